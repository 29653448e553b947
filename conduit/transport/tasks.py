"""Run a coroutine's first step at once, without the cost of a new Task.

Most handlers never suspend, and for them a Task that is scheduled, run and thrown away would cost
more than everything else. But a handler must not run bare either: without a current task
`asyncio.timeout`, `TaskGroup` and `wait_for` do not work.

From Python 3.12 on asyncio has the answer, a Task that starts eagerly. Before that, `Starter` keeps
one spare Task per event loop and lends its identity, by the functions that asyncio documents for
makers of tasks ("Extending asyncio" in Python's library reference). A coroutine that ends in its
first step gives the identity back. One that suspends keeps the Task, which carries it on to its
end, and the next coroutine gets a new spare. So whatever a coroutine has seen as its current task
stays its own as long as it lives.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any

__all__ = ["Start", "Starter", "Suspended"]


class Suspended:
    """What `Starter.start` returns in place of a result that is still to come.

    Attributes:
        future: Will have the result.
    """

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self.future = future


Start = Callable[[Coroutine[Any, Any, Any]], Any]
"""What `Starter.start` is."""

if sys.version_info >= (3, 12):

    class Starter:
        """Starts coroutines on one event loop."""

        __slots__ = ("_loop",)

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._loop = loop

        def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
            """Run a coroutine up to its first suspension.

            Must be called from a callback of the loop, not from inside a task.

            Returns:
                The coroutine's result when it has ended already, or else `Suspended`.

            Raises:
                BaseException: What the coroutine raised in its first step.
            """
            task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=self._loop, eager_start=True)
            if task.done():
                return task.result()
            return Suspended(task)

        def keep(self) -> None:
            """Keep what makes the next start cheap."""

        def release(self) -> None:
            """Keep nothing any more."""

else:
    from asyncio.tasks import (
        _enter_task,  # pyright: ignore[reportPrivateUsage]
        _leave_task,  # pyright: ignore[reportPrivateUsage]
    )

    class Starter:
        """Starts coroutines on one event loop."""

        __slots__ = ("_keeps", "_loop", "_spare")

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._loop = loop
            self._keeps = True
            self._spare: _Carrier | None = None

        def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
            """Run a coroutine up to its first suspension.

            Must be called from a callback of the loop, not from inside a task.

            Returns:
                The coroutine's result when it has ended already, or else `Suspended`.

            Raises:
                BaseException: What the coroutine raised in its first step.
            """
            spare = self._spare
            if spare is None or spare.waiter.done() or (spare.fresh and spare.cancelled):
                self._spare = spare = _Carrier(self._loop)
            loop, task, context = self._loop, spare.task, copy_context()
            _enter_task(loop, task)
            try:
                yielded = context.run(coroutine.send, None)
            except StopIteration as stop:
                if not self._keeps:
                    self.release()
                elif spare.waiter.done() or (spare.fresh and spare.cancelled):
                    # It has cancelled itself and gone on to its end, which cancels any Task.
                    raise asyncio.CancelledError from None
                return stop.value
            except BaseException:
                if not self._keeps:
                    self.release()
                raise
            finally:
                _leave_task(loop, task)
            self._spare = None
            spare.carry(coroutine, context, yielded)
            return Suspended(task)

        def keep(self) -> None:
            """Keep what makes the next start cheap."""
            self._keeps = True

        def release(self) -> None:
            """Keep nothing any more."""
            self._keeps = False
            if self._spare is not None:
                self._spare.end()
                self._spare = None

    class _Carrier(Coroutine[Any, Any, Any]):
        """The body of a spare Task: waits until it is given a suspended coroutine to carry on.

        Attributes:
            task: The Task.
            fresh: Whether the Task has not run its first step yet.
            waiter: What it waits on. Done when it carries a coroutine, or was cancelled, by whom it
                was lent to or by who ends the loop.
        """

        __slots__ = (
            "_accepted",
            "_context",
            "_coroutine",
            "_resumed",
            "_yielded",
            "fresh",
            "task",
            "waiter",
        )

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.waiter: asyncio.Future[None] = loop.create_future()
            self.fresh = True
            self._coroutine: Coroutine[Any, Any, Any] | None = None
            self._context: Context | None = None
            self._yielded: Any = None
            self._accepted = False
            self._resumed = False
            # In a context of its own, which remembers nobody; each coroutine brings its own.
            self.task: asyncio.Task[Any] = Context().run(loop.create_task, self)

        @property
        def cancelled(self) -> bool:
            """Whether the Task will be cancelled in its first step; later `done` tells."""
            return bool(self.task._must_cancel)  # type: ignore[attr-defined]

        def carry(
            self, coroutine: Coroutine[Any, Any, Any], context: Context, yielded: Any
        ) -> None:
            self._coroutine, self._context, self._yielded = coroutine, context, yielded
            if getattr(yielded, "_asyncio_future_blocking", False):
                # Accepted at once, as a Task would, or nobody else could wait for it until then.
                self._accepted = True
                yielded._asyncio_future_blocking = False
            if not self.waiter.done():
                self.waiter.set_result(None)

        def end(self) -> None:
            """End the Task, which nobody needs; that is cheaper than to cancel it."""
            del self.task  # which knows this carrier, and would be freed by collections only
            if not self.waiter.done():
                self.waiter.set_result(None)

        def send(self, value: Any) -> Any:
            self.fresh = False
            if self._coroutine is None:
                return next(self.waiter.__await__())
            if not self._resumed:
                return self._take_over()
            assert self._context is not None
            return self._context.run(self._coroutine.send, value)

        def _take_over(self) -> Any:
            """Return what the coroutine waits for, which the Task waits for from now on."""
            self._resumed = True
            yielded, self._yielded = self._yielded, None
            if self._accepted:
                yielded._asyncio_future_blocking = True
            return yielded

        def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
            error = typ if val is None else val
            self.fresh = False
            if self._coroutine is None:
                self.waiter.cancel()
                raise error
            if not self._resumed:
                # Cancelled before it waited: cancel what the coroutine waits for, as a Task would.
                waits_for = self._take_over()
                if self._accepted and waits_for.cancel(*error.args):
                    return waits_for
            assert self._context is not None
            return self._context.run(self._coroutine.throw, error)

        def close(self) -> None:
            if self._coroutine is not None:
                self._coroutine.close()

        def __await__(self) -> Generator[Any, Any, Any]:
            raise TypeError("a carrier is the body of a Task and cannot be awaited")
