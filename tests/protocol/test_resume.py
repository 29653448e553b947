"""Resume without I/O: logins that go on with a session, and what each side then sends again."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conduit.exceptions import AuthenticationError, ProtocolError
from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Broken,
    Opened,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import PRIORITY, SEQUENCED, FrameType, word
from conduit.protocol.session import Session
from fuzz.targets.parser import small_frames
from tests.golden_frames import USER
from tests.protocol.pair import (
    EPOCH,
    HEARTBEAT,
    SESSION_ID,
    Frame,
    Pair,
    Split,
    byte_by_byte,
    feed,
    frames_of,
    make_client,
    make_server,
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
    HEADER,
    MESSAGE,
    PING,
    RPC_RESPONSE,
    frame,
    pack,
    unpack,
)

MESSAGE_WORD = word(FrameType.MESSAGE, SEQUENCED)
ANONYMOUS: dict[str, Any] = {"client": {"user": None}, "server": {"anonymous": True}}
WITH_PASSWORD: dict[str, Any] = {"client": {}, "server": {}}
LOGINS = pytest.mark.parametrize("login", [ANONYMOUS, WITH_PASSWORD], ids=["anonymous", "scram"])


def again(
    pair: Pair, login: dict[str, Any], *, split: Split = whole, behind: bytes = b""
) -> list[Frame]:
    """Let both sides of a pair go on over another link.

    What the server sends again comes right behind AUTH_SUCCESS, with `behind` after it. `split`
    cuts all that the client receives then. Returns the frames that the client has taken from it.
    """
    client, server = pair.client.peer, pair.server.peer
    joining = Pair(
        client={**login["client"], "session": client.session}, server=login["server"]
    ).run()
    (wanted,) = joining.server.of(ResumeWanted)
    assert (wanted.id, wanted.epoch) == (client.session.id, client.session.epoch)
    assert wanted.identity == joining.server.peer.peer.identity
    joining.server.peer.welcome_back(
        server.session, heartbeat=HEARTBEAT, name="conduit-server", version="1.0.0", keeps=30.0
    )
    data = written(joining.server.peer)
    assert joining.server.peer.state is State.CLOSED
    server.resume(wanted.accepted)
    data += written(server) + behind
    return cut_at_success(joining.client.peer, client, list(split(data)))


def cut_at_success(joining: CNDT, client: CNDT, pieces: list[bytes]) -> list[Frame]:
    """Bring what the server says to a client, whose session the link carries from AUTH_SUCCESS."""
    events: list[Any] = []
    resumed = False
    for piece in pieces:
        if resumed:
            events += feed(client, piece)
            continue
        for event in joining.receive(piece):
            assert isinstance(event, Resumed)
            resumed = True
            client.resume(event.accepted)
            events += feed(client, event.rest)
    assert joining.receive(b"what comes now") == []
    return [event for event in events if isinstance(event, Frame)]


def send(peer: CNDT, *payloads: bytes) -> None:
    for payload in payloads:
        peer.send(MESSAGE_WORD, 0, payload)


def payloads(frames: list[Frame]) -> list[Any]:
    return [event.payload for event in frames]


# Logins


@LOGINS
def test_both_sides_go_on_behind_what_the_other_has(login: dict[str, Any]) -> None:
    pair = Pair(**login).log_in()
    send(pair.client.peer, b"1", b"2")
    send(pair.server.peer, b"a", b"b", b"c")
    pair.step()
    send(pair.client.peer, b"3", b"4")
    send(pair.server.peer, b"d")
    for side in (pair.client, pair.server):
        written(side.peer)  # lost with the link
    send(pair.client.peer, b"5")
    assert payloads(again(pair, login)) == [b"d"]
    pair.server.events.clear()
    pair.run()
    assert payloads(pair.server.of(Frame)) == [b"3", b"4", b"5"]
    for side in (pair.client, pair.server):
        side.peer.ping(1)
    pair.run()
    assert pair.client.peer.session.outbox_bytes == pair.server.peer.session.outbox_bytes == 0


@LOGINS
@pytest.mark.parametrize("split", [whole, byte_by_byte, *map(pieces_of, (31, 33, 64, 257))])
def test_what_comes_behind_the_success_may_be_cut_anywhere(
    login: dict[str, Any], split: Split
) -> None:
    pair = Pair(**login).log_in()
    send(pair.server.peer, b"lost", b"as well" * 20)
    written(pair.server.peer)
    send(pair.server.peer, b"kept")
    number = pair.server.peer.session.sent
    behind = frame(PING, PRIORITY, 9) + frame(MESSAGE, SEQUENCED, 0, b"new", number + 1)
    got = again(pair, login, split=split, behind=behind)
    assert payloads(got) == [b"lost", b"as well" * 20, b"kept", b"new"]


def test_every_single_cut_behind_the_success() -> None:
    for cut in range(1, 600):
        pair = Pair(**ANONYMOUS).log_in()
        send(pair.server.peer, b"lost", b"as well")
        got = again(pair, ANONYMOUS, split=lambda data, at=cut: [data[:at], data[at:]])  # type: ignore[misc]
        assert payloads(got) == [b"lost", b"as well"]


def test_an_answer_that_is_lost_means_nothing() -> None:
    """The server goes on over a link whose answer never comes; then over the next one."""
    pair = Pair(**ANONYMOUS).log_in()
    send(pair.client.peer, b"1", b"2")
    send(pair.server.peer, b"a", b"b")
    pair.carry(pair.client)
    written(pair.server.peer)
    session = pair.client.peer.session
    for _ in range(3):
        joining = Pair(client={"user": None, "session": session}, server={"anonymous": True}).run()
        (wanted,) = joining.server.of(ResumeWanted)
        pair.server.peer.resume(wanted.accepted)
        written(pair.server.peer)
        send(pair.server.peer, b"more")
    assert payloads(again(pair, ANONYMOUS)) == [b"a", b"b", b"more", b"more", b"more"]
    pair.run()
    assert payloads(pair.server.of(Frame)) == [b"1", b"2"]


def test_the_server_hears_of_a_session_before_it_looks_anybody_up() -> None:
    """So that a full server lets in who is in already; it says nothing about whose it is."""
    session = Session(SESSION_ID, EPOCH)
    client, server = make_client(session=session), make_server()
    assert feed(server, written(client)) == [VerifierNeeded(USER, SESSION_ID)]
    client, server = make_client(), make_server()
    assert feed(server, written(client)) == [VerifierNeeded(USER, b"")]


@pytest.mark.parametrize("number", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_numbers_of_64_bits_are_told(number: int) -> None:
    session = Session(SESSION_ID, EPOCH)
    session.received = number
    client = make_client(user=None, session=session)
    (wanted,) = feed(make_server(anonymous=True), written(client))
    assert wanted == ResumeWanted("anonymous", SESSION_ID, EPOCH, number)
    server = make_server(anonymous=True)
    feed(server, written(make_client(user=None, session=session)))
    server.welcome_back(session, heartbeat=HEARTBEAT, name="x", version="1", keeps=1.0)
    assert feed(client, written(server)) == [Resumed(number)]


@pytest.mark.parametrize(
    "session",
    [
        {},
        [],
        "session",
        7,
        True,
        b"x" * 16,
        {"id": bytes(16), "epoch": bytes(8)},
        {"id": bytes(15), "epoch": bytes(8), "recv": 0},
        {"id": bytes(17), "epoch": bytes(8), "recv": 0},
        {"id": "0" * 16, "epoch": bytes(8), "recv": 0},
        {"id": None, "epoch": bytes(8), "recv": 0},
        {"id": bytes(16), "epoch": bytes(7), "recv": 0},
        {"id": bytes(16), "epoch": bytes(9), "recv": 0},
        {"id": bytes(16), "epoch": 1, "recv": 0},
        {"id": bytes(16), "epoch": bytes(8), "recv": -1},
        {"id": bytes(16), "epoch": bytes(8), "recv": 0.0},
        {"id": bytes(16), "epoch": bytes(8), "recv": False},
        {"id": bytes(16), "epoch": bytes(8), "recv": None},
    ],
)
def test_a_server_refuses_a_session_that_cannot_be(session: Any) -> None:
    client, server = make_client(user=None), make_server(anonymous=True)
    (raw,) = frames_of(written(client))
    asked = {**unpack(raw[HEADER.size :]), "session": session}
    (event,) = feed(server, frame(AUTH_REQUEST, id=1, payload=pack(asked)))
    assert isinstance(event, Broken)
    assert isinstance(event.error, AuthenticationError) and event.error.code == "bad_request"
    (raw,) = frames_of(written(server))
    assert raw[5] == AUTH_FAILURE


@pytest.mark.parametrize("told", [True, False], ids=["nil", "left out"])
def test_a_session_that_is_nil_or_left_out_is_none(told: bool) -> None:
    client, server = make_client(user=None), make_server(anonymous=True)
    (raw,) = frames_of(written(client))
    asked: dict[str, Any] = unpack(raw[HEADER.size :])
    assert asked.pop("session") is None
    if told:
        asked["session"] = None
    (event,) = feed(server, frame(AUTH_REQUEST, id=1, payload=pack(asked)))
    assert isinstance(event, WelcomeNeeded)


RIGHT = {"id": SESSION_ID, "epoch": EPOCH, "resumed": True, "recv": 0, "ttl": 30}


def answered(asked: Session | None, session: dict[str, Any]) -> Any:
    """Return what a client makes of the session in AUTH_SUCCESS."""
    client = make_client(user=None, session=asked)
    written(client)
    success = {
        "scram": "",
        "identity": "anonymous",
        "session": session,
        "hb": [30_000, 90_000],
        "server": {"name": "server", "version": "1"},
    }
    (event,) = feed(client, frame(AUTH_SUCCESS, id=1, payload=pack(success)))
    if isinstance(event, Broken):
        assert isinstance(event.error, ProtocolError)
        assert client.state is State.CLOSED and written(client) == b""
        return "broken"
    return event


@pytest.mark.parametrize(
    "asked",
    [None, Session(SESSION_ID, bytes(8)), Session(bytes(16), EPOCH), Session(EPOCH * 2, EPOCH)],
)
def test_a_session_that_was_not_asked_for_cannot_go_on(asked: Session | None) -> None:
    assert answered(asked, RIGHT) == "broken"


@pytest.mark.parametrize(
    "change",
    [
        {"id": SESSION_ID[:15]},
        {"id": SESSION_ID + b"x"},
        {"id": "0" * 16},
        {"id": None},
        {"epoch": EPOCH[:7]},
        {"epoch": EPOCH + b"x"},
        {"epoch": b""},
        {"resumed": 1},
        {"resumed": None},
        {"resumed": "true"},
        {"recv": -1},
        {"recv": 0.0},
        {"recv": True},
        {"recv": None},
        {"ttl": -1},
        {"ttl": 2**32},
        {"ttl": 1.5},
    ],
    ids=str,
)
def test_a_client_believes_no_answer_that_cannot_be(change: dict[str, Any]) -> None:
    asked = Session(SESSION_ID, EPOCH)
    assert answered(asked, RIGHT) == Resumed(0)
    assert answered(asked, {**RIGHT, **change}) == "broken"


def test_a_server_may_start_a_new_session_in_place_of_the_one_that_was_asked_for() -> None:
    new = {**RIGHT, "id": bytes(16), "resumed": False}
    assert isinstance(answered(Session(SESSION_ID, EPOCH), new), Opened)
    assert isinstance(answered(None, new), Opened)


# Going on


@pytest.mark.parametrize("have", [10, 200, 500, 900, 1500])
@pytest.mark.parametrize("size", [250, 400, 1400])
def test_half_a_frame_that_has_come_is_forgotten(have: int, size: int) -> None:
    """Whether it was kept as it was, in a buffer, or as `bytes` of their own."""
    payload = pack(["name", bytes(size)])
    payload = payload.replace(b"\xc5" + size.to_bytes(2, "big"), b"\xc6" + size.to_bytes(4, "big"))
    data = frame(MESSAGE, SEQUENCED, 0, payload, 1) + frame(MESSAGE, SEQUENCED, 0, b"2", 2)
    with small_frames():
        server = server_in(State.OPEN)
        feed(server, data[: min(have, HEADER.size + len(payload) - 1)])
        server.resume(0)
        got = feed(server, data)
    assert [len(event.payload) for event in got if isinstance(event, Frame)] == [len(payload), 1]


def test_what_was_urgent_on_the_old_link_is_not_on_the_new_one() -> None:
    server = server_in(State.OPEN)
    feed(server, frame(MESSAGE, SEQUENCED, 0, b"", 1))
    send(server, b"1")
    written(server)
    server.acknowledge()
    server.ping(7)
    server.push(frame(MESSAGE, PRIORITY))
    send(server, b"2")
    server.resume(0)
    assert not server.ack_due
    assert server.session.reported == server.session.received == 1  # it was told at the login
    numbers = [HEADER.unpack_from(raw)[7] for raw in frames_of(written(server))]
    assert numbers == [1, 2]


def test_what_is_sent_again_is_what_was_sent() -> None:
    server = server_in(State.OPEN)
    send(server, b"1", bytes(100_000))
    server.send_split(word(FrameType.RPC_RESPONSE, SEQUENCED), 1, b"head", bytes(5000), b"end")
    first = written(server)
    send(server, b"4")
    first += written(server)
    for accepted in (0, 0, 1, 2, 3, 4):
        server.resume(accepted)
        assert written(server) == b"".join(frames_of(first)[accepted:])
    assert server.session.outbox_bytes == 0


@pytest.mark.parametrize("number", [3, 2**32, 2**64 - 1])
def test_a_session_cannot_go_on_behind_what_was_never_sent(number: int) -> None:
    server = server_in(State.OPEN)
    send(server, b"1", b"2")
    data = written(server)
    send(server, b"not written yet")
    with pytest.raises(ProtocolError, match=f"frame {number}, but 2 were sent"):
        server.resume(number)
    assert server.session.outbox_bytes == len(data)
    server.resume(0)
    assert written(server)[: len(data)] == data


def test_a_number_that_was_overtaken_holds_no_more() -> None:
    server = server_in(State.OPEN)
    send(server, b"1", b"2", b"3")
    first = frames_of(written(server))
    feed(server, frame(ACK, id=2))
    server.resume(0)
    assert written(server) == first[2]


def test_a_dropped_outbox_has_nothing_to_send_again() -> None:
    server = server_in(State.OPEN)
    send(server, b"1", b"2")
    written(server)
    server.session.drop()
    assert server.session.outbox_bytes == 0
    assert server.session.again(0) == server.session.again(1) == []


Chunks = list[list[tuple[int, bool]]]


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 300), st.booleans()), min_size=1, max_size=5),
        max_size=6,
    ),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=12),
)
def test_whatever_is_acknowledged_the_rest_is_sent_again(
    batches: Chunks, steps: list[tuple[bool, int]]
) -> None:
    """Batches of several frames are cut wherever the peer has stopped, again and again."""
    server = server_in(State.OPEN)
    first: list[bytes] = []
    for batch in batches:
        for size, split in batch:
            if split:
                server.send_split(word(FrameType.RPC_RESPONSE, SEQUENCED), 1, b"", bytes(size))
            else:
                send(server, bytes(size))
        first += frames_of(written(server))
    assert {raw[5] for raw in first} <= {MESSAGE, RPC_RESPONSE}
    sizes = [0, *accumulate(map(len, first))]
    known = 0
    for resumes, number in steps:
        if number > len(first):
            continue
        known = max(known, number)
        if resumes:
            server.resume(number)
            assert written(server) == b"".join(first[known:])
            assert server.session.outbox_bytes == sizes[-1] - sizes[known]
        else:
            feed(server, frame(ACK, id=number))
            # A batch is kept until its last frame is acknowledged.
            assert server.session.outbox_bytes >= sizes[-1] - sizes[known]
    feed(server, frame(ACK, id=len(first)))
    assert server.session.outbox_bytes == 0
    server.resume(len(first))
    assert written(server) == b""
