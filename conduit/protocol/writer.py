"""The writing half of a CNDT peer: frames are numbered, collected, and taken out to be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .frames import COMPRESSED, HEADER
from .payload import COMPRESS_MOST, deflate
from .session import Session

__all__ = ["LARGE_FRAME", "FrameWriter"]

COMPRESS_LEAST: Final = 1024
LARGE_FRAME: Final = 16 * 1024
"""Bytes of a payload that is worth a write of its own, so that what is queued stays small."""

_pack: Final = HEADER.pack


class FrameWriter:
    """Collects frames until they are written.

    Args:
        clock: Returns Unix time in milliseconds, for the headers.

    Attributes:
        session: Numbers the frames, and keeps them until they are acknowledged.
        due: Queued sequenced frames from which `on_due` is called for each; 0 to write the next one
            at once, as it is before a large one.
        on_due: Called when a write is due.
        compresses: Whether payloads are compressed when that makes them smaller.
        holds: Whether sequenced frames are kept back, because the login is not done.
        urgent: Frames that are written ahead of those that are sequenced.
        farewell: A frame that goes out behind all others, and nothing after it.
        ended: Whether the farewell has gone out.
    """

    __slots__ = (
        "_clock",
        "_out",
        "_sealed",
        "_stamp",
        "compresses",
        "due",
        "ended",
        "farewell",
        "holds",
        "on_due",
        "session",
        "urgent",
    )

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._stamp = 0
        self.urgent: list[bytes] = []
        self._sealed: list[bytes] | None = None
        self._out: list[bytes] = []
        self.due = 1
        self.on_due: Callable[[], None] = lambda: None
        self.compresses = False
        self.farewell = b""
        self.ended = False
        self.holds = False
        self.session = Session()

    @property
    def corked(self) -> int:
        """Frames that wait for `take`."""
        return len(self._out) + len(self.urgent) + len(self._sealed or ()) + bool(self.farewell)

    def send(self, word: int, id: int, payload: bytes) -> None:
        """Queue a sequenced frame; `on_due` hears when it is time to write.

        Args:
            word: Type and flags, from `frames.word`; the flags contain SEQUENCED.
            id: The correlation id.
            payload: MessagePack.
        """
        size = len(payload)
        if size >= COMPRESS_LEAST:
            word, payload = self._prepare(word, payload)
            size = len(payload)
        session, out = self.session, self._out
        session.sent = number = session.sent + 1
        if not out:
            self._stamp = self._clock()
        out.append(_pack(word, size, id, self._stamp, number & 0xFFFFFFFF) + payload)
        if len(out) >= self.due:
            self.on_due()

    def _prepare(self, word: int, payload: bytes) -> tuple[int, bytes]:
        """Compress a payload if that helps, and have a large one written at once."""
        if self.compresses and len(payload) <= COMPRESS_MOST:
            smaller = deflate(payload)
            if len(smaller) < len(payload):
                word, payload = word | COMPRESSED, smaller
        if len(payload) >= LARGE_FRAME:
            self.due = 0
        return word, payload

    def send_split(self, word: int, id: int, head: bytes, large: bytes, end: bytes = b"") -> None:
        """Queue a sequenced frame whose payload is these three; the large one is not copied."""
        session = self.session
        session.sent = number = session.sent + 1
        size = len(head) + len(large) + len(end)
        header = HEADER.pack(word, size, id, self._clock(), number & 0xFFFFFFFF)
        if self._sealed is None:
            self._sealed = []
        self._sealed.append(b"".join((*self._out, header, head)))
        self._sealed.append(large)
        if end:
            self._sealed.append(end)
        self._out.clear()

    def send_urgent(self, word: int, id: int, payload: bytes = b"") -> None:
        """Queue a frame that is not sequenced, ahead of those that are."""
        self.push(HEADER.pack(word, len(payload), id, self._clock(), 0) + payload)

    def push(self, frame: bytes) -> None:
        """Queue an encoded frame that is not sequenced, ahead of those that are."""
        self.urgent.append(frame)

    def take(self) -> list[bytes]:
        """Return what is to be written now, in order; its sequenced part enters the outbox.

        What is sequenced waits until the login is done.
        """
        chunks: list[bytes] = []
        if self.ended:
            self.drop()
            self.urgent.clear()
            return chunks
        out = self._out
        if self._sealed and not self.holds:
            chunks, self._sealed = self._sealed, None
            if out:
                chunks.append(b"".join(out))
                out.clear()
            self.session.keep(chunks, sum(map(len, chunks)))
        elif out and not self.holds:
            data = b"".join(out)
            chunks.append(data)
            out.clear()
            self.session.keep(chunks, len(data))
        if self.urgent:
            chunks = [b"".join(self.urgent), *chunks]
            self.urgent.clear()
        if self.farewell:
            chunks = [*chunks, self.farewell]
            self.farewell = b""
            self.ended = True
        return chunks

    def drop(self) -> None:
        """Forget the sequenced frames that were kept back."""
        self._out.clear()
        self._sealed = None
