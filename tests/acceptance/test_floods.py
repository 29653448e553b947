"""Peers that have logged in and send more than they may: closed with the right code, at a bound."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from conduit import Limits, Overloaded
from tests.acceptance import raw
from tests.acceptance.raw import RawPeer, frame, logged_in
from tests.acceptance.support import neighbourhood, new_client, new_server, until, within

FLOOD = 4420


async def flooded(peer: RawPeer, data: list[bytes]) -> tuple[int, int]:
    """Send frames as fast as they go; return the close code, and the bytes that came back."""

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), 1000):
                peer.write(b"".join(data[start : start + 1000]))
                await peer.writer.drain()

    sending = asyncio.ensure_future(send())
    before = len(peer.log)
    try:
        said = await peer.closed()
    finally:
        sending.cancel()
        await asyncio.wait([sending])
    assert said is not None, "hung up without a word"
    return said[0], sum(32 + len(got.payload) for got in peer.log[before:])


async def test_a_flood_of_pings_is_closed_and_hardly_answered() -> None:
    async with neighbourhood(new_server()) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            pings = [frame(raw.PING, number + 1) for number in range(100_000)]
            code, answered = await flooded(peer, pings)
        assert code == FLOOD
        assert answered < 64 * 1024
        assert sum(got.type == raw.PONG for got in peer.log) <= 100


async def test_a_flood_of_cancels_is_closed_and_not_answered() -> None:
    async with neighbourhood(new_server()) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            cancels = [peer.numbered(raw.CANCEL, 3 + 2 * n, ["no reason"]) for n in range(10_000)]
            code, answered = await flooded(peer, cancels)
        assert code == FLOOD
        assert answered < 64 * 1024


@pytest.mark.parametrize("heeds", [True, False], ids=["heeding", "ignoring"])
async def test_who_cancels_every_call_is_served_if_it_heeds_its_limit_and_closed_if_not(
    heeds: bool,
) -> None:
    server, running, most = new_server(limits=Limits(max_calls=16)), 0, 0

    @server.rpc
    async def wait() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.001)  # it has something to put in order
            raise
        finally:
            running -= 1

    def cancelled_call(peer: RawPeer) -> bytes:
        id = peer.take_id()
        request = peer.numbered(raw.RPC_REQUEST, id, ["wait", {}])
        return request + peer.numbered(raw.CANCEL, id, ["no reason"])

    async with neighbourhood(server) as neighbour, logged_in(neighbour.server.address) as peer:
        if heeds:
            for _ in range(16):
                peer.write(cancelled_call(peer))
            for _ in range(1000):
                assert (await peer.until(raw.RPC_ERROR)).body[0] == "call_cancelled"
                peer.write(cancelled_call(peer))
            for _ in range(16):
                await peer.until(raw.RPC_ERROR)
            assert await peer.call("add", {"a": 1, "b": 2}) == 3
        else:
            code, answered = await flooded(peer, [cancelled_call(peer) for _ in range(3_000)])
            assert code == FLOOD and answered < 64 * 1024
            refused = [got for got in peer.log if got.type == raw.RPC_ERROR]
            assert sum(got.body[0] == "overloaded" for got in refused) <= 100
        assert 0 < most <= 16
        await neighbour.check()
        await until(lambda: running == 0)


async def test_who_calls_beyond_its_limit_now_and_then_is_told_and_served() -> None:
    server, gate = new_server(limits=Limits(max_calls=80)), asyncio.Event()

    @server.rpc
    async def wait() -> None:
        await gate.wait()

    async with neighbourhood(server) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            for _ in range(80 + 160):
                peer.request("wait", {})
            for _ in range(160):
                assert (await peer.until(raw.RPC_ERROR)).body[0] == "overloaded"
            peer.request("wait", {})
            said = await peer.closed()
            assert said is not None and said[0] == FLOOD
            assert "more than 160 calls in 10 s beyond the 80" in said[1]
        gate.set()


async def test_calls_of_all_clients_together_have_a_limit_and_each_may_have_one() -> None:
    server, release = new_server(limits=Limits(max_running=5)), asyncio.Event()
    running, most = 0, 0

    @server.rpc
    async def wait() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1

    async with server, contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(new_client(server, name=f"client-{number}"))
            for number in range(4)
        ]
        calls: list[asyncio.Future[Any]] = []
        for client in clients[:2]:
            calls += [asyncio.ensure_future(client.rpc.call("wait")) for _ in range(5)]
        await until(lambda: running == 6)  # each of the two has one beyond
        for client in clients[2:]:
            calls += [asyncio.ensure_future(client.rpc.call("wait")) for _ in range(5)]
        await until(lambda: sum(call.done() for call in calls) == 20 - 8)
        assert most == 8
        refused = [call.exception() for call in calls if call.done()]
        assert all(isinstance(one, Overloaded) and "max_running" in str(one) for one in refused)
        release.set()
        await within(asyncio.gather(*calls, return_exceptions=True))
        assert running == 0
        await within(asyncio.gather(*(client.rpc.call("wait") for client in clients)))


@pytest.mark.parametrize("type", [raw.CANCEL, raw.PING])
async def test_honest_numbers_of_them_are_fine(type: int) -> None:
    async with neighbourhood(new_server()) as neighbour:
        async with logged_in(neighbour.server.address) as peer:
            for number in range(100 if type == raw.PING else 1000):
                if type == raw.PING:
                    peer.write(frame(raw.PING, number + 1))
                else:
                    peer.send(raw.CANCEL, 3, ["no reason"])
            assert await peer.call("add", {"a": 1, "b": 2}) == 3
