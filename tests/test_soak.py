"""A server and its clients in all weathers, for long: in the end there is no more than at first.

Both are processes of their own, which tell what they hold whenever all is quiet; see
`soak_clients.py`. Tasks, descriptors, sessions and stored answers are then known exactly. Memory is
not, because caches fill and the allocator has its own mind, so what counts is whether it grows with
what is done.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest

from tests.acceptance.support import Program, issue_certificate
from tests.conftest import CHAOS, LONG, tell

HERE = Path(__file__).parent
SECONDS = 1800.0 if LONG else 60.0 if CHAOS else 0.0
"""How long it goes on; the shortest is one round, which is too short to see a slope."""
SEED = random.randrange(2**32) if LONG or CHAOS else 7
ROUND = 60.0
"""Seconds in which a round is over, and says that it is stuck if it is."""
WARM = 1 / 3
"""Share of the rounds in which caches and threads may still be new."""
MOST_BLOCKS = 0.05 if LONG else 0.5
"""Blocks of memory, of any size, that may be left of each login at the server, and of each client
that came and went at the other side, with all the calls that were made meanwhile. What is leaked is
one block for each of them or more. At rest their number varies by some tens, for which Python's own
caches are enough, and a minute sees hundreds of both.
"""
MOST_BYTES = 1024 * 1024
"""Bytes by which the memory may have grown from the end of the warm-up on, by the line through what
was measured: pages that the allocator did not give back, and not a KiB for each connection.
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="figures come from /proc")


def growth(rests: list[dict[str, Any]], side: str) -> tuple[float, float]:
    """Return how many blocks each who came has left on one side, and by what the memory grew."""
    came = [rest[side]["came"] for rest in rests]
    blocks = linear_regression(came, [rest[side]["blocks"] for rest in rests]).slope
    times = [rest["time"] for rest in rests]
    line = linear_regression(times, [rest[side]["resident"] for rest in rests])
    return blocks, line.slope * (times[-1] - times[0])


def check_rest(rest: dict[str, Any]) -> None:
    """Check that nothing is left of what was done, and that nobody has found an exception."""
    wanted = {side: {**held, "errors": []} for side, held in rest["wanted"].items()}
    found = {side: {name: rest[side][name] for name in held} for side, held in wanted.items()}
    assert found == wanted


@pytest.mark.long
@pytest.mark.timeout(0 if LONG else 150 if CHAOS else 30)
async def test_nothing_is_left_of_what_is_done_in_all_weathers(tmp_path: Path) -> None:
    certificate, authority = issue_certificate(tmp_path)
    rests: list[dict[str, Any]] = []
    with Program(str(HERE / "soak_server.py"), str(certificate), cwd=tmp_path) as server:
        ports = await asyncio.to_thread(server.wait_for, r"serving at (\d+) and (\d+)")
        arguments = [*ports.groups(), str(authority), str(SECONDS), str(SEED)]
        with Program(str(HERE / "soak_clients.py"), *arguments, cwd=tmp_path) as clients:
            while not rests or "outcomes" not in rests[-1]:
                line = await asyncio.to_thread(clients.wait_for, r"^{.*}$", ROUND)
                rests.append(json.loads(line[0]))
                check_rest(rests[-1])
    first, *rests, end = rests
    tell(
        f"seed {SEED}: {len(rests)} rounds, {end['operations']:,} operations on "
        f"{end['connections']:,} connections; faults {end['faults']}; {end['outcomes']}"
    )
    if not (LONG or CHAOS):
        return
    warm = rests[round(len(rests) * WARM) :]
    for side in ("server", "client"):
        blocks, grown = growth(warm, side)
        before, after, left = (one[side]["resident"] / 1024 for one in (first, warm[0], end))
        tell(
            f"{side}: {blocks:+.3f} blocks for each of {end[side]['came']:,} who came, "
            f"{grown / 1024:+.0f} KiB from the end of the warm-up; {before:.0f} KiB at first, "
            f"{after:.0f} when warm, {left:.0f} at last; "
            f"tasks {first[side]['tasks']} and {end[side]['tasks']}, "
            f"descriptors {first[side]['descriptors']} and {end[side]['descriptors']}"
        )
        if sys.version_info >= (3, 11):  # 3.10 keeps two for every function that ran 1,024 times
            assert blocks < MOST_BLOCKS
        assert grown < MOST_BYTES
        assert end[side]["resident"] < warm[0][side]["resident"] + MOST_BYTES
