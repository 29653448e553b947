"""Fuzz one target with atheris until its time or its inputs are over, or something is wrong.

    python -m fuzz.one TARGET REPORT [arguments of libFuzzer]

fuzz/run.py starts this. REPORT is a JSON file that holds what came of it, also after a failure.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any, Final

import atheris

MOST_CPU: Final = 0.050
"""Seconds of CPU that one input may take."""
MOST_MEMORY: Final = 16 * 1024
"""KiB by which one input may raise the peak of the memory."""
TRIES: Final = 3
"""A slow input is slow each time; one that was in the way of a garbage collection is not."""
SAVED: Final = 1.0
"""Seconds between two reports."""


class Watch:
    """Runs inputs and keeps count of what they cost.

    Args:
        target: The target's module.
        report: The file for what came of it.
    """

    def __init__(self, target: Any, report: Path) -> None:
        self._target = target
        self._report = report
        self._inputs = 0
        self._slowest = 0.0
        self._started = self._saved = time.monotonic()
        self._first = 0

    def run(self, data: bytes) -> None:
        """Run one input.

        Raises:
            AssertionError: It took too much CPU or memory.
        """
        before = peak_memory()
        self._inputs += 1
        self._first = self._first or before  # what libFuzzer takes for itself is not counted
        seconds = self._measure(data)
        if seconds > self._slowest:
            if seconds > MOST_CPU / 10:
                gc.collect()
                seconds = min(seconds, *(self._measure(data) for _ in range(TRIES)))
            self._slowest = max(seconds, self._slowest)
        grown = peak_memory() - before
        if time.monotonic() - self._saved > SAVED:
            self.save()
        assert seconds <= MOST_CPU, f"one input took {1000 * seconds:.1f} ms of CPU"
        assert grown <= MOST_MEMORY, f"one input raised the peak of the memory by {grown} KiB"

    def _measure(self, data: bytes) -> float:
        before = time.process_time()
        self._target.run(data)
        return time.process_time() - before

    def save(self) -> None:
        """Write the report."""
        self._saved = time.monotonic()
        came_of_it = {
            "inputs": self._inputs,
            "seconds": self._saved - self._started,
            "slowest": self._slowest,
            "grown": peak_memory() - (self._first or peak_memory()),
        }
        new = self._report.with_suffix(".new")
        new.write_text(json.dumps(came_of_it))
        new.replace(self._report)


def peak_memory() -> int:
    """Return the most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(name: str, report: Path, arguments: list[str]) -> None:
    with atheris.instrument_imports(include=["conduit"]):
        importlib.import_module("conduit.protocol.cndt")
        target = importlib.import_module(f"fuzz.targets.{name}")
    for data in target.seeds():  # what is made once is made now, and not within an input
        target.run(data)
    logging.getLogger("conduit").setLevel(logging.CRITICAL)
    watch = Watch(target, report)

    def one_input(data: bytes) -> None:
        try:
            watch.run(data)
        except BaseException:
            watch.save()
            raise

    gc.collect()
    gc.freeze()  # a collection within an input need not look at what was there before
    atheris.Setup([name, *arguments], one_input)
    atexit.register(watch.save)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
