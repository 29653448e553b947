"""How each kind of workload is measured, in the client's process."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from .contestants.base import Contestant, Session
from .workloads import Point

WARM_UP = 0.25
"""How long calls are made before it counts, as a part of the measured time."""
TOGETHER = 16
"""Connections that are opened at the same time."""
SILENCE = 2.0
"""Seconds without a broadcast after which the missing ones count as lost."""
TIMED_CALLERS = 4
"""How many callers take the time of their calls."""
PAUSE = 0.005
"""Seconds between the calls of a rare caller, and between the looks at how late a timer is."""

Result = dict[str, float]


class WrongAnswer(Exception):
    """The server answered something else than it should."""


def percentile(ordered: list[float], per_mille: int) -> float:
    """Return what so many thousandths of some figures in order do not exceed."""
    return ordered[len(ordered) * per_mille // 1000]


def add_all_due(times: list[float], seconds: float) -> None:
    """Add how long something took that is due every `PAUSE` seconds.

    What was due meanwhile, and could not be tried, would have taken what was left then. Without it
    a long stall would count once, and many short times for more than they are.
    """
    times.append(seconds)
    while (seconds := seconds - PAUSE) > 0:
        times.append(seconds)


class Lag:
    """Looks again and again how late a timer of the running event loop fires."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._task = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        while True:
            started = time.perf_counter()
            await asyncio.sleep(PAUSE)
            add_all_due(self._late, max(0.0, time.perf_counter() - started - PAUSE))

    def end(self) -> Result:
        """Stop, and return in milliseconds how late timers were."""
        self._task.cancel()
        late = sorted(seconds * 1e3 for seconds in self._late) or [0.0]
        return {"p99": percentile(late, 990), "max": late[-1]}


class Clock:
    """Tells the callers when to stop."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        # A thread, because rpyc's blocking calls keep the event loop from running any timer.
        timer = threading.Timer(seconds, self._stop)
        timer.daemon = True
        timer.start()

    def _stop(self) -> None:
        self.over = True


def cpu_seconds() -> float:
    """Return the processor time that this process has used, all its threads included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Measure:
    """One measurement: `prepare`, then `run` once, then `finish`.

    Args:
        contestant: Who is measured.
        address: Where its server is.
        point: What is measured.
        seconds: For how long.
    """

    def __init__(self, contestant: Contestant, address: Any, point: Point, seconds: float) -> None:
        self.contestant = contestant
        self.address = address
        self.point = point
        self.seconds = seconds
        self.sessions: list[Session] = []

    async def open(self, count: int) -> None:
        """Open connections and use each of them once."""

        async def open_some(numbers: Iterable[int]) -> None:
            for _ in numbers:
                session = await self.connect()
                self.sessions.append(session)
                if self.point.kind != "echo":
                    check(await session.call(1, 2) == 3)

        shared = iter(range(count))
        await asyncio.gather(*(open_some(shared) for _ in range(min(count, TOGETHER))))

    async def connect(self) -> Session:
        return await self.contestant.connect(self.address, self.point.callers, None)

    async def prepare(self) -> None:
        """Connect, and call long enough for caches, pools and branch predictors."""
        await self.open(self.point.connections)
        if self.point.warm_up:
            await self.work(Clock(self.seconds * WARM_UP), None)

    async def run(self) -> Result:
        """Measure."""
        times: list[float] = []
        cpu, started = cpu_seconds(), time.perf_counter()
        count = await self.work(Clock(self.seconds), times)
        elapsed, used = time.perf_counter() - started, cpu_seconds() - cpu
        result = {"count": count, "rate": self.rate(count, elapsed), "client_cpu": used}
        if times:
            times.sort()
            result["p50"] = percentile(times, 500) * 1e6
            result["p99"] = percentile(times, 990) * 1e6
            result["max"] = times[-1] * 1e6
        return result

    def rate(self, count: int, elapsed: float) -> float:
        return count / elapsed

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        """Do what is measured until the clock is over; return how often it was done."""
        raise NotImplementedError

    async def finish(self) -> None:
        """Close the connections."""
        shared = iter(self.sessions)

        async def close_some() -> None:
            for session in shared:
                await session.close()

        await asyncio.gather(*(close_some() for _ in range(TOGETHER)))
        self.sessions.clear()


def check(right: bool) -> None:
    """Insist that an answer is right."""
    if not right:
        raise WrongAnswer


async def caller(call: Callable[[int, int], Awaitable[int]], number: int, clock: Clock) -> int:
    """Await one call after another."""
    done = 0
    while True:
        if await call(number, done) != number + done:
            raise WrongAnswer
        done += 1
        if clock.over:
            return done


async def timed_caller(
    call: Callable[[int, int], Awaitable[int]], number: int, clock: Clock, times: list[float]
) -> int:
    """Await one call after another and take the time of each."""
    done = 0
    now = time.perf_counter
    while True:
        started = now()
        answer = await call(number, done)
        times.append(now() - started)
        if answer != number + done:
            raise WrongAnswer
        done += 1
        if clock.over:
            return done


class Calls(Measure):
    """Small calls. The floors have a faster client than tasks, and use it."""

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        callers: list[Awaitable[int]] = []
        for session in self.sessions:
            pipeline = getattr(session, "pipeline", None)
            if pipeline is not None:
                callers.append(pipeline(self.point.callers, clock, times))
                continue
            for number in range(self.point.callers):
                # A few stand for all: they wait in the same queues.
                if times is not None and len(callers) < TIMED_CALLERS:
                    callers.append(timed_caller(session.call, number, clock, times))
                else:
                    callers.append(caller(session.call, number, clock))
        return sum(await asyncio.gather(*callers))


class Echo(Measure):
    """Values of random bytes, which nothing can compress.

    Of the answer its length and three places are looked at: comparing all of it would take as long
    as some contestants need to carry it. Values that follow each other differ everywhere.
    """

    async def prepare(self) -> None:
        self._values = [os.urandom(self.point.size) for _ in range(2)]
        await super().prepare()

    def rate(self, count: int, elapsed: float) -> float:
        return count * self.point.size / elapsed / 1e6

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        session = self.sessions[0]
        return sum(
            await asyncio.gather(*(self._caller(session, clock) for _ in range(self.point.callers)))
        )

    async def _caller(self, session: Session, clock: Clock) -> int:
        done, size = 0, self.point.size
        while True:
            value = self._values[done % 2]
            answer = await session.echo(value)
            check(len(answer) == size)
            for start in (0, size // 2, max(0, size - 64)):
                check(answer[start : start + 64] == value[start : start + 64])
            done += 1
            if clock.over:
                return done


class Stream(Measure):
    """Small items from one call, one call after another."""

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        done, count = 0, self.point.count
        while True:
            check(await self.sessions[0].stream(count) == count * (count - 1) // 2)
            done += count
            if clock.over:
                return done


class Connect(Measure):
    """Connections that live for one call, one after another."""

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        done = 0
        while True:
            if self.point.cold:
                self.contestant.forget()
            started = time.perf_counter()
            session = await self.connect()
            check(await session.call(done, 1) == done + 1)
            await session.close()
            if times is not None:
                times.append(time.perf_counter() - started)
            done += 1
            if clock.over:
                return done


class Rare(Measure):
    """One caller that makes a call now and then."""

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        done, call = 0, self.sessions[0].call
        while not clock.over:
            await asyncio.sleep(PAUSE)
            started = time.perf_counter()
            answer = await call(done, 1)
            if times is not None:
                add_all_due(times, time.perf_counter() - started)
            check(answer == done + 1)
            done += 1
        return done


class Nothing(Measure):
    """What is beside it has the server for itself."""

    async def work(self, clock: Clock, times: list[float] | None) -> int:
        await asyncio.sleep(self.seconds)
        return 0


class Idle(Measure):
    """Connections that do nothing. What they cost is seen from outside, between the two steps."""

    async def prepare(self) -> None:
        # The first ones make the server allocate what all of them share.
        await self.open(min(500, self.point.count))

    async def run(self) -> Result:
        await self.open(self.point.count)
        await asyncio.sleep(0.5)
        return {"count": self.point.count, "rate": 0.0, "client_cpu": 0.0}


class Broadcast(Measure):
    """A burst of messages from the server, counted and added up where they arrive."""

    async def prepare(self) -> None:
        self._count = self._sum = 0
        self._wanted = self.point.connections * self.point.count
        self._all = asyncio.Event()
        await self.open(self.point.connections)

    async def connect(self) -> Session:
        return await self.contestant.connect(self.address, self.point.callers, self._heard)

    def _heard(self, number: int) -> None:
        self._count += 1
        self._sum += number
        if self._count == self._wanted:
            self._last = time.monotonic()
            self._all.set()

    async def run(self) -> Result:
        point = self.point
        cpu, seen = cpu_seconds(), -1
        while not self._all.is_set() and seen != self._count:
            seen, self._last = self._count, time.monotonic()
            try:
                await asyncio.wait_for(self._all.wait(), SILENCE)
            except asyncio.TimeoutError:
                continue
        if self._count == self._wanted:
            check(self._sum == point.connections * point.count * (point.count - 1) // 2)
        return {
            "count": self._count,
            "wanted": self._wanted,
            "ended": self._last,
            "client_cpu": cpu_seconds() - cpu,
        }


KINDS: dict[str, type[Measure]] = {
    "calls": Calls,
    "echo": Echo,
    "stream": Stream,
    "connect": Connect,
    "idle": Idle,
    "broadcast": Broadcast,
    "rare": Rare,
    "nothing": Nothing,
}
