"""The judge of `make model`: what Spin must find, and what is said where there is no Spin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tools import check_model
from tools.check_model import SEARCHES, Found, Search, judge

HELD = Found(failure="", complete=True, states=41, depth=9, seconds=0.1, megabytes=128.0, story="")
FAILED = replace(HELD, failure="assertion violated", story="link 0 is cut\n")
SCHEME = Search("the scheme", "UP=1")
BROKEN = Search("without the fence", "UP=1 NO_FENCE", must_fail=True)


@pytest.mark.parametrize(
    ("wanted", "found", "fine"),
    [
        (SCHEME, HELD, True),
        (SCHEME, FAILED, False),
        (SCHEME, replace(HELD, complete=False), False),
        (BROKEN, FAILED, True),
        (BROKEN, HELD, False),
        (BROKEN, replace(FAILED, complete=False), False),
    ],
)
def test_the_scheme_must_hold_and_what_is_broken_must_fail(
    wanted: Search, found: Found, fine: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(wanted, found) is fine
    printed = capsys.readouterr().out
    assert ("MUST NOT" in printed or "NOT COMPLETE" in printed) is not fine
    assert "41 states" in printed and found.story in printed


def test_both_broken_variants_are_searched() -> None:
    broken = [search.sizes.split()[-1] for search in SEARCHES if search.must_fail]
    assert broken == ["NO_FENCE", "NO_EPOCH"]
    model = check_model.MODEL.read_text(encoding="ascii")
    assert all(f"\n#ifdef {name}" in model or f"\n#ifndef {name}" in model for name in broken)


def test_without_spin_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_model.main([]) == 1
    assert "apt install spin" in capsys.readouterr().out
    assert check_model.main(["--if-possible"]) == 0
    assert "NOT CHECKED" in capsys.readouterr().out
