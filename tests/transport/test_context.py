"""What a handler can know of its call: in a parameter, from anywhere in its task, in its thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conduit import Context, Response, Stream, from_thread
from conduit.exceptions import CallCancelled, PayloadTooLarge, PermissionDenied, RPCTimeout
from conduit.protocol.frames import CloseCode, FrameType
from conduit.transport import running, serving
from conduit.transport.connection import Connection
from conduit.transport.handling import Handled
from conduit.transport.loop import Shared
from tests.transport.clock import Clock, clock
from tests.transport.pair import Pair, Side, turns, until, within

__all__ = ["clock"]

KINDS = ["coroutine", "suspended", "thread", "inline", "stream", "generator"]

BOTH_WAYS = pytest.mark.parametrize("caller_is_client", [True, False], ids=["client", "server"])


def sides(pair: Pair, caller_is_client: bool) -> tuple[Side, Side]:
    """Return who calls, and who serves."""
    return (pair.client, pair.server) if caller_is_client else (pair.server, pair.client)


def look(context: Context) -> dict[str, Any]:
    """Return what a context tells."""
    return {
        "method": context.method,
        "identity": context.identity,
        "headers": dict(context.headers),
        "left": context.remaining,
        "deadline": context.deadline,
        "mine": context.connection.id == Context.current().connection.id,
    }


def answer(context: Context) -> dict[str, Any]:
    """Do what every handler here does."""
    context.response_headers["kind"] = context.method
    return look(context)


def serve(side: Side) -> None:
    """Register a method of each kind."""

    @side.rpc
    async def coroutine(context: Context) -> Any:
        return answer(context)

    @side.rpc
    async def suspended(context: Context) -> Any:
        await asyncio.sleep(0)
        return answer(context)

    @side.rpc
    def thread(context: Context) -> Any:
        return answer(context)

    @side.rpc(thread=False)
    def inline(context: Context) -> Any:
        return answer(context)

    @side.rpc
    async def stream(context: Context, stream: Stream[int]) -> Any:
        await stream.send(1)
        return answer(context)

    @side.rpc
    async def generator(context: Context) -> AsyncIterator[Any]:
        yield answer(context)


async def ask(side: Side, kind: str, **options: Any) -> Response[Any]:
    """Call a method, whatever its kind."""
    if kind not in ("stream", "generator"):
        result = await within(side.call(kind, returns=Response, **options))
    else:
        async with side.stream(kind, returns=Response, **options) as run:
            items = [item async for item in run]
            result = await run.result()
        if kind == "generator":
            result = Response(items[0], result.headers)
    assert isinstance(result, Response)
    return result


def nothing_left() -> bool:
    """Tell whether everything that is known of handlers was forgotten."""
    handling = Shared.of(asyncio.get_running_loop()).handling
    return not handling.suspended and handling.call is None and handling.source is None


# What it tells


@BOTH_WAYS
@pytest.mark.parametrize("kind", KINDS)
async def test_a_parameter_that_is_annotated_gets_it(kind: str, caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        serve(callee)
        before = time.monotonic()
        answered = await ask(caller, kind, timeout=7, headers={"trace": "a", "n": 1})
        told = answered.value
        assert told["method"] == kind
        assert told["identity"] == callee.connection.identity
        assert told["headers"] == {"trace": "a", "n": 1}
        assert 0 < told["left"] <= 7
        assert before + 7 <= told["deadline"] <= time.monotonic() + 7
        assert told["mine"]
        assert answered.headers == {"kind": kind}
        assert nothing_left()


@pytest.mark.parametrize("kind", KINDS)
async def test_without_headers_and_deadline_it_says_so(kind: str) -> None:
    async with Pair() as pair:
        serve(pair.server)
        told = (await ask(pair.client, kind, timeout=None)).value
        assert (told["headers"], told["left"], told["deadline"]) == ({}, None, None)


async def test_time_runs(clock: Clock) -> None:
    async with Pair() as pair:
        left: list[float | None] = []

        @pair.server.rpc(timeout=8)
        async def work(context: Context) -> None:
            for seconds in (0, 5, 60):
                clock.advance(seconds)
                left.append(context.remaining)

        await within(pair.client.call("work"))
        first, second, third = left
        assert first is not None and second is not None
        assert 7 < first <= 8 and 2 < second <= 3 and third == 0


@BOTH_WAYS
async def test_the_handler_of_a_message_has_one(caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)

        async def news(message: Any, context: Context) -> Any:
            before = look(context)
            await asyncio.sleep(0)
            return [before, look(Context.current())]

        async def with_connection(connection: Connection, message: Any, *, context: Context) -> Any:
            return await news(message, context)

        callee.on("news")(with_connection if caller_is_client else news)
        told = await within(caller.connection.request("news", 1))
        expected: dict[str, Any] = {
            "method": "news",
            "headers": {},
            "left": None,
            "deadline": None,
            "mine": True,
        }
        assert told == [{**expected, "identity": callee.connection.identity}] * 2
        assert nothing_left()


async def test_messages_in_line_have_their_own() -> None:
    async with Pair() as pair:
        seen: list[str] = []

        @pair.server.on("slow")
        async def slow(connection: Connection, message: Any) -> None:
            await asyncio.sleep(0)
            seen.append(Context.current().method)

        @pair.server.on("quick")
        async def quick(connection: Connection, message: Any) -> None:
            seen.append(Context.current().method)

        for name in ("slow", "quick", "slow"):
            await pair.client.connection.send(name)
        await until(lambda: len(seen) == 3)
        assert seen == ["slow", "quick", "slow"]
        await until(nothing_left)


async def test_it_is_no_parameter_of_the_call() -> None:
    async with Pair() as pair:
        serve(pair.server)
        found = {one["name"]: one for one in await within(pair.client.connection.rpc.discover())}
        assert all(found[kind]["parameters"]["properties"] == {} for kind in KINDS)


# From anywhere


async def test_each_handler_finds_its_own() -> None:
    async with Pair() as pair:
        gates: dict[str, asyncio.Event] = {name: asyncio.Event() for name in "abc"}

        async def deeper() -> str:
            context = Context.current()
            name: str = context.headers["name"]
            context.state["name"] = name
            await gates[name].wait()
            assert Context.current().state == {"name": name}
            return name

        @pair.server.rpc
        async def work() -> str:
            return await deeper()

        calls = [pair.client.start("work", headers={"name": name}) for name in "abc"]
        await turns()
        for name in "cab":
            gates[name].set()
        assert await within(asyncio.gather(*calls)) == ["a", "b", "c"]
        assert nothing_left()


async def test_a_thread_and_what_it_runs_on_the_loop_find_it() -> None:
    async with Pair() as pair:

        async def on_the_loop() -> list[str]:
            async def child() -> str:
                return found()

            return [Context.current().method, await asyncio.ensure_future(child())]

        def found() -> str:
            try:
                return Context.current().method
            except RuntimeError:
                return "none"

        @pair.server.rpc
        def work() -> list[str]:
            here = found()
            other: list[str] = []
            beside = threading.Thread(target=lambda: other.append(found()))
            beside.start()
            beside.join()
            return [here, *from_thread.run(on_the_loop), found(), *other]

        assert await within(pair.client.call("work")) == ["work", "work", "none", "work", "none"]


async def test_who_is_no_handler_has_none() -> None:
    async with Pair() as pair:
        ended: list[str] = []

        def none(where: str) -> None:
            with pytest.raises(RuntimeError, match="only in the task or the thread of a handler"):
                Context.current()
            ended.append(where)

        async def child(where: str) -> None:
            none(where)

        @pair.server.rpc
        async def work() -> None:
            await asyncio.gather(child("child"))
            await asyncio.to_thread(none, "thread")
            await asyncio.to_thread(lambda: asyncio.run(child("other loop")))
            task = asyncio.create_task(child("left behind"))
            await asyncio.wait([task])
            task.result()

        none("outside")
        await within(pair.client.call("work"))
        none("afterwards")
        assert ended == ["outside", "child", "thread", "other loop", "left behind", "afterwards"]


@pytest.mark.parametrize("method", ["quick", "slow"])
async def test_nothing_is_made_for_who_does_not_ask(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A call must not cost more because others want to know of theirs."""
    made: list[Any] = []

    class Counted(Handled):
        __slots__ = ()

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(args)

    for module in (running, serving):
        monkeypatch.setattr(module, "Handled", Counted)
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> None: ...

        @pair.server.rpc
        async def slow() -> None:
            await asyncio.sleep(0)

        await within(pair.client.call(method, timeout=3, headers={"a": 1}))
        assert made == []


# Headers


@pytest.mark.parametrize("kind", ["now", "later", "thread", "as response", "both"])
async def test_response_headers_are_those_of_a_response(kind: str) -> None:
    async with Pair() as pair:

        def work(context: Context) -> Any:
            if kind != "as response":
                context.response_headers["age"] = 3
            if kind == "both":
                context.response_headers["age"] = 4
            return Response(7, {"age": 3}) if kind in ("as response", "both") else 7

        @pair.server.rpc
        async def now(context: Context) -> Response[int]:
            result: Response[int] = work(context)
            return result

        @pair.server.rpc
        async def later(context: Context) -> Any:
            await asyncio.sleep(0)
            return work(Context.current())

        pair.server.rpc("thread")(work)
        method = kind if kind in ("later", "thread") else "now"
        expected = Response(7, {"age": 3})
        assert await within(pair.client.call(method, returns=Response)) == expected
        assert await within(pair.client.call(method)) == 7


async def test_without_them_the_answer_has_none() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def work(context: Context) -> int:
            assert context.response_headers == {}
            return 7

        @pair.server.rpc
        async def fails(context: Context) -> int:
            context.response_headers["age"] = 3
            raise PermissionDenied("no")

        await within(pair.client.call("work"))
        with pytest.raises(PermissionDenied):
            await within(pair.client.call("fails"))
        assert [frame.body for frame in pair.server.link.sent(FrameType.RPC_RESPONSE)] == [[7]]


async def test_headers_travel_beside_large_arguments_and_a_deadline() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def size(value: bytes, context: Context) -> Any:
            return [len(value), context.headers]

        for length in (10, 300_000, 300_000):
            arguments = {"value": bytes(length)}
            headers = {"trace": "a"}
            told = await within(pair.client.call("size", arguments, timeout=3, headers=headers))
            assert told == [length, headers]


@pytest.mark.parametrize("how", ["call", "stream"])
async def test_headers_that_cannot_be_sent_are_refused_here(how: str) -> None:
    async with Pair() as pair:
        serve(pair.server)

        async def call(headers: Any) -> Any:
            if how == "call":
                return await pair.client.call("coroutine", headers=headers)
            return await pair.client.stream("generator", headers=headers).result()

        with pytest.raises(PayloadTooLarge, match="3072 are the most"):
            await within(call({"a": "x" * 3072}))
        with pytest.raises(TypeError, match="names of headers"):
            await within(call({1: "x"}))
        with pytest.raises(TypeError):
            await within(call({"a": object()}))
        await within(call({"a": "x" * 3000}))


@pytest.mark.parametrize("headers", [None, 5, [], {b"a": 1}])
async def test_headers_that_cannot_be_read_close(headers: Any) -> None:
    async with Pair() as pair:
        serve(pair.server)
        pair.client.write(FrameType.RPC_REQUEST, 101, ["coroutine", {}, {"headers": headers}])
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


# Told that nobody waits


def wait_and_ask(context: Context, gone: threading.Event, outcome: list[Any]) -> None:
    """Wait in a thread until the test says that the caller has gone, and ask."""
    context.raise_if_cancelled()  # nothing has happened yet
    gone.wait(5)
    try:
        context.raise_if_cancelled()
    except (CallCancelled, RPCTimeout) as exc:
        outcome.append(exc)
        raise
    outcome.append(None)


@BOTH_WAYS
@pytest.mark.parametrize("why", ["left", "late", "lost", "nothing"])
@pytest.mark.parametrize("kind", ["call", "message"])
async def test_a_thread_is_told(kind: str, why: str, caller_is_client: bool) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        gone, outcome = threading.Event(), list[Any]()
        entered = threading.Event()

        @callee.rpc
        def work() -> str:
            entered.set()
            wait_and_ask(Context.current(), gone, outcome)
            return "done"

        def message(message: Any, context: Context) -> Any:
            return work()

        def from_client(connection: Connection, message: Any, context: Context) -> Any:
            return work()

        callee.on("work")(from_client if caller_is_client else message)
        if kind == "call":
            call = caller.start("work", timeout=30)
        else:
            call = asyncio.ensure_future(caller.connection.request("work", timeout=30))
        await until(entered.is_set)
        if why == "left":
            call.cancel()
            await turns()
        elif why == "lost":
            caller.link.cut()
            await until(lambda: callee.connection.closed)
        elif why == "late":
            for side in (callee, caller):  # as their timers would
                side.connection.expire(asyncio.get_running_loop().time() + 60)
            with pytest.raises(RPCTimeout):
                await within(call)
            await turns()
        gone.set()
        await until(lambda: outcome)
        # A message's deadline is with its sender alone, who says then that it has left.
        wanted: dict[str, type] = {"nothing": type(None), "left": CallCancelled}
        wanted |= {"lost": CallCancelled, "late": RPCTimeout if kind == "call" else CallCancelled}
        assert isinstance(outcome[0], wanted[why])
        if why == "nothing":
            assert await within(call) == "done"
        else:
            await asyncio.gather(call, return_exceptions=True)
        await until(nothing_left)


async def test_a_handler_that_closes_its_connection_still_knows_whose_it_was() -> None:
    async with Pair() as pair:
        known: list[Any] = []

        @pair.server.rpc
        async def leave(connection: Connection) -> None:
            try:
                await connection.close()
            finally:
                known.append(Context.current().connection is connection)

        call = pair.client.start("leave")
        await until(lambda: known)
        await asyncio.gather(call, return_exceptions=True)
        assert known == [True]


async def test_the_thread_of_a_message_is_told_that_the_connection_is_lost() -> None:
    async with Pair() as pair:
        entered, gone, outcome = threading.Event(), threading.Event(), list[Any]()

        @pair.server.on("news")
        def news(connection: Connection, message: Any, context: Context) -> None:
            entered.set()
            wait_and_ask(context, gone, outcome)

        await pair.client.connection.send("news")
        await until(entered.is_set)
        pair.client.link.cut()
        await until(lambda: pair.server.connection.closed)
        gone.set()
        await until(lambda: outcome)
        assert isinstance(outcome[0], CallCancelled)
        await until(nothing_left)


async def test_the_deadline_tells_before_the_loop_does(clock: Clock) -> None:
    """The loop may be busy; the thread has a clock of its own."""
    async with Pair() as pair:

        @pair.server.rpc
        def work(context: Context) -> None:
            context.raise_if_cancelled()
            clock.advance(11)
            context.raise_if_cancelled()

        with pytest.raises(RPCTimeout, match="'work' did not end in time"):
            await within(pair.client.call("work", timeout=10))


async def test_a_context_that_is_first_asked_for_in_the_end_knows_as_well() -> None:
    async with Pair() as pair:
        outcome: list[BaseException] = []

        @pair.server.rpc
        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                try:
                    Context.current().raise_if_cancelled()
                except CallCancelled as exc:
                    outcome.append(exc)

        call = pair.client.start("work")
        await turns()
        call.cancel()
        await until(lambda: outcome)
        assert "given up" in str(outcome[0])


async def test_what_is_answered_after_that_is_late_and_counted() -> None:
    async with Pair() as pair:
        entered, gone = threading.Event(), threading.Event()

        @pair.server.rpc
        def work(context: Context) -> None:
            entered.set()
            wait_and_ask(context, gone, [])

        call = pair.client.start("work")
        await until(entered.is_set)
        call.cancel()
        await turns()
        gone.set()
        await until(lambda: pair.client.connection.late)
        assert pair.client.connection.late == 1
        answers = pair.server.link.sent(FrameType.RPC_ERROR)
        assert [frame.body[0] for frame in answers] == [CallCancelled.code]
