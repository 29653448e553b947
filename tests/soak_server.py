"""The server of the soak: `python tests/soak_server.py CERTIFICATE`.

It serves plain TCP and TLS, with every kind of handler, and tells what it holds.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conduit import TLS, Connection, MemoryStore, RPCError, Server, Stream
from tests.acceptance.raw import VERIFIER
from tests.figures import Complaints, figures, listen_to_complaints, run

RESUME_TTL = 0.5
"""Seconds for which sessions are kept, so that some come back and some do not."""
KEPT = 0.5
"""Seconds for which answers to calls with a key are kept."""
HEARTBEAT = (0.2, 0.8)


class Refused(RPCError):
    """What a handler may raise."""


def serve_calls(server: Server) -> None:
    """Serve every kind of call."""

    @server.rpc
    async def echo(value: bytes) -> bytes:
        return value

    @server.rpc
    async def charge(connection: Connection, amount: int) -> int:
        connection.state["charged"] = connection.state.get("charged", 0) + amount
        await asyncio.sleep(0.001)
        return amount

    @server.rpc
    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @server.rpc
    def compute(number: int) -> int:
        return sum(range(number))

    @server.rpc
    async def refuse(text: str) -> None:
        raise Refused(text, details={"text": text})

    @server.rpc
    async def fail(text: str) -> None:
        raise ValueError(text)

    @server.rpc
    async def count(upto: int) -> AsyncIterator[int]:
        for number in range(upto):
            yield number

    @server.rpc
    async def total(numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    @server.rpc
    async def doubled(numbers: AsyncIterator[int], stream: Stream[int]) -> int:
        seen = 0
        async for number in numbers:
            await stream.send(2 * number)
            seen += 1
        return seen

    @server.rpc
    async def ask_back(connection: Connection, number: int) -> int:
        answer: int = await connection.rpc.call("double", [number])
        return answer

    @server.rpc
    async def tell_all(data: bytes, reliable: bool) -> int:
        return await server.broadcast("news", data, reliable=reliable)


def serve_messages(server: Server) -> None:
    """Serve every kind of message, and have every kind of hook."""

    @server.on("note")
    async def note(connection: Connection, message: Any) -> None:
        connection.state["noted"] = message

    @server.on("ask")
    async def ask(connection: Connection, message: int) -> int:
        await asyncio.sleep(0)
        return message

    @server.on("late", concurrent=True)
    async def late(connection: Connection, message: float) -> None:
        await asyncio.sleep(message)

    @server.on_client_away
    @server.on_client_disconnect
    async def gone(connection: Connection, reason: object) -> None:
        await asyncio.sleep(0)

    @server.on_client_return
    async def returned(connection: Connection) -> None:
        await asyncio.sleep(0)


def serve_figures(
    server: Server, others: Server, answers: MemoryStore, complaints: Complaints
) -> None:
    """Tell what the process holds, on one of its servers."""
    logins = 0

    @server.on_client_connect
    @others.on_client_connect
    async def came(connection: Connection) -> None:
        nonlocal logins
        logins += 1

    @server.rpc
    async def held() -> dict[str, Any]:
        return {
            **await figures(),
            "sessions": len(server.connections) + len(others.connections),
            "answers": len(answers),
            "errors": complaints.errors,
            "came": logins,
        }


async def main(certificate: str) -> None:
    complaints = listen_to_complaints()
    store = MemoryStore()
    fields: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "verifier": VERIFIER,
        "resume_ttl": RESUME_TTL,
        "idempotency": store,
        "idempotency_ttl": KEPT,
        "heartbeat_interval": HEARTBEAT[0],
        "heartbeat_timeout": HEARTBEAT[1],
        "enable_compression": True,
    }
    plain, secured = Server(**fields), Server(**fields, tls=TLS(certificate=certificate))
    for server in (plain, secured):
        serve_calls(server)
        serve_messages(server)
    serve_figures(plain, secured, store, complaints)
    async with plain, secured:
        print(f"serving at {plain.address[1]} and {secured.address[1]}", flush=True)  # noqa: T201
        await asyncio.Event().wait()  # until it is killed


if __name__ == "__main__":
    run(main(sys.argv[1]))
