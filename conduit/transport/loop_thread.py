"""An event loop in a thread of its own, for those who wait for its work in other threads."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec, TypeVar

from ..exceptions import ConnectionClosed
from .handling import current, work_for
from .threads import HANDLER_LOOP

__all__ = ["LoopThread"]

logger = logging.getLogger("conduit.client")

P = ParamSpec("P")
T = TypeVar("T")

LOOK = 0.5
"""Seconds after which a waiting thread looks around, because Windows interrupts no longer wait."""
EXIT_TIME = 2.0
"""Seconds that clients have to say goodbye at the end of the process."""


class LoopThread:
    """One event loop in a daemon thread.

    Args:
        factory: Makes the loop.
        farewell: Awaited when the thread is asked to leave.

    Attributes:
        left: Whether it was asked to leave; then it takes no more work.
    """

    def __init__(
        self,
        factory: Callable[[], asyncio.AbstractEventLoop],
        farewell: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._loop = factory()
        self._farewell = farewell
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._asked = asyncio.Event()
        self._ended = threading.Event()
        self.left = False
        self._thread = threading.Thread(target=self._serve, name="conduit-client", daemon=True)
        try:
            self._thread.start()
            _running.add(self)
        except RuntimeError:  # the system has no thread for it
            self._loop.close()
            raise
        except BaseException:  # Ctrl-C; the thread has begun, and nobody else would end it
            self._farewell = _nothing  # it was never used, and another may have taken its place
            self.ask_to_leave()
            raise

    def _serve(self) -> None:
        try:
            life = self._loop.create_task(self._until_left())
            while not life.done():
                try:
                    self._loop.run_until_complete(life)
                except (KeyboardInterrupt, SystemExit) as exc:
                    # A handler or a hook has raised it. It ends no more than this thread, which
                    # would leave whoever waits for the loop to wait for ever: so say goodbye first.
                    text = "a handler or hook has raised %s: the client disconnects"
                    logger.error(text, type(exc).__name__)
                    self.ask_to_leave()
        finally:
            with self._lock:
                self.left = True
            try:
                self._loop.close()
            finally:
                self._ended.set()

    async def _until_left(self) -> None:
        await self._asked.wait()
        self.left = True  # also where Ctrl-C came right behind the question
        try:
            await self._farewell()
        finally:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._loop.shutdown_asyncgens()

    def run(
        self, function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **options: P.kwargs
    ) -> T:
        """Run an async function on the loop, and wait for its result.

        Whoever is interrupted while waiting, by Ctrl-C for instance, has cancelled it. In the
        thread of a handler, of whichever loop, it is a part of that handler.

        Raises:
            ConnectionClosed: The thread has left.
            RuntimeError: This is the thread itself, or another process.
            BaseException: What the function raises.
        """
        self._check_caller()
        # Made first: Ctrl-C may come as soon as the loop knows of the work, and must cancel it.
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        waiting = threading.Lock()  # wakes its waiter sooner than an Event does
        waiting.acquire()
        future.add_done_callback(lambda _: waiting.release())
        try:
            with self._lock:
                if self.left:
                    raise ConnectionClosed("the client has disconnected")
                work = partial(work_for, current(), partial(function, *args, **options))
                self._loop.call_soon_threadsafe(_start, self._loop, work, future)
            while not future.done():
                waiting.acquire(timeout=LOOK)
                if self._ended.is_set() and not future.done():
                    raise ConnectionClosed("the event loop of the client has ended")
            return future.result()
        except concurrent.futures.CancelledError:
            if not self.left:
                raise
            raise ConnectionClosed("the client has disconnected meanwhile") from None
        finally:
            future.cancel()
            del future  # it holds the exception, whose traceback holds this frame

    def _check_caller(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this client was connected in process {self._process} and cannot be used in its "
                f"fork {os.getpid()}; make another client there"
            )
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "this is the thread of the client's event loop, which must not wait for itself; "
                "write the handler as a plain def, which runs in a thread of its own, or await "
                "the methods of client.connection"
            )

    def leave(self) -> None:
        """End the thread, after its farewell; the second time it returns at once.

        It waits for the end, but not in the thread of a handler, for which the end may wait.
        """
        self._check_caller()
        if self.ask_to_leave() and not self.waits_for_caller:
            self.wait()

    def ask_to_leave(self) -> bool:
        """Begin the farewell; False if it was begun before, or belongs to another process."""
        if os.getpid() != self._process:
            return False
        with self._lock:
            first = not self.left
            if first:
                self._loop.call_soon_threadsafe(self._asked.set)
            self.left = True
        return first

    @property
    def waits_for_caller(self) -> bool:
        """Whether the end of the thread waits for a handler or a hook that this is called by."""
        return HANDLER_LOOP.get() is self._loop or threading.current_thread() is self._thread

    def wait(self, until: float = float("inf")) -> None:
        """Wait until the loop is closed, or until a time of `time.monotonic()`."""
        while not self._ended.is_set() and (left := until - time.monotonic()) > 0:
            self._ended.wait(min(left, LOOK))


async def _nothing() -> None:
    pass


def _start(
    loop: asyncio.AbstractEventLoop,
    function: Callable[[], Coroutine[Any, Any, T]],
    future: concurrent.futures.Future[T],
) -> None:
    """Run an async function in a task that ends with the future, and the other way round."""

    async def work() -> T:
        return await function()

    def cancel(future: concurrent.futures.Future[T]) -> None:
        if future.cancelled() and not task.done():
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)

    task = loop.create_task(work())
    task.add_done_callback(partial(_settle, future))
    future.add_done_callback(cancel)


def _settle(future: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        future.cancel()
        return
    error = task.exception()
    if not future.set_running_or_notify_cancel():
        return  # whoever was interrupted wants neither result nor error
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


_running: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    """Let those who forgot to disconnect do so at the end of the process, which must not hang."""
    until = time.monotonic() + EXIT_TIME
    for thread in [one for one in list(_running) if one.ask_to_leave()]:
        thread.wait(until)
