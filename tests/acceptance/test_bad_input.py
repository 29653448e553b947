"""Peers that are wrong, hostile or gone.

Each of them meets a clear answer at a bounded cost, and a neighbour that is connected at the
same time never notices: `neighbourhood` checks that at the end of each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from conduit import (
    AuthenticationError,
    Client,
    ConduitError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Limits,
    MethodNotFound,
    PayloadTooLarge,
    ProtocolError,
    RPCTimeout,
    Status,
)
from tests.acceptance import raw
from tests.acceptance.raw import (
    COMPRESSED,
    HTTP,
    PASSWORD,
    PRIORITY,
    REPLY,
    SEQUENCED,
    RawPeer,
    client_hello,
    dial,
    frame,
    logged_in,
    pack,
)
from tests.acceptance.support import (
    Neighbour,
    Program,
    free_port,
    neighbourhood,
    new_client,
    new_server,
    round_trips,
    within,
)

PROTOCOL_ERROR, TOO_BIG, BAD_PAYLOAD = 1002, 1009, 4400

REQUEST = pack(["add", {"a": 1, "b": 2}])


class Service:
    """A server that notes which handlers ran and who left, and its neighbour."""

    def __init__(
        self, neighbour: Neighbour, ran: list[str], left: asyncio.Queue[Connection]
    ) -> None:
        self.server = neighbour.server
        self.client = neighbour.client
        self.check = neighbour.check
        self.ran = ran
        self.left = left


@contextlib.asynccontextmanager
async def service(**fields: Any) -> AsyncIterator[Service]:
    """Run a server with a method, a message and hooks that leave a trace."""
    server = new_server(**fields)
    ran: list[str] = []
    left: asyncio.Queue[Connection] = asyncio.Queue()

    @server.on_client_connect
    async def connected(connection: Connection) -> None:
        ran.append("connect")

    @server.on_client_disconnect
    async def disconnected(connection: Connection, reason: Any) -> None:
        left.put_nowait(connection)

    @server.rpc
    async def mark(value: Any = None) -> str:
        ran.append("mark")
        return "marked"

    @server.on("note")
    async def note(client: Any, message: Any) -> None:
        ran.append("note")

    async with neighbourhood(server) as neighbour:
        assert ran == ["connect"]
        ran.clear()
        yield Service(neighbour, ran, left)


async def expect_close(peer: RawPeer, *codes: int) -> str:
    """Wait for the end of the link; it must have been announced, with one of these codes."""
    said = await peer.closed()
    assert said is not None, f"hung up without a word; frames before that: {peer.log}"
    code, reason = said
    assert code in codes, said
    assert reason and len(reason.encode()) <= 123
    return reason


# Before the login


@pytest.mark.parametrize(
    "first",
    [
        HTTP,
        client_hello(),
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\0" * 64,
        b"\xff" * 64,
        b"CNDX" + frame(raw.AUTH_REQUEST, 1, b"\x80")[4:],
        b"cndt" + frame(raw.AUTH_REQUEST, 1, b"\x80")[4:],
        b"GET ",
        b"X",
    ],
    ids=["http", "tls", "ssh", "zeros", "ones", "almost", "lower", "four-bytes", "one-byte"],
)
async def test_bytes_of_another_protocol_are_met_with_silence(first: bytes) -> None:
    async with service() as here, dial(here.server.address) as peer:
        peer.write(first)
        assert await peer.rest(5) == b""
        assert here.ran == []


@pytest.mark.parametrize("version", [0, 2, 255])
async def test_another_version_is_refused_and_both_versions_are_named(version: int) -> None:
    async with service() as here, dial(here.server.address) as peer:
        peer.write(frame(raw.AUTH_REQUEST, 1, b"\x80", version=version))
        failure = await peer.until(raw.AUTH_FAILURE)
        assert failure.body["code"] == "unsupported_version"
        assert str(version) in failure.body["message"] and "1" in failure.body["message"]
        assert failure.body["retry"] is False
        await peer.closed()


async def test_a_client_is_told_that_the_server_speaks_another_version() -> None:
    async def newer(peer: RawPeer) -> None:
        await peer.until(raw.AUTH_REQUEST)
        body = {
            "code": "unsupported_version",
            "message": "this server speaks version 2, the client version 1",
            "retry": False,
            "retry_after": 0,
            "mechs": [],
        }
        peer.write(frame(raw.AUTH_FAILURE, 1, pack(body)))

    async with raw.listen(newer) as address:
        with pytest.raises(ConduitError, match="version 2"):
            await within(new_client(address).connect())


@pytest.mark.parametrize(
    "data",
    [
        frame(raw.AUTH_REQUEST, 1, bytes(4097)),
        frame(raw.AUTH_REQUEST, 1, length=1 << 20),
        frame(raw.AUTH_REQUEST, 1, length=0xFFFF_FFFF),
        frame(raw.RPC_REQUEST, 3, REQUEST, flags=SEQUENCED, reserved=1),
        frame(raw.MESSAGE, 0, pack(["note", {}]), flags=SEQUENCED, reserved=1),
        frame(raw.PING, 3),
        frame(raw.AUTH_SUCCESS, 1, b"\x80"),
        frame(raw.AUTH_RESPONSE, 1, pack({"scram": "c=biws,r=x,p=eA=="})),
        frame(raw.AUTH_REQUEST, 1, b"\x80"),
        frame(raw.AUTH_REQUEST, 1, b"\xc1"),
        frame(raw.AUTH_REQUEST, 1, b""),
        frame(raw.AUTH_REQUEST, 1, pack([1, 2, 3])),
        frame(raw.AUTH_REQUEST, 1, pack({"v": 1, "mech": "SCRAM-SHA-256", "scram": 5})),
        frame(raw.AUTH_REQUEST, 1, pack({"v": 1, "mech": "SCRAM-SHA-256", "scram": "nonsense"})),
        frame(raw.AUTH_REQUEST, 1, pack({"v": 1, "mech": "PLAIN", "scram": "n,,n=default,r=x"})),
        frame(raw.AUTH_REQUEST, 1, pack({"v": 1, "mech": "ANONYMOUS", "scram": ""})),
        frame(raw.AUTH_REQUEST, 1, b"\x91" * 2000),
        frame(0),
        frame(99),
    ],
    ids=[
        "too-big",
        "claims-a-megabyte",
        "claims-four-gigabytes",
        "call",
        "message",
        "ping",
        "success",
        "response-first",
        "empty-map",
        "not-msgpack",
        "empty",
        "array",
        "scram-of-another-type",
        "scram-nonsense",
        "unknown-mechanism",
        "anonymous",
        "deep",
        "type-0",
        "type-99",
    ],
)
async def test_before_the_login_nothing_else_is_listened_to(data: bytes) -> None:
    async with service() as here, dial(here.server.address) as peer:
        peer.write(data)
        said = await peer.closed(5)
        # At most one frame says why.
        assert len(peer.log) <= 1
        assert {got.type for got in peer.log} <= {raw.AUTH_FAILURE, raw.CLOSE}
        assert said is None or said[0] in (PROTOCOL_ERROR, TOO_BIG, BAD_PAYLOAD, 4401)
        assert here.ran == []


async def test_an_unknown_mechanism_is_answered_with_the_known_ones() -> None:
    async with service() as here, dial(here.server.address) as peer:
        offer = {"v": 1, "mech": "PLAIN", "scram": "", "caps": raw.CAPS, "session": None}
        peer.write(frame(raw.AUTH_REQUEST, 1, pack({**offer, "agent": "raw/1"})))
        failure = await peer.until(raw.AUTH_FAILURE)
        assert failure.body["code"] == "unsupported_mechanism"
        assert "SCRAM-SHA-256" in failure.body["mechs"]
        await peer.closed()


async def test_an_unknown_user_and_a_wrong_password_look_the_same() -> None:
    async with service() as here:
        seen: list[tuple[dict[str, str], bytes]] = []
        for user, password in [("default", "wrong"), ("nobody", PASSWORD), ("nobody", "x")]:
            async with dial(here.server.address) as peer:
                with pytest.raises(raw.LoginRefused):
                    await peer.login(password, user)
                challenge, failure = peer.log[:2]
                seen.append((raw.attributes(challenge.body["scram"]), failure.payload))
        (known, refused), (unknown, also_refused), (again, _) = seen
        assert refused == also_refused
        assert msgpack.unpackb(refused)["code"] == "invalid_credentials"
        assert known.keys() == unknown.keys()
        assert known["i"] == unknown["i"]
        assert len(known["s"]) == len(unknown["s"])
        # A salt that changed from login to login would tell that there is no such user.
        assert unknown["s"] == again["s"] != known["s"]
        assert here.ran == []


async def test_a_nonce_of_another_connection_is_refused() -> None:
    async with service() as here, dial(here.server.address) as peer:

        async def tampering(data: bytes) -> None:
            if data[5] == raw.AUTH_RESPONSE:
                body = msgpack.unpackb(data[32:])
                start = body["scram"].index("r=") + 2
                changed = "A" if body["scram"][start] != "A" else "B"
                body["scram"] = body["scram"][:start] + changed + body["scram"][start + 1 :]
                data = frame(raw.AUTH_RESPONSE, 1, pack(body))
            peer.write(data)

        with pytest.raises(raw.LoginRefused):
            await peer.login(write=tampering)
        assert here.ran == []


async def test_an_offer_that_was_changed_on_the_way_is_noticed() -> None:
    async with service() as here, dial(here.server.address) as peer:

        async def tampering(data: bytes) -> None:
            if data[5] == raw.AUTH_REQUEST:
                body = msgpack.unpackb(data[32:])
                body["caps"]["feat"] = ["something else"]
                data = frame(raw.AUTH_REQUEST, 1, pack(body))
            peer.write(data)

        # The server signs what it got, and the client sees that this was never sent.
        with pytest.raises(AssertionError, match="not signed as sent"):
            await peer.login(write=tampering)
        assert here.ran == []


async def test_frames_sent_along_with_the_login_are_never_served_before_it() -> None:
    async with service() as here, dial(here.server.address) as peer:

        async def impatient(data: bytes) -> None:
            if data[5] == raw.AUTH_RESPONSE:
                body = msgpack.unpackb(data[32:])
                body["scram"] = body["scram"][:-8] + "AAAAAAA="
                data = frame(raw.AUTH_RESPONSE, 1, pack(body)) + frame(
                    raw.RPC_REQUEST, 3, pack(["mark", {}]), flags=SEQUENCED, reserved=1
                )
            peer.write(data)

        with pytest.raises(raw.LoginRefused):
            await peer.login(write=impatient)
        await peer.closed()
        assert here.ran == []


# A server that is not what it says


@pytest.mark.parametrize("forge", ["signature", "binding"])
async def test_a_server_that_does_not_know_the_password_is_refused(forge: str) -> None:
    async def rogue(peer: RawPeer) -> None:
        with contextlib.suppress(AssertionError):
            await peer.accept_login(forge=forge)
        await peer.closed()

    async with raw.listen(rogue) as address:
        client = new_client(address)
        with pytest.raises(ConduitError):
            await within(client.connect())
        assert client.status is not Status.READY


@pytest.mark.parametrize("iterations", [1, 4095, 2_000_001, 1_000_000_000])
async def test_a_server_that_asks_for_too_little_or_too_much_work_is_refused(
    iterations: int,
) -> None:
    answers: asyncio.Queue[list[int]] = asyncio.Queue()

    async def rogue(peer: RawPeer) -> None:
        with contextlib.suppress(AssertionError):
            await peer.accept_login(iterations=iterations)
        answers.put_nowait([got.type for got in peer.log])

    async with raw.listen(rogue) as address:
        start = time.monotonic()
        with pytest.raises(ConduitError, match=str(iterations)):
            await within(new_client(address).connect())
        assert time.monotonic() - start < 5
        # No proof was handed out that could be attacked cheaply.
        assert raw.AUTH_RESPONSE not in await within(answers.get())


async def test_a_client_with_a_password_does_not_accept_a_server_without_login() -> None:
    async def open_house(peer: RawPeer) -> None:
        await peer.until(raw.AUTH_REQUEST)
        success = {
            "scram": "",
            "identity": "anonymous",
            "caps": pack(raw.CAPS),
            "session": {
                "id": bytes(16),
                "epoch": bytes(8),
                "resumed": False,
                "recv": 0,
                "ttl": 0,
            },
            "hb": [30_000, 90_000],
            "server": {"name": "raw", "version": "1"},
        }
        peer.write(frame(raw.AUTH_SUCCESS, 1, pack(success)))
        await peer.closed()

    async with raw.listen(open_house) as address:
        with pytest.raises(ConduitError):
            await within(new_client(address).connect())


async def test_a_server_of_another_protocol_is_reported() -> None:
    async def web_server(peer: RawPeer) -> None:
        peer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await peer.rest()

    async with raw.listen(web_server) as address:
        with pytest.raises((ConduitError, OSError)) as caught:
            await within(new_client(address).connect())
        assert str(address[1]) in str(caught.value)


async def test_a_server_that_says_nothing_does_not_hold_the_client_for_ever() -> None:
    async def mute(peer: RawPeer) -> None:
        await peer.rest(30)

    async with raw.listen(mute) as address:
        start = time.monotonic()
        with pytest.raises((OSError, asyncio.TimeoutError, ConduitError)) as caught:
            await within(new_client(address, connect_timeout=0.3).connect())
        assert time.monotonic() - start < 5
        assert str(address[1]) in str(caught.value)


async def test_a_server_that_hangs_up_during_the_login_is_reported() -> None:
    async def rude(peer: RawPeer) -> None:
        await peer.until(raw.AUTH_REQUEST)
        peer.abort()

    async with raw.listen(rude) as address:
        with pytest.raises((OSError, ConduitError)) as caught:
            await within(new_client(address).connect())
        assert str(caught.value)


# Frames that break the rules, after the login

Bytes = Callable[[RawPeer], bytes]

BROKEN_FRAMES: dict[str, tuple[Bytes, tuple[int, ...]]] = {
    "magic": (lambda p: b"HTTP" + bytes(28), (PROTOCOL_ERROR,)),
    "version": (lambda p: frame(raw.PING, 3, version=2), (PROTOCOL_ERROR,)),
    "type 0": (lambda p: frame(0), (PROTOCOL_ERROR,)),
    "type 25": (lambda p: frame(25), (PROTOCOL_ERROR,)),
    "type 99": (lambda p: frame(99), (PROTOCOL_ERROR,)),
    "type 127": (lambda p: frame(127), (PROTOCOL_ERROR,)),
    "flag 4": (lambda p: frame(raw.PING, 3, flags=4), (PROTOCOL_ERROR,)),
    "flag 32": (lambda p: frame(raw.PING, 3, flags=32), (PROTOCOL_ERROR,)),
    "flag 64": (lambda p: frame(raw.PING, 3, flags=64), (PROTOCOL_ERROR,)),
    "flag 128": (lambda p: frame(raw.PING, 3, flags=128), (PROTOCOL_ERROR,)),
    "reserved in use": (lambda p: frame(raw.PING, 3, reserved=1), (PROTOCOL_ERROR,)),
    "compressed ping": (lambda p: frame(raw.PING, 3, flags=COMPRESSED), (PROTOCOL_ERROR,)),
    "reply that is a call": (
        lambda p: p.numbered(raw.RPC_REQUEST, 3, ["mark", {}], flags=REPLY),
        (PROTOCOL_ERROR,),
    ),
    "urgent call": (
        lambda p: p.numbered(raw.RPC_REQUEST, 3, ["mark", {}], flags=PRIORITY),
        (PROTOCOL_ERROR,),
    ),
    "call without a number": (
        lambda p: frame(raw.RPC_REQUEST, 3, pack(["mark", {}])),
        (PROTOCOL_ERROR,),
    ),
    "message without a number": (
        lambda p: frame(raw.MESSAGE, 0, pack(["note", {}])),
        (PROTOCOL_ERROR,),
    ),
    "ping with a number": (
        lambda p: frame(raw.PING, 3, flags=SEQUENCED, reserved=1),
        (PROTOCOL_ERROR,),
    ),
    "first number 0": (
        lambda p: frame(raw.RPC_REQUEST, 3, pack(["mark", {}]), flags=SEQUENCED, reserved=0),
        (PROTOCOL_ERROR,),
    ),
    "a number left out": (
        lambda p: frame(raw.RPC_REQUEST, 3, pack(["mark", {}]), flags=SEQUENCED, reserved=2),
        (PROTOCOL_ERROR,),
    ),
    "call id of the other side": (
        lambda p: p.numbered(raw.RPC_REQUEST, 4, ["mark", {}]),
        (PROTOCOL_ERROR,),
    ),
    "message id of the other side": (
        lambda p: p.numbered(raw.MESSAGE, 4, ["note", {}]),
        (PROTOCOL_ERROR,),
    ),
    "call id 0": (lambda p: p.numbered(raw.RPC_REQUEST, 0, ["mark", {}]), (PROTOCOL_ERROR,)),
    "ack of nothing": (lambda p: frame(raw.ACK, 1), (PROTOCOL_ERROR,)),
    "ack of far too much": (lambda p: frame(raw.ACK, 1 << 60), (PROTOCOL_ERROR,)),
    "login again": (lambda p: frame(raw.AUTH_REQUEST, 1, b"\x80"), (PROTOCOL_ERROR,)),
    "success from a client": (lambda p: frame(raw.AUTH_SUCCESS, 1, b"\x80"), (PROTOCOL_ERROR,)),
    "frame over the limit": (
        lambda p: frame(
            raw.RPC_REQUEST, 3, flags=SEQUENCED, reserved=1, length=p.caps["frame_max"] + 4097
        ),
        (TOO_BIG,),
    ),
    "frame of four gigabytes": (
        lambda p: frame(raw.RPC_REQUEST, 3, flags=SEQUENCED, reserved=1, length=0xFFFF_FFFF),
        (TOO_BIG,),
    ),
    "a length that is too short": (
        lambda p: frame(
            raw.RPC_REQUEST,
            3,
            pack(["mark", {"value": "abcdefgh"}]),
            flags=SEQUENCED,
            reserved=1,
            length=10,
        ),
        (BAD_PAYLOAD, PROTOCOL_ERROR),
    ),
    "a length that covers more than the payload": (
        lambda p: frame(
            raw.RPC_REQUEST,
            3,
            pack(["mark", {}]) + bytes(10),
            flags=SEQUENCED,
            reserved=1,
        ),
        (BAD_PAYLOAD,),
    ),
}


@pytest.mark.parametrize("name", BROKEN_FRAMES)
async def test_a_frame_that_breaks_the_rules_ends_the_link_with_a_reason(name: str) -> None:
    make, codes = BROKEN_FRAMES[name]
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        peer.write(make(peer))
        await expect_close(peer, *codes)
        gone = await within(here.left.get())
        assert gone.name == "raw"
        assert here.ran == []


async def test_the_limit_is_named_where_it_is_crossed() -> None:
    async with service(limits=Limits(max_payload=65536)) as here:
        async with logged_in(here.server.address) as peer:
            assert peer.caps["frame_max"] == 65536
            peer.write(frame(raw.RPC_REQUEST, 3, flags=SEQUENCED, reserved=1, length=65536 + 4097))
            reason = await expect_close(peer, TOO_BIG)
            assert "65536" in reason and str(65536 + 4097) in reason


async def test_a_value_just_below_the_limit_is_accepted() -> None:
    server = new_server(limits=Limits(max_payload=65536))

    @server.rpc
    async def size(value: bytes) -> int:
        return len(value)

    async with neighbourhood(server) as neighbour, logged_in(server.address) as peer:
        assert await peer.call("size", {"value": bytes(65536 - 64)}) == 65536 - 64
        called = neighbour.client.rpc.call("size", args={"value": bytes(65536 - 64)})
        assert await within(called) == 65536 - 64


async def test_a_client_refuses_to_send_what_the_server_would_refuse() -> None:
    server = new_server(limits=Limits(max_payload=65536))

    @server.rpc
    async def size(value: bytes) -> int:
        return len(value)

    @server.on("blob")
    async def blob(client: Any, message: Any) -> None:
        return None

    async with neighbourhood(server) as neighbour:
        client = neighbour.client
        for attempt in (
            client.rpc.call("size", args={"value": bytes(100_000)}),
            client.send("blob", bytes(100_000)),
            client.request("blob", bytes(100_000)),
        ):
            with pytest.raises(PayloadTooLarge) as caught:
                await within(attempt)
            text = str(caught.value)
            assert "65536" in text and "max_payload" in text
            await neighbour.check()


async def test_a_result_that_the_caller_would_refuse_becomes_an_error() -> None:
    server = new_server()

    @server.rpc
    async def big() -> bytes:
        return bytes(100_000)

    async with neighbourhood(server) as neighbour:
        limits = Limits(min_iterations=4096, max_payload=65536)
        async with new_client(server, limits=limits) as client:
            with pytest.raises(PayloadTooLarge, match="65536"):
                await within(client.rpc.call("big"))
            await round_trips(client, 2)
        assert len(await within(neighbour.client.rpc.call("big"))) == 100_000


@pytest.mark.parametrize("type", [128, 129, 200, 255])
async def test_a_type_of_128_and_above_is_ignored(type: int) -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        peer.write(frame(type, 12345, os.urandom(100)))
        peer.write(frame(type))
        assert await peer.call("mark", {}) == "marked"


async def test_flags_of_the_high_byte_are_ignored() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        id = peer.take_id()
        peer.send(raw.RPC_REQUEST, id, ["mark", {}], flags=0xFF00)
        answer = await peer.until(raw.RPC_RESPONSE)
        assert (answer.id, answer.body) == (id, ["marked"])
        peer.write(frame(raw.PING, 5, flags=0x8000))
        assert (await peer.until(raw.PONG)).id == 5


async def test_a_replayed_number_ends_the_link() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        first = peer.numbered(raw.RPC_REQUEST, 3, ["mark", {}])
        peer.write(first)
        assert (await peer.until(raw.RPC_RESPONSE)).body == ["marked"]
        here.ran.clear()
        peer.write(first)
        await expect_close(peer, PROTOCOL_ERROR)
        assert here.ran == []


async def test_an_old_number_under_a_new_id_ends_the_link() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        assert await peer.call("mark", {}) == "marked"
        here.ran.clear()
        peer.write(frame(raw.RPC_REQUEST, 5, pack(["mark", {}]), flags=SEQUENCED, reserved=1))
        await expect_close(peer, PROTOCOL_ERROR)
        assert here.ran == []


@pytest.mark.parametrize("second", [7, 5], ids=["the-same-id", "a-smaller-id"])
async def test_ids_must_increase(second: int) -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        peer.send(raw.RPC_REQUEST, 7, ["mark", {}])
        assert (await peer.until(raw.RPC_RESPONSE)).id == 7
        here.ran.clear()
        peer.send(raw.RPC_REQUEST, second, ["mark", {}])
        await expect_close(peer, PROTOCOL_ERROR)
        assert here.ran == []


async def test_an_ack_of_more_than_was_sent_ends_the_link() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        for _ in range(3):
            assert await peer.call("mark", {}) == "marked"
        peer.write(frame(raw.ACK, 3))
        assert await peer.call("mark", {}) == "marked"
        peer.write(frame(raw.ACK, 5))
        await expect_close(peer, PROTOCOL_ERROR)


async def test_more_messages_than_the_credit_allows_end_in_bounded_memory() -> None:
    server = new_server(limits=Limits(max_messages=16))
    gate = asyncio.Event()

    @server.on("note")
    async def note(client: Any, message: Any) -> None:
        await gate.wait()

    async with neighbourhood(server), logged_in(server.address) as peer:
        assert peer.caps["window"][0] == 16
        for _ in range(1000):
            peer.send(raw.MESSAGE, 0, ["note", {}])
        assert await peer.closed() is not None
        gate.set()


async def test_more_calls_than_agreed_are_answered_with_overloaded() -> None:
    server = new_server(limits=Limits(max_calls=4))
    gate = asyncio.Event()
    running = 0

    @server.rpc
    async def wait() -> str:
        nonlocal running
        running += 1
        await gate.wait()
        return "done"

    async with neighbourhood(server), logged_in(server.address) as peer:
        assert peer.caps["calls"] == 4
        ids = [peer.request("wait", {}) for _ in range(6)]
        for _ in range(2):
            refused = await peer.until(raw.RPC_ERROR)
            assert refused.id in ids[4:]
            code, _, details = refused.body
            assert code == "overloaded"
            assert details["retryable"] is True
        assert running == 4
        gate.set()
        answered = {(await peer.until(raw.RPC_RESPONSE)).id for _ in range(4)}
        assert answered == set(ids[:4])


# Pieces


@pytest.mark.parametrize("length", [1, 4, 31, 32, 33, 40, -1])
async def test_a_truncated_frame_is_never_served(length: int) -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        peer.write(peer.numbered(raw.RPC_REQUEST, 3, ["mark", {"value": "x" * 50}])[:length])
        await here.check()
        peer.writer.write_eof()
        await peer.closed()
        gone = await within(here.left.get())
        assert gone.name == "raw"
        assert here.ran == []


async def test_a_frame_cut_in_two_at_every_byte_is_served() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        size = len(frame(raw.RPC_REQUEST, 3, REQUEST))
        for cut_at in range(1, size):
            id = peer.take_id()
            data = peer.numbered(raw.RPC_REQUEST, id, ["add", {"a": 1, "b": 2}])
            peer.write(data[:cut_at])
            # Another call goes back and forth, so the first piece has arrived alone.
            await round_trips(here.client, 1)
            peer.write(data[cut_at:])
            answer = await peer.until(raw.RPC_RESPONSE)
            assert (answer.id, answer.body) == (id, [3])


async def test_a_whole_session_byte_by_byte_is_served() -> None:
    async with service() as here, dial(here.server.address) as peer:
        await peer.login(write=peer.write_slowly)
        data = peer.numbered(raw.MESSAGE, 0, ["note", {"n": 1}])
        data += peer.numbered(raw.RPC_REQUEST, 3, ["add", {"a": 1, "b": 2}])
        data += frame(raw.PING, 9)
        await peer.write_slowly(data)
        # Either may come first: a PONG overtakes what is written with it.
        answers = [await peer.until(raw.RPC_RESPONSE, raw.PONG) for _ in range(2)]
        by_type = {answer.type: answer for answer in answers}
        assert by_type[raw.RPC_RESPONSE].body == [3]
        assert by_type[raw.PONG].id == 9
        assert "note" in here.ran


async def test_many_frames_in_one_segment_are_all_served() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        data = b""
        ids = []
        for number in range(200):
            ids.append(peer.take_id())
            data += peer.numbered(raw.RPC_REQUEST, ids[-1], ["add", {"a": number, "b": 1}])
        peer.write(data)
        answers: dict[int, Any] = {}
        while len(answers) < 200:
            answer = await peer.until(raw.RPC_RESPONSE)
            answers[answer.id] = answer.body
        assert answers == {id: [number + 1] for number, id in enumerate(ids)}


# Payloads


def nested_lies(size: int) -> bytes:
    """Return arrays in arrays, each claiming far more items than there are bytes."""
    return b"\xdd\x00\x0e\xff\xff" * (size // 5)


def empty_containers(kind: bytes, size: int) -> bytes:
    """Return a well-formed array of arrays of empty containers."""
    inner = b"\xdc\xea\x60" + kind * 60_000
    count = size // len(inner)
    return b"\x92\xa4mark\x81\xa5value\xdc" + struct.pack(">H", count) + inner * count


BAD_PAYLOADS = {
    "empty": b"",
    "not msgpack": b"\xc1",
    "cut short": pack(["mark", {"value": "abc"}])[:-1],
    "trailing bytes": pack(["mark", {}]) + b"\x00",
    "map": pack({"method": "mark"}),
    "number": pack(5),
    "empty array": pack([]),
    "one item": pack(["mark"]),
    "method is a number": pack([5, {}]),
    "method is bytes": pack([b"mark", {}]),
    "parameters are nothing at all": b"\x92\xa4mark\xc1",
    "bad utf-8": b"\x92\xa4mark\x81\xa5value\xa2\xff\xfe",
    "unknown extension": b"\x92\xa4mark\x81\xa5value\xd4\x2a\x00",
    "timestamp of another universe": b"\x92\xa4mark\x81\xa5value\xc7\x0c\xff" + b"\xff" * 12,
    "deep arrays": b"\x92\xa4mark\x81\xa5value" + b"\x91" * 5000 + b"\x90",
    "deep maps": b"\x92\xa4mark\x81\xa5value" + b"\x81\xa1a" * 5000 + b"\x80",
    "array of four billion": b"\x92\xa4mark\x81\xa5value\xdd\xff\xff\xff\xff",
    "text of four gigabytes": b"\x92\xa4mark\x81\xa5value\xdb\xff\xff\xff\xff",
    "nested lies, 3 KB": nested_lies(3000),
    "nested lies, 1 MB": nested_lies(1_000_000),
}

# Well-formed payloads whose content is refused: the call fails, and nothing else does.
REFUSED_PAYLOADS = {
    "integer keys": (b"\x92\xa4mark\x81\x01\x02", "invalid_params"),
    "keys that are arrays": (b"\x92\xa4mark\x81\x90\x02", "invalid_params"),
    "empty arrays, 1 MB": (empty_containers(b"\x90", 1_000_000), "payload_too_large"),
    "empty maps, 1 MB": (empty_containers(b"\x80", 1_000_000), "payload_too_large"),
}


@pytest.mark.parametrize("name", BAD_PAYLOADS)
async def test_a_payload_that_is_no_call_ends_the_link_at_a_bounded_cost(name: str) -> None:
    payload = BAD_PAYLOADS[name]
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        gc.collect()
        tracemalloc.start()
        try:
            peer.sent += 1
            data = frame(raw.RPC_REQUEST, 3, payload, flags=SEQUENCED, reserved=peer.sent)
            peer.write(data)
            await expect_close(peer, BAD_PAYLOAD, PROTOCOL_ERROR)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 * len(data) + (16 << 20)
        assert here.ran == []


@pytest.mark.parametrize("name", REFUSED_PAYLOADS)
async def test_a_payload_with_refused_content_fails_its_call_at_a_bounded_cost(name: str) -> None:
    payload, code = REFUSED_PAYLOADS[name]
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        tracemalloc.start()
        try:
            peer.sent += 1
            data = frame(raw.RPC_REQUEST, 1, payload, flags=SEQUENCED, reserved=peer.sent)
            peer.write(data)
            answer = await peer.until(raw.RPC_ERROR)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.body[0] == code
        assert peak < 8 * len(data) + (16 << 20)
        assert here.ran == []
        peer.request("mark", {"value": "still served"})
        await peer.until(raw.RPC_RESPONSE)


async def test_a_method_name_of_a_megabyte_is_not_repeated() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        id = peer.request("x" * 900_000, {})
        answer = await peer.until(raw.RPC_ERROR, raw.CLOSE)
        assert answer.type == raw.CLOSE or answer.id == id
        assert len(answer.payload) < 4096
        assert here.ran == []


async def test_parameters_that_are_neither_map_nor_array_call_nothing() -> None:
    async with service() as here, logged_in(here.server.address) as peer:
        here.ran.clear()
        peer.request("mark", "value")
        answer = await peer.until(raw.RPC_ERROR, raw.CLOSE)
        assert answer.body[0] in ("invalid_params", BAD_PAYLOAD, PROTOCOL_ERROR)
        assert here.ran == []


async def test_a_value_deeper_than_anyone_can_handle_is_an_error() -> None:
    server = new_server()

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    async with neighbourhood(server), logged_in(server.address) as peer:
        payload = b"\x92\xa4echo\x81\xa5value" + b"\x91" * 900 + b"\x90"
        peer.sent += 1
        peer.write(frame(raw.RPC_REQUEST, 3, payload, flags=SEQUENCED, reserved=1))
        await peer.until(raw.RPC_RESPONSE, raw.RPC_ERROR, raw.CLOSE)


async def test_deep_values_within_reason_are_served() -> None:
    server = new_server()

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    deep: Any = []
    for _ in range(100):
        deep = [deep]
    async with neighbourhood(server) as neighbour:
        assert await within(neighbour.client.rpc.call("echo", args={"value": deep})) == deep


@pytest.mark.parametrize(
    "value", [2**64, "\ud800", object(), {1, 2}], ids=["int", "surrogate", "object", "set"]
)
async def test_what_cannot_be_packed_is_an_error_of_the_caller(value: object) -> None:
    server = new_server()

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    async with neighbourhood(server) as neighbour:
        # A set may be sent as an array; nothing else in this list can be.
        with contextlib.suppress(ConduitError, TypeError, ValueError, OverflowError):
            sent = await within(neighbour.client.rpc.call("echo", args={"value": value}))
            assert isinstance(value, set) and sorted(sent) == sorted(value)
        await neighbour.check()


async def test_a_result_that_cannot_be_packed_is_an_error_and_not_silence() -> None:
    server = new_server()

    @server.rpc
    async def strange() -> Any:
        return object()

    @server.rpc
    async def huge() -> Any:
        return 2**70

    async with neighbourhood(server) as neighbour:
        for method in ("strange", "huge"):
            with pytest.raises(ConduitError):
                await within(neighbour.client.rpc.call(method))
            await neighbour.check()


# What a client meets


BROKEN_ANSWERS: dict[str, tuple[Bytes, int]] = {
    "id of the client": (
        lambda p: p.numbered(raw.RPC_REQUEST, 3, ["local", {}]),
        PROTOCOL_ERROR,
    ),
    "wrong number": (
        lambda p: frame(raw.RPC_REQUEST, 2, pack(["local", {}]), flags=SEQUENCED, reserved=7),
        PROTOCOL_ERROR,
    ),
    "ack": (lambda p: frame(raw.ACK, 99), PROTOCOL_ERROR),
    "type": (lambda p: frame(99), PROTOCOL_ERROR),
    "login again": (lambda p: frame(raw.AUTH_SUCCESS, 1, b"\x80"), PROTOCOL_ERROR),
    "magic": (lambda p: b"HTTP/1.1 200 OK\r\n\r\n" + bytes(64), PROTOCOL_ERROR),
    "too big": (
        lambda p: frame(raw.RPC_RESPONSE, 1, flags=SEQUENCED, reserved=1, length=1 << 31),
        TOO_BIG,
    ),
    "bad payload": (
        lambda p: frame(raw.RPC_REQUEST, 2, b"\xc1", flags=SEQUENCED, reserved=1),
        BAD_PAYLOAD,
    ),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
async def test_a_client_closes_when_the_server_breaks_the_rules(name: str) -> None:
    make, code = BROKEN_ANSWERS[name]
    said: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

    async def broken(peer: RawPeer) -> None:
        await peer.accept_login()
        await peer.until(raw.RPC_REQUEST)
        peer.write(make(peer))
        said.put_nowait(await peer.closed())

    async with raw.listen(broken) as address:
        client = new_client(address, reconnect_enabled=False)
        ran: list[str] = []

        @client.rpc
        async def local() -> None:
            ran.append("local")

        await within(client.connect())
        with pytest.raises((ConnectionClosed, ProtocolError)):
            await within(client.rpc.call("anything"))
        await within(client.wait_closed())
        assert ran == []
        heard = await within(said.get())
        assert heard is not None and heard[0] == code


async def test_an_answer_that_comes_too_late_is_ignored() -> None:
    late: asyncio.Event = asyncio.Event()

    async def slow(peer: RawPeer) -> None:
        await peer.accept_login()
        first = await peer.until(raw.RPC_REQUEST)
        cancel = await peer.until(raw.CANCEL)
        assert cancel.id == first.id
        peer.send(raw.RPC_RESPONSE, first.id, ["too late"])
        late.set()
        second = await peer.until(raw.RPC_REQUEST)
        peer.send(raw.RPC_RESPONSE, second.id, ["in time"])
        await peer.closed()

    async with raw.listen(slow) as address, new_client(address) as client:
        with pytest.raises(RPCTimeout):
            await within(client.rpc.call("anything", timeout=0.1))
        await within(late.wait())
        assert await within(client.rpc.call("anything")) == "in time"


async def test_an_error_of_a_class_that_nobody_knows_is_an_rpc_error() -> None:
    async def newer(peer: RawPeer) -> None:
        await peer.accept_login()
        asked = await peer.until(raw.RPC_REQUEST)
        details = {"retryable": True, "retry_after": 250, "shelf": 7}
        peer.send(raw.RPC_ERROR, asked.id, ["out_of_stock", "no apples left", details])
        await peer.closed()

    async with raw.listen(newer) as address, new_client(address) as client:
        with pytest.raises(ConduitError) as caught:
            await within(client.rpc.call("buy"))
        error: Any = caught.value
        assert (error.code, error.message) == ("out_of_stock", "no apples left")
        assert error.retryable is True
        assert error.details["shelf"] == 7


async def test_a_close_tells_the_client_why() -> None:
    async def closing(peer: RawPeer) -> None:
        await peer.accept_login()
        await peer.until(raw.RPC_REQUEST)
        peer.write(frame(raw.CLOSE, 0, pack([1013, "come back at noon"])))

    async with raw.listen(closing) as address:
        client = new_client(address, reconnect_enabled=False)
        await within(client.connect())
        with pytest.raises(ConnectionClosed) as caught:
            await within(client.rpc.call("anything"))
        assert caught.value.code == 1013
        assert caught.value.reason == "come back at noon"
        await within(client.wait_closed())


# Addresses and processes


async def test_a_port_in_use_is_reported_with_its_address() -> None:
    async with new_server() as server:
        port = server.address[1]
        with pytest.raises(OSError, match=str(port)) as caught:
            await within(new_server(port=port).start())
        assert "127.0.0.1" in str(caught.value)
        assert "in use" in str(caught.value)
        async with new_client(server) as client:
            await round_trips(client, 1)


async def test_a_name_that_does_not_resolve_is_reported() -> None:
    client = new_client(("no-such-host.invalid", 8080))
    with pytest.raises(OSError, match=r"no-such-host\.invalid"):
        await within(client.connect(), 25)
    assert client.status is not Status.READY


async def test_a_host_of_the_server_that_does_not_resolve_is_reported() -> None:
    with pytest.raises(OSError, match=r"no-such-host\.invalid"):
        await within(new_server(host="no-such-host.invalid").start(), 25)


async def test_a_port_where_nobody_listens_is_reported() -> None:
    port = free_port()
    with pytest.raises(ConnectionRefusedError, match=str(port)) as caught:
        await within(new_client(("127.0.0.1", port)).connect())
    assert "127.0.0.1" in str(caught.value)


async def test_a_wrong_password_is_reported_once_and_for_all() -> None:
    async with neighbourhood(new_server()) as neighbour:
        client = new_client(neighbour.server, password="not the password")
        with pytest.raises(AuthenticationError, match="password") as caught:
            await within(client.connect(retry=True))
        assert caught.value.code == "invalid_credentials"
        assert PASSWORD not in str(caught.value)


async def test_a_client_without_a_password_is_told_that_it_needs_one() -> None:
    async with neighbourhood(new_server()) as neighbour:
        host, port = neighbour.server.address
        with pytest.raises((ConduitError, ValueError), match="password"):
            await within(Client(server_host=host, server_port=port).connect())


SERVER_PROGRAM = """
import asyncio
from conduit import Server

server = Server(host="127.0.0.1", port=0, verifier={verifier!r})

@server.rpc
async def add(a: int, b: int) -> int:
    return a + b

@server.rpc
async def sleeper() -> None:
    print("sleeping")
    await asyncio.sleep(60)

@server.on_startup
async def started(srv: Server) -> None:
    print("port", srv.address[1])

asyncio.run(server.run())
"""


@pytest.mark.parametrize("reconnect", [False, True])
async def test_a_server_killed_during_a_call_fails_the_call_at_once(
    tmp_path: Path, reconnect: bool
) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER_PROGRAM.format(verifier=raw.VERIFIER), encoding="ascii")
    with Program(str(script), cwd=tmp_path) as program:
        started = await asyncio.to_thread(program.wait_for, r"port (\d+)")
        client = new_client(("127.0.0.1", int(started[1])), reconnect_enabled=reconnect)
        async with client:
            await round_trips(client, 2)
            call = asyncio.ensure_future(client.rpc.call("sleeper", timeout=60))
            await asyncio.to_thread(program.wait_for, "sleeping")
            start = time.monotonic()
            program.process.kill()
            with pytest.raises(ConnectionLost) as caught:
                await within(call)
            assert time.monotonic() - start < 3
            assert caught.value.executed is None


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_server_that_hangs_up_during_a_call_fails_the_call_at_once(how: str) -> None:
    async def dying(peer: RawPeer) -> None:
        await peer.accept_login()
        await peer.until(raw.RPC_REQUEST)
        if how == "reset":
            peer.abort()

    async with raw.listen(dying) as address:
        client = new_client(address, reconnect_enabled=False)
        await within(client.connect())
        with pytest.raises(ConnectionLost) as caught:
            await within(client.rpc.call("anything", timeout=60), 3)
        assert caught.value.executed is None
        await within(client.wait_closed())
        assert client.status is Status.CLOSED


async def test_a_client_that_vanishes_during_its_call_leaves_no_handler_behind() -> None:
    server = new_server()
    running = asyncio.Event()
    ended = asyncio.Event()

    @server.rpc
    async def sleeper() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with neighbourhood(server):
        async with logged_in(server.address) as peer:
            peer.request("sleeper", {})
            await within(running.wait())
            peer.abort()
            await within(ended.wait())


async def test_a_crowd_of_bad_peers_harms_nobody() -> None:
    async with service() as here:
        bad = [
            HTTP,
            client_hello(),
            frame(raw.AUTH_REQUEST, 1, length=1 << 31),
            frame(raw.RPC_REQUEST, 3, REQUEST),
            b"CNDT",
            b"",
        ]

        async def attack(data: bytes) -> None:
            with contextlib.suppress(OSError):
                async with dial(here.server.address) as peer:
                    peer.write(data)
                    if data in (b"CNDT", b""):
                        peer.abort()
                    await peer.rest()

        attacks = asyncio.gather(*(attack(data) for data in bad * 10))
        while not attacks.done():
            await round_trips(here.client, 1)
        await attacks
        assert here.ran == []
        with pytest.raises(MethodNotFound):
            await within(here.client.rpc.call("nothing"))


async def test_sockets_are_given_back() -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system does not list open files")

    def open_sockets() -> int:
        return sum(
            os.path.exists(f"/proc/self/fd/{name}")
            and os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
            for name in os.listdir("/proc/self/fd")
        )

    async with service() as here:
        before = open_sockets()
        for _ in range(20):
            async with dial(here.server.address) as peer:
                peer.write(HTTP)
                await peer.rest()
            async with logged_in(here.server.address) as peer:
                peer.write(frame(99))
                await peer.closed()
            await within(here.left.get())
        await round_trips(here.client)
        assert open_sockets() <= before + 1


async def test_an_address_that_answers_nothing_is_given_up_in_time() -> None:
    # A listener whose queue is full answers nobody, like a host that swallows packets.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            client = new_client(listener.getsockname(), connect_timeout=0.3)
            start = time.monotonic()
            with pytest.raises((OSError, asyncio.TimeoutError, ConduitError)):
                await within(client.connect())
            assert time.monotonic() - start < 5
