"""What streams cost: items a second of each kind, and the memory of a long conversation.

    python benchmarks/streams.py            # items/s of 100,000 items, medians of 7
    python benchmarks/streams.py memory     # 1,000,000 items both ways, under a slow consumer

Server and client are two processes, over loopback, on uvloop where there is one.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import memory_kib
from benchmarks.measures import cpu_seconds
from conduit import Client, Server, Stream

ITEMS = 100_000
ROUNDS = 7
LONG = 1_000_000
PAUSE_EVERY = 1000
PAUSE = 0.005


async def serve() -> None:
    server = Server(host="127.0.0.1", port=0)
    given = 0

    @server.rpc
    async def integers(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @server.rpc
    async def anything(to: int) -> AsyncIterator[Any]:
        for number in range(to):
            yield number

    @server.rpc
    async def send(to: int, stream: Stream[int]) -> None:
        for number in range(to):
            await stream.send(number)

    @server.rpc
    async def maps(to: int) -> AsyncIterator[dict[str, int]]:
        for number in range(to):
            yield {"n": number, "m": 2}

    @server.rpc
    async def add_up(numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    @server.rpc
    async def echo(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
        nonlocal given
        async for number in numbers:
            given += 1
            yield number

    @server.rpc(thread=False)
    def usage() -> dict[str, float]:
        return {"cpu": cpu_seconds(), "memory": memory_kib(os.getpid()), "given": given}

    await server.start()
    print(server.address[1], flush=True)
    await asyncio.Event().wait()


async def taken(run: Any) -> int:
    count = 0
    async for _ in run:
        count += 1
    return count


async def numbers() -> AsyncIterator[int]:
    for number in range(ITEMS):
        yield number


async def rates(client: Client) -> None:
    stream = client.rpc.stream
    args = {"to": ITEMS}
    kinds: dict[str, Callable[[], Awaitable[Any]]] = {
        "generator of int": lambda: taken(stream("integers", args)),
        "the same, items=int": lambda: taken(stream("integers", args, items=int)),
        "generator of anything": lambda: taken(stream("anything", args)),
        "Stream[int].send": lambda: taken(stream("send", args)),
        "generator of maps": lambda: taken(stream("maps", args)),
        "argument, generator": lambda: stream("add_up", [numbers()]).result(),
        "argument, iterator": lambda: stream("add_up", [iter(range(ITEMS))]).result(),
        "both ways": lambda: taken(stream("echo", [iter(range(ITEMS))])),
    }
    print(f"{'':24}  items/s  best  server us/item  client us/item")
    for name, make in kinds.items():
        found: list[tuple[float, float, float]] = []
        for _ in range(ROUNDS):
            far, own = (await client.rpc.usage())["cpu"], cpu_seconds()
            started = time.perf_counter()
            await make()
            rate = ITEMS / (time.perf_counter() - started)
            far = (await client.rpc.usage())["cpu"] - far
            found.append((rate, far / ITEMS * 1e6, (cpu_seconds() - own) / ITEMS * 1e6))
        rate, far, own = (statistics.median(column) for column in zip(*found, strict=True))
        best = max(found)[0]
        print(f"{name:24}  {rate / 1e6:.2f}M  {best / 1e6:.2f}M  {far:14.3f}  {own:14.3f}")


async def memory(client: Client) -> None:
    asked = got = ahead = 0

    def questions() -> Any:
        nonlocal asked
        for number in range(LONG):
            asked = number
            yield number

    started, seen = time.perf_counter(), []
    before = ((await client.rpc.usage())["memory"], memory_kib(os.getpid()))
    async for number in client.rpc.stream("echo", {"numbers": questions()}, items=int):
        assert number == got
        got += 1
        if got % PAUSE_EVERY == 0:
            await asyncio.sleep(PAUSE)
        if got % (LONG // 20) == 0:
            far = await client.rpc.usage()
            ahead = max(ahead, asked - far["given"], far["given"] - got)
            seen.append((far["memory"], memory_kib(os.getpid())))
    seconds = time.perf_counter() - started
    print(f"{got} items in {seconds:.1f} s; a producer was {ahead:.0f} items ahead at the most")
    for side, name in enumerate(("server", "client")):
        column = [one[side] for one in seen]
        print(
            f"{name}: {before[side]} KiB before, {column[0]} after {LONG // 20} items, "
            f"{max(column)} at the most, {column[-1]} in the end"
        )


async def drive(port: int, what: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    async with Client(f"tcp://127.0.0.1:{port}") as client:
        await what(client)


def run(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        run(serve())
    else:
        command = [sys.executable, __file__, "serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                port = int(server.stdout.readline())
                run(drive(port, memory if sys.argv[1:] == ["memory"] else rates))
            finally:
                server.kill()
