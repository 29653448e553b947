"""Names whoever holds the event loop, while that goes on.

A thread asks the loop for a sign of life many times a second. When none comes, what the loop's
thread does just then is what holds it: everybody else who is served by the loop waits meanwhile.

Only then is the stack of the loop's thread looked at. Whoever holds a frame holds its variables,
and one of them may be a buffer that was lent to the loop for a read.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import sys
import threading
import time
import traceback
from types import FrameType

from .handling import Handling

__all__ = ["Watchdog"]

logger = logging.getLogger("conduit.loop")

SHOWN = 12
"""Lines of code that a report shows, those that were reached last."""

LOOKS = 5
"""Looks in the time for which the loop may be held: what holds it a fifth longer is sure to be
seen, in whichever moment it begins."""


class Watchdog:
    """Watches one event loop, from the thread in which it runs.

    Args:
        loop: The event loop.
        handling: Knows which handler runs.
        patience: Seconds that the loop may be held.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, handling: Handling, patience: float
    ) -> None:
        self._loop = loop
        self._handling = handling
        self._patience = patience
        self._watched = threading.get_ident()
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="conduit-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for the moment that it takes."""
        self._stopped.set()
        self._answered.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._patience / LOOKS):
            self._answered.clear()
            if self._stopped.is_set():  # between the wait and the line above
                return
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # the loop was closed, and nobody has stopped what ran on it
                return
            if not self._answered.wait(self._patience):
                self._report(time.monotonic() - self._patience)

    def _report(self, since: float) -> None:
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]  # documented
        frame = frames.get(self._watched)
        name = self._handling.running()
        # A loop that waits for events is held by nobody: the machine was busy, or asleep.
        if frame is not None and frame.f_code.co_filename != selectors.__file__:
            logger.warning(
                "%s has held the event loop for more than %g s, and everybody waits; it should "
                "await what takes long, or be a plain `def`, which runs in a thread:\n%s",
                "something" if name is None else f"the handler {name!r}",
                self._patience,
                _shown(frame),
            )
        del frame, frames
        self._answered.wait()
        logger.info("the event loop was held for %.2f s", time.monotonic() - since)


def _shown(frame: FrameType) -> str:
    """Return the end of a stack."""
    return "".join(traceback.format_stack(frame)[-SHOWN:]).rstrip()
