"""The time that a handler has left: inherited by its calls, by nobody else, and when it is up."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from conduit import from_thread, no_deadline
from conduit.exceptions import RPCTimeout
from conduit.protocol.frames import FrameType
from conduit.transport.background import Background
from conduit.transport.connection import Connection
from tests.transport.clock import Clock, clock
from tests.transport.pair import Pair, Side, settings, turns, until, within

__all__ = ["clock"]

BOTH_WAYS = pytest.mark.parametrize("caller_is_client", [True, False], ids=["client", "server"])
HOW = pytest.mark.parametrize("how", ["at once", "later", "in a thread"])


def sides(pair: Pair, caller_is_client: bool) -> tuple[Side, Side]:
    """Return who calls, and who serves."""
    return (pair.client, pair.server) if caller_is_client else (pair.server, pair.client)


def ask(side: Side, id: int, method: str, params: Any = None, *meta: Any) -> None:
    """Write a request by hand, of which the side itself knows nothing."""
    side.write(FrameType.RPC_REQUEST, id, [method, params or {}, *meta])


def answers(side: Side) -> dict[int, Any]:
    """Return the final frames that a side has written; no id may have two."""
    final = (FrameType.RPC_RESPONSE, FrameType.RPC_ERROR)
    found = [(frame.id, frame.body) for frame in side.link.frames if frame.type in final]
    assert len(dict(found)) == len(found)
    return dict(found)


def told(side: Side) -> list[float | None]:
    """Return how many seconds the requests of a side allow; None for what is usual, 0 for ever."""
    metas = [frame.body[2:] for frame in side.link.sent(FrameType.RPC_REQUEST)]
    return [meta[0].get("ttl", -1000) / 1000 if meta else None for meta in metas]


def answering(side: Side) -> None:
    """Have a side answer the calls of the handlers."""

    @side.rpc
    async def answer() -> int:
        return 42


def relaying(side: Side, clock: Clock, how: str, **options: Any) -> None:
    """Have a side serve `relay`, which lets 4 seconds pass and calls its caller."""

    async def relay(connection: Connection) -> Any:
        if how == "later":
            await asyncio.sleep(0)
        clock.advance(4)
        return await connection.rpc.call("answer", **options)

    def relay_in_thread(connection: Connection) -> Any:
        clock.advance(4)
        return from_thread.run(call, connection)

    async def call(connection: Connection) -> Any:
        return await connection.rpc.call("answer", **options)

    side.rpc("relay")(relay_in_thread if how == "in a thread" else relay)


# What is inherited


@BOTH_WAYS
@HOW
@pytest.mark.parametrize(
    "options, expected",
    [({}, 6), ({"timeout": 20}, 6), ({"timeout": None}, 6), ({"timeout": 2}, 2)],
    ids=["usual", "longer", "none", "shorter"],
)
async def test_a_call_has_no_more_time_than_the_handler_that_makes_it(
    clock: Clock, caller_is_client: bool, how: str, options: Any, expected: float
) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        answering(caller)
        relaying(callee, clock, how, **options)
        assert await within(caller.call("relay", timeout=10)) == 42
        [allowed] = told(callee)
        assert allowed is not None
        assert expected - 1 < allowed <= expected


@HOW
async def test_a_handler_without_a_deadline_hands_none_on(clock: Clock, how: str) -> None:
    async with Pair() as pair:
        answering(pair.client)
        relaying(pair.server, clock, how)
        assert await within(pair.client.call("relay", timeout=None)) == 42
        assert told(pair.server) == [None]


async def test_what_the_handler_itself_is_allowed_counts(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.client)

        @pair.server.rpc(timeout=5)
        async def relay(connection: Connection) -> Any:
            await asyncio.sleep(0)
            clock.advance(4)
            return await connection.rpc.call("answer")

        assert await within(pair.client.call("relay", timeout=10)) == 42
        [allowed] = told(pair.server)
        assert allowed is not None and 0 < allowed <= 1


async def test_it_is_inherited_over_every_connection(clock: Clock) -> None:
    async with Pair() as pair, Pair() as upstream:
        answering(upstream.server)

        @pair.server.rpc
        async def relay() -> Any:
            await asyncio.sleep(0)
            clock.advance(4)
            return await upstream.client.call("answer")

        assert await within(pair.client.call("relay", timeout=10)) == 42
        [allowed] = told(upstream.client)
        assert allowed is not None and 5 < allowed <= 6


async def test_a_stream_inherits_it_too(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.client)

        @pair.server.rpc
        async def relay(connection: Connection) -> Any:
            clock.advance(4)
            return await connection.rpc.stream("answer").result()

        assert await within(pair.client.call("relay", timeout=10)) == 42
        assert await within(pair.client.call("relay", timeout=None)) == 42
        inherited, usual = told(pair.server)
        assert inherited is not None and 5 < inherited <= 6
        assert usual == 0


@BOTH_WAYS
@pytest.mark.parametrize("what", ["call", "stream", "request"])
async def test_a_handler_whose_time_is_up_calls_nobody(
    clock: Clock, what: str, caller_is_client: bool
) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        refused: list[RPCTimeout] = []

        @callee.rpc
        async def relay(connection: Connection) -> None:
            clock.advance(11)
            try:
                if what == "call":
                    await connection.rpc.call("answer")
                elif what == "stream":
                    await connection.rpc.stream("answer").result()
                else:
                    await connection.request("answer")
            except RPCTimeout as exc:
                refused.append(exc)

        callee.link.writes.clear()
        await within(caller.call("relay", timeout=10))
        assert [error.details for error in refused] == [{"executed": False}]
        assert "'relay'" in str(refused[0])
        types = {frame.type for frame in callee.link.frames}
        assert not types & {FrameType.RPC_REQUEST, FrameType.MESSAGE}


# What is not


@BOTH_WAYS
async def test_the_tasks_of_a_handler_inherit_nothing(clock: Clock, caller_is_client: bool) -> None:
    background = Background(logging.getLogger("conduit.test"))
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        answering(caller)
        left: list[asyncio.Task[Any]] = []

        async def call(connection: Connection) -> Any:
            return await connection.rpc.call("answer")

        @callee.rpc
        async def leave(connection: Connection) -> None:
            left.append(asyncio.create_task(call(connection)))
            left.append(background.start(call(connection)))
            await asyncio.gather(call(connection))

        await within(caller.call("leave", timeout=10))
        assert await within(asyncio.gather(*left)) == [42, 42]
        assert told(callee) == [None] * 3


async def test_the_tasks_of_a_thread_inherit_nothing(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.client)
        left: list[asyncio.Task[Any]] = []

        async def call(connection: Connection) -> Any:
            return await connection.rpc.call("answer")

        async def leave_task(connection: Connection) -> None:
            left.append(asyncio.create_task(call(connection)))

        @pair.server.rpc
        def leave(connection: Connection) -> None:
            from_thread.run(leave_task, connection)

        await within(pair.client.call("leave", timeout=10))
        await within(left[0])
        assert told(pair.server) == [None]


async def test_the_next_handler_inherits_nothing_of_the_last(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.client)
        relaying(pair.server, clock, "at once")
        assert await within(pair.client.call("relay", timeout=10)) == 42
        assert await within(pair.client.call("relay", timeout=None)) == 42
        assert told(pair.server)[1] is None


async def test_who_is_no_handler_has_the_usual_time(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.server)
        with no_deadline():
            await within(pair.client.call("answer"))
        await within(pair.client.call("answer"))
        assert told(pair.client) == [None, None]


async def test_a_message_has_no_deadline_to_hand_on(clock: Clock) -> None:
    async with Pair() as pair:
        answering(pair.client)

        @pair.server.on("start")
        async def start(connection: Connection, message: Any) -> Any:
            await asyncio.sleep(0)
            clock.advance(60)
            return await connection.rpc.call("answer")

        assert await within(pair.client.connection.request("start", timeout=10)) == 42
        assert told(pair.server) == [None]


# no_deadline


@HOW
async def test_in_the_block_calls_have_their_own_time(clock: Clock, how: str) -> None:
    async with Pair() as pair:
        answering(pair.client)
        options: list[dict[str, Any]] = [{}, {"timeout": None}, {"timeout": 20}]

        @pair.server.rpc("relay")
        async def relay(connection: Connection) -> None:
            if how == "later":
                await asyncio.sleep(0)
            with no_deadline():
                for one in options:
                    await connection.rpc.call("answer", **one)
                with no_deadline():
                    pass
                await connection.rpc.call("answer")
            await connection.rpc.call("answer")

        async def call(connection: Connection, one: Any) -> None:
            await connection.rpc.call("answer", **one)

        def relay_in_thread(connection: Connection) -> None:
            with no_deadline():
                for one in [*options, {}]:
                    from_thread.run(call, connection, one)
            from_thread.run(call, connection, {})

        if how == "in a thread":
            pair.server.rpc("in a thread")(relay_in_thread)
        method = how if how == "in a thread" else "relay"
        await within(pair.client.call(method, timeout=10))
        allowed = told(pair.server)
        assert allowed[:4] == [None, 0, 20, None]
        assert allowed[4] is not None and 9 < allowed[4] <= 10


@pytest.mark.parametrize("behind", [0, 60])
async def test_what_must_be_set_right_can_be_when_the_time_is_up(
    clock: Clock, behind: float
) -> None:
    """The loop says when that is, whatever the other clock shows."""
    async with Pair() as pair:
        released: list[str] = []
        refused: list[RPCTimeout] = []
        ended = asyncio.Event()

        @pair.client.rpc
        async def release(name: str) -> None:
            released.append(name)

        @pair.server.rpc
        async def hold(connection: Connection) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                clock.advance(-behind)
                try:
                    await connection.rpc.release(name="bounded")
                except RPCTimeout as exc:
                    refused.append(exc)
                with no_deadline():
                    await connection.rpc.release(name="free")
                ended.set()

        ask(pair.client, 101, "hold", {}, {"ttl": 20})
        await within(ended.wait())
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[101][0] == RPCTimeout.code
        assert released == ["free"] and len(refused) == 1
        assert pair.server.connection.running == 0


# Shedding


@BOTH_WAYS
async def test_what_has_expired_before_its_turn_does_not_run(
    clock: Clock, caller_is_client: bool
) -> None:
    async with Pair() as pair:
        caller, callee = sides(pair, caller_is_client)
        ran: list[str] = []

        @callee.rpc(thread=False)
        def busy() -> None:
            clock.advance(1)

        @callee.rpc
        async def work(name: str) -> None:
            ran.append(name)

        @callee.rpc
        async def items(name: str, stream: Any = None) -> Any:
            ran.append(name)

        first = 101 if caller_is_client else 102
        ask(caller, first, "work", ["before"], {"ttl": 10})
        ask(caller, first + 2, "busy", {})
        ask(caller, first + 4, "work", ["expired"], {"ttl": 10})
        ask(caller, first + 6, "work", ["in time"], {"ttl": 5000})
        ask(caller, first + 8, "work", ["for ever"], {"ttl": 0})
        ask(caller, first + 10, "work", ["usual"])
        ask(caller, first + 12, "items", ["stream"], {"ttl": 10, "stream": None})
        await until(lambda: len(answers(callee)) == 7)
        assert ran == ["before", "in time", "for ever", "usual"]
        for id in (first + 4, first + 12):
            code, message, details = answers(callee)[id]
            assert code == RPCTimeout.code and "before its turn" in message
            assert details == {"executed": False}
        assert callee.connection.running == 0


async def test_the_usual_time_expires_as_well(clock: Clock) -> None:
    async with Pair(client=settings(timeout=0.5)) as pair:
        ran: list[str] = []

        @pair.server.rpc(thread=False)
        def busy() -> None:
            clock.advance(1)

        @pair.server.rpc
        async def work(name: str) -> None:
            ran.append(name)

        ask(pair.client, 101, "busy")
        ask(pair.client, 103, "work", ["expired"])
        await until(lambda: len(answers(pair.server)) == 2)
        ask(pair.client, 105, "work", ["in the next batch"])
        await until(lambda: len(answers(pair.server)) == 3)
        assert ran == ["in the next batch"]


@pytest.mark.parametrize("usual, runs", [(None, True), (4.9, False), (5.0, True)])
async def test_only_a_short_usual_time_is_looked_at(
    clock: Clock, usual: float | None, runs: bool
) -> None:
    async with Pair(client=settings(timeout=usual)) as pair:
        ran: list[int] = []

        @pair.server.rpc(thread=False)
        def busy() -> None:
            clock.advance(60)

        @pair.server.rpc(thread=False)
        def work() -> None:
            ran.append(1)

        ask(pair.client, 101, "busy")
        ask(pair.client, 103, "work")
        await until(lambda: len(answers(pair.server)) == 2)
        assert bool(ran) is runs


async def test_the_time_of_a_handler_of_its_own_begins_when_it_runs(clock: Clock) -> None:
    async with Pair() as pair:

        @pair.server.rpc(thread=False)
        def busy() -> None:
            clock.advance(10)

        @pair.server.rpc(timeout=5)
        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        ask(pair.client, 101, "busy")
        ask(pair.client, 103, "work")
        await until(lambda: len(answers(pair.server)) == 2)
        assert answers(pair.server)[103] == ["done"]


async def test_what_expires_in_the_queue_for_a_thread_does_not_run() -> None:
    async with Pair() as pair:
        release, ran = threading.Event(), []

        @pair.server.rpc
        def hold() -> None:
            release.wait(5)

        @pair.server.rpc
        def work() -> None:
            ran.append(1)

        holding = [pair.client.start("hold") for _ in range(64)]
        await turns()
        ask(pair.client, 201, "work", {}, {"ttl": 20})
        await until(lambda: 201 in answers(pair.server))
        release.set()
        await within(asyncio.gather(*holding))
        code, _, details = answers(pair.server)[201]
        assert (code, details, ran) == (RPCTimeout.code, {"executed": False}, [])
