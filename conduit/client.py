"""The client as users hold it: handlers, hooks and messages; its connection is `ClientLife`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

from .client_caller import ClientCaller
from .client_life import ClientLife
from .descriptors import ClientDescriptor
from .exceptions import ConnectionClosed
from .offline import Status
from .transport.connection import Connection
from .transport.requests import DEFAULT, Default

__all__ = ["Client", "ClientCaller", "Status"]

F = TypeVar("F", bound=Callable[..., Any])
ClientHook = TypeVar("ClientHook", bound="Callable[[Client], Any]")
LossHook = TypeVar("LossHook", bound="Callable[[Client, ConnectionClosed], Any]")
T = TypeVar("T")


class Client(ClientLife):
    """Connects to a server, calls its methods and handles its messages.

    Args:
        target: A `ClientDescriptor`; or a URL (`tcp://host:port`, `tls://host:port`), several of
            them, or nothing, with the descriptor's fields as keywords.

    Attributes:
        rpc: Calls the server: `await client.rpc.call("add", {"a": 1})` or `client.rpc.add(a=1)`.

    Raises:
        pydantic.ValidationError: A field is unknown or does not fit.
    """

    def __init__(
        self, target: ClientDescriptor | str | Sequence[str] | None = None, **fields: Any
    ) -> None:
        super().__init__(_descriptor(target, fields))

    def __repr__(self) -> str:
        servers = ", ".join(map(str, self.descriptor.addresses))
        return f"<Client {self.descriptor.name!r} of {servers} {self.status.value}>"

    # Handlers and hooks.

    def on(
        self, name: str, *, concurrent: bool = False, thread: bool | None = None
    ) -> Callable[[F], F]:
        """Register a handler for messages of the server: `async def handler(message)`.

        What it returns goes back; see `Server.on`.

        Raises:
            ValueError: The name has a handler already.
            TypeError: The signature does not fit, or an annotation cannot be resolved.
        """
        return self._router.message_decorator(name, concurrent=concurrent, thread=thread)

    def serve(self, interface: type[Any], implementation: object) -> None:
        """Register the methods of an interface, for the server to call; see `Server.serve`.

        Raises:
            ValueError: One of the names has a handler already; then none is registered.
            TypeError: A method is missing or does not fit, or the interface cannot be served.
        """
        self._router.add_interface(interface, implementation)

    @overload
    def on_connect(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_connect(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_connect(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs after the first login."""
        return self._hooks.decorator("connect", function)

    @overload
    def on_disconnect(self, function: LossHook) -> LossHook: ...
    @overload
    def on_disconnect(self) -> Callable[[LossHook], LossHook]: ...
    def on_disconnect(self, function: Any = None) -> Any:
        """Register a hook `(client, reason)` that runs whenever the connection is lost or ends.

        `reason` is the `ConnectionClosed` that says why. If the client connects again, what comes
        next is `on_resume`, or `on_lost` and `on_reconnect`.
        """
        return self._hooks.decorator("disconnect", function)

    @overload
    def on_resume(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_resume(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_resume(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs when the session goes on over another connection.

        Nothing is lost: calls in flight go on, and what was sent in the meantime arrives.
        """
        return self._hooks.decorator("resume", function)

    @overload
    def on_lost(self, function: LossHook) -> LossHook: ...
    @overload
    def on_lost(self) -> Callable[[LossHook], LossHook]: ...
    def on_lost(self, function: Any = None) -> Any:
        """Register a hook `(client, reason)` that runs when the session cannot go on.

        The server has restarted, or has forgotten the client. Calls in flight have failed, what was
        sent and not acknowledged may be lost, and the server knows nothing of this client.
        """
        return self._hooks.decorator("lost", function)

    @overload
    def on_reconnect(self, function: ClientHook) -> ClientHook: ...
    @overload
    def on_reconnect(self) -> Callable[[ClientHook], ClientHook]: ...
    def on_reconnect(self, function: Any = None) -> Any:
        """Register a hook `(client)` that runs after a new session was made with the server.

        What others call and send by the client waits until the hooks have ended, but no longer than
        `connect_timeout`.
        """
        return self._hooks.decorator("reconnect", function)

    # What users call.

    @property
    def status(self) -> Status:
        """Where the client stands; see `Status`."""
        return self._offline.status

    @property
    def connection(self) -> Connection[Any]:
        """The connection.

        Raises:
            ConnectionClosed: The client is not connected; the text says why.
        """
        if self._connection is None:
            raise self._offline.error()
        return self._connection

    @property
    def server_name(self) -> str:
        """What the server calls itself."""
        return self.connection.name

    @property
    def server_version(self) -> str:
        """The version of the server's application."""
        return self.connection.version

    async def send(self, name: str, data: Any = None, *, ack: bool = False) -> None:
        """Send a message to the server; see `Connection.send`."""
        await self._way.send(name, data, ack=ack)

    @overload
    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: type[T],
    ) -> T: ...

    @overload
    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any: ...

    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any:
        """Send a message and return what its handler answers; see `Connection.request`."""
        return await self._way.request(name, data, timeout=timeout, returns=returns)

    async def ping(self) -> float:
        """Measure the time to the server and back, in seconds; see `Connection.ping`."""
        return await self.connection.ping()


def _descriptor(
    target: ClientDescriptor | str | Sequence[str] | None, fields: dict[str, Any]
) -> ClientDescriptor:
    if isinstance(target, ClientDescriptor):
        if fields:
            raise TypeError(f"give a descriptor or its fields, not both: {', '.join(fields)}")
        return target
    if isinstance(target, str):
        fields = {"urls": (target,), **fields}
    elif target is not None:
        if not isinstance(target, Iterable):
            raise TypeError(
                "a client takes a ClientDescriptor, URLs, or fields such as server_port=..., "
                f"not {target!r:.80}"
            )
        fields = {"urls": tuple(target), **fields}
    return ClientDescriptor(**fields)
