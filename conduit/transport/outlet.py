"""What a connection writes: corked into few writes, and stopped where the peer does not keep up.

Frames are collected and written together: at 64 frames, at the end of a batch of received frames,
or else when the event loop has run what is ready. A write costs a hundred times as much as a frame.

Two things stop a sender. The link is paused when its buffer is full, and the outbox is `full` when
the peer does not acknowledge; `blocked` is either of them, or the end. Answers only wait for the
outbox, since they have nobody who could wait. Reading never stops: two peers that stop reading
until they can write would wait for each other for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..exceptions import ConnectionClosed
from ..protocol.cndt import CNDT
from ..protocol.writer import LARGE_FRAME
from .buffers import STEP

__all__ = ["FLUSH_FRAMES", "Link", "Outlet"]

FLUSH_FRAMES = 64


class Link(Protocol):
    """What carries the bytes of a connection: a socket, or anything that is used like one."""

    def write(self, data: bytes) -> None:
        """Send bytes, or keep them until they can be sent."""

    def unsent(self) -> int:
        """Return how many bytes are kept."""
        ...

    def finish(self) -> None:
        """Send what is kept, end the outgoing side, and close once the peer has done so too."""

    def abort(self) -> None:
        """Close at once."""

    def give_up_after(self, seconds: float) -> None:
        """Give up by itself, once closed, a peer that takes nothing for so long; inf for never."""

    def carry(self, connection: Any) -> None:
        """Hand what comes to this connection from now on."""

    def abandon(self) -> None:
        """Close at once, and hand nothing to anybody any more, whatever has come already."""

    def hold(self, held: bool) -> None:
        """Read nothing as long as this is so: what has come already takes its time."""


class _Nowhere:
    """Stands in for the link while there is none: what is sequenced waits in the outbox."""

    def write(self, data: bytes) -> None:
        """Write nothing."""

    def unsent(self) -> int:
        """Return 0."""
        return 0

    def finish(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""

    def give_up_after(self, seconds: float) -> None:
        """Do nothing."""

    def carry(self, connection: Any) -> None:
        """Do nothing: nothing comes."""

    def abandon(self) -> None:
        """Do nothing."""

    def hold(self, held: bool) -> None:
        """Do nothing."""


_NOWHERE: Final[Link] = _Nowhere()


class Head(Protocol):
    """What an outlet needs of its connection."""

    def room(self) -> None:
        """Go on: senders need not wait any more."""

    def grown(self) -> None:
        """Count what waits: it has become more."""


class _Nobody:
    """The head of an outlet whose connection has ended."""

    def room(self) -> None:
        """Do nothing."""

    def grown(self) -> None:
        """Do nothing."""


_NOBODY: Final[Head] = _Nobody()


class Outlet:
    """The writing half of a connection.

    Frames are sent by `protocol.send`, which tells the outlet when it is time to write: one call
    less for each frame.

    Args:
        loop: The event loop.
        protocol: Numbers and frames what is sent.
        outbox_bytes: Unacknowledged bytes from which senders wait.
        head: Told when there is room again, and when more waits.

    Attributes:
        blocked: Whether senders wait.
        full: Whether the outbox is full, so that answers wait too.
        limit: Unacknowledged bytes from which it is.
        mark: Unacknowledged bytes from which `head` is told next.
        closed: Why nothing can be sent any more; `blocked` is set as well.
        flush_frames: Frames that are written together at most.
    """

    __slots__ = (
        "_link",
        "_loop",
        "_paused",
        "blocked",
        "closed",
        "flush_frames",
        "full",
        "head",
        "limit",
        "mark",
        "protocol",
        "watch",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol: CNDT,
        *,
        outbox_bytes: int,
        head: Head,
    ) -> None:
        self._loop = loop
        self._link: Link | None = None
        self.limit = outbox_bytes
        self.mark = min(STEP, outbox_bytes)
        self.head = head
        self.flush_frames = FLUSH_FRAMES
        self._paused = False
        self.protocol = protocol
        protocol.on_due = self._due
        self.blocked = False
        self.full = False
        self.closed: ConnectionClosed | None = None
        self.watch: Callable[[bytes], None] | None = None

    def use(self, link: Link) -> None:
        """Write to this link from now on."""
        self._link = link

    def detach(self) -> None:
        """Go on without a link: what is sent is kept, as far as the outbox allows."""
        self._link = _NOWHERE
        self._paused = False
        self.flush()
        self._unblock()

    def cork(self) -> bool:
        """Hold what is sent, up to `flush_frames` frames, because a flush is certain to come.

        Returns:
            Whether it was not held already.
        """
        open = self.protocol.due <= 1
        self.protocol.due = self.flush_frames
        return open

    def _due(self) -> None:
        """Write soon when this is the first frame, or now that there are enough."""
        if self.protocol.due == 1:
            self.flush_soon()
        else:
            self.flush()

    def send_split(self, word: int, id: int, head: bytes, large: bytes, end: bytes = b"") -> None:
        """Send a sequenced frame with a large part that is not to be copied."""
        self.protocol.send_split(word, id, head, large, end)
        self.flush()

    def push(self, frame: bytes) -> None:
        """Send an encoded frame that is not sequenced soon."""
        self.protocol.push(frame)
        if self.protocol.corked >= FLUSH_FRAMES or len(frame) >= LARGE_FRAME:
            self.flush()
        else:
            self.flush_soon()

    def flush_soon(self) -> None:
        """Write once the event loop has run what is ready now."""
        if self.cork():
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is queued."""
        self.protocol.due = 1
        link = self._link
        if link is None:
            return
        protocol = self.protocol
        for chunk in protocol.take():
            if self.watch is not None:
                self.watch(chunk)
            link.write(chunk)
        if protocol.session.outbox_bytes >= self.mark:
            self._grown()

    def _grown(self) -> None:
        """Stop senders when the outbox is full, and tell that it has grown."""
        if self.protocol.session.outbox_bytes >= self.limit:
            self.full = self.blocked = True
        self.set_mark()
        self.protocol.grew = True
        self.head.grown()

    def set_mark(self) -> None:
        """Have `head` told when the outbox has grown by `STEP`, or is full."""
        self.mark = min(self.protocol.session.outbox_bytes + STEP, self.limit)

    def unsent(self) -> int:
        """Return the bytes that the link keeps."""
        return self._link.unsent() if self._link is not None else 0

    def hold(self, held: bool) -> None:
        """Have the link read nothing, or go on."""
        if self._link is not None:
            self._link.hold(held)

    def pause(self) -> None:
        """Stop senders: the link's buffer is full."""
        self._paused = self.blocked = True

    def resume(self) -> None:
        """The link has room again."""
        self._paused = False
        self._unblock()

    def acknowledged(self) -> None:
        """The outbox is shorter than it was, or may be."""
        if self.full and self.protocol.session.outbox_bytes < self.limit:
            self.full = False
            self._unblock()

    def _unblock(self) -> None:
        self.blocked = self._paused or self.full or self.closed is not None
        self.head.room()

    def abort(self) -> None:
        """Close the link at once; what it keeps is gone, whenever it says that it is itself."""
        if self._link is not None:
            link, self._link = self._link, _NOWHERE
            link.abort()

    def forget(self) -> None:
        """Let go of the link and of the connection: both have ended."""
        self._link = None
        self.head = _NOBODY
        self.protocol.on_due = _nothing

    def end(self, error: ConnectionClosed, *, abort: bool = False) -> None:
        """Write what is queued and close the link."""
        if self.closed is None:
            self.closed = error
            self.blocked = True
            self.flush()
            if abort:
                self.abort()
            elif self._link is not None:
                self._link.finish()


def _nothing() -> None:
    """What is called when there is nobody to be told."""
