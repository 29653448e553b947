"""`Line`: who waits, in which order they go on, and who leaves before."""

from __future__ import annotations

import asyncio

import pytest

from conduit.exceptions import ConnectionClosed
from conduit.transport.line import Line
from tests.transport.pair import turns, within


class Queue:
    """People in a line, and the order in which they got through."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.line = Line()
        self.through: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def enter(self, *names: str, seconds: float | None = None) -> None:
        for name in names:
            self.tasks[name] = asyncio.ensure_future(self._wait(name, seconds))
            await turns(1)

    async def _wait(self, name: str, seconds: float | None) -> None:
        await self.line.wait(None if seconds is None else self.loop.time() + seconds)
        self.through.append(name)

    async def leave(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


async def test_first_come_first_served() -> None:
    queue = Queue()
    await queue.enter(*"abcd")
    assert queue.line.waiters
    for count in range(4):
        queue.line.move()
        queue.line.move()  # the first has not gone on yet, so this is for nobody else
        await turns()
        assert queue.through == list("abcd"[: count + 1])
    assert not queue.line.waiters


async def test_to_move_an_empty_line_saves_nothing_up() -> None:
    queue = Queue()
    queue.line.move()
    await queue.enter("a")
    await turns()
    assert queue.through == []
    queue.line.move()
    await within(queue.tasks["a"])


async def test_the_first_stays_in_line_until_it_goes_on() -> None:
    queue = Queue()
    await queue.enter("a")
    queue.line.move()
    assert queue.line.waiters, "whoever comes now must see that there is a line"
    await turns()
    assert not queue.line.waiters


@pytest.mark.parametrize("how", ["cancelled", "too late"])
async def test_a_turn_is_not_for_one_that_gives_up_at_the_same_moment(how: str) -> None:
    queue = Queue()
    await queue.enter("a", seconds=0.01)
    await queue.enter(*"bc")
    assert queue.line.waiters
    if how == "cancelled":
        queue.tasks["a"].cancel()
    else:
        queue.line.waiters[0].set_exception(asyncio.TimeoutError())  # as its timer does
    queue.line.move()
    await turns()
    assert queue.through == ["b"]
    await queue.leave()


async def test_one_that_gives_up_lets_nobody_else_go_on() -> None:
    queue = Queue()
    await queue.enter(*"abc")
    queue.tasks["b"].cancel()
    await turns()
    assert queue.through == []
    queue.line.move()
    await turns()
    assert queue.through == ["a"]
    await queue.leave()


async def test_one_that_gives_up_when_it_is_its_turn_passes_it_on() -> None:
    queue = Queue()
    await queue.enter(*"abc")
    queue.line.move()
    queue.tasks["a"].cancel()
    await turns()
    assert queue.through == ["b"]
    await queue.leave()


async def test_the_deadline_of_one_does_not_move_the_others() -> None:
    queue = Queue()
    await queue.enter("a")
    await queue.enter("b", seconds=0.01)
    await queue.enter("c")
    with pytest.raises(asyncio.TimeoutError):
        await within(queue.tasks["b"])
    await turns()
    assert queue.through == []
    queue.line.move()
    await turns()
    assert queue.through == ["a"]
    await queue.leave()


async def test_a_deadline_that_has_passed_ends_the_wait_at_once() -> None:
    queue = Queue()
    await queue.enter("a", seconds=-1)
    with pytest.raises(asyncio.TimeoutError):
        await within(queue.tasks["a"])
    assert not queue.line.waiters


async def test_everybody_is_sent_away() -> None:
    queue = Queue()
    await queue.enter(*"ab", seconds=60)
    queue.line.fail(lambda: ConnectionClosed("the end"))
    for name in "ab":
        with pytest.raises(ConnectionClosed, match="the end"):
            await within(queue.tasks[name])
    assert queue.through == [] and not queue.line.waiters
    queue.line.fail(lambda: ConnectionClosed("again"))
