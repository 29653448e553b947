"""Both ends of connections on which nothing happens, as two programs.

    python tests/idle_peers.py serve INTERVAL TIMEOUT
    python tests/idle_peers.py connect PORT COUNT

The server has a heartbeat of so many seconds and tells what it holds. The other program opens so
many connections and keeps them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conduit import Client, Connection, ConnectionClosed, Limits, Server
from tests.acceptance.raw import PASSWORD, VERIFIER
from tests.figures import resident, run

T = TypeVar("T")

LEADER = "the first of the clients"
AT_ONCE = 50
"""Clients that log in at the same time, and calls that are made."""


async def serve(interval: float, timeout: float) -> None:
    server = Server(
        host="127.0.0.1",
        port=0,
        verifier=VERIFIER,
        heartbeat_interval=interval,
        heartbeat_timeout=timeout,
        max_connections=50_000,
        limits=Limits(max_pending_logins=50_000),
    )
    lost = 0

    @server.on_client_away
    @server.on_client_disconnect
    async def gone(connection: Connection, reason: ConnectionClosed) -> None:
        nonlocal lost
        lost += 1

    @server.rpc
    async def echo(value: int) -> int:
        return value

    @server.rpc
    async def held() -> dict[str, int]:
        """Tell what there is; that takes a while, and nobody is served meanwhile."""
        return {"connections": len(server.connections), "lost": lost, "resident": resident()}

    @server.rpc
    async def call_from_all() -> dict[str, int]:
        """Have each client of the other program make a call."""
        (leader,) = [one for one in server.connections.values() if one.name == LEADER]
        told: dict[str, int] = await leader.rpc.call("call_from_all", timeout=None)
        return told

    await server.start()
    print(f"serving at {server.address[1]}", flush=True)  # noqa: T201
    await asyncio.Event().wait()  # until it is killed


async def connect(port: int, count: int) -> None:
    lost = 0

    async def gone(client: Client, reason: object) -> None:
        nonlocal lost
        lost += 1

    def client(name: str) -> Client:
        made = Client(
            f"tcp://127.0.0.1:{port}",
            password=PASSWORD,
            name=name,
            limits=Limits(min_iterations=4096),
        )
        made.on_disconnect(gone)
        return made

    async def each(method: Callable[[Client], Awaitable[T]]) -> list[T]:
        """Call something with each client, some at a time."""
        results: list[T] = []
        for start in range(0, count, AT_ONCE):
            results += await asyncio.gather(*map(method, clients[start : start + AT_ONCE]))
        return results

    leader = client(LEADER)
    clients = [leader, *(client("idle") for _ in range(count - 1))]

    @leader.rpc
    async def call_from_all() -> dict[str, int]:
        async def answered(one: Client) -> bool:
            return bool(await one.rpc.call("echo", [id(one)]) == id(one))

        return {"answered": sum(await each(answered)), "lost": lost}

    empty = resident()
    await each(Client.connect)
    print(f"connected, {(resident() - empty) / count:.0f} bytes each", flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    what, one, two = sys.argv[1:]
    run(serve(float(one), float(two)) if what == "serve" else connect(int(one), int(two)))
