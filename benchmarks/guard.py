"""Count the instructions of a call, and fail when they have grown.

    python benchmarks/guard.py            compare with benchmarks/guard.json
    python benchmarks/guard.py --commit   write what was counted there

Times wander on a busy machine; instructions do not. Two connections in one process call each other
over links in memory, everything switched on, under valgrind's callgrind. Counted are N calls
against 2N, so that what happens once falls out, and the difference is given as a ratio to that of
a fixed loop of plain Python in the same runs: a new interpreter changes both alike.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "guard.json"
CALLS, LOOPS, TASKS = 1024, 20_000, 64
ALLOWED = 1.05


class MemoryLink:
    """Hands what is written to the other connection, in the next turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.peer: Any = None

    def write(self, data: bytes) -> None:
        self.loop.call_soon(self.peer.receive, data)

    def unsent(self) -> int:
        return 0

    def finish(self) -> None:
        self.loop.call_soon(self.peer.link_lost, None)

    abort = finish


class Owner:
    """Lets everybody in."""

    def __init__(self) -> None:
        self.open = asyncio.get_running_loop().create_future()

    def asked(self, connection: Any, event: Any) -> None:
        from conduit.protocol.session import Session

        connection.introduce(Session(bytes(16), bytes(8)))
        connection.welcome("guard", "1")

    def opened(self, connection: Any) -> None:
        self.open.set_result(None)

    def ended(self, connection: Any, error: Exception) -> None:
        pass


async def work(calls: int, loops: int) -> None:
    """Run the fixed loop and the calls."""
    from conduit import ClientDescriptor, ServerDescriptor
    from conduit.protocol.login import ClientLogin, ServerLogin
    from conduit.rpc.router import Router
    from conduit.transport.connection import ACCEPTING, CONNECTING, Connection
    from conduit.transport.loop import Shared
    from conduit.transport.settings import Settings

    table = {number: str(number) for number in range(100)}
    for number in range(loops):
        table[number % 100] = f"{number}"

    router = Router(with_connection=True)

    async def add(a: int, b: int) -> int:
        return a + b

    router.add_method(add, None, timeout=None, extra="forbid", thread=None)

    loop = asyncio.get_running_loop()
    sides = []
    for descriptor, first_id in (
        (ServerDescriptor(), ACCEPTING),
        (ClientDescriptor(server_host="memory", server_port=1), CONNECTING),
    ):
        owner, settings = Owner(), Settings.of(descriptor)
        connection = Connection(
            Shared.of(loop), loop, owner, router, settings, first_id=first_id, address=None
        )
        sides.append((connection, owner, MemoryLink(loop), settings))
    (server, _, server_link, server_settings), (client, owner, client_link, settings) = sides
    server_link.peer, client_link.peer = client, server
    nonce = "guardguardguardguard1234"
    server.protocol.accept(
        ServerLogin(
            server.protocol.send_login,
            capabilities=server_settings.capabilities,
            nonce=nonce,
            mock_secret=bytes(32),
            anonymous=True,
        )
    )
    client.protocol.open(
        ClientLogin(
            client.protocol.send_login,
            capabilities=settings.capabilities,
            nonce=nonce,
            user=None,
            agent="guard/1",
        )
    )
    server.link_made(server_link)
    client.link_made(client_link)
    await owner.open

    async def caller() -> None:
        for number in range(calls // TASKS):
            assert await client.rpc.call("add", {"a": number, "b": 2}) == number + 2

    await asyncio.gather(*(caller() for _ in range(TASKS)))
    await client.close()


def count(calls: int, loops: int) -> int:
    """Return the instructions of one run."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    command += [str(Path(__file__)), "--work", str(calls), str(loops)]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(HERE.parent)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", ran.stderr)
    if ran.returncode or found is None:
        sys.exit(f"the counted run failed:\n{ran.stderr[-3000:]}")
    return int(found[1])


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--work"]:
        asyncio.run(work(int(arguments[1]), int(arguments[2])))
        return 0
    if shutil.which("valgrind") is None:
        sys.exit("the guard needs valgrind: apt-get install valgrind")
    runs = [(CALLS, LOOPS), (2 * CALLS, LOOPS), (CALLS, 2 * LOOPS)]
    with ThreadPoolExecutor(2) as pool:
        base, more_calls, more_loops = pool.map(lambda run: count(*run), runs)
    call, loop = (more_calls - base) / CALLS, (more_loops - base) / LOOPS
    version, ratio = f"{sys.version_info[0]}.{sys.version_info[1]}", call / loop
    print(f"Python {version}: {call:.0f} instructions a call, {loop:.0f} a loop, ratio {ratio:.1f}")
    committed: dict[str, float] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    if "--commit" in arguments:
        committed[version] = round(ratio, 2)
        COMMITTED.write_text(json.dumps(committed, indent=2, sort_keys=True) + "\n")
        return 0
    if version not in committed:
        sys.exit(f"no ratio is committed for Python {version}; run with --commit")
    allowed = committed[version] * ALLOWED
    verdict = "fine" if ratio <= allowed else "TOO MANY"
    print(f"{verdict}: committed {committed[version]:.1f}, allowed {allowed:.1f}")
    return 0 if ratio <= allowed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
