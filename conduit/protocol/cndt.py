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

Reading. `receive` parses by offset and looks the first eight bytes of a header up in the words that
the state accepts, which checks magic, version, type, flags and state at once. Frames that belong to
the session (sequence numbers, acknowledgements, pings) are dealt with here; the rest goes up as
`Frame`, payload not decoded. The rest of a large frame is read to a buffer that can be used again,
or, when it is mostly `bytes`, right to the object that the handler or the caller gets.

Writing. `send` numbers a frame and appends it; `take` returns what is to be written and puts the
sequenced part of it into the outbox. What is not sequenced goes ahead of what is.

After the first error the peer is CLOSED for good.
"""

from __future__ import annotations

import enum
import io
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgpack import packb

from ..exceptions import AuthenticationError, ProtocolError, RPCError
from .events import (
    Acknowledged,
    Broken,
    Closed,
    Event,
    Opened,
    Peer,
    Ponged,
    Resumed,
    VerifierNeeded,
)
from .frames import (
    ACCEPTED_FLAGS,
    COMPRESSED,
    ENVELOPE,
    HEADER,
    HEADER_SIZE,
    MAGIC,
    PRIORITY,
    REPLY,
    SEQUENCED,
    CloseCode,
    FrameType,
    NotConduit,
    OtherVersion,
    Parted,
    not_conduit,
    tolerate,
    type_name,
    word,
)
from .login import ClientLogin, ServerLogin
from .payload import COMPRESS_MOST, PLACEHOLDER, decode, inflate, large_bytes
from .scram import Keys, Verifier
from .session import ACK_BYTES, ACK_FRAMES, Session
from .writer import FrameWriter

__all__ = ["ACCEPTS", "CNDT", "State"]

BUFFERED: Final = 128 * 1024
"""Bytes from which an unfinished frame gets a buffer of its own."""
APART: Final = 4 * 1024 * 1024 - ENVELOPE
"""Size from which `bytes` are read to where they are to stay. What is smaller is faster in a buffer
that is used again, and copied from there: new memory costs more than the copy.
"""
LOGIN_BYTES: Final = 4096
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


_EMPTY: Final = frozenset(
    int(type)
    for type in (
        FrameType.ACK,
        FrameType.HEARTBEAT_PING,
        FrameType.HEARTBEAT_PONG,
        FrameType.STREAM_END,
    )
)
_LOGIN: Final = frozenset(int(type) for type in FrameType if type.name.startswith("AUTH_"))
_ENDS: Final = (FrameType.AUTH_FAILURE, FrameType.CLOSE)

ACCEPTS: Final[dict[State, tuple[FrameType, ...]]] = {
    State.AWAIT_REQUEST: (FrameType.AUTH_REQUEST, FrameType.CLOSE),
    State.AWAIT_VERIFIER: (FrameType.CLOSE,),
    State.AWAIT_PROOF: (FrameType.AUTH_RESPONSE, FrameType.CLOSE),
    State.AWAIT_WELCOME: (FrameType.CLOSE,),
    State.AWAIT_CHALLENGE: (FrameType.AUTH_CHALLENGE, *_ENDS),
    State.AWAIT_KEYS: _ENDS,
    State.AWAIT_SUCCESS: (FrameType.AUTH_SUCCESS, *_ENDS),
    State.OPEN: tuple(type for type in FrameType if type not in _LOGIN),
}
"""State -> the frame types that the peer may send in it."""


# Names for the hot path: looking a member up in its enum costs more than the comparison.
_CLOSED: Final = State.CLOSED
_MESSAGE: Final = int(FrameType.MESSAGE)
_RPC_ERROR: Final = int(FrameType.RPC_ERROR)
_RPC_REQUEST: Final = int(FrameType.RPC_REQUEST)

_Kind = tuple[int, int, bool, bool, bool, bool]
"""What a word says: type, flags, and whether the frame is sequenced, whether it opens a call or a
request, whether it needs the checks of the rarer frames, and whether it is compressed."""


def _kind(type: int, flags: int) -> _Kind:
    sequenced = bool(flags & SEQUENCED)
    opens = type == _RPC_REQUEST or (type == _MESSAGE and sequenced and not flags & REPLY)
    rare = type > _RPC_ERROR or (type > 0 and not sequenced)
    return type, flags, sequenced, opens, rare, bool(flags & COMPRESSED)


_IGNORED: Final = _kind(0, 0)


def _words(types: tuple[FrameType, ...]) -> dict[int, _Kind]:
    """Return what each accepted word says."""
    return {
        word(type, flags): _kind(int(type), flags)
        for type in types
        for flags in ACCEPTED_FLAGS[type]
    }


_WORDS: Final = {state: _words(types) for state, types in ACCEPTS.items()}


_unpack: Final = HEADER.unpack_from


class CNDT(FrameWriter):
    """One end of a CNDT connection.

    Args:
        clock: Returns Unix time in milliseconds, for the headers.
        allocate: Returns a buffer of at least so many bytes for a large frame.

    Attributes:
        state: See `State`.
        session: The numbers and the outbox.
        peer: What the other side told of itself; set once OPEN.
        max_payload: Bytes of payload that a frame from the peer may have, envelope included.
        ack_due: Whether something was accepted that no ACK has told of yet.
        large: The buffer of a large frame that is under way; see `buffer`.
        corked: Frames that wait for `take`.
    """

    __slots__ = (
        "_accepts",
        "_allocate",
        "_apart",
        "_ends_in",
        "_filled",
        "_heard_bytes",
        "_inflates",
        "_last_id",
        "_login",
        "_missing",
        "_partial",
        "_pings_in",
        "_pings_out",
        "_wants_id",
        "ack_due",
        "large",
        "max_payload",
        "peer",
        "state",
    )

    def __init__(
        self,
        *,
        clock: Callable[[], int],
        allocate: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
    ) -> None:
        super().__init__(clock)
        self._allocate = allocate
        self._partial = b""
        self._missing = 0
        self.large: memoryview | None = None
        self._filled = 0
        self._apart: io.BytesIO | None = None
        self._heard_bytes = 0
        self._inflates = False
        self._pings_in = _Rate(PINGS)
        # Half of what is accepted, because the windows of the two sides may lie across each other.
        self._pings_out = _Rate(PINGS // 2)
        self._last_id = 0
        self._wants_id = 0
        self._login: ServerLogin | ClientLogin | None = None
        self._accepts: dict[int, _Kind] = {}
        self._ends_in = 0
        self.ack_due = False
        self.max_payload = LOGIN_BYTES
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
        self._wants_id = 1
        self._enter(State.AWAIT_REQUEST)

    def open(self, login: ClientLogin) -> None:
        """Start as the connecting side; AUTH_REQUEST is queued."""
        self._login = login
        self.holds = True
        self.peer = login.peer
        self._enter(State.AWAIT_CHALLENGE if login.user is not None else State.AWAIT_SUCCESS)
        login.open()

    def verifier_found(self, verifier: Verifier | None) -> None:
        """Go on after `VerifierNeeded`; None for a user that does not exist."""
        assert isinstance(self._login, ServerLogin)
        self._login.verifier_found(verifier)
        self._enter(State.AWAIT_PROOF)

    def keys_derived(self, keys: Keys) -> None:
        """Go on after `KeysNeeded`."""
        assert isinstance(self._login, ClientLogin)
        self._login.keys_derived(keys)
        self._enter(State.AWAIT_SUCCESS)

    def welcome(
        self, *, heartbeat: tuple[float, float], name: str, version: str, keeps: float = 0.0
    ) -> None:
        """Let the user in after `WelcomeNeeded`; `session` has been set to theirs."""
        login = self._login
        assert isinstance(login, ServerLogin)
        login.welcome(self.session, heartbeat, name, version, keeps=keeps)
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
        self._heard_bytes = 0
        self.ack_due = False
        self.urgent[:] = again

    def forget(self) -> None:
        """Let go of a frame that is under way, since the rest of it will never come.

        A garbage collection must not find that its buffer is lent out.
        """
        self._partial, self._missing = b"", 0
        self.large = self._apart = None

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
        self._inflates = "zlib" in limits.features
        self._pings_in = _Rate(max(PINGS, int(4 * PING_WINDOW / 1000 / login.peer.heartbeat[0])))
        self._login = None
        self.holds = False
        self._enter(State.OPEN)
        return Opened(self.peer)

    def _enter(self, state: State) -> None:
        self.state = state
        self._accepts = _WORDS.get(state, {})
        if state is _CLOSED:
            self._login = None  # which knows this peer, and would be freed by collections only

    # Reading.

    def buffer(self) -> memoryview | None:
        """Return where the rest of a large frame is to be written, when one is under way."""
        return self.large[self._filled : self._ends_in] if self.large is not None else None

    def buffer_filled(self, count: int) -> list[Event]:
        """Take `count` bytes that were written to `buffer()`."""
        self._filled += count
        large = self.large
        if large is None or self._filled < self._ends_in:
            return []
        self.large = None
        if self._apart is not None:
            self._apart.seek(self._filled)
            return []
        return self.receive(large[: self._ends_in])

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the peer, cut anywhere.

        Returns:
            What happened, in order. `Broken` comes last, and nothing comes after it.
        """
        events: list[Event] = []
        if self.state is _CLOSED:
            return events
        if self._partial:
            if self._apart is not None:
                return self._receive_apart(self._apart, data)
            self._missing -= len(data)
            if self._missing > 0:
                self._partial += bytes(data)
                return events
            data = self._partial + bytes(data)
            self._partial = b""
        try:
            self._parse(data, events)
        except ProtocolError as exc:
            self._broken(exc, events)
        except AuthenticationError as exc:
            if isinstance(self._login, ServerLogin):
                self.refuse(exc.code, str(exc))
            self._broken(exc, events)
        return events

    def _parse(  # noqa: C901  # the hot loop: a call per frame would cost as much as the frame
        self, data: bytes | memoryview, events: list[Event]
    ) -> None:
        session, limit = self.session, self.max_payload
        received = before = session.received
        last_id, wants_id = self._last_id, self._wants_id
        start, end, known = 0, len(data), -1
        type, flags, sequenced, opens, checked, compressed = _IGNORED
        try:
            while end - start >= HEADER_SIZE:
                first, size, id, _, number = _unpack(data, start)
                if first != known:  # mostly the word of the frame before
                    kind = self._accepts.get(first) or self._tolerated(first)
                    type, flags, sequenced, opens, checked, compressed = kind
                    known = first
                if size > limit:
                    raise self._too_big(size)
                if sequenced:
                    if number != received + 1 & 0xFFFFFFFF:
                        raise ProtocolError(f"frame {number} came where {received + 1} was due")
                    if opens:
                        if (id <= last_id or id & 1 != wants_id) and (id or type == _RPC_REQUEST):
                            raise ProtocolError(f"correlation id {id} after {last_id}")
                elif number:
                    raise ProtocolError(f"reserved field {number} on a frame without a number")
                if checked:
                    _check(type, id, size)
                start += HEADER_SIZE
                stop = start + size
                if stop > end:
                    start -= HEADER_SIZE
                    self._wait_for(data, start, HEADER_SIZE + size)
                    break
                payload = data[start:stop]
                start = stop
                if sequenced or type == _MESSAGE:
                    if compressed:
                        payload = self._inflate(payload)
                    if sequenced:
                        received += 1
                        if opens and id:
                            last_id = id
                    events.append((type, flags, id, payload))
                elif type:
                    session.received = received
                    self._unsequenced(type, flags, id, payload, events)
                    if self.state is _CLOSED:
                        if type == FrameType.AUTH_SUCCESS and isinstance(events[-1], Resumed):
                            events[-1].rest = bytes(data[start:])
                        return
                    session, limit, known = self.session, self.max_payload, -1
            else:
                if start < end:
                    self._partial = bytes(data[start:])
                    if not MAGIC.startswith(self._partial[:4]):
                        raise not_conduit()
                    self._missing = HEADER_SIZE - (end - start)
        finally:
            session.received = received
            self._last_id = last_id
        if received != session.reported and received != before:
            self._heard_bytes += end
            if received - session.reported >= ACK_FRAMES or self._heard_bytes >= ACK_BYTES:
                self.acknowledge()
            else:
                self.ack_due = True

    def _tolerated(self, first: int) -> _Kind:
        """Return what a word says that is not accepted as it stands; see `tolerate`."""
        accepts = self._accepts
        accepted = tolerate(first, accepts, self._expected(), login=self._login is not None)
        return accepts.get(accepted, _IGNORED)

    def _too_big(self, size: int) -> ProtocolError:
        return ProtocolError(
            f"a payload of {size} bytes exceeds the limit of {self._limit_text()}",
            close_code=CloseCode.TOO_BIG,
        )

    def _wait_for(self, data: bytes | memoryview, start: int, size: int) -> None:
        """Keep the first part of a frame of `size` bytes."""
        rest = bytes(data[start:])
        if size <= BUFFERED:
            self._partial = rest
            self._missing = size - len(rest)
            return
        if size < APART or not self._wait_apart(rest, size):
            self.large = self._allocate(size)
            self.large[: len(rest)] = rest
            self._filled = len(rest)
            self._ends_in = size

    def _wait_apart(self, rest: bytes, size: int) -> bool:
        """Let the large `bytes` of a frame be read to where they are to stay, if there are any."""
        first, _, id, stamp, number = HEADER.unpack_from(rest)
        if first & COMPRESSED:
            return False  # its bytes are no MessagePack, whatever they look like
        begin, end = large_bytes(memoryview(rest)[HEADER_SIZE:], size - HEADER_SIZE, APART)
        begin, end = begin + HEADER_SIZE, end + HEADER_SIZE
        behind = size - end
        if begin == end or len(rest) >= end or behind > ENVELOPE:
            return False
        # Parsed as a frame of its own when all is there, so that it is checked like any other.
        payload = rest[HEADER_SIZE : begin - _BIN_PREFIX] + PLACEHOLDER
        self._partial = HEADER.pack(first, len(payload) + behind, id, stamp, number) + payload
        # BytesIO alone lends out memory to read to, and then hands it over uncopied as `bytes`. It
        # copies while it is lent out, and event loops hold a buffer until they have told that it is
        # filled. So the last byte is not read there.
        self._apart = io.BytesIO(bytes(end - begin))
        self._filled = self._apart.write(rest[begin:])
        self._ends_in = end - begin - 1
        self._missing = 1 + behind
        if self._filled < self._ends_in:
            self.large = self._apart.getbuffer()
        return True

    def _receive_apart(self, apart: io.BytesIO, data: bytes | memoryview) -> list[Event]:
        """Take the last byte of large `bytes` and what is behind them, and so the frame."""
        missing = self._missing
        self._missing -= len(data)
        rest = data[:missing]
        if apart.tell() == self._ends_in:
            apart.write(rest[:1])
            rest = rest[1:]
        self._partial += rest
        if self._missing > 0:
            return []
        frame, self._partial, self._apart = self._partial, b"", None
        large = apart.getvalue()
        self._heard_bytes += len(large)
        events = self.receive(frame)
        for at, event in enumerate(events):
            if type(event) is tuple:  # and not an error that the frame turned out to be
                events[at] = (*event[:3], Parted(frame[HEADER_SIZE:], large))
        return events + self.receive(data[missing:])

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
            events.append((type, flags, id, payload))
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

    def _inflate(self, payload: bytes | memoryview) -> bytes:
        if not self._inflates:
            raise ProtocolError("a compressed payload, which this side has not offered to inflate")
        return inflate(payload, min(self.max_payload, COMPRESS_MOST))

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
        if self.state is not _CLOSED and not silent:
            if isinstance(error, OtherVersion) and isinstance(self._login, ServerLogin):
                self.refuse("unsupported_version", str(error))
            elif isinstance(error, ProtocolError) and not isinstance(self._login, ClientLogin):
                self.close(error.close_code, str(error))
        self._enter(State.CLOSED)
        events.append(Broken(error))

    def eof(self) -> bool:
        """Say whether the peer's end of file cut a frame in two."""
        return bool(self._partial) or self.large is not None

    # Writing.

    def acknowledge(self) -> None:
        """Queue an ACK of everything accepted so far."""
        session = self.session
        session.reported = session.received
        self._heard_bytes = 0
        self.ack_due = False
        self.send_urgent(_ACK, session.received)

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
        return self._pings_out.count(self._clock())

    def _count_ping(self) -> None:
        if not self._pings_in.count(self._clock()):
            raise ProtocolError(
                f"more than {PINGS} pings in {PING_WINDOW // 1000} s", close_code=CloseCode.FLOOD
            )

    def close(self, code: int, reason: str) -> None:
        """Queue CLOSE behind what is queued already; nothing can be sent or received after it."""
        if self.state is _CLOSED:
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


def _check(type: int, id: int, size: int) -> None:
    """Check what only broadcasts and the rarer frames can break."""
    if type == _MESSAGE:
        if id:
            raise ProtocolError(f"correlation id {id} on a message without a number")
    elif type in _EMPTY:
        if size:
            raise ProtocolError(f"{type_name(type)} with {size} bytes of payload")
    elif type in _LOGIN:
        if id != 1:
            raise ProtocolError(f"correlation id {id} on {type_name(type)}")
    elif type == FrameType.CANCEL and not id:
        raise ProtocolError("CANCEL without a correlation id")


def _read_close(payload: bytes | memoryview) -> Closed:
    """Read `[code, reason]`; a CLOSE that cannot be read still closes."""
    try:
        code, reason = decode(payload)
        if type(code) is int and type(reason) is str:
            return Closed(code, reason[:123])
    except (ProtocolError, RPCError, TypeError, ValueError):
        pass  # it closes all the same
    return Closed(CloseCode.PROTOCOL_ERROR, "the peer closed with an unreadable reason")
