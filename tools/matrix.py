"""Run the tests on every tested Python that is found, on asyncio and on uvloop.

    python tools/matrix.py                      all of 3.10, 3.11, 3.12, 3.13
    python tools/matrix.py 3.10 3.13            only these
    python tools/matrix.py --rest               all but what `make test` runs

Each Python has its own environment in .venvs/, each cell its own log in .matrix/. One cell of the
oldest and one of the newest Python leave coverage data there, for tools/coverage_report.py.
A version that is not found is named in the table. One Python alone is no matrix, so fewer than
two fail, as does every cell that fails, is cut off, or runs no test.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".matrix"
VERSIONS = ["3.10", "3.11", "3.12", "3.13"]
# Both ends, both loops, and every test once; measuring makes 3.10 half as slow again.
MEASURED = {("3.10", "asyncio"), ("3.13", "uvloop")}
# What sees no event loop, or programs that bring their own, is run once for each Python: left out
# of one of its two cells, so that both take about as long.
LEFT_OUT = {
    "asyncio": [
        "tests/protocol",
        "tests/rpc/test_compatibility.py",
        "tests/rpc/test_fingerprint.py",
        "tests/rpc/test_method.py",
        "tests/rpc/test_router.py",
        "tests/rpc/test_streams.py",
        "tests/test_admission.py",
        "tests/test_cli.py",
        "tests/test_descriptors.py",
        "tests/test_exceptions.py",
        "tests/test_handshake_tampering.py",
        "tests/test_idle.py",
        "tests/test_model.py",
        "tests/test_penalties.py",
        "tests/test_scram.py",
        "tests/test_soak.py",
        "tests/test_tls_material.py",
    ],
    "uvloop": [
        "tests/test_demo.py",
        "tests/test_debug_scripts.py",
        "tests/test_benchmarks.py",
        "tests/test_loss.py",
        "tests/test_simulation.py",
        "tests/test_stub.py",
        "tests/test_typing.py",
        "tests/acceptance/test_blocking.py",
        "tests/acceptance/test_quickstart.py",
        "tests/transport/test_random_life.py",
    ],
}
# Programs for people and tools for developers, most of whose time goes into starting processes:
# run by the oldest and the newest Python only.
ENDS_ONLY = [
    "tests/test_benchmarks.py",
    "tests/test_cli.py",
    "tests/test_debug_scripts.py",
    "tests/test_demo.py",
    "tests/test_idle.py",
    "tests/test_readme.py",
    "tests/test_simulation.py",
    "tests/test_soak.py",
    "tests/test_stub.py",
    "tests/test_typing.py",
    "tests/acceptance/test_quickstart.py",
]
# Tests take free ports and their own temporary directories, so those that run at once do not meet.
SPREAD = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
PROGRESS = r"[.sxFE]+ *\[ *\d+%\]"
SILENCE = 100
"""Seconds without a line of progress after which a cell is cut off: no test may take a third of it,
so something hangs. How long all of them take is the machine's affair.
"""


@dataclass
class Cell:
    """What one run of the tests came to."""

    version: str
    loop: str
    passed: bool
    closing_line: str
    seconds: float

    @property
    def log(self) -> Path:
        return LOGS / f"{self.version}-{self.loop}.log"


def main(arguments: list[str]) -> int:
    rest = "--rest" in arguments
    versions = [argument for argument in arguments if argument != "--rest"] or VERSIONS
    unknown = set(versions) - set(VERSIONS)
    if unknown:
        return fail(f"not a tested version: {', '.join(sorted(unknown))}")
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir()
    with ThreadPoolExecutor(2) as pool:
        pythons = dict(zip(versions, pool.map(find_python, versions), strict=True))
        found = [version for version in versions if pythons[version]]
        if len(found) < 2:
            return fail(f"a matrix needs two Pythons of {', '.join(versions)}; found: {found}")
        ready = list(pool.map(lambda version: prepare(version, pythons[version]), found))
    if not all(ready):
        return 1
    tested = [(f"3.{sys.version_info[1]}", "asyncio")] if rest else []
    pairs = [(version, loop) for version in found for loop in LEFT_OUT]
    cells = [run(version, loop) for version, loop in pairs if (version, loop) not in tested]

    print(f"\n{'python':<8}{'loop':<9}{'':<6}{'seconds':>8}  pytest's closing line")
    for version in versions:
        if not pythons[version]:
            print(f"{version:<8}not found")
    for version, loop in tested:
        print(f"{version:<8}{loop:<9}left to `make test`")
    for cell in cells:
        verdict = "ok" if cell.passed else "FAIL"
        line = cell.closing_line
        print(f"{cell.version:<8}{cell.loop:<9}{verdict:<6}{cell.seconds:>8.1f}  {line}")
    for cell in cells:
        if not cell.passed:
            print(f"\n--- {cell.version} {cell.loop}, from {cell.log}\n{what_failed(cell)}")
    return 0 if all(cell.passed for cell in cells) else 1


def what_failed(cell: Cell) -> str:
    """Return the end of what pytest says of the failures, without its lines of dots."""
    lines = cell.log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if not re.fullmatch(PROGRESS, line)][-80:])


def find_python(version: str) -> str:
    """Return the path of a Python of this version, or an empty text."""
    command = ["sh", str(ROOT / "tools" / "find_python.sh"), version]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


def prepare(version: str, python: str) -> bool:
    """Make the environment of one version; tell whether that went well."""
    script = ROOT / "tools" / "environment.py"
    command = [python, str(script), str(ROOT / ".venvs" / version), "dev"]
    return subprocess.run(command, check=False).returncode == 0


def run(version: str, loop: str) -> Cell:
    """Run the tests once."""
    cell = Cell(version, loop, False, "", 0.0)
    command = [str(ROOT / ".venvs" / version / "bin" / "python"), "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", *SPREAD]
    ends = version in (VERSIONS[0], VERSIONS[-1])
    command += [f"--ignore={path}" for path in LEFT_OUT[loop] + ([] if ends else ENDS_ONLY)]
    environment = os.environ | {"CONDUIT_TEST_LOOP": loop}
    if (version, loop) in MEASURED:
        command += ["--cov", "--cov-report="]
        environment["COVERAGE_FILE"] = str(LOGS / f".coverage.{version}-{loop}")
    started = time.monotonic()
    with cell.log.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it is ended with all that it has started
        )
        returncode = ended(process, cell.log)
    cell.seconds = time.monotonic() - started
    lines = cell.log.read_text(errors="replace").splitlines()
    cell.closing_line = lines[-1] if lines else "no output"
    if returncode is None:
        cell.closing_line = f"cut off: silent for {SILENCE} s"
    cell.passed = returncode == 0 and bool(re.search(r"\b[1-9]\d* passed", cell.closing_line))
    print(f"{version} on {loop}: {cell.closing_line}", flush=True)
    return cell


def ended(process: subprocess.Popen[bytes], log: Path) -> int | None:
    """Wait until a run has ended, and return its code; None if it was cut off."""
    written, since = -1, 0.0
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it still runs
                return process.wait(1)
            size, now = log.stat().st_size, time.monotonic()
            if size != written:
                written, since = size, now
            elif now - since > SILENCE:
                return None
    finally:
        if process.returncode is None:  # cut off, or whoever waits was interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def fail(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
