"""The items of a call: one end that sends them, one that receives them, with credit between them.

Items are collected as long as their source goes on without waiting, and leave together in one
frame; the receiver hands them out one by one and gives credit back when it has handed out a whole
frame. A consumer that stops reading makes its own producer wait, and nobody else: reading from the
link goes on, and other calls have credit of their own.

What both ends need of the loop is one callback a frame. There is no task, future or validation
for a single item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Final

from ..exceptions import PayloadTooLarge, ProtocolError
from ..protocol.frames import SEQUENCED, CloseCode, FrameType, word
from ..protocol.payload import Encoder
from .outlet import Outlet

__all__ = ["Check", "Explain", "Receiver", "Sender"]

_ITEM: Final = word(FrameType.STREAM_ITEM, SEQUENCED)
_END: Final = word(FrameType.STREAM_END, SEQUENCED)
_CREDIT: Final = word(FrameType.STREAM_CREDIT, SEQUENCED)

FIRST_ITEMS: Final = 16
"""Items that are collected at first; twice as many each time while they are small."""
MOST_ITEMS: Final = 512
"""Items of a frame, and items after which a source that never waits gives way to the others."""
ENOUGH_BYTES: Final = 16 * 1024
"""Bytes of a frame of several items; more of them make the next frames shorter."""
MOST_BYTES: Final = 64 * 1024
"""Bytes above which a frame of several items is cut in two."""

Check = Callable[[list[Any]], list[Any]]
"""Validates several items at once, and returns what they become."""
Explain = Callable[[Exception, int], Exception]
"""Turns what a `Check` raised for the item of an index into what is told of it."""


class Sender:
    """Items on their way out.

    Args:
        loop: The event loop.
        outlet: Where frames go.
        encoder: Packs the items.
        id: The call.
        credit: Items and bytes that the peer takes before it has handed out any.
        value_max: Bytes that an item may have.
        check: Validates the items and makes them plain; None for any.

    Attributes:
        closed: Why no more items can be sent.
        ready: Items that are checked and plain, and wait for credit or for the link.
    """

    __slots__ = (
        "_batch",
        "_bytes",
        "_check",
        "_encoder",
        "_failure",
        "_id",
        "_items",
        "_limit",
        "_loop",
        "_outlet",
        "_room",
        "_task",
        "_value_max",
        "closed",
        "ready",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outlet: Outlet,
        encoder: Encoder,
        id: int,
        *,
        credit: tuple[int, int],
        value_max: int,
        check: Check | None = None,
    ) -> None:
        self._loop = loop
        self._outlet = outlet
        self._encoder = encoder
        self._id = id
        self._items, self._bytes = credit
        self._value_max = value_max
        self._check = check
        self._batch: list[Any] = []  # as they came
        self.ready: list[Any] = []
        self._limit = FIRST_ITEMS  # nothing is known of the items yet
        self._room: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None  # while it feeds
        self._failure: Exception | None = None
        self.closed: Exception | None = None

    async def feed(self, source: AsyncIterator[Any] | Iterator[Any]) -> None:
        """Send what an iterator gives, and close it if it is left before its end."""
        self._task = asyncio.current_task(self._loop)
        try:
            if isinstance(source, AsyncIterator):
                await self._feed(source)
            else:
                await self._feed_plain(source)
        except asyncio.CancelledError:
            if self._failure is None:
                raise
            self._raise()
        finally:
            self._task = None
            await _close(source)

    async def _feed(self, source: AsyncIterator[Any]) -> None:
        batch = self._batch
        async for item in source:
            batch.append(item)
            count = len(batch)
            if count >= self._limit:
                await self._turn()
            elif count == 1:
                self._loop.call_soon(self._flush_later)

    async def _feed_plain(self, source: Iterator[Any]) -> None:
        batch = self._batch
        for item in source:
            batch.append(item)
            if len(batch) >= self._limit:
                await self._turn()

    async def put(self, item: Any) -> None:
        """Send one item."""
        self._raise()
        self._batch.append(item)
        if len(self._batch) >= self._limit:
            await self._turn()
        elif len(self._batch) == 1:
            self._loop.call_soon(self._flush_later)

    async def finish(self) -> None:
        """Wait until every item has left; raises what became of one that could not."""
        self._flush_later()
        while self.ready:
            await self._wait_for_room()
        self._raise()

    def end(self) -> None:
        """Tell the peer that no items follow."""
        self._outlet.send(_END, self._id, b"")

    async def _turn(self) -> None:
        """Send a full batch, give way to others, and wait while it cannot be sent."""
        self._flush()
        await asyncio.sleep(0)
        while self.ready:
            await self._wait_for_room()
        self._raise()

    def _raise(self) -> None:
        """Raise what went wrong while nobody was there to raise it to."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self.closed is not None:
            raise self.closed

    async def _wait_for_room(self) -> None:
        if self._room is None:
            self._room = self._loop.create_future()
        await asyncio.shield(self._room)

    def _flush_later(self) -> None:
        """Send what has become ready while its source went on without waiting."""
        try:
            self._flush()
        except Exception as exc:  # noqa: BLE001  # raised in the task that sends
            self._failure = exc
            if self._task is not None:
                self._task.cancel()  # it may be waiting for its source, for long

    def _flush(self) -> None:
        """Check what was collected, and send what there is credit for.

        Raises:
            Exception: An item is not what it should be; those before it are sent all the same.
        """
        failure: Exception | None = None
        if self._batch:
            items = self._batch.copy()
            self._batch.clear()
            if self._check is not None:
                try:
                    items = self._check(items)
                except Exception as exc:  # noqa: BLE001  # raised below
                    items, failure = good_part(self._check, items, exc)
            self.ready += items
        while self.ready and self._items > 0 and self._bytes > 0 and not self._outlet.blocked:
            self._send(min(len(self.ready), self._items, self._limit))
        if failure is not None:
            raise failure

    def _send(self, count: int) -> None:
        """Send the first `count` items, or fewer when they are large."""
        try:
            head, tail = self._pack(self.ready[:count])
        except Exception:
            if count == 1:
                self.ready.clear()  # nothing goes out behind what could not
                raise
            self._send(1)  # one by one, up to the one that cannot be sent
            return
        size = len(head) + len(tail)
        if count > 1 and size > min(MOST_BYTES, self._value_max):
            self._send(count // 2)
            return
        if size > ENOUGH_BYTES:
            self._limit = max(1, count * ENOUGH_BYTES // size)
        elif count >= self._limit:
            self._limit = min(MOST_ITEMS, 2 * self._limit)
        del self.ready[:count]
        self._items -= count
        self._bytes -= size
        if tail:
            self._outlet.send_split(_ITEM, self._id, head, tail)
        else:
            self._outlet.send(_ITEM, self._id, head)

    def _pack(self, items: list[Any]) -> tuple[bytes, bytes]:
        """Return the payload of a frame, and apart from it a large end that is not copied."""
        if len(items) > 1:
            return self._encoder.pack(items), b""
        head, tail = self._encoder.split(items[0]) or (self._encoder.pack(items[0]), b"")
        if len(head) + len(tail) > self._value_max:
            raise PayloadTooLarge(
                f"an item takes {len(head) + len(tail)} bytes and the peer accepts "
                f"{self._value_max}; raise its Limits.max_payload"
            )
        return b"\x91" + head, tail

    def credit(self, items: int, size: int) -> None:
        """Take credit that the peer gives."""
        self._items += items
        self._bytes += size
        self.room()

    def room(self) -> None:
        """Go on: there is credit, or the outlet has room again."""
        if self.ready:
            self._flush_later()
        if not self.ready:
            self._wake()

    def _wake(self) -> None:
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    def close(self, reason: Exception | None = None) -> None:
        """Send nothing more, because the call is over or the connection is gone."""
        if self.closed is None:
            self.closed = reason or RuntimeError("the call that the items belong to is over")
            self._batch.clear()
            self.ready.clear()
            self._wake()


class Receiver:
    """Items that come in.

    Args:
        loop: The event loop.
        outlet: Where credit goes.
        encoder: Packs credit.
        id: The call.
        window: Items and bytes that the peer may send before any was handed out.
        check: Validates items; None for any.
        explain: What becomes of an error of `check`; None raises it as it is.

    Attributes:
        current: The items that are being handed out. Whoever stops in the middle and starts again
            goes on where it has stopped.
        discards: Whether items are thrown away because nobody wants them.
    """

    __slots__ = (
        "_check",
        "_count",
        "_encoder",
        "_ended",
        "_error",
        "_explain",
        "_handed_out",
        "_id",
        "_loop",
        "_open_bytes",
        "_open_items",
        "_outlet",
        "_owed_bytes",
        "_owed_items",
        "_queue",
        "_size",
        "_waiter",
        "_window",
        "current",
        "discards",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outlet: Outlet,
        encoder: Encoder,
        id: int,
        *,
        window: tuple[int, int],
        check: Check | None,
        explain: Explain | None = None,
    ) -> None:
        self._loop = loop
        self._outlet = outlet
        self._encoder = encoder
        self._id = id
        self._window = window
        self._check = check
        self._explain = explain
        self._queue: deque[tuple[list[Any], int]] = deque()
        self.current: Iterator[Any] = iter(())
        self._count = self._size = 0  # of the frame that is being handed out
        self._handed_out = 0  # items of the frames before it
        self._open_items = self._open_bytes = 0
        self._owed_items = self._owed_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Exception | None = None
        self.discards = False

    # What the connection calls.

    def receive(self, items: list[Any], size: int) -> None:
        """Take the items of one frame, whose payload has `size` bytes.

        Raises:
            ProtocolError: The peer had no credit for them.
        """
        if self._ended:
            return
        if self._open_items + len(items) > self._window[0] or self._open_bytes >= self._window[1]:
            raise ProtocolError(
                f"{len(items)} items without credit: {self._open_items} items of "
                f"{self._open_bytes} bytes wait here, of {self._window}",
                close_code=CloseCode.FLOOD,
            )
        self._open_items += len(items)
        self._open_bytes += size
        if self.discards:
            self._pay_back(len(items), size)
        else:
            self._queue.append((items, size))
            self._wake()

    def end(self, error: Exception | None = None, *, drop: bool = False) -> None:
        """Take the end of the items, or why no more come.

        Args:
            error: Raised when those that have come are handed out.
            drop: Throw those away.
        """
        if not self._ended:
            self._ended = True
            self._error = error
        if drop:
            self._queue.clear()
            self._drop_current()
        self._wake()

    # What the consumer calls.

    async def items(self) -> AsyncIterator[Any]:
        """Hand out the items."""
        while True:
            for item in self.current:
                yield item
            if not await self.more():
                return

    async def more(self) -> bool:
        """Wait for the next frame of items, which `current` iterates over then.

        Returns:
            False at the end of the items.

        Raises:
            Exception: Why there are no more.
        """
        while not self._advance():
            if self._error is not None:
                raise self._error
            if self._ended:
                return False
            if self._waiter is not None:
                raise RuntimeError("another task waits for the items of this call already")
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return True

    def discard(self) -> None:
        """Throw away what nobody takes, so that the producer can go on to its end."""
        self.discards = True
        self._drop_current()
        while self._advance(check=False):
            self._drop_current()

    def _drop_current(self) -> None:
        for _ in self.current:  # exhausted, because a loop over it may be under way
            pass

    def close(self) -> None:
        """Throw everything away: the call is over."""
        self._ended = True
        self._error = RuntimeError("the call that the items belong to is over")
        self.end(drop=True)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _advance(self, *, check: bool = True) -> bool:
        """Pay back the frame that was handed out and go on to the next; False if none is there."""
        if self._count:
            self._pay_back(self._count, self._size)
            self._handed_out += self._count
            self._count = 0
        if not self._queue:
            return False
        items, self._size = self._queue.popleft()
        self._count = len(items)
        if check and self._check is not None:
            try:
                items = self._check(items)
            except Exception as exc:  # noqa: BLE001  # raised behind the items that fit
                items = self._without_bad(self._check, items, exc)
        self.current = iter(items)
        return True

    def _without_bad(self, check: Check, items: list[Any], error: Exception) -> list[Any]:
        """Return the items before the first bad one, behind which nothing is handed out."""
        good, error = good_part(check, items, error)
        if self._explain is not None:
            error = self._explain(error, self._handed_out + len(good))
        self._queue.clear()
        self._ended, self._error = True, error
        return good

    def _pay_back(self, items: int, size: int) -> None:
        self._owed_items += items
        self._owed_bytes += size
        if self._ended:
            return
        if self._owed_items * 2 >= self._window[0] or self._owed_bytes * 2 >= self._window[1]:
            self._open_items -= self._owed_items
            self._open_bytes -= self._owed_bytes
            credit = self._encoder.pack([self._owed_items, self._owed_bytes])
            self._owed_items = self._owed_bytes = 0
            self._outlet.send(_CREDIT, self._id, credit)


async def _close(source: Any) -> None:
    """Close a generator; other iterators have nothing to close."""
    if hasattr(source, "aclose"):
        await source.aclose()
    elif hasattr(source, "close"):
        source.close()


def good_part(check: Check, items: Iterable[Any], error: Exception) -> tuple[list[Any], Exception]:
    """Return what becomes of the items before the first that does not fit, and its own error.

    Args:
        check: Has refused the items.
        items: All of them.
        error: What it raised for all of them.
    """
    good: list[Any] = []
    for item in items:
        try:
            good += check([item])
        except Exception as exc:  # noqa: BLE001  # whoever asks raises it
            return good, exc
    return good, error
