"""docs/protocol.md against itself, and against the library.

The first part needs no library: golden frames, and wire_client against wire_server, both written
from the page alone. Then wire_client against `conduit.Server`, and `conduit.Client` against
wire_server. Every password is `pencil` with 4096 iterations, so nothing waits for PBKDF2.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import zlib
from base64 import b64decode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import pytest

import conduit
from tests import golden_frames
from tests.golden_frames import GOLDEN, PASSWORD, TIMESTAMP, VERIFIER
from tests.wire_client import (
    ACK,
    AUTH_REQUEST,
    AUTH_RESPONSE,
    CANCEL,
    CLOSE,
    COMPRESSED,
    HEADER,
    MESSAGE,
    PING,
    PONG,
    PRIORITY,
    REPLY,
    RPC_ERROR,
    RPC_REQUEST,
    RPC_RESPONSE,
    SEQUENCED,
    STREAM_CREDIT,
    STREAM_END,
    STREAM_ITEM,
    Closed,
    Frame,
    LoginFailed,
    RemoteError,
    Wire,
    WireClient,
    WireError,
    b64,
    derive_keys,
    frame,
    login_digest,
    mac,
    pack,
    xor,
)
from tests.wire_server import NO_ANSWER, ServerEnd, WireServer

T = TypeVar("T")
PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"


# The page and its golden frames


def test_hex_in_the_page_is_the_golden_data() -> None:
    blocks = re.findall(r"^```hex\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    found = re.findall(r"^# (\w+): (\w+), .*\n((?:[0-9a-f]+\n)+)", "".join(blocks), re.MULTILINE)
    in_page = [(name, sender, hex.replace("\n", "")) for name, sender, hex in found]
    assert in_page == [(name, golden.sender, golden.hex) for name, golden in GOLDEN.items()]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frame_follows_from_its_meaning(name: str) -> None:
    golden = GOLDEN[name]
    payload = b"" if golden.value is None else pack(golden.value)
    body = golden.raw[HEADER.size :]
    if golden.flags & COMPRESSED:
        assert zlib.decompress(body) == payload
        payload = body
    fields = (b"CNDT", 1, golden.type, golden.flags, len(payload), golden.id, TIMESTAMP, golden.seq)
    assert golden.raw == HEADER.pack(*fields) + payload


@pytest.mark.parametrize("sender", ["client", "server"])
def test_golden_frames_of_one_side_are_one_conversation(sender: str) -> None:
    reader, writer = socket.socketpair()
    mine = [g for g in GOLDEN.values() if g.sender == sender and not g.alone]
    writer.sendall(b"".join(golden.raw for golden in mine))
    writer.close()
    with Wire(reader, 2 if sender == "client" else 1, None) as wire:
        for golden in mine:
            got = wire.read_frame()
            if not golden.meaning.startswith("login"):
                wire.check(got)
            assert (got.type, got.flags, got.id, got.seq) == golden[2:6]
        with pytest.raises(Closed):
            wire.read_frame()


def test_login_vector() -> None:
    values: dict[str, Any] = {name: golden.value for name, golden in GOLDEN.items()}
    request, challenge = values["auth_request"], values["auth_challenge"]
    bare = f"n={golden_frames.USER},r={golden_frames.CLIENT_NONCE}"
    nonce = golden_frames.CLIENT_NONCE + golden_frames.SERVER_NONCE
    assert request["scram"] == "n,," + bare

    digest = login_digest(GOLDEN["auth_request"].raw[HEADER.size :], challenge["caps"])
    assert digest == golden_frames.DIGEST
    first = f"r={nonce},s={golden_frames.SALT},i={golden_frames.ITERATIONS},d={digest}"
    assert challenge["scram"] == first

    keys = derive_keys(PASSWORD, b64decode(golden_frames.SALT), golden_frames.ITERATIONS)
    assert (b64(keys.stored), b64(keys.server)) == (
        golden_frames.STORED_KEY,
        golden_frames.SERVER_KEY,
    )
    transcript = f"{bare},{first},c=biws,r={nonce}".encode()
    proof = b64(xor(keys.client, mac(keys.stored, transcript)))
    assert values["auth_response"] == {"scram": f"c=biws,r={nonce},p={proof}"}
    assert values["auth_success"]["scram"] == "v=" + b64(mac(keys.server, transcript))
    session_key = mac(keys.stored, b"CNDT session key" + keys.client + transcript)
    assert session_key.hex() == golden_frames.SESSION_KEY


# wire_client against wire_server


def test_login_call_message_request_ping() -> None:
    calls = {"add": lambda params: params["a"] + params["b"]}
    replies = {"status": lambda data: "ok", "greeting": lambda data: f"Hello, {data}!"}
    with WireServer(calls=calls, replies=replies) as server:
        client = WireClient("127.0.0.1", server.port).login(PASSWORD, user="a=b,c")
        assert client.success["identity"] == "a=b,c"
        assert client.call("add", {"a": 10, "b": 20}) == 30
        with pytest.raises(RemoteError, match="method_not_found"):
            client.call("divide", [1, 0])
        client.send("note", [1, 2.5, None, b"\0"])
        client.send("greeting", "World")
        assert client.receive() == ("greeting_response", "Hello, World!")
        assert client.request("status") == "ok"
        client.ping(99)
        assert client.peer_acked == client.sent == 5
        client.close(1000, "done")
    assert server.messages == [("note", [1, 2.5, None, b"\0"])]
    assert server.closed == (1000, "done")


def test_wire_client_and_server_without_password() -> None:
    with WireServer(password=None) as server:
        client = WireClient("127.0.0.1", server.port).login(None)
        assert client.success["identity"] == "anonymous"
        client.close()


@pytest.mark.parametrize("password", ["Pencil", None])
def test_wire_server_refuses(password: str | None) -> None:
    code = "invalid_credentials" if password else "unsupported_mechanism"
    with WireServer() as server, WireClient("127.0.0.1", server.port) as client:
        with pytest.raises(LoginFailed, match=code):
            client.login(password)


def without_digest(first: str) -> str:
    return first.rpartition(",d=")[0]


ROGUE_CHALLENGES = {
    "too few iterations": lambda first: first.replace(",i=4096", ",i=4095"),
    "too many iterations": lambda first: first.replace(",i=4096", ",i=10000000"),
    "no d": without_digest,
    "wrong d": lambda first: without_digest(first) + ",d=" + b64(bytes(32)),
    "foreign nonce": lambda first: "r=" + "x" * 48 + first[first.index(",s=") :],
    "short nonce": lambda first: first[:36] + first[first.index(",s=") :],
    "short salt": lambda first: re.sub(r",s=[^,]+", ",s=" + b64(bytes(8)), first),
    "unknown extension that must be known": lambda first: "m=1," + first,
}


@pytest.mark.parametrize("rewrite", ROGUE_CHALLENGES.values(), ids=ROGUE_CHALLENGES)
def test_wire_client_refuses_rogue_challenge(rewrite: Callable[[str], str]) -> None:
    with WireServer(rewrite_first=rewrite) as server:
        with WireClient("127.0.0.1", server.port) as client, pytest.raises(WireError):
            client.login(PASSWORD)
    assert [got.type for got in server.frames] == [AUTH_REQUEST]


def test_wire_client_refuses_server_that_does_not_know_the_password() -> None:
    with WireServer(rewrite_final=lambda final: "v=" + b64(bytes(32))) as server:
        with WireClient("127.0.0.1", server.port) as client:
            with pytest.raises(WireError, match="wrong v"):
                client.login(PASSWORD)


def test_wire_client_acknowledges_and_gives_credit() -> None:
    acked: list[tuple[int, int]] = []

    def script(end: ServerEnd) -> None:
        for number in range(70):  # the client's window is 8, so each send may wait for credit
            end.send("item", number)
        while end.peer_acked < 64:
            end.step()
        end.ping()
        acked.append((end.peer_acked, end.sent))
        end.close()

    with WireServer(script=script) as server:
        caps = {"window": [8, 1 << 20]}
        with WireClient("127.0.0.1", server.port, caps).login(PASSWORD) as client:
            assert [client.receive() for _ in range(70)] == [("item", n) for n in range(70)]
            assert client.wait_closed() == (1000, "")
    assert acked == [(70, 70)]


def test_wire_client_answers_calls_and_requests_of_the_server() -> None:
    codes: list[str] = []

    def script(end: ServerEnd) -> None:
        for ask in (end.call, end.request):
            with pytest.raises(RemoteError) as caught:
                ask("read_sensor")
            codes.append(caught.value.code)
        end.close(1001, "enough")

    with WireServer(script=script) as server:
        with WireClient("127.0.0.1", server.port).login(PASSWORD) as client:
            assert client.wait_closed() == (1001, "enough")
    assert codes == ["method_not_found"] * 2


BROKEN_FRAMES = {
    "wrong number": frame(MESSAGE, SEQUENCED, 0, pack(["a", 1]), seq=2),
    "no number": frame(RPC_REQUEST, 0, 2, pack(["a", {}])),
    "number in a ping": frame(PING, 0, 1, seq=1),
    "id of the wrong side": frame(RPC_REQUEST, SEQUENCED, 1, pack(["a", {}]), seq=1),
    "broadcast with id": frame(MESSAGE, PRIORITY, 2, pack(["a", 1])),
    "unknown type": frame(25),
    "login after login": frame(AUTH_REQUEST, 0, 1, pack({})),
    "acknowledges too much": frame(ACK, id=1),
    "too long": HEADER.pack(b"CNDT", 1, MESSAGE, SEQUENCED, 1 << 24, 0, 0, 1),
    "another version": frame(PING, version=2),
    "extension type": frame(MESSAGE, SEQUENCED, 0, pack(["a", msgpack.ExtType(5, b"x")]), seq=1),
}


@pytest.mark.parametrize("data", BROKEN_FRAMES.values(), ids=BROKEN_FRAMES)
def test_wire_client_notices_broken_frames(data: bytes) -> None:
    with WireServer(script=lambda end: end.write(data)) as server:
        with WireClient("127.0.0.1", server.port).login(PASSWORD) as client:
            with pytest.raises(WireError):
                client.step()


# wire_client against conduit.Server


async def double(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
    async for number in numbers:
        yield 2 * number


@asynccontextmanager
async def serving(**fields: Any) -> AsyncIterator[conduit.Server]:
    """A server with the handlers of the golden frames, on a free port of loopback."""
    server = conduit.Server(**{"verifier": VERIFIER, "host": "127.0.0.1", "port": 0, **fields})

    @server.rpc
    async def add(a: int, b: int) -> int:
        return a + b

    @server.rpc
    async def divide(a: int, b: int) -> float:
        return a / b

    @server.rpc
    async def sleep(seconds: float = 60) -> None:
        await asyncio.sleep(seconds)

    @server.rpc
    async def zeros(size: int) -> bytes:
        return bytes(size)

    server.rpc(double)

    @server.on("greeting")
    async def greeting(client: conduit.Connection, message: Any) -> dict[str, str]:
        return {"reply": f"Hello, {message['name']}!"}

    @server.on("status")
    async def status(client: conduit.Connection, message: Any) -> str:
        return "ok"

    @server.on("quiet")
    async def quiet(client: conduit.Connection, message: Any) -> None:
        return None

    @server.on("stuck")
    async def stuck(client: conduit.Connection, message: Any) -> None:
        await asyncio.Event().wait()

    @server.on("shout")
    async def shout(client: conduit.Connection, message: Any) -> int:
        return await server.broadcast("news", message)

    @server.on("push")
    async def push(client: conduit.Connection, message: int) -> None:
        for number in range(message):
            await client.send("item", number)

    @server.on("ask_back", concurrent=True)
    async def ask_back(client: conduit.Connection, message: str) -> str:
        try:
            return str(await client.rpc.call(message))
        except conduit.RPCError as exc:
            return exc.code

    async with server:
        yield server


def connect(server: conduit.Server, caps: dict[str, Any] | None = None) -> WireClient:
    host, port = server.address[:2]
    return WireClient(host, port, caps)


async def use(
    server: conduit.Server,
    work: Callable[[WireClient], T],
    caps: dict[str, Any] | None = None,
    password: str | None = PASSWORD,
) -> T:
    """Run `work` in a thread, with a client that has logged in."""

    def run() -> T:
        with connect(server, caps) as client:
            return work(client.login(password))

    return await asyncio.to_thread(run)


async def test_server_login() -> None:
    async with serving(name="hub", version="3.2.1", heartbeat_interval=7.5) as server:
        success = await use(server, lambda client: client.success)
        assert success["identity"] == "default"
        assert success["server"] == {"name": "hub", "version": "3.2.1"}
        assert success["hb"] == [7500, 90_000]
        session = success["session"]
        assert (len(session["id"]), len(session["epoch"])) == (16, 8)
        assert (session["resumed"], session["recv"]) == (False, 0)


async def test_server_identifies_its_methods() -> None:
    def told(client: WireClient) -> object:
        return client.success.get("methods")

    async with serving() as server:
        first = await use(server, told)
        assert isinstance(first, bytes) and 1 <= len(first) <= 32
        assert await use(server, told) == first

        @server.rpc
        async def one_more() -> None: ...

        assert await use(server, told) not in (None, first)
    async with conduit.Server(host="127.0.0.1", port=0) as silent:
        assert await use(silent, told, password=None) is None


async def test_server_knows_what_identifies_a_client() -> None:
    def attempt(methods: bytes) -> None:
        with connect(server) as client:
            client.login(PASSWORD, methods=methods)
            client.call("add", {"a": 1, "b": 2})

    async with serving() as server:
        seen: list[bytes] = []
        server.on_client_connect(lambda connection: seen.append(connection.fingerprint))
        for methods in (b"", b"0123456789abcdef" * 2):
            await asyncio.to_thread(attempt, methods)
        assert seen == [b"", b"0123456789abcdef" * 2]


async def test_server_refuses_wrong_password_and_unknown_user_alike() -> None:
    def attempt(user: str, password: str) -> dict[str, Any]:
        with connect(server) as client:
            with pytest.raises(LoginFailed) as caught:
                client.login(password, user)
            with pytest.raises(Closed):  # AUTH_FAILURE is the last frame
                client.read_frame()
        return caught.value.details

    async with serving() as server:
        wrong = await asyncio.to_thread(attempt, "default", "Pencil")
        unknown = await asyncio.to_thread(attempt, "nobody", PASSWORD)
    assert wrong == unknown
    assert wrong["code"] == "invalid_credentials"
    assert wrong["retry"] is False


async def test_server_without_password() -> None:
    async with serving(verifier=None) as server:
        success = await use(server, lambda client: client.success, password=None)
        assert success["identity"] == "anonymous"
        assert success["scram"] == ""
        assert isinstance(success["caps"], bytes)
        with pytest.raises(LoginFailed) as caught:
            await use(server, lambda client: None)
        assert caught.value.code == "unsupported_mechanism"
        assert caught.value.details["mechs"] == ["ANONYMOUS"]


async def test_server_with_password_refuses_anonymous() -> None:
    async with serving() as server:
        with pytest.raises(LoginFailed) as caught:
            await use(server, lambda client: None, password=None)
    assert caught.value.code == "unsupported_mechanism"
    assert "SCRAM-SHA-256" in caught.value.details["mechs"]


LOGIN_PAYLOAD = {"v": 1, "mech": "SCRAM-SHA-256", "scram": "n,,n=default,r=" + "x" * 24}
LOGIN_PAYLOAD |= {"caps": {}, "session": None, "agent": "a/1"}


@pytest.mark.parametrize(
    ("version", "payload", "code"),
    [
        (2, LOGIN_PAYLOAD, "unsupported_version"),
        (1, {**LOGIN_PAYLOAD, "v": 2}, "unsupported_version"),
        (1, {**LOGIN_PAYLOAD, "mech": "PLAIN"}, "unsupported_mechanism"),
        (1, {**LOGIN_PAYLOAD, "scram": "n,,n=default"}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "scram": "n,a=x,n=default,r=" + "x" * 24}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "scram": "n,,n=default,r=short"}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "caps": {"window": 5}}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "agent": "a" * 65}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "methods": "text"}, "bad_request"),
        (1, {**LOGIN_PAYLOAD, "methods": bytes(33)}, "bad_request"),
        (1, {"v": 1, "mech": "SCRAM-SHA-256"}, "bad_request"),
        (1, ["SCRAM-SHA-256"], "bad_request"),
    ],
)
async def test_server_answers_bad_login_requests(version: int, payload: Any, code: str) -> None:
    def attempt() -> Frame:
        with connect(server) as client:
            client.write(frame(AUTH_REQUEST, 0, 1, pack(payload), version=version))
            return client.read_frame()

    async with serving() as server:
        got = await asyncio.to_thread(attempt)
    assert (got.type, got.flags, got.id, got.seq) == (9, 0, 1, 0)
    assert got.value["code"] == code
    if version != 1:
        assert "1" in got.value["message"]
        assert "2" in got.value["message"]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(AUTH_REQUEST, 0, 1, bytes(4097)), 1009),
        (frame(AUTH_REQUEST, 0, 2, pack(LOGIN_PAYLOAD)), 1002),
        (frame(AUTH_REQUEST, PRIORITY, 1, pack(LOGIN_PAYLOAD)), 1002),
        (frame(AUTH_REQUEST, 0, 1, pack(LOGIN_PAYLOAD), seq=1), 1002),
        (frame(AUTH_RESPONSE, 0, 1, pack({"scram": ""})), 1002),
        (frame(PING), 1002),
        (frame(200), 1002),
        (frame(RPC_REQUEST, SEQUENCED, 1, pack(["add", [1, 2]]), seq=1), 1002),
    ],
)
async def test_server_closes_on_broken_login(data: bytes, code: int) -> None:
    def attempt() -> Any:
        with connect(server) as client:
            client.write(data)
            got = client.read_frame()
            assert got.type == CLOSE
            return got.value[0]

    async with serving() as server:
        assert await asyncio.to_thread(attempt) == code


async def test_server_says_nothing_to_strangers() -> None:
    def attempt() -> bytes:
        with connect(server) as client:
            client.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with pytest.raises(Closed):
                client.read_frame()
            return client.buffer

    async with serving() as server:
        assert await asyncio.to_thread(attempt) == b""


async def test_server_gives_a_silent_client_so_much_time() -> None:
    def attempt() -> tuple[int, str]:
        with connect(server) as client:
            return client.wait_closed()

    async with serving(limits=conduit.Limits(login_timeout=0.05)) as server:
        code, _ = await asyncio.to_thread(attempt)
    assert code == 4408


async def test_server_that_is_full() -> None:
    def second(first: WireClient) -> None:
        with connect(server) as client:
            client.login(PASSWORD)

    async with serving(max_connections=1) as server:
        with pytest.raises(LoginFailed) as caught:
            await use(server, second)
    assert caught.value.code == "busy"
    assert caught.value.details["retry"] is True


async def test_hook_that_refuses() -> None:
    server = conduit.Server(verifier=VERIFIER, host="127.0.0.1", port=0)

    @server.on_client_connect
    async def refuse(connection: conduit.Connection) -> None:
        raise PermissionError("not you")

    async with server:
        with pytest.raises((LoginFailed, Closed)) as caught:
            await use(server, lambda client: client.call("add", [1, 2]))
    refusal: Any = caught.value
    assert refusal.code in ("refused", 4403)


async def test_server_calls_by_name_and_by_position() -> None:
    async with serving() as server:
        assert await use(server, lambda client: client.call("add", {"a": 10, "b": 20})) == 30
        assert await use(server, lambda client: client.call("add", [10, 20])) == 30
        assert await use(server, lambda client: client.call("sleep", {"seconds": 0})) is None


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("subtract", {}, "method_not_found"),
        ("conduit.nothing", {}, "method_not_found"),
        ("add", {"a": 10}, "invalid_params"),
        ("add", {"a": 10, "b": 20, "c": 30}, "invalid_params"),
        ("divide", [1, 0], "internal_error"),
    ],
)
async def test_server_errors(method: str, params: Any, code: str) -> None:
    async with serving() as server:
        with pytest.raises(RemoteError) as caught:
            await use(server, lambda client: client.call(method, params))
    assert caught.value.code == code
    if code == "internal_error":
        assert "zero" not in caught.value.message
        assert isinstance(caught.value.details["error_id"], str)


async def test_server_names_what_does_not_fit() -> None:
    async with serving() as server:
        with pytest.raises(RemoteError) as caught:
            await use(server, lambda client: client.call("add", {"a": 10, "b": "x"}))
    (error,) = caught.value.details["errors"]
    assert set(error) == {"path", "message", "type"}
    assert error["path"] == "b"


async def test_server_messages_and_requests() -> None:
    def work(client: WireClient) -> None:
        client.send("greeting", {"name": "World"})
        assert client.receive() == ("greeting_response", {"reply": "Hello, World!"})
        assert client.request("greeting", {"name": "you"}) == {"reply": "Hello, you!"}
        assert client.request("quiet") is None
        with pytest.raises(RemoteError, match="method_not_found"):
            client.request("nobody listens")
        client.send("nobody listens")
        client.ping()
        assert client.peer_acked == client.sent

    async with serving() as server:
        await use(server, work)


async def test_server_gives_credit_back() -> None:
    def work(client: WireClient) -> None:
        for _ in range(1000):  # four times the window
            client.send("quiet")
        for _ in range(10):
            client.send("nobody listens", bytes(900_000))
        client.ping()

    async with serving() as server:
        await use(server, work)


async def test_server_acknowledges_in_time() -> None:
    def work(client: WireClient) -> None:
        client.send("quiet")
        while client.peer_acked < 1:  # after 200 ms, without a ping
            client.step()
        payload = pack(["quiet", None])
        client.write(b"".join(frame(MESSAGE, SEQUENCED, 0, payload, n) for n in range(2, 66)))
        client.sent += 64
        while client.peer_acked < 65:
            client.step()

    async with serving() as server:
        await use(server, work)


async def test_server_discovery() -> None:
    async with serving() as server:
        methods = await use(server, lambda client: client.call("conduit.discover"))
    assert {"add", "divide", "sleep", "zeros", "double"} == {method["name"] for method in methods}


async def test_server_calls_the_client() -> None:
    async with serving() as server:
        assert await use(server, lambda c: c.request("ask_back", "read")) == "method_not_found"


async def test_server_broadcast() -> None:
    def work(client: WireClient) -> None:
        client.send("shout", {"text": "hi"})
        while True:
            got = client.step()
            if got.type == MESSAGE and got.flags == PRIORITY:
                break
        assert (got.id, got.seq, got.value) == (0, 0, ["news", {"text": "hi"}])

    async with serving() as server:
        await use(server, work)


async def test_server_honours_the_credit_of_the_client() -> None:
    def work(client: WireClient) -> None:
        client.send("push", 3)
        while not client.messages:
            client.step()
        client.ping()
        assert len(client.messages) == 1
        assert [client.receive() for _ in range(3)] == [("item", n) for n in range(3)]

    async with serving() as server:
        await use(server, work, caps={"window": [1, 1 << 20]})


async def test_server_does_not_send_what_the_client_refuses() -> None:
    def work(client: WireClient) -> None:
        assert client.call("zeros", [900]) == bytes(900)
        with pytest.raises(RemoteError, match="payload_too_large"):
            client.call("zeros", [10_000])
        assert client.call("add", [1, 2]) == 3

    async with serving() as server:
        await use(server, work, caps={"frame_max": 1000})


async def test_server_streams() -> None:
    def work(client: WireClient) -> None:
        numbers = list(range(1000))
        assert client.peer_caps["stream"] == [10, 1 << 18]
        got = client.stream("double", {}, "numbers", numbers)
        assert got == ([2 * number for number in numbers], None)
        assert client.stream("double", [], 0, [1]) == ([2], None)
        assert client.stream("add", [1, 2]) == ([], 3)
        for params, parameter in (({}, None), ({}, "other"), ([], 1)):
            with pytest.raises(RemoteError, match="invalid_params"):
                client.stream("double", params, parameter)
        with pytest.raises(RemoteError, match="invalid_params"):
            client.call("double")
        assert client.call("add", [1, 2]) == 3

    async with serving(limits=conduit.Limits(max_stream_items=10)) as server:
        await use(server, work, caps={"stream": [3, 1 << 18]})


async def test_server_honours_the_credit_of_the_client_for_items() -> None:
    def work(client: WireClient) -> None:
        got: list[Any] = []

        def take(count: int) -> None:
            """Wait until there are so many items, and see that no more come."""
            while len(got) < count:
                frame = client.step()
                got.extend(frame.value if frame.type == STREAM_ITEM else ())
            client.ping()
            assert len(got) == count

        id = client.open_id()
        client.post(RPC_REQUEST, id, ["double", {}, {"stream": "numbers"}])
        client.post(STREAM_ITEM, id, [1, 2, 3, 4, 5])
        take(2)
        client.post(STREAM_CREDIT, id, [1, 0])
        take(3)
        client.post(STREAM_CREDIT, id, [2, 0])
        take(5)
        client.post(STREAM_END, id, None)
        assert client.wait_answer(id) == [None]
        assert got == [2, 4, 6, 8, 10]

    async with serving() as server:
        await use(server, work, caps={"stream": [2, 1 << 18]})


async def test_server_closes_on_items_without_credit() -> None:
    def work(client: WireClient) -> tuple[int, str]:
        assert client.peer_caps["stream"] == [4096, 100]
        bodies = [["double", {}, {"stream": "numbers"}], [1] * 200, [1]]
        types = [RPC_REQUEST, STREAM_ITEM, STREAM_ITEM]
        # In one write, so that nothing has been taken when the last of them is read.
        frames = zip(types, bodies, (1, 2, 3), strict=True)
        client.write(b"".join(frame(t, SEQUENCED, 1, pack(body), n) for t, body, n in frames))
        return client.wait_closed()

    async with serving(limits=conduit.Limits(max_stream_bytes=100)) as server:
        code, reason = await use(server, work)
    assert code == 4420
    assert "items without credit" in reason


async def test_server_cancel() -> None:
    def work(client: WireClient) -> None:
        call, message = client.open_id(), client.open_id()
        client.post(RPC_REQUEST, call, ["sleep", {"seconds": 60}])
        client.post(CANCEL, call, ["not needed"])
        with pytest.raises(RemoteError, match="call_cancelled"):
            client.wait_answer(call)
        client.send("stuck", None, message)
        client.post(CANCEL, message, ["not needed"])
        with pytest.raises(RemoteError, match="call_cancelled"):
            client.wait_answer(message)

    async with serving() as server:
        await use(server, work)


@pytest.mark.parametrize("caps", [{"ttl": 30}, {}])
async def test_server_deadline(caps: dict[str, Any]) -> None:
    meta = None if caps else {"ttl": 30, "unknown": True}
    async with serving() as server:
        with pytest.raises(RemoteError, match="rpc_timeout"):
            await use(server, lambda client: client.call("sleep", {}, meta), caps)


async def test_server_deadline_of_zero_is_none() -> None:
    async with serving() as server:
        params = {"seconds": 0.05}
        assert await use(server, lambda c: c.call("sleep", params, {"ttl": 0}), {"ttl": 1}) is None


async def test_server_answers_too_many_calls() -> None:
    def work(client: WireClient) -> RemoteError:
        assert client.peer_caps["calls"] == 1
        client.post(RPC_REQUEST, client.open_id(), ["sleep", {}])
        with pytest.raises(RemoteError) as caught:
            client.call("add", [1, 2])
        return caught.value

    async with serving(limits=conduit.Limits(max_calls=1)) as server:
        error = await use(server, work)
    assert error.code == "overloaded"
    assert (error.details["retryable"], error.details["executed"]) == (True, False)


async def test_server_closes_on_messages_without_credit() -> None:
    def work(client: WireClient) -> tuple[int, str]:
        assert client.peer_caps["window"][0] == 1
        client.post(MESSAGE, 0, ["stuck", None])
        client.post(MESSAGE, 0, ["stuck", None])
        return client.wait_closed()

    async with serving(limits=conduit.Limits(max_messages=1)) as server:
        code, _ = await use(server, work)
    assert code == 4420


def call(flags: int = SEQUENCED, id: int = 1, payload: object = None, seq: int = 1) -> bytes:
    return frame(RPC_REQUEST, flags, id, pack(payload or ["add", [1, 2]]), seq)


def message(payload: bytes, flags: int = SEQUENCED, id: int = 0, seq: int = 1) -> bytes:
    return frame(MESSAGE, flags, id, payload, seq)


GREETING = pack(["quiet", None])
VIOLATIONS = {
    "magic": (b"XNDT" + frame(PING)[4:], 1002),
    "version": (frame(PING, version=2), 1002),
    "type 0": (frame(0), 1002),
    "type 10": (frame(10), 1002),
    "type 25": (frame(25), 1002),
    "flag 4": (frame(PING, 4), 1002),
    "flag 64": (call(SEQUENCED | 64), 1002),
    "low flags of an extension": (frame(200, PRIORITY), 1002),
    "wrong number": (call(seq=2), 1002),
    "number 0": (call(seq=0), 1002),
    "call without number": (call(0, seq=0), 1002),
    "ping with number": (frame(PING, SEQUENCED, 1, seq=1), 1002),
    "reserved": (frame(PING, 0, 1, seq=1), 1002),
    "ping with payload": (frame(PING, 0, 1, b"\xc0"), 1002),
    "stream end with payload": (frame(STREAM_END, SEQUENCED, 1, b"\xc0", 1), 1002),
    "reply to a call": (call(SEQUENCED | REPLY), 1002),
    "priority with number": (message(GREETING, SEQUENCED | PRIORITY), 1002),
    "broadcast without priority": (message(GREETING, 0, seq=0), 1002),
    "broadcast with id": (message(GREETING, PRIORITY, 1, 0), 1002),
    "reply without number": (message(GREETING, REPLY, 0, 0), 1002),
    "compressed ping": (frame(PING, COMPRESSED), 1002),
    "call without id": (call(id=0), 1002),
    "cancel without id": (frame(CANCEL, SEQUENCED, 0, pack(["x"]), 1), 1002),
    "even id": (call(id=2), 1002),
    "id again": (call(id=3) + call(id=3, seq=2), 1002),
    "id goes back": (call(id=3) + message(GREETING, id=1, seq=2), 1002),
    "acknowledges too much": (frame(ACK, id=1), 1002),
    "login after login": (frame(AUTH_REQUEST, 0, 1, pack(LOGIN_PAYLOAD)), 1002),
    "too long": (HEADER.pack(b"CNDT", 1, MESSAGE, SEQUENCED, (1 << 20) + 4097, 0, 0, 1), 1009),
    "not MessagePack": (message(b"\xc1"), 4400),
    "unfinished": (message(b"\x92\xa1a"), 4400),
    "bytes left over": (message(GREETING + b"\xc0"), 4400),
    "a length that lies": (message(b"\x92\xa1a\xdd\xff\xff\xff\xff" + bytes(600)), 4400),
    "no payload": (message(b""), 4400),
    "not UTF-8": (message(b"\x92\xa2\xff\xff\xc0"), 4400),
    "extension type": (message(pack(["quiet", msgpack.ExtType(5, b"x")])), 4400),
    "timestamp": (message(pack(["quiet", msgpack.Timestamp(1)])), 4400),
    "not an array": (message(pack({"quiet": 1})), 4400),
    "one element": (message(pack(["quiet"])), 4400),
    "three elements": (message(pack(["quiet", 1, {}])), 4400),
    "name is no text": (message(pack([1, 1])), 4400),
    "params are a number": (call(payload=["add", 7]), 4400),
    "meta is an array": (call(payload=["add", {}, []]), 4400),
    "key is a number": (call(payload=["add", {}, {"key": 5}]), 4400),
    "key is empty": (call(payload=["add", {}, {"key": ""}]), 4400),
    "key is too long": (call(payload=["add", {}, {"key": "x" * 65}]), 4400),
    "ttl is a text": (call(payload=["add", {}, {"ttl": "1"}]), 4400),
    "credit of one": (frame(STREAM_CREDIT, SEQUENCED, 0, pack([1]), 1), 4400),
    "negative credit": (frame(STREAM_CREDIT, SEQUENCED, 0, pack([-1, 0]), 1), 4400),
}


@pytest.mark.parametrize(("data", "code"), VIOLATIONS.values(), ids=VIOLATIONS)
async def test_server_closes_on_violation(data: bytes, code: int) -> None:
    def work(client: WireClient) -> tuple[int, str]:
        client.write(data)
        client.sent = 2  # what `data` has used, so that an ACK of it is right
        return client.wait_closed()

    async with serving() as server:
        got, reason = await use(server, work)
        assert got == code, reason
        assert 0 < len(reason.encode()) <= 123
        # Others are not touched by it.
        assert await use(server, lambda client: client.call("add", [1, 2])) == 3


async def test_server_ignores_what_it_does_not_know() -> None:
    def work(client: WireClient) -> None:
        client.write(frame(200, 0x4000, 7, b"anything"))
        client.write(frame(PONG, 0x8000, 7))
        client.post(RPC_RESPONSE, 2, [1])
        client.post(RPC_ERROR, 99, ["late", "", {}])
        client.post(MESSAGE, 2, ["late", 1], SEQUENCED | REPLY)
        client.post(CANCEL, 99, ["late"])
        client.post(STREAM_ITEM, 99, [1, 2, 3])
        client.post(STREAM_END, 99, None)
        client.post(STREAM_CREDIT, 99, [1, 1])
        assert client.call("add", [1, 2], {"unknown": 1}) == 3
        client.ping()
        assert client.peer_acked == client.sent

    async with serving() as server:
        await use(server, work, caps={"feat": ["telepathy"], "unknown": 1})


async def test_server_takes_the_golden_frames() -> None:
    """The conversation of the page, but for the ACK, as this server has sent something else."""
    mine = [g for g in GOLDEN.values() if g.sender == "client" and not g.alone and g.seq]
    items: list[Any] = []

    def work(client: WireClient) -> dict[int, Frame]:
        client.write(b"".join(golden.raw for golden in mine))
        client.sent = mine[-1].seq
        answers: dict[int, Frame] = {}
        while set(answers) < {0, 1, 3, 5, 7, 9}:
            got = client.step()
            if got.type == STREAM_ITEM:
                items.extend(got.value)
            if got.type in (RPC_RESPONSE, RPC_ERROR) or got.flags & REPLY:
                answers[got.id] = got
        return answers

    async with serving() as server:
        answers = await use(server, work)
    assert items == GOLDEN["stream_answer"].value
    for name in ("message_response", "reply", "result", "stream_result"):
        golden = GOLDEN[name]
        got = answers[golden.id]
        assert (got.type, got.flags, got.value) == (golden.type, golden.flags, golden.value)
    assert answers[5].value[0] == "internal_error"
    assert answers[7].value[0] == "call_cancelled"


async def test_server_that_stops() -> None:
    called = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work(client: WireClient) -> list[Any] | None:
        assert client.call("add", [1, 2]) == 3
        loop.call_soon_threadsafe(called.set)
        code, _ = client.wait_closed()
        assert (code, client.sent) == (1001, 1)
        return client.goaway

    async with serving() as server:
        working = asyncio.create_task(use(server, work))
        await called.wait()
        await server.stop()
        goaway = await working
    assert goaway is not None
    code, reason, grace, last = goaway
    assert (code, last) == (1001, 1)
    assert isinstance(reason, str)
    assert isinstance(grace, int)


async def test_client_that_leaves() -> None:
    left = asyncio.Event()
    server = conduit.Server(verifier=VERIFIER, host="127.0.0.1", port=0)

    @server.on_client_disconnect
    async def gone(connection: conduit.Connection, reason: object) -> None:
        left.set()

    async with server:
        await use(server, lambda client: client.close(1000, "done"))
        await asyncio.wait_for(left.wait(), 5)


# conduit.Client against wire_server


@asynccontextmanager
async def wire_serving(**options: Any) -> AsyncIterator[WireServer]:
    """A wire server in its thread; at the end its connection has ended, and without an error."""
    server = WireServer(**options).start()
    try:
        yield server
    finally:
        await asyncio.to_thread(server.join)


def library_client(server: WireServer, **fields: Any) -> conduit.Client:
    defaults: dict[str, Any] = {
        "server_host": "127.0.0.1",
        "server_port": server.port,
        "password": PASSWORD,
        "reconnect_enabled": False,
        "limits": conduit.Limits(min_iterations=4096),
    }
    return conduit.Client(**{**defaults, **fields})


async def test_client_login_call_message_request_ping() -> None:
    calls = {"add": lambda params: params["a"] + params["b"]}
    replies = {"status": lambda data: {"heard": data}, "greeting": lambda data: "Hello"}
    heard: asyncio.Queue[Any] = asyncio.Queue()
    async with wire_serving(calls=calls, replies=replies) as server:
        client = library_client(server, name="probe", version="2.1")

        @client.on("greeting_response")
        async def greeted(message: Any) -> None:
            heard.put_nowait(message)

        async with client:
            assert (client.server_name, client.server_version) == ("wire-server", "1.0")
            assert await client.rpc.call("add", {"a": 10, "b": 20}) == 30
            assert await client.rpc.add(a=1, b=2) == 3
            await client.send("note", {"x": [1, 2.5, None, b"\0"]})
            assert await client.request("status", 7) == {"heard": 7}
            await client.send("greeting")
            assert await asyncio.wait_for(heard.get(), 5) == "Hello"
            assert await client.ping() >= 0
    assert server.messages == [("note", {"x": [1, 2.5, None, b"\0"]})]
    assert server.closed is not None
    assert server.closed[0] == 1000
    asked = server.frames[0].value
    assert (asked["v"], asked["mech"], asked["session"]) == (1, "SCRAM-SHA-256", None)
    assert asked["agent"] == "probe/2.1"
    ids = [got.id for got in server.frames if got.type == RPC_REQUEST or got.id and got.type == 1]
    assert ids == sorted(set(ids))
    assert all(id % 2 for id in ids)


async def test_client_identifies_its_methods_and_knows_those_of_the_server() -> None:
    async with wire_serving(methods=b"12345678") as server:
        client = library_client(server)
        client.rpc("add")(lambda a: a)
        async with client:
            assert client.connection.fingerprint == b"12345678"
    assert len(server.frames[0].value["methods"]) == 8
    async with wire_serving() as server:
        async with library_client(server) as client:
            assert client.connection.fingerprint == b""
    assert "methods" not in server.frames[0].value
    async with wire_serving(methods=5) as server:
        with pytest.raises(conduit.ProtocolError, match="methods must be"):
            await library_client(server).connect()


async def test_client_with_wrong_password() -> None:
    async with wire_serving() as server:
        with pytest.raises(conduit.AuthenticationError) as caught:
            await library_client(server, password="Pencil").connect()
    assert caught.value.code == "invalid_credentials"
    assert [got.type for got in server.frames] == [AUTH_REQUEST, AUTH_RESPONSE]


@pytest.mark.parametrize("rewrite", ROGUE_CHALLENGES.values(), ids=ROGUE_CHALLENGES)
async def test_client_refuses_rogue_challenge(rewrite: Callable[[str], str]) -> None:
    async with wire_serving(rewrite_first=rewrite) as server:
        with pytest.raises(conduit.AuthenticationError):
            await library_client(server).connect()
    assert [got.type for got in server.frames] == [AUTH_REQUEST]


async def test_client_has_a_floor_of_iterations_by_default() -> None:
    async with wire_serving() as server:
        with pytest.raises(conduit.AuthenticationError, match="4096"):
            await library_client(server, limits=conduit.Limits()).connect()
    assert [got.type for got in server.frames] == [AUTH_REQUEST]


@pytest.mark.parametrize("final", ["v=" + b64(bytes(32)), "v=", "", "e=other-error"])
async def test_client_refuses_server_that_does_not_know_the_password(final: str) -> None:
    async with wire_serving(rewrite_final=lambda _: final) as server:
        with pytest.raises(conduit.AuthenticationError):
            await library_client(server).connect()
    assert [got.type for got in server.frames] == [AUTH_REQUEST, AUTH_RESPONSE]


@pytest.mark.parametrize("options", [{"trusting": True}, {"password": None}])
async def test_client_with_password_wants_proof(options: dict[str, Any]) -> None:
    async with wire_serving(**options) as server:
        with pytest.raises(conduit.ConduitError):
            await library_client(server).connect()
    assert [got.type for got in server.frames] == [AUTH_REQUEST]


async def test_client_without_password() -> None:
    async with wire_serving(password=None, calls={"one": lambda params: 1}) as server:
        async with library_client(server, password=None) as client:
            assert await client.rpc.call("one") == 1
    assert server.frames[0].value["mech"] == "ANONYMOUS"


async def test_client_of_a_full_server() -> None:
    async with wire_serving(failure={"code": "busy", "message": "full", "retry": True}) as server:
        with pytest.raises(conduit.Unavailable, match="full"):
            await library_client(server).connect()


async def test_client_raises_the_errors_of_the_server() -> None:
    def own(params: Any) -> Any:
        raise RemoteError("out_of_paper", "tray 2 is empty", {"retryable": True, "tray": 2})

    async with wire_serving(calls={"print": own}) as server, library_client(server) as client:
        with pytest.raises(conduit.MethodNotFound, match="nothing"):
            await client.rpc.call("nothing")
        with pytest.raises(conduit.RPCError, match="tray 2 is empty") as caught:
            await client.rpc.call("print")
        assert (caught.value.code, caught.value.retryable) == ("out_of_paper", True)
        assert caught.value.details["tray"] == 2


async def test_client_serves_the_server() -> None:
    results: list[Any] = []

    def script(end: ServerEnd) -> None:
        results.append(end.call("read_sensor", {"name": "t"}))
        results.append(end.request("greeting", "hub"))
        for ask in (end.call, end.request):
            with pytest.raises(RemoteError) as caught:
                ask("nothing")
            results.append(caught.value.code)
        for number in range(600):  # more than the first credit
            end.send("item", number)
        end.request("greeting", "again")  # messages run in order, so all items have been handled
        end.ping(5)
        results.append(end.peer_acked == end.sent)
        end.close(1001, "enough")

    items: list[int] = []
    async with wire_serving(script=script) as server:
        client = library_client(server)

        @client.rpc
        async def read_sensor(name: str) -> dict[str, float]:
            return {name: 21.5}

        @client.on("greeting")
        async def greeting(message: str) -> str:
            return f"Hello, {message}!"

        @client.on("item")
        async def item(message: int) -> None:
            items.append(message)

        await client.connect()
        await asyncio.wait_for(client.wait_closed(), 10)
        await client.disconnect()
    assert results == [{"t": 21.5}, "Hello, hub!", "method_not_found", "method_not_found", True]
    assert items == list(range(600))


class ClosesWithWelcome(WireServer):
    """Says that the client is in and, in the same write, that it shall go."""

    def __init__(self, code: int) -> None:
        super().__init__(PASSWORD, rewrite_final=self._add_close)
        self._code = code

    def _add_close(self, final: str) -> str:
        end, close = self.end, frame(CLOSE, payload=pack([self._code, "sent away"]))
        self.end.write = lambda data: ServerEnd.write(end, data + close)  # type: ignore[method-assign]
        return final


def tell_all(client: conduit.Client) -> list[str]:
    """Return a list that grows by each hook that is called."""
    told: list[str] = []
    client.on_connect(lambda client: told.append("connect"))
    client.on_disconnect(lambda client, reason: told.append("disconnect"))
    client.on_lost(lambda client, reason: told.append("lost"))
    return told


async def test_client_tells_of_a_connection_before_its_end() -> None:
    server = ClosesWithWelcome(1001).start()
    client = library_client(server, reconnect_enabled=True, reconnect_delay=3600)
    told = tell_all(client)
    lost = asyncio.Event()
    client.on_lost(lambda client, reason: lost.set())
    await client.connect()
    await asyncio.wait_for(lost.wait(), 5)
    assert told == ["connect", "disconnect", "lost"]
    await client.disconnect()
    await asyncio.to_thread(server.join)


async def test_client_whose_connect_raises_was_never_connected_for_hooks() -> None:
    server = ClosesWithWelcome(1000).start()
    client = library_client(server)
    told = tell_all(client)
    with pytest.raises(conduit.ConnectionClosed, match="sent away"):
        await client.connect()
    await client.disconnect()  # hooks that run have ended by then
    assert told == []
    await asyncio.to_thread(server.join)


async def test_client_honours_credit() -> None:
    def more(params: Any) -> None:
        server.end.post(STREAM_CREDIT, 0, [1, 1 << 20])

    options = {"caps": {"window": [2, 1 << 20]}, "give_credit": False, "calls": {"more": more}}
    async with wire_serving(**options) as server, library_client(server) as client:
        await client.send("one")
        await client.send("two")
        waiting = asyncio.create_task(client.send("three"))
        await client.ping()
        assert not waiting.done()
        await client.rpc.call("more")
        await asyncio.wait_for(waiting, 5)
        await client.rpc.call("more")  # behind the message; a ping would overtake it
        assert [name for name, _ in server.messages] == ["one", "two", "three"]


async def test_client_gives_up_a_call_with_cancel() -> None:
    async with wire_serving(calls={"silent": lambda params: NO_ANSWER}) as server:
        async with library_client(server) as client:
            with pytest.raises(conduit.RPCTimeout):
                await client.rpc.call("silent", timeout=0.05)
            await client.ping()
    (request,) = (got for got in server.frames if got.type == RPC_REQUEST)
    (cancel,) = (got for got in server.frames if got.type == CANCEL)
    assert cancel.id == request.id
    assert isinstance(cancel.value[0], str)
    assert 0 < request.value[2]["ttl"] <= 50


async def test_client_tells_its_default_deadline_once() -> None:
    calls = {"one": lambda params: 1}
    async with wire_serving(calls=calls) as server:
        async with library_client(server, rpc_timeout=12.5) as client:
            assert await client.rpc.call("one") == 1
            assert await client.rpc.call("one", timeout=None) == 1
    assert server.frames[0].value["caps"]["ttl"] == 12_500
    default, none = (got.value for got in server.frames if got.type == RPC_REQUEST)
    assert len(default) == 2 or "ttl" not in default[2]
    assert none[2]["ttl"] == 0


async def test_client_when_the_link_goes_during_a_call() -> None:
    def script(end: ServerEnd) -> None:
        while end.read_frame().type != RPC_REQUEST:
            pass

    async with wire_serving(script=script) as server:
        client = library_client(server)
        await client.connect()
        with pytest.raises(conduit.ConnectionLost) as caught:
            await client.rpc.call("slow")
        assert caught.value.executed is None
        await client.disconnect()


async def test_no_socket_outlives_a_client_that_has_disconnected() -> None:
    disconnected = threading.Event()
    heard: list[type[OSError]] = []

    def script(end: ServerEnd) -> None:
        while end.read_frame().type != RPC_REQUEST:
            pass
        end.write(frame(CLOSE, payload=pack([1000, "enough"])))
        while end.sock.recv(4096):
            pass  # until the client has said its last word; it waits for this side's
        disconnected.wait(5)
        try:
            for _ in range(2):
                end.sock.send(b"is anybody there?")  # answered by a reset
        except OSError as exc:
            heard.append(type(exc))

    async with wire_serving(script=script) as server:
        client = library_client(server)
        await client.connect()
        with pytest.raises(conduit.ConnectionLost, match="enough"):
            await client.rpc.call("enough")
        await client.disconnect()
        disconnected.set()
    assert heard and issubclass(heard[0], (ConnectionResetError, BrokenPipeError))


CLIENT_VIOLATIONS = {
    **{name: (data, 1002) for name, data in BROKEN_FRAMES.items()},
    "too long": (BROKEN_FRAMES["too long"], 1009),
    "extension type": (BROKEN_FRAMES["extension type"], 4400),
    "bad shape": (frame(RPC_REQUEST, SEQUENCED, 2, pack(["a"]), 1), 4400),
}


@pytest.mark.parametrize(("data", "code"), CLIENT_VIOLATIONS.values(), ids=CLIENT_VIOLATIONS)
async def test_client_closes_on_violation(data: bytes, code: int) -> None:
    def script(end: ServerEnd) -> None:
        end.write(data)
        end.sent = 1
        end.serve()

    async with wire_serving(script=script) as server:
        client = library_client(server)
        with contextlib.suppress(conduit.ConnectionClosed):  # when both come in one read
            await client.connect()
        await asyncio.wait_for(client.wait_closed(), 5)
        await client.disconnect()
    assert server.closed is not None
    assert server.closed[0] == code


async def test_client_ignores_what_it_does_not_know() -> None:
    def script(end: ServerEnd) -> None:
        end.write(frame(200, 0x4000, 7, b"anything"))
        end.write(frame(PONG, 0x8000, 7))
        end.post(RPC_RESPONSE, 99, [1])
        end.post(MESSAGE, 99, ["late", 1], SEQUENCED | REPLY)
        end.post(CANCEL, 98, ["late"])
        end.post(STREAM_ITEM, 99, [1, 2, 3])
        end.post(STREAM_CREDIT, 98, [1, 1])
        sent = end.sent
        end.ping()
        assert end.peer_acked >= sent  # the call below may have been answered meanwhile
        end.serve()

    async with wire_serving(script=script) as server, library_client(server) as client:
        with pytest.raises(conduit.MethodNotFound):
            await client.rpc.call("anything")


async def test_client_streams() -> None:
    """What the client sends, frame by frame, and what it makes of answers that come in pieces."""

    def script(end: ServerEnd) -> None:
        def take(type: int) -> Frame:
            while True:
                got = end.read_frame()
                end.check(got)
                if got.type not in (PING, ACK, STREAM_CREDIT):
                    assert got.type == type
                    return got

        request = take(RPC_REQUEST)
        assert request.value == ["mix", {"a": 1}, {"stream": "numbers", "ttl": 0}]
        first = take(STREAM_ITEM)
        assert (first.id, first.value) == (request.id, [1, 2, 3])
        last = take(STREAM_END)
        assert (last.id, last.payload) == (request.id, b"")
        for items in ([1], [2, 3], ["x"] * 4):
            end.post(STREAM_ITEM, request.id, items)
        end.post(RPC_RESPONSE, request.id, ["done"])
        end.post(STREAM_ITEM, request.id, ["late"])
        request = take(RPC_REQUEST)
        end.post(STREAM_ITEM, request.id, [1])
        assert take(CANCEL).id == request.id
        end.post(STREAM_ITEM, request.id, [2])
        end.post(RPC_ERROR, request.id, ["call_cancelled", "", {}])
        end.serve()

    async with wire_serving(script=script) as server, library_client(server) as client:
        run = client.rpc.stream("mix", {"a": 1, "numbers": iter([1, 2, 3])})
        assert [item async for item in run] == [1, 2, 3, "x", "x", "x", "x"]
        assert await run.result() == "done"
        async with client.rpc.stream("endless") as run:
            async for item in run:
                assert item == 1
                break
        with pytest.raises(conduit.MethodNotFound):
            await client.rpc.call("anything")


async def test_client_pings_in_silence() -> None:
    pinged = threading.Event()

    def script(end: ServerEnd) -> None:
        while end.step().type != PING:
            pass
        pinged.set()
        end.serve()

    async with wire_serving(script=script, heartbeat=(50, 5000)) as server:
        async with library_client(server):
            assert await asyncio.to_thread(pinged.wait, 5)


async def test_client_leaves_a_dead_server() -> None:
    def script(end: ServerEnd) -> None:
        while end.read_frame().type != CLOSE:
            pass

    async with wire_serving(script=script, heartbeat=(20, 60)) as server:
        client = library_client(server)
        await client.connect()
        await asyncio.wait_for(client.wait_closed(), 5)
        await client.disconnect()
    assert server.frames[-1].value[0] == 4422
