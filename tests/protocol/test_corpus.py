"""The corpus of the fuzz targets: every input that is kept there is run again.

`make fuzz` looks for others. What it finds goes into fuzz/corpus/, and so becomes a test here.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from fuzz.run import LENGTHS

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"


def test_every_target_has_a_corpus() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(LENGTHS)


@pytest.mark.parametrize("target", LENGTHS)
def test_nothing_is_wrong_with_the_corpus(target: str) -> None:
    run = importlib.import_module(f"fuzz.targets.{target}").run
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    for path in inputs:
        try:
            run(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"python -m fuzz.targets {target} {path}") from error


@pytest.mark.parametrize("target", LENGTHS)
def test_nothing_is_wrong_with_the_first_inputs(target: str) -> None:
    module = importlib.import_module(f"fuzz.targets.{target}")
    for data in module.seeds():
        module.run(data)


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= 300
    assert sum(path.stat().st_size for path in files) <= 200 * 1024
