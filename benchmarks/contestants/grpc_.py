"""grpc.aio with protobuf messages, as its generator would make them.

The message classes come from a descriptor built here, which gives the same classes as generated
code without a compiler at installation. Each session has a channel, and so a TCP connection, of
its own. On uvloop it is a sixth faster than on asyncio's loop. There is no login: a token on every
call would only cost it time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

from .base import HOST, ROOM, Contestant, Heard

OPTIONS = [
    ("grpc.max_send_message_length", ROOM),
    ("grpc.max_receive_message_length", ROOM),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
    # By default it drops calls when a thousand wait, and the sweep goes up to 4,096.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
]


def message(name: str, **fields: int) -> Any:
    """Make the class of a message with the given field types."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", syntax="proto3")
    kind = file.message_type.add(name=name)
    for number, (field, type) in enumerate(fields.items(), 1):
        kind.field.add(name=field, number=number, type=type, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


INT64, BYTES = 3, 12
Pair = message("Pair", a=INT64, b=INT64)
Number = message("Number", value=INT64)
Blob = message("Blob", data=BYTES)


class Grpc(Contestant):
    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[int]] = set()

    async def serve(self, methods: int) -> Any:
        server = self._server = grpc.aio.server(options=OPTIONS)

        async def add(request: Any, context: Any) -> Any:
            return Number(value=request.a + request.b)

        async def echo(request: Any, context: Any) -> Any:
            return Blob(data=request.data)

        async def ticks(request: Any, context: Any) -> AsyncIterator[Any]:
            queue: asyncio.Queue[int] = asyncio.Queue()
            self._listeners.add(queue)
            yield Number(value=-1)
            try:
                while True:
                    yield Number(value=await queue.get())
            finally:
                self._listeners.discard(queue)

        async def numbers(request: Any, context: Any) -> AsyncIterator[Any]:
            for n in range(request.a):
                yield Number(value=n)

        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "add": unary(add, Pair.FromString, Number.SerializeToString),
            "echo": unary(echo, Blob.FromString, Blob.SerializeToString),
            "numbers": stream(numbers, Pair.FromString, Number.SerializeToString),
            "ticks": stream(ticks, Pair.FromString, Number.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
        port = server.add_insecure_port(f"{HOST}:0")
        await server.start()
        return HOST, port

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        channel = grpc.aio.insecure_channel("{}:{}".format(*address), options=OPTIONS)
        await channel.channel_ready()
        session = Session(channel)
        if heard is not None:
            await session.listen(heard)
        return session

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            for queue in self._listeners:
                queue.put_nowait(n)


class Session:
    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._add = channel.unary_unary("/bench/add", Pair.SerializeToString, Number.FromString)
        self._echo = channel.unary_unary("/bench/echo", Blob.SerializeToString, Blob.FromString)
        self._numbers = channel.unary_stream(
            "/bench/numbers", Pair.SerializeToString, Number.FromString
        )
        self._listening: asyncio.Task[None] | None = None

    async def listen(self, heard: Heard) -> None:
        method = "/bench/ticks"
        ticks = self._channel.unary_stream(method, Pair.SerializeToString, Number.FromString)
        stream = ticks(Pair())
        await stream.read()

        async def read() -> None:
            while number := await stream.read():
                heard(number.value)

        self._listening = asyncio.ensure_future(read())

    async def call(self, a: int, b: int) -> int:
        result: int = (await self._add(Pair(a=a, b=b))).value
        return result

    async def stream(self, count: int) -> int:
        total = 0
        async for number in self._numbers(Pair(a=count)):
            total += number.value
        return total

    async def echo(self, data: bytes) -> Any:
        return (await self._echo(Blob(data=data))).data

    async def close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
        await self._channel.close()
