"""The clients of a server: who is logging in, who is in, and who has lost the link.

A connection passes through here three times: it is made for a socket that was accepted, it is let
in or refused, and it is counted out. The server is told by hooks.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
import time
import weakref
from collections.abc import Coroutine
from functools import partial
from typing import Any, NamedTuple

from .admission import Admission, Fault, Visit
from .away import Away
from .descriptors import ServerDescriptor
from .exceptions import AuthenticationError, ConnectionClosed, ProtocolError, RPCError
from .hooks import Hooks
from .peers import Peers
from .protocol.events import RESUME, ResumeWanted, VerifierNeeded, WelcomeNeeded
from .protocol.frames import CloseCode, OtherVersion
from .protocol.scram import REFUSED
from .protocol.session import EPOCH_BYTES, ID_BYTES, Session
from .rpc.router import Router
from .transport.background import Background
from .transport.connection import Connection, outlast_links
from .transport.life import ACCEPTING, Question
from .transport.link import SocketLink
from .transport.loop import Shared
from .transport.running import text_of
from .transport.settings import Settings
from .transport.tls import peer_names
from .users import Found, Users

__all__ = ["Clients"]

logger = logging.getLogger("conduit.server")

REPLACED = "replaced by a newer login"
AFTERWARDS = 30.0
"""Seconds that message handlers have when their peer has sent and closed."""


class _Joining(NamedTuple):
    """A login that is under way, and what ends it when it takes too long."""

    visit: Visit
    timer: asyncio.TimerHandle


class Clients:
    """The connections of one server.

    Args:
        descriptor: What the server is.
        router: Its handlers.
        users: Who may log in.
        hooks: What the application wants called.

    Attributes:
        connected: The clients that are in, by connection id; those that are away as well.
        peers: The same by who has logged in.
        admission: Says which sockets may go on to log in.
    """

    def __init__(
        self, descriptor: ServerDescriptor, router: Router, users: Users, hooks: Hooks
    ) -> None:
        self._descriptor = descriptor
        self._router = router
        self._users = users
        self._hooks = hooks
        self._settings = Settings.of(descriptor)
        self._epoch = secrets.token_bytes(EPOCH_BYTES)
        self.connected: dict[str, Connection] = {}
        self.peers = Peers()
        limits = descriptor.limits
        self.admission = Admission(
            most=limits.max_pending_logins,
            most_per_source=limits.max_pending_per_address,
            exempt=descriptor.exempt,
            proxies=descriptor.proxies,
        )
        self._away = Away(limits.max_away, limits.max_away_bytes)
        self._joining: dict[Connection, _Joining] = {}
        self._surplus: set[Connection] = set()
        self._replaced: dict[bytes, None] = {}
        self._lingering: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._waiting: dict[Connection, asyncio.Task[None]] = {}
        self._telling: dict[Connection, asyncio.Task[None]] = {}
        self._background = Background(logger)

    # What the server calls.

    async def drain(self, grace: float, spared: asyncio.Task[Any] | None) -> None:
        """Refuse who is logging in, and end every connection; see `Connection.drain`."""
        for connection in list(self._joining):
            self._refuse(connection, "busy", "the server stops", retry=True)
        ends = (one.drain(grace, spared) for one in list(self.connected.values()))
        await asyncio.gather(*ends, self._settings.keyed.drain(grace, spared))

    async def finish(self, seconds: float, spared: asyncio.Task[Any] | None) -> None:
        """Wait for hooks, for messages of clients that have closed, and for links."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        await self._background.finish(seconds, spared)
        await outlast_links(self, max(0.0, until - loop.time()))

    # What the listener calls.

    def connect(
        self, visit: Visit, link: SocketLink, transport: asyncio.Transport, binding: bytes | None
    ) -> Connection:
        """Return the connection for a socket that was accepted; its login begins.

        Args:
            visit: The socket, as admission knows it.
            link: The link over that socket.
            transport: What carries it.
            binding: The hash of the certificate that the client was shown, if there is one.
        """
        loop = asyncio.get_running_loop()
        descriptor = self._descriptor
        connection = Connection(
            Shared.of(loop),
            loop,
            self,
            self._router,
            self._settings,
            first_id=ACCEPTING,
            address=visit.address,
        )
        if self._count_linked() + len(self._joining) >= descriptor.max_connections:
            self._surplus.add(connection)
        left = visit.since + descriptor.limits.login_timeout - time.monotonic()
        timer = loop.call_later(left, self._too_slow, connection)
        self._joining[connection] = _Joining(visit, timer)
        visit.close = partial(self._give_place, connection)
        ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._users.start_login(
            connection.protocol,
            self._settings.capabilities,
            binding,
            frozenset() if ssl_object is None else peer_names(ssl_object),
        )
        return connection

    def _count_linked(self) -> int:
        """Count the sockets of clients that have been let in."""
        return len(self.connected) - len(self._away) + self._count_lingering()

    def _has_no_room(self, older: Connection | None) -> bool:
        """Whether there is no room for a surplus connection.

        Who has been let in before may come back to its session, though not any number of them: the
        sessions of those who are away are many more than connections may be.
        """
        if older is None:
            return True
        return older.away and self._count_linked() >= 2 * self._descriptor.max_connections

    def _count_lingering(self) -> int:
        """Count the sockets of clients that have gone and are slow to read what they were sent.

        Others close within a second, and who comes again at once is not to find them in its way.
        """
        for connection in list(self._lingering):
            if not connection.lingers(self):
                self._lingering.discard(connection)
        return sum(connection.unsent > 0 for connection in self._lingering)

    def _give_place(self, connection: Connection) -> None:
        reason = "too many others want to log in, and this client has said nothing yet"
        connection.fail(ConnectionClosed(reason), CloseCode.TRY_AGAIN_LATER, reason, abort=True)

    def _too_slow(self, connection: Connection) -> None:
        seconds = self._descriptor.limits.login_timeout
        reason = f"the login took more than {seconds:g} s"
        error = ConnectionClosed(reason, code=CloseCode.TOO_LATE)
        connection.fail(error, error.code, reason)

    # What connections call.

    def asked(self, connection: Connection, event: Question) -> None:
        """Go on with the login of a connection."""
        self._joining[connection].visit.spoke()
        older = self._older(event)
        if connection in self._surplus and self._has_no_room(older):
            most = self._descriptor.max_connections
            self._refuse(
                connection,
                "busy",
                f"the server is full: {most} connections (max_connections); try again later",
                retry=True,
            )
        elif isinstance(event, VerifierNeeded):
            if self._users.known_at_once:
                self._found(connection, event, self._users.find(event.user))
            else:
                self._wait(connection, self._look_up(connection, event))
        elif isinstance(event, ResumeWanted) and older is not None:
            self._joined(connection)
            self._surplus.discard(connection)
            older.roles = connection.roles  # they may have changed since the first login
            connection.welcome_back(older, event.accepted, *self._named)
        else:
            assert isinstance(event, (WelcomeNeeded, ResumeWanted))
            if isinstance(event, ResumeWanted) and event.id in self._replaced:
                self._refuse(connection, "refused", REPLACED)
                return
            if self._refuses_another(connection, event.identity):
                return
            if RESUME in connection.claims.features:
                connection.keeps = self._descriptor.resume_ttl
            connection.introduce(Session(secrets.token_bytes(ID_BYTES), self._epoch))
            if "client_connect" in self._hooks:
                self._wait(connection, self._ask_hooks(connection))
            else:
                self._let_in(connection)

    @property
    def _named(self) -> tuple[str, str]:
        """What the server calls itself."""
        return self._descriptor.name, self._descriptor.version

    def _older(self, event: Question) -> Connection | None:
        """Return the connection whose session a client wants to go on with, if it may.

        Before the client has proved who it is, this says only that there is such a session.
        """
        if isinstance(event, VerifierNeeded):
            return self.connected.get(event.session.hex())
        if not isinstance(event, ResumeWanted) or event.epoch != self._epoch:
            return None
        older = self.connected.get(event.id.hex())
        if older is None or older.identity != event.identity or not older.keeps:
            return None
        return older

    def _wait(self, connection: Connection, step: Coroutine[Any, Any, None]) -> None:
        """Run a step of a login that takes time; it ends with the login at the latest."""
        self._waiting[connection] = self._background.start(step)

    async def _look_up(self, connection: Connection, event: VerifierNeeded) -> None:
        try:
            found = await self._users.look_up(event.user)
        except Exception:
            logger.exception("looking up user %r failed", event.user)
            self._refuse(connection, "busy", "users cannot be looked up now", retry=True)
            return
        if not connection.closed:
            self._found(connection, event, found)
            connection.flush()

    def _found(self, connection: Connection, event: VerifierNeeded, user: Found) -> None:
        """Go on with the login of a user, who may have yet to prove who it is."""
        connection.roles = user.roles
        if not event.certified:
            connection.protocol.verifier_found(user.verifier)
        elif user.certificate:
            self.asked(connection, connection.protocol.certified())
        else:
            self._refuse(connection, "invalid_credentials", REFUSED)

    async def _ask_hooks(self, connection: Connection) -> None:
        try:
            await self._hooks.ask("client_connect", connection)
        except RPCError as exc:
            self._refuse(connection, "refused", text_of(exc) or "the server refused this client")
        except Exception:  # noqa: BLE001  # logged by Hooks.ask
            self._refuse(connection, "refused", "the server refused this client")
        except BaseException:
            self._refuse(connection, "refused", "the server refused this client")
            raise
        else:
            # A hook let it in; but it may have left meanwhile, or another may have come before it.
            if not self._let_in(connection):
                await self._hooks.tell("client_disconnect", connection, connection.reason)

    def _refuse(
        self, connection: Connection, code: str, message: str, *, retry: bool = False
    ) -> None:
        if not connection.closed:
            connection.protocol.refuse(
                code, message, retry=retry, retry_after=1.0 if retry else 0.0
            )
            error = AuthenticationError(message, code=code)
            connection.fail(error, CloseCode.LOGIN_FAILED, message)

    def _refuses_another(self, connection: Connection, identity: str) -> bool:
        """Refuse a second login of an identity, where there may be only one."""
        if self._descriptor.duplicate != "refuse":
            return False
        for other in self.peers.of(identity):
            if other.away:  # its link is dead, and it has not come back by itself
                self._replace(other)
        if not self.peers.of(identity):
            return False
        # It may come again: the first one may be dead, and not known to be yet.
        text = f"{identity!r} is logged in already; try again later"
        self._refuse(connection, "busy", text, retry=True)
        return True

    def _let_in(self, connection: Connection) -> bool:
        """Let a client in, unless it has gone, or may not come in any more."""
        # Once more, because another one may have come while hooks were asked.
        if connection.closed or self._refuses_another(connection, connection.identity):
            return False
        connection.welcome(*self._named, self._router.fingerprint(connection.roles))
        return True

    def opened(self, connection: Connection) -> None:
        """Count a client in."""
        self._joined(connection)
        self.connected[connection.id] = connection
        if self._descriptor.duplicate == "replace":
            for older in self.peers.of(connection.identity):
                self._remember_replaced(older.session.id)
                self._replace(older)
        self.peers.add(connection)
        logger.info("%r logged in as %r", connection, connection.identity)

    def _joined(self, connection: Connection) -> None:
        """Know that a login is done."""
        visit, timer = self._joining.pop(connection)
        timer.cancel()
        visit.end()
        self._waiting.pop(connection, None)

    def _replace(self, older: Connection) -> None:
        older.fail(ConnectionClosed(REPLACED), CloseCode.REFUSED, REPLACED)

    def _remember_replaced(self, session: bytes) -> None:
        """Know a session that a newer login has ended, as its client may not have heard of it.

        It asks for that session when it comes back, and would replace the newer one in its turn.
        """
        self._replaced[session] = None
        if len(self._replaced) > self._descriptor.limits.max_away:
            del self._replaced[next(iter(self._replaced))]

    def away(self, connection: Connection, reason: ConnectionClosed) -> None:
        """Keep the session of a client that has lost its link."""
        logger.info("%r has lost its link: %s", connection, reason)
        self._tell("client_away", connection, reason)
        self._away.add(connection)

    def returned(self, connection: Connection) -> None:
        """Know that a client is back."""
        logger.info("%r is back", connection)
        self._away.discard(connection)
        self._tell("client_return", connection)

    def _tell(self, name: str, connection: Connection, *args: Any) -> None:
        """Run the hooks of a moment behind those of earlier moments of the connection."""
        if name not in self._hooks:
            return
        told = self._tell_after(self._telling.get(connection), name, connection, *args)
        self._telling[connection] = task = self._background.start(told)

        def forget(done: asyncio.Task[None]) -> None:
            if self._telling.get(connection) is done:
                del self._telling[connection]

        task.add_done_callback(forget)

    async def _tell_after(self, before: asyncio.Task[None] | None, name: str, *args: Any) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self._hooks.tell(name, *args)

    def leaving(self, connection: Connection, reason: ConnectionClosed) -> None:
        """Do nothing: nobody else can be asked in place of a client."""

    def ended(self, connection: Connection, error: Exception) -> None:
        """Count a client, or a login that failed, out."""
        self._away.discard(connection)
        self._surplus.discard(connection)
        waiting = self._waiting.pop(connection, None)
        kept_waiting = waiting is not None and not waiting.done()
        if waiting is not None and waiting is not asyncio.current_task():
            waiting.cancel()
        joining = self._joining.pop(connection, None)
        if joining is not None:
            joining.timer.cancel()
            # Whoever is kept waiting here has done nothing wrong, however it ends.
            joining.visit.end(None if kept_waiting else _fault(error))
            logger.info("login from %s failed: %s", connection.address, error)
        if connection.handling:
            # Its peer has closed as it should, and what it sent before is still being handled.
            self._background.start(connection.finish_messages(AFTERWARDS, None))
        if self.connected.pop(connection.id, None) is not None:
            self.peers.discard(connection)
            self._lingering.add(connection)
            logger.info("%r has gone: %s", connection, error)
            self._tell("client_disconnect", connection, connection.reason)


_FAULTS = {
    "busy": None,
    "refused": None,
    "unsupported_version": Fault.SILENT,
    "bad_request": Fault.VIOLATION,
}


def _fault(error: Exception) -> Fault | None:
    """Say what was wrong with a login that has failed, if it is the client's fault."""
    if isinstance(error, AuthenticationError):
        return _FAULTS.get(error.code, Fault.PASSWORD)
    if isinstance(error, ProtocolError) and not isinstance(error, OtherVersion):
        return Fault.VIOLATION
    if isinstance(error, ConnectionClosed) and error.code == CloseCode.TOO_LATE:
        return Fault.SLOW
    return Fault.SILENT
