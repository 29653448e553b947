"""Simulate sessions whose links are cut, on every core, until time is up or one of them breaks.

    python tools/simulate.py                 6,000 runs, which are a million messages
    python tools/simulate.py --runs 1000000  or --seconds 600
    python tools/simulate.py --seed 126      one run again, step by step

What is simulated, and what is checked, is told at the head of tests/simulation/world.py.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.simulation.parts import Violation  # conduit lies beside tools
from tests.simulation.world import World

RUNS = 6_000
BATCH = 50
"""Runs that a process makes before it tells what came of them."""
SHOWN = 5
"""Violations that are printed; one would do."""


@dataclass
class Total:
    """What came of some runs."""

    runs: int = 0
    messages: int = 0
    cuts: int = 0
    resumes: int = 0
    restarts: int = 0
    violations: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Total) -> None:
        self.runs += other.runs
        self.messages += other.messages
        self.cuts += other.cuts
        self.resumes += other.resumes
        self.restarts += other.restarts
        self.violations += other.violations


def simulate(seeds: range, world: type[World] = World) -> Total:
    """Make one run for each seed."""
    total = Total()
    for seed in seeds:
        run = world(seed)
        try:
            run.run()
        except Violation as violation:
            total.violations.append((seed, str(violation)))
        except Exception as exc:  # noqa: BLE001  # a run that breaks is what is looked for
            total.violations.append((seed, f"{type(exc).__name__}: {exc}"))
        total.runs += 1
        total.messages += run.messages
        total.cuts += run.cuts
        total.resumes += run.resumes
        total.restarts += run.restarts
    return total


def on_all_cores(first: int, runs: int | None, seconds: float | None) -> Total:
    """Make runs until there are enough, time is up, or something is wrong."""
    total = Total()
    until = time.monotonic() + seconds if seconds is not None else None
    ranges = _ranges(first, runs)
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        waiting: set[Future[Total]] = set()
        more = True
        while more or waiting:
            more = more and not total.violations and (until is None or time.monotonic() < until)
            while more and len(waiting) < 2 * cores:
                seeds = next(ranges, None)
                if seeds is None:
                    more = False
                else:
                    waiting.add(pool.submit(simulate, seeds))
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                total.add(future.result())
    return total


def _ranges(first: int, runs: int | None) -> Iterator[range]:
    """Yield the seeds of one batch after the other."""
    start, end = first, first + runs if runs is not None else None
    while end is None or start < end:
        stop = start + BATCH if end is None else min(start + BATCH, end)
        yield range(start, stop)
        start = stop


def report(total: Total, seconds: float) -> None:
    """Print the table, and how to see a violation again."""
    for name, value in (
        ("runs", total.runs),
        ("messages", total.messages),
        ("cuts", total.cuts),
        ("resumes", total.resumes),
        ("restarts", total.restarts),
        ("violations", len(total.violations)),
        ("seconds", round(seconds)),
    ):
        print(f"{name:10} {value:>13,}")
    for seed, text in sorted(total.violations)[:SHOWN]:
        print(f"\n{text}\n  see it again: python tools/simulate.py --seed {seed}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--runs", type=int)
    amount.add_argument("--seconds", type=float)
    amount.add_argument("--seed", type=int, help="make this one run, and tell each step")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        World(options.seed, tell=print).run()
        return 0
    runs = RUNS if options.runs is None and options.seconds is None else options.runs
    started = time.monotonic()
    total = on_all_cores(random.randrange(2**40), runs, options.seconds)
    report(total, time.monotonic() - started)
    return 1 if total.violations else 0


if __name__ == "__main__":
    sys.exit(main())
