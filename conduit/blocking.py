"""A client for threads, scripts and notebooks: the names of `conduit.Client`, without `await`.

    with conduit.blocking.Client("tcp://127.0.0.1:8080", password="secret") as client:
        print(client.rpc.add(a=1, b=2))

Each client runs a `conduit.Client` on an event loop of its own, in a daemon thread that lives from
`connect` to `disconnect`. Every method hands its work to that loop and waits for the result.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar, overload

from . import client as asynchronous
from .descriptors import ClientDescriptor
from .exceptions import ConnectionClosed
from .hooks import check_hook
from .rpc.blocking_caller import BLOCKING, BlockingCaller, StreamCall
from .rpc.contract import called
from .rpc.method import Example
from .transport import limited
from .transport.connection import Connection
from .transport.loop_thread import LoopThread
from .transport.requests import DEFAULT, Default
from .transport.threads import run_in_thread

__all__ = ["Client", "ClientCaller", "StreamCall"]

F = TypeVar("F", bound=Callable[..., Any])
ClientHook = TypeVar("ClientHook", bound="Callable[[Client], Any]")
LossHook = TypeVar("LossHook", bound="Callable[[Client, ConnectionClosed], Any]")
P = ParamSpec("P")
S = TypeVar("S", bound="Client")
T = TypeVar("T")


class ClientCaller(BlockingCaller):
    """`client.rpc`: calls the server, and registers methods that the server may call."""

    def __init__(
        self,
        rpc: asynchronous.ClientCaller,
        thread: Callable[[], LoopThread],
        connection_id: Callable[[], str],
    ) -> None:
        super().__init__(rpc, thread, connection_id)
        self._register = rpc

    def bind(self, interface: Callable[..., T], *, check: bool = True) -> T:
        """Return an object that calls the server by the methods of an interface, and waits.

        See `BlockingCaller.bind`, and `conduit.Client` for the check.

        Args:
            interface: A class whose methods are plain `def`; streams are `Iterator[T]`.
            check: False leaves out the comparison with what the server offers.

        Raises:
            TypeError: The interface has something that cannot be called; the text says what.
        """
        bound = super().bind(interface)
        if check:
            self._register.expected.add(interface, BLOCKING)
        return bound

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(
        self,
        name: str | None = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
    ) -> Callable[[F], F]: ...

    def __call__(
        self,
        name: Any = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
    ) -> Any:
        """Register a method that the server may call; see `Server.rpc`.

        A plain `def` runs in a thread, where it may use the client.
        """
        return self._register(
            name,
            timeout=timeout,
            extra=extra,
            thread=thread,
            deprecated=deprecated,
            examples=examples,
        )


class Client:
    """Connects to a server, for threads: the methods of `conduit.Client`, which wait.

    All of it may be used from many threads at once. Handlers and hooks that are plain `def` run in
    threads, where they may use the client; those that are `async def` run on the client's event
    loop, where waiting methods raise RuntimeError, and await those of `client.connection`.

    Args:
        target: A `ClientDescriptor`; or a URL, several of them, or nothing, with the descriptor's
            fields as keywords.
        loop_factory: Makes the event loop, such as `uvloop.new_event_loop`.

    Attributes:
        rpc: Calls the server: `client.rpc.call("add", {"a": 1})` or `client.rpc.add(a=1)`.

    Raises:
        pydantic.ValidationError: A field is unknown or does not fit.
    """

    def __init__(
        self,
        target: ClientDescriptor | str | Sequence[str] | None = None,
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
        **fields: Any,
    ) -> None:
        self._client = asynchronous.Client(target, **fields)
        self._loop_factory = loop_factory
        self._lock = threading.Lock()
        self._thread: LoopThread | None = None
        self.rpc = ClientCaller(self._client.rpc, self._started, lambda: self.connection.id)

    def __repr__(self) -> str:
        return f"<blocking.{repr(self._client)[1:]}"

    # Handlers and hooks.

    def on(
        self, name: str, *, concurrent: bool = False, thread: bool | None = None
    ) -> Callable[[F], F]:
        """Register a handler for messages of the server: `def handler(message)`.

        See `conduit.Client.on`.
        """
        return self._client.on(name, concurrent=concurrent, thread=thread)

    def serve(self, interface: type[Any], implementation: object) -> None:
        """Register the methods of an interface, for the server to call; see `Server.serve`.

        Raises:
            ValueError: One of the names has a handler already; then none is registered.
            TypeError: A method is missing or does not fit, or the interface cannot be served.
        """
        self._client.serve(interface, implementation)

    @overload
    def on_connect(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_connect(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_connect(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs after the first login."""
        return self._hook("connect", self._client.on_connect, function)

    @overload
    def on_disconnect(self, function: LossHook) -> LossHook: ...
    @overload
    def on_disconnect(self) -> Callable[[LossHook], LossHook]: ...
    def on_disconnect(self, function: Any = None) -> Any:
        """Register a hook `(client, reason)` that runs whenever the connection is lost or ends."""
        return self._hook("disconnect", self._client.on_disconnect, function)

    @overload
    def on_resume(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_resume(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_resume(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs when the session goes on; nothing is lost."""
        return self._hook("resume", self._client.on_resume, function)

    @overload
    def on_lost(self, function: LossHook) -> LossHook: ...
    @overload
    def on_lost(self) -> Callable[[LossHook], LossHook]: ...
    def on_lost(self, function: Any = None) -> Any:
        """Register a hook `(client, reason)` that runs when the session cannot go on."""
        return self._hook("lost", self._client.on_lost, function)

    @overload
    def on_reconnect(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_reconnect(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_reconnect(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs after a new session was made with the server."""
        return self._hook("reconnect", self._client.on_reconnect, function)

    def _hook(self, name: str, register: Callable[[Any], Any], function: Any) -> Any:
        def add(function: F) -> F:
            check_hook(name, function)
            register(partial(self._tell, function))
            return function

        return add if function is None else add(function)

    async def _tell(self, hook: Callable[..., Any], _: asynchronous.Client, *rest: Any) -> None:
        if inspect.iscoroutinefunction(called(hook)):
            await hook(self, *rest)
        else:
            await run_in_thread(asyncio.get_running_loop(), partial(hook, self, *rest))

    # Life.

    def connect(self, *, retry: bool = False) -> None:
        """Connect and log in; arguments and errors are those of `conduit.Client.connect`.

        Ctrl-C leaves the client unconnected. A handler or hook of a client that disconnects cannot
        connect it again, because the client waits for it: that is a RuntimeError.
        """
        thread, made = self._thread, False
        if thread is None or not thread.waits_for_caller:
            thread, made = self._take_thread()
        elif thread.left:
            raise RuntimeError(
                "the client disconnects, and waits for this handler or hook to end; "
                "it can connect again after that"
            )
        try:
            thread.run(self._client.connect, retry=retry)
        except BaseException:
            if made:
                thread.leave()
            raise

    def _take_thread(self) -> tuple[LoopThread, bool]:
        """Return the thread, and whether it was made for this."""
        with self._lock:
            thread = self._thread
            if thread is not None and not thread.left:
                return thread, False
            if thread is not None:
                thread.wait()  # it may still say goodbye
            thread = self._thread = LoopThread(self._loop_factory, self._client.disconnect)
            return thread, True

    def disconnect(self) -> None:
        """Close the connection and stay disconnected; calls in flight fail.

        May be called at any time and more than once, also by handlers, for which it does not wait.
        """
        if self._thread is not None:
            self._thread.leave()

    def wait_closed(self, timeout: float | None = None) -> None:
        """Wait until the client has disconnected for good; Ctrl-C changes nothing.

        Args:
            timeout: Seconds; None waits for ever.

        Raises:
            TimeoutError: It has not disconnected by then.
        """
        if timeout is not None and math.isnan(timeout):  # which would break the event loop
            raise ValueError("timeout must be a number of seconds, or None, not nan")
        if self._thread is None:
            return
        try:
            self._thread.run(self._closed_within, timeout)
        except ConnectionClosed:
            return  # it has disconnected before the wait began
        except asyncio.TimeoutError:
            raise TimeoutError(f"the client has not disconnected within {timeout:g} s") from None

    async def _closed_within(self, timeout: float | None) -> None:
        async with limited.timeout(timeout):
            await self._client.wait_closed()

    def __enter__(self: S) -> S:
        self.connect()
        return self

    def __exit__(self, *exc: object) -> None:
        self.disconnect()

    def _started(self) -> LoopThread:
        if self._thread is None:
            raise ConnectionClosed("the client is not connected; call client.connect() first")
        return self._thread

    def _run(
        self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **options: P.kwargs
    ) -> T:
        return self._started().run(function, *args, **options)

    # What users call.

    @property
    def descriptor(self) -> ClientDescriptor:
        """What the client was made with."""
        return self._client.descriptor

    @property
    def status(self) -> asynchronous.Status:
        """See `conduit.Status`."""
        return self._client.status

    @property
    def connection(self) -> Connection[Any]:
        """The connection, to be looked at; its methods are for `async def` handlers and hooks.

        Raises:
            ConnectionClosed: The client is not connected; the text says why.
        """
        self._started()
        return self._client.connection

    @property
    def server_name(self) -> str:
        """What the server calls itself."""
        return self.connection.name

    @property
    def server_version(self) -> str:
        """The version of the server's application."""
        return self.connection.version

    def send(self, name: str, data: Any = None, *, ack: bool = False) -> None:
        """Send a message to the server; see `conduit.Connection.send`."""
        self._run(self._client.send, name, data, ack=ack)

    @overload
    def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: type[T],
    ) -> T: ...

    @overload
    def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any: ...

    def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any:
        """Send a message and return what its handler answers; see `conduit.Connection.request`."""
        return self._run(self._client.request, name, data, timeout=timeout, returns=returns)

    def ping(self) -> float:
        """Measure the time to the server and back, in seconds; see `conduit.Connection.ping`."""
        return self._run(self._client.ping)
