"""Limits that are crossed over real sockets: what the peer sees, and that memory stays bounded.

Many have a file of their own: test_admission.py, test_bad_input.py, test_floods.py,
test_slow_readers.py, test_resume.py. docs/security.md lists all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import ssl
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from conduit import (
    TLS,
    Connection,
    ConnectionClosed,
    InvalidParams,
    Limits,
    ProtocolError,
    RPCTimeout,
    Unavailable,
    User,
)
from tests.acceptance import raw
from tests.acceptance.raw import COMPRESSED, SEQUENCED, VERIFIER, RawPeer, dial, frame, logged_in
from tests.acceptance.support import (
    issue_certificate,
    neighbourhood,
    new_client,
    new_server,
    until,
    within,
)

MIB = 1 << 20
TOO_BIG, TRY_AGAIN_LATER, TOO_LATE, TOO_SLOW = 1009, 1013, 4408, 4421


@contextlib.contextmanager
def peak_below(most: int) -> Iterator[None]:
    """Fail if what happens inside takes more memory than so many bytes at any time."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak} bytes"


def login_request(**changed: Any) -> bytes:
    """Return the payload of an AUTH_REQUEST that is right, but for what is changed."""
    request = {"v": 1, "mech": "SCRAM-SHA-256", "scram": "n,,n=default,r=" + "r" * 24}
    return raw.pack({**request, "caps": raw.CAPS, "session": None, "agent": "raw/1", **changed})


# Before the login


async def test_a_frame_of_the_login_has_4_kib_on_both_sides() -> None:
    async with new_server() as server, dial(server.address) as peer:
        peer.write(frame(raw.AUTH_REQUEST, 1, length=4097))
        said = await peer.closed()
        assert said is not None and said[0] == TOO_BIG and "4096 bytes during the login" in said[1]

    async def talkative(peer: RawPeer) -> None:
        await peer.until(raw.AUTH_REQUEST)
        peer.write(frame(raw.AUTH_CHALLENGE, 1, length=4097))
        await peer.rest()

    async with raw.listen(talkative) as address:
        with pytest.raises(ProtocolError, match="4096 bytes during the login") as caught:
            await within(new_client(address).connect())
        assert caught.value.close_code == TOO_BIG


REQUEST = frame(raw.AUTH_REQUEST, 1, login_request(padding="x" * 3700))


@pytest.mark.parametrize(
    "sent",
    [[REQUEST] * 5, [REQUEST, b"CNDT" * 1000], [REQUEST, frame(raw.PING, 3) * 10_000]],
    ids=["requests", "junk", "pings"],
)
@pytest.mark.parametrize("waits", [False, True], ids=["at-once", "looked-up"])
async def test_who_has_not_logged_in_makes_the_server_say_two_frames_at_the_most(
    sent: list[bytes], waits: bool
) -> None:
    asked, found = asyncio.Event(), asyncio.Event()

    async def find(user: str) -> User:
        asked.set()
        await found.wait()
        return User(verifier=VERIFIER)

    server = new_server(users=find if waits else {"default": VERIFIER})
    async with server, dial(server.address) as peer:
        with peak_below(8 * MIB):
            peer.write(sent[0])
            if waits:
                await within(asked.wait())
            for data in sent[1:]:
                peer.write(data)
            await peer.closed()
        assert len(peer.log) <= 2
        assert sum(32 + len(got.payload) for got in peer.log) < 16 * 1024
        assert peer.log[-1].type in (raw.CLOSE, raw.AUTH_FAILURE)
        found.set()


async def test_a_client_listens_to_two_frames_before_it_is_in() -> None:
    async def insisting(peer: RawPeer) -> None:
        asked = await peer.until(raw.AUTH_REQUEST)
        nonce = raw.attributes(asked.body["scram"][3:])["r"] + "s" * 24
        caps = raw.pack(raw.CAPS)
        first = f"r={nonce},s={raw.b64(bytes(16))},i=4096,d={raw.binding(asked.payload, caps)}"
        peer.write(frame(raw.AUTH_CHALLENGE, 1, raw.pack({"scram": first, "caps": caps})) * 3)
        await peer.rest()

    async with raw.listen(insisting) as address:
        with pytest.raises(ProtocolError, match="AUTH_CHALLENGE came where"):
            await within(new_client(address).connect())


async def test_the_time_of_a_login_does_not_begin_anew_with_each_byte() -> None:
    server = new_server(limits=Limits(login_timeout=0.1))
    start = time.monotonic()
    async with server, dial(server.address) as peer:

        async def drip() -> None:
            for index in range(len(REQUEST)):
                peer.write(REQUEST[index : index + 1])
                await asyncio.sleep(0.01)

        dripping = asyncio.ensure_future(drip())
        said = await peer.closed()
        assert 0.09 < time.monotonic() - start < 5  # byte by byte it would take half a minute
        dripping.cancel()
        assert said is not None and said[0] == TOO_LATE and "more than 0.1 s" in said[1]


# Calls and streams


async def test_a_call_has_an_hour_or_what_the_server_says() -> None:
    assert Limits().max_timeout == 3600
    server = new_server(limits=Limits(max_timeout=0.02))
    cancelled = asyncio.Event()

    @server.rpc
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with neighbourhood(server) as neighbour:
        with pytest.raises(RPCTimeout, match=r"a call may take 0\.02 s here \(max_timeout\)"):
            await within(neighbour.client.rpc.call("wait", timeout=None))
        await within(cancelled.wait())


async def test_streams_are_calls_and_have_their_number() -> None:
    server, gate, running = new_server(limits=Limits(max_calls=3)), asyncio.Event(), 0

    @server.rpc
    async def total(items: AsyncIterator[int]) -> int:
        nonlocal running
        running += 1
        await gate.wait()
        return sum([item async for item in items])

    async with neighbourhood(server), logged_in(server.address) as peer:
        ids = [peer.take_id() for _ in range(5)]
        for id in ids:
            peer.send(raw.RPC_REQUEST, id, ["total", {}, {"stream": "items"}])
        for id in ids[3:]:
            refused = await peer.until(raw.RPC_ERROR)
            assert refused.id == id and refused.body[0] == "overloaded"
        assert running == 3
        gate.set()
        for id in ids:  # what comes for a call that was refused means nothing
            peer.send(raw.STREAM_ITEM, id, [1, 2])
            peer.sent += 1
            peer.write(frame(raw.STREAM_END, id, flags=SEQUENCED, reserved=peer.sent))
        answers = [await peer.until(raw.RPC_RESPONSE) for _ in range(3)]
        assert {got.id: got.body for got in answers} == dict.fromkeys(ids[:3], [3])


async def test_items_that_make_a_call_fail_do_not_free_its_slot() -> None:
    server, running, most = new_server(limits=Limits(max_calls=4)), 0, 0
    gate = asyncio.Event()

    @server.rpc
    async def total(items: AsyncIterator[int]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        with contextlib.suppress(InvalidParams):
            async for _ in items:
                pass
        await gate.wait()  # it goes on although its caller has spoilt the stream
        running -= 1

    async with neighbourhood(server), logged_in(server.address) as peer:
        for _ in range(50):
            id = peer.take_id()
            peer.send(raw.RPC_REQUEST, id, ["total", {}, {"stream": "items"}])
            peer.send(raw.STREAM_ITEM, id, ["no number"])
        for _ in range(46):
            refused = await peer.until(raw.RPC_ERROR)
            assert refused.body[0] == "overloaded"
        assert most == running == 4
        gate.set()
        for _ in range(4):
            await peer.until(raw.RPC_RESPONSE)


async def test_a_caller_is_told_ten_faults_and_none_of_its_values() -> None:
    server = new_server()

    @server.rpc
    async def take(values: dict[str, int]) -> None: ...

    async with neighbourhood(server), logged_in(server.address) as peer:
        for key in ("k", "\N{GRINNING FACE}"):
            wrong = {f"{number} {key * 300}": "a secret" for number in range(500)}
            peer.request("take", {"values": wrong})
            refused = await peer.until(raw.RPC_ERROR)
            code, text, details = refused.body
            assert code == "invalid_params" and "secret" not in str(refused.body)
            assert len(refused.payload) <= 4096
            errors = details["errors"]
            assert 1 <= len(errors) <= 10
            assert all(one.keys() == {"path", "message", "type"} for one in errors)
            assert text.endswith(f" and {500 - len(errors)} more")


async def test_half_a_million_faults_are_counted_and_not_described() -> None:
    server = new_server()

    @server.rpc
    async def take(values: list[int]) -> None: ...

    count = 500_000
    values = b"\xdd" + count.to_bytes(4, "big") + b"\xa1x" * count
    body = b"\x92" + raw.pack("take") + b"\x81" + raw.pack("values") + values
    async with neighbourhood(server), logged_in(server.address) as peer:
        with peak_below(64 * MIB):  # they would take 400
            peer.write(frame(raw.RPC_REQUEST, 3, body, flags=SEQUENCED, reserved=1))
            refused = await peer.until(raw.RPC_ERROR)
        code, text, details = refused.body
        assert code == "invalid_params" and text.startswith("'take': 500000 faults")
        assert [(one["path"], one["type"]) for one in details["errors"]] == [
            ("", "too_many_faults")
        ]


async def test_large_items_that_wait_take_no_more_memory_than_they_came_in() -> None:
    server, go, took = new_server(), asyncio.Event(), list[int]()

    @server.rpc
    async def take(items: AsyncIterator[Any]) -> None:
        await go.wait()
        async for item in items:
            took.append(len(item))

    count, size = 10, 340_000
    item = b"\x91\xdd" + size.to_bytes(4, "big") + b"\xa2ab" * size
    async with neighbourhood(server), logged_in(server.address) as peer:
        with peak_below(80 * MIB):  # decoded they take 200
            for _ in range(count):
                id = peer.take_id()
                peer.send(raw.RPC_REQUEST, id, ["take", {}, {"stream": "items"}])
                peer.send(raw.STREAM_ITEM, id, [[1, 2]])
                peer.sent += 1
                peer.write(frame(raw.STREAM_ITEM, id, item, flags=SEQUENCED, reserved=peer.sent))
            await peer.call("add", [1, 2])
        go.set()
        await until(lambda: len(took) == 2 * count)
        assert took.count(size) == took.count(2) == count


# Payloads


async def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(b"\x92\xa4mark\x81\xa5value\xc6\x01\0\0\0" + bytes(16 * MIB))
    assert len(bomb) < 100_000
    server = new_server(limits=Limits(max_payload=64 * MIB))
    async with neighbourhood(server), logged_in(server.address) as peer:
        with peak_below(4 * MIB):
            peer.write(frame(raw.RPC_REQUEST, 3, bomb, flags=SEQUENCED | COMPRESSED, reserved=1))
            said = await peer.closed()
        assert said is not None and said[0] == TOO_BIG and f"limit of {MIB} bytes" in said[1]


@pytest.mark.parametrize("secure", [False, True], ids=["tcp", "tls"])
async def test_many_compressed_frames_in_one_read_let_the_others_have_their_turns(
    secure: bool, tmp_path: Path
) -> None:
    certificate, authority = issue_certificate(tmp_path)
    server = new_server(tls=TLS(certificate=certificate) if secure else None)
    turns, seen = 0, list[int]()

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    @server.rpc
    async def take(value: bytes) -> int:
        seen.append(turns)
        return len(value)

    count, size = 100, MIB - 100
    body = zlib.compress(raw.pack(["take", {"value": bytes(size)}]), 9)
    context = ssl.create_default_context(cafile=str(authority))
    context.check_hostname = False  # the tests dial "localhost"
    async with server, dial(server.address, tls=context if secure else None) as peer:
        await peer.login()
        frames = b"".join(
            frame(
                raw.RPC_REQUEST, peer.take_id(), body, flags=SEQUENCED | COMPRESSED, reserved=number
            )
            for number in range(1, count + 1)
        )
        assert len(frames) < 256 * 1024, "one read takes all"
        turning = asyncio.ensure_future(turn())
        with peak_below(16 * MIB):
            peer.write(frames)
            if not secure:
                peer.writer.write_eof()  # which is not to be seen before all of it was handled
            for _ in range(count):
                answer = await peer.until(raw.RPC_RESPONSE)
                assert answer.body == [size]
        turning.cancel()
        # asyncio before 3.11 hands over each record of TLS that a read brings, held or not.
        records = math.ceil(len(frames) / 16384) if secure else 0
        assert len(set(seen)) >= count - records


@pytest.mark.parametrize("name", ["x" * 257, "x" * 100_000, "\n\x1b[31mred", "\u202eevil"])
async def test_names_that_nobody_has_are_not_repeated_as_they_are(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with neighbourhood(new_server()) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            peer.request(name, {})
            refused = await peer.until(raw.RPC_ERROR)
            assert refused.body[0] == "method_not_found" and len(refused.payload) < 1024
            peer.send(raw.MESSAGE, 0, [name, 1])
            await until(lambda: "message dropped" in caplog.text)
        (dropped,) = [one for one in caplog.records if "message dropped" in one.message]
        assert dropped.message.isprintable() and len(dropped.message) < 1024


async def test_what_a_peer_says_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    forged = "x\nERROR conduit.server: root logged in \x1b[31m"
    server = new_server()

    @server.on("numbers")
    async def numbers(client: Connection, data: dict[str, int]) -> None: ...

    async with neighbourhood(server):
        async with dial(server.address) as stranger:  # who has not even logged in
            stranger.write(frame(raw.CLOSE, 0, raw.pack([4999, forged])))
            await until(lambda: "failed: closed by the peer: x" in caplog.text)
        async with logged_in(server.address) as peer:
            peer.send(raw.MESSAGE, 0, ["numbers", {forged: "none"}])
            await until(lambda: "'numbers' refused" in caplog.text)
            peer.write(frame(raw.CLOSE, 0, raw.pack([4999, forged])))
            await until(lambda: "has gone: closed by the peer: x" in caplog.text)
        assert sum("root logged in" in one.message for one in caplog.records) == 3
        assert all(one.message.isprintable() for one in caplog.records)


# Connections


async def test_who_has_gone_and_does_not_read_the_rest_has_a_socket_all_the_same() -> None:
    server = new_server(max_connections=2)

    @server.rpc
    async def big() -> bytes:
        return bytes(MIB - 4096)

    async with neighbourhood(server), logged_in(server.address) as peer:
        transport: Any = peer.writer.transport
        transport.pause_reading()
        for _ in range(7):
            peer.request("big", {})
        await until(lambda: any(one.unsent > MIB for one in server.connections.values()))
        peer.write(frame(raw.CLOSE, 0, raw.pack([1000, ""])))
        await until(lambda: len(server.connections) == 1)
        with pytest.raises(Unavailable, match=r"max_connections"):
            await within(new_client(server).connect())
        transport.abort()
        await until(lambda: not server._clients._count_lingering())
        async with new_client(server) as another:
            assert await within(another.rpc.call("add", [1, 2])) == 3


async def test_who_comes_again_at_once_is_not_in_its_own_way() -> None:
    server = new_server(max_connections=1)
    async with server:
        for _ in range(20):
            async with new_client(server, reconnect_enabled=False) as client:
                assert await within(client.rpc.call("add", [1, 2])) == 3


# What waits for all clients together


async def endings(peers: list[RawPeer], count: int) -> list[tuple[int, str] | None]:
    """Wait until so many of the peers were closed, and return what each of those was told."""
    waiting = [asyncio.ensure_future(peer.closed()) for peer in peers]
    await until(lambda: sum(one.done() for one in waiting) >= count)
    said = [one.result() for one in waiting if one.done()]
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return said


async def test_frames_that_are_begun_and_not_ended_take_no_more_memory_than_there_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server(limits=Limits(max_payload=8 * MIB, max_buffered=20 * MIB))
    begun = frame(raw.RPC_REQUEST, 3, bytes(200_000), flags=SEQUENCED, reserved=1, length=8 * MIB)
    async with neighbourhood(server), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(logged_in(server.address)) for _ in range(10)]
        with peak_below(36 * MIB):  # each could have 8
            for peer in peers:
                peer.write(begun)
            said = await endings(peers, 8)
        assert len(said) == 8 and len(server.connections) == 1 + 2
        for close in said:
            assert close is not None and close[0] == TRY_AGAIN_LATER
            assert f"{20 * MIB} is the most (max_buffered)" in close[1]
            assert close[1] in caplog.text


async def test_of_those_who_do_not_read_the_ones_with_most_end_and_the_others_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server(limits=Limits(max_buffered=12 * MIB))
    reasons: list[ConnectionClosed] = []

    @server.rpc
    async def big() -> bytes:
        return bytes(MIB - 4096)

    @server.on_client_disconnect
    async def disconnected(connection: Connection, reason: ConnectionClosed) -> None:
        reasons.append(reason)

    async with neighbourhood(server) as neighbour, contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(logged_in(server.address)) for _ in range(6)]
        with peak_below(40 * MIB):
            for peer in peers:
                transport: Any = peer.writer.transport
                transport.pause_reading()
                for _ in range(4):  # none of them has more than its own outbox may hold
                    peer.request("big", {})
            await until(lambda: len(reasons) >= 3)
            await neighbour.check()
        assert [reason.code for reason in reasons] == [TOO_SLOW] * 3
        assert all("max_buffered" in reason.reason for reason in reasons)
        assert all(reason.reason in caplog.text for reason in reasons)
        held = [connection.weigh() for connection in server.connections.values()]
        assert len(held) == 1 + 3 and sum(held) <= 12 * MIB
        for peer in peers:
            peer.writer.transport.abort()
