"""The messages that this side sends, within the credit of the peer; inbox.py has those of the peer.

A side may send as many messages as the other has granted, and gets the credit back when they have
been handled.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections import deque
from functools import partial
from typing import Any, Final, Protocol

from ..exceptions import ConnectionClosed, ConnectionLost, Overloaded, RPCTimeout, Unavailable
from ..protocol.events import Capabilities
from ..protocol.frames import SEQUENCED, FrameType, Payload, word
from ..protocol.payload import UNSENDABLE, Encoder, read_credit
from .calls import Calls, Moved, closed_again, unserved
from .handling import HANDLING
from .line import NOBODY, Line
from .outlet import Outlet
from .requests import DEFAULT, NAME_BYTES, Default, too_large

__all__ = ["Messages", "encode_message"]

logger = logging.getLogger("conduit.connection")

_MESSAGE: Final = word(FrameType.MESSAGE, SEQUENCED)

LONG_WAIT = 10.0
"""Seconds after which a handler that waits for credit is told of in the log."""


class Replies(Protocol):
    """What this needs of the inbox, where replies wait."""

    expected: int
    replies: int

    async def calm(self) -> None: ...


class Messages:
    """The messages that go out on one connection.

    Args:
        outlet: Where frames go.
        encoder: Packs data.
        calls: Keeps what waits for an answer.
        inbox: Is told of messages, and keeps their replies.
        backpressure: Whether a sender waits for credit, or is refused.

    Attributes:
        reliable_bytes: Bytes of the reliable broadcasts that wait for credit.
    """

    __slots__ = (
        "_bytes",
        "_calls",
        "_count",
        "_encoder",
        "_inbox",
        "_line",
        "_outlet",
        "_reliable",
        "_value_max",
        "_waits",
        "reliable_bytes",
    )

    def __init__(
        self,
        outlet: Outlet,
        encoder: Encoder,
        calls: Calls,
        inbox: Replies,
        *,
        backpressure: bool,
    ) -> None:
        self._outlet = outlet
        self._encoder = encoder
        self._calls = calls
        self._inbox = inbox
        self._waits = backpressure
        self._line = NOBODY
        self._count = self._bytes = 0
        self._value_max = sys.maxsize
        self._reliable: deque[bytes] | None = None
        self.reliable_bytes = 0

    def opened(self, peer: Capabilities) -> None:
        """Learn what the peer grants."""
        self._count, self._bytes = peer.window
        self._value_max = peer.frame_max

    async def send(self, name: str, data: Any) -> None:
        """Send a message; returns when it is in the outbox.

        Who does not handle the replies to earlier messages waits, unless it is a handler itself.
        """
        payload = self._encode(name, data)
        if self._inbox.replies and HANDLING.get() is None:
            await self._inbox.calm()
        if not self._may_send():
            try:
                await self._turn(name, math.inf, None)
            except Moved:
                assert self._calls.elsewhere is not None
                await self._calls.elsewhere.send(name, data)
                return
        self._put(0, payload)

    async def request(self, name: str, data: Any, timeout: float | None | Default = DEFAULT) -> Any:
        """Send a message and return what its handler answers."""
        payload = self._encode(name, data)
        calls = self._calls
        seconds, deadline = calls.deadline(timeout)
        try:
            await calls.until_opened(name, deadline, seconds)
            if not self._may_send():
                await self._turn(name, deadline, seconds)
            id = calls.take_id()
            self._put(id, payload)
            return await calls.reply(id, name, seconds, deadline)
        except Moved:
            pass
        except (Unavailable, ConnectionLost) as exc:
            if calls.elsewhere is None or not unserved(exc):
                raise
        assert calls.elsewhere is not None
        return await calls.elsewhere.request(name, data, calls.left(deadline))

    def leave(self) -> list[bytes]:
        """Send nothing more: the peer goes away.

        Returns:
            The payloads of the reliable messages that were not sent yet.
        """
        self._count = -sys.maxsize  # no credit makes up for it, so that nobody may send
        self._line.fail(Moved)
        unsent, self._reliable = self._reliable, None
        self.reliable_bytes = 0
        return list(unsent or ())

    def send_reliably(self, payload: bytes) -> int:
        """Send an encoded message without waiting; what has no credit yet is kept in order.

        Returns:
            The bytes that are kept.
        """
        if self._reliable or not self._may_send():
            if self._reliable is None:
                self._reliable = deque()
            self._reliable.append(payload)
            self.reliable_bytes += len(payload)
            self._outlet.head.grown()
            return self.reliable_bytes
        self._put(0, payload)
        return 0

    def _encode(self, name: str, data: Any) -> bytes:
        if self._outlet.closed is not None and self._calls.elsewhere is None:
            raise closed_again(self._outlet.closed)
        return encode_message(self._encoder, name, data, self._value_max)

    def _may_send(self) -> bool:
        return not self._line.waiters and not self._reliable and self._has_room()

    async def _turn(self, name: str, deadline: float, seconds: float | None) -> None:
        """Wait in line for credit and for room in the outbox."""
        if HANDLING.get() is None or not self._waits:
            await self._wait(name, deadline, seconds)
            return
        # Handlers of both sides may wait for each other like this, and nothing else would tell.
        told = asyncio.get_running_loop().call_later(LONG_WAIT, self._tell_of_wait, name)
        try:
            await self._wait(name, deadline, seconds)
        finally:
            told.cancel()

    def _tell_of_wait(self, name: str) -> None:
        logger.warning(
            "a handler has waited %g s to send %r to a peer that does not keep up; if handlers "
            "there wait to send to this side, both wait for ever: return the value instead, which "
            "needs no credit, or send it from a task",
            LONG_WAIT,
            name,
        )

    async def _wait(self, name: str, deadline: float, seconds: float | None) -> None:
        again = False
        while True:
            if self._calls.elsewhere is not None:
                raise Moved
            if self._outlet.closed is not None:
                raise closed_again(self._outlet.closed)
            if not self._waits:
                raise Overloaded(f"the peer does not keep up, so {name!r} was not sent")
            if self._line is NOBODY:
                self._line = Line()
            try:
                await self._line.wait(None if deadline == math.inf else deadline, again=again)
            except asyncio.TimeoutError:
                raise RPCTimeout(
                    f"{name!r} waited {seconds} s for credit",
                    details={"retryable": True, "executed": False},
                ) from None
            if self._has_room():
                return
            again = True

    def _has_room(self) -> bool:
        return self._count > 0 and self._bytes > 0 and not self._outlet.blocked

    def _put(self, id: int, payload: bytes) -> None:
        self._spend_credit(payload)
        self._inbox.expected += not id
        self._outlet.protocol.send(_MESSAGE, id, payload)
        if self._line.waiters:
            self.room()

    def _spend_credit(self, payload: bytes) -> None:
        self._count -= 1
        self._bytes -= len(payload)

    def room(self) -> None:
        """Go on: there is more credit, or the outbox has room again."""
        while self._reliable and self._has_room():
            payload = self._reliable.popleft()
            self.reliable_bytes -= len(payload)
            self._spend_credit(payload)
            self._inbox.expected += 1
            self._outlet.protocol.send(_MESSAGE, 0, payload)
        if self._line.waiters and self._has_room():
            self._line.move()

    def credit(self, payload: Payload) -> None:
        """Take STREAM_CREDIT of stream 0."""
        count, size = read_credit(payload)
        self._count += count
        self._bytes += size
        self.room()

    def fail(self, error: ConnectionClosed) -> None:
        """Send whoever waits away: the connection is gone."""
        self._line.fail(partial(closed_again, error))
        self._reliable = None
        self.reliable_bytes = 0


def encode_message(encoder: Encoder, name: str, data: Any, limit: int = sys.maxsize) -> bytes:
    """Return the payload of a MESSAGE.

    Raises:
        PayloadTooLarge: The data take more than `limit` bytes.
        TypeError: The data cannot be sent; ValueError for a number or text that cannot.
        ValueError: The name is none.
    """
    if not isinstance(name, str) or not 0 < len(name.encode()) <= NAME_BYTES:
        raise ValueError(f"a message name is text of 1 to {NAME_BYTES} bytes, not {name!r:.80}")
    try:
        value = encoder.pack(data)
    except UNSENDABLE as exc:
        raise encoder.explained(exc, data) from exc
    if len(value) > limit:
        raise too_large(f"the data of {name!r}", len(value), limit)
    return b"\x92" + encoder.pack(name) + value
