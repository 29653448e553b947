"""The store in memory: what it keeps, for how long, and what goes first."""

from __future__ import annotations

from typing import Any

import pytest

from conduit import IdempotencyStore, MemoryStore


class Clock:
    """Stands still until it is set forward."""

    now = 5.0

    def __call__(self) -> float:
        return self.now


async def test_an_answer_is_kept_until_its_time_is_up() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    await store.put("a", b"1", 10)
    clock.now += 9.5
    assert await store.get("a") == b"1"
    clock.now += 0.5
    assert await store.get("a") is None
    assert await store.get("b") is None


async def test_what_has_expired_is_forgotten_when_something_comes() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    for key in "abc":
        await store.put(key, b"1", 10)
    clock.now += 10
    await store.put("d", b"2", 10)
    assert len(store) == 1


async def test_the_oldest_goes_when_there_are_too_many() -> None:
    store = MemoryStore(max_keys=2)
    for key in "abc":
        await store.put(key, key.encode(), 10)
    assert [await store.get(key) for key in "abc"] == [None, b"b", b"c"]


async def test_the_oldest_go_when_there_is_too_much() -> None:
    store = MemoryStore(max_bytes=10)
    await store.put("a", b"x" * 4, 10)
    await store.put("b", b"x" * 4, 10)
    await store.put("c", b"x" * 7, 10)
    assert [await store.get(key) for key in "abc"] == [None, None, b"x" * 7]
    await store.put("c", b"y" * 3, 10)  # in its place, and not beside it
    await store.put("d", b"x" * 7, 10)
    assert [await store.get(key) for key in "cd"] == [b"y" * 3, b"x" * 7]


async def test_what_is_larger_than_everything_is_not_kept() -> None:
    store = MemoryStore(max_bytes=10)
    await store.put("a", b"x", 10)
    await store.put("b", b"x" * 11, 10)
    assert [await store.get(key) for key in "ab"] == [b"x", None]


@pytest.mark.parametrize("bounds", [{"max_keys": 0}, {"max_bytes": 0}])
def test_bounds_that_keep_nothing_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        MemoryStore(**bounds)


def test_it_is_a_store() -> None:
    assert isinstance(MemoryStore(), IdempotencyStore)
