"""Interfaces are held against what a server offers: at connect, at reconnect, and later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any, Protocol

import pytest

from conduit import (
    Client,
    ConduitError,
    Connection,
    ConnectionClosed,
    InterfaceMismatch,
    Status,
)
from tests.acceptance.raw import PASSWORD
from tests.acceptance.support import FAST_LOGIN, new_client, new_server, within
from tests.wire_server import NO_ANSWER, WireServer


class Calculator(Protocol):
    async def add(self, a: int, b: int) -> int: ...


class Scientific(Calculator, Protocol):
    async def root(self, of: float) -> float: ...
    def count(self, to: int) -> AsyncIterator[int]: ...


MISSING = [
    "Scientific.root: the peer has no method 'root'",
    "Scientific.count: the peer has no method 'count'",
]


@pytest.fixture
def wire(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "conduit.wire")
    return caplog


def asked(wire: pytest.LogCaptureFixture) -> int:
    """Return how often somebody was asked what it offers."""
    return sum("> RPC_REQUEST" in text and "discover" in text for text in wire.messages)


class Errors(logging.Handler):
    """What is logged as an error, to be waited for."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._logged: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._logged.put_nowait(record.getMessage())

    async def next(self, count: int) -> list[str]:
        return [await within(self._logged.get()) for _ in range(count)]


@pytest.fixture
async def errors() -> AsyncIterator[Errors]:
    handler = Errors()
    logging.getLogger("conduit").addHandler(handler)
    yield handler
    logging.getLogger("conduit").removeHandler(handler)


@contextlib.asynccontextmanager
async def wire_serving(discover: Any = None) -> AsyncIterator[WireServer]:
    """Run a server that tells no fingerprint, and gives an answer of its own to `discover`."""
    calls = {} if discover is None else {"conduit.discover": discover}
    server = WireServer(PASSWORD, calls=calls).start()
    try:
        yield server
    finally:
        await asyncio.to_thread(server.join)


# At connect


async def test_what_fits_is_asked_for_once(wire: pytest.LogCaptureFixture) -> None:
    async with new_server() as server:
        client = new_client(server)
        calculator = client.rpc.bind(Calculator)
        for _ in range(3):
            async with client:
                assert await calculator.add(1, 2) == 3
        assert asked(wire) == 1

        @server.rpc
        async def more(a: int) -> None: ...

        async with client:
            assert await calculator.add(1, 2) == 3
        assert asked(wire) == 2


async def test_a_client_that_binds_nothing_asks_nothing(wire: pytest.LogCaptureFixture) -> None:
    async with new_server() as server, new_client(server) as client:
        assert await client.rpc.add(a=1, b=2) == 3
        client.rpc.bind(Scientific, check=False)
        assert await client.rpc.add(a=1, b=2) == 3
    assert asked(wire) == 0


@pytest.mark.parametrize("retry", [False, True])
async def test_what_does_not_fit_is_raised_and_named(retry: bool) -> None:
    gone: asyncio.Queue[Any] = asyncio.Queue()
    async with new_server() as server:

        @server.on_client_disconnect
        async def left(connection: Connection, reason: ConnectionClosed) -> None:
            gone.put_nowait(reason.code)

        client = new_client(server)
        told: list[str] = []
        client.on_connect(lambda client: told.append("connect"))
        client.on_disconnect(lambda client, reason: told.append("disconnect"))
        client.rpc.bind(Scientific)
        for _ in range(2):  # the second time the verdict is known
            with pytest.raises(InterfaceMismatch) as caught:
                await within(client.connect(retry=retry))
            assert caught.value.differences == MISSING
            assert str(caught.value) == f"'conduit-server' does not fit: {'; '.join(MISSING)}"
            assert isinstance(caught.value, ConduitError)
            assert client.status is Status.CLOSED
            assert await within(gone.get()) == 1000
            with pytest.raises(ConnectionClosed):
                await client.rpc.add(a=1, b=2)
        assert told == []


async def test_many_differences_are_counted() -> None:
    names = [f"method_{number}" for number in range(8)]

    async def method(self: Any) -> None: ...

    async with new_server() as server:
        client = new_client(server)
        client.rpc.bind(type("Many", (), dict.fromkeys(names, method)))
        with pytest.raises(InterfaceMismatch, match="; and 3 more$") as caught:
            await client.connect()
    assert len(caught.value.differences) == 8


# Later


async def test_what_is_bound_later_is_logged(errors: Errors) -> None:
    async with new_server() as server, new_client(server) as client:
        client.rpc.bind(Calculator)
        client.rpc.bind(Scientific)
        assert await errors.next(2) == [f"'conduit-server' does not fit: {one}" for one in MISSING]
        client.rpc.bind(Scientific)  # it is known
        assert await client.rpc.add(a=1, b=2) == 3
        assert client.status is Status.READY


async def test_what_is_bound_in_a_thread_is_logged(errors: Errors) -> None:
    async with new_server() as server, new_client(server) as client:
        await asyncio.to_thread(client.rpc.bind, Scientific)
        assert len(await errors.next(2)) == 2


async def test_a_server_that_has_changed_is_logged_and_kept(errors: Errors) -> None:
    again = asyncio.Event()
    first = new_server()

    @first.rpc
    async def root(of: float) -> float:
        return of

    @first.rpc
    async def count(to: int) -> AsyncIterator[int]:
        yield to

    await first.start()
    client = new_client(first)
    client.rpc.bind(Scientific)
    client.on_reconnect(lambda client: again.set())
    async with client:
        await first.stop()
        async with new_server(port=client.descriptor.addresses[0].port):
            await within(again.wait())
            assert await errors.next(2) == [
                f"'conduit-server' does not fit: {one}" for one in MISSING
            ]
            assert client.status is Status.READY
            assert await client.rpc.add(a=1, b=2) == 3


# Servers that do not tell


@pytest.mark.parametrize("fits", [True, False])
async def test_a_server_without_a_fingerprint_is_asked_each_time(
    fits: bool, wire: pytest.LogCaptureFixture
) -> None:
    offered = [{"name": "add"}] if fits else []
    async with wire_serving(lambda params: offered) as first, wire_serving(lambda _: []) as second:
        urls = [f"tcp://127.0.0.1:{server.port}" for server in (first, second)]
        client = Client(urls, password=PASSWORD, limits=FAST_LOGIN)
        client.rpc.bind(Calculator)
        with contextlib.nullcontext() if fits else pytest.raises(InterfaceMismatch):
            await client.connect()
        await client.disconnect()
        await asyncio.to_thread(first.join)  # it serves one connection
        with pytest.raises(InterfaceMismatch, match="no method 'add'"):
            await client.connect()
    assert asked(wire) == 2


async def test_a_server_without_discovery_is_taken_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with wire_serving() as server:
        client = new_client(("127.0.0.1", server.port))
        client.rpc.bind(Calculator)
        async with client:
            assert client.status is Status.READY
    assert "what 'wire-server' offers is not known" in caplog.text


class Silence:
    """An answer to `discover` that does not come."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, params: Any) -> Any:
        self._loop.call_soon_threadsafe(self.asked.set)
        return NO_ANSWER


async def test_a_server_that_does_not_answer_is_taken_as_it_is() -> None:
    async with wire_serving(Silence()) as server:
        client = new_client(("127.0.0.1", server.port), connect_timeout=0.5)
        client.rpc.bind(Calculator)
        async with client:
            assert client.status is Status.READY


@pytest.mark.parametrize("how", ["cancel", "disconnect", "loss"])
async def test_the_check_ends_with_the_attempt_to_connect(how: str) -> None:
    silence = Silence()
    async with wire_serving(silence) as server:
        client = new_client(("127.0.0.1", server.port), reconnect_enabled=False)
        client.rpc.bind(Calculator)
        connecting = asyncio.create_task(client.connect())
        await within(silence.asked.wait())
        if how == "cancel":
            connecting.cancel()
        elif how == "disconnect":
            await within(client.disconnect())
        else:
            server.end.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises((asyncio.CancelledError, ConnectionClosed)):
            await within(connecting)
        assert client.status is Status.CLOSED
    assert server.closed is not None
    assert server.closed[0] == (1006 if how == "loss" else 1000)


# By hand, on both sides


async def test_either_side_can_be_asked() -> None:
    async with new_server() as server:
        client = new_client(server)

        @client.rpc
        async def add(a: int) -> int:
            return a

        async with client:
            assert await client.rpc.differences(Calculator) == []
            assert await client.rpc.differences(Scientific) == MISSING
            (connection,) = server.connections.values()
            assert await connection.rpc.differences(Calculator) == [
                "Calculator.add: the peer knows no parameter 'b'"
            ]
            with pytest.raises(TypeError, match="an interface is a class"):
                await client.rpc.differences(5)  # type: ignore[arg-type]


async def test_a_fingerprint_identifies_what_a_peer_offers() -> None:
    async def fingerprints(*methods: Any) -> tuple[bytes, bytes]:
        server, client = new_server(), None
        async with server:
            client = new_client(server)
            for method in methods:
                client.rpc(method)
            async with client:
                (connection,) = server.connections.values()
                return connection.fingerprint, client.connection.fingerprint

    async def one(a: int) -> None: ...
    async def two(a: int) -> None: ...

    silent, of_server = await fingerprints()
    assert silent == b"" and len(of_server) == 8
    first, same = await fingerprints(one, two)
    assert same == of_server
    assert (await fingerprints(two, one))[0] == first
    assert (await fingerprints(one))[0] not in (first, b"")
