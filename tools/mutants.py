"""Mutate what must not be wrong, and count the mutants that the tests kill.

    make mutants                      the modules that pyproject.toml names under [tool.mutmut]
    make mutants ONLY=session,frames  these alone

mutmut changes one thing at a time inside a function (a comparison, a number, an argument) and runs
the tests that call this function. Mutants that live are listed with the command that shows them:
each is a test that is missing, code that does nothing, or a change that nobody could notice. What
is at the level of a module, and so the tables of flags and tokens, is not mutated.

A mutant with which the tests do not end counts as killed: they would not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
WORK: Final = ROOT / "mutants"
"""Where mutmut works; it has no setting for another place."""
MUTMUT: Final = Path(sys.executable).with_name("mutmut")
FLOOR: Final = 90.0
"""Percent of the mutants of each module that must be killed."""
KILLED: Final = (1, 3)
"""How pytest ends when a test fails, or when the mutant breaks pytest itself."""
ENDLESS: Final = (36, 24, -24, 152, 255)
"""How mutmut notes tests that took many times as long as they should."""


@dataclass
class Outcome:
    """What became of the mutants of a module."""

    module: str
    mutants: int = 0
    killed: int = 0
    endless: int = 0
    survivors: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return 100 * (self.killed + self.endless) / self.mutants if self.mutants else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Count the mutants that the tests kill.")
    parser.add_argument("--only", default="", help="names of modules, with commas")
    chosen = [name for name in parser.parse_args().only.split(",") if name]
    # Begun anew each time: mutmut does not notice that a test has become worse.
    shutil.rmtree(WORK, ignore_errors=True)
    started = time.monotonic()
    patterns = [f"conduit.*.{name}.*" for name in chosen]
    # With this Hypothesis chooses the same examples each time, and hands none on to another mutant.
    environment = {**os.environ, "CI": "1"}
    command = [str(MUTMUT), "run", *patterns]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        print("mutmut did not come to its end", file=sys.stderr)
        return 1
    outcomes = [read(path) for path in sorted(WORK.glob("conduit/**/*.py.meta"))]
    outcomes = [one for one in outcomes if not chosen or one.module in chosen]
    show(outcomes, time.monotonic() - started)
    return 0 if outcomes and all(one.share >= FLOOR for one in outcomes) else 1


def read(path: Path) -> Outcome:
    """Read what mutmut noted about a module."""
    outcome = Outcome(path.name.removesuffix(".py.meta"))
    for name, code in json.loads(path.read_text())["exit_code_by_key"].items():
        outcome.mutants += 1
        if code in KILLED:
            outcome.killed += 1
        elif code in ENDLESS:
            outcome.endless += 1
        else:  # the tests passed, or there are none
            outcome.survivors.append(name)
    return outcome


def show(outcomes: list[Outcome], seconds: float) -> None:
    """Print how to see each survivor, and the table."""
    for one in outcomes:
        for name in one.survivors:
            print(f"survived: {MUTMUT.relative_to(ROOT)} show {name}")
    print(
        f"\n{'module':<12}{'mutants':>8}{'killed':>8}{'survived':>10}{'timeouts':>10}{'share':>9}"
    )
    together = Outcome("together")
    for one in outcomes:
        together.mutants += one.mutants
        together.killed += one.killed
        together.endless += one.endless
        together.survivors += one.survivors
    for one in (*outcomes, together):
        print(
            f"{one.module:<12}{one.mutants:>8}{one.killed:>8}{len(one.survivors):>10}"
            f"{one.endless:>10}{one.share:>7.1f} %"
        )
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"in {seconds:.0f} s with mutmut {version('mutmut')} on Python {python}")


if __name__ == "__main__":
    sys.exit(main())
