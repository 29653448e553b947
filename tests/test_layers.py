"""Imports inside conduit/ go down only, and each layer imports only what it may.

Every import statement counts: at the top, inside a function, under TYPE_CHECKING. A module that
needs something from above is handed it, or states what it needs as a `typing.Protocol`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "conduit"

# From the bottom to the top. A module may import modules of the lines above its own, never of its
# own line or of those below. `conduit/__init__.py` gathers the public names and stands outside.
LAYERS = [
    {"exceptions", "idempotency", "schemas"},
    {"penalties", "roles", "signatures"},
    {"protocol.frames", "protocol.plain", "protocol.proxy", "protocol.tokens"},
    {"admission"},
    {"protocol.scram"},
    {"protocol.payload", "protocol.session", "protocol.events"},
    {"protocol.describe", "protocol.writer"},
    {"protocol.reader"},
    {"protocol.login"},
    {"protocol.cndt"},
    {"descriptors"},
    {"transport.handling", "transport.hooked"},
    {
        "transport.buffers",
        "transport.limited",
        "transport.tls",
        "transport.keys",
        "transport.line",
        "transport.proxied",
        "transport.pulse",
        "transport.requests",
        "transport.tasks",
        "transport.threads",
    },
    {
        "transport.loop",
        "transport.loop_thread",
        "transport.outlet",
        "transport.running",
    },
    {"transport.answers", "transport.calls", "transport.stream", "transport.wire_log"},
    {"transport.messages", "transport.serving"},
    {
        "transport.inbox",
        "transport.background",
        "transport.keyed",
        "transport.watchdog",
        "transport.pings",
        "transport.stream_call",
        "transport.thread_items",
    },
    {"transport.inlet", "transport.settings", "transport.streaming"},
    {"transport.parts"},
    {"rpc.generics", "rpc.retry", "rpc.validation"},
    {"rpc.contract"},
    {"rpc.streams"},
    {"rpc.interface"},
    {"rpc.bind", "rpc.compatibility", "rpc.fingerprint"},
    {"rpc.caller"},
    {"rpc.blocking_caller"},
    {"transport.life"},
    {"transport.connection"},
    {"transport.link", "rpc.context"},
    {"rpc.method"},
    {"transport.listeners", "rpc.implementation"},
    {"rpc.router"},
    {"away", "expected", "hooks", "offline", "peers", "users"},
    {"attempts", "client_caller", "clients", "dialing"},
    {"client_life", "from_thread", "server"},
    {"client"},
    {"blocking"},
    {"cli", "stub"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# What is neither in the standard library nor here is not declared in pyproject.toml.
DECLARED = {"pydantic", "msgpack"}
DECLARED |= {"pydantic_core", "typing_extensions"}  # pydantic's own other half, and what it needs
OPTIONAL = {"uvloop", "typer"}  # extras: imported where they are used, so that all else works

# A descriptor is plain data, and a protocol is bytes in, events and bytes out: the clock, the
# randomness and the socket belong to whoever drives it.
IO = {"asyncio", "concurrent", "multiprocessing", "os", "random", "secrets", "select", "selectors"}
IO |= {"signal", "socket", "subprocess", "threading", "time"}
FORBIDDEN = {"protocol.": IO | {"pydantic", "pydantic_core", "ssl"}, "descriptors": IO}


class Import(NamedTuple):
    """One imported module: where it stands, its dotted name, and whether it is run at import."""

    line: int
    name: str
    at_top: bool


def module_of(path: Path) -> str:
    """Return the dotted name below conduit, as the table writes it."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in FILES if not name.endswith("__init__")]
SUBPACKAGES = [name for name in FILES if name.endswith(".__init__")]


def imports(path: Path, source: str) -> Iterator[Import]:
    """Yield what a file imports; its own package's modules are named `conduit.<module>`."""
    tree = ast.parse(source, str(path))
    in_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in in_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:  # `from .protocol import frames` imports a module
                deeper = f"{base}.{alias.name}"
                name = deeper if deeper.removeprefix("conduit.") in FILES | RANK else base
                yield Import(node.lineno, name, at_top)


def complaints(module: str, path: Path, source: str) -> list[str]:
    """Say what is wrong with the imports of one file, one line each."""
    found = []
    for line, name, at_top in sorted(set(imports(path, source))):
        top_level, _, inner = name.partition(".")
        problem = ""
        if top_level == "conduit":
            if module != "__main__" and inner not in RANK:
                problem = "is not a module of the table: import the module that defines the name"
            elif inner and inner in RANK and RANK[inner] >= RANK[module]:
                problem = "is not below it"
        elif any(module.startswith(part) and top_level in FORBIDDEN[part] for part in FORBIDDEN):
            problem = "is I/O, a clock or chance, which this layer is handed from outside"
        elif top_level in OPTIONAL:
            if at_top and module != "__main__":
                problem = "is an extra: import it inside the function that uses it"
        elif top_level not in sys.stdlib_module_names | DECLARED:
            problem = "is not a declared dependency"
        if problem:
            found.append(f"{path.relative_to(ROOT)}:{line}: {name} {problem}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    assert module in RANK, (
        f"conduit/{module.replace('.', '/')}.py stands in no layer: "
        "add it to LAYERS in tests/test_layers.py, on the lowest line that its imports allow"
    )
    path = FILES[module]
    assert not complaints(module, path, path.read_text("utf-8"))


@pytest.mark.parametrize("module", SUBPACKAGES)
def test_subpackages_import_nothing(module: str) -> None:
    # They run before any module inside them, so an import there would reach across the layers.
    path = FILES[module]
    assert not list(imports(path, path.read_text("utf-8")))


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("protocol.frames", "from .session import Session", "is not below it"),
        ("protocol.frames", "from . import session", "is not below it"),
        ("protocol.frames", "import conduit.protocol.session", "is not below it"),
        ("protocol.frames", "def f():\n    from ..server import Server", "is not below it"),
        ("protocol.frames", "if TYPE_CHECKING:\n    from ..client import Client", "not below it"),
        ("protocol.frames", "from .. import data", "not a module of the table"),
        ("protocol.frames", "import asyncio", "is I/O"),
        ("protocol.frames", "from os import urandom", "is I/O"),
        ("protocol.frames", "import pydantic", "is I/O"),
        ("descriptors", "import concurrent.futures", "is I/O"),
        ("server", "import uvloop", "is an extra"),
        ("server", "import requests", "not a declared dependency"),
        ("server", "from .protocol.frames import Frame", ""),
        ("server", "def f():\n    import uvloop", ""),
        ("__main__", "import typer\nfrom . import Server", ""),
    ],
)
def test_the_rules_see(module: str, source: str, complaint: str) -> None:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    found = complaints(module, path, source)
    assert len(found) == bool(complaint)
    assert complaint in "".join(found)
