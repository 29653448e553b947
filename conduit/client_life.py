"""The life of a client: one connection, which is made, made again when it is lost, and ended."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TypeVar, cast

from .attempts import Attempts
from .client_caller import ClientCaller
from .descriptors import ClientDescriptor
from .dialing import Dialer, Wish
from .exceptions import ConnectionClosed
from .expected import Expected
from .hooks import Hooks
from .offline import Offline, Status
from .protocol.events import KeysNeeded, Resumed
from .protocol.frames import CloseCode
from .protocol.session import Session
from .rpc.router import Router
from .transport.background import Background
from .transport.calls import closed_again
from .transport.connection import Connection, outlast_links
from .transport.hooked import AT
from .transport.life import Question
from .transport.settings import Settings

__all__ = ["ClientLife"]

logger = logging.getLogger("conduit.client")

T = TypeVar("T")

AFTERWARDS = 30.0
"""Seconds that message handlers have when the server has sent and closed."""

MOST_LEFT = 16
"""Connections that a client keeps whose servers have said that they go away, and have not gone."""

_FINAL_CODES = (CloseCode.NORMAL, CloseCode.REFUSED)
"""Close codes by which a server says that it wants this client to stay away."""


class ClientLife:
    """What there is to a client from `connect` to `disconnect`; see `Client`.

    It is the client and no part of it, because hooks are handed the client: a part would know it,
    and what knows each other is freed by garbage collections only.

    Args:
        descriptor: What the client is, and where its servers are.
    """

    def __init__(self, descriptor: ClientDescriptor) -> None:
        self.descriptor = descriptor
        self._settings = Settings.of(descriptor)
        self._router = Router(with_connection=False)
        self._hooks = Hooks(logger)
        self._background = Background(logger)
        self._dialer = Dialer(descriptor, self._settings, self._router, self._background)
        self._connection: Connection | None = None
        self._left: dict[Connection, None] = {}
        self._unhandled: list[bytes] = []
        self._attempt: asyncio.Task[None] | None = None
        self._reconnecting: set[asyncio.Task[None]] = set()
        self._reason: ConnectionClosed | None = None
        self._announced = False
        self._going: ConnectionClosed | None = None
        self._loss_told: asyncio.Task[None] | None = None
        self._disconnect_told: asyncio.Task[None]
        self._closed: asyncio.Future[None] | None = None
        self._offline = Offline(self._settings.timeout)
        self._attempts = Attempts(descriptor, self._offline)
        self._expected = Expected(self._background, logger, descriptor.connect_timeout)
        self.rpc = ClientCaller(self._offline, self._router, self._settings.timeout, self._expected)

    # What users call.

    async def connect(self, *, retry: bool = False) -> None:
        """Connect and log in.

        Cancelling it leaves the client unconnected.

        Args:
            retry: Try again, with growing pauses, as after a loss; a refused login ends that.

        Raises:
            OSError: The server cannot be reached; the text says what to check.
            AuthenticationError: The login was refused, or the server could not prove itself.
            Unavailable: The server is full.
            ProtocolError: The peer does not speak this protocol, or another version.
            ConnectionClosed: The server closed during the login or right behind it, or
                `disconnect` was called in the meantime.
            InterfaceMismatch: The server does not offer what `rpc.bind` relies on.
            RuntimeError: The client is connected already.
        """
        status = self._offline.status
        if status not in (Status.IDLE, Status.CLOSED):
            self._check_loop()
            raise RuntimeError(f"the client is {status.value} already")
        loop = asyncio.get_running_loop()
        self._offline.become(Status.CONNECTING)
        self._closed = loop.create_future()
        self._attempts.reset()
        self._reason = None
        self._attempt = attempt = loop.create_task(self._connect_first(retry))
        try:
            await attempt
        except BaseException as exc:
            disconnected = self._attempt is not attempt
            self._attempt = None
            self._end()
            if disconnected and isinstance(exc, asyncio.CancelledError):
                raise ConnectionClosed("disconnected while connecting") from None
            if self._connection is not None or self._reconnecting:
                # Cancelled when it was done, and not woken up yet, or when the link was lost.
                self._announced = True  # nobody has been told of it
                await self.disconnect()
            raise
        self._attempt = None
        if self._going is not None and self._connection is not None:
            self.leaving(self._connection, self._going)
        if not self._closed.done():
            try:
                await self._hooks.tell("connect", self)
            except BaseException:
                await self.disconnect()
                raise
        if self._closed.done():
            raise closed_again(self._reason or ConnectionClosed("disconnected while connecting"))

    async def _connect_first(self, retry: bool) -> None:
        await (self._attempts.make(self._dial, pause=False) if retry else self._dial())
        connection = self._connection
        if connection is None:
            return
        try:
            await self._expected.check(connection)
        except BaseException:
            self._announced = True  # nobody has been told of it
            self._end()
            self._use(None)
            await connection.close(CloseCode.NORMAL, "the client does not stay")
            raise

    async def disconnect(self) -> None:
        """Close the connection and stay disconnected; calls in flight fail.

        May be called at any time and more than once. Cancelling it closes all the same, and waits
        for nothing.

        Raises:
            RuntimeError: The client has connected in another event loop.
        """
        self._check_loop()
        tasks = [*self._reconnecting]  # more than one where hooks of a former still run
        if self._attempt is not None:
            self._announced = True  # nobody has been told of a connection
            tasks.append(self._attempt)
        self._attempt = None
        self._reconnecting.clear()
        connection = self._connection
        self._use(None)
        self._end()
        tasks = [task for task in tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        reason = "the client disconnects"
        closing = [one for one in (connection, *self._left) if one is not None]
        try:
            if tasks:
                await asyncio.wait(tasks)
            for one in closing:
                await one.close(CloseCode.NORMAL, reason)
        except BaseException:
            for one in closing:
                one.fail(ConnectionClosed(reason), CloseCode.NORMAL, reason)
            raise
        await self._settings.keyed.drain(0, asyncio.current_task())
        await self._background.finish(self.descriptor.connect_timeout)
        await outlast_links(self, self.descriptor.connect_timeout)

    async def wait_closed(self) -> None:
        """Wait until the client has disconnected for good; cancelling the wait changes nothing."""
        if self._closed is not None:
            await asyncio.shield(self._closed)

    async def __aenter__(self: T) -> T:
        await cast("ClientLife", self).connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.disconnect()

    def _check_loop(self) -> None:
        """Refuse to work in another event loop, where it would wait for ever."""
        closed = self._closed
        if closed is None or closed.done() or closed.get_loop() is asyncio.get_running_loop():
            return
        raise RuntimeError(
            "the client has connected in another event loop; connect and disconnect it within one "
            "asyncio.run(...)"
        )

    def _end(self, reason: ConnectionClosed | None = None) -> None:
        self._unhandled.clear()  # or the next `connect` would send what nobody waits for
        self._offline.become(Status.CLOSED, reason)
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)

    async def _dial(self) -> None:
        wish = Wish(self, self._resumable, self._is_connected, self._give_up)
        await self._dialer.dial(wish)

    def _resumable(self) -> Session | None:
        away = self._connection
        return None if away is None or not away.away else away.session

    def _is_connected(self) -> bool:
        return self._offline.status is Status.READY and self._connection is not None

    def _give_up(self, connection: Connection) -> None:
        if connection is self._connection:
            self._use(None)
            if self._offline.status is Status.READY:  # and nobody has been told of it
                connecting = self._attempt is not None
                self._offline.become(Status.CONNECTING if connecting else Status.RECONNECTING)

    def _use(self, connection: Connection | None) -> None:
        """Call through this connection from now on, or through none."""
        self._connection = self._offline.connection = connection
        self._expected.use(connection)
        self.rpc.use(self._way.call, self._way.stream)

    @property
    def _way(self) -> Connection | Offline:
        """What is called and sent goes there."""
        if self._connection is None or self._offline.unprepared:
            return self._offline
        return self._connection

    # What the connection calls.

    def asked(self, connection: Connection, event: Question) -> None:
        """Go on with the login of a connection."""
        if isinstance(event, Resumed):
            self._resume(connection, event)
            return
        assert isinstance(event, KeysNeeded)
        self._dialer.prove(connection, event)

    def opened(self, connection: Connection) -> None:
        """Use the connection: the login is done."""
        if self._offline.status is Status.CLOSED:  # `disconnect` came first, in the same turn
            reason = "the client disconnects"
            connection.fail(ConnectionClosed(reason), CloseCode.NORMAL, reason)
            return
        AT.set(connection.id)  # for good, in the context of its link, where its handlers start
        older = self._connection
        self._going = None
        if self.descriptor.reconnect_enabled:
            connection.keeps = connection.protocol.peer.keeps
        again = self._offline.status is Status.RECONNECTING
        self._ready(unprepared=again and "reconnect" in self._hooks)
        self._use(connection)
        if not self._offline.unprepared:
            self._send_again(connection)
        if older is not None and older.leaving:
            self._left[older] = None
            self._close_surplus()
        elif older is not None:
            reason = "the server has not kept the session"
            older.fail(ConnectionClosed(reason), CloseCode.ABNORMAL, reason)

    def _close_surplus(self) -> None:
        """Close the connection that was left first, when there are too many of those."""
        if len(self._left) > MOST_LEFT:
            oldest = next(iter(self._left))
            reason = f"{MOST_LEFT} servers have said after this one that they go away"
            oldest.fail(ConnectionClosed(reason), CloseCode.NORMAL, reason)

    def _send_again(self, connection: Connection) -> None:
        """Send the messages that a server which has gone away has not handled."""
        unhandled, self._unhandled = self._unhandled, []
        for payload in unhandled:
            if not connection.send_reliably(payload, sys.maxsize):
                text = "a message of %d bytes is lost, because the next server accepts less"
                logger.error(text, len(payload))

    def leaving(self, connection: Connection, reason: ConnectionClosed) -> None:
        """Look for another server, or for the next life of this one, while it ends its work."""
        if (
            connection is self._connection
            and self._offline.status is Status.READY
            and self.descriptor.reconnect_enabled
        ):
            if self._attempt is not None:  # `connect` is not done; it comes back to this
                self._going = reason
                return
            self._unhandled += connection.leave(self._offline)
            self._offline.waits = True
            self._connect_again(reason, lost=False)
            self._attempts.reset()

    def _resume(self, connection: Connection, event: Resumed) -> None:
        """Let the connection that has lost its link go on over the one that has logged in."""
        older = self._connection
        if older is None or not older.away:  # it has ended in the meantime
            connection.fail(ConnectionClosed(reason := "the session is over"), 1000, reason)
            return
        AT.set(older.id)  # as above
        self._ready(unprepared=self._offline.unprepared)
        older.take_over(connection, event.accepted, event.rest)

    def _ready(self, *, unprepared: bool = False) -> None:
        self._offline.become(Status.READY, unprepared=unprepared)
        self._announced = False
        self._attempts.ready()
        self._dialer.succeeded()

    def away(self, connection: Connection, reason: ConnectionClosed) -> None:
        """Connect again: the link is lost, and the session is not."""
        if connection is self._connection:  # not one that `disconnect` is about to close
            self._connect_again(reason, lost=False, unprepared=self._offline.unprepared)

    def returned(self, connection: Connection) -> None:
        """Do nothing: who has connected again knows it."""

    def ended(self, connection: Connection, error: Exception) -> None:
        """The connection is over, or the login failed."""
        if connection.handling:
            # The server has closed as it should, and what it sent before is still being handled.
            self._background.start(connection.finish_messages(AFTERWARDS, None))
        status = self._offline.status
        if connection in self._left:
            del self._left[connection]
            if status is not Status.CLOSED and not _as_announced(connection):
                self._tell_of_loss(connection)
        elif connection is self._connection:
            self._use(None)
            if status is Status.RECONNECTING:  # it was away for too long, or has gone away
                self._offline.become(status)  # if its hooks still run, nobody waits for them
                self._tell_of_loss(connection)
            else:
                self._lost(connection.reason)
        elif self._dialer.failed(connection, error):
            return  # whoever dials tells of that
        elif status is Status.READY and connection.id:  # another session has taken its place
            self._tell_of_loss(connection)
        elif status is Status.CLOSED and connection.id and not self._announced:
            self._tell_of_end(connection.reason)

    # Connecting again.

    def _lost(self, reason: ConnectionClosed | None) -> None:
        assert reason is not None
        if self.descriptor.reconnect_enabled and reason.code not in _FINAL_CODES:
            self._offline.waits = self._going is not None
            self._connect_again(reason, lost=True)
        else:
            self._reason = reason
            self._end(reason)
            if self._attempt is None:  # else `connect` raises it, and no hook was told of anything
                logger.warning("connection lost (%s); it is not made again", reason)
                self._background.start(self._tell_of_break(reason, lost=True))

    def _connect_again(
        self, reason: ConnectionClosed, *, lost: bool, unprepared: bool = False
    ) -> None:
        """Make another connection.

        Args:
            reason: Why there is none.
            lost: Whether the session is over as well.
            unprepared: Whether its hooks still run, and still go first.
        """
        self._reason, self._announced = reason, True
        self._offline.become(Status.RECONNECTING, unprepared=unprepared)
        self._attempts.lost()
        logger.warning("connection lost (%s); connecting again", reason)
        # By a task of its own, because `disconnect` may end the other before its first step.
        self._disconnect_told = told = self._background.start(
            self._tell_of_break(reason, lost=lost)
        )
        again = self._background.start(self._reconnect(reason, told))
        self._reconnecting.add(again)
        again.add_done_callback(self._reconnecting.discard)

    async def _tell_of_break(self, reason: ConnectionClosed, *, lost: bool) -> None:
        if (attempt := self._attempt) is not None:  # `on_connect` comes first, if it comes
            await asyncio.wait([attempt])
            if attempt.cancelled() or attempt.exception() is not None:
                return
        await self._hooks.tell("disconnect", self, reason)
        if lost:
            await self._hooks.tell("lost", self, reason)

    def _tell_of_end(self, reason: ConnectionClosed | None) -> None:
        if "disconnect" in self._hooks:
            self._background.start(self._hooks.tell("disconnect", self, reason))

    def _tell_of_loss(self, connection: Connection) -> None:
        """Have `_reconnect` told of the session that is over, as soon as it may know."""
        self._loss_told = self._background.start(self._tell_lost(connection.reason))

    async def _tell_lost(self, reason: ConnectionClosed | None) -> None:
        await asyncio.wait([self._disconnect_told])
        await self._hooks.tell("lost", self, reason)

    async def _reconnect(self, reason: ConnectionClosed, told: asyncio.Task[None]) -> None:
        away = self._connection
        if self._attempt is None:  # else `connect` may be waiting for this
            await asyncio.wait([told])
        if self._offline.status is not Status.RECONNECTING:
            return  # a hook has disconnected the client for good
        try:
            await self._attempts.make(self._dial)
        except Exception as exc:  # noqa: BLE001  # whatever it is, there is nobody to raise it to
            logger.error("giving up the connection: %s", exc)
            if self._connection is not None:
                self._connection.fail(reason, CloseCode.ABNORMAL, f"{reason}; {exc}")
            text = f"the client has given up: {reason}; {exc}"
            end = ConnectionClosed(reason.reason, code=reason.code, message=text)
            end.__cause__ = exc
            self._end(end)
            return
        if self._connection is away:  # hooks on_reconnect that still run go on, and go first
            await self._tell_of_return(away, told)
            return
        seconds = self.descriptor.connect_timeout
        loop, connection = asyncio.get_running_loop(), self._connection
        timer = loop.call_later(seconds, self._prepared, connection, seconds)
        try:
            await self._tell_of_return(away, told)
        finally:
            timer.cancel()
            self._prepared(connection)

    async def _tell_of_return(self, away: Connection | None, told: asyncio.Task[None]) -> None:
        if not told.done():  # not waited for before, and before what is told below
            await asyncio.wait([told])
        if self._connection is None:
            return  # it is lost again already, and another one tells of that
        AT.set(self._connection.id)
        if away is not None and self._connection is away:
            await self._hooks.tell("resume", self)
            return
        if self._loss_told is not None:
            await asyncio.wait([self._loss_told])
        self._expected.report_later()
        await self._hooks.tell("reconnect", self)

    def _prepared(self, connection: Connection | None, late: float = 0.0) -> None:
        """Let others use a connection behind the hooks on_reconnect."""
        if connection is None or connection is not self._connection or not self._offline.unprepared:
            return
        if late:
            text = "a hook on_reconnect has not ended within %g s, and is not waited for any longer"
            logger.warning(text, late)
        self._offline.prepared()
        self._use(connection)
        self._send_again(connection)


def _as_announced(connection: Connection) -> bool:
    """Whether a server that has said that it goes away has closed when it was done."""
    return connection.reason is not None and connection.reason.code == CloseCode.GOING_AWAY
