"""A server that is killed: `python tests/chaos_server.py PORT FILE`.

It appends the number of each call to a file before the call runs, so that whoever kills it can see
what had begun.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conduit import Limits, Server  # conduit lies beside tests
from tests.acceptance.raw import VERIFIER


async def main(port: int, path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    server = Server(
        host="127.0.0.1",
        port=port,
        verifier=VERIFIER,
        max_connections=20_000,
        limits=Limits(max_away=20_000, max_pending_logins=20_000),
    )

    @server.rpc
    async def once(number: int, seconds: float = 0.0) -> int:
        os.write(log, f"{number}\n".encode())
        await asyncio.sleep(seconds)
        return number

    await server.start()
    print("serving")  # noqa: T201  # whoever has started it waits for that
    await asyncio.Event().wait()  # until it is killed


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
