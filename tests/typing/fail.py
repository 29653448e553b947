"""Mistakes of callers and implementers: mypy --strict and pyright see each that is marked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Protocol

from conduit import Client, Connection, Server, StreamCall, User, blocking, options


class Calculator(Protocol):
    async def add(self, a: int, b: int = 0) -> int: ...

    def count(self, to: int) -> AsyncIterator[int]: ...

    async def declared_wrongly(self) -> AsyncIterator[int]: ...

    async def total(self, numbers: AsyncIterator[int]) -> float: ...

    def train(self, rounds: int) -> StreamCall[int, str]: ...


class Store(ABC):
    @abstractmethod
    async def read(self, key: str) -> bytes: ...

    @abstractmethod
    def keys(self) -> AsyncIterator[str]: ...


class Player:
    score: int = 0


def greet(player: Connection[Player]) -> None: ...


def remember(typed: Connection[Player], plain: Connection) -> None:
    typed.state.scores += 1  # expect: no such attribute
    typed.state["score"] = 1  # expect: a Player is no dict
    plain.state.score += 1  # expect: a dict has no such attribute
    greet(typed)
    greet(plain)  # expect: a dict is no Player


async def words() -> AsyncIterator[str]:
    yield "word"


async def call(client: Client) -> None:
    calculator = client.rpc.bind(Calculator)
    await calculator.add("1")  # expect: the type of an argument
    await calculator.add()  # expect: an argument is missing
    await calculator.add(1, 2, 3)  # expect: one argument too many
    await calculator.add(1, c=2)  # expect: no such parameter
    await calculator.subtract(1, 2)  # expect: no such method
    text: str = await calculator.add(1, 2)  # expect: the type of the result
    text.upper()
    await calculator.count(3)  # expect: a stream is not awaited
    async for number in calculator.count("3"):  # expect: the type of an argument
        number.upper()  # expect: the type of an item
    async for _ in calculator.declared_wrongly():  # expect: a coroutine of a stream
        pass
    await calculator.total([1, 2, 3])  # expect: a list is data and no stream
    await calculator.total(words())  # expect: the type of the items
    async with calculator.train(3) as run:
        (await run.result()).hex()  # expect: the type of the result


async def call_with_options(client: Client) -> None:
    calculator = client.rpc.bind(Calculator)
    options(calculator, timeout="2")  # expect: seconds are a number
    options(calculator, colour="1")  # expect: no such option
    options(calculator, key=1)  # expect: a key is text
    options(calculator, retry=3)  # expect: how often is not all that there is to say
    await options(calculator, timeout=2).add("1")  # expect: options change no type


async def bind(client: Client) -> None:
    client.rpc.bind(5)  # expect: no class
    store: Store = client.rpc.bind(Calculator)  # expect: another interface
    await store.read("key")


async def ask(client: Client, connection: Connection, threads: blocking.Client) -> None:
    (await client.request("turn", returns=int)).upper()  # expect: the type of the answer
    (await connection.request("turn", returns=int)).upper()  # expect: the type of the answer
    threads.request("turn", returns=int).upper()  # expect: the type of the answer


class Memory(Store):
    async def read(self, key: int) -> bytes:  # expect: another type than the interface has
        return bytes(key)


def with_roles(server: Server, client: Client) -> None:
    server.rpc(requires=5)  # expect: a role is text
    client.rpc(requires="admin")  # expect: servers have users, clients have not
    User(verifier=5)  # expect: a verifier is text


def serve(server: Server) -> None:
    server.serve(Store, Memory())  # expect: keys() is missing
    server.serve(Store)  # expect: nobody implements it
    server.serve("Store", object())  # expect: no class


def hooks(server: Server, client: Client, threads: blocking.Client) -> None:
    def nothing() -> None: ...

    def number(count: int) -> None: ...

    def one(connection: Connection) -> None: ...

    server.on_startup(nothing)  # expect: it is given the server
    server.on_client_connect(number)  # expect: it is given the connection
    server.on_client_disconnect(one)  # expect: it is given the reason as well
    client.on_connect(number)  # expect: it is given the client
    client.on_lost(nothing)  # expect: it is given the client and the reason
    threads.on_reconnect(number)  # expect: it is given the client
