"""Peers that do not read what they are sent: noticed soon, bounded, and nobody else's trouble."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conduit import Client, Limits, Server
from conduit.transport import link as link_module
from tests.acceptance.raw import RawPeer, logged_in
from tests.acceptance.support import new_client, new_server, until, within
from tests.conftest import LONG

NEWS = b"x" * 16_384
READERS, STALLED = 100, 20
ROUNDS = 2_000 if LONG else 100


@contextlib.asynccontextmanager
async def stalled(server: Server) -> AsyncIterator[RawPeer]:
    """A peer that logs in and then reads nothing."""
    async with logged_in(server.address) as peer:
        transport: Any = peer.writer.transport
        transport.pause_reading()
        try:
            yield peer
        finally:
            transport.abort()


@contextlib.asynccontextmanager
async def reading(server: Server, counts: list[int], number: int) -> AsyncIterator[Client]:
    """A client that counts what it gets."""
    client = new_client(server)

    @client.on("news")
    async def news(message: bytes) -> None:
        counts[number] += 1

    async with client:
        yield client


async def send_rounds(server: Server, counts: list[int]) -> float:
    """Send broadcasts, each when all who read have the one before; return how many a second."""
    start, target = time.monotonic(), counts[0]
    for _ in range(ROUNDS):
        target += 1
        await server.broadcast("news", NEWS)
        while min(counts) < target:  # noqa: ASYNC110  # it lets the loop run and does not sleep
            await asyncio.sleep(0)
    return ROUNDS / (time.monotonic() - start)


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_twenty_of_120_readers_stall_and_the_others_do_not_notice() -> None:
    server = new_server(max_connections=READERS + STALLED)
    counts = [0] * READERS
    async with server, contextlib.AsyncExitStack() as stack:
        for number in range(READERS):
            await stack.enter_async_context(reading(server, counts, number))
        await send_rounds(server, counts)  # warm
        before = await within(send_rounds(server, counts), 60)
        for _ in range(STALLED):
            await stack.enter_async_context(stalled(server))
        stuck = [one for one in server.connections.values() if one.name == "raw"]
        while await server.broadcast("news", NEWS) > READERS:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        await until(lambda: len(set(counts)) == 1)
        with_stalled = await within(send_rounds(server, counts), 60)
        print(  # noqa: T201  # the figures are what the long form is run for
            f"\n{before:.0f} broadcasts a second to {READERS} readers, "
            f"{with_stalled:.0f} with {STALLED} stalled ones beside them"
        )
        # Everybody who reads has got every broadcast, or the rounds would not have ended.
        assert len(stuck) == STALLED
        assert all(not one.closed for one in stuck)
        unsent = [one._outlet.unsent() for one in stuck]
        assert max(unsent) <= link_module.WRITE_BUFFER + len(NEWS) + 1024
        if LONG:
            assert with_stalled > 0.95 * before


async def taken_by_a_stalled_peer() -> int:
    """Return the bytes of broadcasts that are sent to a peer until it counts as stalled."""
    async with new_server() as server, stalled(server):
        reached = 0
        while await server.broadcast("news", NEWS):
            reached += 1
            await asyncio.sleep(0)
        return reached * len(NEWS)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have other buffers")
async def test_a_peer_that_reads_nothing_is_noticed_before_the_kernel_has_taken_megabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounded = await taken_by_a_stalled_peer()
    monkeypatch.setattr(link_module, "_NOTSENT_LOWAT", None)
    print(f"\n{bounded} bytes, {await taken_by_a_stalled_peer()} without")  # noqa: T201
    assert bounded < 2_000_000


@pytest.mark.parametrize("heartbeat", [(1.0, 2.0), (1000.0, 1_000_000.0)])
async def test_the_kernel_is_told_how_long_to_go_on_behind_the_end(
    heartbeat: tuple[float, float],
) -> None:
    interval, timeout = heartbeat
    server = new_server(heartbeat_interval=interval, heartbeat_timeout=timeout)
    async with server, new_client(server) as client:
        (connection,) = server.connections.values()
        assert client.connection is not None
        for side in (connection, client.connection):
            link: Any = side._link
            sock = link._transport.get_extra_info("socket")
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                lowat = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                assert lowat == link_module.UNSENT_IN_KERNEL
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            link.finish()
            given_up = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert given_up == round(timeout * 1500)


@contextlib.asynccontextmanager
async def narrow_path(address: tuple[str, int], rate: float) -> AsyncIterator[tuple[str, int]]:
    """A way to a server that lets so many bytes a second pass, and holds few of them itself."""

    async def pump(source: socket.socket, target: socket.socket) -> None:
        while data := await loop.sock_recv(source, 2048):
            await asyncio.sleep(len(data) / rate)
            await loop.sock_sendall(target, data)

    def narrow() -> socket.socket:
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        return made

    async def serve() -> None:
        near, _ = await loop.sock_accept(listening)
        with near, narrow() as far:
            await loop.sock_connect(far, address)
            await asyncio.gather(pump(near, far), pump(far, near))

    loop = asyncio.get_running_loop()
    with narrow() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        serving = asyncio.create_task(serve())
        try:
            yield listening.getsockname()
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await serving


@pytest.mark.parametrize("method", ["put", "get"])
async def test_a_value_may_take_much_longer_than_the_heartbeat_allows(method: str) -> None:
    # Nothing else passes meanwhile, in either direction: a ping comes behind the value.
    server = new_server(heartbeat_interval=0.2, heartbeat_timeout=0.6)
    lost: list[object] = []

    @server.rpc
    async def put(data: bytes) -> int:
        return len(data)

    @server.rpc
    async def get(size: int) -> bytes:
        return bytes(size)

    @server.on_client_away
    async def away(connection: Any, reason: object) -> None:
        lost.append(reason)

    size = 400_000
    async with server, narrow_path(server.address, rate=200_000) as address:
        async with new_client(address) as client:
            given = bytes(size) if method == "put" else size
            result = await within(client.rpc.call(method, [given]))
            assert result in (size, bytes(size))
    assert lost == []


async def test_a_reliable_broadcast_closes_who_does_not_read() -> None:
    server = new_server(limits=Limits(outbox_bytes=2_000_000))
    gone: list[int] = []

    @server.on_client_disconnect
    async def disconnected(connection: Any, reason: Any) -> None:
        gone.append(reason.code)

    counts, sent, most = [0], 0, 0
    async with server, reading(server, counts, 0), stalled(server):
        (stuck,) = (one for one in server.connections.values() if one.name == "raw")
        while not gone:
            await server.broadcast("news", NEWS, reliable=True)
            sent += 1
            most = max(most, stuck.session.outbox_bytes)
            while counts[0] < sent:  # noqa: ASYNC110  # as above
                await asyncio.sleep(0)
        assert gone == [4421]
        assert most < 2_000_000 + 2 * len(NEWS)
        assert len(server.connections) == 1
