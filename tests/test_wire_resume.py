"""Resume between the library and the implementations made from docs/protocol.md alone.

First wire_client against wire_server; then each of them against the library.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import conduit
from conduit.protocol.events import Resumed, ResumeWanted
from tests.acceptance.support import until, within
from tests.golden_frames import GOLDEN, PASSWORD, VERIFIER
from tests.protocol.pair import feed, make_client, make_server, written
from tests.test_wire import library_client, serving, wire_serving
from tests.wire_client import (
    AUTH_REQUEST,
    CLOSE,
    RPC_REQUEST,
    SEQUENCED,
    Closed,
    WireClient,
    frame,
    pack,
)
from tests.wire_server import ServerEnd, WireServer

RESUME = {"feat": ["resume"]}
ADDRESS = "127.0.0.1"
KEEPS = 30


# wire_client against wire_server


def test_a_session_goes_on() -> None:
    def script(end: ServerEnd) -> None:
        end.step()
        end.send("news", 1)
        assert end.next_link()
        end.send("news", 2)
        assert end.next_link()
        end.serve()

    with WireServer(script=script, ttl=KEEPS, calls={"add": sum}) as server:
        client = WireClient(ADDRESS, server.port, RESUME).login(PASSWORD)
        client.send("note", 1)
        client.send("note", 2)  # which the server does not read any more
        for _ in range(2):
            with client.sock, pytest.raises(Closed):
                while True:
                    client.step()
            assert client.resume(ADDRESS, server.port, PASSWORD)
        assert [client.receive() for _ in range(2)] == [("news", 1), ("news", 2)]
        assert client.call("add", [1, 2]) == 3
        client.ping()
        assert not client.outbox
        client.close()
    assert server.messages == [("note", 1), ("note", 2)]


# Golden frames


def test_the_library_takes_the_golden_frames_of_a_resume() -> None:
    request, success = GOLDEN["resume_request"], GOLDEN["resume_success"]
    server = make_server(anonymous=True)
    (wanted,) = feed(server, request.raw)
    assert isinstance(wanted, ResumeWanted)
    asked: Any = request.value
    assert {"id": wanted.id, "epoch": wanted.epoch, "recv": wanted.accepted} == asked["session"]
    session = server.session
    session.id, session.epoch, session.received = wanted.id, wanted.epoch, wanted.accepted
    client = make_client(user=None, session=session)
    written(client)
    assert feed(client, success.raw) == [Resumed(success.value["session"]["recv"])]  # type: ignore[index]


# wire_client against conduit.Server


def ask_for(client: WireClient, **changed: Any) -> dict[str, Any]:
    """Return the session of a client as it would ask for it, changed."""
    session = client.success["session"]
    return {"id": session["id"], "epoch": session["epoch"], "recv": client.received, **changed}


async def in_thread(server: conduit.Server, work: Callable[[str, int], None]) -> None:
    host, port = server.address[:2]
    await within(asyncio.to_thread(work, host, port))


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "still open"])
@pytest.mark.parametrize("password", [PASSWORD, None], ids=["password", "anonymous"])
async def test_server_goes_on_with_a_session(cut: bool, password: str | None) -> None:
    """Calls and messages of both sides, of which some left, half left, or never did."""

    def work(host: str, port: int) -> None:
        client = WireClient(host, port, RESUME).login(password)
        assert client.success["session"]["ttl"] == KEEPS
        for _ in range(3):
            ids = [client.open_id() for _ in range(3)]
            client.post(RPC_REQUEST, ids[0], ["add", [1, ids[0]]])
            client.send("push", 5)
            half = frame(
                RPC_REQUEST, SEQUENCED, ids[1], pack(["add", [2, ids[1]]]), client.sent + 1
            )
            client.write(half[:40])
            nowhere, kept = socket.socketpair()
            with client.sock as old, nowhere, kept:
                if cut:
                    old.close()
                client.sock = nowhere
                client.post(RPC_REQUEST, ids[1], ["add", [2, ids[1]]])
                client.post(RPC_REQUEST, ids[2], ["zeros", [100_000]])
                assert client.resume(host, port, password)
                assert client.success["session"]["ttl"] == KEEPS
                if not cut:
                    while old.recv(65536):
                        pass  # the server has closed it
            assert client.wait_answer(ids[0])[0] == 1 + ids[0]
            assert client.wait_answer(ids[1])[0] == 2 + ids[1]
            assert client.wait_answer(ids[2])[0] == bytes(100_000)
            assert [client.receive() for _ in range(5)] == [("item", n) for n in range(5)]
        client.ping()
        assert not client.outbox
        client.close()

    async with serving(resume_ttl=KEEPS, verifier=VERIFIER if password else None) as server:
        await in_thread(server, work)


@pytest.mark.parametrize(
    "changed", [{"id": bytes(16)}, {"epoch": bytes(8)}], ids=["another id", "another epoch"]
)
async def test_server_starts_anew_when_it_has_no_such_session(changed: dict[str, Any]) -> None:
    def work(host: str, port: int) -> None:
        with WireClient(host, port, RESUME).login(PASSWORD) as first:
            with WireClient(host, port, RESUME) as second:
                second.login(PASSWORD, session=ask_for(first, **changed))
                session = second.success["session"]
                assert (session["resumed"], session["recv"]) == (False, 0)
                assert session["id"] != first.success["session"]["id"]
                assert second.call("add", [1, 2]) == 3
                assert first.call("add", [1, 2]) == 3

    async with serving() as server:
        await in_thread(server, work)


async def test_server_keeps_no_session_of_a_client_that_does_not_come_back() -> None:
    def work(host: str, port: int) -> None:
        client = WireClient(host, port).login(PASSWORD)
        assert client.success["session"]["ttl"] == 0
        client.sock.close()
        assert not client.resume(host, port, PASSWORD)
        client.close()

    async with serving() as server:
        await in_thread(server, work)


async def test_server_ends_a_session_whose_client_has_what_was_never_sent() -> None:
    def work(host: str, port: int) -> None:
        client = WireClient(host, port, RESUME).login(PASSWORD)
        client.received = 1
        with client.sock, pytest.raises(Closed) as closed:
            assert client.resume(host, port, PASSWORD)
            client.step()
        client.sock.close()
        assert closed.value.code == 1002

    async with serving() as server:
        await in_thread(server, work)
        await until(lambda: not server.connections)


async def test_server_that_stops_keeps_no_session() -> None:
    """GOAWAY: a session that loses its link now is over."""
    stopping = threading.Event()

    def work(host: str, port: int) -> None:
        client = WireClient(host, port, RESUME).login(PASSWORD)
        client.post(RPC_REQUEST, client.open_id(), ["sleep", {}])
        while client.goaway is None:
            client.step()
        client.sock.close()
        stopping.set()

    async with serving() as server:
        working = asyncio.ensure_future(in_thread(server, work))
        await until(lambda: any(one.running for one in server.connections.values()))
        await within(server.stop(grace=20))
        await working
        assert stopping.is_set()


# conduit.Client against wire_server


async def test_client_goes_on_with_its_session() -> None:
    """Its calls are answered over another link than they were made, each of them once."""
    cuts = 4
    taken: list[int] = []

    def add(params: Any) -> int:
        taken.append(params[1])
        return sum(params)

    def script(end: ServerEnd) -> None:
        for number in range(cuts):
            for _ in range(5):
                end.step()
            end.send("news", number)  # it may leave, or not
            assert end.next_link()
        end.serve()

    heard: asyncio.Queue[int] = asyncio.Queue()
    async with wire_serving(script=script, ttl=KEEPS, calls={"add": add}) as server:
        client = library_client(server, reconnect_enabled=True, reconnect_delay=0.001)

        @client.on("news")
        async def news(message: int) -> None:
            heard.put_nowait(message)

        async with client:
            calls = [client.rpc.call("add", [1, number]) for number in range(60)]
            assert await within(asyncio.gather(*calls)) == [1 + number for number in range(60)]
            assert [await within(heard.get()) for _ in range(cuts)] == list(range(cuts))
            assert client.connection.id == server.end.session["id"].hex()
    assert taken == list(range(60))
    logins = [got.value["session"] for got in server.frames if got.type == AUTH_REQUEST]
    assert logins[0] is None and len(logins) == cuts + 1
    told = [login["recv"] for login in logins[1:]]
    assert told == sorted(told)
    numbers = [got.seq for got in server.frames if got.seq]
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1))


async def test_client_ends_a_session_that_the_server_has_not_kept() -> None:
    def script(end: ServerEnd) -> None:
        while end.read_frame().type != RPC_REQUEST:
            pass
        end.session = {"id": b"another session.", "epoch": b"epoch 02"}
        end.sent = end.received = 0
        assert not end.next_link()
        end.serve()

    async with wire_serving(script=script, ttl=KEEPS, calls={"one": len}) as server:
        client = library_client(server, reconnect_enabled=True, reconnect_delay=0.001)
        async with client:
            with pytest.raises(conduit.ConnectionLost) as lost:
                await within(client.rpc.call("slow"))
            assert lost.value.executed is None
            assert await within(client.rpc.call("one", [1])) == 1


async def test_client_ends_a_session_of_which_the_server_has_what_was_never_sent() -> None:
    closed: queue.Queue[int] = queue.Queue()

    def script(end: ServerEnd) -> None:
        while end.read_frame().type != RPC_REQUEST:
            pass
        end.received = 1000
        assert end.next_link()
        while (got := end.read_frame()).type != CLOSE:
            pass
        closed.put(got.value[0])

    async with wire_serving(script=script, ttl=KEEPS) as server:
        client = library_client(server, reconnect_enabled=True, reconnect_delay=0.001)
        told: list[str] = []

        @client.on_reconnect
        async def again(client: conduit.Client) -> None:
            told.append("reconnect")

        @client.on_lost
        async def lost(client: conduit.Client, reason: conduit.ConnectionClosed) -> None:
            told.append("lost")

        async with client:
            with pytest.raises(conduit.ConnectionLost):
                await within(client.rpc.call("slow"))
            assert await within(asyncio.to_thread(closed.get, True, 5)) == 1002
            await until(lambda: told)
    assert told == ["lost"]


async def test_client_whose_login_is_done_at_the_last_moment_goes_on() -> None:
    """The answer has come, and so has the end of the time for it: it counts, and once."""
    loop = asyncio.get_running_loop()
    asleep = threading.Event()
    seconds = 0.3

    def sleep() -> None:
        asleep.set()
        time.sleep(seconds + 0.05)

    def script(end: ServerEnd) -> None:
        while end.read_frame().type != RPC_REQUEST:
            pass
        end.sock.close()
        end.sock, end.buffer = end.server.accept(), b""
        end.asked = end.read_frame().value
        # While the client's loop stands still the answer comes, and its time is up.
        loop.call_soon_threadsafe(sleep)
        asleep.wait(5)
        end.answer("", "anonymous", caps=pack({}))
        end.serve()

    options: dict[str, Any] = {"password": None, "ttl": KEEPS, "calls": {"one": len}}
    async with wire_serving(script=script, **options) as server:
        client = library_client(
            server,
            password=None,
            reconnect_enabled=True,
            reconnect_delay=0.001,
            connect_timeout=seconds,
        )
        told: list[str] = []

        @client.on_resume
        async def resumed(client: conduit.Client) -> None:
            told.append("resume")

        async with client:
            assert await within(client.rpc.call("one", [1], timeout=3)) == 1
            await until(lambda: told == ["resume"])
    assert sum(got.type == AUTH_REQUEST for got in server.frames) == 2
