"""One peer, whichever side it is on: what users see of a connection, and where its parts meet.

    link -> Inlet -> CNDT.receive -> Calls, Serving or Messages -> Outlet -> CNDT.take -> link

A connection does not own the socket. It is given a link, and everything that must outlive one
(calls, handlers, messages, the session) hangs here. Nothing runs between two batches of frames but
one heartbeat timer per loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, Generic, Protocol, cast

from typing_extensions import TypeVar

from ..exceptions import ConnectionClosed, ConnectionLost, ProtocolError, Unavailable
from ..protocol.cndt import CNDT, State
from ..protocol.events import (
    Acknowledged,
    Broken,
    Capabilities,
    Closed,
    Event,
    GoingAway,
    KeysNeeded,
    Opened,
    Peer,
    Ponged,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from ..protocol.frames import COMPRESSED, REPLY, CloseCode, FrameType, Payload
from ..protocol.payload import COMPRESS_MOST, inflate
from ..protocol.session import Session
from ..rpc.caller import Caller, convert
from .calls import DEFAULT, Calls, Default, Elsewhere, Headers, Moved, Params, closed_again
from .inlet import Inlet
from .loop import Shared, Sweep, milliseconds
from .messages import Messages
from .outlet import Link, Outlet
from .pings import Pings
from .pulse import FRAME_RATE, FRAME_TIME, Pulse
from .serving import Routes, Serving
from .settings import Settings
from .stream import Check
from .stream_call import OpenCall
from .streaming import Streams
from .wire_log import WireLog

__all__ = ["Connection", "Owner", "outlast_links"]

logger = logging.getLogger("conduit.connection")

CANCEL_TIME = 1.0
"""Seconds that handlers have for their clean-up when they are cancelled at the end of a drain."""

SPARE_CANCELS = 1000
"""CANCELs that a peer may send beyond the number of its other frames."""

KERNEL_PATIENCE = 1.5
"""Heartbeat timeouts after which the kernel gives up by itself a peer that takes nothing."""

CONNECTING, ACCEPTING = 1, 2
"""The first correlation id of either side."""


# With a default, because the bare name would be an error for type checkers that are strict.
S = TypeVar("S", default=dict[str, Any])

Question = VerifierNeeded | KeysNeeded | WelcomeNeeded | ResumeWanted | Resumed
"""What only the owner of a connection can answer; `Resumed` asks whose the link shall be."""


class Owner(Protocol):
    """The server or the client that a connection belongs to."""

    def asked(self, connection: Connection[Any], event: Question) -> None:
        """Answer what the login cannot decide by itself."""

    def opened(self, connection: Connection[Any]) -> None:
        """The login is done."""

    def away(self, connection: Connection[Any], reason: ConnectionClosed) -> None:
        """The link is lost, and the connection waits for another."""

    def returned(self, connection: Connection[Any]) -> None:
        """The connection goes on over another link."""

    def leaving(self, connection: Connection[Any], reason: ConnectionClosed) -> None:
        """The peer has said that it goes away; see `Connection.leave`."""

    def ended(self, connection: Connection[Any], error: Exception) -> None:
        """The connection is over: called once, also when the login failed."""


class Connection(Generic[S]):
    """A peer that is connected, on a server or on a client.

    Handlers get it as their first parameter, or wherever they annotate a parameter with it.
    `Connection[Player]` says that the application has put a `Player` into `state`, as a hook
    `on_client_connect` does; without it `state` is a dict.

    Attributes:
        id: Unique text; the same on both sides, and as long as the session lasts.
        roles: What the user may do, as the server's `users` says; empty on a client.
        state: What the application wants to remember of this peer; an empty dict in the beginning.
        rpc: Calls the peer: `await connection.rpc.call("method", {...})`.
    """

    __slots__ = (
        "_calls",
        "_cancels",
        "_ended",
        "_error",
        "_expiry",
        "_first_id",
        "_link",
        "_loop",
        "_messages",
        "_opened",
        "_outlet",
        "_owner",
        "_pings",
        "_polite",
        "_protocol",
        "_pulse",
        "_serving",
        "_shared",
        "_stream_window",
        "_streams",
        "_sweep",
        "__weakref__",
        "address",
        "call",
        "id",
        "identity",
        "inlet",
        "keeps",
        "name",
        "roles",
        "rpc",
        "state",
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
        self._loop = loop
        self._shared = shared
        self._owner = owner
        self._first_id = first_id
        self._protocol = CNDT(clock=milliseconds, allocate=shared.allocate)
        self._outlet = Outlet(
            loop, self._protocol, outbox_bytes=settings.outbox_bytes, on_room=self._room
        )
        self._sweep = Sweep(loop, self._expire)
        self._calls = Calls(
            loop,
            self._outlet,
            shared.encoder,
            self._sweep,
            first_id=first_id,
            timeout=settings.timeout,
            backpressure=settings.backpressure,
        )
        self._serving = Serving(
            loop,
            self,
            routes,
            self._outlet,
            shared.encoder,
            shared.starter,
            self._sweep,
            shared.handling,
            keyed=settings.keyed,
            limit=settings.capabilities.calls,
            limit_of_all=settings.running,
            messages=settings.capabilities.window[0],
            debug=settings.debug,
        )
        self._streams: Streams | None = None
        self._stream_window = settings.capabilities.stream
        self._messages = Messages(
            loop,
            self._outlet,
            shared.encoder,
            routes,
            self._calls,
            self._serving,
            window=settings.capabilities.window,
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
            self._messages,
        )
        self._pings: Pings | None = None
        self._cancels = 0
        self._error: ConnectionClosed | None = None
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
        self.state: S = cast("S", {})
        self.call = self._calls.call
        self.rpc = Caller(self.call, self.stream, timeout=settings.timeout)

    # What users call.

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
    def fingerprint(self) -> bytes:
        """What identifies the methods that the peer had at login.

        The same bytes mean that discovery tells the same names, parameters, results and streams; no
        bytes that the peer has not told, or has no methods.
        """
        return self._protocol.peer.methods

    @property
    def dropped(self) -> int:
        """Best-effort broadcasts that were dropped here, because their handler was busy."""
        return self._messages.dropped

    @property
    def late(self) -> int:
        """Answers that came when nobody waited for them any more."""
        return self._calls.late

    async def send(self, name: str, data: Any = None, *, ack: bool = False) -> None:
        """Send a message.

        Returns when the message is in the outbox and the peer's credit allows it, so a peer that
        does not keep up makes the sender wait. Cancelling while it waits sends nothing.

        Args:
            name: The name of the peer's handler; at most 256 bytes.
            data: Plain data, a dataclass or a Pydantic model.
            ack: Wait until the peer's handler has ended.

        Raises:
            ConnectionClosed: The connection is closed.
            Overloaded: The peer does not keep up, and backpressure is switched off.
            PayloadTooLarge: The peer does not accept so much.
            TypeError: The data cannot be sent; ValueError for a number or text that cannot.
        """
        if ack:
            await self._messages.request(name, data)
        else:
            await self._messages.send(name, data)

    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any:
        """Send a message and return what its handler answers.

        Args:
            name: The name of the peer's handler.
            data: Plain data, a dataclass or a Pydantic model.
            timeout: Seconds; the descriptor's `rpc_timeout` by default, None for no deadline.
            returns: A type that the answer is validated against and turned into.

        Raises:
            RPCTimeout: No answer came in time.
            RPCError: The handler failed, or there is none.
            ConnectionLost: The connection went away before the answer.
            pydantic.ValidationError: The answer is not what `returns` says.
        """
        answer = await self._messages.request(name, data, timeout)
        return answer if returns is None else convert(answer, returns)

    async def ping(self) -> float:
        """Measure the time to the peer and back, in seconds.

        A ping overtakes what still waits to be written, so its answer does not say that messages
        sent before have arrived; the answer to a call does.

        Raises:
            ConnectionClosed: The connection is closed, or its link is lost before the answer.
            Overloaded: 50 pings were sent within 10 s; a peer closes who sends 100.
        """
        if self._error is not None:
            raise closed_again(self._error)
        if not self._opened:
            raise RuntimeError("the peer cannot be pinged before it is in")
        if self._link is None:
            raise ConnectionLost("the link to the peer is lost, and not made again yet")
        if self._pings is None:
            self._pings = Pings(self._loop, self._outlet)
        return await self._pings.ping()

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Close the connection: what was sent still arrives, calls in flight fail.

        Args:
            code: A close code of docs/protocol.md.
            reason: Text for the peer, at most 123 bytes.
        """
        message = reason or "closed by this side"
        self._close(ConnectionClosed(reason, code=code, message=message))
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the connection is over; cancelling the wait changes nothing."""
        if self._link is not None or self._error is None:
            if self._ended is None:
                self._ended = asyncio.Event()
            await self._ended.wait()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._opened else "logging in"
        state = "away" if self.away else state
        return f"<Connection {self.id[:8] or 'new'} {self.name!r} at {self.address} {state}>"

    # What the owner calls.

    @property
    def protocol(self) -> CNDT:
        """The sans-I/O peer, for the login."""
        return self._protocol

    @property
    def streams(self) -> Streams:
        """The calls with streams. Made for the first one, because most connections have none."""
        if self._streams is None:
            self._streams = Streams(
                self._loop,
                self,
                self._outlet,
                self._shared.encoder,
                self._calls,
                self._serving,
                self._shared.starter,
                window=self._stream_window,
                peer=self._protocol.peer,
            )
        return self._streams

    async def stream(
        self,
        method: str,
        args: Params,
        timeout: float | None,
        check: Check | None,
        headers: Headers,
    ) -> OpenCall:
        """Send the request of a call with streams; `rpc.stream` is what people use."""
        try:
            return await self.streams.call(method, args, timeout, check, headers)
        except Moved:
            assert self._calls.elsewhere is not None
        call: OpenCall = await self._calls.elsewhere.stream(method, args, timeout, check, headers)
        return call

    @property
    def running(self) -> int:
        """Handlers that run for the peer's calls."""
        return len(self._serving)

    def flush(self) -> None:
        """Write what the protocol has queued."""
        self._outlet.flush()

    def push(self, frame: bytes) -> bool:
        """Send an encoded best-effort frame, if the peer keeps up and accepts so much."""
        if self._outlet.blocked or self._link is None or not self._opened:
            return False
        if len(frame) > self._protocol.peer.capabilities.frame_max:
            return False
        self._outlet.push(frame)
        return True

    def send_reliably(self, payload: bytes, limit: int) -> bool:
        """Send an encoded message without waiting, if the peer accepts so much.

        A peer that lets more than `limit` bytes pile up is closed.
        """
        if self._error is not None or not self._opened:
            return False
        if len(payload) > self._protocol.peer.capabilities.frame_max:
            return False
        waiting = self._messages.send_reliably(payload)
        if waiting > limit:
            self._close(
                ConnectionClosed(
                    f"{waiting} bytes of broadcasts wait for this peer, more than {limit}",
                    code=CloseCode.TOO_SLOW,
                )
            )
            return False
        return True

    def introduce(self, session: Session) -> None:
        """Know who it is, on the accepting side: the proof was right.

        From now on messages may be sent; they leave after the peer has been told that it is in.
        """
        self._protocol.session = session
        self._meet(self._protocol.peer)

    def welcome(self, name: str, version: str, methods: bytes = b"") -> None:
        """Let the peer in, on the accepting side; its session is kept for `keeps` seconds.

        Args:
            name: What the server calls itself.
            version: The version of its application.
            methods: What identifies the methods that the peer may call.
        """
        self._protocol.welcome(
            heartbeat=(self._pulse.interval, self._pulse.timeout),
            name=name,
            version=version,
            keeps=self.keeps,
            methods=methods,
        )
        self._open(self._protocol.peer)
        self._outlet.flush()

    def welcome_back(self, older: Connection[Any], accepted: int, name: str, version: str) -> None:
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
            heartbeat=(self._pulse.interval, self._pulse.timeout),
            name=name,
            version=version,
            keeps=older.keeps,
        )
        self._outlet.flush()
        older.take_over(self, accepted)

    def fence(self) -> None:
        """Take no notice any more of what comes over the link, which its peer has given up."""
        if self._link is not None:
            self._detach(
                ConnectionClosed("the peer comes over another link", code=CloseCode.ABNORMAL)
            )

    def take_over(self, other: Connection[Any], accepted: int, rest: bytes = b"") -> None:
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
        self._pulse.heard = True
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

    @property
    def leaving(self) -> bool:
        """Whether the peer has said that it goes away, so that nothing new is asked of it.

        What runs here goes on to its end; calls and messages go to the client's next connection.
        """
        return self._calls.elsewhere is not None

    def leave(self, elsewhere: Elsewhere) -> list[bytes]:
        """Ask nothing new of the peer, which goes away; what is in flight goes on.

        Args:
            elsewhere: Does what is asked of this connection from now on, and what the peer refuses
                because it came too late.

        Returns:
            The payloads of the messages that it will not handle, in order.
        """
        self.keeps = 0.0
        self._outlet.flush()
        messages: list[bytes] = []
        unserved_from = math.inf
        for word, id, payload in self._protocol.session.unserved():
            type, flags = word >> 16 & 0xFF, word & 0xFFFF
            if type == FrameType.MESSAGE and not id and not flags & REPLY:
                messages.append(inflate(payload, COMPRESS_MOST) if flags & COMPRESSED else payload)
            elif type == FrameType.RPC_REQUEST or (type == FrameType.MESSAGE and not flags & REPLY):
                unserved_from = min(unserved_from, id)
        self._calls.leave(elsewhere, unserved_from)
        return messages + self._messages.leave()

    async def drain(self, grace: float, spared: asyncio.Future[Any] | None = None) -> None:
        """Tell the peer that the end is near, let running handlers end, and close.

        Args:
            grace: Seconds that the handlers have; then they are cancelled.
            spared: The handler that waits for the drain itself, if one does.
        """
        self.keeps = 0.0
        if self._link is not None and self._error is None:
            self._protocol.go_away(CloseCode.GOING_AWAY, "the server stops", round(grace * 1000))
            self._outlet.flush()
            self._serving.draining = self._loop.time() + grace
            await self._wait_for_handlers(grace, spared)
            self._serving.stop_all(Unavailable("the server stops", details={"retryable": True}))
            self._messages.stop()
            await self._wait_for_handlers(CANCEL_TIME, spared)
        closing = asyncio.ensure_future(self.close(CloseCode.GOING_AWAY, "the server has stopped"))
        await asyncio.wait([closing], timeout=max(grace, CANCEL_TIME))
        self._outlet.abort()
        await closing

    async def _wait_for_handlers(self, seconds: float, spared: asyncio.Future[Any] | None) -> None:
        deadline = self._loop.time() + seconds
        while True:
            busy = (self._serving.futures() | self._messages.futures()) - {spared}
            left = deadline - self._loop.time()
            if not busy or left <= 0:
                return
            await asyncio.wait(busy, timeout=left)
            await asyncio.sleep(0)  # for the callbacks that answer, and start what has waited

    async def abort(self) -> None:
        """Close the link at once, whatever is left to be sent."""
        self._close(ConnectionClosed("given up by this side"), abort=True)
        self._outlet.abort()
        await self.wait_closed()

    @property
    def claims(self) -> Capabilities:
        """What the peer says that it can do."""
        return self._protocol.peer.capabilities

    @property
    def session(self) -> Session:
        """What outlives a link."""
        return self._protocol.session

    @property
    def reason(self) -> ConnectionClosed | None:
        """Why the connection is over."""
        return self._error

    async def finish_messages(self, seconds: float, spared: asyncio.Future[Any] | None) -> None:
        """Give the messages of a peer that has closed `seconds`; then cancel their handlers."""
        try:
            await self._wait_for_handlers(seconds, spared)
        finally:
            self._messages.stop()
        await self._wait_for_handlers(CANCEL_TIME, spared)
        self._untie()

    @property
    def handling(self) -> bool:
        """Whether messages of a peer that has closed are still being handled."""
        return self._polite and bool(self._messages.futures())

    def lingers(self, owner: Owner) -> bool:
        """Whether this connection of an owner is over and its link is not.

        The peer may still be reading how it ended.
        """
        return self._owner is owner and self._link is not None and self._error is not None

    def fail(self, error: Exception, code: int, reason: str, *, abort: bool = False) -> None:
        """End the connection for a reason that the owner has found.

        Args:
            error: What the owner is told by `ended`.
            code: The close code for the peer.
            reason: The same in words.
            abort: Close at once, and do not wait until the peer has read it.
        """
        self._close(ConnectionClosed(reason, code=code), error, abort=abort)

    # What the link calls.

    def link_made(self, link: Link) -> None:
        """Start: the link is up."""
        self._link = link
        self._outlet.use(link)
        self._shared.join(self)
        self._log_wire()
        self._outlet.flush()

    def _log_wire(self) -> None:
        if logging.getLogger("conduit.wire").isEnabledFor(logging.DEBUG):
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

    def _over(self) -> None:
        """Let whoever waits for the end know, when there is neither a link nor hope for one."""
        if self._error is not None:
            if self._ended is not None:
                self._ended.set()
            self._untie()

    def _untie(self) -> None:
        """Take the parts from each other, so that they are freed without a garbage collection.

        Collections that find hundreds of ended connections stop everybody for milliseconds.
        """
        if self._link is None and not self.handling:
            self._streams = None
            self._protocol.forget()
            self._outlet.forget()
            self.inlet.forget()
            self._serving.forget()
            self._sweep.forget()
            self.rpc.use(self.call, self._calls.refuse_stream)

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

    def pause_writing(self) -> None:
        """Make senders wait: the link's buffer is full."""
        self._outlet.pause()

    def resume_writing(self) -> None:
        """Let senders go on."""
        self._outlet.resume()

    # What the inlet calls.

    def rarer(self, type: int, id: int, payload: Payload) -> bool:
        """Handle the frames that are seldom; True when a caller can go on."""
        if type == FrameType.RPC_ERROR:
            return self._calls.refused(id, payload)
        if type == FrameType.CANCEL:
            self._count_cancel()
            if not self._serving.cancel(id):
                self._messages.cancel(id)
        elif type == FrameType.STREAM_CREDIT and id == 0:
            self._messages.credit(payload)
        elif self._streams is not None:
            self._streams.receive(type, id, payload)
        return False

    def _count_cancel(self) -> None:
        """Refuse to go on with a peer that cancels more than it has sent."""
        self._cancels += 1
        if self._cancels - SPARE_CANCELS > self._protocol.session.received - self._cancels:
            text = f"{self._cancels} cancels, and fewer frames that they could be for"
            raise ProtocolError(text, close_code=CloseCode.FLOOD)

    def happened(self, event: Event) -> None:
        """Handle what is no frame: the login, the end, what the peer has acknowledged."""
        if isinstance(event, Acknowledged):
            self._outlet.acknowledged()
        elif isinstance(event, Ponged):
            if self._pings is not None:
                self._pings.ponged(event.id)
        elif isinstance(event, GoingAway):
            self._owner.leaving(self, ConnectionClosed(event.reason, code=event.code))
            self._protocol.session.release()
            self._outlet.acknowledged()
        elif isinstance(event, Closed):
            told = f"closed by the peer: {event.reason or 'no reason given'}"
            self._polite = event.code in (CloseCode.NORMAL, CloseCode.GOING_AWAY)
            self._close(ConnectionClosed(event.reason, code=event.code, message=told))
        elif isinstance(event, Broken):
            error = event.error
            code = error.close_code if isinstance(error, ProtocolError) else CloseCode.LOGIN_FAILED
            self._close(ConnectionClosed(str(error), code=code), error)
        elif isinstance(event, Opened):
            self._meet(event.peer)
            self._open(event.peer)
        elif isinstance(event, Resumed) or self._protocol.state is not State.CLOSED:
            assert isinstance(event, Question)
            self._owner.asked(self, event)
        # Otherwise the peer has gone on before it was answered, and the next event is the end.

    # Life.

    def _meet(self, peer: Peer) -> None:
        self.id = self._protocol.session.id.hex()
        self.identity, self.name, self.version = peer.identity, peer.name, peer.version
        self._serving.opened(peer.capabilities)
        self._messages.opened(peer.capabilities)

    def _open(self, peer: Peer) -> None:
        self._opened = True
        self._pulse.interval, self._pulse.timeout = peer.heartbeat
        if self._link is not None:
            self._link.give_up_after(KERNEL_PATIENCE * self._pulse.timeout)
        self._shared.join(self)
        self._calls.opened(peer.capabilities)
        self._owner.opened(self)

    def _room(self) -> None:
        self._serving.room()
        self._calls.room()
        self._messages.room()
        if self._streams is not None:
            self._streams.room()

    def _expire(self, now: float) -> float:
        return min(self._calls.expire(now), self._serving.expire(now))

    @property
    def interval(self) -> float:
        """Seconds of silence after which this connection wants to be looked after."""
        return self._pulse.interval

    def beat(self, now: float, *, judge: bool) -> None:
        """Look after the connection, several times in each heartbeat interval."""
        if not self._opened or self._error is not None:
            return
        if self._pulse.drips(now, *self._protocol.unfinished, judge=judge):
            text = (
                f"a frame took more than {FRAME_TIME:g} s, at less than {FRAME_RATE} bytes a second"
            )
            self._give_up(ConnectionClosed(text, code=CloseCode.TOO_LATE))
            return
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
        self._error = error
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._outlet.end(error, abort=abort)
        self._protocol.session.drop()
        self._sweep.stop()
        self._serving.end()
        self._messages.fail(error, handle_rest=self._polite)
        if self._streams is not None:
            self._streams.fail(error)
        self._calls.fail(error)
        if self._pings is not None:
            self._pings.fail(error)
        self._owner.ended(self, cause or error)
        if self._link is None:
            self._over()


async def outlast_links(owner: Owner, seconds: float) -> None:
    """Wait until the links of an owner's connections have gone too, so that none outlives the loop.

    Args:
        owner: Whose connections are over.
        seconds: How long the peers have; then, and when it is cancelled, the links are closed.
    """
    members = Shared.of(asyncio.get_running_loop()).members
    lingering = [one for one in members if isinstance(one, Connection) and one.lingers(owner)]
    if lingering:
        ends = [asyncio.ensure_future(connection.wait_closed()) for connection in lingering]
        try:
            await asyncio.wait(ends, timeout=seconds)
        finally:
            await asyncio.gather(*(connection.abort() for connection in lingering))
            await asyncio.gather(*ends)
