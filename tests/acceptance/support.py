"""What the acceptance tests share: servers and clients that log in fast, and programs to run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trustme

from conduit import Client, Limits, Server
from tests.acceptance.raw import PASSWORD, TIMEOUT, VERIFIER

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]

SOON = 1_000
"""How many turns of the loop a test looks in each of, before it looks each millisecond."""
FAST_LOGIN = Limits(min_iterations=4096)
"""What lets a client accept the cheap verifier of these tests."""


async def within(awaitable: Awaitable[T], seconds: float = TIMEOUT) -> T:
    """Wait for something that has to happen, and fail if it does not."""
    return await asyncio.wait_for(awaitable, seconds)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that no event tells of."""

    async def look() -> None:
        looks = 0
        while not condition():
            looks += 1  # what takes longer must not keep a core from the others
            await asyncio.sleep(0 if looks < SOON else 0.001)

    await within(look())


def new_server(**fields: Any) -> Server:
    """Return a server on a free port of the loopback interface, with the method `add`."""
    if not fields.keys() & {"password", "users", "verifier"}:
        fields["verifier"] = VERIFIER
    server = Server(**{"host": "127.0.0.1", "port": free_port(), **fields})

    @server.rpc
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    return server


def new_client(to: Server | tuple[str, int], **fields: Any) -> Client:
    """Return a client of a running server, or of an address; it is not connected yet."""
    host, port = to.address if isinstance(to, Server) else to
    known = {"password": PASSWORD, "limits": FAST_LOGIN, "reconnect_delay": 0.01}
    return Client(**{"server_host": host, "server_port": port, **known, **fields})


async def round_trips(client: Client, count: int = 20) -> None:
    """Make calls one after the other: whatever both sides had to do by now has been done."""
    for number in range(count):
        assert await within(client.rpc.call("add", args={"a": number, "b": 1})) == number + 1


class Neighbour:
    """A client that has nothing to do with what a test does, and must not notice it."""

    def __init__(self, server: Server, client: Client) -> None:
        self.server = server
        self.client = client
        self.lost: list[object] = []

        @client.on_disconnect
        async def lost(client: Client, reason: object) -> None:
            self.lost.append(reason)

    async def check(self) -> None:
        """Fail unless this client's calls are answered, over the link that it always had."""
        await round_trips(self.client, 3)
        assert self.lost == []


@contextlib.asynccontextmanager
async def neighbourhood(server: Server) -> AsyncIterator[Neighbour]:
    """Run a server with one well-behaved client, which must still be served at the end."""
    async with server:
        client = new_client(server)
        neighbour = Neighbour(server, client)
        async with client:
            await neighbour.check()
            yield neighbour
            await neighbour.check()


def issue_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a server's certificate for 127.0.0.1, and the authority that has signed it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    return folder / "server.pem", folder / "ca.pem"


_DICE = random.SystemRandom()
"""Hypothesis seeds the usual one, so that tests side by side would all want the same port."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on, for a program that has to be told one.

    It lies below those that the kernel gives to sockets that connect. Clients that try again and
    again while the program is down would be given it, too, and keep it from the program.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = _DICE.randrange(10_000, 32_768)
        with socket.socket(family) as sock, contextlib.suppress(OSError):
            sock.bind((host, port))
            return port


def has_ipv6() -> bool:
    """Tell whether this machine has ::1."""
    if not socket.has_ipv6:
        return False
    try:
        free_port("::1")
    except OSError:
        return False
    return True


class Program:
    """A Python program in its own process, whose output is read line by line."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        for thread in self._threads:
            thread.join(TIMEOUT)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, timeout: float = TIMEOUT) -> re.Match[str]:
        """Return the first match in a line not seen yet; the program must print it in time."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise AssertionError(
                    f"never printed {pattern!r}; output {self.lines}, errors {self.errors}"
                )
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match

    def wait_for_port(self, host: str, port: int, timeout: float = TIMEOUT) -> None:
        """Wait until the program listens on a port."""
        deadline = time.monotonic() + timeout
        while True:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
                if sock.connect_ex((host, port)) == 0:
                    return
            assert self.process.poll() is None, f"ended: {self.errors}"
            assert time.monotonic() < deadline, f"never listened on {port}: {self.errors}"
            # Another process cannot be waited for in any other way.
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def finish(self, timeout: float = TIMEOUT) -> int:
        """Wait for the end, take in what was printed, and return the exit code."""
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(timeout)
        while not self._queue.empty():
            line = self._queue.get_nowait()
            if line is not None:
                self.lines.append(line)
        return code

    @property
    def output(self) -> str:
        """Everything that `wait_for` and `finish` have seen."""
        return "\n".join(self.lines)

    @property
    def error_output(self) -> str:
        """Everything written to the standard error output by now."""
        return "\n".join(self.errors)


# the quick start

QUICKSTART = Path(__file__).parent / "quickstart"

QUICKSTART_LINES = [
    "Connected to server!",
    "10 + 20 = 30",
    "3.5 * 2.0 = 7.0",
    "Available methods: ['add', 'multiply']",
]


def copy_program(name: str, folder: Path, port: int) -> str:
    """Copy a program and change its port, and nothing else."""
    text = (QUICKSTART / name).read_text(encoding="ascii")
    assert text.count("port=8080") == 1
    (folder / name).write_text(text.replace("port=8080", f"port={port}"), encoding="ascii")
    return name


def start_quickstart_server(folder: Path) -> tuple[Program, int]:
    """Start the server of the quick start and return it with its port."""
    program = Program(copy_program("server.py", folder, 0), cwd=folder)
    try:
        started = program.wait_for(r"^Server starting on \('0\.0\.0\.0', (\d+)\)$")
    except AssertionError:
        program.__exit__()
        raise
    return program, int(started[1])


def end_cleanly(server: Program, number: signal.Signals) -> None:
    """End the server by a signal; it must not complain."""
    server.signal(number)
    assert server.finish() == 0, server.error_output
    assert "Traceback" not in server.error_output
    assert "KeyboardInterrupt" not in server.error_output
    assert "never awaited" not in server.error_output
    assert "was destroyed" not in server.error_output
