"""`SocketLink` between a connection and a bare socket, which does what a peer should not do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest

from conduit.exceptions import ConnectionClosed
from conduit.protocol.frames import CloseCode, FrameType
from conduit.transport import link
from conduit.transport.link import SocketLink
from conduit.transport.loop import Shared
from tests.transport.pair import Side, SocketPair, cut, frame_type, settings, turns, until, within


@contextlib.asynccontextmanager
async def bare_peer() -> AsyncIterator[tuple[Side, socket.socket]]:
    """Give an accepting side, which waits for a login, and the socket at the other end."""
    loop = asyncio.get_running_loop()
    side = Side(settings(), accepting=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        peer = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    peer.setblocking(False)
    accepted.setblocking(False)
    side.transport, side.link = await loop.create_connection(
        lambda: SocketLink(Shared.of(loop), side.given), sock=accepted
    )
    with peer:
        yield side, peer
        peer.close()
        await within(side.connection.wait_closed())
    side.ready.cancel()
    if side.ready.done() and not side.ready.cancelled():
        side.ready.exception()


async def received(peer: socket.socket) -> bytes:
    """Read until the other side ends."""
    loop, data = asyncio.get_running_loop(), b""
    while chunk := await within(loop.sock_recv(peer, 65536)):
        data += chunk
    return data


async def test_to_close_ends_the_outgoing_side_and_waits_for_the_peer() -> None:
    async with bare_peer() as (side, peer):
        closing = asyncio.ensure_future(side.connection.close(4403, "enough"))
        (frame,), rest = cut(await received(peer))
        assert frame_type(frame) == FrameType.CLOSE and b"enough" in frame and not rest
        await turns()
        assert not closing.done()
        peer.close()
        await within(closing)


async def test_a_peer_that_does_not_end_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert link.LINGER == 1.0
    monkeypatch.setattr(link, "LINGER", 0.03)
    async with bare_peer() as (side, peer):
        started = asyncio.get_running_loop().time()
        await within(side.connection.close())
        assert 0.02 < asyncio.get_running_loop().time() - started < 1
        await received(peer)


async def test_a_peer_that_goes_on_sending_can_still_read_why() -> None:
    async with bare_peer() as (side, peer):
        loop = asyncio.get_running_loop()
        for _ in range(4):
            with contextlib.suppress(BlockingIOError):
                peer.send(bytes(16_384))  # no login: the connection is refused while it comes in
        await until(lambda: side.connection.closed)
        with contextlib.suppress(BlockingIOError):
            peer.send(bytes(16_384))
        assert await received(peer) == b"", "what is not conduit gets no answer, nor a reset"
        del loop


async def test_a_peer_that_has_reset_the_connection_is_no_trouble() -> None:
    async with bare_peer() as (side, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        side.connection.fail(ConnectionClosed("x"), CloseCode.GOING_AWAY, "at the same time")
        await within(side.connection.wait_closed())
        side.connection.flush()


async def test_a_reset_is_the_reason() -> None:
    async with bare_peer() as (side, peer):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        await within(side.connection.wait_closed())
        reason = side.connection.reason
        assert reason is not None and reason.code == CloseCode.ABNORMAL
        assert isinstance(reason.__cause__, ConnectionResetError)


async def test_an_end_of_file_is_the_reason() -> None:
    async with bare_peer() as (side, peer):
        peer.shutdown(socket.SHUT_WR)
        assert await received(peer) == b""
        await within(side.connection.wait_closed())
        assert "went away without closing" in str(side.connection.reason)


async def test_to_abort_forgets_what_is_unsent() -> None:
    async with SocketPair() as pair:
        pair.server.transport.pause_reading()
        sends = [
            asyncio.ensure_future(pair.client.connection.send("news", bytes(100_000)))
            for _ in range(50)
        ]
        await until(lambda: pair.client.link.unsent() > 0)
        await turns()
        pair.client.link.abort()
        await within(pair.client.connection.wait_closed())
        assert pair.client.link.unsent() == 0
        results = await within(asyncio.gather(*sends, return_exceptions=True))
        assert any(isinstance(result, ConnectionClosed) for result in results)
        pair.client.link.write(b"to nobody")
        pair.client.link.finish()
        pair.server.transport.resume_reading()
        await within(pair.server.connection.wait_closed())


async def test_a_full_buffer_pauses_and_an_empty_one_lets_go_on() -> None:
    async with SocketPair() as pair:
        pair.server.transport.pause_reading()
        waiting = None
        for _ in range(1000):
            send = asyncio.ensure_future(pair.client.connection.send("news", bytes(20_000)))
            await turns(3)
            if not send.done():
                waiting = send
                break
        assert waiting is not None and pair.client.link.unsent() > link.WRITE_BUFFER
        pair.server.transport.resume_reading()
        await within(waiting)


async def test_what_was_written_before_the_end_arrives_though_the_peer_is_slow() -> None:
    async with SocketPair() as pair:
        pair.server.transport.pause_reading()
        send = pair.client.connection.send
        sends = [asyncio.ensure_future(send("news", bytes(50_000))) for _ in range(20)]
        await turns()
        written = sum(one.done() for one in sends)  # the others wait for room
        assert pair.client.link.unsent() > 0
        closing = asyncio.ensure_future(pair.client.connection.close(4403, "that was all"))
        await turns()
        pair.server.transport.resume_reading()
        await within(closing)
        await within(pair.server.connection.wait_closed())
        reason = pair.server.connection.reason
        assert reason is not None and reason.reason == "that was all"
        assert pair.server.connection.protocol.session.received == written > 0
        results = await asyncio.gather(*sends, return_exceptions=True)
        assert [type(one) for one in results[written:]] == [ConnectionClosed] * (20 - written)
