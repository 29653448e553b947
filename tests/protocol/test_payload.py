"""MessagePack in and out: plain values survive, hostile bytes cost little and are refused."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import ipaddress
import math
import pathlib
import struct
import sys
import tracemalloc
import types
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conduit.exceptions import InvalidParams, PayloadTooLarge, ProtocolError
from conduit.protocol.frames import Parted
from conduit.protocol.payload import (
    LARGE,
    PLACEHOLDER,
    Encoder,
    decode,
    deflate,
    inflate,
    kept,
    large_bytes,
    read_credit,
)
from conduit.protocol.plain import plain
from tests.wire_client import pack

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.binary(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
SIZES = [1, 256, 257, 4096, 4097, LARGE - 1, LARGE, 3 * LARGE]
"""Payloads of these sizes are read in different ways."""


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fail if the block allocates more than `size` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= size


def padded(value: Any, size: int) -> bytes:
    """Pack a list of a value and so much text that the payload has `size` bytes, if it can."""
    head = b"\x92" + pack(value)
    return head + pack("x" * max(0, size - len(head) - 5))


# Values


@given(VALUES)
def test_plain_values_survive(value: Any) -> None:
    assert decode(Encoder().pack(value)) == value
    assert decode(memoryview(pack(value))) == value


@given(VALUES, st.sampled_from(SIZES))
def test_plain_values_survive_in_payloads_of_all_sizes(value: Any, size: int) -> None:
    payload = padded(value, size)
    assert decode(payload) == decode(memoryview(payload)) == msgpack.unpackb(payload)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_floats_that_are_no_numbers_survive(number: float) -> None:
    assert repr(decode(Encoder().pack(number))) == repr(number)


@pytest.mark.parametrize(
    ("payload", "value"),
    [
        (b"\xcf" + bytes(7) + b"\x07", 7),
        (b"\xd3" + b"\xff" * 8, -1),
        (b"\xca" + struct.pack(">f", 1.5), 1.5),
        (b"\xdb\0\0\0\x02hi", "hi"),
        (b"\xc6\0\0\0\x01\xff", b"\xff"),
        (b"\xdd\0\0\0\x01\xc0", [None]),
        (b"\xdf\0\0\0\x01\xa1k\xc2", {"k": False}),
    ],
)
def test_every_encoding_of_a_number_or_length_is_accepted(payload: bytes, value: Any) -> None:
    """A sender need not choose the shortest one, neither in a short payload nor in a long one."""
    assert decode(payload) == value
    for size in (300, 5000, LARGE):
        assert decode(b"\x92" + payload + pack("x" * size)) == [value, "x" * size]


@pytest.mark.parametrize("size", [8, 300, 5000])
def test_a_repeated_key_has_its_last_value(size: int) -> None:
    text = pack("x" * size)
    assert decode(b"\x83\xa1a\x01\xa1b" + text + b"\xa1a\x02") == {"a": 2, "b": "x" * size}


@pytest.mark.parametrize("size", [8, 300, 5000, LARGE])
def test_254_levels_are_accepted(size: int) -> None:
    value = decode(b"\x91" * 253 + padded(0, size))
    for _ in range(253):
        (value,) = value
    assert value[0] == 0


# Hostile bytes

NESTED = b"\x91" * 100_000 + b"\xc0"
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "list that lies": b"\xdd\xff\xff\xff\xff",
    "map that lies": b"\xdf\xff\xff\xff\xff",
    "text that lies": b"\xdb\xff\xff\xff\xff",
    "bytes that lie": b"\xc6\xff\xff\xff\xff",
    "bytes that lie by one": b"\xc4\x03ab",
    "list that lies by one": b"\x92\xc0",
    "lists that lie in lists": b"\xdd\x7f\xff\xff\xff" * 50,
    "length that is cut": b"\xdd\xff\xff",
    "first byte that MessagePack never uses": b"\xc1",
    "lists in lists in lists": NESTED,
    "maps in maps in maps": b"\x81\xa0" * 2000 + b"\xc0",
    "text that is no UTF-8": b"\xa2\xc3\x28",
    "text with a surrogate": b"\xa3\xed\xa0\x80",
    "key that is no UTF-8": b"\x81\xa1\xff\xc0",
    "extension": pack(msgpack.ExtType(5, b"x")),
    "extension of 32-bit length": b"\xc9\0\0\0\x01\x05x",
    "extension without data": b"\xc7\0\x05",
    "extension that lies": b"\xc9\xff\xff\xff\xff\x05",
    "timestamp of 32 bits": pack(msgpack.Timestamp(1)),
    "timestamp of 64 bits": pack(msgpack.Timestamp(1, 1)),
    "timestamp of 96 bits": pack(msgpack.Timestamp(2**40, 1)),
    "timestamp without data": b"\xc7\0\xff",
    "two values": b"\xc0\xc0",
    "value and half a value": b"\xc0\xdb\0",
}


@pytest.mark.parametrize("size", [1, 257, 4097, LARGE])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_are_refused_at_a_bounded_cost(name: str, size: int) -> None:
    payload = HOSTILE[name]
    if size > 1:  # behind so much of good text that another way of reading is taken
        payload = b"\x92" + pack("x" * size) + payload
    with bounded(200_000 + 4 * len(payload)), pytest.raises(ProtocolError) as caught:
        decode(payload)
    assert caught.value.close_code == 4400


@pytest.mark.parametrize("size", [2, 300, 5000, LARGE])
def test_bytes_behind_the_value_are_refused(size: int) -> None:
    for payload in (padded(1, size), pack(bytes(size)), pack("x" * size)):
        decode(payload)
        with pytest.raises(ProtocolError) as caught:
            decode(payload + b"\xc0")
        assert caught.value.close_code == 4400
        assert size == 2 or "1 bytes behind the end" in str(caught.value)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"\xc1", "payload of 1 bytes is not MessagePack: FormatError"),
        (b"\x92\x81\x01\xc0\xc1", "payload of 5 bytes is not MessagePack: FormatError"),
        (b"\xc7\0\x05", "extension type 5 is not part of the protocol"),
        (b"\x82\x01\xc0\x90\x01", "the keys of maps must be text or numbers, not a list"),
        (b"\x82\x01\xc0\x80\x01", "the keys of maps must be text or numbers, not a dict"),
    ],
)
def test_the_error_says_what_is_wrong(payload: bytes, error: str) -> None:
    with pytest.raises((ProtocolError, InvalidParams), match=error):
        decode(payload)


@pytest.mark.parametrize("size", [2, 300, 5000, LARGE])
def test_every_payload_that_is_cut_is_refused(size: int) -> None:
    payload = padded({"a": [1, 2.5, b"x"], "b": {}}, size)
    for cut in {*range(16), len(payload) // 2, len(payload) - 1}:
        if cut < len(payload):
            with pytest.raises(ProtocolError):
                decode(payload[:cut])


@pytest.mark.parametrize(
    ("key", "text"),
    [(1, "1"), (-(2**63), str(-(2**63))), (1.5, "1.5"), (True, "true"), (False, "false")]
    + [(None, "null"), (math.inf, "inf")],
)
@pytest.mark.parametrize("size", [2, 300, 5000])
def test_keys_that_are_scalars_become_text(key: Any, text: str, size: int) -> None:
    value = {"a": {key: 1, b"b": 2, "c": [{key: key}]}}
    expected = {"a": {text: 1, b"b": 2, "c": [{text: key}]}}
    assert decode(padded(value, size))[0] == expected
    with pytest.raises(InvalidParams, match="must be text here"):
        decode(padded(value, size), text_keys=True)


def test_keys_that_collide_are_told_apart_by_their_text() -> None:
    """A peer could choose numbers that all have one hash, which would make a map slow."""
    numbers = [count * sys.hash_info.modulus for count in range(8)]
    assert len({hash(number) for number in numbers}) == 1
    found = decode(pack(dict.fromkeys(numbers)))
    assert found == dict.fromkeys(map(str, numbers))


@pytest.mark.parametrize("key", [b"\x90", b"\x80", b"\x91\x01", b"\xd4\x05x", b"\xc7\0\0"])
@pytest.mark.parametrize("others", [b"", b"\x01\xc0"])
def test_keys_that_are_containers_are_refused(key: bytes, others: bytes) -> None:
    count = 1 + bool(others)
    with pytest.raises((InvalidParams, ProtocolError)):
        decode(bytes((0x80 | count,)) + others + key + b"\x01")


def test_large_bytes_are_read_beside_keys_that_are_numbers() -> None:
    large = bytes(LARGE)
    parted = Parted(b"\x92" + pack({1: 2}) + PLACEHOLDER, large)
    assert decode(parted) == [{"1": 2}, large]


@pytest.mark.parametrize(
    "bad",
    [b"\xc1", b"\xa2\xc3\x28", b"\xc7\x01\x05x", b"\xd6\xff\0\0\0\1", b"\x93\xc0", b""],
)
def test_hostile_bytes_behind_keys_that_are_numbers(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x92\x81\x01\xc0" + bad)


@pytest.mark.parametrize("rest", [b"\x81\x01\xc0", b"\x80", b"\x90"])
def test_containers_beside_keys_that_are_numbers_are_counted(rest: bytes) -> None:
    payload = b"\xdd" + (120_000).to_bytes(4, "big") + b"\x81\x01\xc0" + rest * 119_999
    with pytest.raises(PayloadTooLarge):
        decode(payload)


def test_the_limit_of_containers_grows_beside_keys_that_are_numbers() -> None:
    value = [{"1": 2}, [[]] * 150_000, bytes(2 << 20)]
    assert decode(pack([{1: 2}, *value[1:]])) == value


BOMBS = {
    "empty lists": b"\x90",
    "empty maps": b"\x80",
    "lists of one": b"\x91\xc0",
    "maps of one": b"\x81\xa0\xc0",
}


@pytest.mark.parametrize("element", BOMBS.values(), ids=BOMBS)
def test_element_bombs_are_refused(element: bytes) -> None:
    """Of these a megabyte would make a hundred of objects."""
    count = 450_000 // len(element)
    payload = b"\xdd" + count.to_bytes(4, "big") + element * count
    with bounded(40_000_000), pytest.raises(PayloadTooLarge, match="100000 lists and maps"):
        decode(payload)


@pytest.mark.parametrize("empty", [[], {}])
def test_the_limit_of_containers_grows_with_the_payload(empty: Any) -> None:
    value = [bytes(1 << 20), [empty] * 199_000]  # more than 1 MiB, so more than 100,000 are let in
    assert decode(pack([*value, bytes(1 << 20)])) == [*value, bytes(1 << 20)]
    with pytest.raises(PayloadTooLarge, match="lists and maps"):
        decode(pack(value))


def test_100_000_elements_are_accepted() -> None:
    assert len(decode(pack([[]] * 99_999))) == 99_999
    assert len(decode(pack({"of maps": [{}] * 99_998}))["of maps"]) == 99_998
    assert len(decode(pack(list(range(65_536))))) == 65_536


@pytest.mark.parametrize(
    "value",
    [
        bytes(8 * LARGE),
        {"data": bytes(8 * LARGE)},
        {"name": "file", "data": bytes(8 * LARGE)},
        [bytes(8 * LARGE)],
        ["file", bytes(8 * LARGE)],
        [*range(10), bytes(8 * LARGE), 2**40],
    ],
)
def test_a_large_value_is_not_copied_to_be_checked(value: Any) -> None:
    """However few others are beside it: reading it takes one copy."""
    payload = pack(value)
    with bounded(len(payload) + 10_000):
        found = decode(payload)
    assert found == value


@pytest.mark.parametrize(
    "value",
    [
        [list(range(20)), {str(n): n for n in range(20)}],
        list(range(70)),
        {str(n): n for n in range(70)},
        [1.5, -1, -200, 2**40, True, None, "x" * 40, b"x" * 300, "x" * 70_000, b"x" * 70_000],
    ],
)
def test_large_values_among_others_are_read(value: Any) -> None:
    """Few tokens or many, the large one first or last."""
    for payload in (pack([value, bytes(LARGE)]), pack([bytes(LARGE), value])):
        assert decode(payload) == msgpack.unpackb(payload)
        for cut in (1, 10, len(payload) - 1):
            with pytest.raises(ProtocolError):
                decode(payload[:cut])
        with pytest.raises(ProtocolError):
            decode(payload + b"\0")


@pytest.mark.parametrize("wide", [b"\xdc\0\0", b"\xdd\0\0\0\0", b"\xde\0\0", b"\xdf\0\0\0\0"])
def test_an_empty_container_among_large_values_may_have_a_long_length(wide: bytes) -> None:
    found = decode(b"\x92" + wide + pack(bytes(LARGE)))
    assert found == [[] if wide[0] < 0xDE else {}, bytes(LARGE)]


def test_a_length_that_lies_among_large_values_is_noticed() -> None:
    large = pack(bytes(LARGE))
    for lie in (b"\xdd\xff\xff\xff\xff", b"\xdf\x00\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1"):
        for payload in (b"\x92" + large + lie, b"\x92" + lie + large, lie + large):
            with bounded(len(payload) * 3), pytest.raises(ProtocolError):
                decode(payload)


@pytest.mark.parametrize("others", [0, 100])
def test_lists_that_claim_much_within_each_other_cost_nothing(others: int) -> None:
    """Each claims no more than the payload has bytes, and all of them a hundred times as much."""
    head = b"\xdc" + (2 + others).to_bytes(2, "big") + pack(bytes(LARGE)) + b"\x01" * others
    payload = head + (b"\xdd" + LARGE.to_bytes(4, "big")) * 50
    with bounded(len(payload) * 3), pytest.raises(ProtocolError):
        decode(payload)


# Bytes of no design, and bytes that are nearly right

TOKENS = st.sampled_from([bytes([first]) for first in range(256)]) | st.binary(max_size=6)
NEARLY = st.builds(
    lambda payload, at, byte: (
        payload[: at % (len(payload) + 1)] + bytes([byte]) + payload[at % (len(payload) + 1) :]
    ),
    VALUES.map(pack),
    st.integers(0, 1 << 16),
    st.integers(0, 255),
)


@given(payload=st.binary(max_size=600) | st.lists(TOKENS, max_size=80).map(b"".join) | NEARLY)
@example(b"\xc7\0\x05")
@example(b"\xc7\0\xff")
@example(b"\x91" * 255)
def test_decode_returns_plain_values_or_raises_what_it_may(payload: bytes) -> None:
    for size in (0, 257, 5000, LARGE):
        whole = payload if not size else b"\x92" + pack(bytes(size)) + payload
        try:
            value = decode(whole)
        except (ProtocolError, InvalidParams, PayloadTooLarge):
            continue
        assert is_plain(value)


def is_plain(value: Any) -> bool:
    """Whether MessagePack's own types are all that a value is made of."""
    left = [value]
    while left:
        value = left.pop()
        if type(value) is list:
            left += value
        elif type(value) is dict:
            left += [*value, *value.values()]
        elif type(value) not in (type(None), bool, int, float, str, bytes):
            return False
    return True


# Encoder


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        bytes(LARGE - 1),
        bytearray(LARGE),
        "x" * LARGE,
        [bytes(LARGE)],
        {},
        {"data": bytes(LARGE - 1)},
        {"data": bytes(LARGE), "name": "last"},
        {"data": {"deeper": bytes(LARGE)}},
    ],
)
def test_what_does_not_end_with_large_bytes_is_not_split(value: Any) -> None:
    assert Encoder().split(value) is None


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, 70_000])
@pytest.mark.parametrize("others", [0, 1, 14, 15, 16, 40])
def test_split_is_pack_without_a_copy(size: int, others: int) -> None:
    data = b"\xa5" * size
    value = {**{f"key {n}": [n, None, {"n": n}] for n in range(others)}, "data": data}
    split = Encoder().split(value)
    assert split is not None
    head, tail = split
    assert tail is data
    assert decode(head + tail) == value
    if len(value) < 16:  # a longer map may begin in more than one way
        assert head + tail == Encoder().pack(value)


def test_split_of_bytes() -> None:
    data = bytes(LARGE)
    split = Encoder().split(data)
    assert split is not None
    assert split[1] is data
    assert decode(b"".join(split)) == data


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=5), SCALARS, max_size=20))
def test_split_reads_like_pack(value: dict[str, Any]) -> None:
    value = {**{key: inner for key, inner in value.items() if key != "tail"}, "tail": bytes(LARGE)}
    split = Encoder().split(value)
    assert split is not None
    assert decode(b"".join(split)) == value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (2**64, ValueError),
        (-(2**63) - 1, ValueError),
        ("\ud800", ValueError),
        (object(), TypeError),
        (1 + 2j, TypeError),
    ],
)
def test_what_cannot_be_packed_raises_and_leaves_nothing_behind(
    value: Any, error: type[Exception]
) -> None:
    encoder = Encoder()
    with pytest.raises(error):
        encoder.pack(["before", value])
    assert decode(encoder.pack([1])) == [1]


def test_nesting_that_cannot_be_packed_raises() -> None:
    value: list[Any] = []
    for _ in range(2000):
        value = [value]
    with pytest.raises(ValueError):
        Encoder().pack(value)


# Types that MessagePack does not have


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    seen: datetime.date


class Reading(pydantic.BaseModel):
    sensor: str
    at: datetime.datetime


class NamedAttributes:
    """Looks like a model, but only its objects do, not the class."""

    def __init__(self) -> None:
        self.model_dump = dict


class DumpsItself:
    """What its class calls a dump is not plain, and would not be however often it is asked."""

    def model_dump(self, **options: Any) -> Any:
        return self


NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
ODD = datetime.timezone(datetime.timedelta(seconds=2))


class Number(int):
    """An int of one's own."""


class Nested(enum.Enum):
    """Values that need turning themselves."""

    DAY = NOON.date()
    COLOUR = Colour.RED
    NUMBER = Number(7)
    LARGE = 2**70
    ODD_TEXT = "a\ud800"


ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (NOON, "2026-01-01T12:00:00+00:00"),
        (NOON.date(), "2026-01-01"),
        (NOON.time(), "12:00:00"),
        (datetime.timedelta(minutes=1, milliseconds=500), "PT60.5S"),
        (ID, "12345678-1234-5678-1234-567812345678"),
        (decimal.Decimal("1.10"), "1.10"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (Colour.RED, "red"),
        ({7}, [7]),
        (frozenset({"a"}), ["a"]),
        ((1, 2), [1, 2]),
        (bytearray(b"ab"), b"ab"),
        (Point(1, NOON.date()), {"x": 1, "seen": "2026-01-01"}),
        (datetime.timedelta(0), "PT0S"),
        (datetime.timedelta(days=2), "P2D"),
        (datetime.timedelta(days=1, microseconds=10), "P1DT0.00001S"),
        (datetime.timedelta(seconds=-1.5), "-PT1.5S"),
        (datetime.timedelta.min, "-P999999999D"),
        (datetime.timedelta.max, "P999999999DT86399.999999S"),
        (NOON.replace(tzinfo=ODD), "2026-01-01T11:59:58+00:00"),
        (ipaddress.ip_interface("::1/64"), "::1/64"),
        (pydantic.TypeAdapter(pydantic.HttpUrl).validate_python("http://a/b"), "http://a/b"),
        (Nested.DAY, "2026-01-01"),
        (Nested.COLOUR, "red"),
        (Nested.NUMBER, 7),
        (pydantic.RootModel[datetime.date](NOON.date()), "2026-01-01"),
        (collections.deque([1]), [1]),
        ({"a": 1}.keys(), ["a"]),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (Reading(sensor="s", at=NOON), {"sensor": "s", "at": "2026-01-01T12:00:00+00:00"}),
    ],
)
def test_python_types_become_plain(value: Any, sent: Any) -> None:
    assert decode(Encoder().pack(value)) == sent
    assert decode(Encoder().pack({"in": [value]})) == {"in": [sent]}


def test_plain_goes_one_level() -> None:
    assert plain(Point(1, NOON.date())) == {"x": 1, "seen": NOON.date()}
    assert plain(pathlib.Path("a")) == "a"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (object(), "builtins.object"),
        (Point, "builtins.type"),
        (Reading, "ModelMetaclass"),
        (NamedAttributes(), "test_payload.NamedAttributes"),
        (DumpsItself(), "test_payload.DumpsItself"),
        (pydantic.SecretStr("a"), "pydantic.types.SecretStr"),
        (test_plain_goes_one_level, "builtins.function"),
    ],
)
def test_other_types_are_refused_by_name(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"cannot send a value of type .*{name}"):
        Encoder().pack([value])


def explained(value: Any) -> Exception:
    """Return what is said of a value that cannot be packed."""
    encoder = Encoder()
    with pytest.raises(Exception) as caught:  # any, to be explained
        encoder.pack(value)
    return encoder.explained(caught.value, value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "cannot send a value of type builtins.object; send plain data"),
        ({"a": [1, {2: object()}]}, "a.1.2: cannot send a value of type builtins.object"),
        ({"a": {object(): 1}}, "a.a key: cannot send a value of type builtins.object"),
        ([Point(1, 2**64)], "0.seen: cannot send an integer of 65 bits"),  # type: ignore[arg-type]
        ({"a": Nested.LARGE}, "a: cannot send an integer of 71 bits"),
        ({"a": Nested.ODD_TEXT}, "a: cannot send text with a lone surrogate, at position 1"),
    ],
)
def test_an_error_begins_with_the_path_to_what_cannot_be_sent(value: Any, text: str) -> None:
    assert str(explained(value)).startswith(text)


def test_a_value_whose_parts_could_be_sent_is_too_deep_itself() -> None:
    deeper: dict[str, Any] = {}
    with pytest.raises(ValueError):
        while Encoder().pack(deeper):
            deeper = {"a": deeper}
    assert str(explained(deeper)).startswith("cannot send a value that contains itself, or")
    assert str(explained({"b": [deeper]})).startswith("b.0: cannot send a value that contains")


# Large bytes that are read to a place of their own


@pytest.mark.parametrize("others", [0, 300, 5000])
def test_large_bytes_are_given_as_the_object_that_they_are(others: int) -> None:
    """However much there is beside them, and once."""
    large = bytes(LARGE)
    beside = pack("x" * others)
    value = decode(Parted(b"\x92" + beside + PLACEHOLDER, large))
    assert value == ["x" * others, large]
    assert value[1] is large
    for parts in (PLACEHOLDER + PLACEHOLDER, b"\xc7\x01\x00x" + PLACEHOLDER):
        with pytest.raises(ProtocolError):
            decode(Parted(b"\x93" + beside + parts, large))


@pytest.mark.parametrize("there", [45, 46, 1000, 2 * LARGE])
def test_large_bytes_are_found_before_they_are_there(there: int) -> None:
    payload = pack({"name": "x" * 28, "data": bytes(2 * LARGE)})
    begin = len(payload) - 2 * LARGE
    assert begin == 45
    for least in (LARGE, 2 * LARGE):
        assert large_bytes(payload[:there], len(payload), least) == (begin, len(payload))


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (b"", 2 * LARGE),
        (pack({"name": "file"}), 2 * LARGE),
        (b"\x92" + pack("x" * (LARGE - 1)) + b"\xc6" + (LARGE - 1).to_bytes(4, "big"), 4 * LARGE),
        (b"\xc6" + LARGE.to_bytes(4, "big"), LARGE + 4),  # goes on behind the end of the payload
        (b"\xc6" + (1 << 24).to_bytes(4, "big")[:3], (1 << 24) + 5),  # its length is not there yet
        (pack([*range(1000), bytes(LARGE)])[:-LARGE], 4 * LARGE),  # costs too much to look for
    ],
)
def test_there_are_no_large_bytes(start: bytes, size: int) -> None:
    assert large_bytes(start, size, LARGE) == (0, 0)


# Credit


@pytest.mark.parametrize("credit", [(0, 0), (0, 1), (1, 0), (2**32 - 1, 2**32 - 1)])
def test_credit_is_items_and_bytes(credit: tuple[int, int]) -> None:
    assert read_credit(pack(list(credit))) == credit


@pytest.mark.parametrize(
    "body",
    [None, 1, "ab", {0: 1, 1: 2}, [], [1], [1, 2, 3], [-1, 2], [1, -2], [1.0, 2], [1, "2"]]
    + [[None, 1], [True, 1], [1, False], [2**32, 0], [0, 2**32]],
)
def test_what_is_no_credit_is_refused(body: Any) -> None:
    with pytest.raises(ProtocolError, match=r"STREAM_CREDIT must carry \[items, bytes\]") as caught:
        read_credit(pack(body))
    assert caught.value.close_code == 4400


# Compression


@given(st.binary(max_size=2000))
def test_deflated_bytes_come_back(data: bytes) -> None:
    packed = deflate(data)
    assert inflate(packed, len(data)) == data
    assert inflate(memoryview(packed), len(data) + 1) == data


@pytest.mark.parametrize("size", [1, 1000, 100_000])
def test_inflating_stops_at_the_limit(size: int) -> None:
    packed = deflate(bytes(size))
    assert inflate(packed, size) == bytes(size)
    with pytest.raises(ProtocolError, match=f"limit of {size - 1} bytes") as caught:
        inflate(packed, size - 1)
    assert caught.value.close_code == 1009


def test_a_bomb_costs_no_more_than_its_limit() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    with bounded(1_000_000), pytest.raises(ProtocolError) as caught:
        inflate(bomb, 100_000)
    assert caught.value.close_code == 1009


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"garbage",
        deflate(b"x" * 100)[:-1],
        deflate(b"x" * 100)[:-4] + b"\0\0\0\0",
        deflate(b"x" * 100) + b"\0",
        deflate(b"x" * 100) * 2,
        deflate(b"x" * 100)[2:-4],  # without zlib's own header and checksum
        b"\x78\xbb" + deflate(b"x" * 100)[2:],  # wants a dictionary that nobody has
    ],
)
def test_what_is_not_one_whole_stream_is_refused(packed: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"payload of {len(packed)} bytes is ") as caught:
        inflate(packed, 1000)
    assert caught.value.close_code == 4400


@given(st.binary(max_size=200), st.integers(0, 300))
def test_inflate_returns_or_raises_what_it_may(packed: bytes, limit: int) -> None:
    for data in (packed, deflate(packed) + packed[:1], deflate(packed)[: limit or 1]):
        try:
            assert len(inflate(data, limit)) <= limit
        except ProtocolError as exc:
            assert exc.close_code in (1009, 4400)


def test_a_view_is_copied_to_be_kept() -> None:
    place = bytearray(b"abc")
    copy = kept(memoryview(place))
    place[:] = b"xyz"
    assert copy == b"abc" and type(copy) is bytes
    parted = Parted(b"x", b"y")
    assert kept(copy) is copy and kept(parted) is parted
