"""The reading half of a CNDT peer: bytes cut anywhere come in, whole frames go up in order.

`receive` parses by offset and looks the first eight bytes of a header up in the words that are
accepted now, which checks magic, version, type, flags and state at once. A length is checked before
anything is kept of its frame. Sequence numbers and correlation ids are verified here.

The rest of a large frame is read to a buffer that can be used again, or, when it is mostly `bytes`,
right to the object that the handler or the caller gets.
"""

from __future__ import annotations

import io
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from ..exceptions import AuthenticationError, ProtocolError
from .events import Event, Resumed
from .frames import (
    ACCEPTED_FLAGS,
    COMPRESSED,
    ENVELOPE,
    HEADER,
    HEADER_SIZE,
    MAGIC,
    REPLY,
    SEQUENCED,
    CloseCode,
    FrameType,
    Parted,
    not_conduit,
    type_name,
    word,
)
from .payload import COMPRESS_MOST, PLACEHOLDER, inflate, large_bytes
from .session import ACK_BYTES, ACK_FRAMES
from .writer import FrameWriter

__all__ = ["IGNORED", "LOGIN_TYPES", "FrameReader", "Kind", "words"]

BUFFERED: Final = 128 * 1024
"""Bytes from which an unfinished frame gets a buffer of its own."""
APART: Final = 4 * 1024 * 1024 - ENVELOPE
"""Size from which `bytes` are read to where they are to stay. What is smaller is faster in a buffer
that is used again, and copied from there: new memory costs more than the copy.
"""
_BIN_PREFIX: Final = 5
"""Bytes of the token before large `bytes`."""
LOGIN_BYTES: Final = 4096
INFLATED_AT_ONCE: Final = 256 * 1024
"""Bytes of inflated payloads after which the frames behind them wait for another `receive`. A read
is no larger either; but a thousand times as much may be compressed in one.
"""
_ACK: Final = word(FrameType.ACK)

LOGIN_TYPES: Final = frozenset(int(type) for type in FrameType if type.name.startswith("AUTH_"))
_EMPTY: Final = frozenset(
    int(type)
    for type in (
        FrameType.ACK,
        FrameType.HEARTBEAT_PING,
        FrameType.HEARTBEAT_PONG,
        FrameType.STREAM_END,
    )
)


# Names for the hot path: looking a member up in its enum costs more than the comparison.
_MESSAGE: Final = int(FrameType.MESSAGE)
_RPC_ERROR: Final = int(FrameType.RPC_ERROR)
_RPC_REQUEST: Final = int(FrameType.RPC_REQUEST)

Kind = tuple[int, int, bool, bool, tuple[bool, bool, bool]]
"""What a word says: type, flags, whether the frame opens a call or a request, whether it is common;
and of those that are not, whether they are sequenced, need the checks of the rarer frames, and are
compressed. Common is what is sequenced and neither rare nor compressed, as nearly all frames are.
"""


def _kind(type: int, flags: int) -> Kind:
    sequenced = bool(flags & SEQUENCED)
    opens = type == _RPC_REQUEST or (type == _MESSAGE and sequenced and not flags & REPLY)
    rare = type > _RPC_ERROR or (type > 0 and not sequenced)
    compressed = bool(flags & COMPRESSED)
    common = sequenced and not (rare or compressed)
    return type, flags, opens, common, (sequenced, rare, compressed)


IGNORED: Final = _kind(0, 0)


def words(types: tuple[FrameType, ...]) -> dict[int, Kind]:
    """Return what each word of the frame types that are accepted says."""
    return {
        word(type, flags): _kind(int(type), flags)
        for type in types
        for flags in ACCEPTED_FLAGS[type]
    }


_unpack: Final = struct.Struct(">QIQ8xI").unpack_from
"""The header without its time, which is for people who look at frames."""


class FrameReader(FrameWriter, ABC):
    """Takes what comes from the peer.

    Args:
        clock: Returns Unix time in milliseconds, for the headers.
        allocate: Returns a buffer of at least so many bytes for a large frame.

    Attributes:
        accepts: What the words say that may come now; with none of them everything is swallowed.
        wants_id: 1 if correlation ids of the peer must be odd, 0 if even.
        max_payload: Bytes of payload that a frame from the peer may have, envelope included.
        inflates: Whether the peer may compress payloads.
        ack_due: Whether something was accepted that no ACK has told of yet.
        large: The buffer of a large frame that is under way; see `buffer`.
        grew: Whether memory was taken for one, or for what is sent; whoever looks resets it.
        more: Whether frames that have come wait for another `receive`, of nothing if need be,
            because those before them were compressed and are enough for once.
    """

    __slots__ = (
        "_allocate",
        "_apart",
        "_cut",
        "_ends_in",
        "_filled",
        "_heard_bytes",
        "_last_id",
        "_missing",
        "_partial",
        "accepts",
        "ack_due",
        "grew",
        "inflates",
        "large",
        "max_payload",
        "more",
        "wants_id",
    )

    def __init__(self, clock: Callable[[], int], allocate: Callable[[int], memoryview]) -> None:
        super().__init__(clock)
        self._allocate = allocate
        self._last_id = 0
        self.wants_id = 0
        self.accepts: dict[int, Kind] = {}
        self.inflates = False
        self.max_payload = LOGIN_BYTES
        self.forget()

    def forget(self) -> None:
        """Forget the frame that is under way: the rest of it will never come.

        A garbage collection must not find that its buffer is lent out.
        """
        self._partial = b""
        self._missing = 0
        self._cut = 0
        self.large: memoryview | None = None
        self._filled = 0
        self._ends_in = 0
        self._apart: io.BytesIO | None = None
        self._heard_bytes = 0
        self.ack_due = False
        self.grew = False
        self.more = False

    # What there is to be known of a connection, in cndt.py.

    @abstractmethod
    def _unsequenced(
        self, type: int, flags: int, id: int, payload: bytes | memoryview, events: list[Event]
    ) -> None:
        """Deal with a frame that is no part of the session."""

    @abstractmethod
    def _tolerated(self, first: int) -> Kind:
        """Return what a word says that is not accepted as it stands.

        Raises:
            ProtocolError: It must not come now.
        """

    @abstractmethod
    def _failed(self, error: ProtocolError | AuthenticationError, events: list[Event]) -> None:
        """End: the peer has broken a rule."""

    @abstractmethod
    def _limit_text(self) -> str:
        """Say how large a payload may be now."""

    # Reading.

    def buffer(self) -> memoryview | None:
        """Return where the rest of a large frame is to be written, when one is under way."""
        return self.large[self._filled : self._ends_in] if self.large is not None else None

    def buffer_filled(self, count: int) -> list[Event]:
        """Take `count` bytes that were written to `buffer()`."""
        self._filled += count
        large = self.large
        if large is None or self._filled < self._ends_in:
            return []
        self.large = None
        if self._apart is not None:
            self._apart.seek(self._filled)
            return []
        return self.receive(large[: self._ends_in])

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the peer, cut anywhere.

        Returns:
            What happened, in order. `Broken` comes last, and nothing comes after it.
        """
        if not self._partial and len(data) >= HEADER_SIZE:
            first, size, id, number = _unpack(data)
            if size + HEADER_SIZE == len(data):
                # One whole frame, as nearly all reads bring where a few calls are in flight. If it
                # is common and right, the loop is spared; see there.
                type, flags, opens, common, _ = self.accepts.get(first, IGNORED)
                session = self.session
                if (
                    common
                    and number == session.received + 1
                    and size <= self.max_payload
                    and (not opens or (id > self._last_id and id & 1 == self.wants_id))
                ):
                    if opens:
                        self._last_id = id
                    session.received = number
                    self._heard(len(data))
                    return [(type, flags, id, data[HEADER_SIZE:])]
        events: list[Event] = []
        if not self.accepts:
            return events
        if self._partial:
            if self._apart is not None:
                return self._receive_apart(self._apart, data)
            self.more = False
            self._missing -= len(data)
            if self._missing > 0:
                self._partial += bytes(data)
                return events
            data = self._partial + bytes(data)
            self._partial = b""
        try:
            self._parse(data, events)
        except (ProtocolError, AuthenticationError) as exc:
            self._failed(exc, events)
        return events

    def _parse(  # noqa: C901  # the hot loop: a call per frame would cost as much as the frame
        self, data: bytes | memoryview, events: list[Event]
    ) -> None:
        session, limit = self.session, self.max_payload
        received = before = session.received
        last_id, wants_id = self._last_id, self.wants_id
        start, end, known, inflated = 0, len(data), -1, 0
        last_start = end - HEADER_SIZE
        type, flags, opens, common, others = IGNORED
        try:
            while start <= last_start:
                first, size, id, number = _unpack(data, start)
                if first != known:  # mostly the word of the frame before
                    kind = self.accepts.get(first) or self._tolerated(first)
                    type, flags, opens, common, others = kind
                    known = first
                if common and number == received + 1 and size <= limit:
                    # The short way of frames that are right and whole. The others take the long
                    # one, which finds out what is wrong with them.
                    begin = start + HEADER_SIZE
                    stop = begin + size
                    if stop <= end and (
                        not opens
                        or (id > last_id and id & 1 == wants_id)
                        or (not id and type == _MESSAGE)
                    ):
                        if opens and id:
                            last_id = id
                        events.append((type, flags, id, data[begin:stop]))
                        received, start = number, stop
                        continue
                sequenced, rare, compressed = others
                if size > limit:
                    raise self._too_big(size)
                if sequenced:
                    if number != received + 1 & 0xFFFFFFFF:
                        raise ProtocolError(f"frame {number} came where {received + 1} was due")
                    if opens:
                        if (id <= last_id or id & 1 != wants_id) and (id or type == _RPC_REQUEST):
                            raise ProtocolError(f"correlation id {id} after {last_id}")
                elif number:
                    raise ProtocolError(f"reserved field {number} on a frame without a number")
                if rare:
                    _check(type, id, size)
                start += HEADER_SIZE
                stop = start + size
                if stop > end:
                    start -= HEADER_SIZE
                    self._wait_for(data, start, HEADER_SIZE + size)
                    break
                payload = data[start:stop]
                start = stop
                if sequenced or type == _MESSAGE:
                    if compressed:
                        payload = self._inflate(payload)
                    if sequenced:
                        received += 1
                        if opens and id:
                            last_id = id
                    events.append((type, flags, id, payload))
                    if compressed:
                        inflated += len(payload)
                        if inflated >= INFLATED_AT_ONCE and start < end:
                            self._partial, self._missing = bytes(data[start:]), 0
                            self.grew = self.more = True
                            break
                elif type:
                    session.received = received
                    self._unsequenced(type, flags, id, payload, events)
                    if not self.accepts:
                        if type == FrameType.AUTH_SUCCESS and isinstance(events[-1], Resumed):
                            events[-1].rest = bytes(data[start:])
                        return
                    session, limit, known = self.session, self.max_payload, -1
            else:
                if start < end:
                    self._partial = bytes(data[start:])
                    self._cut += 1
                    if not MAGIC.startswith(self._partial[:4]):
                        raise not_conduit(self._partial[:4])
                    self._missing = HEADER_SIZE - (end - start)
        finally:
            session.received = received
            self._last_id = last_id
        if received != before and received != session.reported:
            self._heard(end)

    def _heard(self, size: int) -> None:
        """Acknowledge what was accepted, once it is enough, and until then know that it is due."""
        self._heard_bytes += size
        session = self.session
        if session.received - session.reported >= ACK_FRAMES or self._heard_bytes >= ACK_BYTES:
            self.acknowledge()
        else:
            self.ack_due = True

    def _too_big(self, size: int) -> ProtocolError:
        return ProtocolError(
            f"a payload of {size} bytes exceeds the limit of {self._limit_text()}",
            close_code=CloseCode.TOO_BIG,
        )

    def _wait_for(self, data: bytes | memoryview, start: int, size: int) -> None:
        """Keep the first part of a frame of `size` bytes."""
        rest = bytes(data[start:])
        self._cut += 1
        if size <= BUFFERED:
            self._partial = rest
            self._missing = size - len(rest)
            return
        self.grew = True
        if size < APART or not self._wait_apart(rest, size):
            self.large = self._allocate(size)
            self.large[: len(rest)] = rest
            self._filled = len(rest)
            self._ends_in = size

    def _wait_apart(self, rest: bytes, size: int) -> bool:
        """Let the large `bytes` of a frame be read to where they are to stay, if there are any."""
        first, _, id, stamp, number = HEADER.unpack_from(rest)
        if first & COMPRESSED:
            return False  # its bytes are no MessagePack, whatever they look like
        begin, end = large_bytes(memoryview(rest)[HEADER_SIZE:], size - HEADER_SIZE, APART)
        begin, end = begin + HEADER_SIZE, end + HEADER_SIZE
        behind = size - end
        if begin == end or len(rest) >= end or behind > ENVELOPE:
            return False
        # Parsed as a frame of its own when all is there, so that it is checked like any other.
        payload = rest[HEADER_SIZE : begin - _BIN_PREFIX] + PLACEHOLDER
        self._partial = HEADER.pack(first, len(payload) + behind, id, stamp, number) + payload
        # BytesIO alone lends out memory to read to, and then hands it over uncopied as `bytes`. It
        # copies while it is lent out, and event loops hold a buffer until they have told that it is
        # filled. So the last byte is not read there.
        self._apart = io.BytesIO(bytes(end - begin))
        self._filled = self._apart.write(rest[begin:])
        self._ends_in = end - begin - 1
        self._missing = 1 + behind
        if self._filled < self._ends_in:
            self.large = self._apart.getbuffer()
        return True

    def _receive_apart(self, apart: io.BytesIO, data: bytes | memoryview) -> list[Event]:
        """Take the last byte of large `bytes` and what is behind them, and so the frame."""
        missing = self._missing
        self._missing -= len(data)
        rest = data[:missing]
        if rest and apart.tell() == self._ends_in:
            # Not by `write`, which fails while anybody still holds what was read to: somebody who
            # looks at the stacks of all threads, as profilers do, keeps what stands in them.
            with apart.getbuffer() as whole:
                whole[self._ends_in :] = rest[:1]
            apart.seek(self._ends_in + 1)
            rest = rest[1:]
        self._partial += rest
        if self._missing > 0:
            return []
        frame, self._partial, self._apart = self._partial, b"", None
        large = apart.getvalue()
        self._heard_bytes += len(large)
        events = self.receive(frame)
        for at, event in enumerate(events):
            if type(event) is tuple:  # and not an error that the frame turned out to be
                events[at] = (*event[:3], Parted(frame[HEADER_SIZE:], large))
        return events + self.receive(data[missing:])

    def _inflate(self, payload: bytes | memoryview) -> bytes:
        if not self.inflates:
            raise ProtocolError("a compressed payload, which this side has not offered to inflate")
        return inflate(payload, min(self.max_payload, COMPRESS_MOST))

    @property
    def unfinished(self) -> tuple[int, int]:
        """Which frame has come in part, counted among those that did, and how many bytes of it.

        (0, 0) when there is none.
        """
        if self.large is None and not self._partial:
            return 0, 0
        apart = self.large is not None or self._apart is not None
        return self._cut, len(self._partial) + (self._filled if apart else 0)

    @property
    def held(self) -> int:
        """Bytes of memory that the frame takes which has come in part: what it claims, if large."""
        claimed = self._ends_in if self.large is not None or self._apart is not None else 0
        return claimed + len(self._partial)

    def eof(self) -> bool:
        """Say whether the peer's end of file cut a frame in two."""
        return bool(self._partial) or self.large is not None

    def acknowledge(self) -> None:
        """Queue an ACK of everything accepted so far."""
        session = self.session
        session.reported = session.received
        self._heard_bytes = 0
        self.ack_due = False
        self.send_urgent(_ACK, session.received)


def _check(type: int, id: int, size: int) -> None:
    """Check what only broadcasts and the rarer frames can break."""
    if type == _MESSAGE:
        if id:
            raise ProtocolError(f"correlation id {id} on a message without a number")
    elif type in _EMPTY:
        if size:
            raise ProtocolError(f"{type_name(type)} with {size} bytes of payload")
    elif type in LOGIN_TYPES:
        if id != 1:
            raise ProtocolError(f"correlation id {id} on {type_name(type)}")
    elif type == FrameType.CANCEL and not id:
        raise ProtocolError("CANCEL without a correlation id")
