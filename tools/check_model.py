"""Have Spin go through every state of the model of resume, and of its broken variants.

    python tools/check_model.py                  the scheme must hold, the variants must fail
    python tools/check_model.py --long           more messages and faults: minutes and gigabytes
    python tools/check_model.py --if-possible    pass, saying why, where there is no Spin

What the model is, and what it checks, is told at the head of tests/model/resume.pml. For a variant
that fails the shortest story that leads there is printed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "tests" / "model" / "resume.pml"
MEGABYTES = 8000
"""Memory at which a search gives up, and so fails."""
DEPTH = 1_000_000
"""Steps of one run that a search can follow; a deeper one fails, since it was not complete."""

DEPTH_FIRST = ("-DSAFETY", "-DCOLLAPSE")
BREADTH_FIRST = ("-DSAFETY", "-DCOLLAPSE", "-DBFS")
"""Finds the shortest story of a failure."""
CYCLES = ("-DNP", "-DCOLLAPSE")
"""Finds a run that has no end: the model marks no step as progress."""
COMPACT = ("-DSAFETY", "-DHC4")
"""Keeps a hash of each state, so that much larger searches fit; it might take two for one."""

OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {CYCLES: ("-l",), COMPACT: ("-w27",)}
"""What the searching program is told; 27 makes the table large enough for 100 million states."""


@dataclass(frozen=True)
class Search:
    """One search through the model: how large it is, how it is searched, and how it must end."""

    name: str
    sizes: str
    kind: tuple[str, ...] = DEPTH_FIRST
    must_fail: bool = False


SEARCHES = (
    Search("the scheme, 4 messages up", "UP=4 DOWN=0 CUTS=3 KILLS=1 EXPIRIES=1"),
    Search("the scheme, 2 up and 2 down", "UP=2 DOWN=2 CUTS=2 KILLS=1 EXPIRIES=1"),
    Search("the scheme, every run ends", "UP=2 DOWN=1 CUTS=2 KILLS=1 EXPIRIES=1", CYCLES),
    Search(
        "without the fence",
        "UP=2 DOWN=0 CUTS=2 KILLS=1 EXPIRIES=0 NO_FENCE",
        BREADTH_FIRST,
        must_fail=True,
    ),
    Search(
        "without the epoch rule",
        "UP=2 DOWN=0 CUTS=2 KILLS=1 EXPIRIES=0 NO_EPOCH",
        BREADTH_FIRST,
        must_fail=True,
    ),
)

LONG_SEARCHES = (
    Search("the scheme, 5 messages up", "UP=5 DOWN=0 CUTS=4 KILLS=2 EXPIRIES=1", COMPACT),
    Search("the scheme, 2 up and 2 down", "UP=2 DOWN=2 CUTS=3 KILLS=1 EXPIRIES=1"),
)


class Impossible(Exception):
    """Nothing can be searched on this machine."""


@dataclass(frozen=True)
class Found:
    """What a search has found."""

    failure: str
    complete: bool
    states: int
    depth: int
    seconds: float
    megabytes: float
    story: str


def run(command: Sequence[str], folder: str) -> str:
    """Run a program in a folder and return what it printed; whatever it complains of ends us."""
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode or ran.stderr:
        sys.exit(f"{' '.join(command)} failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return ran.stdout


def number(pattern: str, text: str) -> float:
    """Return the number that a report has at a place where it must have one."""
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        sys.exit(f"Spin reported nothing like {pattern!r}:\n{text[-3000:]}")
    return float(match[1])


def search(wanted: Search) -> Found:
    """Search through the model once."""
    defines = [f"-D{size}" for size in wanted.sizes.split()]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(MODEL, folder)
        run(["spin", "-a", *defines, MODEL.name], folder)
        # pan.c is Spin's, and so are its warnings.
        run(
            ["gcc", "-O2", "-w", f"-DMEMLIM={MEGABYTES}", *wanted.kind, "-o", "pan", "pan.c"],
            folder,
        )
        report = run(["./pan", f"-m{DEPTH}", *OPTIONS.get(wanted.kind, ())], folder)
        failure = "; ".join(re.findall(r"^pan:\d+: (.*) \(at depth", report, re.MULTILINE))
        story = ""
        if Path(folder, f"{MODEL.name}.trail").exists():
            told = run(["spin", "-t", "-T", *defines, MODEL.name], folder)
            story, _, _ = told.partition("spin: trail ends")
    if not failure and number(r"errors: (\d+)", report):
        failure = "an error that it did not name"
    return Found(
        failure=failure,
        complete="max search depth too small" not in report and "-DMEMLIM" not in report,
        states=int(number(r"^ *([\d.e+]+) states, stored", report)),
        depth=int(number(r"depth reached (\d+)", report)),
        seconds=number(r"elapsed time ([\d.e+-]+) seconds", report),
        megabytes=number(r"([\d.]+)\s+total actual memory usage", report),
        story=story,
    )


def judge(wanted: Search, found: Found) -> bool:
    """Print what a search has found, and tell whether it ended as it must."""
    verdict = f"fails: {found.failure}" if found.failure else "holds"
    fine = found.complete and bool(found.failure) == wanted.must_fail
    if not found.complete:
        verdict += ", BUT THE SEARCH WAS NOT COMPLETE"
    elif not fine:
        verdict += ", AND MUST NOT"
    print(
        f"{wanted.name} ({wanted.sizes}): {verdict}\n"
        f"  {found.states:,} states, depth {found.depth:,}, {found.seconds:.1f} s, "
        f"{found.megabytes:,.0f} MB",
        flush=True,  # the next search may take minutes
    )
    for line in found.story.splitlines():
        print(f"    {line}")
    return fine


def check(searches: Sequence[Search]) -> bool:
    """Make the searches, print what they have found, and tell whether each ended as it must.

    Raises:
        Impossible: Spin or a C compiler is missing.
    """
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            raise Impossible(
                f"it needs {tool}, which pip cannot install; "
                f"your system has a package of that name (apt install {tool})"
            )
    fine = True
    for wanted in searches:
        found = search(wanted)
        fine &= judge(wanted, found)
    return fine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--if-possible", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return 0 if check(LONG_SEARCHES if options.long else SEARCHES) else 1
    except Impossible as exc:
        print(f"the model was NOT CHECKED: {exc}")
        return 0 if options.if_possible else 1


if __name__ == "__main__":
    sys.exit(main())
