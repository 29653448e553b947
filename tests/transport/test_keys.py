"""The cache of derived keys: derived once, for whoever waits, and only so many are kept."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

from conduit.exceptions import Unavailable
from conduit.protocol.scram import Keys, derive_keys
from conduit.transport import keys as module
from conduit.transport.keys import KEPT, MOST, forget_keys, known_keys
from tests.transport.pair import within

FEW, MANY = 1, 400_000
"""Iterations that take no time, and some that take long enough to do something meanwhile."""

numbers = itertools.count()


async def client_keys(password: str, salt: bytes, iterations: int) -> Keys:
    """Derive keys for a server that has not asked for any before."""
    return await module.client_keys(f"server {next(numbers)}", password, salt, iterations)


@pytest.fixture
def password() -> Iterator[str]:
    password = f"password {next(numbers)}"
    yield password
    forget_keys(password)


async def test_keys_are_those_of_the_specification(password: str) -> None:
    assert known_keys(password, b"salt", FEW) is None
    keys = await within(client_keys(password, b"salt", FEW))
    assert keys == derive_keys(password, b"salt", FEW)
    assert known_keys(password, b"salt", FEW) is keys
    assert await within(client_keys(password, b"salt", FEW)) is keys


async def test_another_password_salt_or_number_has_other_keys(password: str) -> None:
    keys = [
        await within(client_keys(password, b"salt", FEW)),
        await within(client_keys(password, b"salt", FEW + 1)),
        await within(client_keys(password, b"pepper", FEW)),
        await within(client_keys(password + "!", b"salt", FEW)),
    ]
    forget_keys(password + "!")
    assert all(one != other for one, other in itertools.combinations(keys, 2))


async def test_many_who_ask_at_once_get_the_same_one(password: str) -> None:
    keys = await within(
        asyncio.gather(*(client_keys(password, b"salt", 20_000) for _ in range(100)))
    )
    assert all(one is keys[0] for one in keys), "it was derived a hundred times"


async def test_the_loop_goes_on_meanwhile(password: str) -> None:
    deriving = asyncio.ensure_future(client_keys(password, b"salt", MANY))
    steps = 0
    while not deriving.done():
        await asyncio.sleep(0)
        steps += 1
    assert steps > 20


async def test_one_who_gives_up_does_not_disturb_the_others(password: str) -> None:
    tasks = [asyncio.ensure_future(client_keys(password, b"salt", 50_000)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    first, second = await within(asyncio.gather(*tasks[1:]))
    assert tasks[0].cancelled() and first is second
    assert known_keys(password, b"salt", 50_000) is first


async def test_what_is_still_being_derived_is_not_known(password: str) -> None:
    deriving = asyncio.ensure_future(client_keys(password, b"salt", MANY))
    await asyncio.sleep(0)
    assert known_keys(password, b"salt", MANY) is None
    await within(deriving)


async def test_a_password_that_was_refused_is_forgotten(password: str) -> None:
    for salt in (b"one", b"two"):
        await within(client_keys(password, salt, FEW))
    await within(client_keys(password + "!", b"one", FEW))
    forget_keys(password)
    assert known_keys(password, b"one", FEW) is None is known_keys(password, b"two", FEW)
    assert known_keys(password + "!", b"one", FEW) is not None
    forget_keys(password + "!")
    forget_keys("of which nobody has heard")


async def test_only_the_last_ones_are_kept(password: str) -> None:
    for number in range(KEPT):
        await within(client_keys(password, b"%d" % number, FEW))
    await within(client_keys(password, b"0", FEW))  # used again, so it is not the oldest now
    await within(client_keys(password, b"one more", FEW))
    assert known_keys(password, b"0", FEW) is not None
    assert known_keys(password, b"1", FEW) is None
    assert known_keys(password, b"2", FEW) is not None


def test_a_loop_that_ends_while_keys_are_derived_harms_nothing(
    password: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client_keys(password, b"salt", MANY), 0.001)

    asyncio.run(give_up())

    async def ask_again() -> None:
        assert await within(client_keys(password, b"salt", MANY)) is not None

    asyncio.run(ask_again())
    assert "exception" not in caplog.text.lower()


async def test_a_server_has_a_few_derived_in_a_minute_for_each_password(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(module, "monotonic", lambda: now)

    async def derive(salt: int, server: str = "a", password: str = password) -> Keys:
        return await within(module.client_keys(server, password, b"%d" % salt, FEW))

    for salt in range(MOST):
        now += 10
        await derive(salt)
        assert await derive(salt) == derive_keys(password, b"%d" % salt, FEW)  # known, so free
    with pytest.raises(Unavailable, match="a has had keys derived 5 times within 60 s") as caught:
        await derive(MOST)
    assert caught.value.retryable and caught.value.retry_after == 20
    assert known_keys(password, b"%d" % MOST, FEW) is None
    await derive(MOST - 1)  # what is known still helps
    await derive(MOST, server="b")
    await derive(MOST + 1, password=password + "!")
    now += 19.5
    with pytest.raises(Unavailable):
        await derive(MOST + 2)
    now += 0.6
    await derive(MOST + 2)
    with pytest.raises(Unavailable):
        await derive(MOST + 3)
    now += 60
    await derive(MOST + 3)
    assert list(module._begun) == [("a", module._digest(password))], "the others are forgotten"
    forget_keys(password + "!")
