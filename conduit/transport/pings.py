"""Pings that somebody waits for. Those of the heartbeat need no answer: any byte is one."""

from __future__ import annotations

import asyncio
import time

from ..exceptions import ConnectionClosed, Overloaded
from .calls import closed_again
from .outlet import Outlet

__all__ = ["Pings"]


class Pings:
    """The pings of one connection that are on their way.

    Args:
        loop: The event loop.
        outlet: Where they go.
    """

    __slots__ = ("_loop", "_outlet", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, outlet: Outlet) -> None:
        self._loop = loop
        self._outlet = outlet
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def ping(self) -> float:
        """Send a ping, and return the seconds until its answer; see `Connection.ping`."""
        protocol, waiting = self._outlet.protocol, self._waiting
        if not protocol.may_ping():
            raise Overloaded("50 pings within 10 s are the most that are sent")
        id = protocol.session.sent << 8 | len(waiting) & 0xFF
        while id in waiting:
            id += 1
        waiting[id] = answer = self._loop.create_future()
        started = time.perf_counter()  # the loop's clock may stand still within one turn
        protocol.ping(id)
        self._outlet.flush()
        try:
            await answer
        finally:
            waiting.pop(id, None)
        return time.perf_counter() - started

    def ponged(self, id: int) -> None:
        """Take the answer to a ping; nobody waits for those of the heartbeat."""
        answer = self._waiting.get(id)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def fail(self, error: ConnectionClosed) -> None:
        """Tell whoever waits that no answer will come."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(closed_again(error))
