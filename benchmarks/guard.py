"""Count the instructions of a call, and fail when they have grown.

    python benchmarks/guard.py                  compare with benchmarks/guard.json
    python benchmarks/guard.py --commit         write what was counted there
    python benchmarks/guard.py --if-possible    pass, saying why, where nothing can be compared

Times wander on a busy machine; instructions do not. guarded.py is run under valgrind's callgrind by
every tested Python that is found. What a call costs is given as a ratio to a fixed loop of plain
Python that was counted in the same run. A compiler that makes another interpreter of the same
source moves the ratio by a fifth, so each build of Python is compared with itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# So that it can be run as a file. Behind everything else: see worker.py.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.guarded import CALLS
from benchmarks.unit import LOOPS
from tools.matrix import ROOT, VERSIONS, find_python, prepare

COMMITTED = ROOT / "benchmarks" / "guard.json"
ALLOWED = 1.05

TELL = """
import json, platform, re
from importlib.metadata import version
from sysconfig import get_config_var
optimized = re.findall(r"-O\\w", get_config_var("PY_CFLAGS"))[-1:]
options = re.findall(r"--(?:enable|with)-[\\w-]+(?=')", get_config_var("CONFIG_ARGS"))
print(json.dumps({
    "build": " ".join([platform.machine(), *optimized, *sorted(options)]),
    "python": platform.python_version(),
    "compiler": platform.python_compiler(),
    **{name: version(name) for name in ("msgpack", "pydantic", "pydantic-core")},
}))
"""
"""Has a Python say what it is. Whatever changes its ratio much is part of the build."""

Figures = dict[str, Any]


class Impossible(Exception):
    """Nothing can be counted, or compared, on this machine."""


def find(version: str) -> tuple[str, Figures] | None:
    """Return the path of a tested Python, and what it says of itself; None if it is not here."""
    found = find_python(version)
    if not found:
        return None
    if not prepare(version, found):
        sys.exit(f"the environment of Python {version} could not be made")
    python = str(ROOT / ".venvs" / version / "bin" / "python")
    told = subprocess.run([python, "-c", TELL], capture_output=True, text=True, check=True)
    return python, json.loads(told.stdout)


def count(python: str) -> Figures:
    """Count one call, and how many times as much as one loop it is."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]
        command += [f"--callgrind-out-file={folder}/part", python]
        command += [str(ROOT / "benchmarks" / "guarded.py")]
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ran.returncode:
            sys.exit(f"the counted run failed:\n{ran.stderr[-3000:]}")
        parts = [Path(folder, f"part.{number}").read_text() for number in range(1, 6)]
    totals = [int(re.findall(r"^totals: (\d+)$", part, re.MULTILINE)[0]) for part in parts]
    _, calls, twice, loops, loops_twice = totals
    call, loop = (twice - calls) / CALLS, (loops_twice - loops) / LOOPS
    return {"instructions": round(call), "ratio": round(call / loop, 3)}


def judge(version: str, found: Figures, committed: Figures) -> bool:
    """Say how what was counted compares; False when it is too much."""
    growth: float = found["ratio"] / committed["ratio"]
    verdict = "fine"
    if growth > ALLOWED:
        verdict = f"TOO MUCH, {ALLOWED - 1:.0%} are allowed"
    elif growth < 2 - ALLOWED:
        verdict = "so much less that it should be committed: make guard COMMIT=1"
    print(
        f"Python {version}: {found['instructions']:,} instructions a call, {found['ratio']:.2f} "
        f"loops; committed are {committed['ratio']:.2f}: {growth - 1:+.1%}, {verdict}"
    )
    changed = [
        f"{name} {committed[name]} -> {found[name]}"
        for name in ("python", "compiler", "msgpack", "pydantic", "pydantic-core")
        if found[name] != committed[name]
    ]
    if growth > ALLOWED and changed:
        print(f"  what else has changed: {', '.join(changed)}")
    return growth <= ALLOWED


def guard(*, commit: bool) -> bool:
    """Measure every Python and compare it, or commit; False when one needs too much.

    Raises:
        Impossible: There is no valgrind, or no Python that could be compared.
    """
    if shutil.which("valgrind") is None:
        raise Impossible(
            "it needs valgrind, which pip cannot install; "
            "your system has a package of that name (apt install valgrind)"
        )
    committed: dict[str, dict[str, Figures]] = json.loads(COMMITTED.read_text())
    chosen: dict[str, tuple[str, Figures]] = {}
    for version in VERSIONS:
        found = find(version)
        if found is None:
            print(f"Python {version} is not here")
        elif commit or version in committed.get(found[1]["build"], {}):
            chosen[version] = found
        else:
            print(f"Python {version} is another build than was committed: {found[1]['build']}")
    if not chosen:
        raise Impossible(f"no Python here is one that {COMMITTED.name} has figures of")
    with ThreadPoolExecutor(2) as pool:
        counted = list(pool.map(count, [python for python, _ in chosen.values()]))
    fine = True
    for (version, (_, told)), figures in zip(chosen.items(), counted, strict=True):
        now = figures | told
        known = committed.setdefault(now.pop("build"), {})
        fine &= judge(version, now, known.get(version, now))
        known[version] = now
    if commit:
        COMMITTED.write_text(json.dumps(committed, indent=2, sort_keys=True) + "\n")
    return fine or commit


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commit", action="store_true")
    parser.add_argument("--if-possible", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return 0 if guard(commit=options.commit) else 1
    except Impossible as exc:
        print(f"the count of instructions was NOT RUN: {exc}")
        return 0 if options.if_possible else 1


if __name__ == "__main__":
    sys.exit(main())
