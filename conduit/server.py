"""The server: handlers, a listening socket, and the connections that it has accepted."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import math
import signal
import ssl
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast, overload

from .clients import Clients
from .descriptors import Address, ServerDescriptor
from .exceptions import ConnectionClosed
from .hooks import Hooks
from .protocol.frames import HEADER, PRIORITY, FrameType, word
from .roles import Roles
from .rpc.method import Example
from .rpc.router import Router
from .transport.background import Background
from .transport.connection import CANCEL_TIME, Connection
from .transport.listeners import Listener, bind
from .transport.loop import Shared, milliseconds
from .transport.messages import encode_message
from .transport.tls import shown_by
from .transport.watchdog import Watchdog
from .users import Users

__all__ = ["Server"]

logger = logging.getLogger("conduit.server")

F = TypeVar("F", bound=Callable[..., Any])
ServerHook = TypeVar("ServerHook", bound="Callable[[Server], Any]")
ConnectionHook = TypeVar("ConnectionHook", bound="Callable[[Connection[Any]], Any]")
LossHook = TypeVar("LossHook", bound="Callable[[Connection[Any], ConnectionClosed], Any]")
T = TypeVar("T")

_BROADCAST = word(FrameType.MESSAGE, PRIORITY)

Exclude = Connection[Any] | str | Iterable["Connection[Any] | str"] | None


class Server:
    """Serves handlers to the clients that log in.

    Args:
        descriptor: A `ServerDescriptor`; or a URL (`tcp://host:port`, `tls://host:port`), or
            nothing, with the descriptor's fields as keywords.

    Raises:
        pydantic.ValidationError: A field is unknown or does not fit.
    """

    def __init__(self, descriptor: ServerDescriptor | str | None = None, **fields: Any) -> None:
        self.descriptor = _descriptor(descriptor, fields)
        self.name = self.descriptor.name
        self.version = self.descriptor.version
        self._router = Router(with_connection=True)
        self._users = Users(self.descriptor)
        self._hooks = Hooks(logger)
        self._clients = Clients(self.descriptor, self._router, self._users, self._hooks)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Listener | None = None
        self._watchdog: Watchdog | None = None
        self._address: tuple[str, int] | None = None
        self._tasks = Background(logger)
        self._stopping: asyncio.Event | None = None
        self._hurried: asyncio.Event | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        where = "not serving" if self._address is None else "at {}:{}".format(*self._address)
        return f"<Server {self.name!r} {where}>"

    # Handlers and hooks.

    def on(
        self,
        name: str,
        *,
        concurrent: bool = False,
        thread: bool | None = None,
        requires: Roles = (),
    ) -> Callable[[F], F]:
        """Register a handler for messages: `async def handler(connection, message)`.

        What it returns goes back to the sender: as the answer when the sender used `request`, else
        as the message `<name>_response`. Messages of one connection are handled one after another.

        Args:
            name: The message's name.
            concurrent: Run beside other messages of the same connection.
            thread: False runs a plain `def` on the event loop instead of in a thread.
            requires: A role that the sender must have, or several, all of which it must have. The
                message of another is dropped, or answered with `PermissionDenied`.

        Raises:
            ValueError: The name has a handler already.
            TypeError: The signature does not fit, or an annotation cannot be resolved.
        """
        return self._router.message_decorator(
            name, concurrent=concurrent, thread=thread, requires=requires
        )

    @overload
    def rpc(self, function: F, /) -> F: ...

    @overload
    def rpc(
        self,
        name: str | None = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
        requires: Roles = (),
    ) -> Callable[[F], F]: ...

    def rpc(
        self,
        name: Any = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
        requires: Roles = (),
    ) -> Any:
        """Register a method: `@server.rpc`, or `@server.rpc("name", timeout=5)`.

        Parameters are validated by their annotations, the result by the return annotation. A
        parameter annotated with `Connection` is filled in. A plain `def` runs in a thread.

        Args:
            name: The name on the wire; the function's own by default.
            timeout: Seconds that it may run at most.
            extra: `"ignore"` drops unknown parameters instead of refusing the call.
            thread: False runs a plain `def` on the event loop instead of in a thread.
            deprecated: Tells callers not to use it any more; text says what to use instead. The
                decorator `warnings.deprecated` on the function says the same.
            examples: Parameters of calls that show how it is used, each as `rpc.call` takes them,
                for `discover`; the items of a stream that the caller sends are a list.
            requires: A role that the caller must have, or several, all of which it must have; see
                `User`. Anybody else gets `PermissionDenied` before the parameters are looked at,
                and discovery does not show the method.

        Raises:
            ValueError: The name has a handler already, or an example does not fit.
            TypeError: The signature cannot be served, or an annotation cannot be resolved.
        """
        return self._router.method_decorator(
            name,
            timeout=timeout,
            extra=extra,
            thread=thread,
            deprecated=deprecated,
            examples=examples,
            requires=requires,
        )

    def serve(self, interface: type[Any], implementation: object, *, requires: Roles = ()) -> None:
        """Register the methods of an interface; `rpc.bind(interface)` is how they are called.

        Parameters, results and items are validated by the annotations of the interface. The
        implementation may take a `Connection` beside the parameters of the interface, which is
        filled in. Its methods are served as by `rpc`: a plain `def` runs in a thread.

        Args:
            interface: A `typing.Protocol`, an ABC or another class; see `Caller.bind`.
            implementation: An object with all the methods of the interface: for a stream a
                generator, a plain `def` that returns an async iterator, or, as for
                `-> StreamCall[T, R]`, `async def` with a parameter `Stream[T]` that returns `R`.
            requires: The roles that a caller of any of the methods must have, as for `rpc`. What
                needs other roles is an interface of its own; one object may implement several.

        Raises:
            ValueError: One of the names has a handler already; then none is registered.
            TypeError: A method is missing or does not fit, or the interface cannot be served; the
                text says which and why.
        """
        self._router.add_interface(interface, implementation, requires=requires)

    @overload
    def on_startup(self, function: ServerHook) -> ServerHook: ...
    @overload
    def on_startup(self) -> Callable[[ServerHook], ServerHook]: ...
    def on_startup(self, function: Any = None) -> Any:
        """Register a hook `(server)` that runs once the address is known, before any client."""
        return self._hooks.decorator("startup", function)

    @overload
    def on_shutdown(self, function: ServerHook) -> ServerHook: ...
    @overload
    def on_shutdown(self) -> Callable[[ServerHook], ServerHook]: ...
    def on_shutdown(self, function: Any = None) -> Any:
        """Register a hook `(server)` that runs when every connection has ended."""
        return self._hooks.decorator("shutdown", function)

    @overload
    def on_client_connect(self, function: ConnectionHook) -> ConnectionHook: ...
    @overload
    def on_client_connect(self) -> Callable[[ConnectionHook], ConnectionHook]: ...
    def on_client_connect(self, function: Any = None) -> Any:
        """Register a hook `(connection)` that runs after the login, before any handler.

        A hook that raises refuses the client; the text of an `RPCError` reaches it. Messages that
        the hook sends arrive first. It cannot call the client, which is not in yet; a task of
        `start_task` can.
        """
        return self._hooks.decorator("client_connect", function)

    @overload
    def on_client_away(self, function: LossHook) -> LossHook: ...
    @overload
    def on_client_away(self) -> Callable[[LossHook], LossHook]: ...
    def on_client_away(self, function: Any = None) -> Any:
        """Register a hook `(connection, reason)` that runs when a client has lost its link.

        Its session is kept for `resume_ttl` seconds: what is sent to it waits, and so do calls.
        Then comes `on_client_return` or `on_client_disconnect`. The hooks of one connection run one
        after another.
        """
        return self._hooks.decorator("client_away", function)

    @overload
    def on_client_return(self, function: ConnectionHook) -> ConnectionHook: ...
    @overload
    def on_client_return(self) -> Callable[[ConnectionHook], ConnectionHook]: ...
    def on_client_return(self, function: Any = None) -> Any:
        """Register a hook `(connection)` that runs when a client goes on with its session."""
        return self._hooks.decorator("client_return", function)

    @overload
    def on_client_disconnect(self, function: LossHook) -> LossHook: ...
    @overload
    def on_client_disconnect(self) -> Callable[[LossHook], LossHook]: ...
    def on_client_disconnect(self, function: Any = None) -> Any:
        """Register a hook `(connection, reason)` that runs once when a client has gone for good.

        `reason` is the `ConnectionClosed` that the connection ended with.
        """
        return self._hooks.decorator("client_disconnect", function)

    # Life.

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server listens on; the real port when the descriptor says 0.

        Raises:
            RuntimeError: The server has not started.
        """
        if self._address is None:
            raise RuntimeError("the server has no address before it starts")
        return self._address

    @property
    def connections(self) -> Mapping[str, Connection[Any]]:
        """The clients that are logged in, by connection id; `away` says who has lost the link."""
        return MappingProxyType(self._clients.connected)

    async def peer(self, identity: str, *, wait: float = 0.0) -> Connection[Any]:
        """Find a client by who has logged in; of several the one that came last.

        Cancelling the wait changes nothing.

        Args:
            identity: The user name that the client has logged in with.
            wait: Seconds to wait for the client, if it is not connected now.

        Raises:
            Unavailable: Nobody has been connected as that. A handler may let it go on to its
                caller, who may try again. With an idempotency key that is kept as the answer, as
                every error of the library that a handler lets out; with one, `raise
                Unavailable(...) from error` to have the call run again.
        """
        return await self._clients.peers.find(identity, wait)

    async def start(self) -> None:
        """Bind the socket, run the startup hooks, then accept clients.

        Raises:
            OSError: The address cannot be listened on; a certificate cannot be read.
            ssl.SSLError: Certificate and key do not fit.
            ValueError: There is no password, and the address is not a loopback one.
            RuntimeError: The server runs already.
        """
        if self._starting is not None or self._address is not None:
            self._check_loop()
            raise RuntimeError("the server runs already")
        self._starting = starting = asyncio.get_running_loop().create_task(self._start())
        try:
            await starting
        except asyncio.CancelledError:
            if self._starting is not starting:
                raise RuntimeError("the server was stopped while it started") from None
            raise
        finally:
            self._starting = None

    async def _start(self) -> None:
        descriptor = self.descriptor
        address = Address(
            host=_host(descriptor), port=descriptor.port, tls=descriptor.tls is not None
        )
        self._check_exposure(address)
        shown = shown_by(descriptor.tls) if descriptor.tls is not None else None
        await self._users.prepare()
        for roles in self._users.roles:
            self._router.fingerprint(roles)  # made now, and not while the first client waits
        listening = await bind(address, ipv6=descriptor.ipv6)
        self._address = listening.getsockname()[:2]
        try:
            await self._hooks.ask("startup", self)
        except BaseException:
            listening.close()
            self._address = None
            await self._tasks.cancel()
            raise
        self._listener = Listener(
            listening,
            shown,
            self._clients.admission,
            self._clients.connect,
            patience=descriptor.limits.login_timeout,
        )
        self._loop = loop = asyncio.get_running_loop()
        if descriptor.watchdog is not None:
            self._watchdog = Watchdog(loop, Shared.of(loop).handling, descriptor.watchdog)
        logger.info("%s listens on %s:%s", self.name, *self.address)

    def _check_exposure(self, address: Address) -> None:
        """Refuse to serve everybody without a password; warn about plain TCP."""
        descriptor = self.descriptor
        if _is_loopback(address.host):
            return
        if self._users.anybody:
            raise ValueError(
                f"{address} can be reached from other machines, so the server needs a password, "
                "a verifier or users; or listen on 127.0.0.1"
            )
        if descriptor.tls is None:
            logger.warning(
                "%s serves plain TCP to other machines: messages can be read and changed on the "
                "way; use tls=TLS(certificate=..., key=...)",
                address,
            )

    def reload_tls(self) -> None:
        """Read the files of `tls=TLS(...)` again, for the connections that come from now on.

        Those that are up stay as they are. When it raises, nothing has changed.

        Raises:
            OSError, ssl.SSLError, ValueError: The files cannot be used; as `start`.
            RuntimeError: The server does not run, or there are no files: it serves plain TCP, or
                `tls` is a context, which can be loaded again by whoever has made it.
        """
        tls, listener = self.descriptor.tls, self._listener
        if listener is None:
            raise RuntimeError("the server does not run; start() reads the certificate")
        if tls is None or isinstance(tls, ssl.SSLContext):
            raise RuntimeError("the server has no TLS(certificate=...) that could be read again")
        listener.tls = shown_by(tls)
        logger.info("%s shows the certificate %s from now on", self.name, tls.certificate)

    async def stop(self, grace: float = 5.0) -> None:
        """Stop: accept nobody, let running handlers end, close every connection.

        May be called at any time and more than once, and from a handler, which is then cancelled
        with its connection. Whoever calls it while the server stops waits for the same end, within
        the grace of the first call, but for a hook on_shutdown, for which that end waits.
        Cancelling it leaves the server stopping.

        Args:
            grace: Seconds that running handlers have; then they are cancelled. Their clean-up, the
                close of peers that do not read, and hooks have what is left of it, and each at
                least a second.

        Raises:
            RuntimeError: The server was started in another event loop.
            ValueError: The grace is no number of seconds.
        """
        _check_grace(grace)
        starting, self._starting = self._starting, None
        if starting is not None:
            starting.cancel()
            # It may wait for this task, or be it, where a hook of the start stops the server.
            await asyncio.wait([starting])
        if self._ending is None:
            if self._listener is None:
                return
            self._check_loop()
            ending = self._stop(grace, asyncio.current_task())
            self._ending = asyncio.get_running_loop().create_task(ending)
        if self._ending is not asyncio.current_task():  # of a hook on_shutdown
            await asyncio.shield(self._ending)

    def _check_loop(self) -> None:
        """Refuse to work in another event loop, where it would wait for ever."""
        if self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "the server was started in another event loop; start and stop it within one "
                "asyncio.run(...)"
            )

    async def _stop(self, grace: float, caller: asyncio.Task[Any] | None) -> None:
        listener, self._listener = self._listener, None
        assert listener is not None
        await listener.close()
        if self._stopping is not None:
            self._stopping.set()
        loop = asyncio.get_running_loop()
        until = loop.time() + grace
        if await self._drain(grace, caller):
            left = max(until - loop.time(), CANCEL_TIME)
        else:
            left = 0.0
            await self._clients.drain(left, caller)
        await self._tasks.cancel(caller)
        await self._clients.finish(left, caller)
        await self._hooks.tell("shutdown", self)
        await self._tasks.cancel(caller)  # what hooks have started
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.stop()
        self._address = self._ending = self._loop = None
        logger.info("%s has stopped", self.name)

    async def _drain(self, grace: float, caller: asyncio.Task[Any] | None) -> bool:
        """Let the clients end what they do; False when a second signal does not leave them time."""
        draining = asyncio.ensure_future(self._clients.drain(grace, caller))
        if self._hurried is None:
            await draining
            return True
        hurried = asyncio.ensure_future(self._hurried.wait())
        await asyncio.wait([draining, hurried], return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if draining.done():
            await draining
            return True
        draining.cancel()
        await asyncio.wait([draining])
        return False

    async def run(self, *, signals: bool = True, grace: float = 5.0) -> None:
        """Serve until cancelled, stopped, or told to end by SIGINT or SIGTERM.

        A second signal ends the grace: handlers are cancelled at once. A thread that runs a plain
        `def` cannot be ended, and the process waits for it as always.

        Args:
            signals: False leaves the signals of the process alone.
            grace: Seconds that running handlers have in the end; see `stop`.

        Raises:
            OSError, ValueError, ssl.SSLError: As `start`.
        """
        _check_grace(grace)
        stopping = self._stopping = asyncio.Event()
        hurried = self._hurried = asyncio.Event()

        def stop() -> None:
            (hurried if stopping.is_set() else stopping).set()

        with _handled_signals(stop) if signals else contextlib.nullcontext():
            await self.start()
            try:
                await stopping.wait()
            finally:
                await self.stop(grace)
                self._stopping = self._hurried = None

    async def __aenter__(self: T) -> T:
        await cast("Server", self).start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def start_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine beside the handlers; it is cancelled when the server stops.

        It inherits nothing of the handler that starts it. An exception is logged.
        """
        return self._tasks.start(coroutine)

    # Messages to many.

    async def broadcast(
        self, name: str, data: Any = None, *, exclude: Exclude = None, reliable: bool = False
    ) -> int:
        """Send a message to every client, and never wait for one.

        Args:
            name: The name of the clients' handler.
            data: Plain data, a dataclass or a Pydantic model; encoded once.
            exclude: A connection, its id, or several of either, that get nothing.
            reliable: Send everyone a message of their own, kept until it is acknowledged. A client
                that lets more than its outbox pile up is closed. Without it, a client that does not
                keep up misses the message.

        Returns:
            The number of clients that it was sent to.
        """
        connections = self._clients.connected
        if not connections:
            return 0
        shared = Shared.of(asyncio.get_running_loop())
        payload = encode_message(shared.encoder, name, data)
        left_out = _ids(exclude)
        chosen = [connection for id, connection in connections.items() if id not in left_out]
        if reliable:
            limit = self.descriptor.limits.outbox_bytes
            return sum(connection.send_reliably(payload, limit) for connection in chosen)
        frame = HEADER.pack(_BROADCAST, len(payload), 0, milliseconds(), 0) + payload
        return sum(connection.push(frame) for connection in chosen)


def _descriptor(
    descriptor: ServerDescriptor | str | None, fields: dict[str, Any]
) -> ServerDescriptor:
    if isinstance(descriptor, ServerDescriptor):
        if fields:
            raise TypeError(f"give a descriptor or its fields, not both: {', '.join(fields)}")
        return descriptor
    if isinstance(descriptor, str):
        address = Address.parse(descriptor)
        if address.tls != (fields.get("tls") is not None):
            raise ValueError(
                f"{descriptor}: a tls:// URL goes with tls=TLS(certificate=..., key=...)"
            )
        fields = {"host": address.host, "port": address.port, **fields}
    elif descriptor is not None:
        raise TypeError(
            "a server takes a ServerDescriptor, a URL, or fields such as port=..., "
            f"not {descriptor!r:.80}"
        )
    return ServerDescriptor(**fields)


def _check_grace(grace: float) -> None:
    """Refuse a grace that clients could not be told, before anything is stopped."""
    if not math.isfinite(grace):
        raise ValueError(f"grace must be a number of seconds, not {grace}")


def _host(descriptor: ServerDescriptor) -> str:
    return "::" if descriptor.ipv6 and descriptor.host == "0.0.0.0" else descriptor.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ids(exclude: Exclude) -> frozenset[str]:
    """Return the ids of whoever is left out."""
    if exclude is None:
        return frozenset()
    if isinstance(exclude, (Connection, str)):
        exclude = (exclude,)
    return frozenset(one if isinstance(one, str) else one.id for one in exclude)


@contextlib.contextmanager
def _handled_signals(stop: Callable[[], None]) -> Any:
    """Have SIGINT and SIGTERM call `stop`, where signals can be handled at all."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    with contextlib.suppress(NotImplementedError):  # Windows' loops have no signal handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, stop)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
