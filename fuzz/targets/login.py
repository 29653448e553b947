"""The login frames of both roles: true ones with some of their fields changed, and any others.

A frame is accepted, or the login ends as the specification says. The server lets nobody in whose
frames were changed, and the client believes no server whose frames were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from msgpack import packb, unpackb

from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Broken,
    Closed,
    Event,
    KeysNeeded,
    Opened,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import HEADER_SIZE, FrameType
from conduit.protocol.session import EPOCH_BYTES, ID_BYTES, Session
from fuzz.source import Source
from tests.golden_frames import GOLDEN, PASSWORD, USER
from tests.protocol.pair import (
    EPOCH,
    SESSION_ID,
    Login,
    client_in,
    feed,
    frames_of,
    login_frames,
    make_client,
    make_server,
    server_in,
    verifier_of,
    written,
)
from tests.wire_client import frame

TRUE: Final[Login] = login_frames()
ROLES: Final = (
    ("server", State.AWAIT_REQUEST, FrameType.AUTH_REQUEST, TRUE.request),
    ("server", State.AWAIT_PROOF, FrameType.AUTH_RESPONSE, TRUE.response),
    ("client", State.AWAIT_CHALLENGE, FrameType.AUTH_CHALLENGE, TRUE.challenge),
    ("client", State.AWAIT_SUCCESS, FrameType.AUTH_SUCCESS, TRUE.success),
    ("client", State.AWAIT_SUCCESS, FrameType.AUTH_FAILURE, GOLDEN["auth_failure"].raw),
    ("anonymous server", State.AWAIT_REQUEST, FrameType.AUTH_REQUEST, TRUE.request),
    ("anonymous client", State.AWAIT_SUCCESS, FrameType.AUTH_SUCCESS, TRUE.success),
    ("anonymous server", State.AWAIT_REQUEST, FrameType.AUTH_REQUEST, GOLDEN["resume_request"].raw),
    ("returning client", State.AWAIT_SUCCESS, FrameType.AUTH_SUCCESS, GOLDEN["resume_success"].raw),
)
CODES: Final = (
    "bad_request",
    "unsupported_version",
    "unsupported_mechanism",
    "invalid_credentials",
)


def run(data: bytes) -> None:
    source = Source(data)
    role, state, type, true = source.choose(ROLES)
    right = true[HEADER_SIZE:]
    payload = _payload(source, right)
    if len(payload) > 4096:
        return
    peer = _peer(role, state)
    events = feed(peer, frame(type, id=1, payload=payload), source.cut)
    assert len(events) == 1
    if role.endswith("server"):
        _check_server(peer, events[0], payload == right)
    else:
        _check_client(peer, events[0], returns=role == "returning client")
    if type == FrameType.AUTH_REQUEST and role == "server" and peer.state is State.AWAIT_VERIFIER:
        _go_on(peer, events[0], payload == right)


def _peer(role: str, state: State) -> CNDT:
    if role == "anonymous server":
        return make_server(anonymous=True)
    if role in ("anonymous client", "returning client"):
        session = Session(SESSION_ID, EPOCH) if role == "returning client" else None
        client = make_client(user=None, session=session)
        written(client)
        return client
    return (server_in if role == "server" else client_in)(state)


def _payload(source: Source, right: bytes) -> bytes:
    kind = source.below(4)
    if kind == 0:
        return source.changed(right)
    if kind == 1:
        return source.packed()
    fields = unpackb(right)
    for _ in range(source.below(4)):
        _change(source, fields)
    changed: bytes = packb(fields)
    return changed


def _change(source: Source, fields: dict[str, Any]) -> None:
    key = source.choose((*fields, "other")) if source.below(8) else source.choose(("caps", "mechs"))
    old = fields.get(key)
    kind = source.below(6)
    if kind == 0:
        fields.pop(key, None)
    elif kind == 1 and isinstance(old, dict) and old:
        _change(source, old)
    elif kind == 2 and isinstance(old, str):
        start = source.below(len(old) + 1)
        put = source.text().encode("utf-8", "replace").decode()
        fields[key] = old[:start] + put + old[start + source.below(32) :]
    elif kind == 3 and isinstance(old, bytes) and key == "caps":
        try:
            inner = unpackb(old)
        except ValueError:  # it was changed already
            return
        if isinstance(inner, dict):
            _change(source, inner)
        fields[key] = source.changed(packb(inner))
    elif kind == 4:
        fields[key] = packb(source.value()) if source.below(2) else source.short()
    else:
        fields[key] = source.value()


def _check_server(server: CNDT, event: Event, unchanged: bool) -> None:
    if isinstance(event, (VerifierNeeded, WelcomeNeeded, ResumeWanted)):
        assert isinstance(event, VerifierNeeded) or event.identity in (USER, "anonymous")
        if isinstance(event, ResumeWanted):
            assert (len(event.id), len(event.epoch)) == (ID_BYTES, EPOCH_BYTES)
            assert 0 <= event.accepted < 2**64
        return
    assert isinstance(event, Broken)
    assert server.state is State.CLOSED
    (raw,) = frames_of(written(server))
    failure = unpackb(raw[HEADER_SIZE:])
    assert raw[5] == FrameType.AUTH_FAILURE
    assert len(raw) <= HEADER_SIZE + 4096
    assert failure["code"] in CODES
    assert not unchanged or failure["code"] == "unsupported_mechanism"


def _go_on(server: CNDT, event: Event, unchanged: bool) -> None:
    """Bring the true proof to a server whose request was changed."""
    assert isinstance(event, VerifierNeeded)
    server.verifier_found(verifier_of(PASSWORD) if event.user == USER else None)
    (raw,) = frames_of(written(server))
    assert len(raw) <= HEADER_SIZE + 4096
    (answer,) = feed(server, TRUE.response)
    assert isinstance(answer, WelcomeNeeded) == unchanged, "a changed request has logged in"


def _check_client(client: CNDT, event: Event, *, returns: bool) -> None:
    assert isinstance(event, (KeysNeeded, Opened, Broken, Closed, Resumed))
    if isinstance(event, Resumed):
        assert returns, "a session goes on that was not asked for"
        assert 0 <= event.accepted < 2**64 and not event.rest
        assert client.state is State.CLOSED
    if isinstance(event, Opened):
        interval, timeout = event.peer.heartbeat
        assert 0 < interval <= timeout
    if isinstance(event, (Broken, Closed)):
        assert client.state is State.CLOSED
    assert written(client) == b""


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for role in range(len(ROLES)):
        yield bytes((role,))
        for key in range(6):
            for kind in range(6):
                yield bytes((role, 2, 1, key, 1, kind, kind, key)) + bytes(range(24))
        yield bytes((role, 1)) + bytes(range(7, 60))
