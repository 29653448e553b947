"""Streams as their users see them: public names, real sockets, both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

import conduit
from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    InvalidParams,
    Limits,
    Response,
    RPCTimeout,
    Server,
    Stream,
    StreamCall,
    Unavailable,
)
from tests.acceptance.support import FAST_LOGIN, new_client, new_server, round_trips, within


class Progress(BaseModel):
    step: int
    of: int


class Model(BaseModel):
    weights: list[float]


class Endless:
    """Items without end, and whether they were closed."""

    def __init__(self) -> None:
        self.given = 0
        self.closed = asyncio.Event()

    async def items(self) -> AsyncIterator[int]:
        try:
            while True:
                self.given += 1
                yield self.given
        finally:
            self.closed.set()


def register(side: Server | Client) -> Endless:
    """Register methods of each kind; server and client do it in the same way."""
    endless = Endless()

    @side.rpc
    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @side.rpc
    async def train(steps: int, stream: Stream[Progress]) -> Model:
        for step in range(steps):
            await stream.send(Progress(step=step, of=steps))
        return Model(weights=[0.5] * steps)

    @side.rpc
    async def total(numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    @side.rpc
    async def running_total(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        so_far = 0
        async for number in numbers:
            so_far += number
            yield so_far

    @side.rpc
    async def forever() -> AsyncIterator[int]:
        items = endless.items()
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    @side.rpc
    async def greet(name: str) -> str:
        return f"Hello, {name}"

    return endless


@pytest.fixture(params=["client to server", "server to client"])
async def caller(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, Endless]]:
    """Yield who calls, a client or the server's connection to one, and the other side's items."""
    async with new_server() as server, new_client(server) as client:
        if request.param == "client to server":
            yield client, register(server)
        else:
            yield server.connections[client.connection.id], register(client)
        await round_trips(client, 3)


async def numbers(to: int) -> AsyncIterator[int]:
    for number in range(to):
        if number % 100 == 0:
            await asyncio.sleep(0)
        yield number


async def all_of(call: StreamCall[Any, Any]) -> list[Any]:
    return [item async for item in call]


async def test_each_kind_of_call(caller: tuple[Any, Endless]) -> None:
    rpc = caller[0].rpc
    async with rpc.stream("count", {"to": 10_000}, items=int) as run:
        assert await within(all_of(run)) == list(range(10_000))
        assert await run.result() is None

    async with rpc.stream("train", args={"steps": 3}, items=Progress, returns=Model) as run:
        assert await within(all_of(run)) == [Progress(step=step, of=3) for step in range(3)]
        assert await within(run.result()) == Model(weights=[0.5] * 3)

    assert await within(rpc.stream("total", {"numbers": numbers(1000)}).result()) == 499_500
    assert await within(rpc.stream("total", [iter(range(1000))]).result()) == 499_500

    got = await within(all_of(rpc.stream("running_total", {"numbers": numbers(1000)})))
    assert (len(got), got[-1]) == (1000, 499_500)

    assert await within(rpc.stream("greet", {"name": "Ada"}, returns=str).result()) == "Hello, Ada"
    with pytest.raises(InvalidParams, match=r"call it by rpc.stream\('count', ...\)"):
        await within(rpc.count(to=1))


async def test_leaving_early(caller: tuple[Any, Endless]) -> None:
    connection, endless = caller
    async with connection.rpc.stream("forever") as run:
        async for item in run:
            if item == 1000:
                break
    await within(endless.closed.wait())


async def test_a_conversation_item_by_item(caller: tuple[Any, Endless]) -> None:
    """Each side answers what the other has just said, so nothing may be held back."""
    connection, _ = caller
    questions: asyncio.Queue[int | None] = asyncio.Queue()

    async def asked() -> AsyncIterator[int]:
        while (number := await questions.get()) is not None:
            yield number

    async with connection.rpc.stream("running_total", {"numbers": asked()}) as run:
        answers = run.__aiter__()
        total = 0
        for number in range(50):
            total += number
            questions.put_nowait(number)
            assert await within(answers.__anext__()) == total
        questions.put_nowait(None)
        assert await within(run.result()) is None


async def test_a_slow_consumer_keeps_its_producer_back(caller: tuple[Any, Endless]) -> None:
    connection, endless = caller
    ahead = taken = 0
    async with connection.rpc.stream("forever") as run:
        async for item in run:
            taken += 1
            assert item == taken
            if taken % 500 == 0:
                await within(connection.rpc.greet(name="Ada"))  # others are served meanwhile
                ahead = max(ahead, endless.given - taken)
            if taken == 50_000:
                break
    assert 0 < ahead <= 4096 + 512


@pytest.mark.parametrize(
    ("limits", "most"),
    [({"max_stream_items": 32}, 32), ({"max_stream_bytes": 100}, 100)],
)
async def test_limits_of_the_receiving_side(limits: dict[str, int], most: int) -> None:
    async with new_server() as server:
        endless = register(server)
        own = Limits(min_iterations=FAST_LOGIN.min_iterations, **limits)
        async with new_client(server, limits=own) as client:
            async with client.rpc.stream("forever") as run:
                items = run.__aiter__()
                for number in range(1, 200):
                    assert await within(items.__anext__()) == number
                    await round_trips(client, 1)
                    assert endless.given - number <= most + 1
                given = endless.given
                await round_trips(client, 50)
                assert endless.given == given

    async with new_server(limits=Limits(**limits)) as server:
        register(server)
        async with new_client(server) as client:
            total = client.rpc.stream("total", {"numbers": numbers(1000)})
            assert await within(total.result()) == 499_500


async def test_the_server_goes_away() -> None:
    server = new_server()
    endless = register(server)
    async with server:
        client = new_client(server, reconnect_enabled=False)
        await client.connect()
        run = client.rpc.stream("forever")
        with pytest.raises((ConnectionLost, Unavailable)):
            async with run:
                async for item in run:
                    if item == 10:
                        stopping = asyncio.ensure_future(server.stop(0.01))
        await within(endless.closed.wait())
        await within(stopping)
        with pytest.raises(ConnectionClosed):
            await client.rpc.stream("forever").result()
        await client.disconnect()


async def test_the_client_goes_away() -> None:
    async with new_server() as server:
        endless = register(server)
        client = new_client(server)
        await client.connect()
        run = client.rpc.stream("forever")
        items = run.__aiter__()
        assert await within(items.__anext__()) == 1
        await client.connection.abort()
        await within(endless.closed.wait())
        with pytest.raises(ConnectionLost):
            while True:
                await within(items.__anext__())
        await client.disconnect()


async def test_many_streams_beside_each_other() -> None:
    async with new_server() as server, new_client(server) as client:
        register(server)
        calls = [all_of(client.rpc.stream("count", [1000 + index])) for index in range(50)]
        calls += [all_of(client.rpc.stream("running_total", [numbers(500)])) for _ in range(50)]
        got = await within(asyncio.gather(*calls))
        assert [len(items) for items in got] == [*range(1000, 1050), *[500] * 50]


async def test_streams_within_streams() -> None:
    """A handler streams what its caller streams to it, by way of the caller itself."""
    async with new_server() as server:

        @server.rpc
        async def by_way_of_you(connection: Connection, to: int) -> AsyncIterator[int]:
            async with connection.rpc.stream("count", {"to": to}, items=int) as run:
                async for number in run:
                    yield 10 * number

        async with new_client(server) as client:
            register(client)
            got = await within(all_of(client.rpc.stream("by_way_of_you", {"to": 1000})))
            assert got == [10 * number for number in range(1000)]


async def test_a_file_of_chunks() -> None:
    """Large items: sent without a copy, one by one, and never many of them at a time."""
    chunk, count = bytes(256 * 1024), 40
    async with new_server() as server:
        held = most = 0

        @server.rpc
        async def store(chunks: AsyncIterator[bytes]) -> int:
            nonlocal held
            size = 0
            async for part in chunks:
                held -= 1
                size += len(part)
            return size

        def read() -> Iterator[bytes]:
            nonlocal held, most
            for _ in range(count):
                held += 1
                most = max(most, held)
                yield chunk

        async with new_client(server) as client:
            run = client.rpc.stream("store", {"chunks": read()}, returns=int)
            assert await within(run.result()) == count * len(chunk)
        assert most <= 4


async def test_deadlines_and_headers_and_wrong_types() -> None:
    async with new_server() as server, new_client(server, rpc_timeout=0.05) as client:
        register(server)

        @server.rpc
        async def patient(stream: Stream[str]) -> Response[str]:
            await stream.send("item")
            await asyncio.sleep(0.1)  # longer than plain calls may take
            return Response("value", {"age": 3})

        answer = await within(client.rpc.stream("patient", returns=Response).result())
        assert answer == Response("value", {"age": 3})
        with pytest.raises(RPCTimeout):
            await within(client.rpc.stream("patient", timeout=0.01).result())
        with pytest.raises(ValidationError):
            await within(all_of(client.rpc.stream("patient", items=int)))


async def test_discovery_tells_of_streams() -> None:
    async with new_server() as server, new_client(server) as client:
        register(server)
        found = {method["name"]: method for method in await client.rpc.discover()}
        assert {name: found[name]["streaming"] for name in found} == {
            "add": None,
            "count": "out",
            "train": "out",
            "total": "in",
            "running_total": "both",
            "forever": "out",
            "greet": None,
        }
        assert set(found["train"]["items"]["properties"]) == {"step", "of"}
        assert found["total"]["argument"] == {"name": "numbers", "items": {"type": "integer"}}


async def test_public_names() -> None:
    async with new_server() as server, new_client(server) as client:
        assert isinstance(client.rpc.stream("count"), conduit.StreamCall)
    with pytest.raises(ConnectionClosed, match="the client has disconnected"):
        await client.rpc.stream("count").result()
