"""SCRAM in both roles, message by message.

A message is accepted or raises AuthenticationError. Nobody comes in without the proof, and nobody
is believed without the signature: what is accepted is, to the letter, what the true peer says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from conduit.exceptions import AuthenticationError
from conduit.protocol.scram import (
    MECHANISM,
    MECHANISM_PLUS,
    ClientScram,
    ServerScram,
    Verifier,
    derive_keys,
)
from fuzz.source import Source
from tests.golden_frames import (
    CLIENT_NONCE,
    DIGEST,
    ITERATIONS,
    PASSWORD,
    SALT,
    SERVER_NONCE,
    USER,
    VERIFIER,
)

BINDING: Final = bytes(range(32))
KNOWN: Final = Verifier.parse(VERIFIER)
KEYS: Final = derive_keys(PASSWORD, KNOWN.salt, ITERATIONS)
NAMES: Final = "nrsicpvdemaxA"
PARTS: Final = (
    USER,
    CLIENT_NONCE,
    CLIENT_NONCE + SERVER_NONCE,
    SALT,
    DIGEST,
    "biws",
    "eSws",
    "4096",
    "a=2Cb=3D",
    "=",
    "p=tls-server-end-point",
    "é",
    "e\u0301" * 40,
)
HEADERS: Final = ("n,,", "y,,", "p=tls-server-end-point,,", "p=x,,", "n,a=b,", "n", "")


def run(data: bytes) -> None:
    source = Source(data)
    role, binding = source.below(2), BINDING if source.below(2) else None
    (_server if role else _client)(source, binding)


def _server(source: Source, binding: bytes | None) -> None:
    server = ServerScram(
        SERVER_NONCE, binding=binding, mock_secret=bytes(16), mock_iterations=ITERATIONS
    )
    client = ClientScram(USER, CLIENT_NONCE, binding=binding, min_iterations=1)
    first = client.first()
    mechanism = source.choose((client.mechanism, client.mechanism, MECHANISM, MECHANISM_PLUS, "x"))
    told = _changed(source, first, source.choose(HEADERS))
    try:
        user = server.start(mechanism, told)
    except AuthenticationError as exc:
        _check(exc)
        return
    assert 1 <= len(user.encode()) <= 128
    digest = DIGEST if source.below(2) else None
    challenge = server.challenge(KNOWN if user == USER else None, digest)
    client.challenge(challenge, digest) if told == first else None
    proof = (
        client.final(KEYS)
        if told == first
        else f"c=biws,r={CLIENT_NONCE}{SERVER_NONCE},p=" + DIGEST
    )
    answer = _changed(source, proof)
    try:
        signature = server.final(answer)
    except AuthenticationError as exc:
        _check(exc)
        assert told != first or answer != proof or mechanism != client.mechanism
        return
    assert (told, answer) == (first, proof), "somebody came in without the proof"
    client.verify(signature)


def _client(source: Source, binding: bytes | None) -> None:
    server = ServerScram(SERVER_NONCE, binding=binding, mock_secret=bytes(16))
    client = ClientScram(USER, CLIENT_NONCE, binding=binding, can_bind=True, min_iterations=1)
    digest = DIGEST if source.below(2) else None
    first = client.first()
    if binding is not None:
        assert server.start(client.mechanism, first) == USER
        true = server.challenge(KNOWN, digest)
    else:
        true = f"r={CLIENT_NONCE}{SERVER_NONCE},s={SALT},i={ITERATIONS}"
        true += f",d={digest}" if digest else ""
    told = _changed(source, true)
    try:
        client.challenge(told, digest)
    except AuthenticationError as exc:
        _check(exc)
        assert told != true
        return
    assert 12 <= len(client.salt) <= 64
    assert 1 <= client.iterations <= 2_000_000
    proof = client.final(KEYS)
    signature = f"v={DIGEST}"
    if binding is not None and told == true:
        signature = server.final(proof)
    answer = _changed(source, signature)
    try:
        client.verify(answer)
    except AuthenticationError as exc:
        _check(exc)
        assert told != true or binding is None or answer != signature
        return
    assert binding is not None and (told, answer) == (true, signature), "a false server is believed"


def _changed(source: Source, right: str, header: str = "") -> str:
    """Return a message: the right one, or one with a stretch replaced, or a made up one."""
    kind = source.below(6)
    if kind < 3:
        return right
    if kind == 3:
        pairs = (f"{source.choose(NAMES)}={_part(source)}" for _ in range(source.below(7)))
        return header + ",".join(pairs)
    if kind == 4:
        start = source.below(len(right) + 1)
        return right[:start] + _part(source) + right[start + source.below(40) :]
    return _part(source)


def _part(source: Source) -> str:
    if source.below(4):
        return source.choose(PARTS)
    return source.short().decode("utf-8", source.choose(("replace", "surrogateescape")))


def _check(exc: AuthenticationError) -> None:
    assert str(exc).isascii()
    assert len(str(exc)) < 500
    assert exc.code


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for role in range(2):
        for bound in range(2):
            for kinds in range(36):
                yield bytes((role, bound, 0, kinds % 6, 1, kinds // 6, 1, 2, 3, 4)) + bytes(
                    range(40)
                )
                yield bytes((role, bound, 0, 0, 0, 1, kinds % 6, kinds, 1, 9, 1, 3, 0, 0))
