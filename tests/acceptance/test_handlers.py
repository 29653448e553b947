"""Servers and clients as their users see them: decorators, hooks, calls, messages, validation."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import threading
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from pydantic import BaseModel, Field

from conduit import (
    AuthenticationError,
    Client,
    ConduitError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    Limits,
    MethodNotFound,
    Overloaded,
    PermissionDenied,
    RPCError,
    RPCTimeout,
    Server,
    Status,
    Unavailable,
    data,
    from_thread,
)
from tests.acceptance import raw
from tests.acceptance.raw import Relay, logged_in, make_verifier
from tests.acceptance.support import (
    FAST_LOGIN,
    neighbourhood,
    new_client,
    new_server,
    round_trips,
    within,
)

SECRET = "an offending value that must not come back"


class Item(BaseModel):
    """One line of an order."""

    name: str
    count: int = Field(ge=1)


class Order(BaseModel):
    """What somebody wants to have."""

    customer: str
    items: list[Item]
    note: Optional[str] = None  # noqa: UP045


@dataclass
class Point:
    """A place on a plane."""

    x: float
    y: float


class OutOfStock(RPCError):
    """An error of the application."""


Colour = Literal["red", "green"]
Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[str, Field(min_length=2, max_length=5, pattern="^[a-z]+$")]


def paths(error: InvalidParams) -> set[str]:
    """Return the paths of the errors, each as `a.b.0`."""
    found = set()
    for entry in error.errors:
        assert {"path", "message", "type"} <= entry.keys()
        assert isinstance(entry["message"], str) and entry["message"]
        path: Any = entry["path"]
        text = path if isinstance(path, str) else ".".join(str(part) for part in path)
        found.add(re.sub(r"\[(\w+)\]", r".\1", text))
    return found


# Decorators


async def test_decorators_work_with_and_without_brackets_and_return_the_function() -> None:
    server = Server(host="127.0.0.1", port=0, verifier=raw.VERIFIER)
    ran: list[str] = []

    async def plain() -> str:
        return "plain"

    async def brackets() -> str:
        return "brackets"

    async def named() -> str:
        return "named"

    async def options() -> str:
        return "options"

    def threaded() -> str:
        return "threaded"

    async def startup(srv: Server) -> None:
        ran.append("startup")

    async def startup_too(srv: Server) -> None:
        ran.append("startup too")

    async def message(client: Any, message: Any) -> str:
        return "message"

    assert server.rpc(plain) is plain
    assert server.rpc()(brackets) is brackets
    assert server.rpc("another.name")(named) is named
    assert server.rpc(timeout=5.0, extra="ignore")(options) is options
    assert server.rpc(threaded) is threaded
    assert server.on("message")(message) is message
    assert server.on("again", concurrent=True)(message) is message
    assert server.on_startup(startup) is startup
    assert server.on_startup()(startup_too) is startup_too
    async with server, new_client(server) as client:
        assert ran == ["startup", "startup too"]
        for name, value in {
            "plain": "plain",
            "brackets": "brackets",
            "another.name": "named",
            "options": "options",
            "threaded": "threaded",
        }.items():
            assert await within(client.rpc.call(name)) == value
        with pytest.raises(MethodNotFound):
            await within(client.rpc.call("named"))
        assert await within(client.request("message")) == "message"
        assert await within(client.request("again")) == "message"


async def test_the_decorators_of_a_client_work_the_same_way() -> None:
    async with new_server() as server:
        client = new_client(server)
        ran: list[str] = []

        async def plain() -> str:
            return "plain"

        async def brackets() -> str:
            return "brackets"

        async def named() -> str:
            return "named"

        async def connected(cli: Client) -> None:
            ran.append("connect")

        async def connected_too(cli: Client) -> None:
            ran.append("connect too")

        assert client.rpc(plain) is plain
        assert client.rpc()(brackets) is brackets
        assert client.rpc("another.name")(named) is named
        assert client.on_connect(connected) is connected
        assert client.on_connect()(connected_too) is connected_too
        async with client:
            assert ran == ["connect", "connect too"]
            (connection,) = server.connections.values()
            assert await within(connection.rpc.call("plain")) == "plain"
            assert await within(connection.rpc.call("brackets")) == "brackets"
            assert await within(connection.rpc.call("another.name")) == "named"


def test_an_annotation_that_cannot_be_resolved_fails_at_registration() -> None:
    server = Server(host="127.0.0.1", port=0, verifier=raw.VERIFIER)

    async def broken(value: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        return None

    with pytest.raises((TypeError, NameError, ValueError, ConduitError), match="Nowhere"):
        server.rpc(broken)


async def test_methods_are_reached_by_attribute_and_underscores_are_not() -> None:
    async with new_server() as server, new_client(server) as client:
        assert await within(client.rpc.add(a=10, b=20)) == 30
        with pytest.raises(AttributeError):
            _ = client.rpc._private
        with pytest.raises(AttributeError):
            _ = client.rpc.__wrapped__


# Hooks


async def test_every_hook_of_a_server_runs_once_at_its_time() -> None:
    server = new_server()
    log: list[str] = []
    gone = asyncio.Event()

    @server.on_startup
    async def startup(srv: Server) -> None:
        assert srv is server
        log.append("startup")

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        log.append(f"connect {connection.name}")
        connection.state["visits"] = 1

    @server.on_client_disconnect
    async def disconnected(connection: Connection, reason: Any) -> None:
        log.append(f"disconnect {connection.name} {connection.state['visits']}")
        gone.set()

    @server.on_shutdown
    async def shutdown(srv: Server) -> None:
        assert srv is server
        log.append("shutdown")

    async with server:
        async with new_client(server, name="visitor"):
            pass
        await within(gone.wait())
    assert log == ["startup", "connect visitor", "disconnect visitor 1", "shutdown"]


async def test_hooks_may_be_plain_functions() -> None:
    server = new_server()
    log: list[str] = []

    @server.on_startup
    def startup(srv: Server) -> None:
        log.append("startup")

    @server.on_client_connect
    def connected(connection: Connection) -> None:
        log.append("connect")

    async with server:
        client = new_client(server)

        @client.on_connect
        def on_connect(cli: Client) -> None:
            log.append("client")

        async with client:
            assert log == ["startup", "connect", "client"]


async def test_the_connect_hook_runs_before_any_handler() -> None:
    server = new_server()
    gate = asyncio.Event()
    entered = asyncio.Event()
    log: list[str] = []

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        entered.set()
        await gate.wait()
        log.append("connect")

    @server.rpc
    async def work() -> None:
        log.append("work")

    async with server:
        client = new_client(server)
        connecting = asyncio.ensure_future(client.connect())
        await within(entered.wait())
        gate.set()
        await within(connecting)
        await within(client.rpc.call("work"))
        await within(client.disconnect())
        assert log == ["connect", "work"]


async def test_what_a_connect_hook_starts_may_call_the_client_and_the_hook_itself_not() -> None:
    server = new_server()
    answers: asyncio.Queue[Any] = asyncio.Queue()

    async def ask(connection: Connection, way: str) -> None:
        try:
            asked = connection.rpc.call if way == "call" else connection.request
            answers.put_nowait(await asked("config"))
        except RuntimeError as exc:
            answers.put_nowait(str(exc))

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        for way in ("call", "request"):
            server.start_task(ask(connection, way))
            await within(ask(connection, way))
        await asyncio.sleep(0.01)  # as a look into a database would take

    async with server:
        client = new_client(server)
        client.rpc("config")(lambda: "called")
        client.on("config")(lambda message: "requested")
        async with client:
            said = [await within(answers.get()) for _ in range(4)]
    for error in said[:2]:
        assert "'config' cannot be called before the peer is in" in error
        assert "server.start_task(...)" in error
    assert sorted(said[2:]) == ["called", "requested"]


async def test_a_connect_hook_that_raises_refuses_the_client(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    ran: list[str] = []

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        if connection.name == "unwanted":
            raise RuntimeError(SECRET)

    @server.on_client_disconnect
    async def disconnected(connection: Connection, reason: Any) -> None:
        ran.append("disconnect")

    async with neighbourhood(server):
        client = new_client(server, name="unwanted")
        with pytest.raises(ConduitError) as caught:
            await within(client.connect())
        assert getattr(caught.value, "code", None) in ("refused", 4403)
        assert SECRET not in str(caught.value)
        assert len(server.connections) == 1
        assert SECRET in caplog.text


async def test_other_hooks_that_fail_are_logged_and_harm_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    gone = asyncio.Event()

    @server.on_client_disconnect
    async def disconnected(connection: Connection, reason: Any) -> None:
        gone.set()
        raise RuntimeError("the disconnect hook failed")

    @server.on_shutdown
    async def shutdown(srv: Server) -> None:
        raise RuntimeError("the shutdown hook failed")

    async with neighbourhood(server):
        client = new_client(server)

        @client.on_connect
        async def connected(cli: Client) -> None:
            raise RuntimeError("the connect hook failed")

        async with client:
            await round_trips(client, 1)
        await within(gone.wait())
    for hook in ("disconnect", "shutdown", "connect"):
        assert f"the {hook} hook failed" in caplog.text


async def test_state_belongs_to_one_connection() -> None:
    server = new_server()

    @server.rpc
    async def count(connection: Connection) -> int:
        connection.state["n"] = connection.state.get("n", 0) + 1
        result: int = connection.state["n"]
        return result

    async with server, new_client(server) as first, new_client(server) as second:
        assert [await within(first.rpc.call("count")) for _ in range(3)] == [1, 2, 3]
        assert await within(second.rpc.call("count")) == 1


async def test_users_log_in_under_their_own_names() -> None:
    verifiers = {"alice": make_verifier("alice's password"), "bob": make_verifier("bob's")}

    async def look_up(user: str) -> str | None:
        return verifiers.get(user)

    for users in (verifiers, look_up):
        server = new_server(users=users)

        @server.rpc
        async def whoami(connection: Connection) -> str:
            return connection.identity

        async with server:
            alice = new_client(server, user="alice", password="alice's password")
            bob = new_client(server, user="bob", password="bob's")
            async with alice, bob:
                assert await within(alice.rpc.call("whoami")) == "alice"
                assert await within(bob.rpc.call("whoami")) == "bob"
            for user, password in [("alice", "bob's"), ("carol", "bob's")]:
                with pytest.raises(AuthenticationError) as caught:
                    await within(new_client(server, user=user, password=password).connect())
                assert caught.value.code == "invalid_credentials"


async def test_a_server_without_a_password_serves_the_loopback_interface() -> None:
    server = Server(host="127.0.0.1", port=0)

    @server.rpc
    async def whoami(connection: Connection) -> str:
        return connection.identity

    async with server:
        host, port = server.address
        async with Client(server_host=host, server_port=port) as client:
            assert await within(client.rpc.call("whoami")) == "anonymous"
        # A password that nobody checked must not look as if it had been.
        with pytest.raises(ConduitError):
            await within(new_client(server).connect())


# Messages


async def test_messages_of_one_connection_are_handled_in_order() -> None:
    server = new_server()
    got: list[int] = []

    @server.on("item")
    async def item(client: Any, message: Any) -> None:
        # Handlers that take turns would come out of order here.
        for _ in range(message["n"] % 3):
            await asyncio.sleep(0)
        got.append(message["n"])

    async with server, new_client(server) as client:
        for number in range(500):
            await within(client.send("item", {"n": number}))
        await within(client.request("item", {"n": 500}))
        assert got == list(range(501))


async def test_messages_to_a_client_are_handled_in_order() -> None:
    async with new_server() as server:
        client = new_client(server)
        got: list[int] = []

        @client.on("item")
        async def item(message: Any) -> None:
            for _ in range(message["n"] % 3):
                await asyncio.sleep(0)
            got.append(message["n"])

        async with client:
            (connection,) = server.connections.values()
            for number in range(500):
                await within(connection.send("item", {"n": number}))
            await within(connection.request("item", {"n": 500}))
            assert got == list(range(501))


async def test_concurrent_messages_run_side_by_side() -> None:
    server = new_server()
    here: dict[str, asyncio.Event] = {"a": asyncio.Event(), "b": asyncio.Event()}

    @server.on("meet", concurrent=True)
    async def meet(client: Any, message: Any) -> str:
        here[message["me"]].set()
        await here[message["other"]].wait()
        return "met"

    async with server, new_client(server) as client:
        meetings = asyncio.gather(
            client.request("meet", {"me": "a", "other": "b"}),
            client.request("meet", {"me": "b", "other": "a"}),
        )
        assert list(await within(meetings)) == ["met", "met"]


async def test_a_slow_message_handler_holds_up_nobody_but_its_connection() -> None:
    server = new_server()
    gate = asyncio.Event()

    @server.on("wait")
    async def wait(client: Any, message: Any) -> str:
        await gate.wait()
        return "waited"

    @server.on("quick")
    async def quick(client: Any, message: Any) -> str:
        return "quick"

    async with neighbourhood(server) as neighbour, new_client(server) as client:
        slow = asyncio.ensure_future(client.request("wait"))
        await round_trips(client)
        assert await within(neighbour.client.request("quick")) == "quick"
        behind = asyncio.ensure_future(client.request("quick"))
        await round_trips(client)
        assert not slow.done() and not behind.done()
        gate.set()
        assert await within(slow) == "waited"
        assert await within(behind) == "quick"


async def test_request_returns_the_result_and_raises_its_errors() -> None:
    server = new_server()

    @server.on("greeting")
    async def greeting(client: Any, message: Any) -> Any:
        return {"reply": f"Hello, {message['name']}!"}

    @server.on("count")
    async def count(client: Any, message: Any) -> Any:
        return {"name": "apple", "count": 3}

    @server.on("forbidden")
    async def forbidden(client: Any, message: Any) -> Any:
        raise PermissionDenied("not for you")

    @server.on("broken")
    async def broken(client: Any, message: Any) -> Any:
        raise RuntimeError(SECRET)

    @server.on("slow")
    async def slow(client: Any, message: Any) -> Any:
        await asyncio.Event().wait()

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        assert await within(client.request("greeting", {"name": "World"})) == {
            "reply": "Hello, World!"
        }
        assert await within(client.request("count", returns=Item)) == Item(name="apple", count=3)
        with pytest.raises(PermissionDenied, match="not for you"):
            await within(client.request("forbidden"))
        with pytest.raises(InternalError) as caught:
            await within(client.request("broken"))
        assert SECRET not in str(caught.value)
        with pytest.raises(RPCError):
            await within(client.request("nobody handles this"))
        with pytest.raises(RPCTimeout):
            await within(client.request("slow", timeout=0.05))
        assert await within(client.request("greeting", {"name": "you"}))


async def test_send_with_ack_returns_when_the_handler_has_ended() -> None:
    server = new_server()
    gate = asyncio.Event()
    done: list[str] = []

    @server.on("work")
    async def work(client: Any, message: Any) -> str:
        await gate.wait()
        done.append("work")
        return "dropped"

    async with server, new_client(server) as client:
        await within(client.send("work"))
        sending = asyncio.ensure_future(client.send("work", ack=True))
        await round_trips(client)
        assert not sending.done() and done == []
        gate.set()
        await within(sending)
        assert done == ["work", "work"]


async def test_a_message_of_any_kind_of_data_arrives_unchanged() -> None:
    server = new_server()
    got: asyncio.Queue[Any] = asyncio.Queue()

    @server.on("data")
    async def on_data(client: Any, message: Any) -> None:
        got.put_nowait(message)

    values: list[Any] = [
        None,
        True,
        0,
        -1,
        2**63,
        1.5,
        "text \N{SNOWMAN}",
        b"\x00\xff",
        [],
        {},
        [1, [2, {"three": [None]}]],
        {"a": {"b": b"c"}},
        "x" * 100_000,
        bytes(300_000),
    ]
    async with server, new_client(server) as client:
        for value in values:
            await within(client.send("data", value))
            assert await within(got.get()) == value
        await within(client.send("data"))
        assert await within(got.get()) is None


async def test_a_message_nobody_handles_harms_nothing() -> None:
    async with neighbourhood(new_server()) as neighbour:
        await within(neighbour.client.send("nobody handles this", {"n": 1}))
        await neighbour.check()
        for connection in list(neighbour.server.connections.values()):
            await within(connection.send("nor this", {"n": 1}))
        await neighbour.check()


async def test_a_message_handler_that_raises_harms_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    got: list[int] = []

    @server.on("item")
    async def item(client: Any, message: Any) -> None:
        got.append(message["n"])
        if message["n"] == 1:
            raise RuntimeError("item 1 is broken")

    async with neighbourhood(server) as neighbour:
        for number in range(3):
            await within(neighbour.client.send("item", {"n": number}))
        await round_trips(neighbour.client)
        assert got == [0, 1, 2]
        assert "item 1 is broken" in caplog.text


async def test_the_annotation_of_a_message_validates_it() -> None:
    server = new_server()
    got: list[Item] = []

    @server.on("item")
    async def item(client: Connection, message: Item) -> str:
        assert isinstance(message, Item)
        got.append(message)
        return client.identity

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        assert await within(client.request("item", {"name": "apple", "count": 2})) == "default"
        with pytest.raises(InvalidParams) as caught:
            await within(client.request("item", {"name": "apple", "count": SECRET}))
        assert SECRET not in str(caught.value)
        assert got == [Item(name="apple", count=2)]


# Broadcast


class Crowd:
    """Three clients of one server, and what each of them has heard."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.clients = [new_client(server, name=f"client {number}") for number in range(3)]
        self.heard: list[list[Any]] = [[], [], []]
        for client, heard in zip(self.clients, self.heard, strict=True):
            self._listen(client, heard)

    def _listen(self, client: Client, heard: list[Any]) -> None:
        @client.on("news")
        async def news(message: Any) -> None:
            heard.append(message)

    def connection(self, number: int) -> Connection:
        """Return the server's end of a client."""
        name = f"client {number}"
        (found,) = [c for c in self.server.connections.values() if c.name == name]
        return found

    async def settle(self) -> None:
        """Wait until what was broadcast has been handled."""
        for client in self.clients:
            await round_trips(client, 5)

    async def __aenter__(self) -> Crowd:
        for client in self.clients:
            await within(client.connect())
        return self

    async def __aexit__(self, *exc: object) -> None:
        for client in self.clients:
            await within(client.disconnect())


@pytest.mark.parametrize("reliable", [False, True])
async def test_broadcast_reaches_all_but_the_excluded_and_counts_them(reliable: bool) -> None:
    async with new_server() as server, Crowd(server) as crowd:
        first, second, third = (crowd.connection(number) for number in range(3))
        excludes: list[tuple[Any, list[int]]] = [
            (None, [0, 1, 2]),
            (first, [1, 2]),
            (second.id, [0, 2]),
            ([first, third], [1]),
            ((first.id, second.id), [2]),
            ({second, third.id}, [0]),
            ((c for c in (first, second, third)), []),
            ([], [0, 1, 2]),
        ]
        expected: list[list[int]] = [[], [], []]
        for number, (exclude, reached) in enumerate(excludes):
            count = await within(
                server.broadcast("news", number, exclude=exclude, reliable=reliable)
            )
            assert count == len(reached)
            for index in reached:
                expected[index].append(number)
            # Each is handled before the next: best effort promises no order among others.
            await crowd.settle()
        assert crowd.heard == expected


async def test_broadcast_never_waits_for_a_peer_that_does_not_read() -> None:
    async with neighbourhood(new_server()) as neighbour:
        server, client = neighbour.server, neighbour.client
        heard = 0

        @client.on("blob")
        async def blob(message: Any) -> None:
            nonlocal heard
            heard += 1

        async with logged_in(server.address):
            for _ in range(400):
                await within(server.broadcast("blob", bytes(65536)), 2)
                await round_trips(client, 1)
            assert heard == 400


async def test_broadcast_to_nobody_reaches_nobody() -> None:
    async with new_server() as server:
        assert await within(server.broadcast("news", 1)) == 0


async def test_a_best_effort_broadcast_carries_no_number_and_a_reliable_one_does() -> None:
    async with new_server() as server, logged_in(server.address) as peer:
        await within(server.broadcast("news", {"n": 1}))
        plain = await peer.until(raw.MESSAGE)
        assert (plain.id, plain.flags, plain.body) == (0, raw.PRIORITY, ["news", {"n": 1}])
        await within(server.broadcast("news", {"n": 2}, reliable=True))
        reliable = await peer.until(raw.MESSAGE)
        assert (reliable.flags, reliable.reserved) == (raw.SEQUENCED, 1)
        assert reliable.body == ["news", {"n": 2}]


# Calls that run side by side


async def test_calls_run_concurrently() -> None:
    server = new_server()
    waiting = 0
    everybody = asyncio.Event()

    @server.rpc
    async def meet() -> str:
        nonlocal waiting
        waiting += 1
        if waiting == 100:
            everybody.set()
        await everybody.wait()
        return "met"

    async with server, new_client(server) as client:
        calls = asyncio.gather(*(client.rpc.call("meet") for _ in range(100)))
        assert await within(calls) == ["met"] * 100


async def test_a_thousand_calls_get_each_its_own_answer() -> None:
    async with new_server() as server, new_client(server) as client:
        calls = (client.rpc.call("add", args=data(a=n, b=n)) for n in range(1000))
        assert await within(asyncio.gather(*calls)) == [2 * n for n in range(1000)]


async def test_calls_wait_in_line_for_the_places_that_the_server_offers() -> None:
    server = new_server(limits=Limits(max_calls=2))
    gate = asyncio.Event()
    running = most = 0

    @server.rpc
    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await gate.wait()
        running -= 1

    async with neighbourhood(server) as neighbour, new_client(server) as client:
        calls = asyncio.gather(*(client.rpc.call("work") for _ in range(6)))
        await round_trips(neighbour.client)
        assert running == 2
        # The line is part of the deadline.
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("work", timeout=0.05))
        gate.set()
        await within(calls)
        assert most == 2


async def test_without_backpressure_a_wait_is_an_error() -> None:
    server = new_server(limits=Limits(max_calls=2, max_messages=4))
    gate = asyncio.Event()

    @server.rpc
    async def work() -> None:
        await gate.wait()

    @server.on("item")
    async def item(client: Any, message: Any) -> None:
        await gate.wait()

    async with server, new_client(server, enable_backpressure=False) as client:
        calls = [asyncio.ensure_future(client.rpc.call("work")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as caught:
            await within(client.rpc.call("work"))
        assert caught.value.retryable
        with pytest.raises(Overloaded):
            for _ in range(10):
                await within(client.send("item", {}))
        gate.set()
        await within(asyncio.gather(*calls))


async def test_a_call_made_inside_a_handler_does_not_wait_in_line() -> None:
    server = new_server()
    answers: asyncio.Queue[str] = asyncio.Queue()

    @server.rpc
    async def ask_back(connection: Connection) -> str:
        try:
            await connection.rpc.call("wait")
        except Overloaded:
            return "overloaded"
        return "answered"

    async with server:
        limits = Limits(min_iterations=4096, max_calls=1)
        client = new_client(server, limits=limits)
        gate = asyncio.Event()

        @client.rpc
        async def wait() -> None:
            answers.put_nowait("waiting")
            await gate.wait()

        async with client:
            first = asyncio.ensure_future(client.rpc.call("ask_back"))
            await within(answers.get())
            assert await within(client.rpc.call("ask_back")) == "overloaded"
            gate.set()
            assert await within(first) == "answered"


# Plain functions


async def test_a_plain_function_runs_in_a_thread_and_blocks_nobody() -> None:
    server = new_server()
    release = threading.Event()
    threads: list[int] = []

    @server.rpc
    def block() -> str:
        threads.append(threading.get_ident())
        assert release.wait(10)
        return "released"

    async with neighbourhood(server) as neighbour:
        calls = [asyncio.ensure_future(neighbour.client.rpc.call("block")) for _ in range(3)]
        await round_trips(neighbour.client)
        assert not any(call.done() for call in calls)
        release.set()
        assert await within(asyncio.gather(*calls)) == ["released"] * 3
        assert threading.get_ident() not in threads


async def test_a_plain_function_may_ask_for_the_loop() -> None:
    server = new_server()

    @server.rpc(thread=False)
    def quick() -> int:
        return threading.get_ident()

    @server.rpc
    def threaded() -> int:
        return threading.get_ident()

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("quick")) == threading.get_ident()
        assert await within(client.rpc.call("threaded")) != threading.get_ident()


async def test_a_thread_can_call_back_into_the_loop() -> None:
    server = new_server()

    @server.rpc
    def ask(n: int, connection: Connection) -> str:
        async def back(number: int) -> Any:
            assert threading.current_thread() is threading.main_thread()
            return await connection.rpc.call("double", args=data(n=number))

        return f"the client says {from_thread.run(back, n)}"

    async with server:
        client = new_client(server)

        @client.rpc
        def double(n: int) -> int:
            return 2 * n

        async with client:
            assert await within(client.rpc.call("ask", args=data(n=4))) == "the client says 8"


async def test_a_plain_function_that_raises_is_like_any_other() -> None:
    server = new_server()

    @server.rpc
    def broken() -> None:
        raise RuntimeError(SECRET)

    @server.rpc
    def refuse() -> None:
        raise PermissionDenied("not for you")

    async with neighbourhood(server) as neighbour:
        with pytest.raises(InternalError) as caught:
            await within(neighbour.client.rpc.call("broken"))
        assert SECRET not in str(caught.value)
        with pytest.raises(PermissionDenied, match="not for you"):
            await within(neighbour.client.rpc.call("refuse"))


async def test_calls_do_not_see_each_others_context() -> None:
    server = new_server()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    @server.rpc
    async def on_the_loop(value: str) -> list[str]:
        before = variable.get()
        variable.set(value)
        await asyncio.sleep(0)
        return [before, variable.get()]

    @server.rpc
    def in_a_thread(value: str) -> list[str]:
        before = variable.get()
        variable.set(value)
        return [before, variable.get()]

    async with server, new_client(server) as client:
        for method in ("on_the_loop", "in_a_thread"):
            calls = (client.rpc.call(method, args=data(value=str(n))) for n in range(50))
            seen = await within(asyncio.gather(*calls))
            assert seen == [["unset", str(n)] for n in range(50)]


async def test_handlers_have_a_task_of_their_own() -> None:
    server = new_server()

    @server.rpc
    async def times_out() -> str:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.01)
        except asyncio.TimeoutError:
            return "timed out"
        return "never"

    @server.rpc
    async def cancels_itself() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return "never"

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        assert await within(client.rpc.call("times_out")) == "timed out"
        with pytest.raises(ConduitError):
            await within(client.rpc.call("cancels_itself"))
        await neighbour.check()


# Errors


async def test_an_unexpected_error_is_logged_under_the_id_that_the_caller_gets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()

    @server.rpc
    async def broken() -> None:
        raise ValueError(SECRET)

    async with neighbourhood(server) as neighbour:
        ids = set()
        for _ in range(2):
            caplog.clear()
            with pytest.raises(InternalError) as caught:
                await within(neighbour.client.rpc.call("broken"))
            error = caught.value
            assert isinstance(error.error_id, str) and error.error_id
            ids.add(error.error_id)
            for text in (str(error), repr(error), error.message, repr(error.details)):
                assert SECRET not in text and "ValueError" not in text
            logged = [r for r in caplog.records if error.error_id in r.getMessage()]
            assert logged and all(r.name.startswith("conduit.") for r in logged)
            assert any("broken" in r.getMessage() for r in logged)
            assert max(r.levelno for r in logged) >= logging.ERROR
            assert "Traceback" in caplog.text and SECRET in caplog.text
        assert len(ids) == 2


async def test_a_handler_raises_the_classes_that_the_caller_catches() -> None:
    server = new_server()

    @server.rpc
    async def fail(how: str) -> None:
        if how == "denied":
            raise PermissionDenied("not for you")
        if how == "unavailable":
            raise Unavailable("closed for lunch")
        if how == "stock":
            raise OutOfStock("no apples left")

    async with server, new_client(server) as client:
        with pytest.raises(PermissionDenied) as denied:
            await within(client.rpc.call("fail", args=data(how="denied")))
        assert (denied.value.code, denied.value.message) == ("permission_denied", "not for you")
        with pytest.raises(Unavailable, match="closed for lunch"):
            await within(client.rpc.call("fail", args=data(how="unavailable")))
        with pytest.raises(RPCError) as caught:
            await within(client.rpc.call("fail", args=data(how="stock")))
        assert (caught.value.code, caught.value.message) == ("out_of_stock", "no apples left")


async def test_the_text_of_an_error_does_not_leak_through_two_hops() -> None:
    server = new_server()

    @server.rpc
    async def outer(connection: Connection) -> None:
        await connection.rpc.call("inner", timeout=5)

    async with server:
        client = new_client(server)

        @client.rpc
        async def inner() -> None:
            raise RuntimeError(SECRET)

        async with client:
            with pytest.raises(RPCError) as caught:
                await within(client.rpc.call("outer"))
            assert SECRET not in str(caught.value)


async def test_an_unknown_method_names_the_nearest_one_with_its_signature() -> None:
    server = new_server()

    @server.rpc
    async def unrelated(q: float) -> float:
        return q

    async with server, new_client(server) as client:
        with pytest.raises(MethodNotFound) as caught:
            await within(client.rpc.call("ad", args=data(a=1, b=2)))
        text = str(caught.value)
        assert "'ad'" in text or '"ad"' in text or " ad" in text
        assert re.search(r"add\(a: int, b: int\)", text)
        assert "unrelated" not in text
        with pytest.raises(MethodNotFound, match="zzzzzzzz"):
            await within(client.rpc.call("zzzzzzzz"))


# Deadlines and cancellation


async def test_a_cancelled_call_cancels_its_handler() -> None:
    server = new_server()
    running = asyncio.Event()
    cancelled = asyncio.Event()

    @server.rpc
    async def sleeper() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with server, new_client(server) as client:
        call = asyncio.ensure_future(client.rpc.call("sleeper"))
        await within(running.wait())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await within(cancelled.wait())
        await round_trips(client, 1)


async def test_the_timeout_of_a_method_ends_its_handler() -> None:
    server = new_server()
    cancelled = asyncio.Event()

    @server.rpc(timeout=0.05)
    async def sleeper() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with server, new_client(server) as client:
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("sleeper", timeout=60))
        await within(cancelled.wait())


async def test_a_handler_that_ignores_its_cancellation_keeps_its_place() -> None:
    server = new_server(limits=Limits(max_calls=1))
    gate = asyncio.Event()
    running = asyncio.Event()

    @server.rpc
    async def stubborn() -> None:
        running.set()
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    async with neighbourhood(server) as neighbour, new_client(server) as client:
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("stubborn", timeout=0.05))
        assert running.is_set()
        with pytest.raises((RPCTimeout, Overloaded)):
            await within(client.rpc.call("add", args=data(a=1, b=2), timeout=0.2))
        await neighbour.check()
        gate.set()
        await round_trips(client, 1)


async def test_the_calls_of_a_server_have_a_deadline_too() -> None:
    async with new_server(rpc_timeout=0.05) as server:
        client = new_client(server)

        @client.rpc
        async def sleeper() -> None:
            await asyncio.Event().wait()

        async with client:
            (connection,) = server.connections.values()
            with pytest.raises(RPCTimeout):
                await within(connection.rpc.call("sleeper"))


# Validation


async def test_a_lone_model_takes_all_parameters() -> None:
    server = new_server()

    @server.rpc
    async def buy(order: Order) -> str:
        assert isinstance(order, Order)
        return f"{order.customer}: {sum(item.count for item in order.items)} ({order.note})"

    async with server, new_client(server) as client:
        items = [{"name": "apple", "count": 2}, {"name": "pear", "count": 3}]
        args = data(customer="Ann", items=items)
        assert await within(client.rpc.call("buy", args=args)) == "Ann: 5 (None)"
        with pytest.raises(InvalidParams) as caught:
            bad = [{"name": "apple", "count": 2}, {"name": "pear", "count": 0}]
            await within(client.rpc.call("buy", args=data(customer=SECRET, items=bad)))
        assert any(path.endswith("items.1.count") for path in paths(caught.value))
        assert SECRET not in str(caught.value)


async def test_models_and_dataclasses_among_other_parameters() -> None:
    server = new_server()

    @server.rpc
    async def distance(start: Point, end: Point, unit: str = "m") -> str:
        assert isinstance(start, Point) and isinstance(end, Point)
        return f"{abs(end.x - start.x) + abs(end.y - start.y)} {unit}"

    @server.rpc
    async def label(item: Item, size: Percent) -> str:
        assert isinstance(item, Item)
        return f"{item.name} {size}"

    async with server, new_client(server) as client:
        args = data(start={"x": 0, "y": 0}, end={"x": 3, "y": 4.5})
        assert await within(client.rpc.call("distance", args=args)) == "7.5 m"
        with pytest.raises(InvalidParams) as caught:
            bad = data(start={"x": 0}, end={"x": "far", "y": 4})
            await within(client.rpc.call("distance", args=bad))
        assert paths(caught.value) == {"start.y", "end.x"}
        args = data(item={"name": "pear", "count": 1}, size=50)
        assert await within(client.rpc.call("label", args=args)) == "pear 50"
        with pytest.raises(InvalidParams) as caught:
            bad = data(item={"name": "pear", "count": 0}, size=101)
            await within(client.rpc.call("label", args=bad))
        assert paths(caught.value) == {"item.count", "size"}


async def test_models_may_be_given_as_arguments() -> None:
    server = new_server()

    @server.rpc
    async def label(item: Item, at: Point) -> str:
        return f"{item.name} {at.x}"

    async with server, new_client(server) as client:
        args = data(item=Item(name="pear", count=1), at=Point(1.0, 2.0))
        assert await within(client.rpc.call("label", args=args)) == "pear 1.0"


@pytest.mark.parametrize(
    ("method", "good", "bad"),
    [
        ("optional", [1, None], ["x", 1.5, []]),
        ("union", [1, "x"], [None, [], 1.5]),
        ("literal", ["red", "green"], ["blue", 1, None]),
        ("percent", [0, 100], [-1, 101, "x", None]),
        ("name", ["ab", "abcde"], ["a", "abcdef", "AB", 5]),
        ("listed", [[], [1, 2]], [["x"], 5, {"a": 1}]),
        ("mapped", [{}, {"a": 1}], [{"a": "x"}, [], 5]),
        ("anything", [None, 1, "x", [1], {"a": 1}], []),
        ("flag", [True, False], ["x", [], None]),
        ("blob", [b"", b"\x00\xff"], [5, None, []]),
    ],
)
async def test_each_kind_of_annotation_is_checked(
    method: str, good: list[Any], bad: list[Any]
) -> None:
    server = new_server()

    @server.rpc
    async def optional(value: Optional[int]) -> Optional[int]:  # noqa: UP045
        return value

    @server.rpc
    async def union(value: Union[int, str]) -> Union[int, str]:  # noqa: UP007
        return value

    @server.rpc
    async def literal(value: Colour) -> Colour:
        return value

    @server.rpc
    async def percent(value: Percent) -> Percent:
        return value

    @server.rpc
    async def name(value: Name) -> Name:
        return value

    @server.rpc
    async def listed(value: list[int]) -> list[int]:
        return value

    @server.rpc
    async def mapped(value: dict[str, int]) -> dict[str, int]:
        return value

    @server.rpc
    async def anything(value: Any) -> Any:
        return value

    @server.rpc
    async def flag(value: bool) -> bool:
        return value

    @server.rpc
    async def blob(value: bytes) -> bytes:
        return value

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        for value in good:
            result = await within(client.rpc.call(method, args=data(value=value)))
            assert result == value and type(result) is type(value)
        for value in bad:
            with pytest.raises(InvalidParams) as caught:
                await within(client.rpc.call(method, args=data(value=value)))
            assert all(path.split(".")[0] == "value" for path in paths(caught.value))
            assert caught.value.code == "invalid_params"


async def test_defaults_and_keyword_only_parameters() -> None:
    server = new_server()

    @server.rpc
    async def show(a: int, b: int = 2, *, c: int, d: Optional[int] = None) -> list[Any]:  # noqa: UP045
        return [a, b, c, d]

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("show", args=data(a=1, c=3))) == [1, 2, 3, None]
        assert await within(client.rpc.show(a=1, b=5, c=6, d=7)) == [1, 5, 6, 7]
        with pytest.raises(InvalidParams) as caught:
            await within(client.rpc.call("show", args=data(b=1)))
        assert paths(caught.value) == {"a", "c"}
        # By position there is no way to give what is keyword-only.
        with pytest.raises(InvalidParams) as caught:
            await within(client.rpc.call("show", args=[1, 2, 3]))
        assert any("c" in path for path in paths(caught.value))


async def test_arguments_may_be_a_list_by_position() -> None:
    async with new_server() as server, new_client(server) as client:
        assert await within(client.rpc.call("add", args=[10, 20])) == 30
        assert await within(client.rpc.call("add", args=(10, 20))) == 30
        for wrong in ([1], [1, 2, 3], [], ["x", 2]):
            with pytest.raises(InvalidParams):
                await within(client.rpc.call("add", args=wrong))


async def test_an_unknown_parameter_is_an_error_unless_it_is_to_be_ignored() -> None:
    server = new_server()

    @server.rpc(extra="ignore")
    async def lenient(a: int) -> int:
        return a

    async with server, new_client(server) as client:
        with pytest.raises(InvalidParams) as caught:
            await within(client.rpc.call("add", args=data(a=1, b=2, colour=SECRET)))
        assert paths(caught.value) == {"colour"}
        assert SECRET not in str(caught.value)
        assert await within(client.rpc.call("lenient", args=data(a=1, colour="red"))) == 1


async def test_a_method_without_parameters_takes_none() -> None:
    server = new_server()

    @server.rpc
    async def nothing() -> str:
        return "nothing"

    async with server, new_client(server) as client:
        empty: list[Any] = [None, {}, []]
        for args in empty:
            assert await within(client.rpc.call("nothing", args=args)) == "nothing"
        with pytest.raises(InvalidParams):
            await within(client.rpc.call("nothing", args=data(a=1)))


async def test_the_connection_is_injected_and_cannot_be_sent() -> None:
    server = new_server()

    @server.rpc
    async def whoami(greeting: str, connection: Connection) -> str:
        return f"{greeting} {connection.name}"

    async with server, new_client(server, name="Ann") as client:
        assert await within(client.rpc.call("whoami", args=data(greeting="hi"))) == "hi Ann"
        assert await within(client.rpc.call("whoami", args=["hi"])) == "hi Ann"
        with pytest.raises(InvalidParams):
            await within(client.rpc.call("whoami", args=data(greeting="hi", connection="me")))
        (described,) = [m for m in await client.rpc.discover() if m["name"] == "whoami"]
        assert "connection" not in str(described["parameters"])


async def test_errors_show_every_path_and_never_the_value(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()

    @server.rpc
    async def strict(
        number: int,
        colour: Colour,
        name: Name,
        point: Point,
        either: Union[int, bool],  # noqa: UP007
    ) -> None:
        return None

    async with server, Relay(server.address) as relay, new_client(relay.address) as client:
        args = data(number=SECRET, colour=SECRET, name=SECRET, point=SECRET, either=SECRET)
        with pytest.raises(InvalidParams) as caught:
            await within(client.rpc.call("strict", args=args))
        error = caught.value
        tops = {path.split(".")[0] for path in paths(error)}
        assert tops == {"number", "colour", "name", "point", "either"}
        for text in (str(error), repr(error), error.message, repr(error.details)):
            assert SECRET not in text
        assert "number" in str(error)
        assert SECRET.encode() not in relay.downward
        assert SECRET in relay.upward.decode("latin-1")


async def test_a_thousand_errors_are_not_all_told() -> None:
    server = new_server()

    @server.rpc
    async def sums(values: list[int]) -> int:
        return sum(values)

    async with server, new_client(server) as client:
        with pytest.raises(InvalidParams) as caught:
            await within(client.rpc.call("sums", args=data(values=["x"] * 1000)))
        assert 1 <= len(caught.value.errors) <= 10


async def test_results_are_checked_and_dumped_by_their_annotation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()

    @server.rpc
    async def model() -> Item:
        return Item(name="apple", count=3)

    @server.rpc
    async def models() -> list[Item]:
        return [Item(name="apple", count=3)]

    @server.rpc
    async def point() -> Point:
        return Point(1.0, 2.0)

    @server.rpc
    async def wrong() -> int:
        return SECRET  # type: ignore[return-value]

    @server.rpc
    async def unchecked():
        return {"any": ["thing"]}

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        apple = {"name": "apple", "count": 3}
        assert await within(client.rpc.call("model")) == apple
        assert await within(client.rpc.call("models")) == [apple]
        assert await within(client.rpc.call("point")) == {"x": 1.0, "y": 2.0}
        assert await within(client.rpc.call("unchecked")) == {"any": ["thing"]}
        with pytest.raises(InternalError) as caught:
            await within(client.rpc.call("wrong"))
        assert SECRET not in str(caught.value)
        assert caught.value.error_id is not None and caught.value.error_id in caplog.text


async def test_returns_turns_the_result_into_what_the_caller_wants() -> None:
    server = new_server()

    @server.rpc
    async def model() -> Item:
        return Item(name="apple", count=3)

    @server.rpc
    async def number() -> Any:
        return "not a number"

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("model", returns=Item)) == Item(name="apple", count=3)
        added = await within(client.rpc.call("add", args=data(a=1, b=2), returns=int))
        assert added == 3
        with pytest.raises((ConduitError, ValueError)):
            await within(client.rpc.call("number", returns=int))
        await round_trips(client, 1)


async def test_discovery_describes_parameters_by_their_schema() -> None:
    server = new_server()

    @server.rpc
    async def paint(colour: Colour, strength: Percent = 50, *, at: Point) -> Item:
        """Paint something.

        It takes a while.
        """
        return Item(name=colour, count=strength + int(at.x))

    async with server, new_client(server) as client:
        (described,) = [m for m in await client.rpc.discover() if m["name"] == "paint"]
        assert described["description"].startswith("Paint something.")
        parameters = str(described["parameters"])
        for word in ("colour", "red", "green", "strength", "50", "100", "at", "number"):
            assert word in parameters
        assert "count" in str(described["returns"])


# Life


async def test_stop_returns_with_live_clients_and_calls_in_flight() -> None:
    server = new_server()
    running = asyncio.Event()
    cancelled = asyncio.Event()

    @server.rpc
    async def sleeper() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    await within(server.start())
    address = server.address
    clients = [new_client(server, reconnect_enabled=False) for _ in range(5)]
    for client in clients:
        await within(client.connect())
    call = asyncio.ensure_future(clients[0].rpc.call("sleeper", timeout=60))
    await within(running.wait())
    await within(server.stop(grace=0.1), 5)
    assert cancelled.is_set()
    with pytest.raises(ConduitError):
        await within(call)
    for client in clients:
        await within(client.wait_closed())
        assert client.status is Status.CLOSED
    assert not server.connections
    with pytest.raises(ConnectionRefusedError):
        await within(new_client(address).connect())


async def test_stop_gives_calls_in_flight_their_time() -> None:
    server = new_server()
    running = asyncio.Event()
    gate = asyncio.Event()

    @server.rpc
    async def finish() -> str:
        running.set()
        await gate.wait()
        return "finished"

    await within(server.start())
    client = new_client(server, reconnect_enabled=False)
    await within(client.connect())
    async with logged_in(server.address) as peer:
        call = asyncio.ensure_future(client.rpc.call("finish"))
        await within(running.wait())
        stopping = asyncio.ensure_future(server.stop(grace=8))
        code, reason, grace, _ = (await peer.until(raw.GOAWAY)).body
        assert (code, grace) == (1001, 8000) and isinstance(reason, str)
        assert not stopping.done()
        gate.set()
        assert await within(call) == "finished"
        assert await peer.closed() is not None
        await within(stopping, 5)
    await within(client.wait_closed())


async def test_stop_returns_although_a_thread_is_busy() -> None:
    server = new_server()
    release = threading.Event()
    running = threading.Event()

    @server.rpc
    def block() -> None:
        running.set()
        release.wait(20)

    await within(server.start())
    client = new_client(server, reconnect_enabled=False)
    await within(client.connect())
    call = asyncio.ensure_future(client.rpc.call("block"))
    try:
        assert await asyncio.to_thread(running.wait, 10)
        await within(server.stop(grace=0.1), 8)
        with pytest.raises(ConduitError):
            await within(call)
    finally:
        release.set()
    await within(client.wait_closed())


async def test_stop_may_be_called_twice_and_at_once() -> None:
    server = new_server()
    stops: list[Server] = []

    @server.on_shutdown
    async def shutdown(srv: Server) -> None:
        stops.append(srv)

    await within(server.start())
    client = new_client(server, reconnect_enabled=False)
    await within(client.connect())
    await within(asyncio.gather(server.stop(), server.stop()))
    await within(client.wait_closed())
    await within(server.stop())
    assert stops == [server]


async def test_tasks_of_the_server_end_with_it() -> None:
    server = new_server()
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with server:
        task = server.start_task(forever())
        assert isinstance(task, asyncio.Task)
        await asyncio.sleep(0)
        assert not task.done()
    assert ended.is_set() and task.done()


@pytest.mark.parametrize("moment", ["startup", "shutdown"])
async def test_tasks_of_a_server_end_although_a_start_fails_or_a_stop_has_begun(
    moment: str,
) -> None:
    server, tasks = new_server(), list[asyncio.Task[None]]()

    def begin(server: Server) -> None:
        tasks.append(server.start_task(asyncio.sleep(3600)))

    def fail(server: Server) -> None:
        raise RuntimeError("no database")

    if moment == "startup":
        server.on_startup(begin)
        server.on_startup(fail)
        with pytest.raises(RuntimeError, match="no database"):
            await within(server.start())
    else:
        server.on_shutdown(begin)
        await within(server.start())
        await within(server.stop())
    assert [task.cancelled() for task in tasks] == [True]


async def test_nothing_is_left_running_after_both_sides_are_gone() -> None:
    before = asyncio.all_tasks()
    async with new_server() as server, new_client(server) as client:
        await round_trips(client)
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_server_can_end_one_connection() -> None:
    server = new_server()
    left: asyncio.Queue[Connection] = asyncio.Queue()

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: Any) -> None:
        left.put_nowait(connection)

    async with neighbourhood(server):
        client = new_client(server, name="unwanted", reconnect_enabled=False)
        reasons: asyncio.Queue[Any] = asyncio.Queue()

        @client.on_disconnect
        async def lost(cli: Client, reason: Any) -> None:
            reasons.put_nowait(reason)

        await within(client.connect())
        (connection,) = [c for c in server.connections.values() if c.name == "unwanted"]
        assert not connection.closed
        await within(connection.close(1000, "that is enough"))
        await within(connection.wait_closed())
        assert connection.closed
        assert await within(left.get()) is connection
        assert connection.id not in server.connections
        await within(client.wait_closed())
        assert "that is enough" in str(await within(reasons.get()))
        with pytest.raises(ConnectionClosed):
            await within(connection.send("news", 1))
        with pytest.raises(ConnectionClosed):
            await within(connection.rpc.call("anything"))


@pytest.mark.parametrize(
    ("code", "comes_back"), [(1000, False), (4403, False), (1001, True), (1013, True), (4000, True)]
)
async def test_a_server_says_by_the_code_whether_a_client_is_to_come_back(
    code: int, comes_back: bool
) -> None:
    server, came = new_server(), asyncio.Queue[Connection]()

    @server.on_client_connect
    def connected(connection: Connection) -> None:
        came.put_nowait(connection)

    async with server, new_client(server) as client:
        first = await within(came.get())
        await within(first.close(code, "for a reason"))
        if comes_back:
            assert await within(came.get()) is not first
            return
        await within(client.wait_closed())
        assert client.status is Status.CLOSED and came.empty()
        with pytest.raises(ConnectionClosed):
            await within(client.rpc.add(a=1, b=2))


async def test_wait_closed_returns_when_the_client_is_done() -> None:
    async with new_server() as server:
        client = new_client(server)
        await within(client.connect())
        waiting = asyncio.ensure_future(client.wait_closed())
        await round_trips(client)
        assert not waiting.done()
        await within(client.disconnect())
        await within(waiting)
        await within(client.wait_closed())
        await within(client.disconnect())


async def test_a_client_is_of_no_use_before_it_is_connected() -> None:
    async with new_server() as server:
        client = new_client(server)
        for attempt in (
            lambda: client.rpc.call("add", args=data(a=1, b=2)),
            lambda: client.send("note", {}),
            lambda: client.request("note", {}),
        ):
            with pytest.raises((ConnectionClosed, RuntimeError)):
                await within(attempt())
        async with client:
            await round_trips(client, 1)


async def test_connect_with_retry_waits_for_the_server() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        relay.unplug()
        client = new_client(relay.address, reconnect_delay=0.001)
        connecting = asyncio.ensure_future(client.connect(retry=True))
        await relay.attempted(3)
        assert not connecting.done()
        relay.plugged = True
        await within(connecting)
        await round_trips(client, 1)
        await within(client.disconnect())


async def test_a_plain_connect_is_one_attempt() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        relay.unplug()
        with pytest.raises((OSError, ConduitError)):
            await within(new_client(relay.address).connect())
        assert relay.attempts == 1


async def test_handlers_stay_after_a_reconnect_and_hooks_may_call() -> None:
    server = new_server(resume_ttl=0)
    async with server, Relay(server.address) as relay:
        client = new_client(relay.address)
        heard: asyncio.Queue[Any] = asyncio.Queue()
        hooks: asyncio.Queue[Any] = asyncio.Queue()

        @client.on("news")
        async def news(message: Any) -> None:
            heard.put_nowait(message)

        @client.on_connect
        async def connected(cli: Client) -> None:
            hooks.put_nowait(("connect", await cli.rpc.call("add", args=data(a=1, b=1))))

        @client.on_disconnect
        async def disconnected(cli: Client, reason: Any) -> None:
            hooks.put_nowait(("disconnect", bool(str(reason))))

        @client.on_reconnect
        async def reconnected(cli: Client) -> None:
            hooks.put_nowait(("reconnect", await cli.rpc.call("add", args=data(a=2, b=2))))

        async with client:
            assert await within(hooks.get()) == ("connect", 2)
            relay.cut()
            assert await within(hooks.get()) == ("disconnect", True)
            assert await within(hooks.get()) == ("reconnect", 4)
            await within(server.broadcast("news", 1))
            assert await within(heard.get()) == 1


async def test_a_client_comes_back_when_the_server_is_started_again() -> None:
    first = new_server()
    await within(first.start())
    port = first.address[1]
    client = new_client(first, reconnect_attempts=0, reconnect_delay=0.01)
    again = asyncio.Event()

    @client.on_reconnect
    async def reconnected(cli: Client) -> None:
        again.set()

    await within(client.connect())
    await within(first.stop(grace=0.1))
    async with new_server(port=port):
        await within(again.wait(), 20)
        await round_trips(client, 1)
        await within(client.disconnect())


async def test_pending_calls_of_the_server_fail_at_once_too() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_enabled=False)
        running = asyncio.Event()

        @client.rpc
        async def sleeper() -> None:
            running.set()
            await asyncio.Event().wait()

        await within(client.connect())
        (connection,) = server.connections.values()
        call = asyncio.ensure_future(connection.rpc.call("sleeper", timeout=60))
        await within(running.wait())
        relay.cut()
        with pytest.raises(ConnectionLost) as caught:
            await within(call, 3)
        assert caught.value.executed is None
        await within(client.wait_closed())


async def test_compression_carries_large_values_both_ways() -> None:
    server = new_server(enable_compression=True)

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    @server.on("echo")
    async def on_echo(client: Any, message: Any) -> Any:
        return message

    async with neighbourhood(server), new_client(server, enable_compression=True) as client:
        for size in (1, 1023, 1024, 1025, 100_000, 1_000_000):
            value = {"text": "abc " * (size // 4), "end": b"\x00" * 10}
            assert await within(client.rpc.call("echo", args=data(value=value))) == value
            assert await within(client.request("echo", value)) == value


async def test_bytes_of_many_mebibytes_arrive_however_they_are_passed() -> None:
    """As the only value, behind and before others, with a deadline, in answers and in messages."""
    limits = FAST_LOGIN.model_copy(update={"max_payload": 17 << 20})
    server = new_server(limits=limits)

    @server.rpc
    async def echo(value: Any, other: Any = None) -> Any:
        return value

    @server.on("echo")
    async def on_echo(client: Any, message: Any) -> Any:
        return message

    values = [bytes([number]) * size for number, size in enumerate((4 << 20, 9_000_000, 16 << 20))]
    async with neighbourhood(server), new_client(server, limits=limits) as client:
        for value in values:
            assert await within(client.rpc.echo(value=value)) == value
            assert await within(client.rpc.call("echo", args=data(value=value), timeout=9)) == value
            assert await within(client.rpc.call("echo", args=[value[9:], "x"])) == value[9:]
            assert await within(client.request("echo", value)) == value
        every = await within(asyncio.gather(*(client.rpc.echo(value=value) for value in values)))
        assert every == values


async def test_a_ping_measures_the_way_there_and_back() -> None:
    async with new_server() as server, new_client(server) as client:
        for _ in range(3):
            assert 0 < await within(client.ping()) < 5
        (connection,) = server.connections.values()
        assert 0 < await within(connection.ping()) < 5
        await within(asyncio.gather(*(client.ping() for _ in range(10))))


async def test_every_frame_can_be_logged_without_the_secrets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG, logger="conduit.wire"):
        async with new_server() as server, new_client(server) as client:
            assert await within(client.rpc.call("add", args=data(a=10, b=20))) == 30
    wire = "\n".join(r.getMessage() for r in caplog.records if r.name == "conduit.wire")
    for name in ("AUTH_REQUEST", "AUTH_RESPONSE", "RPC_REQUEST", "RPC_RESPONSE", "CLOSE"):
        assert name in wire
    assert "add" in wire
    assert not re.search(r"p=[A-Za-z0-9+/]{20}", wire)
    compact = re.sub(r"[\s:]", "", wire).lower()
    assert b"CNDT".hex() in compact
    assert not re.search(b",p=".hex() + r"(?!(..)\1{3})[0-9a-f]{40}", compact)


async def test_conduit_never_configures_logging() -> None:
    async with new_server() as server, new_client(server) as client:
        await round_trips(client, 1)
    for name in ("conduit", "conduit.server", "conduit.client", "conduit.connection"):
        logger = logging.getLogger(name)
        assert logger.level == logging.NOTSET
        assert all(isinstance(handler, logging.NullHandler) for handler in logger.handlers)
        assert logger.propagate


class Player:
    """What a game remembers of a peer."""

    def __init__(self) -> None:
        self.score = 0


async def test_the_state_of_a_connection_may_have_a_type() -> None:
    server = new_server()

    @server.on_client_connect
    def came(connection: Connection[Player]) -> None:
        connection.state = Player()

    @server.rpc
    async def win(points: int, connection: Connection[Player]) -> int:
        connection.state.score += points
        return connection.state.score

    @server.on("lose")
    async def lose(connection: Connection[Player], message: int) -> int:
        connection.state.score -= message
        return connection.state.score

    async with server, new_client(server) as one, new_client(server) as other:
        assert await within(one.rpc.win(points=5)) == 5
        assert await within(one.rpc.win(points=2)) == 7
        assert await within(other.rpc.win(points=1)) == 1
        described = {one["name"]: one for one in await one.rpc.discover()}["win"]
        assert list(described["parameters"]["properties"]) == ["points"]


class Options(BaseModel):
    """What a lone parameter takes the whole map for."""

    depth: int
    wide: bool = False


async def test_a_lone_model_with_a_default_may_be_left_out() -> None:
    server = new_server()

    @server.rpc
    async def search(options: Options = Options(depth=3)) -> int:  # noqa: B008
        return options.depth

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("search")) == 3
        assert await within(client.rpc.search()) == 3
        assert await within(client.rpc.search(depth=5)) == 5
        with pytest.raises(InvalidParams):
            await within(client.rpc.search(wide=True))
