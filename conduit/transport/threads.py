"""The threads in which plain `def` handlers run, and the way back to the event loop from one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any

__all__ = ["HANDLER_LOOP", "run_in_thread"]

THREADS = 64

HANDLER_LOOP: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar(
    "conduit_handler_loop", default=None
)
"""The loop that serves the connection, for a handler that runs in a thread."""


@cache
def _pool() -> ThreadPoolExecutor:
    # Our own pool: in asyncio's default one, handlers that block would hold up name lookups.
    return ThreadPoolExecutor(THREADS, thread_name_prefix="conduit-handler")


def run_in_thread(
    loop: asyncio.AbstractEventLoop, function: Callable[[], Any]
) -> asyncio.Future[Any]:
    """Run a handler in a thread, in a copy of the current context.

    Cancelling the returned future does not end the thread, so nobody should: the future is done
    when the thread is done with the handler.
    """
    done: asyncio.Future[Any] = loop.create_future()
    context = copy_context()
    context.run(HANDLER_LOOP.set, loop)

    def settle(ended: Future[Any]) -> None:
        error = ended.exception()
        if done.cancelled():
            return
        if isinstance(error, StopIteration):
            # A future cannot hold one; a coroutine makes the same of it (PEP 479).
            told = RuntimeError("the handler raised StopIteration")
            told.__cause__ = error
            error = told
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(ended.result())

    def hand_over(ended: Future[Any]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, ended)

    _pool().submit(context.run, function).add_done_callback(hand_over)
    return done
