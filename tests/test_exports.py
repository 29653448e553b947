"""The public names are there, documented and typed, and importing them pulls in no extra."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

import conduit

DOCUMENTED = [
    name
    for name in conduit.__all__
    if inspect.isclass(getattr(conduit, name)) or inspect.isroutine(getattr(conduit, name))
]


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods and properties that conduit itself defines for users of the class."""
    ours = [one for one in cls.__mro__ if one.__module__.partition(".")[0] == "conduit"]
    for name, member in itertools.chain.from_iterable(vars(one).items() for one in ours):
        member = getattr(member, "__func__", member)  # classmethod, staticmethod
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            yield name, member


def test_names_exist_are_unique_and_sorted() -> None:
    assert conduit.__all__ == sorted(set(conduit.__all__))
    assert [name for name in conduit.__all__ if not hasattr(conduit, name)] == []


def test_star_import() -> None:
    namespace: dict[str, Any] = {}
    exec("from conduit import *", namespace)
    assert set(conduit.__all__) <= set(namespace)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(conduit, name)
    assert public.__doc__
    if inspect.isclass(public):
        silent = [member for member, value in public_members(public) if not value.__doc__]
        assert not silent, f"without a docstring in {name}: {', '.join(silent)}"


def test_data_is_a_function() -> None:
    assert inspect.isfunction(conduit.data)


def test_types_are_shipped() -> None:
    assert files("conduit").joinpath("py.typed").is_file()


def test_import_leaves_extras_alone() -> None:
    code = "import sys, conduit; print({'uvloop', 'typer', 'websockets'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    assert shown.stdout.strip() == "set()"
