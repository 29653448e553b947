"""Two CNDT peers and the link between them, without a socket, a loop or a clock of their own.

`Pair()` is a client and a server that have not met; `Pair().log_in()` are two that are OPEN. Bytes
move when a test says so: `run()` until nobody has more to say, `step()` once each way. On the way
they can be cut into pieces (`split`), changed (`change`) or lost (`Side.deaf`).

The bytes that a test writes by hand come from wire_client, whose codec is not the library's.
"""

from __future__ import annotations

import functools
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from conduit.protocol.cndt import CNDT, State
from conduit.protocol.events import (
    Broken,
    Capabilities,
    Closed,
    Event,
    KeysNeeded,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import Parted, Payload
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.scram import Verifier, derive_keys
from conduit.protocol.session import Session
from tests.golden_frames import (
    CLIENT_NONCE,
    ITERATIONS,
    PASSWORD,
    SERVER_NONCE,
    TIMESTAMP,
    USER,
    VERIFIER,
)
from tests.wire_client import HEADER

E = TypeVar("E")
Split = Callable[[bytes], Iterable[bytes]]
Change = Callable[[str, bytes], bytes]
"""Takes the name of the sender and what it wrote, and returns what arrives."""

SESSION_ID = bytes(range(16))
EPOCH = bytes(range(0xF0, 0xF8))
SALT = b64decode(VERIFIER.split(":")[1].split("$")[0])
HEARTBEAT = (30.0, 90.0)
DEFAULTS = Capabilities()

keys_of = functools.cache(derive_keys)


@functools.cache
def verifier_of(password: str) -> Verifier:
    """Return what a server keeps of a password; of the golden one without the cost."""
    if password == PASSWORD:
        return Verifier.parse(VERIFIER)
    return Verifier.from_password(password, salt=SALT, iterations=ITERATIONS)


class Frame(NamedTuple):
    """A frame that was received, with names for what is in it."""

    type: int
    flags: int
    id: int
    payload: Payload


# Ways to cut bytes into pieces.


def whole(data: bytes) -> list[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def cut_at(*cuts: int) -> Split:
    """Cut at these places, counted from the start of the data; those behind its end do nothing."""

    def split(data: bytes) -> list[bytes]:
        places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        return [data[a:b] for a, b in zip(places, places[1:], strict=False)]

    return split


def pieces_of(size: int) -> Split:
    return lambda data: [data[at : at + size] for at in range(0, len(data), size)]


def frames_of(data: bytes) -> list[bytes]:
    """Cut what a peer wrote into its frames; there must be no half one."""
    frames = []
    while data:
        size = HEADER.size + HEADER.unpack_from(data)[4]
        assert len(data) >= size
        frames.append(data[:size])
        data = data[size:]
    return frames


def feed(peer: CNDT, data: bytes, split: Split = whole) -> list[Event]:
    """Hand bytes to a peer as a link does, and return the events.

    A large frame that is under way has a buffer; everything else comes as it is. What every owner
    relies on is checked here: nothing comes after `Broken` or `Closed`, and the peer is shut.
    """
    events: list[Event] = []
    for piece in split(data):
        left = piece
        while left:
            closed = peer.state is State.CLOSED
            room = None if closed else peer.buffer()
            if room is None:
                new = peer.receive(left)
                left = b""
            else:
                assert len(room) > 0
                count = min(len(room), len(left))
                room[:count] = left[:count]
                new = peer.buffer_filled(count)
                left = left[count:]
            if new:
                assert not closed
                assert not any(isinstance(event, (Broken, Closed)) for event in new[:-1])
                assert peer.state is State.CLOSED or not isinstance(new[-1], (Broken, Closed))
                events += map(_kept, new)
            while peer.more:  # as an owner goes on in the next turn of its loop
                events += map(_kept, peer.receive(b""))
    return events


def _kept(event: Event) -> Event:
    """Copy the payload, which is only valid until the next bytes come."""
    if type(event) is tuple:
        type_, flags, id, payload = event
        return Frame(type_, flags, id, payload if isinstance(payload, Parted) else bytes(payload))
    return event


def written(peer: CNDT) -> bytes:
    """Take all that a peer has to say."""
    return b"".join(peer.take())


class Clock:
    """Unix time in milliseconds, which stands until a test moves it."""

    def __init__(self) -> None:
        self.now = TIMESTAMP

    def __call__(self) -> int:
        return self.now


def make_client(clock: Callable[[], int] | None = None, **options: Any) -> CNDT:
    """Return a client that has AUTH_REQUEST queued; `options` are those of `ClientLogin`."""
    allocate = options.pop("allocate", None)
    peer = CNDT(clock=clock or Clock(), **({"allocate": allocate} if allocate else {}))
    fields: dict[str, Any] = {
        "send": peer.send_login,
        "capabilities": DEFAULTS,
        "nonce": CLIENT_NONCE,
        "user": USER,
        "agent": "conduit-py/1.0",
        "min_iterations": ITERATIONS,
        **options,
    }
    peer.open(ClientLogin(fields.pop("send"), **fields))
    return peer


def make_server(clock: Callable[[], int] | None = None, **options: Any) -> CNDT:
    """Return a server that waits for AUTH_REQUEST; `options` are those of `ServerLogin`."""
    allocate = options.pop("allocate", None)
    peer = CNDT(clock=clock or Clock(), **({"allocate": allocate} if allocate else {}))
    fields: dict[str, Any] = {
        "capabilities": DEFAULTS,
        "nonce": SERVER_NONCE,
        "mock_secret": b"m" * 32,
        "mock": (ITERATIONS, 16),
        **options,
    }
    peer.accept(ServerLogin(peer.send_login, **fields))
    return peer


class Side:
    """One of the two.

    Attributes:
        events: What it was told, but for the questions of the login, which are answered.
        wrote: All bytes that it wrote.
        deaf: What it is sent from now on is lost.
    """

    def __init__(self, name: str, peer: CNDT) -> None:
        self.name = name
        self.peer = peer
        self.events: list[Event] = []
        self.wrote = b""
        self.deaf = False

    def of(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def error(self) -> Exception:
        """What broke it; `Broken` has to be the last event."""
        last = self.events[-1]
        assert isinstance(last, Broken)
        return last.error


class Pair:
    """A client and a server.

    Args:
        password: What the client knows.
        users: What the server knows: user -> password.
        client: Options of `ClientLogin`, and `allocate`.
        server: Options of `ServerLogin`, and `allocate`.
        on_welcome: What the owner of the server does when the proof was right.
        split: Cuts what arrives.
        change: Changes what one of the two wrote.
    """

    def __init__(
        self,
        *,
        password: str = PASSWORD,
        users: Mapping[str, str] | None = None,
        client: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
        on_welcome: Callable[[CNDT], None] | None = None,
        split: Split = whole,
        change: Change | None = None,
    ) -> None:
        self.clock = Clock()
        self.client = Side("client", make_client(self.clock, **(client or {})))
        self.server = Side("server", make_server(self.clock, **(server or {})))
        self.split = split
        self._password = password
        self._users = {USER: PASSWORD} if users is None else users
        self._welcome = on_welcome or welcome
        self._change = change

    def other(self, side: Side) -> Side:
        return self.server if side is self.client else self.client

    def carry(self, sender: Side) -> bool:
        """Bring what one side wrote to the other; False if that was nothing."""
        data = written(sender.peer)
        sender.wrote += data
        receiver = self.other(sender)
        if data and not receiver.deaf:
            self.arrive(receiver, self._change(sender.name, data) if self._change else data)
        return bool(data)

    def arrive(self, side: Side, data: bytes) -> list[Event]:
        """Let bytes arrive, and answer the questions of the login; return all events."""
        events = feed(side.peer, data, self.split)
        for event in events:
            if isinstance(event, VerifierNeeded):
                password = self._users.get(event.user)
                side.peer.verifier_found(None if password is None else verifier_of(password))
            elif isinstance(event, KeysNeeded):
                side.peer.keys_derived(keys_of(self._password, event.salt, event.iterations))
            elif isinstance(event, WelcomeNeeded):
                self._welcome(side.peer)
            else:
                side.events.append(event)
        return events

    def step(self) -> bool:
        """Carry once each way; False if nobody had anything to say."""
        return any([self.carry(self.client), self.carry(self.server)])

    def run(self) -> Pair:
        """Carry until nobody has anything to say."""
        while self.step():
            pass
        return self

    def log_in(self) -> Pair:
        """Run the login, which must succeed, and forget its events and bytes."""
        self.run()
        for side in (self.client, self.server):
            assert side.peer.state is State.OPEN, (side.name, side.events)
            side.events.clear()
            side.wrote = b""
        return self


def welcome(server: CNDT, methods: bytes = b"") -> None:
    """Let the client in, as the owner of a server does."""
    server.session = Session(SESSION_ID, EPOCH)
    server.welcome(heartbeat=HEARTBEAT, name="conduit-server", version="1.0.0", methods=methods)


# Peers in each state of the login, without running it again for each.


class Login(NamedTuple):
    """The four frames of a login; all are the same each time, as clock and nonces are."""

    request: bytes
    challenge: bytes
    response: bytes
    success: bytes


@functools.cache
def login_frames(client: Capabilities = DEFAULTS, server: Capabilities = DEFAULTS) -> Login:
    pair = Pair(client={"capabilities": client}, server={"capabilities": server}).run()
    (request, response), (challenge, success) = map(
        frames_of, (pair.client.wrote, pair.server.wrote)
    )
    return Login(request, challenge, response, success)


SERVER_STATES = (
    State.AWAIT_REQUEST,
    State.AWAIT_VERIFIER,
    State.AWAIT_PROOF,
    State.AWAIT_WELCOME,
    State.OPEN,
)
CLIENT_STATES = (State.AWAIT_CHALLENGE, State.AWAIT_KEYS, State.AWAIT_SUCCESS, State.OPEN)
STATES = [
    *(("server", state) for state in SERVER_STATES),
    *(("client", state) for state in CLIENT_STATES),
]
"""Every state in which a frame may come, with the side that can be in it."""


def server_in(state: State, clock: Callable[[], int] | None = None, **options: Any) -> CNDT:
    """Return a server that has come to a state, all that it wrote taken."""
    server = make_server(clock, **options)
    login = login_frames(server=options.get("capabilities", DEFAULTS))
    steps: list[Callable[[], object]] = [
        lambda: server.receive(login.request),
        lambda: server.verifier_found(verifier_of(PASSWORD)),
        lambda: server.receive(login.response),
        lambda: welcome(server),
    ]
    return _go_on(server, steps, state)


def client_in(state: State, clock: Callable[[], int] | None = None, **options: Any) -> CNDT:
    """Return a client that has come to a state, all that it wrote taken."""
    client = make_client(clock, **options)
    login = login_frames(client=options.get("capabilities", DEFAULTS))
    steps: list[Callable[[], object]] = [
        lambda: client.receive(login.challenge),
        lambda: client.keys_derived(keys_of(PASSWORD, SALT, ITERATIONS)),
        lambda: client.receive(login.success),
    ]
    return _go_on(client, steps, state)


def peer_in(side: str, state: State, **options: Any) -> CNDT:
    return (server_in if side == "server" else client_in)(state, **options)


def _go_on(peer: CNDT, steps: list[Callable[[], object]], state: State) -> CNDT:
    for step in steps:
        if peer.state is state:
            break
        step()
    assert peer.state is state
    written(peer)
    return peer
