"""What people write against typed clients; neither mypy --strict nor pyright may complain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from typing_extensions import assert_type

from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    Context,
    Response,
    Retry,
    Server,
    ServerDescriptor,
    Stream,
    StreamCall,
    User,
    blocking,
    idempotent,
    options,
)


@dataclass
class Progress:
    done: int


class Calculator(Protocol):
    async def add(self, a: int, b: int = 0) -> int: ...

    async def cached(self, key: str) -> Response[str]: ...

    def count(self, to: int) -> AsyncIterator[int]: ...

    async def total(self, numbers: AsyncIterator[int], *, digits: int = 2) -> float: ...

    def translate(self, words: AsyncIterator[str]) -> AsyncIterator[str]: ...

    def train(self, rounds: int) -> StreamCall[Progress, str]: ...


class Store(ABC):
    @abstractmethod
    @idempotent
    async def read(self, key: str) -> bytes | None: ...

    @abstractmethod
    def keys(self) -> AsyncIterator[str]: ...


class Memory(Store):
    """An implementation is an interface as well."""

    async def read(self, key: str) -> bytes | None:
        return key.encode() or None

    async def keys(self) -> AsyncIterator[str]:
        yield "a"


T = TypeVar("T")


class Crud(Protocol[T]):
    async def get(self, id: int) -> T: ...

    async def put(self, item: T) -> None: ...


class Counts(Crud[int], Protocol): ...


class CountsService:
    async def get(self, id: int) -> int:
        return id

    async def put(self, item: int) -> None: ...


class CalculatorService:
    async def add(self, a: int, b: int = 0) -> int:
        return a + b

    async def cached(self, key: str, connection: Connection) -> Response[str]:
        return Response(key, {"from": connection.name})

    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    async def total(self, numbers: AsyncIterator[int], *, digits: int = 2) -> float:
        return round(float(sum([number async for number in numbers])), digits)

    async def translate(self, words: AsyncIterator[str]) -> AsyncIterator[str]:
        async for word in words:
            yield word.upper()

    async def train(self, rounds: int, stream: Stream[Progress]) -> str:
        for done in range(rounds):
            await stream.send(Progress(done))
        return "the model"


async def numbers() -> AsyncIterator[int]:
    yield 1


async def words() -> AsyncIterator[str]:
    yield "word"


class Player:
    """What a game remembers of a peer."""

    score: int = 0


def remember(server: Server, plain: Connection) -> None:
    assert_type(plain.state, dict[str, Any])

    @server.on_client_connect
    def came(connection: Connection[Player]) -> None:
        connection.state = Player()

    @server.rpc
    async def win(points: int, connection: Connection[Player]) -> int:
        connection.state.score += points
        assert_type(connection.state, Player)
        return connection.state.score


def greet(player: Connection[Player]) -> int:
    return player.state.score


def tell(plain: Connection) -> None:
    plain.state["told"] = True


async def find(server: Server, client: Client, threads: blocking.Client, context: Context) -> None:
    """A connection that the library gives is one of whatever the application says."""
    found = await server.peer("ann")
    for connection in (*server.connections.values(), found, context.connection):
        assert_type(connection, Connection[Any])
        greet(connection)
        tell(connection)
        await server.broadcast("joined", exclude=connection)
    greet(client.connection)
    greet(threads.connection)
    player: Connection[Player] = context.connection
    await server.broadcast("joined", exclude=player)
    await server.broadcast("joined", exclude=[player, found.id])


def serve(server: Server, client: Client) -> None:
    server.serve(Calculator, CalculatorService())
    client.serve(Calculator, CalculatorService())
    server.serve(Store, Memory())
    server.serve(Memory, Memory())
    server.serve(Counts, CountsService())


async def look_up(name: str) -> User | str | None:
    known: dict[str, User | str] = {"ann": User(verifier="...", roles=("admin",)), "bob": "..."}
    return known.get(name)


async def look_up_verifier(name: str) -> str | None:
    return None


def with_roles(server: Server, verifiers: dict[str, str]) -> None:
    ServerDescriptor(users=look_up)
    ServerDescriptor(users=look_up_verifier)
    ServerDescriptor(users=verifiers)
    ServerDescriptor(users={"ann": User(certificate=True, roles="admin"), "bob": "..."})

    @server.rpc(requires="admin")
    async def restart(connection: Connection) -> bool:
        return "admin" in assert_type(connection.roles, frozenset[str])

    @server.on("shut", requires=["admin", "staff"])
    async def shut(connection: Connection, message: object) -> None: ...

    server.serve(Calculator, CalculatorService(), requires={"staff"})


async def call(client: Client, connection: Connection) -> None:
    assert_type(await client.rpc.bind(Counts).get(3), int)
    calculator = client.rpc.bind(Calculator)
    assert_type(calculator, Calculator)
    assert_type(connection.rpc.bind(Calculator), Calculator)
    assert_type(await calculator.add(1, b=2), int)
    assert_type(await calculator.add(1), int)
    assert_type((await calculator.cached("key")).value, str)
    async for number in calculator.count(3):
        assert_type(number, int)
    assert_type(await anext(calculator.count(3)), int)
    assert_type(await calculator.total(numbers(), digits=1), float)
    async for word in calculator.translate(words()):
        assert_type(word, str)
    async with calculator.train(3) as run:
        async for progress in run:
            assert_type(progress, Progress)
        assert_type(await run.result(), str)

    quick = options(calculator, timeout=2)
    assert_type(quick, Calculator)
    assert_type(await options(quick, timeout=None).add(1), int)
    assert_type(await options(quick, retry=Retry(attempts=5)).add(1), int)
    assert_type(await options(quick, key="order 5").add(1), int)
    assert_type(options(quick, retry=None, timeout=2), Calculator)
    assert_type(await client.rpc.call("add", [1, 2], returns=int, retry=Retry()), int)
    assert_type(await client.rpc.call("cached", returns=Response[int]), Response[int])

    store = client.rpc.bind(Store)
    assert_type(store, Store)
    assert_type(await store.read("key"), bytes | None)
    assert_type([key async for key in store.keys()], list[str])
    assert_type(client.rpc.bind(Memory), Memory)


async def ask(client: Client, connection: Connection, threads: blocking.Client) -> None:
    """What `returns=` says is what comes; without it, it is anything."""
    assert_type(await client.request("turn", 5, returns=Progress, timeout=2), Progress)
    assert_type(await connection.request("turn", returns=int), int)
    assert_type(threads.request("turn", 5, returns=str), str)
    assert_type(await client.request("turn", returns=list[int]), list[int])
    some: int | None = await client.request("turn", returns=int | None)
    assert some is None
    assert_type(await client.request("turn", {"by": 5}), Any)
    assert_type(await connection.request("turn", returns=None), Any)
    assert_type(threads.request("turn"), Any)


class Desk:
    """Calls by way of an interface, so it can be given anything that has its methods."""

    def __init__(self, calculator: Calculator) -> None:
        self.calculator = calculator

    async def three(self) -> int:
        return await self.calculator.add(1, 2)


def desk(client: Client) -> Desk:
    return Desk(client.rpc.bind(Calculator))


def hooks(server: Server, client: Client, threads: blocking.Client) -> None:
    @server.on_startup
    def begun(server: Server) -> None: ...

    @server.on_client_disconnect()
    async def gone(connection: Connection[Player], reason: Exception, more: int = 0) -> None: ...

    @client.on_disconnect
    async def lost(*given: object) -> None: ...

    @client.on_connect
    def come(client: Client) -> object:
        return client.rpc.call("join")

    @threads.on_lost
    def over(client: blocking.Client, reason: ConnectionClosed) -> None: ...

    assert_type(over(threads, ConnectionClosed("")), None)
