"""The CNDT frame: a 32-byte header and its payload, as docs/protocol.md specifies them.

A header is read and written as five numbers, because magic, version, type and flags together make
one 64-bit *word*: a single comparison checks all four. `word()` builds it, `ACCEPTED_FLAGS` says
which words are legal, and the peer in `cndt.py` looks a received word up in a table.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Container
from typing import Final

from ..exceptions import ProtocolError

__all__ = [
    "ACCEPTED_FLAGS",
    "COMPRESSED",
    "ENVELOPE",
    "HEADER",
    "HEADER_SIZE",
    "MAGIC",
    "PRIORITY",
    "REPLY",
    "SEQUENCED",
    "VERSION",
    "CloseCode",
    "Frame",
    "FrameType",
    "NotConduit",
    "OtherVersion",
    "Parted",
    "Payload",
    "not_conduit",
    "tolerate",
    "type_name",
    "word",
]

MAGIC: Final = b"CNDT"
VERSION: Final = 1

HEADER: Final = struct.Struct(">QIQQI")
"""Word (magic, version, type, flags), payload length, correlation id, timestamp, reserved."""
HEADER_SIZE: Final = HEADER.size

ENVELOPE: Final = 4096
"""Bytes that a payload may have beyond the user's value: names, metadata, array headers."""


class FrameType(enum.IntEnum):
    """The frame types. Compare plain integers on the hot path; the names are for people."""

    MESSAGE = 1
    RPC_REQUEST = 2
    RPC_RESPONSE = 3
    RPC_ERROR = 4
    HEARTBEAT_PING = 5
    HEARTBEAT_PONG = 6
    AUTH_REQUEST = 7
    AUTH_SUCCESS = 8
    AUTH_FAILURE = 9
    AUTH_CHALLENGE = 16
    AUTH_RESPONSE = 17
    ACK = 18
    CANCEL = 19
    STREAM_ITEM = 20
    STREAM_END = 21
    STREAM_CREDIT = 22
    GOAWAY = 23
    CLOSE = 24


# Flags.
COMPRESSED: Final = 1
SEQUENCED: Final = 2
PRIORITY: Final = 8
REPLY: Final = 16


class CloseCode(enum.IntEnum):
    """Why a connection ends: WebSocket's numbers where one fits, 4xxx where none does."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    ABNORMAL = 1006
    TOO_BIG = 1009
    TRY_AGAIN_LATER = 1013
    BAD_PAYLOAD = 4400
    LOGIN_FAILED = 4401
    REFUSED = 4403
    TOO_LATE = 4408
    FLOOD = 4420
    TOO_SLOW = 4421
    HEARTBEAT_TIMEOUT = 4422


class Parted:
    """A payload whose large `bytes` are there already as the object that they stand for.

    Attributes:
        rest: The payload with payload.py's `PLACEHOLDER` for them.
        large: They.
    """

    __slots__ = ("large", "rest")

    def __init__(self, rest: bytes | memoryview, large: bytes) -> None:
        self.rest = rest
        self.large = large

    def __len__(self) -> int:
        # As long as it came, which credit is counted by: five bytes said the length of `large`, and
        # three hold its place.
        return len(self.rest) + len(self.large) + 2


Payload = bytes | memoryview | Parted
"""MessagePack, not decoded yet."""

Frame = tuple[int, int, int, Payload]
"""A frame that was received: type, flags, correlation id (0 for none), payload.

A plain tuple, because an object with names takes four times as long to make, which is a twentieth
of a call. The payload is MessagePack, not decoded yet; a memoryview is valid only until the next
frame of the same connection is read, and a `Parted` has its large `bytes` apart.
"""

ACCEPTED_FLAGS: Final[dict[int, tuple[int, ...]]] = {
    FrameType.MESSAGE: (
        SEQUENCED,
        SEQUENCED | COMPRESSED,
        SEQUENCED | REPLY,
        SEQUENCED | REPLY | COMPRESSED,
        PRIORITY,
        PRIORITY | COMPRESSED,
    ),
    FrameType.RPC_REQUEST: (SEQUENCED, SEQUENCED | COMPRESSED),
    FrameType.RPC_RESPONSE: (SEQUENCED, SEQUENCED | COMPRESSED),
    FrameType.RPC_ERROR: (SEQUENCED, SEQUENCED | COMPRESSED),
    FrameType.HEARTBEAT_PING: (0, PRIORITY),
    FrameType.HEARTBEAT_PONG: (0,),
    FrameType.AUTH_REQUEST: (0,),
    FrameType.AUTH_SUCCESS: (0,),
    FrameType.AUTH_FAILURE: (0,),
    FrameType.AUTH_CHALLENGE: (0,),
    FrameType.AUTH_RESPONSE: (0,),
    FrameType.ACK: (0,),
    FrameType.CANCEL: (SEQUENCED,),
    FrameType.STREAM_ITEM: (SEQUENCED, SEQUENCED | COMPRESSED),
    FrameType.STREAM_END: (SEQUENCED,),
    FrameType.STREAM_CREDIT: (SEQUENCED,),
    FrameType.GOAWAY: (0,),
    FrameType.CLOSE: (0,),
}
"""Type -> every combination of flags that a sender may put on it."""

_MAGIC_NUMBER: Final = int.from_bytes(MAGIC, "big")
_TLS = (b"\x15\x03", b"\x16\x03")
"""How the alerts and handshakes of TLS begin."""
_HTTP = (b"GET ", b"PUT ", b"POST", b"HEAD", b"OPTI", b"CONN", b"PRI ", b"HTTP")


def word(type: int, flags: int = 0) -> int:
    """Return the first eight bytes of a header as one number."""
    return _MAGIC_NUMBER << 32 | VERSION << 24 | type << 16 | flags


def type_name(type: int) -> str:
    """Return the name of a frame type for people, also of one that is unknown."""
    try:
        return FrameType(type).name
    except ValueError:
        return f"type {type}"


class NotConduit(ProtocolError):
    """The bytes are not CNDT at all, so whoever sent them gets no answer."""


class OtherVersion(ProtocolError):
    """The peer speaks another version of the protocol."""


def not_conduit(begin: bytes) -> NotConduit:
    """Return the error for bytes that do not begin with the magic but with these four or fewer."""
    guess = "does the peer speak CNDT?"
    if begin.startswith(_TLS):
        guess = "they look like TLS, which the peer uses and this side does not"
    elif begin in _HTTP:
        guess = "they look like HTTP"
    return NotConduit(f"the bytes that came are not a conduit frame; {guess}")


def tolerate(received: int, accepted: Container[int], expected: str, *, login: bool) -> int:
    """Deal with a word that is not accepted as it stands.

    The high byte of the flags is for extensions that a receiver may ignore, and so are the types
    from 128 on, once the login is done. Everything else is an error.

    Args:
        received: The word.
        accepted: The words that may come.
        expected: The same for people, for the error's text.
        login: Whether the login is still under way.

    Returns:
        The accepted word without the flags that are to be ignored, or 0 to ignore the whole frame.

    Raises:
        NotConduit: The magic is wrong.
        OtherVersion: The version is not 1.
        ProtocolError: The type or a flag is unknown, or not allowed here.
    """
    if received >> 32 != _MAGIC_NUMBER:
        raise not_conduit((received >> 32).to_bytes(4, "big"))
    version, type, flags = received >> 24 & 0xFF, received >> 16 & 0xFF, received & 0xFF
    if version != VERSION:
        raise OtherVersion(
            f"the peer speaks protocol version {version}, this side speaks version {VERSION}"
        )
    if type >= 128 and not login:
        if flags:
            raise ProtocolError(f"flags 0x{flags:02x} are not allowed on frame type {type}")
        return 0
    if word(type, flags) in accepted:
        return word(type, flags)
    if type not in ACCEPTED_FLAGS:
        raise ProtocolError(f"unknown frame type {type}")
    if flags not in ACCEPTED_FLAGS[type]:
        raise ProtocolError(f"flags 0x{flags:02x} are not allowed on {type_name(type)}")
    raise ProtocolError(f"{type_name(type)} came where {expected} was expected")
