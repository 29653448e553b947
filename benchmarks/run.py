"""Measure conduit beside what its users would take instead.

    python benchmarks/run.py                                everything; about twenty minutes
    python benchmarks/run.py --quick                        the comparison in two minutes
    python benchmarks/run.py --only conduit,picows --workloads in-flight,connections

The Python that runs this is the one that is measured. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

# So that it can be run as a file. Behind everything else: see worker.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.contestants import CONTESTANTS
from benchmarks.environments import ROOT, prepare
from benchmarks.machine import Cores, choose_cores, describe
from benchmarks.processes import Failed, NotInstalled, Pair
from benchmarks.report import aims, table
from benchmarks.workloads import MIB, WORKLOADS, Point, Workload

ROUNDS, SECONDS = 5, 1.0
QUICK_ROUNDS, QUICK_SECONDS = 3, 0.15
QUICK_SHARE = 0.25
"""How much of the idle connections and of the broadcasts is left with --quick."""

Figures = dict[str, Any]


class Run:
    """One run of the benchmarks.

    Args:
        names: The contestants.
        pythons: The interpreter of each contestant's environment.
        rounds: How often each point is measured.
        seconds: How long one measurement takes.
        quick: Whether to measure less of what is counted instead of timed.
        log: Where the processes' output goes.
    """

    def __init__(
        self,
        names: Sequence[str],
        pythons: dict[str, str],
        *,
        rounds: int,
        seconds: float,
        quick: bool,
        log: IO[str],
    ) -> None:
        self.names = list(names)
        self.pythons = pythons
        self.rounds = rounds
        self.seconds = seconds
        self.quick = quick
        self.log = log
        self.cores: Cores | None = choose_cores()
        self.versions: dict[str, dict[str, str]] = {}
        self._pairs: dict[str, Pair] = {}

    async def workloads(self, chosen: Iterable[str]) -> dict[str, Any]:
        """Measure workloads one after another, and print each as soon as it is there."""
        results = {}
        try:
            await asyncio.gather(*map(self._get_ready, list(self.names)))
            for name in chosen:
                started = time.monotonic()
                results[name] = await self._workload(WORKLOADS[name])
                results[name]["took"] = round(time.monotonic() - started, 1)
                print("\n" + table(name, results[name]), flush=True)
        finally:
            await asyncio.gather(*(pair.end() for pair in self._pairs.values()))
        return results

    async def _get_ready(self, name: str) -> None:
        """Start a contestant's processes before anything is measured."""
        try:
            self._pairs[name] = await self._start(name)
        except NotInstalled as exc:
            print(f"{name} is left out: {exc}", flush=True)
            self.names.remove(name)
        except Failed as exc:
            print(f"{name} is left out, it does not start: {exc}", flush=True)
            self.names.remove(name)

    async def _workload(self, workload: Workload) -> dict[str, Any]:
        names = [name for name in self.names if not workload.only or name in workload.only]
        points = []
        for point in workload.points:
            if self.quick and point.count:
                point = replace(point, count=round(point.count * QUICK_SHARE), rounds=1)
            elif self.quick and point.size > MIB:
                # A third of the two minutes otherwise. The first round does it for the others.
                point = replace(point, warm_up=False)
            points.append({"label": point.label, "by": await self._point(workload, point, names)})
        counted = any(point.count for point in workload.points)
        return {
            "title": workload.title + (" (a quarter of them)" if self.quick and counted else ""),
            "unit": workload.unit,
            "floor": workload.floor,
            "points": points,
        }

    async def _point(self, workload: Workload, point: Point, names: list[str]) -> dict[str, Any]:
        """Measure a point in rounds, in each of which every contestant has its turn."""
        taking_part = [
            name
            for name in names
            if point.kind in CONTESTANTS[name].can and point.size <= CONTESTANTS[name].largest
        ]
        found: dict[str, list[Figures]] = {name: [] for name in taking_part}
        errors: dict[str, str] = {}
        for number in range(min(self.rounds, point.rounds)):
            # Turned round every time, so that nobody always comes after the same one.
            for name in taking_part if number % 2 == 0 else reversed(taking_part):
                if name in errors:
                    continue
                try:
                    found[name].append(
                        await self._measure(name, point, self.seconds * workload.seconds)
                    )
                except Failed as exc:
                    errors[name] = str(exc)
                    print(f"{name} failed: {exc}", flush=True)
        medians: dict[str, Any] = {
            name: {**median(rounds), "rounds": rounds} for name, rounds in found.items() if rounds
        }
        return medians | {name: {"error": text} for name, text in errors.items()}

    async def _measure(self, name: str, point: Point, seconds: float) -> Figures:
        if point.fresh:
            pair = await self._start(name, point.methods)
            try:
                return await pair.measure(point, seconds)
            finally:
                await pair.end()
        if name not in self._pairs:
            self._pairs[name] = await self._start(name)
        try:
            return await self._pairs[name].measure(point, seconds)
        except Failed:
            await self._pairs.pop(name).end()
            raise

    async def _start(self, name: str, methods: int = 0) -> Pair:
        python = self.pythons[CONTESTANTS[name].environment]
        pair = await Pair.start(name, python, self.cores, self.log, methods)
        self.versions[name] = pair.server.versions
        return pair


def median(rounds: list[Figures]) -> Figures:
    """Return the median of every figure, and the range of the rates."""
    keys = {key for figures in rounds for key in figures}
    found = {key: statistics.median(figures.get(key, 0.0) for figures in rounds) for key in keys}
    rates = [figures["rate"] for figures in rounds]
    return {**found, "lowest": min(rates), "highest": max(rates)}


def names_of(text: str, known: Iterable[str], what: str) -> list[str]:
    """Split a list given by a person.

    Raises:
        SystemExit: A name is not known.
    """
    known = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            sys.exit(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    environ = os.environ
    parser.add_argument(
        "--quick", action="store_true", default=environ.get("QUICK", "0") not in ("", "0")
    )
    parser.add_argument("--only", default=environ.get("ONLY", ""), help="contestants; and floors")
    parser.add_argument("--workloads", default=environ.get("WORKLOADS", ""))
    parser.add_argument("--rounds", type=int, help="rounds per point")
    parser.add_argument("--seconds", type=float, help="length of one measurement")
    parser.add_argument("--name", default="", help="the results' file in benchmarks/results")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venvs")
    parser.add_argument(
        "--here", action="store_true", help="use this Python's packages and install nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what is written to the results' file."""
    options = parse(arguments)
    peers = names_of(options.only, CONTESTANTS, "contestant")
    names = [
        name for name, entry in CONTESTANTS.items() if not peers or name in peers or entry.floor
    ]
    default = [name for name, w in WORKLOADS.items() if w.part_of == "table" or not options.quick]
    chosen = names_of(options.workloads, WORKLOADS, "workload") or default
    needed = {CONTESTANTS[name].environment for name in names}
    pythons = {
        name: sys.executable if options.here else prepare(options.environments, name)
        for name in sorted(needed)
    }
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    started = time.monotonic()
    options.environments.mkdir(parents=True, exist_ok=True)
    with (options.environments / "bench.log").open("w") as log:
        run = Run(names, pythons, rounds=rounds, seconds=seconds, quick=options.quick, log=log)
        results: dict[str, Any] = {"machine": describe(run.cores)}
        results["workloads"] = asyncio.run(run.workloads(chosen))
        if any("error" in by for by in everything(results)):
            print(f"\nwhat the processes said is in {log.name}")
    results["machine"]["load_after"] = os.getloadavg()[0]
    results["machine"]["minutes"] = round((time.monotonic() - started) / 60, 1)
    results["method"] = {"rounds": rounds, "seconds": seconds, "quick": options.quick}
    results["versions"] = run.versions
    print("\n" + aims(results))
    name = options.name or ("quick" if options.quick else "latest")
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)} after {results['machine']['minutes']} minutes")
    return results


def everything(results: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Return the figures of every contestant at every point."""
    for workload in results["workloads"].values():
        for point in workload["points"]:
            yield from point["by"].values()


def failures(results: dict[str, Any]) -> list[str]:
    """Return the workloads that conduit itself did not get through."""
    return [
        name
        for name, workload in results["workloads"].items()
        for point in workload["points"]
        if any("error" in by for one, by in point["by"].items() if one.startswith("conduit"))
    ]


if __name__ == "__main__":
    if failed := failures(main()):
        sys.exit(f"conduit failed in {', '.join(failed)}")
