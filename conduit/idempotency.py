"""Where a server keeps the answers to calls that carry an idempotency key."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol, runtime_checkable

__all__ = ["KEY_BYTES", "IdempotencyStore", "MemoryStore"]

KEY_BYTES: Final = 64
"""What a caller's key may have at most."""


@runtime_checkable
class IdempotencyStore(Protocol):
    """Keeps answers by their keys; `ServerDescriptor(idempotency=...)` takes one.

    The server asks before it runs a handler, and puts the answer in before it sends it. A store
    that raises in `get` makes the call `Unavailable`, and the handler does not run. A `put` that
    takes longer than 10 s is cancelled. That is logged, and so is a `put` that raises, and the
    answer is sent all the same.
    """

    async def get(self, key: str) -> bytes | None:
        """Return what was put under a key and has not expired, or None.

        Args:
            key: 64 hexadecimal digits: a hash of who calls, of the method and of the caller's key.
        """
        ...

    async def put(self, key: str, answer: bytes, ttl: float) -> None:
        """Keep an answer for `ttl` seconds.

        The answer to the caller waits for this. If it fails, the answer is not kept: the next call
        with the key runs again.
        """
        ...


class MemoryStore:
    """Keeps answers in the memory of this process; the oldest go when there are too many.

    Args:
        max_keys: How many answers are kept.
        max_bytes: How many bytes they may have in all. An answer that has more is not kept.
        clock: Returns the time in seconds.

    Raises:
        ValueError: A bound is below 1.
    """

    def __init__(
        self,
        *,
        max_keys: int = 10_000,
        max_bytes: int = 16 * 1024 * 1024,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if max_keys < 1 or max_bytes < 1:
            raise ValueError(
                f"max_keys and max_bytes must be 1 or more, not {max_keys} and {max_bytes}"
            )
        self._max_keys = max_keys
        self._max_bytes = max_bytes
        self._clock = clock
        self._bytes = 0
        self._kept: dict[str, tuple[float, bytes]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    async def get(self, key: str) -> bytes | None:
        """Return what was put under a key and has not expired, or None."""
        expires, answer = self._kept.get(key, (0.0, None))
        if answer is None or expires <= self._clock():
            return None
        return answer

    async def put(self, key: str, answer: bytes, ttl: float) -> None:
        """Keep an answer for `ttl` seconds, if it is not too large."""
        self._drop(key)
        if len(answer) > self._max_bytes:
            return
        now = self._clock()
        self._kept[key] = (now + ttl, answer)
        self._bytes += len(answer)
        while True:
            oldest = next(iter(self._kept))
            fits = len(self._kept) <= self._max_keys and self._bytes <= self._max_bytes
            if fits and self._kept[oldest][0] > now:
                return
            self._drop(oldest)

    def _drop(self, key: str) -> None:
        _, answer = self._kept.pop(key, (0.0, b""))
        self._bytes -= len(answer)
