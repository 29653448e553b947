"""Two connections in one process, joined by a link that can be slowed, cut into pieces and lost.

    async with Pair(server=settings(calls=4)) as pair:

        @pair.server.rpc
        async def add(a: int, b: int) -> int:
            return a + b

        assert await within(pair.client.call("add", [1, 2])) == 3

`Pair` needs no socket: `MemoryLink` hands bytes over by `loop.call_soon`, so a test decides what
arrives, when and in which pieces. `SocketPair` is the same over a real pair of sockets.
"""

from __future__ import annotations

import asyncio
import functools
import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgpack

from conduit.exceptions import ConnectionClosed
from conduit.protocol.events import Capabilities, Resumed, ResumeWanted, WelcomeNeeded
from conduit.protocol.frames import HEADER, SEQUENCED, FrameType, word
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.session import Session
from conduit.rpc.router import Router
from conduit.transport.buffers import Buffers
from conduit.transport.connection import Connection
from conduit.transport.life import ACCEPTING, CONNECTING, Question
from conduit.transport.link import SocketLink
from conduit.transport.loop import Shared
from conduit.transport.settings import Settings
from tests.conftest import LOOP

T = TypeVar("T")
P = TypeVar("P", bound="Pair")

SECONDS = 5.0
"""How long a test waits for what has to happen."""
SOON = 1_000
"""How many turns of the loop a test looks in each of, before it looks each millisecond."""
HIGH = 64 * 1024
"""Bytes in a link's buffer from which its connection is asked to pause."""
READ = 256 * 1024
"""Bytes that a link hands over at once at most, as one read of a socket would."""


async def within(awaitable: Awaitable[T], seconds: float = SECONDS) -> T:
    """Wait for something that has to happen, and fail if it does not."""
    return await asyncio.wait_for(awaitable, seconds)


async def turns(count: int = 20) -> None:
    """Let the event loop run: whatever does not wait for a timer or a socket has happened then."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that no event tells of."""

    async def look() -> None:
        looks = 0
        while not condition():
            looks += 1  # what takes longer must not keep a core from the others
            await asyncio.sleep(0 if looks < SOON else 0.001)

    await within(look())


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a whole program on the loop that is tested."""
    if LOOP == "uvloop":
        import uvloop

        return uvloop.run(main())
    return asyncio.run(main())


def settings(
    *,
    calls: int = 256,
    running: int = 10_000,
    longest: float = math.inf,
    window: tuple[int, int] = (256, 1024 * 1024),
    stream: tuple[int, int] = (4096, 256 * 1024),
    frame_max: int = 1024 * 1024,
    timeout: float | None = 30.0,
    outbox_bytes: int = 8 * 1024 * 1024,
    backpressure: bool = True,
    heartbeat: tuple[float, float] = (30.0, 90.0),
    compress: bool = False,
    debug: bool = False,
    buffers: Buffers | None = None,
) -> tuple[Settings, bool]:
    """Return what one side is told, its descriptor's defaults filled in."""
    return Settings(
        capabilities=Capabilities(
            frame_max=frame_max,
            features=frozenset({"zlib"}),
            calls=calls,
            window=window,
            stream=stream,
            ttl=0 if timeout is None else round(timeout * 1000),
        ),
        timeout=timeout,
        running=running,
        longest=longest,
        outbox_bytes=outbox_bytes,
        backpressure=backpressure,
        heartbeat=heartbeat,
        debug=debug,
        buffers=buffers or Buffers(),
    ), compress


class Seen(NamedTuple):
    """One frame as it was written."""

    type: int
    flags: int
    id: int
    number: int
    payload: bytes

    @property
    def body(self) -> Any:
        return msgpack.unpackb(self.payload)


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole frames at the beginning of the data, and what is left."""
    frames = []
    while len(data) >= HEADER.size and len(data) >= HEADER.size + HEADER.unpack_from(data)[1]:
        size = HEADER.size + HEADER.unpack_from(data)[1]
        frames.append(data[:size])
        data = data[size:]
    return frames, data


def frame_type(frame: bytes) -> int:
    """Return the type of an encoded frame."""
    return frame[5]


class MemoryLink:
    """One end of a link; what is written to it is received by the connection at the other end.

    It keeps the manners of a socket's transport: bytes arrive in a later turn of the loop, a full
    buffer pauses the connection, the buffer is flushed before an orderly end, and what is written
    after the end goes nowhere.

    Attributes:
        writes: Every chunk that was written.
        split: Bytes that arrive at once; 0 for all there are.
        delay: Seconds on the way.
        drops: Types of frames that get lost on the way. Only what is not sequenced may be lost.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.peer: MemoryLink
        self.writes: list[bytes] = []
        self.split = 0
        self.delay = 0.0
        self.drops: set[int] = set()
        self._loop = asyncio.get_running_loop()
        self._buffer: deque[bytes] = deque()
        self._size = 0
        self._rest = b""
        self._stalled = False
        self._paused = False
        self._moving = False
        self._finished = False
        self._closing = False
        self.held = False
        self.lost = False

    # What the connection calls.

    def write(self, data: bytes) -> None:
        if self._closing or self._finished:
            return
        self.writes.append(bytes(data))
        self._buffer.append(bytes(data))
        self._size += len(data)
        self._move_soon()
        if self._size > HIGH and not self._paused:
            self._paused = True
            self.connection.pause_writing()

    def unsent(self) -> int:
        return self._size

    def finish(self) -> None:
        self.hold(False)
        self._finished = True
        self._move_soon()

    def hold(self, held: bool) -> None:
        self.held = held
        self.peer._move_soon()

    def give_up_after(self, seconds: float) -> None:
        """Leave it to the heartbeat."""

    def carry(self, connection: Connection) -> None:
        self.connection = connection

    def abandon(self) -> None:
        self.lost = True
        self.abort()

    def abort(self) -> None:
        self._drop()
        self._loop.call_soon(self._lose, None)
        self._loop.call_soon(self.peer.reset)

    # What a test does.

    def stall(self) -> None:
        """Keep what is written: the peer does not read."""
        self._stalled = True

    def flow(self) -> None:
        """Let what was kept go on."""
        self._stalled = False
        self._move_soon()

    def let(self, count: int) -> None:
        """Hand over so many bytes of what is kept, in the next turn, and keep the rest."""
        self._loop.call_soon(self._let, count)

    @property
    def quiet(self) -> bool:
        """Whether nothing is on the way, and whatever is written would be."""
        return not (self._buffer or self._stalled)

    def reset(self, cause: Exception | None = None) -> None:
        """Lose the link at this end, and what is still in it."""
        self._drop()
        self._lose(cause or ConnectionResetError("the link was reset"))

    def cut(self) -> None:
        """Lose the link at both ends, as if somebody had pulled a plug that both notice."""
        self._loop.call_soon(self.reset)
        self._loop.call_soon(self.peer.reset)

    @property
    def frames(self) -> list[Seen]:
        """Every frame that was written, in order."""
        seen = []
        for frame in cut(b"".join(self.writes))[0]:
            first, _, id, _, number = HEADER.unpack_from(frame)
            seen.append(Seen(first >> 16 & 0xFF, first & 0xFFFF, id, number, frame[HEADER.size :]))
        return seen

    def sent(self, type: int) -> list[Seen]:
        """Return the frames of one type that were written."""
        return [frame for frame in self.frames if frame.type == type]

    # The way to the other end.

    def _move_soon(self) -> None:
        if not self._moving and not self._stalled and not self.lost:
            self._moving = True
            if self.delay:
                self._loop.call_later(self.delay, self._move)
            else:
                self._loop.call_soon(self._move)

    def _move(self) -> None:
        self._moving = False
        if self._stalled or self.lost or self.peer.held:
            return
        if self._buffer:
            self._hand_over(self.split or READ)
        if self._buffer:
            self._move_soon()
        elif self._closing:
            self._lose(None)
            self.peer._ended()
        elif self._finished:
            self.peer._ended()

    def _let(self, count: int) -> None:
        if self._buffer and not self.lost:
            self._hand_over(count)

    def _hand_over(self, most: int) -> None:
        self.peer._arrive(self._without_drops(self._take(most)))
        if self._paused and self._size <= HIGH // 4:
            self._paused = False
            self.connection.resume_writing()

    def _take(self, most: int) -> bytes:
        """Return what arrives at once."""
        taken, size = [], 0
        while self._buffer and size < most:
            chunk = self._buffer.popleft()
            if size + len(chunk) > most:
                self._buffer.appendleft(chunk[most - size :])
                chunk = chunk[: most - size]
            taken.append(chunk)
            size += len(chunk)
        self._size -= size
        return b"".join(taken)

    def _without_drops(self, data: bytes) -> bytes:
        if not self.drops and not self._rest:
            return data
        frames, self._rest = cut(self._rest + data)
        return b"".join(frame for frame in frames if frame_type(frame) not in self.drops)

    def _arrive(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view and not self.lost:
                if self.connection.protocol.large is None:
                    self.connection.inlet.receive(bytes(view))
                    return
                place = self.connection.inlet.buffer()
                count = min(len(place), len(view))
                place[:count] = view[:count]
                del place  # as a transport lets go of it before it reads again
                self.connection.inlet.buffer_filled(count)
                view = view[count:]
        except Exception:
            self.abort()  # as a transport does when its protocol fails; and the loop reports it
            raise

    def _ended(self) -> None:
        if not self.lost:
            self._closing = True
            self._move_soon()

    def _drop(self) -> None:
        self._closing = True
        self._buffer.clear()
        self._size = 0

    def _lose(self, cause: Exception | None) -> None:
        if not self.lost:
            self.lost = self._closing = True
            self.connection.link_lost(cause)


class Side:
    """One side of a pair: its handlers, its connection and the owner of the connection.

    Attributes:
        connection: The connection.
        link: What the connection writes to.
        transport: What the link writes to, if it is a socket.
        ready: Done when the login is.
        endings: Why the connection ended, as its owner was told; one entry, once it has.
        losses: Why its link was lost, each time that it waits for another.
        returns: How often it went on over another link.
    """

    def __init__(
        self, settings: tuple[Settings, bool], *, accepting: bool, keeps: float = 0.0
    ) -> None:
        loop = asyncio.get_running_loop()
        self._settings, self._compress = settings
        self._accepting = accepting
        self._keeps = keeps
        self.router = Router(with_connection=accepting)
        self.ready: asyncio.Future[None] = loop.create_future()
        self.endings: list[Exception] = []
        self.losses: list[ConnectionClosed] = []
        self.returns = 0
        self.link: Any = None
        self.transport: Any = None
        self.connection = self.make_connection()

    def make_connection(self, session: Session | None = None) -> Connection:
        """Return a connection that is about to log in, for a session that is to go on."""
        loop, accepting, compress = asyncio.get_running_loop(), self._accepting, self._compress
        connection = Connection(
            Shared.of(loop),
            loop,
            self,
            self.router,
            self._settings,
            first_id=ACCEPTING if accepting else CONNECTING,
            address="server" if accepting else "client",
        )
        connection.keeps = self._keeps
        protocol = connection.protocol
        if accepting:
            protocol.accept(
                ServerLogin(
                    protocol.send_login,
                    capabilities=self._settings.capabilities,
                    nonce="n" * 24,
                    mock_secret=bytes(32),
                    anonymous=True,
                    compress=compress,
                )
            )
        else:
            protocol.open(
                ClientLogin(
                    protocol.send_login,
                    capabilities=self._settings.capabilities,
                    nonce="n" * 24,
                    user=None,
                    agent="client/1",
                    compress=compress,
                    session=session,
                )
            )
        return connection

    @property
    def is_joined(self) -> bool:
        """Whether the connection goes on, over the link that was made last."""
        goes_on = not (self.connection.closed or self.connection.away)
        return goes_on and self.link.connection is self.connection

    # Handlers.

    def rpc(self, name: Any = None, *, timeout: float | None = None, thread: bool | None = None):
        """Register a method, as `@server.rpc` does."""
        return self.router.method_decorator(name, timeout=timeout, extra="forbid", thread=thread)

    def on(self, name: str, *, concurrent: bool = False, thread: bool | None = None):
        """Register a handler for messages, as `@server.on` does."""
        return self.router.message_decorator(name, concurrent=concurrent, thread=thread)

    # What a test does.

    def call(self, method: str, args: Any = None, **options: Any) -> Any:
        """Call the other side."""
        return self.connection.rpc.call(method, args, **options)

    def stream(self, method: str, args: Any = None, **options: Any) -> Any:
        """Call the other side, with streams."""
        return self.connection.rpc.stream(method, args, **options)

    def start(self, method: str, args: Any = None, **options: Any) -> asyncio.Future[Any]:
        """Call the other side in a task of its own."""
        call: asyncio.Future[Any] = asyncio.ensure_future(self.call(method, args, **options))
        return call

    def write(self, type: FrameType, id: int, body: Any, flags: int = SEQUENCED) -> None:
        """Send a frame that the library would not send by itself."""
        self.connection.protocol.send(word(type, flags), id, msgpack.packb(body))
        self.connection.flush()

    def given(self, link: SocketLink, transport: asyncio.Transport) -> Connection:
        """Return the connection to a socket that is ready."""
        return self.connection

    # What the connection calls.

    def asked(self, connection: Connection, event: Question) -> None:
        if isinstance(event, ResumeWanted):
            connection.welcome_back(self.connection, event.accepted, "server", "2")
        elif isinstance(event, Resumed) and self.connection.away:
            self.connection.take_over(connection, event.accepted, event.rest)
        elif isinstance(event, WelcomeNeeded):
            connection.introduce(Session(b"s" * 16, b"e" * 8))
            connection.welcome("server", "2")

    def opened(self, connection: Connection) -> None:
        self.ready.set_result(None)

    def away(self, connection: Connection, reason: ConnectionClosed) -> None:
        self.losses.append(reason)

    def returned(self, connection: Connection) -> None:
        self.returns += 1

    def leaving(self, connection: Connection, reason: ConnectionClosed) -> None:
        """The peer goes away."""

    def ended(self, connection: Connection, error: Exception) -> None:
        if connection is not self.connection:
            return  # it was to carry the session on, and its login failed
        self.endings.append(error)
        if not self.ready.done():
            self.ready.set_exception(error)


class Pair:
    """A client and a server that are joined, logged in and, in the end, closed.

    Attributes:
        client: The side that connects.
        server: The side that accepts.

    Args:
        keeps: Seconds for which both sides keep the session when the link is lost.
    """

    def __init__(
        self,
        *,
        client: tuple[Settings, bool] | None = None,
        server: tuple[Settings, bool] | None = None,
        keeps: float = 0.0,
    ) -> None:
        self.client = Side(client or settings(), accepting=False, keeps=keeps)
        self.server = Side(server or settings(), accepting=True, keeps=keeps)

    async def join(self) -> None:
        """Make the link, and nothing more."""
        self._link(self.client.connection, self.server.connection)

    def _link(self, client: Connection, server: Connection) -> None:
        ends = [MemoryLink(client), MemoryLink(server)]
        self.client.link, self.server.link = ends
        ends[0].peer, ends[1].peer = ends[1], ends[0]
        for end in reversed(ends):
            end.connection.link_made(end)

    def start_again(self) -> None:
        """Make another link, over which the session is to go on."""
        session = self.client.connection.session
        self._link(self.client.make_connection(session), self.server.make_connection())

    async def come_back(self) -> None:
        """Make another link, and wait until both sides use it."""
        before = self.client.returns
        self.start_again()
        await until(lambda: self.client.returns > before)

    async def __aenter__(self: P) -> P:
        await self.join()
        await within(asyncio.gather(self.client.ready, self.server.ready))
        await turns()
        for side in (self.client, self.server):
            if isinstance(side.link, MemoryLink):
                side.link.writes.clear()  # the login is over and of no interest
        return self

    async def __aexit__(self, *exc: object) -> None:
        for side in (self.client, self.server):
            if isinstance(side.link, MemoryLink):
                side.link.flow()
        for side in (self.client, self.server):
            await within(side.connection.close())


class SocketPair(Pair):
    """The same over two real sockets."""

    async def join(self) -> None:
        """Make the link, and nothing more."""
        loop = asyncio.get_running_loop()
        for side, end in zip((self.server, self.client), socket.socketpair(), strict=True):
            end.setblocking(False)
            side.transport, side.link = await loop.create_connection(
                functools.partial(SocketLink, Shared.of(loop), side.given), sock=end
            )
