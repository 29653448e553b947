"""The proxy of the chaos tests does what it is told, in bytes and in their order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest

from tests.acceptance.raw import reset
from tests.acceptance.support import within
from tests.chaos_proxy import ChaosProxy, Direction
from tests.transport.pair import until

DATA = random.Random(1).randbytes(300_000)


class End:
    """One end of a connection through the proxy, whose other end is another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes, *, end: bool = False) -> None:
        self.writer.write(data)
        if end:
            self.writer.write_eof()

    async def receive(self, count: int) -> bytes:
        return await within(self.reader.readexactly(count))

    async def rest(self) -> bytes:
        """Everything up to the end, which must not be a reset."""
        return await within(self.reader.read())

    async def until_reset(self) -> bytes:
        """Everything up to the reset that has to come."""
        data = bytearray()
        with pytest.raises(ConnectionResetError):
            while chunk := await within(self.reader.read(65536)):
                data += chunk
            pytest.fail("it ended without a reset")
        return bytes(data)


class Ends:
    """A proxy with a target behind it; connecting gives the two ends of a connection."""

    def __init__(self, proxy: ChaosProxy, accepted: asyncio.Queue[End], made: list[End]) -> None:
        self.proxy = proxy
        self._accepted = accepted
        self._made = made

    async def connect(self) -> tuple[End, End]:
        near = End(*await within(asyncio.open_connection(*self.proxy.address)))
        self._made.append(near)
        return near, await within(self._accepted.get())


@contextlib.asynccontextmanager
async def ends(seed: int = 0) -> AsyncIterator[Ends]:
    accepted: asyncio.Queue[End] = asyncio.Queue()
    made: list[End] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.append(End(reader, writer))
        accepted.put_nowait(made[-1])

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()
        async with ChaosProxy(host, port, seed=seed) as proxy:
            yield Ends(proxy, accepted, made)
    finally:
        server.close()
        for end in made:
            end.writer.transport.abort()


@contextlib.asynccontextmanager
async def joined(seed: int = 0) -> AsyncIterator[tuple[ChaosProxy, End, End]]:
    async with ends(seed) as both:
        near, far = await both.connect()
        yield both.proxy, near, far


async def test_it_is_a_cable_when_it_is_told_nothing() -> None:
    async with joined() as (proxy, near, far):
        near.send(DATA, end=True)
        far.send(DATA[::-1], end=True)
        assert await far.rest() == DATA
        assert await near.rest() == DATA[::-1]
        assert (proxy.accepted, proxy.cuts) == (1, 0)
        assert (proxy.up.passed, proxy.down.passed) == (len(DATA), len(DATA))
        assert (proxy.up.corrupted, proxy.down.corrupted) == (0, 0)


async def test_one_side_may_end_and_still_be_sent_to() -> None:
    async with joined() as (_, near, far):
        near.send(b"question", end=True)
        assert await far.rest() == b"question"
        far.send(b"answer", end=True)
        assert await near.rest() == b"answer"


async def test_latency_holds_each_byte_back_and_not_the_rate() -> None:
    loop = asyncio.get_running_loop()
    async with joined() as (proxy, near, far):
        proxy.up.latency, proxy.up.jitter = 0.1, 0.05
        started = loop.time()
        for start in range(0, len(DATA), 1000):
            near.send(DATA[start : start + 1000])
            await asyncio.sleep(0)
        near.writer.write_eof()
        first = await far.receive(1)
        assert loop.time() - started >= 0.1
        assert first + await far.rest() == DATA
        # Each of hundreds of chunks is late, and all of them together not more.
        assert loop.time() - started < 5.0


async def test_a_rate_is_not_exceeded() -> None:
    loop = asyncio.get_running_loop()
    async with joined() as (proxy, near, far):
        proxy.down.rate = 100_000
        started = loop.time()
        far.send(DATA[:20_000])
        near.send(DATA)
        assert await far.receive(len(DATA)) == DATA  # the other direction is free
        assert await near.receive(20_000) == DATA[:20_000]
        # The last piece has passed before its time is over.
        assert loop.time() - started >= 0.19
        assert proxy.down.pieces >= 40


@pytest.mark.parametrize(("most", "least"), [(1, 1.0), (10, 0.1)])
async def test_slices_are_written_one_by_one(most: int, least: float) -> None:
    async with joined() as (proxy, near, far):
        proxy.up.slice = most
        data = DATA[:3000]
        near.send(data, end=True)
        read = bytearray()
        reads = 0
        while chunk := await within(far.reader.read(65536)):
            read += chunk
            reads += 1
        assert read == data
        assert proxy.up.pieces >= len(data) * least
        assert reads > proxy.up.pieces / 10  # whoever reads finds few of them together


async def test_nothing_passes_a_hole_and_everything_when_it_is_over() -> None:
    async with joined() as (proxy, near, far):
        near.send(b"before")
        assert await far.receive(6) == b"before"
        proxy.up.hole = True
        near.send(DATA, end=True)
        far.send(b"the other way")
        assert await near.receive(13) == b"the other way"
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(far.reader.read(1), 0.1)
        assert proxy.up.passed == 6
        proxy.up.hole = False
        assert await far.rest() == DATA


async def test_a_hole_takes_the_news_of_a_reset_as_well() -> None:
    async with joined() as (proxy, near, far):
        proxy.up.hole = True
        reset(near.writer)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(far.reader.read(1), 0.1)
        proxy.up.hole = False
        assert await far.until_reset() == b""


async def test_a_reset_is_passed_on_behind_what_was_sent_before() -> None:
    async with joined() as (proxy, near, far):
        proxy.up.latency = 0.05
        near.send(b"last words")
        await until(lambda: proxy.up.taken == 10)
        reset(near.writer)
        assert await far.until_reset() == b"last words"


async def test_half_close_ends_one_direction_and_leaves_the_other() -> None:
    async with joined() as (proxy, near, far):
        near.send(b"before")
        assert await far.receive(6) == b"before"
        proxy.half_close(proxy.up)
        near.send(b"nobody reads this")
        assert await far.rest() == b""
        far.send(DATA, end=True)
        assert await near.rest() == DATA


async def test_cut_resets_both_sides_of_every_connection_and_admits_new_ones() -> None:
    async with ends() as both:
        proxy = both.proxy
        pairs = [await both.connect() for _ in range(3)]
        assert proxy.connections == 3
        assert proxy.cut() == 3
        assert proxy.connections == 0
        for pair in pairs:
            for end in pair:
                assert await end.until_reset() == b""
        near, far = await both.connect()
        near.send(b"again")
        assert await far.receive(5) == b"again"
        assert (proxy.accepted, proxy.cuts) == (4, 3)


@pytest.mark.parametrize("count", [0, 1, 1000, 200_000])
@pytest.mark.parametrize("upward", [True, False])
async def test_cut_after_some_bytes_lets_exactly_these_pass(count: int, upward: bool) -> None:
    async with joined() as (proxy, near, far):
        direction = proxy.up if upward else proxy.down
        sender, receiver = (near, far) if upward else (far, near)
        sender.send(b"before")
        assert await receiver.receive(6) == b"before"
        direction.cut_after = count
        sender.send(DATA)
        received = await receiver.until_reset()
        # The reset may overtake what waits in the sockets.
        assert DATA.startswith(received)
        assert direction.passed == 6 + count and direction.cut_after is None
        assert (proxy.cuts, proxy.connections) == (1, 0)


async def test_refuse_leaves_what_is_connected_and_admit_takes_new_ones() -> None:
    async with ends() as both:
        proxy = both.proxy
        near, far = await both.connect()
        port = proxy.port
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await both.connect()
        near.send(b"still here")
        assert await far.receive(10) == b"still here"
        await proxy.admit()
        assert proxy.port == port
        near, far = await both.connect()
        near.send(b"here too")
        assert await far.receive(8) == b"here too"


async def test_where_the_target_refuses_the_proxy_resets() -> None:
    async with joined() as (proxy, _, _), ChaosProxy("127.0.0.1", proxy.port) as second:
        proxy.refuse()
        near = End(*await within(asyncio.open_connection(*second.address)))
        try:
            assert await near.until_reset() == b""
        finally:
            near.writer.transport.abort()


def changed(data: bytes) -> list[int]:
    """Return where data differs from what was sent."""
    assert len(data) == len(DATA)
    return [place for place, byte in enumerate(data) if byte != DATA[place]]


async def test_corrupt_after_changes_one_byte() -> None:
    async with joined() as (proxy, near, far):
        near.send(b"before")
        assert await far.receive(6) == b"before"
        proxy.up.corrupt_after = 123_456
        near.send(DATA, end=True)
        assert changed(await far.rest()) == [123_456]
        assert proxy.up.corrupted == 1 and proxy.up.corrupt_after is None


async def test_corruption_changes_no_more_than_it_counts() -> None:
    async with joined() as (proxy, near, far):
        proxy.up.corrupt, proxy.up.slice = 0.5, 2000
        near.send(DATA, end=True)
        found = changed(await far.rest())
        assert len(found) == proxy.up.corrupted
        assert 10 < len(found) < proxy.up.pieces


async def test_it_heals_while_connections_run() -> None:
    async with joined() as (proxy, near, far):
        up = proxy.up
        up.latency, up.jitter, up.rate, up.slice, up.hole = 0.001, 0.001, 1000, 1, True
        up.corrupt, up.corrupt_after, up.cut_after = 1.0, 0, 3
        proxy.heal()
        near.send(DATA, end=True)
        assert await far.rest() == DATA
        assert up.corrupted == 0 and proxy.cuts == 0


def pass_through(direction: Direction) -> tuple[list[int], bytes]:
    """Cut data into pieces and count them, as the proxy does."""
    sizes, passed, start = [], b"", 0
    while start < len(DATA):
        piece = direction.count(DATA[start : start + direction.size()])
        sizes.append(len(piece))
        passed += piece
        start += len(piece)
    return sizes, passed


async def test_a_seed_decides_everything() -> None:
    runs = []
    for seed in (3, 3, 4):
        direction = Direction(random.Random(seed))
        direction.slice, direction.corrupt, direction.jitter = 5000, 0.1, 1.0
        runs.append((pass_through(direction), direction.delay()))
    assert runs[0] == runs[1] != runs[2]
