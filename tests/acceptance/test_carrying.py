"""Servers that go away or are killed, and links that break, while hooks set up what comes next."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter

import pytest

from conduit import Client, Connection, ConnectionClosed, RPCError, Server, Status
from tests.acceptance.raw import Relay
from tests.acceptance.support import new_client, new_server, until, within
from tests.conftest import LONG

SEEDS = 200 if LONG else 4
EVENTS = 12


class Fleet:
    """Servers behind one address, one after another, and a client that never stops.

    Attributes:
        noted: Sender, number and server of each message, in the order in which they came.
        ran: How often each call ran.
        sent: How many messages each sender has sent, those that raised an error not counted.
    """

    def __init__(self, seed: int, relay: Relay) -> None:
        self.random = random.Random(seed)
        self.relay = relay
        self.noted: list[tuple[str, int, str]] = []
        self.ran: Counter[int] = Counter()
        self.sent: dict[str, set[int]] = {}
        self.over = False
        self.numbers = itertools.count()
        self.server = self.next_server()
        self.stops: list[asyncio.Task[None]] = []
        self.client = client = new_client(relay.address, connect_timeout=20, reconnect_attempts=0)
        client.on_reconnect(self.prepare)
        client.rpc("answer")(self.answer)

    def next_server(self) -> Server:
        server = new_server(name=f"server {next(self.numbers)}")

        @server.on("note")
        async def note(connection: Connection, message: tuple[str, int]) -> None:
            self.noted.append((*message, server.name))

        @server.rpc
        async def join(number: int) -> int:
            await asyncio.sleep(self.random.choice((0, 0, 0.005)))
            return number

        @server.rpc
        async def ask(connection: Connection) -> int:
            answer: int = await connection.rpc.call("answer")
            return answer

        @server.rpc
        async def say(number: int) -> int:
            self.ran[number] += 1
            return number

        return server

    async def answer(self) -> int:
        """Handle a call of the server, for which the server is needed in turn."""
        number: int = await self.client.rpc.call("join", [0])
        return number

    async def prepare(self, client: Client) -> None:
        await asyncio.sleep(self.random.choice((0, 0, 0.01, 0.03)))
        try:
            await asyncio.gather(*(client.rpc.call("join", [number]) for number in range(3)))
            await client.rpc.call("ask")
        except (ConnectionClosed, RPCError):
            pass  # it is gone already, and the next one is prepared as well

    async def send(self, name: str) -> None:
        number, self.sent[name] = 0, set()
        while not self.over:
            try:
                await self.client.send("note", (name, number))
                self.sent[name].add(number)
            except ConnectionClosed:  # as it says where there is no connection
                await asyncio.sleep(0.002)
            number += 1
            if number % 40 == 0:
                await asyncio.sleep(0.001)

    async def call(self, first: int) -> None:
        number = first
        while not self.over:
            number += 1
            try:
                assert await self.client.rpc.call("say", [number], timeout=15) == number
            except ConnectionClosed:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.001)

    async def replace(self, grace: float) -> None:
        """Let another server take the place of the one that runs, which goes away or is killed."""
        old, self.server = self.server, self.next_server()
        await self.server.start()
        self.relay.target = self.server.address
        if not grace:
            self.relay.cut()
        self.stops.append(asyncio.ensure_future(old.stop(grace)))

    async def cut(self) -> None:
        """Break the links, and wait until the client knows."""
        self.relay.cut()
        await until(lambda: self.client.status is not Status.READY)

    def is_linked(self) -> bool:
        return self.client.status is Status.READY and not self.client.connection.away

    async def settled(self) -> None:
        """Wait until the client uses the server that runs, and no other any more."""

        def uses_it_alone() -> bool:
            client = self.client
            return self.is_linked() and client.server_name == self.server.name and not client._left

        await until(uses_it_alone)

    async def happen(self, *, kills: bool) -> None:
        """Let something happen; without kills so that nothing may be lost."""
        await asyncio.sleep(self.random.choice((0, 0.005, 0.02, 0.05)))
        what = self.random.choice(("goes", "goes", "cut", *(("killed",) if kills else ())))
        if what == "cut":
            if not kills:  # what a server that goes away still serves would be lost with its link
                await self.settled()
            await self.cut()
        else:
            if not kills:  # and so would the session of who is away while its server goes
                await until(self.is_linked)
            await self.replace(grace=5 if what == "goes" else 0)

    async def end(self) -> None:
        await within(asyncio.gather(*self.stops), 20)
        await self.server.stop()


@pytest.mark.parametrize("kills", [False, True], ids=["gone", "killed"])
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_work_goes_on_over_servers_and_links(seed: int, *, kills: bool) -> None:
    async with Relay(("", 0)) as relay:
        fleet = Fleet(seed, relay)
        await fleet.server.start()
        relay.target = fleet.server.address
        try:
            async with fleet.client as client:
                work = [*map(fleet.send, "ab"), fleet.call(0)]
                running = [asyncio.ensure_future(one) for one in work]
                for _ in range(EVENTS):
                    await fleet.happen(kills=kills)
                fleet.over = True
                await within(asyncio.gather(*running), 20)
                await fleet.settled()
                await within(client.rpc.call("say", [0]))
                await within(client.send("note", ("end", 0), ack=True))
        finally:
            await fleet.end()
    assert max(fleet.ran.values()) == 1
    for name, sent in fleet.sent.items():
        numbers = [number for sender, number, _ in fleet.noted if sender == name]
        assert len(numbers) == len(set(numbers))
        if not kills:
            assert set(numbers) == sent
        for server in {at for _, _, at in fleet.noted}:
            there = [number for sender, number, at in fleet.noted if (sender, at) == (name, server)]
            assert there == sorted(there)
