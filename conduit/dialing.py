"""How a client comes to a connection: it reaches one of its servers and logs in there."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import sys
from collections.abc import Callable
from typing import NamedTuple

from .descriptors import TLS, Address, ClientDescriptor, reveal
from .exceptions import AuthenticationError, ConnectionClosed, ProtocolError, Unavailable
from .protocol.events import KeysNeeded
from .protocol.frames import CloseCode
from .protocol.login import ClientLogin
from .protocol.session import Session
from .protocol.tokens import ITERATIONS as TOKEN_ITERATIONS
from .protocol.tokens import user_of
from .rpc.router import Router
from .transport.background import Background
from .transport.connection import Connection
from .transport.keys import client_keys, forget_keys, known_keys
from .transport.life import CONNECTING, Owner
from .transport.limited import timeout
from .transport.link import SocketLink
from .transport.listeners import connect, refused
from .transport.loop import Shared
from .transport.settings import Settings
from .transport.tls import client_context, peer_end_point

__all__ = ["Dialer"]


class Wish(NamedTuple):
    """What a client wants of an attempt. It knows the client, and is kept only as long as it lasts.

    Attributes:
        owner: The owner of the connection.
        session: Returns the session that is to go on, if one waits for that.
        connected: Returns whether the client has a connection that it can use.
        give_up: Told of a connection that is not to be used: its login has ended too late.
    """

    owner: Owner
    session: Callable[[], Session | None]
    connected: Callable[[], bool]
    give_up: Callable[[Connection], None]


class Dialer:
    """Makes the connections of one client, one at a time.

    Args:
        descriptor: What the client is, and where its servers are.
        settings: What that says about each connection.
        router: Its handlers.
        background: Runs what takes long.

    A connection tells its owner when the login is done; that is told on by `succeeded` or `failed`.
    """

    def __init__(
        self,
        descriptor: ClientDescriptor,
        settings: Settings,
        router: Router,
        background: Background,
    ) -> None:
        self._descriptor = descriptor
        self._settings = settings
        self._router = router
        self._background = background
        self._joining: Connection | None = None
        self._address: Address | None = None
        self._login: asyncio.Future[None] | None = None

    async def dial(self, wish: Wish) -> None:
        """Try each address once, until a login is done.

        Raises:
            Exception: The first error of those that were met, for `Client.connect` to tell of; the
                others are its notes, where Python has them.
        """
        failure: Exception | None = None
        for address in self._descriptor.addresses:
            try:
                await self._log_in(wish, address)
            except (OSError, ConnectionClosed, ProtocolError, Unavailable) as exc:
                if failure is None:
                    failure = exc
                elif sys.version_info >= (3, 11):
                    failure.add_note(str(exc))
            else:
                return
        assert failure is not None
        raise failure

    async def _log_in(self, wish: Wish, address: Address) -> None:
        try:
            await self._within_timeout(wish, address, can_bind=False)
        except AuthenticationError as exc:
            cannot_bind = exc.code == "unsupported_mechanism" and not self._descriptor.certified
            if not cannot_bind or not self._may_go_unbound(address):
                raise
            # The server cannot bind. Saying so under the proof exposes whoever only pretended it.
            await self._within_timeout(wish, address, can_bind=True)

    async def _within_timeout(self, wish: Wish, address: Address, *, can_bind: bool) -> None:
        seconds = self._descriptor.connect_timeout
        try:
            async with timeout(seconds):
                await self._open(wish, address, can_bind=can_bind)
        except asyncio.TimeoutError as exc:
            if wish.connected():
                return  # the answer came at the last moment, and the session goes on
            if isinstance(exc, OSError) and exc.errno:
                raise  # the operating system's own, which says more
            raise TimeoutError(
                f"{address} did not complete the login within {seconds:g} s (connect_timeout)"
            ) from None

    def _may_go_unbound(self, address: Address) -> bool:
        tls = self._descriptor.tls
        if isinstance(tls, ssl.SSLContext):
            return address.tls and tls.verify_mode is ssl.CERT_REQUIRED
        return address.tls and (tls is None or tls.verify)

    async def _open(self, wish: Wish, address: Address, *, can_bind: bool) -> None:
        tls = (self._descriptor.tls or TLS()) if address.tls else None
        loop = asyncio.get_running_loop()
        self._login = login = loop.create_future()
        self._address = address
        connection: Connection | None = None
        itself = False

        def make(link: SocketLink, transport: asyncio.Transport) -> Connection:
            nonlocal itself
            itself = transport.get_extra_info("sockname") == transport.get_extra_info("peername")
            return self._make_connection(wish, transport, unbound=can_bind)

        try:
            connection = await connect(
                address,
                make,
                tls=None if tls is None else client_context(tls),
                server_name=tls.server_name if isinstance(tls, TLS) else None,
                prefer_ipv6=self._descriptor.use_ipv6,
                patience=self._descriptor.connect_timeout,
            )
            await login
        except BaseException as exc:
            if connection is not None:
                wish.give_up(connection)
                await connection.abort()
            if itself and isinstance(exc, Exception):
                # The kernel may choose the port of a server that is down, and join both ends.
                raise refused(address) from exc
            if isinstance(exc, (ConnectionClosed, ProtocolError)):
                raise _explained(exc, address) from exc
            raise
        finally:
            if self._login is login:  # the link may be lost by now, and another attempt under way
                self._joining = self._login = None
            login.cancel()

    def _make_connection(
        self, wish: Wish, transport: asyncio.Transport, *, unbound: bool
    ) -> Connection:
        loop = asyncio.get_running_loop()
        descriptor = self._descriptor
        connection = Connection(
            Shared.of(loop),
            loop,
            wish.owner,
            self._router,
            self._settings,
            first_id=CONNECTING,
            address=transport.get_extra_info("peername"),
        )
        self._joining = connection
        protocol = connection.protocol
        binding = None
        tls = descriptor.tls
        wants_binding = not isinstance(tls, TLS) or tls.channel_binding
        ssl_object: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if ssl_object is not None and wants_binding and not unbound:
            binding = peer_end_point(ssl_object)
        certified = descriptor.certified
        fewest = descriptor.limits.min_iterations
        if descriptor.password is not None and user_of(self._password()) is not None:
            fewest = min(fewest, TOKEN_ITERATIONS)  # nobody finds its secret by trying
        protocol.open(
            ClientLogin(
                protocol.send_login,
                capabilities=self._settings.capabilities,
                nonce=secrets.token_urlsafe(18),
                user=descriptor.user if descriptor.password is not None or certified else None,
                external=certified,
                agent=f"{descriptor.name}/{descriptor.version}",
                binding=binding,
                can_bind=unbound,
                min_iterations=fewest,
                max_iterations=descriptor.limits.max_iterations,
                compress=descriptor.enable_compression,
                session=wish.session(),
                methods=self._router.fingerprint(),
            )
        )
        return connection

    # What the client calls, told by the connection.

    def prove(self, connection: Connection, event: KeysNeeded) -> None:
        """Derive the keys that the proof of a login takes, unless they are known."""
        keys = known_keys(self._password(), event.salt, event.iterations)
        if keys is not None:
            connection.protocol.keys_derived(keys)
        else:
            self._background.start(self._derive(connection, event))

    def _password(self) -> str:
        return reveal(self._descriptor.password)

    async def _derive(self, connection: Connection, event: KeysNeeded) -> None:
        try:
            keys = await client_keys(
                str(self._address), self._password(), event.salt, event.iterations
            )
        except Unavailable as exc:
            connection.fail(exc, CloseCode.ABNORMAL, exc.message)
            return
        if not connection.closed:
            connection.protocol.keys_derived(keys)
            connection.flush()

    def succeeded(self) -> None:
        """Know that the login is done."""
        if self._login is not None and not self._login.done():
            self._login.set_result(None)

    def failed(self, connection: Connection, error: Exception) -> bool:
        """Know that a connection is over; True if it is the one that was logging in."""
        if connection is not self._joining or self._login is None or self._login.done():
            return False
        wrong = isinstance(error, AuthenticationError) and error.code == "invalid_credentials"
        if wrong and self._descriptor.password is not None:
            forget_keys(self._password())
        self._login.set_exception(error)
        return True


def _explained(error: ConnectionClosed | ProtocolError, address: Address) -> Exception:
    """Say where, and what it may mean that the login did not complete."""
    doubt = "do both sides use TLS or neither"
    if address.tls:  # TLS is up, and with TLS 1.3 a client learns only later that it is not let in
        doubt = "does it want a certificate of this client, TLS(certificate=...)"
    told = str(error).rstrip("?")
    text = f"{address} did not complete the login: {told}; is it a conduit server, and {doubt}?"
    if isinstance(error, ConnectionClosed):
        return ConnectionClosed(error.reason, code=error.code, message=text)
    return ProtocolError(text, close_code=error.close_code)
