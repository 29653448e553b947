"""What a target makes of the bytes of one input: choices, numbers, texts and MessagePack.

atheris has a reader of its own; this one needs no atheris, so that the corpus means the same to
plain pytest on every Python. It reads from front to back, and behind the end everything is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from msgpack import packb

T = TypeVar("T")

NUMBERS: Final = (0, 1, 2, 3, 127, 128, 255, 256, 2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
"""Numbers at which something ends."""
WORDS: Final = tuple(
    "scram caps mech v agent session hb server name version identity id epoch code message retry "
    "retry_after mechs frame_max feat calls window ttl stream zlib resume busy invalid_credentials "
    "unsupported_version unsupported_mechanism default SCRAM-SHA-256 SCRAM-SHA-256-PLUS ANONYMOUS "
    "headers key deadline retryable executed error_id details".split()
)
"""Texts that mean something somewhere."""
DEPTH: Final = 5


class Source:
    """Reads an input.

    Attributes:
        left: Bytes that were not read yet.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    @property
    def left(self) -> int:
        return self._size - self._at

    def byte(self) -> int:
        """Return a number below 256."""
        at = self._at
        if at >= self._size:
            return 0
        self._at = at + 1
        return self._data[at]

    def below(self, limit: int) -> int:
        """Return a number below `limit`, which is at most 256."""
        return self.byte() % limit

    def choose(self, choices: Sequence[T]) -> T:
        """Return one of up to 256 choices."""
        return choices[self.byte() % len(choices)]

    def seldom(self) -> bool:
        """Return True for one byte in 16, and False at the end."""
        return self.byte() & 15 == 15

    def number(self, size: int = 8) -> int:
        """Return a number of up to `size` bytes, often one at which something ends."""
        kind = self.byte()
        if kind < 224:
            return NUMBERS[kind % len(NUMBERS)] & (1 << 8 * size) - 1
        return int.from_bytes(self.take(size), "big")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, or what is left of them."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def short(self) -> bytes:
        """Return up to 255 bytes."""
        return self.take(self.byte())

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(self.left)

    def text(self) -> str:
        """Return a known word or any text; also one with lone surrogates."""
        kind = self.byte()
        if kind < 192:
            return WORDS[kind % len(WORDS)]
        return self.short().decode("utf-8", "surrogateescape")

    def changed(self, right: bytes) -> bytes:
        """Return what was right with a few bytes changed, or, mostly, as it was."""
        if not self.seldom() or not right:
            return right
        start = self.number(2) % (len(right) + 1)
        return right[:start] + self.short() + right[start + self.byte() :]

    def value(self, depth: int = DEPTH) -> Any:
        """Return plain data."""
        kind = self.below(9 if depth else 7)
        if kind == 0:
            return None
        if kind == 1:
            return self.number()
        if kind == 2:
            return -self.number(7)
        if kind == 3:
            return self.text().encode("utf-8", "replace").decode()
        if kind == 4:
            return self.short()
        if kind == 5:
            return bool(self.byte() & 1)
        if kind == 6:
            return self.choose((0.0, -1.5, float("inf"), float("nan"), 1e308))
        if kind == 7:
            return [self.value(depth - 1) for _ in range(self.below(6))]
        texts = [self.text() for _ in range(self.below(6))]
        return {text.encode("utf-8", "replace").decode(): self.value(depth - 1) for text in texts}

    def packed(self) -> bytes:
        """Return MessagePack, sometimes damaged."""
        packed: bytes = packb(self.value())
        return self.changed(packed)

    def cut(self, data: bytes) -> list[bytes]:
        """Return the data in pieces, as they may come from a link."""
        kind = self.below(4)
        if kind == 0:
            return [data]
        if kind == 1:
            size = max(1 + self.byte() % 64, len(data) // 64)  # in few pieces: each has its price
            return [data[at : at + size] for at in range(0, len(data), size)]
        places = sorted({0, len(data), *(self.number(2) % (len(data) + 1) for _ in range(kind))})
        return [data[a:b] for a, b in zip(places, places[1:], strict=False)]
