"""Interfaces as their users see them: public names, real sockets, both directions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import pytest
from pydantic import BaseModel, ValidationError

from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Response,
    RPCTimeout,
    Server,
    Stream,
    StreamCall,
    options,
)
from tests.acceptance.support import new_client, new_server, round_trips, within


class Order(BaseModel):
    article: str
    pieces: int = 1


class Shop(Protocol):
    async def price(self, article: str, pieces: int = ..., *, currency: str = "EUR") -> float: ...

    async def order(self, order: Order) -> Order: ...

    async def cached(self) -> Response[Order]: ...

    async def whoami(self) -> str: ...

    async def slow(self) -> None: ...

    async def broken(self) -> int: ...

    def count(self, to: int) -> AsyncIterator[int]: ...

    def forever(self) -> StreamCall[int, None]: ...

    def pack(self, order: Order) -> StreamCall[Order, str]: ...

    async def total(self, orders: AsyncIterator[Order], start: int = 0) -> int: ...

    def running_total(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]: ...

    async def _internal(self) -> None: ...


class ShopService:
    """Implements `Shop` without knowing it, with annotations where it wants some."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def price(self, article, pieces=3, *, currency="USD"):
        return f"{len(article) * pieces}.5" if currency == "USD" else 0

    async def order(self, order: Order) -> Order:
        return order.model_copy(update={"pieces": order.pieces + 1})

    def cached(self) -> Response[Any]:
        return Response({"article": "nail"}, {"age": 3})

    async def whoami(self, connection: Connection) -> str:
        return connection.id

    async def slow(self) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            self.left.set()

    async def broken(self):
        return "no number"

    async def count(self, to):
        for number in range(to):
            yield str(number)

    async def forever(self):
        number = 0
        try:
            while True:
                yield number
                number += 1
        finally:
            self.left.set()

    async def pack(self, order: Order, stream: Stream[Any], connection: Connection) -> str:
        for _ in range(order.pieces):
            await stream.send({"article": order.article})
        return connection.id

    async def total(self, orders, start=100):
        return start + sum([order.pieces async for order in orders])

    async def running_total(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        so_far = 0
        async for number in numbers:
            so_far += number
            yield so_far

    async def _internal(self) -> None:
        raise AssertionError("it is not in the interface")


@pytest.fixture(params=["client to server", "server to client"])
async def peer(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, ShopService]]:
    """Yield who calls, a client or the server's connection to one, and who serves."""
    service = ShopService()
    async with new_server() as server, new_client(server) as client:
        if request.param == "client to server":
            server.serve(Shop, service)
            yield client, service
        else:
            client.serve(Shop, service)
            yield server.connections[client.connection.id], service
        await round_trips(client, 3)


async def orders() -> AsyncIterator[Order]:
    for pieces in range(3):
        await asyncio.sleep(0)
        yield Order(article="nail", pieces=pieces)


async def numbers(to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number


async def test_calls(peer: tuple[Any, ShopService]) -> None:
    shop = peer[0].rpc.bind(Shop)
    assert await within(shop.price("nail")) == 12.5  # both defaults are those of the service
    assert await within(shop.price("nail", 2, currency="EUR")) == 0.0
    assert await within(shop.order(Order(article="nut"))) == Order(article="nut", pieces=2)
    cached = Response(Order(article="nail"), {"age": 3})
    assert await within(shop.cached()) == cached
    assert await within(shop.whoami()) == getattr(peer[0], "connection", peer[0]).id
    with pytest.raises(InvalidParams, match="pieces"):
        await within(shop.price("nail", "many"))
    with pytest.raises(InternalError):
        await within(shop.broken())
    with pytest.raises(MethodNotFound):
        await within(peer[0].rpc.call("_internal"))


async def test_streams(peer: tuple[Any, ShopService]) -> None:
    connection, service = peer
    shop = connection.rpc.bind(Shop)
    assert await within(all_of(shop.count(1000))) == list(range(1000))
    async with shop.count(3) as run:
        assert await within(all_of(run)) == [0, 1, 2]
        assert await run.result() is None
    assert await within(anext(shop.count(3))) == 0

    async with shop.pack(Order(article="nail", pieces=2)) as run:
        assert await within(all_of(run)) == [Order(article="nail")] * 2
        assert await within(run.result()) == getattr(connection, "connection", connection).id

    assert await within(shop.total(orders())) == 103
    assert await within(shop.total(orders(), start=1)) == 4
    assert await within(all_of(shop.running_total(numbers(4)))) == [0, 1, 3, 6]

    async with shop.forever() as run:
        async for number in run:
            if number == 100:
                break
    await within(service.left.wait())


async def all_of(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_items_one_by_one(peer: tuple[Any, ShopService]) -> None:
    shop = peer[0].rpc.bind(Shop)
    run = shop.count(3)
    assert [await within(anext(run)) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(StopAsyncIteration):
            await within(anext(run))
    assert await within(anext(run, None)) is None
    assert await within(run.result()) is None

    run = shop.count(5)
    assert await within(anext(run)) == 0
    async for number in run:  # goes on where anext has stopped
        assert number == 1
        break
    assert await within(all_of(run)) == [2, 3, 4]


async def test_a_call_that_waits_for_one_item_is_given_up_when_it_is_cancelled() -> None:
    async with new_server() as server, new_client(server) as client:
        left = asyncio.Event()

        @server.rpc
        async def silent() -> AsyncIterator[int]:
            try:
                await asyncio.sleep(30)
                yield 1
            finally:
                left.set()

        run = client.rpc.stream("silent")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(run), 0.05)
        await within(left.wait())


async def test_cancelling_a_call_closes_its_items_and_the_handler() -> None:
    async with new_server() as server, new_client(server) as client:
        taken, left, closed = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Sink(Protocol):
            async def take(self, items: AsyncIterator[int]) -> None: ...

        class Service:
            async def take(self, items: Any) -> None:
                try:
                    async for _ in items:
                        taken.set()
                finally:
                    left.set()

        async def endless() -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0.001)
            finally:
                closed.set()

        server.serve(Sink, Service())
        call = asyncio.create_task(client.rpc.bind(Sink).take(endless()))
        await within(taken.wait())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(call)
        assert closed.is_set()
        await within(left.wait())


async def test_options(peer: tuple[Any, ShopService]) -> None:
    connection, service = peer
    shop = connection.rpc.bind(Shop)
    quick = options(shop, timeout=0.05)
    with pytest.raises(RPCTimeout):
        await within(quick.slow())
    await within(service.left.wait())
    with pytest.raises(RPCTimeout):
        await within(all_of(quick.forever()))
    assert await within(shop.price("nail")) == 12.5


async def test_a_bound_object_outlives_the_connection() -> None:
    async with new_server() as server:
        server.serve(Shop, ShopService())
        client = new_client(server)
        shop = client.rpc.bind(Shop)  # before there is a connection
        with pytest.raises(ConnectionClosed, match="not connected"):
            await shop.price("nail")
        for _ in range(2):
            async with client:
                assert await within(shop.price("nail")) == 12.5
                assert await within(all_of(shop.count(2))) == [0, 1]


async def test_either_half_alone() -> None:
    """What `bind` calls need not come from `serve`, and what `serve` has can be called plainly."""
    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def price(article: str, pieces: int = 1, *, currency: str = "EUR") -> str:
            return "7.5"

        @server.rpc
        async def count(to: int) -> AsyncIterator[str]:
            yield "no number"

        shop = client.rpc.bind(Shop)
        assert await within(shop.price("nail")) == 7.5
        with pytest.raises(ValidationError):
            await within(all_of(shop.count(1)))
        with pytest.raises(MethodNotFound):
            await within(shop.order(Order(article="nail")))
        with pytest.raises(ValueError, match="'price' has a handler already"):
            server.serve(Shop, ShopService())

    async with new_server() as server, new_client(server) as client:
        server.serve(Shop, ShopService())
        assert await within(client.rpc.price(article="nail")) == 12.5
        assert await within(client.rpc.call("price", ["nail", 1])) == 4.5
        assert await within(client.rpc.order(article="nail")) == {"article": "nail", "pieces": 2}
        found = {method["name"]: method["streaming"] for method in await client.rpc.discover()}
        assert found == {
            "add": None,
            "price": None,
            "order": None,
            "cached": None,
            "whoami": None,
            "slow": None,
            "broken": None,
            "count": "out",
            "forever": "out",
            "pack": "out",
            "total": "in",
            "running_total": "both",
        }


class Simple(Protocol):
    async def price(self, article: str, pieces: int = 3) -> float: ...

    def forever(self) -> StreamCall[int, None]: ...

    async def total(self, orders: AsyncIterator[Order], start: int = 0) -> int: ...

    def running_total(self, numbers: AsyncIterator[int]) -> AsyncIterator[int]: ...


async def test_a_server_may_pass_an_interface_on() -> None:
    """What `bind` makes implements the interface, so another server can serve it."""
    service = ShopService()
    async with new_server() as backend, new_server() as hub, new_client(backend) as behind:
        backend.serve(Shop, service)
        hub.serve(Simple, behind.rpc.bind(Simple))
        async with new_client(hub) as client:
            simple = client.rpc.bind(Simple)
            assert await within(simple.price("nail", 1)) == 4.5
            assert await within(simple.total(orders(), 7)) == 10
            assert await within(all_of(simple.running_total(numbers(4)))) == [0, 1, 3, 6]
            async with simple.forever() as run:
                assert await within(anext(run)) == 0
            await within(service.left.wait())


def test_a_stream_that_is_declared_async_is_refused_with_the_reason() -> None:
    class Wrong(Protocol):
        async def count(self, to: int) -> AsyncIterator[int]: ...

    for use in (
        lambda: Client("tcp://127.0.0.1:1").rpc.bind(Wrong),
        lambda: Server(host="127.0.0.1", port=0).serve(Wrong, ShopService()),
    ):
        with pytest.raises(TypeError, match=r"declare it `def count\(...\) -> AsyncIterator"):
            use()
