"""What every contestant offers, so that all of them are measured by the same code."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Protocol

PASSWORD = "correct horse battery staple"
HOST = "127.0.0.1"
LARGEST = 64 * 1024 * 1024
"""The largest value that is echoed. Limits are set with this much and room for an envelope."""
ROOM = LARGEST + 1024 * 1024

Heard = Callable[[int], None]
"""Told the number of each broadcast that arrives."""


class Session(Protocol):
    """One connection of a client, or what its users take for one."""

    async def call(self, a: int, b: int, /) -> int:
        """Have the server add two numbers."""
        ...

    async def echo(self, data: bytes, /) -> Any:
        """Have the server send bytes back."""
        ...

    async def stream(self, count: int, /) -> int:
        """Have the server send the numbers below `count` one by one; return their sum.

        Only who `can` do so has it.
        """
        ...

    async def close(self) -> None:
        """Close the connection."""


class Contestant:
    """A library with the settings that it recommends for speed.

    One object serves in the server's process, another connects in the client's.

    Attributes:
        children: Processes that the server has started, counted as part of it.
    """

    children: tuple[int, ...] = ()

    async def serve(self, methods: int) -> Any:
        """Start a server with `add` and `echo` and so many further methods; return its address."""
        raise NotImplementedError

    async def stop(self) -> None:
        """End what would outlive the server's process."""

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Session:
        """Connect and log in.

        Args:
            address: What `serve` returned.
            callers: How many calls will be in flight at most.
            heard: Wants the broadcasts.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Forget whatever makes a second login cheaper than the first one of a process."""

    async def broadcast(self, count: int) -> None:
        """Send the numbers below `count` to everybody who is connected."""
        raise NotImplementedError


class Pending:
    """The client's half of a hand-made protocol: answers find their callers by number."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last = 0

    def add(self) -> tuple[int, asyncio.Future[Any]]:
        """Return a new number and the future of its answer."""
        self._last += 1
        future = self._waiting[self._last] = self._loop.create_future()
        return self._last, future

    def answered(self, number: int, result: Any) -> None:
        """Hand an answer to its caller."""
        self._waiting.pop(number).set_result(result)


def free_port() -> int:
    """Return a port that is free now, for servers that cannot choose one themselves."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
