"""FastAPI behind uvicorn (uvloop, httptools), called with aiohttp: JSON over HTTP/1.1, kept alive.

HTTP/1.1 has one call in flight per TCP connection, so "one connection" with 256 callers is a pool
of 256 here. Large values are raw bodies. There is no login: a header would only cost it time.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp  # type: ignore[import-not-found]
import fastapi  # type: ignore[import-not-found]
import orjson  # type: ignore[import-not-found]
import uvicorn  # type: ignore[import-not-found]
from pydantic import BaseModel

from .base import HOST, Contestant, Heard


class Pair(BaseModel):
    a: int
    b: int


async def add(pair: Pair) -> int:
    return pair.a + pair.b


async def echo(request: fastapi.Request) -> fastapi.Response:
    return fastapi.Response(await request.body(), media_type="application/octet-stream")


class Fastapi(Contestant):
    async def serve(self, methods: int) -> Any:
        app = fastapi.FastAPI()
        app.post("/add")(add)
        app.post("/echo")(echo)
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, 0))
        configuration = uvicorn.Config(
            app,
            http="httptools",
            lifespan="off",
            log_level="critical",
            access_log=False,
            timeout_keep_alive=600,
            server_header=False,
            date_header=False,
        )
        server = uvicorn.Server(configuration)
        self._serving = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started:  # noqa: ASYNC110  # it has no event to wait for
            await asyncio.sleep(0.01)
        return listening.getsockname()

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        connector = aiohttp.TCPConnector(limit=callers, keepalive_timeout=600)
        base = "http://{}:{}".format(*address)
        return Session(aiohttp.ClientSession(base, connector=connector))


class Session:
    def __init__(self, client: Any) -> None:
        self._client = client
        self.close = client.close

    async def call(self, a: int, b: int) -> int:
        body = orjson.dumps({"a": a, "b": b})
        headers = {"Content-Type": "application/json"}
        async with self._client.post("/add", data=body, headers=headers) as answer:
            result: int = orjson.loads(await answer.read())
            return result

    async def echo(self, data: bytes) -> Any:
        async with self._client.post("/echo", data=data) as answer:
            return await answer.read()
