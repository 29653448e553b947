"""What the hooks `on_reconnect` tell a new server comes before all else that goes there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

import conduit.blocking
from conduit import Client, Connection, ConnectionClosed, Retry, RPCTimeout, Status
from tests.acceptance.raw import PASSWORD, TIMEOUT, Relay
from tests.acceptance.support import FAST_LOGIN, new_client, new_server, round_trips, until, within

Hook = Callable[[Client], Coroutine[Any, Any, None]]


class Room:
    """A server that wants to know a client before it does anything for it."""

    def __init__(self, name: str) -> None:
        self.heard: list[str] = []
        self.server = new_server(name=name)
        self.server.rpc(self.join)
        self.server.rpc(self.say)
        self.server.rpc(self.tell)
        self.server.on("note")(self.note)

    async def join(self, room: str = "a") -> None:
        self.heard.append(f"join {room}")

    async def say(self, text: str) -> str:
        self.heard.append(f"say {text}")
        return self.server.name

    async def tell(self, connection: Connection, text: str) -> None:
        self.heard.append(f"tell {await connection.rpc.call('spell', [text])}")

    async def note(self, connection: Connection, text: str) -> None:
        self.heard.append(f"note {text}")


@contextlib.asynccontextmanager
async def moving(
    hook: Hook, **fields: Any
) -> AsyncIterator[tuple[Client, Room, Callable[[], None]]]:
    """A client of a server that goes away when it is told to, and the next server."""
    first, second = Room("first"), Room("second")
    async with first.server, second.server:
        urls = ["tcp://{}:{}".format(*one.server.address) for one in (first, second)]
        known = {"password": PASSWORD, "limits": FAST_LOGIN, "reconnect_delay": 0.01}
        client = Client(urls, **{**known, **fields})
        client.on_reconnect(hook)

        def move() -> None:
            first.server.start_task(first.server.stop(grace=TIMEOUT))

        async with client:
            assert client.server_name == "first"
            yield client, second, move


async def round_of_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def ready(client: Client) -> bool:
    return client.status is Status.READY and client.server_name == "second"


async def test_what_has_waited_for_a_server_comes_behind_the_hook() -> None:
    async def join(client: Client) -> None:
        await client.rpc.call("join", ["a"])
        await asyncio.sleep(0.02)  # a look into a database, for instance
        await asyncio.gather(*(client.rpc.call("join", [room]) for room in "bc"))
        await client.send("note", "of the hook")

    async with moving(join) as (client, second, move):
        move()
        await until(lambda: client.status is Status.RECONNECTING)
        waiting = [asyncio.ensure_future(client.rpc.call("say", [str(one)])) for one in range(3)]
        waiting += [asyncio.ensure_future(client.send("note", str(one))) for one in range(3)]
        await until(lambda: ready(client))
        waiting.append(asyncio.ensure_future(client.rpc.call("say", ["meanwhile"])))
        answers = await within(asyncio.gather(*waiting))
        assert answers == ["second"] * 3 + [None] * 3 + ["second"]
        await within(client.rpc.call("say", ["behind"]))
    joins, notes = ["join a", "join b", "join c"], [f"note {one}" for one in range(3)]
    says = [f"say {text}" for text in ("0", "1", "2", "meanwhile")]
    assert second.heard[:3] == joins
    assert [one for one in second.heard if "note" in one] == ["note of the hook", *notes]
    assert [one for one in second.heard if "say" in one] == [*says, "say behind"]


async def test_messages_that_the_old_server_has_not_handled_come_behind_it_too() -> None:
    async def join(client: Client) -> None:
        await client.rpc.call("join")

    count = 1000  # more than the window, so that they meet the goodbye
    async with moving(join) as (client, second, move):
        move()
        for one in range(count):
            await within(client.send("note", str(one)))
        await until(lambda: f"note {count - 1}" in second.heard)
    notes = [one for one in second.heard if "note" in one]
    assert second.heard.index("join a") < second.heard.index(notes[0])
    assert notes == [f"note {one}" for one in range(count - len(notes), count)]


async def test_so_do_calls_that_are_made_again_behind_a_server_that_was_killed() -> None:
    heard: list[str] = []

    async def joined(client: Client) -> None:
        await asyncio.sleep(0.01)
        await within(client.rpc.call("add", [0, 0], retry=Retry(idempotent=True)))
        heard.append("hook")

    server = new_server()
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_attempts=0)
        client.on_reconnect(joined)
        async with client:
            host, port = server.address
            relay.unplug()
            await within(server.stop(grace=0))
            again = asyncio.ensure_future(
                client.rpc.call("add", [1, 2], retry=Retry(attempts=100, idempotent=True))
            )
            again.add_done_callback(lambda _: heard.append("call"))
            second = new_server(host=host, port=port)
            async with second:
                relay.plugged = True
                assert await within(again) == 3
                assert heard == ["hook", "call"]


async def test_what_the_new_server_asks_for_meanwhile_is_answered() -> None:
    async def join(client: Client) -> None:
        await client.rpc.call("tell", ["me"])

    async with moving(join) as (client, second, move):

        @client.rpc
        async def spell(text: str) -> str:
            name, _ = await asyncio.gather(
                client.rpc.call("say", [text]), client.send("note", "of a task")
            )
            return f"{text} {name}"

        move()
        await until(lambda: ready(client) and bool(second.heard))
        assert await within(client.rpc.call("say", ["behind"])) == "second"
    assert second.heard == ["say me", "note of a task", "tell me second", "say behind"]


async def test_a_handler_of_another_server_waits() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def join(client: Client) -> None:
        entered.set()
        await go.wait()
        await client.rpc.call("join")

    gate = new_server()
    async with gate, moving(join) as (client, second, move):

        @gate.rpc
        async def through(text: str) -> str:
            return str(await client.rpc.call("say", [text]))

        async with new_client(gate) as user:
            move()
            await within(entered.wait())
            call = asyncio.ensure_future(user.rpc.call("through", ["x"]))
            await round_trips(user)
            go.set()
            assert await within(call) == "second"
    assert second.heard == ["join a", "say x"]


async def test_the_messages_of_what_a_handler_has_left_behind_stay_in_order() -> None:
    async def join(client: Client) -> None:
        await asyncio.sleep(0.02)
        await client.rpc.call("join")

    count, tasks = 1000, list[asyncio.Task[None]]()  # more than the window
    first, second = Room("first"), Room("second")
    async with first.server, second.server:
        urls = ["tcp://{}:{}".format(*one.server.address) for one in (first, second)]
        client = Client(urls, password=PASSWORD, limits=FAST_LOGIN, reconnect_delay=0.01)
        client.on_reconnect(join)

        async def tell() -> None:
            for one in range(count):
                await client.send("note", str(one))

        @client.on("begin")
        async def begin(data: None) -> None:
            tasks.append(asyncio.create_task(tell()))

        async with client:
            (connection,) = first.server.connections.values()
            await connection.send("begin")
            first.server.start_task(first.server.stop(grace=TIMEOUT))
            await until(lambda: tasks)
            await within(tasks[0])
            await until(lambda: f"note {count - 1}" in second.heard)
    assert second.heard[0] == "join a"
    notes = [one for one in (*first.heard, *second.heard) if "note" in one]
    assert notes == [f"note {one}" for one in range(count)]


async def test_the_messages_of_a_hook_stay_in_order_when_the_next_server_goes_away_too() -> None:
    count, rooms = 1000, [Room(name) for name in ("first", "second", "third")]
    first, second, third = rooms
    async with first.server, second.server, third.server:
        urls = ["tcp://{}:{}".format(*one.server.address) for one in rooms]
        client = Client(urls, password=PASSWORD, limits=FAST_LOGIN, reconnect_delay=0.01)

        @client.on_reconnect
        async def tell(client: Client) -> None:
            if client.server_name == "second":
                second.server.start_task(second.server.stop(grace=TIMEOUT))
                for one in range(count):
                    await client.send("note", str(one))
            else:
                await asyncio.sleep(0.02)
                await client.rpc.call("join")

        async with client:
            first.server.start_task(first.server.stop(grace=0))
            await until(lambda: f"note {count - 1}" in third.heard)
    assert third.heard[0] == "join a"
    notes = [one for one in (*second.heard, *third.heard) if "note" in one]
    assert notes == [f"note {one}" for one in range(count)]


async def test_what_an_earlier_hook_has_left_behind_waits() -> None:
    go, left = asyncio.Event(), list[asyncio.Task[Any]]()

    async def join(client: Client) -> None:
        await asyncio.sleep(0.01)
        await client.rpc.call("join")

    async def work(client: Client) -> None:
        await go.wait()
        await client.rpc.call("say", ["worker"])

    async with moving(join) as (client, second, move):

        @client.on_disconnect
        async def started(client: Client, reason: object) -> None:
            left.append(asyncio.create_task(work(client)))

        move()
        await until(lambda: ready(client))
        go.set()
        await within(left[0])
    assert second.heard == ["join a", "say worker"]


async def test_a_deadline_goes_on_meanwhile() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def join(client: Client) -> None:
        entered.set()
        await go.wait()

    async with moving(join) as (client, second, move):
        move()
        await within(entered.wait())
        with pytest.raises(RPCTimeout, match="'say' waited 0.05 s for the connection to be made"):
            await within(client.rpc.call("say", ["late"], timeout=0.05))
        go.set()
        await within(client.rpc.call("say", ["then"]))
    assert second.heard == ["say then"]


async def test_a_hook_that_does_not_end_is_waited_for_no_longer_than_a_login(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hang(client: Client) -> None:
        await asyncio.Event().wait()

    async with moving(hang, connect_timeout=1.0) as (client, _, move):
        move()
        await until(lambda: ready(client))
        assert await within(client.rpc.call("say", ["at last"])) == "second"
    assert "a hook on_reconnect has not ended within 1 s" in caplog.text


async def test_who_waits_hears_of_it_when_the_client_disconnects_meanwhile() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def join(client: Client) -> None:
        entered.set()
        await go.wait()

    async with moving(join) as (client, second, move):
        move()
        await within(entered.wait())
        call = asyncio.ensure_future(client.rpc.call("say", ["x"]))
        await within(second.server.stop(grace=0))  # it waits for a third server
        await until(lambda: client.status is Status.RECONNECTING)
        go.set()
        await round_of_turns()
        assert not call.done()
        await within(client.disconnect())
        with pytest.raises(ConnectionClosed):
            await within(call)
    assert second.heard == []


async def test_the_hook_goes_first_also_when_its_link_is_lost_and_comes_back_meanwhile() -> None:
    entered, go, resumed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    first, second = Room("first"), Room("second")
    async with first.server, second.server, Relay(second.server.address) as relay:
        urls = ["tcp://{}:{}".format(*address) for address in (first.server.address, relay.address)]
        client = Client(urls, password=PASSWORD, limits=FAST_LOGIN, reconnect_delay=0.01)

        @client.on_reconnect
        async def join(client: Client) -> None:
            entered.set()
            await go.wait()
            await client.rpc.call("join", retry=Retry(idempotent=True))

        @client.on_resume
        async def back(client: Client) -> None:
            resumed.set()

        async def tell(count: int) -> None:
            for one in range(count):
                await client.send("note", str(one))

        count = 1000  # more than the window, so that they meet the goodbye
        async with client:
            first.server.start_task(first.server.stop(grace=TIMEOUT))
            telling = asyncio.ensure_future(tell(count))
            await within(entered.wait())
            relay.cut()
            await until(lambda: client.status is Status.RECONNECTING)
            call = asyncio.ensure_future(client.rpc.call("say", ["while it is away"]))
            await within(resumed.wait())
            await round_of_turns()
            assert second.heard == []
            go.set()
            await within(asyncio.gather(telling, call))
            await until(lambda: f"note {count - 1}" in second.heard)
    assert second.heard[0] == "join a"
    notes = [one for one in (*first.heard, *second.heard) if "note" in one]
    assert notes == [f"note {one}" for one in range(count)]


async def test_who_waits_hears_of_it_when_its_link_is_lost_and_does_not_come_back() -> None:
    entered = asyncio.Event()

    async def join(client: Client) -> None:
        entered.set()
        await client.wait_closed()

    first, second = Room("first"), Room("second")
    async with first.server, second.server, Relay(second.server.address) as relay:
        urls = ["tcp://{}:{}".format(*address) for address in (first.server.address, relay.address)]
        known: dict[str, Any] = {"password": PASSWORD, "limits": FAST_LOGIN}
        client = Client(urls, **known, reconnect_delay=0.01, reconnect_attempts=3)
        client.on_reconnect(join)
        async with client:
            await within(first.server.stop(grace=0))
            await within(entered.wait())
            call = asyncio.ensure_future(client.rpc.call("say", ["x"], timeout=None))
            relay.unplug()
            with pytest.raises(ConnectionClosed):
                await within(call)
    assert second.heard == []


async def test_disconnect_cancels_a_hook_whose_link_was_lost_and_came_back_meanwhile() -> None:
    entered, resumed = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    async def hang(client: Client) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    first, second = Room("first"), Room("second")
    async with first.server, second.server, Relay(second.server.address) as relay:
        urls = ["tcp://{}:{}".format(*address) for address in (first.server.address, relay.address)]
        known: dict[str, Any] = {"password": PASSWORD, "limits": FAST_LOGIN}
        client = Client(urls, **known, reconnect_delay=0.01, connect_timeout=2 * TIMEOUT)
        client.on_reconnect(hang)
        client.on_resume(lambda client: resumed.set())
        async with client:
            await within(first.server.stop(grace=0))
            await within(entered.wait())
            relay.cut()
            await within(resumed.wait())
            await within(client.disconnect())
    assert ended == ["cancelled"]


async def test_who_waits_goes_on_at_a_server_that_has_forgotten_the_session() -> None:
    entered, go = asyncio.Event(), asyncio.Event()

    async def join(client: Client) -> None:
        entered.set()
        await go.wait()
        await client.rpc.call("join")

    first, second, third = Room("first"), Room("second"), Room("third")
    async with first.server, second.server, third.server, Relay(second.server.address) as relay:
        urls = ["tcp://{}:{}".format(*address) for address in (first.server.address, relay.address)]
        client = Client(urls, password=PASSWORD, limits=FAST_LOGIN, reconnect_delay=0.01)
        client.on_reconnect(join)
        async with client:
            first.server.start_task(first.server.stop(grace=0))
            await within(entered.wait())
            call = asyncio.ensure_future(client.rpc.call("say", ["x"]))
            relay.target = third.server.address
            relay.cut()
            await until(lambda: client.status is Status.RECONNECTING)
            await until(lambda: client.status is Status.READY)
            await round_of_turns()
            assert third.heard == []
            go.set()
            assert await within(call) == "third"
    assert third.heard == ["join a", "join a", "say x"]  # of either session


async def test_the_hook_of_a_blocking_client_goes_first_as_well() -> None:
    first, second = Room("first"), Room("second")
    async with first.server, second.server:
        urls = ["tcp://{}:{}".format(*one.server.address) for one in (first, second)]

        loop = asyncio.get_running_loop()

        def move() -> None:
            first.server.start_task(first.server.stop(grace=TIMEOUT))

        def use() -> str:
            fields: dict[str, Any] = {
                "password": PASSWORD,
                "limits": FAST_LOGIN,
                "reconnect_delay": 0.01,
            }
            with conduit.blocking.Client(urls, **fields) as client:

                @client.on_reconnect
                def join(client: conduit.blocking.Client) -> None:
                    client.rpc.join(room="a")
                    client.rpc.join(room="b")

                client.rpc.say(text="here")
                loop.call_soon_threadsafe(move)
                while client.rpc.say(text="there") == "first":
                    pass
                return str(client.rpc.say(text="at last"))

        assert await within(asyncio.to_thread(use)) == "second"
    assert second.heard[:3] == ["join a", "join b", "say there"]
