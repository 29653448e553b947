"""Who is connected, by the identity that has logged in."""

from __future__ import annotations

import asyncio

from .exceptions import Unavailable
from .transport.connection import Connection

__all__ = ["Peers"]


class Peers:
    """The connections of a server by identity, each in the order in which they came."""

    def __init__(self) -> None:
        # Any number may share an identity, so those who leave are not to be searched for.
        self._connected: dict[str, dict[Connection, None]] = {}
        self._wanted: dict[str, set[asyncio.Future[None]]] = {}

    def add(self, connection: Connection) -> None:
        """Count a connection in, and tell whoever waits for its identity."""
        self._connected.setdefault(connection.identity, {})[connection] = None
        for waiter in self._wanted.pop(connection.identity, ()):
            if not waiter.done():
                waiter.set_result(None)

    def discard(self, connection: Connection) -> None:
        """Count a connection out."""
        same = self._connected.get(connection.identity)
        if same is not None and connection in same:
            del same[connection]
            if not same:
                del self._connected[connection.identity]

    def of(self, identity: str) -> list[Connection]:
        """Return the connections of an identity, the oldest first."""
        return list(self._connected.get(identity, ()))

    async def find(self, identity: str, seconds: float) -> Connection:
        """Return the newest connection of an identity, and wait for one if there is none.

        One that is away is only returned if there is no other.

        Raises:
            Unavailable: There was none for so many seconds.
        """
        if identity not in self._connected and seconds > 0:
            await self._wait(identity, seconds)
        connections = self.of(identity)
        if not connections:
            details = {"executed": False, "retryable": True}
            raise Unavailable(f"nobody is connected as {identity!r}", details=details)
        return next((one for one in reversed(connections) if not one.away), connections[-1])

    async def _wait(self, identity: str, seconds: float) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(identity, set()).add(waiter)
        try:
            await asyncio.wait([waiter], timeout=seconds)
        finally:
            waiters = self._wanted.get(identity, set())
            waiters.discard(waiter)
            if not waiters:
                self._wanted.pop(identity, None)
