"""netconduit 5.0.0, the earlier library of that name: its own login, heartbeat and queues.

It gives typed parameters only to handlers that take a Pydantic model; plain ones are faster, so
its handlers are plain. Its limits are raised as far as the workloads need it.
"""

from __future__ import annotations

from typing import Any

import conduit

from .base import HOST, PASSWORD, Contestant, Heard, free_port

# The package of that name in this environment is another than the one that the types are of.
library: Any = conduit


class Netconduit(Contestant):
    async def serve(self, methods: int) -> Any:
        port = free_port()
        descriptor = library.ServerDescriptor(
            host=HOST, port=port, password=PASSWORD, max_connections=10_000
        )
        server = self._server = library.Server(descriptor)

        @server.rpc  # type: ignore[untyped-decorator]
        async def add(a: int, b: int) -> int:
            return a + b

        @server.rpc  # type: ignore[untyped-decorator]
        async def echo(data: bytes) -> bytes:
            return data

        await server.start()
        return HOST, port

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        host, port = address
        client = library.Client(
            library.ClientDescriptor(
                server_host=host, server_port=port, password=PASSWORD, reconnect_enabled=False
            )
        )
        if heard is not None:

            async def tick(message: Any) -> None:
                heard(message["n"])

            client.on("tick")(tick)
        if not await client.connect():
            raise RuntimeError("netconduit did not connect")
        return Session(client)

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            await self._server.broadcast("tick", {"n": n})


class Session:
    def __init__(self, client: Any) -> None:
        self._rpc = client.rpc
        self.close = client.disconnect

    async def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        answer = await self._rpc.call(method, args=arguments)
        return answer["data"] if isinstance(answer, dict) and "data" in answer else answer

    async def call(self, a: int, b: int) -> int:
        result: int = await self._call("add", {"a": a, "b": b})
        return result

    async def echo(self, data: bytes) -> Any:
        return await self._call("echo", {"data": data})
