"""`Starter`: what it starts must behave as a Task does, whether it suspends or not.

Before Python 3.12 a coroutine's first step runs under the name of a spare Task, which may be new
(its own first step is still to come) or waiting since an earlier batch. Every test runs with both.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import subprocess
import sys
import types
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from conduit.transport.tasks import Starter, Suspended
from tests.conftest import LOOP
from tests.transport.pair import run, turns, within

ROOT = Path(__file__).resolve().parents[2]

since_3_11 = pytest.mark.skipif(sys.version_info < (3, 11), reason="new in Python 3.11")


async def in_callback(function: Callable[[], Any]) -> Any:
    """Run a function in a callback of the loop, as a transport runs its protocol."""
    ran = asyncio.Event()
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        assert asyncio.current_task() is None
        try:
            results.append(function())
        except BaseException as exc:  # noqa: BLE001  # raised where the function was handed in
            errors.append(exc)
        assert asyncio.current_task() is None, "the task of what was started is still current"
        ran.set()

    asyncio.get_running_loop().call_soon(run)
    await within(ran.wait())
    if errors:
        raise errors[0]
    return results[0]


@pytest.fixture(params=["new spare", "waiting spare"])
async def starter(request: pytest.FixtureRequest) -> AsyncIterator[Starter]:
    starter = Starter(asyncio.get_running_loop())
    if request.param == "waiting spare":
        await in_callback(lambda: starter.start(returning(None)))
        await turns(3)
    yield starter
    starter.release()


async def begin(starter: Starter, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Start a coroutine, and return its result or what stands for it."""
    return await in_callback(lambda: starter.start(coroutine))


async def finish(starter: Starter, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Start a coroutine and wait for its result."""
    started = await begin(starter, coroutine)
    return await within(started.future) if isinstance(started, Suspended) else started


async def returning(value: Any) -> Any:
    return value


async def raising(error: BaseException) -> None:
    raise error


# Results


@pytest.mark.parametrize(
    "value", [None, 0, "text", (1, 2), [3], ValueError("a value"), StopIteration(4)], ids=repr
)
async def test_the_result_of_a_coroutine_that_does_not_suspend_is_there_at_once(
    starter: Starter, value: Any
) -> None:
    assert await begin(starter, returning(value)) is value


async def test_what_a_coroutine_raises_at_once_is_raised(starter: Starter) -> None:
    error = ValueError("no")
    with pytest.raises(ValueError) as caught:
        await begin(starter, raising(error))
    assert caught.value is error
    assert caught.traceback[-1].name == "raising"
    assert await begin(starter, returning(1)) == 1


async def test_a_stop_iteration_is_an_error_and_not_a_result(starter: Starter) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        await begin(starter, raising(StopIteration(5)))


async def test_the_result_of_a_coroutine_that_suspends_comes_later(starter: Starter) -> None:
    gate = asyncio.Event()

    async def waits() -> str:
        await gate.wait()
        return "done"

    started = await begin(starter, waits())
    assert type(started) is Suspended
    await turns()
    assert not started.future.done()
    gate.set()
    assert await within(started.future) == "done"


async def test_what_a_coroutine_raises_later_is_in_its_future(starter: Starter) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("later")

    started = await begin(starter, fails())
    with pytest.raises(ValueError, match="later"):
        await within(started.future)


async def test_a_suspended_coroutine_may_return_what_another_suspended_one_stands_for(
    starter: Starter,
) -> None:
    other = await begin(starter, asyncio.sleep(0, "other"))
    started = await begin(starter, returning(other.future))
    assert started is other.future
    assert await within(other.future) == "other"


# Like a Task: the same outcome, whoever runs it

Log = list[Any]
Outside = Callable[["asyncio.Task[Any]"], object]
CASES: list[Any] = []


def case(outside: Outside | None = None, *marks: pytest.MarkDecorator) -> Any:
    """Register a coroutine whose outcome and notes must not depend on who runs it."""

    def register(function: Callable[[Log], Coroutine[Any, Any, Any]]) -> Any:
        CASES.append(pytest.param(function, outside, marks=marks, id=function.__name__))
        return function

    return register


def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()


def cancel_twice(task: asyncio.Task[Any]) -> None:
    task.cancel()
    task.cancel()


def cancel_with_a_message(task: asyncio.Task[Any]) -> None:
    task.cancel("because")


def me() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@case()
async def sleeps(log: Log) -> str:
    for count in range(5):
        log.append(count)
        await asyncio.sleep(0)
    return "slept"


@case()
async def sleeps_for_a_while(log: Log) -> str:
    await asyncio.sleep(0.001)
    return "slept"


@case()
async def raises_an_exception_after_sleeping(log: Log) -> None:
    await asyncio.sleep(0)
    raise LookupError("gone", 5)


@case()
async def wait_for_a_result(log: Log) -> Any:
    return await asyncio.wait_for(asyncio.sleep(0, "in time"), 5)


@case()
async def wait_for_that_times_out(log: Log) -> str:
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 0.001)
    except asyncio.TimeoutError:
        log.append("timed out")
    await asyncio.sleep(0)
    return "went on"


@case()
async def wait_for_nothing_at_all(log: Log) -> Any:
    try:
        return await asyncio.wait_for(asyncio.Event().wait(), 0)
    except asyncio.TimeoutError:
        return "timed out"


@case(None, since_3_11)
async def timeout_that_is_not_needed(log: Log) -> Any:
    async with asyncio.timeout(5):  # type: ignore[attr-defined, unused-ignore]
        await asyncio.sleep(0)
    return "in time", me().cancelling()  # type: ignore[attr-defined, unused-ignore]


@case(None, since_3_11)
async def timeout_that_fires(log: Log) -> Any:
    try:
        async with asyncio.timeout(0.001):  # type: ignore[attr-defined, unused-ignore]
            await asyncio.Event().wait()
    except TimeoutError:
        log.append("timed out")
    await asyncio.sleep(0)
    return me().cancelling()  # type: ignore[attr-defined, unused-ignore]


@case(None, since_3_11)
async def timeout_that_has_passed(log: Log) -> Any:
    try:
        async with asyncio.timeout(0):  # type: ignore[attr-defined, unused-ignore]
            await asyncio.Event().wait()
    except TimeoutError:
        log.append("timed out")
    return me().cancelling()  # type: ignore[attr-defined, unused-ignore]


@case(None, since_3_11)
async def group_of_tasks(log: Log) -> Any:
    async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined, unused-ignore]
        tasks = [group.create_task(asyncio.sleep(0, count)) for count in range(3)]
    return [task.result() for task in tasks]


@case(None, since_3_11)
async def group_of_tasks_one_of_which_fails(log: Log) -> Any:
    async def fails() -> None:
        raise LookupError("one")

    try:
        async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined, unused-ignore]
            group.create_task(fails())
            await asyncio.Event().wait()
    except BaseException as exc:  # noqa: BLE001  # an exception group, which 3.10 has no name for
        log.append([repr(one) for one in exc.exceptions])  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    return me().cancelling()  # type: ignore[attr-defined, unused-ignore]


@case()
async def gathers(log: Log) -> Any:
    return await asyncio.gather(asyncio.sleep(0, 1), returning(2), asyncio.sleep(0, 3))


@case()
async def shields(log: Log) -> Any:
    return await asyncio.shield(asyncio.sleep(0, "safe"))


@case()
async def waits_for_a_task_of_its_own(log: Log) -> Any:
    return await asyncio.ensure_future(asyncio.sleep(0, "mine"))


@case()
async def runs_through_an_async_generator(log: Log) -> Any:
    async def numbers() -> AsyncGenerator[int, None]:
        try:
            for number in range(5):
                yield number
                await asyncio.sleep(0)
        finally:
            log.append("closed")

    async with contextlib.aclosing(numbers()) as source:
        async for number in source:
            log.append(number)
            if number == 3:
                break
    return "ended"


@case()
async def waits_in_an_async_comprehension(log: Log) -> Any:
    return [await asyncio.sleep(0, number) async for number in ticks(3)]


async def ticks(count: int) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(0)
        yield number


@case()
async def waits_for_what_is_done_already(log: Log) -> Any:
    future = asyncio.get_running_loop().create_future()
    future.set_result("done")
    return await future


@case()
async def awaits_itself(log: Log) -> Any:
    try:
        await me()
    except RuntimeError as exc:
        log.append(type(exc))
    return await asyncio.sleep(0, "went on")


@types.coroutine
def bare(value: Any) -> Any:
    return (yield value)


@case()
async def yields_what_nobody_can_wait_for(log: Log) -> Any:
    try:
        await bare(5)
    except RuntimeError as exc:
        log.append(str(exc).partition(" in ")[0])
    return await asyncio.sleep(0, "went on")


@case(cancel)
async def cancelled_while_it_waits_for_a_future(log: Log) -> None:
    future = asyncio.get_running_loop().create_future()
    try:
        await future
    finally:
        log.append(future.cancelled())


@case(cancel)
async def cancelled_in_a_bare_yield(log: Log) -> None:
    try:
        await asyncio.sleep(0)
    finally:
        log.append("cleaned up")


@case(cancel)
async def cancelled_while_it_waits_for_a_task(log: Log) -> None:
    inner = asyncio.ensure_future(asyncio.Event().wait())
    try:
        await inner
    finally:
        log.append(inner.cancelled())


@case(cancel)
async def cancelled_behind_a_shield(log: Log) -> None:
    inner = asyncio.get_running_loop().create_future()
    try:
        await asyncio.shield(inner)
    finally:
        log.append(inner.cancelled())


@case(cancel)
async def cancelled_in_gather(log: Log) -> None:
    parts = [asyncio.ensure_future(asyncio.Event().wait()) for _ in range(2)]
    try:
        await asyncio.gather(*parts)
    finally:
        log.append([part.cancelled() for part in parts])


@case(cancel)
async def cancelled_in_wait_for(log: Log) -> None:
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 5)
    finally:
        log.append("cleaned up")


@case(cancel, since_3_11)
async def cancelled_in_a_timeout(log: Log) -> None:
    try:
        async with asyncio.timeout(5):  # type: ignore[attr-defined, unused-ignore]
            await asyncio.Event().wait()
    finally:
        log.append(me().cancelling())  # type: ignore[attr-defined, unused-ignore]


@case(cancel, since_3_11)
async def cancelled_in_a_group(log: Log) -> None:
    try:
        async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined, unused-ignore]
            group.create_task(asyncio.Event().wait())
            await asyncio.Event().wait()
    finally:
        log.append(me().cancelling())  # type: ignore[attr-defined, unused-ignore]


@case(cancel)
async def cancelled_and_cleans_up_slowly(log: Log) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        log.append("cleaned up")


@case(cancel)
async def swallows_its_cancellation(log: Log) -> str:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return "stayed"


@case(cancel)
async def swallows_its_cancellation_and_suspends_again(log: Log) -> Any:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return await asyncio.sleep(0.001, "stayed")


@case(cancel_twice)
async def cancelled_twice_at_once(log: Log) -> Any:
    for _ in range(2):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
            log.append("slept")
    return "stayed"


@case(cancel_with_a_message)
async def cancelled_with_a_message(log: Log) -> str:
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError as exc:
        log.append(exc.args)
    return "stayed"


@case(cancel)
async def fails_when_it_is_cancelled(log: Log) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise LookupError("instead") from None


@case()
async def cancels_itself_and_waits(log: Log) -> None:
    me().cancel()
    try:
        await asyncio.Event().wait()
    finally:
        log.append("cleaned up")


@case()
async def cancels_itself_and_yields(log: Log) -> None:
    me().cancel()
    await asyncio.sleep(0)
    log.append("never")


@case()
async def cancels_itself_and_returns(log: Log) -> str:
    me().cancel()
    return "the result"


@case()
async def cancels_itself_and_raises(log: Log) -> str:
    me().cancel()
    raise LookupError("instead")


@case()
async def cancels_itself_and_swallows_it(log: Log) -> Any:
    me().cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    return await asyncio.sleep(0, "stayed")


@case()
async def cancels_itself_after_a_suspension(log: Log) -> None:
    await asyncio.sleep(0)
    me().cancel()
    await asyncio.sleep(0)
    log.append("never")


@case()
async def cancels_itself_after_a_suspension_and_returns(log: Log) -> None:
    await asyncio.sleep(0)
    me().cancel()


@case()
async def raises_a_cancellation_of_its_own(log: Log) -> None:
    raise asyncio.CancelledError("own")


@case(None, since_3_11)
async def cancels_and_uncancels_itself(log: Log) -> Any:
    me().cancel()
    me().uncancel()  # type: ignore[attr-defined, unused-ignore]
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
        log.append("not cancelled")
    return me().cancelling()  # type: ignore[attr-defined, unused-ignore]


async def outcome(awaitable: Any) -> tuple[Any, ...]:
    """Return how something ends, in a form that can be compared."""
    try:
        return "result", await awaitable
    except asyncio.CancelledError:
        return ("cancelled",)
    except Exception as exc:  # noqa: BLE001  # compared
        return type(exc), exc.args


@pytest.mark.parametrize("function, outside", CASES)
async def test_it_is_like_a_task(
    starter: Starter, function: Callable[[Log], Any], outside: Outside | None
) -> None:
    expected_log: Log = []
    task = asyncio.ensure_future(function(expected_log))
    if outside is not None:
        asyncio.get_running_loop().call_soon(outside, task)  # right after the task's first step
    expected = await outcome(within(asyncio.gather(task)))

    def start() -> Any:
        started = starter.start(function(log))
        if outside is not None:
            assert isinstance(started, Suspended)
            outside(started.future)  # type: ignore[arg-type]  # a coroutine's future is its Task
        return started

    async def run() -> Any:
        started = await in_callback(start)
        return await asyncio.gather(started.future) if isinstance(started, Suspended) else [started]

    log: Log = []
    assert (await outcome(within(run())), log) == (expected, expected_log)
    # Whatever it did, the next one is not affected.
    assert await begin(starter, returning("next")) == "next"
    assert await finish(starter, asyncio.sleep(0, "one after it")) == "one after it"
    assert await finish(starter, returning(None)) is None


# The current task


async def test_the_current_task_is_a_real_one_and_stays_the_same(starter: Starter) -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def looks() -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())
        await asyncio.sleep(0.001)
        seen.append(asyncio.current_task())

    started = await begin(starter, looks())
    await within(started.future)
    assert seen == [started.future] * 3
    assert isinstance(started.future, asyncio.Task)


async def test_a_coroutine_that_ends_at_once_has_a_task_as_well(starter: Starter) -> None:
    async def looks() -> Any:
        task = asyncio.current_task()
        assert task is not None
        return type(task), task.done(), task.cancelled(), task in asyncio.all_tasks()

    assert await begin(starter, looks()) == (asyncio.Task, False, False, True)


async def test_coroutines_that_live_at_the_same_time_have_different_tasks(starter: Starter) -> None:
    gate = asyncio.Event()
    passing: list[object] = []

    async def stays() -> object:
        mine = asyncio.current_task()
        await gate.wait()
        assert asyncio.current_task() is mine
        return mine

    async def passes() -> None:
        passing.append(asyncio.current_task())

    def start() -> list[Suspended]:
        started = []
        for _ in range(20):
            starter.start(passes())
            started.append(starter.start(stays()))
            starter.start(passes())
        return started

    started = await in_callback(start)
    living = {one.future for one in started}
    assert len(living) == 20
    # One that passes may be lent the Task of a later one, but never that of one that lives.
    for count in range(20):
        assert passing[2 * count + 1] not in {one.future for one in started[: count + 1]}
    gate.set()
    results = await within(asyncio.gather(*living))
    assert set(results) == living


async def test_nothing_is_current_between_two_coroutines(starter: Starter) -> None:
    def start() -> list[Any]:
        seen = []
        starter.start(returning(1))
        seen.append(asyncio.current_task())
        with pytest.raises(LookupError):
            starter.start(raising(LookupError()))
        seen.append(asyncio.current_task())
        suspended = starter.start(asyncio.sleep(0))
        seen.append(asyncio.current_task())
        return [seen, suspended]

    seen, suspended = await in_callback(start)
    assert seen == [None] * 3
    await within(suspended.future)


# Context

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")


async def test_a_variable_that_one_sets_is_not_seen_by_the_next(starter: Starter) -> None:
    async def sets(value: str, *, suspend: bool) -> str:
        before = NAME.get()
        NAME.set(value)
        if suspend:
            await asyncio.sleep(0)
        return f"{before} -> {NAME.get()}"

    def start() -> list[Any]:
        NAME.set("whoever started it")
        coroutines = [sets("a", suspend=False), sets("b", suspend=True), sets("c", suspend=False)]
        return [*map(starter.start, coroutines), NAME.get()]

    first, second, third, outside = await in_callback(start)
    assert first == "whoever started it -> a"
    assert await within(second.future) == "whoever started it -> b"
    assert third == "whoever started it -> c"
    assert outside == "whoever started it"
    assert NAME.get() == "nobody"


async def test_a_token_can_be_used_after_a_suspension(starter: Starter) -> None:
    async def resets() -> tuple[str, str]:
        token = NAME.set("set before")
        await asyncio.sleep(0)
        between = NAME.get()
        await asyncio.sleep(0.001)
        NAME.reset(token)
        return between, NAME.get()

    assert await finish(starter, resets()) == ("set before", "nobody")


async def test_callbacks_and_tasks_inherit_the_context_at_every_step(starter: Starter) -> None:
    loop = asyncio.get_running_loop()
    seen: list[str] = []

    def note() -> None:
        seen.append(NAME.get())

    async def child() -> None:
        note()

    async def parent() -> None:
        NAME.set("first")
        loop.call_soon(note)
        await asyncio.sleep(0)
        NAME.set("second")
        loop.call_soon(note)
        await loop.create_task(child())

    await finish(starter, parent())
    assert seen == ["first", "second", "second"]


# What happens between the first step and the next


@pytest.mark.parametrize("how", ["result", "error", "cancel"])
async def test_a_future_may_be_done_before_the_task_waits_for_it(
    starter: Starter, how: str
) -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        return await future

    def start() -> Any:
        started = starter.start(waits())
        if how == "result":
            future.set_result("quick")
        elif how == "error":
            future.set_exception(LookupError("quick"))
        else:
            future.cancel()
        return started

    started = await in_callback(start)
    expected = {"result": ("result", "quick"), "error": (LookupError, ("quick",))}
    await within(asyncio.wait({started.future}))
    assert await outcome(started.future) == expected.get(how, ("cancelled",))


async def test_a_future_that_is_done_does_not_save_from_being_cancelled(starter: Starter) -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        return await future

    def start() -> Any:
        started = starter.start(waits())
        future.set_result("quick")
        assert started.future.cancel()
        return started

    started = await in_callback(start)
    await within(asyncio.wait({started.future}))
    assert started.future.cancelled()


@pytest.mark.parametrize("kind", ["future", "task", "coroutine that waits for a future"])
async def test_several_that_start_together_may_wait_for_the_same_thing(
    starter: Starter, kind: str
) -> None:
    loop = asyncio.get_running_loop()
    gate: asyncio.Future[str] = loop.create_future()

    async def opened() -> str:
        return await gate

    shared: Any = loop.create_task(opened()) if kind == "task" else gate
    await turns(2)

    async def waits() -> str:
        if kind.startswith("coroutine"):
            return await opened()
        result: str = await shared
        return result

    started = await in_callback(lambda: [starter.start(waits()) for _ in range(3)])
    gate.set_result("for all")
    results = await within(asyncio.gather(*(one.future for one in started)))
    assert results == ["for all"] * 3


async def test_one_that_was_just_started_does_not_keep_a_task_from_waiting_for_the_same(
    starter: Starter,
) -> None:
    gate: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def waits() -> str:
        return await gate

    task = asyncio.ensure_future(waits())  # its first step comes right after the callback's
    started = await in_callback(lambda: starter.start(waits()))
    other = asyncio.ensure_future(waits())
    await turns(2)
    gate.set_result("for all")
    results = await within(asyncio.gather(task, started.future, other))
    assert set(results) == {"for all"}


# Cancellation from outside, later


async def test_it_is_cancelled_while_it_waits(starter: Starter) -> None:
    cleaned = asyncio.Event()

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    started = await begin(starter, waits())
    await turns()
    assert started.future.cancel()
    await within(asyncio.wait({started.future}))
    assert started.future.cancelled() and cleaned.is_set()
    assert not started.future.cancel()


async def test_it_is_cancelled_several_times_and_stays(starter: Starter) -> None:
    gate = asyncio.Event()
    cancelled = 0

    async def stubborn() -> int:
        nonlocal cancelled
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                cancelled += 1
        return cancelled

    started = await begin(starter, stubborn())
    for _ in range(3):
        started.future.cancel()
        await turns(5)
    assert not started.future.done()
    gate.set()
    assert await within(started.future) == 3


async def test_to_cancel_one_does_not_touch_another(starter: Starter) -> None:
    gate = asyncio.Event()

    async def waits(name: str) -> str:
        await gate.wait()
        return name

    def start() -> list[Suspended]:
        started = [starter.start(waits(name)) for name in "abc"]
        started[1].future.cancel()
        return started

    started = await in_callback(start)
    await turns()
    gate.set()
    done = [await outcome(one.future) for one in started]
    assert done == [("result", "a"), ("cancelled",), ("result", "c")]


# The spare Task is not the user's, but the user's tools reach it


def cancel_everything_else() -> None:
    """What a program does that ends everything it finds."""
    for task in asyncio.all_tasks():
        if task is not asyncio.current_task():
            task.cancel()


@pytest.mark.parametrize("wait", [0, 5], ids=["at once", "later"])
async def test_what_starts_after_everything_was_cancelled_is_not_cancelled(
    starter: Starter, wait: int
) -> None:
    await begin(starter, returning(None))
    cancel_everything_else()
    await turns(wait)

    async def looks() -> bool:
        task = asyncio.current_task()
        assert task is not None
        return task.done()

    def start() -> Any:
        return starter.start(looks()), starter.start(asyncio.sleep(0.001, "slept"))

    done, started = await in_callback(start)
    assert done is False
    await within(asyncio.wait({started.future}))
    assert await outcome(started.future) == ("result", "slept")


async def test_what_starts_between_cancelling_everything_and_the_end_of_it_is_not_cancelled(
    starter: Starter,
) -> None:
    await begin(starter, returning(None))
    others = asyncio.all_tasks() - {asyncio.current_task()}

    def start() -> Any:
        for task in others:
            task.cancel()
        return starter.start(asyncio.sleep(0.001, "slept"))

    started = await in_callback(start)
    await within(asyncio.wait({started.future}))
    assert await outcome(started.future) == ("result", "slept")


async def test_release_leaves_nothing_behind_and_may_be_repeated(starter: Starter) -> None:
    before = asyncio.all_tasks()
    starter.release()
    starter.release()
    await turns()
    left = asyncio.all_tasks()
    assert left <= before and left == {asyncio.current_task()}
    assert await begin(starter, returning("still works")) == "still works"
    assert await finish(starter, asyncio.sleep(0, "still works")) == "still works"


async def test_release_does_not_touch_what_runs(starter: Starter) -> None:
    started = await begin(starter, asyncio.sleep(0.001, "slept"))
    starter.release()
    assert await within(started.future) == "slept"


async def test_what_has_ended_is_not_kept(starter: Starter) -> None:
    class Thing:
        pass

    things: list[weakref.ref[Thing]] = []

    async def uses(*, suspend: bool) -> None:
        thing = Thing()
        things.append(weakref.ref(thing))
        if suspend:
            await asyncio.sleep(0)

    await finish(starter, uses(suspend=False))
    await finish(starter, uses(suspend=True))
    await turns()
    gc.collect()
    assert [thing() for thing in things] == [None, None]


# Many


async def test_twenty_thousand_live_at_the_same_time(starter: Starter) -> None:
    gate = asyncio.Event()
    count = 20_000

    async def waits(number: int) -> int:
        NAME.set(str(number))
        mine = asyncio.current_task()
        await gate.wait()
        assert asyncio.current_task() is mine
        return int(NAME.get())

    started = await in_callback(lambda: [starter.start(waits(n)) for n in range(count)])
    assert len({one.future for one in started}) == count
    gate.set()
    results = await within(asyncio.gather(*(one.future for one in started)), 20)
    assert results == list(range(count))


async def test_a_thousand_mixed_ones_end_each_in_its_way(starter: Starter) -> None:
    async def mixed(number: int) -> int:
        if number % 3 == 0:
            await asyncio.sleep(0)
        if number % 5 == 0:
            raise LookupError(number)
        if number % 7 == 0:
            me().cancel()
            await asyncio.sleep(0)
        if number % 2 == 0:
            await asyncio.sleep(0.001)
        return number

    async def run(number: int) -> None:
        ended = await outcome(asyncio.gather(finish(starter, mixed(number))))
        if number % 5 == 0:
            assert ended == (LookupError, (number,))
        elif number % 7 == 0:
            assert ended == ("cancelled",)
        else:
            assert ended == ("result", [number])

    await within(asyncio.gather(*map(run, range(1000))), 20)


# The end of the program


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_a_handler_ends_the_program(
    step: int, error: type[BaseException]
) -> None:
    cleaned: list[str] = []

    async def interrupted() -> None:
        for _ in range(step):
            await asyncio.sleep(0)
        raise error

    async def other() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("other")

    async def main() -> None:
        starter = Starter(asyncio.get_running_loop())
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)  # the error is told below
        loop.call_soon(starter.start, other())
        loop.call_soon(starter.start, interrupted())
        await asyncio.Event().wait()

    with pytest.raises(error):
        run(main)
    assert cleaned == ["other"]


PROGRAM = '''
"""Uses a starter in every way, leaves things running, and must end in silence."""
import asyncio, contextlib, sys
from conduit.transport.tasks import Starter, Suspended

async def main():
    loop = asyncio.get_running_loop()
    starter = Starter(loop)
    started = []

    async def quick():
        return 1

    async def fails():
        raise LookupError

    async def waits(seconds):
        try:
            await asyncio.sleep(seconds)
        finally:
            await asyncio.sleep(0)

    async def timed():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)

    def work():
        assert starter.start(quick()) == 1
        with contextlib.suppress(LookupError):
            starter.start(fails())
        started.extend(starter.start(waits(seconds)) for seconds in (0, 0.001, 60))
        started.append(starter.start(timed()))
        cancelled = starter.start(waits(60))
        cancelled.future.cancel()
        started.append(starter.start(timed()))
        starter.start(quick())

    loop.call_soon(work)
    await asyncio.sleep(0)
    await asyncio.wait({one.future for one in started if one is not started[2]}, timeout=10)
    assert [one.future.done() for one in started] == [True, True, False, True, True]
    print(*started[0].future.get_stack(), repr(started[2].future)[:5])
    if "release" in sys.argv:
        starter.release()

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
'''


@pytest.mark.parametrize("debug", ["0", "1"], ids=["normal", "debug"])
@pytest.mark.parametrize("ending", ["release", "leave it"])
def test_a_program_ends_without_a_warning(debug: str, ending: str) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, LOOP, ending],
        env={**os.environ, "PYTHONPATH": path, "PYTHONASYNCIODEBUG": debug},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("<Task\n", "", 0)
