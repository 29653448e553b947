"""Which call a handler handles: found by whoever asks from inside the handler, and not before.

A handler is told apart by its task, and nothing is made for a call until somebody wants to know of
it: the handler itself, or a call that it makes and that ends with it.

A context variable for each call would be shorter. But it would reach the tasks that a handler
leaves behind, whose calls would then end with a deadline that is not theirs, and it would cost each
call what only some need. So a context variable says no more than that a handler runs. Which one,
says the event loop: the one whose first step it runs now, or else the one that the current task
carries on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextvars import ContextVar
from time import monotonic
from typing import Any, Protocol, TypeVar

from ..exceptions import RPCError, RPCTimeout

__all__ = [
    "HANDLING",
    "Handled",
    "Handling",
    "PartOf",
    "current",
    "inherit",
    "no_deadline",
    "work_for",
]

T = TypeVar("T")


class Handled:
    """A call, or a message, that is being handled.

    Attributes:
        connection: Whose.
        name: Of the method or the message.
        deadline: When its time is up, by `time.monotonic`; None for no deadline.
        headers: What the caller sent beside the parameters.
        key: The idempotency key of the call, or None.
        response_headers: What goes back beside the result; None as long as nobody has asked.
        state: What the application keeps for it; None as long as nobody has asked.
        stopped: Why nobody waits for it any more, if that is so.
        unbounded: How many `no_deadline` blocks the handler is in.
    """

    __slots__ = (
        "connection",
        "deadline",
        "headers",
        "key",
        "name",
        "response_headers",
        "state",
        "stopped",
        "unbounded",
    )

    def __init__(
        self,
        connection: Any,
        name: str,
        deadline: float | None = None,
        headers: Mapping[str, Any] | None = None,
        stopped: RPCError | None = None,
        *,
        key: str | None = None,
    ) -> None:
        self.connection = connection
        self.name = name
        self.deadline = deadline
        self.headers: Mapping[str, Any] = {} if headers is None else headers
        self.response_headers: dict[str, Any] | None = None
        self.state: dict[str, Any] | None = None
        self.stopped = stopped
        self.unbounded = 0
        self.key = key


class Source(Protocol):
    """What `Handling` needs of the calls of one connection."""

    def handled(self, call: Any) -> Handled:
        """Return what is known of a call whose first step runs."""
        ...


class Entry(Protocol):
    """What `Handling` needs of a handler that was suspended."""

    @property
    def handled(self) -> Handled: ...
    def tell(self, reason: RPCError) -> None: ...


class Handling:
    """The handlers that run on one event loop.

    Attributes:
        call: Whose first step runs now, in the words of `source`, or as `Handled` when somebody
            has asked. None between the batches of frames.
        source: Who knows more of `call`.
        suspended: The handlers that were suspended, by their tasks, and those in threads.
        arrived: When the batch of frames came that is being handled, by `time.monotonic`, which
            goes on while handlers run. uvloop's clock stands still for that long.
        started: The same by the clock of the loop.
    """

    __slots__ = ("_loop", "arrived", "call", "source", "started", "suspended")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.call: Any = None
        self.source: Source | None = None
        self.suspended: dict[asyncio.Future[Any], Entry] = {}
        self.arrived = self.started = 0.0

    def enter(self, source: Source) -> None:
        """Begin to handle a batch of frames of one connection.

        To be called where only handlers start: the context is marked for good.
        """
        if HANDLING.get() is not self:
            HANDLING.set(self)
        self.source = source
        self.arrived, self.started = monotonic(), self._loop.time()

    def leave(self) -> None:
        """End it."""
        self.call = self.source = None

    def running(self) -> str | None:
        """Return the name of the handler whose step runs now, for another thread that asks."""
        call = self.call
        if call is not None:
            return str(call[0] if type(call) is list else call.name)
        task = asyncio.current_task(self._loop)
        entry = self.suspended.get(task) if task is not None else None
        return entry.handled.name if entry is not None else None

    def handled(self) -> Handled | None:
        """Return the call whose handler asks; None for any other task, and any other thread."""
        try:
            if asyncio.get_running_loop() is not self._loop:
                return None
        except RuntimeError:
            return None
        call = self.call
        if call is None:
            task = asyncio.current_task()
            found = None if task is None else self.suspended.get(task)
            return None if found is None else found.handled
        if type(call) is Handled:
            return call
        assert self.source is not None
        self.call = made = self.source.handled(call)
        return made


class PartOf:
    """A thread that runs a handler, or a task that works for one which waits for it.

    Args:
        handled: What the handler handles.
        task: The task; None for a thread. What either of them starts does not count.
    """

    __slots__ = ("_handled", "_task")

    def __init__(self, handled: Handled, task: asyncio.Task[Any] | None = None) -> None:
        self._handled = handled
        self._task = task

    def handled(self) -> Handled | None:
        """Return the call whose handler asks."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        return self._handled if task is self._task else None

    def run(self, function: Callable[[], T]) -> T:
        """Run the handler in its thread."""
        HANDLING.set(self)
        return function()


HANDLING: ContextVar[Handling | PartOf | None] = ContextVar("conduit_handling", default=None)
"""Set while a handler runs, and in all that it starts: whoever serves a call must not wait in line
for a call of its own. Its `handled` tells the handler from what it has started."""


def current() -> Handled | None:
    """Return what the handler that asks handles; None outside of a handler."""
    handling = HANDLING.get()
    return None if handling is None else handling.handled()


async def work_for(handled: Handled | None, function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run an async function in a task of its own as a part of a handler that waits for it."""
    if handled is not None:
        HANDLING.set(PartOf(handled, asyncio.current_task()))
    return await function(*args)


def inherit(handling: Handling | PartOf, seconds: float | None) -> float | None:
    """Return how long a call may take that is made where `handling` is set.

    Args:
        handling: What `HANDLING` says.
        seconds: What the caller allows.

    Raises:
        RPCTimeout: The time of the handler that calls is up.
    """
    handled = handling.handled()
    if handled is None or handled.deadline is None or handled.unbounded:
        return seconds
    left = handled.deadline - monotonic()
    # The loop's clock, which stops handlers, may be some milliseconds ahead of this one.
    if left <= 0 or isinstance(handled.stopped, RPCTimeout):
        raise RPCTimeout(
            f"the time of {handled.name!r} is up, and so it can call nobody",
            details={"executed": False},
        )
    # Whole milliseconds are what travels, and what an error shows.
    return seconds if seconds is not None and seconds <= left else max(0.001, round(left, 3))


@contextlib.contextmanager
def no_deadline() -> Generator[None, None, None]:
    """Let the calls of a block take longer than the handler that makes them.

    Inside, a call has the deadline that its own `timeout` says, or the usual one. What a handler
    has to set right when its time is up, it does in such a block. The deadline of the handler
    itself stays: it is cancelled when that passes. Outside of a handler the block changes nothing.
    """
    handled = current()
    if handled is None:
        yield
        return
    handled.unbounded += 1
    try:
        yield
    finally:
        handled.unbounded -= 1
