"""Frames for people: one line each, from any bytes, and never a secret."""

from __future__ import annotations

import hashlib
import re
import zlib
from base64 import b64decode
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conduit.protocol.describe import FrameCutter, describe
from conduit.protocol.frames import FrameType
from tests.golden_frames import GOLDEN, SALT, SERVER_KEY, STORED_KEY
from tests.protocol.pair import Pair, Split, byte_by_byte, frames_of, pieces_of, whole
from tests.wire_client import (
    AUTH_CHALLENGE,
    AUTH_REQUEST,
    AUTH_RESPONSE,
    AUTH_SUCCESS,
    COMPRESSED,
    HEADER,
    MESSAGE,
    PRIORITY,
    RPC_REQUEST,
    SEQUENCED,
    b64,
    frame,
    pack,
)

AUTH = {type for type in FrameType if type.name.startswith("AUTH_")}
# What somebody who reads a log must not see. With salt and proof passwords can be tried.
PROOF = "XMDxqJWkTUW/pJiGww92rbJVo1WP5wJaFQTcB+0PN6g="
SIGNATURE = "ejEW4L2FE2J858mw5DGCYE+zff4tJUnTaQ5TqhV2274="
SECRETS = [PROOF, SIGNATURE, SALT, STORED_KEY, SERVER_KEY]


def assert_no_secret(text: str, secrets: list[str]) -> None:
    """Look for each secret as it stands, as bytes and in hex, and for a good part of it."""
    for secret in secrets:
        raw = b64decode(secret)
        for form in (secret, secret[:12], secret[-12:], raw.hex()[:16], secret.encode().hex()[:24]):
            assert form not in text


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames_give_one_readable_line(name: str) -> None:
    golden = GOLDEN[name]
    line, dump = describe(golden.raw)
    assert line.isprintable()
    assert line.startswith(FrameType(golden.type).name)
    assert f" id={golden.id} " in line
    assert (f" seq={golden.seq} " in line) == bool(golden.flags & SEQUENCED)
    assert f"[32+{len(golden.raw) - 32} bytes]" in line
    for flag, text in {1: "COMPRESSED", 2: "SEQUENCED", 8: "PRIORITY", 16: "REPLY"}.items():
        assert (f" {text}" in line) == bool(golden.flags & flag)
    if golden.type in AUTH:
        assert dump.startswith(golden.raw[: HEADER.size].hex())
        assert golden.raw[HEADER.size :].hex()[:16] not in dump
    else:
        assert dump == golden.hex
        if golden.value is not None and len(golden.raw) < 500 and not golden.flags & COMPRESSED:
            assert line.endswith(repr(golden.value))


@pytest.mark.parametrize("name", [name for name in GOLDEN if GOLDEN[name].type in AUTH])
def test_golden_frames_of_the_login_show_no_secret(name: str) -> None:
    line, dump = describe(GOLDEN[name].raw)
    assert_no_secret(line + dump, SECRETS)
    assert "default" in line or name not in ("auth_request", "auth_success")  # but it is readable


@pytest.mark.parametrize("name", ["auth_request", "auth_challenge"])
def test_capabilities_are_readable(name: str) -> None:
    """The server packs them twice, so that they can be hashed as they are."""
    assert "'caps': {" in describe(GOLDEN[name].raw)[0]
    assert "'frame_max': 1048576" in describe(GOLDEN[name].raw)[0]


@pytest.mark.parametrize("caps", [b"", b"\xc1", b"\x91" * 300, pack({1: 2}), b"s=" + SALT.encode()])
def test_capabilities_that_cannot_be_read_are_described(caps: bytes) -> None:
    line, _ = describe(frame(AUTH_CHALLENGE, id=1, payload=pack({"scram": "x", "caps": caps})))
    assert line.startswith("AUTH_CHALLENGE id=1 [")
    assert line.isprintable()
    assert_no_secret(line, SECRETS)


def test_golden_compressed_frame_is_inflated_and_cut() -> None:
    line, _ = describe(GOLDEN["compressed"].raw)
    assert "['log', 'aaa" in line
    assert line.endswith("... (2011 characters)")


@pytest.mark.parametrize("binding", [None, b"\xa5" * 32])
def test_a_login_shows_no_secret(binding: bytes | None) -> None:
    pair = Pair(client={"binding": binding}, server={"binding": binding}).run()
    frames = frames_of(pair.client.wrote) + frames_of(pair.server.wrote)
    text = "\n".join(part for raw in frames for part in describe(raw))
    secrets = [
        value
        for raw in frames
        for value in re.findall(r"[psv]=([A-Za-z0-9+/]{20,}=*)", str(msgpack.unpackb(raw[32:])))
    ]
    assert len(secrets) == 3  # salt, proof, signature
    assert_no_secret(text, secrets)
    assert text.count("=***") >= 3


@given(
    secret=st.binary(max_size=8).map(lambda seed: hashlib.sha512(seed).digest()),
    size=st.integers(12, 64),
    type=st.sampled_from([AUTH_REQUEST, AUTH_CHALLENGE, AUTH_RESPONSE, AUTH_SUCCESS]),
    attribute=st.sampled_from("psv"),
    before=st.sampled_from(["", "r=x,", "c=biws,r=abc,", ",,"]),
    after=st.sampled_from(["", ",i=4096", ",d=x", "x" * 600]),
    cut=st.integers(0, 60),
)
def test_no_secret_in_any_login_frame(
    secret: bytes, size: int, type: int, attribute: str, before: str, after: str, cut: int
) -> None:
    """Whole, cut, damaged, compressed or in a type where it does not belong."""
    text = b64(secret[:size])
    scram = f"{before}{attribute}={text}" + (after if after.startswith(",") else "")
    shapes: list[Any] = [
        {"scram": scram},
        {"scram": scram.encode()},
        {"pad": after, "scram": scram},
        [scram],
        {"a": {"b": [scram]}},
    ]
    for shape in shapes:
        payload = pack(shape)
        for broken in (payload, payload[:-1], payload + b"\0", payload[cut:], b"\xc1" + payload):
            line, dump = describe(frame(type, id=1, payload=broken))
            assert_no_secret(line + dump, [text])
            assert line.isprintable()
        line, dump = describe(frame(type, COMPRESSED, 1, zlib.compress(payload)))
        assert_no_secret(line + dump, [text])


# Any frame


@given(
    type=st.integers(0, 255),
    flags=st.integers(0, 2**16 - 1),
    id=st.integers(0, 2**64 - 1),
    payload=st.binary(max_size=300) | st.text(max_size=100).map(pack),
    seq=st.integers(0, 2**32 - 1),
    version=st.integers(0, 255),
)
def test_any_frame_gives_one_line(
    type: int, flags: int, id: int, payload: bytes, seq: int, version: int
) -> None:
    line, dump = describe(frame(type, flags, id, payload, seq, version))
    assert line.isprintable()
    assert dump.isprintable()
    assert f"id={id}" in line


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", None),
        (b"\xc1", "MessagePack"),
        (b"\xc0\xc0", "extra data"),
        (pack({1: 2}), "{'1': 2}"),
        (b"\x81\x90\xc0", "keys of maps must be text or numbers"),
        (pack("line\nbreak\r\x1b[31m\u2028"), r"line\nbreak\r\x1b[31m\u2028"),
    ],
)
def test_payloads_that_are_odd(payload: bytes, text: str | None) -> None:
    line, _ = describe(frame(MESSAGE, SEQUENCED, 0, payload, 1))
    assert line.isprintable()
    if text is None:
        assert line.endswith("[32+0 bytes]")
    else:
        assert text in line


@pytest.mark.parametrize(
    "packed", [b"x", zlib.compress(b"\xc0")[:-1], zlib.compress(b"\xc0") + b"x"]
)
def test_a_compressed_payload_that_is_damaged_is_described(packed: bytes) -> None:
    line, _ = describe(frame(MESSAGE, SEQUENCED | COMPRESSED, 0, packed, 1))
    assert "compressed payload" in line


def test_a_payload_that_is_nested_deeply_is_described() -> None:
    payload = b"\x91" * 1000 + b"\xc0"
    line, _ = describe(frame(MESSAGE, PRIORITY, 0, payload))
    assert line.startswith("MESSAGE PRIORITY id=0 [32+1001 bytes]")


def test_unknown_types_have_their_number() -> None:
    assert describe(frame(200, 0, 7))[0] == "type 200 id=7 [32+0 bytes]"


def test_a_bomb_is_not_inflated_for_the_log() -> None:
    """The peer refuses more than a mebibyte, and what is refused is logged all the same."""
    bomb = frame(MESSAGE, SEQUENCED | COMPRESSED, 0, zlib.compress(bytes(50_000_000)), 1)
    line, _ = describe(bomb)
    assert "exceeds the limit of 1048576 bytes" in line


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_lines_and_dumps_are_bounded(size: int) -> None:
    raw = frame(RPC_REQUEST, SEQUENCED, 1, pack(["name", {"data": "x" * size}]), 1)
    line, dump = describe(raw)
    assert len(line) < 700
    assert len(dump) < 700
    if size == 10:
        assert dump == raw.hex()
    else:
        assert dump.endswith(f"... ({len(raw)} bytes)")
        assert "characters)" in line


# Cutting


@pytest.mark.parametrize("split", [whole, byte_by_byte, pieces_of(31), pieces_of(100)])
def test_a_stream_is_cut_into_its_frames(split: Split) -> None:
    frames = [golden.raw for golden in GOLDEN.values()]
    cutter = FrameCutter()
    cut = [raw for piece in split(b"".join(frames)) for raw in cutter.cut(piece)]
    assert cut == frames
    assert cutter.cut(b"") == []


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"CNDX" * 20, b"CX", bytes(100)]
)
@pytest.mark.parametrize("split", [whole, byte_by_byte])
@pytest.mark.parametrize("before", [b"", GOLDEN["message"].raw])
def test_what_is_no_frame_is_shown_as_it_came(split: Split, garbage: bytes, before: bytes) -> None:
    cutter = FrameCutter()
    cut = [raw for piece in split(before + garbage) for raw in cutter.cut(piece)]
    assert b"".join(cut) == before + garbage
    for raw in cut[1 if before else 0 :]:
        line, dump = describe(raw)
        assert line == f"({len(raw)} bytes that are no frame)"
        assert dump == raw.hex()


@pytest.mark.parametrize("data", [b"", b"C", b"CNDT", b"CNDT\x01" + bytes(26)])
def test_what_may_become_a_frame_waits(data: bytes) -> None:
    cutter = FrameCutter()
    raw = GOLDEN["ping"].raw
    start = raw[: len(data)]
    assert cutter.cut(start) == []
    assert cutter.cut(raw[len(data) :]) == [raw]
    assert describe(data)[0] == f"({len(data)} bytes that are no frame)"
