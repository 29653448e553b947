"""What a process holds, told by itself: the programs of the idle test and of the soak use it.

From /proc, so on Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import linecache
import logging
import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

ERRORS_KEPT = 5
TIMERS = 1000
"""More than asyncio keeps that were cancelled."""


def resident() -> int:
    """Return the bytes of memory that the process has, after all that is garbage has gone."""
    while gc.collect():
        pass
    sys._clear_type_cache()  # which holds the names of attributes that were looked up lately
    linecache.clearcache()  # which holds the source of whatever was in a traceback
    # glibc keeps what was freed for later. How much of it says nothing about the program.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


async def figures() -> dict[str, Any]:
    """Return what the process holds now: numbers that are plain data.

    Blocks are what Python has allocated and not freed, of any size. That is exact, where the
    resident memory is the allocator's business as well.
    """
    # asyncio keeps timers that were cancelled until their time, or until there are many: so be it.
    loop = asyncio.get_running_loop()
    for _ in range(TIMERS):
        loop.call_later(3600, TIMERS.bit_length).cancel()
    await asyncio.sleep(0)
    memory = resident()
    return {
        "resident": memory,
        "blocks": sys.getallocatedblocks(),
        "tasks": len(asyncio.all_tasks()),
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # one of them lists the others
        "threads": threading.active_count(),
    }


class Complaints(logging.Handler):
    """Reads whatever is logged and drops it, but for what nobody should ever have to log.

    Attributes:
        counted: How much was logged, by logger and level.
        errors: The first errors of asyncio: exceptions that nobody has taken, tasks that vanished.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self.counted[f"{record.name} {record.levelname}"] += 1
        ours = record.name == "asyncio" and record.levelno >= logging.ERROR
        if ours and len(self.errors) < ERRORS_KEPT:
            self.errors.append(text)


def listen_to_complaints() -> Complaints:
    """Have everything from INFO on, of every logger, handed to `Complaints`."""
    complaints = Complaints()
    logging.basicConfig(level=logging.INFO, handlers=[complaints])
    return complaints


@contextlib.contextmanager
def many_descriptors(needed: int) -> Iterator[None]:
    """Let this process, and those that it starts meanwhile, open so many descriptors.

    Raises:
        RuntimeError: The machine does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"{needed} descriptors are needed, and {hard} is the hard limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a program on the event loop that the tests run on."""
    loop = importlib.import_module(os.environ.get("CONDUIT_TEST_LOOP") or "asyncio")
    runner = loop.new_event_loop()
    try:
        runner.run_until_complete(main)
    finally:
        runner.close()
