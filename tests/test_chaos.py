"""Real sockets, and a link that does what networks do: everything arrives, or ends in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conduit import (
    TLS,
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    RPCError,
    RPCTimeout,
    Server,
    Status,
)
from conduit.protocol.frames import CloseCode
from tests.acceptance.support import (
    issue_certificate,
    neighbourhood,
    new_client,
    new_server,
    within,
)
from tests.chaos_proxy import ChaosProxy
from tests.transport.pair import until

LATE = 1.0
"""Seconds by which what has a deadline may miss it; what is right takes milliseconds."""
SHORT = 0.3
"""Seconds of a deadline that has to pass in a test."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A server's certificate for 127.0.0.1, and the authority that has signed it."""
    return issue_certificate(tmp_path_factory.mktemp("certificates"))


@dataclass
class Told:
    """What a server has heard."""

    notes: list[int] = field(default_factory=list)
    gone: list[ConnectionClosed] = field(default_factory=list)


def chatty_server(**fields: Any) -> tuple[Server, Told]:
    """Return a server with every kind of handler."""
    server = new_server(**fields)
    told = Told()

    @server.rpc
    async def echo(value: bytes) -> bytes:
        return value

    @server.rpc
    async def count(upto: int) -> AsyncIterator[int]:
        for number in range(upto):
            yield number

    @server.rpc
    async def total(numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    @server.rpc
    async def never() -> None:
        await asyncio.Event().wait()

    @server.on("note")
    async def note(connection: Connection, message: int) -> None:
        told.notes.append(message)

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: ConnectionClosed) -> None:
        told.gone.append(reason)

    return server, told


async def numbers(upto: int) -> AsyncIterator[int]:
    for number in range(upto):
        yield number


async def everything(client: Client, told: Told) -> None:
    """Do a bit of all that goes over a link, at the same time, and check every answer."""

    async def counted() -> list[int]:
        return [number async for number in client.rpc.stream("count", {"upto": 500})]

    async def totalled() -> Any:
        async with client.rpc.stream("total", {"numbers": numbers(300)}) as run:
            return await run.result()

    async def noted() -> None:
        for number in range(50):
            await client.send("note", number)

    value = bytes(range(256)) * 12
    results = await within(
        asyncio.gather(
            counted(),
            totalled(),
            noted(),
            client.rpc.call("echo", {"value": value}),
            *(client.rpc.call("add", {"a": number, "b": 1}) for number in range(30)),
        ),
    )
    assert results[0] == list(range(500))
    assert results[1] == sum(range(300))
    assert results[3] == value
    assert results[4:] == [number + 1 for number in range(30)]
    await within(client.rpc.call("add", {"a": 1, "b": 1}))  # behind the messages
    await until(lambda: len(told.notes) >= 50)
    assert told.notes == list(range(50))


def one_byte(proxy: ChaosProxy) -> None:
    proxy.up.slice = proxy.down.slice = 1


def far_away(proxy: ChaosProxy) -> None:
    for direction in (proxy.up, proxy.down):
        direction.latency, direction.jitter, direction.slice = 0.02, 0.02, 700


def slow(proxy: ChaosProxy) -> None:
    proxy.up.rate = proxy.down.rate = 60_000


@pytest.mark.parametrize("weather", [one_byte, far_away, slow])
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
async def test_everything_arrives_in_any_weather(
    weather: Callable[[ChaosProxy], None], tls: bool, certificate: tuple[Path, Path]
) -> None:
    server, told = chatty_server(tls=TLS(certificate=certificate[0]) if tls else None)
    async with server, ChaosProxy(*server.address) as proxy:
        weather(proxy)
        client = new_client(proxy.address, tls=TLS(ca=certificate[1]) if tls else None)
        async with client:
            await everything(client, told)
            assert not told.gone
        assert proxy.up.pieces > 10 and proxy.down.pieces > 10


# Links that say nothing any more.


@dataclass
class Line:
    """A client that is connected through a proxy, and what it was told about the link."""

    server: Server
    proxy: ChaosProxy
    client: Client
    told: Told
    lost: list[ConnectionClosed] = field(default_factory=list)
    again: asyncio.Event = field(default_factory=asyncio.Event)

    async def waiting(self, timeout: float | None = None) -> asyncio.Future[Any]:
        """Make a call that is never answered, and see to it that it runs."""
        (connection,) = self.server.connections.values()
        before = connection.running
        call = asyncio.ensure_future(self.client.rpc.call("never", timeout=timeout))
        await until(lambda: connection.running > before)
        return call

    async def works_again(self) -> None:
        """Wait until the client has connected again, and use the connection."""
        await within(self.again.wait())
        assert self.client.status is Status.READY
        assert await within(self.client.rpc.call("add", {"a": 1, "b": 2})) == 3


@contextlib.asynccontextmanager
async def line(
    *, heartbeat: tuple[float, float] = (30.0, 90.0), certificate: tuple[Path, Path] | None = None
) -> AsyncIterator[Line]:
    interval, timeout = heartbeat
    tls = None if certificate is None else TLS(certificate=certificate[0])
    trust = None if certificate is None else TLS(ca=certificate[1])
    server, told = chatty_server(
        heartbeat_interval=interval, heartbeat_timeout=timeout, tls=tls, resume_ttl=0
    )
    async with server, ChaosProxy(*server.address) as proxy:
        client = new_client(proxy.address, connect_timeout=0.5, reconnect_attempts=0, tls=trust)
        made = Line(server, proxy, client, told)

        @client.on_disconnect
        async def lost(client: Client, reason: ConnectionClosed) -> None:
            made.lost.append(reason)

        @client.on_reconnect
        async def again(client: Client) -> None:
            made.again.set()

        async with client:
            yield made


@pytest.mark.parametrize("ways", ["both", "up", "down"])
async def test_a_black_hole_is_found_by_the_heartbeat(ways: str) -> None:
    interval, timeout = 0.2, 0.8
    loop = asyncio.get_running_loop()
    async with line(heartbeat=(interval, timeout)) as held:
        call = await held.waiting()
        for name in ("up", "down") if ways == "both" else (ways,):
            getattr(held.proxy, name).hole = True
        started = loop.time()
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(call, timeout + interval + LATE)
        assert loop.time() - started >= timeout - interval
        await until(lambda: held.told.gone)
        # Whoever hears nothing says so; the other side may have been told by a reset since.
        codes = {reason.code for reason in (*held.lost, *held.told.gone)}
        assert CloseCode.HEARTBEAT_TIMEOUT in codes
        held.proxy.heal()
        await held.works_again()


async def test_a_call_into_a_black_hole_ends_by_its_deadline() -> None:
    loop = asyncio.get_running_loop()
    async with line() as held:
        running = await held.waiting(SHORT)
        held.proxy.up.hole = held.proxy.down.hole = True
        started = loop.time()
        with pytest.raises(RPCTimeout):
            await asyncio.wait_for(held.client.rpc.call("never", timeout=SHORT), SHORT + LATE)
        with pytest.raises(RPCTimeout):
            await asyncio.wait_for(running, SHORT + LATE)
        assert loop.time() - started < SHORT + LATE
        held.proxy.heal()
        assert await within(held.client.rpc.call("add", {"a": 1, "b": 2})) == 3
        assert not held.lost


async def test_a_hole_that_is_shorter_than_the_heartbeat_harms_nothing() -> None:
    async with line() as held:
        held.proxy.up.hole = held.proxy.down.hole = True
        calls = [
            asyncio.ensure_future(held.client.rpc.call("add", {"a": number, "b": 1}))
            for number in range(100)
        ]
        done, _ = await asyncio.wait(calls, timeout=SHORT)
        assert not done
        held.proxy.heal()
        assert await within(asyncio.gather(*calls)) == list(range(1, 101))
        assert not held.lost and not held.told.gone


# Links that end.


def cut(proxy: ChaosProxy) -> None:
    assert proxy.cut() == 1


def half_close_up(proxy: ChaosProxy) -> None:
    proxy.half_close(proxy.up)


def half_close_down(proxy: ChaosProxy) -> None:
    proxy.half_close(proxy.down)


@pytest.mark.parametrize("end", [cut, half_close_up, half_close_down])
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
async def test_calls_fail_at_once_when_the_link_ends_and_the_client_comes_again(
    end: Callable[[ChaosProxy], None], tls: bool, certificate: tuple[Path, Path]
) -> None:
    async with line(certificate=certificate if tls else None) as held:
        calls = [await held.waiting() for _ in range(3)]
        end(held.proxy)
        ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LATE)
        assert [type(one) for one in ended] == [ConnectionLost] * 3
        await held.works_again()
        await until(lambda: held.told.gone)
        assert [reason.code for reason in (*held.lost, *held.told.gone)] == [1006, 1006]


async def test_a_client_comes_again_when_it_is_admitted_again() -> None:
    async with line() as held:
        held.proxy.refuse()
        held.proxy.cut()
        await until(lambda: held.client.status is Status.RECONNECTING)
        with pytest.raises(ConnectionClosed):
            await held.client.rpc.call("add", {"a": 1, "b": 2})
        await held.proxy.admit()
        await held.works_again()


# Bytes that change on their way.


async def talk(client: Client) -> list[Any]:
    """Use a link for a while; each thing ends by its deadline, well or not."""

    async def counted() -> list[int]:
        run = client.rpc.stream("count", {"upto": 40}, timeout=SHORT)
        return [number async for number in run]

    return await asyncio.wait_for(
        asyncio.gather(
            *(client.rpc.call("add", {"a": 1, "b": 2}, timeout=SHORT) for _ in range(3)),
            client.rpc.call("echo", {"value": b"value" * 10}, timeout=SHORT),
            client.request("note", 1, timeout=SHORT),
            counted(),
            return_exceptions=True,
        ),
        SHORT + LATE,
    )


RIGHT = [3, 3, 3, b"value" * 10, None, list(range(40))]


async def corrupted(server: Server, upward: bool, place: int, **fields: Any) -> list[Any]:
    """Talk over a link of which one byte behind the login is changed; return what came of it."""
    async with ChaosProxy(*server.address, seed=place) as proxy:
        client = new_client(proxy.address, reconnect_enabled=False, **fields)
        async with client:
            assert await within(client.rpc.call("add", {"a": 1, "b": 2})) == 3
            direction = proxy.up if upward else proxy.down
            direction.corrupt_after = place
            results = await talk(client)
            if direction.corrupted and "tls" in fields:
                await asyncio.wait_for(client.wait_closed(), TLS_HEARTBEAT[1] + LATE)
            return results if direction.corrupted else []


async def corrupt_each(server: Server, upward: bool, step: int, **fields: Any) -> list[list[Any]]:
    """Change one byte of each of many links, some at a time, until a place is never reached."""
    found: list[list[Any]] = []
    for first in range(0, 10_000, 40 * step):
        places = range(first, first + 40 * step, step)
        ended = await asyncio.gather(
            *(corrupted(server, upward, place, **fields) for place in places)
        )
        found += [results for results in ended if results]
        if not ended[-1]:
            return found
    return found


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged with a traceback, or as an error."""
    return [
        f"{record.name}: {record.getMessage()} {record.exc_info}"
        for record in caplog.records
        if record.exc_info or record.levelno >= logging.ERROR
    ]


@pytest.mark.parametrize("upward", [True, False], ids=["up", "down"])
async def test_a_byte_that_is_changed_ends_in_an_error_or_a_wrong_value(
    upward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    server, _ = chatty_server()
    async with neighbourhood(server):
        found = await corrupt_each(server, upward, 3)
    assert len(found) > 50
    wrong = 0
    for results in found:
        for result, right in zip(results, RIGHT, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, (ConnectionClosed, RPCError)), results
            wrong += result != right
    assert wrong > len(found) // 2
    assert complaints(caplog) == []


TLS_HEARTBEAT = (0.25, 1.0)
"""Interval and timeout: a length that was changed to a larger one is only found by silence."""


@pytest.mark.parametrize("upward", [True, False], ids=["up", "down"])
async def test_under_tls_a_byte_that_is_changed_always_ends_the_link(
    upward: bool, certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    interval, timeout = TLS_HEARTBEAT
    server, _ = chatty_server(
        tls=TLS(certificate=certificate[0]),
        heartbeat_interval=interval,
        heartbeat_timeout=timeout,
    )
    async with server:
        found = await corrupt_each(server, upward, 17, tls=TLS(ca=certificate[1]))
    assert len(found) > 15
    for results in found:
        for result, right in zip(results, RIGHT, strict=True):
            assert result == right or isinstance(result, (ConnectionClosed, RPCTimeout)), results
    assert complaints(caplog) == []
