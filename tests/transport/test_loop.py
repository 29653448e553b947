"""What the connections of one event loop share: timers, buffers, and the state itself."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from conduit.transport.loop import Shared, Sweep


class Timer:
    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when = when
        self.run = lambda: callback(*args)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clockwork:
    """The part of an event loop that has to do with time, which passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.turns = 0
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(when, callback, args)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        return self.call_at(self.now + delay, callback, *args)

    def armed(self) -> list[float]:
        """Return how long it is to each timer."""
        return sorted(when - self.now for when, _, timer in self._timers if not timer.cancelled)

    def advance(self, seconds: float, *, late: float = 0.0) -> None:
        """Let time pass; with `late` every timer runs so much after its time, as in a stall."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] + late <= end:
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, when + late)
                self.turns += 1
                timer.run()
        self.now = end


class Member:
    """A connection as `Shared` sees it."""

    def __init__(self, interval: float = 20.0) -> None:
        self.interval = interval
        self.beats: list[tuple[float, bool]] = []
        self.acknowledged = 0

    def beat(self, now: float, *, judge: bool) -> None:
        self.beats.append((now - 100, judge))

    def acknowledge(self) -> None:
        self.acknowledged += 1


def shared_of(loop: Clockwork) -> Shared:
    return Shared(loop)  # type: ignore[arg-type]


def test_one_timer_watches_all_connections() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    members = [Member() for _ in range(100)]
    for member in members:
        shared.join(member)
    assert loop.armed() == [5.0], "a quarter of the interval"
    loop.advance(12)
    assert all(member.beats == [(5.0, True), (10.0, True)] for member in members)


def test_the_shortest_interval_sets_the_pace() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    slow, quick = Member(20.0), Member(4.0)
    shared.join(slow)
    loop.advance(1)
    shared.join(quick)
    assert loop.armed() == [1.0]
    loop.advance(1)
    shared.join(Member(8.0))
    assert loop.armed() == [1.0]
    assert slow.beats == quick.beats == [(2.0, True)]


def test_after_a_stall_nobody_is_judged() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    member = Member()
    shared.join(member)
    loop.advance(6, late=0.9)
    loop.advance(10, late=3)
    loop.advance(6)
    assert [judge for _, judge in member.beats] == [True, False, True]


class Counted(Member):
    """A connection that knows how many others were looked after in the same turn."""

    at_once: ClassVar[Counter[int]] = Counter()

    def __init__(self, loop: Clockwork) -> None:
        super().__init__()
        self.loop = loop

    def beat(self, now: float, *, judge: bool) -> None:
        super().beat(now, judge=judge)
        self.at_once[self.loop.turns] += 1

    def pauses(self) -> list[float]:
        """Return the time between one look and the next."""
        times = [when for when, _ in self.beats]
        return [round(later - earlier, 6) for earlier, later in itertools.pairwise(times)]


def joined(loop: Clockwork, shared: Shared, count: int) -> list[Counted]:
    Counted.at_once.clear()
    members = [Counted(loop) for _ in range(count)]
    for member in members:
        shared.join(member)
    return members


def test_thousands_are_looked_after_some_at_a_time_over_the_whole_period() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    members = joined(loop, shared, 2345)
    loop.advance(21)
    assert max(Counted.at_once.values()) <= 100
    assert {len(member.beats) for member in members} == {3, 4}
    assert {pause for member in members for pause in member.pauses()} == {5.0}
    assert all(judge for member in members for _, judge in member.beats)
    for member in members:
        shared.leave(member)
    assert loop.armed() == []


def test_a_loop_that_is_busy_looks_after_thousands_no_later() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    members = joined(loop, shared, 10_000)
    loop.advance(30, late=0.2)
    assert max(pause for member in members for pause in member.pauses()) < 5.5


def test_one_who_leaves_or_comes_changes_nothing_for_thousands() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    members = joined(loop, shared, 2345)
    loop.advance(12)
    for member in members[:45]:
        shared.leave(member)
    for member in [Counted(loop) for _ in range(45)]:
        shared.join(member)
    loop.advance(10)
    stayed = [pause for member in members[45:] for pause in member.pauses()]
    assert 4.5 < min(stayed) and max(stayed) == 5.0
    assert all(len(member.beats) <= 2 for member in members[:45])


def test_a_shorter_interval_does_not_wait_for_thousands() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    joined(loop, shared, 2345)
    loop.advance(6)
    quick = Member(2.0)
    shared.join(quick)
    loop.advance(1.1)
    assert len(quick.beats) == 1


def test_after_a_stall_none_of_thousands_is_judged() -> None:
    """All of them are looked after at once then, as those who are late."""
    loop = Clockwork()
    shared = shared_of(loop)
    members = joined(loop, shared, 2345)
    loop.advance(9.99)
    loop.now += 8  # a stall
    loop.advance(9.9)
    assert all([judge for _, judge in member.beats] == [True, False, True] for member in members)


def test_with_the_last_connection_the_timer_goes() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    first, second = Member(), Member()
    shared.join(first)
    shared.join(second)
    shared.join(second)
    shared.leave(first)
    assert len(loop.armed()) == 1
    shared.leave(second)
    assert loop.armed() == []
    shared.leave(second)
    shared.join(first)
    assert len(loop.armed()) == 1
    shared.leave(first)


def test_one_who_leaves_during_a_beat_disturbs_nobody() -> None:
    loop = Clockwork()
    shared = shared_of(loop)

    class Leaving(Member):
        def beat(self, now: float, *, judge: bool) -> None:
            super().beat(now, judge=judge)
            for member in members:
                shared.leave(member)

    members = [Leaving() for _ in range(3)]
    for member in members:
        shared.join(member)
    loop.advance(30)
    assert loop.armed() == []
    assert sum(len(member.beats) for member in members) <= 3


def test_acknowledgements_are_gathered_for_a_fifth_of_a_second() -> None:
    loop = Clockwork()
    shared = shared_of(loop)
    first, second = Member(), Member()
    shared.acknowledge_later(first)
    loop.advance(0.1)
    shared.acknowledge_later(second)
    assert len(loop.armed()) == 1
    loop.advance(0.11)
    assert (first.acknowledged, second.acknowledged) == (1, 1)
    assert loop.armed() == []
    shared.acknowledge_later(first)
    loop.advance(0.2)
    assert (first.acknowledged, second.acknowledged) == (2, 1)


def test_a_large_buffer_is_used_again() -> None:
    shared = shared_of(Clockwork())
    member = Member()
    shared.join(member)
    buffer = shared.allocate(200_000)
    assert len(buffer) >= 200_000
    shared.recycle(buffer)
    assert shared.allocate(150_000) is buffer
    assert shared.allocate(150_000) is not buffer, "it is in use"
    shared.recycle(buffer)
    assert shared.allocate(300_000) is not buffer, "it is too small"
    shared.leave(member)


def test_a_huge_buffer_is_not_kept_nor_is_one_that_nobody_needs() -> None:
    shared = shared_of(Clockwork())
    member = Member()
    shared.join(member)
    huge, large = shared.allocate(5 * 1024 * 1024), shared.allocate(200_000)
    shared.recycle(huge)
    assert shared.allocate(1000) is not huge
    shared.leave(member)
    shared.recycle(large)
    shared.join(member)
    assert shared.allocate(1000) is not large


async def test_a_loop_has_one_state_and_another_loop_another() -> None:
    loop = asyncio.get_running_loop()
    shared = Shared.of(loop)
    assert Shared.of(loop) is shared
    other = asyncio.new_event_loop()
    try:
        theirs = Shared.of(other)
        assert theirs is not shared and Shared.of(other) is theirs
        assert theirs.slab is not shared.slab
    finally:
        other.close()
    assert Shared.of(loop) is shared


# Sweep


class Deadlines:
    """What a `Sweep` watches."""

    def __init__(self, *deadlines: float) -> None:
        self.left = sorted(deadlines)
        self.ended: list[tuple[float, float]] = []

    def expire(self, now: float) -> float:
        while self.left and self.left[0] <= now:
            self.ended.append((now, self.left.pop(0)))
        return self.left[0] if self.left else math.inf


@pytest.mark.parametrize("order", list(itertools.permutations([101.0, 102.0, 103.0])))
def test_one_timer_for_many_deadlines(order: tuple[float, ...]) -> None:
    loop = Clockwork()
    watched = Deadlines(*order)
    sweep = Sweep(loop, watched)  # type: ignore[arg-type]
    for deadline in order:
        sweep.arm(deadline)
        assert len(loop.armed()) == 1
    assert sweep.at == 101.0
    loop.advance(10)
    assert watched.ended == [(101.0, 101.0), (102.0, 102.0), (103.0, 103.0)]
    assert loop.armed() == [] and sweep.at == math.inf
    watched.left.append(120.0)
    sweep.arm(120.0)
    loop.advance(10)
    assert watched.ended[-1] == (120.0, 120.0)


def test_deadlines_that_have_gone_cost_one_look() -> None:
    loop = Clockwork()
    watched = Deadlines(150.0)
    sweep = Sweep(loop, watched)  # type: ignore[arg-type]
    sweep.arm(101.0)
    sweep.arm(150.0)
    loop.advance(5)
    assert watched.ended == [] and loop.armed() == [45.0]


def test_a_sweep_that_was_stopped_does_nothing_until_it_is_armed_again() -> None:
    loop = Clockwork()
    watched = Deadlines(101.0)
    sweep = Sweep(loop, watched)  # type: ignore[arg-type]
    sweep.stop()
    sweep.arm(101.0)
    sweep.stop()
    sweep.stop()
    loop.advance(10)
    assert watched.ended == [] and loop.armed() == []
    sweep.arm(111.0)
    loop.advance(10)
    assert watched.ended == [(111.0, 101.0)]
