"""The calls that carry an idempotency key: each runs once, however often it arrives.

A call is known by who makes it, its method and its key. The first one that arrives starts the
handler, in a task that belongs to no connection; whoever comes while it runs waits for the same
answer, and whoever comes later gets it from the store. So a caller that has lost its session may
make the call again over the next one, and the handler does not notice.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any, Final, Literal

import msgpack

from ..exceptions import CallCancelled, IdempotencyMismatch, RPCError, RPCTimeout, Unavailable
from ..idempotency import IdempotencyStore, MemoryStore
from ..protocol.payload import UNSENDABLE, Encoder
from .answers import Response
from .handling import Handled, PartOf, work_for
from .running import Handler, again, as_rpc_error, is_let_out, text_of
from .threads import ThreadFuture, run_in_thread

__all__ = ["KEPT", "Keyed"]

logger = logging.getLogger("conduit.connection")

KEPT: Final = 600.0
"""Seconds for which answers are kept by default."""
MOST_LEFT: Final = 1000
"""Handlers that go on although the connections of all their callers have ended."""
CLEAN_UP: Final = 1.0
"""Seconds that handlers have for their clean-up when they are stopped."""
KEEPING: Final = 10.0
"""Seconds that the store has to keep an answer, for which its callers wait."""

_Answer = Response[Any] | RPCError


class Keyed:
    """The calls with a key that one side serves, over all of its connections.

    Args:
        store: Keeps the answers; the memory of this process by default.
        ttl: Seconds for which it keeps each.
    """

    def __init__(self, store: IdempotencyStore | None = None, ttl: float = KEPT) -> None:
        self._store = MemoryStore() if store is None else store
        self._ttl = ttl
        self._runs: dict[str, _Run] = {}
        self._left: set[_Run] = set()

    def once(self, handler: Handler, handled: Handled, encoder: Encoder, *, debug: bool) -> Handler:
        """Return what handles a call in place of its handler, which it runs at most once.

        Args:
            handler: The handler.
            handled: The call.
            encoder: Packs what is kept.
            debug: Whether callers are shown the tracebacks of handlers that fail.
        """
        return _Once(self, handler, handled, encoder, debug)

    async def answer(self, once: _Once, params: Any) -> Any:
        """Return the answer to a call: run its handler, wait for the one that runs, or look it up.

        Cancelling it stops the handler if nobody else waits, unless the connection has ended:
        then its caller may come over another one, and the handler has until the deadline.

        Raises:
            IdempotencyMismatch: The key belongs to a call with other parameters.
            RPCError: What the handler has raised.
            Unavailable: The store cannot be asked.
        """
        handled = once.handled
        name = _digest([handled.connection.identity, once.name, handled.key])
        parameters = _digest(_sorted(params))
        run = self._runs.get(name)
        while run is not None and run.stopping:
            await asyncio.wait([run.task])
            run = self._runs.get(name)
        if run is None:
            run = self._runs[name] = _Run(handled, parameters)
            run.task = asyncio.get_running_loop().create_task(self._find(name, run, once, params))
            run.task.add_done_callback(partial(self._ended, name, run))
        elif run.parameters != parameters:
            raise _mismatch(handled)
        answer = await self._wait(run, handled)
        if isinstance(answer, RPCError):
            raise RPCError.from_wire(answer.code, answer.message, answer.to_wire())
        return answer if answer.headers else answer.value

    async def drain(self, grace: float, spared: asyncio.Future[Any] | None) -> None:
        """Let the handlers end, and stop what is left.

        Args:
            grace: Seconds that they have.
            spared: The handler that waits for the drain itself, if one does.
        """
        await self._end(grace, spared)
        for run in list(self._runs.values()):
            if run.task is not spared:
                run.stop(Unavailable("the server stops", details={"retryable": True}))
        await self._end(CLEAN_UP, spared)
        for run in list(self._runs.values()):
            if run.task is not spared and not run.running:
                run.task.cancel()  # its store still keeps the answer, or never will
        await self._end(CLEAN_UP, spared)

    async def _end(self, seconds: float, spared: asyncio.Future[Any] | None) -> None:
        tasks = {run.task for run in self._runs.values()} - {spared}
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def _wait(self, run: _Run, handled: Handled) -> _Answer:
        self._left.discard(run)
        run.join(handled)
        try:
            return await asyncio.shield(run.answer)
        except asyncio.CancelledError:
            if run.waiting == 1 and not run.answer.done():
                if handled.connection.closed and len(self._left) < MOST_LEFT:
                    self._left.add(run)
                    run.go_on(self._ttl)
                elif run.running:
                    run.stop(handled.stopped)
                    # A call has its slot until its handler has ended.
                    await asyncio.wait([run.task])
            raise
        finally:
            run.waiting -= 1

    def _ended(self, name: str, run: _Run, task: asyncio.Task[_Answer]) -> None:
        """Tell the answer to those who wait."""
        self._left.discard(run)
        del self._runs[name]
        failed = task.cancelled() or task.exception() is not None
        run.end(run.why_stopped() if failed else task.result())

    async def _find(self, name: str, run: _Run, once: _Once, params: Any) -> _Answer:
        """Look the answer up, or have the handler give it."""
        try:
            kept = await self._store.get(name)
            found = None if kept is None else _unpack(kept)
        except Exception:
            logger.exception("the store of idempotency keys cannot be read")
            details = {"executed": False, "retryable": True}
            return Unavailable("idempotency keys cannot be looked up now", details=details)
        if found is not None:
            parameters, answer = found
            return answer if parameters == run.parameters else _mismatch(run.handled)
        answer, keeps = await self._run(run, once, params)
        if keeps is not None:
            run.running = False  # it has run, so that it is too late to stop it
            await self._keep(name, run, keeps)
        return answer

    async def _keep(self, name: str, run: _Run, answer: bytes) -> None:
        """Have the store keep an answer; a store that never does must not hold up everybody."""
        limit = asyncio.get_running_loop().call_later(KEEPING, run.task.cancel)
        try:
            await self._store.put(name, answer, self._ttl)
        except asyncio.CancelledError:
            text = "the store did not take the answer of %r in time; it may run again"
            logger.error(text, run.handled.name)
        except Exception:
            logger.exception("the answer of %r was not kept; it may run again", run.handled.name)
        finally:
            limit.cancel()

    async def _run(self, run: _Run, once: _Once, params: Any) -> tuple[_Answer, bytes | None]:
        """Run the handler; what is to be kept of the answer stands behind it, if it is."""
        try:
            result = await work_for(run.handled, run.result, once.handler, params)
            answer = _with_headers(result, run.handled.response_headers)
            return answer, _pack(once.encoder, run.parameters, answer)
        except (Exception, asyncio.CancelledError) as exc:
            if run.stopping:
                if not isinstance(exc, (RPCError, asyncio.CancelledError)):
                    logger.exception("handler %r failed after it was stopped", once.name)
                return run.why_stopped(), None
            error = as_rpc_error(exc, once.name, debug=once.debug)
            # Behind a call of its own the handler has begun, and may have done much.
            passes = _may_pass(error) and not is_let_out(exc)
            if isinstance(exc, asyncio.CancelledError) or passes:
                return error, None
            return error, _pack_error(once.encoder, run.parameters, error)


class _Once:
    """Handles one call with a key: it waits for the answer, wherever that comes from."""

    kind: Literal["coroutine", "thread", "inline"] = "coroutine"
    timeout: float | None = None  # the handler's own is that of the run, which may be older
    concurrent = True
    streaming: Any = None
    finish: Callable[[Any], Any] | None = None

    def __init__(
        self, keyed: Keyed, handler: Handler, handled: Handled, encoder: Encoder, debug: bool
    ) -> None:
        self.name = handler.name
        self.guard = handler.guard
        self.handler = handler
        self.handled = handled
        self.encoder = encoder
        self.debug = debug
        self._keyed = keyed

    def start(self, data: Any, connection: Any) -> Coroutine[Any, Any, Any]:
        """Return the answer to the call with these parameters."""
        if self.guard is not None:  # an answer that is kept is for those who may call as well
            self.guard(connection)
        return self._keyed.answer(self, data)


class _Run:
    """A handler that runs for one or more calls with the same key.

    Args:
        handled: The first of the calls.
        parameters: The hash of its parameters.

    Attributes:
        handled: What the handler can know of its call.
        parameters: As above.
        answer: Will have the answer.
        task: Runs the handler.
        thread: The same, when the handler runs in a thread.
        running: Whether it can be stopped.
        stopping: Whether it was.
        waiting: How many calls wait for the answer.
    """

    def __init__(self, handled: Handled, parameters: str) -> None:
        self.handled = Handled(
            handled.connection,
            handled.name,
            handled.deadline,
            handled.headers,
            key=handled.key,
        )
        self.parameters = parameters
        self.answer: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[_Answer]
        self.thread: ThreadFuture | None = None
        self.running = True
        self.stopping = False
        self.waiting = 0
        self._limit: float | None = None
        self._limited: asyncio.TimerHandle | None = None
        self._abandoned: asyncio.TimerHandle | None = None

    async def result(self, handler: Handler, params: Any) -> Any:
        """Run the handler and return its result as plain data."""
        loop, seconds = asyncio.get_running_loop(), handler.timeout
        if seconds is not None:  # no more time than this, whoever waits
            self._limit = monotonic() + seconds
            self._limited = loop.call_later(seconds, self.stop, _too_late(handler.name))
        work = handler.start(params, self.handled.connection)
        if handler.kind == "coroutine":
            work = await work
        elif handler.kind == "thread":
            self.thread = run_in_thread(loop, partial(PartOf(self.handled).run, work))
            work = await self.thread
        return work if handler.finish is None else handler.finish(work)

    def join(self, handled: Handled) -> None:
        """Wait for the handler as well: it has as much time as the most patient of its callers."""
        self.waiting += 1
        if self._abandoned is not None:
            self._abandoned.cancel()
            self._abandoned = None
        mine, theirs = self.handled.deadline, handled.deadline
        later = None if mine is None or theirs is None else max(mine, theirs)
        if self._limit is not None:
            later = self._limit if later is None else min(later, self._limit)
        self.handled.deadline = later

    def go_on(self, most: float) -> None:
        """Go on although nobody waits: until the deadline, or `most` seconds."""
        deadline = self.handled.deadline
        seconds = most if deadline is None else min(most, max(0.0, deadline - monotonic()))
        stop = partial(self.stop, _too_late(self.handled.name))
        self._abandoned = asyncio.get_running_loop().call_later(seconds, stop)

    def stop(self, reason: RPCError | None) -> None:
        """End the handler; a thread cannot be ended and is only told, when it asks."""
        if self.running and not self.stopping:
            self.stopping = True
            self.handled.stopped = reason
            if self.thread is not None:
                self.thread.leave_queue()
            else:
                self.task.cancel()

    def why_stopped(self) -> RPCError:
        """Return what those are told who still wait."""
        stopped = self.handled.stopped
        return _cancelled(self.handled.name) if stopped is None else again(stopped)

    def end(self, answer: _Answer) -> None:
        """Tell the answer to those who wait."""
        for timer in (self._limited, self._abandoned):
            if timer is not None:
                timer.cancel()
        if not self.answer.done():
            self.answer.set_result(answer)


def _with_headers(result: Any, headers: dict[str, Any] | None) -> Response[Any]:
    if type(result) is Response:
        return Response(result.value, {**(headers or {}), **(result.headers or {})})
    return Response(result, headers)


def _may_pass(error: RPCError) -> bool:
    """Whether an error is no answer, because the same call may succeed, or was not made."""
    passing = isinstance(error, Unavailable)
    details = error.details if isinstance(error.details, dict) else {}  # it can be set to anything
    return details.get("executed") is False or bool(details.get("retryable", passing))


def _pack(encoder: Encoder, parameters: str, answer: Response[Any]) -> bytes:
    headers = dict(answer.headers or {})
    try:
        return bytes(encoder.pack([parameters, answer.value, headers]))
    except UNSENDABLE as exc:
        raise encoder.explained(exc, answer.value) from exc


def _pack_error(encoder: Encoder, parameters: str, error: RPCError) -> bytes:
    told = [parameters, error.code, text_of(error.message)]
    try:
        return bytes(encoder.pack([*told, error.to_wire()]))
    except UNSENDABLE:
        logger.exception("the details of %s cannot be kept", type(error).__name__)
        return bytes(encoder.pack([*told, {}]))


def _unpack(kept: bytes) -> tuple[str, _Answer]:
    """Read what `_pack` or `_pack_error` has made."""
    parameters, *rest = msgpack.unpackb(kept, strict_map_key=False)
    if len(rest) == 3:
        return parameters, RPCError.from_wire(*rest)
    value, headers = rest
    return parameters, Response(value, headers)


def _digest(value: Any) -> str:
    """Return a hash of plain data as 64 hexadecimal digits."""
    return hashlib.sha256(msgpack.packb(value)).hexdigest()


def _sorted(value: Any) -> Any:
    """Return parameters with all maps in one order."""
    if type(value) is dict:
        return {key: _sorted(value[key]) for key in sorted(value, key=repr)}
    if type(value) is list:
        return [_sorted(one) for one in value]
    return value


def _cancelled(name: str) -> CallCancelled:
    return CallCancelled(f"{name!r} was cancelled by the side that ran it")


def _too_late(name: str) -> RPCTimeout:
    return RPCTimeout(f"{name!r} did not end in time")


def _mismatch(handled: Handled) -> IdempotencyMismatch:
    return IdempotencyMismatch(
        f"the key {handled.key!r} belongs to a call of {handled.name!r} with other parameters; "
        "take a new key for another call",
        details={"executed": False},
    )
