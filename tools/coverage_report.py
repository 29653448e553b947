"""Combine what the matrix measured and hold it against the bar.

The bar, for branches and lines together: 95 % over all of conduit/, 100 % over conduit/protocol/.
Python 3.10 and 3.13 are measured, because some code runs on only one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".matrix"
OVERALL = 95.0
PROTOCOL = "conduit/protocol/"


def main() -> int:
    measured = {path.name.split("-")[0].removeprefix(".coverage.") for path in DATA.glob(".cov*-*")}
    if missing := {"3.10", "3.13"} - measured:
        print(f"not measured: Python {', '.join(sorted(missing))}; run `make matrix` first")
        return 1
    report = DATA / "coverage.json"
    coverage("combine", "--keep", "--quiet", str(DATA))
    coverage("report")
    coverage("json", "--quiet", "-o", str(report))

    totals = json.loads(report.read_text())
    overall = totals["totals"]["percent_covered"]
    protocol = {
        name: file["summary"]["percent_covered"]
        for name, file in totals["files"].items()
        if name.startswith(PROTOCOL)
    }
    low = [f"{name} {percent:.2f} %" for name, percent in protocol.items() if percent < 100]
    print(f"branch coverage: {overall:.2f} %, at least {OVERALL:g} % is wanted")
    print(f"{PROTOCOL}: {len(protocol)} files, below 100 %: {', '.join(low) or 'none'}")
    return 0 if overall >= OVERALL and protocol and not low else 1


def coverage(*arguments: str) -> None:
    command = [sys.executable, "-m", "coverage", *arguments]
    environment = os.environ | {"COVERAGE_FILE": str(DATA / ".coverage")}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"failed: coverage {' '.join(arguments)}")


if __name__ == "__main__":
    sys.exit(main())
