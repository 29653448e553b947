"""From an address to a socket: listening ones on a server, a connected one on a client."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

from ..admission import Admission, Fault, Visit
from ..descriptors import Address
from ..exceptions import ProtocolError
from .connection import Connection
from .limited import timeout
from .link import SocketLink
from .loop import Shared
from .proxied import read_proxy_header
from .tls import Shown

__all__ = ["Listener", "bind", "connect", "refused"]

logger = logging.getLogger("conduit.server")

BACKLOG = 4096
AT_ONCE = 64
"""Sockets that are taken in one turn of the event loop."""
TLS_TIMEOUT = 5.0
"""Seconds for the TLS handshake of a client, and before it for the header of its proxy."""
EXHAUSTED_PAUSE = 1.0
"""Seconds to wait when the process has no descriptor left for a new connection."""

_RESET = struct.pack("ii", 1, 0)

MakeConnection = Callable[[SocketLink, asyncio.Transport], Connection]
Welcome = Callable[[Visit, SocketLink, asyncio.Transport, "bytes | None"], Connection]
"""Makes a connection whose login is bound to the certificate that its peer was shown."""


async def bind(address: Address, *, ipv6: bool) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: The address is in use, not this machine's, or does not resolve.
    """
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ipv6 or ":" in address.host else socket.AF_INET
    infos = await _resolve(loop, address, family, flags=socket.AI_PASSIVE)
    # With the protocol named, asyncio knows that accepted sockets are TCP and sets TCP_NODELAY.
    listening = socket.socket(infos[0][0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(infos[0][4])
        listening.listen(BACKLOG)
    except OSError as exc:
        listening.close()
        raise _explained(exc, f"cannot listen on {address}") from exc
    except BaseException:
        listening.close()
        raise
    return listening


class Listener:
    """Accepts connections, and counts them before TLS, so that a silent peer costs no more.

    Args:
        listening: The socket.
        tls: What a TLS server shows, or None.
        admission: Counts the sockets, and refuses those that are too many.
        make: Makes the connection of an accepted socket, and ends its visit.
        patience: Seconds for what comes before the login: the header of a proxy, and TLS.

    Attributes:
        tls: As above; another one is for the sockets that are accepted from then on.
    """

    def __init__(
        self,
        listening: socket.socket,
        tls: Shown | None,
        admission: Admission,
        make: Welcome,
        *,
        patience: float = TLS_TIMEOUT,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = listening
        self.tls = tls
        self._admission = admission
        self._make = make
        self._patience = min(patience, TLS_TIMEOUT)
        self._shared = Shared.of(self._loop)
        self._starting: dict[asyncio.Task[None], Visit] = {}
        self._accepted: dict[socket.socket, Visit] = {}
        self._paused: asyncio.TimerHandle | None = None
        self._loop.add_reader(listening, self._accept)

    @property
    def starting(self) -> int:
        """Sockets that are taken but have no connection yet: their proxy is to speak, or TLS."""
        return len(self._starting)

    def _accept(self) -> None:
        """Take the sockets that wait; no task, so that a cancelled one cannot lose any."""
        for _ in range(AT_ONCE):
            try:
                accepted, address = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                logger.warning("cannot accept a connection: %s", exc)
                self._loop.remove_reader(self._socket)
                self._paused = self._loop.call_later(EXHAUSTED_PAUSE, self._go_on)
                return
            accepted.setblocking(False)
            visit = self._admission.enter(address)
            if visit is None:
                _reset(accepted)
                continue
            self._accepted[accepted] = visit
            task = self._loop.create_task(self._start(accepted, visit))
            visit.close = task.cancel
            self._starting[task] = visit
            task.add_done_callback(self._starting.pop)

    def _go_on(self) -> None:
        self._paused = None
        self._loop.add_reader(self._socket, self._accept)

    async def _start(self, accepted: socket.socket, visit: Visit) -> None:
        context, end_point = self.tls or (None, None)
        try:
            if visit.proxied and not await self._reveal(accepted, visit):
                return
            del self._accepted[accepted]  # from here on asyncio owns it
            await self._loop.connect_accepted_socket(
                lambda: SocketLink(
                    self._shared,
                    lambda link, transport: self._make(visit, link, transport, end_point),
                ),
                accepted,
                ssl=context,
                ssl_handshake_timeout=self._patience if context is not None else None,
            )
        except (OSError, ssl.SSLError) as exc:
            why = str(exc) or "it went away; does it trust the certificate?"
            logger.info("%s did not complete the TLS handshake: %s", visit.address, why)
            visit.end(_tls_fault(exc))
            accepted.close()
        except asyncio.CancelledError:
            visit.end()
            if self._accepted.pop(accepted, None) is not None:
                _reset(accepted)
            raise

    async def _reveal(self, accepted: socket.socket, visit: Visit) -> bool:
        """Let a proxy say whose socket this is; False if the socket was closed."""
        try:
            async with timeout(self._patience):
                source = await read_proxy_header(accepted)
        except (OSError, ProtocolError, asyncio.TimeoutError) as exc:
            why = str(exc) or f"no PROXY header came within {self._patience:g} s"
            logger.warning("a connection of the proxy %s is closed: %s", visit.address[0], why)
        else:
            if visit.reveal(source):
                return True
        del self._accepted[accepted]
        visit.end()
        _reset(accepted)
        return False

    async def close(self) -> None:
        """Stop listening; connections that are up stay so."""
        if self._socket.fileno() < 0:
            return
        if self._paused is not None:
            self._paused.cancel()
        else:
            self._loop.remove_reader(self._socket)
        for task, visit in self._starting.items():
            if visit.proxied or self.tls is not None:  # the others are done in a moment
                task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for accepted, visit in self._accepted.items():  # asyncio does not own them yet
            visit.end()
            accepted.close()
        self._accepted.clear()
        self._socket.close()


def _reset(accepted: socket.socket) -> None:
    """Close a socket without a goodbye, which leaves nothing behind in the kernel."""
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    accepted.close()


def _tls_fault(exc: OSError) -> Fault:
    """Say what was wrong with a client whose TLS handshake failed.

    One that does not trust the certificate has done nothing that it should not.
    """
    if isinstance(exc, ConnectionAbortedError):  # asyncio's word for a handshake that takes long
        return Fault.SLOW
    if isinstance(exc, ssl.SSLError) and "ALERT" not in (exc.reason or "ALERT"):
        return Fault.VIOLATION
    return Fault.SILENT


async def connect(
    address: Address,
    make: MakeConnection,
    *,
    tls: ssl.SSLContext | None,
    server_name: str | None,
    prefer_ipv6: bool,
    patience: float,
) -> Connection:
    """Return a connection whose link is up; the login is still to come.

    A name that has several addresses is tried in order, those of the preferred family first.

    Args:
        address: Where to connect to.
        make: Makes the connection.
        tls: The context for TLS; None for plain TCP.
        server_name: Whom the certificate must name, if that is not the host.
        prefer_ipv6: Which family comes first.
        patience: Seconds that the caller waits for all of it. uvloop keeps what belongs to a
            TLS handshake that nobody waits for any more for as long as that may take.

    Raises:
        OSError: The name does not resolve, or nothing answers; the text says what to check.
        ssl.SSLError: The server's certificate is not trusted, or it does not speak TLS.
    """
    loop = asyncio.get_running_loop()
    infos = await _resolve(loop, address, socket.AF_UNSPEC)
    preferred = socket.AF_INET6 if prefer_ipv6 else socket.AF_INET
    infos.sort(key=lambda info: info[0] != preferred)
    made: list[Connection] = []

    def keep(link: SocketLink, transport: asyncio.Transport) -> Connection:
        made.append(make(link, transport))
        return made[-1]

    failure: OSError | None = None
    for family, _, _, _, target in infos:
        try:
            await loop.create_connection(
                lambda: SocketLink(Shared.of(loop), keep),
                target[0],
                target[1],
                family=family,
                ssl=tls,
                server_hostname=(server_name or address.host) if tls is not None else None,
                ssl_handshake_timeout=patience if tls is not None else None,
            )
        except asyncio.CancelledError:
            for connection in made:  # uvloop does not tell the links of a cancelled connect
                connection.link_lost(None)
            raise
        except ssl.SSLError as exc:
            raise _explained_tls(exc, address) from exc
        except OSError as exc:
            if tls is not None and not exc.errno:
                raise _explained_tls(exc, address) from exc
            failure = failure or exc
        else:
            return made[0]
    assert failure is not None
    raise _explained(failure, f"cannot connect to {address}") from failure


async def _resolve(
    loop: asyncio.AbstractEventLoop, address: Address, family: int, flags: int = 0
) -> list[Any]:
    if "\0" in address.host:  # where the system would stop reading
        raise _no_name(address)
    for kind in (socket.AF_INET, socket.AF_INET6):
        # An address needs no lookup, which would go through a thread.
        with contextlib.suppress(OSError, UnicodeError):
            if family not in (kind, socket.AF_UNSPEC):
                continue
            socket.inet_pton(kind, address.host)
            return [(kind, socket.SOCK_STREAM, 0, "", (address.host, address.port))]
    try:
        return list(
            await loop.getaddrinfo(
                address.host, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
            )
        )
    except UnicodeError as exc:  # a label that is empty or too long, as in "a..b"
        raise _no_name(address) from exc
    except socket.gaierror as exc:
        raise socket.gaierror(
            exc.errno,
            f"cannot resolve {address.host!r} of {address}: {exc.strerror}; check the host name",
        ) from exc


def _no_name(address: Address) -> OSError:
    return socket.gaierror(
        socket.EAI_NONAME, f"{address.host!r} of {address} is no host name; check it"
    )


_HINTS: dict[type[OSError], str] = {
    ConnectionRefusedError: "nothing listens there; is the server running, and is the port right?",
    ConnectionResetError: "it hung up at once; is it full, or have logins from here failed?",
    TimeoutError: "no answer; is a firewall in between?",
    PermissionError: "ports below 1024 need privileges; choose another",
}


_OTHER_NAME = "connect by a name that it has, or say it with TLS(server_name=...)"
_CERTIFICATE_HINTS = {  # by the codes of OpenSSL, X509_V_ERR_...
    9: "is the clock right?",
    10: "the server needs a new one; or is the clock wrong?",
    62: _OTHER_NAME,
    64: _OTHER_NAME,
}


def refused(address: Address) -> OSError:
    """Return the error for an address where nothing listens."""
    return _explained(
        ConnectionRefusedError(errno.ECONNREFUSED, ""), f"cannot connect to {address}"
    )


def _explained(exc: OSError, what: str) -> OSError:
    """Return the same kind of error with a text that names the address and what to do."""
    text = os.strerror(exc.errno) if exc.errno else str(exc) or type(exc).__name__
    hint = _HINTS.get(type(exc), "")
    if "already in use" in text.lower() or exc.errno == errno.EADDRINUSE:
        hint = "another program listens there; stop it, or choose another port (0 takes a free one)"
    parts = [f"{what}: {text.lower()}", hint] if hint else [f"{what}: {text.lower()}"]
    return type(exc)(exc.errno, "; ".join(parts))


def _explained_tls(exc: OSError, address: Address) -> OSError:
    """Return an error that says what to check when TLS does not come about."""
    reason = getattr(exc, "reason", None) or str(exc) or "the peer closed the connection"
    hint = "does the server speak TLS on this port?"
    if isinstance(exc, ssl.SSLCertVerificationError):
        reason = f"the certificate is not trusted: {exc.verify_message.rstrip('.')}"
        hint = _CERTIFICATE_HINTS.get(exc.verify_code, "TLS(ca=...) names the authority to trust")
    return type(exc)(exc.errno or 1, f"TLS with {address} failed: {reason}; {hint}")
