"""What waits in all connections of one side together: bounded, at the cost of who holds most of it.

No byte is counted as it comes and goes, which would cost every call something. Instead a connection
is weighed as a whole, at moments that are rare beside the calls: when its outbox has grown by
`STEP`, when it begins to take a large frame, when it has to hold answers, five times a second if it
takes anything in, and with its heartbeat. Room is made at the end of the batch that it grew in, or
as soon as the event loop gets round to it. What is light is not kept in mind, so idle connections
cost nothing here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Final, Protocol

__all__ = ["STEP", "Buffers"]

logger = logging.getLogger("conduit.connection")

STEP: Final = 64 * 1024
"""Bytes from which a connection counts, and by which its outbox may grow before it is weighed."""


class Holder(Protocol):
    """What `Buffers` needs of a connection."""

    def weigh(self) -> int:
        """Return the bytes that wait in it."""
        ...

    def overflow(self, reason: str) -> None:
        """End, and let go of what waits."""


class Buffers:
    """The connections in which much waits.

    Args:
        most: Bytes that may wait in all of them.
    """

    def __init__(self, most: float = math.inf) -> None:
        self._most = most
        self._sizes: dict[Holder, int] = {}
        self._total = 0

    def count(self, holder: Holder) -> None:
        """Weigh a connection. If too much waits in all, some end when what is ready has run."""
        if self._most == math.inf:
            return
        self._weigh(holder)
        if self._total > self._most:
            asyncio.get_running_loop().call_soon(self.relieve)

    def forget(self, holder: Holder) -> None:
        """Count a connection out: it has ended."""
        self._total -= self._sizes.pop(holder, 0)

    def relieve(self) -> None:
        """End the connections that hold most, if too much waits in all of them, until it does not.

        Not to be called from inside a handler, which may be one of theirs.
        """
        if self._total > self._most:
            for holder in list(self._sizes):  # some may hold less by now
                self._weigh(holder)
        while self._total > self._most:
            worst = max(self._sizes, key=self._sizes.__getitem__)
            size, total = self._sizes[worst], self._total
            why = f"{size} bytes wait for this peer, {total} for all; {self._most} is the most"
            logger.warning("closing %r: %s (max_buffered)", worst, why)
            worst.overflow(f"{why} (max_buffered)")
            self.forget(worst)

    def _weigh(self, holder: Holder) -> None:
        size = holder.weigh()
        self._total += size - self._sizes.pop(holder, 0)
        if size >= STEP:
            self._sizes[holder] = size
        else:
            self._total -= size
