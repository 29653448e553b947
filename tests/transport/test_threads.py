"""Plain functions in threads, the way back to the loop, and tasks beside the handlers."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from conduit import ConnectionClosed, from_thread
from conduit.transport.background import Background
from conduit.transport.connection import Connection
from conduit.transport.handling import HANDLING, Handling
from conduit.transport.loop_thread import LoopThread
from conduit.transport.threads import run_in_thread
from tests.conftest import LOOP
from tests.transport.pair import Pair, settings, turns, until, within

ROOT = Path(__file__).resolve().parents[2]

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")


# Threads


async def test_a_function_runs_in_a_thread_of_its_own_with_the_context() -> None:
    loop = asyncio.get_running_loop()
    NAME.set("somebody")

    def work() -> tuple[str, bool]:
        before = NAME.get()
        NAME.set("changed")
        return before, threading.current_thread() is threading.main_thread()

    assert await within(run_in_thread(loop, work)) == ("somebody", False)
    assert NAME.get() == "somebody"


async def test_what_a_function_raises_is_raised() -> None:
    def fails() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        await within(run_in_thread(asyncio.get_running_loop(), fails))


async def test_a_stop_iteration_ends_the_wait_as_well() -> None:
    """`next()` without a default is a common slip, and no future can hold what it raises."""

    def slips() -> Any:
        return next(iter([]))

    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        await within(run_in_thread(asyncio.get_running_loop(), slips), 1)
    assert isinstance(caught.value.__cause__, StopIteration), "whose traceback says where it was"


async def test_64_functions_run_at_the_same_time() -> None:
    barrier = threading.Barrier(64)
    loop = asyncio.get_running_loop()
    waits = [run_in_thread(loop, lambda: barrier.wait(5)) for _ in range(64)]
    assert sorted(await within(asyncio.gather(*waits))) == list(range(64))


async def test_to_cancel_the_future_does_not_disturb_the_thread() -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(5)
        ended.set()

    future = run_in_thread(asyncio.get_running_loop(), work)
    future.cancel()
    release.set()
    await until(ended.is_set)
    await turns()
    assert future.cancelled()


def test_a_thread_that_outlives_its_loop_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(5)
        ended.set()

    async def main() -> None:
        run_in_thread(asyncio.get_running_loop(), work)

    asyncio.run(main())
    release.set()
    assert ended.wait(5)
    # The pool takes one after the other where threads are free: when these are done, so is that.
    barrier = threading.Barrier(64)

    async def again() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(run_in_thread(loop, lambda: barrier.wait(5)) for _ in range(64)))

    asyncio.run(again())
    assert "exception" not in caplog.text.lower()


# from_thread


async def test_a_plain_handler_can_use_its_connection() -> None:
    async with Pair() as pair:
        heard: list[Any] = []

        @pair.client.on("news")
        async def news(message: Any) -> None:
            heard.append(message)

        @pair.client.rpc
        async def double(number: int) -> int:
            return 2 * number

        @pair.server.rpc
        def work(connection: Connection, number: int) -> int:
            from_thread.run(connection.send, "news", number)
            result: int = from_thread.run(connection.call, "double", [number])
            return result

        @pair.server.on("start")
        def start(connection: Connection, message: Any) -> Any:
            return from_thread.run(connection.call, "double", [message])

        assert await within(pair.client.call("work", {"number": 21})) == 42
        assert await within(pair.client.connection.request("start", 4)) == 8
        assert heard == [21]


async def test_what_the_async_function_raises_reaches_the_thread() -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise LookupError("on the loop")

    def work() -> str:
        try:
            from_thread.run(fails)
        except LookupError as exc:
            return str(exc)
        return "nothing"

    assert await within(run_in_thread(asyncio.get_running_loop(), work)) == "on the loop"


def test_when_the_loop_has_ended_there_is_no_way_to_it_any_more() -> None:
    release, results = threading.Event(), queue.SimpleQueue[BaseException]()

    async def nothing() -> None: ...

    def work() -> None:
        release.wait(5)
        try:
            from_thread.run(nothing)
        except RuntimeError as exc:
            results.put(exc)

    async def main() -> None:
        run_in_thread(asyncio.get_running_loop(), work)

    asyncio.run(main())
    release.set()
    assert "closed" in str(results.get(timeout=5))


async def test_outside_of_a_plain_handler_there_is_no_way_from_a_thread() -> None:
    async def nothing() -> None: ...

    with pytest.raises(RuntimeError, match="only inside a plain def handler"):
        from_thread.run(nothing)
    with pytest.raises(RuntimeError, match="only inside a plain def handler"):
        await within(asyncio.to_thread(from_thread.run, nothing))


BLOCKING = """
import asyncio, sys
from conduit import ConnectionClosed, from_thread
from conduit.transport.background import Background
from conduit.transport.threads import run_in_thread
import logging

async def nothing():
    return "never"

async def on_the_loop():
    try:
        return from_thread.run(nothing)
    except RuntimeError as exc:
        return str(exc)

async def main():
    loop = asyncio.get_running_loop()
    if "task" in sys.argv:
        tasks = []
        async def leave_a_task():
            tasks.append(Background(logging.getLogger()).start(on_the_loop()))
        await run_in_thread(loop, lambda: from_thread.run(leave_a_task))
        print(await tasks[0])
    else:
        print(await run_in_thread(loop, lambda: from_thread.run(on_the_loop)))

if "uvloop" in sys.argv:
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.mark.parametrize("where", ["function", "task"])
def test_on_the_loop_itself_it_is_an_error_and_no_deadlock(where: str) -> None:
    """An async function that a handler runs on the loop inherits its context."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKING, LOOP, where],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("the loop waits for itself")
    assert "only inside a plain def handler" in output, errors


async def test_a_call_from_a_thread_does_not_wait_in_line_either() -> None:
    async with Pair(client=settings(calls=1)) as pair:
        gate = asyncio.Event()

        @pair.client.rpc
        async def hold() -> None:
            await gate.wait()

        @pair.server.rpc
        def work(connection: Connection) -> str:
            try:
                from_thread.run(connection.call, "hold")
            except Exception as exc:  # noqa: BLE001  # named below
                return type(exc).__name__
            return "waited"

        running = pair.server.start("hold")
        await turns()
        assert await within(pair.client.call("work")) == "Overloaded"
        gate.set()
        await within(running)


# Tasks beside the handlers


@pytest.fixture
def background() -> Background:
    return Background(logging.getLogger("conduit.test"))


async def test_a_task_inherits_the_context_but_not_that_a_handler_runs(
    background: Background,
) -> None:
    async def look() -> tuple[object, str]:
        return HANDLING.get(), NAME.get()

    NAME.set("somebody")
    token = HANDLING.set(Handling(asyncio.get_running_loop()))
    try:
        task = background.start(look())
    finally:
        HANDLING.reset(token)
    assert await within(task) == (None, "somebody")


async def test_a_task_that_a_handler_leaves_behind_may_wait_in_line() -> None:
    background = Background(logging.getLogger("conduit.test"))
    async with Pair(client=settings(calls=1)) as pair:
        gate = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []

        @pair.client.rpc
        async def hold(name: str) -> str:
            await gate.wait()
            return name

        @pair.server.rpc
        async def leave(connection: Connection) -> None:
            tasks.append(background.start(connection.rpc.call("hold", ["left behind"])))

        running = pair.server.start("hold", ["first"])
        await turns()
        await within(pair.client.call("leave"))
        await turns()
        assert not tasks[0].done()
        gate.set()
        assert await within(tasks[0]) == "left behind"
        await within(running)


async def test_what_a_task_raises_is_logged(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise LookupError("in the background")

    await within(asyncio.wait({background.start(fails())}))
    await turns()
    (record,) = caplog.records
    assert record.name == "conduit.test" and record.levelno == logging.ERROR
    assert "in the background" in caplog.text


async def test_all_tasks_are_cancelled_in_the_end_and_waited_for(background: Background) -> None:
    ended: list[str] = []

    async def slow(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    tasks = [background.start(slow(name)) for name in "ab"]
    await turns()
    await within(background.cancel())
    assert sorted(ended) == ["a", "b"] and all(task.cancelled() for task in tasks)
    await within(background.cancel())


async def test_a_task_may_end_all_the_others(background: Background) -> None:
    other = background.start(asyncio.sleep(60))

    async def ends() -> str:
        await background.cancel()
        return "still here"

    assert await within(background.start(ends())) == "still here"
    assert other.cancelled()


async def test_tasks_are_given_time_to_end_by_themselves(background: Background) -> None:
    quick, slow = (
        background.start(asyncio.sleep(0.001, "quick")),
        background.start(asyncio.sleep(60)),
    )
    await within(background.finish(0.02))
    assert quick.result() == "quick" and slow.cancelled()
    await within(background.finish(5))


# An event loop in a thread


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_ends_leaves_nobody_waiting() -> None:
    async def nothing() -> None:
        pass

    async def end() -> None:
        asyncio.get_running_loop().stop()

    ended: queue.Queue[Exception] = queue.Queue()

    def wait() -> None:
        try:
            thread.run(end)
        except ConnectionClosed as exc:
            ended.put(exc)

    thread = LoopThread(asyncio.new_event_loop, nothing)
    threading.Thread(target=wait, daemon=True).start()
    assert str(ended.get(timeout=10)) == "the event loop of the client has ended"
    with pytest.raises(ConnectionClosed):
        thread.run(nothing)
    thread.leave()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_loop_whose_start_is_interrupted_is_closed(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(threading.Thread):
        def start(self) -> None:
            if error is KeyboardInterrupt:
                super().start()
            raise error

    async def farewell() -> None:
        raise AssertionError("there is nothing to say goodbye to")

    loop = asyncio.new_event_loop()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Interrupted)
        with pytest.raises(error):
            LoopThread(lambda: loop, farewell)
    for thread in threading.enumerate():
        if thread.name == "conduit-client":
            thread.join(10)
    assert loop.is_closed()
