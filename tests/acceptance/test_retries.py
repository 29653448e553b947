"""Calls that are made again: with real servers and clients, from either side."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    MethodNotFound,
    Overloaded,
    Retry,
    RPCError,
    RPCTimeout,
    Server,
    Status,
    Unavailable,
    blocking,
    from_thread,
    idempotent,
    options,
)
from tests.acceptance.support import Program, end_cleanly, new_client, new_server, within

FAST = Retry(pause=0.001)
SURE = Retry(pause=0.001, idempotent=True)


@contextlib.asynccontextmanager
async def running(server: Server, **fields: Any) -> AsyncIterator[Client]:
    """Run a server and one client of it."""
    async with server, new_client(server, **fields) as client:
        yield client


class Desk:
    """A server whose methods fail as often as they were told to, and note when they did their work.

    `lose` cuts the connection off in the middle of the call.
    """

    def __init__(self, **fields: Any) -> None:
        self.server = new_server(**fields)
        self.errors: list[Exception] = []
        self.called: list[float] = []
        self.done = 0
        self.losses = 0
        self.server.rpc(self.work)
        self.server.rpc(self.lose)

    async def work(self) -> int:
        self.called.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)
        self.done += 1
        return self.done

    async def lose(self, connection: Connection) -> int:
        self.done += 1
        if self.losses:
            self.losses -= 1
            await connection.close(4000, "cut off")
        return self.done


# Answers


async def test_a_handler_that_is_overloaded_twice_runs_once() -> None:
    desk = Desk()
    desk.errors = [Overloaded(), Overloaded()]
    async with running(desk.server) as client:
        assert await within(client.rpc.call("work", retry=FAST)) == 1
        assert (len(desk.called), desk.done) == (3, 1)


async def test_a_call_that_may_have_run_is_made_again_only_if_it_may_be() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        for error in (Unavailable("no database"), RPCError("later", details={"retryable": True})):
            desk.errors = [error]
            with pytest.raises(type(error)):
                await within(client.rpc.call("work", retry=FAST))
            desk.errors = [error]
            assert await within(client.rpc.call("work", retry=SURE)) == desk.done
        assert (len(desk.called), desk.done) == (6, 2)


async def test_what_will_not_pass_is_asked_for_once() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        desk.errors = [RPCError("sold out")]
        with pytest.raises(RPCError, match="sold out"):
            await within(client.rpc.call("work", retry=SURE))
        with pytest.raises(MethodNotFound):
            await within(client.rpc.call("walk", retry=SURE))
        assert len(desk.called) == 1


async def test_the_peer_says_how_long_to_wait() -> None:
    desk = Desk()
    desk.errors = [Overloaded(details={"retry_after": 150})]
    async with running(desk.server) as client:
        await within(client.rpc.call("work", retry=FAST))
        first, second = desk.called
        assert second - first >= 0.15 - 0.002  # uvloop's clock counts milliseconds


async def test_a_pause_that_is_longer_than_the_deadline_is_not_made() -> None:
    desk = Desk()
    desk.errors = [Overloaded("come back later", details={"retry_after": 60_000})]
    async with running(desk.server) as client:
        with pytest.raises(Overloaded, match="come back later"):
            await within(client.rpc.call("work", retry=SURE, timeout=50), 5)
        assert len(desk.called) == 1


async def test_all_attempts_share_one_deadline() -> None:
    server = new_server()
    called = 0

    @server.rpc
    async def slow() -> None:
        nonlocal called
        called += 1
        if called < 3:
            raise Overloaded()
        await asyncio.Event().wait()

    async with running(server) as client:
        begin = asyncio.get_running_loop().time()
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("slow", retry=Retry(pause=0, attempts=9), timeout=1))
        assert called == 3  # the time is up, and so it is not made again
        assert asyncio.get_running_loop().time() - begin >= 1 - 0.01


async def test_a_call_is_cancelled_in_its_pause() -> None:
    desk = Desk()
    desk.errors = [Overloaded(details={"retry_after": 20_000})]
    async with running(desk.server) as client:
        call = asyncio.ensure_future(client.rpc.call("work", retry=FAST))
        while not desk.called:  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await within(call)
        assert await within(client.rpc.call("work")) == 1
        assert len(desk.called) == 2


async def test_a_server_in_trouble_is_left_alone() -> None:
    desk = Desk()
    desk.errors = [Overloaded() for _ in range(1000)]
    async with running(desk.server) as client:
        for _ in range(100):
            with pytest.raises(Overloaded):
                await within(client.rpc.call("work", retry=FAST))
        assert len(desk.called) == 103


async def test_a_server_calls_its_client_again() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        answers = [Overloaded(), Overloaded()]

        @client.rpc
        async def ask() -> int:
            if answers:
                raise answers.pop()
            return 42

        (connection,) = desk.server.connections.values()
        assert await within(connection.rpc.call("ask", retry=FAST)) == 42
        await within(client.disconnect())
        await within(connection.wait_closed())
        with pytest.raises(ConnectionClosed):  # and does not wait for a client that is another one
            await within(connection.rpc.call("ask", retry=SURE, timeout=None))


async def test_a_handler_has_no_more_time_for_all_attempts_than_it_has_itself() -> None:
    server = new_server()
    calls = 0

    async with running(server) as client:

        @client.rpc
        async def busy() -> None:
            nonlocal calls
            calls += 1
            raise Overloaded(details={"retry_after": 10_000})

        @server.rpc
        async def relay(connection: Connection) -> str:
            try:
                await connection.rpc.call("busy", retry=SURE, timeout=None)
            except Overloaded:
                return "it did not wait"
            return "it did"

        assert await within(client.rpc.call("relay", timeout=5)) == "it did not wait"
        assert calls == 1


# Lost connections


async def test_a_lost_call_is_made_again_after_the_reconnect_if_it_is_idempotent() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        desk.losses = 1
        with pytest.raises(ConnectionLost):
            await within(client.rpc.call("lose", retry=FAST))
        assert desk.done == 1
        assert await within(client.rpc.call("lose", retry=FAST)) == 2
        desk.losses = 2
        assert await within(client.rpc.call("lose", retry=SURE)) == 5


HANGS = """
import asyncio, sys
from conduit import Server

server = Server(host="127.0.0.1", port=int(sys.argv[1]))

@server.rpc
async def work(name: str) -> str:
    print("begins", name)
    await asyncio.Event().wait() if sys.argv[2] == "hangs" else None
    return name

@server.on_startup
async def started(server):
    print("port", server.address[1])

asyncio.run(server.run())
"""


@pytest.fixture
def programs() -> Iterator[contextlib.ExitStack]:
    """End the programs of a test."""
    with contextlib.ExitStack() as stack:
        yield stack


async def test_a_server_is_killed_in_the_middle_of_calls(
    tmp_path: Path, programs: contextlib.ExitStack
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS, "ascii")

    def run(*arguments: str) -> tuple[Program, int]:
        program = programs.enter_context(Program("hangs.py", *arguments, cwd=tmp_path))
        return program, int(program.wait_for(r"^port (\d+)$")[1])

    first, port = await asyncio.to_thread(run, "0", "hangs")
    client = new_client(("127.0.0.1", port), password=None, reconnect_attempts=0)
    await within(client.connect())
    one = asyncio.ensure_future(client.rpc.call("work", {"name": "one"}, retry=FAST))
    other = asyncio.ensure_future(client.rpc.call("work", {"name": "other"}, retry=SURE))
    for name in ("one", "other"):
        await asyncio.to_thread(first.wait_for, f"^begins {name}$")
    first.signal(signal.SIGKILL)
    second, _ = await asyncio.to_thread(run, str(port), "works")
    with pytest.raises(ConnectionLost, match="has not kept the session"):
        await within(one)
    assert await within(other) == "other"
    await within(client.disconnect())
    await asyncio.to_thread(end_cleanly, second, signal.SIGTERM)
    assert second.lines[1:] == ["begins other"]


class Losing(Protocol):
    async def lose(self) -> int: ...


class LosingTwice(Protocol):
    @idempotent
    async def lose(self) -> int: ...


async def test_an_interface_marks_what_is_idempotent() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        desk.losses = 1
        with pytest.raises(ConnectionLost):
            await within(options(client.rpc.bind(Losing), retry=FAST).lose())
        desk.losses = 1
        assert await within(options(client.rpc.bind(LosingTwice), retry=FAST).lose()) == 3


async def test_a_call_waits_for_the_server_to_come_back() -> None:
    desk = Desk()
    await desk.server.start()
    client = new_client(desk.server, reconnect_attempts=0)
    away = asyncio.Event()

    @client.on_disconnect
    async def gone(client: Client, reason: ConnectionClosed) -> None:
        away.set()

    await within(client.connect())
    port = desk.server.address[1]
    await within(desk.server.stop())
    await within(away.wait())
    assert client.status is Status.RECONNECTING
    calls = [asyncio.ensure_future(client.rpc.call("work", retry=FAST)) for _ in range(50)]
    given_up = asyncio.ensure_future(client.rpc.call("work", retry=FAST))
    with pytest.raises(RPCTimeout, match="connection to be made again"):
        await within(client.rpc.call("work", retry=FAST, timeout=0.05))
    given_up.cancel()
    assert not any(call.done() for call in calls)

    desk = Desk(port=port)
    await desk.server.start()
    assert sorted(await within(asyncio.gather(*calls))) == list(range(1, 51))
    with pytest.raises(asyncio.CancelledError):
        await given_up
    await within(client.disconnect())
    await within(desk.server.stop())


async def test_a_call_comes_back_when_the_server_has_stopped_and_another_is_there() -> None:
    desk = Desk()
    held = asyncio.Event()

    @desk.server.rpc
    async def hold() -> None:
        held.set()
        await asyncio.Event().wait()

    await desk.server.start()
    port = desk.server.address[1]
    client = new_client(desk.server, reconnect_attempts=0)
    await within(client.connect())
    stays = new_client(desk.server, reconnect_enabled=False)
    await within(stays.connect())
    holding = asyncio.ensure_future(stays.rpc.call("hold"))
    await within(held.wait())
    stopping = asyncio.ensure_future(desk.server.stop(grace=0.4))
    with pytest.raises(Unavailable) as caught:
        while True:
            await within(stays.rpc.call("work"))
    assert caught.value.retry_after is not None and 0.1 <= caught.value.retry_after <= 0.5
    before = len(desk.called)
    call = asyncio.ensure_future(client.rpc.call("work", retry=FAST))
    with pytest.raises(Unavailable):
        await within(holding)
    await within(stopping)
    assert len(desk.called) == before and not call.done()

    desk = Desk(port=port)
    await desk.server.start()
    assert await within(call) == 1
    await within(client.disconnect())
    await within(stays.disconnect())
    await within(desk.server.stop())


async def test_whoever_waits_for_a_connection_hears_that_there_will_be_none() -> None:
    desk = Desk()
    await desk.server.start()
    client = new_client(desk.server, reconnect_attempts=0)
    with pytest.raises(ConnectionClosed, match="await client.connect"):
        await within(client.rpc.call("work", retry=SURE, timeout=None))
    away = asyncio.Event()

    @client.on_disconnect
    async def gone(client: Client, reason: ConnectionClosed) -> None:
        away.set()

    await within(client.connect())
    await within(desk.server.stop())
    await within(away.wait())
    call = asyncio.ensure_future(client.rpc.call("work", retry=SURE, timeout=None))
    await asyncio.sleep(0)
    assert not call.done()
    await within(client.disconnect())
    with pytest.raises(ConnectionClosed, match="the client has disconnected"):
        await within(call)

    await desk.server.start()
    client = new_client(desk.server, reconnect_enabled=False)
    await within(client.connect())
    desk.losses = 1
    with pytest.raises(ConnectionLost):
        await within(client.rpc.call("lose", retry=SURE, timeout=None))
    await within(client.disconnect())
    await within(desk.server.stop())


async def test_a_hook_that_the_reconnect_waits_for_waits_in_vain() -> None:
    desk = Desk()
    async with running(desk.server) as client:
        heard: asyncio.Queue[Exception] = asyncio.Queue()

        @client.on_disconnect
        async def ask(client: Client, reason: ConnectionClosed) -> None:
            try:
                await client.rpc.call("work", retry=SURE, timeout=0.02)
            except ConnectionClosed as exc:
                heard.put_nowait(exc)

        desk.losses = 1
        assert await within(client.rpc.call("lose", retry=SURE)) == 2
        assert "is being made again" in str(heard.get_nowait())
        assert desk.called == []


async def test_the_blocking_client_does_the_same() -> None:
    desk = Desk()
    desk.errors = [Overloaded()]
    desk.losses = 1

    def script(client: blocking.Client) -> list[int]:
        with client:
            work = client.rpc.call("work", retry=FAST, returns=int)
            return [work, client.rpc.call("lose", retry=SURE)]

    async with desk.server:
        descriptor = new_client(desk.server).descriptor
        assert await within(asyncio.to_thread(script, blocking.Client(descriptor))) == [1, 3]
        assert len(desk.called) == 2


# What an error says, and of which call


async def test_a_handler_is_not_taken_for_one_that_did_not_run_because_its_own_call_did_not() -> (
    None
):
    """Or a caller that trusts `executed` would have done twice what the handler did before."""
    server = new_server()
    done: list[str] = []

    async def refuse() -> None:
        raise Overloaded("too much")

    async def ask(connection: Connection) -> None:
        await connection.rpc.call("busy")

    @server.rpc
    async def itself() -> None:
        await refuse()

    @server.rpc
    async def relays(connection: Connection) -> None:
        done.append("relays")
        await ask(connection)

    @server.rpc
    async def gathers(connection: Connection) -> None:
        done.append("gathers")
        await asyncio.gather(ask(connection), ask(connection))

    @server.rpc
    def in_a_thread(connection: Connection) -> None:
        done.append("in_a_thread")
        from_thread.run(connection.rpc.call, "busy")

    @server.rpc
    async def absent() -> None:
        done.append("absent")
        await server.peer("nobody")

    async with running(server) as client:
        client.rpc("busy")(refuse)
        for method in ("itself", "relays", "gathers", "in_a_thread", "absent"):
            with pytest.raises((Overloaded, Unavailable)) as caught:
                await within(client.rpc.call(method, retry=FAST))
            assert caught.value.retryable
            assert caught.value.details["executed"] is (method != "itself")
        assert done == ["relays", "gathers", "in_a_thread", "absent"]


class Busy(Protocol):
    async def work(self) -> int: ...


async def test_a_server_that_only_passes_calls_on_says_what_it_was_told() -> None:
    desk, hub = Desk(), new_server()
    desk.errors = [Overloaded()]
    async with running(desk.server) as inner:
        hub.serve(Busy, inner.rpc.bind(Busy))
        async with running(hub) as client:
            assert await within(client.rpc.call("work", retry=FAST)) == 1
            assert len(desk.called) == 2
