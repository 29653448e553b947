"""When a client tries to connect: how many attempts it makes, and the pauses between them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from .descriptors import ClientDescriptor
from .exceptions import AuthenticationError
from .offline import Offline, Status

__all__ = ["Attempts"]

logger = logging.getLogger("conduit.client")

LONGEST_DELAY = 30.0
"""Seconds that the pause between two attempts to connect never exceeds."""
STEADY = 30.0
"""Seconds that a connection must last before the pauses start from the shortest again."""


class Attempts:
    """Tries to connect until it is done, with random pauses that grow ("full jitter").

    The pauses grow with each failure, also over connections that do not last.

    Args:
        descriptor: How long the pauses are, and how many attempts are made.
        offline: Where the client stands.
    """

    def __init__(self, descriptor: ClientDescriptor, offline: Offline) -> None:
        self._descriptor = descriptor
        self._offline = offline
        self._failures = 0
        self._ready_since = 0.0

    def reset(self) -> None:
        """Start from the shortest pause again."""
        self._failures = 0

    def ready(self) -> None:
        """Know that there is a connection from now on."""
        self._ready_since = asyncio.get_running_loop().time()

    def lost(self) -> None:
        """Start from the shortest pause again, if the connection has lasted."""
        if asyncio.get_running_loop().time() - self._ready_since >= STEADY:
            self._failures = 0

    async def make(self, dial: Callable[[], Awaitable[None]], *, pause: bool = True) -> None:
        """Make attempts until one succeeds, or the client is disconnected.

        Args:
            dial: Makes one attempt.
            pause: Whether there is a pause before the first one as well.

        Raises:
            AuthenticationError: As `dial`; trying again would not help.
            Exception: As `dial`, when that was the last of the attempts.
        """
        offline = self._offline
        attempt = 0
        while True:
            if pause or attempt:
                grown = self._descriptor.reconnect_delay * 2 ** min(self._failures, 16)
                await asyncio.sleep(random.uniform(0, min(LONGEST_DELAY, grown)))
            # Those are not counted that are made before a server has gone that goes away.
            counts = offline.connection is None or not offline.connection.leaving
            attempt += counts
            self._failures += counts
            try:
                await dial()
            except AuthenticationError:
                raise
            except Exception as exc:
                if offline.status is Status.CLOSED:
                    return  # disconnected in the meantime, so it interests nobody
                if not counts:
                    logger.info("the server goes away, and nobody takes over yet: %s", exc)
                    continue
                logger.warning("attempt %d to connect failed: %s", attempt, exc)
                if attempt == self._descriptor.reconnect_attempts:
                    raise
            else:
                return
