"""The CNDT peer, without I/O: bytes in, events and bytes out. The same class on both sides.

How it works
============
A peer is always in one `State`. `ACCEPTS` says, as data, which frame types may arrive in each; a
type that is not listed there is the error. The table does not care who asks: a server that receives
AUTH_SUCCESS and a client that receives AUTH_REQUEST break the same rule.

    accepting side   AWAIT_REQUEST -> AWAIT_VERIFIER -> AWAIT_PROOF -> AWAIT_WELCOME -> OPEN
    connecting side  AWAIT_CHALLENGE -> AWAIT_KEYS -> AWAIT_SUCCESS -> OPEN
    both             any state -> CLOSED

In AWAIT_VERIFIER, AWAIT_WELCOME and AWAIT_KEYS the peer waits for its owner and not for a frame:
it has asked by an event (`VerifierNeeded`, `WelcomeNeeded` or `ResumeWanted`, `KeysNeeded`) and
goes on when the owner calls the method that the event names. OPEN carries everything but AUTH
frames. CLOSED swallows what still comes, because the other side may not have read our CLOSE yet.

Resume. A peer that is OPEN stays so when its link is lost. The login over another link is that of
another peer, which is CLOSED when it is done: `welcome_back` on the accepting side and the event
`Resumed` on the connecting one end it. Then `resume` lets the first one go on where it was.

Reading and writing are the halves below, in reader.py and writer.py. Frames that belong to the
session (acknowledgements, pings) are dealt with here; the rest goes up as `Frame`, payload not
decoded. What is not sequenced is written ahead of what is.

After the first error the peer is CLOSED for good.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgpack import packb

from ..exceptions import AuthenticationError, ProtocolError, RPCError
from .events import (
    Acknowledged,
    Broken,
    Closed,
    Event,
    GoingAway,
    Opened,
    Peer,
    Ponged,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
    printable,
)
from .frames import (
    ENVELOPE,
    HEADER,
    PRIORITY,
    CloseCode,
    FrameType,
    NotConduit,
    OtherVersion,
    tolerate,
    type_name,
    word,
)
from .login import ClientLogin, ServerLogin
from .payload import decode
from .reader import IGNORED, LOGIN_TYPES, FrameReader, Kind, words
from .scram import Keys, Verifier
from .session import Session

__all__ = ["ACCEPTS", "CNDT", "State"]

PINGS: Final = 100
"""Pings that a peer may send within `PING_WINDOW` milliseconds."""
PING_WINDOW: Final = 10_000


class State(enum.Enum):
    """Where a peer stands; see the module's text."""

    AWAIT_REQUEST = "await_request"
    AWAIT_VERIFIER = "await_verifier"
    AWAIT_PROOF = "await_proof"
    AWAIT_WELCOME = "await_welcome"
    AWAIT_CHALLENGE = "await_challenge"
    AWAIT_KEYS = "await_keys"
    AWAIT_SUCCESS = "await_success"
    OPEN = "open"
    CLOSED = "closed"


_ENDS: Final = (FrameType.AUTH_FAILURE, FrameType.CLOSE)

ACCEPTS: Final[dict[State, tuple[FrameType, ...]]] = {
    State.AWAIT_REQUEST: (FrameType.AUTH_REQUEST, FrameType.CLOSE),
    State.AWAIT_VERIFIER: (FrameType.CLOSE,),
    State.AWAIT_PROOF: (FrameType.AUTH_RESPONSE, FrameType.CLOSE),
    State.AWAIT_WELCOME: (FrameType.CLOSE,),
    State.AWAIT_CHALLENGE: (FrameType.AUTH_CHALLENGE, *_ENDS),
    State.AWAIT_KEYS: _ENDS,
    State.AWAIT_SUCCESS: (FrameType.AUTH_SUCCESS, *_ENDS),
    State.OPEN: tuple(type for type in FrameType if type not in LOGIN_TYPES),
}
"""State -> the frame types that the peer may send in it."""


_WORDS: Final = {state: words(types) for state, types in ACCEPTS.items()}


class CNDT(FrameReader):
    """One end of a CNDT connection.

    Args:
        clock: Returns Unix time in milliseconds, for the headers.
        allocate: Returns a buffer of at least so many bytes for a large frame.

    Attributes:
        state: See `State`.
        session: The numbers and the outbox.
        peer: What the other side told of itself; set once OPEN.
        corked: Frames that wait for `take`.
    """

    __slots__ = (
        "_login",
        "_pings_in",
        "_pings_out",
        "peer",
        "state",
    )

    def __init__(
        self,
        *,
        clock: Callable[[], int],
        allocate: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
    ) -> None:
        super().__init__(clock, allocate)
        self._pings_in = _Rate(PINGS)
        self._pings_out: _Rate | None = None
        self._login: ServerLogin | ClientLogin | None = None
        self.peer = Peer()
        self.state = State.CLOSED

    # Login: the owner builds the login object with `send_login`, and starts one side.

    def send_login(self, type: FrameType, body: Mapping[str, Any]) -> bytes:
        """Queue an AUTH frame; the `send` of `ServerLogin` and `ClientLogin`."""
        payload: bytes = packb(body)
        self.send_urgent(word(type), 1, payload)
        return payload

    def accept(self, login: ServerLogin) -> None:
        """Start as the accepting side."""
        self._login = login
        self.holds = True
        self.peer = login.peer
        self.wants_id = 1
        self._enter(State.AWAIT_REQUEST)

    def open(self, login: ClientLogin) -> None:
        """Start as the connecting side; AUTH_REQUEST is queued."""
        self._login = login
        self.holds = True
        self.peer = login.peer
        self._enter(State.AWAIT_CHALLENGE if login.proves else State.AWAIT_SUCCESS)
        login.open()

    def verifier_found(self, verifier: Verifier | None) -> None:
        """Go on after `VerifierNeeded`; None for a user that does not exist."""
        assert isinstance(self._login, ServerLogin)
        self._login.verifier_found(verifier)
        self._enter(State.AWAIT_PROOF)

    def certified(self) -> WelcomeNeeded | ResumeWanted:
        """Go on after a `VerifierNeeded` that is `certified`: the user may log in so.

        Returns:
            The next question.
        """
        assert isinstance(self._login, ServerLogin)
        self._enter(State.AWAIT_WELCOME)
        return self._login.certified()

    def keys_derived(self, keys: Keys) -> None:
        """Go on after `KeysNeeded`."""
        assert isinstance(self._login, ClientLogin)
        self._login.keys_derived(keys)
        self._enter(State.AWAIT_SUCCESS)

    def welcome(
        self,
        *,
        heartbeat: tuple[float, float],
        name: str,
        version: str,
        keeps: float = 0.0,
        methods: bytes = b"",
    ) -> None:
        """Let the user in after `WelcomeNeeded`; `session` has been set to theirs."""
        login = self._login
        assert isinstance(login, ServerLogin)
        login.welcome(self.session, heartbeat, name, version, keeps=keeps, methods=methods)
        self._opened(login)

    def welcome_back(
        self,
        session: Session,
        *,
        heartbeat: tuple[float, float],
        name: str,
        version: str,
        keeps: float,
    ) -> None:
        """Let the user go on with a session after `ResumeWanted`, which ends this peer.

        From now on the session must accept nothing over its old link: what the client is told here
        is all that it need not send again.
        """
        assert isinstance(self._login, ServerLogin)
        self._login.welcome(session, heartbeat, name, version, keeps=keeps, resumed=True)
        self._enter(State.CLOSED)

    def resume(self, accepted: int) -> None:
        """Go on over another link, whose login is done: send again what the peer has not accepted.

        Args:
            accepted: The highest number that the peer has accepted.

        Raises:
            ProtocolError: The session cannot go on behind it.
        """
        again = self.session.again(accepted)
        self.forget()
        self.urgent[:] = again

    def refuse(
        self, code: str, message: str, *, retry: bool = False, retry_after: float = 0.0
    ) -> None:
        """Queue AUTH_FAILURE and close. Allowed at any time before the login is done."""
        assert isinstance(self._login, ServerLogin)
        self._login.refuse(code, message, retry=retry, retry_after=retry_after)
        self.drop()
        self._enter(State.CLOSED)

    def _opened(self, login: ServerLogin | ClientLogin) -> Opened:
        limits = login.capabilities
        self.max_payload = limits.frame_max + ENVELOPE
        self.compresses = login.compress and "zlib" in login.peer.capabilities.features
        self.inflates = "zlib" in limits.features
        self._pings_in = _Rate(max(PINGS, int(4 * PING_WINDOW / 1000 / login.peer.heartbeat[0])))
        self._login = None
        self.holds = False
        self._enter(State.OPEN)
        return Opened(self.peer)

    def _enter(self, state: State) -> None:
        self.state = state
        self.accepts = _WORDS.get(state, {})
        if state is State.CLOSED:
            self._login = None  # which knows this peer, and would be freed by collections only

    # Reading.

    def _tolerated(self, first: int) -> Kind:
        """Return what a word says that is not accepted as it stands; see `tolerate`."""
        accepts = self.accepts
        accepted = tolerate(first, accepts, self._expected(), login=self._login is not None)
        return accepts.get(accepted, IGNORED)

    def _failed(self, error: ProtocolError | AuthenticationError, events: list[Event]) -> None:
        if isinstance(error, AuthenticationError) and isinstance(self._login, ServerLogin):
            self.refuse(error.code, str(error))
        self._broken(error, events)

    def _unsequenced(
        self, type: int, flags: int, id: int, payload: bytes | memoryview, events: list[Event]
    ) -> None:
        if type == FrameType.ACK:
            before = self.session.outbox_bytes
            self.session.acknowledge(id)
            if self.session.outbox_bytes != before:
                events.append(Acknowledged())
        elif type == FrameType.HEARTBEAT_PING:
            self._count_ping()
            if self.session.received != self.session.reported:
                self.acknowledge()
            self.send_urgent(_PONG, id)
        elif type == FrameType.HEARTBEAT_PONG:
            events.append(Ponged(id))
        elif type == FrameType.CLOSE:
            events.append(_read_close(payload))
            self._enter(State.CLOSED)
        elif type == FrameType.GOAWAY:
            going = _read_go_away(payload)
            self.session.wanted = going.last  # an ACK may stand behind it in the same batch
            events.append(going)
        else:
            self._login_step(type, bytes(payload), events)

    def _login_step(self, type: int, payload: bytes, events: list[Event]) -> None:
        login = self._login
        if isinstance(login, ServerLogin):
            try:
                if type == FrameType.AUTH_REQUEST:
                    asked = login.requested(payload)
                else:
                    asked = login.proved(payload)
            except ProtocolError as exc:
                raise AuthenticationError(str(exc), code="bad_request") from exc
            self._enter(
                State.AWAIT_VERIFIER if isinstance(asked, VerifierNeeded) else State.AWAIT_WELCOME
            )
            events.append(asked)
            return
        assert login is not None
        if type == FrameType.AUTH_CHALLENGE:
            events.append(login.challenged(payload))
            self._enter(State.AWAIT_KEYS)
        elif type == FrameType.AUTH_SUCCESS:
            session, accepted = login.welcomed(payload)
            if accepted is not None:
                self._enter(State.CLOSED)
                events.append(Resumed(accepted))
                return
            session.sent = self.session.sent
            self.session = session
            events.append(self._opened(login))
        else:
            self._broken(login.failed(payload), events)

    def _limit_text(self) -> str:
        if self._login is not None:
            return f"{self.max_payload} bytes during the login"
        return f"{self.max_payload - ENVELOPE} bytes (max_payload) and {ENVELOPE} for the envelope"

    def _expected(self) -> str:
        names = [type_name(type) for type in ACCEPTS.get(self.state, ())]
        return " or ".join(names) if len(names) < 5 else "a frame of an open connection"

    def _broken(self, error: Exception, events: list[Event]) -> None:
        """Fail for good, telling the peer why where it may be told."""
        silent = isinstance(error, NotConduit) and self._login is not None
        if self.state is not State.CLOSED and not silent:
            if isinstance(error, OtherVersion) and isinstance(self._login, ServerLogin):
                self.refuse("unsupported_version", str(error))
            elif isinstance(error, ProtocolError) and not isinstance(self._login, ClientLogin):
                self.close(error.close_code, str(error))
        self._enter(State.CLOSED)
        events.append(Broken(error))

    # Writing.

    def ping(self, id: int) -> None:
        """Queue a ping; the answer is the event `Ponged`."""
        self.send_urgent(_PING, id)
        if self.ack_due:
            self.acknowledge()

    def go_away(self, code: int, reason: str, grace: int) -> None:
        """Queue GOAWAY: what has been received is the last that is served. `grace` in ms."""
        self.send_urgent(_GOAWAY, 0, packb([int(code), reason, grace, self.session.received]))

    def may_ping(self) -> bool:
        """Count a ping of this side; False when it is more than a peer accepts."""
        if self._pings_out is None:
            # Half of what is accepted: the windows of the two sides may lie across each other.
            self._pings_out = _Rate(PINGS // 2)
        return self._pings_out.count(self._clock())

    def _count_ping(self) -> None:
        if not self._pings_in.count(self._clock()):
            raise ProtocolError(
                f"more than {PINGS} pings in {PING_WINDOW // 1000} s", close_code=CloseCode.FLOOD
            )

    def close(self, code: int, reason: str) -> None:
        """Queue CLOSE behind what is queued already; nothing can be sent or received after it."""
        if self.state is State.CLOSED:
            return
        text = reason.encode(errors="replace")[:123].decode(errors="ignore")
        payload = packb([int(code), text])
        self.farewell = HEADER.pack(_CLOSE, len(payload), 0, self._clock(), 0) + payload
        self._enter(State.CLOSED)


_BIN_PREFIX: Final = 5
"""Bytes of the token before large `bytes`."""
_ACK: Final = word(FrameType.ACK)
_PING: Final = word(FrameType.HEARTBEAT_PING, PRIORITY)
_PONG: Final = word(FrameType.HEARTBEAT_PONG)
_CLOSE: Final = word(FrameType.CLOSE)
_GOAWAY: Final = word(FrameType.GOAWAY)


class _Rate:
    """Counts what may happen `limit` times within `PING_WINDOW`."""

    __slots__ = ("_count", "_limit", "_since")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = self._since = 0

    def count(self, now: int) -> bool:
        if not 0 <= now - self._since < PING_WINDOW:
            self._count, self._since = 0, now
        self._count += 1
        return self._count <= self._limit


def _read_go_away(payload: bytes | memoryview) -> GoingAway:
    """Read `[code, reason, grace_ms, last]`.

    Raises:
        ProtocolError: It is none.
    """
    try:
        body = decode(payload)
    except (ProtocolError, RPCError):
        body = None
    shape = [int, str, int, int]
    if type(body) is not list or [type(value) for value in body] != shape or body[3] < 0:
        raise ProtocolError(
            "GOAWAY must carry [code, reason, grace_ms, last]", close_code=CloseCode.BAD_PAYLOAD
        )
    return GoingAway(body[0], printable(body[1][:123]), body[3])


def _read_close(payload: bytes | memoryview) -> Closed:
    """Read `[code, reason]`; a CLOSE that cannot be read still closes."""
    try:
        code, reason = decode(payload)
        if type(code) is int and type(reason) is str:
            return Closed(code, printable(reason[:123]))
    except (ProtocolError, RPCError, TypeError, ValueError):
        pass  # it closes all the same
    return Closed(CloseCode.PROTOCOL_ERROR, "the peer closed with an unreadable reason")
