"""What a connection reads: batches of frames, each handled as a whole and answered by one write.

    link -> Inlet.receive -> CNDT.receive -> Calls, Serving or Messages -> Outlet

The other half is `outlet.py`. What is seldom goes up to the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from ..exceptions import ProtocolError, RPCError
from ..protocol.cndt import State
from ..protocol.events import Event
from ..protocol.frames import REPLY, CloseCode, FrameType, Payload
from .calls import Calls
from .inbox import Inbox
from .loop import Shared
from .outlet import Outlet
from .pulse import Pulse
from .serving import Serving
from .wire_log import WireLog

__all__ = ["Head", "Inlet"]

_RESPONSE: Final = int(FrameType.RPC_RESPONSE)
_REQUEST: Final = int(FrameType.RPC_REQUEST)
_MESSAGE: Final = int(FrameType.MESSAGE)


class Head(Protocol):
    """The connection that an inlet belongs to."""

    def happened(self, event: Event) -> None:
        """Take what is no frame of a call or a message."""

    def rarer(self, type: int, id: int, payload: Payload) -> bool:
        """Take the frames that are seldom; True when a caller can go on."""
        ...

    def fail(self, error: Exception, code: int, reason: str) -> None:
        """End: the peer has broken the rules."""

    def swollen(self) -> None:
        """Know that much more waits than before the batch."""


class Inlet:
    """The reading half of a connection.

    Args:
        loop: The event loop.
        head: The connection.
        shared: The state of the loop.
        outlet: The writing half.
        pulse: Is told that bytes have come.
        calls: Takes answers.
        serving: Takes requests.
        inbox: Takes messages.

    Attributes:
        watch: Logs what comes in, when somebody has asked for that.
    """

    __slots__ = (
        "_calls",
        "_goes_on",
        "_head",
        "_inbox",
        "_loop",
        "_outlet",
        "_protocol",
        "_pulse",
        "_serving",
        "_shared",
        "_unacknowledged",
        "watch",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        head: Head,
        shared: Shared,
        outlet: Outlet,
        pulse: Pulse,
        calls: Calls,
        serving: Serving,
        inbox: Inbox,
    ) -> None:
        self._loop = loop
        self._head: Any = head
        self._shared = shared
        self._protocol = outlet.protocol
        self._outlet = outlet
        self._pulse = pulse
        self._calls = calls
        self._serving = serving
        self._inbox = inbox
        self._unacknowledged = False
        self._goes_on = False
        self.watch: WireLog | None = None

    # What the link calls.

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer: handle all that they complete, then write once.

        As long as `protocol.large` is there, what comes next is to be read to `buffer()`, and told
        to `buffer_filled`.
        """
        self._pulse.heard = True
        if self.watch is not None:
            self.watch.received(data)
        protocol = self._protocol
        self._handle(protocol.receive(data))
        if protocol.ack_due and not self._unacknowledged:
            self._acknowledge_later()
        if protocol.grew:
            self._swell()

    def buffer(self) -> memoryview:
        """Return where the rest of the large frame that is under way is to be read to."""
        buffer = self._protocol.buffer()
        assert buffer is not None
        return buffer

    def buffer_filled(self, count: int) -> None:
        """Take bytes that were read to `buffer()`; see `receive`."""
        self._pulse.heard = True
        if self.watch is not None:
            self.watch.received(bytes((self._protocol.buffer() or b"")[:count]))
        events = self._protocol.buffer_filled(count)
        if events:
            self._handle(events)
            payload = events[0][3] if type(events[0]) is tuple else None
            if isinstance(payload, memoryview) and isinstance(payload.obj, bytearray):
                self._shared.recycle(memoryview(payload.obj))
        if self._protocol.ack_due and not self._unacknowledged:
            self._acknowledge_later()
        if self._protocol.grew:
            self._swell()

    def _swell(self) -> None:
        self._head.swollen()
        if self._protocol.more and not self._goes_on:
            # The others come first. Until then nothing is read, or what waits would grow.
            self._goes_on = True
            self._outlet.hold(True)
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Handle more of what has come."""
        self._goes_on = False
        protocol = self._protocol
        if protocol.more and self._head is not None:
            protocol.more = False  # also if it has ended, and takes nothing any more
            self.receive(b"")
        if not protocol.more:
            self._outlet.hold(False)

    # What the connection and the timers call.

    def acknowledge(self) -> None:
        """Tell the peer what has arrived, if no other ACK did so in the meantime."""
        self._unacknowledged = False
        self._outlet.head.grown()
        protocol = self._protocol
        if protocol.session.reported != protocol.session.received and protocol.state is State.OPEN:
            protocol.acknowledge()
            self._outlet.flush_soon()

    def forget(self) -> None:
        """Let go of the connection: it has ended."""
        self._head = None
        if self._unacknowledged:
            self._shared.acknowledge_never(self)

    def _acknowledge_later(self) -> None:
        self._unacknowledged = True
        self._shared.acknowledge_later(self)

    def _handle(self, events: list[Event]) -> None:
        outlet, calls, serving = self._outlet, self._calls, self._serving
        handling = serving.handling
        flushes, resolved, entered = outlet.cork(), False, False
        try:
            for event in events:
                if type(event) is not tuple:
                    self._head.happened(event)
                    continue
                kind, flags, id, payload = event
                if kind == _RESPONSE:
                    if calls.answered(id, payload):
                        resolved = True
                    continue
                if outlet.closed is not None:
                    break  # closed by a handler of this batch: nobody would get the answers
                if not entered:
                    entered = True
                    handling.enter(serving)
                if kind == _REQUEST:
                    serving.request(id, payload)
                elif kind == _MESSAGE:
                    if flags & REPLY and id:
                        resolved |= calls.replied(id, payload)
                    else:
                        self._inbox.receive(flags, id, payload)
                else:
                    resolved |= self._head.rarer(kind, id, payload)
        except ProtocolError as exc:
            self._head.fail(exc, exc.close_code, str(exc))
        except RPCError as exc:
            self._head.fail(exc, CloseCode.BAD_PAYLOAD, str(exc))
        finally:
            if entered:
                handling.leave()
            if resolved:
                self._write_with_callers(len(events))
            elif flushes:
                outlet.flush()

    def _write_with_callers(self, events: int) -> None:
        """Write together with what the callers send next whose answers have just come.

        They are ready to run, so that takes no further turn of the loop.
        """
        outlet = self._outlet
        share = self._calls.share(events) if events > 1 else 0
        if share:
            outlet.flush_frames = outlet.protocol.due = share
            self._loop.call_soon(outlet.flush)
        else:  # there is too little to be put together, so what comes next is written at once
            if outlet.protocol.urgent or (events > 1 and outlet.protocol.corked):
                outlet.flush()
            outlet.protocol.due = 0
