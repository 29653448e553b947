"""The benchmarks measure: a few calls of conduit and of the floors, through the real processes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run as benchmarks
from benchmarks.contestants import CONTESTANTS
from benchmarks.machine import describe
from benchmarks.report import BEGIN, END, aims, fill, page, table
from benchmarks.run import Run
from benchmarks.workloads import WORKLOADS, Point, Workload

pytest.importorskip("uvloop")

TINY = {
    "in-flight": Workload("calls", (Point("", callers=8),)),
    "sweep": Workload("calls", (Point("1"), Point("4", callers=4)), only=("conduit",)),
    "echo-1m": Workload("echo", (Point("", "echo", size=100_000),), floor="SF", unit="MB/s"),
    "connect": Workload("connect", (Point("", "connect"),)),
    "broadcast": Workload("burst", (Point("", "broadcast", connections=3, count=20),), floor=""),
    "idle": Workload("idle", (Point("", "idle", count=10, rounds=1),), unit="KiB each"),
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


def test_a_report_has_every_contestant_and_fits_the_page(results: dict[str, Any]) -> None:
    text = table("in-flight", results["workloads"]["in-flight"])
    assert [line for line in text.splitlines() if line.startswith("| conduit ")]
    assert "| 4 " in table("sweep", results["workloads"]["sweep"])
    assert "in-flight: " in aims(results)
    target = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    once = fill(target, page(results))
    assert once.count(BEGIN) == once.count(END) == 1
    assert fill(once, page(results)) == once
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


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(SystemExit, match="there is no contestant 'condiut'"):
        benchmarks.main(["--only", "condiut"])
    assert {name for w in WORKLOADS.values() for name in w.only} <= CONTESTANTS.keys()
