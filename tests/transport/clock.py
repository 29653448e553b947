"""A clock that tests set forward, where conduit asks how much time a handler has left.

The timers of the event loop are not touched, so no handler is stopped by it.
"""

from __future__ import annotations

import time

import pytest

MODULES = ("conduit.transport.handling", "conduit.transport.serving", "conduit.rpc.context")


class Clock:
    """The real one, and what it was set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in MODULES:
        monkeypatch.setattr(f"{module}.monotonic", clock)
    return clock
