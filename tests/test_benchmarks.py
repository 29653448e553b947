"""The benchmarks measure: a few calls of conduit and of the floors, through the real processes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import guard, guarded
from benchmarks import run as benchmarks
from benchmarks.contestants import CONTESTANTS, load
from benchmarks.contestants.base import PASSWORD
from benchmarks.guard import ALLOWED, judge
from benchmarks.machine import describe
from benchmarks.measures import PAUSE, Lag
from benchmarks.report import PARTS, aims, fill, page, table
from benchmarks.run import Run
from benchmarks.workloads import ALONE, WORKLOADS, Point, Workload
from conduit.transport.keys import MOST, client_keys, known_keys

pytest.importorskip("uvloop")

TINY = {
    "in-flight": Workload("calls", (Point("", callers=8),)),
    "sweep": Workload("calls", (Point("1"), Point("4", callers=4)), only=("conduit",)),
    "echo-1m": Workload("echo", (Point("", "echo", size=100_000),), floor="SF", unit="MB/s"),
    "connect": Workload("connect", (Point("", "connect"),)),
    "broadcast": Workload("burst", (Point("", "broadcast", connections=3, count=20),), floor=""),
    "idle": Workload("idle", (Point("", "idle", count=10, rounds=1),), unit="KiB each"),
    "hammer": Workload(
        "load",
        (ALONE, Point("others", connections=3, callers=2, beside=True)),
        only=("F1", "conduit"),
    ),
    "logins": Workload(
        "logins", (Point("", "connect", cold=True, beside=True),), only=("conduit",)
    ),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One tiny run of every kind of measurement."""
    log_path = tmp_path_factory.mktemp("benchmarks") / "log"
    with pytest.MonkeyPatch.context() as patch, log_path.open("w") as log:
        for name, workload in TINY.items():
            patch.setitem(WORKLOADS, name, workload)
        run = Run(
            ["F1", "Fc", "SF", "conduit"],
            {"bench": sys.executable},
            rounds=2,
            seconds=0.02,
            quick=False,
            log=log,
        )
        found = asyncio.run(run.workloads(TINY))
    return {
        "workloads": found,
        "versions": run.versions,
        "machine": describe(run.cores),
        "method": {"rounds": 2, "seconds": 0.02},
        "log": log_path.read_text(),
    }


def figures(results: dict[str, Any], workload: str) -> dict[str, Any]:
    by: dict[str, Any] = results["workloads"][workload]["points"][0]["by"]
    return by


def test_whoever_can_is_measured_and_nobody_fails(results: dict[str, Any]) -> None:
    assert "Traceback" not in results["log"]
    assert figures(results, "in-flight").keys() == {"F1", "Fc", "conduit"}
    assert figures(results, "echo-1m").keys() == {"SF", "conduit"}
    assert figures(results, "connect").keys() == {"F1", "conduit"}
    assert figures(results, "idle").keys() == {"F1", "conduit"}
    assert not [by for by in benchmarks.everything(results) if "error" in by]


def test_rates_and_processor_time_are_those_of_the_calls(results: dict[str, Any]) -> None:
    for workload in ("in-flight", "echo-1m", "connect"):
        for found in figures(results, workload).values():
            assert len(found["rounds"]) == 2
            assert 0 < found["lowest"] <= found["rate"] <= found["highest"]
            assert found["count"] > 0
            assert found["client_us"] > 0
    assert 0 < figures(results, "connect")["conduit"]["p50"] <= 1e6
    assert figures(results, "broadcast")["conduit"]["count"] == 60


def test_a_caller_beside_others_and_late_timers_are_told_apart_from_the_rest(
    results: dict[str, Any],
) -> None:
    alone, others = (point["by"] for point in results["workloads"]["hammer"]["points"])
    assert alone.keys() == others.keys() == {"F1", "conduit"}
    for found in (*alone.values(), *others.values()):
        assert 0 < found["rare_p50"] <= found["rare_p99"] <= found["rare_max"] < 10_000
        for side in ("server", "client"):
            assert 0 <= found[f"{side}_lag_p99"] <= found[f"{side}_lag_max"] < 10_000
    assert alone["conduit"]["rate"] == 0 < others["conduit"]["rate"]
    text = table("hammer", results["workloads"]["hammer"])
    assert len(text.splitlines()) == 8
    assert "| conduit " in text
    derived = figures(results, "logins")["conduit"]
    assert derived["client_us"] > 10_000, "600,000 iterations are never done so fast"


async def test_a_stall_counts_for_every_timer_that_was_due_in_it() -> None:
    lag = Lag()
    await asyncio.sleep(0)
    time.sleep(40 * PAUSE)
    await asyncio.sleep(2 * PAUSE)
    found = lag.end()
    assert found["max"] >= found["p99"] > 30 * PAUSE * 1e3


def test_a_report_has_every_contestant_and_fits_the_page(results: dict[str, Any]) -> None:
    text = table("in-flight", results["workloads"]["in-flight"])
    assert [line for line in text.splitlines() if line.startswith("| conduit ")]
    assert "| 4 " in table("sweep", results["workloads"]["sweep"])
    assert "in-flight: " in aims(results)
    target = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    for part in PARTS:
        figures = page(results, part)
        assert ("**hammer**" in figures) == (part == "hurt")
        once = fill(target, figures, part)
        assert once.count(f"<!-- {part} -->") == once.count(f"<!-- end of {part} -->") == 1
        assert fill(once, figures, part) == once
    assert page(results | {"workloads": {}}, "hurt") == ""
    assert json.loads(json.dumps(results)) == results


def test_a_contestant_that_is_not_installed_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("rpyc") is not None:
        pytest.skip("rpyc is installed here")
    pythons = {"bench": sys.executable}
    with (tmp_path / "log").open("w") as log:
        run = Run(["rpyc"], pythons, rounds=1, seconds=0.01, quick=True, log=log)
        found = asyncio.run(run.workloads(["sequential"]))
    assert found["sequential"]["points"][0]["by"] == {}
    assert "rpyc is left out: No module named 'rpyc'" in capsys.readouterr().out


async def test_each_login_from_nothing_may_derive_its_keys() -> None:
    contestant = load("conduit")
    for _ in range(MOST + 1):
        contestant.forget()
        assert known_keys(PASSWORD, b"salt", 1) is None
        await client_keys("benchmark", PASSWORD, b"salt", 1)


def test_whatever_conduit_does_not_get_through_is_named(results: dict[str, Any]) -> None:
    assert benchmarks.failures(results) == []
    point = {"label": "", "by": {"picows": {"error": "gone"}, "conduit-asyncio": {"error": "late"}}}
    other = {"label": "", "by": {"picows": {"error": "gone"}, "conduit": {"rate": 1.0}}}
    assert benchmarks.failures(
        {"workloads": {"logins": {"points": [point]}, "idle": {"points": [other]}}}
    ) == ["logins"]


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SystemExit, match="there is no contestant 'condiut'"):
        benchmarks.main(["--only", "condiut"])
    assert {name for w in WORKLOADS.values() for name in w.only} <= CONTESTANTS.keys()


# The count of instructions


def test_the_calls_that_are_counted_work() -> None:
    command = [sys.executable, str(Path(guarded.__file__))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(command, env=environment, check=True, timeout=20)


def test_more_instructions_than_allowed_are_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    told = dict.fromkeys(("python", "compiler", "msgpack", "pydantic", "pydantic-core"), "1")
    committed = {"ratio": 10.0, "instructions": 1000, **told}
    assert judge("3.13", committed | {"ratio": 10 * ALLOWED - 0.01}, committed)
    assert "fine" in capsys.readouterr().out
    assert judge("3.13", committed | {"ratio": 9.0}, committed)
    assert "COMMIT=1" in capsys.readouterr().out
    assert not judge("3.13", committed | {"ratio": 10.6, "pydantic": "2"}, committed)
    out = capsys.readouterr().out
    assert "+6.0%, TOO MUCH, 5% are allowed" in out
    assert "pydantic 1 -> 2" in out


def test_without_valgrind_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert guard.main([]) == 1
    assert "NOT RUN: it needs valgrind" in capsys.readouterr().out
    assert guard.main(["--if-possible"]) == 0
    assert "NOT RUN: it needs valgrind" in capsys.readouterr().out


def test_a_build_of_python_that_nothing_is_known_of_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/valgrind")
    monkeypatch.setattr(
        guard, "find", lambda version: ("python", {"build": "odd"}) if version > "3.11" else None
    )
    assert guard.main([]) == 1
    out = capsys.readouterr().out
    assert "Python 3.10 is not here" in out
    assert "Python 3.13 is another build than was committed: odd" in out
    assert "NOT RUN" in out
