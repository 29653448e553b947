"""Streams of items between two connections in memory: order, credit, ends, hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import msgpack
import pytest
from pydantic import AfterValidator, BaseModel, ValidationError

from conduit import (
    CallCancelled,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    Response,
    RPCError,
    RPCTimeout,
    Stream,
    Unavailable,
)
from conduit.protocol.frames import SEQUENCED, FrameType, word
from tests.transport.pair import Pair, Side, settings, turns, until, within

ITEM, END, CREDIT = FrameType.STREAM_ITEM, FrameType.STREAM_END, FrameType.STREAM_CREDIT
FINALS = (FrameType.RPC_RESPONSE, FrameType.RPC_ERROR)


class Failed(RPCError):
    """An error of the application."""


class Point(BaseModel):
    x: int
    y: int = 0


class Source:
    """Counts for ever, or to a number, and tells how far it came and whether it was closed."""

    def __init__(self, end: int | None = None, *, waits: bool = False) -> None:
        self.end = end
        self.waits = waits
        self.given = 0
        self.closed = 0

    async def items(self) -> AsyncIterator[int]:
        try:
            while self.given != self.end:
                if self.waits:
                    await asyncio.sleep(0)
                self.given += 1
                yield self.given
        finally:
            self.closed += 1

    def plain(self) -> Iterator[int]:
        try:
            while self.given != self.end:
                self.given += 1
                yield self.given
        finally:
            self.closed += 1


def serve(side: Side) -> Source:
    """Register one handler of each kind, and return the source that `count` gives from."""
    source = Source()

    @side.rpc
    async def count() -> AsyncIterator[int]:
        items = source.items()
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    @side.rpc
    async def up_to(end: int) -> AsyncIterator[int]:
        for number in range(end):
            yield number

    @side.rpc
    async def report(end: int, stream: Stream[str]) -> int:
        for number in range(end):
            await stream.send(f"number {number}")
        return end

    @side.rpc
    async def add_up(numbers: AsyncIterator[int]) -> int:
        total = 0
        async for number in numbers:
            total += number
        return total

    @side.rpc
    async def double(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        async for number in numbers:
            yield 2 * number

    @side.rpc
    async def add(a: int, b: int) -> int:
        return a + b

    return source


def left(pair: Pair) -> list[int]:
    """Return what both sides still keep of calls."""
    connections = [pair.client.connection, pair.server.connection]
    counts = [len(connection.streams) for connection in connections]
    counts += [len(connection._calls._pending) for connection in connections]
    return counts + [connection.running for connection in connections]


async def all_of(run: Any) -> list[Any]:
    return [item async for item in run]


async def collect(run: Any, got: list[Any]) -> None:
    """Add the items to a list, those before an error too."""
    async for item in run:
        got.append(item)  # noqa: PERF401  # a comprehension would lose them


@pytest.fixture(params=["the client calls", "the server calls"])
def caller_is_client(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "the client calls")


def sides(pair: Pair, caller_is_client: bool) -> tuple[Side, Side]:
    """Return who calls and who is called."""
    return (pair.client, pair.server) if caller_is_client else (pair.server, pair.client)


# Each kind of call, in both directions


async def test_a_generator_is_a_streaming_answer(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        serve(called)
        async with caller.stream("up_to", {"end": 1000}, items=int) as run:
            assert await within(all_of(run)) == list(range(1000))
            assert await within(run.result()) is None
        await turns()
        assert left(pair) == [0] * 6
        assert len([f for f in called.link.frames if f.type in FINALS]) == 1


async def test_a_handler_with_a_stream_sends_and_returns(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        serve(called)
        async with caller.stream("report", [3], items=str, returns=int) as run:
            assert await within(all_of(run)) == ["number 0", "number 1", "number 2"]
            assert await within(run.result()) == 3
            assert await within(run.result()) == 3


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_an_argument_can_be_an_iterator(kind: str, caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        serve(called)
        source = Source(1000)
        numbers = source.items() if kind == "async" else source.plain()
        run = caller.stream("add_up", {"numbers": numbers})
        assert await within(run.result()) == 500_500
        assert source.closed == 1
        assert len(caller.link.sent(END)) == 1
        await turns()
        assert left(pair) == [0] * 6


@pytest.mark.parametrize("waits", [False, True])
async def test_both_ways(waits: bool, caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        serve(called)
        numbers = Source(100, waits=waits).items()
        got = await within(all_of(caller.stream("double", {"numbers": numbers}, items=int)))
        assert got == [2 * number for number in range(1, 101)]


async def test_items_and_results_take_the_form_that_is_asked_for() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def points(stream: Stream[Point], start: Point) -> Response[Point]:
            await stream.send(start)
            await stream.send(Point(x=2))
            return Response(Point(x=3), {"age": 5})

        @pair.server.rpc
        async def sums(points: AsyncIterator[Point]) -> AsyncIterator[int]:
            async for point in points:
                yield point.x + point.y

        args = Point(x=1)  # a lone model takes all parameters, whatever is filled in beside it
        run = pair.client.stream("points", args, items=Point, returns=Response)
        assert await within(all_of(run)) == [Point(x=1), Point(x=2)]
        assert await within(run.result()) == Response({"x": 3, "y": 0}, {"age": 5})
        run = pair.client.stream("points", args, returns=Point)
        assert await within(all_of(run)) == [{"x": 1, "y": 0}, {"x": 2, "y": 0}]
        assert await within(run.result()) == Point(x=3)
        given = iter([Point(x=1, y=2), {"x": 5}])
        assert await within(all_of(pair.client.stream("sums", [given]))) == [3, 5]


async def test_position_does_not_count_what_is_filled_in() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def add(c: Connection, a: int, numbers: AsyncIterator[int], b: int) -> int:
            assert c is pair.server.connection
            return a + b + sum([number async for number in numbers])

        assert await within(pair.client.stream("add", [1, iter([10, 20]), 2]).result()) == 33
        with pytest.raises(InvalidParams, match="takes a stream as 'numbers', not as 0"):
            await within(pair.client.stream("add", [iter([10]), 1, 2]).result())


async def test_one_stream_can_be_the_argument_of_another_call() -> None:
    async with Pair() as pair:
        serve(pair.server)
        numbers = pair.client.stream("up_to", {"end": 5})
        doubled = pair.client.stream("double", {"numbers": numbers})
        assert await within(all_of(doubled)) == [0, 2, 4, 6, 8]


async def test_a_method_without_streams_has_a_result_and_no_items() -> None:
    async with Pair() as pair:
        serve(pair.server)

        @pair.server.rpc
        def in_a_thread() -> str:
            return "done"

        async with pair.client.stream("add", {"a": 1, "b": 2}, returns=int) as run:
            assert await within(all_of(run)) == []
            assert await within(run.result()) == 3
        assert await within(pair.client.stream("in_a_thread").result()) == "done"


# What is refused


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("up_to", {"end": 1}, r"'up_to' is a method with streams: call it by rpc.stream\('up_to'"),
        ("report", {"end": 1}, "'report' is a method with streams"),
        ("add_up", {}, "'add_up' is a method with streams"),
    ],
)
async def test_a_plain_call_of_a_method_with_streams(method: str, args: Any, text: str) -> None:
    async with Pair() as pair:
        serve(pair.server)
        with pytest.raises(InvalidParams, match=text):
            await within(pair.client.call(method, args))


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("add_up", {}, "'add_up' takes a stream as 'numbers': pass an async iterable, or"),
        ("add_up", {"numbers": [1]}, "'add_up' takes a stream as 'numbers': pass an async"),
        ("add_up", {"number": iter([1])}, "takes a stream as 'numbers', not as 'number'"),
        ("up_to", {"end": iter([1])}, "'up_to' takes no stream, and one came as 'end'"),
        ("add", {"a": 1, "b": iter([1])}, "'add' takes no stream, and one came as 'b'"),
        ("up_to", {"end": "x"}, "end: Input should be a valid integer"),
        ("up_to", {}, "end"),
    ],
)
async def test_arguments_that_do_not_fit(method: str, args: Any, text: str) -> None:
    async with Pair() as pair:
        serve(pair.server)
        with pytest.raises(InvalidParams, match=text):
            await within(all_of(pair.client.stream(method, args)))
        await turns()
        assert left(pair) == [0] * 6


async def test_what_the_caller_cannot_send() -> None:
    async with Pair(server=settings(frame_max=1000)) as pair:
        serve(pair.server)
        with pytest.raises(TypeError, match="one argument of a call may be an iterator"):
            await pair.client.stream("add", {"a": iter([1]), "b": iter([2])}).result()
        with pytest.raises(TypeError, match="one argument of a call may be an iterator"):
            await pair.client.stream("add", [iter([1]), iter([2])]).result()
        with pytest.raises(TypeError, match="an iterator can be an argument of rpc.stream"):
            await pair.client.call("add_up", {"numbers": iter([1])})
        with pytest.raises(TypeError, match="args must be"):
            await pair.client.stream("add", 5).result()
        with pytest.raises(PayloadTooLarge, match="the arguments take 1[0-9]{3} bytes"):
            await pair.client.stream("add", {"a": "x" * 1000}).result()
        with pytest.raises(ValueError, match="a method name is text"):
            await pair.client.stream("").result()
        with pytest.raises(MethodNotFound):
            await within(pair.client.stream("nothing").result())
        assert pair.client.link.sent(FrameType.RPC_REQUEST)[0].body[0] == "nothing"


async def test_a_call_is_made_once() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        serve(pair.server)
        async with pair.client.stream("count"):
            run = pair.client.stream("up_to", {"end": 5})
            waiting = asyncio.ensure_future(run.result())  # for the only slot
            await turns()
            with pytest.raises(RuntimeError, match="the call is being made"):
                await all_of(run)
        assert await within(waiting) is None
        pair.client.connection.fail(ValueError("gone"), 1000, "")
        run = pair.client.stream("up_to", {"end": 5})
        with pytest.raises(ConnectionClosed):
            await run.result()
        with pytest.raises(RuntimeError, match="could not be made"):
            await run.result()


async def test_slots_are_shared_with_other_calls() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        serve(pair.server)
        async with pair.client.stream("count"):
            with pytest.raises(RPCTimeout, match="waited 0.01 s for one of 1 call slots"):
                await within(pair.client.call("add", [1, 2], timeout=0.01))
            with pytest.raises(RPCTimeout, match="'up_to' waited 0.01 s for one of 1 call slots"):
                await within(pair.client.stream("up_to", [1], timeout=0.01).result())
            waiting = pair.client.start("add", [1, 2])
            await turns()
            assert not waiting.done()
        assert await within(waiting) == 3


async def test_everybody_in_line_gets_a_slot() -> None:
    async with Pair(server=settings(calls=2)) as pair:
        serve(pair.server)
        async with pair.client.stream("count"), pair.client.stream("count"):
            waiting = [
                asyncio.ensure_future(pair.client.stream("up_to", [1]).result()) for _ in range(5)
            ]
            await turns()
            assert not any(task.done() for task in waiting)
        await within(asyncio.gather(*waiting))


async def test_a_validator_that_changes_its_mind_is_believed_at_first() -> None:
    async with Pair() as pair:
        serve(pair.server)
        refused: list[int] = []

        def once(value: int) -> int:
            if value == 3 and not refused:
                refused.append(value)
                raise ValueError("not today")
            return value

        run = pair.client.stream("up_to", [5], items=Annotated[int, AfterValidator(once)])
        got: list[Any] = []
        with pytest.raises(ValidationError, match="not today"):
            await within(collect(run, got))
        assert got == [0, 1, 2, 3, 4]


async def test_the_result_can_be_had_behind_an_item_that_does_not_fit() -> None:
    async with Pair(client=settings(stream=(10, 1 << 20))) as pair:

        @pair.server.rpc
        async def mixed(stream: Stream[int | str]) -> str:
            for number in range(500):
                await stream.send("three" if number == 3 else number)
            return "done"

        got: list[Any] = []
        async with pair.client.stream("mixed", items=int) as run:
            with pytest.raises(ValidationError, match="three"):
                await within(collect(run, got))
            with pytest.raises(ValidationError, match="three"):
                await within(collect(run, got))
            assert await within(run.result()) == "done"
        assert got == [0, 1, 2]
        await turns()
        assert left(pair) == [0] * 6


async def test_an_error_of_a_handler_whose_connection_is_gone_is_not_waited_with() -> None:
    async with Pair(client=settings(stream=(2, 100))) as pair:
        ended = asyncio.Event()

        @pair.server.rpc
        async def failing(stream: Stream[int]) -> None:
            try:
                while True:
                    await stream.send(1)
            except asyncio.CancelledError:
                ended.set()
                raise KeyError("on its way out") from None

        async with pair.client.stream("failing") as run:
            await turns()
            pair.client.link.cut()
            with pytest.raises(ConnectionLost):
                await within(run.result())
        await within(ended.wait())
        assert left(pair) == [0] * 6


async def test_without_backpressure_there_is_no_line() -> None:
    async with Pair(client=settings(backpressure=False), server=settings(calls=1)) as pair:
        serve(pair.server)
        async with pair.client.stream("count"):
            with pytest.raises(Overloaded):
                await pair.client.stream("count").result()


# Frames


def counts(side: Side) -> list[int]:
    return [len(frame.body) for frame in side.link.sent(ITEM)]


async def test_items_that_are_ready_together_leave_together() -> None:
    async with Pair() as pair:
        serve(pair.server)
        assert len(await within(all_of(pair.client.stream("up_to", [10])))) == 10
        assert counts(pair.server) == [10]
        pair.server.link.writes.clear()
        await within(all_of(pair.client.stream("up_to", [5000])))
        assert sum(counts(pair.server)) == 5000
        assert set(counts(pair.server)[:-1]) == {512}


async def test_an_item_does_not_wait_for_the_next() -> None:
    async with Pair() as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def slow() -> AsyncIterator[int]:
            yield 1
            yield 2
            await go_on.wait()
            yield 3

        @pair.server.rpc
        async def sending(stream: Stream[int]) -> None:
            await stream.send(1)
            await stream.send(2)
            await go_on.wait()
            await stream.send(3)

        for method in ("slow", "sending"):
            go_on.clear()
            got: list[Any] = []
            async for item in pair.client.stream(method):
                got.append(item)
                if item == 2:
                    assert counts(pair.server)[-1] == 2
                    go_on.set()
            assert got == [1, 2, 3]


async def test_large_items_go_one_by_one_and_small_ones_in_frames_of_bounded_size() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def chunks(size: int, number: int) -> AsyncIterator[bytes]:
            for index in range(number):
                yield bytes([index % 256]) * size

        for size, number in ((100_000, 8), (30_000, 20), (3000, 100), (10, 3000)):
            pair.server.link.writes.clear()
            got = await within(all_of(pair.client.stream("chunks", [size, number])))
            assert got == [bytes([index % 256]) * size for index in range(number)]
            sizes = [len(frame.payload) for frame in pair.server.link.sent(ITEM)]
            assert max(sizes) <= max(64 * 1024, size + 6)
        assert [*map(len, got)] == [10] * 3000


async def test_sizes_may_change_in_the_middle() -> None:
    async with Pair() as pair:
        sizes = [1] * 2000 + [50_000] * 10 + [1] * 50 + [70_000] * 2

        @pair.server.rpc
        async def chunks() -> AsyncIterator[str]:
            for size in sizes:
                yield "x" * size

        got = await within(all_of(pair.client.stream("chunks")))
        assert [*map(len, got)] == sizes
        assert max(len(f.payload) for f in pair.server.link.sent(ITEM)) < 71_000


async def test_compressed_items() -> None:
    async with Pair(server=settings(compress=True)) as pair:

        @pair.server.rpc
        async def words() -> AsyncIterator[str]:
            for _ in range(1000):
                yield "the same word again"

        got = await within(all_of(pair.client.stream("words")))
        assert got == ["the same word again"] * 1000
        assert pair.server.link.sent(ITEM)[-1].flags & 1


# Credit


async def test_a_consumer_that_stops_stops_its_producer_and_nothing_else() -> None:
    async with Pair(client=settings(stream=(20, 1 << 20))) as pair:
        source = serve(pair.server)
        async with pair.client.stream("count") as run:
            items = run.__aiter__()
            assert await within(items.__anext__()) == 1
            await turns(100)
            given = source.given
            assert sum(counts(pair.server)) == 20
            await turns(100)
            assert source.given == given == 21
            assert await within(pair.client.call("add", [1, 2])) == 3
            assert len(await within(all_of(pair.client.stream("up_to", [100])))) == 100
            for number in range(2, 200):
                assert await within(items.__anext__()) == number
        await until(lambda: left(pair) == [0] * 6)
        assert source.closed == 1


async def test_credit_counts_bytes_too() -> None:
    async with Pair(client=settings(stream=(1000, 1000))) as pair:

        @pair.server.rpc
        async def texts() -> AsyncIterator[str]:
            for _ in range(50):
                yield "x" * 400

        async with pair.client.stream("texts") as run:
            await turns(100)
            # One frame may go below zero.
            sizes = [len(frame.payload) for frame in pair.server.link.sent(ITEM)]
            assert sum(sizes[:-1]) < 1000 <= sum(sizes)
            assert [*map(len, await within(all_of(run)))] == [400] * 50
        assert all(frame.body[1] for frame in pair.client.link.sent(CREDIT))


async def test_one_item_may_be_larger_than_the_window() -> None:
    async with Pair(client=settings(stream=(1, 10))) as pair:

        @pair.server.rpc
        async def texts() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"x" * 100_000

        assert [*map(len, await within(all_of(pair.client.stream("texts"))))] == [100_000] * 5


async def test_credit_for_the_callers_items() -> None:
    async with Pair(server=settings(stream=(10, 1 << 20))) as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def late(numbers: AsyncIterator[int]) -> int:
            await go_on.wait()
            return len([number async for number in numbers])

        source = Source(100)
        async with pair.client.stream("late", {"numbers": source.items()}) as run:
            await turns(100)
            assert source.given == 11
            assert sum(counts(pair.client)) == 10
            go_on.set()
            assert await within(run.result()) == 100


async def test_a_million_items_need_no_memory() -> None:
    """In short; the long form is in tests/acceptance/."""
    async with Pair(client=settings(stream=(64, 1 << 20))) as pair:
        source = serve(pair.server)
        taken = 0
        async with pair.client.stream("count") as run:
            async for item in run:
                taken += 1
                assert item == taken
                assert source.given - taken <= 64 + 1
                if taken % 100 == 0:
                    await asyncio.sleep(0)
                if taken == 20_000:
                    break


@pytest.mark.parametrize("size", [10_000, 100_000])
async def test_a_link_that_is_full_makes_producers_wait_in_turn(size: int) -> None:
    window = (1 << 16, 1 << 26)
    async with Pair(client=settings(stream=window), server=settings(outbox_bytes=1 << 26)) as pair:
        given = [0, 0, 0]

        @pair.server.rpc
        async def chunks(number: int) -> AsyncIterator[bytes]:
            while True:
                given[number] += 1
                yield bytes(size)

        pair.server.link.stall()
        async with contextlib.AsyncExitStack() as stack:
            runs = []
            for number in range(3):
                run = await stack.enter_async_context(pair.client.stream("chunks", [number]))
                runs.append(run)
            await turns(200)
            assert 0 < sum(given) < 100
            before = sum(given)
            await turns(200)
            assert sum(given) == before
            pair.server.link.flow()
            await until(lambda: min(given) > 100)
            assert max(given) < 3 * min(given)
            assert await within(runs[0].__aiter__().__anext__()) == bytes(size)
        await until(lambda: left(pair) == [0] * 6)


async def test_a_source_that_never_waits_lets_others_run() -> None:
    async with Pair() as pair:
        source = serve(pair.server)
        ran = 0

        async def others() -> None:
            nonlocal ran
            while True:
                await asyncio.sleep(0)
                ran += 1

        task = asyncio.ensure_future(others())
        async for item in pair.client.stream("up_to", [20_000]):
            del item
        assert ran >= 20_000 // 512
        before, ran = ran, 0
        plain = Source(20_000)
        await within(pair.client.stream("add_up", {"numbers": plain.plain()}).result())
        assert ran >= 20_000 // 512
        assert before and not source.given
        task.cancel()
        await asyncio.wait([task])


# Leaving early, cancelling, deadlines


async def test_leaving_early_cancels_the_handler(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        source = serve(called)
        async with caller.stream("count") as run:
            async for item in run:
                if item == 10:
                    break
        await turns()
        assert source.closed == 1
        assert [frame.body for frame in caller.link.sent(FrameType.CANCEL)] == [
            ["the caller has left"]
        ]
        assert [frame.type for frame in called.link.frames if frame.type in FINALS] == [
            FrameType.RPC_ERROR
        ]
        assert left(pair) == [0] * 6
        with pytest.raises(RuntimeError, match="left before its end"):
            await run.result()
        with pytest.raises(RuntimeError, match="the call that the items belong to is over"):
            await within(all_of(run))


async def test_a_plain_loop_that_is_left_gives_the_call_up() -> None:
    async with Pair() as pair:
        source = serve(pair.server)
        async for item in pair.client.stream("count"):
            if item == 10:
                break
        gc.collect()
        await until(lambda: left(pair) == [0] * 6)
        assert source.closed == 1


async def test_a_call_that_nobody_holds_is_given_up() -> None:
    async with Pair() as pair:
        source = serve(pair.server)
        run = pair.client.stream("count")
        assert await within(run.__aiter__().__anext__()) == 1
        del run
        gc.collect()
        await until(lambda: left(pair) == [0] * 6)
        assert source.closed == 1
        del source
        never_made = pair.client.stream("count")
        del never_made


@pytest.mark.parametrize("how", ["in the block", "in a plain loop", "for the result"])
async def test_a_caller_that_is_cancelled(how: str) -> None:
    async with Pair() as pair:
        closed = asyncio.Event()

        @pair.server.rpc
        async def silent() -> AsyncIterator[int]:
            try:
                await asyncio.Event().wait()
                yield 1
            finally:
                closed.set()

        async def call() -> None:
            run = pair.client.stream("silent")
            if how == "in the block":
                async with run:
                    await all_of(run)
            elif how == "in a plain loop":
                await all_of(run)
            else:
                await run.result()

        task = asyncio.ensure_future(call())
        await until(lambda: pair.server.connection.running)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await within(closed.wait())
        await until(lambda: left(pair) == [0] * 6)


async def test_cancelling_the_wait_for_a_result_leaves_the_block_alone() -> None:
    async with Pair() as pair:
        serve(pair.server)
        go_on = asyncio.Event()

        @pair.server.rpc
        async def patient(stream: Stream[int]) -> int:
            await go_on.wait()
            return 5

        async with pair.client.stream("patient") as run:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(run.result(), 0.01)
            go_on.set()
            assert await within(run.result()) == 5


async def test_a_deadline(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        source = serve(called)
        async with caller.stream("count", timeout=0.02) as run:
            with pytest.raises(RPCTimeout):
                async for _ in run:
                    await asyncio.sleep(0)
            with pytest.raises(RPCTimeout):
                await run.result()
        await until(lambda: left(pair) == [0] * 6)
        assert source.closed == 1


async def test_behind_a_deadline_nothing_is_handed_out() -> None:
    async with Pair() as pair:
        serve(pair.server)
        async with pair.client.stream("count", timeout=0.02) as run:
            items = run.__aiter__()
            assert await within(items.__anext__()) == 1
            with pytest.raises(RPCTimeout):
                await within(run.result())
            with pytest.raises(RPCTimeout):
                await within(items.__anext__())


async def test_nor_is_it_when_the_loop_was_held_until_behind_the_deadline() -> None:
    async with Pair() as pair:
        serve(pair.server)
        async with pair.client.stream("count", timeout=0.02) as run:
            items = run.__aiter__()
            assert await within(items.__anext__()) == 1
            time.sleep(0.03)
            await asyncio.sleep(0)  # in this turn the deadline is noticed
            with pytest.raises(RPCTimeout):
                await within(run.result())
            with pytest.raises(RPCTimeout):
                await within(items.__anext__())


async def test_a_stream_has_no_default_deadline() -> None:
    async with Pair(client=settings(timeout=0.01), server=settings(timeout=0.01)) as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def patient() -> AsyncIterator[int]:
            yield 1
            await go_on.wait()
            yield 2

        @pair.server.rpc
        async def unary() -> None:
            await go_on.wait()

        run = pair.client.stream("patient")
        items = run.__aiter__()
        assert await within(items.__anext__()) == 1
        with pytest.raises(RPCTimeout):  # the deadline that plain calls have passes
            await within(pair.client.call("unary"))
        go_on.set()
        assert await within(items.__anext__()) == 2
        sent = pair.client.link.sent(FrameType.RPC_REQUEST)
        assert sent[0].body[2] == {"stream": None, "ttl": 0}
        await within(pair.client.stream("patient", timeout=0.01).result())
        sent = pair.client.link.sent(FrameType.RPC_REQUEST)
        assert sent[-1].body[2] == {"stream": None}  # both sides know it from the login


async def test_a_handler_may_have_a_limit_of_its_own() -> None:
    async with Pair() as pair:
        source = Source()

        @pair.server.rpc("count", timeout=0.02)
        async def count() -> AsyncIterator[int]:
            yield 1
            yield 2
            source.given = 2
            await asyncio.Event().wait()

        got: list[Any] = []
        with pytest.raises(RPCTimeout):
            await collect(pair.client.stream("count"), got)
        assert got == [1, 2]


async def test_the_callers_items_are_closed_when_the_call_ends() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def first(numbers: AsyncIterator[int]) -> int:
            async for number in numbers:
                return number
            return 0

        for source in (Source(), Source(waits=True)):
            async with pair.client.stream("first", {"numbers": source.items()}) as run:
                assert await within(run.result()) == 1
            assert source.closed == 1
        source = Source()
        async with pair.client.stream("first", {"numbers": source.plain()}) as run:
            assert await within(run.result()) == 1
        assert source.closed == 1
        await turns()
        assert left(pair) == [0] * 6


async def test_the_callers_items_are_closed_when_the_block_is_left() -> None:
    async with Pair() as pair:
        serve(pair.server)
        for source in (Source(), Source(waits=True)):
            async with pair.client.stream("double", {"numbers": source.items()}) as run:
                async for item in run:
                    if item == 10:
                        break
            assert source.closed == 1


async def test_a_block_that_is_left_at_once_closes_the_callers_items_too() -> None:
    async with Pair() as pair:
        serve(pair.server)
        source = Source()
        items = source.items()
        assert await items.__anext__() == 1
        async with pair.client.stream("double", {"numbers": items}):
            pass
        assert source.closed == 1
        plain = source.plain()
        assert next(plain) == 2
        async with pair.client.stream("double", {"numbers": plain}):
            pass
        assert source.closed == 2


async def test_items_that_fail_behind_the_end_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def first(numbers: AsyncIterator[int]) -> int:
            return await numbers.__anext__()

        async def broken() -> AsyncIterator[int]:
            try:
                yield 1
                await asyncio.Event().wait()
            finally:
                raise KeyError("while it was closed")

        async with pair.client.stream("first", {"numbers": broken()}) as run:
            assert await within(run.result()) == 1
        assert "the items of a call failed behind its end" in caplog.text


@pytest.mark.parametrize("split", [1, 33, 1000])
async def test_frames_may_arrive_in_pieces(split: int) -> None:
    async with Pair() as pair:
        serve(pair.server)
        pair.client.link.split = pair.server.link.split = split
        numbers = iter(range(500))
        got = await within(all_of(pair.client.stream("double", {"numbers": numbers})))
        assert got == [2 * number for number in range(500)]


async def test_items_beside_each_other_at_random(caller_is_client: bool) -> None:
    """Many streams with tiny windows, over a slow link, none of which may lose or swap an item."""
    chance = random.Random(5)
    small = settings(stream=(5, 60))
    async with Pair(client=small, server=small) as pair:
        caller, called = sides(pair, caller_is_client)

        @called.rpc
        async def echo(words: AsyncIterator[str], stream: Stream[str]) -> int:
            count = 0
            async for word in words:
                count += 1
                await stream.send(word)
                if chance.random() < 0.2:
                    await asyncio.sleep(0)
            return count

        async def talk(name: int) -> None:
            said = [f"{name}.{index}" + "x" * chance.randrange(90) for index in range(60)]

            async def words() -> AsyncIterator[str]:
                for word in said:
                    if chance.random() < 0.2:
                        await asyncio.sleep(0)
                    yield word

            got: list[str] = []
            async with caller.stream("echo", {"words": words()}, items=str, returns=int) as run:
                async for word in run:
                    got.append(word)
                    if chance.random() < 0.2:
                        await asyncio.sleep(0)
                assert (got, await run.result()) == (said, 60)

        await within(asyncio.gather(*(talk(name) for name in range(20))), 20)
        await turns()
        assert left(pair) == [0] * 6


# Results without items, items without an end


async def test_result_throws_away_what_nobody_takes() -> None:
    async with Pair(client=settings(stream=(10, 1 << 20))) as pair:
        serve(pair.server)
        assert await within(pair.client.stream("report", [1000]).result()) == 1000
        async with pair.client.stream("report", [1000]) as run:
            async for item in run:
                if item == "number 30":
                    break
            del item
            gc.collect()
            assert await within(run.result()) == 1000
        async with pair.client.stream("report", [1000]) as run:
            await turns()
            assert await within(run.result()) == 1000
            assert await within(all_of(run)) == []


async def test_result_takes_nothing_from_a_loop_beside_it() -> None:
    async with Pair(client=settings(stream=(10, 1 << 20))) as pair:
        serve(pair.server)
        async with pair.client.stream("report", [1000]) as run:
            got, result = await within(asyncio.gather(all_of(run), run.result()))
        assert (len(got), result) == (1000, 1000)


async def test_a_second_loop_goes_on_where_the_first_stopped() -> None:
    async with Pair() as pair:
        serve(pair.server)
        async with pair.client.stream("up_to", [100]) as run:
            async for item in run:
                if item == 41:
                    break
            assert await within(all_of(run)) == list(range(42, 100))
            assert await within(all_of(run)) == []


async def test_one_task_at_a_time_waits_for_items() -> None:
    async with Pair() as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def patient() -> AsyncIterator[int]:
            await go_on.wait()
            yield 1

        async with pair.client.stream("patient") as run:
            first = asyncio.ensure_future(all_of(run))
            await turns()
            with pytest.raises(RuntimeError, match="another task waits for the items"):
                await all_of(run)
            go_on.set()
            assert await within(first) == [1]


# Errors


async def test_a_source_that_waits_for_what_is_cancelled_ends_the_call() -> None:
    async with Pair() as pair:
        serve(pair.server)

        async def numbers() -> AsyncIterator[int]:
            yield 1
            worker = asyncio.ensure_future(asyncio.Event().wait())
            worker.cancel()
            await worker

        with pytest.raises(CallCancelled, match="the iterator among the arguments was cancelled"):
            await within(pair.client.stream("add_up", [numbers()]).result())
        got: list[Any] = []
        async with pair.client.stream("double", [numbers()]) as run:
            with pytest.raises(CallCancelled) as caught:
                await within(collect(run, got))
            assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        await turns()
        assert left(pair) == [0] * 6


@pytest.mark.parametrize("wait", [False, True])
async def test_an_error_arrives_behind_the_items_before_it(wait: bool) -> None:
    async with Pair(client=settings(stream=(10, 1 << 20))) as pair:

        @pair.server.rpc
        async def yields() -> AsyncIterator[int]:
            for number in range(50):
                yield number
            if wait:
                await asyncio.sleep(0)
            raise Failed("that was all", details={"at": 50})

        @pair.server.rpc
        async def sends(stream: Stream[int]) -> None:
            for number in range(50):
                await stream.send(number)
            if wait:
                await asyncio.sleep(0)
            raise Failed("that was all", details={"at": 50})

        for method in ("yields", "sends"):
            got: list[Any] = []
            async with pair.client.stream(method) as run:
                with pytest.raises(Failed, match="that was all") as caught:
                    await collect(run, got)
                assert caught.value.details == {"at": 50}
                with pytest.raises(Failed):
                    await run.result()
            assert got == list(range(50))
        await turns()
        assert left(pair) == [0] * 6


@pytest.mark.parametrize("wait", [False, True])
async def test_what_a_generator_yields_is_checked(
    wait: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pair(client=settings(stream=(4, 1 << 20))) as pair:
        closed = []

        @pair.server.rpc
        async def wrong() -> AsyncIterator[int]:
            try:
                for number in range(10):
                    yield number
                yield "eleven"  # type: ignore[misc]
                if wait:
                    await asyncio.Event().wait()  # found all the same
                yield 12
            finally:
                closed.append(True)

        got: list[Any] = []
        with pytest.raises(InternalError):
            await collect(pair.client.stream("wrong"), got)
        assert got == list(range(10))
        assert closed == [True]
        assert "valid integer" in caplog.text


async def test_what_a_handler_sends_is_checked() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def sending(stream: Stream[int]) -> str:
            await stream.send(1)
            with pytest.raises(ValidationError):
                await stream.send("two")  # type: ignore[arg-type]
            await stream.send("3")  # type: ignore[arg-type]
            return "sent"

        run = pair.client.stream("sending")
        assert await within(all_of(run)) == [1, 3]
        assert await within(run.result()) == "sent"


@pytest.mark.parametrize("wait", [False, True])
async def test_items_that_cannot_be_sent(wait: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def yields():
            for number in range(20):
                yield number
            yield object()
            if wait:
                await asyncio.Event().wait()
            yield 21

        @pair.server.rpc
        async def sends(stream: Stream) -> None:
            for number in range(20):
                await stream.send(number)
            with pytest.raises(TypeError):
                await stream.send(object())
            if wait:
                await asyncio.sleep(0)
            await stream.send(20)
            raise KeyError("for the test below")

        for method in ("yields", "sends"):
            got: list[Any] = []
            with pytest.raises(InternalError):
                await collect(pair.client.stream(method), got)
            assert got == list(range(20 + (method == "sends")))
        assert "cannot send a value of type builtins.object" in caplog.text

        async def bad() -> AsyncIterator[Any]:
            yield 1
            yield object()
            if wait:
                await asyncio.Event().wait()

        serve(pair.server)
        with pytest.raises(TypeError, match="cannot send a value of type builtins.object"):
            await within(pair.client.stream("add_up", {"numbers": bad()}).result())
        await turns()
        assert left(pair) == [0] * 6


async def test_an_item_that_is_too_large() -> None:
    async with Pair(client=settings(frame_max=1000), server=settings(frame_max=1000)) as pair:

        @pair.server.rpc
        async def texts() -> AsyncIterator[str]:
            yield "x" * 900
            yield "y" * 900
            yield "z" * 1000

        got: list[Any] = []
        with pytest.raises(PayloadTooLarge, match="an item takes 1003 bytes and the peer accepts"):
            await collect(pair.client.stream("texts"), got)
        assert got == ["x" * 900, "y" * 900]
        serve(pair.server)
        with pytest.raises(PayloadTooLarge, match="an item takes 100005 bytes"):
            numbers = iter([b"x" * 100_000])
            await within(pair.client.stream("add_up", {"numbers": numbers}).result())


async def test_the_callers_items_are_checked_in_their_turn() -> None:
    async with Pair() as pair:
        taken: list[int] = []

        @pair.server.rpc
        async def take(numbers: AsyncIterator[int]) -> None:
            await collect(numbers, taken)

        numbers = iter([*range(1000), "x", 1001])  # in the second frame
        with pytest.raises(InvalidParams) as caught:
            await within(pair.client.stream("take", {"numbers": numbers}).result())
        assert taken == list(range(1000))
        assert caught.value.errors[0]["path"] == "numbers.1000"
        assert caught.value.errors[0]["type"] == "int_parsing"

        @pair.server.rpc
        async def points(points: AsyncIterator[Point]) -> None:
            async for point in points:
                del point

        with pytest.raises(InvalidParams) as caught:
            given = iter([{"x": 1}, {"x": 1, "y": "?"}])
            await within(pair.client.stream("points", {"points": given}).result())
        assert caught.value.errors[0]["path"] == "points.1.y"


async def test_items_that_are_not_what_the_caller_asks_for() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def mixed():
            yield 1
            yield 2
            yield "three"
            yield 4

        got: list[Any] = []
        async with pair.client.stream("mixed", items=int) as run:
            with pytest.raises(ValidationError):
                await collect(run, got)
        assert got == [1, 2]
        run = pair.client.stream("up_to", [1], returns=int)
        serve(pair.server)
        with pytest.raises(ValidationError):
            await within(run.result())


async def test_an_error_of_the_callers_iterator_is_the_callers() -> None:
    async with Pair() as pair:
        serve(pair.server)
        ended: list[Any] = []

        @pair.server.rpc
        async def take(numbers: AsyncIterator[int]) -> None:
            try:
                await collect(numbers, ended)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        async def broken() -> AsyncIterator[int]:
            yield 1
            yield 2
            raise KeyError("mine")

        def plain() -> Iterator[int]:
            yield 1
            yield 2
            raise KeyError("mine")

        for source in (broken(), plain()):
            ended.clear()
            with pytest.raises(KeyError, match="mine"):
                await within(pair.client.stream("take", {"numbers": source}).result())
            await turns()
            assert ended[-1] == "cancelled"
            assert left(pair) == [0] * 6


@pytest.mark.parametrize("size", [1, 1000, 70_000])
async def test_several_tasks_of_a_handler_may_send(size: int) -> None:
    async with Pair(client=settings(stream=(3, 5000))) as pair:

        @pair.server.rpc
        async def crowd(stream: Stream[list[Any]]) -> None:
            async def send(number: int) -> None:
                for index in range(20):
                    await stream.send([number, index, "x" * size])

            await asyncio.gather(*(send(number) for number in range(10)))

        got = await within(all_of(pair.client.stream("crowd")))
        assert all(len(item[2]) == size for item in got)
        for number in range(10):
            assert [item[1] for item in got if item[0] == number] == list(range(20))


async def test_what_was_sent_may_be_changed_afterwards() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def yields() -> AsyncIterator[dict[str, int]]:
            row = {}
            for number in range(5):
                row["n"] = number
                yield row

        @pair.server.rpc
        async def sends(stream: Stream) -> None:
            row = bytearray(1)
            for number in range(5):
                row[0] = number
                await stream.send(row)

        got = await within(all_of(pair.client.stream("yields")))
        assert got == [{"n": number} for number in range(5)]
        got = await within(all_of(pair.client.stream("sends")))
        assert got == [bytes([number]) for number in range(5)]


async def test_a_stream_ends_with_its_handler() -> None:
    async with Pair() as pair:
        kept: list[Any] = []

        @pair.server.rpc
        async def keep(stream: Stream[int], numbers: AsyncIterator[int]) -> None:
            kept.extend([stream, numbers])

        await within(pair.client.stream("keep", {"numbers": Source().items()}).result())
        with pytest.raises(RuntimeError, match="the call that the items belong to is over"):
            await kept[0].send(1)
        with pytest.raises(RuntimeError, match="the call that the items belong to is over"):
            await all_of(kept[1])


# The end of the connection


async def test_a_lost_link_ends_both_sides(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, called = sides(pair, caller_is_client)
        seen: list[Any] = []

        @called.rpc
        async def both(numbers: AsyncIterator[int], stream: Stream[int]) -> None:
            async def beside() -> None:
                try:
                    await collect(numbers, seen)
                except ConnectionLost as exc:
                    seen.append(exc)

            task = asyncio.ensure_future(beside())
            await stream.send(1)
            await stream.send(2)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await task
                with pytest.raises(ConnectionLost):
                    await stream.send(3)
                seen.append("cancelled")
                raise

        source = Source(3)

        async def numbers() -> AsyncIterator[int]:
            async for item in source.items():
                yield item
            await asyncio.Event().wait()

        got: list[Any] = []
        async with caller.stream("both", {"numbers": numbers()}) as run:
            with pytest.raises(ConnectionLost):
                async for item in run:
                    got.append(item)
                    if item == 2:
                        await until(lambda: len(seen) == 3)
                        caller.link.cut()
            with pytest.raises(ConnectionLost):
                await run.result()
        await until(lambda: seen and seen[-1] == "cancelled")
        assert got == [1, 2]
        assert seen[:3] == [1, 2, 3]
        assert isinstance(seen[3], ConnectionLost)
        assert left(pair) == [0] * 6


async def test_a_producer_that_waits_for_credit_when_the_link_goes() -> None:
    async with Pair(client=settings(stream=(4, 1 << 20))) as pair:
        source = serve(pair.server)
        ended = asyncio.Event()

        @pair.server.rpc
        async def sending(stream: Stream[int]) -> None:
            try:
                while True:
                    await stream.send(1)
            finally:
                ended.set()

        runs = [pair.client.stream("count"), pair.client.stream("sending")]
        for run in runs:
            await run.__aenter__()
        await turns(100)
        pair.client.link.cut()
        await within(ended.wait())
        await until(lambda: source.closed == 1)
        for run in runs:
            with pytest.raises(ConnectionLost):
                await within(run.result())
            await run.__aexit__()
        assert left(pair) == [0] * 6


async def test_a_server_that_stops_ends_streams_with_a_reason() -> None:
    async with Pair() as pair:
        source = serve(pair.server)
        async with pair.client.stream("count") as run:
            items = run.__aiter__()
            assert await within(items.__anext__()) == 1
            stopping = asyncio.ensure_future(pair.server.connection.drain(0.01))
            with pytest.raises(Unavailable, match="the server stops"):
                while True:
                    await within(items.__anext__())
            await within(stopping)
        assert source.closed == 1


# What a peer may do


async def opened(pair: Pair, method: str = "take") -> int:
    """Have the client make a call whose items the test sends itself, and return its id."""

    @pair.server.rpc(method)
    async def take(numbers: AsyncIterator[int]) -> int:
        await go_on.wait()
        return len([number async for number in numbers])

    go_on = pair.client.connection.state["go_on"] = asyncio.Event()
    pair.client.write(FrameType.RPC_REQUEST, 1, [method, {}, {"stream": "numbers"}])
    await turns()
    assert pair.server.connection.running == 1
    return 1


async def test_items_by_hand() -> None:
    async with Pair() as pair:
        id = await opened(pair)
        pair.client.write(ITEM, id, [1, 2])
        pair.client.write(ITEM, id, [3])
        pair.client.connection.protocol.send(word(END, SEQUENCED), id, b"")
        pair.client.connection.flush()
        pair.client.write(ITEM, id, [4])  # behind the end: late
        pair.client.connection.state["go_on"].set()
        await until(lambda: pair.server.link.sent(FrameType.RPC_RESPONSE))
        assert pair.server.link.sent(FrameType.RPC_RESPONSE)[0].body == [3]
        pair.client.write(ITEM, id, [5])
        pair.client.write(ITEM, 77, [5])
        pair.client.write(CREDIT, 77, ["?"])
        await turns()
        assert not pair.server.connection.closed


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([[1] * 10, [1]], 4420),
        ([[1] * 11], 4420),
        ([["x" * 200], [1]], 4420),
        ([[]], 4400),
        ([{}], 4400),
        ([5], 4400),
    ],
)
async def test_items_without_credit_or_form(frames: list[Any], code: int) -> None:
    async with Pair(server=settings(stream=(10, 100))) as pair:
        id = await opened(pair)
        for body in frames:
            assert not pair.server.connection.closed
            pair.client.write(ITEM, id, body)
            await turns()
        reason = pair.server.connection.reason
        assert reason is not None
        assert reason.code == code
        assert left(pair)[1] == 0


async def test_items_that_are_refused_end_the_stream_only() -> None:
    async with Pair() as pair:
        id = await opened(pair)
        pair.client.write(ITEM, id, [1])
        pair.client.write(ITEM, id, [{5: "a key that is no text"}])
        pair.client.write(ITEM, id, [3])
        pair.client.connection.state["go_on"].set()
        await until(lambda: pair.server.link.sent(FrameType.RPC_ERROR))
        assert pair.server.link.sent(FrameType.RPC_ERROR)[0].body[0] == "invalid_params"
        assert not pair.server.connection.closed


@pytest.mark.parametrize("body", [[1], [1, -1], ["1", 2], {}, 5, [True, 1]])
async def test_credit_without_form(body: Any) -> None:
    async with Pair(client=settings(stream=(4, 100))) as pair:
        serve(pair.server)
        async with pair.client.stream("count"):
            await turns()
            pair.client.write(CREDIT, 1, body)
            await turns()
            reason = pair.server.connection.reason
            assert reason is not None
            assert reason.code == 4400


async def test_items_for_calls_that_have_no_stream_are_ignored() -> None:
    async with Pair() as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def patient() -> int:
            await go_on.wait()
            return 5

        call = pair.client.start("patient")
        await turns()
        pair.server.write(ITEM, 1, [1])
        pair.client.write(ITEM, 1, [1])
        pair.client.write(CREDIT, 1, [1, 1])
        run = pair.client.stream("patient")
        waiting = asyncio.ensure_future(all_of(run))
        await turns()
        pair.server.connection.protocol.send(word(END, SEQUENCED), 3, b"")  # not the caller's end
        pair.server.connection.flush()
        await turns()
        go_on.set()
        assert await within(call) == 5
        assert await within(waiting) == []
        assert await within(run.result()) == 5


async def test_items_behind_the_answer_are_late_also_in_the_same_read() -> None:
    async with Pair() as pair:
        go_on = asyncio.Event()

        @pair.server.rpc
        async def patient() -> AsyncIterator[int]:
            await go_on.wait()
            yield 1

        async with pair.client.stream("patient") as run:
            send = pair.server.connection.protocol.send
            send(word(ITEM, SEQUENCED), 1, msgpack.packb([1, 2]))
            send(word(FrameType.RPC_RESPONSE, SEQUENCED), 1, msgpack.packb([None]))
            send(word(ITEM, SEQUENCED), 1, msgpack.packb([3]))
            pair.server.connection.flush()
            assert await within(all_of(run)) == [1, 2]
        go_on.set()
        await until(lambda: left(pair) == [0] * 6)


async def test_items_that_come_when_the_caller_has_left_are_late() -> None:
    async with Pair() as pair:
        serve(pair.server)
        async with pair.client.stream("count") as run:
            assert await within(run.__aiter__().__anext__()) == 1
        pair.server.write(ITEM, 1, [1] * 5000)
        await turns()
        assert pair.client.connection.reason is None


async def test_a_handler_that_swallows_its_cancellation_is_answered_once() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def stubborn() -> AsyncIterator[int]:
            yield 1
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            yield 2

        async with pair.client.stream("stubborn") as run:
            assert await within(run.__aiter__().__anext__()) == 1
        await until(lambda: left(pair) == [0] * 6)
        finals = [frame for frame in pair.server.link.frames if frame.type in FINALS]
        assert [frame.body[0] for frame in finals] == [CallCancelled.code]
