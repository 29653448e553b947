"""The functions that an application wants called when something happens."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .exceptions import RPCError

__all__ = ["Hooks"]

F = TypeVar("F", bound=Callable[..., Any])


class Hooks:
    """Hooks by the name of the moment; plain and async functions alike.

    Args:
        logger: Where hooks that fail are reported.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._hooks: dict[str, list[Callable[..., Any]]] = {}

    def decorator(self, name: str, function: Any) -> Any:
        """Serve `@on_something` and `@on_something()` alike."""

        def register(function: F) -> F:
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
            result = hook(*args)
            if asyncio.iscoroutine(result):
                await result
        except RPCError as exc:  # a refusal in so many words, and no fault of the hook
            self._logger.info("the hook on_%s %r refuses with %s", name, hook, type(exc).__name__)
            raise
        except asyncio.CancelledError as exc:
            if _is_cancelled():
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
