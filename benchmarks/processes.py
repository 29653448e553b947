"""The two processes of a contestant, as the measuring program sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from .machine import Cores, pin
from .workloads import Point

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 60.0
"""Seconds that a step may take beyond what it measures."""


class Failed(Exception):
    """A contestant did not do what it was asked."""


class NotInstalled(Exception):
    """A contestant's packages are not there."""


class Worker:
    """One process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid
        self.versions: dict[str, str] = {}

    @classmethod
    async def start(
        cls, python: str, role: str, name: str, core: int | None, log: IO[str]
    ) -> Worker:
        """Start a process and wait until it listens to commands."""
        command = [python, str(WORKER), role, name]
        # A group of its own, so that it can be ended with all that it has started.
        worker = cls(
            await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=log, start_new_session=True
            )
        )
        if core is not None:
            pin(worker.pid, frozenset({core}))
        hello = await worker._answer(PATIENCE)
        if "missing" in hello:
            await worker.end()
            raise NotInstalled(hello["missing"])
        worker.versions = hello["versions"]
        return worker

    async def ask(self, do: str, *, within: float = 0.0, **values: Any) -> Any:
        """Have it do something, and return the result.

        Args:
            do: A method of the worker's side.
            within: Seconds that it is expected to take.
            values: The method's arguments.

        Raises:
            Failed: It could not, or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            raise Failed("the process is gone") from None
        answer = await self._answer(within + PATIENCE)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    async def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except asyncio.TimeoutError:
            raise Failed(f"no answer within {seconds:g} s") from None
        if not line:
            raise Failed("the process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def end(self) -> None:
        """End it, gently at first."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 2)
        except asyncio.TimeoutError:
            pass
        # What it has started may be left even when it has ended itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._process.wait()


class Pair:
    """Server and client of one contestant, and a second client where one is needed."""

    def __init__(
        self,
        name: str,
        python: str,
        cores: Cores | None,
        log: IO[str],
        server: Worker,
        client: Worker,
    ) -> None:
        self.name = name
        self.cores = cores
        self.server = server
        self.client = client
        self.address: Any = None
        self._python = python
        self._log = log
        self._other: Worker | None = None

    @classmethod
    async def start(
        cls, name: str, python: str, cores: Cores | None, log: IO[str], methods: int = 0
    ) -> Pair:
        """Start both.

        Raises:
            NotInstalled: The contestant's packages are not there.
            Failed: The server did not start.
        """
        server = await Worker.start(python, "serve", name, cores.server if cores else None, log)
        try:
            client = await Worker.start(python, "drive", name, cores.client if cores else None, log)
            pair = cls(name, python, cores, log, server, client)
        except BaseException:
            await server.end()
            raise
        try:
            started = await server.ask("start", methods=methods)
        except BaseException:
            await pair.end()
            raise
        pair.address = started["address"]
        if cores is not None:
            for child in started["children"]:
                pin(child, cores.spare)
        return pair

    async def measure(self, point: Point, seconds: float) -> dict[str, float]:
        """Measure one point once.

        Raises:
            Failed: It went wrong; the processes are not to be used again.
        """
        if self.cores is not None:
            core = self.cores.server if point.one_core else self.cores.client
            pin(self.client.pid, frozenset({core}))
        await self.client.ask("prepare", address=self.address, point=asdict(point), seconds=seconds)
        if point.beside:
            return await self._measure_beside(point, seconds)
        before = await self.server.ask("usage")
        running = asyncio.ensure_future(self.client.ask("run", within=seconds))
        if point.kind == "broadcast":
            try:
                sent = await self.server.ask("broadcast", count=point.count)
            finally:
                result: dict[str, float] = await running
            result["rate"] = result["count"] / (result["ended"] - sent["started"])
        else:
            result = await running
        after = await self.server.ask("usage")
        await self.client.ask("finish")
        return figures(point, result, before, after)

    async def _measure_beside(self, point: Point, seconds: float) -> dict[str, float]:
        """Measure what a caller in a process of its own notices of the rest."""
        if self._other is None:
            # Beside the client, so that it takes nothing from the server.
            core = self.cores.client if self.cores else None
            self._other = await Worker.start(self._python, "drive", self.name, core, self._log)
        rare = asdict(Point(point.label, "rare"))
        await self._other.ask("prepare", address=self.address, point=rare, seconds=seconds)
        before = await self.server.ask("usage")
        await self.server.ask("watch")
        await self.client.ask("watch")
        result, noticed = await asyncio.gather(
            self.client.ask("run", within=seconds), self._other.ask("run", within=seconds)
        )
        found = {f"rare_{key}": noticed[key] / 1e3 for key in ("p50", "p99", "max")}
        for side, worker in (("server", self.server), ("client", self.client)):
            lag = await worker.ask("watched")
            found |= {f"{side}_lag_{key}": value for key, value in lag.items()}
        after = await self.server.ask("usage")
        await asyncio.gather(self.client.ask("finish"), self._other.ask("finish"))
        return found | figures(point, result, before, after)

    async def end(self) -> None:
        """End all of them."""
        workers = [self.server, self.client, *([self._other] if self._other else [])]
        await asyncio.gather(*(worker.end() for worker in workers))


def figures(
    point: Point,
    result: dict[str, float],
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, float]:
    """Turn what both processes said into the figures of one round."""
    count = result["count"]
    found = {"rate": result["rate"], "count": count}
    if point.kind == "idle":
        found["rate"] = (after["memory"] - before["memory"]) / count
        return found
    if count:
        found["server_us"] = (after["cpu"] - before["cpu"]) / count * 1e6
        found["client_us"] = result["client_cpu"] / count * 1e6
    for key in ("p50", "p99", "wanted"):
        if key in result:
            found[key] = result[key]
    return found
