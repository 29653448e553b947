"""websockets with MessagePack and the least protocol that allows calls: [number, name, arguments].

Compression is off and the limits are raised, as its documentation recommends for speed. Handlers
are awaited one after another, which is faster than a task for each. Logging in is a header that is
compared during the handshake.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

import msgpack
from websockets.asyncio.client import connect  # type: ignore[import-not-found]
from websockets.asyncio.server import broadcast, serve  # type: ignore[import-not-found]

from .base import HOST, PASSWORD, ROOM, Contestant, Heard, Pending

SETTINGS: dict[str, Any] = {
    "compression": None,
    "max_size": ROOM,
    "max_queue": 1024,
    "write_limit": 1024 * 1024,
}
pack = msgpack.Packer().pack
unpack = msgpack.unpackb


async def add(a: int, b: int) -> int:
    return a + b


async def echo(data: bytes) -> bytes:
    return data


METHODS: dict[str, Any] = {"add": add, "echo": echo}


class Websockets(Contestant):
    def __init__(self) -> None:
        self._connections: set[Any] = set()

    async def serve(self, methods: int) -> Any:
        server = await serve(self._handle, HOST, 0, process_request=self._admit, **SETTINGS)
        return server.sockets[0].getsockname()

    def _admit(self, connection: Any, request: Any) -> Any:
        if request.headers.get("Authorization") != PASSWORD:
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "")
        return None

    async def _handle(self, connection: Any) -> None:
        self._connections.add(connection)
        try:
            async for message in connection:
                number, name, arguments = unpack(message)
                if name == "numbers":
                    for n in range(arguments["count"]):
                        await connection.send(pack(("item", n)))
                    await connection.send(pack((number, None)))
                    continue
                result = await METHODS[name](**arguments)
                await connection.send(pack((number, result)))
        finally:
            self._connections.discard(connection)

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        url = "ws://{}:{}".format(*address)
        headers = {"Authorization": PASSWORD}
        return Session(await connect(url, additional_headers=headers, **SETTINGS), heard)

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            broadcast(self._connections, pack(("tick", {"n": n})))


class Session:
    def __init__(self, connection: Any, heard: Heard | None) -> None:
        self._connection = connection
        self._pending = Pending()
        self._heard = heard
        self._total = 0
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for message in self._connection:
            number, result = unpack(message)
            if number == "item":
                self._total += result
            elif number != "tick":
                self._pending.answered(number, result)
            elif self._heard is not None:
                self._heard(result["n"])

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        number, answer = self._pending.add()
        await self._connection.send(pack((number, name, arguments)))
        return await answer

    async def call(self, a: int, b: int) -> int:
        result: int = await self._call("add", {"a": a, "b": b})
        return result

    async def stream(self, count: int) -> int:
        self._total = 0
        await self._call("numbers", {"count": count})
        return self._total

    async def echo(self, data: bytes) -> Any:
        return await self._call("echo", {"data": data})

    async def close(self) -> None:
        await self._connection.close()
        await self._reader
