"""The virtual environments of the contestants, made once and kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
REQUIREMENTS = {
    "bench": HERE / "requirements.txt",
    "bench-netconduit": HERE / "requirements-netconduit.txt",
}


def prepare(folder: Path, name: str) -> str:
    """Return the Python of an environment, making or completing the environment first."""
    directory = folder / name
    python = directory / "bin" / "python"
    wanted = REQUIREMENTS[name].read_text()
    # The checkout is part of it, for conduit is installed in place.
    known = f"{ROOT}{sys.version}{wanted}" + (ROOT / "pyproject.toml").read_text()
    digest = hashlib.sha256(known.encode()).hexdigest()
    note = directory / "installed.txt"
    if note.exists() and note.read_text() == digest:
        return str(python)
    print(f"making {directory.name} with Python {sys.version.split()[0]}", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if name == "bench":
        subprocess.run([*pip, "--editable", f"{ROOT}[uvloop]"], check=True)
    if subprocess.run([*pip, "-r", str(REQUIREMENTS[name])], check=False).returncode:
        # One package that does not install on this machine must not take the others with it.
        for line in wanted.splitlines():
            if line.strip() and not line.startswith("#"):
                if subprocess.run([*pip, line], check=False).returncode:
                    print(f"{line} cannot be installed here; whoever needs it is left out")
    note.write_text(digest)
    return str(python)
