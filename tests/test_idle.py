"""Connections on which nothing happens: none is given up, and they are in nobody's way.

The server and its idle clients are processes of their own. The one client that is not idle is here,
so that its figures are those of the server and of the machine.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path

import pytest

from conduit import Client
from tests.acceptance.support import Program, new_client
from tests.conftest import CHAOS, LONG, tell
from tests.figures import many_descriptors

PEERS = str(Path(__file__).parent / "idle_peers.py")
COUNT, SECONDS = (10_000, 600.0) if LONG else (1_000, 30.0) if CHAOS else (50, 2.0)
DEFAULT = (30.0, 90.0)
"""The heartbeat of a server that says nothing else."""
HEARTBEATS = [(5.0, 15.0), DEFAULT] if LONG else [(2.0, 6.0)] if CHAOS else [(0.4, 1.6)]
"""Whoever is not pinged, and is silent, is given up several times within the test."""
PAUSE = 0.01
NEAR = 0.05
"""Seconds in which 99 of 100 echoes are back, beyond those that an empty server takes meanwhile:
how long a busy machine lets everybody wait is not the doing of the idle ones.
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="figures come from /proc")


async def echoes(client: Client, seconds: float) -> list[float]:
    """Make a call every 10 ms, one after the other; return how long each took.

    A call that is late because the one before took long counts from when it was due.
    """
    loop = asyncio.get_running_loop()
    due = loop.time()
    took: list[float] = []
    for number in range(round(seconds / PAUSE)):
        due += PAUSE
        began = due
        if loop.time() < due:
            await asyncio.sleep(due - loop.time())
            began = loop.time()
        assert await client.rpc.call("echo", [number]) == number
        took.append(loop.time() - began)
    return took


@pytest.mark.long
@pytest.mark.timeout(0 if LONG else 90 if CHAOS else 30)
@pytest.mark.parametrize("heartbeat", HEARTBEATS, ids=lambda one: f"{one[0]:g}s-{one[1]:g}s")
async def test_idle_connections_are_held_and_are_in_nobodys_way(
    heartbeat: tuple[float, float], tmp_path: Path
) -> None:
    lost: list[object] = []
    interval, timeout = map(str, heartbeat)
    serve = (PEERS, "serve", interval, timeout)
    with (
        many_descriptors(COUNT + 200),
        Program(*serve, cwd=tmp_path) as server,
        Program(*serve, cwd=tmp_path) as empty_server,
    ):
        port, other = [
            int((await asyncio.to_thread(one.wait_for, r"serving at (\d+)"))[1])
            for one in (server, empty_server)
        ]
        async with new_client(("127.0.0.1", port)) as client:

            @client.on_disconnect
            async def gone(client: Client, reason: object) -> None:
                lost.append(reason)

            empty = await client.rpc.call("held")
            with Program(PEERS, "connect", str(port), str(COUNT), cwd=tmp_path) as clients:
                connected = r"connected, (\d+) bytes each"
                at_client = await asyncio.to_thread(clients.wait_for, connected, 20 + COUNT / 100)
                full = await client.rpc.call("held")
                assert full["connections"] == COUNT + 1
                async with new_client(("127.0.0.1", other)) as alone:
                    took, took_alone = await asyncio.gather(
                        echoes(client, SECONDS), echoes(alone, SECONDS)
                    )
                answers = await client.rpc.call("call_from_all", timeout=10 + COUNT / 100)
                held = await client.rpc.call("held")
            assert answers == {"answered": COUNT, "lost": 0}
            assert (held["connections"], held["lost"], lost) == (COUNT + 1, 0, [])
    p99, p99_alone = (statistics.quantiles(one, n=100)[-1] for one in (took, took_alone))
    each = (full["resident"] - empty["resident"]) / COUNT
    tell(
        f"{COUNT:,} idle connections for {SECONDS:.0f} s, heartbeat {interval} s / {timeout} s: "
        f"none lost; echo p50 {statistics.median(took) * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms, "
        f"longest {max(took) * 1000:.0f} ms, where an empty server has p99 "
        f"{p99_alone * 1000:.2f} ms; {each / 1024:.1f} KiB each at the server, "
        f"{int(at_client[1]) / 1024:.1f} KiB at the client"
    )
    assert p99 < NEAR + p99_alone
