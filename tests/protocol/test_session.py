"""Sequence numbers and acknowledgement: both ends agree on what has arrived, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conduit.exceptions import ProtocolError
from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import Acknowledged, Broken, Event, GoingAway
from conduit.protocol.frames import PRIORITY, SEQUENCED, FrameType, word
from conduit.protocol.session import ACK_BYTES, ACK_FRAMES, Session
from tests.protocol.pair import (
    EPOCH,
    SESSION_ID,
    Frame,
    Pair,
    byte_by_byte,
    feed,
    frames_of,
    pieces_of,
    server_in,
    written,
)
from tests.wire_client import ACK, CLOSE, GOAWAY, HEADER, MESSAGE, PING, PONG, frame, pack

MESSAGE_WORD = word(FrameType.MESSAGE, SEQUENCED)


def messages(first: int, last: int, size: int = 0) -> bytes:
    """Return the messages with these numbers, each with so much payload."""
    return b"".join(
        frame(MESSAGE, SEQUENCED, 0, bytes(size), number) for number in range(first, last + 1)
    )


def said(peer: CNDT) -> list[tuple[int, int]]:
    """Take what a peer has to say, as type and id of each frame."""
    headers = [HEADER.unpack_from(raw) for raw in frames_of(written(peer))]
    return [(header[2], header[5]) for header in headers]


def broken_code(events: list[Event]) -> int:
    """Return the close code with which a peer broke; nothing else may have happened."""
    (event,) = events
    assert isinstance(event, Broken)
    assert isinstance(event.error, ProtocolError)
    return event.error.close_code


@pytest.fixture
def server() -> CNDT:
    return server_in(State.OPEN)


# Numbers


def test_both_sides_have_the_session_of_the_server() -> None:
    pair = Pair().log_in()
    for side in (pair.client, pair.server):
        session = side.peer.session
        assert (session.id, session.epoch) == (SESSION_ID, EPOCH)
        assert (session.sent, session.received, session.reported) == (0, 0, 0)


def test_each_direction_counts_its_own_sequenced_frames() -> None:
    pair = Pair().log_in()
    for number in range(1, 4):
        pair.client.peer.send(MESSAGE_WORD, 0, b"")
        pair.client.peer.ping(number)  # has no number of its own
        pair.run()
    pair.server.peer.send(MESSAGE_WORD, 0, b"")
    pair.run()
    assert (pair.client.peer.session.sent, pair.server.peer.session.received) == (3, 3)
    assert (pair.server.peer.session.sent, pair.client.peer.session.received) == (1, 1)
    numbers = [HEADER.unpack_from(raw)[7] for raw in frames_of(pair.client.wrote)]
    assert [number for number in numbers if number] == [1, 2, 3]


@pytest.mark.parametrize("number", [0, 2, 2**32 - 1])
def test_another_number_than_the_next_is_an_error(server: CNDT, number: int) -> None:
    assert broken_code(feed(server, frame(MESSAGE, SEQUENCED, 0, b"", number))) == 1002


def test_a_number_that_came_already_is_an_error(server: CNDT) -> None:
    assert len(feed(server, messages(1, 3))) == 3
    assert broken_code(feed(server, messages(3, 3))) == 1002
    assert server.session.received == 3


def test_frames_before_the_fault_count(server: CNDT) -> None:
    """What came whole and in order has been taken, also in the read that broke the connection."""
    events = feed(server, messages(1, 5) + messages(9, 9))
    assert [type(event) for event in events] == [Frame] * 5 + [Broken]
    assert server.session.received == 5


@pytest.mark.parametrize("data", [frame(MESSAGE, PRIORITY, 0, b"", 1), frame(PING, seq=1)])
def test_frames_without_a_number_have_none(server: CNDT, data: bytes) -> None:
    assert broken_code(feed(server, data)) == 1002


def test_numbers_go_on_behind_32_bits() -> None:
    pair = Pair().log_in()
    pair.client.peer.session.sent = pair.server.peer.session.received = 2**32 - 2
    pair.server.peer.session.reported = 2**32 - 2
    for _ in range(3):
        pair.client.peer.send(MESSAGE_WORD, 0, b"")
    pair.run()
    numbers = [HEADER.unpack_from(raw)[7] for raw in frames_of(pair.client.wrote)]
    assert numbers == [2**32 - 1, 0, 1]
    assert len(pair.server.of(Frame)) == 3
    pair.client.peer.ping(1)
    pair.run()
    assert (ACK, 2**32 + 1) in [
        (header[2], header[5]) for header in map(HEADER.unpack_from, frames_of(pair.server.wrote))
    ]
    assert pair.client.peer.session.outbox_bytes == 0


# Acknowledging


def test_an_ack_is_due_once_something_sequenced_has_come(server: CNDT) -> None:
    feed(server, frame(PONG, id=1) + frame(MESSAGE, PRIORITY))
    assert not server.ack_due
    feed(server, messages(1, 1)[:-1])
    feed(server, messages(1, 1)[-1:])
    assert server.ack_due
    assert said(server) == []
    server.acknowledge()
    assert not server.ack_due
    assert said(server) == [(ACK, 1)]


@pytest.mark.parametrize("split", [byte_by_byte, pieces_of(100)])
def test_after_64_frames_an_ack_is_sent_at_once(
    server: CNDT, split: Callable[[bytes], list[bytes]]
) -> None:
    feed(server, messages(1, ACK_FRAMES - 1), split)
    assert said(server) == []
    assert server.ack_due
    feed(server, messages(ACK_FRAMES, ACK_FRAMES), split)
    assert said(server) == [(ACK, ACK_FRAMES)]
    assert not server.ack_due
    feed(server, messages(ACK_FRAMES + 1, 2 * ACK_FRAMES), split)
    assert said(server) == [(ACK, 2 * ACK_FRAMES)]


def test_many_frames_in_one_read_are_acknowledged_once(server: CNDT) -> None:
    assert len(feed(server, messages(1, 500))) == 500
    assert said(server) == [(ACK, 500)]
    assert not server.ack_due


@pytest.mark.parametrize("size", [1000, 100_000, 200_000, ACK_BYTES])
def test_after_256_kib_an_ack_is_sent_at_once(server: CNDT, size: int) -> None:
    """Large frames and small ones count with their headers, however they come."""
    enough = min(ACK_FRAMES, -(-ACK_BYTES // (size + HEADER.size)))
    for _ in range(2):
        start = server.session.received
        feed(server, messages(start + 1, start + enough - 1, size), pieces_of(50_000))
        assert said(server) == []
        feed(server, messages(start + enough, start + enough, size), pieces_of(50_000))
        assert said(server) == [(ACK, start + enough)]


def test_a_ping_is_answered_by_ack_and_then_pong(server: CNDT) -> None:
    feed(server, messages(1, 3) + frame(PING, PRIORITY, 42))
    assert said(server) == [(ACK, 3), (PONG, 42)]
    feed(server, frame(PING, 0, 43))
    assert said(server) == [(PONG, 43)]


def test_the_ack_of_a_ping_covers_what_came_before_it(server: CNDT) -> None:
    feed(server, messages(1, 3) + frame(PING, id=7) + messages(4, 5))
    assert said(server) == [(ACK, 3), (PONG, 7)]
    assert server.ack_due


def test_after_the_ack_of_a_ping_none_is_due(server: CNDT) -> None:
    feed(server, messages(1, 3) + frame(PING, id=7))
    assert (ACK, 3) in said(server)
    assert not server.ack_due


def test_a_ping_carries_the_ack_that_is_due(server: CNDT) -> None:
    server.ping(1)
    assert said(server) == [(PING, 1)]
    feed(server, messages(1, 1))
    server.ping(2)
    assert sorted(said(server)) == [(PING, 2), (ACK, 1)]
    assert not server.ack_due


def test_frames_that_are_ignored_or_extensions_are_not_counted(server: CNDT) -> None:
    feed(server, messages(1, 1) + frame(200, id=9, payload=b"x") * 100)
    assert said(server) == []
    assert server.session.received == 1


# Being acknowledged


def sent_by(server: CNDT, count: int, size: int = 10) -> int:
    """Let the server write so many messages, each with its own write, and return their bytes."""
    sizes = []
    for _ in range(count):
        server.send(MESSAGE_WORD, 0, bytes(size))
        sizes.append(len(written(server)))
    return sum(sizes)


def test_what_is_written_is_kept_until_it_is_acknowledged(server: CNDT) -> None:
    session = server.session
    assert session.outbox_bytes == 0
    size = sent_by(server, 4)
    assert session.outbox_bytes == size
    assert feed(server, frame(ACK, id=1)) == [Acknowledged()]
    assert session.outbox_bytes == size * 3 // 4
    assert feed(server, frame(ACK, id=4)) == [Acknowledged()]
    assert session.outbox_bytes == 0


def test_an_ack_that_is_lower_or_repeated_is_ignored(server: CNDT) -> None:
    sent_by(server, 4)
    feed(server, frame(ACK, id=3))
    left = server.session.outbox_bytes
    assert feed(server, frame(ACK, id=0) + frame(ACK, id=2) + frame(ACK, id=3)) == []
    assert server.session.outbox_bytes == left > 0
    assert server.state is State.OPEN


@pytest.mark.parametrize(("sent", "number"), [(0, 1), (4, 5), (4, 6), (4, 2**32), (4, 2**64 - 1)])
def test_an_ack_of_more_than_was_sent_is_an_error(server: CNDT, sent: int, number: int) -> None:
    sent_by(server, sent)
    assert broken_code(feed(server, frame(ACK, id=number))) == 1002
    assert said(server) == [(CLOSE, 0)]


def test_an_ack_of_what_has_not_left_yet_is_an_error(server: CNDT) -> None:
    """What is queued was not sent: the peer cannot have it."""
    sent_by(server, 4)
    server.send(MESSAGE_WORD, 0, b"")
    assert broken_code(feed(server, frame(ACK, id=5))) == 1002


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=60))
def test_the_outbox_is_what_was_written_and_not_acknowledged(
    steps: list[tuple[int, int, bool]],
) -> None:
    session, kept, acknowledged = Session(), list[bytes](), 0
    for wrote, more, resumes in steps:
        for _ in range(wrote):
            session.sent += 1
            kept.append(frame(MESSAGE, SEQUENCED, 0, bytes(session.sent % 7), session.sent))
            session.keep([kept[-1]], len(kept[-1]))
        acknowledged = min(session.sent, acknowledged + more)
        again = session.again(acknowledged) if resumes else None
        session.acknowledge(acknowledged)
        assert session.outbox_bytes == sum(map(len, kept[acknowledged:]))
        assert again is None or again == kept[acknowledged:]


def test_each_of_many_acks_is_quick() -> None:
    session, count = Session(), 200_000
    for _ in range(count):
        session.sent += 1
        session.keep([b"x"], 1)
    began = time.process_time()
    for number in range(1, count):
        session.acknowledge(number)
    # A list that is shortened at each of them takes five seconds and more.
    assert time.process_time() - began < 2
    assert session.outbox_bytes == 1


def test_a_write_of_several_frames_is_kept_until_its_last_is_acknowledged(server: CNDT) -> None:
    for _ in range(3):
        server.send(MESSAGE_WORD, 0, b"12345")
    size = len(written(server))
    assert feed(server, frame(ACK, id=2)) == []
    assert server.session.outbox_bytes == size
    assert feed(server, frame(ACK, id=3)) == [Acknowledged()]
    assert server.session.outbox_bytes == 0


def test_only_sequenced_frames_are_kept(server: CNDT) -> None:
    server.ping(1)
    server.send_urgent(word(FrameType.MESSAGE, PRIORITY), 0, bytes(100))
    written(server)
    assert server.session.outbox_bytes == 0
    server.ping(2)
    server.send(MESSAGE_WORD, 0, bytes(100))
    server.close(1000, "")
    written(server)
    assert server.session.outbox_bytes == HEADER.size + 100


def test_a_large_end_is_kept_with_its_frame(server: CNDT) -> None:
    tail = bytes(100_000)
    server.send(MESSAGE_WORD, 0, b"small")
    server.send_split(word(FrameType.RPC_RESPONSE, SEQUENCED), 1, b"head", tail)
    size = len(written(server))
    assert server.session.outbox_bytes == size == 2 * HEADER.size + len(b"smallhead") + len(tail)
    assert feed(server, frame(ACK, id=1)) == []
    assert feed(server, frame(ACK, id=2)) == [Acknowledged()]
    assert server.session.outbox_bytes == 0


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20),
    acks=st.lists(st.integers(0, 22), max_size=10),
)
def test_the_outbox_holds_what_was_sent_and_not_acknowledged(
    sizes: list[int], acks: list[int]
) -> None:
    session = Session()
    for size in sizes:
        session.sent += 1
        session.keep([bytes(size)], size)
    highest = 0
    for number in acks:
        if number > len(sizes):
            with pytest.raises(ProtocolError):
                session.acknowledge(number)
        else:
            session.acknowledge(number)
            highest = max(highest, number)
        assert session.outbox_bytes == sum(sizes[highest:])


def test_a_peer_that_never_reads_is_told_nothing_new() -> None:
    """With one direction cut the other goes on, and the sender sees that nothing is accepted."""
    pair = Pair().log_in()
    pair.server.deaf = True
    for _ in range(100):
        pair.client.peer.send(MESSAGE_WORD, 0, b"lost")
        pair.server.peer.send(MESSAGE_WORD, 0, b"arrives")
    pair.run()
    assert len(pair.client.of(Frame)) == 100
    assert pair.server.events == []
    assert pair.client.peer.session.outbox_bytes == 100 * (HEADER.size + 4)


@given(st.data())
def test_two_peers_that_talk_at_random_agree(data: st.DataObject) -> None:
    """Whatever the order of writes and reads, all that was sent arrives once and is accepted."""
    pair = Pair().log_in()
    texts: dict[str, list[bytes]] = {"client": [], "server": []}
    actions: list[Any] = data.draw(
        st.lists(st.sampled_from(["send", "carry", "ping", "ack"]), max_size=30)
    )
    for action in actions:
        side = data.draw(st.sampled_from([pair.client, pair.server]))
        if action == "send":
            texts[side.name].append(pack(len(texts[side.name])))
            side.peer.send(MESSAGE_WORD, 0, texts[side.name][-1])
        elif action == "carry":
            pair.carry(side)
        elif action == "ping":
            side.peer.ping(1)
        elif side.peer.ack_due:
            side.peer.acknowledge()
    pair.run()
    for side in (pair.client, pair.server):
        side.peer.acknowledge()
    pair.run()
    for side in (pair.client, pair.server):
        sender = pair.other(side)
        assert [frame.payload for frame in side.of(Frame)] == texts[sender.name]
        assert side.peer.session.received == side.peer.session.reported == len(texts[sender.name])
        assert side.peer.session.outbox_bytes == 0
        assert not side.of(Broken)


# A peer that goes away


def kept(peer: CNDT) -> list[tuple[int, bytes]]:
    return [(id, payload) for _, id, payload in peer.session.unserved()]


def test_what_a_peer_does_not_serve_is_kept_also_when_it_acknowledges_it_in_one_batch() -> None:
    pair = Pair().log_in()
    client, server = pair.client.peer, pair.server.peer
    for number in range(5):
        client.send(MESSAGE_WORD, 0, bytes([number]))
        if number in (1, 3):
            written(client)
    feed(server, written(client))
    goodbye = frame(GOAWAY, 0, 0, pack([1001, "", 0, 3])) + frame(ACK, 0, 5, b"")
    events = feed(client, goodbye)
    assert GoingAway(1001, "", 3) in events
    assert kept(client) == [(0, b"\x03"), (0, b"\x04")]
    assert client.session.outbox_bytes > 0
    client.session.release()
    assert (kept(client), client.session.outbox_bytes) == ([], 0)


def test_what_is_not_served_is_told_frame_by_frame_however_it_was_written() -> None:
    """Frames of all sizes in one write, and one whose large end is a piece of its own."""
    client = Pair().log_in().client.peer
    request = word(FrameType.RPC_REQUEST, SEQUENCED)
    large = b"large" * 20_000
    client.send(MESSAGE_WORD, 0, b"served")
    client.send(request, 1, b"one")
    client.send_split(request, 3, b"head", large, b"end")
    client.send(MESSAGE_WORD, 0, b"")
    written(client)
    feed(client, frame(GOAWAY, 0, 0, pack([1001, "", 0, 1])))
    assert list(client.session.unserved()) == [
        (request, 1, b"one"),
        (request, 3, b"head" + large + b"end"),
        (MESSAGE_WORD, 0, b""),
    ]


def test_all_is_served_that_was_sent_before_the_goodbye_came() -> None:
    client = Pair().log_in().client.peer
    client.send(MESSAGE_WORD, 0, b"x")
    written(client)
    feed(client, frame(GOAWAY, 0, 0, pack([1001, "", 0, 1])))
    assert kept(client) == []
    client.session.release()
    assert client.session.outbox_bytes > 0  # until it is acknowledged


def test_a_batch_that_went_on_in_its_middle_is_counted_by_what_was_left_of_it() -> None:
    session = Session()
    for first, last in ((1, 4), (5, 6)):
        session.sent = last
        session.keep([batch := messages(first, last, 10)], len(batch))
    assert session.again(2) == [messages(3, 4, 10), messages(5, 6, 10)]
    assert session.outbox_bytes == len(messages(3, 6, 10))
    session.acknowledge(4)
    assert session.outbox_bytes == len(messages(5, 6, 10))
