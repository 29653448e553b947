"""The clients of the soak: `python tests/soak_clients.py PLAIN SECURED AUTHORITY SECONDS SEED`.

Round after round, lasting clients use the server in every way over links that fail, and visitors
come and go in every way. Then all of it rests, and what both processes hold is printed as a line of
JSON. What they hold at rest is known beforehand, but for the memory: each round waits until there
is no more, and says what there is if that takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conduit.attempts
from conduit import TLS, Client, Limits, Retry, Status
from tests.acceptance.raw import AUTH_REQUEST, PASSWORD, LoginRefused, dial, frame, logged_in
from tests.chaos_proxy import ChaosProxy
from tests.figures import figures, listen_to_complaints, run
from tests.soak_operations import OPERATIONS, TOLERATED, call, numbers, stream, talk, wait_long
from tests.soak_server import HEARTBEAT, KEPT, RESUME_TTL

LASTING = 2
"""Clients that stay, at each of the two servers."""
HANDS = 4
"""Things that each of them does at the same time."""
LOAD = 1.5
"""Seconds of a round in which something is done."""
VISITORS, RAW_VISITORS = 4, 16
"""Of each kind, in a round. The latter cost little, so there are more of them."""
LOOKS = 20
"""How often it is looked, half a second apart or more, whether all has come to rest."""
TASKS_OF_PROXY = 5
"""For each connection that passes it."""
DESCRIPTORS_OF_PROXY = 2


# Who comes and goes.


def new_client(url: str, **fields: Any) -> Client:
    """Return a client, which the server may call and send news."""
    fields = {"password": PASSWORD, "reconnect_delay": 0.01, "reconnect_attempts": 0, **fields}
    client = Client(
        url,
        connect_timeout=2.0,
        enable_compression=True,
        limits=Limits(min_iterations=4096),
        **fields,
    )

    @client.rpc
    async def double(number: int) -> int:
        return 2 * number

    @client.on("news")
    async def news(message: bytes) -> None:
        await asyncio.sleep(0)

    return client


class Site:
    """One of the two servers, and the way to it.

    Args:
        port: Where it is.
        proxy: Goes there.
        tls: What its clients need.
    """

    def __init__(self, port: int, proxy: ChaosProxy, tls: TLS | None) -> None:
        self.address = ("127.0.0.1", port)
        self.proxy = proxy
        self.tls = tls

    def new_client(self, **fields: Any) -> Client:
        """Return a client that comes over the proxy."""
        scheme = "tls" if self.tls else "tcp"
        return new_client(f"{scheme}://127.0.0.1:{self.proxy.port}", tls=self.tls, **fields)


async def stay_a_while(site: Site, dice: random.Random) -> None:
    async with site.new_client() as client:
        for operation in dice.sample(OPERATIONS, 3):
            await operation(client, dice)


async def leave_at_once(site: Site, dice: random.Random) -> None:
    """Disconnect, or change one's mind, while something is going on."""
    client = site.new_client()
    coming = asyncio.ensure_future(client.connect())
    try:
        if dice.random() < 0.5:
            await asyncio.sleep(dice.choice([0.0, 0.002, 0.01]))
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await coming
            return
        await coming
        doing = [
            asyncio.ensure_future(one(client, dice)) for one in (wait_long, call, stream, talk)
        ]
        await asyncio.sleep(dice.choice([0.0, 0.01]))
        await client.disconnect()
        ended = await asyncio.gather(*doing, return_exceptions=True)
        for outcome in ended:
            if outcome is not None and not isinstance(outcome, TOLERATED):
                raise outcome
    finally:
        await client.disconnect()


async def do_not_come_back(site: Site, dice: random.Random) -> None:
    """Lose the link, and with it the session; the server keeps it for a while."""
    async with site.new_client(reconnect_enabled=False) as client:
        waiting = asyncio.ensure_future(wait_long(client, dice))
        with contextlib.suppress(*TOLERATED):
            await call(client, dice)
        site.proxy.cut()
        with contextlib.suppress(*TOLERATED):
            await waiting


async def vanish(site: Site, dice: random.Random) -> None:
    """Leave without a word in the middle of a call, by a reset or an end of the link."""
    async with logged_in(site.address) as peer:
        peer.request("wait", [10.0])
        peer.request("count", [100_000])
        await peer.receive()
        if dice.random() < 0.5:
            peer.abort()


async def be_nobody(site: Site, dice: random.Random) -> None:
    """Fail to log in: a wrong password, an end in the middle, something else than CNDT."""
    kind = dice.randrange(5)
    async with dial(site.address) as peer:
        if kind == 0:
            with contextlib.suppress(LoginRefused):
                await peer.login("wrong")
        elif kind == 1:
            peer.write(b"GET / HTTP/1.1\r\n\r\n")
            await peer.rest()
        elif kind == 2:
            peer.write(frame(AUTH_REQUEST, 1, b"\xc1"))
            await peer.rest()
        elif kind == 3:
            peer.write(frame(AUTH_REQUEST, 1, b"", length=100))
            peer.abort()


async def mistake_the_password(site: Site, dice: random.Random) -> None:
    await site.new_client(password="not the right one").connect()


VISITS = [stay_a_while, leave_at_once, do_not_come_back, mistake_the_password]
RAW_VISITS = [vanish, be_nobody]
"""Those that go past the proxy, to the server without TLS."""


# What happens to the links.


class Weather:
    """Does one thing after the other to the links that go to a server."""

    def __init__(self, site: Site, dice: random.Random) -> None:
        self.site = site
        self.proxy = site.proxy
        self.dice = dice
        self.done: Counter[str] = Counter()

    async def rage(self, ends: float) -> None:
        """Go on until that time on the loop's clock, or until what was begun then is over."""
        kinds = [*[self.cut, self.cut_after] * 4, self.half_close, self.refuse, self.hole]
        if self.site.tls:
            kinds += [self.corrupt] * 3
        while asyncio.get_running_loop().time() < ends:
            self.change()
            await asyncio.sleep(self.dice.uniform(0.02, 0.2))
            kind = self.dice.choice(kinds)
            self.done[kind.__name__] += 1
            await kind()
        self.proxy.heal()

    def change(self) -> None:
        for direction in (self.proxy.up, self.proxy.down):
            direction.heal()
            direction.latency = self.dice.choice([0.0, 0.0, 0.002])
            direction.jitter = self.dice.choice([0.0, 0.0, 0.002])
            direction.slice = self.dice.choice([None, None, 5000, 500])

    def either(self) -> Any:
        return self.dice.choice([self.proxy.up, self.proxy.down])

    async def cut(self) -> None:
        self.proxy.cut()

    async def cut_after(self) -> None:
        self.either().cut_after = self.dice.choice([0, 10, 500, 5000])
        await asyncio.sleep(0.05)

    async def corrupt(self) -> None:
        self.either().corrupt_after = self.dice.choice([0, 10, 500, 5000])
        await asyncio.sleep(0.05)

    async def half_close(self) -> None:
        self.proxy.half_close(self.either())

    async def refuse(self) -> None:
        """Let nobody come back, now and then until their sessions have ended."""
        self.proxy.refuse()
        self.proxy.cut()
        await asyncio.sleep(self.dice.choice([0.01, RESUME_TTL * 1.3]))
        await self.proxy.admit()

    async def hole(self) -> None:
        self.either().hole = True
        await asyncio.sleep(HEARTBEAT[1] * 1.3)


# The rounds.


class Soak:
    """Runs the rounds.

    Args:
        sites: The servers.
        control: A client that goes to the first of them without a proxy.
        dice: Decides all that is left to chance.

    Attributes:
        rounds: How many are over.
    """

    def __init__(self, sites: list[Site], control: Client, dice: random.Random) -> None:
        self.sites = sites
        self.control = control
        self.dice = dice
        self.rounds = 0
        self._weather = [Weather(site, dice) for site in sites]
        self._lasting: list[Client] = []
        self._outcomes: Counter[str] = Counter()
        self._visits: Counter[bool] = Counter()
        self._at_first: dict[str, dict[str, Any]] = {}
        self._complaints = listen_to_complaints()

    async def start(self) -> None:
        """Note what there is before there is anything, and let the lasting clients in."""
        self._at_first = await self._held()
        await self._tell()
        for site in self.sites:
            self._lasting += [site.new_client() for _ in range(LASTING)]
        for client in self._lasting:
            await client.connect()

    async def round(self) -> None:
        """Work for a while in bad weather, come to rest, and tell what there is then."""
        ends = asyncio.get_running_loop().time() + LOAD
        working = [weather.rage(ends) for weather in self._weather]
        working += [self._work(client, ends) for client in self._lasting for _ in range(HANDS)]
        working += [
            self._visit(kind, site)
            for site in self.sites
            for kind in VISITS
            for _ in range(VISITORS)
        ]
        working += [
            self._visit(kind, self.sites[0]) for kind in RAW_VISITS for _ in range(RAW_VISITORS)
        ]
        await asyncio.gather(*working)
        self.rounds += 1
        await self._tell()

    async def end(self) -> None:
        """Let the lasting clients leave, and tell what is left, and what was done."""
        for client in self._lasting:
            await client.disconnect()
        self._lasting.clear()
        weather = sum((weather.done for weather in self._weather), Counter[str]())
        await self._tell(faults=weather, outcomes=self._outcomes)

    async def _attempt(self, doing: Awaitable[None]) -> None:
        try:
            await doing
        except TOLERATED as error:
            self._outcomes[type(error).__name__] += 1
        else:
            self._outcomes["done"] += 1

    async def _work(self, client: Client, ends: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < ends:
            operation = self.dice.choice(OPERATIONS)
            await self._attempt(operation(client, self.dice))
            await asyncio.sleep(self.dice.uniform(0.0, 0.02))

    async def _visit(self, kind: Any, site: Site) -> None:
        await asyncio.sleep(self.dice.uniform(0.0, LOAD))
        self._visits[kind in RAW_VISITS] += 1
        await self._attempt(kind(site, self.dice))

    async def _tell(self, **more: Any) -> None:
        """Print what there is at rest, and what there should be."""
        operations = sum(self._outcomes.values())
        connections = sum(site.proxy.accepted for site in self.sites) + self._visits[True]
        told = {
            "time": asyncio.get_running_loop().time(),
            "operations": operations,
            "connections": connections,
            "wanted": self._wanted(),
            **await self._rest(),
            **more,
        }
        print(json.dumps(told), flush=True)  # noqa: T201  # for the test

    async def _rest(self) -> dict[str, dict[str, Any]]:
        """Wait until there is no more than there should be, or for long enough."""
        await self._are_ready()
        # Whatever a connection makes when it is first needed is there from now on.
        for operation in OPERATIONS:
            doing = (self._attempt(operation(client, self.dice)) for client in self._lasting)
            await asyncio.gather(*doing)
        for _ in range(LOOKS):
            await asyncio.sleep(max(KEPT, RESUME_TTL))
            await self._are_ready()
            found = await self._held()
            wanted = self._wanted().items()
            if all(found[side].items() >= held.items() for side, held in wanted):
                break
        return found

    async def _are_ready(self) -> None:
        """Wait until all lasting clients are connected."""
        for client in self._lasting:
            while client.status is not Status.READY:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)

    async def _held(self) -> dict[str, dict[str, Any]]:
        """Return what both processes hold now.

        The calls before see to it that what is kept for the next call is there each time. They are
        made again where a busy machine lets a heartbeat be late.
        """
        ask, again = self.control.rpc.call, Retry(idempotent=True)
        await ask("charge", [1], key=f"of {next(numbers)}", retry=again)
        await ask("ask_back", [1], retry=again)
        server = await ask("held", retry=again)
        client = {
            **await figures(),
            "errors": self._complaints.errors,
            "came": self._visits[False],
        }
        return {"server": server, "client": client}

    def _wanted(self) -> dict[str, dict[str, int]]:
        """Return what there should be at rest: what there was, and the lasting clients."""
        count = len(self._lasting)
        server, client = self._at_first["server"], self._at_first["client"]
        return {
            "server": {
                "sessions": server["sessions"] + count,
                "answers": server["answers"],
                "tasks": server["tasks"],
                "descriptors": server["descriptors"] + count,
            },
            "client": {
                "tasks": client["tasks"] + TASKS_OF_PROXY * count,
                "descriptors": client["descriptors"] + (1 + DESCRIPTORS_OF_PROXY) * count,
            },
        }


async def main(plain: int, secured: int, authority: str, seconds: float, seed: int) -> None:
    # Pauses double with each attempt, and are not to grow beyond a moment here.
    conduit.attempts.LONGEST_DELAY = 0.05
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    async with (
        ChaosProxy("127.0.0.1", plain, seed=seed) as first,
        ChaosProxy("127.0.0.1", secured, seed=seed + 1) as second,
        new_client(f"tcp://127.0.0.1:{plain}") as control,
    ):
        sites = [Site(plain, first, None), Site(secured, second, TLS(ca=authority))]
        soak = Soak(sites, control, random.Random(seed))
        await soak.start()
        while loop.time() < ends or not soak.rounds:
            await soak.round()
        await soak.end()


if __name__ == "__main__":
    ports, (authority, seconds, seed) = sys.argv[1:3], sys.argv[3:]
    run(main(int(ports[0]), int(ports[1]), authority, float(seconds), int(seed)))
