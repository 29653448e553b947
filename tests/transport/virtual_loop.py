"""An event loop that stands still: a test runs it turn by turn and lets its time pass.

Nothing here depends on how fast the machine is, so that a program of a thousand steps and hours of
waiting ends in milliseconds, and ends in the same way each time. It is asyncio's own loop on every
Python; uvloop keeps its clock to itself.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

SECONDS = 10.0
"""How long a thread may take to come to where it says something to the loop."""
MANY = 100_000
"""Turns after which the loop counts as busy for ever."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, with a clock that only `advance` moves.

    Attributes:
        now: What `time()` says.
        errors: What nobody but the loop has heard of: exceptions never retrieved, callbacks that
            failed, tasks destroyed while pending.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.errors: list[str] = []
        self._looks_at = selectors.DefaultSelector()
        super().__init__(self._looks_at)
        self.set_exception_handler(self._record)

    def time(self) -> float:
        return self.now

    def _record(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{context['message']}: {context.get('exception')!r}")

    @property
    def ready(self) -> bool:
        """Whether there is anything to run without waiting."""
        return bool(self._ready)  # type: ignore[attr-defined]

    @property
    def timers(self) -> list[asyncio.TimerHandle]:
        """The timers that are set."""
        handles: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return [handle for handle in handles if not handle.cancelled()]

    def turn(self, count: int = 1) -> None:
        """Run what is ready now, and so on `count` times."""
        for _ in range(count):
            self.call_soon(self.stop)
            self.run_forever()

    def settle(self, threads_are_quiet: Callable[[], bool] = lambda: True) -> None:
        """Run until there is nothing to do before more time passes.

        Args:
            threads_are_quiet: Whether no thread is about to tell the loop something.
        """
        for _ in range(MANY):
            self.turn()
            if not self.ready:
                if threads_are_quiet():
                    return
                self._looks_at.select(SECONDS)  # until a thread wakes it
        raise AssertionError("the loop does not come to rest")

    def advance(self, seconds: float, settle: Callable[[], None]) -> None:
        """Let time pass, from one timer to the next, and settle at each."""
        end = self.now + seconds
        while timers := [handle.when() for handle in self.timers if handle.when() <= end]:
            self.now = max(self.now, min(timers))
            settle()
        self.now = end
        settle()
