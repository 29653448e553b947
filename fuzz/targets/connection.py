"""A connection of the transport layer, without a socket: calls, handlers, messages and streams.

The link is a list, and it may be lost: then the session goes on over another one, whose login says
what the input wants. Whatever comes, `receive` returns, the event loop hears of no error, and when
the connection has ended every call has ended.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import zlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Final

from msgpack import packb

from conduit.exceptions import ConduitError, ConnectionClosed
from conduit.protocol.events import (
    Capabilities,
    KeysNeeded,
    Resumed,
    ResumeWanted,
    VerifierNeeded,
    WelcomeNeeded,
)
from conduit.protocol.frames import COMPRESSED, HEADER, REPLY, SEQUENCED, FrameType, word
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.session import Session
from conduit.rpc.router import Router
from conduit.transport.connection import Connection
from conduit.transport.life import ACCEPTING, CONNECTING
from conduit.transport.loop import Shared
from conduit.transport.settings import Settings
from conduit.transport.streaming import Stream
from fuzz.source import Source
from fuzz.targets.parser import small_frames
from tests.golden_frames import GOLDEN
from tests.protocol.pair import EPOCH, SESSION_ID, Pair, frames_of
from tests.wire_client import frame

CAPABILITIES: Final = Capabilities(
    frame_max=2000, features=frozenset({"zlib"}), calls=4, window=(6, 4000), stream=(8, 2000)
)
SETTINGS: Final = Settings(
    capabilities=CAPABILITIES,
    timeout=None,
    running=1000,
    outbox_bytes=4000,
    backpressure=True,
    debug=False,
)
S, R, C = SEQUENCED, REPLY, COMPRESSED
KINDS: Final = (
    (FrameType.RPC_REQUEST, S),
    (FrameType.RPC_RESPONSE, S),
    (FrameType.RPC_ERROR, S),
    (FrameType.MESSAGE, S),
    (FrameType.MESSAGE, S | R),
    (FrameType.MESSAGE, 8),
    (FrameType.STREAM_ITEM, S),
    (FrameType.STREAM_END, S),
    (FrameType.STREAM_CREDIT, S),
    (FrameType.CANCEL, S),
    (FrameType.ACK, 0),
    (FrameType.RPC_REQUEST, S | C),
    (FrameType.STREAM_ITEM, S | C),
    (FrameType.GOAWAY, 0),
    (FrameType.HEARTBEAT_PONG, 0),
    (FrameType.CLOSE, 0),
)
METHODS: Final[dict[str, Any]] = {
    "add": {"a": 1},
    "wait": {},
    "count": {"to": 20},
    "total": {},
    "double": {},
    "fail": [],
    "conduit.discover": {},
    "none": {},
    "push": [30],
}
"""Method -> parameters that it takes."""
STREAMING: Final = {"count": None, "push": None, "total": "numbers", "double": 0}
"""Method -> the parameter whose items the caller sends."""
MESSAGES: Final = ("note", "slow", "none", "note_response")
LARGE: Final = 700
TURNS: Final = 12
KEEPS: Final = 30.0


Question = VerifierNeeded | KeysNeeded | WelcomeNeeded | ResumeWanted | Resumed


class Link:
    """Takes what is written, and is closed when it is told so."""

    def __init__(self) -> None:
        self.wrote: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.wrote.append(bytes(data))

    def unsent(self) -> int:
        return 0

    def finish(self) -> None: ...

    def abort(self) -> None: ...

    def carry(self, connection: Connection) -> None: ...

    def give_up_after(self, seconds: float) -> None: ...

    def abandon(self) -> None: ...

    def hold(self, held: bool) -> None: ...


class Owner:
    """Lets everybody in."""

    def __init__(self) -> None:
        self.endings: list[Connection] = []
        self.older: Connection | None = None

    def asked(self, connection: Connection, event: Question) -> None:
        older = self.older
        if isinstance(event, (Resumed, ResumeWanted)) and (older is None or older.closed):
            connection.fail(ConnectionClosed("gone"), 1000, "gone")
        elif isinstance(event, Resumed):
            assert older is not None
            older.fence()
            older.take_over(connection, event.accepted, event.rest)
        elif isinstance(event, ResumeWanted):
            assert older is not None
            connection.welcome_back(older, event.accepted, "server", "1")
        else:
            assert isinstance(event, WelcomeNeeded)  # it logs in without a password
            connection.introduce(Session(SESSION_ID, EPOCH))
            connection.welcome("server", "1")

    def opened(self, connection: Connection) -> None: ...

    def away(self, connection: Connection, reason: ConnectionClosed) -> None: ...

    def returned(self, connection: Connection) -> None: ...

    def leaving(self, connection: Connection, reason: ConnectionClosed) -> None:
        """The peer goes away."""

    def ended(self, connection: Connection, error: Exception) -> None:
        self.endings.append(connection)


def add(a: int, b: int = 1) -> int:
    return a + b


def fail(text: str = "") -> None:
    raise LookupError(text)


async def wait() -> None:
    await asyncio.get_running_loop().create_future()


async def count(to: int) -> AsyncIterator[int]:
    for number in range(min(to, 50)):
        yield number


async def push(to: int, numbers: Stream[int]) -> int:
    for number in range(min(to, 50)):
        await numbers.send(number)
    return to


async def total(numbers: AsyncIterator[int]) -> int:
    return sum([number async for number in numbers])


async def double(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for item in items:
        yield item
        yield item


def note(message: Any) -> Any:
    return message


async def slow(message: Any) -> Any:
    for _ in range(3):
        await asyncio.sleep(0)
    return message


@functools.cache
def router() -> Router:
    """Return handlers of every kind."""
    router = Router(with_connection=False)
    for method in (add, fail, wait, count, push, total, double):
        thread = False if method in (add, fail) else None
        router.add_method(method, None, timeout=None, extra="forbid", thread=thread)
    router.add_message(note, "note", concurrent=False, thread=False)
    router.add_message(slow, "slow", concurrent=False, thread=None)
    return router


@functools.cache
def login() -> tuple[bytes, bytes]:
    """Return what client and server write to log in without a password."""
    pair = Pair(
        client={"user": None, "capabilities": CAPABILITIES},
        server={"anonymous": True, "capabilities": CAPABILITIES},
    ).run()
    return pair.client.wrote, pair.server.wrote


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """Return the loop of all inputs; a new one for each would take most of the time."""
    made = asyncio.new_event_loop()
    atexit.register(made.close)
    return made


def run(data: bytes) -> None:
    errors: list[dict[str, Any]] = []
    loop().set_exception_handler(lambda _, context: errors.append(context))
    loop().run_until_complete(_run(Source(data)))
    for error in errors:
        raise error.get("exception") or AssertionError(error)


async def _run(source: Source) -> None:
    accepting = bool(source.below(2))
    owner, links = Owner(), [Link()]
    connection = _connect(owner, links[0], accepting=accepting)
    connection.inlet.receive(login()[0 if accepting else 1])
    owner.older = connection
    connection.keeps = KEEPS * source.below(2)
    tasks = [asyncio.ensure_future(_ask(source, connection)) for _ in range(source.below(5))]
    await _turns(3)
    feeder = Feeder(source, connection, accepting=accepting)
    for _ in range(24):
        if connection.closed or source.left < 3:
            break
        if connection.keeps and source.below(4) == 3:
            links.append(Link())
            loop().call_soon(feeder.come_back, owner, links[-1])
        else:
            loop().call_soon(feeder.feed)  # a link is no task either
        await _turns(1 + source.below(4))
    if connection.away:
        connection.fail(ConnectionClosed("nobody comes"), 1006, "nobody comes")
    connection.keeps = 0.0
    loop().call_soon(connection.link_lost, None)
    await _turns(TURNS)
    assert connection.closed and owner.endings.count(connection) == 1
    for task in tasks:
        assert task.done(), "a call outlives its connection"
        error = task.exception()
        assert error is None or isinstance(error, ConduitError), repr(error)
    assert not connection.running, "a handler outlives its connection"
    for link in links:
        frames_of(b"".join(link.wrote))


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def _connect(
    owner: Owner, link: Link, *, accepting: bool, session: Session | None = None
) -> Connection:
    connection = Connection(
        Shared.of(loop()),
        loop(),
        owner,
        router(),
        SETTINGS,
        first_id=ACCEPTING if accepting else CONNECTING,
        address="fuzz",
    )
    protocol = connection.protocol
    if accepting:
        protocol.accept(
            ServerLogin(
                protocol.send_login,
                capabilities=CAPABILITIES,
                nonce="n" * 24,
                mock_secret=bytes(32),
                anonymous=True,
            )
        )
    else:
        protocol.open(
            ClientLogin(
                protocol.send_login,
                capabilities=CAPABILITIES,
                nonce="n" * 24,
                user=None,
                agent="fuzz/1",
                session=session,
            )
        )
    connection.link_made(link)
    return connection


async def _items(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number


def _ask(source: Source, connection: Connection) -> Coroutine[Any, Any, Any]:
    """Return something that this side wants of the other."""
    kind = source.below(6)
    if kind == 0:
        return connection.rpc.call("add", {"a": 1})
    if kind == 1:
        return connection.request("note", source.byte(), timeout=None)
    if kind == 2:
        return connection.send("note", "x" * source.byte())
    if kind == 3:
        return _read(connection.rpc.stream("count", {"to": 3}))
    if kind == 4:
        return _read(connection.rpc.stream("double", {"items": _items(source.byte())}))
    return connection.ping()


async def _read(stream: Any) -> int:
    return len([item async for item in stream])


class Feeder:
    """The other side of the connection, which keeps to the rules until the input says otherwise."""

    def __init__(self, source: Source, connection: Connection, *, accepting: bool) -> None:
        self._source = source
        self._connection = connection
        self._accepting = accepting
        self._sent = connection.protocol.session.received
        self._next_id = 1 if accepting else 2

    def feed(self) -> None:
        """Let the connection receive a few frames."""
        source = self._source
        data = b"".join(self._frame() for _ in range(1 + source.below(4)))
        with small_frames():
            for piece in source.cut(data):
                self._arrive(piece)

    def come_back(self, owner: Owner, link: Link) -> None:
        """Lose the link, or let it be, and log in over another one."""
        source, older = self._source, self._connection
        if source.below(2) and not older.away:
            older.link_lost(None)
        if older.closed or (older.away is False and not self._accepting):
            return  # a client does not come again before it has lost the link
        new = _connect(owner, link, accepting=self._accepting, session=older.session)
        accepted = (
            source.number() if source.seldom() else max(0, older.session.sent - source.below(4))
        )
        name = "resume_request" if self._accepting else "resume_success"
        golden = GOLDEN[name]
        body: Any = golden.value
        changed = packb({**body, "session": {**body["session"], "recv": accepted}})
        self._sent = older.session.received
        data = frame(golden.type, id=1, payload=changed)
        with small_frames():
            if self._accepting:
                new.inlet.receive(data)
                return
            data += b"".join(self._frame() for _ in range(source.below(4)))
            pieces = source.cut(data)
            while pieces and not new.closed:
                new.inlet.receive(pieces.pop(0))
            for piece in pieces:
                self._arrive(piece)

    def _arrive(self, data: bytes) -> None:
        """Do what a link does: the rest of a large frame is read to where it is to be."""
        inlet, left = self._connection.inlet, memoryview(data)
        while left:
            if self._connection.protocol.large is None:
                inlet.receive(bytes(left))
                return
            place = inlet.buffer()
            count = min(len(place), len(left))
            place[:count] = left[:count]
            inlet.buffer_filled(count)
            left = left[count:]
            del place  # event loops hold it no longer either

    def _frame(self) -> bytes:
        source = self._source
        type, flags = source.choose(KINDS)
        payload = b"" if type in (FrameType.STREAM_END, FrameType.ACK) else self._body(type)
        if type == FrameType.HEARTBEAT_PONG:
            payload = b""
        if flags & C:
            payload = zlib.compress(payload)
        self._sent += bool(flags & S)
        number = self._sent if flags & S else 0
        return (
            HEADER.pack(word(type, flags), len(payload), self._id(type, flags), 0, number) + payload
        )

    def _id(self, type: int, flags: int) -> int:
        source = self._source
        if source.seldom():
            return source.number()
        opens = type == FrameType.MESSAGE and flags == S and source.below(2)
        if opens or type == FrameType.RPC_REQUEST:
            self._next_id += 2
            return self._next_id - 2
        if type in (FrameType.GOAWAY, FrameType.CLOSE) or (
            type == FrameType.MESSAGE and flags != S | R
        ):
            return 0
        if type == FrameType.ACK:
            return source.below(1 + min(255, self._connection.protocol.session.sent))
        # One of the calls of either side, or stream 0.
        return source.below(12)

    def _body(self, type: int) -> bytes:
        source = self._source
        if source.seldom():
            return source.packed()
        if source.seldom():  # with `bytes` that are read apart
            text = _packed(source.choose((*METHODS, *MESSAGES)))
            return b"\x92" + text + b"\x91\xc6" + LARGE.to_bytes(4, "big") + bytes(LARGE)
        if type == FrameType.RPC_REQUEST:
            method = source.choose(tuple(METHODS))
            parameters = _packed(METHODS[method]) if source.below(4) else source.packed()
            parts = [_packed(method), parameters, *self._meta(method)]
        elif type == FrameType.MESSAGE:
            parts = [_packed(source.choose(MESSAGES)), source.packed()]
        elif type == FrameType.RPC_ERROR:
            code = source.choose(
                ("call_cancelled", "invalid_params", "overloaded", "mine", "unavailable")
            )
            parts = [_packed(code), source.packed(), source.packed()]
        elif type == FrameType.STREAM_CREDIT:
            parts = [_packed(source.number(4)), _packed(source.number(4))]
        elif type == FrameType.STREAM_ITEM:
            parts = [source.packed() for _ in range(source.below(10))]
        elif type == FrameType.CLOSE:
            parts = [_packed(source.choose((1000, 1001, 1002, 4421))), source.packed()]
        else:
            parts = [source.packed() for _ in range(1 + source.below(2))]
        return bytes((0x90 | len(parts),)) + b"".join(parts)

    def _meta(self, method: str) -> list[bytes]:
        source = self._source
        kind = source.below(8)
        if method in STREAMING and kind < 7:
            return [_packed({"stream": STREAMING[method]})]
        if kind < 4:
            return []
        meta: dict[str, Any] = {"ttl": source.choose((0, 1, 5000, 2**63)), "headers": {"a": 1}}
        if kind > 5:
            meta[source.choose(("ttl", "headers", "stream", "key"))] = source.value()
        return [_packed(meta)]


def _packed(value: Any) -> bytes:
    packed: bytes = packb(value)
    return packed


def seeds() -> Iterator[bytes]:
    """Yield inputs from which a first corpus grows."""
    for side in range(2):
        for kind in range(len(KINDS)):
            for method in range(6):
                start = bytes((side, 3, method, 5, 3, 4, 0, 1))
                yield start + bytes((kind, 0, method, method, 1, 1, 0, 0, 0, 1, 2, 3)) * 3
                yield start + bytes((0, 0, method, 2, 1, kind, 0, 1, 1, 1, 2, 0)) * 4
                yield start + bytes((1, 3, method & 1, 0, kind % 4, 0, 3, 0, kind, 2, 1, 1)) * 4
