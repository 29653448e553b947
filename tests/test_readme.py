"""The Python code in README.md and docs/*.md runs.

    ```python                 runs; `await` may stand at the top level
    ```python background      a program that serves until it is stopped, such as a server: runs
                              while the blocks after it run, and is cancelled at the end of the page
    ```python no-run          is only compiled

The tests that a page names are there.

The blocks of one page run in order, in one namespace and one event loop, so a block can use what
those before it defined. `asyncio.run(...)` at the top level, with or without the main guard, is
awaited in that loop. The ports 8080 and 8443 stand for free ones.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import logging
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.acceptance.support import free_port

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+) *(?P<info>[^`\n]*)\n(?P<code>.*?)^ *(?P=fence) *$", re.M | re.S
)
TEST = re.compile(r"`(?:tests/)?((?:[a-z_]+/)*test_\w+\.py)(?:::(test_\w+))?`")
PORTS = re.compile(r"\b(8080|8443)\b")
SECONDS = 25  # for one page; pytest's own limit comes later


class Block(NamedTuple):
    """One block of Python: the line its code starts on, the words after `python`, the code."""

    line: int
    words: set[str]
    code: str


def blocks(page: str) -> Iterator[Block]:
    """Yield the Python blocks of a page."""
    for match in FENCE.finditer(page):
        language, *words = match["info"].split() or [""]
        if language == "python":
            line = page.count("\n", 0, match.start("code")) + 1
            unknown = set(words) - {"background", "no-run"}
            assert not unknown, f"line {line}: unknown words after python: {unknown}"
            yield Block(line, set(words), textwrap.dedent(match["code"]))
        else:
            assert language not in ("py", "python3", "pycon"), f"```{language} would not be run"


class RunInThisLoop(ast.NodeTransformer):
    """Take the body out of the main guard, and await what `asyncio.run` would have run."""

    def visit_If(self, node: ast.If) -> Any:
        if ast.unparse(node.test) != "__name__ == '__main__'":
            return node
        return [self.visit(statement) for statement in node.body]

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "asyncio.run":
            node.value = ast.copy_location(ast.Await(call.args[0]), call)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        return node  # the top level only

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> Any:
        return node


def compiled(block: Block, page: Path) -> types.CodeType:
    """Compile a block so that its tracebacks name the page and its line."""
    tree = ast.increment_lineno(ast.parse(block.code, str(page)), block.line - 1)
    tree = ast.fix_missing_locations(RunInThisLoop().visit(tree))
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code: types.CodeType = compile(tree, str(page), "exec", flags, dont_inherit=True)
    return code


async def run_page(page: Path, text: str, module: types.ModuleType) -> None:
    """Run the blocks of a page one after the other."""

    async def run(code: types.CodeType) -> None:
        # With a top-level `await` in it, the code is the body of a coroutine.
        result = eval(code, module.__dict__)
        if inspect.iscoroutine(result):
            await result

    ports: dict[str, str] = {}
    serving: list[asyncio.Task[None]] = []
    try:
        for block in blocks(PORTS.sub(lambda match: port_for(match[0], ports), text)):
            code = compiled(block, page)
            if "no-run" in block.words:
                continue
            if "background" not in block.words:
                await run(code)
                continue
            task = asyncio.create_task(run(code))
            serving.append(task)
            await listening(task, [int(port) for port in ports.values()])
    finally:
        for task in serving:
            task.cancel()
        for result in await asyncio.gather(*serving, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


def port_for(name: str, ports: dict[str, str]) -> str:
    """Return the port that stands for this one on the page."""
    if name not in ports:
        ports[name] = str(free_port())
    return ports[name]


async def listening(task: asyncio.Task[None], ports: list[int]) -> None:
    """Wait until the program has ended or one of the ports is open."""
    while not task.done():
        for port in ports:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.01)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module for the code of a page, known by name as Pydantic wants it for annotations."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    yield module
    logging.getLogger("conduit").setLevel(logging.NOTSET)  # a page shows how it is set


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_python_blocks_run(page: Path, module: types.ModuleType) -> None:
    await asyncio.wait_for(run_page(page, page.read_text("utf-8"), module), SECONDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_that_a_page_names_are_there(page: Path) -> None:
    for path, name in TEST.findall(page.read_text("utf-8")):
        file = next((file for at in ("tests", ".") if (file := ROOT / at / path).is_file()), None)
        assert file is not None, path
        assert not name or f"def {name}(" in file.read_text("utf-8"), f"{path}::{name}"


def test_readme_shows_code() -> None:
    assert any("no-run" not in block.words for block in blocks(README.read_text("utf-8")))


RunPage = Callable[[str], Any]


@pytest.fixture
def run_text(module: types.ModuleType) -> RunPage:
    return lambda text: run_page(ROOT / "page.md", textwrap.dedent(text), module)


class TestTheRunner:
    """What the tests above promise about pages, on pages made up for it."""

    async def test_blocks_share_names_and_loop(
        self, run_text: RunPage, module: types.ModuleType
    ) -> None:
        await run_text("""
            ```python
            import asyncio
            loop = asyncio.get_running_loop()
            async def answer():
                return 42
            ```
            ```console
            $ not python
            ```
            - in a list

              ```python
              number = await answer()
              same = loop is asyncio.get_running_loop()
              ```
        """)
        assert (module.number, module.same) == (42, True)

    async def test_a_program_is_awaited(self, run_text: RunPage, module: types.ModuleType) -> None:
        await run_text("""
            ```python
            import asyncio
            ran = []
            async def main():
                ran.append(__name__)
            asyncio.run(main())
            if __name__ == "__main__":
                asyncio.run(main())
            ```
        """)
        assert module.ran == ["page", "page"]

    async def test_a_server_runs_beside_the_rest(
        self, run_text: RunPage, module: types.ModuleType
    ) -> None:
        await run_text("""
            ```python background
            import asyncio
            ended = []
            async def main():
                server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 8080)
                try:
                    await asyncio.Event().wait()
                finally:
                    server.close()
                    ended.append(True)
            asyncio.run(main())
            ```
            ```python
            reader, writer = await asyncio.open_connection("127.0.0.1", 8080)
            received = await reader.read()
            writer.close()
            ```
        """)
        assert (module.received, module.ended) == (b"", [True])

    async def test_errors_name_the_line(self, run_text: RunPage) -> None:
        with pytest.raises(ZeroDivisionError) as error:
            await run_text("\n\n```python\nfine = 1\n1 / 0\n```\n")
        assert error.traceback[-1].lineno == 4  # the fifth line, counted from 0
        assert str(error.traceback[-1].path).endswith("page.md")

    async def test_a_server_that_fails_is_an_error(self, run_text: RunPage) -> None:
        with pytest.raises(ZeroDivisionError):
            await run_text("```python background\n1 / 0\n```\n")

    async def test_no_run_is_compiled(self, run_text: RunPage) -> None:
        await run_text("```python no-run\nraise SystemExit\n```\n")
        with pytest.raises(SyntaxError):
            await run_text("```python no-run\n1 +\n```\n")

    @pytest.mark.parametrize("info", ["py", "python norun"])
    async def test_unknown_kinds_are_refused(self, info: str, run_text: RunPage) -> None:
        with pytest.raises(AssertionError):
            await run_text(f"```{info}\n1\n```\n")
