"""The parts of a connection, and what concerns them all: room, weight, deadlines, their end.

What a connection does with them is in connection.py, and how it lives in life.py.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from ..exceptions import ConnectionClosed
from ..protocol.cndt import CNDT
from ..protocol.events import Event
from ..protocol.frames import Payload
from .answers import Answers
from .calls import Calls
from .inbox import Inbox
from .inlet import Inlet
from .loop import Shared, Sweep, milliseconds
from .messages import Messages
from .outlet import Outlet
from .pings import Pings
from .pulse import Pulse
from .serving import Routes, Serving
from .settings import Settings
from .streaming import Streams

__all__ = ["Parts"]


class Parts(ABC):
    """What a connection is made of.

    Args:
        shared: The state of the event loop.
        loop: The event loop.
        routes: Names to handlers.
        settings: What the owner says about each of its connections.
        first_id: The first correlation id of this side.

    Attributes:
        inlet: The reading half.
    """

    __slots__ = (
        "_answers",
        "_calls",
        "_error",
        "_inbox",
        "_loop",
        "_messages",
        "_outlet",
        "_pings",
        "_protocol",
        "_pulse",
        "_serving",
        "_settings",
        "_shared",
        "_streams",
        "_sweep",
        "inlet",
    )

    def __init__(
        self,
        shared: Shared,
        loop: asyncio.AbstractEventLoop,
        routes: Routes,
        settings: Settings,
        *,
        first_id: int,
    ) -> None:
        self._loop = loop
        self._shared = shared
        self._error: ConnectionClosed | None = None
        self._protocol = CNDT(clock=milliseconds, allocate=shared.allocate)
        self._settings = settings
        self._outlet = Outlet(
            loop,
            self._protocol,
            outbox_bytes=settings.outbox_bytes,
            head=self,
        )
        self._sweep = Sweep(loop, self)
        self._calls = Calls(
            loop,
            self._outlet,
            shared.encoder,
            shared.requests(settings.timeout),
            self._sweep,
            first_id=first_id,
            timeout=settings.timeout,
            backpressure=settings.backpressure,
        )
        window = settings.capabilities.window
        self._answers = Answers(
            self._outlet, shared.encoder, most=settings.capabilities.calls + window[0]
        )
        self._serving = Serving(
            loop,
            self,
            routes,
            self._answers,
            shared.encoder,
            shared.start,
            self._sweep,
            shared.handling,
            keyed=settings.keyed,
            limit=settings.capabilities.calls,
            limit_of_all=settings.running,
            longest=settings.longest,
            debug=settings.debug,
        )
        self._streams: Streams | None = None
        self._inbox = Inbox(
            loop, self._outlet, shared.encoder, routes, self._answers, self._serving, window=window
        )
        self._messages = Messages(
            self._outlet,
            shared.encoder,
            self._calls,
            self._inbox,
            backpressure=settings.backpressure,
        )
        self._pulse = Pulse(*settings.heartbeat)
        self.inlet = Inlet(
            loop,
            self,
            shared,
            self._outlet,
            self._pulse,
            self._calls,
            self._serving,
            self._inbox,
        )
        self._pings: Pings | None = None

    # What the inlet calls, and the buffers.

    @abstractmethod
    def rarer(self, type: int, id: int, payload: Payload) -> bool:
        """Handle the frames that are seldom; True when a caller can go on."""

    @abstractmethod
    def happened(self, event: Event) -> None:
        """Handle what is no frame: the login, the end, what the peer has acknowledged."""

    @abstractmethod
    def fail(self, error: Exception, code: int, reason: str) -> None:
        """End: the peer has broken the rules."""

    @abstractmethod
    def overflow(self, reason: str) -> None:
        """End, because too much waits in all connections and most of it here."""

    # Time and room.

    def room(self) -> None:
        """Let those go on who wait: what is sent finds room again."""
        self._answers.room()
        self._calls.room()
        self._inbox.room()
        self._messages.room()
        if self._streams is not None:
            self._streams.room()

    def grown(self) -> None:
        """Count what waits here: it has become more, or may have."""
        self._settings.buffers.count(self)

    def swollen(self) -> None:
        """Have room made before the next batch: many may come before the loop gets round to it."""
        self._protocol.grew = False
        self._settings.buffers.count(self)
        self._settings.buffers.relieve()

    def weigh(self) -> int:
        """Return the bytes that wait here, for the peer or for handlers."""
        self._outlet.set_mark()
        return sum(self._waiting())

    def _waiting(self) -> tuple[int, int]:
        """Return the bytes that have come and wait for handlers, and those that wait for the peer.

        What is unsent is in the outbox as well, but for broadcasts, and behind the end.
        """
        if self._error is not None:
            return self._inbox.held_bytes, self._outlet.unsent()
        taken, sent = self._streams.held_bytes() if self._streams is not None else (0, 0)
        taken += self._protocol.held + self._inbox.held_bytes + self._serving.queued_bytes()
        sent += self._answers.held_bytes + self._messages.reliable_bytes
        return taken, sent + max(self._protocol.session.outbox_bytes, self._outlet.unsent())

    def expire(self, now: float) -> float:
        """End what is due of calls of both directions, and return the next deadline."""
        return min(self._calls.expire(now), self._serving.expire(now))

    # The end.

    def _end_parts(self, error: ConnectionClosed, *, handle_rest: bool, abort: bool) -> None:
        """End each of them.

        Args:
            error: Why.
            handle_rest: Go on with messages that have come; see `Inbox.fail`.
            abort: Close the link at once.
        """
        self._error = error
        self._outlet.end(error, abort=abort)
        self._protocol.session.drop()
        self._protocol.forget()
        self._sweep.stop()
        self._serving.end()
        self._answers.end()
        self._inbox.fail(handle_rest=handle_rest)
        self._messages.fail(error)
        if self._streams is not None:
            self._streams.fail(error)
        self._calls.fail(error)
        if self._pings is not None:
            self._pings.fail(error)
        self.grown()

    def _untie_parts(self) -> None:
        """Take them from each other, so that they are freed without a garbage collection.

        Collections that find hundreds of ended connections stop everybody for milliseconds.
        """
        self._settings.buffers.forget(self)
        self._streams = None
        self._protocol.forget()
        self._outlet.forget()
        self.inlet.forget()
        self._serving.forget()
        self._sweep.forget()
