"""The machine: its cores, what processes use of it, and what it is."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .unit import LOOPS, loop


@dataclass(frozen=True)
class Cores:
    """Which side runs where.

    Attributes:
        server: The server's core.
        client: The client's core.
        spare: What is left for processes that a server starts; else they share the server's.
    """

    server: int
    client: int
    spare: frozenset[int]


def choose_cores() -> Cores | None:
    """Choose two cores that are not two threads of one, or None where nothing can be pinned."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    free = sorted(os.sched_getaffinity(0))
    if len(free) < 2:
        return None
    first = free[0]
    others = [core for core in free[1:] if core not in siblings(first)] or free[1:]
    spare = frozenset(free) - {first, others[0]}
    return Cores(first, others[0], spare or frozenset({first}))


def siblings(core: int) -> set[int]:
    """Return the threads of the physical core that a core is one of."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found = {core}
    with contextlib.suppress(OSError):
        for part in path.read_text().strip().split(","):
            low, _, high = part.partition("-")
            found.update(range(int(low), int(high or low) + 1))
    return found


def pin(pid: int, cores: frozenset[int]) -> None:
    """Have every thread of a process run on these cores only."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # the thread has just ended
            os.sched_setaffinity(int(thread), cores)


def memory_kib(pid: int) -> int:
    """Return the resident memory of a process."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def ticks_seconds(pid: int) -> float:
    """Return the processor time of another process, in steps of a hundredth of a second."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loop_ns() -> int:
    """Return the nanoseconds of a fixed loop of plain Python, the unit of the guard.

    It says how fast the processor and this build of Python are together: one that was built without
    profile-guided optimization takes a quarter longer.
    """
    times = []
    for _ in range(5):
        started = time.perf_counter()
        loop(LOOPS)
        times.append(time.perf_counter() - started)
    return round(min(times) / LOOPS * 1e9)


def describe(cores: Cores | None) -> dict[str, Any]:
    """Say what the machine is, as far as figures depend on it, and nothing about whose it is."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = 0.0
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "loop_ns": loop_ns(),
        "pinned": cores is not None,
        "threads_of_one_core": cores is not None and cores.client in siblings(cores.server),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
