"""Golden frames through the library's own codec, and parsing at any cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    HEADER_SIZE,
    MAGIC,
    SEQUENCED,
    VERSION,
    FrameType,
    Parted,
    type_name,
    word,
)
from conduit.protocol.payload import decode
from fuzz.source import Source
from tests import wire_client
from tests.conftest import EXAMPLES
from tests.golden_frames import GOLDEN, TIMESTAMP, Golden
from tests.protocol.pair import (
    Frame,
    Pair,
    Side,
    Split,
    byte_by_byte,
    feed,
    frames_of,
    make_client,
    make_server,
    pieces_of,
    welcome,
    whole,
    written,
)
from tests.wire_client import frame, pack

CONVERSATION = {name: golden for name, golden in GOLDEN.items() if not golden.alone}
SPLITS: dict[str, Split] = {
    "whole": whole,
    "byte by byte": byte_by_byte,
    "at every header's end": pieces_of(32),
    "in sevens": pieces_of(7),
}


class Told(Capabilities):
    """Capabilities that are told in other words: the golden ones have keys of their own."""

    def to_map(self) -> dict[str, Any]:
        return {"frame_max": 1048576, "feat": ["resume"]}


class ToldByServer(Capabilities):
    def to_map(self) -> dict[str, Any]:
        return {"v": 1, **Told().to_map()}


def golden_pair() -> Pair:
    told: Any = GOLDEN["auth_success"].value
    return Pair(
        client={"capabilities": Told()},
        server={"capabilities": ToldByServer()},
        on_welcome=lambda server: welcome(server, told["methods"]),
    )


def after_login(name: str) -> bool:
    return not GOLDEN[name].meaning.startswith("login")


def say(pair: Pair, name: str) -> None:
    """Let the side that sends a golden frame do what makes it send that frame."""
    golden = GOLDEN[name]
    peer = pair.client.peer if golden.sender == "client" else pair.server.peer
    value: Any = golden.value
    if golden.flags & SEQUENCED:
        payload = b"" if value is None else pack(value)
        peer.send(word(golden.type, golden.flags), golden.id, payload)
    elif name == "broadcast":
        peer.send_urgent(word(golden.type, golden.flags), 0, pack(value))
    elif name == "ping":
        peer.ping(golden.id)
    elif name == "goaway":
        code, reason, grace, _ = value
        peer.go_away(code, reason, grace)
    elif name == "close":
        peer.close(*value)
    else:
        assert name in ("ack", "pong")  # they answer the ping, without being told to


def side_of(pair: Pair, sender: str) -> Side:
    return pair.client if sender == "client" else pair.server


# Sending


def test_the_whole_golden_conversation_is_written_byte_for_byte() -> None:
    pair = golden_pair().run()
    for name in filter(after_login, CONVERSATION):
        say(pair, name)
        pair.carry(side_of(pair, GOLDEN[name].sender))

    for side in (pair.client, pair.server):
        expected = [golden.raw for golden in CONVERSATION.values() if golden.sender == side.name]
        # The server may acknowledge as well; in the golden conversation it does not.
        extra = FrameType.ACK if side is pair.server else None
        assert [raw for raw in frames_of(side.wrote) if raw[5] != extra] == expected
    assert not pair.client.of(Broken)
    assert not pair.server.of(Broken)
    assert pair.client.peer.state is pair.server.peer.state is State.CLOSED


def test_golden_failure_is_written_byte_for_byte() -> None:
    server = make_server()
    feed(server, GOLDEN["auth_request"].raw)
    server.refuse("invalid_credentials", "invalid credentials")
    assert written(server) == GOLDEN["auth_failure"].raw


# Reading


def news(golden: Golden) -> list[Event]:
    """Return what the reader of a golden frame tells its owner."""
    value: Any = golden.value
    if golden.type == FrameType.HEARTBEAT_PING:
        return []
    if golden.type == FrameType.ACK:
        return [Acknowledged()]
    if golden.type == FrameType.HEARTBEAT_PONG:
        return [Ponged(golden.id)]
    if golden.type == FrameType.CLOSE:
        return [Closed(*value)]
    if golden.type == FrameType.GOAWAY:
        return [GoingAway(value[0], value[1], value[3])]
    payload = b"" if value is None else pack(value)
    return [Frame(golden.type, golden.flags, golden.id, payload)]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("sender", ["client", "server"])
def test_golden_conversation_is_read_at_any_cut(sender: str, split: Split) -> None:
    pair = golden_pair()
    pair.split = split
    pair.log_in()
    reader = side_of(pair, "server" if sender == "client" else "client")
    for golden in CONVERSATION.values():  # what the reader said itself, so that the ACK fits
        if golden.sender == reader.name and golden.flags & SEQUENCED:
            reader.peer.send(word(golden.type, golden.flags), golden.id, b"")
            written(reader.peer)
    mine = [g for name, g in CONVERSATION.items() if g.sender == sender and after_login(name)]
    pair.arrive(reader, b"".join(golden.raw for golden in mine))
    assert reader.events == [event for golden in mine for event in news(golden)]
    assert reader.peer.session.received == max(golden.seq for golden in mine)


def test_golden_failure_is_read() -> None:
    client = make_client()
    (event,) = feed(client, GOLDEN["auth_failure"].raw)
    assert isinstance(event, Broken)
    assert "wrong user name or password" in str(event.error)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_golden_compressed_frame_is_read(split: Split) -> None:
    pair = Pair(server={"capabilities": Capabilities(features=frozenset({"zlib"}))}).log_in()
    pair.split = split
    (event,) = pair.arrive(pair.server, GOLDEN["compressed"].raw)
    assert isinstance(event, Frame)
    assert event.flags & COMPRESSED
    assert decode(event.payload) == GOLDEN["compressed"].value


# The header


def test_header_is_the_one_of_the_page() -> None:
    assert HEADER_SIZE == wire_client.HEADER.size == 32
    fields = (wire_client.MESSAGE, SEQUENCED)
    raw = HEADER.pack(word(*fields), 7, 5, TIMESTAMP, 9)
    assert wire_client.HEADER.unpack(raw) == (MAGIC, VERSION, *fields, 7, 5, TIMESTAMP, 9)


def test_types_have_names() -> None:
    assert [type_name(type) for type in ACCEPTED_FLAGS] == [type.name for type in FrameType]
    assert type_name(200) == "type 200"


@pytest.mark.parametrize("name", ["client", "server"])
def test_timestamp_is_the_clock_and_is_never_checked(name: str) -> None:
    pair = Pair().log_in()
    side = side_of(pair, name)
    pair.clock.now += 1234
    side.peer.send(word(FrameType.MESSAGE, SEQUENCED), 0, pack(["a", 1]))
    side.peer.ping(1)
    for raw in frames_of(written(side.peer)):
        assert wire_client.HEADER.unpack_from(raw)[6] == TIMESTAMP + 1234
    for time in (0, 1, 2**64 - 1):
        number = side.peer.session.received + 1
        header = HEADER.pack(word(FrameType.MESSAGE, SEQUENCED), 0, 0, time, number)
        assert len(pair.arrive(side, header)) == 1
    assert not side.of(Broken)


# Cuts


def some_frames(payloads: list[bytes]) -> bytes:
    """Return sequenced messages, and between them frames that have no number."""
    parts = []
    for number, payload in enumerate(payloads, 1):
        parts.append(frame(FrameType.MESSAGE, SEQUENCED, 0, payload, number))
        if number % 3 == 0:
            parts.append(frame(FrameType.HEARTBEAT_PONG, id=number))
        if number % 5 == 0:
            parts.append(frame(200, id=number, payload=payload))
    return b"".join(parts)


def expected_events(payloads: list[bytes]) -> list[Event]:
    events: list[Event] = []
    for number, payload in enumerate(payloads, 1):
        events.append(Frame(FrameType.MESSAGE, SEQUENCED, 0, payload))
        if number % 3 == 0:
            events.append(Ponged(number))
    return events


@pytest.mark.long
@settings(max_examples=EXAMPLES)
@given(data=st.binary(max_size=400))
def test_random_cuts_change_nothing(data: bytes) -> None:
    source = Source(data)
    payloads = [source.short() for _ in range(1 + source.below(12))]
    server = Pair(client={"user": None}, server={"anonymous": True}).log_in().server.peer
    assert feed(server, some_frames(payloads), source.cut) == expected_events(payloads)
    assert not server.eof()


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_all_cuts_of_a_conversation(split: Split) -> None:
    payloads = [bytes([number]) * number for number in range(40)]
    server = Pair().log_in().server.peer
    assert feed(server, some_frames(payloads), split) == expected_events(payloads)


@pytest.mark.parametrize("piece", [bytes, memoryview])
def test_bytes_and_memoryviews_are_taken(piece: Callable[[bytes], bytes | memoryview]) -> None:
    payloads = [b"one", b"", b"three"]
    server = Pair().log_in().server.peer
    data = some_frames(payloads)
    events = [*server.receive(piece(data[:50])), *server.receive(piece(data[50:]))]
    assert [
        (*event[:3], bytes(event[3]))
        if type(event) is tuple and not isinstance(event[3], Parted)
        else event
        for event in events
    ] == expected_events(payloads)


@pytest.mark.parametrize("kept", [1, 4, 31, 32, 33, 40, 41])
def test_what_is_behind_a_whole_frame_waits_for_its_rest(kept: int) -> None:
    """A half frame is no event and no error; the end of the stream within it is one."""
    first = frame(FrameType.MESSAGE, SEQUENCED, 0, b"first", 1)
    second = frame(FrameType.MESSAGE, SEQUENCED, 0, b"0123456789", 2)
    server: CNDT = Pair().log_in().server.peer
    assert not server.eof()
    assert len(feed(server, first + second[:kept])) == 1
    assert server.eof()
    assert len(feed(server, second[kept:])) == 1
    assert not server.eof()
