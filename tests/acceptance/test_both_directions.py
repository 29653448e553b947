"""Calls that go back and forth between both sides, a hundred deep, with the defaults of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from pydantic import BaseModel

from conduit import (
    CallCancelled,
    Client,
    Connection,
    Context,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    RPCError,
    RPCTimeout,
    Server,
)
from tests.acceptance.support import new_client, new_server, round_trips, within

DEPTH = 100
SLOTS = 2 * 256
"""Calls that both directions of a connection hold together."""


class NoneLeft(RPCError):
    """An error of the application with fields."""

    article: str
    left: int

    def __init__(self, article: str, left: int) -> None:
        super().__init__(f"only {left} of {article} are left")
        self.article = article
        self.left = left


class Stay(BaseModel):
    guest: str
    until: datetime


class Levels:
    """Handlers on both sides that call each other, each time one level deeper.

    Args:
        bottom: What the innermost handler does.

    Attributes:
        remaining: Seconds that each handler had left, from the outermost to the innermost.
        running: Handlers that have not ended.
        deepest: The most that ran at once.
        arrived: Set when the innermost handler runs.
        cancelled: Handlers that were cancelled.
        timed_out: Handlers whose own call told them first that the time is up.
    """

    def __init__(self, bottom: Callable[[], Awaitable[Any]]) -> None:
        self.bottom = bottom
        self.remaining: list[float] = []
        self.running = self.deepest = self.cancelled = self.timed_out = 0
        self.arrived = asyncio.Event()

    def register(self, *sides: Server | Client) -> None:
        for side in sides:
            side.rpc(self.descend)
            side.rpc(self.relay)

    async def descend(self, depth: int, context: Context) -> Any:
        assert context.remaining is not None
        self.remaining.append(context.remaining)
        self.running += 1
        self.deepest = max(self.deepest, self.running)
        try:
            if depth > 1:
                return await context.connection.rpc.call("descend", {"depth": depth - 1})
            self.arrived.set()
            return await self.bottom()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except RPCTimeout:
            self.timed_out += 1
            raise
        finally:
            self.running -= 1

    async def relay(self, connection: Connection, depth: int) -> AsyncIterator[int]:
        """Stream what the other side streams that has it from this side, and so on."""
        self.running += 1
        self.deepest = max(self.deepest, self.running)
        try:
            if depth > 1:
                arguments = {"depth": depth - 1}
                async with connection.rpc.stream("relay", arguments, items=int) as run:
                    async for number in run:
                        yield number
            else:
                for number in range(1_000_000):
                    yield number
        finally:
            self.running -= 1


async def hang() -> None:
    await asyncio.Event().wait()


async def until_none_runs(levels: Levels) -> None:
    """Wait until every handler has ended."""

    async def look() -> None:
        while levels.running:  # noqa: ASYNC110  # it lets the loop run and does not sleep
            await asyncio.sleep(0)

    await within(look())


FROM_BOTH = pytest.mark.parametrize("starts", ["client", "server"])


def caller(starts: str, server: Server, client: Client) -> Any:
    """Return the `rpc` of who makes the outermost call."""
    return client.rpc if starts == "client" else server.connections[client.connection.id].rpc


@FROM_BOTH
async def test_calls_back_and_forth_to_depth_100(starts: str) -> None:
    async def bottom() -> str:
        return "as deep as it goes"

    levels = Levels(bottom)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        rpc = caller(starts, server, client)
        assert await within(rpc.call("descend", {"depth": DEPTH})) == "as deep as it goes"
        assert levels.deepest == DEPTH and levels.running == 0
        # Ten at once take 250 of the 256 slots of each direction.
        calls = [rpc.call("descend", {"depth": DEPTH // 2}) for _ in range(10)]
        assert await within(asyncio.gather(*calls)) == ["as deep as it goes"] * 10


@FROM_BOTH
async def test_the_innermost_error_arrives_as_itself(starts: str) -> None:
    async def bottom() -> None:
        raise NoneLeft("rope", 3)

    levels = Levels(bottom)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        with pytest.raises(NoneLeft, match="only 3 of rope are left") as caught:
            await within(caller(starts, server, client).call("descend", {"depth": DEPTH}))
        assert (caught.value.article, caught.value.left) == ("rope", 3)
        assert levels.deepest == DEPTH and levels.running == 0


@FROM_BOTH
async def test_the_deadline_of_the_outermost_call_is_that_of_all(starts: str) -> None:
    levels = Levels(hang)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        rpc = caller(starts, server, client)
        call = asyncio.ensure_future(rpc.call("descend", {"depth": DEPTH}, timeout=1.5))
        await within(levels.arrived.wait())
        with pytest.raises(RPCTimeout):
            await within(call)
        await until_none_runs(levels)
        # The time of a handler and of the call that it makes is up in the same moment.
        ended = levels.cancelled + levels.timed_out
        assert levels.deepest == ended == len(levels.remaining) == DEPTH
        assert levels.remaining[0] <= 1.5
        # Whole milliseconds travel, so that rounding may add half of one at each level.
        deeper = zip(levels.remaining, levels.remaining[1:], strict=False)
        assert all(inner <= outer + 0.001 for outer, inner in deeper)
        await round_trips(client, 3)


@FROM_BOTH
async def test_to_cancel_the_outermost_call_cancels_all(starts: str) -> None:
    levels = Levels(hang)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        rpc = caller(starts, server, client)
        call = asyncio.ensure_future(rpc.call("descend", {"depth": DEPTH}))
        await within(levels.arrived.wait())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(call)
        await until_none_runs(levels)
        assert levels.deepest == levels.cancelled == DEPTH
        await round_trips(client, 3)


async def test_the_end_of_the_connection_ends_all() -> None:
    levels = Levels(hang)
    async with new_server() as server:
        async with new_client(server) as client:
            levels.register(server, client)
            call = asyncio.ensure_future(client.rpc.call("descend", {"depth": DEPTH}))
            await within(levels.arrived.wait())
        with pytest.raises(ConnectionError):
            await within(call)
        await until_none_runs(levels)
        assert levels.cancelled == DEPTH


@FROM_BOTH
async def test_deeper_than_there_are_slots_is_an_error_and_no_deadlock(starts: str) -> None:
    levels = Levels(hang)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        rpc = caller(starts, server, client)
        with pytest.raises(Overloaded, match="256 calls are in flight and the peer serves 256"):
            await within(rpc.call("descend", {"depth": SLOTS + 1}))
        assert levels.deepest == SLOTS and levels.running == levels.cancelled == 0
        # Exactly as deep as there are slots is possible; whoever is no handler waits in line.
        call = asyncio.ensure_future(rpc.call("descend", {"depth": SLOTS}))
        await within(levels.arrived.wait())
        waits = asyncio.ensure_future(client.rpc.call("add", {"a": 1, "b": 2}))
        await asyncio.sleep(0)
        assert not waits.done()
        call.cancel()
        assert await within(waits) == 3
        await until_none_runs(levels)
        assert levels.cancelled == SLOTS
        await round_trips(client, 3)


async def test_two_clients_by_way_of_the_server() -> None:
    """Ann calls Bob who calls Ann, and Bob calls Ann who calls Bob, all at the same time."""
    running = deepest = 0
    async with new_server() as server:
        ann, bob = new_client(server, name="ann"), new_client(server, name="bob")

        @server.rpc
        async def pass_on(connection: Connection, depth: int) -> list[str]:
            (other,) = (one for one in server.connections.values() if one is not connection)
            way: list[str] = await other.rpc.call("visit", {"depth": depth})
            return way

        def visited(client: Client, name: str) -> None:
            @client.rpc
            async def visit(depth: int) -> list[str]:
                nonlocal running, deepest
                running += 1
                deepest = max(deepest, running)
                try:
                    if depth == 1:
                        return [name]
                    return [name, *await client.rpc.call("pass_on", {"depth": depth - 1})]
                finally:
                    running -= 1

        visited(ann, "ann")
        visited(bob, "bob")
        async with ann, bob:
            for at_once in (1, 2):
                calls = [
                    client.rpc.call("pass_on", {"depth": DEPTH // 2})
                    for client in (ann, bob)
                    for _ in range(at_once)
                ]
                ways = await within(asyncio.gather(*calls))
                from_ann, from_bob = ["bob", "ann"] * 25, ["ann", "bob"] * 25
                assert ways == [from_ann] * at_once + [from_bob] * at_once
            assert deepest > DEPTH // 2, "they crossed"
            assert running == 0


@FROM_BOTH
async def test_a_stream_through_20_levels_and_to_leave_it_ends_them_all(starts: str) -> None:
    levels = Levels(hang)
    async with new_server() as server, new_client(server) as client:
        levels.register(server, client)
        rpc = caller(starts, server, client)
        got = []
        async with rpc.stream("relay", {"depth": 20}, items=int) as run:
            async for number in run:
                got.append(number)
                if number == 1000:
                    break
        assert got == list(range(1001))
        assert levels.deepest == 20
        await until_none_runs(levels)
        await round_trips(client, 3)


@FROM_BOTH
async def test_types_and_errors_are_the_same_from_both_sides(starts: str) -> None:
    async def extend(stay: Stay, days: int = 1) -> Stay:
        until = stay.until.replace(day=stay.until.day + days)
        return Stay(guest=stay.guest, until=until)

    async def give_up() -> None:
        raise asyncio.CancelledError

    async with new_server() as server, new_client(server) as client:
        for side in (server, client):
            side.rpc(extend)
            side.rpc(give_up)
        rpc = caller(starts, server, client)
        noon = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
        stay = Stay(guest="Ada", until=noon)
        longer = await within(rpc.call("extend", {"stay": stay, "days": 2}, returns=Stay))
        assert longer == Stay(guest="Ada", until=noon.replace(day=3))
        with pytest.raises(InvalidParams) as caught:
            await within(rpc.call("extend", {"stay": {"guest": "Ada", "until": "soon"}}))
        assert [error["path"] for error in caught.value.errors] == ["stay.until"]
        with pytest.raises(MethodNotFound, match="extend"):
            await within(rpc.call("extent"))
        with pytest.raises(CallCancelled):
            await within(rpc.call("give_up"))
