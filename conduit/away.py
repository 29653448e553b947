"""The clients that have lost their links, and whose sessions are kept until they come back."""

from __future__ import annotations

import asyncio

from .exceptions import ConnectionClosed
from .protocol.frames import CloseCode
from .transport.connection import Connection

__all__ = ["Away"]

LOOK = 1.0
"""Seconds after which the bytes that wait for clients are counted again."""


class Away:
    """The connections of a server that wait for another link.

    Each ends by itself when its time is up. Here they end earlier, the one that has waited longest
    first, when there are too many of them or when too much waits in them.

    Args:
        most: How many there may be.
        most_bytes: How many bytes may wait in all of them.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._waiting: dict[Connection, None] = {}
        self._timer: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, connection: Connection) -> None:
        """Count a connection in that has lost its link.

        Nothing ends before the event loop has run what is ready: a client that comes over another
        link while the old one is still up is away for no longer than that.
        """
        self._waiting[connection] = None
        self._forget_timer()
        self._timer = asyncio.get_running_loop().call_soon(self._look)

    def discard(self, connection: Connection) -> None:
        """Count a connection out: its client is back, or it has ended."""
        self._waiting.pop(connection, None)
        if not self._waiting:
            self._forget_timer()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """End what is too much, and look again later: senders may go on."""
        while len(self._waiting) > self._most:
            self._end(f"more than {self._most} clients are away (max_away)")
        kept = sum(connection.weigh() for connection in self._waiting)
        while kept > self._most_bytes:
            kept -= self._end(f"more than {self._most_bytes} bytes wait (max_away_bytes)")
        self._forget_timer()
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(LOOK, self._look)

    def _end(self, why: str) -> int:
        """End the one that has waited longest, and return the bytes that have waited in it."""
        oldest = next(iter(self._waiting))
        kept = oldest.weigh()
        reason = f"the client is away, and {why}"
        oldest.fail(ConnectionClosed(reason), CloseCode.ABNORMAL, reason)
        return kept
