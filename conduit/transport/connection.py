"""One peer, whichever side it is on: what users see of a connection, and where its parts meet.

    link -> Inlet -> CNDT.receive -> Calls, Serving or Messages -> Outlet -> CNDT.take -> link

How it lives, with one link after another, is in life.py.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, TypeVar, overload

from ..exceptions import ConnectionClosed, ConnectionLost, ProtocolError, Unavailable
from ..protocol.cndt import State
from ..protocol.events import (
    Acknowledged,
    Broken,
    Capabilities,
    Closed,
    Event,
    GoingAway,
    Opened,
    Peer,
    Ponged,
    Resumed,
)
from ..protocol.frames import COMPRESSED, REPLY, CloseCode, FrameType, Payload
from ..protocol.payload import COMPRESS_MOST, inflate
from ..protocol.session import Session
from ..rpc.caller import Caller, convert
from .calls import Elsewhere, Moved, closed_again
from .life import KERNEL_PATIENCE, Life, Owner, Question, S
from .loop import Shared
from .pings import Pings
from .requests import DEFAULT, Default, Headers, Params
from .stream import Check
from .stream_call import OpenCall
from .streaming import Streams

__all__ = ["CANCEL_TIME", "Connection", "outlast_links"]

T = TypeVar("T")

CANCEL_TIME = 1.0
"""Seconds that handlers have for their clean-up when they are cancelled at the end of a drain."""

SPARE_CANCELS = 1000
"""CANCELs that a peer may send beyond the number of its other frames."""


class Connection(Life[S]):
    """A peer that is connected, on a server or on a client.

    Handlers get it as their first parameter, or wherever they annotate a parameter with it.
    `Connection[Player]` says that the application has put a `Player` into `state`, as a hook
    `on_client_connect` does; without it `state` is a dict.

    Attributes:
        id: Unique text; the same on both sides, and as long as the session lasts.
        roles: What the user may do, as the server's `users` says; empty on a client.
    """

    __slots__ = ()

    # What users call.

    @property
    def rpc(self) -> Caller:
        """Calls the peer: `await connection.rpc.call("method", {...})`."""
        if self._rpc is None:
            self._rpc = Caller(self.call, self.stream, timeout=self._settings.timeout)
            if self.closed:
                self._rpc.use(self.call, self._calls.refuse_stream)
        return self._rpc

    @property
    def dropped(self) -> int:
        """Best-effort broadcasts that were dropped here, because their handler was busy."""
        return self._inbox.dropped

    @property
    def late(self) -> int:
        """Answers that came when nobody waited for them any more."""
        return self._calls.late

    @property
    def fingerprint(self) -> bytes:
        """What identifies the methods that the peer had at login.

        The same bytes mean that discovery tells the same names, parameters, results and streams; no
        bytes that the peer has not told, or has no methods.
        """
        return self._protocol.peer.methods

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

    @overload
    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: type[T],
    ) -> T: ...

    @overload
    async def request(
        self,
        name: str,
        data: Any = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Any: ...

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

    # What the owner calls.

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
                self._shared.start,
                window=self._settings.capabilities.stream,
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
        _, deadline = self._calls.deadline(timeout)
        try:
            return await self.streams.call(method, args, timeout, check, headers)
        except Moved:
            assert self._calls.elsewhere is not None
        left = self._calls.left(deadline)
        call: OpenCall = await self._calls.elsewhere.stream(method, args, left, check, headers)
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
            heartbeat=self._settings.heartbeat,
            name=name,
            version=version,
            keeps=self.keeps,
            methods=methods,
        )
        self._open(self._protocol.peer)
        self._outlet.flush()

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
        until = self._loop.time() + grace
        if self._link is not None and self._error is None:
            self._protocol.go_away(CloseCode.GOING_AWAY, "the server stops", round(grace * 1000))
            self._outlet.flush()
            self._serving.draining = until
            await self._wait_for_handlers(grace, spared)
            self._serving.stop_all(Unavailable("the server stops", details={"retryable": True}))
            self._inbox.stop()
            await self._wait_for_handlers(CANCEL_TIME, spared)
        closing = asyncio.ensure_future(self.close(CloseCode.GOING_AWAY, "the server has stopped"))
        await asyncio.wait([closing], timeout=max(until - self._loop.time(), CANCEL_TIME))
        self._outlet.abort()
        await closing

    async def _wait_for_handlers(self, seconds: float, spared: asyncio.Future[Any] | None) -> None:
        deadline = self._loop.time() + seconds
        while True:
            busy = (self._serving.futures() | self._inbox.futures()) - {spared}
            left = deadline - self._loop.time()
            if not busy or left <= 0:
                return
            await asyncio.wait(busy, timeout=left)
            await asyncio.sleep(0)  # for the callbacks that answer, and start what has waited

    @property
    def claims(self) -> Capabilities:
        """What the peer says that it can do."""
        return self._protocol.peer.capabilities

    async def finish_messages(self, seconds: float, spared: asyncio.Future[Any] | None) -> None:
        """Give the messages of a peer that has closed `seconds`; then cancel their handlers."""
        try:
            await self._wait_for_handlers(seconds, spared)
        finally:
            self._inbox.stop()
        await self._wait_for_handlers(CANCEL_TIME, spared)
        self._untie()

    # What the inlet calls.

    def rarer(self, type: int, id: int, payload: Payload) -> bool:
        """Handle the frames that are seldom; True when a caller can go on."""
        if type == FrameType.RPC_ERROR:
            return self._calls.refused(id, payload)
        if type == FrameType.CANCEL:
            self._count_cancel()
            if not self._serving.cancel(id):
                self._inbox.cancel(id)
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

    def _meet(self, peer: Peer) -> None:
        self.id = self._protocol.session.id.hex()
        self.identity, self.name, self.version = peer.identity, peer.name, peer.version
        self._serving.opened(peer.capabilities)
        self._answers.opened(peer.capabilities)
        self._inbox.opened(peer.capabilities)
        self._messages.opened(peer.capabilities)

    def _open(self, peer: Peer) -> None:
        self._opened = True
        self._pulse.interval, self._pulse.timeout = peer.heartbeat
        if self._link is not None:
            self._link.give_up_after(KERNEL_PATIENCE * self._pulse.timeout)
        self._shared.join(self)
        self._calls.opened(peer.capabilities)
        self._owner.opened(self)

    def _untie(self) -> bool:
        untied = super()._untie()
        if untied and self._rpc is not None:
            self._rpc.use(self.call, self._calls.refuse_stream)
        return untied


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
