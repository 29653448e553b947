"""Whether a call that failed is made again, and when.

Nothing here waits or knows a connection: the time and the randomness are handed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from ..exceptions import ConnectionClosed, ConnectionLost, Overloaded, RPCError, Unavailable

__all__ = ["Attempts", "Budget", "Retry"]

LEAST = 0.001
"""Seconds that an attempt has at least."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often a call is made that fails for a reason which may pass, and with which pauses.

        await client.rpc.call("add", [1, 2], retry=Retry())
        calculator = options(client.rpc.bind(Calculator), retry=Retry(attempts=5))

    A call that surely did not run is made again; any other only if it is idempotent. All attempts
    and pauses lie within the timeout of the call. A pause is random, from nothing to `pause` before
    the second attempt and to twice as much before each further one; where the peer has said
    `retry_after`, that comes first.

    Attributes:
        attempts: The most that are made, the first one included.
        pause: Seconds that the first pause has at most.
        longest_pause: Seconds that no pause exceeds, but for what the peer has asked for.
        idempotent: The call may run twice. Methods marked `@idempotent` need not say it.

    Raises:
        ValueError: A number does not fit.
    """

    attempts: int = 3
    pause: float = 0.1
    longest_pause: float = 5.0
    idempotent: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"attempts must be a whole number from 1 on, not {self.attempts!r}")
        if not 0 <= self.pause <= self.longest_pause < math.inf:
            raise ValueError(
                "pause must be seconds from 0 to longest_pause, not "
                f"{self.pause!r} of {self.longest_pause!r}"
            )

    def grown(self, failures: int) -> float:
        """Return how long the pause behind so many failures may be."""
        return min(self.longest_pause, self.pause * 2.0 ** min(failures - 1, 64))


class Budget:
    """Keeps a peer that is in trouble from being called much more often because of it.

    Whatever the peer answers costs a token when it may pass, and returns a tenth of one when it is
    a result. At half of the tokens nothing is tried again. So of many calls that fail, few are made
    twice: about one for every ten that succeed. gRPC does the same (its proposal A6).
    """

    __slots__ = ("_tenths",)

    FULL = 100
    """Tenths of a token. They are counted because they add up without rounding."""

    def __init__(self) -> None:
        self._tenths = self.FULL

    @property
    def tokens(self) -> float:
        """How many are left, 10 at most."""
        return self._tenths / 10

    def spend(self) -> bool:
        """Pay for a failure; False when the call must not be made again."""
        self._tenths = max(0, self._tenths - 10)
        return self._tenths > self.FULL // 2

    def earn(self) -> None:
        """Take what a result returns."""
        self._tenths = min(self.FULL, self._tenths + 1)


class Attempts:
    """The attempts at one call.

    Args:
        retry: How they are to be made.
        idempotent: Whether the method is marked, whatever `retry` says.
        budget: What all calls to one peer share.
        deadline: When the time of the call is up, by the clock that `now` is read from below;
            infinity for no deadline.
        chance: Returns a random number from 0 to 1.

    Raises:
        TypeError: `retry` is none.
    """

    __slots__ = ("_budget", "_chance", "_deadline", "_failures", "_idempotent", "_retry")

    def __init__(
        self,
        retry: Retry,
        budget: Budget,
        *,
        idempotent: bool = False,
        deadline: float = math.inf,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if not isinstance(retry, Retry):
            raise TypeError(f"retry must be a Retry(...), not {retry!r}")
        self._retry = retry
        self._budget = budget
        self._idempotent = idempotent or retry.idempotent
        self._deadline = deadline
        self._chance = chance
        self._failures = 0

    def left(self, now: float) -> float | None:
        """Return the seconds for an attempt that begins now; None for no deadline."""
        if self._deadline == math.inf:
            return None
        # Whole milliseconds are what travels, and what an error shows.
        return max(LEAST, round(self._deadline - now, 3))

    def failed(self, error: Exception, now: float) -> float | None:
        """Return the seconds of pause before the next attempt, or None if there is to be none."""
        if not _may_pass(error):
            return None
        self._failures += 1
        # What a lost connection takes with it waits for the next one, whose making has pauses of
        # its own. Otherwise one loss would use up the budget, and most calls would stay undone.
        affordable = isinstance(error, ConnectionClosed) or self._budget.spend()
        if not affordable or self._failures >= self._retry.attempts:
            return None
        if not self._idempotent and not _surely_not_executed(error):
            return None
        pause = _asked_for(error) + self._chance() * self._retry.grown(self._failures)
        return pause if self._deadline - now - pause >= LEAST else None

    def succeeded(self) -> None:
        """Tell that there is a result."""
        self._budget.earn()


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later; what the error itself says of that counts."""
    if isinstance(error, RPCError):
        passing = isinstance(error, (Overloaded, Unavailable)) or error.retryable
        return bool(error.details.get("retryable", passing))
    return isinstance(error, ConnectionClosed)


def _surely_not_executed(error: Exception) -> bool:
    if isinstance(error, RPCError):
        return error.details.get("executed") is False
    if isinstance(error, ConnectionLost):
        return error.executed is False
    return isinstance(error, ConnectionClosed)


def _asked_for(error: Exception) -> float:
    """Return the pause that the peer asks for; it may have sent any number, NaN among them."""
    seconds = error.retry_after if isinstance(error, RPCError) else None
    return seconds if seconds is not None and seconds > 0 else 0.0
