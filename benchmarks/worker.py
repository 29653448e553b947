"""One side of one contestant, in a process of its own: `worker.py serve|drive CONTESTANT`.

It is told what to do by lines of JSON on its standard input and answers each by one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Behind the environment's own packages: netconduit's environment has another `conduit` than this
# repository, and must find that one.
sys.path.pop(0)
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.contestants import CONTESTANTS, load
from benchmarks.machine import memory_kib, ticks_seconds
from benchmarks.measures import KINDS, Lag, Measure, Result, cpu_seconds
from benchmarks.workloads import Point


class Side:
    """What both sides can be asked for."""

    _lag: Lag

    async def watch(self) -> None:
        """Look how late timers are from now on."""
        self._lag = Lag()

    async def watched(self) -> Result:
        """Return how late they were."""
        return self._lag.end()


class Server(Side):
    """Serves, and tells what that costs."""

    def __init__(self, name: str) -> None:
        self._contestant = load(name)

    async def start(self, methods: int) -> dict[str, Any]:
        address = await self._contestant.serve(methods)
        return {"address": address, "children": self._contestant.children}

    async def usage(self) -> Result:
        children = self._contestant.children
        return {
            "cpu": cpu_seconds() + sum(map(ticks_seconds, children)),
            "memory": memory_kib(os.getpid()) + sum(map(memory_kib, children)),
        }

    async def broadcast(self, count: int) -> Result:
        started = time.monotonic()
        await self._contestant.broadcast(count)
        return {"started": started}

    async def end(self) -> None:
        await self._contestant.stop()


class Driver(Side):
    """Connects and measures."""

    _measure: Measure

    def __init__(self, name: str) -> None:
        self._contestant = load(name)

    async def prepare(self, address: Any, point: dict[str, Any], seconds: float) -> None:
        chosen = Point(**point)
        self._measure = KINDS[chosen.kind](self._contestant, address, chosen, seconds)
        await self._measure.prepare()

    async def run(self) -> Result:
        return await self._measure.run()

    async def finish(self) -> None:
        await self._measure.finish()

    async def end(self) -> None:
        """Nothing of it outlives the process."""


def versions(name: str) -> dict[str, str]:
    """Return the versions of a contestant's packages and of its event loop."""
    found = {}
    for package in CONTESTANTS[name].packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


async def obey(side: Server | Driver, out: Any, name: str) -> None:
    """Do what the lines of standard input say until it ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    print(json.dumps({"versions": versions(name)}), file=out, flush=True)
    try:
        while line := await lines.readline():
            request = json.loads(line)
            answer: dict[str, Any] = {}
            try:
                answer["result"] = await getattr(side, request.pop("do"))(**request)
            except Exception as exc:  # noqa: BLE001  # told to whoever asked
                traceback.print_exc()
                answer["error"] = f"{type(exc).__name__}: {exc}"
            print(json.dumps(answer), file=out, flush=True)
    finally:
        await side.end()


def main(role: str, name: str) -> None:
    # Whatever a contestant prints goes to the log; the answers have the old standard output.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.ERROR)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        if CONTESTANTS[name].loop == "uvloop":
            import uvloop

            loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        else:
            loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        side = Server(name) if role == "serve" else Driver(name)
    except ImportError as exc:
        print(json.dumps({"missing": str(exc)}), file=out, flush=True)
        return
    loop.run_until_complete(obey(side, out, name))
    out.flush()
    # Threads and tasks that a contestant has left behind must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
