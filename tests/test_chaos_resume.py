"""Sessions over real sockets that fail again and again: all is done once, in order, and ends.

`make chaos` does more of each than a run of all tests, and tells what; `make long` does much more.
The faults of a test follow from its seed, but what they hit does not: that is the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import signal
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from conduit import TLS, Client, Connection, ConnectionLost, RPCTimeout, Server, Status
from tests.acceptance.raw import PASSWORD
from tests.acceptance.support import (
    Program,
    free_port,
    issue_certificate,
    new_client,
    new_server,
    until,
    within,
)
from tests.chaos_proxy import ChaosProxy
from tests.conftest import CHAOS, LONG, tell

SERVER = Path(__file__).parent / "chaos_server.py"
FAULTS, KILLS, STORM = (5_000, 500, 8_000) if LONG else (100, 5, 500) if CHAOS else (40, 2, 100)
"""Faults of each of two tests, over TCP and TLS; kills of each side; clients that come back."""
SEED = random.randrange(2**32) if LONG or CHAOS else 7
AT_ONCE = 16
"""Messages that wait for their acknowledgement at the same time, and callers."""
PATIENCE = 300.0
"""Seconds that a session is kept, and that messages wait: neither is what comes to an end here."""
DEADLINE = 2.0
LATE = 1.0
"""Seconds by which a call may miss its deadline."""


@pytest.fixture(autouse=True)
def little_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps what is logged, and with it the frames of each error: gigabytes in long runs."""
    caplog.set_level(logging.ERROR, "conduit")


class Ledger:
    """What was done on one side, for the other."""

    def __init__(self) -> None:
        self.ran: Counter[int] = Counter()
        self.asked: Counter[int] = Counter()
        self.notes: list[int] = []
        self.news: list[int] = []
        self.summed: list[int] = []

    def serve(self, on: Server | Client) -> None:
        """Serve every kind of call and message."""

        @on.rpc
        async def once(number: int, fill: bytes) -> int:
            self.ran[number] += 1
            await asyncio.sleep(0)
            return number

        @on.rpc
        async def count(upto: int) -> AsyncIterator[int]:
            for number in range(upto):
                yield number

        @on.rpc
        async def total(numbers: AsyncIterator[int]) -> int:
            self.summed.append(sum([number async for number in numbers]))
            return self.summed[-1]

        @on.on("note")
        async def note(connection: Connection, message: int) -> None:
            self.notes.append(message)

        @on.on("news")
        async def news(connection: Connection, message: list[Any]) -> None:
            self.news.append(message[0])

        @on.on("ask")
        async def ask(connection: Connection, message: int) -> int:
            self.asked[message] += 1
            return message


class Worker:
    """Uses a connection in every way, until it is told to stop; then checks what was done.

    Args:
        to: Who calls: a client, or the connection of a server.
        far: What was done on the other side.
    """

    def __init__(self, to: Any, far: Ledger, dice: random.Random) -> None:
        self.to = to
        self.far = far
        self.dice = dice
        self.going = True
        self.calls = self.asked = self.notes = self.news = self.streams = 0

    async def run(self) -> None:
        callers = [self._call, self._call, self._call, self._ask, self._stream, self._total]
        await asyncio.gather(*(caller() for caller in callers), self._note(), self._tell())

    def stop(self) -> None:
        self.going = False

    def _fill(self) -> bytes:
        return bytes(self.dice.choice([0, 10, 100, 3000, 60_000]))

    async def _call(self) -> None:
        while self.going:
            self.calls = number = self.calls + 1
            assert await self.to.rpc.call("once", [number, self._fill()], timeout=None) == number

    async def _ask(self) -> None:
        while self.going:
            self.asked = number = self.asked + 1
            assert await self.to.request("ask", number, timeout=None) == number

    async def _note(self) -> None:
        """Send messages whose acknowledgements are waited for, many at once."""
        waiting: deque[asyncio.Future[None]] = deque()
        while self.going or waiting:
            if self.going:
                waiting.append(asyncio.ensure_future(self.to.send("note", self.notes, ack=True)))
                self.notes += 1
            if len(waiting) == AT_ONCE or not self.going:
                await waiting.popleft()

    async def _tell(self) -> None:
        while self.going:
            await self.to.send("news", [self.news, self._fill()])
            self.news += 1

    async def _stream(self) -> None:
        while self.going:
            self.streams += 1
            run = self.to.rpc.stream("count", [300], timeout=None)
            assert [number async for number in run] == list(range(300))

    async def _total(self) -> None:
        async def numbers() -> AsyncIterator[int]:
            for number in range(300):
                yield number

        while self.going:
            async with self.to.rpc.stream("total", [numbers()], timeout=None) as run:
                assert await run.result() == sum(range(300))

    def check(self) -> None:
        """Check that all that was sent was done, once and in order."""
        assert self.far.ran == Counter(range(1, self.calls + 1))
        assert self.far.asked == Counter(range(1, self.asked + 1))
        assert self.far.notes == list(range(self.notes))
        assert self.far.news == list(range(self.news))
        assert set(self.far.summed) <= {sum(range(300))}
        assert self.streams > 0 and self.far.summed


class Weather:
    """Does one thing after the other to the links that go through a proxy."""

    def __init__(self, proxy: ChaosProxy, client: Client, timeout: float) -> None:
        self.proxy = proxy
        self.client = client
        self.timeout = timeout
        self.dice = proxy.random
        self.done: Counter[str] = Counter()

    async def faults(self, count: int) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            *[self.cut] * 8,
            *[self.cut_after] * 8,
            *[self.half_close] * 3,
            *[self.refuse] * 2,
            self.hole,
        ]
        for _ in range(count):
            self.change()
            await until_ready(self.client)
            # Not for anything to happen: a fault comes at any time.
            await asyncio.sleep(self.dice.choice([0.0, 0.001, 0.005, 0.02]))
            kind = self.dice.choice(kinds)
            self.done[kind.__name__] += 1
            await kind()
        self.proxy.heal()

    def change(self) -> None:
        """Let the links be slow, or cut what they carry into pieces, for a while."""
        for direction in (self.proxy.up, self.proxy.down):
            direction.heal()
            direction.latency = self.dice.choice([0.0, 0.0, 0.002])
            direction.jitter = self.dice.choice([0.0, 0.0, 0.002])
            direction.slice = self.dice.choice([None, None, None, 2000, 300])

    async def cut(self) -> None:
        self.proxy.cut()

    async def cut_after(self) -> None:
        """Cut at some byte, of a frame or of a login."""
        direction = self.dice.choice([self.proxy.up, self.proxy.down])
        direction.cut_after = self.dice.choice([0, 10, 500, 5000, 50_000])
        await until(lambda: direction.cut_after is None)

    async def half_close(self) -> None:
        self.proxy.half_close(self.dice.choice([self.proxy.up, self.proxy.down]))

    async def refuse(self) -> None:
        self.proxy.refuse()
        self.proxy.cut()
        await asyncio.sleep(0.01)
        await self.proxy.admit()

    async def hole(self) -> None:
        """Say nothing for longer than the heartbeat waits, in one direction or both."""
        for direction in self.dice.choice(
            [[self.proxy.up], [self.proxy.down], [self.proxy.up, self.proxy.down]]
        ):
            direction.hole = True
        await asyncio.sleep(self.timeout * 1.5)


async def until_ready(client: Client) -> None:
    while client.status is not Status.READY:  # noqa: ASYNC110  # no event tells of it
        await asyncio.sleep(0.001)


@pytest.mark.long
@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
async def test_all_is_done_once_whatever_happens_to_the_links(
    tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pauses double with each attempt, and are not to grow beyond a moment here.
    monkeypatch.setattr("conduit.attempts.LONGEST_DELAY", 0.02)
    interval, timeout = 0.1, 0.4
    certificate, authority = issue_certificate(tmp_path) if tls else (None, None)
    server = new_server(
        tls=TLS(certificate=certificate) if certificate else None,
        heartbeat_interval=interval,
        heartbeat_timeout=timeout,
        resume_ttl=PATIENCE,
        rpc_timeout=PATIENCE,
    )
    on_server, on_client = Ledger(), Ledger()
    on_server.serve(server)
    async with server, ChaosProxy(*server.address, seed=SEED) as proxy:
        client = new_client(
            proxy.address,
            tls=TLS(ca=authority) if authority else None,
            reconnect_delay=0.001,
            reconnect_attempts=0,
            connect_timeout=1.0,
            rpc_timeout=PATIENCE,
        )
        on_client.serve(client)
        async with client:
            connection = client.connection
            (far,) = server.connections.values()
            workers = [
                Worker(client, on_server, proxy.random),
                Worker(far, on_client, proxy.random),
            ]
            working = [asyncio.ensure_future(worker.run()) for worker in workers]
            weather = Weather(proxy, client, timeout)
            faults = asyncio.ensure_future(weather.faults(FAULTS))
            await asyncio.wait([faults, *working], return_when=asyncio.FIRST_COMPLETED)
            assert not any(work.done() for work in working), working
            await faults
            for worker in workers:
                worker.stop()
            await within(asyncio.gather(*working), 30)
            await within(client.rpc.call("add", [1, 2]))
            await within(far.rpc.call("once", [0, b""]))
            del on_client.ran[0]
            await until(lambda: all(len(w.far.news) == w.news for w in workers))
            for worker in workers:
                worker.check()
            assert client.connection is connection and not far.closed
    acked = sum(worker.notes for worker in workers)
    done = sum(worker.calls + worker.asked + worker.news for worker in workers)
    tell(f"seed {SEED}: {dict(weather.done)}, {acked:,} acknowledged, {done:,} others")


# Processes that are killed.


class Killed:
    """A server in a process of its own, which is killed and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.log = folder / "ran"
        self.stack = contextlib.ExitStack()
        self.program: Program

    async def start(self) -> None:
        self.program = await asyncio.to_thread(
            Program, str(SERVER), str(self.port), str(self.log), cwd=self.log.parent
        )
        self.stack.enter_context(self.program)
        await asyncio.to_thread(self.program.wait_for, "serving", 20.0)

    def kill(self) -> None:
        self.program.process.send_signal(signal.SIGKILL)

    def ran(self) -> Counter[int]:
        return Counter(map(int, self.log.read_text().split()))


@contextlib.asynccontextmanager
async def killable(folder: Path) -> AsyncIterator[Killed]:
    killed = Killed(folder)
    with killed.stack:
        await killed.start()
        yield killed


@pytest.mark.long
async def test_no_call_runs_twice_when_the_server_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conduit.attempts.LONGEST_DELAY", 0.02)
    loop = asyncio.get_running_loop()
    dice = random.Random(SEED)
    numbers = itertools.count(1)
    outcomes: dict[int, str] = {}
    latest = 0.0

    async def call(client: Client) -> None:
        nonlocal latest
        number = next(numbers)
        began = loop.time()
        try:
            pause = dice.choice([0.0, 0.001, 0.05])
            result = await client.rpc.call("once", [number, pause], timeout=DEADLINE)
        except ConnectionLost as lost:
            outcomes[number] = f"executed {lost.executed}"
        except RPCTimeout:
            outcomes[number] = "timeout"
        else:
            assert result == number
            outcomes[number] = "answered"
        latest = max(latest, loop.time() - began)

    async def keep_calling(client: Client) -> None:
        while True:
            await until_ready(client)
            await call(client)

    async with killable(tmp_path) as server, contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                new_client(("127.0.0.1", server.port), reconnect_delay=0.01, reconnect_attempts=0)
            )
            for _ in range(4)
        ]
        calling = [
            asyncio.ensure_future(keep_calling(client)) for client in clients for _ in range(8)
        ]
        for _ in range(KILLS):
            before = len(outcomes)
            await until(lambda: len(outcomes) > before + 100)  # noqa: B023  # it is awaited here
            await asyncio.sleep(dice.uniform(0.0, 0.05))
            server.kill()
            await server.start()
            for client in clients:
                await within(until_ready(client))
        before = len(outcomes)
        await until(lambda: len(outcomes) > before + 100)
        server.kill()
        for one in calling:
            one.cancel()
        ended = await within(asyncio.gather(*calling, return_exceptions=True))
        assert {type(one) for one in ended} == {asyncio.CancelledError}
    ran = server.ran()
    assert max(ran.values()) == 1
    wrong = {"answered": 0, "executed False": 1, "executed True": 0}
    for number, outcome in outcomes.items():
        assert ran[number] != wrong.get(outcome, -1), (number, outcome)
    assert latest < DEADLINE + LATE
    counted = Counter(outcomes.values())
    # Who was cut off hears so, or that time is up: a new server takes a moment to begin.
    assert counted["answered"] > 100 * KILLS and counted["executed None"] + counted["timeout"] > 0
    tell(f"seed {SEED}: {KILLS} kills, {dict(counted)}, the longest call {latest:.3f} s")


CALLER = """
import asyncio, sys
from conduit import Client, Limits
async def main():
    async with Client(server_port=int(sys.argv[1]), server_host="127.0.0.1",
                      password=sys.argv[2], limits=Limits(min_iterations=4096)) as client:
        first = int(sys.argv[3])
        async def call(start):
            for number in range(start, start + 10_000):
                await client.rpc.call("once", [number], timeout=None)
        await asyncio.gather(*(call(first + 10_000 * one) for one in range(8)))
asyncio.run(main())
"""


@pytest.mark.long
async def test_what_a_killed_client_left_running_ends_and_ran_once(tmp_path: Path) -> None:
    server = new_server(resume_ttl=0.1)
    ran: Counter[int] = Counter()
    dice = random.Random(SEED)

    @server.rpc
    async def once(number: int) -> int:
        ran[number] += 1
        await asyncio.sleep(0.001 if number % 8 else 0.05)
        return number

    async with server:
        for kill in range(KILLS):
            before = len(ran)
            arguments = ("-c", CALLER, str(server.address[1]), PASSWORD, str(kill * 1_000_000))
            with await asyncio.to_thread(Program, *arguments, cwd=tmp_path) as program:
                await until(lambda: len(ran) > before + 100)  # noqa: B023  # awaited here
                (connection,) = server.connections.values()
                await asyncio.sleep(dice.uniform(0.0, 0.02))
                program.process.kill()
                await until(lambda: not server.connections)
            assert not connection.running
    assert max(ran.values()) == 1


@pytest.mark.long
async def test_all_clients_come_back_at_once(tmp_path: Path) -> None:
    """The server was killed, and serves again: everybody is in within ten seconds."""
    async with killable(tmp_path) as server:
        clients = [
            new_client(("127.0.0.1", server.port), reconnect_delay=0.25, reconnect_attempts=0)
            for _ in range(STORM)
        ]
        for some in range(0, STORM, 100):
            await within(asyncio.gather(*(one.connect() for one in clients[some : some + 100])))
        server.kill()
        await until(lambda: all(one.status is Status.RECONNECTING for one in clients))
        await server.start()
        started = time.monotonic()
        await asyncio.wait_for(asyncio.gather(*map(until_ready, clients)), 10)
        took = time.monotonic() - started
        results = await within(
            asyncio.gather(*(one.rpc.call("once", [n]) for n, one in enumerate(clients)))
        )
        assert results == list(range(STORM))
        for some in range(0, STORM, 100):
            await asyncio.gather(*(one.disconnect() for one in clients[some : some + 100]))
    tell(f"{STORM:,} clients were in {took:.1f} s after the server was up")
