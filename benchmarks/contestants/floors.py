"""What uvloop can do when nothing is decoded: the yardsticks.

F1 and Fc exchange frames of the size of conduit's smallest call, with a client that answers every
frame by the next one and has no tasks, no futures and no numbers to match. SF sends a whole large
frame, waits until it has come back, and sends the next.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from .base import HOST, Contestant, Heard

FRAME = bytes(range(48))
"""As long as conduit's call of add(a, b): 32 bytes of header and 16 of MessagePack."""
SIZE = len(FRAME)
EXPECTED = FRAME * (1024 * 1024 // SIZE)

Address = tuple[str, int]


def write_each(transport: asyncio.WriteTransport, frames: bytes) -> None:
    """Write frames one by one."""
    for start in range(0, len(frames), SIZE):
        transport.write(frames[start : start + SIZE])


def write_all(transport: asyncio.WriteTransport, frames: bytes) -> None:
    """Write frames together."""
    transport.write(frames)


class EchoServer(asyncio.Protocol):
    def __init__(self, write: Any) -> None:
        self._write = write
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % SIZE
        self._rest = data[whole:]
        self._write(self._transport, data[:whole] if self._rest else data)


class PipelinedClient(asyncio.Protocol):
    """Keeps frames in flight: for each that comes back it writes the next."""

    def __init__(self, write: Any) -> None:
        self._write = write
        self._in_flight = 0
        self._position = 0
        self._count = 0
        self._clock: Any = None
        self._sent_at = 0.0
        self._times: list[float] | None = None
        self._done: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        end = self._position + len(data)
        if data != EXPECTED[self._position : end]:
            raise RuntimeError("the server sent back other bytes")
        frames, self._position = divmod(end, SIZE)
        self._count += frames
        if self._times is not None and frames:
            now = time.perf_counter()
            self._times.append(now - self._sent_at)
            self._sent_at = now
        if not self._clock.over:
            self._write(self._transport, EXPECTED[: frames * SIZE])
            return
        self._in_flight -= frames
        if not self._in_flight and self._done is not None:
            self._done.set_result(self._count)

    async def pipeline(self, callers: int, clock: Any, times: list[float] | None) -> int:
        """Keep `callers` frames in flight until `clock.over`; return how many came back.

        `times` takes the time of each where only one is in flight.
        """
        self._done = asyncio.get_running_loop().create_future()
        self._in_flight, self._count, self._clock = callers, 0, clock
        self._times = times if callers == 1 else None
        self._sent_at = time.perf_counter()
        self._write(self._transport, EXPECTED[: callers * SIZE])
        return await self._done

    stream: Any
    """Of Fc; over a connection of its own."""

    async def call(self, a: int, b: int) -> int:
        """Exchange one frame."""
        await self.pipeline(1, Over, None)
        return a + b

    async def close(self) -> None:
        self._transport.close()


class Over:
    over = True


class OneWritePerFrame(Contestant):
    write = staticmethod(write_each)

    async def serve(self, methods: int) -> Any:
        loop = asyncio.get_running_loop()
        # More connections at once than the default backlog of 100 would allow.
        server = await loop.create_server(lambda: EchoServer(self.write), HOST, 0, backlog=1024)
        return server.sockets[0].getsockname()

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        loop = asyncio.get_running_loop()
        _, session = await loop.create_connection(lambda: PipelinedClient(self.write), *address)
        return session


class Flood(asyncio.Protocol):
    """Sends as many frames as it is asked for: made one by one, written 64 at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        frames = []
        for _ in range(int(data)):
            frames.append(FRAME)
            if len(frames) == 64:
                self._transport.write(b"".join(frames))
                frames.clear()
        self._transport.write(b"".join(frames))


class FloodedClient(asyncio.Protocol):
    """Cuts frames out of what comes, and counts them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % SIZE
        for start in range(0, whole, SIZE):
            frame = data[start : start + SIZE]
            self._total += self._count if frame else 0
            self._count += 1
        self._rest = data[whole:]
        if self._count == self._wanted:
            self._done.set_result(self._total)

    async def stream(self, count: int) -> int:
        """Have the server send `count` frames; return the sum of the numbers below that."""
        self._done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted, self._count, self._total = count, 0, 0
        self._transport.write(b"%d" % count)
        return await self._done


class Coalesced(OneWritePerFrame):
    write = staticmethod(write_all)

    async def serve(self, methods: int) -> Any:
        loop = asyncio.get_running_loop()
        self._flood = await loop.create_server(Flood, HOST, 0)
        return *await super().serve(methods), self._flood.sockets[0].getsockname()[1]

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        session = await super().connect(address[:2], callers, heard)
        _, flooded = await asyncio.get_running_loop().create_connection(
            FloodedClient, HOST, address[2]
        )
        session.stream = flooded.stream
        return session


class Whole(asyncio.BufferedProtocol):
    """Collects a whole frame, 8 bytes of length and a body, in a buffer that is used again."""

    def __init__(self) -> None:
        self._head = memoryview(bytearray(8))
        self._body = memoryview(b"")
        self._have = 0
        self._length = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=1 << 30)

    def get_buffer(self, sizehint: int) -> memoryview:
        return (self._head if self._length < 0 else self._body)[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        if self._length < 0 and self._have == 8:
            self._have = 0
            self._length = int.from_bytes(self._head, "big")
            if len(self._body) != self._length:
                self._body = memoryview(bytearray(self._length))
        elif self._have == self._length:
            self._have, self._length = 0, -1
            self.whole(self._body)

    def send(self, body: bytes | memoryview) -> None:
        self.transport.write(len(body).to_bytes(8, "big"))
        self.transport.write(body)

    def whole(self, body: memoryview) -> None:
        """Send it back."""
        self.send(body)


class WholeClient(Whole):
    _answer: asyncio.Future[memoryview]

    def whole(self, body: memoryview) -> None:
        self._answer.set_result(body)

    async def echo(self, data: bytes) -> Any:
        self._answer = asyncio.get_running_loop().create_future()
        self.send(data)
        return await self._answer

    async def close(self) -> None:
        self.transport.close()


class StoreAndForward(Contestant):
    async def serve(self, methods: int) -> Any:
        server = await asyncio.get_running_loop().create_server(Whole, HOST, 0)
        return server.sockets[0].getsockname()

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        _, session = await asyncio.get_running_loop().create_connection(WholeClient, *address)
        return session
