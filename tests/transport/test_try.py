import pytest, asyncio
from tests.transport.pair import *


async def test_mem():
    async with Pair() as pair:

        @pair.server.rpc
        async def add(a: int, b: int) -> int:
            await asyncio.sleep(0)
            return a + b

        assert await within(pair.client.call("add", [1, 2])) == 3
        print(pair.client.link.frames, pair.server.link.frames)


async def test_sock():
    async with SocketPair() as pair:

        @pair.server.rpc
        async def echo(a: bytes) -> bytes:
            return a

        assert len(await within(pair.client.call("echo", [bytes(900_000)]))) == 900_000


async def test_mem2():
    async with Pair() as pair:

        @pair.server.rpc
        async def echo(a: bytes) -> bytes:
            return a

        assert len(await within(pair.client.call("echo", [bytes(900_000)]))) == 900_000
