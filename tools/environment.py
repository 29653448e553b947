"""Make a virtual environment with conduit installed in it, or leave a good one alone.

    python tools/environment.py .venv           the package, as a user would install it
    python tools/environment.py .venv dev       and everything that tests and checks need

The Python that runs this file becomes the environment's. What was installed is noted in the
environment itself, so that a second run costs nothing until pyproject.toml changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(directory: Path, extra: str) -> None:
    if not runs_this_version(directory):
        shutil.rmtree(directory, ignore_errors=True)
        print(f"making {directory.name} with Python {sys.version.split()[0]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    # The path is part of it: the package is installed in place, so a moved checkout starts anew.
    wanted = hashlib.sha256(str(ROOT).encode() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    note = directory / "installed.json"
    installed = json.loads(note.read_text()) if note.exists() else {}
    if installed.get("digest") == wanted and extra in ("", installed.get("extra")):
        return
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    print(f"installing conduit{extra and f'[{extra}]'} in {directory.name}", flush=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--editable", target], check=True)
    note.write_text(json.dumps({"digest": wanted, "extra": extra}))


def runs_this_version(directory: Path) -> bool:
    """Tell whether the environment there is whole and has the version that runs this file."""
    # The Python it was made with may be gone; pip comes last, so without it the making broke off.
    if not all((directory / "bin" / name).exists() for name in ("python", "pip")):
        return False
    major, minor = sys.version_info[:2]
    settings = (directory / "pyvenv.cfg").read_text().splitlines()
    return any(line.startswith(f"version = {major}.{minor}.") for line in settings)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "")
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(map(str, error.cmd))}")
