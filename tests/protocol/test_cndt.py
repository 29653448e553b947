"""The peer: what may come in which state, what it makes of it, and in what order it speaks.

The state table is compared with the one of docs/protocol.md, read from the page itself.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conduit.exceptions import AuthenticationError, ProtocolError
from conduit.protocol.cndt import ACCEPTS, CNDT, State
from conduit.protocol.events import (
    Broken,
    Capabilities,
    Closed,
    Event,
    GoingAway,
    KeysNeeded,
    Opened,
    Ponged,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import ENVELOPE, FrameType, Parted, word
from conduit.protocol.payload import decode
from conduit.protocol.reader import APART
from conduit.protocol.writer import LARGE_FRAME
from tests.golden_frames import GOLDEN
from tests.protocol.pair import (
    STATES,
    Clock,
    Frame,
    Pair,
    byte_by_byte,
    client_in,
    cut_at,
    feed,
    frames_of,
    login_frames,
    make_client,
    peer_in,
    pieces_of,
    server_in,
    whole,
    written,
)
from tests.wire_client import (
    ACK,
    AUTH_FAILURE,
    AUTH_REQUEST,
    AUTH_SUCCESS,
    CANCEL,
    CLOSE,
    COMPRESSED,
    GOAWAY,
    HEADER,
    MESSAGE,
    PING,
    PONG,
    PRIORITY,
    REPLY,
    RPC_ERROR,
    RPC_REQUEST,
    RPC_RESPONSE,
    SEQUENCED,
    STREAM_CREDIT,
    STREAM_END,
    STREAM_ITEM,
    frame,
    pack,
    unpack,
)

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
ZLIB = Capabilities(features=frozenset({"zlib"}))
KIB = 1024
LARGE = 128 * KIB
"""Frames above this, header included, get a buffer of their own."""
MIB = 1024 * KIB


@pytest.fixture
def server() -> CNDT:
    return server_in(State.OPEN, capabilities=ZLIB)


@pytest.fixture
def client() -> CNDT:
    return client_in(State.OPEN)


def message(number: int, payload: bytes = b"", flags: int = SEQUENCED) -> bytes:
    return frame(MESSAGE, flags, 0, payload, number)


def error_of(events: list[Event]) -> ProtocolError:
    """Return the error with which a peer broke; nothing else may have happened."""
    (event,) = events
    assert isinstance(event, Broken)
    assert isinstance(event.error, ProtocolError)
    return event.error


def said(peer: CNDT) -> list[tuple[int, int]]:
    """Take what a peer has to say, as type and id of each frame."""
    headers = [HEADER.unpack_from(raw) for raw in frames_of(written(peer))]
    return [(header[2], header[5]) for header in headers]


def goodbye(peer: CNDT) -> tuple[int, str]:
    """Take what a peer has to say, which must be CLOSE, and return code and reason."""
    raw = written(peer)
    magic, version, type, flags, length, id, _, reserved = HEADER.unpack_from(raw)
    assert (magic, version, type, flags, id, reserved) == (b"CNDT", 1, CLOSE, 0, 0, 0)
    assert len(raw) == HEADER.size + length
    code, reason = unpack(raw[HEADER.size :])
    assert len(reason.encode()) <= 123
    return code, reason


# Which frame may come when

ROW = re.compile(r"^\| (\d+) \| ([A-Z_]+) \| (yes|no)[^|]* \| (yes|no) \|", re.MULTILINE)


def flags_of_the_page() -> dict[int, set[int]]:
    """Return type -> the flags that section 3 of the page lets a sender put on it."""
    legal: dict[int, set[int]] = {}
    for number, name, sequenced, compressed in ROW.findall(PAGE.read_text("utf-8")):
        flags = {SEQUENCED if sequenced == "yes" else 0}
        if name == "MESSAGE":
            flags |= {SEQUENCED | REPLY, PRIORITY}
        if name == "HEARTBEAT_PING":
            flags |= {PRIORITY}
        if compressed == "yes":
            flags |= {flag | COMPRESSED for flag in flags}
        legal[int(number)] = flags
    return legal


LEGAL = flags_of_the_page()
AUTH = {type for type in FrameType if type.name.startswith("AUTH_")}
MAY_COME: dict[tuple[str, State], set[int]] = {
    ("server", State.AWAIT_REQUEST): {AUTH_REQUEST, CLOSE},
    ("server", State.AWAIT_VERIFIER): {CLOSE},
    ("server", State.AWAIT_PROOF): {FrameType.AUTH_RESPONSE, CLOSE},
    ("server", State.AWAIT_WELCOME): {CLOSE},
    ("server", State.OPEN): LEGAL.keys() - AUTH,
    ("client", State.AWAIT_CHALLENGE): {FrameType.AUTH_CHALLENGE, AUTH_FAILURE, CLOSE},
    ("client", State.AWAIT_KEYS): {AUTH_FAILURE, CLOSE},
    ("client", State.AWAIT_SUCCESS): {AUTH_SUCCESS, AUTH_FAILURE, CLOSE},
    ("client", State.OPEN): LEGAL.keys() - AUTH,
}
"""Section 6.4 of the page."""

EMPTY = {ACK, PING, PONG, STREAM_END}
FAILURE = GOLDEN["auth_failure"].raw
LOGINS = {
    side: {raw[5]: raw[HEADER.size :] for raw in (*login, FAILURE)}
    for side, login in [("server", login_frames(server=ZLIB)), ("client", login_frames(ZLIB))]
}
"""Reader -> type -> the payload that a peer with the capabilities `ZLIB` expects."""


def fitting(side: str, type: int, flags: int) -> bytes:
    """Return a frame of this type and these flags of which everything else is right."""
    ids = {MESSAGE: 0, ACK: 0, GOAWAY: 0, CLOSE: 0, RPC_REQUEST: 1 if side == "server" else 2}
    body = [1001, "text", 5000, 3] if type == GOAWAY else [1000, "text"]
    payload = LOGINS[side].get(type, b"" if type in EMPTY else pack(body))
    if flags & COMPRESSED:
        payload = zlib.compress(payload)
    return frame(type, flags, ids.get(type, 1), payload, 1 if flags & SEQUENCED else 0)


def test_the_page_lists_the_types_of_the_library() -> None:
    assert [(int(row[0]), row[1]) for row in ROW.findall(PAGE.read_text("utf-8"))] == [
        (int(type), type.name) for type in FrameType
    ]


def test_the_state_table_is_the_one_of_the_page() -> None:
    assert ACCEPTS.keys() | {State.CLOSED} == set(State)
    for side, state in STATES:
        assert set(ACCEPTS[state]) == MAY_COME[side, state]


KNOWN_FLAGS = [flags for flags in range(32) if not flags & 4]
UNKNOWN_FLAGS = [0, 4, 32, 64, 128, 4 | 32 | 64 | 128]


def every_header(state: State) -> Iterator[tuple[int, int]]:
    """Yield type and flags: the known types with all flags, the others with some.

    An open peer, where most is allowed, meets all 256 low bytes; at login each combination of the
    known flags comes alone, with each of the unknown ones and with all of these.
    """
    low = {known | unknown for known in KNOWN_FLAGS for unknown in UNKNOWN_FLAGS}
    for type in range(256):
        if type in LEGAL:
            yield from ((type, flags) for flags in (range(256) if state is State.OPEN else low))
            yield from ((type, high | flags) for high in (0x100, 0xFF00) for flags in LEGAL[type])
        else:
            yield from ((type, flags) for flags in (0, 2, 8, 128, 0x8000))


@pytest.mark.parametrize(("side", "state"), STATES)
def test_what_a_state_does_not_allow_is_refused(side: str, state: State) -> None:
    """Every type with every combination of flags, to both sides in every state."""
    for type, flags in every_header(state):
        peer = peer_in(side, state, capabilities=ZLIB)
        events = feed(peer, fitting(side, type, flags))
        at = (side, state, type, flags, events)
        if type in MAY_COME[side, state] and flags & 0xFF in LEGAL[type]:
            assert type == AUTH_FAILURE or not broken(events), at
        elif type >= 128 and state is State.OPEN and not flags & 0xFF:
            assert events == [], at
            assert peer.state is State.OPEN, at
            assert written(peer) == b"", at
        else:
            assert broken(events), at
            assert peer.state is State.CLOSED, at
            if side == "client" and state is not State.OPEN:
                assert written(peer) == b"", at
            else:
                assert goodbye(peer)[0] == 1002, at


def broken(events: list[Event]) -> bool:
    return any(isinstance(event, Broken) for event in events)


@pytest.mark.parametrize("type", sorted(MAY_COME["server", State.OPEN]))
@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("high", [0, 0x100, 0xFF00])
def test_what_an_open_peer_makes_of_each_frame(side: str, type: int, high: int) -> None:
    """Flags in the high byte are ignored: the owner does not even see them."""
    for flags in LEGAL[type]:
        peer = peer_in(side, State.OPEN, capabilities=ZLIB)
        raw = fitting(side, type, flags | high)
        events = feed(peer, raw)
        if type == CLOSE:
            assert events == [Closed(1000, "text")]
        elif type == GOAWAY:
            assert events == [GoingAway(1001, "text", 3)]
        elif type == PONG:
            assert events == [Ponged(1)]
        elif type in (ACK, PING):
            assert events == []
            assert said(peer) == ([(PONG, 1)] if type == PING else [])
        else:
            payload = b"" if type in EMPTY else pack([1000, "text"])
            assert events == [Frame(type, flags, HEADER.unpack_from(raw)[5], payload)]


def test_an_anonymous_client_takes_no_challenge() -> None:
    client = make_client(user=None)
    assert client.state is State.AWAIT_SUCCESS
    assert "AUTH_CHALLENGE came where" in str(error_of(feed(client, login_frames().challenge)))


@pytest.mark.parametrize(("side", "state"), STATES)
def test_a_closed_peer_swallows_what_still_comes(side: str, state: State) -> None:
    peer = peer_in(side, state)
    assert feed(peer, frame(CLOSE, payload=pack([1000, "bye"]))) == [Closed(1000, "bye")]
    assert peer.state is State.CLOSED
    for data in (*login_frames(), message(1), frame(PING), b"garbage", b"C"):
        assert peer.receive(data) == []
    assert written(peer) == b""


@pytest.mark.parametrize(("side", "state"), STATES)
def test_nothing_is_made_of_what_follows_an_error(side: str, state: State) -> None:
    """In the same read or in a later one."""
    wrong = frame(0)
    for split in (whole, byte_by_byte, pieces_of(32)):
        peer = peer_in(side, state)
        events = feed(peer, wrong + message(1) + frame(PING, id=1) * 3, split)
        assert error_of(events).close_code == 1002
        left = written(peer)
        assert left == b"" or [raw[5] for raw in frames_of(left)] == [CLOSE]
        assert peer.receive(message(1)) == []
        assert written(peer) == b""


# Nothing that comes makes it raise

KNOWN = sorted(LEGAL)
NUMBERS = st.integers(0, 6) | st.integers(0, 2**64 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
PAYLOADS = (
    st.just(b"")
    | st.binary(max_size=60)
    | PLAIN.map(pack)
    | st.tuples(PLAIN, PLAIN).map(list).map(pack)
    | st.binary(max_size=60).map(zlib.compress)
    | st.sampled_from(sorted(LOGINS["server"].values()))
)
FRAMES = st.builds(
    frame,
    st.sampled_from(KNOWN) | st.sampled_from(KNOWN) | st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 8, 9, 18, 0x100]) | st.integers(0, 2**16 - 1),
    NUMBERS,
    PAYLOADS,
    st.integers(0, 4),
    st.sampled_from([1, 1, 1, 1, 2]),
)
FITTING = st.builds(
    fitting,
    st.sampled_from(["server", "client"]),
    st.sampled_from(KNOWN),
    st.sampled_from([0, 2, 3, 8, 18]),
)
STREAMS = st.lists(FITTING | FRAMES | st.binary(max_size=50), max_size=8).map(b"".join)
INFINITE = frame(CLOSE, payload=pack([float("inf"), "x"]))
DEEP = frame(CLOSE, payload=b"\x92\x01" + b"\x91" * 1000 + b"\xc0")


@pytest.mark.parametrize(("side", "state"), STATES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=STREAMS, cuts=st.lists(st.integers(0, 500), max_size=6))
def test_receive_never_raises(side: str, state: State, data: bytes, cuts: list[int]) -> None:
    """Whatever comes, the owner gets events, and the peer is open or shut for good."""
    peer = peer_in(side, state, capabilities=ZLIB)
    events = feed(peer, data, cut_at(*cuts))
    questions = (VerifierNeeded, WelcomeNeeded, KeysNeeded)
    if any(isinstance(event, (Broken, Closed)) for event in events):
        assert peer.state is State.CLOSED
        assert peer.receive(message(1)) == []
    else:
        opened = any(isinstance(event, (Opened, *questions)) for event in events)
        assert opened or peer.state is state
    frames_of(written(peer))  # whole frames only


@settings(max_examples=60)
@given(
    at=st.integers(0, 10_000),
    change=st.binary(min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
)
@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_conversation_with_wrong_bytes_never_raises(
    sender: str, at: int, change: bytes, cuts: list[int]
) -> None:
    side, state = ("server", State.OPEN) if sender == "client" else ("client", State.OPEN)
    mine = [golden.raw for golden in GOLDEN.values() if golden.sender == sender]
    data = b"".join(raw for raw in mine if raw[5] not in AUTH)
    at %= len(data)
    peer = peer_in(side, state, capabilities=ZLIB)
    feed(peer, data[:at] + change + data[at + len(change) :], cut_at(*cuts))
    frames_of(written(peer))


@pytest.mark.parametrize(
    ("data", "guess"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "they look like HTTP"),
        (b"\x16\x03\x01\x02\x00\x01", "they look like TLS"),
        (b"\x16\x03\x01\x02\x00\x01" * 9, "they look like TLS"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "they look like TLS"),
        (b"CNDX", "does the peer speak CNDT"),
    ],
)
def test_what_is_not_conduit_gets_no_byte_before_the_login(data: bytes, guess: str) -> None:
    server = server_in(State.AWAIT_REQUEST)
    assert guess in str(error_of(feed(server, data)))
    assert written(server) == b""
    client = client_in(State.AWAIT_CHALLENGE)
    assert error_of(feed(client, data * 3)).close_code == 1002
    assert written(client) == b""


@pytest.mark.parametrize("side", ["server", "client"])
def test_what_is_not_conduit_is_an_error_like_others_after_it(side: str) -> None:
    peer = peer_in(side, State.OPEN)
    assert error_of(feed(peer, bytes(32))).close_code == 1002
    assert goodbye(peer)[0] == 1002


def test_another_version() -> None:
    """Before the login the client is told both versions, in a header that it may understand."""
    server = server_in(State.AWAIT_REQUEST)
    newer = b"CNDT\x02" + login_frames().request[5:]
    error_of(feed(server, newer))
    (raw,) = frames_of(written(server))
    assert raw[:6] == b"CNDT\x01" + bytes([AUTH_FAILURE])
    failure = unpack(raw[HEADER.size :])
    assert failure["code"] == "unsupported_version"
    assert "version 2" in failure["message"]
    assert "version 1" in failure["message"]

    for side, state in STATES:
        if state is State.OPEN:
            peer = peer_in(side, state)
            assert "version 2" in str(error_of(feed(peer, frame(PING, version=2))))
            assert goodbye(peer)[0] == 1002
        elif side == "client":
            peer = peer_in(side, state)
            error_of(feed(peer, frame(AUTH_FAILURE, id=1, version=2)))
            assert written(peer) == b""


def test_the_error_says_what_was_expected() -> None:
    text = str(error_of(feed(server_in(State.AWAIT_PROOF), login_frames().request)))
    assert text == "AUTH_REQUEST came where AUTH_RESPONSE or CLOSE was expected"
    text = str(error_of(feed(server_in(State.OPEN), login_frames().request)))
    assert text == "AUTH_REQUEST came where a frame of an open connection was expected"
    text = str(error_of(feed(server_in(State.OPEN), frame(25))))
    assert text == "unknown frame type 25"
    text = str(error_of(feed(server_in(State.OPEN), frame(PING, 4))))
    assert text == "flags 0x04 are not allowed on HEARTBEAT_PING"
    text = str(error_of(feed(server_in(State.OPEN), frame(130, 4))))
    assert text == "flags 0x04 are not allowed on frame type 130"


# Header fields

WRONG_FIELDS: dict[str, bytes] = {
    "magic": b"CNDX" + message(1, b"x")[4:],
    "version": frame(MESSAGE, SEQUENCED, 0, b"x", 1, version=2),
    "type": frame(25, 0, 0, b"x"),
    "flags": frame(MESSAGE, 0, 0, b"x", 1),
    "length": HEADER.pack(b"CNDT", 1, MESSAGE, SEQUENCED, 2**32 - 1, 0, 0, 1),
    "payload of an empty type": frame(PING, 0, 1, b"x"),
    "payload of an end": frame(STREAM_END, SEQUENCED, 1, b"x", 1),
    "id of the wrong kind": frame(RPC_REQUEST, SEQUENCED, 2, b"x", 1),
    "id of a broadcast": frame(MESSAGE, PRIORITY, 1, b"x"),
    "no id": frame(CANCEL, SEQUENCED, 0, b"x", 1),
    "number": frame(MESSAGE, SEQUENCED, 0, b"x", 2),
    "reserved": frame(GOAWAY, 0, 0, b"x", 1),
    "reserved of an extension": frame(200, 0, 0, b"x", 1),
}


@pytest.mark.parametrize("data", WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_header_is_an_error(data: bytes) -> None:
    code = 1009 if HEADER.unpack_from(data)[4] > MIB else 1002
    server = server_in(State.OPEN)
    assert error_of(feed(server, data)).close_code == code
    assert goodbye(server)[0] == code


@pytest.mark.parametrize("data", WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_header_is_an_error_as_soon_as_it_is_there(data: bytes) -> None:
    """Before any room is made for the payload, which may be a megabyte (section 2)."""
    server = server_in(State.OPEN)
    error_of(feed(server, data[: HEADER.size]))


@pytest.mark.parametrize("field", ["magic", "version", "type", "flags", "length"])
def test_a_wrong_header_that_comes_in_pieces_is_an_error_once_it_is_whole(field: str) -> None:
    server = server_in(State.OPEN)
    data = WRONG_FIELDS[field][: HEADER.size]
    assert feed(server, data[:1], byte_by_byte) == []
    error_of(feed(server, data[1:], byte_by_byte))


# Large frames


class Buffers:
    """Counts the buffers that a peer asks for, and gives it more than it asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, size: int) -> memoryview:
        self.sizes.append(size)
        return memoryview(bytearray(size + 999))


def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes in which a piece that is lost, doubled or moved shows."""
    block = b"".join((number + seed).to_bytes(4, "big") for number in range(1024))
    return (block * (size // len(block) + 1))[:size]


EDGES = [1, 31, 32, 33, 100, LARGE - 1, LARGE, LARGE + 31, LARGE + 32]


@pytest.mark.parametrize("cut", [*EDGES, -2, -1])
@pytest.mark.parametrize("small", [b"", b"small"])
def test_a_large_frame_arrives_at_any_cut(cut: int, small: bytes) -> None:
    payload = pattern(LARGE)
    before = message(1, small) if small else b""
    data = before + message(2 if small else 1, payload) + message(3 if small else 2, b"behind")
    server = server_in(State.OPEN)
    events = feed(server, data, cut_at(cut % len(data)))
    payloads = [event.payload for event in events if isinstance(event, Frame)]
    assert payloads == [*([small] if small else []), payload, b"behind"]
    assert server.session.received == len(payloads)


@settings(max_examples=30)
@given(
    sizes=st.lists(
        st.sampled_from([0, 5, 100, LARGE - 32, LARGE - 31, LARGE, 150_000, 300_000]),
        min_size=1,
        max_size=6,
    ),
    cuts=st.lists(st.integers(0, 1_000_000), max_size=12),
)
def test_large_and_small_frames_arrive_at_random_cuts(sizes: list[int], cuts: list[int]) -> None:
    payloads = [pattern(size, number) for number, size in enumerate(sizes)]
    data = b"".join(message(number, payload) for number, payload in enumerate(payloads, 1))
    server = server_in(State.OPEN, allocate=Buffers())
    events = feed(server, data, cut_at(*cuts))
    assert [event.payload for event in events if isinstance(event, Frame)] == payloads
    assert server.buffer() is None
    assert not server.eof()


@pytest.mark.parametrize("size", [1500, 16 * KIB, 64 * KIB, 256 * KIB])
def test_large_frames_in_a_row_arrive_in_pieces_of_any_size(size: int) -> None:
    payloads = [pattern(200_000, 1), pattern(LARGE, 2), b"small", pattern(150_000, 3), b""]
    data = b"".join(message(number, payload) for number, payload in enumerate(payloads, 1))
    server = server_in(State.OPEN)
    events = feed(server, data, pieces_of(size))
    assert [event.payload for event in events if isinstance(event, Frame)] == payloads


def test_only_a_large_frame_that_is_not_whole_gets_a_buffer() -> None:
    buffers = Buffers()
    server = server_in(State.OPEN, allocate=buffers)
    exact, large = message(1, bytes(LARGE - 32)), message(2, bytes(LARGE - 31))
    assert len(feed(server, exact, cut_at(LARGE // 2))) == 1
    assert len(feed(server, large)) == 1
    assert buffers.sizes == []
    large = message(3, bytes(LARGE - 31))
    assert feed(server, large[:33]) == []
    assert buffers.sizes == [LARGE + 1]
    room = server.buffer()
    assert room is not None
    assert len(room) == len(large) - 33
    assert server.eof()
    assert len(feed(server, large[33:], pieces_of(10_000))) == 1
    assert server.buffer() is None
    assert not server.eof()
    assert buffers.sizes == [LARGE + 1]


@pytest.mark.parametrize("cut", [32, 33, 1000, LARGE])
def test_a_large_frame_is_checked_like_others(cut: int) -> None:
    server = server_in(State.OPEN)
    data = frame(RPC_REQUEST, SEQUENCED, 2, bytes(LARGE), 1)
    error_of(feed(server, data, cut_at(cut)))
    assert goodbye(server)[0] == 1002
    assert feed(server, data) == []


def test_a_large_frame_of_an_extension_is_ignored() -> None:
    server = server_in(State.OPEN)
    data = frame(200, payload=bytes(LARGE)) + message(1, b"next")
    events = feed(server, data, pieces_of(50_000))
    assert [event.payload for event in events if isinstance(event, Frame)] == [b"next"]


def test_a_peer_that_is_closed_within_a_large_frame_stays_closed() -> None:
    server = server_in(State.OPEN)
    data = message(1, bytes(LARGE))
    assert feed(server, data[:1000]) == []
    room = server.buffer()
    assert room is not None
    server.close(1000, "enough")
    assert server.buffer_filled(len(room)) == []
    assert server.receive(message(2)) == []
    assert goodbye(server) == (1000, "enough")


def test_a_read_that_was_under_way_for_nothing_changes_nothing(server: CNDT) -> None:
    assert server.buffer() is None
    assert server.buffer_filled(0) == []


# Large bytes, which are read to where they are to stay

HUGE = Capabilities(frame_max=2 * APART)
FILE = {"name": "a file", "data": pattern(APART)}
HEAD = len(pack(["put", {**FILE, "data": b""}])) + 3  # where the data begins: four bytes of length


def payloads_of(events: list[Event]) -> list[Any]:
    return [decode(event.payload) for event in events if isinstance(event, Frame)]


def lengths_of(events: list[Event]) -> list[int]:
    return [len(event.payload) for event in events if isinstance(event, Frame)]


def parted(events: list[Event]) -> list[bool]:
    return [isinstance(event.payload, Parted) for event in events if isinstance(event, Frame)]


@pytest.mark.parametrize(
    ("cuts", "is_parted"),
    [
        ([], False),
        ([10], False),  # not even a header: one buffer for the whole frame, as for any other
        ([32], False),
        ([31 + HEAD], False),  # without the token's last byte
        ([32 + HEAD], True),
        ([33 + HEAD], True),
        ([LARGE, 2 * LARGE], True),
        ([1000, -1], True),
        ([1000, -2, -1], True),
        ([-2, -1], True),
        ([-1], True),
    ],
)
def test_large_bytes_at_the_end_arrive_at_any_cut(cuts: list[int], is_parted: bool) -> None:
    buffers = Buffers()
    server = server_in(State.OPEN, allocate=buffers, capabilities=HUGE)
    data = message(1, pack(["put", FILE]))
    behind = message(2, pack(["behind", None]))
    for places in (cuts, [*cuts, len(data)]):
        events = feed(server, data + behind, cut_at(*(cut % len(data) for cut in places)))
        assert payloads_of(events) == [["put", FILE], ["behind", None]]
        assert lengths_of(events) == [len(data) - 32, len(behind) - 32], "as credit counts them"
        assert parted(events) == [is_parted, False]
        assert server.buffer() is None
        assert not server.eof()
        assert server.session.received == 2
        assert [frame[5] for frame in frames_of(written(server))] == [ACK]
        server = server_in(State.OPEN, allocate=buffers, capabilities=HUGE)
    assert not (is_parted and buffers.sizes)


@pytest.mark.parametrize("end", [0, 1, 2, 9, 10, 11])
def test_large_bytes_arrive_with_something_behind_them(end: int) -> None:
    """The deadline of a call comes last, as do parameters that are given last."""
    value = ["put", [pattern(APART), "x"], {"ttl": 5000}]
    data, behind = message(1, pack(value)), message(2, pack(["behind", None]))
    ttl = len(pack(["x", {"ttl": 5000}])) - 1
    assert ttl == 10
    for cuts in ([1000, len(data) - ttl + 4 - end], [1000, -end - 1, -end], [-end - 2, -1]):
        server = server_in(State.OPEN, capabilities=HUGE)
        places = cut_at(*(cut % len(data) for cut in cuts))
        events = feed(server, data + behind, places)
        assert payloads_of(events) == [value, ["behind", None]]
        assert lengths_of(events) == [len(data) - 32, len(behind) - 32]
        assert server.session.received == 2
        assert not server.eof()


@pytest.mark.parametrize("size", [1500, 64 * KIB, MIB])
def test_large_bytes_arrive_in_pieces_and_each_in_memory_of_its_own(size: int) -> None:
    server = server_in(State.OPEN, capabilities=HUGE)
    values = [pattern(APART + number, number) for number in range(3)]
    data = b"".join(message(n, pack(["put", value])) for n, value in enumerate(values, 1))
    events = feed(server, data, pieces_of(size))
    assert payloads_of(events) == [["put", value] for value in values]
    assert all(parted(events))


def test_the_link_ends_within_large_bytes() -> None:
    server = server_in(State.OPEN, capabilities=HUGE)
    data = message(1, pack(["put", pattern(APART)]))
    for start, end in ((0, 1000), (1000, -1)):
        assert feed(server, data[start:end]) == []
        assert server.eof()
    assert server.buffer() is None
    assert server.receive(b"") == []
    assert len(feed(server, data[-1:])) == 1
    assert not server.eof()


def test_large_bytes_arrive_also_while_somebody_holds_the_buffer_that_was_lent() -> None:
    """A profiler takes the frames of other threads, and with them what these have read to."""
    server = server_in(State.OPEN, capabilities=HUGE)
    data = message(1, pack(["put", FILE]))
    assert server.receive(data[:1000]) == []
    held = server.buffer()
    assert held is not None
    held[:] = data[1000 : 1000 + len(held)]
    assert server.buffer_filled(len(held)) == []
    (event,) = server.receive(data[1000 + len(held) :])
    assert isinstance(event, tuple) and decode(event[3]) == ["put", FILE]
    assert not server.eof()


@pytest.mark.parametrize("end", [MIB, -1])
def test_a_peer_that_is_closed_within_large_bytes_stays_closed(end: int) -> None:
    server = server_in(State.OPEN, capabilities=HUGE)
    data = message(1, pack(["put", pattern(APART)]))
    assert feed(server, data[:end]) == []
    room = server.buffer()
    server.close(1000, "enough")
    if room is not None:
        assert server.buffer_filled(len(room)) == []
    assert server.receive(data[end:]) == []
    assert goodbye(server) == (1000, "enough")


@pytest.mark.parametrize(
    "start",
    [
        pack([]),  # something behind the end
        b"\x92" + b"\xc7\x00\x00",  # an extension, that of the placeholder
        b"\x92" + b"\xc7\x00\x05",
        b"\x92" + b"\xd4\x01\x00",
        b"\x92" + b"\xff" * 8,
        b"\x92" + b"\xa2\xff\xff",  # text that is none
        b"\x91" + b"\x81",  # a key that is bytes is fine, but then there is no value
        b"\xdc\xff\xff",  # 65,535 of them
        b"\xc1",
    ],
)
def test_what_is_wrong_before_large_bytes_is_found(start: bytes) -> None:
    """The same as when the frame comes in one piece."""
    payload = start + pack(pattern(APART))
    for cuts in ([], [1000]):
        server = server_in(State.OPEN, capabilities=HUGE)
        events = feed(server, message(1, payload), cut_at(*cuts))
        with pytest.raises(ProtocolError):
            payloads_of(events)


def test_a_frame_of_an_extension_with_large_bytes_is_ignored() -> None:
    server = server_in(State.OPEN, capabilities=HUGE)
    data = frame(200, payload=pack(pattern(APART))) + message(1, b"next")
    events = feed(server, data, cut_at(1000))
    assert [event.payload for event in events if isinstance(event, Frame)] == [b"next"]


@pytest.mark.parametrize("behind", [b"\xc7\x00\x00", b"\xc1", b"", b"\xa5four", pack(1) + pack(2)])
def test_what_is_wrong_behind_large_bytes_is_found(behind: bytes) -> None:
    payload = b"\x93" + pack("put") + pack(pattern(APART)) + behind
    server = server_in(State.OPEN, capabilities=HUGE)
    events = feed(server, message(1, payload), cut_at(1000))
    assert parted(events) == [True]
    with pytest.raises(ProtocolError):
        payloads_of(events)


def test_what_only_seems_to_end_with_large_bytes_is_read_like_any_other() -> None:
    for value in (pattern(APART).hex(), {"data": pattern(APART), "more": bytes(ENVELOPE)}):
        payload = pack(["put", value])
        for cut in (1000, -1):
            server = server_in(State.OPEN, capabilities=HUGE)
            data = message(1, payload)
            events = feed(server, data, cut_at(cut % len(data)))
            assert [event.payload for event in events if isinstance(event, Frame)] == [payload]


def test_three_bytes_of_a_length_are_not_taken_for_four() -> None:
    """Cut there, what is there of the length seems to fit the frame's, and is a lie."""
    server = server_in(State.OPEN, capabilities=HUGE)
    payload = b"\xc6" + (APART << 8).to_bytes(4, "big") + pattern(APART - 1)
    events = feed(server, message(1, payload), cut_at(32 + 4))
    assert parted(events) == [False]
    with pytest.raises(ProtocolError):
        payloads_of(events)


def test_a_key_that_comes_twice_before_large_bytes_has_its_last_value() -> None:
    value = pattern(APART)
    payload = (
        b"\x83" + pack("data") + pack(1) + pack("other") + pack(2) + pack("data") + pack(value)
    )
    for cuts in ([], [1000]):
        server = server_in(State.OPEN, capabilities=HUGE)
        events = feed(server, message(1, payload), cut_at(*cuts))
        assert payloads_of(events) == [{"data": value, "other": 2}]


@pytest.mark.parametrize("limit", [1000, MIB, 4 * MIB])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_length_above_the_limit_is_refused_before_room_is_made(side: str, limit: int) -> None:
    """`frame_max` is what a value may have; the names around it have 4096 bytes more."""
    buffers = Buffers()
    options: dict[str, Any] = {
        "allocate": buffers,
        "capabilities": Capabilities(frame_max=limit),
    }
    peer = peer_in(side, State.OPEN, **options)
    assert peer.max_payload == limit + ENVELOPE
    assert len(feed(peer, message(1, bytes(limit + ENVELOPE)))) == 1
    for length in (limit + ENVELOPE + 1, 2**32 - 1):
        peer = peer_in(side, State.OPEN, **options)
        header = HEADER.pack(b"CNDT", 1, RPC_RESPONSE, SEQUENCED, length, 1, 0, 1)
        error = error_of(feed(peer, header))
        assert error.close_code == 1009
        assert f"{limit} bytes (max_payload)" in str(error)
        assert goodbye(peer)[0] == 1009
        assert peer.buffer() is None
    assert buffers.sizes == []


@pytest.mark.parametrize(("side", "state"), [at for at in STATES if at[1] is not State.OPEN])
def test_the_limit_at_login_is_4096_bytes(side: str, state: State) -> None:
    buffers = Buffers()
    for type in MAY_COME[side, state]:
        header = HEADER.pack(b"CNDT", 1, type, 0, 4096, 1, 0, 0)
        peer = peer_in(side, state, allocate=buffers)
        assert feed(peer, header) == []
        header = HEADER.pack(b"CNDT", 1, type, 0, 4097, 1, 0, 0)
        peer = peer_in(side, state, allocate=buffers)
        error = error_of(feed(peer, header))
        assert error.close_code == 1009
        assert "4096 bytes during the login" in str(error)
        if side == "client":
            assert written(peer) == b""
        else:
            assert goodbye(peer)[0] == 1009
    assert buffers.sizes == []


# Ids


@pytest.mark.parametrize(("side", "right", "wrong"), [("server", 1, 2), ("client", 2, 1)])
@pytest.mark.parametrize("type", [MESSAGE, RPC_REQUEST])
def test_a_side_opens_requests_with_its_own_kind_of_ids(
    side: str, right: int, wrong: int, type: int
) -> None:
    peer = peer_in(side, State.OPEN)
    ids = [right, right + 2, right + 100, 2**64 - 2 + right % 2]  # they may skip
    for number, id in enumerate(ids, 1):
        assert len(feed(peer, frame(type, SEQUENCED, id, b"", number))) == 1
    for id in (wrong, wrong + 2, 2**63 + wrong % 2):
        peer = peer_in(side, State.OPEN)
        assert error_of(feed(peer, frame(type, SEQUENCED, id, b"", 1))).close_code == 1002


@pytest.mark.parametrize("again", [5, 3, 1])
@pytest.mark.parametrize("first", [MESSAGE, RPC_REQUEST])
@pytest.mark.parametrize("second", [MESSAGE, RPC_REQUEST])
def test_ids_increase_over_messages_and_calls(first: int, second: int, again: int) -> None:
    server = server_in(State.OPEN)
    assert len(feed(server, frame(first, SEQUENCED, 5, b"", 1))) == 1
    assert error_of(feed(server, frame(second, SEQUENCED, again, b"", 2))).close_code == 1002


def test_ids_increase_within_one_read() -> None:
    server = server_in(State.OPEN)
    data = [frame(RPC_REQUEST, SEQUENCED, id, b"", number) for number, id in enumerate((3, 3), 1)]
    events = feed(server, b"".join(data))
    assert [type(event) for event in events] == [Frame, Broken]


@pytest.mark.parametrize("type", [RPC_REQUEST, CANCEL])
def test_requests_and_cancel_have_an_id(server: CNDT, type: int) -> None:
    assert error_of(feed(server, frame(type, SEQUENCED, 0, pack(["x"]), 1))).close_code == 1002


@pytest.mark.parametrize("type", [RPC_RESPONSE, RPC_ERROR, STREAM_ITEM, STREAM_END])
def test_an_answer_with_id_0_is_one_that_nobody_waits_for(server: CNDT, type: int) -> None:
    """Section 8: only requests and CANCEL must have an id; other unknown ones are ignored."""
    events = feed(server, frame(type, SEQUENCED, 0, b"", 1))
    assert not broken(events)


@pytest.mark.parametrize("type", [RPC_RESPONSE, RPC_ERROR, CANCEL, STREAM_ITEM, STREAM_CREDIT])
@pytest.mark.parametrize("id", [1, 2, 2**64 - 1])
def test_answers_to_any_id_go_up(server: CNDT, type: int, id: int) -> None:
    """Late ones are normal; what is open only the owner knows."""
    for number in (1, 2):
        assert len(feed(server, frame(type, SEQUENCED, id, b"", number))) == 1


def test_replies_and_messages_need_no_new_id(server: CNDT) -> None:
    frames = [(MESSAGE, 0, 0), (MESSAGE, 0, 7), (MESSAGE, REPLY, 2), (MESSAGE, REPLY, 2)]
    frames += [(MESSAGE, REPLY, 0), (STREAM_CREDIT, 0, 0)]
    for number, (type, flags, id) in enumerate(frames, 1):
        assert len(feed(server, frame(type, SEQUENCED | flags, id, b"", number))) == 1


def test_a_broadcast_has_no_id(server: CNDT) -> None:
    events = feed(server, frame(MESSAGE, PRIORITY, 0, b"news"))
    assert events == [Frame(MESSAGE, PRIORITY, 0, b"news")]
    assert error_of(feed(server, frame(MESSAGE, PRIORITY, 1, b"news"))).close_code == 1002


# Pings


def test_more_than_100_pings_in_10_seconds_are_a_flood() -> None:
    clock = Clock()
    server = server_in(State.OPEN, clock)
    assert feed(server, frame(PING, id=1) * 100) == []
    assert said(server) == [(PONG, 1)] * 100
    clock.now += 9_999
    assert error_of(feed(server, frame(PING, id=1))).close_code == 4420
    assert goodbye(server)[0] == 4420


def test_pings_at_a_fair_rate_are_no_flood() -> None:
    clock = Clock()
    server = server_in(State.OPEN, clock)
    for id in range(1000):
        assert feed(server, frame(PING, id=id)) == []
        assert said(server) == [(PONG, id)]
        clock.now += 101


def test_a_clock_that_is_set_back_makes_no_flood() -> None:
    clock = Clock()
    server = server_in(State.OPEN, clock)
    feed(server, frame(PING) * 100)
    clock.now -= 3_600_000
    assert feed(server, frame(PING) * 100) == []
    assert len(said(server)) == 200


def test_pongs_go_up(client: CNDT) -> None:
    client.ping(2**64 - 1)
    raw = written(client)
    assert HEADER.unpack_from(raw)[2:6] == (PING, PRIORITY, 0, 2**64 - 1)
    assert feed(client, frame(PONG, id=7) + frame(PONG, id=2**64 - 1)) == [
        Ponged(7),
        Ponged(2**64 - 1),
    ]


@pytest.mark.parametrize("type", [ACK, PING, PONG])
def test_empty_frames_are_empty(server: CNDT, type: int) -> None:
    assert error_of(feed(server, frame(type, payload=b"x"))).close_code == 1002


# Compression


@pytest.mark.parametrize(
    ("size", "smaller"),
    [(10, False), (1023, False), (1024, True), (50_000, True), (MIB, True), (MIB + 1, False)],
)
@pytest.mark.parametrize("sender", ["server", "client"])
def test_payloads_are_compressed_where_it_helps(sender: str, size: int, smaller: bool) -> None:
    told = {"capabilities": ZLIB, "compress": True}
    pair = Pair(client=told, server=told).log_in()
    side = pair.client if sender == "client" else pair.server
    payload = bytes(size)
    side.peer.send(word(MESSAGE, SEQUENCED), 0, payload)
    pair.carry(side)
    _, _, _, flags, length, *_ = HEADER.unpack_from(side.wrote)
    assert flags == (SEQUENCED | COMPRESSED if smaller else SEQUENCED)
    assert (length < size) == smaller
    (got,) = pair.other(side).of(Frame)
    assert got.payload == payload
    assert got.flags == flags


def test_a_payload_that_does_not_shrink_stays_as_it_is() -> None:
    pair = Pair(client={"compress": True}, server={"capabilities": ZLIB}).log_in()
    payload = random.Random(1).randbytes(5000)
    pair.client.peer.send(word(MESSAGE, SEQUENCED), 0, payload)
    assert HEADER.unpack_from(written(pair.client.peer))[3] == SEQUENCED


@pytest.mark.parametrize(
    ("compress", "capabilities"), [(False, ZLIB), (True, Capabilities()), (False, Capabilities())]
)
@pytest.mark.parametrize("sender", ["server", "client"])
def test_nothing_is_compressed_that_was_not_agreed(
    sender: str, compress: bool, capabilities: Capabilities
) -> None:
    reader = "client" if sender == "server" else "server"
    sides: dict[str, Any] = {
        sender: {"compress": compress},
        reader: {"capabilities": capabilities},
    }
    pair = Pair(**sides).log_in()
    side = pair.client if sender == "client" else pair.server
    side.peer.send(word(MESSAGE, SEQUENCED), 0, bytes(5000))
    assert HEADER.unpack_from(written(side.peer))[3:5] == (SEQUENCED, 5000)


@pytest.mark.parametrize("flags", [SEQUENCED, PRIORITY])
def test_a_compressed_frame_that_was_not_asked_for_is_an_error(flags: int) -> None:
    """Section 10: COMPRESSED towards a side that did not list `zlib` is error 1002."""
    server = server_in(State.OPEN, capabilities=Capabilities())
    data = frame(MESSAGE, flags | COMPRESSED, 0, zlib.compress(b"x"), flags == SEQUENCED)
    assert error_of(feed(server, data)).close_code == 1002


@pytest.mark.parametrize("flags", [SEQUENCED, PRIORITY])
@pytest.mark.parametrize(
    ("packed", "code"),
    [
        (zlib.compress(bytes(MIB)), None),
        (zlib.compress(bytes(MIB + 1)), 1009),
        (zlib.compress(b"x")[:-1], 4400),
        (zlib.compress(b"x") + b"x", 4400),
        (b"x", 4400),
        (b"", 4400),
    ],
)
def test_compressed_payloads_are_bounded(flags: int, packed: bytes, code: int | None) -> None:
    """A mebibyte, also for a side that takes larger frames which are not compressed."""
    told = Capabilities(frame_max=8 * MIB, features=frozenset({"zlib"}))
    server = server_in(State.OPEN, capabilities=told)
    data = frame(MESSAGE, flags | COMPRESSED, 0, packed, flags == SEQUENCED)
    events = feed(server, data)
    if code is None:
        assert [event.payload for event in events if isinstance(event, Frame)] == [bytes(MIB)]
    else:
        assert error_of(events).close_code == code
        assert goodbye(server)[0] == code


@pytest.mark.parametrize("flags", [SEQUENCED, PRIORITY])
def test_inflating_stops_at_the_limit_of_the_receiver(flags: int) -> None:
    told = Capabilities(frame_max=1000, features=frozenset({"zlib"}))
    for size, fits in ((1000 + ENVELOPE, True), (1001 + ENVELOPE, False)):
        server = server_in(State.OPEN, capabilities=told)
        packed = zlib.compress(bytes(size))
        events = feed(server, frame(MESSAGE, flags | COMPRESSED, 0, packed, flags == SEQUENCED))
        if fits:
            assert len(events) == 1
        else:
            assert error_of(events).close_code == 1009


# Writing


def test_what_has_no_number_goes_first_and_close_goes_last(server: CNDT) -> None:
    request, response = word(RPC_REQUEST, SEQUENCED), word(RPC_RESPONSE, SEQUENCED)
    assert server.corked == 0
    server.send(request, 2, b"a")
    server.send(response, 1, b"b")
    server.ping(9)
    server.send_split(response, 3, b"head", b"tail")
    server.send(request, 4, b"c")
    server.push(frame(MESSAGE, PRIORITY, 0, b"news"))
    server.close(1000, "")
    assert server.corked > 0
    raw = frames_of(written(server))
    assert [(HEADER.unpack_from(r)[2], HEADER.unpack_from(r)[5]) for r in raw] == [
        (PING, 9),
        (MESSAGE, 0),
        (RPC_REQUEST, 2),
        (RPC_RESPONSE, 1),
        (RPC_RESPONSE, 3),
        (RPC_REQUEST, 4),
        (CLOSE, 0),
    ]
    assert raw[4][HEADER.size :] == b"headtail"
    assert [HEADER.unpack_from(r)[7] for r in raw] == [0, 0, 1, 2, 3, 4, 0]
    assert server.corked == 0
    assert server.take() == []


@pytest.mark.parametrize("end", [b"", b"end"])
def test_a_large_part_is_written_without_a_copy(server: CNDT, end: bytes) -> None:
    tail = bytes(LARGE)
    server.send_split(word(RPC_RESPONSE, SEQUENCED), 1, b"head", tail, end)
    assert server.corked > 0
    chunks = server.take()
    assert any(chunk is tail for chunk in chunks)
    peer = client_in(State.OPEN)
    (event,) = feed(peer, b"".join(chunks), pieces_of(10_000))
    assert isinstance(event, Frame)
    assert event.payload == b"head" + tail + end


@pytest.mark.parametrize("kind", ["compressed", "close"])
def test_a_very_large_frame_that_is_an_error_looks_like_one_with_bytes(kind: str) -> None:
    size = 5 * MIB
    limits = Capabilities(frame_max=8 * MIB, features=frozenset({"zlib"}))
    server = Pair(server={"capabilities": limits}).log_in().server.peer
    payload = b"\x92\xa1n\xc6" + size.to_bytes(4, "big") + bytes(size)
    if kind == "compressed":
        raw = frame(MESSAGE, SEQUENCED | COMPRESSED, 0, payload, 1)
        (event,) = feed(server, raw, pieces_of(100_000))
        assert isinstance(event, Broken)
        assert isinstance(event.error, ProtocolError)
    else:
        (event,) = feed(server, frame(CLOSE, 0, 0, payload), pieces_of(100_000))
        assert isinstance(event, Closed)


@pytest.mark.parametrize("cut", [HEADER.size, HEADER.size + 20, 100_000])
def test_a_compressed_frame_that_looks_like_one_with_bytes_is_inflated(cut: int) -> None:
    """One zlib stream of stored blocks, nearly all of them empty, however it is cut."""
    value = b"\xc6" + (4 * MIB).to_bytes(4, "big")
    block = len(value).to_bytes(2, "little") + (len(value) ^ 0xFFFF).to_bytes(2, "little") + value
    empty, last = b"\0\0\0\xff\xff", b"\1\0\0\xff\xff"
    packed = b"\x78\x01\0" + block + empty * (4 * MIB // 5 + 100) + last
    packed += zlib.adler32(value).to_bytes(4, "big")
    limits = Capabilities(frame_max=8 * MIB, features=frozenset({"zlib"}))
    server = server_in(State.OPEN, capabilities=limits)
    events = feed(server, message(1, packed, SEQUENCED | COMPRESSED), cut_at(cut))
    assert events == [Frame(MESSAGE, SEQUENCED | COMPRESSED, 0, value)]


def test_it_is_told_when_a_write_is_due(server: CNDT) -> None:
    due: list[int] = []
    server.on_due = lambda: due.append(server.corked)
    request = word(RPC_REQUEST, SEQUENCED)
    server.send(request, 2, b"first")
    server.due = 3
    server.send(request, 4, b"held")
    server.send(request, 6, b"third")
    server.take()
    server.send(request, 8, bytes(LARGE_FRAME - 1))
    assert due == [1, 3]
    server.send(request, 10, bytes(LARGE_FRAME))
    assert due == [1, 3, 2]


def test_corked_counts_what_waits(server: CNDT) -> None:
    counts = [server.corked]
    for act in (
        lambda: server.send(word(MESSAGE, SEQUENCED), 0, b""),
        lambda: server.ping(1),
        lambda: server.go_away(1001, "soon", 1000),
        lambda: server.close(1000, ""),
    ):
        act()
        counts.append(server.corked)
    assert counts == [0, 1, 2, 3, 4]


# Closing


def test_goaway_names_what_is_still_served(server: CNDT) -> None:
    feed(server, message(1) + message(2))
    server.go_away(1001, "the server stops", 5000)
    raw = written(server)
    assert HEADER.unpack_from(raw)[2:6] == (GOAWAY, 0, len(raw) - HEADER.size, 0)
    assert unpack(raw[HEADER.size :]) == [1001, "the server stops", 5000, 2]
    assert server.state is State.OPEN
    client = client_in(State.OPEN)
    assert feed(client, raw) == [GoingAway(1001, "the server stops", 2)]
    assert client.state is State.OPEN


@pytest.mark.parametrize(
    "body",
    [[], {}, 7, [1001, "x", 5], [1001, "x", 5, -1], [1001, 5, 5, 5], ["x", "x", 5, 5], [[]] * 99],
)
def test_goaway_that_cannot_be_read_is_an_error(body: Any) -> None:
    client = client_in(State.OPEN)
    (broken,) = feed(client, frame(GOAWAY, 0, 0, pack(body)))
    assert isinstance(broken, Broken) and isinstance(broken.error, ProtocolError)
    assert broken.error.close_code == 4400


@pytest.mark.parametrize("code", [1000, 1001, 1013, 4403, 4499])
def test_close_ends_both_sides(code: int) -> None:
    pair = Pair().log_in()
    pair.server.peer.close(code, "that is all")
    assert pair.server.peer.state is State.CLOSED
    pair.run()
    assert pair.client.events == [Closed(code, "that is all")]
    assert pair.client.peer.state is State.CLOSED
    assert written(pair.client.peer) == b""  # CLOSE is not answered
    assert pair.server.events == []


def test_the_first_close_counts(server: CNDT) -> None:
    server.close(1000, "first")
    server.close(1001, "second")
    assert goodbye(server) == (1000, "first")
    server.close(1001, "third")
    assert written(server) == b""


def test_what_is_queued_leaves_before_close(server: CNDT) -> None:
    server.send(word(MESSAGE, SEQUENCED), 0, b"last words")
    feed(server, frame(0))
    assert [type for type, _ in said(server)] == [MESSAGE, CLOSE]


def test_nothing_leaves_behind_close(server: CNDT) -> None:
    server.close(1000, "")
    written(server)
    server.send(word(MESSAGE, SEQUENCED), 0, b"too late")
    server.ping(1)
    assert written(server) == b""


@pytest.mark.parametrize("reason", ["x" * 200, "ä" * 100, "€" * 100, "😀" * 100, "a\ud800b", ""])
def test_reasons_are_cut_at_123_bytes(server: CNDT, reason: str) -> None:
    server.close(1000, reason)
    _, text = goodbye(server)
    assert reason.encode(errors="replace").decode().startswith(text)
    assert len(text.encode()) >= min(120, len(reason.encode(errors="replace")))


@pytest.mark.parametrize("state", [State.AWAIT_REQUEST, State.AWAIT_PROOF, State.AWAIT_WELCOME])
def test_a_server_may_close_during_the_login(state: State) -> None:
    server = server_in(state)
    server.close(4408, "too slow")
    assert goodbye(server) == (4408, "too slow")


UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "a number": pack(1000),
    "only a code": pack([1000]),
    "three elements": pack([1000, "x", 1]),
    "no number": pack(["x", "y"]),
    "not a number": pack([float("nan"), "x"]),
    "nil": pack([None, "x"]),
    "a list": pack([[], "x"]),
    "keys that are no text": pack({1: 2, 3: 4}),
    "infinite": INFINITE[HEADER.size :],
}


def compressed(first: int, last: int, size: int = 200_000) -> bytes:
    """Return the messages with these numbers, each of which inflates to so many bytes."""
    return b"".join(
        frame(MESSAGE, SEQUENCED | COMPRESSED, 0, zlib.compress(bytes(size)), number)
        for number in range(first, last + 1)
    )


def sizes(events: list[Event]) -> list[int]:
    """Return how long the payloads of frames are."""
    return [len(event[3]) for event in events if isinstance(event, tuple)]


def inflating_server() -> CNDT:
    """Return a server that has let somebody in who may compress."""
    return server_in(State.OPEN, capabilities=Capabilities(features=frozenset({"zlib"})))


def test_of_many_compressed_frames_some_are_inflated_at_a_time() -> None:
    server = inflating_server()
    assert sizes(server.receive(compressed(1, 5))) == [200_000] * 2
    assert (server.more, server.grew, server.session.received) == (True, True, 2)
    assert sizes(server.receive(b"")) == [200_000] * 2
    assert (server.more, server.held > 0, server.session.received) == (True, True, 4)
    # What comes meanwhile stands behind what waits.
    assert len(server.receive(frame(MESSAGE, SEQUENCED, 0, b"x", 6))) == 2
    assert (server.more, server.held, server.session.received) == (False, 0, 6)


def test_what_waits_behind_compressed_frames_may_be_cut_or_wrong() -> None:
    server = inflating_server()
    whole = compressed(1, 3)
    assert len(server.receive(whole[:-1])) == 2
    assert (server.more, server.receive(b""), server.more) == (True, [], False)
    assert len(server.receive(whole[-1:])) == 1
    assert len(server.receive(compressed(4, 5) + bytes(32))) == 2
    (broken,) = server.receive(b"")
    assert isinstance(broken, Broken) and not server.more


def test_nothing_waits_behind_the_last_compressed_frame() -> None:
    server = inflating_server()
    assert len(server.receive(compressed(1, 2))) == 2
    assert not server.more
    assert len(server.receive(compressed(3, 9, size=20_000))) == 7
    assert not server.more


def test_what_waits_is_forgotten_with_the_link() -> None:
    server = inflating_server()
    server.receive(compressed(1, 5))
    server.resume(0)
    assert (server.more, server.receive(b""), server.session.received) == (False, [], 2)
    assert len(server.receive(compressed(3, 4))) == 2


@pytest.mark.parametrize("payload", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("state", [State.AWAIT_REQUEST, State.OPEN])
def test_a_close_that_cannot_be_read_still_closes(payload: bytes, state: State) -> None:
    server = server_in(state)
    (event,) = feed(server, frame(CLOSE, payload=payload))
    assert isinstance(event, Closed)
    assert event.code == 1002
    assert event.reason
    assert server.state is State.CLOSED


def test_a_reason_that_is_nested_deeply_still_closes() -> None:
    server = server_in(State.AWAIT_REQUEST)
    (event,) = feed(server, DEEP)
    assert isinstance(event, Closed)


def test_a_reason_without_end_is_cut() -> None:
    server = server_in(State.OPEN)
    (event,) = feed(server, frame(CLOSE, payload=pack([1000, "x" * 10_000])))
    assert isinstance(event, Closed)
    assert len(event.reason) <= 123


def test_a_reason_is_one_line_of_what_prints() -> None:
    forged = "bye\nERROR \x1b[31m\u202e \N{SNOWMAN} \\"
    told = "bye\\nERROR \\x1b[31m\\u202e \N{SNOWMAN} \\"
    (closed,) = feed(server_in(State.OPEN), frame(CLOSE, payload=pack([1000, forged])))
    assert closed == Closed(1000, told)
    going, *_ = feed(server_in(State.OPEN), frame(GOAWAY, payload=pack([1001, forged, 1, 0])))
    assert going == GoingAway(1001, told, 0)
    failure = {"code": "bad\n", "message": forged}
    (broken,) = feed(
        client_in(State.AWAIT_CHALLENGE), frame(AUTH_FAILURE, id=1, payload=pack(failure))
    )
    assert isinstance(broken, Broken) and isinstance(broken.error, AuthenticationError)
    assert (broken.error.code, str(broken.error)) == ("bad\\n", told)


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda: frame(0), 1002),
        (lambda: HEADER.pack(b"CNDT", 1, MESSAGE, SEQUENCED, 2**31, 0, 0, 1), 1009),
        (lambda: frame(MESSAGE, SEQUENCED | COMPRESSED, 0, b"x", 1), 4400),
        (lambda: frame(PING) * 101, 4420),
    ],
)
@pytest.mark.parametrize("side", ["server", "client"])
def test_the_other_side_learns_why(side: str, act: Callable[[], bytes], code: int) -> None:
    told = {"capabilities": ZLIB}
    pair = Pair(client=told, server=told).log_in()
    broken = pair.server if side == "server" else pair.client
    pair.arrive(broken, act())
    assert isinstance(broken.error, ProtocolError)
    pair.run()
    (closed,) = pair.other(broken).of(Closed)
    assert closed.code == broken.error.close_code == code
    assert closed.reason == str(broken.error)


# A login that is over stays over


def test_a_refused_login_sends_one_failure_and_nothing_else() -> None:
    server = server_in(State.AWAIT_REQUEST)
    server.send(word(MESSAGE, SEQUENCED), 0, b"never")
    (event,) = feed(server, frame(AUTH_REQUEST, id=1, payload=pack({})))
    assert isinstance(event, Broken)
    assert isinstance(event.error, AuthenticationError)
    assert [type for type, _ in said(server)] == [AUTH_FAILURE]
    server.close(1000, "")
    assert written(server) == b""


# What its own side may do


def test_no_more_pings_are_allowed_than_a_peer_accepts() -> None:
    clock = Clock()
    client, server = client_in(State.OPEN, clock), server_in(State.OPEN, clock)
    for _ in range(3):
        allowed = 0
        while client.may_ping():
            client.ping(allowed)
            allowed += 1
        assert allowed == 50  # half, as the windows of the two sides may lie across each other
        assert feed(server, written(client)) == []
        clock.now += 9_999
        assert not client.may_ping()
        clock.now += 1


def test_no_10_seconds_have_more_than_100_allowed_pings() -> None:
    """Wherever the 10 seconds of the peer begin."""
    clock = Clock()
    client = client_in(State.OPEN, clock)
    assert client.may_ping()
    times = [clock.now]
    clock.now += 9_900
    for _ in range(300):
        times += [clock.now for _ in range(110) if client.may_ping()]
        clock.now += 50
    assert len(times) > 100
    for first, last in zip(times, times[100:], strict=False):
        assert last - first >= 10_000
