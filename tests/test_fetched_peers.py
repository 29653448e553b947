"""The programs of `make peers`: one that is missing is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import peers


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peers, "FETCHED", tmp_path)
    for name in ("bash", "psql"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho {name} 1.0\n", "ascii")
        program.chmod(0o755)
    missing = peers.show()
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()] == [
        ["psql", "psql", "1.0"],
        ["bash", "bash", "1.0"],
    ]
    assert missing[:2] == [
        "postgres is not on PATH, and `make peers` has not fetched it: install it",
        "openssl is not on PATH: install it",
    ]
