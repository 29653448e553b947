"""The life of a connection: its links one after another, its heartbeats, and its end.

A connection does not own the socket. It is given a link, and everything that must outlive one
(calls, handlers, messages, the session) hangs here. Nothing runs between two batches of frames but
one heartbeat timer per loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Generic, Protocol, cast

from typing_extensions import TypeVar

from ..exceptions import ConnectionClosed, ProtocolError
from ..protocol.cndt import CNDT
from ..protocol.events import (
    KeysNeeded,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from ..protocol.frames import CloseCode, FrameType, word
from ..protocol.session import Session
from ..rpc.bind import Call
from ..rpc.caller import Caller
from .loop import Shared
from .outlet import Link
from .parts import Parts
from .pulse import FRAME_RATE, FRAME_TIME
from .serving import Routes
from .settings import Settings
from .wire_log import WireLog

__all__ = ["ACCEPTING", "CONNECTING", "KERNEL_PATIENCE", "Life", "Owner", "Question", "S"]

logger = logging.getLogger("conduit.connection")

KERNEL_PATIENCE = 1.5
"""Heartbeat timeouts after which the kernel gives up by itself a peer that takes nothing."""

_PONG = word(FrameType.HEARTBEAT_PONG)
CONNECTING, ACCEPTING = 1, 2
"""The first correlation id of either side."""

_NOTHING_YET = object()
"""What `state` is before anybody has asked for it."""

# With a default, because the bare name would be an error for type checkers that are strict.
S = TypeVar("S", default=dict[str, Any])

Question = VerifierNeeded | KeysNeeded | WelcomeNeeded | ResumeWanted | Resumed
"""What only the owner of a connection can answer; `Resumed` asks whose the link shall be."""


class Owner(Protocol):
    """The server or the client that a connection belongs to."""

    def asked(self, connection: Any, event: Question) -> None:
        """Answer what the login cannot decide by itself."""

    def opened(self, connection: Any) -> None:
        """The login is done."""

    def away(self, connection: Any, reason: ConnectionClosed) -> None:
        """The link is lost, and the connection waits for another."""

    def returned(self, connection: Any) -> None:
        """The connection goes on over another link."""

    def leaving(self, connection: Any, reason: ConnectionClosed) -> None:
        """The peer has said that it goes away; see `Connection.leave`."""

    def ended(self, connection: Any, error: Exception) -> None:
        """The connection is over: called once, also when the login failed."""


class Life(Parts, Generic[S]):
    """What there is to a connection from its first link to its end; see `Connection`.

    Args:
        shared: The state of the event loop.
        loop: The event loop.
        owner: The server or the client.
        routes: Names to handlers.
        settings: What the owner says about each of its connections.
        first_id: `CONNECTING` or `ACCEPTING`.
        address: Of the peer's socket.
    """

    __slots__ = (
        "_cancels",
        "_ended",
        "_expiry",
        "_first_id",
        "_link",
        "_opened",
        "_owner",
        "_polite",
        "_rpc",
        "_state",
        "__weakref__",
        "address",
        "id",
        "identity",
        "keeps",
        "name",
        "roles",
        "version",
    )

    def __init__(
        self,
        shared: Shared,
        loop: asyncio.AbstractEventLoop,
        owner: Owner,
        routes: Routes,
        settings: Settings,
        *,
        first_id: int,
        address: Any,
    ) -> None:
        super().__init__(shared, loop, routes, settings, first_id=first_id)
        self._owner = owner
        self._first_id = first_id
        self._rpc: Caller | None = None
        self._cancels = 0
        self._opened = False
        self._link: Link | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self.keeps = 0.0
        self._polite = False
        self._ended: asyncio.Event | None = None
        self.address = address
        self.id = ""
        self.identity = ""
        self.roles: frozenset[str] = frozenset()
        self.name = ""
        self.version = ""
        self._state: object = _NOTHING_YET

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._opened else "logging in"
        state = "away" if self.away else state
        return f"<Connection {self.id[:8] or 'new'} {self.name!r} at {self.address} {state}>"

    # What is known of it.

    @property
    def state(self) -> S:
        """What the application wants to remember of this peer; an empty dict in the beginning."""
        if self._state is _NOTHING_YET:
            self._state = {}
        return cast("S", self._state)

    @state.setter
    def state(self, state: S) -> None:
        self._state = state

    @property
    def call(self) -> Call:
        """Makes a call; `rpc.call` is what people use."""
        return self._calls.call

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._error is not None

    @property
    def away(self) -> bool:
        """Whether the link is lost and the connection waits for another.

        What is sent meanwhile is kept, and calls wait for their answers as before.
        """
        return self._opened and self._link is None and self._error is None

    @property
    def reason(self) -> ConnectionClosed | None:
        """Why the connection is over."""
        return self._error

    @property
    def leaving(self) -> bool:
        """Whether the peer has said that it goes away, so that nothing new is asked of it.

        What runs here goes on to its end; calls and messages go to the client's next connection.
        """
        return self._calls.elsewhere is not None

    @property
    def handling(self) -> bool:
        """Whether messages of a peer that has closed are still being handled."""
        return self._polite and bool(self._inbox.futures())

    @property
    def protocol(self) -> CNDT:
        """The sans-I/O peer, for the login."""
        return self._protocol

    @property
    def session(self) -> Session:
        """What outlives a link."""
        return self._protocol.session

    @property
    def interval(self) -> float:
        """Seconds of silence after which this connection wants to be looked after."""
        return self._pulse.interval

    # What the link calls.

    def link_made(self, link: Link) -> None:
        """Start: the link is up."""
        self._link = link
        self._outlet.use(link)
        self._shared.join(self)
        self._log_wire()
        self._outlet.flush()

    def _log_wire(self) -> None:
        if WireLog.wanted():
            self.inlet.watch = WireLog(self.address)
            self._outlet.watch = self.inlet.watch.sent

    def link_ended(self) -> None:
        """Lose the link: the peer has ended its side, so nothing comes from there any more."""
        self._gone(None)

    def link_lost(self, cause: Exception | None) -> None:
        """Lose the link: it is gone."""
        self._gone(cause)
        self._link = None
        self._shared.leave(self)
        self._over()

    def pause_writing(self) -> None:
        """Make senders wait: the link's buffer is full."""
        self._outlet.pause()

    def resume_writing(self) -> None:
        """Let senders go on."""
        self._outlet.resume()

    # One link after another.

    def _gone(self, cause: Exception | None) -> None:
        if self._error is None:
            if self._protocol.eof():
                reason = "the peer's end came in the middle of a frame"
            elif cause is not None:
                reason = f"the link to the peer broke: {cause}"
            else:
                reason = "the peer went away without closing"
            error = ConnectionClosed(reason, code=CloseCode.ABNORMAL)
            if cause is not None:  # the frames of its traceback hold the buffer that was read to
                error.__cause__ = cause.with_traceback(None)
            self._lose(error)

    def _lose(self, error: ConnectionClosed) -> None:
        """Wait for another link, if the peer may come back, or end."""
        if self._opened and self.keeps:
            self._detach(error)
        else:
            self._end(error)

    def _detach(self, reason: ConnectionClosed) -> None:
        link, self._link = self._link, None
        assert link is not None
        link.abandon()
        self._shared.leave(self)
        self._calls.detached()
        self._outlet.detach()
        if self._pings is not None:
            self._pings.fail(reason)
        self._expiry = self._loop.call_later(self.keeps, self._expire_session, reason)
        self._owner.away(self, reason)

    def _expire_session(self, reason: ConnectionClosed) -> None:
        text = f"{reason}; no other link came within {self.keeps:g} s"
        self._end(ConnectionClosed(text, code=CloseCode.ABNORMAL))

    def fence(self) -> None:
        """Take no notice any more of what comes over the link, which its peer has given up."""
        if self._link is not None:
            self._detach(
                ConnectionClosed("the peer comes over another link", code=CloseCode.ABNORMAL)
            )

    def welcome_back(self, older: Life[Any], accepted: int, name: str, version: str) -> None:
        """Let the peer go on with the session of an older connection, on the accepting side.

        This connection ends, and the older one takes its link.

        Args:
            older: The connection, whose link may be up or lost.
            accepted: The highest number that the peer has accepted.
            name: What the server calls itself.
            version: The version of its application.
        """
        older.fence()
        self._protocol.welcome_back(
            older._protocol.session,
            heartbeat=self._settings.heartbeat,
            name=name,
            version=version,
            keeps=older.keeps,
        )
        self._outlet.flush()
        older.take_over(self, accepted)

    def take_over(self, other: Life[Any], accepted: int, rest: bytes = b"") -> None:
        """Go on over the link of a connection that has just logged in for this session.

        Args:
            other: That connection, which ends.
            accepted: The highest number that the peer has accepted.
            rest: What has come over the link already.
        """
        assert self._link is None
        link = other._give_link_away()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._link, self.address = link, other.address
        link.carry(self)
        link.give_up_after(KERNEL_PATIENCE * self._pulse.timeout)
        self._outlet.use(link)
        self._shared.join(self)
        self._pulse.restart()
        self._log_wire()
        try:
            self._protocol.resume(accepted)
        except ProtocolError as exc:
            self.fail(exc, exc.close_code, str(exc))
            return
        self._calls.attached()
        self._outlet.acknowledged()
        self._outlet.flush()
        self._owner.returned(self)
        if rest:
            self.inlet.receive(rest)

    def _give_link_away(self) -> Link:
        """End without a word, for the connection whose session the link is to carry."""
        link = self._link
        assert link is not None
        self._link = None
        self._error = self._outlet.closed = ConnectionClosed("its link carries an older session")
        self._shared.leave(self)
        self._outlet.forget()
        self._loop.call_soon(self._over)  # behind the batch that is being handled
        return link

    # Time and room.

    def overflow(self, reason: str) -> None:
        """End, because too much waits in all connections and most of it here."""
        taken, sent = self._waiting()
        if self._error is not None:
            self._inbox.stop()
            self._outlet.abort()
        elif sent < taken:
            self._close(ConnectionClosed(reason, code=CloseCode.TRY_AGAIN_LATER))
        else:  # behind what waits a CLOSE would not be read soon
            error = ConnectionClosed(reason, code=CloseCode.TOO_SLOW)
            self._close(error, abort=bool(self._outlet.unsent()))

    def beat(self, now: float, *, judge: bool) -> None:
        """Look after the connection, several times in each heartbeat interval."""
        if not self._opened or self._error is not None:
            return
        self.grown()
        coming = self._pulse.look_at_frame(now, *self._protocol.unfinished, judge=judge)
        if coming == "drips":
            text = (
                f"a frame took more than {FRAME_TIME:g} s, at less than {FRAME_RATE} bytes a second"
            )
            self._give_up(ConnectionClosed(text, code=CloseCode.TOO_LATE))
            return
        if coming == "tell":
            self._protocol.send_urgent(_PONG, 0)
            self._outlet.flush()
        needed = self._pulse.look(now, self._outlet.unsent(), judge=judge)
        if needed == "ping":
            self._protocol.ping(0)
            self._outlet.flush()
        elif needed == "stuck":
            reason = f"the peer has taken nothing of what it was sent for {self._pulse.timeout:g} s"
            logger.warning("%r: %s", self, reason)
            self._close(ConnectionClosed(reason, code=CloseCode.TOO_SLOW), abort=True)
        elif needed == "dead":
            timeout = self._pulse.timeout
            silence = f"no sign of life from the peer for {timeout:g} s (heartbeat_timeout)"
            reason = f"{silence}; {self._shared.account(timeout)}"
            self._give_up(ConnectionClosed(reason, code=CloseCode.HEARTBEAT_TIMEOUT))

    def _give_up(self, error: ConnectionClosed) -> None:
        """Give up a link that is of no use any more."""
        logger.warning("%r: %s", self, error)
        if self.keeps:
            self._detach(error)
        else:
            self._close(error, abort=True)

    # The end.

    def fail(self, error: Exception, code: int, reason: str, *, abort: bool = False) -> None:
        """End the connection for a reason that the owner has found.

        Args:
            error: What the owner is told by `ended`.
            code: The close code for the peer.
            reason: The same in words.
            abort: Close at once, and do not wait until the peer has read it.
        """
        self._close(ConnectionClosed(reason, code=code), error, abort=abort)

    def _close(
        self, error: ConnectionClosed, cause: Exception | None = None, *, abort: bool = False
    ) -> None:
        """Say goodbye where it can still be said, and end."""
        if self._error is None:
            if self._opened or self._first_id == ACCEPTING:
                self._protocol.close(error.code, error.reason)
            self._end(error, cause, abort=abort)

    def _end(
        self, error: ConnectionClosed, cause: Exception | None = None, *, abort: bool = False
    ) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._end_parts(error, handle_rest=self._polite, abort=abort)
        self._owner.ended(self, cause or error)
        if self._link is None:
            self._over()

    def _over(self) -> None:
        """Let whoever waits for the end know, when there is neither a link nor hope for one."""
        if self._error is not None:
            if self._ended is not None:
                self._ended.set()
            self._untie()

    def _untie(self) -> bool:
        """Take the parts from each other; False if that is not possible yet."""
        if self._link is not None or self.handling:
            return False
        self._untie_parts()
        return True

    async def wait_closed(self) -> None:
        """Wait until the connection is over; cancelling the wait changes nothing."""
        if self._link is not None or self._error is None:
            if self._ended is None:
                self._ended = asyncio.Event()
            await self._ended.wait()

    async def abort(self) -> None:
        """Close the link at once, whatever is left to be sent."""
        self._close(ConnectionClosed("given up by this side"), abort=True)
        self._outlet.abort()
        await self.wait_closed()

    def lingers(self, owner: Owner) -> bool:
        """Whether this connection of an owner is over and its link is not.

        The peer may still be reading how it ended.
        """
        return self._owner is owner and self._link is not None and self._error is not None

    @property
    def unsent(self) -> int:
        """Bytes that the link keeps, because the peer does not take them."""
        return self._outlet.unsent()
