"""Tells a peer that is alive from one that is not. No clock and no I/O: it is told the time."""

from __future__ import annotations

from typing import Literal

__all__ = ["Pulse"]

FRAME_TIME = 30.0
"""Seconds that the peer has for a frame, however small."""
FRAME_RATE = 1024
"""Bytes a second that have to come of one that takes longer."""

Look = Literal["fine", "ping", "stuck", "dead"]
"""`stuck` is a peer that lives, but takes nothing of what waits for it."""


class Pulse:
    """The heartbeat of one connection.

    Bytes that came, and bytes that the peer has taken from us, are life. A ping is due only after
    silence.

    Attributes:
        heard: Whether bytes have come since the last look; set by whoever reads.
        interval: Seconds of silence after which a ping is due.
        timeout: Seconds of silence after which the peer counts as dead.
    """

    __slots__ = (
        "_frame",
        "_frame_since",
        "_frame_size",
        "_next_ping",
        "_next_tell",
        "_since",
        "_stuck_since",
        "_unsent",
        "heard",
        "interval",
        "timeout",
    )

    def __init__(self, interval: float, timeout: float) -> None:
        self.interval = interval
        self.timeout = timeout
        self.heard = True
        self._since = 0.0
        self._stuck_since = 0.0
        self._next_ping = self._next_tell = 0.0
        self._unsent = 0
        self._frame = 0
        self._frame_since = 0.0
        self._frame_size = 0

    def restart(self) -> None:
        """Begin anew: another link has taken the place of the one that was looked at."""
        self.heard = True
        self._unsent = self._frame = 0

    def look(self, now: float, unsent: int, *, judge: bool) -> Look:
        """Say what is to be done; to be called several times in each interval.

        Args:
            now: Seconds, on a clock that never goes back.
            unsent: Bytes that wait for the peer to take them.
            judge: False after a stall of our own, when bytes of the peer may still be unread.
        """
        if not self._unsent or unsent < self._unsent or not judge:
            self._stuck_since = now
        if self.heard or unsent < self._unsent or not judge:
            self.heard = False
            self._since = now
        self._unsent = unsent
        silent = now - self._since
        if silent >= self.timeout:
            return "dead"
        if now - self._stuck_since >= self.timeout:
            return "stuck"
        # A look comes every quarter of the interval or oftener, so one quarter is given in advance.
        if silent >= self.interval * 0.75 and now >= self._next_ping:
            self._next_ping = now + self.interval / 4
            return "ping"
        return "fine"

    def look_at_frame(
        self, now: float, frame: int, size: int, *, judge: bool
    ) -> Literal["fine", "tell", "drips"]:
        """Say what is to be done about a frame that has come in part; to be called as `look`.

        `tell` when it takes so long that the peer needs a sign of life: it hears nothing of us
        meanwhile, and a ping of it would come behind the frame. `drips` when it comes so slowly
        that it does nothing but hold memory. One of which nothing comes is not meant here: its
        sender is silent.

        Args:
            now: As above.
            frame: Which frame has come in part; 0 for none.
            size: Bytes of it that have come.
            judge: As above.
        """
        if not frame or frame != self._frame or not judge:
            self._frame, self._frame_since, self._frame_size = frame, now, size
            self._next_tell = now + self.interval / 2
        if size == self._frame_size:
            return "fine"
        self._frame_size = size
        seconds = now - self._frame_since
        if seconds >= FRAME_TIME and size < seconds * FRAME_RATE:
            return "drips"
        if now < self._next_tell:
            return "fine"
        self._next_tell = now + self.interval / 2
        return "tell"
