"""Both sides of the login, without I/O. docs/protocol.md section 6 is the specification.

What a side cannot do by itself it asks for: `VerifierNeeded` (look a user up), `KeysNeeded` (derive
keys from the password, which takes a tenth of a second) and `WelcomeNeeded` (decide whether to let
the user in). The exchange itself is `scram.py`; here are its frames, and what both sides tell each
other beside it. All of it before the proofs is under both signatures, by the digest `d`.
AUTH_SUCCESS comes after them: but for its signature it is as open as the frames behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from msgpack import packb

from ..exceptions import AuthenticationError, ProtocolError, RPCError, Unavailable
from .events import (
    Capabilities,
    KeysNeeded,
    Peer,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
    number,
    printable,
)
from .frames import VERSION, FrameType
from .payload import decode
from .scram import (
    DEFAULT_ITERATIONS,
    MECHANISM,
    MECHANISM_PLUS,
    REFUSED,
    SALT_BYTES,
    ClientScram,
    Keys,
    ServerScram,
    Verifier,
    transcript_digest,
)
from .session import EPOCH_BYTES, ID_BYTES, Session

__all__ = ["ANONYMOUS", "EXTERNAL", "MOCK", "ClientLogin", "ServerLogin"]

ANONYMOUS: Final = "ANONYMOUS"
"""The mechanism of a server that has no users, which serves only its own machine."""

EXTERNAL: Final = "EXTERNAL"
"""The mechanism of a client whose certificate says who it is (RFC 4422 appendix A)."""

MOCK: Final = (DEFAULT_ITERATIONS, SALT_BYTES)
"""Iterations and bytes of salt of a user who does not exist, where there is no better example."""

AGENT_BYTES: Final = 64
METHODS_BYTES: Final = 32


Send = Callable[[FrameType, Mapping[str, Any]], bytes]
"""Queue an AUTH frame and return its payload as it goes out."""

_WITHOUT_PASSWORD = {ANONYMOUS: "without a password", EXTERNAL: "by a certificate"}


class ServerLogin:
    """The accepting side.

    Args:
        send: Queues an AUTH frame.
        capabilities: What this side accepts.
        nonce: 24 characters of base64, fresh for this connection.
        mock_secret: Makes the salts of users that do not exist; always the same.
        mock: Iterations and bytes of salt that unknown users are told, as known ones are.
        binding: The hash of the server's certificate, when the link has one.
        anonymous: The server has no users, and lets everybody in.
        names: What the verified certificate of the client calls it, where that may log in.
        compress: Whether this side compresses what it sends, if the peer can inflate.
    """

    def __init__(
        self,
        send: Send,
        *,
        capabilities: Capabilities,
        nonce: str,
        mock_secret: bytes,
        mock: tuple[int, int] = MOCK,
        binding: bytes | None = None,
        anonymous: bool = False,
        names: frozenset[str] = frozenset(),
        compress: bool = False,
    ) -> None:
        self.peer = Peer()
        self.compress = compress
        self._send = send
        self.capabilities = capabilities
        self._anonymous = anonymous
        self._mechanisms = (
            [ANONYMOUS]
            if anonymous
            else [MECHANISM_PLUS, MECHANISM]
            if binding is not None
            else [MECHANISM]
        )
        if names:
            self._mechanisms.append(EXTERNAL)
        self._names = names
        self._signs = not anonymous
        self._scram = ServerScram(
            nonce,
            binding=binding,
            mock_secret=mock_secret,
            mock_iterations=mock[0],
            mock_salt_bytes=mock[1],
        )
        self._request = b""
        self._final = ""
        self._wanted: tuple[bytes, bytes, int] | None = None

    def requested(self, payload: bytes) -> VerifierNeeded | WelcomeNeeded | ResumeWanted:
        """Take AUTH_REQUEST.

        Raises:
            AuthenticationError: The request cannot be granted; `code` says why.
            ProtocolError: The payload is not what the specification says.
        """
        self._request = payload
        request = _map(payload)
        agent = _text(request, "agent", limit=AGENT_BYTES)
        self.peer.name, self.peer.version = _name_and_version(agent)
        self.peer.capabilities = Capabilities.from_map(request.get("caps", {}))
        if request.get("session") is not None:
            self._wanted = _wanted(request["session"])
        self.peer.methods = _methods(request)
        mechanism = _text(request, "mech")
        version = request.get("v")
        if type(version) is not int:
            raise ProtocolError(f"v must be a number, not {type(version).__name__}")
        if version != VERSION:
            raise AuthenticationError(
                f"this server speaks protocol version {VERSION}, the client asked for {version}",
                code="unsupported_version",
            )
        if mechanism not in self._mechanisms:
            by = _WITHOUT_PASSWORD.get(mechanism, f"by {mechanism[:32]!r}")
            raise AuthenticationError(f"login {by} is not offered", code="unsupported_mechanism")
        if self._anonymous:
            self.peer.identity = "anonymous"
            return self._known()
        claimed = self._wanted[0] if self._wanted else b""
        if mechanism == EXTERNAL:
            user = _text(request, "scram")
            if user not in self._names:
                raise AuthenticationError(REFUSED, code="invalid_credentials")
            self.peer.identity, self._signs = user, False
            return VerifierNeeded(user, claimed, certified=True)
        self.peer.identity = self._scram.start(mechanism, _text(request, "scram"))
        return VerifierNeeded(self.peer.identity, claimed)

    def verifier_found(self, verifier: Verifier | None) -> None:
        """Send AUTH_CHALLENGE; None for a user that does not exist, who is not told so."""
        caps = packb(self.capabilities.to_map())
        digest = transcript_digest(VERSION, self._request, caps)
        challenge = self._scram.challenge(verifier, digest)
        self._send(FrameType.AUTH_CHALLENGE, {"scram": challenge, "caps": caps})

    def certified(self) -> WelcomeNeeded | ResumeWanted:
        """Go on with a user whose certificate is enough."""
        return self._known()

    def proved(self, payload: bytes) -> WelcomeNeeded | ResumeWanted:
        """Take AUTH_RESPONSE.

        Raises:
            AuthenticationError: The proof is wrong, or the user does not exist.
            ProtocolError: The payload is not what the specification says.
        """
        self._final = self._scram.final(_text(_map(payload), "scram"))
        return self._known()

    def _known(self) -> WelcomeNeeded | ResumeWanted:
        """Ask what to do with a user who is known now."""
        if self._wanted is None:
            return WelcomeNeeded(self.peer.identity)
        return ResumeWanted(self.peer.identity, *self._wanted)

    def welcome(
        self,
        session: Session,
        heartbeat: tuple[float, float],
        name: str,
        version: str,
        *,
        keeps: float,
        resumed: bool = False,
        methods: bytes = b"",
    ) -> None:
        """Send AUTH_SUCCESS.

        Args:
            session: The session, a new one or the one that goes on.
            heartbeat: Interval and timeout in seconds, for both sides.
            name: What the server calls itself.
            version: The version of its application.
            keeps: Seconds for which the session is kept without a link.
            resumed: Whether it is the one that the client has asked for.
            methods: What identifies the methods that it serves.
        """
        self.peer.heartbeat = heartbeat
        body: dict[str, Any] = {
            "scram": self._final,
            "identity": self.peer.identity,
            "session": {
                "id": session.id,
                "epoch": session.epoch,
                "resumed": resumed,
                "recv": session.received,
                "ttl": math.ceil(keeps),
            },
            "hb": [round(seconds * 1000) for seconds in heartbeat],
            "server": {"name": name, "version": version},
        }
        if methods:
            body["methods"] = methods
        if not self._signs:
            body["caps"] = packb(self.capabilities.to_map())
        self._send(FrameType.AUTH_SUCCESS, body)

    def refuse(
        self, code: str, message: str, *, retry: bool = False, retry_after: float = 0.0
    ) -> None:
        """Send AUTH_FAILURE; the link is to be closed behind it. `retry_after` in seconds."""
        self._send(
            FrameType.AUTH_FAILURE,
            {
                "code": code,
                "message": message.encode(errors="replace")[:1000].decode(errors="ignore"),
                "retry": retry,
                "retry_after": round(retry_after * 1000),
                "mechs": self._mechanisms,
            },
        )


class ClientLogin:
    """The connecting side.

    Args:
        send: Queues an AUTH frame.
        capabilities: What this side accepts.
        nonce: 24 characters of base64, fresh for this connection.
        user: Who logs in, or None to log in without a password.
        external: The certificate that this side shows says so, and no password. Only over TLS, and
            only if the server's certificate was verified: nothing else proves who it is.
        agent: `name/version`, what this side calls itself.
        binding: The hash of the certificate that the server showed, under TLS.
        can_bind: Whether this side could have bound, had the server offered it.
        min_iterations: Fewer would make the proof cheap to crack, so the client refuses.
        max_iterations: More would only burn the client's time.
        compress: Whether this side compresses what it sends, if the peer can inflate.
        session: The session that is to go on, if the server still has it.
        methods: What identifies the methods that this side serves.
    """

    def __init__(
        self,
        send: Send,
        *,
        capabilities: Capabilities,
        nonce: str,
        user: str | None,
        external: bool = False,
        agent: str,
        binding: bytes | None = None,
        can_bind: bool = False,
        min_iterations: int = 100_000,
        max_iterations: int = 2_000_000,
        compress: bool = False,
        session: Session | None = None,
        methods: bytes = b"",
    ) -> None:
        self.peer = Peer()
        self._session = session
        self.compress = compress
        self._send = send
        self.capabilities = capabilities
        self._agent = agent
        self._methods = methods
        self.user = user
        self._external = external
        self.proves = user is not None and not external
        self._request = b""
        self._scram = ClientScram(
            user or "anonymous",
            nonce,
            binding=binding,
            can_bind=can_bind,
            min_iterations=min_iterations,
            max_iterations=max_iterations,
        )

    def open(self) -> None:
        """Send AUTH_REQUEST."""
        session = self._session
        mechanism, scram = ANONYMOUS, ""
        if self._external:
            mechanism, scram = EXTERNAL, self.user or ""
        elif self.user is not None:
            mechanism, scram = self._scram.mechanism, self._scram.first()
        self._request = self._send(
            FrameType.AUTH_REQUEST,
            {
                "v": VERSION,
                "mech": mechanism,
                "scram": scram,
                "caps": self.capabilities.to_map(),
                "session": session
                and {"id": session.id, "epoch": session.epoch, "recv": session.received},
                "agent": self._agent,
                **({"methods": self._methods} if self._methods else {}),
            },
        )

    def challenged(self, payload: bytes) -> KeysNeeded:
        """Take AUTH_CHALLENGE.

        Raises:
            AuthenticationError: The server asks for what this side must not give, or what both
                sides told each other was changed on the way.
            ProtocolError: The payload is not what the specification says.
        """
        challenge = _map(payload)
        caps = challenge.get("caps")
        if not isinstance(caps, bytes):
            raise ProtocolError("AUTH_CHALLENGE without caps")
        digest = transcript_digest(VERSION, self._request, caps)
        self._scram.challenge(_text(challenge, "scram"), digest)
        self.peer.capabilities = Capabilities.from_map(_decode(caps))
        return KeysNeeded(self._scram.salt, self._scram.iterations)

    def keys_derived(self, keys: Keys) -> None:
        """Send AUTH_RESPONSE."""
        self._send(FrameType.AUTH_RESPONSE, {"scram": self._scram.final(keys)})

    def welcomed(self, payload: bytes) -> tuple[Session, int | None]:
        """Take AUTH_SUCCESS; nothing in it is believed before the server's signature fits.

        Returns:
            The session, and if it is the one that goes on, the highest number that the server has
            accepted of it.

        Raises:
            AuthenticationError: The server does not know the password.
            ProtocolError: The payload is not what the specification says.
        """
        success = _map(payload)
        if self.proves:
            self._scram.verify(_text(success, "scram"))
        else:
            caps = success.get("caps")
            self.peer.capabilities = Capabilities.from_map(
                _decode(caps) if isinstance(caps, bytes) else {}
            )
        self.peer.identity = _text(success, "identity")
        server = success.get("server")
        if not isinstance(server, dict):
            raise ProtocolError("AUTH_SUCCESS without a server")
        self.peer.name, self.peer.version = _text(server, "name"), _text(server, "version")
        self.peer.methods = _methods(success)
        heartbeat = success.get("hb")
        if not isinstance(heartbeat, list) or len(heartbeat) != 2:
            raise ProtocolError("hb must be [interval, timeout] in milliseconds")
        interval, timeout = (number("hb", value, least=0) / 1000 for value in heartbeat)
        if not interval:
            interval = timeout = math.inf
        elif timeout <= interval:
            raise ProtocolError(f"heartbeat timeout {timeout} s must exceed interval {interval} s")
        self.peer.heartbeat = (interval, timeout)
        session = success.get("session")
        if not isinstance(session, dict):
            raise ProtocolError("AUTH_SUCCESS without a session")
        id, epoch = _session_name(session)
        self.peer.keeps = float(number("session.ttl", session.get("ttl", 0), least=0))
        resumed = session.get("resumed")
        if not isinstance(resumed, bool):
            raise ProtocolError(f"session.resumed must be true or false, not {resumed!r:.32}")
        if not resumed:
            return Session(id, epoch), None
        if self._session is None or (id, epoch) != (self._session.id, self._session.epoch):
            raise ProtocolError("the server goes on with a session that was not asked for")
        return self._session, number("session.recv", session.get("recv"), least=0, bits=64)

    def failed(self, payload: bytes) -> Exception:
        """Take AUTH_FAILURE and return what to raise."""
        failure = _map(payload)
        code = printable(_text(failure, "code", limit=64))
        message = printable(_text(failure, "message", limit=1024))
        if code == "busy":
            after = failure.get("retry_after")
            return Unavailable(message, details={"retryable": True, "retry_after": after})
        if code == "unsupported_version":
            return ProtocolError(message)
        if code == "invalid_credentials":
            why = "its certificate does not let it in" if self._external else REFUSED
            return AuthenticationError(f"the server refused user {self.user!r}: {why}")
        if code == "unsupported_mechanism" and self.user is None:
            message = "the server wants a password"
        elif code == "unsupported_mechanism" and self._external:
            message = "the server lets nobody in by a certificate; is it to have users and a ca?"
        elif code == "unsupported_mechanism" and failure.get("mechs") == [ANONYMOUS]:
            message = "the server has no password, so it cannot prove itself; leave yours out"
        return AuthenticationError(message or code, code=code)


@lru_cache(maxsize=256)  # shared by the peers that call themselves the same
def _name_and_version(agent: str) -> tuple[str, str]:
    name, _, version = agent.rpartition("/")
    return (name, version) if name else (agent, "")


def _wanted(session: Any) -> tuple[bytes, bytes, int]:
    """Read what a client says of the session that it wants to go on with."""
    if not isinstance(session, dict):
        raise ProtocolError(f"session must be nil or a map, not {type(session).__name__}")
    id, epoch = _session_name(session)
    return id, epoch, number("session.recv", session.get("recv"), least=0, bits=64)


def _session_name(session: Mapping[str, Any]) -> tuple[bytes, bytes]:
    return _bytes(session, "id", ID_BYTES), _bytes(session, "epoch", EPOCH_BYTES)


def _bytes(session: Mapping[str, Any], key: str, size: int) -> bytes:
    value = session.get(key)
    if not isinstance(value, bytes) or len(value) != size:
        raise ProtocolError(f"session.{key} must be {size} bytes")
    return value


def _decode(payload: bytes) -> Any:
    try:
        return decode(payload, text_keys=True)
    except RPCError as exc:
        raise ProtocolError(str(exc)) from exc


def _map(payload: bytes) -> dict[str, Any]:
    decoded = _decode(payload)
    if not isinstance(decoded, dict):
        raise ProtocolError(f"a login frame carries a map, not {type(decoded).__name__}")
    return decoded


def _text(source: Mapping[str, Any], key: str, *, limit: int = 2048) -> str:
    value = source.get(key)
    if not isinstance(value, str) or len(value.encode(errors="replace")) > limit:
        raise ProtocolError(f"{key} must be text of at most {limit} bytes in a login frame")
    return value


def _methods(source: Mapping[str, Any]) -> bytes:
    """Return what identifies the peer's methods; nothing where it does not tell."""
    value = source.get("methods", b"")
    if not isinstance(value, bytes) or len(value) > METHODS_BYTES:
        raise ProtocolError(f"methods must be at most {METHODS_BYTES} bytes in a login frame")
    return value
