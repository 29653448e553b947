"""The functions that an application wants called when something happens."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .exceptions import RPCError
from .transport.hooked import hooked

__all__ = ["Hooks", "check_hook"]

F = TypeVar("F", bound=Callable[..., Any])

_GIVEN = {
    "startup": ("server",),
    "shutdown": ("server",),
    "client_connect": ("connection",),
    "client_away": ("connection", "reason"),
    "client_return": ("connection",),
    "client_disconnect": ("connection", "reason"),
    "connect": ("client",),
    "disconnect": ("client", "reason"),
    "resume": ("client",),
    "lost": ("client", "reason"),
    "reconnect": ("client",),
}
"""What the hooks of each moment are called with."""


class Hooks:
    """Hooks by the name of the moment; plain and async functions alike.

    Args:
        logger: Where hooks that fail are reported.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._hooks: dict[str, list[Callable[..., Any]]] = {}

    def decorator(self, name: str, function: Any) -> Any:
        """Serve `@on_something` and `@on_something()` alike.

        Raises:
            TypeError: The function does not take what hooks of this moment are given.
        """

        def register(function: F) -> F:
            check_hook(name, function)
            self._hooks.setdefault(name, []).append(function)
            return function

        return register if function is None else register(function)

    def __contains__(self, name: str) -> bool:
        return name in self._hooks

    async def ask(self, name: str, *args: Any) -> None:
        """Run the hooks of a moment in order; the first that fails is logged, and raises."""
        for hook in self._hooks.get(name, ()):
            await self._call(name, hook, args)

    async def tell(self, name: str, *args: Any) -> None:
        """Run the hooks of a moment in order; one that fails is logged and harms nothing."""
        for hook in self._hooks.get(name, ()):
            try:
                await self._call(name, hook, args)
            except Exception:  # noqa: BLE001  # logged by _call
                continue

    async def _call(self, name: str, hook: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            with hooked(name):
                result = hook(*args)
                if asyncio.iscoroutine(result):
                    await result
        except RPCError as exc:  # a refusal in so many words, and no fault of the hook
            self._logger.info("the hook on_%s %r refuses with %s", name, hook, type(exc).__name__)
            raise
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                self._logger.warning("the hook on_%s %r was cancelled before its end", name, hook)
                raise
            text = f"the hook on_{name} has waited for something that was cancelled"
            self._logger.exception("the hook on_%s %r failed", name, hook)
            raise RuntimeError(text) from exc
        except Exception:
            self._logger.exception("the hook on_%s %r failed", name, hook)
            raise


def _is_cancelled() -> bool:
    """Whether somebody has cancelled this task; before Python 3.11 nobody can tell."""
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        return task is None or task.cancelling() > 0
    else:
        return True


def check_hook(name: str, function: Any) -> None:
    """Refuse a hook that could not be called, when it is registered and not when it is wanted."""
    given = _GIVEN[name]
    if not callable(function):
        raise TypeError(f"the hook on_{name} must be a function, not {function!r:.80}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some of what is built in does not tell
        return
    try:
        signature.bind(*given)
    except TypeError:
        called = getattr(function, "__qualname__", repr(function))
        raise TypeError(
            f"the hook on_{name} {called} must take ({', '.join(given)}), not {signature}"
        ) from None
