"""A time limit that loses no cancellation.

Up to Python 3.11 a task that is cancelled inside `asyncio.wait_for` goes on as if it had not been,
when what it waits for ends at the same moment. A client would go on connecting after `disconnect`.
"""

from __future__ import annotations

import asyncio
import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:

    class timeout:  # as asyncio calls it from Python 3.11 on
        """Cancels what runs in the block when its time is up, and raises `asyncio.TimeoutError`.

        Args:
            delay: Seconds; None for no limit.
        """

        def __init__(self, delay: float | None) -> None:
            self._delay = delay
            self._timer: asyncio.TimerHandle | None = None
            self._expired = False

        async def __aenter__(self) -> None:
            task = asyncio.current_task()
            assert task is not None
            if self._delay is not None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._delay, self._expire, task)

        def _expire(self, task: asyncio.Task[object]) -> None:
            self._expired = True
            task.cancel()

        async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
            if self._timer is not None:
                self._timer.cancel()
            if self._expired and kind is asyncio.CancelledError:
                raise asyncio.TimeoutError from None


__all__ = ["timeout"]
