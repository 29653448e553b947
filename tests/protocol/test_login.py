"""The login over a pair of peers: who gets in, who does not, and what a liar learns from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conduit.exceptions import AuthenticationError, ProtocolError, Unavailable
from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Broken,
    Capabilities,
    Closed,
    Event,
    KeysNeeded,
    Opened,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import word
from conduit.protocol.login import ANONYMOUS
from conduit.protocol.scram import MECHANISM, MECHANISM_PLUS, transcript_digest
from conduit.protocol.session import Session
from tests.golden_frames import CLIENT_NONCE, ITERATIONS, SERVER_NONCE
from tests.protocol.pair import (
    EPOCH,
    HEARTBEAT,
    SESSION_ID,
    Change,
    Frame,
    Pair,
    Side,
    byte_by_byte,
    client_in,
    feed,
    frames_of,
    login_frames,
    make_client,
    make_server,
    server_in,
    welcome,
    whole,
    written,
)
from tests.wire_client import (
    AUTH_CHALLENGE,
    AUTH_FAILURE,
    AUTH_REQUEST,
    AUTH_RESPONSE,
    AUTH_SUCCESS,
    CLOSE,
    HEADER,
    MESSAGE,
    PING,
    SEQUENCED,
    b64,
    frame,
    pack,
    unpack,
)

BINDING = bytes(range(32))
LOGIN_STATES = [State.AWAIT_REQUEST, State.AWAIT_VERIFIER, State.AWAIT_PROOF, State.AWAIT_WELCOME]
ANONYMOUS_PAIR: dict[str, Any] = {"client": {"user": None}, "server": {"anonymous": True}}


def types_of(side: Side) -> list[int]:
    """Return the types of all frames that a side wrote."""
    return [raw[5] for raw in frames_of(side.wrote)]


def payload_of(side: Side, type: int) -> dict[str, Any]:
    """Return what the one frame of this type carried."""
    (raw,) = (raw for raw in frames_of(side.wrote) if raw[5] == type)
    decoded: dict[str, Any] = unpack(raw[HEADER.size :])
    return decoded


def rewrite(type: int, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the payload of every AUTH frame of one type on its way.

    `change` returns the new payload, or changes the map that it is given and returns None.
    """

    def on_the_way(sender: str, data: bytes) -> bytes:
        frames = []
        for raw in frames_of(data):
            if raw[5] == type:
                value = unpack(raw[HEADER.size :])
                changed = change(value)
                raw = frame(type, id=1, payload=pack(value if changed is None else changed))
            frames.append(raw)
        return b"".join(frames)

    return on_the_way


def rewrite_scram(type: int, old: str, new: str) -> Change:
    """Replace a pattern in the SCRAM message of one type."""

    def change(value: dict[str, Any]) -> None:
        changed = re.sub(old, new, value["scram"])
        assert changed != value["scram"]
        value["scram"] = changed

    return rewrite(type, change)


def refused_with(pair: Pair) -> AuthenticationError:
    """Run a login that the server must refuse, and return what the client makes of it."""
    pair.run()
    server_error, client_error = pair.server.error, pair.client.error
    assert isinstance(server_error, AuthenticationError)
    assert isinstance(client_error, AuthenticationError)
    assert types_of(pair.server)[-1] == AUTH_FAILURE
    assert CLOSE not in types_of(pair.server) + types_of(pair.client)
    assert pair.client.peer.state is pair.server.peer.state is State.CLOSED
    failure = payload_of(pair.server, AUTH_FAILURE)
    assert client_error.code == server_error.code == failure["code"]
    assert failure["retry"] is False
    assert failure["retry_after"] == 0
    return client_error


# Success


@pytest.mark.parametrize("split", [whole, byte_by_byte])
@pytest.mark.parametrize("binding", [None, BINDING])
def test_login(binding: bytes | None, split: Callable[[bytes], list[bytes]]) -> None:
    pair = Pair(client={"binding": binding}, server={"binding": binding}, split=split).run()
    assert payload_of(pair.client, AUTH_REQUEST)["mech"] == (
        MECHANISM if binding is None else MECHANISM_PLUS
    )
    assert types_of(pair.client) == [AUTH_REQUEST, AUTH_RESPONSE]
    assert types_of(pair.server) == [AUTH_CHALLENGE, AUTH_SUCCESS]
    for raw in frames_of(pair.client.wrote + pair.server.wrote):
        _, _, _, flags, length, id, _, reserved = HEADER.unpack_from(raw)
        assert (flags, id, reserved) == (0, 1, 0)
        assert length <= 4096
    assert pair.client.peer.state is pair.server.peer.state is State.OPEN
    assert pair.client.events == [Opened(pair.client.peer.peer)]
    assert pair.server.events == []


def test_both_sides_know_whom_they_talk_to() -> None:
    own = Capabilities(5000, frozenset({"zlib", "resume"}), 7, (8, 9000), 0)
    other = Capabilities(6000, frozenset(), 1, (1, 1), 60_000)
    users = {"ä=b,c": "pencil"}
    pair = Pair(
        users=users,
        client={"user": "ä=b,c", "agent": "some/thing/2.1", "capabilities": own},
        server={"capabilities": other},
    ).log_in()
    client, server = pair.client.peer.peer, pair.server.peer.peer
    assert client.identity == server.identity == "ä=b,c"
    assert (server.name, server.version) == ("some/thing", "2.1")
    assert (client.name, client.version) == ("conduit-server", "1.0.0")
    assert server.capabilities == own
    assert client.capabilities == other
    assert client.heartbeat == server.heartbeat == HEARTBEAT


@pytest.mark.parametrize(
    ("agent", "name", "version"),
    [
        ("a/1", "a", "1"),
        ("plain", "plain", ""),
        ("/1", "/1", ""),
        ("a/", "a", ""),
        ("", "", ""),
        ("x" * 62 + "/1", "x" * 62, "1"),
    ],
)
def test_agents(agent: str, name: str, version: str) -> None:
    peer = Pair(client={"agent": agent}).log_in().server.peer.peer
    assert (peer.name, peer.version) == (name, version)


def test_the_server_asks_before_it_goes_on() -> None:
    """The peer waits for its owner: no frame leaves before the owner has answered."""
    server = make_server()
    assert feed(server, login_frames().request) == [VerifierNeeded("default")]
    assert server.state is State.AWAIT_VERIFIER
    assert written(server) == b""
    server = server_in(State.AWAIT_PROOF)
    assert feed(server, login_frames().response) == [WelcomeNeeded("default")]
    assert server.state is State.AWAIT_WELCOME
    assert written(server) == b""
    client = client_in(State.AWAIT_CHALLENGE)
    (event,) = feed(client, login_frames().challenge)
    assert isinstance(event, KeysNeeded)
    assert event.iterations == ITERATIONS
    assert written(client) == b""


def test_without_a_password() -> None:
    told = Capabilities(frame_max=77_777)
    pair = Pair(client={"user": None}, server={"anonymous": True, "capabilities": told}).run()
    assert types_of(pair.client) == [AUTH_REQUEST]
    assert types_of(pair.server) == [AUTH_SUCCESS]
    request = payload_of(pair.client, AUTH_REQUEST)
    assert (request["mech"], request["scram"]) == (ANONYMOUS, "")
    success = payload_of(pair.server, AUTH_SUCCESS)
    assert (success["scram"], success["identity"]) == ("", "anonymous")
    assert pair.client.peer.state is pair.server.peer.state is State.OPEN
    assert pair.client.peer.peer.identity == pair.server.peer.peer.identity == "anonymous"
    assert pair.client.peer.peer.capabilities == told


def test_an_anonymous_server_may_leave_its_capabilities_out() -> None:
    change = rewrite(AUTH_SUCCESS, lambda value: {k: v for k, v in value.items() if k != "caps"})
    pair = Pair(**ANONYMOUS_PAIR, change=change).log_in()
    assert pair.client.peer.peer.capabilities == Capabilities()


def test_missing_capabilities_have_their_defaults() -> None:
    server = make_server()
    request = unpack(login_frames().request[HEADER.size :])
    request["caps"] = {"unknown": 1, "calls": 9}
    request["unknown"] = {"deep": []}
    feed(server, frame(AUTH_REQUEST, id=1, payload=pack(request)))
    assert server.state is State.AWAIT_VERIFIER
    assert server.peer.capabilities == Capabilities(1048576, frozenset(), 9, (256, 1048576), 30000)


# What is queued before the login is done


def test_frames_queued_before_the_welcome_leave_behind_it() -> None:
    """The owner of a server may send as soon as it knows who it is."""
    messages = [pack(["early", number]) for number in range(3)]

    def on_welcome(server: CNDT) -> None:
        assert server.state is State.AWAIT_WELCOME
        for payload in messages:
            server.send(word(MESSAGE, SEQUENCED), 0, payload)
        assert written(server) == b""
        welcome_keeping_the_session(server)

    pair = Pair(on_welcome=on_welcome).run()
    assert types_of(pair.server) == [AUTH_CHALLENGE, AUTH_SUCCESS, MESSAGE, MESSAGE, MESSAGE]
    assert [frame.payload for frame in pair.client.of(Frame)] == messages
    pair.server.peer.send(word(MESSAGE, SEQUENCED), 0, b"later")
    pair.run()
    assert pair.client.of(Frame)[-1].payload == b"later"
    assert not pair.client.of(Broken)


def welcome_keeping_the_session(server: CNDT) -> None:
    server.session.id, server.session.epoch = SESSION_ID, EPOCH
    server.welcome(heartbeat=HEARTBEAT, name="conduit-server", version="1.0.0")


def test_a_large_frame_queued_before_the_welcome_leaves_behind_it() -> None:
    server = server_in(State.AWAIT_WELCOME)
    server.send_split(word(MESSAGE, SEQUENCED), 0, b"head", bytes(100_000))
    assert written(server) == b""
    welcome_keeping_the_session(server)
    assert [raw[5] for raw in frames_of(written(server))] == [AUTH_SUCCESS, MESSAGE]


def test_frames_that_a_client_queued_before_the_success_leave_behind_it() -> None:
    pair = Pair()
    pair.client.peer.send(word(MESSAGE, SEQUENCED), 0, b"early")
    pair.run()
    assert types_of(pair.client) == [AUTH_REQUEST, AUTH_RESPONSE, MESSAGE]
    pair.client.peer.send(word(MESSAGE, SEQUENCED), 0, b"later")
    pair.run()
    assert [frame.payload for frame in pair.server.of(Frame)] == [b"early", b"later"]
    assert not pair.server.of(Broken)


def test_frames_queued_for_one_who_is_refused_never_leave() -> None:
    def on_welcome(server: CNDT) -> None:
        server.send_split(word(MESSAGE, SEQUENCED), 0, b"secret", bytes(100_000))
        server.send(word(MESSAGE, SEQUENCED), 0, b"secret")
        server.refuse("refused", "not you")

    pair = Pair(on_welcome=on_welcome).run()
    assert types_of(pair.server) == [AUTH_CHALLENGE, AUTH_FAILURE]
    assert b"secret" not in pair.server.wrote


# Refusal


@pytest.mark.parametrize("binding", [None, BINDING])
def test_wrong_password_and_unknown_user_look_the_same(binding: bytes | None) -> None:
    sides: dict[str, Any] = {"client": {"binding": binding}, "server": {"binding": binding}}
    wrong = Pair(password="Pencil", **sides)
    unknown = Pair(users={"somebody": "pencil"}, **sides)
    errors = [refused_with(pair) for pair in (wrong, unknown)]
    assert [error.code for error in errors] == ["invalid_credentials"] * 2
    assert str(errors[0]) == str(errors[1])
    assert "'default'" in str(errors[0])
    failures = [payload_of(pair.server, AUTH_FAILURE) for pair in (wrong, unknown)]
    assert failures[0] == failures[1]
    mechanisms = [MECHANISM] if binding is None else [MECHANISM_PLUS, MECHANISM]
    assert failures[0]["mechs"] == mechanisms
    first, second = (payload_of(pair.server, AUTH_CHALLENGE)["scram"] for pair in (wrong, unknown))
    assert len(first) == len(second)
    assert f",i={ITERATIONS}," in second


def test_an_unknown_user_has_the_same_salt_every_time() -> None:
    def salt(user: str, nonce: str = SERVER_NONCE) -> str:
        pair = Pair(users={}, client={"user": user}, server={"nonce": nonce})
        refused_with(pair)
        scram: str = payload_of(pair.server, AUTH_CHALLENGE)["scram"]
        return scram.split(",")[1]

    assert salt("nobody") == salt("nobody", "x" * 24) != salt("nobody else")


def test_a_wrong_certificate_is_refused() -> None:
    error = refused_with(Pair(client={"binding": b"x" * 32}, server={"binding": BINDING}))
    assert error.code == "invalid_credentials"


def test_a_server_that_cannot_bind_says_so_and_the_second_try_gets_in() -> None:
    pair = Pair(client={"binding": BINDING})
    assert refused_with(pair).code == "unsupported_mechanism"
    assert payload_of(pair.server, AUTH_FAILURE)["mechs"] == [MECHANISM]
    Pair(client={"can_bind": True}).log_in()


def test_a_client_that_was_told_a_lie_about_binding_is_refused() -> None:
    """Section 6.2: somebody in between took the better mechanism away."""
    error = refused_with(Pair(client={"can_bind": True}, server={"binding": BINDING}))
    assert error.code == "invalid_credentials"


def test_a_server_with_a_password_takes_nobody_without() -> None:
    pair = Pair(client={"user": None})
    error = refused_with(pair)
    assert (error.code, str(error)) == ("unsupported_mechanism", "the server wants a password")


def test_a_server_without_a_password_cannot_prove_itself() -> None:
    error = refused_with(Pair(server={"anonymous": True}))
    assert error.code == "unsupported_mechanism"
    assert "leave yours out" in str(error)


def test_a_client_with_a_password_never_believes_a_success_without_proof() -> None:
    anonymous = Pair(**ANONYMOUS_PAIR).run()
    for state in (State.AWAIT_CHALLENGE, State.AWAIT_KEYS, State.AWAIT_SUCCESS):
        client = client_in(state)
        (event,) = feed(client, anonymous.server.wrote)
        assert isinstance(event, Broken)
        assert client.state is State.CLOSED
        assert written(client) == b""


@pytest.mark.parametrize(
    ("version", "named"), [(2, "2"), (0, "0"), (10**12, "1000000000000"), (-1, "-1")]
)
def test_another_version_of_the_login_is_refused_and_both_are_named(
    version: int, named: str
) -> None:
    pair = Pair(change=rewrite(AUTH_REQUEST, lambda value: value.update(v=version))).run()
    assert isinstance(pair.server.error, AuthenticationError)
    assert pair.server.error.code == "unsupported_version"
    assert f"version 1, the client asked for {named}" in str(pair.server.error)
    assert isinstance(pair.client.error, ProtocolError)
    assert str(pair.client.error) == str(pair.server.error)


@pytest.mark.parametrize("mechanism", ["PLAIN", "", "scram-sha-256", "ä" * 500])
def test_unknown_mechanisms_are_refused(mechanism: str) -> None:
    pair = Pair(change=rewrite(AUTH_REQUEST, lambda value: value.update(mech=mechanism)))
    assert refused_with(pair).code == "unsupported_mechanism"


@pytest.mark.parametrize(
    "user", ["", "n=x", "n=x,r=short", "n=,r=" + "x" * 24, "a=x,n=y,r=" + "x" * 24]
)
def test_scram_that_is_malformed_is_a_bad_request(user: str) -> None:
    pair = Pair(change=rewrite(AUTH_REQUEST, lambda value: value.update(scram="n,," + user)))
    assert refused_with(pair).code == "bad_request"


@pytest.mark.parametrize("final", ["", "e=other", "c=biws", "c=biws,r=x,p=!", "c=biws,r=x,p=eA=="])
def test_a_final_that_is_malformed_is_a_bad_request(final: str) -> None:
    pair = Pair(change=rewrite(AUTH_RESPONSE, lambda value: value.update(scram=final)))
    assert refused_with(pair).code == "bad_request"


@pytest.mark.parametrize("state", LOGIN_STATES)
@pytest.mark.parametrize(("retry_after", "sent"), [(0.0, 0), (1.5, 1500)])
def test_an_owner_may_refuse_at_any_time(state: State, retry_after: float, sent: int) -> None:
    server = server_in(state)
    server.refuse("busy", "the server is full", retry=True, retry_after=retry_after)
    assert server.state is State.CLOSED
    raw = written(server)
    failure = unpack(raw[HEADER.size :])
    assert failure == {
        "code": "busy",
        "message": "the server is full",
        "retry": True,
        "retry_after": sent,
        "mechs": [MECHANISM],
    }
    for client_state in (State.AWAIT_CHALLENGE, State.AWAIT_KEYS, State.AWAIT_SUCCESS):
        client = client_in(client_state)
        (event,) = feed(client, raw)
        assert isinstance(event, Broken)
        assert isinstance(event.error, Unavailable)
        assert str(event.error) == "the server is full"
        assert event.error.retryable
        assert event.error.retry_after == retry_after
        assert written(client) == b""


@pytest.mark.parametrize("code", ["refused", "bad_request", "some_new_code"])
@pytest.mark.parametrize("message", ["because", ""])
def test_other_codes_reach_the_client(code: str, message: str) -> None:
    pair = Pair(on_welcome=lambda server: server.refuse(code, message)).run()
    error = pair.client.error
    assert isinstance(error, AuthenticationError)
    assert (error.code, str(error)) == (code, message or code)


@pytest.mark.parametrize("size", [1000, 1500, 3000, 10_000])
def test_a_long_refusal_reaches_the_client(size: int) -> None:
    """An application says why in its own words, and how many they are it cannot know."""
    pair = Pair(on_welcome=lambda server: server.refuse("refused", "x" * size)).run()
    assert HEADER.unpack_from(frames_of(pair.server.wrote)[-1])[4] <= 4096
    assert isinstance(pair.client.error, AuthenticationError)
    assert pair.client.error.code == "refused"
    assert str(pair.client.error).startswith("xxx")


@pytest.mark.parametrize("state", LOGIN_STATES)
def test_a_client_may_close_during_the_login(state: State) -> None:
    server = server_in(state)
    assert feed(server, frame(CLOSE, payload=pack([1000, "never mind"]))) == [
        Closed(1000, "never mind")
    ]
    assert written(server) == b""


# Somebody in between


def told(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["caps"] = {**value["caps"], **changes}

    return change


def told_by_server(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["caps"] = pack({**unpack(value["caps"]), **changes})

    return change


TAMPERED: dict[str, Change] = {
    "what the client accepts": rewrite(AUTH_REQUEST, told(frame_max=2**31)),
    "what the client is": rewrite(AUTH_REQUEST, lambda value: value.update(agent="other/1")),
    "something was added to the request": rewrite(AUTH_REQUEST, lambda value: value.update(x=1)),
    "what the server accepts": rewrite(AUTH_CHALLENGE, told_by_server(feat=["zlib"])),
    "d": rewrite_scram(AUTH_CHALLENGE, "d=.*", "d=" + b64(bytes(32))),
    "d is cut": rewrite_scram(AUTH_CHALLENGE, ".$", ""),
    "d is gone": rewrite_scram(AUTH_CHALLENGE, ",d=.*", ""),
}


def silent_end(pair: Pair, sent: list[int]) -> AuthenticationError:
    """Run a login that the client must give up, without a frame after those in `sent`."""
    pair.run()
    assert isinstance(pair.client.error, AuthenticationError)
    assert types_of(pair.client) == sent
    assert pair.client.peer.state is State.CLOSED
    return pair.client.error


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
@pytest.mark.parametrize("binding", [None, BINDING])
def test_what_was_changed_on_the_way_is_noticed(binding: bytes | None, change: Change) -> None:
    pair = Pair(client={"binding": binding}, server={"binding": binding}, change=change)
    assert "downgrade" in str(silent_end(pair, [AUTH_REQUEST]))


ROGUE: dict[str, Change] = {
    "fewer iterations than the floor": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=4095"),
    "one iteration": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=1"),
    "more iterations than the ceiling": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=2000001"),
    "iterations with a zero in front": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=04096"),
    "negative iterations": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=-4096"),
    "iterations in letters": rewrite_scram(AUTH_CHALLENGE, "i=4096", "i=many"),
    "nonce of somebody else": rewrite_scram(AUTH_CHALLENGE, "r=....", "r=xxxx"),
    "nonce that is not extended": rewrite_scram(AUTH_CHALLENGE, SERVER_NONCE, ""),
    "short salt": rewrite_scram(AUTH_CHALLENGE, "s=[^,]*", "s=" + b64(bytes(11))),
    "long salt": rewrite_scram(AUTH_CHALLENGE, "s=[^,]*", "s=" + b64(bytes(65))),
    "extension that must be known": rewrite_scram(AUTH_CHALLENGE, "^", "m=x,"),
    "error instead of a challenge": rewrite_scram(AUTH_CHALLENGE, ".+", "e=other-error"),
}


@pytest.mark.parametrize("change", ROGUE.values(), ids=ROGUE)
def test_a_rogue_challenge_ends_the_login(change: Change) -> None:
    """No proof is sent that could be attacked, and no time is spent on keys."""
    silent_end(Pair(change=change), [AUTH_REQUEST])


def test_the_limits_of_iterations_can_be_moved() -> None:
    for low, high, accepted in [(4096, 4096, True), (4097, 10**6, False), (1, 4095, False)]:
        pair = Pair(client={"min_iterations": low, "max_iterations": high})
        if accepted:
            pair.log_in()
        else:
            assert f"min_iterations={low}" in str(silent_end(pair, [AUTH_REQUEST]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"p=..", "p=AA"),
        (SERVER_NONCE, "x" * 24),
        (CLIENT_NONCE, "x" * 24),
        (r"c=biws", "c=eSws"),
    ],
)
def test_a_proof_that_was_changed_is_refused(old: str, new: str) -> None:
    error = refused_with(Pair(change=rewrite_scram(AUTH_RESPONSE, old, new)))
    assert error.code == "invalid_credentials"


def test_a_recorded_proof_is_worth_nothing() -> None:
    """It fits the nonce of one connection of the server, and no other."""
    recorded = login_frames().response
    assert [type(event) for event in feed(server_in(State.AWAIT_PROOF), recorded)] == [
        WelcomeNeeded
    ]

    def replay(sender: str, data: bytes) -> bytes:
        return recorded if data[5] == AUTH_RESPONSE else data

    pair = Pair(server={"nonce": "y" * 24}, change=replay)
    assert refused_with(pair).code == "invalid_credentials"


@pytest.mark.parametrize("new", ["v=" + b64(bytes(32)), "v=", "v=!", "e=other-error", "", "x=y"])
def test_a_server_that_does_not_know_the_password_is_not_believed(new: str) -> None:
    pair = Pair(change=rewrite_scram(AUTH_SUCCESS, ".+", new))
    error = silent_end(pair, [AUTH_REQUEST, AUTH_RESPONSE])
    assert error.code in ("untrusted_server", "refused")
    assert not pair.client.of(Opened)


# Payloads of the wrong shape

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
WRONG: list[Any] = [None, True, 7, 1.5, b"bin", "text", [], [1], {}, {"k": 1}]
"""A value of each type."""
NO_MAP: dict[str, bytes] = {
    "nothing": b"",
    "no MessagePack": b"\xc1",
    "cut": pack({"v": 1})[:-1],
    "behind it": pack({"v": 1}) + b"\0",
    "nil": b"\xc0",
    "a list": pack([1]),
    "text": pack("x"),
    "keys that are no text": pack({1: 2}),
    "extension": b"\x81\xa1v\xd4\x05\0",
    "lists in lists": b"\x91" * 2000 + b"\xc0",
    "empty lists": b"\xdc\x0f\xfc" + b"\x90" * 4092,
}
LEAVE_OUT: Any = object()
WRONG_OR_GONE: list[Any] = [*WRONG, LEAVE_OUT]
NOT_TEXT: list[Any] = [value for value in WRONG_OR_GONE if value != "text"]


def with_key(value: dict[str, Any], key: str, new: Any) -> dict[str, Any]:
    if new is LEAVE_OUT:
        return {name: old for name, old in value.items() if name != key}
    return {**value, key: new}


def bad_request(server: CNDT, type: int, payload: bytes) -> str:
    """Let a malformed AUTH frame arrive, and return the code with which it is refused."""
    (event,) = feed(server, frame(type, id=1, payload=payload))
    assert isinstance(event, Broken)
    assert isinstance(event.error, AuthenticationError)
    (raw,) = frames_of(written(server))
    assert raw[5] == AUTH_FAILURE
    failure = unpack(raw[HEADER.size :])
    assert failure["code"] == event.error.code
    assert failure["message"] == str(event.error)
    code: str = failure["code"]
    return code


def given_up(client: CNDT, type: int, payload: bytes) -> Exception:
    """Let a malformed AUTH frame arrive, at which the client must close without a word."""
    (event,) = feed(client, frame(type, id=1, payload=payload))
    assert isinstance(event, Broken)
    assert isinstance(event.error, (ProtocolError, AuthenticationError))
    assert client.state is State.CLOSED
    assert written(client) == b""
    return event.error


REQUEST: dict[str, Any] = unpack(login_frames().request[HEADER.size :])
CHALLENGE: dict[str, Any] = unpack(login_frames().challenge[HEADER.size :])
SUCCESS: dict[str, Any] = unpack(login_frames().success[HEADER.size :])
FAILURE: dict[str, Any] = {
    "code": "refused",
    "message": "no",
    "retry": False,
    "retry_after": 0,
    "mechs": [MECHANISM],
}


@pytest.mark.parametrize("payload", NO_MAP.values(), ids=NO_MAP)
@pytest.mark.parametrize(
    ("type", "state"), [(AUTH_REQUEST, State.AWAIT_REQUEST), (AUTH_RESPONSE, State.AWAIT_PROOF)]
)
def test_a_request_that_is_no_map_is_a_bad_request(type: int, state: State, payload: bytes) -> None:
    assert bad_request(server_in(state), type, payload) == "bad_request"


@pytest.mark.parametrize("payload", NO_MAP.values(), ids=NO_MAP)
@pytest.mark.parametrize(
    ("type", "state"),
    [
        (AUTH_CHALLENGE, State.AWAIT_CHALLENGE),
        (AUTH_SUCCESS, State.AWAIT_SUCCESS),
        (AUTH_FAILURE, State.AWAIT_CHALLENGE),
    ],
)
def test_an_answer_that_is_no_map_ends_the_login(type: int, state: State, payload: bytes) -> None:
    given_up(client_in(state), type, payload)


@pytest.mark.parametrize("key", ["mech", "scram", "agent"])
@pytest.mark.parametrize("wrong", NOT_TEXT)
def test_text_of_the_request_must_be_text(key: str, wrong: Any) -> None:
    payload = pack(with_key(REQUEST, key, wrong))
    assert bad_request(server_in(State.AWAIT_REQUEST), AUTH_REQUEST, payload) == "bad_request"


@pytest.mark.parametrize("wrong", [LEAVE_OUT, None, True, 1.0, "1", b"\x01", [1], {}, 2])
def test_v_must_be_the_number_1(wrong: Any) -> None:
    payload = pack(with_key(REQUEST, "v", wrong))
    code = bad_request(server_in(State.AWAIT_REQUEST), AUTH_REQUEST, payload)
    assert code in ("unsupported_version", "bad_request")


def test_v_that_is_nested_deeply_is_refused() -> None:
    deep = b"\x91" * 1000 + b"\xc0"
    rest = pack({key: value for key, value in REQUEST.items() if key != "v"})
    payload = bytes([rest[0] + 1]) + b"\xa1v" + deep + rest[1:]
    code = bad_request(server_in(State.AWAIT_REQUEST), AUTH_REQUEST, payload)
    assert code in ("unsupported_version", "bad_request")


@pytest.mark.parametrize("wrong", [value for value in WRONG if not isinstance(value, dict)])
def test_caps_of_the_request_must_be_a_map(wrong: Any) -> None:
    payload = pack(with_key(REQUEST, "caps", wrong))
    assert bad_request(server_in(State.AWAIT_REQUEST), AUTH_REQUEST, payload) == "bad_request"


NO_NUMBER: list[Any] = [None, True, 1.0, "1", b"", [], {}, -1, 2**32]
NO_NAMES: list[Any] = [None, True, 1, "zlib", b"zlib", {}, [1], ["zlib", None]]
NO_WINDOW: list[Any] = [
    None,
    1,
    "1",
    {},
    [],
    [1],
    [1, 2, 3],
    ["1", 2],
    [1, None],
    [True, 1],
    [-1, 1],
]
WRONG_CAPS: list[tuple[str, Any]] = [
    *((key, value) for key in ("frame_max", "calls", "ttl") for value in NO_NUMBER),
    *(("feat", value) for value in NO_NAMES),
    *(("window", value) for value in NO_WINDOW),
]


@pytest.mark.parametrize(("key", "value"), WRONG_CAPS)
def test_wrong_capabilities_are_refused_by_both_sides(key: str, value: Any) -> None:
    caps = {**REQUEST["caps"], key: value}
    payload = pack({**REQUEST, "caps": caps})
    assert bad_request(server_in(State.AWAIT_REQUEST), AUTH_REQUEST, payload) == "bad_request"
    success = pack(anonymous_success(caps=pack(caps)))
    given_up(make_anonymous_client(), AUTH_SUCCESS, success)


def test_a_side_may_serve_no_calls() -> None:
    """A minimal client need not serve any (section 14), and says so."""
    server = server_in(State.AWAIT_REQUEST)
    payload = pack({**REQUEST, "caps": {"calls": 0}})
    assert feed(server, frame(AUTH_REQUEST, id=1, payload=payload)) == [VerifierNeeded("default")]
    assert server.peer.capabilities.calls == 0


def anonymous_success(**changes: Any) -> dict[str, Any]:
    success = payload_of(Pair(**ANONYMOUS_PAIR).run().server, AUTH_SUCCESS)
    return {**success, **changes}


def make_anonymous_client() -> CNDT:
    client = make_client(user=None)
    written(client)
    return client


@pytest.mark.parametrize("wrong", NOT_TEXT)
def test_text_of_the_response_must_be_text(wrong: Any) -> None:
    payload = pack(with_key({"scram": ""}, "scram", wrong))
    assert bad_request(server_in(State.AWAIT_PROOF), AUTH_RESPONSE, payload) == "bad_request"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *(("scram", value) for value in WRONG_OR_GONE),
        *(("caps", value) for value in WRONG_OR_GONE),
        *(("caps", payload) for payload in NO_MAP.values()),
    ],
)
def test_a_malformed_challenge_ends_the_login(key: str, wrong: Any) -> None:
    given_up(
        client_in(State.AWAIT_CHALLENGE), AUTH_CHALLENGE, pack(with_key(CHALLENGE, key, wrong))
    )


@pytest.mark.parametrize("caps", [*NO_MAP.values(), pack({"calls": "many"}), pack({"feat": 1})])
def test_capabilities_that_cannot_be_read_end_the_login(caps: bytes) -> None:
    """Also when `d` says that nobody changed them on the way."""
    digest = transcript_digest(1, login_frames().request[HEADER.size :], caps)
    scram = re.sub("d=.*", "d=" + digest, CHALLENGE["scram"])
    challenge = pack({"scram": scram, "caps": caps})
    error = given_up(client_in(State.AWAIT_CHALLENGE), AUTH_CHALLENGE, challenge)
    assert isinstance(error, ProtocolError)


NO_HEARTBEAT: list[Any] = [[1, 2, 3], [1, "2"], [True, 2], [2.0, 3.0], [-1, 5], [5, 4]]
NO_ID: list[Any] = [None, 1, "text", [], {}]
WRONG_SUCCESS: list[tuple[str, Any]] = [
    *(("scram", value) for value in WRONG_OR_GONE),
    *(("identity", value) for value in NOT_TEXT),
    *(("hb", value) for value in WRONG_OR_GONE),
    *(("hb", value) for value in NO_HEARTBEAT),
    *(("session", value) for value in WRONG_OR_GONE),
    *(("session", {**SUCCESS["session"], "id": value}) for value in NO_ID),
]


@pytest.mark.parametrize(("key", "wrong"), WRONG_SUCCESS)
def test_a_malformed_success_ends_the_login(key: str, wrong: Any) -> None:
    payload = pack(with_key(SUCCESS, key, wrong))
    given_up(client_in(State.AWAIT_SUCCESS), AUTH_SUCCESS, payload)


@pytest.mark.parametrize(
    "changes",
    [
        {"session": {**SUCCESS["session"], "epoch": 1}},
        {"server": ["conduit-server", "1.0.0"]},
        {"server": {"name": 1, "version": "1.0.0"}},
        {"server": {"name": "conduit-server", "version": None}},
    ],
    ids=["epoch", "server", "name", "version"],
)
def test_what_a_server_says_of_itself_has_the_types_of_the_page(changes: dict[str, Any]) -> None:
    client = client_in(State.AWAIT_SUCCESS)
    given_up(client, AUTH_SUCCESS, pack({**SUCCESS, **changes}))


@pytest.mark.parametrize("key", ["name", "version"])
def test_a_server_name_that_is_nested_deeply_breaks_nothing(key: str) -> None:
    rest = pack({name: value for name, value in SUCCESS.items() if name != "server"})
    deep = b"\x81" + pack(key) + b"\x91" * 1000 + b"\xc0"
    payload = bytes([rest[0] + 1]) + pack("server") + deep + rest[1:]
    client = client_in(State.AWAIT_SUCCESS)
    (event,) = feed(client, frame(AUTH_SUCCESS, id=1, payload=payload))
    assert isinstance(event, (Opened, Broken))


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *(("code", value) for value in NOT_TEXT),
        *(("message", value) for value in NOT_TEXT),
    ],
)
def test_a_malformed_failure_ends_the_login_like_others(key: str, wrong: Any) -> None:
    payload = pack(with_key(FAILURE, key, wrong))
    assert isinstance(
        given_up(client_in(State.AWAIT_CHALLENGE), AUTH_FAILURE, payload), ProtocolError
    )


@pytest.mark.parametrize("after", WRONG_OR_GONE)
def test_a_wrong_time_to_wait_does_not_hide_that_the_server_is_busy(after: Any) -> None:
    failure = with_key({**FAILURE, "code": "busy", "retry": True}, "retry_after", after)
    (event,) = feed(
        client_in(State.AWAIT_CHALLENGE), frame(AUTH_FAILURE, id=1, payload=pack(failure))
    )
    assert isinstance(event, Broken)
    assert isinstance(event.error, Unavailable)
    assert event.error.retryable
    wait = event.error.retry_after
    assert wait is None or isinstance(wait, float)


@settings(max_examples=80)
@given(
    changes=st.dictionaries(
        st.sampled_from(["v", "mech", "scram", "caps", "session", "agent", "other"]),
        ANYTHING,
        max_size=3,
    ),
    missing=st.sets(st.sampled_from(sorted(REQUEST)), max_size=2),
)
def test_any_request_is_accepted_or_refused(changes: dict[str, Any], missing: set[str]) -> None:
    request = {key: value for key, value in REQUEST.items() if key not in missing}
    server = server_in(State.AWAIT_REQUEST)
    payload = pack({**request, **changes})
    (event,) = feed(server, frame(AUTH_REQUEST, id=1, payload=payload))
    codes = ("bad_request", "unsupported_version", "unsupported_mechanism")
    check_server(server, event, codes)


@settings(max_examples=50)
@given(ANYTHING, ANYTHING)
def test_any_response_is_accepted_or_refused(scram: Any, other: Any) -> None:
    server = server_in(State.AWAIT_PROOF)
    payload = pack({"scram": scram, "other": other})
    (event,) = feed(server, frame(AUTH_RESPONSE, id=1, payload=payload))
    check_server(server, event, ("bad_request",))


def check_server(server: CNDT, event: Event, codes: tuple[str, ...]) -> None:
    if isinstance(event, VerifierNeeded):
        assert server.state is State.AWAIT_VERIFIER
        return
    assert isinstance(event, Broken)
    (raw,) = frames_of(written(server))
    assert (raw[5], HEADER.unpack_from(raw)[4] <= 4096) == (AUTH_FAILURE, True)
    assert unpack(raw[HEADER.size :])["code"] in codes
    assert server.state is State.CLOSED


ANSWERS: list[tuple[int, State, dict[str, Any]]] = [
    (AUTH_CHALLENGE, State.AWAIT_CHALLENGE, CHALLENGE),
    (AUTH_SUCCESS, State.AWAIT_SUCCESS, SUCCESS),
    (AUTH_FAILURE, State.AWAIT_SUCCESS, FAILURE),
]


@pytest.mark.parametrize(("type", "state", "value"), ANSWERS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_answer_is_accepted_or_ends_the_login(
    type: int, state: State, value: dict[str, Any], data: st.DataObject
) -> None:
    keys = st.sampled_from([*sorted(value), "other"])
    changes = data.draw(st.dictionaries(keys, ANYTHING, max_size=3))
    missing = data.draw(st.sets(keys, max_size=2))
    changed = {key: old for key, old in value.items() if key not in missing} | changes
    client = client_in(state)
    (event,) = feed(client, frame(type, id=1, payload=pack(changed)))
    if isinstance(event, Broken):
        assert client.state is State.CLOSED
        assert written(client) == b""
    else:
        assert isinstance(event, (KeysNeeded, Opened))


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(SUCCESS) + ["caps", "other"]), ANYTHING, max_size=3))
def test_any_success_without_a_password_opens_or_ends_the_login(changes: dict[str, Any]) -> None:
    client = make_anonymous_client()
    payload = pack({**SUCCESS, "caps": pack({}), **changes})
    (event,) = feed(client, frame(AUTH_SUCCESS, id=1, payload=payload))
    assert isinstance(event, (Opened, Broken))
    assert written(client) == b""


@pytest.mark.parametrize(("type", "state"), [(AUTH_REQUEST, LOGIN_STATES[0])])
@pytest.mark.parametrize("id", [0, 2, 2**64 - 1])
def test_auth_frames_have_id_1(type: int, state: State, id: int) -> None:
    request = login_frames().request
    server = server_in(state)
    (event,) = feed(server, frame(type, id=id, payload=request[HEADER.size :]))
    assert isinstance(event, Broken)
    assert isinstance(event.error, ProtocolError)
    assert unpack(written(server)[HEADER.size :])[0] == 1002
    client = client_in(State.AWAIT_CHALLENGE)
    challenge = login_frames().challenge
    feed(client, frame(AUTH_CHALLENGE, id=id, payload=challenge[HEADER.size :]))
    assert client.state is State.CLOSED
    assert written(client) == b""


@pytest.mark.parametrize("state", LOGIN_STATES)
def test_nothing_else_is_said_before_the_login_is_done(state: State) -> None:
    """Frames behind a login frame that is not answered yet are not kept for later."""
    for raw in (frame(PING), frame(MESSAGE, SEQUENCED, 0, b"", 1), frame(200)):
        server = server_in(state)
        (event,) = feed(server, raw)
        assert isinstance(event, Broken)
    server = make_server()
    events = feed(server, login_frames().request + login_frames().response)
    assert [type(event) for event in events] == [VerifierNeeded, Broken]


# Heartbeat


@pytest.mark.parametrize(
    "heartbeat", [(30.0, 90.0), (0.001, 0.002), (0.5, 1.5), (86_400.0, 100_000.0)]
)
def test_the_heartbeat_of_the_server_holds_for_both(heartbeat: tuple[float, float]) -> None:
    def on_welcome(server: CNDT) -> None:
        server.session = Session(SESSION_ID, EPOCH)
        server.welcome(heartbeat=heartbeat, name="x", version="1")

    pair = Pair(on_welcome=on_welcome).log_in()
    assert pair.client.peer.peer.heartbeat == pair.server.peer.peer.heartbeat == heartbeat


@pytest.mark.parametrize("milliseconds", [[0, 0], [0, 90_000]])
def test_a_heartbeat_of_0_is_none(milliseconds: list[int]) -> None:
    """Section 11: an interval of 0 means no heartbeat."""
    client = client_in(State.AWAIT_SUCCESS)
    payload = pack({**SUCCESS, "hb": milliseconds})
    (event,) = feed(client, frame(AUTH_SUCCESS, id=1, payload=payload))
    assert isinstance(event, Opened)


# Capabilities


@given(
    st.builds(
        Capabilities,
        st.integers(1, 2**32 - 1),
        st.frozensets(st.sampled_from(["zlib", "resume"])),
        st.integers(1, 2**32 - 1),
        st.tuples(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)),
        st.integers(0, 2**32 - 1),
    )
)
def test_capabilities_survive_the_wire(capabilities: Capabilities) -> None:
    assert Capabilities.from_map(unpack(pack(capabilities.to_map()))) == capabilities


def test_what_most_peers_claim_is_kept_once_and_what_nobody_knows_never() -> None:
    """A server keeps it for each connection, and a peer may name what it likes."""
    usual = Capabilities(features=frozenset({"zlib"})).to_map()
    odd = {**usual, "feat": ["zlib", *map(str, range(1000))]}
    first = Capabilities.from_map(unpack(pack(usual)))
    assert first.features == {"zlib"}
    assert Capabilities.from_map(unpack(pack(usual))) is first
    assert Capabilities.from_map(unpack(pack(odd))) is first


def test_welcome_sets_what_the_client_is_told() -> None:
    server = server_in(State.AWAIT_WELCOME)
    welcome(server)
    assert server.state is State.OPEN
    assert unpack(written(server)[HEADER.size :]) == SUCCESS
