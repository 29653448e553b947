"""conduit itself, with everything switched on.

Login by SCRAM, validation of parameters and results, a deadline on every call, sequence numbers,
acknowledgement and backpressure: these are its defaults. What is set here only raises limits that
other workloads than the usual need: 64 MiB values, thousands of connections, 4,096 calls at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from conduit import Client, Limits, Server
from conduit.transport import keys

from .base import HOST, LARGEST, PASSWORD, Contestant, Heard

LIMITS = Limits(max_payload=LARGEST, max_calls=4096)


class Conduit(Contestant):
    async def serve(self, methods: int) -> Any:
        server = self._server = Server(
            host=HOST, port=0, password=PASSWORD, max_connections=10_000, limits=LIMITS
        )

        @server.rpc
        async def add(a: int, b: int) -> int:
            return a + b

        @server.rpc
        async def echo(data: bytes) -> bytes:
            return data

        @server.rpc
        async def numbers(count: int) -> AsyncIterator[int]:
            for n in range(count):
                yield n

        for number in range(methods):
            server.rpc(f"method_{number}")(add)
        await server.start()
        return server.address

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Session:
        host, port = address
        client = Client(server_host=host, server_port=port, password=PASSWORD, limits=LIMITS)
        if heard is not None:

            @client.on("tick")
            async def tick(message: dict[str, int]) -> None:
                heard(message["n"])

        await client.connect()
        return Session(client)

    def forget(self) -> None:
        # Stands for a process that has derived nothing yet, so the limit of derivations that a
        # process has for one server is as new as its cache.
        keys.forget_keys(PASSWORD)
        keys._begun.clear()

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            await self._server.broadcast("tick", {"n": n})


class Session:
    def __init__(self, client: Client) -> None:
        self._rpc = client.rpc.call
        self._streams = client.rpc.stream
        self.close = client.disconnect

    async def call(self, a: int, b: int) -> int:
        result: int = await self._rpc("add", {"a": a, "b": b})
        return result

    async def stream(self, count: int) -> int:
        total = 0
        async with self._streams("numbers", {"count": count}, items=int) as run:
            async for number in run:
                total += number
        return total

    async def echo(self, data: bytes) -> Any:
        return await self._rpc("echo", {"data": data})
