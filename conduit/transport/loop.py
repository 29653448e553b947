"""What all connections of one event loop share: one timer, one buffer, one packer.

A connection that sits idle must cost next to nothing, so what would be a timer, a task or a buffer
of its own is here once. `Shared.of(loop)` finds it.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import ClassVar, Protocol

from ..protocol.payload import Encoder
from .handling import Handling
from .requests import Requests
from .tasks import Start, Starter

__all__ = ["ACK_DELAY", "Shared", "Sweep", "milliseconds"]

SLAB_BYTES = 256 * 1024
SPARE_BYTES = 4 * 1024 * 1024
ACK_DELAY = 0.2
"""Seconds within which what was accepted is acknowledged."""
HELD = 0.25
"""Seconds by which a timer must be late for the loop to have been held."""
STALL = 1.0
"""Seconds by which a timer must be late, at the most, for the loop to count as stalled."""
AT_ONCE = 100
"""Connections that are looked after at a time. To ping each of them takes a few milliseconds, which
is as long as those who have something to do should wait for it.
"""


def milliseconds() -> int:
    """Return the Unix time in milliseconds, for the headers of frames."""
    return time.time_ns() // 1_000_000


class Member(Protocol):
    """What `Shared` needs of a connection."""

    @property
    def interval(self) -> float: ...
    def beat(self, now: float, *, judge: bool) -> None: ...


class Acknowledging(Protocol):
    """What has taken something in that its peer does not know of yet."""

    def acknowledge(self) -> None: ...


class Shared:
    """The state of one event loop.

    Attributes:
        slab: Where every socket of the loop reads to; its content is copied out before the next
            read. Safe on loops that read when the socket is ready, which all but Windows' proactor
            do.
        encoder: Packs values.
        handling: The handlers that run.
        members: The connections whose links are up, in the order in which they came.
        start: Runs a coroutine up to its first suspension; see `Starter.start`.
    """

    _all: ClassVar[dict[asyncio.AbstractEventLoop, Shared]] = {}

    __slots__ = (
        "_acknowledges",
        "_beat_timer",
        "_due",
        "_held",
        "_judge",
        "_loop",
        "_pause",
        "_period",
        "_requests",
        "_spare",
        "_starter",
        "_unacknowledged",
        "_unseen",
        "encoder",
        "handling",
        "members",
        "slab",
        "start",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.members: dict[Member, None] = {}
        self._unseen: list[Member] = []
        self._judge = True
        self._unacknowledged: dict[Acknowledging, None] = {}
        self._acknowledges = False
        self._beat_timer: asyncio.TimerHandle | None = None
        self._period = self._pause = 0.0
        self._due = 0.0
        self._held = (-math.inf, 0.0)
        self._spare: memoryview | None = None
        self.slab = memoryview(bytearray(SLAB_BYTES))
        self.encoder = Encoder()
        self._requests: dict[float | None, Requests] = {}
        self.handling = Handling(loop)
        self._starter = Starter(loop)
        self.start: Start = self._starter.start

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Shared:
        """Return the state of a loop, made at its first use."""
        shared = cls._all.get(loop)
        if shared is None:
            for ended in [known for known in cls._all if known.is_closed()]:
                del cls._all[ended]
            shared = cls._all[loop] = cls(loop)
        return shared

    def requests(self, timeout: float | None) -> Requests:
        """Return what writes the requests of all connections whose calls have this timeout."""
        if timeout not in self._requests:
            self._requests[timeout] = Requests(self.encoder, timeout)
        return self._requests[timeout]

    def join(self, member: Member) -> None:
        """Count a connection in: its heartbeat is watched from now on."""
        self.members[member] = None
        self._starter.keep()
        # A quarter of the interval is how late a ping may be.
        period = member.interval / 4
        if self._beat_timer is None or period < self._period:
            self._period = period
            self._unseen.clear()  # or the new one would have to wait for all of them
            if self._beat_timer is not None:
                self._beat_timer.cancel()
            self._arm(self._loop.time() + period)

    def leave(self, member: Member) -> None:
        """Count a connection out; with the last one the timer and the spare Task go."""
        self.members.pop(member, None)
        if not self.members:
            if self._beat_timer is not None:
                self._beat_timer.cancel()
                self._beat_timer = None
            self._unseen.clear()
            self._starter.release()
            self._spare = None

    def _arm(self, due: float) -> None:
        self._due = due
        self._beat_timer = self._loop.call_at(due, self._beat)

    def _beat(self) -> None:
        """Look after the connections, some at a time, and after each of them once in a period."""
        now = self._loop.time()
        if not self._unseen:
            self._unseen, self._judge = list(reversed(self.members)), True
            self._pause = self._period / math.ceil(len(self._unseen) / AT_ONCE)
        # After a stall the peers' bytes may still be unread in the sockets, so nobody is judged.
        late = now - self._due
        if late >= min(self._period, STALL):
            self._judge = False
        if late >= HELD:
            self._held = now, late
        # A loop that is late takes more of them, or each round would last the longer.
        turns = 1 + int(max(late, 0.0) / self._pause)
        some = self._unseen[-turns * AT_ONCE :]
        del self._unseen[-turns * AT_ONCE :]
        if self._unseen:
            self._arm(self._due + turns * self._pause)
        else:
            self._arm(now + math.ceil(len(some) / AT_ONCE) * self._pause)
        for member in some:
            if member in self.members:
                member.beat(now, judge=self._judge)

    def account(self, seconds: float) -> str:
        """Say what the loop itself has done in the last seconds, for a peer that counts as dead."""
        when, late = self._held
        if self._loop.time() - when > seconds:
            return "this side was awake all the time"
        return f"this side's event loop was held for {late:.1f} s in that time"

    def acknowledge_later(self, inlet: Acknowledging) -> None:
        """Have `inlet.acknowledge()` called within `ACK_DELAY`."""
        if not self._acknowledges:
            self._acknowledges = True
            self._loop.call_later(ACK_DELAY, self._acknowledge_all)
        self._unacknowledged[inlet] = None

    def acknowledge_never(self, inlet: Acknowledging) -> None:
        """Let go of an inlet whose connection has ended, which would live on until then."""
        self._unacknowledged.pop(inlet, None)

    def _acknowledge_all(self) -> None:
        inlets, self._unacknowledged = self._unacknowledged, {}
        self._acknowledges = False
        for inlet in inlets:
            inlet.acknowledge()

    def allocate(self, size: int) -> memoryview:
        """Return a buffer of at least `size` bytes for a large frame."""
        spare, self._spare = self._spare, None
        if spare is not None and len(spare) >= size:
            return spare
        return memoryview(bytearray(size))

    def recycle(self, buffer: memoryview) -> None:
        """Take back a buffer whose content nobody needs any more."""
        if len(buffer) <= SPARE_BYTES and self.members:
            self._spare = buffer


class Expiring(Protocol):
    """What a sweep needs of a connection."""

    def expire(self, now: float) -> float:
        """End what is due, and return the next deadline or infinity."""
        ...


class Sweep:
    """One timer for many deadlines: it is armed for the earliest, and looks at all when it fires.

    Args:
        loop: The event loop.
        head: Knows the deadlines.

    Attributes:
        at: When the timer fires.
    """

    __slots__ = ("_handle", "_head", "_loop", "at")

    def __init__(self, loop: asyncio.AbstractEventLoop, head: Expiring) -> None:
        self._loop = loop
        self._head: Expiring | None = head
        self._handle: asyncio.TimerHandle | None = None
        self.at = math.inf

    def arm(self, deadline: float) -> None:
        """See to it that the deadline is noticed."""
        if deadline < self.at:
            if self._handle is not None:
                self._handle.cancel()
            self.at = deadline
            self._handle = self._loop.call_at(deadline, self._fire)

    def _fire(self) -> None:
        self.at, self._handle = math.inf, None
        if self._head is not None:
            self.arm(self._head.expire(self._loop.time()))

    def forget(self) -> None:
        """Stop for good, and let go of the connection."""
        self.stop()
        self._head = None

    def stop(self) -> None:
        """Forget every deadline."""
        self.at = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
