"""Decoding, inflating and describing of payloads.

What `decode` returns must be what msgpack says and made of plain types; what it raises is what its
docstring names. The line for the log never raises, and never shows a secret.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any, Final

from msgpack import unpackb

from conduit.exceptions import InvalidParams, PayloadTooLarge, ProtocolError
from conduit.protocol.describe import FrameCutter, describe
from conduit.protocol.frames import HEADER, FrameType, Parted, Payload, word
from conduit.protocol.payload import (
    PLACEHOLDER,
    decode,
    inflate,
    large_bytes,
    read_credit,
)
from fuzz.source import Source
from tests.golden_frames import GOLDEN

REFUSED: Final = (ProtocolError, InvalidParams, PayloadTooLarge)
SIZES: Final = (0, 0, 0, 0, 257, 257, 4097, 64 * 1024)
"""Payloads of these sizes are read in different ways."""
PLAIN: Final = (type(None), bool, int, float, str, bytes)
LIMIT: Final = 64 * 1024


def run(data: bytes) -> None:
    source = Source(data)
    kind = source.below(8)
    if kind == 0:
        _inflate(source)
    elif kind == 1:
        _describe(source)
    elif kind == 2:
        _parted(source)
    else:
        size = source.choose(SIZES)
        payload = source.packed() if kind == 3 else source.rest()
        if size:
            filling = size - len(payload) - 6
            if filling > 0:
                payload = b"\x92\xc6" + filling.to_bytes(4, "big") + bytes(filling) + payload
        _decode(payload)
        _credit(payload)


def _decode(payload: bytes) -> None:
    begin, end = large_bytes(payload[: len(payload) // 2], len(payload), 64)
    assert 0 <= begin <= end <= len(payload)
    try:
        value = decode(payload)
    except REFUSED:
        return
    assert _same(value, decode(memoryview(payload)))
    try:
        value = decode(payload, text_keys=True)
    except InvalidParams:
        return  # keys that became text
    assert _same(value, unpackb(payload, strict_map_key=False))


def _same(one: Any, other: Any) -> bool:
    """Compare plain data; a number that is none is like itself, and 1 is not True."""
    left = [(one, other)]
    while left:
        one, other = left.pop()
        if type(one) is not type(other):
            return False
        if type(one) is list and len(one) == len(other):
            left += zip(one, other, strict=True)
        elif type(one) is dict and list(one) == list(other):
            left += zip(one.values(), other.values(), strict=True)
        elif type(one) is float and math.isnan(one):
            if not math.isnan(other):
                return False
        elif type(one) not in PLAIN or one != other:
            return False
    return True


def _credit(payload: bytes) -> None:
    try:
        items, size = read_credit(payload)
    except REFUSED:
        return
    assert items >= 0 <= size


def _parted(source: Source) -> None:
    """Decode a payload whose large `bytes` are apart: it must mean what it means in one piece."""
    head = source.choose((b"\x92", b"\x91", b"\x93", b"\x81")) + source.packed()
    large = b"\xc6\0\0\x01\x2c" + bytes(300)
    whole = source.changed(head + large) + source.rest()
    begin, end = large_bytes(whole, len(whole), 100)
    if len(whole) > 256 and begin:
        payload = Parted(whole[: begin - 5] + PLACEHOLDER + whole[end:], whole[begin:end])
        if len(payload) > 256:
            assert _same(_value(payload), _value(whole))


def _value(payload: Payload) -> Any:
    try:
        return decode(payload)
    except REFUSED as exc:
        return f"refused: {type(exc).__name__}"


def _inflate(source: Source) -> None:
    limit = source.number(2)
    packed = source.rest()
    if source.below(2):
        packed = zlib.compress(packed)
    try:
        assert len(inflate(packed, limit)) <= limit
    except ProtocolError:
        pass


def _describe(source: Source) -> None:
    type = source.choose(tuple(FrameType)) if source.below(4) else source.byte()
    flags = source.choose((2, 0, 3, 8, 0xFFFF))
    payload = source.packed() if source.below(2) else source.short()
    if flags & 1 and source.below(2):
        payload = zlib.compress(payload)
    size = source.number(4) if source.seldom() else len(payload)
    frame = HEADER.pack(word(type, flags), size, source.number(), 0, 0) + payload
    stream = source.changed(frame) + frame + source.short()
    cutter = FrameCutter()
    pieces = [piece for part in source.cut(stream) for piece in cutter.cut(part)]
    assert stream.startswith(b"".join(pieces))
    for piece in pieces:
        line, dump = describe(piece)
        assert len(line) < 1000 and len(dump) < 1000


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for golden in GOLDEN.values():
        for size in range(len(SIZES)):
            yield bytes((4, size)) + golden.raw[32:]
        yield bytes((0, 5)) + zlib.compress(golden.raw)
    for kind in range(4):
        yield bytes((kind,)) + bytes(range(60))
