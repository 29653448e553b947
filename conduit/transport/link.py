"""A socket as a link: TCP or TLS, on asyncio's loops and on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from collections.abc import Callable
from typing import Any, Final, cast

from ..protocol.payload import LARGE
from .connection import Connection
from .loop import Shared

__all__ = ["SocketLink"]

WRITE_BUFFER = 64 * 1024
"""Bytes in the transport's buffer from which senders wait."""
UNSENT_IN_KERNEL = 1024 * 1024
"""Bytes that the kernel keeps beside those on their way. It would take megabytes, and hide for
seconds that a peer does not keep up. Less than this costs values of a megabyte a quarter of their
rate, because the writing side is woken for each piece.
"""
LINGER = 1.0
"""Seconds that the peer has to close its side once it has been sent everything."""
STALLED = 5.0
"""Seconds without progress after which a peer that does not read the rest is given up."""


# None where the platform has no such thing.
_NOTSENT_LOWAT: Final[int | None] = getattr(socket, "TCP_NOTSENT_LOWAT", None)
_USER_TIMEOUT: Final[int | None] = getattr(socket, "TCP_USER_TIMEOUT", None)
_INT_MAX: Final = 2**31 - 1


class _Nobody:
    """Whom a link belongs to that was given up: whatever comes over it means nothing any more."""

    large = None

    @property
    def inlet(self) -> _Nobody:
        return self

    @property
    def protocol(self) -> _Nobody:
        return self

    def ignore(self, *event: object) -> None:
        """Take no notice."""

    receive = link_ended = link_lost = pause_writing = resume_writing = ignore


_NOBODY: Final[Any] = _Nobody()


class SocketLink(asyncio.BufferedProtocol):
    """Reads into the loop's shared slab and hands the bytes to the connection.

    Args:
        shared: The state of the event loop.
        connect: Makes the connection once the socket, and TLS if there is any, is ready.
    """

    __slots__ = (
        "_connect",
        "_connection",
        "_held",
        "_inlet",
        "_patience",
        "_protocol",
        "_slab",
        "_transport",
        "_watch",
        "_writable",
    )

    def __init__(
        self, shared: Shared, connect: Callable[[SocketLink, asyncio.Transport], Connection]
    ) -> None:
        self._slab = shared.slab
        self._connect = connect
        self._watch: asyncio.TimerHandle | None = None
        self._writable = True
        self._held = False
        self._patience = math.inf

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport and start the connection."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER)
        self._set_option(_NOTSENT_LOWAT, UNSENT_IN_KERNEL)
        connection = self._connect(self, self._transport)
        del self._connect  # which knows more of how the socket came than anybody needs any longer
        self.carry(connection)
        connection.link_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where to read to."""
        return self._slab if self._protocol.large is None else self._inlet.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        if self._protocol.large is None:
            self._inlet.receive(bytes(self._slab[:nbytes]))
        else:
            self._inlet.buffer_filled(nbytes)

    def eof_received(self) -> bool:
        """End the connection: nobody uses half of one.

        The transport closes itself when it has written what it has, which a peer that has left
        will never take.
        """
        self._writable = False
        self._connection.link_ended()
        self._leave_to_kernel()
        self._watch_end(left=True)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the connection that the socket is gone."""
        self._writable = False
        self._connection.link_lost(exc)
        if self._watch is not None:
            self._watch.cancel()

    def pause_writing(self) -> None:
        """Pass on that the buffer is full."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the buffer has room."""
        self._connection.resume_writing()

    def _set_option(self, option: int | None, value: int) -> None:
        """Set an option of TCP where there is such a thing; a peer may have reset the socket."""
        sock = self._transport.get_extra_info("socket")
        if option is not None and sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)

    # What the connection calls.

    def give_up_after(self, seconds: float) -> None:
        """Once this side has closed, have the kernel give up a peer that takes nothing for so long.

        Before that the heartbeat notices. Afterwards the kernel alone is left, which would keep
        what is unsent for many minutes. It must not be told before: a peer that reads slowly, with
        a window smaller than a segment, takes nothing by the count of Linux.
        """
        self._patience = seconds

    def _leave_to_kernel(self) -> None:
        if self._patience != math.inf:
            self._set_option(_USER_TIMEOUT, min(round(self._patience * 1000), _INT_MAX))

    def carry(self, connection: Connection) -> None:
        """Hand what comes to this connection from now on."""
        self._connection = connection
        self._inlet = connection.inlet
        self._protocol = connection.protocol

    def abandon(self) -> None:
        """Close at once, and hand nothing to anybody any more, whatever has come already."""
        self.carry(_NOBODY)
        self.abort()

    def write(self, data: bytes) -> None:
        """Send bytes; after the end they have nowhere to go."""
        if self._writable:
            try:
                # asyncio before 3.12 cuts off what it has sent at once, which copies bytes.
                self._transport.write(data if len(data) < LARGE else memoryview(data))
            except RuntimeError:  # uvloop, when the transport was closed by somebody else
                self._writable = False

    def unsent(self) -> int:
        """Return the size of the transport's buffer in bytes."""
        try:
            return self._transport.get_write_buffer_size()
        except AttributeError:  # on 3.10 TLS lets go of the socket before it says that it is gone
            return 0

    def finish(self) -> None:
        """End the outgoing side, and give the peer a moment to read what it said.

        To close at once, with bytes of the peer unread, would reset the connection, and a reset may
        overtake the CLOSE frame.
        """
        transport = self._transport
        self._writable = False
        if transport.is_closing():
            return
        self._leave_to_kernel()
        self.hold(False)  # or the end of the peer would not be seen
        try:
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()  # TLS says goodbye by itself
        except OSError:  # the peer has reset the connection already
            transport.abort()
        except RuntimeError:  # uvloop, when the transport was closed by somebody else
            return
        else:
            self._watch_end()

    def _watch_end(self, *, left: bool = False) -> None:
        """See to it that the transport ends, whatever the peer does.

        Args:
            left: The peer has ended its side, and will hardly read what is left.
        """
        if self._watch is not None:
            self._watch.cancel()
        loop = asyncio.get_running_loop()
        unsent = self.unsent()
        if unsent and not left:
            self._watch = loop.call_later(STALLED, self._look_at_end, unsent)
        else:
            self._watch = loop.call_later(LINGER, self._transport.abort)

    def _look_at_end(self, unsent: int) -> None:
        """Give up a peer that has taken nothing; give one that has taken something its time."""
        if self.unsent() < unsent:
            self._watch_end()
        else:
            self._transport.abort()

    def hold(self, held: bool) -> None:
        """Read nothing as long as this is so."""
        if held == self._held:
            return
        self._held = held
        # uvloop, when the transport closes already; on 3.10 TLS has let go of the socket by then.
        with contextlib.suppress(RuntimeError, AttributeError):
            if held:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once and forget what is unsent."""
        self._writable = False
        self._leave_to_kernel()
        self._transport.abort()
