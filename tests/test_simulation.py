"""Sessions that are cut at random hold what they promise, and it is noticed when they do not.

`make simulate` makes as many runs as one likes; tests/simulation/world.py tells of what.
"""

from __future__ import annotations

from typing import Any

import pytest

from conduit.protocol import session
from conduit.protocol.cndt import CNDT
from conduit.protocol.events import ResumeWanted
from conduit.protocol.frames import FrameType, word
from tests.simulation.parts import End, Violation
from tests.simulation.world import World
from tools import simulate

RUNS = 150
"""Runs of a test; each broken variant is found in the first few."""


def test_nothing_is_lost_twice_or_out_of_order() -> None:
    total = simulate.simulate(range(RUNS))
    assert total.violations == []
    assert total.messages > 100 * RUNS and total.cuts > 20 * RUNS
    assert total.resumes > 5 * RUNS and total.restarts > RUNS


def test_the_same_seed_gives_the_same_run() -> None:
    told: list[list[str]] = [[], []]
    for steps in told:
        World(7, tell=steps.append).run()
    assert told[0] == told[1] and len(told[0]) == 1_500


# The scheme without one of its rules.


class NoFence(World):
    """The server goes on reading the old link of a session that it has resumed."""

    def _fence(self, end: End) -> None:
        end.link = None


class NoEpoch(World):
    """The server looks at the id of a session alone."""

    def _older(self, wanted: ResumeWanted) -> End | None:
        return self._server.get(wanted.id)


class HastyAck(World):
    """A frame is acknowledged as soon as its first bytes have come."""

    def _acknowledge(self) -> None:
        for end in self._ends():
            if end.peer.eof() and end.link is not None:
                end.peer.send_urgent(word(FrameType.ACK), end.peer.session.received + 1)


class ForgottenRest(World):
    """What has come in the same read behind the answer to a login is dropped."""

    def _take(self, end: End, data: bytes | bytearray) -> None:
        super()._take(end, b"" if self._joining is None and self._resuming else data)

    _resuming = False

    def _go_on(self, end: End, accepted: int) -> None:
        self._resuming = end is self._client
        super()._go_on(end, accepted)

    def _piece(self, way: bytearray) -> bytes:
        self._resuming = False
        return super()._piece(way)


@pytest.mark.parametrize("world", [NoFence, NoEpoch, HastyAck, ForgottenRest])
def test_a_scheme_without_one_of_its_rules_is_found_out(world: type[World]) -> None:
    assert simulate.simulate(range(RUNS), world).violations


def _resume_with_old_bytes(peer: CNDT, accepted: int) -> None:
    peer.urgent[:] = peer.session.again(accepted)


def _forget_the_batch(batch: bytes, frames: int) -> int:
    return len(batch)


def _keep_the_batch(batch: bytes, frames: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (CNDT, "resume", _resume_with_old_bytes),
        (session, "_behind", _forget_the_batch),
        (session, "_behind", _keep_the_batch),
    ],
)
def test_a_fault_in_the_library_is_found_out(
    where: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, broken)
    assert simulate.simulate(range(RUNS)).violations


# The tool.


def test_a_violation_says_how_it_is_seen_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    total = simulate.simulate(range(RUNS), NoFence)
    seed, text = total.violations[0]
    simulate.report(total, 1.0)
    assert (
        f"{text}\n  see it again: python tools/simulate.py --seed {seed}" in capsys.readouterr().out
    )
    with pytest.raises(Violation) as again:
        NoFence(seed).run()
    assert str(again.value) == text


def test_the_tool_makes_runs_and_tells_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--runs", "120"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["runs"] == "120" and printed["violations"] == "0"
    assert simulate.main(["--seed", "7"]) == 0
    assert "handed over" in capsys.readouterr().out
