"""Tasks that belong to a server or a client, and end with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

from .handling import HANDLING
from .hooked import HOOK

__all__ = ["Background"]

T = TypeVar("T")


class Background:
    """Keeps tasks alive while they run, logs what they raise, and cancels them in the end."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that is not part of the handler or hook which may be running now."""
        context = copy_context()
        context.run(HANDLING.set, None)
        context.run(HOOK.set, None)
        task: asyncio.Task[T] = context.run(asyncio.get_running_loop().create_task, coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._logger.error("a background task failed: %r", task, exc_info=error)

    async def cancel(self, spared: asyncio.Task[Any] | None = None) -> None:
        """Cancel every task, and wait for the end of each.

        Args:
            spared: A task that waits for this one, and so must not be waited for.
        """
        tasks = self._tasks - {asyncio.current_task(), spared}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, timeout: float, spared: asyncio.Task[Any] | None = None) -> None:
        """Wait for every task to end by itself, and cancel what has not after `timeout` seconds."""
        tasks = self._tasks - {asyncio.current_task(), spared}
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
            await self.cancel(spared)
