"""A call with streams, at its caller: what `rpc.stream` returns, and the task that sends items."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from operator import length_hint
from typing import Any, Generic, TypeVar

from ..exceptions import CallCancelled, RPCTimeout
from .calls import Calls
from .requests import Params
from .stream import Receiver, Sender, close_source

__all__ = ["OpenCall", "StreamCall", "without_iterator"]

logger = logging.getLogger("conduit.connection")

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound="StreamCall[Any, Any]")


class OpenCall:
    """A streaming call that was sent.

    Args:
        loop: The event loop.
        calls: The calls of the connection.
        id: The call.
        answer: Will have the body of the final frame.
        receiver: The items that come.
        drops: Whether the call has a deadline, behind which nothing is handed out any more.

    Attributes:
        answer: As above.
        receiver: As above.
    """

    __slots__ = ("_calls", "_drops", "_id", "_loop", "_pump", "_source", "answer", "receiver")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        calls: Calls,
        id: int,
        answer: asyncio.Future[list[Any]],
        receiver: Receiver,
        *,
        drops: bool,
    ) -> None:
        self._loop = loop
        self._calls = calls
        self._id = id
        self._drops = drops
        self._pump: asyncio.Task[None] | None = None
        self.answer = answer
        self.receiver = receiver
        answer.add_done_callback(self._answered)

    def send(self, sender: Sender, source: AsyncIterator[Any] | Iterator[Any]) -> None:
        """Start to send the caller's items."""
        self._source = source
        self._pump = self._loop.create_task(self._send(sender, source))

    async def _send(self, sender: Sender, source: AsyncIterator[Any] | Iterator[Any]) -> None:
        try:
            await sender.feed(source)
            await sender.finish()
            sender.end()
        except asyncio.CancelledError as exc:
            # Whoever ends this task has ended the call before. The iterator did it: it has waited
            # for something that was cancelled.
            cancelled = CallCancelled("the iterator among the arguments was cancelled")
            cancelled.__cause__ = exc
            self._fail(cancelled)
            raise
        except Exception as exc:  # the caller gets it
            if not self._fail(exc) and exc is not sender.closed:
                logger.error("the items of a call failed behind its end", exc_info=exc)
        finally:
            sender.close()

    def _fail(self, error: Exception) -> bool:
        """End the call, because its items have; False if it is over already."""
        if self.answer.done():
            return False
        self.answer.set_exception(error)
        self._calls.abandon(self._id, "the caller's items failed")
        return True

    def leave(self) -> None:
        """Give the call up, if it is not over: the handler is cancelled."""
        if not self.answer.done():
            self.answer.cancel()
            self.receiver.close()
            self._calls.abandon(self._id, "the caller has left")

    def leave_soon(self) -> None:
        """The same from any thread, and from nowhere: nobody holds the call any more."""
        if not self.answer.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.leave)

    async def close(self) -> None:
        """Give the call up, and wait until the caller's items are closed."""
        self.leave()
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
            await close_source(self._source)  # a task that was cancelled at once did not

    def _answered(self, answer: asyncio.Future[list[Any]]) -> None:
        if not answer.cancelled():
            error: Any = answer.exception()
            self.receiver.end(error, drop=self._drops and isinstance(error, RPCTimeout))
        if self._pump is not None:
            self._pump.cancel()


class StreamCall(Generic[T, R]):
    """A call with streams; `rpc.stream(...)` returns it.

    The documented form is certain to clean up: whoever leaves the block before the end of the call,
    by `break`, an error or a cancellation, cancels the handler at the peer, and the caller's own
    items are closed when the block is left.

        async with client.rpc.stream("train", {"rounds": 9}, items=Progress, returns=Model) as run:
            async for progress in run:
                ...
            model = await run.result()

    A plain `async for item in client.rpc.stream(...)` and `await client.rpc.stream(...).result()`
    work as well; a call that is left early is then given up when nobody refers to it any more.

    Nothing is sent before the block is entered, the first item or the result is asked for.
    """

    __slots__ = ("_call", "_entered", "_finish", "_iterators", "_start", "_started", "_wanted")

    def __init__(
        self, start: Callable[[], Awaitable[OpenCall]], finish: Callable[[list[Any]], R]
    ) -> None:
        self._call: OpenCall | None = None
        self._start = start
        self._finish = finish
        self._entered = False
        self._started = False
        self._iterators = 0
        self._wanted = False

    async def _opened(self) -> OpenCall:
        if self._call is None:
            if self._started:
                raise RuntimeError("the call is being made, or could not be made; make another one")
            self._started = True
            self._call = await self._start()
        return self._call

    async def __aenter__(self: S) -> S:
        """Make the call; see `result` for what it may raise."""
        await self._opened()
        self._entered = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._call is not None:
            await self._call.close()

    async def __aiter__(self) -> AsyncIterator[T]:
        """Yield the items, each validated against `items` if that was given.

        A slow loop makes the peer's handler wait. What the handler raised is raised behind the
        items that it had sent before.

        Raises:
            pydantic.ValidationError: An item is not what `items` says.
            RPCError, ConnectionLost: As for `result`.
        """
        call = await self._opened()
        receiver = call.receiver
        self._iterators += 1
        try:
            while True:
                for item in receiver.current:
                    yield item
                if not await receiver.more():
                    return
        except asyncio.CancelledError:
            self._cancelled(call)
            raise
        finally:
            self._iterators -= 1
            self._throw_away(call)

    async def __anext__(self) -> T:
        """Return the next item, for `anext(run)`; errors as in a loop over the items.

        Raises:
            StopAsyncIteration: There are no more.
        """
        call = await self._opened()
        receiver = call.receiver
        self._iterators += 1
        try:
            while True:
                item: T
                for item in receiver.current:
                    return item
                if not await receiver.more():
                    raise StopAsyncIteration
        except asyncio.CancelledError:
            self._cancelled(call)
            raise
        finally:
            self._iterators -= 1
            self._throw_away(call)

    @property
    def ready(self) -> int:
        """Items that the loop over this call can take without waiting."""
        return 0 if self._call is None else length_hint(self._call.receiver.current)

    async def result(self) -> R:
        """Wait for the end of the call and return its result; None for a generator.

        Items that nobody iterates over are thrown away, so that the handler comes to its end.
        Cancelling it inside the block leaves the call alone; without a block it gives the call up.

        Raises:
            RPCTimeout: The deadline has passed; what had not been handed out by then is dropped.
            RPCError: As for `rpc.call`.
            ConnectionLost: The connection went away before the end.
            ConnectionClosed: The connection is closed.
            Exception: What the iterator among the arguments raised; the handler is cancelled.
            pydantic.ValidationError: The result is not what `returns` says.
        """
        call = await self._opened()
        self._wanted = True
        self._throw_away(call)
        try:
            # Also if it is there already: it may be so new that the receiver has not heard of it.
            await asyncio.wait([call.answer])
        except asyncio.CancelledError:
            self._cancelled(call)
            raise
        if call.answer.cancelled():
            raise RuntimeError("the call was left before its end, so it has no result")
        return self._finish(call.answer.result())

    def _cancelled(self, call: OpenCall) -> None:
        if not self._entered:
            call.leave()

    def _throw_away(self, call: OpenCall) -> None:
        if self._wanted and not self._iterators:
            call.receiver.discard()

    def __del__(self) -> None:
        if self._call is not None:
            self._call.leave_soon()


def without_iterator(args: Params) -> tuple[Params, str | int | None, Any]:
    """Return arguments without the one that is an iterator, its name or position, and it itself."""
    places: list[Any] = []
    if isinstance(args, Mapping):
        places = [key for key, value in args.items() if _has_items(value)]
    elif isinstance(args, (list, tuple)):
        places = [index for index, value in enumerate(args) if _has_items(value)]
    if not places:
        return args, None, None
    if len(places) > 1:
        raise TypeError(f"one argument of a call may be an iterator, not {places}")
    place = places[0]
    rest: Any = dict(args) if isinstance(args, Mapping) else list(args or ())
    source = rest.pop(place)
    return rest, place, aiter(source) if isinstance(source, AsyncIterable) else source


def _has_items(value: Any) -> bool:
    return isinstance(value, (AsyncIterable, Iterator))
