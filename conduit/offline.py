"""What a client does while it has no connection: it refuses, or it waits for the next one."""

from __future__ import annotations

import asyncio
import enum
import math
from typing import Any

from .exceptions import ConnectionClosed, RPCTimeout
from .transport.calls import closed_again
from .transport.connection import Connection
from .transport.handling import HANDLING, inherit
from .transport.hooked import AT, hook_of_caller
from .transport.requests import DEFAULT, Default, Headers, Params
from .transport.stream import Check
from .transport.stream_call import OpenCall

__all__ = ["Offline", "Status"]


class Status(enum.Enum):
    """Where a client stands."""

    IDLE = "idle"
    CONNECTING = "connecting"
    READY = "ready"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


_MAY_HAVE_SENT = {"connect", "resume", "reconnect"}
"""Hooks that may have sent something to an earlier server, and still run at the next."""

_NOT_CONNECTED = {
    Status.IDLE: "the client is not connected; await client.connect() first",
    Status.CONNECTING: "the client is still connecting",
    Status.RECONNECTING: "the connection was lost and is being made again",
    Status.CLOSED: "the client has disconnected",
    Status.READY: "the connection has just been lost",
}


class Offline:
    """Refuses what needs a connection while there is none, or has it wait for the next.

    It waits behind a server that has said that it goes away: then nothing is lost, only late. What
    such a connection is still asked for comes here as well, see `calls.Elsewhere`. And at a new
    server it lets the hooks `on_reconnect` go first, which tell it what it must know.

    It has the status of the client and not the client itself, which would otherwise know itself and
    so be freed by garbage collections only.
    """

    __slots__ = (
        "_everybody",
        "_first",
        "_timeout",
        "connection",
        "end",
        "status",
        "unprepared",
        "waits",
    )

    def __init__(self, timeout: float | None) -> None:
        self.status = Status.IDLE
        self.connection: Connection | None = None
        self.end: ConnectionClosed | None = None
        self.waits = False
        self.unprepared = False
        self._timeout = timeout
        self._first: asyncio.Future[None] | None = None
        self._everybody: asyncio.Future[None] | None = None

    def become(
        self, status: Status, end: ConnectionClosed | None = None, *, unprepared: bool = False
    ) -> None:
        """Change the status, and tell whoever waits for that.

        Args:
            status: The new one.
            end: Why there will be no connection, unless the application wants none.
            unprepared: Whether hooks go first; see `prepared`.
        """
        self.status, self.end = status, end
        self.waits = self.waits and status is Status.RECONNECTING
        self.unprepared = unprepared
        first, self._first = self._first, None
        _tell(first)
        if not unprepared:
            self._tell_everybody()

    def prepared(self) -> None:
        """Let everybody use the connection: the hooks that come first have ended."""
        self.unprepared = False
        self._tell_everybody()

    def _tell_everybody(self) -> None:
        everybody, self._everybody = self._everybody, None
        _tell(everybody)

    async def ready(self, seconds: float | None, *, in_order: bool = False) -> bool:
        """Wait until there is a connection, so many seconds at most; False if there is none.

        Args:
            seconds: None for no end.
            in_order: Whether it is for a message; see `_goes_first`.
        """
        loop = asyncio.get_running_loop()
        until = math.inf if seconds is None else loop.time() + seconds
        while self._must_wait(in_order) and (left := until - loop.time()) > 0:
            if self._goes_first(in_order):
                change = self._first = self._first or loop.create_future()
            else:
                change = self._everybody = self._everybody or loop.create_future()
            await asyncio.wait([change], timeout=None if left == math.inf else left)
        return self.status is Status.READY and not self._must_wait(in_order)

    def _must_wait(self, in_order: bool) -> bool:
        return self.status in (Status.CONNECTING, Status.RECONNECTING) or self._is_behind(in_order)

    def _is_behind(self, in_order: bool) -> bool:
        """Whether whoever asks waits for the hooks that go first."""
        return self.unprepared and not self._goes_first(in_order)

    def _goes_first(self, in_order: bool) -> bool:
        """Whether a hook asks, or a handler of what the new server asks for meanwhile.

        Args:
            in_order: Whether it is for a message, which must not overtake those that an earlier
                server has not handled: they are sent behind the hooks.
        """
        hook = hook_of_caller()
        if hook is not None and not (in_order and hook in _MAY_HAVE_SENT):
            return True
        if hook is None and HANDLING.get() is None:
            return False
        return self.connection is not None and AT.get() == self.connection.id

    def error(self) -> ConnectionClosed:
        """Return the error that says why there is no connection."""
        if self.end is not None:
            return closed_again(self.end)
        return ConnectionClosed(_NOT_CONNECTED[self.status])

    async def _next(
        self, name: str, timeout: float | None | Default, *, in_order: bool = False
    ) -> tuple[Connection, float | None]:
        """Wait for the next connection, if there will be one; the seconds that are left go with it.

        Raises:
            RPCTimeout: There was none in time.
            ConnectionClosed: There will be none.
        """
        seconds = self._timeout if isinstance(timeout, Default) else timeout
        handling = HANDLING.get()
        if handling is not None:
            seconds = inherit(handling, seconds)
        now = asyncio.get_running_loop().time
        deadline = math.inf if seconds is None else now() + seconds
        left = seconds
        while self.waits or self._is_behind(in_order):
            await self.ready(left, in_order=in_order)
            left = None if seconds is None else round(deadline - now(), 3)
            if left is not None and left <= 0:
                raise RPCTimeout(
                    f"{name!r} waited {seconds} s for the connection to be made again",
                    details={"retryable": True, "executed": False},
                )
        if self.connection is None:
            raise self.error()
        return self.connection, left

    async def call(
        self,
        method: str,
        args: Params = None,
        timeout: float | None | Default = DEFAULT,
        whole: bool = False,
        headers: Headers = None,
        key: str | None = None,
    ) -> Any:
        """Make a call by the next connection."""
        connection, left = await self._next(method, timeout)
        return await connection.call(method, args, left, whole, headers, key)

    async def stream(
        self,
        method: str,
        args: Params,
        timeout: float | None,
        check: Check | None,
        headers: Headers,
    ) -> OpenCall:
        """Make a call with streams by the next connection."""
        connection, left = await self._next(method, timeout)
        return await connection.stream(method, args, left, check, headers)

    async def send(self, name: str, data: Any, *, ack: bool = False) -> None:
        """Send a message over the next connection."""
        connection, _ = await self._next(name, None, in_order=True)
        await connection.send(name, data, ack=ack)

    async def request(
        self, name: str, data: Any, timeout: float | None | Default, returns: Any = None
    ) -> Any:
        """Send a message over the next connection and return what its handler answers."""
        connection, left = await self._next(name, timeout)
        return await connection.request(name, data, timeout=left, returns=returns)


def _tell(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None:
        waiting.set_result(None)
