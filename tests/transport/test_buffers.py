"""What waits in all connections together: what counts, who ends when it is too much, and how."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest

from conduit.exceptions import ConnectionClosed, ConnectionLost
from conduit.protocol.frames import HEADER, PRIORITY, SEQUENCED, CloseCode, FrameType, word
from conduit.transport import threads
from conduit.transport.buffers import STEP, Buffers
from tests.transport.pair import Pair, Side, settings, turns, until, within

KIB = 1024


def begin_large(side: Side, size: int) -> None:
    """Let the first part of a large frame of the peer come in."""
    head = HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), size, 101, 0, 1)
    side.connection.inlet.receive(head + bytes(130 * KIB))


async def closed(side: Side) -> ConnectionClosed:
    """Return why a connection is over; to be awaited where that has to happen."""
    await within(side.connection.wait_closed())
    assert side.connection.reason is not None
    return side.connection.reason


# What counts


class Here:
    """A pair, what its handlers wait for, and the calls that are under way."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.gate = asyncio.Event()
        self.calls: list[asyncio.Future[Any]] = []
        self.runs: list[Any] = []

    def start(self, method: str) -> None:
        self.calls.append(self.pair.client.start(method))

    async def enter(self, run: Any) -> None:
        self.runs.append(await run.__aenter__())

    async def leave(self) -> None:
        for run in self.runs:
            with contextlib.suppress(ConnectionLost):
                await within(run.__aexit__(None, None, None))
        await asyncio.gather(*self.calls, return_exceptions=True)


async def unread_answers(here: Here) -> int:
    @here.pair.server.rpc
    async def big() -> bytes:
        return bytes(300 * KIB)

    here.pair.server.link.stall()
    here.start("big")
    return 300 * KIB


async def held_answers(here: Here) -> int:
    @here.pair.server.rpc
    async def some() -> bytes:
        return bytes(60 * KIB)

    here.pair.server.connection._outlet.limit = 50 * KIB
    here.pair.server.link.stall()
    for _ in range(5):
        here.start("some")
    return 5 * 60 * KIB


async def messages_behind_a_busy_handler(here: Here) -> int:
    @here.pair.server.on("note")
    async def note(client: Any, message: bytes) -> None:
        await here.gate.wait()

    for _ in range(6):
        await here.pair.client.connection.send("note", bytes(60 * KIB))
    return 5 * 60 * KIB  # one of them is the handler's


async def broadcasts_behind_a_busy_handler(here: Here) -> int:
    @here.pair.server.on("news")
    async def news(client: Any, message: bytes) -> None:
        await here.gate.wait()

    for _ in range(6):
        payload = msgpack.packb(["news", bytes(60 * KIB)])
        head = HEADER.pack(word(FrameType.MESSAGE, PRIORITY), len(payload), 0, 0, 0)
        asyncio.get_running_loop().call_soon(
            here.pair.server.connection.inlet.receive, head + payload
        )
    return 5 * 60 * KIB


async def items_that_nobody_takes(here: Here) -> int:
    @here.pair.server.rpc
    async def total(items: AsyncIterator[bytes]) -> None:
        await here.gate.wait()
        async for _ in items:
            pass

    await here.enter(here.pair.client.stream("total", [iter([bytes(100 * KIB)] * 2)]))
    return 2 * 100 * KIB


async def items_without_credit(here: Here) -> int:
    @here.pair.server.rpc
    async def many() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(200 * KIB)

    await here.enter(here.pair.client.stream("many"))
    await until(lambda: len(here.pair.server.link.sent(FrameType.STREAM_ITEM)) == 2)
    here.pair.server.connection.protocol.session.drop()  # as if they had been acknowledged
    return 200 * KIB


async def reliable_broadcasts_without_credit(here: Here) -> int:
    payload = msgpack.packb(["news", bytes(60 * KIB)])
    here.pair.server.connection._messages._count = 0
    for _ in range(5):
        here.pair.server.connection.send_reliably(payload, 1 << 30)
    return 5 * 60 * KIB


async def a_large_frame_that_has_begun(here: Here) -> int:
    begin_large(here.pair.server, 800 * KIB)
    return 800 * KIB


WAITING: list[Callable[[Here], Awaitable[int]]] = [
    unread_answers,
    held_answers,
    messages_behind_a_busy_handler,
    broadcasts_behind_a_busy_handler,
    items_that_nobody_takes,
    items_without_credit,
    reliable_broadcasts_without_credit,
    a_large_frame_that_has_begun,
]


@pytest.mark.parametrize("make", WAITING)
async def test_what_waits_counts_until_its_connection_ends(
    make: Callable[[Here], Awaitable[int]],
) -> None:
    async with Pair(server=settings(buffers=Buffers(1 << 30))) as pair:
        connection, here = pair.server.connection, Here(pair)
        assert connection.weigh() < STEP
        size = await make(here)
        await until(lambda: size <= connection.weigh() < size + 4 * KIB)
        here.gate.set()
        await within(connection.abort())
        assert connection.weigh() == 0
        await here.leave()


async def test_calls_that_wait_for_a_thread_count_and_those_that_run_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release, running = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(threads, "_pool", lambda: pool)
        async with Pair(server=settings(buffers=Buffers(1 << 30))) as pair:

            @pair.server.rpc
            def size(data: bytes) -> int:
                running.set()
                release.wait(5)
                return len(data)

            calls = [pair.client.start("size", [bytes(100 * KIB)]) for _ in range(4)]
            await until(lambda: pair.server.connection.running == 4 and running.is_set())
            assert 300 * KIB <= pair.server.connection.weigh() < 304 * KIB
            release.set()
            assert await within(asyncio.gather(*calls)) == [100 * KIB] * 4
            assert pair.server.connection.weigh() < STEP


# When it is too much


@contextlib.asynccontextmanager
async def crowd(most: int, count: int) -> AsyncIterator[list[Pair]]:
    """Return pairs whose servers are one."""
    shared = Buffers(most)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Pair(server=settings(buffers=shared)))
            for _ in range(count)
        ]
    assert shared._total == 0 and not shared._sizes


async def test_memory_for_large_frames_is_taken_from_who_holds_most(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with crowd(1800 * KIB, 4) as pairs:
        for pair, size in zip(pairs, [500, 700, 500, 200], strict=True):
            begin_large(pair.server, size * KIB)
        # At once, and not when the event loop has come round to it.
        worst = pairs[1].server.connection
        assert [pair.server.connection.closed for pair in pairs] == [False, True, False, False]
        assert worst.weigh() < 200 and worst.protocol.large is None
        seen = await closed(pairs[1].client)
        assert seen.code == CloseCode.TRY_AGAIN_LATER
        total = 1900 * KIB + 4 * HEADER.size
        text = f"{700 * KIB + 32} bytes wait for this peer, {total} for all; {1800 * KIB} is the"
        assert text in seen.reason and seen.reason.endswith("(max_buffered)")
        (warning,) = [one for one in caplog.records if one.levelno == logging.WARNING]
        assert seen.reason in warning.message and repr(worst).split()[1] in warning.message
        for pair in pairs:
            await within(pair.server.connection.abort())


async def test_who_does_not_read_is_too_slow() -> None:
    async with crowd(1500 * KIB, 3) as pairs:
        calls = []
        for pair in pairs:

            @pair.server.rpc
            async def big(size: int) -> bytes:
                return bytes(size)

            pair.server.link.stall()
        for pair, size in zip(pairs, [600, 500, 500], strict=True):
            calls.append(pair.client.start("big", [size * KIB]))
        seen = await closed(pairs[0].server)
        assert seen.code == CloseCode.TOO_SLOW
        assert f"{1500 * KIB} is the most" in seen.reason
        assert pairs[0].server.link.unsent() == 0, "nobody would have read it"
        for pair in pairs[1:]:
            pair.server.link.flow()
        with pytest.raises(ConnectionLost):
            await within(calls[0])
        assert [len(await within(call)) for call in calls[1:]] == [500 * KIB] * 2


async def test_who_has_let_go_by_now_is_not_the_one() -> None:
    async with crowd(1500 * KIB, 2) as pairs:
        heavy, light = (pair.server for pair in pairs)

        @heavy.rpc
        async def big() -> bytes:
            return bytes(1000 * KIB)

        heavy.link.stall()
        call = pairs[0].client.start("big")
        await until(lambda: heavy.connection.weigh() > 1000 * KIB)
        heavy.link.flow()
        await within(call)
        pairs[0].client.connection.inlet.acknowledge()
        await turns()
        begin_large(light, 900 * KIB)
        await turns()
        assert not heavy.connection.closed and not light.connection.closed
        await within(light.connection.abort())


async def test_what_an_ended_connection_still_holds_counts_and_can_be_taken() -> None:
    async with crowd(1500 * KIB, 2) as pairs:
        ended, other = (pair.server for pair in pairs)

        @ended.on("note")
        async def note(client: Any, message: bytes) -> None:
            await asyncio.Event().wait()

        for _ in range(16):
            await pairs[0].client.connection.send("note", bytes(60 * KIB))
        await within(pairs[0].client.connection.close())
        await until(lambda: ended.connection.closed)
        assert ended.connection.weigh() > 800 * KIB, "messages of who has closed are handled"
        begin_large(other, 900 * KIB)
        await turns()
        assert ended.connection.weigh() == 0 and not other.connection.closed
        await ended.connection.finish_messages(5, None)
        await within(other.connection.abort())


async def test_a_client_that_is_away_ends_like_the_others() -> None:
    buffers = Buffers(700 * KIB)
    server = settings(buffers=buffers)
    async with Pair(server=server, keeps=30) as pair, Pair(server=server) as other:
        pair.server.link.cut()
        await until(lambda: pair.server.connection.away)
        for _ in range(10):
            await pair.server.connection.send("news", bytes(60 * KIB))
        begin_large(other.server, 300 * KIB)
        assert [one.server.connection.closed for one in (pair, other)] == [True, False]
        (error,) = pair.server.endings
        assert "max_buffered" in str(error)
        await within(other.server.connection.abort())


async def test_what_goes_through_may_be_any_amount() -> None:
    async with crowd(1500 * KIB, 2) as pairs:
        for pair in pairs:

            @pair.server.rpc
            async def echo(data: bytes) -> bytes:
                return data

        for _ in range(10):
            calls = [pair.client.start("echo", [bytes(300 * KIB)]) for pair in pairs]
            assert [len(data) for data in await within(asyncio.gather(*calls))] == [300 * KIB] * 2


async def test_without_a_bound_nobody_is_weighed() -> None:
    async with Pair() as pair:
        begin_large(pair.server, 900 * KIB)
        assert not pair.server.connection._settings.buffers._sizes
        await within(pair.server.connection.abort())
