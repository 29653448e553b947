"""MessagePack in and out, so that hostile bytes cost little and Python's own types just work.

Reading. `unpackb` trusts the lengths that it is told, so three things come first: `Unpacker.skip()`
walks the whole payload and allocates nothing, which finds every lying length; a budget counts
containers, because a megabyte of empty lists would otherwise make a hundred megabytes of objects;
and extension types are refused, timestamps among them. Payloads up to 256 bytes cannot do harm and
skip the walk.

Very large `bytes` are not in a payload at all when it is decoded: they were read from the socket to
their own place, and a `Parted` has them beside the rest.

Writing. A `Packer` that is kept costs half of `packb`. It must not be used from two threads, nor
again from inside its own `default`, so there is one `Encoder` per event loop.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

from msgpack import Packer, Unpacker, unpackb

from ..exceptions import InvalidParams, PayloadTooLarge, ProtocolError
from .frames import CloseCode, Parted, Payload
from .plain import plain, unsendable

__all__ = [
    "COMPRESS_MOST",
    "LARGE",
    "PLACEHOLDER",
    "UNSENDABLE",
    "Encoder",
    "decode",
    "deflate",
    "inflate",
    "kept",
    "large_bytes",
    "read_credit",
]

LARGE: Final = 64 * 1024
"""Bytes from which a `bytes` value at the end of a payload is sent without being copied."""

UNSENDABLE: Final = (TypeError, ValueError, OverflowError)
"""What `Encoder.pack` raises for a value that cannot be sent."""

COMPRESS_MOST: Final = 1024 * 1024
"""Bytes that a payload may have to be compressed, and so what a compressed one may hold."""

_UNCHECKED: Final = 256
_FEW_TOKENS: Final = 64
_BUDGETED: Final = 4096
_CONTAINERS: Final = 100_000
"""Lists and maps that a payload may hold; more in proportion, from 1 MiB on."""


PLACEHOLDER: Final = b"\xc7\x00\x00"
"""Stands for the large `bytes` of a `Parted`: an empty extension, which no peer may send."""


def large_bytes(start: bytes | memoryview, size: int, least: int) -> tuple[int, int]:
    """Find the `bytes` that a large payload mostly is.

    Args:
        start: What is there of the payload so far.
        size: Bytes that it will have.
        least: What the `bytes` must have.

    Returns:
        Where their content begins and ends; 0 and 0 when there are none, or when that cannot be
        told from what is there. Whether the rest of the payload is right is for `decode` to find.
    """
    for first, begin, end, _ in islice(_tokens(start), _FEW_TOKENS):
        if first == _BIN_32 and end - begin >= least:
            return (begin, end) if begin <= len(start) and end <= size else (0, 0)
    return 0, 0


def decode(payload: Payload, text_keys: bool = False) -> Any:
    """Decode one payload.

    Args:
        payload: One MessagePack value, in whole.
        text_keys: Whether maps have no keys but text and bytes. Others become text, as in JSON:
            `1`, `0.5`, `true`, `null`.

    Raises:
        ProtocolError: The bytes are not one well-formed value of plain types.
        PayloadTooLarge: Well formed, but with too many containers.
        InvalidParams: Well formed, but a map has a key that must not be: a list, for example.
    """
    try:
        size = len(payload)
        if size <= _UNCHECKED:  # and so no Parted; asking first would cost every small call
            return unpackb(payload, max_ext_len=0, ext_hook=_refuse_extension)  # type: ignore[arg-type]
        rest, fill = _rest_of(payload)
        size = len(rest)
        _check_lengths(rest, size)
        if size <= _BUDGETED:
            return unpackb(rest, max_ext_len=0, ext_hook=fill)
        budget = _Budget(max(_CONTAINERS, size * _CONTAINERS >> 20))
        return unpackb(
            rest,
            max_ext_len=0,
            ext_hook=fill,
            list_hook=budget.spend_list,
            object_hook=budget.spend_map,
        )
    except (ProtocolError, PayloadTooLarge):
        raise
    except Exception as exc:
        # unpackb leaks a dozen kinds of exception, and every one of them means the same.
        if "not allowed for map key" in str(exc):
            if text_keys:
                raise InvalidParams("the keys of maps must be text here") from exc
            return _decode_other_keys(payload)
        raise _not_messagepack(payload, exc) from exc


def _decode_other_keys(payload: Payload) -> Any:
    """Decode a payload with maps whose keys are numbers, truth values or None: they become text.

    They are not put into a hash table as they are: a peer could choose numbers that all collide.
    The lengths in the payload are true, which `decode` has seen; its containers are counted anew.
    """
    rest, fill = _rest_of(payload)
    budget = _Budget(max(_CONTAINERS, len(rest) * _CONTAINERS >> 20))

    def with_text_keys(pairs: list[tuple[Any, Any]]) -> dict[str | bytes, Any]:
        return budget.spend_map({_text_key(key): value for key, value in pairs})

    try:
        return unpackb(
            rest,
            max_ext_len=0,
            ext_hook=fill,
            list_hook=budget.spend_list,
            object_pairs_hook=with_text_keys,
            strict_map_key=False,
        )
    except (InvalidParams, PayloadTooLarge):
        raise
    except Exception as exc:
        raise _not_messagepack(payload, exc) from exc


def _text_key(key: Any) -> str | bytes:
    """Return the key of a map as text, as JSON has it."""
    if type(key) is str or type(key) is bytes:
        return key
    if key is None:
        return "null"
    if isinstance(key, bool):
        return "true" if key else "false"
    if isinstance(key, (int, float)):
        return repr(key)
    raise InvalidParams(f"the keys of maps must be text or numbers, not a {type(key).__name__}")


def _not_messagepack(payload: Payload, error: Exception) -> ProtocolError:
    return ProtocolError(
        f"a payload of {len(payload)} bytes is not MessagePack: {type(error).__name__}: {error}",
        close_code=CloseCode.BAD_PAYLOAD,
    )


def _rest_of(payload: Payload) -> tuple[bytes | memoryview, Callable[[int, bytes], Any]]:
    """Return what of a payload is to be decoded, and what fills the places of extensions."""
    if isinstance(payload, Parted):
        return payload.rest, _give_once(payload.large)
    return payload, _refuse_extension


def _give_once(large: bytes) -> Callable[[int, bytes], Any]:
    """Return what fills the place of large `bytes`.

    An extension of the peer's own would take them, so that none are left, which is an error.
    """
    left = [large]

    def give(code: int, data: bytes) -> bytes:
        return left.pop()

    return give


def _refuse_extension(code: int, data: bytes) -> Any:
    # Asked for what has no length; `max_ext_len` refuses the rest, and timestamps, unasked.
    raise ValueError(f"extension type {code} is not part of the protocol")


class _Budget:
    """Counts containers while a payload is decoded."""

    __slots__ = ("left", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = self.left = limit

    def spend_list(self, value: list[Any]) -> list[Any]:
        self.left -= 1
        if self.left < 0:
            raise PayloadTooLarge(f"more than {self.limit} lists and maps in one payload")
        return value

    def spend_map(self, value: dict[Any, Any]) -> dict[Any, Any]:
        self.left -= 1
        if self.left < 0:
            raise PayloadTooLarge(f"more than {self.limit} lists and maps in one payload")
        return value


def _check_lengths(payload: bytes | memoryview, size: int) -> None:
    """Prove that every length inside the payload is true, without allocating what they claim."""
    if size >= LARGE and _has_few_tokens(payload, size):
        return
    unpacker = Unpacker(max_buffer_size=size)
    unpacker.feed(payload)
    unpacker.skip()
    if unpacker.tell() != size:
        raise ProtocolError(
            f"{size - unpacker.tell()} bytes behind the end of the payload",
            close_code=CloseCode.BAD_PAYLOAD,
        )


# What follows the first byte of a token: (bytes of length field, bytes added to it, kind). Kinds:
# 0 a scalar, 1 a list, 2 a map. From the MessagePack specification's table of formats.
_SCALAR, _LIST, _MAP = 0, 1, 2
_BIN_32: Final = 0xC6
_TOKENS: Final[dict[int, tuple[int, int, int]]] = {
    **dict.fromkeys((192, 194, 195), (0, 0, _SCALAR)),
    **{0xC4 + power: (1 << power, 0, _SCALAR) for power in range(3)},  # bin 8, 16, 32
    **{0xC7 + power: (1 << power, 1, _SCALAR) for power in range(3)},  # ext 8, 16, 32
    0xCA: (0, 4, _SCALAR),
    0xCB: (0, 8, _SCALAR),
    **{0xCC + power: (0, 1 << power, _SCALAR) for power in range(4)},  # uint 8 to 64
    **{0xD0 + power: (0, 1 << power, _SCALAR) for power in range(4)},  # int 8 to 64
    **{0xD4 + power: (0, 1 + (1 << power), _SCALAR) for power in range(5)},  # fixext 1 to 16
    **{0xD9 + power: (1 << power, 0, _SCALAR) for power in range(3)},  # str 8, 16, 32
    0xDC: (2, 0, _LIST),
    0xDD: (4, 0, _LIST),
    0xDE: (2, 0, _MAP),
    0xDF: (4, 0, _MAP),
    **dict.fromkeys((*range(128), *range(224, 256)), (0, 0, _SCALAR)),
    **{0xA0 + size: (0, size, _SCALAR) for size in range(32)},
}


def _tokens(payload: bytes | memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Walk through a payload, or the start of one, as far as it is there and means something.

    Returns:
        Of each token its first byte, where its content begins and ends if it is a scalar, and how
        many values it holds if it is not.
    """
    position, there = 0, len(payload)
    while position < there:
        first = payload[position]
        position += 1
        if first & 0xF0 == 0x90:
            yield first, position, position, first & 0x0F
        elif first & 0xF0 == 0x80:
            yield first, position, position, 2 * (first & 0x0F)
        elif first in _TOKENS:
            width, extra, kind = _TOKENS[first]
            length = int.from_bytes(payload[position : position + width], "big")
            position += width
            if kind == _SCALAR:
                yield first, position, position + length + extra, 0
                position += length + extra
            else:
                yield first, position, position, kind * length
        else:
            return


def _has_few_tokens(payload: bytes | memoryview, size: int) -> bool:
    """Whether a large payload is a handful of tokens, every length true.

    Such a payload is mostly one `bytes` or `str`. Walking it here spares `skip()`, which would copy
    all of it first.
    """
    wanted = 1
    for _, _, end, holds in islice(_tokens(payload), _FEW_TOKENS):
        wanted += holds - 1
        if end > size or wanted > size:
            return False
        if wanted == 0:
            return end == size
    return False


def kept(payload: Payload) -> bytes | Parted:
    """Return a payload that may be kept; a view of one is gone with the next frame."""
    return bytes(payload) if isinstance(payload, memoryview) else payload


def read_credit(payload: Payload) -> tuple[int, int]:
    """Return items and bytes, what STREAM_CREDIT carries.

    Raises:
        ProtocolError: It is something else.
    """
    body = decode(payload)
    if (
        type(body) is not list
        or len(body) != 2
        or not all(type(number) is int and 0 <= number < 2**32 for number in body)
    ):
        raise ProtocolError(
            "STREAM_CREDIT must carry [items, bytes], each below 2**32",
            close_code=CloseCode.BAD_PAYLOAD,
        )
    return body[0], body[1]


class Encoder:
    """Packs values. One per event loop; not to be shared by threads.

    Attributes:
        pack: `pack(value) -> bytes`, the kept packer's own method. It raises TypeError for a type
            that cannot be sent, and ValueError for an integer, text or nesting that MessagePack
            cannot hold; `explained` says where.
    """

    __slots__ = ("pack",)

    def __init__(self) -> None:
        self.pack = Packer(default=plain, buf_size=16 * 1024).pack

    def explained(self, error: Exception, value: Any) -> Exception:
        """Return what to raise for the error of `pack` or `split`: it names the part at fault."""
        return unsendable(error, value, self.pack)

    def split(self, value: Any) -> tuple[bytes, bytes] | None:
        """Return a value as its encoded head and the large `bytes` that ends it, uncopied.

        Returns:
            None when the value is not `bytes` of at least `LARGE` bytes, nor a dict whose last
            value is.
        """
        if type(value) is bytes:
            return (_bin_prefix(len(value)), value) if len(value) >= LARGE else None
        if type(value) is dict and value:
            *keys, last = value
            tail = value[last]
            if type(tail) is bytes and len(tail) >= LARGE:
                head = [_map_prefix(len(value))]
                for key in keys:
                    head += (self.pack(key), self.pack(value[key]))
                return b"".join((*head, self.pack(last), _bin_prefix(len(tail)))), tail
        return None


def _bin_prefix(size: int) -> bytes:
    return b"\xc6" + size.to_bytes(4, "big")


def _map_prefix(size: int) -> bytes:
    return bytes((0x80 | size,)) if size < 16 else b"\xdf" + size.to_bytes(4, "big")


def deflate(payload: bytes) -> bytes:
    """Compress a payload, fast rather than small."""
    return zlib.compress(payload, 1)


def inflate(payload: bytes | memoryview, limit: int) -> bytes:
    """Inflate one zlib stream, never past `limit` bytes.

    Raises:
        ProtocolError: The stream is damaged, not whole, or holds more.
    """
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(payload, limit + 1)
    except zlib.error as exc:
        raise ProtocolError(
            f"compressed payload of {len(payload)} bytes is damaged: {exc}",
            close_code=CloseCode.BAD_PAYLOAD,
        ) from exc
    if len(data) > limit:
        raise ProtocolError(
            f"compressed payload of {len(payload)} bytes exceeds the limit of {limit} bytes",
            close_code=CloseCode.TOO_BIG,
        )
    if not inflater.eof or inflater.unused_data:
        raise ProtocolError(
            f"compressed payload of {len(payload)} bytes is not one whole zlib stream",
            close_code=CloseCode.BAD_PAYLOAD,
        )
    return data
