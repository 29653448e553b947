"""What people get wrong at first: that it is refused at once, with what to do about it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

import conduit.blocking
from conduit import TLS, AuthenticationError, Client, Connection, ConnectionClosed, Server, Status
from tests.acceptance.support import FAST_LOGIN, free_port, new_client, new_server, until, within


class Stranger:
    """Nothing that Pydantic knows."""


def nobody(**fields: Any) -> Client:
    return Client("tcp://127.0.0.1:1", **fields)


# Registration


@pytest.mark.parametrize("side", [Server(), nobody(), conduit.blocking.Client("tcp://h:1")])
def test_a_handler_of_messages_without_a_name_is_refused(side: Any) -> None:
    def greeting(connection: Connection, message: str) -> None: ...

    with pytest.raises(TypeError, match=r"@on\('greeting'\)"):
        side.on(greeting)


def test_a_decorated_method_of_a_class_is_refused_and_one_of_an_object_is_not() -> None:
    server = Server()

    class Thing:
        async def method(self, number: int) -> int:
            return number

        async def message(self, message: str) -> None: ...

    with pytest.raises(TypeError, match=r"'method' takes `self`.*server\.rpc\(thing\.method\)"):
        server.rpc(Thing.method)
    with pytest.raises(TypeError, match="'message' takes `self`"):
        server.on("message")(Thing.message)
    server.rpc(Thing().method)


def test_a_handler_that_returns_a_stream_in_place_of_yielding_is_told_to_yield() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1

    async def passes_on() -> AsyncIterator[int]:
        return items()

    with pytest.raises(TypeError, match="'passes_on' is annotated .* async for item in"):
        Server().rpc(passes_on)
    Server().rpc(items)


def test_a_class_that_pydantic_does_not_know_is_named_and_not_explained_at_length() -> None:
    async def put(thing: Stranger) -> None: ...

    with pytest.raises(
        TypeError, match=r"Stranger.*; take plain data, a dataclass or a"
    ) as refused:
        Server().rpc(put)
    assert "arbitrary_types_allowed" not in str(refused.value)


@pytest.mark.parametrize("timeout", ["5", 0, -1, math.nan])
def test_a_timeout_of_a_method_is_a_number_above_zero(timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout of method 'print' must be a number of seconds"):
        Server().rpc("print", timeout=timeout)(lambda: None)


def test_a_name_that_is_taken_says_by_whom() -> None:
    server = Server()

    @server.rpc
    async def add() -> None: ...

    with pytest.raises(ValueError, match=r"'add' has a handler already: .*test_mistakes\..*add$"):
        server.rpc(add)


HOOKS = {
    "on_startup": 1,
    "on_shutdown": 1,
    "on_client_connect": 1,
    "on_client_away": 2,
    "on_client_return": 1,
    "on_client_disconnect": 2,
    "on_connect": 1,
    "on_disconnect": 2,
    "on_resume": 1,
    "on_lost": 2,
    "on_reconnect": 1,
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("side", [Server(), nobody(), conduit.blocking.Client("tcp://h:1")])
def test_a_hook_that_cannot_be_called_is_refused(side: Any, name: str) -> None:
    register = getattr(side, name, None)
    if register is None:
        return
    one, two = (lambda first: None), (lambda first, second: None)
    right, wrong = (one, two) if HOOKS[name] == 1 else (two, one)
    assert register(right) is right
    for harmless in (lambda *args: None, lambda first, second=None: None, print):
        register(harmless)
    for useless in (wrong, lambda: None, lambda: ...):
        with pytest.raises(TypeError, match=rf"{name} .*lambda.* must take \(\w+"):
            register()(useless)
    with pytest.raises(TypeError, match=f"{name} must be a function, not 5"):
        register(5)


# Servers and clients


def test_what_is_no_address_is_refused() -> None:
    for wrong in (8080, ["tcp://127.0.0.1:1"]):
        with pytest.raises(TypeError, match="a server takes"):
            Server(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a client takes .* not 8080"):
        Client(8080)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "fields", "hints"),
    [
        (Server, {"pasword": "secret"}, ["'pasword' (did you mean password?)"]),
        (Server, {"pasword": "secret", "zzz": 1}, ["'pasword' (did you mean password?), 'zzz'"]),
        (
            Client,
            {"host": "hub", "port": 1},
            ["'host' (did you mean server_host?)", "'port' (did you mean server_port?)"],
        ),
        (nobody, {"username": "ada"}, ["'username' (did you mean user?)"]),
        (nobody, {"timeout": 1}, ["(did you mean rpc_timeout or connect_timeout?)"]),
        (TLS, {"cert": "hub.pem"}, ["'cert' (did you mean certificate?)"]),
        (Server, {"zzz": 1}, ["zzz\n  Extra inputs are not permitted"]),
    ],
)
def test_an_unknown_field_is_told_what_it_may_be(
    make: Any, fields: dict[str, Any], hints: list[str]
) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted") as refused:
        make(**fields)
    assert all(hint in str(refused.value) for hint in hints)
    assert "secret" not in str(refused.value)


def test_a_password_in_the_place_of_a_verifier_names_the_function_that_makes_one() -> None:
    with pytest.raises(ValueError, match=r"hash_password\(\.\.\.\)") as refused:
        Server(users={"ada": "correct horse"})
    assert "correct horse" not in str(refused.value)


async def test_a_plain_function_as_users_is_named_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def look_up(user: str) -> None: ...

    async with Server(host="127.0.0.1", port=0, users=look_up) as server:
        url = f"tcp://127.0.0.1:{server.address[1]}"
        with pytest.raises(conduit.Unavailable):
            await within(Client(url, password="secret", limits=FAST_LOGIN).connect())
    assert "users= must be an async function; it returned NoneType" in caplog.text


def test_servers_and_clients_say_what_they_are() -> None:
    assert repr(Server(name="hub")) == "<Server 'hub' not serving>"
    assert repr(nobody(name="ada")) == "<Client 'ada' of tcp://127.0.0.1:1 idle>"
    blocking = conduit.blocking.Client("tcp://h:1", name="ada")
    assert repr(blocking) == "<blocking.Client 'ada' of tcp://h:1 idle>"


# Calls


async def test_arguments_by_position_are_told_how_to_go() -> None:
    async with new_server() as server, new_client(server) as client:
        with pytest.raises(TypeError, match=r"by name, .* rpc\.call\('add', \[1\]\)"):
            await client.rpc.add(1, 2)
        assert await within(client.rpc.call("add", [1, 2])) == 3
    with pytest.raises(TypeError, match=r"by name, such as rpc\.add\(a=1\)"):
        conduit.blocking.Client("tcp://h:1").rpc.add(1, 2)


@pytest.mark.parametrize("timeout", ["5", math.inf, [1]])
async def test_what_is_no_timeout_is_an_error_of_the_caller(timeout: Any) -> None:
    async with new_server() as server, new_client(server) as client:
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            await client.rpc.call("add", [1, 2], timeout=timeout)
        if timeout != math.inf:
            with pytest.raises(TypeError, match="timeout must be a number of seconds"):
                await client.request("news", timeout=timeout)
        assert await within(client.rpc.add(a=1, b=2)) == 3


async def test_headers_are_a_mapping() -> None:
    async with new_server() as server, new_client(server) as client:
        with pytest.raises(TypeError, match="headers must be a mapping, not 'trace'"):
            await client.rpc.call("add", [1, 2], headers="trace")  # type: ignore[call-overload]


async def test_a_coroutine_that_is_sent_misses_its_await(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    made = []

    @server.rpc
    async def forgets() -> Any:
        made.append(asyncio.sleep(0))
        return made[0]

    async with server, new_client(server) as client:
        with pytest.raises(conduit.InternalError):
            await within(client.rpc.forgets())
    assert "cannot send a value of type builtins.coroutine; is an `await` missing?" in caplog.text
    await made[0]


async def test_the_log_tells_a_result_that_does_not_fit_from_a_handler_that_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from pydantic import TypeAdapter

    server = new_server()

    @server.rpc
    async def wrong() -> int:
        return "one"  # type: ignore[return-value]

    @server.rpc
    async def fails() -> int:
        return TypeAdapter(int).validate_python("one")

    async with server, new_client(server) as client:
        with pytest.raises(conduit.InternalError):
            await within(client.rpc.wrong())
        assert "what handler 'wrong' gives back does not fit its annotation" in caplog.text
        with pytest.raises(conduit.InternalError):
            await within(client.rpc.fails())
        assert "handler 'fails' failed" in caplog.text


# The end of a connection


async def test_a_client_that_was_sent_away_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "conduit.client")
    async with new_server() as server, new_client(server) as client:
        (connection,) = server.connections.values()
        await connection.close(4403, "too loud")
        await within(client.wait_closed())
        with pytest.raises(ConnectionClosed, match="too loud") as raised:
            await client.rpc.add(a=1, b=2)
        assert raised.value.code == 4403
        with pytest.raises(ConnectionClosed, match="too loud"):
            await client.send("news")
        assert "connection lost (closed by the peer: too loud); it is not made again" in caplog.text
        await client.disconnect()
        with pytest.raises(ConnectionClosed, match="the client has disconnected"):
            await client.rpc.add(a=1, b=2)


async def test_a_client_that_has_given_up_says_so() -> None:
    server = new_server()
    await server.start()
    client = new_client(server, reconnect_attempts=1, reconnect_delay=0.001)
    await client.connect()
    await server.stop()
    await within(client.wait_closed())
    assert client.status is Status.CLOSED
    with pytest.raises(ConnectionClosed, match="has given up: .*nothing listens there") as caught:
        await client.rpc.add(a=1, b=2)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
async def test_of_several_servers_each_says_why_it_was_of_no_use() -> None:
    urls = [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]
    with pytest.raises(ConnectionRefusedError, match=urls[0]) as raised:
        await within(Client(urls).connect())
    notes: list[str] = vars(raised.value)["__notes__"]
    assert all(url in note for url, note in zip(urls[1:], notes, strict=True))


async def test_the_log_names_a_login_without_a_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conduit.server")
    async with new_server() as server:
        with pytest.raises(AuthenticationError, match="the server wants a password"):
            await within(new_client(server, password=None).connect())
        await until(lambda: "login without a password is not offered" in caplog.text)


async def test_a_refused_number_of_iterations_says_what_to_do() -> None:
    server = new_server()
    async with server:
        url = f"tcp://127.0.0.1:{server.address[1]}"
        with pytest.raises(AuthenticationError, match=r"Limits\(\.\.\.\)"):
            await within(Client(url, password="secret").connect())


# Event loops


def test_an_event_loop_of_its_own_for_each_step_is_refused_and_hangs_nowhere() -> None:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        server = new_server()
        loop.run_until_complete(server.start())
        client = new_client(server)
        loop.run_until_complete(client.connect())
        for step in (client.connect, client.disconnect, server.start, server.stop):
            with pytest.raises(RuntimeError, match=r"another event loop; .* one asyncio\.run"):
                asyncio.run(within(step()))
        loop.run_until_complete(client.disconnect())
        loop.run_until_complete(server.stop())
    asyncio.run(client.disconnect())  # there is nothing to do
    asyncio.run(server.stop())
