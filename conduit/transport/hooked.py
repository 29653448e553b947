"""Whether a hook of the application runs, for what it calls: it must not wait for its own end.

A login waits for the hooks `on_client_connect`, and what goes to a new server for `on_reconnect`. A
context variable tells them, and all that they start as long as they run, from what waits. What they
leave behind is told by the end of the hook, for a context cannot be taken back from a task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

__all__ = ["AT", "HOOK", "hook_of_caller", "hooked"]


class _Hook:
    """A hook that runs, or has run."""

    __slots__ = ("ended", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended = False


HOOK: ContextVar[_Hook | None] = ContextVar("conduit_hook", default=None)
AT: ContextVar[str] = ContextVar("conduit_at", default="")
"""The id of the connection of a client whose handler runs, or whose hooks tell of its beginning."""


@contextlib.contextmanager
def hooked(name: str) -> Generator[None, None, None]:
    """Run a hook: the block does.

    Args:
        name: The moment, such as `reconnect`.
    """
    hook = _Hook(name)
    token = HOOK.set(hook)
    try:
        yield
    finally:
        hook.ended = True
        HOOK.reset(token)


def hook_of_caller() -> str | None:
    """Return the moment of the hook that this is a part of; None outside of one."""
    hook = HOOK.get()
    return None if hook is None or hook.ended else hook.name
