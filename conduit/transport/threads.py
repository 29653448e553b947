"""The threads in which plain `def` handlers run, and the way back to the event loop from one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import cache
from typing import Any

__all__ = ["HANDLER_LOOP", "ThreadFuture", "run_in_thread"]

THREADS = 64

HANDLER_LOOP: ContextVar[asyncio.AbstractEventLoop | None] = ContextVar(
    "conduit_handler_loop", default=None
)
"""The loop that serves the connection, for a handler that runs in a thread."""


@cache
def _pool() -> ThreadPoolExecutor:
    # Our own pool: in asyncio's default one, handlers that block would hold up name lookups.
    return ThreadPoolExecutor(THREADS, thread_name_prefix="conduit-handler")


# A forked process has the pool, but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class ThreadFuture(asyncio.Future[Any]):
    """The result of a handler that runs, or is about to run, in a thread.

    Attributes:
        job: The same in the pool of threads.
        size: Bytes of what the handler was sent.
    """

    job: Future[Any] | None = None
    size = 0

    @property
    def queued(self) -> bool:
        """Whether the handler has not begun."""
        return self.job is not None and not (self.job.running() or self.job.done())

    def leave_queue(self) -> bool:
        """Do not run the handler, if it has not begun; a thread cannot be stopped.

        Returns:
            Whether it will not run.
        """
        return self.job is not None and self.job.cancel()


def run_in_thread(loop: asyncio.AbstractEventLoop, function: Callable[[], Any]) -> ThreadFuture:
    """Run a handler in a thread, in a copy of the current context.

    Cancelling the returned future does not end the thread, so nobody should: the future is done
    when the thread is done with the handler.
    """
    done = ThreadFuture(loop=loop)
    context = copy_context()
    context.run(HANDLER_LOOP.set, loop)

    def settle(ended: Future[Any]) -> None:
        if ended.cancelled():
            done.cancel()
        if done.cancelled():
            return
        error = ended.exception()
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

    done.job = _pool().submit(context.run, function)
    done.job.add_done_callback(hand_over)
    return done
