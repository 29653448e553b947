"""A pair of peers with programmed calls between them, and what must hold whatever happens to them.

A `Spec` says what a caller does and what its handler does; `World.start` makes a call of it. Both
ends run in this process, so a handler finds its own program by the number that the call carries,
and reports to the same `Call` as the caller does. `World.check` says what must hold after every
turn of the loop, and more of it when nothing is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from conduit.exceptions import ConnectionClosed, InternalError, Overloaded, RPCTimeout
from conduit.transport.loop import Shared
from conduit.transport.requests import DEFAULT, Default
from conduit.transport.stream_call import StreamCall
from conduit.transport.streaming import Stream
from conduit.transport.threads import ThreadFuture
from tests.transport.life_calls import (
    BRIEF,
    MESSAGES,
    METHODS,
    ROUNDING,
    SILENCE,
    STREAMS,
    USUAL,
    Call,
    FailedOnPurpose,
    LeftByError,
    SourceFailed,
    Spec,
)
from tests.transport.life_checks import (
    check_agreement,
    check_credit,
    check_nothing_open,
    check_tables,
)
from tests.transport.pair import Pair, Side
from tests.transport.virtual_loop import VirtualLoop


class World:
    """Two peers, and every call that was made between them.

    Attributes:
        problems: What went wrong where nobody could raise it.
        tasks: The callers that have not ended, by their calls.
        may_end: Whether somebody has closed or cut, or stopped reading for long.
        sound: Whether all checks have held so far.
    """

    def __init__(self, loop: VirtualLoop, pair: Pair, *, backpressure: bool) -> None:
        self.loop = loop
        self.pair = pair
        self.sides = (pair.client, pair.server)
        self.backpressure = backpressure
        self.calls: list[Call] = []
        self.tasks: dict[asyncio.Task[None], Call] = {}
        self.problems: list[str] = []
        self.gates: list[asyncio.Future[None]] = []
        self.thread_gates: list[threading.Event] = []
        self.in_threads = 0
        self.may_end = False
        self.stalled_since = [math.inf, math.inf]
        self.sound = True
        for side in self.sides:
            self._register(side)

    def other(self, side: Side) -> Side:
        return self.pair.server if side is self.pair.client else self.pair.client

    # Handlers.

    def _register(self, side: Side) -> None:
        async def act(number: int, ballast: bytes) -> Any:
            call = self.calls[number]
            with self._handles(call):
                for step in call.spec.plan:
                    await self.step(call, side, step)
                return [number, ballast]

        def act_inline(number: int, ballast: bytes) -> Any:
            call = self.calls[number]
            with self._handles(call):
                for step in call.spec.plan:
                    _fail(call, step)
                return [number, ballast]

        def act_in_thread(number: int, ballast: bytes) -> Any:
            call = self.calls[number]
            with self._handles(call):
                for step in call.spec.plan:
                    if step[0] == "wait":
                        self._wait_in_thread()
                    _fail(call, step)
                return [number, ballast]

        side.rpc("call")(act)
        side.rpc("brief", timeout=BRIEF)(act)
        side.rpc("inline", thread=False)(act_inline)
        side.rpc("thread")(act_in_thread)
        self._register_streams(side)
        self._register_messages(side, act, act_in_thread)

    def _register_streams(self, side: Side) -> None:
        async def give(number: int, ballast: bytes) -> AsyncIterator[Any]:
            call = self.calls[number]
            with self._handles(call):
                async with aclosing(self._given(call, side)) as items:
                    async for item in items:
                        yield item

        async def take(number: int, ballast: bytes, items: AsyncIterator[Any]) -> Any:
            call = self.calls[number]
            with self._handles(call):
                for step in call.spec.plan:
                    await self._take(call, step, items)
                    await self.step(call, side, step)
                return [number, ballast]

        async def both(
            number: int, ballast: bytes, items: AsyncIterator[Any]
        ) -> AsyncIterator[Any]:
            call = self.calls[number]
            with self._handles(call):
                async with aclosing(self._given(call, side, items)) as given:
                    async for item in given:
                        yield item

        async def feed(number: int, ballast: bytes, stream: Stream[Any]) -> Any:
            call = self.calls[number]
            with self._handles(call):
                async with aclosing(self._given(call, side)) as items:
                    async for item in items:
                        await stream.send(item)
                return [number, ballast]

        for method in (give, take, both, feed):
            side.rpc(method)

    def _register_messages(self, side: Side, act: Any, act_in_thread: Any) -> None:
        async def note(message: Any) -> Any:
            return await act(*message)

        async def aside(message: Any) -> Any:
            return await act(*message)

        def note_in_thread(message: Any) -> Any:
            return act_in_thread(*message)

        async def answered(message: Any) -> None:
            await asyncio.sleep(0)

        async def news(message: Any) -> None:
            await asyncio.sleep(0)

        def with_client(function: Any) -> Any:
            """Return the handler as a server registers it: with the client before the message."""
            if side is self.pair.client:
                return function
            if asyncio.iscoroutinefunction(function):

                async def handler(client: Any, message: Any) -> Any:
                    return await function(message)

                return handler
            return lambda client, message: function(message)

        side.on("note")(with_client(note))
        side.on("note in a thread")(with_client(note_in_thread))
        side.on("aside", concurrent=True)(with_client(aside))
        side.on("note_response")(with_client(answered))
        side.on("news")(with_client(news))

    @contextlib.contextmanager
    def _handles(self, call: Call) -> Iterator[None]:
        """Count a handler in and out, and see that nobody stops it without a reason."""
        call.begun += 1
        if call.begun > 1:
            self.problems.append(f"handled {call.begun} times: {call}")
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            overdue = self.loop.now >= call.deadline - ROUNDING
            if not (call.given_up or overdue or self.may_end or call.source_fails):
                self.problems.append(f"stopped without a reason: {call}")
            raise
        finally:
            call.ended += 1

    async def step(self, call: Call, side: Side, step: tuple[Any, ...]) -> None:
        """Do what a handler is to do next."""
        kind = step[0]
        if kind == "wait":
            await self._gate()
        elif kind == "pause":
            await asyncio.sleep(0)
        elif kind == "sleep":
            await asyncio.sleep(step[1])
        elif kind == "stubborn":
            try:
                await self._gate()
            except asyncio.CancelledError:
                call.stubborn = True
                await self._gate()
                raise
        elif kind == "then":
            await self._call_from(call, side, step[1])
        elif kind == "leave behind":
            self.start(side, step[1], call)
        elif kind == "close":
            self.may_end = True
            await side.connection.close()
        else:
            _fail(call, step)

    async def _call_from(self, call: Call, side: Side, spec: Spec) -> None:
        """Call from a handler, in a way that lets both sides go on in the end.

        The handler of a message holds up those behind it. Two sides that each wait in such a
        handler for what the other has not come to yet wait for ever, if they have no deadline.
        """
        if call.holds_up:
            if spec.kind == "send":
                self.start(side, spec, call)
                return
            if spec.timeout is None:
                spec = spec._replace(timeout=DEFAULT)
        await self.perform(self._new(side, spec, call))

    async def _gate(self) -> None:
        gate = self.loop.create_future()
        self.gates.append(gate)
        await gate

    def _wait_in_thread(self) -> None:
        gate = threading.Event()
        self.in_threads += 1
        self.thread_gates.append(gate)
        self.loop.call_soon_threadsafe(_nothing)
        gate.wait()

    async def _given(
        self, call: Call, side: Side, items: AsyncIterator[Any] | None = None
    ) -> AsyncGenerator[Any, None]:
        for step in call.spec.plan:
            if step[0] == "give":
                for _ in range(step[1]):
                    call.given += 1
                    yield [call.given - 1, bytes(call.spec.size)]
            else:
                if items is not None:
                    await self._take(call, step, items)
                await self.step(call, side, step)

    async def _take(self, call: Call, step: tuple[Any, ...], items: AsyncIterator[Any]) -> None:
        if step[0] == "take":
            count = 0
            async for index, _ in items:
                if index != call.taken:
                    self.problems.append(f"item {index} in place of {call.taken}: {call}")
                call.taken += 1
                count += 1
                if count == step[1]:
                    return
            if call.taken != call.sent and not call.given_up:
                self.problems.append(f"{call.taken} of {call.sent} items came: {call}")

    # Callers.

    def _new(self, side: Side, spec: Spec, parent: Call | None = None) -> Call:
        call = Call(len(self.calls), side, spec, parent)
        self.calls.append(call)
        return call

    def start(self, side: Side, spec: Spec, parent: Call | None = None) -> None:
        """Make a call in a task of its own."""
        call = self._new(side, spec, parent)
        call.detached = True
        task = self.loop.create_task(self._perform_alone(call))
        self.tasks[task] = call
        task.add_done_callback(self._performed)

    def _performed(self, task: asyncio.Task[None]) -> None:
        call = self.tasks.pop(task)
        if task.cancelled():  # before its first step
            self._came(call, "cancelled", allowed=call.cancelled)
        elif task.exception() is not None:
            self.problems.append(f"{task.exception()!r}: {call}")

    async def _perform_alone(self, call: Call) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self.perform(call)

    async def perform(self, call: Call) -> None:
        """Make a call, and judge what comes of it."""
        self._bound(call)
        try:
            value = await (self._stream(call) if call.spec.kind in STREAMS else self._unary(call))
        except asyncio.CancelledError:
            nested = call.parent is not None and not call.detached
            self._came(call, "cancelled", allowed=call.cancelled or nested)
            raise
        except Exception as error:  # noqa: BLE001  # judged
            self._came(call, repr(error), allowed=self._may_raise(call, error))
        else:
            self._came(call, "value", allowed=self._may_return(call, value))

    def _bound(self, call: Call) -> None:
        timeout = call.spec.timeout
        if call.spec.kind == "send":
            timeout = None
        elif call.spec.kind == "ack":
            timeout = USUAL
        elif isinstance(timeout, Default):
            timeout = None if call.spec.kind in STREAMS else USUAL
        if timeout is not None:
            call.deadline = self.loop.now + timeout
            if call.spec.kind not in STREAMS:  # whose consumers wait for other things as well
                call.latest = call.deadline
        if call.spec.kind == "brief":
            call.deadline = min(call.deadline, self.loop.now + BRIEF)
        parent = call.parent
        if parent is not None and not call.detached and parent.spec.kind in METHODS:
            call.deadline = min(call.deadline, parent.deadline)

    async def _unary(self, call: Call) -> Any:
        spec, connection = call.spec, call.side.connection
        message = [call.number, bytes(spec.size)]
        if spec.kind == "send":
            return await connection.send("note", message)
        if spec.kind == "ack":
            return await connection.send("note", message, ack=True)
        if spec.kind in MESSAGES:
            name = "note" if spec.kind == "request" else spec.kind
            return await connection.request(name, message, timeout=spec.timeout)
        return await connection.rpc.call(spec.kind, message, timeout=spec.timeout)

    async def _stream(self, call: Call) -> Any:
        spec = call.spec
        args: dict[str, Any] = {"number": call.number, "ballast": bytes(spec.size)}
        if spec.kind in ("take", "both"):
            args["items"] = self._source(call)
        timeout = None if isinstance(spec.timeout, Default) else spec.timeout
        how, count = spec.consumer
        if how == "plain":
            async for item in call.side.stream(spec.kind, args, timeout=timeout):
                if self._saw(call, item, count):
                    call.leaving = True
                    break
            return None
        async with call.side.stream(spec.kind, args, timeout=timeout) as run:
            try:
                return await self._consume(call, run, how, count)
            except asyncio.CancelledError:
                call.leaving = True
                raise

    async def _consume(self, call: Call, run: StreamCall[Any, Any], how: str, count: int) -> Any:
        if how != "result":
            async for item in run:
                if self._saw(call, item, count):
                    break
        if how == "wait":
            await self._gate()
        if how in ("leave", "raise"):
            call.leaving = True
        if how == "raise":
            raise LeftByError
        return None if how == "leave" else await run.result()

    def _saw(self, call: Call, item: Any, count: int) -> bool:
        if item[0] != call.seen:
            self.problems.append(f"item {item[0]} in place of {call.seen}: {call}")
        call.seen += 1
        return call.seen == count

    async def _source(self, call: Call) -> AsyncIterator[Any]:
        call.source_open += 1
        try:
            for step in call.spec.source:
                if step[0] == "give":
                    for _ in range(step[1]):
                        call.sent += 1
                        yield [call.sent - 1, bytes(call.spec.size)]
                elif step[0] == "raise":
                    raise SourceFailed(call.number)
                elif step[0] == "wait":
                    await self._gate()
                elif step[0] == "sleep":
                    await asyncio.sleep(step[1])
        finally:
            call.source_open -= 1

    # Judgement.

    def _came(self, call: Call, outcome: str, *, allowed: bool) -> None:
        if call.outcome is not None:
            self.problems.append(f"{outcome} after {call.outcome}: {call}")
        elif not allowed:
            self.problems.append(f"{outcome} at {self.loop.now}: {call}")
        call.outcome = outcome

    def _may_return(self, call: Call, value: Any) -> bool:
        spec = call.spec
        if call.leaving:
            return value is None
        if spec.kind == "send":
            return value is None
        expected = None if spec.kind in ("ack", "give", "both") else [call.number, bytes(spec.size)]
        if spec.consumer[0] == "plain" and spec.kind in STREAMS:
            expected = None
        whole = spec.consumer[0] in ("all", "plain") and not spec.consumer[1]
        if spec.kind in STREAMS and whole and call.seen != call.given:
            return False
        return value == expected and call.begun == call.ended == 1 and call.fails is None

    def _may_raise(self, call: Call, error: Exception) -> bool:
        if isinstance(error, FailedOnPurpose):
            return call.fails == "raise" and error.number == call.number and call.begun == 1
        if isinstance(error, InternalError):
            return call.fails == "bug" and call.begun == 1
        if isinstance(error, RPCTimeout):
            return self.loop.now >= call.deadline - ROUNDING
        if isinstance(error, Overloaded):
            refused_here = "running here already" not in str(error)
            return refused_here and (call.parent is not None or not self.backpressure)
        if isinstance(error, ConnectionClosed):
            return call.side.connection.closed and self.may_end
        if isinstance(error, SourceFailed):
            return call.source_fails
        return isinstance(error, LeftByError) and call.leaving

    def open_gates(self) -> bool:
        """Let go on whatever waits for a gate; True if something did."""
        closed = [gate for gate in self.gates if not gate.done()]
        closed_to_threads = [gate for gate in self.thread_gates if not gate.is_set()]
        for gate in closed:
            gate.set_result(None)
        for event in closed_to_threads:
            event.set()
        return bool(closed or closed_to_threads)

    @property
    def busy(self) -> bool:
        """Whether a caller, a handler or a queue of messages goes on."""
        connections = [side.connection for side in self.sides]
        queued = any(
            one._messages._reliable or one._inbox._inbox or one._inbox._best_effort
            for one in connections
        )
        return queued or bool(self.tasks) or any(call.begun > call.ended for call in self.calls)

    @property
    def quiet(self) -> bool:
        """Whether both peers are connected and nothing is under way between them."""
        return (
            not self.loop.ready
            and self.threads_are_quiet()
            and all(side.link.quiet and side.is_joined for side in self.sides)
        )

    def threads_are_quiet(self) -> bool:
        """Whether every handler in a thread waits for a gate."""
        suspended = Shared.of(self.loop).handling.suspended
        running = [future for future in suspended if isinstance(future, ThreadFuture)]
        waiting = sum(not gate.is_set() for gate in self.thread_gates)
        begun = sum(
            call.begun > call.ended
            for call in self.calls
            if call.spec.kind in ("thread", "note in a thread")
        )
        return begun == waiting and len(running) <= waiting

    def check(self) -> None:
        """Fail unless all is as it must be."""
        self.sound = False
        self._check()
        self.sound = True

    def _check(self) -> None:
        assert not self.problems, self.problems
        assert not self.loop.errors, self.loop.errors
        for index, side in enumerate(self.sides):
            if self.loop.now - self.stalled_since[index] >= SILENCE:
                self.may_end = True
            if side.connection.closed:
                assert self.may_end, side.connection.reason
            assert len(side.endings) == side.connection.closed
            check_credit(side, self.other(side).connection)
            check_tables(side.connection)
        if not self.loop.ready and self.threads_are_quiet():
            for call in self.calls:
                assert call.outcome is not None or call.latest >= self.loop.now, f"late: {call}"
                self._check_stopped(call)
        if self.quiet:
            self._check_quiet()

    def _check_stopped(self, call: Call) -> None:
        """A handler ends with its connection; only messages are handled behind a polite end."""
        connection = self.other(call.side).connection
        polite = connection.handling and call.spec.kind in MESSAGES
        if connection.closed and not polite and "thread" not in call.spec.kind:
            assert call.begun == call.ended or call.stubborn, f"the handler goes on: {call}"

    def _check_quiet(self) -> None:
        """Nothing is under way, so nobody goes on who has been told to stop."""
        for side in self.sides:
            check_agreement(side.connection, self.other(side).connection)
        for call in self.calls:
            over = call.outcome is not None and call.spec.kind != "send"
            if over and call.begun > call.ended and "thread" not in call.spec.kind:
                assert call.stubborn, f"the handler goes on: {call}"
            if call.outcome is not None:
                assert not call.source_open, f"the caller's items are open: {call}"
        for task, call in self.tasks.items():
            assert not call.cancelled, f"{task!r} was cancelled and goes on: {call}"

    def check_empty(self) -> None:
        """Fail if anything is left of a call: each has ended, on both sides."""
        for call in self.calls:
            assert call.outcome is not None, f"no outcome: {call}"
            assert call.begun == call.ended <= 1, f"the handler goes on: {call}"
            arrived = call.begun or self.may_end or call.outcome != "value"
            assert arrived or call.leaving, f"never handled: {call}"
            assert not call.source_open, f"the caller's items are open: {call}"
        assert not self.tasks
        assert not Shared.of(self.loop).handling.suspended
        for side in self.sides:
            check_nothing_open(side)


def _fail(call: Call, step: tuple[Any, ...]) -> None:
    if step[0] == "raise":
        raise FailedOnPurpose(call.number)
    if step[0] == "bug":
        raise ValueError("on purpose")


def _nothing() -> None:
    """What wakes the loop."""
