"""A line in which callers wait for their turn, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["NOBODY", "Line"]


class Line:
    """Callers that wait until something has room again.

    The first in line stays in it until it has really gone on, so nobody can slip in before it.
    Whoever has gone on calls `move` when there is room for the next.

    Attributes:
        waiters: Those in line; None or empty when there are none, which costs nothing to ask.
    """

    __slots__ = ("waiters",)

    def __init__(self) -> None:
        self.waiters: deque[asyncio.Future[None]] | None = None

    async def wait(self, deadline: float | None = None, *, again: bool = False) -> None:
        """Wait for the turn.

        Args:
            deadline: When to give up, on the loop's clock.
            again: The turn came and could not be used, so wait at the head of the line.

        Raises:
            asyncio.TimeoutError: The deadline passed in line.
            ConnectionClosed: The line was ended by `fail`.
        """
        if self.waiters is None:
            self.waiters = deque()
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        if again:
            self.waiters.appendleft(turn)
        else:
            self.waiters.append(turn)
        timer = None
        if deadline is not None:
            timer = loop.call_at(deadline, _expire, turn)
        try:
            await turn
        except BaseException:
            self._leave(turn)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.move()  # it was this one's turn, which is now the next one's
            raise
        finally:
            if timer is not None:
                timer.cancel()
        self._leave(turn)

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if self.waiters and turn in self.waiters:
            self.waiters.remove(turn)

    def move(self) -> None:
        """Let the first in line go on; those who have given up are about to leave it."""
        for turn in self.waiters or ():
            if not turn.done():
                turn.set_result(None)
                return
            if not turn.cancelled() and turn.exception() is None:
                return  # it was told already, and has not gone on yet

    def fail(self, error: Callable[[], Exception]) -> None:
        """Send everybody away, each with an error of their own."""
        waiters, self.waiters = self.waiters or (), None
        for turn in waiters:
            if not turn.done():
                turn.set_exception(error())


NOBODY: Final = Line()
"""The line of all who never had to wait, and take one of their own when they have to."""


def _expire(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(asyncio.TimeoutError())
