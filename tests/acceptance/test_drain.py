"""A server that stops: what runs ends there, what is new goes elsewhere, nobody hears an error."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import textwrap
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Limits,
    Retry,
    RPCTimeout,
    Status,
    Unavailable,
    client_life,
)
from tests.acceptance.raw import (
    GOAWAY,
    PASSWORD,
    TIMEOUT,
    VERIFIER,
    RawPeer,
    frame,
    listen,
    logged_in,
    pack,
)
from tests.acceptance.support import (
    FAST_LOGIN,
    Program,
    end_cleanly,
    free_port,
    new_client,
    new_server,
    until,
    within,
)


class Worker:
    """A server whose handlers wait until they may go on, and what has run on it.

    `ran` counts the numbers of calls, and `noted` those of messages.
    """

    def __init__(self, name: str, **fields: Any) -> None:
        self.server = new_server(name=name, **fields)
        self.name = name
        self.go = asyncio.Event()
        self.begun = 0
        self.ran: Counter[int] = Counter()
        self.noted: list[int] = []
        self.server.rpc(self.work)
        self.server.rpc(self.count)
        self.server.rpc(self.answer)
        self.server.on("note")(self.note)
        self.server.on("slow")(self.slow)

    async def work(self, number: int) -> list[Any]:
        self.begun += 1
        await self.go.wait()
        self.ran[number] += 1
        return [number, self.name]

    async def answer(self) -> str:
        return self.name

    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number
            if number == 0:
                self.begun += 1
                await self.go.wait()

    async def note(self, connection: Connection, number: int) -> str:
        self.noted.append(number)
        return self.name

    async def slow(self, connection: Connection, number: int) -> str:
        self.begun += 1
        await self.go.wait()
        return await self.note(connection, number)


def both(*workers: Worker, **fields: Any) -> Client:
    """Return a client that knows several servers."""
    urls = ["tcp://{}:{}".format(*one.server.address) for one in workers]
    known = {"password": PASSWORD, "limits": FAST_LOGIN, "reconnect_delay": 0.01}
    return Client(urls, **{**known, **fields})


class Story:
    """What the hooks of a client have told."""

    def __init__(self, client: Client) -> None:
        self.told: list[str] = []
        for name in ("disconnect", "lost"):
            getattr(client, f"on_{name}")(self.because(name))
        for name in ("connect", "resume", "reconnect"):
            getattr(client, f"on_{name}")(self.now(name))

    def because(self, name: str) -> Any:
        async def hook(client: Client, reason: ConnectionClosed) -> None:
            self.told.append(f"{name} {reason.code}")

        return hook

    def now(self, name: str) -> Any:
        async def hook(client: Client) -> None:
            self.told.append(name)

        return hook


@contextlib.asynccontextmanager
async def two() -> AsyncIterator[tuple[Worker, Worker, Client]]:
    """Run two servers, and a client of the first that knows both."""
    one, other = Worker("one"), Worker("other")
    async with one.server, other.server, both(one, other) as client:
        assert client.server_name == "one"
        yield one, other, client


def start(coroutine: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.ensure_future(coroutine)
    return task


async def gone_over(client: Client, name: str = "other") -> None:
    await until(lambda: client.status is Status.READY and client.server_name == name)


# Calls


async def test_none_of_a_thousand_calls_fails_and_each_runs_once() -> None:
    async with two() as (one, other, client):
        story = Story(client)
        other.go.set()
        calls = [start(client.rpc.call("work", [number])) for number in range(500)]
        await until(lambda: one.begun == 256)  # max_calls; the others wait in line
        stopping = start(one.server.stop(grace=TIMEOUT))
        calls += [start(client.rpc.call("work", [number])) for number in range(500, 1000)]
        await until(lambda: sum(other.ran.values()) == 1000 - 256)
        assert not stopping.done() and not any(call.done() for call in calls[:256])
        one.go.set()
        answers = await within(asyncio.gather(*calls))
        assert [number for number, _ in answers] == list(range(1000))
        assert Counter(name for _, name in answers) == {"one": 256, "other": 744}
        assert one.ran + other.ran == Counter(range(1000))
        await within(stopping)
        await within(client.rpc.call("add", [1, 2]))
        assert story.told == ["disconnect 1001", "reconnect"]


async def test_calls_that_cross_the_goodbye_are_made_again() -> None:
    for _ in range(5):
        async with two() as (one, other, client):
            one.go.set()
            other.go.set()
            calls = [start(client.rpc.call("work", [number])) for number in range(200)]
            stopping = start(one.server.stop(grace=0))
            calls += [start(client.rpc.call("work", [number])) for number in range(200, 400)]
            await asyncio.sleep(0)
            calls += [start(client.rpc.call("work", [number])) for number in range(400, 600)]
            answers = await within(asyncio.gather(*calls))
            assert [number for number, _ in answers] == list(range(600))
            assert one.ran + other.ran == Counter(range(600))
            await within(stopping)


async def test_all_the_ways_to_call_wait_for_the_next_server() -> None:
    one = Worker("one")
    await one.server.start()
    port = one.server.address[1]
    async with new_client(one.server) as client:
        connection = client.connection
        holds = start(client.rpc.call("work", [0]))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await until(lambda: client.status is Status.RECONNECTING)

        def ask() -> list[asyncio.Task[Any]]:
            return [
                start(client.rpc.call("work", [1], returns=list[Any])),
                start(client.rpc.work(number=2)),
                start(client.rpc.call("work", [3], retry=Retry(), key="k")),
                start(client.request("note", 4)),
                start(client.rpc.stream("count", {"to": 3}).result()),
                start(client.send("note", 5, ack=True)),
                start(client.send("note", 6)),
            ]

        asked = ask() + [start(connection.rpc.call("work", [7])), start(connection.send("note", 8))]
        one.go.set()
        assert await within(holds) == [0, "one"]
        await within(stopping)
        asked += ask()
        await asyncio.sleep(0)
        assert not any(task.done() for task in asked)
        next_one = Worker("next", port=port)
        next_one.go.set()
        async with next_one.server:
            answers = await within(asyncio.gather(*asked))
            expected = [[1, "next"], [2, "next"], [3, "next"], "next", None, None, None]
            assert answers == [*expected, [7, "next"], None, *expected]
            await until(lambda: sorted(next_one.noted) == [4, 4, 5, 5, 6, 6, 8])
            assert (sum(one.ran.values()), one.noted) == (1, [])


async def test_deadlines_go_on_while_a_call_waits_for_the_next_server() -> None:
    one = Worker("one")
    await one.server.start()
    async with new_client(one.server, reconnect_attempts=0) as client:
        await within(one.server.stop())
        await until(lambda: client.status is Status.RECONNECTING)
        for waiting in (
            client.rpc.call("work", [1], timeout=0.05),
            client.request("note", 1, timeout=0.05),
            client.rpc.stream("count", {"to": 3}, timeout=0.05).result(),
        ):
            with pytest.raises(RPCTimeout, match="connection to be made again") as caught:
                await within(waiting)
            assert caught.value.details == {"retryable": True, "executed": False}


async def test_who_waits_hears_that_there_will_be_no_other_server() -> None:
    one = Worker("one")
    await one.server.start()
    async with new_client(one.server, reconnect_attempts=2) as client:
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await until(lambda: client.status is Status.RECONNECTING)
        late = start(client.rpc.call("work", [2]))
        one.go.set()
        assert await within(call) == [1, "one"]
        await within(stopping)
        with pytest.raises(ConnectionClosed):
            await within(late)
        assert client.status is Status.CLOSED


async def test_attempts_do_not_count_while_the_server_still_ends_its_work() -> None:
    one = Worker("one")
    await one.server.start()
    port = one.server.address[1]
    async with new_client(one.server, reconnect_attempts=1, reconnect_delay=0.001) as client:
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await until(lambda: client.status is Status.RECONNECTING)
        late = start(client.rpc.call("work", [2]))
        await asyncio.sleep(0.1)  # time for many attempts, all in vain
        assert client.status is Status.RECONNECTING
        other = Worker("other", port=port)
        other.go.set()
        async with other.server:
            assert await within(late) == [2, "other"]
            one.go.set()
            assert await within(call) == [1, "one"]
            await within(stopping)


async def test_what_is_left_when_the_grace_is_over_is_cancelled_and_told() -> None:
    async with two() as (one, _, client):
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        await within(one.server.stop(grace=0.05))
        with pytest.raises(Unavailable, match="the server stops") as caught:
            await within(call)
        assert caught.value.details.get("executed") is not False
        await gone_over(client)


async def test_without_reconnect_the_client_stays_and_is_refused() -> None:
    one = Worker("one")
    async with one.server, new_client(one.server, reconnect_enabled=False) as client:
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        with pytest.raises(Unavailable, match="the server stops"):
            while True:
                await within(client.rpc.call("add", [1, 2]))
        one.go.set()
        assert await within(call) == [1, "one"]
        await within(stopping)


# Messages


async def test_messages_go_on_in_order_and_none_is_lost_or_handled_twice() -> None:
    async with two() as (one, other, client):
        sent = 0
        stopping = None
        while sent < 600 or client.server_name != "other":
            await within(client.send("note", sent))
            sent += 1
            if sent == 300:
                stopping = start(one.server.stop(grace=TIMEOUT))
        await until(lambda: len(one.noted) + len(other.noted) == sent)
        assert one.noted + other.noted == list(range(sent))
        assert one.noted and other.noted
        assert stopping is not None
        await within(stopping)


async def test_compressed_messages_are_sent_again() -> None:
    texts: list[str] = []
    fields = {"enable_compression": True}
    one, other = Worker("one", **fields), Worker("other", **fields)

    async def text(connection: Connection, text: str) -> None:
        texts.append(text)

    for worker in (one, other):
        worker.server.on("text")(text)
    async with one.server, other.server, both(one, other, **fields) as client:
        stopping = start(one.server.stop(grace=0))
        sent = [f"{number} " * 2000 for number in range(50)]
        for one_text in sent:
            await within(client.send("text", one_text))
        await until(lambda: len(texts) == 50)
        assert texts == sent
        await within(stopping)


async def test_requests_end_where_they_began() -> None:
    async with two() as (one, _, client):
        asked = start(client.request("slow", 1))
        acknowledged = start(client.send("note", 2, ack=True))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await gone_over(client)
        assert await within(client.request("note", 3)) == "other"
        one.go.set()
        assert await within(asked) == "one"
        await within(acknowledged)
        assert one.noted == [1, 2]
        await within(stopping)


# Streams


async def test_a_stream_that_moves_on_has_no_more_time_than_it_had() -> None:
    one = Worker("one", limits=Limits(**{**FAST_LOGIN.model_dump(), "max_calls": 1}))
    async with one.server, new_client(one.server) as client:
        holds = start(client.rpc.call("work", [0]))
        await until(lambda: one.begun)
        asyncio.get_running_loop().call_later(0.2, start, one.server.stop(grace=TIMEOUT))
        with pytest.raises(RPCTimeout) as caught:  # in line until the goodbye, and then elsewhere
            await within(client.rpc.stream("count", {"to": 3}, timeout=0.5).result())
        waited = re.search(r"waited ([0-9.]+) s for the connection", str(caught.value))
        assert waited is not None and float(waited[1]) < 0.4
        one.go.set()
        assert await within(holds) == [0, "one"]


async def test_what_was_not_handled_is_forgotten_by_who_disconnects() -> None:
    one = Worker("one")
    await one.server.start()
    client = new_client(one.server)
    await client.connect()
    holds = start(client.rpc.call("work", [0]))
    await until(lambda: one.begun)
    stopping = start(one.server.stop(grace=TIMEOUT))
    (connection,) = one.server.connections.values()
    while not connection._serving.draining:  # noqa: ASYNC110  # the client is not to read it yet
        await asyncio.sleep(0)
    await client.send("note", 1)  # crosses the goodbye
    await until(lambda: client.status is Status.RECONNECTING)
    await within(client.disconnect())
    with pytest.raises(ConnectionLost):
        await within(holds)
    await within(stopping)
    next_one = Worker("next", port=client.descriptor.addresses[0].port)
    async with next_one.server, client:
        await within(client.send("note", 2, ack=True))
    assert (one.noted, next_one.noted) == ([], [2])


async def test_streams_that_are_open_go_on() -> None:
    async with two() as (one, other, client):
        other.go.set()
        run = client.rpc.stream("count", {"to": 5}, items=int)
        async with run:
            got = [await within(anext(run))]
            await until(lambda: one.begun)
            stopping = start(one.server.stop(grace=TIMEOUT))
            await gone_over(client)
            assert [number async for number in client.rpc.stream("count", {"to": 2})] == [0, 1]
            one.go.set()
            got += [number async for number in run]
        assert got == [0, 1, 2, 3, 4]
        await within(stopping)


# Connections


async def test_the_story_that_the_hooks_tell_of_a_server_that_comes_back() -> None:
    one = Worker("one")
    await one.server.start()
    port = one.server.address[1]
    async with new_client(one.server, reconnect_attempts=0) as client:
        story = Story(client)
        await within(one.server.stop())
        await until(lambda: len(story.told) == 2)
        async with Worker("next", port=port).server:
            await until(lambda: len(story.told) == 3)
            assert story.told == ["disconnect 1001", "lost 1001", "reconnect"]


async def test_a_server_that_breaks_off_its_goodbye_is_a_loss() -> None:
    async with two() as (one, _, client):
        story = Story(client)
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        leaving = client.connection
        stopping = start(one.server.stop(grace=TIMEOUT))
        await gone_over(client)
        leaving._link.abort()  # type: ignore[union-attr]  # as when the process is killed
        with pytest.raises(ConnectionLost) as caught:
            await within(call)
        assert caught.value.executed is None
        await until(lambda: len(story.told) == 3)
        assert story.told == ["disconnect 1001", "reconnect", "lost 1006"]
        assert not leaving.away
        one.go.set()
        await within(stopping)


async def test_a_client_disconnects_from_both_servers() -> None:
    async with two() as (one, other, client):
        story = Story(client)
        call = start(client.rpc.call("work", [1]))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await until(lambda: story.told == ["disconnect 1001", "reconnect"])
        await within(client.disconnect())
        with pytest.raises(ConnectionClosed):
            await within(call)
        await until(lambda: not one.server.connections and not other.server.connections)
        await within(stopping)
        assert story.told == ["disconnect 1001", "reconnect", "disconnect 1000"]


async def test_a_second_server_stops_while_the_first_still_does() -> None:
    one, other, third = Worker("one"), Worker("other"), Worker("third")
    third.go.set()
    async with (
        one.server,
        other.server,
        third.server,
        both(one, other, third) as client,
    ):
        calls = [start(client.rpc.call("work", [1]))]
        await until(lambda: one.begun)
        stopping = [start(one.server.stop(grace=TIMEOUT))]
        await gone_over(client)
        calls.append(start(client.rpc.call("work", [2])))
        await until(lambda: other.begun)
        stopping.append(start(other.server.stop(grace=TIMEOUT)))
        await gone_over(client, "third")
        calls.append(start(client.rpc.call("work", [3])))
        one.go.set()
        other.go.set()
        answers = await within(asyncio.gather(*calls))
        assert answers == [[1, "one"], [2, "other"], [3, "third"]]
        await within(asyncio.gather(*stopping))


async def test_who_connects_while_the_server_stops_finds_another() -> None:
    one, other = Worker("one"), Worker("other")
    letting, let = asyncio.Event(), asyncio.Event()

    async with one.server, other.server, both(one) as first:
        call = start(first.rpc.call("work", [1]))
        await until(lambda: one.begun)

        @one.server.on_client_connect
        async def slowly(connection: Connection) -> None:
            letting.set()
            await let.wait()

        client = both(one, other)
        connecting = start(client.connect())
        await within(letting.wait())
        stopping = start(one.server.stop(grace=TIMEOUT))
        await within(connecting)  # it was refused in the middle of its login
        assert client.server_name == "other"
        later = both(one, other)
        await within(later.connect())
        assert later.server_name == "other"
        let.set()
        one.go.set()
        assert await within(call) == [1, "one"]
        await within(stopping)
        await within(asyncio.gather(client.disconnect(), later.disconnect()))


class Counts(Protocol):
    """An interface, which a client holds against its server before it is connected."""

    def count(self, to: int) -> AsyncIterator[int]: ...


@pytest.mark.parametrize("busy", [True, False], ids=["still works", "closes"])
async def test_a_goodbye_before_the_client_is_connected_is_one_all_the_same(busy: bool) -> None:
    one, other = Worker("one"), Worker("other")
    await one.server.start()
    async with other.server:
        first = both(one, other)
        await within(first.connect())
        call = start(first.rpc.call("work", [1])) if busy else None
        await until(lambda: one.begun or not busy)
        client = both(one, other)
        counts = client.rpc.bind(Counts)

        async def stop() -> None:
            await until(lambda: len(one.server.connections) == 2)
            await one.server.stop(grace=TIMEOUT)

        stopping = start(stop())
        await within(client.connect())
        assert await within(client.rpc.call("answer", [])) == "other"
        one.go.set()
        other.go.set()
        assert [number async for number in counts.count(2)] == [0, 1]
        if call is not None:
            assert await within(call) == [1, "one"]
        await within(stopping)
        assert client.server_name == "other"
        await within(asyncio.gather(client.disconnect(), first.disconnect()))


async def test_the_server_calls_its_client_until_the_end() -> None:
    async with two() as (one, other, client):

        @client.rpc
        async def whoami() -> str:
            return "the client"

        @one.server.rpc
        async def ask(connection: Connection) -> str:
            one.begun += 1
            await one.go.wait()
            return await connection.rpc.call("whoami", returns=str)

        call = start(client.rpc.call("ask"))
        await until(lambda: one.begun)
        stopping = start(one.server.stop(grace=TIMEOUT))
        await gone_over(client)
        one.go.set()
        assert await within(call) == "the client"
        await within(stopping)


@pytest.mark.parametrize(
    "body", [[], {}, [1001, "x", 5], [1001, "x", 5, -1], [1001, 5, 5, 5], ["x", "x", 5, 5], 7]
)
async def test_a_goodbye_that_cannot_be_read_closes(body: Any) -> None:
    server = new_server()
    async with server, logged_in(server.address) as peer:
        peer.write(frame(GOAWAY, 0, pack(body)))
        closed = await peer.closed()
        assert closed is not None and closed[0] == 4400


async def test_a_client_that_says_goodbye_is_served_all_the_same() -> None:
    server = new_server()
    async with server, logged_in(server.address) as peer:
        peer.write(frame(GOAWAY, 0, pack([1001, "so long", 5, 5])))
        assert await peer.call("add", [1, 2]) == 3


async def test_a_server_that_says_goodbye_again_and_again_is_not_held_on_to() -> None:
    links, logins, connected = set[RawPeer](), 0, asyncio.Event()
    most = client_life.MOST_LEFT

    async def goes_away(peer: RawPeer) -> None:
        nonlocal logins
        await peer.accept_login()
        links.add(peer)
        logins += 1
        await connected.wait()
        # the last one stays, so that no login is under way when the client disconnects
        if logins < most + 10:
            peer.write(frame(GOAWAY, 0, pack([1001, "so long", 5, 0])))
        await peer.closed(timeout=60)
        links.discard(peer)

    async with listen(goes_away) as address:
        async with new_client(address, reconnect_delay=0.001):
            connected.set()
            for count in range(most, most + 10):
                await until(lambda: logins > count)  # noqa: B023  # awaited here
                await until(lambda: len(links) <= most + 2)


# Signals

PROGRAM = """
    import asyncio, sys
    from conduit import Server

    server = Server(host="127.0.0.1", port={port}, verifier="{verifier}", name="{name}")

    @server.rpc
    async def work(number: int) -> list:
        await asyncio.sleep(0.3)
        return [number, server.name]

    @server.rpc
    async def hang() -> None:
        print("hangs", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            print("cancelled", flush=True)

    asyncio.run(server.run(grace=20))
"""


def program(folder: Path, name: str) -> tuple[Program, int]:
    port = free_port()
    text = textwrap.dedent(PROGRAM).format(port=port, verifier=VERIFIER, name=name)
    (folder / f"{name}.py").write_text(text, encoding="ascii")
    return Program(f"{name}.py", cwd=folder), port


async def test_sigterm_with_a_thousand_calls_in_flight(tmp_path: Path) -> None:
    (one, port), (other, other_port) = program(tmp_path, "one"), program(tmp_path, "other")
    with one, other:
        for running, number in ((one, port), (other, other_port)):
            await asyncio.to_thread(running.wait_for_port, "127.0.0.1", number)
        urls = [f"tcp://127.0.0.1:{number}" for number in (port, other_port)]
        limits = FAST_LOGIN
        async with Client(urls, password=PASSWORD, limits=limits, reconnect_delay=0.01) as client:
            calls = [start(client.rpc.call("work", [number])) for number in range(500)]
            await asyncio.sleep(0.1)  # into the middle of the first 256
            one.signal(signal.SIGTERM)
            calls += [start(client.rpc.call("work", [number])) for number in range(500, 1000)]
            answers = await within(asyncio.gather(*calls), 30)
            assert [number for number, _ in answers] == list(range(1000))
            assert {name for _, name in answers} == {"one", "other"}
            assert await asyncio.to_thread(one.finish) == 0
            assert "Traceback" not in one.error_output
        await asyncio.to_thread(end_cleanly, other, signal.SIGTERM)


@pytest.mark.parametrize("numbers", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM")])
async def test_a_second_signal_ends_at_once(numbers: tuple[str, str], tmp_path: Path) -> None:
    first, second = (signal.Signals[name] for name in numbers)
    server, port = program(tmp_path, "one")
    with server:
        await asyncio.to_thread(server.wait_for_port, "127.0.0.1", port)
        fields: dict[str, Any] = {"reconnect_enabled": False}
        async with new_client(("127.0.0.1", port), **fields) as client:
            call = start(client.rpc.call("hang"))
            await asyncio.to_thread(server.wait_for, "hangs")
            server.signal(first)
            with pytest.raises(Unavailable):
                while True:
                    await within(client.rpc.call("work", [1]))
            assert not call.done()
            server.signal(second)
            with pytest.raises(Unavailable, match="the server stops"):
                await within(call, 5)
            await within(client.wait_closed(), 5)
            assert await asyncio.to_thread(server.finish, 5) == 0
            assert "cancelled" in server.output
            assert "Traceback" not in server.error_output
