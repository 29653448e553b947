"""A session goes on over another link, and nothing of it is lost or done twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conduit.exceptions import ConnectionClosed, ConnectionLost, RPCTimeout
from conduit.protocol.frames import CloseCode
from tests.transport.pair import Pair, SocketPair, run, settings, turns, until, within
from tests.wire_client import MESSAGE, SEQUENCED, frame, pack

KEEPS = 30.0


def resumable(**fields: Any) -> Pair:
    """Return a pair whose session outlives its link."""
    return Pair(keeps=KEEPS, **fields)


async def cut(pair: Pair) -> None:
    """Cut the link, and let both sides notice."""
    pair.client.link.cut()
    await until(lambda: pair.client.connection.away and pair.server.connection.away)


# What goes on


async def test_calls_in_flight_go_on_and_run_once() -> None:
    async with resumable() as pair:
        gate, ran = asyncio.Event(), []

        @pair.server.rpc
        async def double(n: int) -> int:
            ran.append(n)
            await gate.wait()
            return n * 2

        calls = [pair.client.start("double", [n]) for n in range(5)]
        await until(lambda: len(ran) == 5)
        await cut(pair)
        gate.set()
        await turns()
        assert not any(call.done() for call in calls)
        await pair.come_back()
        assert await within(asyncio.gather(*calls)) == [0, 2, 4, 6, 8]
        assert ran == [0, 1, 2, 3, 4]
        assert (pair.client.returns, pair.server.returns) == (1, 1)
        assert not pair.client.endings and not pair.server.endings


async def test_what_is_sent_while_the_link_is_lost_waits() -> None:
    async with resumable() as pair:
        got: list[Any] = []

        @pair.server.on("note")
        async def note(connection: Any, message: Any) -> None:
            got.append(message)

        @pair.server.rpc
        async def add(a: int, b: int) -> int:
            return a + b

        await cut(pair)
        for number in range(10):
            await within(pair.client.connection.send("note", number))
        call = pair.client.start("add", [1, 2])
        await turns()
        assert not call.done()
        await pair.come_back()
        assert await within(call) == 3
        assert got == list(range(10))


async def test_both_directions_go_on() -> None:
    async with resumable() as pair:
        gate = asyncio.Event()

        @pair.client.rpc
        async def name() -> str:
            await gate.wait()
            return "client"

        call = pair.server.start("name")
        await turns()
        await cut(pair)
        gate.set()
        await pair.come_back()
        assert await within(call) == "client"


async def test_streams_go_on() -> None:
    async with resumable() as pair:
        taken: list[int] = []

        @pair.server.rpc
        async def count(to: int) -> AsyncIterator[int]:
            for number in range(to):
                yield number

        @pair.server.rpc
        async def add_up(numbers: AsyncIterator[int]) -> int:
            async for number in numbers:
                taken.append(number)  # noqa: PERF401  # they are looked at on the way
            return sum(taken)

        gate = asyncio.Event()

        async def source() -> AsyncIterator[int]:
            for number in range(2000):
                if number == 700:
                    await gate.wait()
                yield number

        total = asyncio.ensure_future(pair.client.stream("add_up", [source()]).result())
        got: list[int] = []
        async with pair.client.stream("count", [20_000], items=int) as run_:
            async for number in run_:
                got.append(number)
                if number in (5, 6000, 12_000):
                    await cut(pair)
                    await pair.come_back()
        assert got == list(range(20_000))
        await until(lambda: len(taken) >= 600)
        await cut(pair)
        gate.set()
        await pair.come_back()
        assert await within(total) == sum(range(2000))
        assert taken == list(range(2000))


async def test_the_login_and_what_follows_it_may_come_in_any_pieces() -> None:
    for split in (1, 7, 40, 500):
        async with resumable() as pair:

            @pair.server.rpc
            async def add(a: int, b: int) -> int:
                return a + b

            await cut(pair)
            calls = [pair.client.start("add", [n, n]) for n in range(20)]
            await turns()
            pair.start_again()
            pair.client.link.split = pair.server.link.split = split
            results = await within(asyncio.gather(*calls))
            assert results == [2 * n for n in range(20)]


async def test_large_values_go_on_from_the_beginning() -> None:
    large = bytes(range(256)) * 40_000  # ten megabytes: read apart, in many pieces
    wide = settings(frame_max=16 * 1024 * 1024, outbox_bytes=32 * 1024 * 1024)
    async with resumable(client=wide, server=wide) as pair:

        @pair.server.rpc
        async def echo(value: bytes) -> bytes:
            return value

        call = pair.client.start("echo", [large])
        for _ in range(4):
            await turns(5)
            await cut(pair)
            await pair.come_back()
        assert await within(call, 20) == large


async def test_the_other_side_may_notice_late() -> None:
    """The client comes over another link while the server still believes in the old one."""
    async with resumable() as pair:
        ran = []

        @pair.server.rpc
        async def once(n: int) -> int:
            ran.append(n)
            return n

        assert await within(pair.client.call("once", [0])) == 0
        calls = [pair.client.start("once", [n]) for n in range(1, 50)]
        await asyncio.sleep(0)  # they are on their way
        old = pair.server.link
        pair.client.link.stall()
        pair.client.link.reset()  # only the client notices
        assert pair.client.connection.away and not pair.server.connection.away
        await pair.come_back()
        assert await within(asyncio.gather(*calls)) == list(range(1, 50))
        assert ran == list(range(50))
        assert old.lost and len(pair.server.losses) == 1


async def test_what_still_comes_over_the_old_link_means_nothing() -> None:
    async with SocketPair(keeps=KEEPS) as pair:
        got: list[Any] = []

        @pair.server.on("note")
        async def note(connection: Any, message: Any) -> None:
            got.append(message)

        await within(pair.client.connection.send("note", 1))
        await until(lambda: got == [1])
        old = pair.server.link
        pair.server.connection.fence()
        late = frame(MESSAGE, SEQUENCED, 0, pack(["note", 2]), 2)
        old.get_buffer(-1)[: len(late)] = late  # as if the kernel had kept it
        old.buffer_updated(len(late))
        old.eof_received()
        await turns()
        assert got == [1]
        assert pair.server.connection.away
        assert not pair.server.endings


# What does not


async def test_a_session_that_nobody_comes_back_to_ends_with_its_calls() -> None:
    async with Pair(keeps=0.05) as pair:
        cancelled = asyncio.Event()

        @pair.server.rpc
        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        written = pair.client.start("wait")
        await turns()
        await cut(pair)
        unwritten = pair.client.start("wait")
        with pytest.raises(ConnectionLost, match=r"no other link came within 0.05 s") as lost:
            await within(written)
        assert lost.value.executed is None
        with pytest.raises(ConnectionLost) as lost:
            await within(unwritten)
        assert lost.value.executed is False
        await within(cancelled.wait())
        await until(lambda: pair.server.endings)
        assert [type(error) for error in pair.client.endings] == [ConnectionClosed]
        with pytest.raises(ConnectionClosed):
            await pair.client.call("wait")


async def test_a_stream_that_has_begun_has_surely_run() -> None:
    async with Pair(keeps=0.05) as pair:

        @pair.server.rpc
        async def forever() -> AsyncIterator[int]:
            yield 1
            await asyncio.Event().wait()

        async with pair.client.stream("forever") as run_:
            async for _ in run_:
                break
            await cut(pair)
            with pytest.raises(ConnectionLost) as lost:
                await within(run_.result())
        assert lost.value.executed is True


async def test_deadlines_and_cancels_hold_without_a_link() -> None:
    async with resumable() as pair:
        ended: list[str] = []

        @pair.server.rpc
        async def wait(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        short = pair.client.start("wait", ["short"], timeout=0.05)
        given_up = pair.client.start("wait", ["given up"])
        await turns()
        await cut(pair)
        given_up.cancel()
        with pytest.raises(RPCTimeout):
            await within(short)
        await pair.come_back()
        await until(lambda: sorted(ended) == ["given up", "short"])


async def test_a_close_ends_the_session_at_once() -> None:
    async with resumable() as pair:
        call = pair.client.start("nothing")
        await within(pair.server.connection.close(CloseCode.NORMAL, "enough"))
        with pytest.raises((ConnectionLost, Exception)):
            await within(call)
        await until(lambda: pair.client.connection.closed)
        assert not pair.client.losses and not pair.server.losses


async def test_a_side_that_closes_without_a_link_ends_at_once() -> None:
    async with resumable() as pair:
        await cut(pair)
        await within(pair.client.connection.close())
        assert pair.client.connection.closed
        assert [getattr(error, "code", None) for error in pair.client.endings] == [CloseCode.NORMAL]


async def test_a_ping_does_not_wait_for_another_link() -> None:
    async with resumable() as pair:
        pair.server.link.stall()
        ping = asyncio.ensure_future(pair.client.connection.ping())
        await turns()
        await cut(pair)
        with pytest.raises(ConnectionClosed):
            await within(ping)
        with pytest.raises(ConnectionLost, match="not made again yet"):
            await pair.client.connection.ping()
        await pair.come_back()
        assert await within(pair.client.connection.ping()) >= 0


async def test_broadcasts_at_best_effort_are_not_kept() -> None:
    async with resumable() as pair:
        frame = pair.client.connection.push
        await cut(pair)
        assert frame(b"x" * 32) is False


async def test_the_outbox_bounds_what_is_kept() -> None:
    small = settings(outbox_bytes=10_000)
    async with resumable(client=small) as pair:
        got: list[int] = []

        @pair.server.on("note")
        async def note(connection: Any, message: Any) -> None:
            got.append(message["n"])

        await cut(pair)

        async def send_all() -> None:
            for number in range(100):
                await pair.client.connection.send("note", {"n": number, "fill": bytes(1000)})

        sending = asyncio.ensure_future(send_all())
        await turns(300)
        assert not sending.done()
        assert pair.client.connection.session.outbox_bytes < 10_000 + 64 * 1100
        await pair.come_back()
        await within(sending)
        await until(lambda: got == list(range(100)))


async def test_a_number_that_was_never_sent_breaks_the_session() -> None:
    async with resumable() as pair:
        await cut(pair)
        pair.client.connection.session.received = 10**6
        pair.start_again()
        await until(lambda: pair.server.endings)
        assert pair.server.connection.reason is not None
        assert pair.server.connection.reason.code == CloseCode.PROTOCOL_ERROR


async def test_a_login_that_was_overtaken_does_no_harm() -> None:
    """Its number is too low by now, and it takes the link from the one that came later."""
    async with resumable() as pair:

        @pair.server.rpc
        async def nothing() -> None: ...

        connection = pair.client.connection
        for _ in range(100):
            await within(pair.client.call("nothing"))
        await until(lambda: pair.server.connection.session.outbox_bytes == 0)
        received = connection.session.received
        await cut(pair)
        connection.session.received = 1  # as it was long ago
        pair.start_again()
        await until(lambda: pair.server.returns == 1)
        connection.session.received = received
        pair.client.link.stall()
        pair.client.link.reset()
        await until(lambda: connection.away)
        await pair.come_back()
        assert await within(pair.client.call("nothing")) is None
        assert not pair.server.endings and not pair.client.endings


# Anything, cut anywhere


@given(seed=st.integers(0, 2**32))
@hypothesis_settings(max_examples=40, deadline=None)
def test_nothing_is_lost_twice_or_out_of_order_wherever_links_are_cut(seed: int) -> None:
    run(lambda: _many_cuts(random.Random(seed)))


async def _many_cuts(dice: random.Random) -> None:
    small = settings(
        outbox_bytes=dice.choice([20_000, 2**23, 2**23, 2**23]), compress=dice.random() < 0.3
    )
    async with resumable(client=small, server=small) as pair:
        got: dict[str, list[int]] = {"client": [], "server": []}
        ran: list[int] = []

        @pair.server.on("note")
        async def to_server(connection: Any, message: Any) -> None:
            got["server"].append(message[0])

        @pair.client.on("note")
        async def to_client(message: Any) -> None:
            got["client"].append(message[0])

        @pair.server.rpc
        async def echo(n: int, fill: bytes) -> int:
            ran.append(n)
            await asyncio.sleep(0)
            return n

        async def send(side: Any) -> None:
            for number in range(60):
                await side.connection.send("note", [number, bytes(dice.choice([0, 10, 700]))])
                for _ in range(dice.randrange(3)):
                    await asyncio.sleep(0)

        async def call(n: int) -> Any:
            return await pair.client.call("echo", [n, bytes(dice.choice([0, 10, 700]))])

        work = [
            asyncio.ensure_future(send(pair.client)),
            asyncio.ensure_future(send(pair.server)),
            *(asyncio.ensure_future(call(n)) for n in range(40)),
        ]
        for _ in range(dice.randrange(1, 8)):
            for link in (pair.client.link, pair.server.link):
                link.split = dice.choice([0, 17, 200, 1000])
            await turns(dice.randrange(60))
            if dice.random() < 0.5:
                pair.client.link.stall()
                pair.client.link.reset()  # the server may notice later, or not at all
            else:
                await cut(pair)
            for _ in range(dice.randrange(2)):  # a login that is cut off as well
                pair.start_again()
                await turns(dice.randrange(12))
                if not pair.client.connection.away:
                    pair.client.link.stall()
                pair.client.link.reset()
            await pair.come_back()
        results = await within(asyncio.gather(*work), 20)
        assert results[2:] == list(range(40))
        assert sorted(ran) == list(range(40))
        await until(lambda: all(len(numbers) == 60 for numbers in got.values()))
        assert got == {"client": list(range(60)), "server": list(range(60))}
        assert not pair.client.endings and not pair.server.endings
