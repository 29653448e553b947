"""The items of a call: one end that sends them, one that receives them, with credit between them.

An item is checked and packed when it is sent, so whoever sent it gets the error, and may change it
afterwards. Items then gather as long as their source goes on without waiting, and leave together in
one frame. The receiver hands them out one by one and gives credit back when it has handed out a
whole frame. A consumer that stops reading makes its own producer wait, and nobody else: reading
from the link goes on, and other calls have credit of their own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from ..exceptions import PayloadTooLarge, ProtocolError
from ..protocol.frames import SEQUENCED, CloseCode, FrameType, Parted, Payload, word
from ..protocol.payload import LARGE, UNSENDABLE, Encoder, decode, kept
from .outlet import Outlet

__all__ = ["Check", "Explain", "Receiver", "Sender", "close_source"]

_ITEM: Final = word(FrameType.STREAM_ITEM, SEQUENCED)
_END: Final = word(FrameType.STREAM_END, SEQUENCED)
_CREDIT: Final = word(FrameType.STREAM_CREDIT, SEQUENCED)

MOST_ITEMS: Final = 512
"""Items of a frame, and items after which a source that never waits gives way to the others."""
ENOUGH_BYTES: Final = 16 * 1024
"""Bytes of a frame of several items at most."""
LARGEST: Final = 32 * 1024
"""Bytes of a frame up to which its items wait decoded. They may take twenty times as much memory as
is counted for them, and those of each of many streams may wait."""
ARRAY_HEADER: Final = 3
"""Bytes of the header of an array of up to 65,535 items."""

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
        finish: Checks an item and makes it plain; None for any.

    Attributes:
        closed: Why no more items can be sent.
    """

    __slots__ = (
        "_alone",
        "_bytes",
        "_encoder",
        "_enough",
        "_finish",
        "_id",
        "_items",
        "_loop",
        "_most",
        "_outlet",
        "_parts",
        "_room",
        "_size",
        "_splits",
        "_value_max",
        "closed",
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
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        self._loop = loop
        self._outlet = outlet
        self._encoder = encoder
        self._id = id
        self._items, self._bytes = credit
        self._value_max = value_max
        self._finish = finish
        self._most = self._enough = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._alone: tuple[bytes, bytes] | None = None  # behind the parts, in a frame of its own
        self._splits = False
        self._room: asyncio.Future[None] | None = None
        self.closed: Exception | None = None
        self._measure()

    async def feed(self, source: AsyncIterator[Any] | Iterator[Any]) -> None:
        """Send what an iterator gives, and close it if it is left before its end."""
        add = self._add
        try:
            if isinstance(source, AsyncIterator):
                async for item in source:
                    if add(item):
                        await self._turn()
            else:
                for item in source:
                    if add(item):
                        await self._turn()
        finally:
            await close_source(source)

    async def put(self, item: Any) -> None:
        """Send one item."""
        if self._alone is not None or self.closed is not None:  # of another task
            await self._wait_for_room()
        if self._add(item):
            await self._turn()

    async def finish(self) -> None:
        """Wait until every item has left."""
        self.flush()
        await self._wait_for_room()

    def end(self) -> None:
        """Tell the peer that no items follow."""
        self._outlet.protocol.send(_END, self._id, b"")

    def _add(self, item: Any) -> bool:
        """Check and pack an item; True when there is enough for a frame."""
        if self._finish is not None:
            item = self._finish(item)
        try:
            if self._splits:
                split = self._encoder.split(item)
                if split is not None:
                    return self._add_alone(*split)
            part = self._encoder.pack(item)
        except UNSENDABLE as exc:
            raise self._encoder.explained(exc, item) from exc
        self._size += len(part)
        if self._size > self._enough:
            self._size -= len(part)
            self._splits = len(part) >= LARGE  # the next of its kind is not copied
            return self._add_alone(part, b"")
        parts = self._parts
        parts.append(part)
        count = len(parts)
        if count == 1:
            self._loop.call_soon(self.flush)
        return count >= self._most

    def _add_alone(self, head: bytes, tail: bytes) -> bool:
        """Put an item behind the others, into a frame of its own."""
        size = len(head) + len(tail)
        if size > self._value_max:
            raise PayloadTooLarge(
                f"an item takes {size} bytes and the peer accepts {self._value_max}; "
                "raise its Limits.max_payload"
            )
        self._alone = head, tail
        return True

    async def _turn(self) -> None:
        """Send a frame, give way to others, and wait while there was no room for it."""
        self.flush()
        await asyncio.sleep(0)
        await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while self.waits:
            if self._room is None:
                self._room = self._loop.create_future()
            await asyncio.shield(self._room)
        if self.closed is not None:
            raise self.closed

    @property
    def waits(self) -> bool:
        """Whether there are items that could not be sent yet."""
        return bool(self._parts) or self._alone is not None

    @property
    def held_bytes(self) -> int:
        """Bytes of the items that could not be sent yet."""
        return self._size + (sum(map(len, self._alone)) if self._alone is not None else 0)

    def flush(self) -> None:
        """Send what has gathered, as far as there is credit and room."""
        while self._parts and self._may_send():
            count = min(len(self._parts), self._items, MOST_ITEMS)
            items = b"".join(self._parts[:count])
            del self._parts[:count]
            self._size -= len(items)
            self._send(count, _array(count) + items, b"")
        if self._alone is not None and not self._parts and self._may_send():
            head, tail = self._alone
            self._alone = None
            self._send(1, b"\x91" + head, tail)
        self._measure()
        if self._room is not None and not self.waits:
            self._wake()

    def _measure(self) -> None:
        """Say how much may gather before its source has to wait: what a frame may have now."""
        self._enough = min(ENOUGH_BYTES, self._value_max - ARRAY_HEADER, self._bytes)
        self._most = min(MOST_ITEMS, self._items)

    def _may_send(self) -> bool:
        has_credit = self._items > 0 and self._bytes > 0
        return has_credit and not self._outlet.blocked and self.closed is None

    def _send(self, count: int, head: bytes, tail: bytes) -> None:
        self._items -= count
        self._bytes -= len(head) + len(tail)
        if tail:
            self._outlet.send_split(_ITEM, self._id, head, tail)
        else:
            self._outlet.protocol.send(_ITEM, self._id, head)

    def credit(self, items: int, size: int) -> None:
        """Take credit that the peer gives."""
        self._items += items
        self._bytes += size
        self.flush()

    def _wake(self) -> None:
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    def close(self, reason: Exception | None = None) -> None:
        """Send nothing more, because the call is over or the connection is gone."""
        if self.closed is None:
            self.closed = reason or RuntimeError("the call that the items belong to is over")
            self._parts.clear()
            self._alone = None
            self._wake()


def _array(count: int) -> bytes:
    """Return the MessagePack header of an array."""
    return bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


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
        started: Whether any items have come.
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
        "_refused",
        "_size",
        "_waiter",
        "_window",
        "current",
        "discards",
        "started",
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
        # Of each frame the items, or its payload; its size, and how many items there are.
        self._queue: deque[tuple[list[Any] | bytes | Parted, int, int]] = deque()
        self.current: Iterator[Any] = iter(())
        self._count = self._size = 0  # of the frame that is being handed out
        self._handed_out = 0  # items of the frames before it
        self._open_items = self._open_bytes = 0
        self._owed_items = self._owed_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: Exception | None = None
        self._refused: Exception | None = None  # an item, behind which nothing is handed out
        self.discards = False
        self.started = False

    # What the connection calls.

    def receive(self, items: list[Any], payload: Payload) -> None:
        """Take the items of one frame.

        Those of a large one that waits are kept as they came.

        Args:
            items: They.
            payload: The same before it was decoded.

        Raises:
            ProtocolError: The peer had no credit for them.
        """
        if self._ended:
            return
        size = len(payload)
        if self._open_items + len(items) > self._window[0] or self._open_bytes >= self._window[1]:
            raise ProtocolError(
                f"{len(items)} items without credit: {self._open_items} items of "
                f"{self._open_bytes} bytes wait here, of {self._window}",
                close_code=CloseCode.FLOOD,
            )
        self.started = True
        self._open_items += len(items)
        self._open_bytes += size
        if self.discards:
            self._pay_back(len(items), size)
        else:
            waits = size > LARGEST and (self._queue or self._waiter is None)
            self._queue.append((kept(payload) if waits else items, size, len(items)))
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

    @property
    def held_bytes(self) -> int:
        """Bytes of the items that nobody has taken yet."""
        return self._open_bytes - self._owed_bytes

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
            if self._refused is not None:
                raise self._refused
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
        self._refused = None
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
        if not self._queue or (check and self._refused is not None):
            return False
        items, self._size, self._count = self._queue.popleft()
        if not isinstance(items, list):
            items = decode(items) if check else []
        if check and self._check is not None:
            try:
                items = self._check(items)
            except Exception as exc:  # noqa: BLE001  # raised behind the items that fit
                items = self._without_bad(self._check, items, exc)
        self.current = iter(items)
        return True

    def _without_bad(self, check: Check, items: list[Any], error: Exception) -> list[Any]:
        """Return the items before the first bad one, behind which nothing is handed out."""
        good, error = _good_part(check, items, error)
        if self._explain is not None:
            error = self._explain(error, self._handed_out + len(good))
        self._refused = error
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
            self._outlet.protocol.send(_CREDIT, self._id, credit)


async def close_source(source: Any) -> None:
    """Close a generator; other iterators have nothing to close."""
    if hasattr(source, "aclose"):
        await source.aclose()
    elif hasattr(source, "close"):
        source.close()


def _good_part(check: Check, items: list[Any], error: Exception) -> tuple[list[Any], Exception]:
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
