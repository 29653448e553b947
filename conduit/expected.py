"""The interfaces that a client has bound, held against what its server offers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from typing import Any, Final

from .exceptions import ConnectionClosed, InterfaceMismatch, RPCError
from .rpc.compatibility import differences
from .rpc.interface import Style
from .transport.background import Background
from .transport.connection import Connection

__all__ = ["Expected"]

VERDICTS: Final = 256
"""What is remembered of interfaces and servers, before it is asked anew."""
DIFFERENCES_SHOWN: Final = 5
"""How many the text of an error names."""


class Expected:
    """Asks a server what it offers only if that is not known by its fingerprint.

    Args:
        background: Runs the checks that nobody waits for.
        logger: Where they are reported.
        timeout: Seconds that the server has for its answer.
    """

    def __init__(self, background: Background, logger: logging.Logger, timeout: float) -> None:
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._background = background
        self._logger = logger
        self._timeout = timeout
        self._interfaces: dict[Any, Style] = {}
        self._verdicts: dict[tuple[Any, bytes], list[str]] = {}

    def use(self, connection: Connection | None) -> None:
        """Take this for the server that is there, or know that there is none."""
        self._connection = connection
        self._loop = None if connection is None else asyncio.get_running_loop()

    def add(self, interface: Any, style: Style) -> None:
        """Expect an interface of every server from now on; from any thread.

        A server that is there is asked in the background.
        """
        if interface in self._interfaces:
            return
        self._interfaces[interface] = style
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(self.report_later, [interface])

    def report_later(self, interfaces: Iterable[Any] | None = None) -> None:
        """Check interfaces, or all of them, in the background, and log what does not fit."""
        wanted = list(self._interfaces if interfaces is None else interfaces)
        if wanted and self._connection is not None:
            self._background.start(self._report(self._connection, wanted))

    async def _report(self, connection: Connection, interfaces: list[Any]) -> None:
        for difference in await self._differences(connection, interfaces):
            self._logger.error("%r does not fit: %s", connection.name, difference)

    async def check(self, connection: Connection) -> None:
        """Hold the interfaces against what a server offers.

        A server that does not say what it offers is logged, and fits.

        Raises:
            InterfaceMismatch: The server does not fit; the text says why.
        """
        if found := await self._differences(connection, list(self._interfaces)):
            raise _mismatch(connection.name, found)

    async def _differences(self, connection: Connection, interfaces: list[Any]) -> list[str]:
        fingerprint = connection.fingerprint
        known = {one: self._verdicts.get((one, fingerprint)) for one in interfaces}
        if None in known.values():
            try:
                offered = await connection.call(
                    "conduit.discover", None, self._timeout, False, None, None
                )
            except ConnectionClosed:
                return []  # the next connection is checked as well
            except RPCError as exc:
                text = "what %r offers is not known, and its interfaces not checked: %s"
                self._logger.warning(text, connection.name, exc)
                return []
            if len(self._verdicts) > VERDICTS:
                self._verdicts.clear()
            for interface in interfaces:
                style = self._interfaces[interface]
                known[interface] = found = differences(interface, offered, style)
                if fingerprint:
                    self._verdicts[interface, fingerprint] = found
        return [difference for found in known.values() for difference in found or ()]


def _mismatch(server: str, found: list[str]) -> InterfaceMismatch:
    listed = "; ".join(found[:DIFFERENCES_SHOWN])
    more = len(found) - DIFFERENCES_SHOWN
    text = f"{server!r} does not fit: {listed}" + (f"; and {more} more" if more > 0 else "")
    return InterfaceMismatch(text, differences=found)
