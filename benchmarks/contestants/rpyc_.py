"""rpyc: a thread per connection on the server, compression off, TCP_NODELAY on, large chunks.

A client with one call in flight uses rpyc as it is meant, by blocking calls. With more in flight
it uses rpyc's asynchronous results, and the event loop tells when there is something to read.
The remote methods are looked up once. There is no login.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import rpyc  # type: ignore[import-not-found]
from rpyc.core.channel import Channel  # type: ignore[import-not-found]
from rpyc.core.stream import SocketStream  # type: ignore[import-not-found]
from rpyc.utils.server import ThreadedServer  # type: ignore[import-not-found]

from .base import HOST, Contestant, Heard

Channel.COMPRESSION_THRESHOLD = 1 << 40
# The default of 64 kB copies what is left of a value for every 64 kB of it.
SocketStream.MAX_IO_CHUNK = 8 * 1024 * 1024
CONFIGURATION = {"sync_request_timeout": 60}


class Service(rpyc.Service):  # type: ignore[misc]
    def __init__(self) -> None:
        self.listeners: list[Any] = []

    def exposed_add(self, a: int, b: int) -> int:
        return a + b

    def exposed_echo(self, data: bytes) -> bytes:
        return data

    def exposed_listen(self, heard: Any) -> None:
        self.listeners.append(rpyc.async_(heard))


def without_delay(accepted: socket.socket) -> tuple[socket.socket, None]:
    """Let anybody in; this is where a server gets hold of the socket."""
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return accepted, None


class Rpyc(Contestant):
    async def serve(self, methods: int) -> Any:
        self._service = Service()
        logger = logging.getLogger("rpyc")
        logger.setLevel(logging.CRITICAL)
        server = ThreadedServer(
            self._service,
            hostname=HOST,
            port=0,
            backlog=1024,
            authenticator=without_delay,
            protocol_config=CONFIGURATION,
            logger=logger,
        )
        server._start_in_thread()
        return HOST, server.port

    async def connect(self, address: Any, callers: int, heard: Heard | None) -> Any:
        host, port = address
        stream = SocketStream.connect(host, port, nodelay=True)
        connection = rpyc.connect_stream(stream, config=CONFIGURATION)
        return Session(connection, blocking=callers == 1 and heard is None, heard=heard)

    async def broadcast(self, count: int) -> None:
        for n in range(count):
            for heard in self._service.listeners:
                heard(n)
        self._service.listeners.clear()


class Session:
    def __init__(self, connection: Any, *, blocking: bool, heard: Heard | None) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._blocking = blocking
        self._add, self._echo = connection.root.add, connection.root.echo
        if heard is not None:
            connection.root.listen(heard)
        if not blocking:
            self._add, self._echo = rpyc.async_(self._add), rpyc.async_(self._echo)
            self._loop.add_reader(connection.fileno(), self._readable)

    def _readable(self) -> None:
        while self._connection.poll(0):
            pass

    async def _answer(self, result: Any) -> Any:
        future = self._loop.create_future()
        result.add_callback(lambda ready: future.set_result(ready.value))
        return await future

    async def call(self, a: int, b: int) -> int:
        result = self._add(a, b)
        sum: int = result if self._blocking else await self._answer(result)
        return sum

    async def echo(self, data: bytes) -> Any:
        result = self._echo(data)
        return result if self._blocking else await self._answer(result)

    async def close(self) -> None:
        if not self._blocking:
            self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
