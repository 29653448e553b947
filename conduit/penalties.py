"""Addresses that are refused for a while, because too much went wrong with what came from them.

The scheme is that of OpenSSH 9.8 (PerSourcePenalties): each failure adds seconds to the time until
which an address is remembered. Once that is far enough ahead, the address is refused until then.
No clock: whoever asks tells the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Penalties"]


class _Penalty(NamedTuple):
    """What an address has earned: until when it is remembered, and whether it is refused."""

    ends: float
    refused: bool


class Penalties:
    """The penalties of all addresses.

    Args:
        threshold: Seconds from which an address is refused. Parts of a second count as a whole one,
            so that failures in quick succession add up to what they are worth.
        longest: Seconds that an address can have at the most.
        most: Addresses that are remembered; the one that was not heard of for longest is forgotten.
    """

    def __init__(
        self, *, threshold: float = 15.0, longest: float = 600.0, most: int = 65_536
    ) -> None:
        self._threshold = threshold
        self._longest = longest
        self._most = most
        self._table: dict[bytes, _Penalty] = {}

    def __len__(self) -> int:
        return len(self._table)

    def add(self, source: bytes, seconds: float, now: float) -> float:
        """Add to the penalty of an address.

        Args:
            source: The address.
            seconds: What the failure is worth.
            now: The time, on a clock that never goes back.

        Returns:
            The seconds for which it is refused if it was not before, else 0.
        """
        before = self._table.pop(source, None)
        if before is None or before.ends <= now:
            before = _Penalty(now, False)
        ends = min(before.ends + seconds, now + self._longest)
        left = round(ends - now, 6)  # sums of floats may be a hair above a whole second
        refused = before.refused or math.ceil(left) >= self._threshold
        self._table[source] = _Penalty(ends, refused)
        if len(self._table) > self._most:
            del self._table[next(iter(self._table))]
        return ends - now if refused and not before.refused else 0.0

    def refuses(self, source: bytes, now: float) -> bool:
        """Whether an address is refused now."""
        penalty = self._table.pop(source, None)
        if penalty is None or penalty.ends <= now:
            return False
        self._table[source] = penalty  # behind those that were heard of before
        return penalty.refused
