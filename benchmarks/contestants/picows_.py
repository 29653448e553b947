"""picows with MessagePack and the same small protocol as for websockets: [number, name, arguments].

Handlers are plain functions that run inside the callback: less could not be done.
Logging in is a header that is compared during the handshake.
"""

from __future__ import annotations

from typing import Any

import msgpack
from picows import (  # type: ignore[import-not-found]
    WSListener,
    WSMsgType,
    ws_connect,
    ws_create_server,
)

from .base import HOST, PASSWORD, ROOM, Contestant, Heard, Pending

pack = msgpack.Packer().pack
unpack = msgpack.unpackb
BINARY = WSMsgType.BINARY

METHODS: dict[str, Any] = {"add": lambda a, b: a + b, "echo": lambda data: data}


class Listener(WSListener):  # type: ignore[misc]
    def __init__(self, everybody: set[Any]) -> None:
        self._everybody = everybody

    def on_ws_connected(self, transport: Any) -> None:
        self._everybody.add(transport)

    def on_ws_disconnected(self, transport: Any) -> None:
        self._everybody.discard(transport)

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == BINARY:
            number, name, arguments = unpack(frame.get_payload_as_memoryview())
            if name == "numbers":
                for n in range(arguments["count"]):
                    transport.send(BINARY, pack(("item", n)))
                transport.send(BINARY, pack((number, None)))
                return
            transport.send(BINARY, pack((number, METHODS[name](**arguments))))
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()


class Picows(Contestant):
    def __init__(self) -> None:
        self._everybody: set[Any] = set()

    async def serve(self, methods: int) -> Any:
        server = await ws_create_server(
            self._admit, HOST, 0, max_frame_size=ROOM, backlog=1024, enable_auto_ping=True
        )
        return server.sockets[0].getsockname()

    def _admit(self, request: Any) -> Any:
        if request.headers.get("Authorization") != PASSWORD:
            return None
        return Listener(self._everybody)

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        transport, session = await ws_connect(
            lambda: Session(heard),
            "ws://{}:{}/".format(*address),
            extra_headers={"Authorization": PASSWORD},
            max_frame_size=ROOM,
        )
        session.transport = transport
        return session

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            message = pack(("tick", {"n": n}))
            for transport in self._everybody:
                transport.send(BINARY, message)


class Session(WSListener):  # type: ignore[misc]
    transport: Any

    def __init__(self, heard: Heard | None) -> None:
        self._pending = Pending()
        self._heard = heard
        self._total = 0

    def on_ws_frame(self, transport: Any, frame: Any) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()
            return
        number, result = unpack(frame.get_payload_as_memoryview())
        if number == "item":
            self._total += result
        elif number != "tick":
            self._pending.answered(number, result)
        elif self._heard is not None:
            self._heard(result["n"])

    async def call(self, a: int, b: int) -> int:
        number, answer = self._pending.add()
        self.transport.send(BINARY, pack((number, "add", {"a": a, "b": b})))
        result: int = await answer
        return result

    async def stream(self, count: int) -> int:
        self._total = 0
        number, answer = self._pending.add()
        self.transport.send(BINARY, pack((number, "numbers", {"count": count})))
        await answer
        return self._total

    async def echo(self, data: bytes) -> Any:
        number, answer = self._pending.add()
        self.transport.send(BINARY, pack((number, "echo", {"data": data})))
        return await answer

    async def close(self) -> None:
        self.transport.send_close()
        await self.transport.wait_disconnected()
