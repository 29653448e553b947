"""What a random program is made of: calls, what both ends of them do, and what came of it."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from conduit.exceptions import RPCError
from conduit.transport.requests import DEFAULT, Default
from tests.transport.pair import Side

Kind = Literal[
    "call", "brief", "thread", "inline", "request", "ack", "aside", "send", "note in a thread",
    "give", "take", "both", "feed",
]  # fmt: skip
STREAMS = ("give", "take", "both", "feed")
METHODS = ("call", "brief", "thread", "inline", *STREAMS)
MESSAGES = ("request", "ack", "aside", "send", "note in a thread")
BRIEF = 2.0
"""Seconds that the handler of a brief call allows itself."""
USUAL = 30.0
"""Seconds that a unary call has by default."""
ROUNDING = 0.001
"""Seconds by which whole milliseconds on the wire may bring a deadline forward."""
SILENCE = 60.0
"""Seconds behind which a peer may be declared dead: a timeout of 90, less an interval of 30."""


class Spec(NamedTuple):
    """What a call does.

    Attributes:
        kind: How it is called, and what handles it.
        plan: What the handler does, step by step; see `World.step`.
        timeout: Seconds, or None; `DEFAULT` for what is usual.
        size: Bytes of ballast in the arguments and in each item.
        source: What the caller's items do: steps as in a plan.
        consumer: What the caller does with the items, and after how many of them.
    """

    kind: Kind
    plan: tuple[Any, ...] = ()
    timeout: float | None | Default = DEFAULT
    size: int = 0
    source: tuple[Any, ...] = (("give", 3),)
    consumer: tuple[str, int] = ("all", 0)


class FailedOnPurpose(RPCError):
    """What a handler raises on purpose."""

    number: int

    def __init__(self, number: int) -> None:
        super().__init__("on purpose")
        self.number = number


class SourceFailed(Exception):
    """What the caller's items raise on purpose."""


class LeftByError(Exception):
    """What is raised in a block around a stream on purpose."""


class Call:
    """One call, as its caller and its handler have seen it.

    Attributes:
        deadline: The earliest time at which a timeout is right.
        latest: The time by which there must be an outcome.
        outcome: What the caller got; None until it has.
        cancelled: Whether the test has cancelled the caller.
        leaving: Whether the caller has given up by itself.
        begun, ended: How often the handler was started, and has ended.
        stubborn: Whether the handler has been cancelled and does not go yet.
        given, taken: Items that the handler has sent and got.
        sent: Items that the caller has sent.
        seen: Items that the caller has got.
    """

    def __init__(self, number: int, side: Side, spec: Spec, parent: Call | None) -> None:
        self.number = number
        self.side = side
        self.spec = spec
        self.parent = parent
        self.detached = False
        self.deadline = self.latest = math.inf
        self.outcome: str | None = None
        self.cancelled = False
        self.leaving = False
        self.begun = self.ended = 0
        self.stubborn = False
        self.given = self.taken = self.sent = self.seen = 0
        self.source_open = 0

    @property
    def fails(self) -> str | None:
        """How the handler ends if it comes to the end of its plan: "raise", "bug" or neither."""
        return next((step[0] for step in self.spec.plan if step[0] in ("raise", "bug")), None)

    @property
    def holds_up(self) -> bool:
        """Whether the handler of a message waits for this call, or is that of this call."""
        if self.spec.kind in MESSAGES:
            return True
        return self.parent is not None and not self.detached and self.parent.holds_up

    @property
    def source_fails(self) -> bool:
        return ("raise",) in self.spec.source

    @property
    def given_up(self) -> bool:
        return self.cancelled or self.leaving or self.outcome is not None

    def __repr__(self) -> str:
        return f"call {self.number} of the {self.side.connection.address}: {self.spec}"
