"""Clients found by who has logged in, and what a second login of the same user does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conduit import Client, Connection, ConnectionClosed, Server, Status, Unavailable
from tests.acceptance.raw import VERIFIER, Relay
from tests.acceptance.support import new_client, new_server, until, within

USERS = {"ann": VERIFIER, "bob": VERIFIER}


async def start(**fields: Any) -> Server:
    server = new_server(users=USERS, **fields)
    await server.start()
    return server


async def join(server: Server, user: str) -> Client:
    client = new_client(server, user=user)

    @client.rpc
    async def whoami() -> str:
        return f"{user} {id(client)}"

    await within(client.connect())
    return client


async def end(server: Server, *clients: Client) -> None:
    for client in clients:
        await within(client.disconnect())
    await within(server.stop())


async def calls(peer: Connection, client: Client) -> bool:
    """Whether a connection of the server leads to this client."""
    answer: str = await within(peer.rpc.call("whoami"))
    return answer.endswith(f" {id(client)}")


async def test_a_client_is_found_by_its_identity() -> None:
    server = await start()
    ann, bob = await join(server, "ann"), await join(server, "bob")
    assert await calls(await within(server.peer("ann")), ann)
    assert await calls(await within(server.peer("bob")), bob)
    with pytest.raises(Unavailable, match="nobody is connected as 'carl'"):
        await within(server.peer("carl"))
    await end(server, ann, bob)


async def test_of_several_the_last_one_is_found_and_then_the_one_before() -> None:
    server = await start()
    first, second = await join(server, "ann"), await join(server, "ann")
    peer = await within(server.peer("ann"))
    assert await calls(peer, second)
    await within(second.disconnect())
    await within(peer.wait_closed())
    assert await calls(await within(server.peer("ann")), first)
    await end(server, first)


async def test_one_that_is_away_is_found_if_there_is_no_other() -> None:
    server = await start()
    async with Relay(server.address) as relay:
        first = await join(server, "ann")
        second = new_client(relay.address, user="ann", reconnect_attempts=0)
        await within(second.connect())
        newest = await within(server.peer("ann"))
        relay.unplug()
        await until(lambda: newest.away)
        assert await calls(other := await within(server.peer("ann")), first)
        await within(first.disconnect())
        await within(other.wait_closed())
        assert await within(server.peer("ann")) is newest
        await end(server, second)


async def test_a_client_is_waited_for() -> None:
    server = await start()
    waits = [asyncio.ensure_future(server.peer("ann", wait=30)) for _ in range(3)]
    given_up = asyncio.ensure_future(server.peer("ann", wait=30))
    await asyncio.sleep(0)
    given_up.cancel()
    bob = await join(server, "bob")
    assert not any(wait.done() for wait in waits)
    ann = await join(server, "ann")
    peers = await within(asyncio.gather(*waits))
    assert len(set(peers)) == 1
    assert await calls(peers[0], ann)
    await end(server, ann, bob)


async def test_the_wait_ends() -> None:
    server = await start()
    with pytest.raises(Unavailable) as caught:
        await within(server.peer("ann", wait=0.02))
    assert caught.value.retryable
    await end(server)


async def test_a_caller_hears_that_the_other_client_is_not_there() -> None:
    server = new_server(users=USERS)

    @server.rpc
    async def ask(user: str) -> str:
        peer = await server.peer(user)
        answer: str = await peer.rpc.call("whoami")
        return answer

    await server.start()
    ann = await join(server, "ann")
    with pytest.raises(Unavailable, match="'bob'"):
        await within(ann.rpc.call("ask", {"user": "bob"}))
    bob = await join(server, "bob")
    assert (await within(ann.rpc.call("ask", {"user": "bob"}))).startswith("bob ")
    await end(server, ann, bob)


async def test_two_logins_are_allowed_by_default() -> None:
    server = await start()
    first, second = await join(server, "ann"), await join(server, "ann")
    assert len(server.connections) == 2
    await end(server, first, second)


async def test_a_newer_login_replaces_the_older_one_for_good() -> None:
    server = await start(duplicate="replace")
    bob = await join(server, "bob")
    first = await join(server, "ann")
    reasons: asyncio.Queue[ConnectionClosed] = asyncio.Queue()

    @first.on_disconnect
    async def ended(client: Client, reason: ConnectionClosed) -> None:
        reasons.put_nowait(reason)

    second = await join(server, "ann")
    reason = await within(reasons.get())
    assert (reason.code, reason.reason) == (4403, "replaced by a newer login")
    await within(first.wait_closed())
    assert first.status is Status.CLOSED  # or the two would replace each other for ever
    assert await calls(await within(server.peer("ann")), second)
    assert await within(bob.rpc.call("add", {"a": 1, "b": 2})) == 3
    await end(server, first, second, bob)


async def test_who_was_replaced_while_it_was_away_does_not_replace_the_newer_one() -> None:
    server = await start(duplicate="replace")
    async with Relay(server.address) as relay:
        first = new_client(relay.address, user="ann", reconnect_attempts=0, reconnect_delay=0.01)
        await within(first.connect())
        older = await within(server.peer("ann"))
        relay.unplug()
        await until(lambda: older.away)
        second = await join(server, "ann")
        relay.plugged = True
        await within(first.wait_closed())
        with pytest.raises(ConnectionClosed, match="replaced by a newer login"):
            await within(first.rpc.call("add", {"a": 1, "b": 2}))
        assert await calls(await within(server.peer("ann")), second)
        await within(first.connect())  # but who says so replaces it
        await within(second.wait_closed())
        await end(server, first, second)


async def test_a_second_login_is_refused_until_the_first_has_gone() -> None:
    server = await start(duplicate="refuse")
    first = await join(server, "ann")
    second = new_client(server, user="ann")
    with pytest.raises(Unavailable, match="'ann' is logged in already"):
        await within(second.connect())
    bob = await join(server, "bob")
    peer = await within(server.peer("ann"))
    assert await calls(peer, first)
    await within(first.disconnect())
    await within(peer.wait_closed())
    await within(second.connect())
    await end(server, second, bob)


async def test_of_two_logins_at_once_one_is_refused() -> None:
    server = new_server(users=USERS, duplicate="refuse")
    asked, go_on = 0, asyncio.Event()
    here: set[str] = set()

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            go_on.set()
        here.add(connection.id)
        await go_on.wait()

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: ConnectionClosed) -> None:
        here.remove(connection.id)

    await server.start()
    clients = [new_client(server, user="ann") for _ in range(2)]
    results = await within(
        asyncio.gather(*(client.connect() for client in clients), return_exceptions=True)
    )
    assert {type(result) for result in results} == {type(None), Unavailable}
    assert len(server.connections) == 1
    await until(lambda: here == {*server.connections})  # who was refused has gone as well
    await end(server, *clients)
    assert not here


@pytest.mark.parametrize("duplicate", ["replace", "refuse"])
@pytest.mark.parametrize("fields", [{}, {"password": "secret"}, {"verifier": VERIFIER}])
def test_where_everybody_is_the_same_user_there_are_no_duplicates(
    duplicate: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="needs users"):
        Server(host="127.0.0.1", port=0, duplicate=duplicate, **fields)
