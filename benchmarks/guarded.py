"""What guard.py counts the instructions of: calls over a pair in memory, and a fixed loop.

Marks tell the parts from each other: callgrind starts a new count whenever `getppid` is called,
which nothing else here does. N calls come before 2N, so that what happens once for each part falls
out of the difference.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import Any

from benchmarks.unit import LOOPS, loop
from conduit import ClientDescriptor, ServerDescriptor
from conduit.exceptions import ConnectionClosed
from conduit.protocol.login import ClientLogin, ServerLogin
from conduit.protocol.session import Session
from conduit.rpc.router import Router
from conduit.transport.connection import Connection
from conduit.transport.life import ACCEPTING, CONNECTING
from conduit.transport.loop import Shared
from conduit.transport.settings import Settings

CALLS, TASKS = 1024, 64
NONCE = "guardguardguardguard1234"

mark = os.getppid


class TimelessLoop(asyncio.SelectorEventLoop):
    """Never fires a timer: how many would, depends on how busy the machine is."""

    def time(self) -> float:
        return time.monotonic() * 0.0


class MemoryLink:
    """Hands what is written to the other connection, in the next turn of the loop."""

    peer: Connection

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def write(self, data: bytes) -> None:
        self._loop.call_soon(self.peer.inlet.receive, data)

    def unsent(self) -> int:
        return 0

    def finish(self) -> None:
        self._loop.call_soon(self.peer.link_lost, None)

    abort = abandon = finish

    def give_up_after(self, seconds: float) -> None:
        """Nothing takes time here."""

    def hold(self, held: bool) -> None:
        """Nothing is compressed here."""

    def carry(self, connection: Connection) -> None:
        """Nothing is lost here, so there is no other connection to carry."""


class Owner:
    """Lets everybody in."""

    def __init__(self) -> None:
        self.open = asyncio.get_running_loop().create_future()

    def asked(self, connection: Connection, event: Any) -> None:
        connection.keeps = 30.0
        connection.introduce(Session(bytes(16), bytes(8)))
        connection.welcome("guard", "1")

    def opened(self, connection: Connection) -> None:
        self.open.set_result(None)

    def away(self, connection: Connection, reason: ConnectionClosed) -> None:
        """Nobody is told."""

    def returned(self, connection: Connection) -> None:
        """Nobody is told."""

    def leaving(self, connection: Connection, reason: ConnectionClosed) -> None:
        """The peer goes away."""

    def ended(self, connection: Connection, error: Exception) -> None:
        """Nobody is told."""


async def connect(router: Router) -> Connection:
    """Join two connections, everything switched on, and return the client's."""
    loop, owner = asyncio.get_running_loop(), Owner()
    served = Settings.of(ServerDescriptor())
    settings = Settings.of(ClientDescriptor(server_host="memory", server_port=1))
    shared = Shared.of(loop)
    server = Connection(shared, loop, Owner(), router, served, first_id=ACCEPTING, address=None)
    client = Connection(shared, loop, owner, router, settings, first_id=CONNECTING, address=None)
    server.protocol.accept(
        ServerLogin(
            server.protocol.send_login,
            capabilities=served.capabilities,
            nonce=NONCE,
            mock_secret=bytes(32),
            anonymous=True,
        )
    )
    client.protocol.open(
        ClientLogin(
            client.protocol.send_login,
            capabilities=settings.capabilities,
            nonce=NONCE,
            user=None,
            agent="guard/1",
        )
    )
    links = MemoryLink(loop), MemoryLink(loop)
    for link, connection, peer in zip(links, (server, client), (client, server), strict=True):
        link.peer = peer
        connection.link_made(link)
    await owner.open
    return client


async def call(client: Connection, count: int) -> None:
    """Make so many calls, some of them in flight at any time."""

    async def caller() -> None:
        for number in range(count // TASKS):
            assert await client.rpc.call("add", {"a": number, "b": 2}) == number + 2

    await asyncio.gather(*(caller() for _ in range(TASKS)))


async def main() -> None:
    router = Router(with_connection=True)

    async def add(a: int, b: int) -> int:
        return a + b

    router.add_method(add, None, timeout=None, extra="forbid", thread=None)
    client = await connect(router)
    await call(client, CALLS)
    loop(LOOPS)
    # What was made at the start is not looked through again, so that no count has that by chance.
    gc.collect()
    gc.freeze()
    for factor in (1, 2):
        mark()
        await call(client, factor * CALLS)
    for factor in (1, 2):
        mark()
        loop(factor * LOOPS)
    mark()
    await client.close()


if __name__ == "__main__":
    event_loop = TimelessLoop()
    event_loop.run_until_complete(main())
    event_loop.close()
