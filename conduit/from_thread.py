"""The way from a plain `def` handler, which runs in a thread, back to the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .transport.handling import current, work_for
from .transport.threads import HANDLER_LOOP

__all__ = ["run"]

T = TypeVar("T")


LOOK = 0.5
"""Seconds between two looks at whether the event loop still runs."""


def _loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run(function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
    """Run an async function on the event loop that serves this handler, and wait for its result.

    What it calls has no more time than the handler, as if the handler called by itself.

    Args:
        function: An async function, such as `connection.send`.
        args: Its arguments.

    Raises:
        RuntimeError: This is not the thread of a handler, or its event loop has ended.
        BaseException: What the function raises.
    """
    loop = HANDLER_LOOP.get()
    if loop is None:
        raise RuntimeError("from_thread.run works only inside a plain def handler")
    if _loop_runs_here():
        raise RuntimeError(
            "from_thread.run works only inside a plain def handler; on the event loop, await"
        )
    coroutine = work_for(current(), function, *args)
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:  # the loop has ended
        coroutine.close()
        raise
    while True:
        concurrent.futures.wait([future], timeout=LOOK)
        if future.done():
            return future.result()
        if not loop.is_running():
            future.cancel()
            raise RuntimeError("the event loop has ended while a thread waited for it")
