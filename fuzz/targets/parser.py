"""The peer in each state of both roles, fed with frames of which anything may be wrong.

Whatever comes, it must not raise; and how it was cut on the way must not matter.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from conduit.exceptions import ProtocolError, RPCError
from conduit.protocol import reader
from conduit.protocol.cndt import State
from conduit.protocol.events import Broken, Capabilities, Event
from conduit.protocol.frames import HEADER, FrameType, NotConduit, Payload, word
from conduit.protocol.payload import decode
from fuzz.peers import peer_at
from fuzz.source import Source
from tests.golden_frames import GOLDEN
from tests.protocol.pair import STATES, feed, frames_of, login_frames, written

CAPABILITIES: Final = Capabilities(frame_max=2000, features=frozenset({"zlib"}))
KNOWN: Final = tuple(int(type) for type in FrameType)
FLAGS: Final = (2, 0, 3, 8, 9, 16, 18, 19, 1, 4, 0x100, 0x102, 0xFF00)
RIGHT: Final = tuple(golden.raw for golden in GOLDEN.values()) + tuple(
    frame
    for login in (login_frames(server=CAPABILITIES), login_frames(CAPABILITIES))
    for frame in login
)
SMALL: Final = {"BUFFERED": 300, "APART": 600}
"""Sizes from which frames are read in other ways: small, so that small inputs come there. `decode`
takes what is apart only in payloads above 256 bytes, so it cannot be less.
"""


@contextmanager
def small_frames(state: State = State.OPEN) -> Iterator[None]:
    """Treat frames of a few hundred bytes like those of megabytes, which no login frame can be."""
    true = {name: vars(reader)[name] for name in SMALL}
    vars(reader).update(SMALL if state is State.OPEN else {})
    try:
        yield
    finally:
        vars(reader).update(true)


def run(data: bytes) -> None:
    source = Source(data)
    side, state = source.choose(STATES)
    stream = b"".join(_pieces(source))
    with small_frames(state):
        one, other = (peer_at(side, state, CAPABILITIES) for _ in range(2))
        whole = feed(one, stream)
        cut = feed(other, stream, source.cut)
    for peer in (one, other):
        frames_of(written(peer))  # whole frames only
    last = whole[-1] if whole else None
    if isinstance(last, Broken) and isinstance(last.error, NotConduit) and len(cut) < len(whole):
        # What begins with less than the whole magic is looked at again when a header is there.
        assert other.state is not State.CLOSED and other.eof()
        whole.pop()
    else:
        assert one.state is other.state
    assert _plain(whole) == _plain(cut), "how the bytes were cut has changed what they mean"
    if state is State.OPEN:
        assert one.session.received == other.session.received


def _pieces(source: Source) -> Iterator[bytes]:
    sequenced = 0
    while source.left > 8:
        kind = source.below(8)
        if kind == 0:
            yield source.short()
        elif kind == 1:
            yield source.changed(source.choose(RIGHT))
        else:
            type = source.choose(KNOWN) if kind < 7 else source.byte()
            flags = source.choose(FLAGS)
            payload = _payload(source)
            size = source.number(4) if source.seldom() else len(payload)
            sequenced += bool(flags & 2)
            number = source.number(4) if source.seldom() else sequenced * bool(flags & 2)
            id = source.choose((0, 1, 2, 2 * sequenced + 1)) if kind < 6 else source.number()
            yield HEADER.pack(word(type, flags), size, id, 0, number) + payload


def _payload(source: Source) -> bytes:
    kind = source.below(6)
    if kind == 0:
        return b""
    if kind == 1:
        return source.short()
    if kind == 2:
        return zlib.compress(source.packed())
    if kind == 3:  # mostly one `bytes`, which is read apart
        large = bytes(source.number(2) % 1800)
        return b"\x92\xa1n\xc6" + len(large).to_bytes(4, "big") + source.changed(large)
    if kind == 4:
        return (
            b"\x93" + source.packed() + b"\xc6" + b"\0\0\x03\x00" + bytes(0x300) + source.packed()
        )
    return source.packed()


def _plain(events: list[Event]) -> list[Any]:
    """Return events in a form that can be compared."""
    return [
        (event[:3], len(event[3]), _meaning(event[3]))
        if isinstance(event, tuple)
        else NotConduit  # what it looks like instead is guessed from what has come
        if isinstance(event, Broken) and isinstance(event.error, NotConduit)
        else (type(event.error), str(event.error))
        if isinstance(event, Broken)
        else event
        for event in events
    ]


def _meaning(payload: Payload) -> str:
    try:
        return repr(decode(payload))
    except (ProtocolError, RPCError) as exc:
        return type(exc).__name__


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for number in range(len(STATES)):
        for at in range(len(RIGHT)):
            yield bytes((number, 1, at, 0)) + bytes(12)
        yield bytes((number,)) + bytes(range(40))
