"""One readable line for a frame, for logs and for the debug scripts. Never shows a secret."""

from __future__ import annotations

import re
from typing import Final

from ..exceptions import ProtocolError, RPCError
from .frames import COMPRESSED, HEADER, HEADER_SIZE, MAGIC, PRIORITY, REPLY, SEQUENCED, type_name
from .payload import COMPRESS_MOST, decode, inflate

__all__ = ["FrameCutter", "describe"]

_FLAGS: Final = {
    COMPRESSED: "COMPRESSED",
    SEQUENCED: "SEQUENCED",
    PRIORITY: "PRIORITY",
    REPLY: "REPLY",
}
_SECRETS: Final = re.compile(r"\b([pvs])=[A-Za-z0-9+/]+=*")
SHOWN: Final = 500
HEX_SHOWN: Final = 256


def describe(frame: bytes) -> tuple[str, str]:
    """Return a frame as a readable line, and as hex.

    Proofs, signatures and salts of AUTH frames are masked in the line, and their whole payload is
    in the hex: whoever reads a log must not be able to start guessing the password.

    Args:
        frame: Header and payload, in whole; or bytes that are no frame.
    """
    if not frame.startswith(MAGIC) or len(frame) < HEADER_SIZE:
        return f"({len(frame)} bytes that are no frame)", _hex(frame)
    first, size, id, _, number = HEADER.unpack_from(frame)
    type, flags = first >> 16 & 0xFF, first & 0xFFFF
    name, payload = type_name(type), frame[HEADER_SIZE:]
    parts = [name]
    parts += [text for flag, text in _FLAGS.items() if flags & flag]
    parts.append(f"id={id}")
    if flags & SEQUENCED:
        parts.append(f"seq={number}")
    parts.append(f"[{HEADER_SIZE}+{size} bytes]")
    secret = name.startswith("AUTH_")
    if payload:
        text = _payload(payload, flags)
        if secret:
            text = _SECRETS.sub(r"\1=***", text)
        parts.append(text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)")
    if secret:
        return " ".join(parts), f"{frame[:HEADER_SIZE].hex()} ({size} bytes masked)"
    return " ".join(parts), _hex(frame)


def _hex(data: bytes) -> str:
    dump = data[:HEX_SHOWN].hex()
    return dump if len(data) <= HEX_SHOWN else f"{dump}... ({len(data)} bytes)"


def _payload(payload: bytes, flags: int) -> str:
    try:
        if flags & COMPRESSED:
            payload = inflate(payload, COMPRESS_MOST)
        body = decode(payload)
        if isinstance(body, dict) and isinstance(body.get("caps"), bytes):
            body["caps"] = decode(body["caps"])
        return repr(body)
    except (ProtocolError, RPCError, RecursionError) as exc:
        return f"({exc})"


class FrameCutter:
    """Cuts a stream of bytes into frames, for looking at; it checks nothing."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept = b""

    def cut(self, data: bytes) -> list[bytes]:
        """Return the frames that the data completes, and what is no frame as it came."""
        data = self._kept + data
        frames = []
        while len(data) >= HEADER_SIZE and data.startswith(MAGIC):
            size = HEADER_SIZE + HEADER.unpack_from(data)[1]
            if len(data) < size:
                break
            frames.append(data[:size])
            data = data[size:]
        if data and not MAGIC.startswith(data[:4]):
            frames.append(data)
            data = b""
        self._kept = data
        return frames
