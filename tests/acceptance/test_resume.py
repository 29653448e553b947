"""What users see of a link that is lost: the session goes on, or all of it ends and they know."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from typing import Any

import pytest

from conduit import (
    Client,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Limits,
    RPCTimeout,
    Server,
    Status,
    Unavailable,
)
from conduit.protocol.cndt import CNDT
from tests.acceptance.raw import (
    AUTH_CHALLENGE,
    AUTH_RESPONSE,
    CAPS,
    CLOSE,
    MESSAGE,
    PING,
    VERIFIER,
    LoginRefused,
    RawPeer,
    Relay,
    dial,
    frame,
)
from tests.acceptance.support import new_client, new_server, until, within

Heard = asyncio.Queue[Any]


def hooked(client: Client) -> Heard:
    """Have what happens to a client told."""
    heard: Heard = asyncio.Queue()
    client.on_connect(lambda cli: heard.put_nowait("connect"))
    client.on_disconnect(lambda cli, reason: heard.put_nowait("disconnect"))
    client.on_resume(lambda cli: heard.put_nowait("resume"))
    client.on_lost(lambda cli, reason: heard.put_nowait("lost"))
    client.on_reconnect(lambda cli: heard.put_nowait("reconnect"))
    return heard


def watched(server: Server) -> Heard:
    """Have what happens to the clients of a server told."""
    heard: Heard = asyncio.Queue()
    server.on_client_connect(lambda connection: heard.put_nowait("connect"))
    server.on_client_away(lambda connection, reason: heard.put_nowait("away"))
    server.on_client_return(lambda connection: heard.put_nowait("return"))
    server.on_client_disconnect(lambda connection, reason: heard.put_nowait("disconnect"))
    return heard


async def told(heard: Heard, *what: str) -> None:
    """Wait until just these things have happened, in this order."""
    for expected in what:
        assert await within(heard.get()) == expected
    assert heard.empty()


class Slow:
    """A method that ends when it is told to."""

    def __init__(self, server: Server) -> None:
        self.gate = asyncio.Event()
        self.running = asyncio.Event()
        self.runs = 0

        @server.rpc
        async def slow(n: int) -> int:
            self.runs += 1
            self.running.set()
            await self.gate.wait()
            return n


async def test_a_call_survives_a_lost_link() -> None:
    server = new_server()
    slow = Slow(server)
    server_heard = watched(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01)
        heard = hooked(client)
        async with client:
            connection = client.connection
            call = asyncio.ensure_future(client.rpc.call("slow", [7]))
            await within(slow.running.wait())
            relay.unplug()
            await told(heard, "connect", "disconnect")
            statuses = [client.status]
            assert client.connection is connection and connection.away
            assert not call.done()
            relay.plugged = True
            slow.gate.set()
            assert await within(call) == 7
            await told(heard, "resume")
            assert [*statuses, client.status] == [Status.RECONNECTING, Status.READY]
            assert client.connection is connection and not connection.away
            assert slow.runs == 1
            await told(server_heard, "connect", "away", "return")
        await told(heard, "disconnect")
        await told(server_heard, "disconnect")


async def test_what_the_server_remembers_stays_and_its_calls_go_on() -> None:
    server = new_server()
    connections: list[Connection] = []
    server.on_client_connect(connections.append)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01)
        gate = asyncio.Event()
        got: list[Any] = []

        @client.rpc
        async def slow() -> str:
            await gate.wait()
            return "done"

        @client.on("news")
        async def news(message: Any) -> None:
            got.append(message)

        async with client:
            (connection,) = connections
            connection.state["score"] = 5
            call = asyncio.ensure_future(connection.rpc.call("slow"))
            relay.unplug()
            await until(lambda: connection.away)
            for number in range(50):
                await within(connection.send("news", number))
            assert await server.broadcast("news", "unheard") == 0
            relay.plugged = True
            gate.set()
            assert await within(call) == "done"
            await until(lambda: got == list(range(50)))
            assert connection.state == {"score": 5}
            assert list(server.connections.values()) == [connection]
            assert connections == [connection]


async def test_hundreds_of_calls_and_many_cuts_lose_nothing() -> None:
    server = new_server()
    ran: list[int] = []

    @server.rpc
    async def once(n: int) -> int:
        ran.append(n)
        await asyncio.sleep(0)
        return n

    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=0.001) as client:

            async def call(n: int) -> int:
                return await client.rpc.call("once", [n], returns=int)

            async def cut_again_and_again() -> None:
                for attempts in range(1, 10):  # pauses double each time
                    await relay.attempted(attempts)
                    await until(lambda: not client.connection.away)
                    relay.cut()
                    await until(lambda: client.connection.away)

            cutting = asyncio.ensure_future(cut_again_and_again())
            for begin in range(0, 2000, 200):
                numbers = range(begin, begin + 200)
                calls = asyncio.gather(*(call(n) for n in numbers))
                assert await within(calls, 20) == list(numbers)
            await within(cutting, 20)
    assert ran == list(range(2000))


async def test_a_restarted_server_has_lost_the_session() -> None:
    server = new_server()
    slow = Slow(server)
    async with Relay(("127.0.0.1", 0)) as relay:
        await server.start()
        relay.target = server.address
        client = new_client(relay.address, reconnect_delay=0.01)
        heard = hooked(client)
        async with client:
            call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=60))
            await within(slow.running.wait())
            relay.unplug()
            await told(heard, "connect", "disconnect")
            unsent = asyncio.ensure_future(client.rpc.call("add", [1, 2]))
            async with new_server() as another:
                relay.target = another.address
                relay.plugged = True
                with pytest.raises(ConnectionLost, match="has not kept the session") as lost:
                    await within(call)
                assert lost.value.executed is None
                with pytest.raises(ConnectionLost) as lost:
                    await within(unsent)
                assert lost.value.executed is False
                await told(heard, "lost", "reconnect")
                assert await within(client.rpc.add(a=1, b=2)) == 3
        await server.stop(grace=0)


async def test_a_client_that_stays_away_is_gone() -> None:
    server = new_server(resume_ttl=0.1)
    slow = Slow(server)
    server_heard = watched(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01, reconnect_attempts=0)
        heard = hooked(client)
        async with client:
            call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=60))
            await within(slow.running.wait())
            relay.unplug()
            with pytest.raises(ConnectionLost):
                await within(call)
            await told(heard, "connect", "disconnect", "lost")
            await told(server_heard, "connect", "away", "disconnect")
            assert not server.connections
            relay.plugged = True
            await told(heard, "reconnect")
            await told(server_heard, "connect")


async def test_a_client_that_gives_up_ends_its_calls() -> None:
    server = new_server()
    slow = Slow(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01, reconnect_attempts=2)
        heard = hooked(client)
        await client.connect()
        call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=60))
        await within(slow.running.wait())
        relay.unplug()
        with pytest.raises(ConnectionLost):
            await within(call)
        await within(client.wait_closed())
        await told(heard, "connect", "disconnect", "lost")
        await client.disconnect()


@pytest.mark.parametrize("how", ["a link that is not made again", "sent away"])
async def test_a_session_that_is_over_for_good_is_lost_as_well(how: str) -> None:
    server = new_server()
    slow = Slow(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_enabled=how == "sent away")
        heard = hooked(client)
        await client.connect()
        call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=60))
        await within(slow.running.wait())
        if how == "sent away":
            (connection,) = server.connections.values()
            await within(connection.close(4403, "enough"))
        else:
            relay.cut()
        with pytest.raises(ConnectionLost):
            await within(call)
        await told(heard, "connect", "disconnect", "lost")
        await within(client.wait_closed())
        await client.disconnect()
        assert heard.empty()


async def test_disconnect_while_away_ends_everything_at_once() -> None:
    server = new_server()
    slow = Slow(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01)
        heard = hooked(client)
        await client.connect()
        call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=60))
        await within(slow.running.wait())
        relay.unplug()
        await told(heard, "connect", "disconnect")
        await within(client.disconnect())
        with pytest.raises(ConnectionLost):
            await within(call)
        await told(heard)
        assert client.status is Status.CLOSED


@pytest.mark.parametrize("resume_ttl", [0.0, 30.0])
async def test_who_disconnects_at_the_loss_hears_of_it_all_the_same(resume_ttl: float) -> None:
    server = new_server(resume_ttl=resume_ttl)
    slow = Slow(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address)
        heard = hooked(client)
        call = None
        with pytest.raises(ConnectionClosed):  # which the block lets out, and so disconnects
            async with client:
                call = asyncio.ensure_future(client.rpc.call("slow", [7]))
                await within(slow.running.wait())
                asyncio.get_running_loop().call_soon(relay.unplug)
                await client.ping()  # which is told of the loss before the hooks
        await told(heard, "connect", "disconnect", *(() if resume_ttl else ("lost",)))
        assert call is not None
        with contextlib.suppress(ConnectionLost):
            await within(call)


async def test_a_hook_that_ends_as_cancelled_does_not_keep_the_client_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01)

        @client.on_disconnect
        async def stop_working(client: Client, reason: ConnectionClosed) -> None:
            worker = asyncio.ensure_future(asyncio.Event().wait())
            worker.cancel()
            await worker

        heard = hooked(client)
        async with client:
            relay.unplug()
            await until(lambda: client.status is Status.RECONNECTING)
            relay.plugged = True
            await until(lambda: client.status is Status.READY)
            if sys.version_info >= (3, 11):  # before, nobody can tell who was cancelled
                assert "the hook on_disconnect" in caplog.text
                await told(heard, "connect", "disconnect", "resume")


async def test_a_server_stops_at_once_for_clients_that_are_away() -> None:
    server = new_server()
    slow = Slow(server)
    server_heard = watched(server)
    async with Relay(("127.0.0.1", 0)) as relay:
        await server.start()
        relay.target = server.address
        async with new_client(relay.address, reconnect_delay=0.01, reconnect_attempts=0) as client:
            call = asyncio.ensure_future(client.rpc.call("slow", [1], timeout=0.5))
            await within(slow.running.wait())
            relay.unplug()
            await told(server_heard, "connect", "away")
            await within(server.stop(grace=30))
            await told(server_heard, "disconnect")
            with pytest.raises(RPCTimeout):
                await within(call)


async def test_a_client_that_does_not_come_back_has_no_session_kept() -> None:
    server = new_server()
    server_heard = watched(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_enabled=False)
        await client.connect()
        relay.cut()
        await told(server_heard, "connect", "disconnect")
        await client.disconnect()


async def test_clients_that_are_away_do_not_fill_the_server() -> None:
    server = new_server(max_connections=1)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=0.01) as first:
            relay.unplug()
            await until(lambda: first.connection.away)
            await until(lambda: all(one.away for one in server.connections.values()))
            async with new_client(server, reconnect_enabled=False) as second:
                assert await within(second.rpc.add(a=1, b=2)) == 3
                relay.plugged = True
                # There is no room, but it has been let in before.
                assert await within(first.rpc.add(a=1, b=2)) == 3
                assert not first.connection.away
                with pytest.raises(Unavailable, match="full"):
                    await within(new_client(server).connect())


async def test_those_who_come_back_to_a_full_server_are_as_many_again_at_the_most() -> None:
    server = new_server(max_connections=2)
    async with server, contextlib.AsyncExitStack() as stack:

        async def come(session: dict[str, Any] | None = None) -> RawPeer:
            peer = await stack.enter_async_context(dial(server.address))
            known = session and {"id": session["id"], "epoch": session["epoch"], "recv": 0}
            success = await peer.login(caps={**CAPS, "feat": ["resume"]}, session=known)
            assert success["session"]["resumed"] is (session is not None)
            return peer

        async def go(peer: RawPeer) -> None:
            peer.abort()
            connection = server.connections[peer.success["session"]["id"].hex()]
            await until(lambda: connection.away)

        peers = [await come() for _ in range(2)]
        for _ in range(3):
            for peer in peers[-2:]:
                await go(peer)
            peers += [await come() for _ in range(2)]
        sessions = [peer.success["session"] for peer in peers]
        # Two are there. Two more may come back, and those who are there over another link.
        back = [await come(sessions[number]) for number in (0, 1, 6)]
        with pytest.raises(LoginRefused) as refused:
            await come(sessions[2])
        assert refused.value.body is not None and refused.value.body["code"] == "busy"
        # It is not given up by that.
        await go(back[0])
        await come(sessions[2])


async def test_of_too_many_that_are_away_the_oldest_ends() -> None:
    server = new_server(limits=Limits(max_away=2))
    heard = watched(server)
    async with server, Relay(server.address) as relay, contextlib.AsyncExitStack() as stack:
        clients = [new_client(relay.address, reconnect_delay=100) for _ in range(3)]
        for client in clients:
            await stack.enter_async_context(client)
        await told(heard, *["connect"] * 3)
        connections = list(server.connections.values())
        relay.unplug()
        await told(heard, *["away"] * 3, "disconnect")
        (ended,) = (one for one in connections if one.closed)
        assert "max_away" in str(ended.reason)


async def test_what_waits_for_clients_that_are_away_is_bounded() -> None:
    server = new_server(limits=Limits(max_away_bytes=100_000))
    heard = watched(server)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=100):
            (connection,) = server.connections.values()
            relay.unplug()
            await told(heard, "connect", "away")
            for _ in range(20):
                await connection.send("news", bytes(10_000))
            await told(heard, "disconnect")
            assert "max_away_bytes" in str(connection.reason)


async def test_a_session_belongs_to_who_has_logged_in() -> None:
    """Whoever knows the number of a session, and another password, gets a session of their own."""
    server = new_server(users={"ann": VERIFIER, "bob": VERIFIER})
    heard = watched(server)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, user="ann", reconnect_delay=100) as ann:
            session = ann.connection.session
            name = {"id": session.id, "epoch": session.epoch, "recv": session.received}
            relay.unplug()
            await told(heard, "connect", "away")
            async with dial(server.address) as bob:
                success = await bob.login(user="bob", session=name)
                assert success["session"]["resumed"] is False
                assert success["session"]["id"] != session.id
            await told(heard, "connect", "disconnect")
            async with dial(server.address) as other:
                success = await other.login(user="ann", session={**name, "epoch": bytes(8)})
                assert success["session"]["resumed"] is False
            await told(heard, "connect", "disconnect")
            (kept,) = server.connections.values()
            assert kept.id == session.id.hex() and kept.away
            async with dial(server.address) as same:
                success = await same.login(user="ann", session=name)
                assert success["session"]["resumed"] is True
                await told(heard, "return")


@pytest.mark.parametrize("duplicate", ["refuse", "replace"])
async def test_who_is_away_does_not_keep_out_the_same_user(duplicate: Any) -> None:
    server = new_server(users={"ann": VERIFIER}, duplicate=duplicate)
    heard = watched(server)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, user="ann", reconnect_delay=100)
        async with client:
            relay.unplug()
            await told(heard, "connect", "away")
            async with new_client(server, user="ann") as again:
                assert await within(again.rpc.add(a=1, b=2)) == 3
                assert (await server.peer("ann")).id == again.connection.id


async def test_the_hooks_of_one_connection_run_one_after_another() -> None:
    server = new_server()
    gate = asyncio.Event()
    order: list[str] = []

    @server.on_client_away
    async def away(connection: Connection, reason: ConnectionClosed) -> None:
        await gate.wait()
        order.append("away")

    @server.on_client_return
    async def back(connection: Connection) -> None:
        order.append("return")

    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=0.01) as client:
            relay.cut()
            await until(lambda: client.connection.away)
            assert await within(client.rpc.add(a=1, b=2)) == 3
            assert order == []
            gate.set()
            await until(lambda: order == ["away", "return"])


async def test_a_dead_link_is_noticed_by_the_heartbeat_and_the_session_goes_on() -> None:
    server = new_server(heartbeat_interval=0.05, heartbeat_timeout=0.2)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_delay=0.01)
        heard = hooked(client)
        async with client:
            connection = client.connection
            relay.swallow()
            await told(heard, "connect", "disconnect", "resume")
            assert client.connection is connection
            assert await within(client.rpc.add(a=1, b=2)) == 3


RESUMING = {**CAPS, "feat": ["resume"]}


def name_of(peer: RawPeer, received: int = 0) -> dict[str, Any]:
    """Return what a client says of the session that it wants to go on with."""
    session = peer.success["session"]
    return {"id": session["id"], "epoch": session["epoch"], "recv": received}


async def test_who_changes_links_is_not_one_too_many() -> None:
    """The server has not noticed that the first link is dead, and there is no room to be away."""
    server = new_server(limits=Limits(max_away=1, max_away_bytes=1000))
    heard = watched(server)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=100), dial(server.address) as first:
            await told(heard, "connect")
            (innocent,) = server.connections.values()
            relay.unplug()
            await told(heard, "away")
            await first.login(caps=RESUMING)
            await told(heard, "connect")
            (connection,) = (one for one in server.connections.values() if not one.away)
            await connection.send("news", bytes(2000))
            async with dial(server.address) as second:
                success = await second.login(caps=RESUMING, session=name_of(first))
                assert success["session"]["resumed"] is True
                await told(heard, "away", "return")
                assert (await second.until(MESSAGE)).body == ["news", bytes(2000)]
                assert await second.call("add", [1, 2]) == 3
                assert innocent.away and not connection.away
                assert await first.closed() is None


async def test_a_login_that_breaks_the_rules_does_not_touch_the_session() -> None:
    """What comes behind AUTH_RESPONSE before its time is an error, and the proof counts no more."""
    server = new_server()
    heard = watched(server)
    async with server, dial(server.address) as first:
        await first.login(caps=RESUMING)
        await told(heard, "connect")
        async with dial(server.address) as second:

            async def hastily(data: bytes) -> None:
                second.write(data + (frame(PING, 1) if data[5] == AUTH_RESPONSE else b""))

            with pytest.raises(AssertionError, match="not a login frame"):
                await second.login(caps=RESUMING, session=name_of(first), write=hastily)
            assert [got.type for got in second.log] == [AUTH_CHALLENGE, CLOSE]
            assert second.log[-1].body[0] == 1002
        assert await first.call("add", [1, 2]) == 3
        await told(heard)


@pytest.mark.parametrize(
    "changed",
    [
        {"id": bytes(15)},
        {"id": bytes(17)},
        {"epoch": bytes(7)},
        {"epoch": b""},
        {"id": "0" * 16},
        {"recv": -1},
        {"recv": None},
        {"recv": True},
        {"recv": 1.0},
    ],
    ids=str,
)
async def test_a_session_that_cannot_be_is_a_bad_request(changed: dict[str, Any]) -> None:
    server = new_server()
    async with server, dial(server.address) as peer:
        session = {"id": bytes(16), "epoch": bytes(8), "recv": 0, **changed}
        with pytest.raises(LoginRefused) as refused:
            await peer.login(session=session)
        assert refused.value.body is not None
        assert refused.value.body["code"] == "bad_request"


async def test_logins_that_end_with_a_session_need_no_garbage_collection() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_delay=0.001) as client:
            gc.collect()
            gc.disable()
            try:
                peers = sum(isinstance(one, CNDT) for one in gc.get_objects())
                for attempts in range(1, 4):
                    await relay.attempted(attempts)
                    relay.cut()
                    await until(lambda: client.connection.away)
                    assert await within(client.rpc.add(a=1, b=2)) == 3
                await until(lambda: not any(one.away for one in server.connections.values()))
                # A timer may know the two of the last login yet.
                assert sum(isinstance(one, CNDT) for one in gc.get_objects()) <= peers + 2
            finally:
                gc.enable()


async def lose_a_large_frame() -> None:
    """Cut a link in the middle of a large frame; what read it is part of a cycle."""
    wide = Limits(max_payload=2**25, min_iterations=4096)
    server = new_server(limits=wide)
    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_enabled=False, limits=wide) as client:
            (connection,) = server.connections.values()
            connection.state["knows"] = connection
            sending = asyncio.ensure_future(client.send("news", bytes(2**24)))
            await until(lambda: connection.protocol.large is not None)
            relay.cut()
            await within(asyncio.gather(sending, return_exceptions=True))
            await until(lambda: connection.closed)


async def test_a_large_frame_that_was_cut_leaves_nothing_to_complain_about() -> None:
    """A garbage collection that finds its buffer lent out says so, which fails the test."""
    await lose_a_large_frame()
    gc.collect()
