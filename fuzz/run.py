"""Fuzz every target, as many at a time as there are cores, and print what came of it.

    make fuzz                       each target for 60 seconds
    make fuzz SECONDS=600           each for ten minutes
    make fuzz RUNS=20000000         each with so many inputs, however long that takes
    make fuzz ONLY=parser,payload   these alone

It makes its own environment, .venvs/fuzz, with Python 3.11 to 3.13: atheris has no wheels for
others. What is found on the way stays in .fuzz/, and the next run goes on from there; the corpus
in fuzz/corpus/ is what pytest replays. `--keep` puts into it what reaches more of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
HERE: Final = ROOT / "fuzz"
ENVIRONMENT: Final = ROOT / ".venvs" / "fuzz"
WORK: Final = ROOT / ".fuzz"
LENGTHS: Final = {
    "payload": 4096,
    "parser": 1024,
    "login": 1024,
    "scram": 512,
    "session": 512,
    "connection": 512,
}
"""Target -> bytes that an input may have. They are instructions: what they make is larger."""
SLOW: Final = 20
"""Seconds after which an input that does not end is a failure."""
MEMORY: Final = 512
"""MiB that a target may take."""


@dataclass
class Outcome:
    """What came of a target."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    grown: int = 0
    passed: bool = False
    reproducers: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return WORK / f"{self.target}.log"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz every target.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, default=0, help="inputs of each target, and no time")
    parser.add_argument("--only", default="", help="names of targets, with commas")
    parser.add_argument("--keep", action="store_true", help="renew the corpus from what was found")
    options = parser.parse_args()
    targets = options.only.split(",") if options.only else list(LENGTHS)
    unknown = set(targets) - LENGTHS.keys()
    if unknown:
        return fail(f"not a target: {', '.join(sorted(unknown))}; there are {', '.join(LENGTHS)}")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return fail(f"atheris runs on Python 3.11 to 3.13, and this is {sys.version.split()[0]}")
    prepare()
    if options.keep:
        return keep(targets)
    limit = [f"-runs={options.runs}"] if options.runs else [f"-max_total_time={options.seconds}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda target: run(target, limit), targets))
    show(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def prepare() -> None:
    """Make the environment, or leave a good one alone."""
    wanted = (HERE / "requirements.txt").read_text()
    known = f"{ROOT}{sys.version}{wanted}" + (ROOT / "pyproject.toml").read_text()
    digest = hashlib.sha256(known.encode()).hexdigest()
    note = ENVIRONMENT / "installed.txt"
    if note.exists() and note.read_text() == digest:
        return
    print(f"making {ENVIRONMENT.name} with Python {sys.version.split()[0]}", flush=True)
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [python(), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run(
        [*pip, "--editable", str(ROOT), "-r", str(HERE / "requirements.txt")], check=True
    )
    note.write_text(digest)


def python() -> str:
    return str(ENVIRONMENT / "bin" / "python")


def run(target: str, limit: list[str]) -> Outcome:
    """Fuzz one target."""
    outcome = Outcome(target)
    found = WORK / target
    found.mkdir(parents=True, exist_ok=True)
    report = WORK / f"{target}.json"
    report.unlink(missing_ok=True)
    command = [python(), "-m", "fuzz.one", target, str(report), *limit]
    command += [f"-max_len={LENGTHS[target]}", f"-timeout={SLOW}", f"-rss_limit_mb={MEMORY}"]
    command += ["-print_final_stats=1", f"-artifact_prefix={WORK}/{target}-"]
    command += [str(found), str(HERE / "corpus" / target)]
    started = time.monotonic()
    with outcome.log.open("w") as log:
        ended = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    outcome.seconds = time.monotonic() - started
    if report.exists():
        measured = json.loads(report.read_text())
        outcome.slowest, outcome.grown = measured["slowest"], measured["grown"]
    text = outcome.log.read_text(errors="replace")
    counted = re.search(r"number_of_executed_units: (\d+)", text)
    outcome.inputs = int(counted[1]) if counted else 0
    written = re.findall(r"Test unit written to (\S+)", text)
    outcome.reproducers = [str(Path(path).relative_to(ROOT)) for path in written]
    outcome.passed = ended.returncode == 0 and outcome.inputs > 0
    return outcome


def show(outcomes: list[Outcome]) -> None:
    """Print the table, and the log of what failed."""
    head = f"{'target':<12}{'inputs':>11}{'a second':>10}{'longest':>10}{'memory':>9}  failures"
    print(f"\n{head}")
    for one in outcomes:
        rate = one.inputs / one.seconds if one.seconds else 0.0
        failures = ", ".join(one.reproducers) or ("none" if one.passed else f"see {one.log}")
        print(
            f"{one.target:<12}{one.inputs:>11,}{rate:>10,.0f}{1000 * one.slowest:>7.1f} ms"
            f"{one.grown / 1024:>+5.0f} MiB  {failures}"
        )
    print(f"{'together':<12}{sum(one.inputs for one in outcomes):>11,}")
    for one in outcomes:
        if not one.passed:
            lines = one.log.read_text(errors="replace").splitlines()
            tail = [line for line in lines if not line.startswith("INFO: ")][-60:]
            print(f"\n--- the end of {one.log}", *tail, sep="\n")
            for path in one.reproducers:
                print(f"again: {python()} -m fuzz.targets {one.target} {path}")


def keep(targets: list[str]) -> int:
    """Renew the corpus of these targets."""
    for target in targets:
        command = [python(), "-m", "fuzz.keep", target, str(WORK / target)]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            return 1
    return 0


def fail(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
