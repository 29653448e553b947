"""python-socketio on aiohttp, WebSocket from the start, MessagePack packets, no compression.

Calls are events with an acknowledgement. The server runs handlers one after another instead of
starting a task for each, which is faster. Logging in is the `auth` value of the connect packet.
"""

from __future__ import annotations

from typing import Any

import socketio  # type: ignore[import-not-found]
from aiohttp import web  # type: ignore[import-not-found]

from .base import HOST, PASSWORD, ROOM, Contestant, Heard


class Socketio(Contestant):
    async def serve(self, methods: int) -> Any:
        server = self._server = socketio.AsyncServer(
            async_mode="aiohttp",
            serializer="msgpack",
            transports=["websocket"],
            max_http_buffer_size=ROOM,
            http_compression=False,
            async_handlers=False,
        )

        async def connect(sid: str, environ: Any, auth: Any) -> bool:
            return bool(auth == {"password": PASSWORD})

        async def add(sid: str, data: dict[str, int]) -> int:
            return data["a"] + data["b"]

        async def echo(sid: str, data: bytes) -> bytes:
            return data

        for handler in (connect, add, echo):
            server.on(handler.__name__, handler)
        app = web.Application()
        server.attach(app)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0, backlog=1024).start()
        return runner.addresses[0]

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        client = socketio.AsyncClient(
            serializer="msgpack",
            reconnection=False,
            handle_sigint=False,
            websocket_extra_options={"max_msg_size": 0},
        )
        if heard is not None:
            client.on("tick", lambda message: heard(message["n"]))
        await client.connect(
            "http://{}:{}".format(*address), transports=["websocket"], auth={"password": PASSWORD}
        )
        return Session(client)

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            await self._server.emit("tick", {"n": n})


class Session:
    def __init__(self, client: Any) -> None:
        self._call = client.call
        self.close = client.disconnect

    async def call(self, a: int, b: int) -> int:
        result: int = await self._call("add", {"a": a, "b": b})
        return result

    async def echo(self, data: bytes) -> Any:
        return await self._call("echo", data)
