"""Random programs of calls, streams, messages, cancellations, deadlines and cuts on two peers.

Some of them lose the link and go on over another. Whatever happens, each call has one outcome, and
one that there is a reason for; credit is never negative and none is lost; both sides agree on what
is under way; and in the end no task, timer or table entry is left. Virtual time makes each program
the same each time.

CONDUIT_EXAMPLES=20000 runs that many programs, other ones each time, for as long as they take, and
shortens one that fails; the few of a usual run are always the same.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from conduit.protocol.frames import HEADER, PRIORITY, FrameType, word
from conduit.transport.loop import Shared
from conduit.transport.messages import encode_message
from conduit.transport.requests import DEFAULT
from tests.transport.clock import MODULES
from tests.transport.life import World
from tests.transport.life_calls import MESSAGES, METHODS, STREAMS, Spec
from tests.transport.pair import Pair, settings
from tests.transport.virtual_loop import VirtualLoop

EXAMPLES = int(os.environ.get("CONDUIT_EXAMPLES", "0"))

Step = tuple[Any, ...]

BROADCAST = word(FrameType.MESSAGE, PRIORITY)

# What a program is made of

WAIT: Step = ("wait",)
COMMON: list[Step] = [WAIT, WAIT, ("pause",), ("sleep", 0.05), ("sleep", 3.0)]
ENDS: list[Step] = [("raise",), ("bug",)]
ITEMS: list[Step] = [("give", 1), ("give", 3), ("give", 40), ("take", 1), ("take", 4), ("take", 0)]
SIZES = st.sampled_from([0, 0, 0, 0, 90, 700, 20_000, 70_000])
TIMEOUTS = st.sampled_from([DEFAULT, DEFAULT, DEFAULT, 0.04, 1.0, 5.0, None])
CONSUMERS = st.tuples(
    st.sampled_from(["all", "all", "leave", "raise", "result", "plain", "wait"]),
    st.sampled_from([0, 0, 1, 2, 7]),
)
SOURCES = st.lists(st.sampled_from([*ITEMS[:3], *COMMON, ("raise",)]), max_size=3).map(tuple)


def specs(kinds: tuple[str, ...], depth: int = 2) -> st.SearchStrategy[Spec]:
    """Return calls whose handlers call back, and so on `depth` times."""
    often = [*ITEMS, WAIT] if kinds is STREAMS else COMMON
    steps: list[st.SearchStrategy[Step]] = [
        st.sampled_from([*COMMON, *often, *ITEMS, *ENDS, ("stubborn",)])
    ]
    if depth:
        inner = specs(METHODS + MESSAGES, depth - 1)
        steps.append(st.tuples(st.sampled_from(["then", "then", "leave behind"]), inner))
    return st.builds(
        Spec,
        kind=st.sampled_from(kinds),
        plan=st.lists(st.one_of(steps), max_size=4).map(tuple),
        timeout=TIMEOUTS,
        size=SIZES,
        source=SOURCES,
        consumer=CONSUMERS,
    )


WINDOWS = {
    "narrow": {"calls": 2, "window": (2, 1000), "stream": (2, 100), "outbox_bytes": 1000},
    "medium": {"calls": 8, "window": (8, 4000), "stream": (16, 4000), "outbox_bytes": 100_000},
    "usual": {},
}
LONG = 60.0
"""Seconds that each call may take at the most, when those of one handler wait for each other."""
MANY = 1000
"""Turns in which a session goes on over another link, and looks at what a thread still holds."""
SIDES = st.integers(0, 1)
INDEXES = st.integers(0, 7)
TURNS = st.sampled_from([0, 0, 1, 2, 3, 5, 9, None, None, None])
ENDINGS = ["answered", "out of time", "cut", "closed", "closed at both ends", "given up"]


class RandomLife(RuleBasedStateMachine):
    """Two peers, what their users do, and what happens to the link between them.

    Attributes:
        keeps: Seconds for which both sides keep the session when the link is lost.
    """

    keeps = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.loop = VirtualLoop()
        for module in MODULES:
            self.patch.setattr(f"{module}.monotonic", self.loop.time)
        self.world: World

    @initialize(
        client=st.sampled_from(sorted(WINDOWS)),
        server=st.sampled_from(sorted(WINDOWS)),
        backpressure=st.sampled_from([True, True, True, False]),
        compress=st.booleans(),
        ending=st.sampled_from(ENDINGS),
    )
    def join(
        self, client: str, server: str, backpressure: bool, compress: bool, ending: str
    ) -> None:
        self.ending = ending
        common: dict[str, Any] = {"backpressure": backpressure, "compress": compress}

        async def make() -> Pair:
            pair = Pair(
                client=settings(**WINDOWS[client], **common),  # type: ignore[arg-type]
                server=settings(**WINDOWS[server], **common),  # type: ignore[arg-type]
                keeps=self.keeps,
            )
            return await pair.__aenter__()

        pair = self.loop.run_until_complete(make())
        self.world = World(self.loop, pair, backpressure=backpressure)

    # What users do.

    @rule(side=SIDES, specs=st.lists(specs(METHODS), min_size=1, max_size=3), turns=TURNS)
    def call(self, side: int, specs: list[Spec], turns: int | None) -> None:
        for spec in specs:
            self.world.start(self.world.sides[side], spec)
        self.go_on(turns)

    @rule(side=SIDES, specs=st.lists(specs(STREAMS), min_size=1, max_size=3), turns=TURNS)
    def stream(self, side: int, specs: list[Spec], turns: int | None) -> None:
        for spec in specs:
            self.world.start(self.world.sides[side], spec)
        self.go_on(turns)

    @rule(side=SIDES, spec=specs(MESSAGES), turns=TURNS, count=st.sampled_from([1, 1, 1, 5]))
    def message(self, side: int, spec: Spec, turns: int | None, count: int) -> None:
        for _ in range(count):
            self.world.start(self.world.sides[side], spec)
        self.go_on(turns)

    @rule(side=SIDES, reliable=st.booleans(), count=st.sampled_from([1, 5, 300]), turns=TURNS)
    def broadcast(self, side: int, reliable: bool, count: int, turns: int | None) -> None:
        connection = self.world.sides[side].connection
        payload = encode_message(Shared.of(self.loop).encoder, "news", "x")
        frame = HEADER.pack(BROADCAST, len(payload), 0, 0, 0) + payload
        for _ in range(count):
            if reliable:
                connection.send_reliably(payload, 1_000_000)
            else:
                connection.push(frame)
        self.go_on(turns)

    @rule(index=INDEXES, turns=TURNS)
    def cancel(self, index: int, turns: int | None) -> None:
        callers = list(self.world.tasks.items())
        if callers:
            task, call = callers[index % len(callers)]
            call.cancelled = True
            task.cancel()
        self.go_on(turns)

    @rule(index=INDEXES, turns=TURNS)
    def open_gate(self, index: int, turns: int | None) -> None:
        gates = self.world.gates = [gate for gate in self.world.gates if not gate.done()]
        if gates:
            gates[index % len(gates)].set_result(None)
        self.go_on(turns)

    @rule(index=INDEXES)
    def let_thread_go(self, index: int) -> None:
        gates = [gate for gate in self.world.thread_gates if not gate.is_set()]
        if gates:
            gates[index % len(gates)].set()
        self.settle()

    # What time and the link do.

    @rule(turns=TURNS)
    def go_on(self, turns: int | None) -> None:
        """Run the loop for some turns, or until it comes to rest."""
        if turns is None:
            self.settle()
        else:
            self.loop.turn(turns)

    def settle(self) -> None:
        self.loop.settle(self.world.threads_are_quiet)

    @rule(seconds=st.sampled_from([0.01, 0.2, 1.0, 5.0, 31.0]))
    def pass_time(self, seconds: float) -> None:
        def settle() -> None:
            self.settle()
            self.world.check()

        self.loop.advance(seconds, settle)

    @rule(side=SIDES)
    def stall(self, side: int) -> None:
        self.world.sides[side].link.stall()
        since = self.world.stalled_since
        since[side] = min(since[side], self.loop.now)

    @rule(side=SIDES, count=st.sampled_from([1, 31, 33, 100, 5000]), turns=TURNS)
    def let_bytes_go(self, side: int, count: int, turns: int | None) -> None:
        self.world.sides[side].link.let(count)
        self.go_on(turns)

    @rule(side=SIDES, turns=TURNS)
    def flow(self, side: int, turns: int | None) -> None:
        self.world.sides[side].link.flow()
        self.world.stalled_since[side] = float("inf")
        self.go_on(turns)

    @rule(
        side=SIDES,
        split=st.sampled_from([0, 0, 1000, 50]),
        delay=st.sampled_from([0.0, 0.0, 0.1]),
    )
    def change_link(self, side: int, split: int, delay: float) -> None:
        link = self.world.sides[side].link
        link.split, link.delay = split, delay

    @rule(
        side=SIDES,
        how=st.sampled_from(["close", "cut", "reset", "abort"]),
        turns=TURNS,
        really=INDEXES,
    )
    def end(self, side: int, how: str, turns: int | None, really: int) -> None:
        # Seldom for good, or most programs would be short.
        if not really or (self.keeps and how in ("cut", "reset")):
            self._end(side, how)
        self.go_on(turns)

    def _come_back(self) -> None:
        """Log in again, and wait for that: what happens to a login is not the question here."""
        sides = self.world.sides
        if all(side.connection.away and side.link.lost for side in sides):
            self.loop.call_soon(self.world.pair.start_again)
            for _ in range(MANY):
                self.loop.turn()
                if all(side.is_joined for side in sides):
                    return
            raise AssertionError("the session does not go on")

    def _end(self, side: int, how: str) -> None:
        self.world.may_end = True
        link, connection = self.world.sides[side].link, self.world.sides[side].connection
        if how == "cut":
            link.cut()
        elif how == "reset":
            self.loop.call_soon(link.reset)  # the other side hears of it one turn later
            self.loop.call_soon(self.loop.call_soon, link.peer.reset)
        else:
            end = connection.close() if how == "close" else connection.abort()
            task = self.loop.create_task(end)
            task.add_done_callback(lambda task: task.exception())

    # What must hold.

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world") and self.world.sound:
                self.end_all()
                self.nothing_is_left()
        finally:
            self.patch.undo()
            if hasattr(self, "world"):
                for gate in self.world.thread_gates:
                    gate.set()
            Shared._all.pop(self.loop, None)
            self.loop.close()

    def end_all(self) -> None:
        """End every call in the way that was chosen, and see that nothing is left."""
        world, started = self.world, self.loop.now
        for link in (side.link for side in world.sides):
            if self.ending not in ("cut", "given up"):
                link.delay, link.split = 0.0, 0
                link.flow()
        if self.ending == "cut":
            self._end(0, "cut")
        elif self.ending == "given up":
            self._end(0, "abort")
            self._end(1, "abort")
        elif self.ending.startswith("closed"):
            self._end(0, "close")
            if self.ending == "closed at both ends":
                self._end(1, "close")
        elif self.ending == "answered":
            self.settle()
            self._come_back()
        elif self.ending == "out of time":
            for task, call in list(world.tasks.items()):
                if call.latest == float("inf"):
                    call.cancelled = True
                    task.cancel()
            self.pass_time(31.0)
        self.settle()
        if any(side.connection.away for side in world.sides):
            self.pass_time(self.keeps + 1.0)
        idle = rounds = 0
        while idle < 4:
            idle, rounds = idle + 1, rounds + 1
            if world.open_gates() or world.busy:
                idle = 0
            self.settle()
            self.pass_time(0.25 if rounds < 40 else 5.0)
            unfinished = [call for call in world.calls if not call.outcome]
            assert self.loop.now < started + LONG * (len(world.calls) + 1), unfinished
        self.pass_time(1.0)
        world.check_empty()
        self._end(0, "close")
        self._end(1, "close")
        self.pass_time(1.0)
        world.check_empty()

    def nothing_is_left(self) -> None:
        world, loop = self.world, self.loop
        assert [side.link.lost for side in world.sides] == [True, True]
        assert [len(side.endings) for side in world.sides] == [1, 1]
        assert not Shared.of(loop).members
        assert not asyncio.all_tasks(loop)
        assert not loop.timers
        connections = [weakref.ref(side.connection) for side in world.sides]
        problems = world.problems
        del self.world, world
        gc.collect()
        for _ in range(MANY):  # a thread lets go of its handler a moment after it has ended
            gc.collect()
            if not any(connection() for connection in connections):
                break
            time.sleep(0.001)  # no event tells of that
        assert [connection() for connection in connections] == [None, None]
        assert not loop._asyncgens  # type: ignore[attr-defined]
        assert (problems, loop.errors) == ([], [])


class RandomLifeOverLinks(RandomLife):
    """The same over one link after the other."""

    keeps = 20.0

    @rule(turns=TURNS)
    def come_back(self, turns: int | None) -> None:
        """Make another link when both sides have noticed that there is none."""
        self._come_back()
        self.go_on(turns)

    @rule(
        how=st.sampled_from(["cut", "reset"]), seconds=st.sampled_from([0.0, 0.3, 5.0]), turns=TURNS
    )
    def lose_link_for_a_while(self, how: str, seconds: float, turns: int | None) -> None:
        self._end(0, how)
        self.settle()
        self.pass_time(seconds)
        self._come_back()
        self.go_on(turns)


@pytest.fixture
def quick_collector() -> Iterator[None]:
    """Let the collector look at nothing but what the programs make."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def silent_log() -> Iterator[None]:
    """Drop what handlers that fail on purpose leave in the log."""
    logger = logging.getLogger("conduit")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.mark.timeout(0 if EXAMPLES else 120)
@pytest.mark.parametrize("machine, programs", [(RandomLife, 60), (RandomLifeOverLinks, 40)])
def test_random_programs_leave_nothing_behind(
    machine: type[RandomLife], programs: int, quick_collector: None, silent_log: None
) -> None:
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=EXAMPLES or programs,
            stateful_step_count=40,
            derandomize=not EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # To find the shortest program that fails takes minutes.
            phases=tuple(Phase) if EXAMPLES else (Phase.generate,),
        ),
    )
