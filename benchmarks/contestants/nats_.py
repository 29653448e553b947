"""nats-py and a nats-server: client, broker and service, so every call takes two more hops.

Calls are NATS requests with MessagePack payloads to one subscriber per subject. The service is one
connection to the broker; the broker's processor time and memory count as the server's. Logging in
is the broker's user and password.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import nats  # type: ignore[import-not-found]

from .base import HOST, LARGEST, PASSWORD, Contestant, Heard, free_port

pack = msgpack.Packer().pack
unpack = msgpack.unpackb

CONFIGURATION = f"""
max_payload: {LARGEST}
max_pending: {16 * LARGEST}
max_connections: 10000
authorization {{ user: bench, password: "{PASSWORD}" }}
"""


class Nats(Contestant):
    _broker: asyncio.subprocess.Process | None = None

    async def serve(self, methods: int) -> Any:
        port = free_port()
        folder = Path(sys.prefix) / "bin"
        program = shutil.which("nats-server", path=f"{folder}{os.pathsep}{os.environ['PATH']}")
        if program is None:
            raise ImportError("there is no nats-server")
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(CONFIGURATION)
            file.flush()
            self._broker = await asyncio.create_subprocess_exec(
                *(program, "-a", HOST, "-p", str(port), "-c", file.name),
                stderr=asyncio.subprocess.DEVNULL,
            )
            self.children = (self._broker.pid,)
            service = self._service = await join((HOST, port), attempts=100)

        async def add(message: Any) -> None:
            arguments = unpack(message.data)
            await message.respond(pack(arguments["a"] + arguments["b"]))

        async def echo(message: Any) -> None:
            await message.respond(message.data)

        async def numbers(message: Any) -> None:
            for n in range(unpack(message.data)):
                await service.publish(message.reply, pack(n))
            await service.publish(message.reply, pack(None))

        await service.subscribe("add", cb=add)
        await service.subscribe("numbers", cb=numbers)
        await service.subscribe("echo", cb=echo, pending_bytes_limit=1 << 30)
        await service.flush()
        return HOST, port

    async def stop(self) -> None:
        if self._broker is not None:
            self._broker.kill()
            await self._broker.wait()

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        connection = await join(address)
        if heard is not None:

            async def tick(message: Any) -> None:
                heard(unpack(message.data)["n"])

            await connection.subscribe("tick", cb=tick)
            await connection.flush()
        return Session(connection)

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            await self._service.publish("tick", pack({"n": n}))


async def ignore(error: Exception) -> None:
    """Leave the end of the broker unmentioned; what matters raises as well."""


async def join(address: Any, attempts: int = 1) -> Any:
    """Connect to the broker, which may be starting."""
    while True:
        try:
            return await nats.connect(
                "nats://{}:{}".format(*address),
                user="bench",
                password=PASSWORD,
                allow_reconnect=False,
                error_cb=ignore,
                pending_size=4 * LARGEST,
            )
        except (OSError, nats.errors.NoServersError):
            attempts -= 1
            if not attempts:
                raise
            await asyncio.sleep(0.05)


class Session:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._request = connection.request
        self.close = connection.close

    async def call(self, a: int, b: int) -> int:
        answer = await self._request("add", pack({"a": a, "b": b}), timeout=30)
        result: int = unpack(answer.data)
        return result

    async def stream(self, count: int) -> int:
        total, ended = 0, asyncio.get_running_loop().create_future()

        async def item(message: Any) -> None:
            nonlocal total
            number = unpack(message.data)
            if number is None:
                ended.set_result(None)
            else:
                total += number

        inbox = self._connection.new_inbox()
        limits = {"pending_msgs_limit": 2 * count, "pending_bytes_limit": 1 << 30}
        subscription = await self._connection.subscribe(inbox, cb=item, **limits)
        await self._connection.publish("numbers", pack(count), reply=inbox)
        await ended
        await subscription.unsubscribe()
        return total

    async def echo(self, data: bytes) -> Any:
        return (await self._request("echo", data, timeout=60)).data
