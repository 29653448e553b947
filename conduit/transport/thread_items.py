"""The items of a caller whose iterator may block: a thread advances it, and the loop goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from contextvars import copy_context
from functools import partial
from typing import Any

from .requests import Params

__all__ = ["in_thread", "in_threads"]

logger = logging.getLogger("conduit.connection")

AHEAD = 64
"""Items that are taken from the iterator before they are sent."""
CLOSE_TIME = 1.0
"""Seconds that the end of a call waits for the iterator to be closed."""


class ThreadItems:
    """A caller's plain iterator as an async one: a thread advances it, because it may block.

    The thread is a daemon of its own, so that an iterator which blocks for good keeps neither a
    handler from a thread nor the process from its end.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._ready: asyncio.Queue[tuple[Any, Exception | None]] = asyncio.Queue()
        self._room = threading.Semaphore(AHEAD)
        self._ended: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> ThreadItems:
        return self

    async def __anext__(self) -> Any:
        self._started()
        item, error = await self._ready.get()
        self._room.release()
        if error is not None:
            raise error
        return item

    async def aclose(self) -> None:
        """Close the iterator in its thread; one that blocks is closed when it comes back."""
        self._closed = True
        ended = self._started()
        self._room.release()
        await asyncio.wait([ended], timeout=CLOSE_TIME)

    def _started(self) -> asyncio.Future[None]:
        if self._ended is None:
            loop = asyncio.get_running_loop()
            self._ended = loop.create_future()
            job = partial(copy_context().run, self._advance, loop, self._ended)
            threading.Thread(target=job, name="conduit-items", daemon=True).start()
        return self._ended

    def _advance(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
        failure: Exception = StopAsyncIteration()
        try:
            try:
                self._take(loop)
            finally:
                close = getattr(self._source, "close", None)
                if close is not None:
                    close()
        except BaseException as exc:  # the call gets it, and would wait for ever
            failure = _failure(exc)
            if self._closed:
                logger.error("the items of a call failed behind its end", exc_info=exc)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the call
            loop.call_soon_threadsafe(self._ready.put_nowait, (None, failure))
            loop.call_soon_threadsafe(_settle, ended)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            self._room.acquire()
            if self._closed:
                return
            try:
                item = next(self._source)
            except StopIteration:
                return
            loop.call_soon_threadsafe(self._ready.put_nowait, (item, None))


def _failure(error: BaseException) -> Exception:
    """Return an error as one that a loop takes for nothing but an error of the call."""
    if isinstance(error, Exception) and not isinstance(error, StopAsyncIteration):
        return error
    failure = RuntimeError(f"the iterator among the arguments raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def in_threads(args: Params) -> Params:
    """Return the arguments of a call, in which plain iterators do not block the loop."""
    if isinstance(args, Mapping):
        return {name: in_thread(value) for name, value in args.items()}
    if isinstance(args, (list, tuple)):
        return [in_thread(value) for value in args]
    return args


def in_thread(value: Any) -> Any:
    """Return a plain iterator as one that does not block the loop, and all else as it is."""
    return ThreadItems(value) if isinstance(value, Iterator) else value
