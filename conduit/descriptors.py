"""What a server or a client is told when it is made. Sizes are in bytes, times in seconds.

Every field changes something; unknown fields are an error.
"""

from __future__ import annotations

import difflib
import re
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .idempotency import IdempotencyStore
from .protocol import tokens
from .protocol.scram import Verifier, normalise
from .roles import Roles, role_names

__all__ = [
    "TLS",
    "Address",
    "ClientDescriptor",
    "Limits",
    "ServerDescriptor",
    "User",
    "reveal",
]

Seconds = Annotated[float, Field(ge=0.001, le=1_000_000, allow_inf_nan=False)]
"""A time that can be told in milliseconds."""
Bytes = Annotated[int, Field(gt=0, le=64 * 1024 * 1024)]
Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1, max_length=40)]


def _hide(value: Any) -> Any:
    return SecretStr(value) if isinstance(value, str) else value


Secret = Annotated[SecretStr | str | None, BeforeValidator(_hide)]
"""Text that is never shown. A plain `str` is accepted; what is kept is always a `SecretStr`."""


def _check_network(network: str) -> str:
    ip_network(network)
    return network


Networks = tuple[Annotated[str, AfterValidator(_check_network)], ...]


class _Model(BaseModel):
    # An error must not show the password that it complains about.
    model_config = ConfigDict(
        extra="forbid", frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, given: Any) -> Any:
        """Say of an unknown field what it may have been meant to be."""
        if isinstance(given, dict):
            known = cls.model_fields
            near = {name: _near(str(name), known) for name in given if name not in known}
            if any(near.values()):
                listed = (f"{name!r} {hint}".rstrip() for name, hint in near.items())
                raise PydanticCustomError(
                    "extra_forbidden",
                    "Extra inputs are not permitted: {names}",
                    {"names": ", ".join(listed)},
                )
        return given


def _near(name: str, known: Iterable[str]) -> str:
    """Return a hint with the fields that a name is like or a part of, or nothing."""
    found = [one for one in known if one.startswith(name) or one.endswith(f"_{name}")]
    found = found[:3] or difflib.get_close_matches(name, known, 1)
    return f"(did you mean {' or '.join(found)}?)" if name and found else ""


def reveal(secret: SecretStr | str | None) -> str:
    """Return the text of a secret that is there."""
    assert isinstance(secret, SecretStr)
    return secret.get_secret_value()


def _check_verifier(verifier: SecretStr | None) -> SecretStr | None:
    if verifier is not None:
        Verifier.parse(reveal(verifier))
    return verifier


class User(_Model):
    """Who may log in, and what for.

    Attributes:
        verifier: What `hash_password` makes of the password or the token. A plain `str` is
            accepted; what is kept is a `SecretStr`. None for a user who has no password.
        certificate: Whether a certificate with the user's name, signed by `TLS.ca`, is enough.
        roles: One role or several; `requires=` of handlers asks for them. What is kept is a
            `frozenset`.
    """

    verifier: Secret = None
    certificate: bool = False
    roles: Annotated[frozenset[str] | Roles, BeforeValidator(role_names)] = frozenset()

    _verifier = field_validator("verifier")(_check_verifier)

    @model_validator(mode="after")
    def _may_log_in(self) -> User:
        if self.verifier is None and not self.certificate:
            raise ValueError("a user needs a verifier, or certificate=True, to log in at all")
        return self


def _as_user(user: User | SecretStr | str) -> User:
    """Return a user; who is given as a verifier has no roles.

    Raises:
        ValueError: The verifier is none; the text does not quote it.
    """
    if isinstance(user, User):
        return user
    text = user.get_secret_value() if isinstance(user, SecretStr) else user
    Verifier.parse(text)  # which says what is wrong in fewer words than the model
    return User(verifier=text)


UserLookup = Callable[[str], Awaitable["User | SecretStr | str | None"]]
"""`await lookup(user)` returns the user, or only the verifier, or None."""


def _check_server_name(name: str | None) -> str | None:
    """Refuse at once what TLS could not look for when a client connects."""
    try:
        named = (name or "").encode("idna")
    except UnicodeError:
        named = b"\0"
    if b"\0" in named:
        raise ValueError(f"server_name must be the name of a host, not {name!r:.80}")
    return name


class TLS(_Model):
    """Certificates. The files are read when a server starts, and at each attempt of a client.

    Attributes:
        certificate: PEM file of this side's certificate chain. A server needs one; a client shows
            its own when the server asks for it (mutual TLS).
        key: PEM file of the private key; by default it is in the certificate's file.
        key_password: Opens an encrypted key.
        ca: PEM file of the authorities to trust. On a server it means that clients must show a
            certificate; on a client it stands in for the system's authorities.
        verify: Client only. False trusts any certificate, and therefore demands that the login is
            bound to it: somebody in between who does not know the password is still found out.
        server_name: Client only. The name that the certificate must have, if not the host's.
        channel_binding: Bind the login to the server's certificate (RFC 5929). Switch it off when
            TLS ends at a proxy that has another certificate.
    """

    certificate: Path | str | None = None
    key: Path | str | None = None
    key_password: Secret = None
    ca: Path | str | None = None
    verify: bool = True
    server_name: str | None = None
    channel_binding: bool = True

    _server_name = field_validator("server_name")(_check_server_name)

    @model_validator(mode="after")
    def _binding_without_verification(self) -> TLS:
        if not self.verify and not self.channel_binding:
            raise ValueError(
                "verify=False needs channel_binding=True, or nothing is checked at all"
            )
        return self


class Limits(_Model):
    """What one connection may use.

    Attributes:
        max_payload: Bytes of one value that this side accepts: the arguments of a call, its result,
            the data of a message. At most 64 MiB.
        max_calls: Calls that this side serves at once; further ones wait at the caller.
        max_running: Handlers that may run at once on the event loop, for all peers together.
            Further calls are refused, but each peer may always have one.
        max_timeout: Server only. Seconds that a call may run, whatever its caller asks for; None
            for no limit. Streams, and methods with a `timeout=` of their own, have none but that.
        max_messages: Messages that the peer may send ahead of this side's handlers.
        max_message_bytes: The same in bytes.
        max_stream_items: Items of each stream that the peer may send ahead of their consumer here.
        max_stream_bytes: The same in bytes.
        outbox_bytes: Unacknowledged bytes from which senders wait.
        login_timeout: Seconds from the connection to the end of the login, TLS included.
        max_pending_logins: Server only. Connections that may be logging in at the same time. Those
            that say nothing give way to newcomers.
        max_pending_per_address: Server only. Those of one address, or of one IPv6 /64.
        max_buffered: Server only. Bytes that may wait in all connections together, to be taken by
            their peers or by handlers; of more than that those with the most end.
        max_away: Server only. Sessions that are kept for clients which have lost their links; of
            more than that the oldest end.
        max_away_bytes: Server only. The same for what waits in them, in bytes.
        min_iterations: Client only. A server that asks for fewer PBKDF2 iterations is refused: it
            could crack the proof.
        max_iterations: Client only. A server that asks for more is refused: it only burns time.
    """

    max_payload: Bytes = 1024 * 1024
    max_calls: Annotated[int, Field(gt=0, le=65536)] = 256
    max_running: Annotated[int, Field(gt=0)] = 10_000
    max_timeout: Seconds | None = 3600.0
    max_messages: Annotated[int, Field(gt=0, le=65536)] = 256
    max_message_bytes: Bytes = 1024 * 1024
    max_stream_items: Annotated[int, Field(gt=0, le=65536)] = 4096
    max_stream_bytes: Bytes = 256 * 1024
    outbox_bytes: Annotated[int, Field(gt=0)] = 8 * 1024 * 1024
    login_timeout: Seconds = 10.0
    max_pending_logins: Annotated[int, Field(gt=0)] = 256
    max_pending_per_address: Annotated[int, Field(gt=0)] = 32
    max_buffered: Annotated[int, Field(gt=0)] = 512 * 1024 * 1024
    max_away: Annotated[int, Field(gt=0)] = 1000
    max_away_bytes: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    min_iterations: Annotated[int, Field(ge=4096)] = 100_000
    max_iterations: Annotated[int, Field(ge=4096)] = 2_000_000

    @model_validator(mode="after")
    def _consistent(self) -> Limits:
        if self.max_buffered < self.max_payload:
            raise ValueError(
                f"max_buffered ({self.max_buffered}) must not be less than max_payload "
                f"({self.max_payload}), or no such payload could ever come in"
            )
        return self


class Address(_Model):
    """Where to listen, or where to connect to.

    Attributes:
        host: Name or address, IPv6 without brackets.
        port: TCP port.
        tls: Whether the URL asks for TLS.
    """

    host: str
    port: Port
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `tcp://host:port` or `tls://host:port`.

        Raises:
            ValueError: The text is not such a URL; it says what is wrong.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise ValueError(f"{_without_password(url)!r} is not an address: {exc}") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("a URL must not hold a password; use password= and user=")
        if parts.scheme not in ("tcp", "tls"):
            raise ValueError(
                f"{url!r} has scheme {parts.scheme!r}; use tcp://host:port or tls://host:port"
            )
        if not host or port is None or parts.path or parts.query or parts.fragment:
            raise ValueError(f"{url!r} must be {parts.scheme}://host:port and nothing more")
        return cls(host=host, port=port, tls=parts.scheme == "tls")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//***@", url)


def _check_password(password: SecretStr | None) -> SecretStr | None:
    if password is not None:
        normalise(reveal(password))
    return password


class ServerDescriptor(_Model):
    """What a server is.

    Exactly one of `password`, `verifier` and `users` says who may log in. None of them is allowed
    on a loopback address only.

    Attributes:
        password: One password for the user `default`.
        verifier: The same without the plain password, from `conduit hash-password`; recommended for
            production, because it stays the same over restarts.
        users: User name to `User`, or to the verifier of a user without roles; a mapping, which is
            copied, or an async function that returns None for a user who does not exist.
        mock_secret: Random text of 16 characters or more that makes the salts of users who do not
            exist. Keep it over restarts, and share it between servers with the same users, where
            nobody is to find out by a salt that changes who exists. By default it is a new one at
            each start.
        name: What the server calls itself to its clients.
        version: The version of the application.
        host: Address to listen on; 0.0.0.0 means every IPv4 interface, and every IPv6 one with
            `ipv6=True`.
        port: TCP port; 0 takes a free one, which `server.address` tells.
        ipv6: Listen on IPv6.
        max_connections: Sockets at once, those that have not logged in included.
        duplicate: What a second login of the same user does while the first one is connected:
            nothing to it, closes it with 4403, after which it stays away, or is refused itself.
            The latter two need `users`.
        heartbeat_interval: Seconds of silence after which either side pings.
        heartbeat_timeout: Seconds of silence after which a peer counts as dead.
        enable_compression: Compress payloads of 1 KiB to 1 MiB when that makes them smaller.
        enable_backpressure: Make senders wait when a peer does not keep up; False refuses them.
        watchdog: Seconds for which a handler may hold the event loop before it is named in the log,
            with the lines of code that it has reached; None looks away.
        resume_ttl: Seconds for which the session of a client that has lost its link is kept: calls
            go on, and what is sent waits for the client. 0 ends it at once.
        idempotency: Where the answers to calls with a key are kept; by default
            `MemoryStore()`, in the memory of this process.
        idempotency_ttl: Seconds for which they are kept.
        rpc_timeout: Default deadline in seconds of calls that the server makes; None for none.
        debug: Show callers the traceback of a handler that fails; for development only.
        tls: Certificates, or a context of your own; None serves plain TCP.
        proxies: Networks, as "10.0.0.0/8", whose connections must begin with the header of the
            PROXY protocol, version 1 or 2; what it says is the client's address. From anywhere else
            no such header is accepted.
        exempt: Networks to which nothing applies that is counted by address: the number of
            logins at the same time, and penalties for those that fail.
        limits: What one connection may use.
    """

    password: Secret = None
    verifier: Secret = None
    users: Annotated[
        Mapping[str, User | SecretStr | str] | UserLookup | None, Field(repr=False, exclude=True)
    ] = None
    mock_secret: Secret = None
    name: Name = "conduit-server"
    version: Annotated[str, Field(max_length=20)] = "1.0.0"
    host: str = "0.0.0.0"  # the documented default; every start without TLS warns
    port: Port = 8080
    ipv6: bool = False
    max_connections: Annotated[int, Field(gt=0)] = 100
    duplicate: Literal["allow", "replace", "refuse"] = "allow"
    heartbeat_interval: Seconds = 30.0
    heartbeat_timeout: Seconds = 90.0
    enable_compression: bool = False
    enable_backpressure: bool = True
    watchdog: Seconds | None = 0.25
    resume_ttl: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)] = 30.0
    idempotency: Annotated[IdempotencyStore | None, Field(repr=False, exclude=True)] = None
    idempotency_ttl: Seconds = 600.0
    rpc_timeout: Seconds | None = 30.0
    debug: bool = False
    tls: TLS | ssl.SSLContext | None = None
    proxies: Networks = ()
    exempt: Networks = ("127.0.0.0/8", "::1/128")
    limits: Limits = Limits()

    _password = field_validator("password")(_check_password)

    _verifier = field_validator("verifier")(_check_verifier)

    @field_validator("mock_secret")
    @classmethod
    def _check_mock_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret) < 16:
            raise ValueError(f"mock_secret has {len(secret)} characters, fewer than 16")
        return secret

    @field_validator("users")
    @classmethod
    def _parse_users(cls, users: Any) -> Any:
        if not isinstance(users, Mapping):
            return users
        known: dict[str, User] = {}
        for name, user in users.items():
            try:
                known[name] = _as_user(user)
            except ValueError as exc:
                raise ValueError(f"user {name!r}: {exc}") from None
        return known

    @model_validator(mode="after")
    def _consistent(self) -> ServerDescriptor:
        if self.password is not None and (user := tokens.user_of(reveal(self.password))):
            raise ValueError(
                f"the password is a token, which logs in as {user!r}: "
                f"users={{{user!r}: hash_password(...)}}"
            )
        given = [
            name for name in ("password", "verifier", "users") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"give one of password, verifier and users, not {' and '.join(given)}")
        if self.duplicate != "allow" and self.users is None:
            raise ValueError(
                f"duplicate={self.duplicate!r} needs users: with one password, or none, everybody "
                "logs in as the same user"
            )
        known = self.users if isinstance(self.users, Mapping) else {}
        stranded = [
            name for name, one in known.items() if isinstance(one, User) and one.verifier is None
        ]
        if stranded and (self.tls is None or (isinstance(self.tls, TLS) and self.tls.ca is None)):
            raise ValueError(
                f"user {stranded[0]!r} can log in by certificate only, which needs "
                "tls=TLS(certificate=..., ca=...)"
            )
        if round(self.heartbeat_timeout * 1000) <= round(self.heartbeat_interval * 1000):
            raise ValueError(
                f"heartbeat_timeout ({self.heartbeat_timeout} s) must exceed "
                f"heartbeat_interval ({self.heartbeat_interval} s)"
            )
        return self


class ClientDescriptor(_Model):
    """What a client is, and where its server is.

    Attributes:
        server_host: Name or address of the server.
        server_port: Its TCP port.
        urls: Several servers instead, `tcp://host:port` or `tls://host:port`; the first that
            answers is used.
        password: The password, or a token; None for a server that has none.
        user: The user name. A token says it itself. With a user, a certificate in `tls` and no
            password, the certificate says who logs in.
        name: What the client calls itself to the server.
        version: The version of the application.
        use_ipv6: Prefer IPv6 where a name has both kinds of address.
        reconnect_enabled: Connect again after the link was lost, and go on with the session if the
            server still has it.
        reconnect_attempts: Attempts after a loss; 0 goes on for ever.
        reconnect_delay: Seconds within which the first attempt is made, at random; doubled for each
            further one, up to 30.
        rpc_timeout: Default deadline of a call in seconds; None for none.
        debug: Show callers the traceback of a handler that fails; for development only.
        connect_timeout: Seconds for one attempt to connect and log in.
        enable_compression: Compress payloads of 1 KiB to 1 MiB when that makes them smaller.
        enable_backpressure: Make senders wait when the server does not keep up; False refuses them.
        tls: Certificates, or a context of your own; None is plain TCP unless a URL says tls.
        limits: What the connection may use.
    """

    server_host: str | None = None
    server_port: Annotated[int, Field(gt=0, le=65535)] | None = None
    urls: tuple[str, ...] = ()
    password: Secret = None
    user: Annotated[str, Field(min_length=1, max_length=128)] = "default"
    name: Name = "conduit-client"
    version: Annotated[str, Field(max_length=20)] = "1.0.0"
    use_ipv6: bool = False
    reconnect_enabled: bool = True
    reconnect_attempts: Annotated[int, Field(ge=0)] = 5
    reconnect_delay: Seconds = 1.0
    rpc_timeout: Seconds | None = 30.0
    debug: bool = False
    connect_timeout: Seconds = 10.0
    enable_compression: bool = False
    enable_backpressure: bool = True
    tls: TLS | ssl.SSLContext | None = None
    limits: Limits = Limits()

    _password = field_validator("password")(_check_password)

    @model_validator(mode="before")
    @classmethod
    def _take_user_from_token(cls, fields: Any) -> Any:
        password = fields.get("password") if isinstance(fields, dict) else None
        if isinstance(password, SecretStr):
            password = password.get_secret_value()
        user = tokens.user_of(password) if isinstance(password, str) else None
        if user is None:
            return fields
        if fields.get("user", user) != user:
            raise ValueError(f"the token is that of user {user!r}; leave user= out")
        return {**fields, "user": user}

    @field_validator("urls")
    @classmethod
    def _parse_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not Address.parse(url).port:
                raise ValueError(f"{url!r}: port 0 is none that a server listens on")
        return urls

    @model_validator(mode="after")
    def _consistent(self) -> ClientDescriptor:
        if self.urls and (self.server_host is not None or self.server_port is not None):
            raise ValueError("give urls, or server_host and server_port, not both")
        if not self.urls and (self.server_host is None or self.server_port is None):
            raise ValueError("give server_host and server_port, or urls")
        agent = f"{self.name}/{self.version}"
        if len(agent.encode()) > 64:
            raise ValueError(f"name and version take {len(agent.encode())} bytes; 64 are the most")
        if self.certified and not self._verifies:
            raise ValueError(
                "without a password the server's certificate alone proves who it is: to log in by "
                "certificate, leave verify on"
            )
        if isinstance(self.tls, TLS) and not self.tls.verify and self.password is None:
            raise ValueError("verify=False needs a password, or nothing is checked at all")
        if self.tls is not None and any(not Address.parse(url).tls for url in self.urls):
            raise ValueError("tls is set, so every url must begin with tls://")
        return self

    @property
    def certified(self) -> bool:
        """Whether the certificate of the client says who logs in, and no password does."""
        if self.password is not None or "user" not in self.model_fields_set:
            return False
        return self.tls is not None and (
            isinstance(self.tls, ssl.SSLContext) or self.tls.certificate is not None
        )

    @property
    def _verifies(self) -> bool:
        if isinstance(self.tls, ssl.SSLContext):
            return self.tls.verify_mode is ssl.CERT_REQUIRED and self.tls.check_hostname
        return self.tls is None or self.tls.verify

    @property
    def addresses(self) -> list[Address]:
        """The servers, in the order in which they are tried."""
        if self.urls:
            return [Address.parse(url) for url in self.urls]
        assert self.server_host is not None
        assert self.server_port is not None
        host, port = self.server_host, self.server_port
        return [Address(host=host, port=port, tls=self.tls is not None)]
