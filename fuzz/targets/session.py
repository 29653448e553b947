"""An open peer: frames of which most is right, so that they come deep.

The peer must not raise, count exactly what it accepted, believe no ACK of what it never sent, and
write nothing but whole frames that a peer of its own kind accepts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

from conduit.exceptions import ProtocolError, RPCError
from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Acknowledged,
    Broken,
    Capabilities,
    Closed,
    Event,
    GoingAway,
    Ponged,
)
from conduit.protocol.frames import (
    ACCEPTED_FLAGS,
    COMPRESSED,
    HEADER,
    REPLY,
    SEQUENCED,
    FrameType,
    word,
)
from conduit.protocol.payload import decode, read_credit
from fuzz.peers import open_pair
from fuzz.source import Source
from fuzz.targets.parser import small_frames
from tests.protocol.pair import Clock, Pair, Side, feed, frames_of, welcome

CAPABILITIES: Final = Capabilities(frame_max=2000, features=frozenset({"zlib"}))
TYPES: Final = tuple(FrameType)
REQUEST: Final = word(FrameType.RPC_REQUEST, SEQUENCED)
ANSWER: Final = word(FrameType.RPC_RESPONSE, SEQUENCED)
STEPS: Final = 48


class Other:
    """The other side of an open peer, which keeps to the rules until the input says otherwise."""

    def __init__(self, source: Source, side: Side) -> None:
        self.source = source
        self.side = side
        self.sent = side.peer.session.received
        self.id = 1 if side.name == "server" else 2
        self.accepted = 0

    def frame(self) -> bytes:
        """Return the next frame."""
        source = self.source
        type = source.choose(TYPES) if source.byte() < 250 else source.byte()
        flags = source.choose(ACCEPTED_FLAGS.get(type, (0,)))
        if source.seldom():
            flags ^= 1 << source.below(16)
        payload = self._payload(type, flags)
        number = 0
        if flags & SEQUENCED:
            self.sent += 1
            number = self.sent
        if source.seldom():
            number = source.number(4)
        size = source.number(4) if source.seldom() else len(payload)
        return HEADER.pack(word(type, flags), size, self._id(type, flags), 0, number) + payload

    def _id(self, type: int, flags: int) -> int:
        source = self.source
        if source.seldom():
            return source.number()
        if type == FrameType.RPC_REQUEST or (
            type == FrameType.MESSAGE
            and flags & SEQUENCED
            and not flags & REPLY
            and source.below(2)
        ):
            self.id += 2
            return self.id - 2
        if type == FrameType.ACK:
            return source.below(1 + min(255, self.side.peer.session.sent))
        if type in (FrameType.MESSAGE, FrameType.GOAWAY, FrameType.CLOSE):
            return 0
        return source.below(self.id) if self.id < 256 else 1

    def _payload(self, type: int, flags: int) -> bytes:
        source = self.source
        empty = type in (FrameType.ACK, FrameType.HEARTBEAT_PING, FrameType.HEARTBEAT_PONG)
        if empty or type == FrameType.STREAM_END:
            return b"" if not source.seldom() else source.short()
        kind = source.below(4)
        payload = source.packed() if kind else source.short()
        if kind == 3:
            payload = b"\x92" + payload + b"\xc6" + source.number(2).to_bytes(4, "big") + bytes(700)
        return zlib.compress(payload) if flags & COMPRESSED else payload


def run(data: bytes) -> None:
    source = Source(data)
    pair = open_pair(_log_in)
    side = pair.server if source.below(2) else pair.client
    other = Other(source, side)
    with small_frames():
        for _ in range(STEPS):
            if side.peer.state is not State.OPEN or source.left < 4:
                break
            if source.below(4):
                stream = b"".join(other.frame() for _ in range(1 + source.below(4)))
                for event in feed(side.peer, stream, source.cut):
                    _check(side.peer, other, event)
            else:
                _act(source, side.peer, pair.clock)
    session = side.peer.session
    assert session.received == other.accepted
    assert session.reported <= session.received
    assert session.outbox_bytes >= 0
    side.wrote += b"".join(side.peer.take())
    frames_of(side.wrote)
    _read_by_another(pair, side)


def _log_in() -> Pair:
    return Pair(
        client={"user": None, "capabilities": CAPABILITIES},
        server={"anonymous": True, "capabilities": CAPABILITIES, "compress": True},
        on_welcome=welcome,
    ).log_in()


def _check(peer: CNDT, other: Other, event: Event) -> None:
    if isinstance(event, tuple):
        type, flags, _, payload = event
        other.accepted += bool(flags & SEQUENCED)
        try:
            read_credit(payload) if type == FrameType.STREAM_CREDIT else decode(payload)
        except (ProtocolError, RPCError):
            pass
    elif isinstance(event, Broken):
        assert isinstance(event.error, ProtocolError)
        assert peer.state is State.CLOSED
    else:
        assert isinstance(event, (Acknowledged, Closed, GoingAway, Ponged))


def _act(source: Source, peer: CNDT, clock: Clock) -> None:
    """Do what an owner does between two reads."""
    kind = source.below(7)
    if kind < 2:
        # An owner sends no more than the other side accepts.
        payload = (source.packed() * 9)[: CAPABILITIES.frame_max]
        peer.send(REQUEST if kind else ANSWER, 2 * source.byte(), payload)
    elif kind == 2:
        peer.send_split(ANSWER, 1, b"\x91\xc6\0\0\x01\0", bytes(256))
    elif kind == 3 and peer.may_ping():
        peer.ping(source.number())
    elif kind == 4:
        peer.acknowledge()
    elif kind == 5:
        clock.now += source.number(2)
    elif source.seldom():
        peer.close(1000, "enough")


def _read_by_another(pair: Pair, side: Side) -> None:
    """Let the other side read all that was written, but for ACKs of what it never sent."""
    reader = pair.other(side).peer
    for raw in frames_of(side.wrote):
        if raw[5] == FrameType.ACK:
            continue
        for event in feed(reader, raw):
            # Ids of requests are the input's own, and may be used twice.
            assert not isinstance(event, Broken) or "correlation id" in str(event.error)


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for side in range(2):
        for type in range(len(TYPES)):
            yield bytes((side, 1, 0, type, 0, 0, 1, 7, 3, 1, 2, 3, 0, 0, 0, 0)) * 3
            yield bytes((side, 0, 0, 1, 4, 0, 0, 1, 2, type, type, 0, 0, 1, 8, 2, 3, 1, 2, 3))
