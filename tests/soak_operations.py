"""What the clients of the soak do with a connection: a bit of everything, well behaved or not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from conduit import Client, ConduitError, RPCError, RPCTimeout

DEADLINE = 4.0
"""Seconds after which a call is given up."""
TOLERATED = (ConduitError, OSError, asyncio.TimeoutError)
"""How what is done over a link that fails may end; whatever else comes out ends the program."""

Operation = Callable[[Client, random.Random], Coroutine[Any, Any, None]]

numbers = itertools.count(1)


async def call(client: Client, dice: random.Random) -> None:
    value = bytes(dice.choice([0, 10, 1000, 20_000, 400_000]))
    assert await client.rpc.call("echo", [value], timeout=DEADLINE) == value


async def call_with_key(client: Client, dice: random.Random) -> None:
    number = next(numbers)
    calls = (
        client.rpc.call("charge", [number], key=f"key {number}", timeout=DEADLINE) for _ in range(2)
    )
    assert await asyncio.gather(*calls) == [number, number]


async def call_a_thread(client: Client, dice: random.Random) -> None:
    assert await client.rpc.call("compute", [100], timeout=DEADLINE) == 4950


async def call_back(client: Client, dice: random.Random) -> None:
    assert await client.rpc.call("ask_back", [next(numbers)], timeout=DEADLINE) > 0


async def fail(client: Client, dice: random.Random) -> None:
    method, code, args = dice.choice(
        [
            ("refuse", "refused", ["no"]),
            ("fail", "internal_error", ["no"]),
            ("compute", "invalid_params", ["many"]),
            ("nothing", "method_not_found", []),
        ]
    )
    try:
        await client.rpc.call(method, args, timeout=DEADLINE)
    except RPCError as error:
        if error.code != code:
            raise


async def be_late(client: Client, dice: random.Random) -> None:
    with contextlib.suppress(RPCTimeout):
        await client.rpc.call("wait", [10.0], timeout=dice.choice([0.001, 0.01, 0.05]))


async def cancel(client: Client, dice: random.Random) -> None:
    """Give something up at some time, of any kind."""
    doing = asyncio.ensure_future(
        dice.choice([wait_long, call, call_with_key, stream, send_stream, ask])(client, dice)
    )
    await asyncio.sleep(dice.choice([0.0, 0.001, 0.005, 0.02]))
    doing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await doing


async def wait_long(client: Client, dice: random.Random) -> None:
    await client.rpc.call("wait", [10.0], timeout=DEADLINE)


async def stream(client: Client, dice: random.Random) -> None:
    upto = dice.choice([0, 10, 1000])
    run = client.rpc.stream("count", [upto], timeout=DEADLINE)
    assert [number async for number in run] == list(range(upto))


async def abandon(client: Client, dice: random.Random) -> None:
    """Leave a stream midway, with a block and without."""
    async for number in client.rpc.stream("count", [100_000], timeout=DEADLINE):
        if number >= 50:
            break
    async with client.rpc.stream("count", [100_000], timeout=DEADLINE) as run:
        async for number in run:
            if number >= 50:
                break


async def up_to(count: int) -> AsyncIterator[int]:
    for number in range(count):
        yield number
        if number % 16 == 0:
            await asyncio.sleep(0)


async def send_stream(client: Client, dice: random.Random) -> None:
    async with client.rpc.stream("total", [up_to(300)], timeout=DEADLINE) as run:
        assert await run.result() == sum(range(300))


async def talk(client: Client, dice: random.Random) -> None:
    """Send a stream and get one; now and then leave before the end."""
    stays = dice.random() < 0.7
    async with client.rpc.stream("doubled", [up_to(200)], timeout=DEADLINE) as run:
        async for number in run:
            if not stays and number >= 100:
                return
        assert await run.result() == 200


async def send(client: Client, dice: random.Random) -> None:
    size = dice.choice([0, 100, 5000])
    for _ in range(10):
        await asyncio.wait_for(client.send("note", bytes(size)), DEADLINE)


async def send_acknowledged(client: Client, dice: random.Random) -> None:
    await asyncio.wait_for(client.send("note", next(numbers), ack=True), DEADLINE)


async def ask(client: Client, dice: random.Random) -> None:
    number = next(numbers)
    assert await client.request("ask", number, timeout=DEADLINE) == number


async def send_slow(client: Client, dice: random.Random) -> None:
    await asyncio.wait_for(client.send("late", dice.choice([0.0, 0.01, 0.2])), DEADLINE)


async def broadcast(client: Client, dice: random.Random) -> None:
    data = bytes(dice.choice([10, 3000]))
    assert await client.rpc.call("tell_all", [data, dice.random() < 0.5], timeout=DEADLINE) > 0


async def ping(client: Client, dice: random.Random) -> None:
    await asyncio.wait_for(client.ping(), DEADLINE)


OPERATIONS: list[Operation] = [
    *[call, call_with_key, call_a_thread, call_back, fail, be_late, cancel, stream, abandon],
    *[send_stream, talk, send, send_acknowledged, ask, send_slow, broadcast, ping],
]
