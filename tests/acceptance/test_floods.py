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


async def test_who_cancels_every_call_is_served_and_runs_no_more_than_it_may() -> None:
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

    count = 3_000
    async with neighbourhood(server) as neighbour, logged_in(neighbour.server.address) as peer:
        data: list[bytes] = []
        for _ in range(count):
            id = peer.take_id()
            data.append(peer.numbered(raw.RPC_REQUEST, id, ["wait", {}]))
            data.append(peer.numbered(raw.CANCEL, id, ["no reason"]))

        async def send() -> None:
            for start in range(0, len(data), 100):
                peer.write(b"".join(data[start : start + 100]))
                await peer.writer.drain()

        sending = asyncio.ensure_future(send())
        for _ in range(count):
            answer = await peer.until(raw.RPC_ERROR)
            assert answer.body[0] in ("call_cancelled", "overloaded")
        await sending
        assert most <= 16
        assert await peer.call("add", {"a": 1, "b": 2}) == 3
        await neighbour.check()
    assert running == 0


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
