"""What the README of the original promises, row by row: N1 to N27."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import msgpack
import pytest

import conduit
from conduit import (
    AuthenticationError,
    Client,
    ClientDescriptor,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    Limits,
    MethodNotFound,
    Response,
    RPCError,
    RPCTimeout,
    Server,
    ServerDescriptor,
    Status,
    Unavailable,
    data,
)
from tests.acceptance import raw
from tests.acceptance.raw import PASSWORD, VERIFIER, Relay, dial, logged_in
from tests.acceptance.support import (
    FAST_LOGIN,
    QUICKSTART_LINES,
    ROOT,
    Neighbour,
    Program,
    copy_program,
    end_cleanly,
    free_port,
    has_ipv6,
    neighbourhood,
    new_client,
    new_server,
    round_trips,
    start_quickstart_server,
    within,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")

# N1: the names of the quick start


def test_n01_the_names_of_the_quick_start_can_be_imported() -> None:
    for name in ("Server", "ServerDescriptor", "Client", "ClientDescriptor", "Response", "data"):
        assert name in conduit.__all__
        assert getattr(conduit, name) is not None
    assert data(a=10, b=20) == {"a": 10, "b": 20}


def test_n01_the_version_is_told() -> None:
    assert re.match(r"\d+\.\d+", conduit.__version__)


async def test_n01_a_response_is_its_value_with_metadata() -> None:
    server = new_server()

    @server.rpc
    async def wrapped() -> Response:
        return Response({"n": 1}, headers={"cache": "hit"})

    async with server, new_client(server) as client:
        assert await within(client.rpc.call("wrapped")) == {"n": 1}


# N2: both files of the quick start (test_quickstart.py looks closer)


def test_n02_the_quick_start_prints_what_it_promises(tmp_path: Path) -> None:
    server, port = start_quickstart_server(tmp_path)
    with server:
        with Program(copy_program("client.py", tmp_path, port), cwd=tmp_path) as client:
            assert client.finish() == 0, client.error_output
            assert client.lines == QUICKSTART_LINES
        end_cleanly(server, signal.SIGINT)


# N3: messages and their answers


async def test_n03_a_message_reaches_its_handler_and_the_result_comes_back() -> None:
    server = new_server(name="MyServer")
    seen: list[tuple[object, object]] = []

    @server.on("greeting")
    async def handle_greeting(client: Any, message: Any) -> Any:
        seen.append((client, message))
        return {"reply": f"Hello, {message.get('name', 'stranger')}!"}

    async with server:
        client = new_client(server)
        answers: asyncio.Queue[Any] = asyncio.Queue()

        @client.on("greeting_response")
        async def answered(message: Any) -> None:
            answers.put_nowait(message)

        async with client:
            await within(client.send("greeting", {"name": "World"}))
            assert await within(answers.get()) == {"reply": "Hello, World!"}
            ((connection, message),) = seen
            assert message == {"name": "World"}
            assert isinstance(connection, Connection)


async def test_n03_no_answer_goes_back_for_none_and_none_to_an_answer() -> None:
    server = new_server()

    @server.on("quiet")
    async def quiet(client: Any, message: Any) -> None:
        return None

    @server.on("loud")
    async def loud(client: Any, message: Any) -> Any:
        return message

    @server.on("loud_response")
    async def loop(client: Any, message: Any) -> Any:
        return message

    async with server, logged_in(server.address) as peer:
        peer.send(raw.MESSAGE, 0, ["quiet", {}])
        peer.send(raw.MESSAGE, 0, ["loud", {"n": 1}])
        answer = await peer.until(raw.MESSAGE)
        assert answer.body == ["loud_response", {"n": 1}]
        assert answer.id == 0
        assert answer.flags == raw.SEQUENCED | raw.REPLY
        peer.send(raw.MESSAGE, 0, ["loud_response", {"n": 1}], flags=raw.REPLY)
        assert await peer.call("add", {"a": 1, "b": 1}) == 2
        assert [got.body for got in peer.log if got.type == raw.MESSAGE] == [answer.body]


# N4: @server.rpc


async def test_n04_rpc_without_brackets_validates_and_publishes_the_docstring() -> None:
    server = new_server()

    @server.rpc
    async def multiply(x: float, y: float) -> float:
        """Multiply two numbers."""
        return x * y

    assert inspect.iscoroutinefunction(multiply)
    assert await multiply(2.0, 3.0) == 6.0
    async with server, new_client(server) as client:
        assert await within(client.rpc.call("multiply", args=data(x=3.5, y=2.0))) == 7.0
        with pytest.raises(InvalidParams):
            await within(client.rpc.call("multiply", args=data(x="three", y=2.0)))
        (described,) = [m for m in await client.rpc.discover() if m["name"] == "multiply"]
        assert described["description"] == "Multiply two numbers."


# N5: on_startup


async def test_n05_the_startup_hook_sees_the_real_address() -> None:
    server = new_server()
    seen: list[object] = []

    @server.on_startup
    async def startup(srv: Server) -> None:
        seen.append((srv, srv.address))

    async with server:
        host, port = server.address
        assert seen == [(server, ("127.0.0.1", port))]
        assert isinstance(server.address, tuple)
        assert host == "127.0.0.1" and isinstance(port, int) and port > 0
        async with new_client(server) as client:
            await round_trips(client, 1)


# N6: on_client_connect


async def test_n06_the_connect_hook_runs_after_the_login_with_a_connection_of_its_own() -> None:
    server = new_server()
    seen: list[Connection] = []

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        seen.append(connection)

    async with server:
        with pytest.raises(AuthenticationError):
            await within(new_client(server, password="not the password").connect())
        assert seen == []
        async with new_client(server) as _, new_client(server) as _:
            first, second = seen
            assert isinstance(first.id, str) and first.id
            assert first.id != second.id
            assert server.connections[first.id] is first
            assert set(server.connections) == {first.id, second.id}
            assert first.identity == "default"


# N7: run()


async def test_n07_run_serves_until_it_is_cancelled() -> None:
    server = new_server()
    started = asyncio.Event()

    @server.on_startup
    async def startup(srv: Server) -> None:
        started.set()

    task = asyncio.ensure_future(server.run(signals=False))
    await within(started.wait())
    address = server.address
    client = new_client(server, reconnect_enabled=False)
    await within(client.connect())
    await round_trips(client, 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(task)
    await within(client.wait_closed())
    with pytest.raises(ConnectionRefusedError):
        await within(new_client(address).connect())


# N8: messages from the server


async def test_n08_a_client_handles_what_the_server_broadcasts() -> None:
    async with new_server() as server:
        client = new_client(server)
        seen: asyncio.Queue[Any] = asyncio.Queue()

        @client.on("broadcast")
        async def handle_broadcast(message: Any) -> None:
            seen.put_nowait(message)

        async with client:
            assert await within(server.broadcast("broadcast", {"n": 1})) == 1
            assert await within(seen.get()) == {"n": 1}


# N9: on_connect


async def test_n09_on_connect_runs_at_the_first_connect_only() -> None:
    async with new_server(resume_ttl=0) as server, Relay(server.address) as relay:
        client = new_client(relay.address)
        connects: list[object] = []
        reconnected = asyncio.Event()

        @client.on_connect
        async def connected(cli: Client) -> None:
            connects.append(cli)

        @client.on_reconnect
        async def again(cli: Client) -> None:
            reconnected.set()

        async with client:
            assert connects == [client]
            relay.cut()
            await within(reconnected.wait())
            await round_trips(client, 1)
            assert connects == [client]


# N10: connect, send, disconnect


async def test_n10_a_client_connects_sends_and_disconnects() -> None:
    server = new_server(name="MyServer", version="2.1")
    got: asyncio.Queue[Any] = asyncio.Queue()
    left: asyncio.Queue[Any] = asyncio.Queue()

    @server.on("note")
    async def note(client: Connection, message: Any) -> None:
        got.put_nowait((client.name, client.version, message))

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: Any) -> None:
        left.put_nowait(connection)

    async with server:
        client = new_client(server, name="MyClient", version="3.2")
        statuses = [client.status]
        await within(client.connect())
        statuses.append(client.status)
        assert statuses == [Status.IDLE, Status.READY]
        assert (client.server_name, client.server_version) == ("MyServer", "2.1")
        await within(client.send("note", {"text": "hello"}))
        assert await within(got.get()) == ("MyClient", "3.2", {"text": "hello"})
        await within(client.disconnect())
        assert client.status is Status.CLOSED
        connection = await within(left.get())
        assert connection.closed
        assert not server.connections
        with pytest.raises(ConnectionClosed):
            await within(client.send("note", {"text": "too late"}))


# N11: calls and their errors


async def test_n11_a_call_returns_the_plain_value() -> None:
    async with new_server() as server, new_client(server) as client:
        result = await within(client.rpc.call("add", args=data(a=10, b=20)))
        assert result == 30 and type(result) is int


async def test_n11_every_kind_of_failure_raises_with_its_code() -> None:
    server = new_server()

    @server.rpc
    async def broken() -> int:
        raise RuntimeError("it is broken")

    async with server, new_client(server) as client:
        cases: list[tuple[str, dict[str, object], type[RPCError], str]] = [
            ("subtract", {}, MethodNotFound, "method_not_found"),
            ("add", {"a": 1, "b": "x"}, InvalidParams, "invalid_params"),
            ("broken", {}, InternalError, "internal_error"),
        ]
        for method, args, error, code in cases:
            with pytest.raises(error) as caught:
                await within(client.rpc.call(method, args=args))
            assert isinstance(caught.value, RPCError)
            assert caught.value.code == code
            assert caught.value.message
        assert await within(client.rpc.call("add", args=data(a=1, b=2))) == 3


async def test_n11_a_call_without_an_answer_in_time_raises_rpc_timeout() -> None:
    server = new_server()
    cancelled = asyncio.Event()

    @server.rpc
    async def sleeper() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with server, new_client(server) as client:
        with pytest.raises(RPCTimeout) as caught:
            await within(client.rpc.call("sleeper", timeout=0.05))
        assert isinstance(caught.value, RPCError)
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, asyncio.TimeoutError)
        await within(cancelled.wait())
        await round_trips(client, 1)


# N12: discover


async def test_n12_discover_lists_what_can_be_called() -> None:
    server = new_server()

    @server.rpc
    async def multiply(x: float, y: float = 2.0) -> float:
        """Multiply two numbers."""
        return x * y

    async with server, new_client(server) as client:
        methods = await within(client.rpc.discover())
        assert isinstance(methods, list)
        assert [m["name"] for m in methods] == ["add", "multiply"]
        for method in methods:
            assert isinstance(method, dict)
            assert {"name", "description", "parameters", "returns"} <= method.keys()
        described = methods[1]
        assert described["description"] == "Multiply two numbers."
        assert "x" in str(described["parameters"]) and "number" in str(described["parameters"])
        assert "number" in str(described["returns"])


# N13: ServerDescriptor


def test_n13_the_server_descriptor_has_the_documented_fields_and_defaults() -> None:
    descriptor = ServerDescriptor(password="secret")
    documented = {
        "host": "0.0.0.0",
        "port": 8080,
        "ipv6": False,
        "max_connections": 100,
        "heartbeat_interval": 30.0,
        "heartbeat_timeout": 90.0,
        "enable_compression": False,
        "enable_backpressure": True,
        "version": "1.0.0",
    }
    assert {name: getattr(descriptor, name) for name in documented} == documented
    ServerDescriptor(
        password="secret",
        name="my_server",
        version="1.0.0",
        host="0.0.0.0",
        port=8080,
        ipv6=False,
        max_connections=100,
        heartbeat_interval=30.0,
        heartbeat_timeout=90.0,
        enable_compression=False,
        enable_backpressure=True,
    )


def test_n13_unknown_field_is_an_error() -> None:
    misspelt: dict[str, Any] = {"password": "secret", "max_conections": 5}
    with pytest.raises(ValueError, match="max_conections"):
        ServerDescriptor(**misspelt)
    with pytest.raises(ValueError, match="max_conections"):
        Server(**misspelt)


def test_n13_the_timeout_must_exceed_the_interval() -> None:
    with pytest.raises(ValueError, match="heartbeat_timeout"):
        ServerDescriptor(password="secret", heartbeat_interval=30.0, heartbeat_timeout=30.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"password": ""},
        {"password": "secret", "port": -1},
        {"password": "secret", "port": 65536},
        {"password": "secret", "max_connections": 0},
        {"password": "secret", "heartbeat_interval": 0},
        {"password": "secret", "verifier": VERIFIER},
        {"password": "secret", "users": {"alice": VERIFIER}},
        {"verifier": "not a verifier"},
    ],
)
def test_n13_a_value_that_makes_no_sense_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ServerDescriptor(**wrong)


async def test_n13_a_server_on_a_wide_address_must_have_a_password() -> None:
    with pytest.raises(ValueError, match="password"):
        await Server(ServerDescriptor(host="0.0.0.0", port=0)).start()


def test_n13_the_password_is_not_shown() -> None:
    assert "secret words" not in repr(ServerDescriptor(password="secret words"))
    assert "secret words" not in repr(
        ClientDescriptor(server_host="localhost", server_port=1, password="secret words")
    )


async def test_n13_fields_and_url_are_other_forms_of_the_descriptor() -> None:
    forms = [
        Server(ServerDescriptor(host="127.0.0.1", port=0, verifier=VERIFIER, name="relay")),
        Server(host="127.0.0.1", port=0, verifier=VERIFIER, name="relay"),
        Server("tcp://127.0.0.1:0", verifier=VERIFIER, name="relay"),
    ]
    for server in forms:
        assert server.name == "relay"
        async with server, new_client(server) as client:
            assert client.server_name == "relay"


# N14: ClientDescriptor


def test_n14_the_client_descriptor_has_the_documented_fields_and_defaults() -> None:
    descriptor = ClientDescriptor(server_host="localhost", server_port=8080, password="secret")
    documented = {
        "server_host": "localhost",
        "server_port": 8080,
        "version": "1.0.0",
        "use_ipv6": False,
        "reconnect_enabled": True,
        "reconnect_attempts": 5,
        "reconnect_delay": 1.0,
        "rpc_timeout": 30.0,
    }
    assert {name: getattr(descriptor, name) for name in documented} == documented


def test_n14_unknown_field_is_an_error() -> None:
    unknown: dict[str, Any] = {
        "server_host": "localhost",
        "server_port": 8080,
        "password": "secret",
        "retries": 3,
    }
    with pytest.raises(ValueError, match="retries"):
        ClientDescriptor(**unknown)
    with pytest.raises(ValueError, match="retries"):
        Client(**unknown)


def test_n14_a_server_must_be_named() -> None:
    with pytest.raises(ValueError):
        ClientDescriptor(password="secret")


async def test_n14_fields_urls_and_lists_are_other_forms_of_the_descriptor() -> None:
    async with new_server() as server:
        host, port = server.address
        closed = free_port()
        known: dict[str, Any] = {"password": PASSWORD, "limits": FAST_LOGIN}
        forms = [
            Client(ClientDescriptor(server_host=host, server_port=port, **known)),
            Client(server_host=host, server_port=port, **known),
            Client(f"tcp://{host}:{port}", **known),
            Client([f"tcp://{host}:{closed}", f"tcp://{host}:{port}"], **known),
        ]
        for client in forms:
            async with client:
                await round_trips(client, 1)


async def test_n14_rpc_timeout_is_the_deadline_of_calls_that_name_none() -> None:
    server = new_server()

    @server.rpc
    async def sleeper() -> None:
        await asyncio.Event().wait()

    async with server, new_client(server, rpc_timeout=0.05) as client:
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("sleeper"))


# N15: the header


async def test_n15_a_header_has_32_bytes_in_the_documented_order() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        async with new_client(relay.address) as client:
            await within(client.rpc.call("add", args=data(a=10, b=20)))
        for tap in (bytes(relay.upward), bytes(relay.downward)):
            offset = 0
            while offset < len(tap):
                head = tap[offset : offset + 32]
                assert head[0:4] == b"CNDT"
                assert head[4] == 1
                assert head[5] in set(range(1, 10)) | set(range(16, 25))
                length = int.from_bytes(head[8:12], "big")
                stamp = int.from_bytes(head[20:28], "big")
                assert abs(stamp / 1000 - time.time()) < 60
                payload = tap[offset + 32 : offset + 32 + length]
                assert len(payload) == length
                if payload:
                    msgpack.unpackb(payload)
                if head[5] == raw.RPC_REQUEST:
                    assert int.from_bytes(head[6:8], "big") == raw.SEQUENCED
                    assert int.from_bytes(head[12:20], "big") % 2 == 1
                    assert int.from_bytes(head[28:32], "big") == 1
                    assert msgpack.unpackb(payload)[:2] == ["add", {"a": 10, "b": 20}]
                offset += 32 + length


# N16: the types


async def test_n16_each_documented_type_does_its_work() -> None:
    server = new_server()

    @server.on("note")
    async def note(client: Any, message: Any) -> Any:
        return message

    async with server, logged_in(server.address) as peer:
        assert [got.type for got in peer.log] == [raw.AUTH_CHALLENGE, raw.AUTH_SUCCESS]
        assert (raw.AUTH_REQUEST, raw.AUTH_SUCCESS, raw.AUTH_FAILURE) == (7, 8, 9)
        id = peer.request("add", {"a": 1, "b": 2})
        answer = await peer.until(3)
        assert (answer.id, answer.body) == (id, [3])
        id = peer.request("nothing", {})
        error = await peer.until(4)
        assert error.id == id
        code, message, details = error.body
        assert code == "method_not_found" and "nothing" in message and isinstance(details, dict)
        peer.send(1, peer.take_id(), ["note", {"n": 1}])
        assert (await peer.until(1)).body == ["note", {"n": 1}]
        peer.write(raw.frame(5, 77))
        pong = await peer.until(6)
        assert (pong.id, pong.payload) == (77, b"")


# N17: the login


async def test_n17_a_wrong_password_is_refused_and_no_handler_ever_runs() -> None:
    server = new_server()
    ran: list[str] = []

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        ran.append("connect")

    @server.on("note")
    async def note(client: Any, message: Any) -> None:
        ran.append("note")

    async with server:
        async with dial(server.address) as peer:
            with pytest.raises(raw.LoginRefused) as caught:
                await peer.login("not the password")
            assert caught.value.body is not None
            assert caught.value.body["code"] == "invalid_credentials"
            assert caught.value.body["retry"] is False
            peer.send(raw.MESSAGE, 0, ["note", {}])
            await peer.closed()
        client = new_client(server, password="not the password")
        with pytest.raises(AuthenticationError) as error:
            await within(client.connect())
        assert error.value.code == "invalid_credentials"
        assert "not the password" not in str(error.value)
        # It is final: there is no reconnect loop behind the user's back.
        await within(client.wait_closed())
        assert client.status is Status.CLOSED
        assert ran == []


async def test_n17_the_password_never_crosses_the_wire() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        async with new_client(relay.address) as client:
            await round_trips(client, 1)
        crossed = bytes(relay.upward + relay.downward)
    digest = hashlib.sha256(PASSWORD.encode())
    salted = raw.salted_password(PASSWORD, b"salt of 16 bytes", raw.ITERATIONS)
    client_key = raw.mac(salted, "Client Key")
    for secret in (PASSWORD.encode(), digest.digest(), salted, client_key):
        for form in (secret, secret.hex().encode(), raw.b64(secret).encode()):
            assert form not in crossed


async def test_n17_a_password_in_place_of_a_verifier_costs_600_000_rounds() -> None:
    server = new_server(password="the password itself")
    async with server:
        async with dial(server.address) as peer:
            await peer.login("the password itself")
            challenge = peer.log[0].body
            assert raw.attributes(challenge["scram"])["i"] == "600000"
        client = Client(
            server_host=server.address[0],
            server_port=server.address[1],
            password="the password itself",
        )
        async with client:
            await round_trips(client, 1)


# N18: heartbeats


async def test_n18_a_ping_follows_each_interval_of_silence() -> None:
    async with new_server(heartbeat_interval=0.1, heartbeat_timeout=0.5) as server:
        async with logged_in(server.address) as peer:
            assert peer.success["hb"] == [100, 500]
            start = time.monotonic()
            pings = 0
            while time.monotonic() - start < 1.0:
                ping = await peer.until(raw.PING)
                assert ping.payload == b""
                pings += 1
                peer.write(raw.frame(raw.PONG, ping.id))
            assert 3 <= pings <= 12
            assert await peer.call("add", {"a": 1, "b": 2}) == 3


async def test_n18_a_silent_peer_is_dropped_after_the_timeout() -> None:
    server = new_server(heartbeat_interval=0.1, heartbeat_timeout=0.4)
    left = asyncio.Event()

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: Any) -> None:
        left.set()

    async with neighbourhood(server):
        async with logged_in(server.address) as peer:
            start = time.monotonic()
            said = await peer.closed()
            assert time.monotonic() - start >= 0.3
            assert said is not None and said[0] == 4422
            await within(left.wait())


async def test_n18_a_silent_server_is_noticed_by_the_client() -> None:
    async def silent(peer: raw.RawPeer) -> None:
        await peer.accept_login(heartbeat=(100, 400))
        await peer.closed()

    async with raw.listen(silent) as address:
        client = new_client(address, reconnect_enabled=False)
        await within(client.connect())
        with pytest.raises(ConnectionLost):
            await within(client.rpc.call("anything"))
        await within(client.wait_closed())


async def test_n18_any_byte_is_life() -> None:
    async with new_server(heartbeat_interval=0.1, heartbeat_timeout=0.4) as server:
        async with logged_in(server.address) as peer:
            start = time.monotonic()
            while time.monotonic() - start < 0.8:
                # Pings are left unanswered; calls are proof enough.
                assert await peer.call("add", {"a": 1, "b": 2}) == 3
                await asyncio.sleep(0.02)


async def test_n18_a_busy_handler_does_not_look_dead() -> None:
    server = new_server(heartbeat_interval=0.05, heartbeat_timeout=0.2)

    @server.rpc
    async def long() -> str:
        await asyncio.sleep(0.5)
        return "done"

    @server.rpc
    async def stalls_the_loop() -> str:
        time.sleep(0.5)
        return "done"

    @server.rpc
    def blocks_a_thread() -> str:
        time.sleep(0.5)
        return "done"

    async with neighbourhood(server) as neighbour:
        for method in ("long", "stalls_the_loop", "blocks_a_thread"):
            assert await within(neighbour.client.rpc.call(method)) == "done"
            await neighbour.check()


# N19: backpressure


async def test_n19_a_slow_receiver_makes_the_sender_wait_and_only_that_sender() -> None:
    server = new_server(limits=Limits(max_messages=8))
    gate = asyncio.Event()
    got: list[int] = []

    @server.on("item")
    async def item(client: Any, message: Any) -> None:
        await gate.wait()
        got.append(message["n"])

    @server.on("other")
    async def other(client: Any, message: Any) -> str:
        return "seen"

    async with neighbourhood(server) as neighbour, new_client(server) as client:
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            for number in range(100):
                await client.send("item", {"n": number})
                sent += 1

        task = asyncio.ensure_future(send_all())
        # The calls of the same client are not held up, and show that time has passed.
        await round_trips(client)
        assert not task.done()
        assert 1 <= sent <= 9
        for _ in range(20):
            assert await within(neighbour.client.request("other", {})) == "seen"
        assert not task.done() and sent <= 9
        gate.set()
        await within(task)
        await within(client.send("item", {"n": 100}, ack=True))
        assert got == list(range(101))


async def test_n19_a_peer_that_does_not_read_makes_the_server_wait() -> None:
    server = new_server()
    connected: asyncio.Queue[Connection] = asyncio.Queue()

    @server.on_client_connect
    async def arrived(connection: Connection) -> None:
        if connection.name == "raw":
            connected.put_nowait(connection)

    async with neighbourhood(server) as neighbour, logged_in(server.address) as peer:
        connection = await within(connected.get())
        sent = 0

        async def send_all() -> None:
            nonlocal sent
            for _ in range(100):
                await connection.send("blob", bytes(65536))
                sent += 1

        task = asyncio.ensure_future(send_all())
        await neighbour.check()
        await round_trips(neighbour.client)
        assert not task.done()
        # The credit of a peer is 1 MiB, and it has given none back.
        assert 1 <= sent <= 17
        arrived_there = 0
        while arrived_there < 100:
            blob = await peer.until(raw.MESSAGE)
            arrived_there += 1
            peer.send(raw.STREAM_CREDIT, 0, [1, len(blob.payload)])
        await within(task)


# N20: compression


async def test_n20_compression_is_used_only_where_it_helps() -> None:
    server = new_server(enable_compression=True)

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    digits = os.urandom(4096).hex()
    noise = os.urandom(8192)
    caps = {**raw.CAPS, "feat": ["zlib"]}
    async with server:
        async with logged_in(server.address, caps=caps) as peer:
            for value, compressed in [
                ("a" * 10_000, True),
                (digits, True),
                ("short", False),
                (noise, False),
            ]:
                id = peer.request("echo", {"value": value})
                answer = await peer.until(raw.RPC_RESPONSE)
                assert answer.id == id
                assert bool(answer.flags & raw.COMPRESSED) is compressed
                assert answer.body == [value]
                assert not compressed or len(answer.payload) < len(value)
        async with logged_in(server.address) as peer:
            # This peer has not said that it can inflate anything.
            peer.request("echo", {"value": "a" * 10_000})
            answer = await peer.until(raw.RPC_RESPONSE)
            assert not answer.flags & raw.COMPRESSED
            assert answer.body == ["a" * 10_000]


async def test_n20_compression_is_off_by_default_and_two_sides_agree_on_it() -> None:
    server = new_server(enable_compression=True)

    @server.rpc
    async def size(text: str) -> int:
        return len(text)

    text = "the same words again and again, " * 5000
    crossed: dict[bool, int] = {}
    async with server:
        for enabled in (False, True):
            async with Relay(server.address) as relay:
                async with new_client(relay.address, enable_compression=enabled) as client:
                    assert await within(client.rpc.call("size", args={"text": text})) == len(text)
                crossed[enabled] = len(relay.upward)
    assert crossed[False] > len(text)
    assert crossed[True] < len(text) / 10


async def test_n20_a_bomb_is_refused_at_a_bounded_cost() -> None:
    bomb = b"".join(_zeros(64 << 20))
    assert len(bomb) < 1 << 20
    async with neighbourhood(new_server(enable_compression=True)) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            assert "zlib" in peer.caps["feat"]
            tracemalloc.start()
            try:
                peer.sent += 1
                flags = raw.SEQUENCED | raw.COMPRESSED
                peer.write(raw.frame(raw.RPC_REQUEST, 3, bomb, flags=flags, reserved=peer.sent))
                said = await peer.closed()
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert said is not None and said[0] in (1009, 4400)
            assert peak < 16 << 20


def _zeros(size: int) -> list[bytes]:
    packer = zlib.compressobj(9)
    return [*(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)), packer.flush()]


# N21: IPv4 and IPv6


@needs_ipv6
async def test_n21_ipv6_with_the_default_host_means_every_ipv6_address() -> None:
    server = Server(ServerDescriptor(verifier=VERIFIER, port=0, ipv6=True))

    @server.rpc
    async def add(a: int, b: int) -> int:
        return a + b

    async with server:
        assert server.address[0] == "::"
        address = ("::1", server.address[1])
        async with new_client(address, use_ipv6=True) as client:
            await round_trips(client, 1)
            assert client.connection.address[0] == "::1"


@needs_ipv6
async def test_n21_ipv6_of_the_loopback_interface() -> None:
    async with new_server(host="::1", ipv6=True) as server:
        assert server.address == ("::1", server.address[1])
        async with new_client(server, use_ipv6=True) as client:
            await round_trips(client, 1)


@needs_ipv6
async def test_n21_localhost_is_found_where_it_is_ipv6_only() -> None:
    found = socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)
    if socket.AF_INET6 not in {info[0] for info in found}:
        pytest.skip("localhost is not ::1 on this machine")
    async with new_server(host="::1", ipv6=True) as server:
        address = ("localhost", server.address[1])
        async with new_client(address, use_ipv6=False) as client:
            await round_trips(client, 1)


async def test_n21_ipv4() -> None:
    async with new_server() as server:
        async with new_client(("localhost", server.address[1])) as client:
            await round_trips(client, 1)
            assert client.connection.address == server.address


# N22: reconnect


async def test_n22_a_lost_link_is_made_again_and_the_hooks_run() -> None:
    async with new_server(resume_ttl=0) as server, Relay(server.address) as relay:
        client = new_client(relay.address)
        events: asyncio.Queue[str] = asyncio.Queue()

        @client.on_disconnect
        async def lost(cli: Client, reason: Any) -> None:
            events.put_nowait("lost")

        @client.on_reconnect
        async def again(cli: Client) -> None:
            events.put_nowait("again")

        async with client:
            for _ in range(3):
                await round_trips(client, 1)
                relay.cut()
                assert await within(events.get()) == "lost"
                assert await within(events.get()) == "again"
                assert client.status is Status.READY


async def test_n22_the_attempts_are_counted_and_then_it_is_over() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_attempts=3)
        await within(client.connect())
        relay.unplug()
        await within(client.wait_closed())
        assert client.status is Status.CLOSED
        assert relay.attempts == 1 + 3
        with pytest.raises(ConnectionClosed):
            await within(client.rpc.call("add", args=data(a=1, b=2)))


async def test_n22_zero_attempts_means_for_ever() -> None:
    async with new_server(resume_ttl=0) as server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_attempts=0, reconnect_delay=0.001)
        again = asyncio.Event()

        @client.on_reconnect
        async def reconnected(cli: Client) -> None:
            again.set()

        async with client:
            relay.unplug()
            await relay.attempted(1 + 6)
            assert client.status in (Status.RECONNECTING, Status.CONNECTING)
            relay.plugged = True
            await within(again.wait(), 20)
            await round_trips(client, 1)


async def test_n22_no_reconnect_where_it_is_switched_off() -> None:
    async with new_server() as server, Relay(server.address) as relay:
        client = new_client(relay.address, reconnect_enabled=False)
        await within(client.connect())
        relay.cut()
        await within(client.wait_closed())
        assert relay.attempts == 1


@pytest.mark.parametrize("reconnect, keeps", [(False, 30), (True, 0)])
async def test_n22_pending_calls_fail_at_once_on_loss(reconnect: bool, keeps: float) -> None:
    server = new_server(resume_ttl=keeps)
    running = asyncio.Event()

    @server.rpc
    async def sleeper() -> None:
        running.set()
        await asyncio.Event().wait()

    async with server, Relay(server.address) as relay:
        async with new_client(relay.address, reconnect_enabled=reconnect) as client:
            call = asyncio.ensure_future(client.rpc.call("sleeper", timeout=60))
            await within(running.wait())
            relay.cut()
            with pytest.raises(ConnectionLost) as caught:
                await within(call, 3)
            assert caught.value.executed is None
            assert isinstance(caught.value, ConnectionClosed)
            assert isinstance(caught.value, ConnectionError)


# N23: both directions


async def test_n23_a_server_sends_and_calls_at_any_time() -> None:
    async with new_server() as server:
        client = new_client(server)
        news: asyncio.Queue[Any] = asyncio.Queue()

        @client.on("news")
        async def on_news(message: Any) -> str:
            news.put_nowait(message)
            return "noted"

        @client.rpc
        async def temperature(room: str) -> float:
            return {"kitchen": 21.5}[room]

        async with client:
            (connection,) = server.connections.values()
            await within(connection.send("news", {"n": 1}))
            assert await within(news.get()) == {"n": 1}
            assert await within(connection.request("news", {"n": 2})) == "noted"
            called = connection.rpc.call("temperature", args={"room": "kitchen"})
            assert await within(called) == 21.5
            assert await within(connection.rpc.temperature(room="kitchen")) == 21.5
            (described,) = await within(connection.rpc.discover())
            assert described["name"] == "temperature"
            with pytest.raises(InvalidParams):
                await within(connection.rpc.call("temperature", args={"rom": "kitchen"}))
            assert 0 <= await within(connection.ping()) < 5
            assert 0 <= await within(client.ping()) < 5


# N24: max_connections


async def test_n24_max_connections_is_enforced() -> None:
    async with neighbourhood(new_server(max_connections=2)) as neighbour:
        server = neighbour.server
        async with new_client(server):
            with pytest.raises(Unavailable):
                await within(new_client(server, reconnect_enabled=False).connect())
            async with dial(server.address) as peer:
                with pytest.raises(raw.LoginRefused) as caught:
                    await peer.login()
                assert caught.value.body is not None
                assert caught.value.body["code"] == "busy"
                assert caught.value.body["retry"] is True
                await peer.closed()
        await _connects_when_there_is_room(neighbour)


async def test_n24_peers_that_have_not_logged_in_count_and_are_time_limited() -> None:
    limits = Limits(login_timeout=0.5)
    async with neighbourhood(new_server(max_connections=2, limits=limits)) as neighbour:
        server = neighbour.server
        async with dial(server.address) as silent:
            with pytest.raises(Unavailable):
                await within(new_client(server, reconnect_enabled=False).connect())
            said = await silent.closed(5)
            assert said is None or said[0] == 4408
        await _connects_when_there_is_room(neighbour)


async def test_n24_the_time_for_the_login_is_absolute() -> None:
    limits = Limits(login_timeout=0.5)
    async with neighbourhood(new_server(limits=limits)) as neighbour:
        async with dial(neighbour.server.address) as peer:
            start = time.monotonic()
            dripping = asyncio.ensure_future(_drip(peer))
            await peer.closed(5)
            assert time.monotonic() - start < 3
            dripping.cancel()
            await asyncio.wait([dripping])


async def _drip(peer: raw.RawPeer) -> None:
    for byte in raw.frame(raw.AUTH_REQUEST, 1, bytes(4000)):
        peer.write(bytes([byte]))
        await asyncio.sleep(0.05)


async def test_n24_sockets_that_say_nothing_have_a_limit_of_their_own() -> None:
    limits = Limits(max_pending_logins=4, login_timeout=20)
    async with neighbourhood(new_server(limits=limits)) as neighbour:
        async with contextlib.AsyncExitStack() as stack:
            peers = []
            for _ in range(12):
                # One that is refused may learn it while it still connects.
                with contextlib.suppress(ConnectionResetError):
                    peers.append(await stack.enter_async_context(dial(neighbour.server.address)))
            ends = [asyncio.ensure_future(peer.rest(20)) for peer in peers]
            over: set[asyncio.Future[bytes]] = set()
            while 12 - len(peers) + len(over) < 8:
                waiting = [end for end in ends if end not in over]
                ended, _ = await within(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
                assert all(end.result() == b"" for end in ended)
                over |= ended
            assert 12 - len(peers) + len(over) == 8
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)


async def _connects_when_there_is_room(neighbour: Neighbour) -> None:
    """Connect as soon as the server has noticed that a place is free."""
    for _ in range(100):
        client = new_client(neighbour.server, reconnect_enabled=False)
        try:
            await within(client.connect())
        except Unavailable:
            await neighbour.check()
        else:
            await within(client.disconnect())
            return
    pytest.fail("the place never became free")


# N25: the test commands of the README


@pytest.mark.parametrize(
    "arguments",
    [
        ["-v"],
        # Of a part: the pages of all files take ten seconds, more than the rest of the tests here.
        ["--cov=conduit/protocol", "--cov-report=html:report", "--cov-fail-under=0"],
    ],
)
def test_n25_the_test_commands_of_the_readme_work(arguments: list[str], tmp_path: Path) -> None:
    test = f"{__file__}::{test_n01_the_version_is_told.__name__}"
    arguments = [argument.replace("html:report", f"html:{tmp_path}") for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", test, *arguments],
        cwd=ROOT,
        env={**os.environ, "COVERAGE_FILE": str(tmp_path / "coverage")},
        capture_output=True,
        text=True,
        timeout=25,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


# N26: the debug scripts


def start_debug_server(*arguments: str, host: str = "127.0.0.1") -> tuple[Program, int]:
    """Start test_server_debug.py on a free port."""
    port = free_port(host)
    script = str(ROOT / "test_server_debug.py")
    program = Program(script, "--port", str(port), *arguments, cwd=ROOT)
    try:
        program.wait_for_port(host, port)
    except AssertionError:
        program.__exit__()
        raise
    return program, port


@pytest.mark.parametrize("family", ["ipv4", pytest.param("ipv6", marks=needs_ipv6)])
def test_n26_the_debug_scripts_show_every_frame(family: str) -> None:
    flags = ["--ipv6"] if family == "ipv6" else []
    server, port = start_debug_server(*flags, host="::1" if flags else "127.0.0.1")
    with server:
        script = str(ROOT / "test_client_debug.py")
        with Program(script, "--port", str(port), *flags, cwd=ROOT) as client:
            assert client.finish() == 0, client.output + client.error_output
        server.signal(signal.SIGINT)
        assert server.finish() == 0, server.error_output
        for program in (server, client):
            shown = program.output + program.error_output
            assert "Traceback" not in shown
            for name in (
                "AUTH_REQUEST",
                "AUTH_CHALLENGE",
                "AUTH_RESPONSE",
                "AUTH_SUCCESS",
                "RPC_REQUEST",
                "RPC_RESPONSE",
                "MESSAGE",
                "PING",
                "PONG",
            ):
                assert name in shown, f"{name} is missing"
            for word in ("add", "multiply", "hello"):
                assert word in shown
            compact = re.sub(r"[\s:]", "", shown).lower()
            assert b"CNDT".hex() in compact
            # The proof of the login is a secret: neither its text nor its bytes are shown.
            assert not re.search(r"p=[A-Za-z0-9+/]{20}", shown)
            proof = b",p=".hex()
            assert not re.search(proof + r"(?!(..)\1{3})[0-9a-f]{40}", compact)


def test_n26_the_debug_client_ends_with_1_and_a_reason() -> None:
    script = str(ROOT / "test_client_debug.py")
    server, port = start_debug_server("--password", "one password")
    with server:
        wrong = ("--port", str(port), "--password", "another password")
        with Program(script, *wrong, cwd=ROOT) as client:
            assert client.finish() == 1
            assert "password" in client.output + client.error_output
            assert "Traceback" not in client.output + client.error_output
        right = ("--port", str(port), "--password", "one password")
        with Program(script, *right, cwd=ROOT) as client:
            assert client.finish() == 0, client.output + client.error_output
        server.signal(signal.SIGINT)
        assert server.finish() == 0
    with Program(script, "--port", str(port), cwd=ROOT) as client:
        assert client.finish() == 1
        assert str(port) in client.output + client.error_output
        assert "Traceback" not in client.output + client.error_output


@pytest.mark.parametrize("script", ["test_server_debug.py", "test_client_debug.py"])
def test_n26_the_debug_scripts_explain_their_options(script: str) -> None:
    with Program(str(ROOT / script), "--help", cwd=ROOT) as program:
        assert program.finish() == 0
        for word in ("--ipv6", "--port", "--password", "9999"):
            assert word in program.output


def test_n26_pytest_does_not_take_the_debug_scripts_for_tests() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert config["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


# N27: what it needs


def test_n27_it_needs_python_3_10_pydantic_2_and_msgpack_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "netconduit"
    assert project["requires-python"] == ">=3.10"
    needed = sorted(line.replace(" ", "") for line in project["dependencies"])
    assert needed == ["msgpack>=1.2.4", "pydantic>=2"]
    assert "dev" in project["optional-dependencies"]
    assert sys.version_info >= (3, 10)


def test_n27_what_is_installed_is_new_enough() -> None:
    def version(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:3])

    assert version("msgpack") >= (1, 2, 4)
    assert version("pydantic") >= (2,)


def test_n27_importing_conduit_imports_no_extra() -> None:
    code = "import sys, conduit; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=25
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & {"uvloop", "typer", "websockets", "pytest", "scramp", "cryptography"}
