"""Connections as a whole: writes, acknowledgements, heartbeats, and every way to end."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import weakref
from typing import Any

import pytest
from pydantic import ValidationError

from conduit.descriptors import ServerDescriptor
from conduit.exceptions import ConnectionClosed, ConnectionLost, Overloaded
from conduit.protocol.cndt import PINGS
from conduit.protocol.frames import HEADER, SEQUENCED, CloseCode, FrameType, word
from conduit.transport.connection import Connection
from conduit.transport.pulse import Pulse
from tests.transport.pair import Pair, Side, SocketPair, settings, turns, until, within

PING = HEADER.pack(word(FrameType.HEARTBEAT_PING), 0, 1, 0, 0)

BOTH = pytest.mark.parametrize("pair_of", [Pair, SocketPair])


async def closed(side: Side) -> ConnectionClosed:
    """Wait for the end of a connection and return why it is over."""
    await within(side.connection.wait_closed())
    reason = side.connection.reason
    assert reason is not None and side.connection.closed
    return reason


# Who it is


async def test_both_sides_know_each_other_after_the_login() -> None:
    async with Pair(
        client=settings(heartbeat=(1.0, 2.0)), server=settings(heartbeat=(5.0, 9.0))
    ) as pair:
        client, server = pair.client.connection, pair.server.connection
        assert client.id == server.id == (b"s" * 16).hex()
        assert (client.name, client.version) == ("server", "2")
        assert (server.name, server.version) == ("client", "1")
        assert client.identity == server.identity == "anonymous"
        assert client.state == {} and client.state is not server.state
        assert not client.closed and client.reason is None
        assert repr(server).endswith("'client' at server open>") and server.id[:8] in repr(server)
    assert repr(server).endswith("closed>")
    assert repr(Pair().server.connection) == "<Connection new '' at server logging in>"


async def test_a_connection_that_is_over_is_not_kept() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> int:
            return 1

        await within(pair.client.call("quick"))
        references = [weakref.ref(side.connection) for side in (pair.client, pair.server)]
    loop = asyncio.get_running_loop()
    acknowledged = loop.create_future()
    loop.call_later(0.25, acknowledged.set_result, None)  # a timer of 0.2 s may still know them
    await acknowledged
    del pair, quick
    gc.collect()
    assert [reference() for reference in references] == [None, None]


# Writes and acknowledgements


def _has(things: list[Any], count: int) -> bool:
    return len(things) == count


async def test_what_is_sent_in_one_turn_is_one_write() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick(number: int) -> int:
            return number

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None: ...

        sends = [pair.client.connection.send("news", n) for n in range(10)]
        calls = [pair.client.call("quick", [n]) for n in range(10)]
        await within(asyncio.gather(*sends, *calls))
        assert len(pair.client.link.writes) == 1


async def test_callers_whose_answers_came_together_write_together_again() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick(number: int) -> int:
            return number

        async def caller() -> None:
            for number in range(5):
                assert await pair.client.call("quick", [number]) == number

        await within(asyncio.gather(*(caller() for _ in range(8))))
        for side, type in ((pair.client, b"\x02"), (pair.server, b"\x03")):
            frames = [write.count(b"CNDT\x01" + type) for write in side.link.writes]
            assert [count for count in frames if count] == [8] * 5  # others acknowledge


async def test_an_answer_leaves_with_the_batch_that_brings_an_answer_as_well() -> None:
    async with Pair() as pair:
        for side in (pair.client, pair.server):
            side.link.drops.add(FrameType.ACK)  # would take along what has been forgotten

            @side.rpc
            async def quick() -> int:
                return 1

        # Each side gets the other's answer and its call in one batch, and has no more to send.
        pair.client.link.stall()
        pair.server.link.stall()
        first = pair.client.start("quick")
        await turns()
        pair.client.link.flow()
        await turns()
        second = pair.server.start("quick")
        await turns()
        pair.server.link.flow()
        await turns()
        assert first.done() and second.done()


async def test_everything_is_acknowledged_within_200_ms() -> None:
    async with Pair() as pair:

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None: ...

        for number in range(3):
            await pair.client.connection.send("news", number)
            await turns()
        assert pair.server.link.sent(FrameType.ACK) == []
        loop = asyncio.get_running_loop()
        started = loop.time()
        await until(lambda: pair.server.link.sent(FrameType.ACK))
        assert loop.time() - started < 0.4
        (ack,) = pair.server.link.sent(FrameType.ACK)
        assert ack.id == 3
        await turns()
        assert pair.client.connection.protocol.session.outbox_bytes == 0


async def test_after_64_frames_it_is_acknowledged_at_once() -> None:
    async with Pair() as pair:

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None: ...

        for number in range(70):
            await within(pair.client.connection.send("news", number))
            await turns(5)
        assert [ack.id for ack in pair.server.link.sent(FrameType.ACK)] == [64]


@BOTH
async def test_a_large_message_is_acknowledged_within_200_ms_as_well(pair_of: type[Pair]) -> None:
    """What does not come in one piece is read into a buffer of its own, by another way."""
    async with pair_of(client=settings(outbox_bytes=100_000)) as pair:
        handled: list[int] = []

        @pair.server.on("news")
        async def news(connection: Connection, message: bytes) -> None:
            handled.append(len(message))

        if pair_of is Pair:
            pair.client.link.split = 100_000
        for number in range(1, 4):  # each fills the outbox until it is acknowledged
            await within(pair.client.connection.send("news", bytes(250_000)), 1)
            await until(functools.partial(_has, handled, number))
        assert handled == [250_000] * 3


async def test_a_ping_is_answered_behind_an_acknowledgement() -> None:
    async with Pair() as pair:

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None: ...

        await pair.client.connection.send("news")
        await turns()
        seconds = await within(pair.client.connection.ping())
        assert 0 <= seconds < 1
        types = [frame.type for frame in pair.server.link.frames]
        assert types == [FrameType.ACK, FrameType.HEARTBEAT_PONG]


@pytest.mark.parametrize("size", [1, 31, 32, 100])
async def test_whatever_is_cut_into_pieces_arrives(size: int) -> None:
    async with Pair() as pair:
        pair.client.link.split = pair.server.link.split = size
        heard: list[Any] = []

        @pair.server.rpc
        async def length(body: bytes) -> int:
            return len(body)

        @pair.client.on("news")
        async def news(message: Any) -> None:
            heard.append(message)

        assert await within(pair.client.call("length", [bytes(500)])) == 500
        await within(pair.server.connection.send("news", "x" * 100))
        await within(pair.client.connection.ping())
        await until(lambda: heard == ["x" * 100])


@pytest.mark.parametrize("split", [0, 100_000, 1000])
async def test_large_values_arrive_in_pieces_and_in_one(split: int) -> None:
    async with Pair() as pair:
        pair.client.link.split = pair.server.link.split = split

        @pair.server.rpc
        async def echo(body: bytes) -> bytes:
            return body

        bodies = [
            bytes([number]) * size for number, size in enumerate((200_000, 10, 500_000, 131_072))
        ]
        calls = [pair.client.call("echo", [body]) for body in bodies * 2]
        assert await within(asyncio.gather(*calls)) == bodies * 2


@BOTH
async def test_large_values_of_every_kind_arrive_over_and_over(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:

        @pair.server.rpc
        async def echo(value: Any) -> Any:
            return value

        values = [b"\x01" * 300_000, "text" * 60_000, list(range(60_000)), {"a": b"\x02" * 400_000}]
        for value in values * 3:
            assert await within(pair.client.call("echo", {"value": value})) == value
        answers = await within(
            asyncio.gather(*(pair.client.call("echo", [value]) for value in values * 5))
        )
        assert answers == values * 5


# Bounds


@pytest.mark.parametrize(
    "make",
    [lambda size: {"body": bytes(size)}, lambda size: [bytes(size)], lambda size: ["x" * size]],
    ids=["bytes by name", "bytes by position", "text"],
)
async def test_no_more_is_sent_than_the_outbox_holds(make: Any) -> None:
    limit, size = 300_000, 100_000
    async with Pair(client=settings(outbox_bytes=limit)) as pair:
        pair.server.link.drops.add(FrameType.ACK)

        @pair.server.rpc
        async def length(body: Any) -> int:
            return len(body)

        calls = [pair.client.start("length", make(size)) for _ in range(30)]
        await turns(200)
        written = sum(map(len, pair.client.link.writes))
        try:
            assert limit <= written < limit + 2 * size, "full, and at most one frame over"
        finally:
            pair.server.link.drops.clear()
            while not all(call.done() for call in calls):
                pair.server.connection.protocol.acknowledge()
                pair.server.connection.flush()
                await turns()
        assert await asyncio.gather(*calls) == [size] * 30


async def test_one_frame_may_be_larger_than_the_outbox() -> None:
    async with Pair(client=settings(outbox_bytes=1000)) as pair:

        @pair.server.rpc
        async def length(body: bytes) -> int:
            return len(body)

        for _ in range(3):
            assert await within(pair.client.call("length", [bytes(300_000)]), 1) == 300_000


@BOTH
async def test_a_peer_that_does_not_read_makes_senders_wait(pair_of: type[Pair]) -> None:
    wide = settings(window=(10_000, 64 * 1024 * 1024))
    async with pair_of(client=settings(), server=wide) as pair:
        gate = asyncio.Event()
        received: list[int] = []

        @pair.server.on("news")
        async def news(connection: Connection, message: bytes) -> None:
            received.append(len(message))

        if pair_of is Pair:
            pair.client.link.stall()
        else:
            pair.server.transport.pause_reading()
        sends = [
            asyncio.ensure_future(pair.client.connection.send("news", bytes(50_000)))
            for _ in range(200)
        ]
        gate.set()
        await turns()
        sent = sum(send.done() for send in sends)
        assert 0 < sent < 200, "a buffer is full before 10 MB"
        if pair_of is Pair:
            pair.client.link.flow()
        else:
            pair.server.transport.resume_reading()
        await within(asyncio.gather(*sends))
        await until(lambda: len(received) == 200)


# Heartbeat: the clock is what the tests say


def beat(side: Side, *seconds: float, judge: bool = True) -> None:
    """Let a connection look after itself, so many seconds after the login."""
    for second in seconds:
        side.connection.beat(asyncio.get_running_loop().time() + second, judge=judge)


def receive(side: Side, data: bytes) -> None:
    """Let bytes come as a socket brings them, also where they are part of a large frame."""
    buffer = side.connection.protocol.buffer()
    if buffer is None:
        side.connection.inlet.receive(data)
    else:
        buffer[: len(data)] = data
        side.connection.inlet.buffer_filled(len(data))


async def test_a_ping_goes_out_after_silence_and_only_then() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        pings = FrameType.HEARTBEAT_PING
        beat(pair.client, 0)  # the login was a sign of life
        beat(pair.client, 2.5, 5.0)
        assert pair.client.link.sent(pings) == []
        pair.server.link.stall()
        beat(pair.client, 7.6)
        assert len(pair.client.link.sent(pings)) == 1
        beat(pair.client, 8.0)
        assert len(pair.client.link.sent(pings)) == 1, "not again so soon"
        beat(pair.client, 12.6)
        assert len(pair.client.link.sent(pings)) == 2
        pair.server.link.flow()
        await turns()  # the answer is a sign of life
        beat(pair.client, 13.0, 18.0)
        assert len(pair.client.link.sent(pings)) == 2
        beat(pair.client, 20.6)
        assert len(pair.client.link.sent(pings)) == 3


async def test_a_silent_peer_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        pair.server.link.stall()
        call = pair.client.start("nobody")
        await turns()
        beat(pair.client, 0, 10, 20, 29.9)
        assert not pair.client.connection.closed
        beat(pair.client, 30.1)
        reason = await closed(pair.client)
        assert reason.code == CloseCode.HEARTBEAT_TIMEOUT
        assert "no sign of life" in str(reason) and "30 s (heartbeat_timeout)" in str(reason)
        assert "no sign of life" in caplog.text
        with pytest.raises(ConnectionLost, match="no sign of life"):
            await within(call)
        pair.server.link.flow()
        await closed(pair.server)


async def test_any_byte_is_a_sign_of_life() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        beat(pair.client, 0)
        pair.client.connection.inlet.receive(
            b"CNDT"
        )  # the beginning of a frame that takes its time
        beat(pair.client, 29, 58)
        assert not pair.client.connection.closed
        beat(pair.client, 60)
        assert pair.client.connection.closed


async def test_bytes_that_the_peer_takes_are_a_sign_of_life() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        pair.server.link.stall()  # it never answers
        pair.client.link.split = 1000
        pair.client.link.stall()
        for _ in range(5):
            call = pair.client.start("nobody", [bytes(10_000)])
            call.cancel()
            await turns(1)
        pair.client.write(FrameType.RPC_REQUEST, 101, ["nobody", [bytes(50_000)]])
        beat(pair.client, 0, 0)
        for second in (25, 50, 75, 100):
            pair.client.link.flow()
            await turns(2)
            pair.client.link.stall()  # it reads a little
            beat(pair.client, second)
            assert not pair.client.connection.closed
        beat(pair.client, 125)
        assert not pair.client.connection.closed
        beat(pair.client, 130.5)
        assert pair.client.connection.closed
        pair.client.link.flow()
        pair.server.link.flow()


async def test_a_peer_that_lives_and_takes_nothing_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0)), keeps=30) as pair:

        @pair.server.rpc
        async def big() -> bytes:
            return bytes(100_000)

        pair.server.link.stall()
        call = pair.client.start("big")
        await until(lambda: pair.server.link.unsent() > 100_000)
        for second in range(0, 30, 5):
            beat(pair.server, second)
            pair.server.connection.inlet.receive(PING)  # it is there, and does not read
        assert not pair.server.connection.closed
        beat(pair.server, 30.1)
        reason = await closed(pair.server)
        assert reason.code == CloseCode.TOO_SLOW
        assert "taken nothing of what it was sent for 30 s" in str(reason)
        assert "taken nothing" in caplog.text
        assert pair.server.connection.weigh() == 0
        with pytest.raises(ConnectionLost):
            await within(pair.client.connection.abort())
            await within(call)


async def test_a_link_over_which_a_frame_drips_in_is_given_up_and_the_session_goes_on() -> None:
    async with Pair(server=settings(heartbeat=(100.0, 300.0)), keeps=30) as pair:
        sent = HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), 10_000, 101, 0, 1)
        for second in range(31):
            pair.server.connection.inlet.receive(sent if not second else b"x")
            beat(pair.server, second)
        assert pair.server.connection.away and pair.server.connection.weigh() < 100
        assert pair.server.losses[0].code == CloseCode.TOO_LATE

        @pair.server.rpc
        async def add(a: int, b: int) -> int:
            return a + b

        await until(lambda: pair.client.connection.away)
        await pair.come_back()
        assert await within(pair.client.call("add", [1, 2])) == 3


@pytest.mark.parametrize("size, step, ends", [(60, 1, 31), (100_000, 600, 31), (10**6, 2000, 0)])
async def test_a_frame_that_drips_in_ends_the_link(size: int, step: int, ends: int) -> None:
    async with Pair(server=settings(heartbeat=(100.0, 300.0))) as pair:
        second = 0
        sent = HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), size, 1, 0, 1) + bytes(size)
        for at in range(0, 100 * step, step):
            receive(pair.server, sent[at : at + step])
            second = at // step
            beat(pair.server, second)
            if pair.server.connection.closed:
                break
        if ends:
            assert second in (ends - 1, ends, ends + 1)
            reason = await closed(pair.server)
            assert reason.code == CloseCode.TOO_LATE
            assert "a frame took more than 30 s" in str(reason)
        else:
            assert not pair.server.connection.closed


async def test_whoever_receives_a_long_frame_gives_signs_of_life_meanwhile() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        receive(pair.server, HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), 90_000, 1, 0, 1))
        signs: list[int] = []
        for second in range(0, 30, 2):
            receive(pair.server, bytes(5_000))
            beat(pair.server, second)
            signs.append(len(pair.server.link.sent(FrameType.HEARTBEAT_PONG)))
        assert signs == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
        beat(pair.server, 40)
        assert len(pair.server.link.sent(FrameType.HEARTBEAT_PONG)) == 4, "it comes no further"


async def test_on_another_link_a_frame_has_its_time_again() -> None:
    async with Pair(server=settings(heartbeat=(100.0, 300.0)), keeps=30) as pair:
        start = HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), 10_000, 101, 0, 1)
        pair.server.connection.inlet.receive(start)
        beat(pair.server, 0)
        pair.client.link.cut()
        await until(lambda: pair.client.connection.away and pair.server.connection.away)
        await pair.come_back()
        pair.server.connection.inlet.receive(start)
        beat(pair.server, 40)
        pair.server.connection.inlet.receive(b"x")
        beat(pair.server, 69)
        assert not pair.server.connection.away
        pair.server.connection.inlet.receive(b"x")
        beat(pair.server, 71)
        assert pair.server.connection.away


async def test_on_another_link_a_peer_has_its_time_again_to_take_what_it_is_sent() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0)), keeps=30) as pair:

        @pair.server.rpc
        async def big() -> bytes:
            return bytes(100_000)

        pair.server.link.stall()
        call = pair.client.start("big")
        await until(lambda: pair.server.link.unsent() > 100_000)
        beat(pair.server, 0)
        pair.client.link.cut()
        await until(lambda: pair.client.connection.away and pair.server.connection.away)
        await pair.come_back()
        pair.server.link.stall()
        second = pair.client.start("big")
        await until(lambda: pair.server.link.unsent() > 100_000)
        beat(pair.server, 40)
        assert not pair.server.connection.closed
        pair.server.link.flow()
        await within(asyncio.gather(call, second))


async def test_a_frame_that_comes_no_further_is_the_heartbeats_business() -> None:
    async with Pair(server=settings(heartbeat=(100.0, 300.0))) as pair:
        header = HEADER.pack(word(FrameType.RPC_REQUEST, SEQUENCED), 1000, 1, 0, 1)
        pair.server.connection.inlet.receive(header)
        beat(pair.server, 0, 60, 120)
        pair.server.connection.inlet.receive(bytes(10))
        beat(pair.server, 180, judge=False)
        pair.server.connection.inlet.receive(bytes(10))
        beat(pair.server, 200)
        assert not pair.server.connection.closed, "this side had stalled, so the time began anew"
        pair.server.connection.inlet.receive(bytes(10))
        beat(pair.server, 211)
        assert pair.server.connection.closed


async def test_nobody_is_judged_after_a_stall_of_the_loop() -> None:
    async with Pair(server=settings(heartbeat=(10.0, 30.0))) as pair:
        beat(pair.client, 0)
        beat(pair.client, 100, judge=False)
        assert not pair.client.connection.closed
        beat(pair.client, 129)
        assert not pair.client.connection.closed, "the silence begins anew"
        beat(pair.client, 131)
        assert pair.client.connection.closed


async def test_a_heartbeat_before_the_login_and_after_the_end_does_nothing() -> None:
    pair = Pair()
    beat(pair.client, 0, 1000, 2000)
    assert not pair.client.connection.closed
    async with pair:
        await within(pair.client.connection.close())
        writes = list(pair.client.link.writes)
        beat(pair.client, 0, 20, 1000)
        assert pair.client.link.writes == writes


@BOTH
async def test_two_idle_sides_keep_each_other_alive(pair_of: type[Pair]) -> None:
    async with pair_of(server=settings(heartbeat=(0.04, 0.12))) as pair:
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(0.4, later.set_result, None)
        await within(later)
        assert not pair.client.connection.closed and not pair.server.connection.closed
        await within(pair.client.connection.ping())


@pytest.mark.parametrize("interval", [0.01, 0.05, 0.1, 0.15, 0.5])
def test_no_heartbeat_that_a_descriptor_accepts_counts_as_a_flood(interval: float) -> None:
    try:
        ServerDescriptor(heartbeat_interval=interval, heartbeat_timeout=3 * interval)
    except ValidationError:
        return
    pulse, pings, now = Pulse(interval, 3 * interval), 0, 0.0
    while now < 10:
        if pulse.look(now, 0, judge=True) == "ping":
            pings += 1
            pulse.heard = True  # the peer answers each
        now += interval / 4
    assert pings <= max(PINGS, 4 * 10 / interval)  # what a peer of that heartbeat accepts


# Ping


async def test_several_pings_at_once_have_each_its_answer() -> None:
    async with Pair() as pair:
        seconds = await within(asyncio.gather(*(pair.client.connection.ping() for _ in range(20))))
        assert len(seconds) == 20
        ids = [frame.id for frame in pair.client.link.sent(FrameType.HEARTBEAT_PING)]
        assert len(set(ids)) == 20
        pongs = [frame.id for frame in pair.server.link.sent(FrameType.HEARTBEAT_PONG)]
        assert pongs == ids


async def test_more_pings_than_the_peer_accepts_are_not_sent() -> None:
    async with Pair() as pair:
        pings = [pair.client.connection.ping() for _ in range(150)]
        results = await within(asyncio.gather(*pings, return_exceptions=True))
        assert any(isinstance(result, Overloaded) for result in results)
        assert not pair.client.connection.closed and not pair.server.connection.closed


async def test_a_ping_is_not_held_up_by_a_busy_handler() -> None:
    async with Pair() as pair:
        release = asyncio.Event()

        @pair.server.on("slow")
        async def slow(connection: Connection, message: Any) -> None:
            await release.wait()

        await pair.client.connection.send("slow")
        await within(pair.client.connection.ping())
        release.set()


async def test_a_ping_ends_with_the_connection() -> None:
    async with Pair() as pair:
        pair.server.link.stall()
        pings = [asyncio.ensure_future(pair.client.connection.ping()) for _ in range(3)]
        await turns()
        pings[0].cancel()
        await turns()
        pair.client.link.cut()
        for ping in pings[1:]:
            with pytest.raises(ConnectionClosed):
                await within(ping)
        with pytest.raises(ConnectionClosed):
            await within(pair.client.connection.ping())
        assert pings[0].cancelled()


# The end


@BOTH
@pytest.mark.parametrize("who", ["client", "server"])
async def test_to_close_tells_the_other_side_why(pair_of: type[Pair], who: str) -> None:
    async with pair_of() as pair:
        side, other = (pair.client, pair.server) if who == "client" else (pair.server, pair.client)
        await within(side.connection.close(4403, "not you"))
        mine, theirs = await closed(side), await closed(other)
        assert (mine.code, mine.reason, str(mine)) == (4403, "not you", "not you")
        assert (theirs.code, theirs.reason) == (4403, "not you")
        assert str(theirs) == "closed by the peer: not you"
        assert len(side.endings) == len(other.endings) == 1


@BOTH
async def test_the_normal_end_needs_no_words(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        await within(pair.client.connection.close())
        mine, theirs = await closed(pair.client), await closed(pair.server)
        assert mine.code == theirs.code == CloseCode.NORMAL
        assert str(mine) == "closed by this side"
        assert str(theirs).startswith("closed by the peer")


@BOTH
async def test_both_sides_may_close_at_once(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        await within(
            asyncio.gather(
                pair.client.connection.close(4403, "I go"),
                pair.server.connection.close(4403, "no, I go"),
            )
        )
        assert (await closed(pair.client)).reason == "I go"
        assert (await closed(pair.server)).reason == "no, I go"
        assert len(pair.client.endings) == len(pair.server.endings) == 1


@BOTH
async def test_to_close_twice_is_to_close_once(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        closing = [pair.client.connection.close(4403, f"reason {n}") for n in range(3)]
        await within(asyncio.gather(*closing))
        await within(pair.client.connection.close())
        assert (await closed(pair.server)).reason == "reason 0"


@pytest.mark.parametrize("reason", ["x" * 200, "ä" * 100, "\ud800", "€" * 41 + "x"])
async def test_a_reason_is_cut_where_a_character_ends(reason: str) -> None:
    async with Pair() as pair:
        await within(pair.client.connection.close(4403, reason))
        told = (await closed(pair.server)).reason
        assert len(told.encode()) <= 123
        assert told == reason.encode(errors="replace")[:123].decode(errors="ignore")


@BOTH
async def test_what_was_sent_before_the_end_arrives(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        heard: list[int] = []

        @pair.server.on("news", thread=False)
        def news(connection: Connection, message: Any) -> None:
            heard.append(message[0])

        for number in range(20):
            await within(pair.client.connection.send("news", [number, bytes(30_000)]))
        await within(pair.client.connection.close())
        await closed(pair.server)
        assert heard == list(range(20))


async def test_what_comes_after_close_is_thrown_away() -> None:
    async with Pair() as pair:
        served: list[int] = []

        @pair.server.rpc
        async def serve(number: int) -> None:
            served.append(number)

        call = pair.client.start("serve", [1])
        closing = asyncio.ensure_future(pair.server.connection.close())
        with pytest.raises(ConnectionLost):
            await within(call)
        await within(closing)
        assert served == []


async def test_waiting_for_the_end_may_be_given_up() -> None:
    async with Pair() as pair:
        waits = [asyncio.ensure_future(pair.client.connection.wait_closed()) for _ in range(3)]
        await turns()
        waits[0].cancel()
        await turns()
        assert not waits[1].done()
        await within(pair.server.connection.close())
        await within(asyncio.gather(*waits[1:]))
        assert waits[0].cancelled()
        await within(pair.client.connection.wait_closed())


@BOTH
async def test_to_abort_does_not_wait_for_a_peer_that_does_not_read(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        if pair_of is Pair:
            pair.client.link.stall()
        else:
            pair.server.transport.pause_reading()
        sends = [
            asyncio.ensure_future(pair.client.connection.send("news", bytes(50_000)))
            for _ in range(100)
        ]
        await turns()
        await within(pair.client.connection.abort(), 0.5)
        assert pair.client.connection.closed
        results = await within(asyncio.gather(*sends, return_exceptions=True))
        assert any(isinstance(result, ConnectionClosed) for result in results)
        if pair_of is SocketPair:
            pair.server.transport.resume_reading()
        await closed(pair.server)


async def test_to_abort_without_a_link_is_over_at_once() -> None:
    pair = Pair()
    await within(pair.client.connection.abort())
    assert pair.client.connection.closed
    assert isinstance(pair.client.ready.exception(), ConnectionClosed)


async def test_to_close_without_a_link_is_over_at_once() -> None:
    pair = Pair()
    await within(pair.client.connection.close())
    await within(pair.client.connection.wait_closed())
    assert pair.client.connection.closed
    assert isinstance(pair.client.ready.exception(), ConnectionClosed)


async def test_a_link_that_breaks_is_the_reason() -> None:
    async with Pair() as pair:
        pair.client.link.reset(TimeoutError("the cable is out"))
        reason = await closed(pair.client)
        assert reason.code == CloseCode.ABNORMAL
        assert str(reason) == "the link to the peer broke: the cable is out"
        assert isinstance(reason.__cause__, TimeoutError)
        pair.server.link.reset()


async def test_an_end_without_close_is_the_reason() -> None:
    async with Pair() as pair:
        pair.server.link.finish()  # what the system does for a program that was killed
        reason = await closed(pair.client)
        assert (reason.code, str(reason)) == (1006, "the peer went away without closing")
        await closed(pair.server)


@pytest.mark.parametrize("size", [100, 200_000])
async def test_an_end_in_the_middle_of_a_frame_is_the_reason(size: int) -> None:
    async with Pair() as pair:
        pair.server.link.split = 50
        pair.server.write(FrameType.RPC_RESPONSE, 1, ["x" * size])
        await turns(2)
        pair.server.link.reset()
        pair.client.link.lost = True
        pair.client.connection.link_lost(None)
        reason = await closed(pair.client)
        assert (reason.code, str(reason)) == (
            1006,
            "the peer's end came in the middle of a frame",
        )


async def test_a_peer_that_breaks_the_rules_is_told_which() -> None:
    async with Pair() as pair:
        pair.client.write(FrameType.RPC_REQUEST, 2, ["even ids are the server's", []])
        mine, theirs = await closed(pair.server), await closed(pair.client)
        assert mine.code == theirs.code == CloseCode.PROTOCOL_ERROR
        assert "correlation id 2" in mine.reason and mine.reason == theirs.reason


async def test_an_error_of_the_peer_that_cannot_be_read_closes() -> None:
    async with Pair() as pair:
        pair.server.write(FrameType.RPC_ERROR, 1, ["code", "message", {(1,): 2}])
        reason = await closed(pair.client)
        assert reason.code == CloseCode.BAD_PAYLOAD and "keys" in str(reason)


async def test_the_owner_may_end_it_for_a_reason_of_its_own() -> None:
    async with Pair() as pair:
        error = LookupError("found by the owner")
        pair.server.connection.fail(error, CloseCode.GOING_AWAY, "the reason")
        mine, theirs = await closed(pair.server), await closed(pair.client)
        assert (mine.code, mine.reason) == (theirs.code, theirs.reason) == (1001, "the reason")
        assert pair.server.endings == [error]
        pair.server.connection.fail(error, CloseCode.NORMAL, "again")
        assert pair.server.endings == [error]


async def test_nothing_runs_and_nothing_is_scheduled_after_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "asyncio")
    async with Pair() as pair:

        @pair.server.rpc
        async def hold() -> None:
            await asyncio.Event().wait()

        calls = [pair.client.start("hold", timeout=60) for _ in range(5)]
        await until(lambda: pair.server.connection.running == 5)
        await within(pair.client.connection.close())
        await closed(pair.server)
        await asyncio.gather(*calls, return_exceptions=True)
    await turns()
    assert asyncio.all_tasks() == {asyncio.current_task()}
