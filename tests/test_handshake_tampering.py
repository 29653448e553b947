"""Nobody gets in with recorded frames, or with frames of which one bit was changed on the way.

What a login does not protect, by design, is said here as well, bit by bit: nothing else may be
changed unnoticed.

- The timestamp of a header is information only, and the high byte of its flags is for extensions
  that a receiver ignores.
- AUTH_SUCCESS beside its signature: name of the user, session, heartbeat, name of the server. They
  are said after the proofs, and are protected as much as all frames behind them: by TLS or not at
  all. The server is in by then, so it is the client alone who could notice.
"""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from msgpack import unpackb

from conduit.exceptions import AuthenticationError, ProtocolError
from conduit.protocol.cndt import State
from conduit.protocol.events import Broken, Closed
from tests.conftest import LONG
from tests.protocol.pair import Login, Pair, Side, frames_of
from tests.wire_client import AUTH_CHALLENGE, AUTH_REQUEST, AUTH_RESPONSE, AUTH_SUCCESS, HEADER

REPLAYS = 10_000 if LONG else 1_000
BINDING = bytes(range(32))
TYPES = {
    "request": AUTH_REQUEST,
    "challenge": AUTH_CHALLENGE,
    "response": AUTH_RESPONSE,
    "success": AUTH_SUCCESS,
}
SENDERS = {"request": "client", "challenge": "server", "response": "client", "success": "server"}
NOTICED_BY = {"request": "client", "challenge": "client", "response": "server", "success": "client"}
"""Who must notice a change: a changed request is answered, and the client sees by `d` what came."""
UNSIGNED = {*range(6 * 8, 7 * 8), *range(20 * 8, 28 * 8)}
"""Bits of a header, counted from its start, that mean nothing: high flags and timestamp."""
LENGTH = range(8 * 8, 12 * 8)
"""Bits of the payload's length. A receiver waits for the rest of a longer frame, until its login
times out."""


class Nonces(NamedTuple):
    """The nonces of a login."""

    client: str
    server: str


@functools.cache
def fresh(seed: int) -> Nonces:
    source = random.Random(seed)
    made = (base64.b64encode(source.randbytes(18)).decode() for _ in range(2))
    return Nonces(*made)


def new_pair(nonces: Nonces, change: dict[str, bytes], binding: bytes | None = None) -> Pair:
    """Return two peers that have not met; what `change` names is put in the place of a frame."""
    types = {TYPES[name]: frame for name, frame in change.items()}
    return Pair(
        client={"nonce": nonces.client, "binding": binding},
        server={"nonce": nonces.server, "binding": binding},
        change=lambda sender, data: types.get(data[5], data),
    )


@functools.cache
def record(nonces: Nonces, binding: bytes | None = None) -> Login:
    """Return the frames of a true login."""
    pair = new_pair(nonces, {}, binding).run()
    assert pair.client.peer.state is pair.server.peer.state is State.OPEN
    (request, response), (challenge, success) = map(
        frames_of, (pair.client.wrote, pair.server.wrote)
    )
    return Login(request, challenge, response, success)


def has_refused(side: Side) -> bool:
    """Whether a side has ended the login because of what came."""
    last = side.events[-1] if side.events else None
    if isinstance(last, Closed):  # one bit makes CLOSE of two of the frames
        return True
    return isinstance(last, Broken) and isinstance(last.error, (AuthenticationError, ProtocolError))


# Replays


@pytest.mark.long
@pytest.mark.parametrize("name", TYPES)
def test_a_recorded_frame_in_the_place_of_a_new_one_is_refused(name: str) -> None:
    """Somebody in between puts one frame of an old login into a new one."""
    for seed in range(REPLAYS // 4):
        old, nonces = record(fresh(-1 - seed % 50)), fresh(seed)
        pair = new_pair(nonces, {name: getattr(old, name)}).run()
        assert pair.client.peer.state is State.CLOSED
        assert has_refused(pair.client if NOTICED_BY[name] == "client" else pair.server)
        if name != "success":
            assert pair.server.peer.state is not State.OPEN


@pytest.mark.long
def test_all_frames_of_a_client_do_not_log_in_again() -> None:
    """Somebody who has listened says to the server all that the client has said."""
    for seed in range(REPLAYS // 4):
        old, nonces = record(fresh(-1 - seed % 50)), fresh(seed)
        pair = new_pair(nonces, {})
        for frame in (old.request, old.response):
            pair.arrive(pair.server, frame)
        pair.client.deaf = True
        pair.carry(pair.server)
        assert pair.server.peer.state is State.CLOSED
        assert has_refused(pair.server)
        failure = unpackb(frames_of(pair.server.wrote)[-1][HEADER.size :])
        assert failure["code"] == "invalid_credentials"


@pytest.mark.long
def test_all_frames_of_a_server_are_not_believed_again() -> None:
    """Somebody who has listened says to the client all that the server has said."""
    for seed in range(REPLAYS // 4):
        old, nonces = record(fresh(-1 - seed % 50)), fresh(seed)
        pair = new_pair(nonces, {})
        for frame in (old.challenge, old.success):
            pair.arrive(pair.client, frame)
        assert pair.client.peer.state is State.CLOSED
        assert has_refused(pair.client)


def test_the_same_nonce_of_the_client_does_not_help() -> None:
    """The server's own is enough, and so is the client's for the client."""
    for seed in range(REPLAYS // 10):
        client, server = fresh(seed), fresh(-1 - seed)
        old = record(client)
        pair = new_pair(Nonces(client.client, server.server), {"response": old.response}).run()
        assert has_refused(pair.server)
        pair = new_pair(Nonces(server.client, client.server), {"success": old.success}).run()
        assert has_refused(pair.client)


# Changed bits


def flipped(frame: bytes, bit: int) -> bytes:
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def signed_part(frame: bytes) -> range:
    """Return where the value of `scram` stands in AUTH_SUCCESS, with its key before it."""
    start = frame.index(b"\xa5scram")
    end = frame.index(b"\xa8identity")
    return range(8 * start, 8 * end)


def bits(frame: bytes) -> Iterator[int]:
    return iter(range(8 * len(frame)))


@pytest.mark.parametrize("binding", [None, BINDING], ids=["plain", "bound"])
@pytest.mark.parametrize("name", ["request", "challenge", "response"])
def test_every_changed_bit_of_a_proof_is_noticed(name: str, binding: bytes | None) -> None:
    nonces = fresh(0)
    frame: bytes = getattr(record(nonces, binding), name)
    unnoticed = set()
    for bit in bits(frame):
        pair = new_pair(nonces, {name: flipped(frame, bit)}, binding).run()
        if pair.client.peer.state is State.OPEN:
            assert pair.server.peer.state is State.OPEN
            unnoticed.add(bit)
            continue
        assert pair.server.peer.state is not State.OPEN
        receiver = pair.server if SENDERS[name] == "client" else pair.client
        waits = bit in LENGTH and receiver.peer.eof()
        noticed = pair.client if NOTICED_BY[name] == "client" else pair.server
        assert waits or has_refused(noticed) or has_refused(receiver)
    assert unnoticed == UNSIGNED


@pytest.mark.parametrize("binding", [None, BINDING], ids=["plain", "bound"])
def test_every_changed_bit_of_the_server_s_proof_is_noticed(binding: bytes | None) -> None:
    nonces = fresh(0)
    frame = record(nonces, binding).success
    signed = {*range(8 * HEADER.size), *signed_part(frame)} - UNSIGNED
    unnoticed = set()
    for bit in bits(frame):
        pair = new_pair(nonces, {"success": flipped(frame, bit)}, binding).run()
        if pair.client.peer.state is State.OPEN:
            unnoticed.add(bit)
            continue
        assert has_refused(pair.client) or (bit in LENGTH and pair.client.peer.eof())
    assert UNSIGNED <= unnoticed
    assert not unnoticed & signed


@pytest.mark.long
def test_changed_bits_of_many_logins_are_noticed() -> None:
    """Any bit of any frame, each time in a login with nonces of its own."""
    source = random.Random(1)
    for seed in range(REPLAYS):
        nonces = fresh(seed)
        name = source.choice(["request", "challenge", "response"])
        frame: bytes = getattr(record(nonces), name)
        bit = source.choice(sorted({*bits(frame)} - UNSIGNED))
        pair = new_pair(nonces, {name: flipped(frame, bit)}).run()
        assert pair.client.peer.state is not State.OPEN
        assert pair.server.peer.state is not State.OPEN
