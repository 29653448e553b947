"""The `conduit` command: what it prints, what it asks for, and the exit codes that scripts use."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import trustme
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import conduit.__main__ as command
from conduit import TLS, Client, Connection, Server, Stream
from conduit.__main__ import app, main
from conduit.cli import json_text, load_server, parse_parameters
from conduit.protocol import cndt
from conduit.protocol.scram import Verifier
from conduit.rpc.method import Method
from conduit.signatures import python_signature, shown, signature
from tests.acceptance.support import ROOT, Program, end_cleanly, free_port, until, within

PASSWORD = "the password of these tests"
# As few iterations as a client takes; both sides need 20 ms, and that only once.
VERIFIER = Verifier.from_password(PASSWORD, salt=b"0123456789abcdef", iterations=100_000).text()


class Done:
    """What a command did."""

    def __init__(self, code: int, output: str, errors: str) -> None:
        self.code = code
        self.output = output
        self.errors = errors

    def failed(self, code: int, pattern: str = "") -> bool:
        """Check that it ended with this code, and with one line that says why."""
        assert self.code == code, (self.output, self.errors)
        assert self.output == ""
        assert len(self.errors.splitlines()) == 1, self.errors
        assert re.search(pattern, self.errors), self.errors
        return True


def conduit(*arguments: str, given: str | None = None, password: str | None = PASSWORD) -> Done:
    """Run a command in this process."""
    result = CliRunner().invoke(
        app, arguments, input=given, env={"CONDUIT_PASSWORD": password}, prog_name="conduit"
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)


async def run(*arguments: str, **options: Any) -> Done:
    """Run a command in a thread, beside the server of a test."""
    return await within(asyncio.to_thread(conduit, *arguments, **options))


def new_server(**fields: Any) -> Server:
    """Return a server with a handler for everything that the tests call."""
    if not fields.keys() & {"verifier", "users"}:
        fields["verifier"] = VERIFIER
    server = Server(**{"host": "127.0.0.1", "port": 0, **fields})

    @server.rpc
    async def add(a: int, b: int = 0) -> int:
        """Add two numbers.

        The second line of the description.
        """
        return a + b

    @server.rpc
    async def echo(value: Any) -> Any:
        return value

    @server.rpc
    async def reverse(data: bytes) -> bytes:
        return data[::-1]

    @server.rpc
    async def sleep() -> None:
        await asyncio.Event().wait()

    @server.rpc
    async def count(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    @server.rpc
    async def total(numbers: AsyncIterator[Any], start: str = "") -> list[Any]:
        return [start, [number async for number in numbers]]

    @server.rpc
    async def work(stream: Stream[str], steps: int) -> int:
        for step in range(steps):
            await stream.send(f"step {step}")
        return steps

    @server.rpc
    async def hang_up(client: Connection) -> None:
        server.start_task(client.close(1001, "enough of you"))
        await asyncio.Event().wait()

    return server


@contextlib.asynccontextmanager
async def serving(**fields: Any) -> AsyncIterator[str]:
    """Run a server and yield its address."""
    async with new_server(**fields) as server:
        yield "{}:{}".format(*server.address)


# call


async def test_call_prints_the_result_as_json() -> None:
    async with serving() as at:
        for arguments, result in (
            (["add", "a=10", "b=20"], "30"),
            (["add", "a=-1"], "-1"),
            (["add", "--json", '{"a": 10, "b": 20}'], "30"),
            (["add", "--json", "[10, 20]"], "30"),
            (["echo", "value=text"], '"text"'),
            (["echo", "value="], '""'),
            (["echo", 'value="true"'], '"true"'),
            (["echo", "value=true"], "true"),
            (["echo", "value=a=b"], '"a=b"'),
            (["echo", 'value=[1, 2.5, null, {"k": "ü"}]'], '[1, 2.5, null, {"k": "ü"}]'),
            (["echo", "value=NaN"], '"NaN"'),
            (["reverse", "data=abc"], '{"$base64": "Y2Jh"}'),
            (["reverse", 'data={"$base64": "AAH/"}'], '{"$base64": "/wEA"}'),
        ):
            done = await run("call", at, *arguments)
            assert (done.code, done.output, done.errors) == (0, result + "\n", ""), arguments
        done = await run("call", at, "add", "-", given='{"a": 1, "b": 2}')
        assert (done.code, done.output) == (0, "3\n")
        done = await run("call", f"tcp://{at}", "add", "a=1")
        assert (done.code, done.output) == (0, "1\n")


async def test_stream_prints_each_item_and_what_comes_behind_them() -> None:
    async with serving() as at:
        for arguments, given, output in (
            (["count", "to=3"], None, "0\n1\n2\n"),
            (["count", "--json", "[2]"], None, "0\n1\n"),
            (["count", "-"], '{"to": 1}', "0\n"),
            (["work", "steps=2"], None, '"step 0"\n"step 1"\n2\n'),
            (["add", "a=1"], None, "1\n"),
            (
                ["total", "--send", "numbers", "start=x"],
                'not JSON\n\n{"a": 1}\r\n2.5',
                '["x", ["not JSON", {"a": 1}, 2.5]]\n',
            ),
        ):
            done = await run("stream", at, *arguments, given=given)
            assert (done.code, done.output, done.errors) == (0, output, ""), arguments


async def test_a_stream_that_cannot_be_is_told_in_one_line() -> None:
    async with serving() as at:
        for arguments, code, why in (
            (["count", "to=x"], 1, "^invalid_params: 'count': to: "),
            (["total", "--send", "others"], 1, "^invalid_params: 'total' takes a stream as 'num"),
            (["total"], 1, "^invalid_params: "),
            (["count", "to"], 2, "^'to' is not name=value$"),
            (
                ["total", "--send", "numbers", "--json", "[1]"],
                2,
                "^--send needs parameters by name",
            ),
            (["total", "--send", "numbers", "-"], 2, "^--send needs parameters by name, and stdin"),
        ):
            assert (await run("stream", at, *arguments, given="{}")).failed(code, why)
        called = await run("call", at, "count", "to=1")
        assert called.failed(1, "^invalid_params: .*; in a shell: conduit stream")


async def test_an_answer_with_an_error_is_1_with_its_code() -> None:
    async with serving() as at:
        assert (await run("call", at, "ad", "a=1")).failed(
            1, r"^method_not_found: no method 'ad'; did you mean add\(a: int, b: int = 0\) -> int\?"
        )
        assert (await run("call", at, "add", "a=x")).failed(1, "^invalid_params: 'add': a: ")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["localhost:1", "add", "a"], "'a' is not name=value"),
        (["localhost:1", "add", "=1"], "'=1' is not name=value"),
        (["localhost:1", "add", "a=1", "a=2"], "'a' is given twice"),
        (["localhost:1", "add", "a=1", "--json", "{}"], "not both: 'a=1'"),
        (["localhost:1", "add", "--json", "{"], "the parameters are not JSON: "),
        (["localhost:1", "add", "--json", "[NaN]"], "the parameters are not JSON: NaN"),
        (["localhost:1", "add", "--json", "[" * 100_000], "nested too deeply"),
        (["localhost:1", "add", "--json", "3"], "must be a JSON object or array"),
        (["localhost", "add"], "'tcp://localhost' must be tcp://host:port"),
        (["http://localhost:1", "add"], "has scheme 'http'"),
        (["localhost:1", "add", "--insecure-tls"], "must begin with tls://"),
        (["localhost:1", "add", "--password", "a\0b"], "password holds a control character"),
    ],
)
def test_a_wrong_command_line_is_2(arguments: list[str], problem: str) -> None:
    done = conduit("call", *arguments)
    assert done.failed(2, re.escape(problem))
    assert "a\0b" not in done.errors


def test_what_typer_refuses_is_2() -> None:
    for arguments in (["call"], ["call", "localhost:1", "add", "-x"], ["nothing"], ["ping"]):
        done = conduit(*arguments)
        assert done.code == 2
        assert "Traceback" not in done.errors


async def test_what_cannot_be_sent_is_2() -> None:
    async with serving() as at:
        assert (await run("call", at, "")).failed(2, "a method name is text of 1 to 256 bytes")
        assert (await run("call", at, "add", f"a={10**30}")).failed(2, "cannot be sent: ")


async def test_no_connection_is_3() -> None:
    port = free_port()
    done = await run("call", f"127.0.0.1:{port}", "add")
    assert done.failed(3, rf"127\.0\.0\.1:{port}.*is the server running")
    assert "Errno" not in done.errors
    assert (await run("ping", "no-such-host.invalid:1")).failed(3, "no-such-host.invalid")


@pytest.mark.parametrize("host", ["a..b", ".", f"{'a' * 64}.example", "\udcff", "a\0b"])
async def test_what_is_no_host_name_is_3(host: str) -> None:
    assert (await run("call", f"{host}:1", "add")).failed(3, "is no host name")


async def test_something_else_on_the_port_is_3() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(32)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        host, port = other.sockets[0].getsockname()
        assert (await run("discover", f"{host}:{port}")).failed(3, "conduit")


async def test_a_lost_connection_is_3() -> None:
    async with serving() as at:
        assert (await run("call", at, "hang_up")).failed(3, "enough of you")


async def test_a_full_server_is_3() -> None:
    async with new_server(max_connections=1) as server:
        host, port = server.address
        client = Client(server_host=host, server_port=port, password=PASSWORD)
        async with client:
            assert (await run("ping", f"{host}:{port}")).failed(3, "max_connections")


async def test_a_refused_login_is_4() -> None:
    async with serving() as at:
        assert (await run("call", at, "add", "a=1", password="wrong")).failed(4, "password")
        assert (await run("ping", at, "--user", "nobody")).failed(4, "nobody")
        assert (await run("ping", at, password=None)).failed(4)


async def test_no_answer_in_time_is_5(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as at:
        assert (await run("call", at, "sleep", "--timeout", "0.5")).failed(5, "'sleep'")

        async def never(client: Client) -> float:
            await asyncio.Event().wait()
            return 0.0

        monkeypatch.setattr(Client, "ping", never)
        assert (await run("ping", at, "--timeout", "0.5")).failed(5, "no answer within 0.5 s")


def test_a_login_that_takes_too_long_is_5() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = "{}:{}".format(*silent.getsockname())
        done = run_python("-m", "conduit", "ping", at, "--timeout", "0.1")
        assert (done.returncode, done.stdout) == (5, "")
        assert re.fullmatch(rf"tcp://{at} did not .* within 0\.1 s.*\n", done.stderr)


async def test_the_password_comes_from_the_option_or_the_environment() -> None:
    async with serving() as at:
        assert (await run("ping", at, "--count", "1")).code == 0
        option = ("--password", PASSWORD)
        assert (await run("ping", at, "--count", "1", *option, password="wrong")).code == 0
    async with Server(host="127.0.0.1", port=0) as server:
        at = "{}:{}".format(*server.address)
        assert (await run("ping", at, password=None)).code == 0


async def test_users_log_in_by_name() -> None:
    async with serving(users={"ada": VERIFIER}) as at:
        assert (await run("call", at, "add", "a=1", "--user", "ada")).output == "1\n"
        assert (await run("call", at, "add", "a=1")).failed(4)


# TLS


async def test_tls(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    pem = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    async with serving(tls=TLS(certificate=pem)) as at:
        command = ("call", f"tls://{at}", "add", "a=1")
        assert (await run(*command, "--ca", str(tmp_path / "ca.pem"))).output == "1\n"
        assert (await run(*command, "--insecure-tls")).output == "1\n"
        assert (await run(*command, "--insecure-tls", password="wrong")).failed(4)
        assert (await run(*command)).failed(3, "(?i)certificate|TLS")
        assert (await run(*command, "--ca", str(tmp_path / "other.pem"))).failed(3, "TLS")
        assert (await run(*command, "--ca", str(tmp_path / "none.pem"))).code == 2


# discover, ping


async def test_discover_lists_one_method_a_line() -> None:
    async with serving() as at:
        done = await run("discover", at)
        assert done.code == 0
        assert done.output.splitlines() == [
            f"{'add(a: int, b: int = 0) -> int':44}  Add two numbers.",
            "echo(value: Any)",
            "reverse(data: bytes) -> bytes",
            "sleep() -> None",
            "count(to: int) -> AsyncIterator[int]",
            "total(numbers: AsyncIterator[Any], start: str = '') -> list",
            "work(steps: int, stream: Stream[str]) -> int",
            "hang_up() -> None",
        ]
        methods = json.loads((await run("discover", at, "--json")).output)
        assert [method["name"] for method in methods][:2] == ["add", "echo"]
        assert methods[0]["parameters"]["required"] == ["a"]


async def test_discover_marks_what_is_not_to_be_used_any_more() -> None:
    async with Server(host="127.0.0.1", port=0, verifier=VERIFIER) as server:

        @server.rpc(deprecated="use\nsum")
        async def add(a: int) -> int:
            """Add."""
            return a

        @server.rpc(deprecated=True)
        async def silent() -> None: ...

        done = await run("discover", "{}:{}".format(*server.address))
        assert done.output.splitlines() == [
            "add(a: int) -> int  Add. (deprecated: use\\nsum)",
            "silent() -> None    (deprecated)",
        ]


@pytest.mark.parametrize("told", [None, 5, {}, [5], [None, {"name": "add"}]])
async def test_a_server_may_say_anything_of_its_methods(
    told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conduit.rpc.router._Discovery.start", lambda *_: told)
    async with Server(host="127.0.0.1", port=0, verifier=VERIFIER) as server:
        done = await run("discover", "{}:{}".format(*server.address))
        assert (done.code, done.output.strip()) in ((0, ""), (0, "add(...)"))


async def test_discover_of_a_server_without_methods_prints_nothing() -> None:
    async with Server(host="127.0.0.1", port=0, verifier=VERIFIER) as server:
        done = await run("discover", "{}:{}".format(*server.address))
        assert (done.code, done.output) == (0, "")


async def test_ping_prints_each_time_and_a_summary() -> None:
    async with serving() as at:
        done = await run("ping", at, "--count", "3")
        assert done.code == 0
        *times, summary = done.output.splitlines()
        for number, line in enumerate(times, 1):
            assert re.fullmatch(rf"{number}: \d+\.\d{{3}} ms", line)
        assert len(times) == 3
        assert re.fullmatch(r"min [\d.]+ ms, mean [\d.]+ ms, max [\d.]+ ms", summary)


async def test_ping_sends_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cndt, "PINGS", 8)  # of which a client sends the half
    monkeypatch.setattr(cndt, "PING_WINDOW", 500)
    monkeypatch.setattr(command, "AT_ONCE", 2, raising=False)
    monkeypatch.setattr(command, "PAUSE", 0.3, raising=False)
    async with serving() as at:
        done = await run("ping", at, "--count", "6")
        assert (done.code, done.errors) == (0, "")
        assert len(done.output.splitlines()) == 7


# passwords


def test_hash_password_reads_one_line_and_prints_its_verifier() -> None:
    done = conduit("hash-password", "--iterations", "100000", given=f"{PASSWORD}\r\nanother\n")
    assert (done.code, done.errors) == (0, "")
    verifier = Verifier.parse(done.output.strip())
    assert verifier == Verifier.from_password(PASSWORD, salt=verifier.salt, iterations=100_000)
    again = conduit("hash-password", "--iterations", "100000", given=PASSWORD)
    assert Verifier.parse(again.output.strip()).salt != verifier.salt


def test_hash_password_says_when_clients_would_refuse_it() -> None:
    done = conduit("hash-password", "--iterations", "4096", given="x\n")
    assert done.code == 0
    assert "100000" in done.errors
    assert Verifier.parse(done.output.strip()).iterations == 4096


def test_hash_password_refuses_what_no_login_could_use() -> None:
    assert conduit("hash-password", given="").failed(2, "password is empty")
    assert conduit("hash-password", "--iterations", "1", given="x").code == 2


async def test_new_token_prints_all_that_both_sides_need() -> None:
    done = conduit("new-token", "ci")
    assert (done.code, done.errors) == (0, "")
    printed = dict(line.split(maxsplit=1) for line in done.output.splitlines())
    assert printed.keys() == {"token", "user", "verifier"}
    assert printed["user"] == "cnd_ci"
    async with serving(users={printed["user"]: printed["verifier"]}) as at:
        done = await run("call", at, "add", "a=1", "b=2", password=printed["token"])
        assert (done.code, done.output, done.errors) == (0, "3\n", "")
        for command in ("discover", "stub"):  # every other command that asks for a user
            done = await run(command, at, password=printed["token"])
            assert (done.code, done.errors) == (0, "")
        done = await run("call", at, "add", "--user", "ann", password=printed["token"])
        assert done.failed(2, "the token is that of user 'cnd_ci'")
    hashed = conduit("hash-password", given=printed["token"])
    assert (hashed.code, hashed.errors) == (0, "")
    assert Verifier.parse(hashed.output.strip()).iterations == 4096
    assert conduit("new-token", "a b").failed(2, "the id of a token")


def test_gen_password_prints_128_bits() -> None:
    first, second = conduit("gen-password").output, conduit("gen-password").output
    assert first != second
    assert len(base64.urlsafe_b64decode(first.strip() + "==")) == 16


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[str, str], str]]]:
    """Run a command whose stdin and stderr are a terminal, and answer what it asks there."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = {name: text for name, text in os.environ.items() if name != "CONDUIT_PASSWORD"}
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "conduit", *arguments],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**environment, "PYTHONPATH": path},
        start_new_session=True,  # or the password would be asked for at the tester's terminal
        text=True,
    )
    os.close(slave)

    def answer(question: str, text: str) -> str:
        """Wait for a question, answer it, and return what the terminal has shown so far."""
        seen = b""
        while question.encode() not in seen:
            seen += os.read(master, 1024)
        os.write(master, text.encode() + b"\n")
        return seen.decode()

    try:
        yield process, answer
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        os.close(master)


def test_hash_password_asks_a_terminal_twice_without_echo() -> None:
    with terminal("hash-password", "--iterations", "100000") as (process, answer):
        answer("Password: ", "s3cret")
        assert "s3cret" not in answer("Repeat for confirmation: ", "s3cret")
        assert process.stdout is not None
        verifier = Verifier.parse(process.stdout.readline().strip())
        assert process.wait(10) == 0
    assert verifier == Verifier.from_password("s3cret", salt=verifier.salt, iterations=100_000)


async def test_call_asks_a_terminal_for_the_password() -> None:
    def talk(at: str, password: str) -> tuple[int, str]:
        with terminal("call", at, "add", "a=1", "b=2") as (process, answer):
            answer("Password of default (Enter for none): ", password)
            assert process.stdout is not None
            return process.wait(10), process.stdout.read()

    async with serving() as at:
        assert await within(asyncio.to_thread(talk, at, PASSWORD)) == (0, "3\n")
    async with Server(host="127.0.0.1", port=0) as server:
        server.rpc("add")(lambda a, b: a + b)
        at = "{}:{}".format(*server.address)
        assert await within(asyncio.to_thread(talk, at, "")) == (0, "3\n")


# serve

APP = f"""
from conduit import Server

password = "not a server"
server = Server(host="127.0.0.1", port=0, verifier={VERIFIER!r})

@server.rpc
async def add(a: int, b: int) -> int:
    return a + b

@server.on_startup
async def started(server):
    print("listening on {{}}:{{}}".format(*server.address), flush=True)

class Nested:
    server = server
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with app.py and a module that fails; imports from it are forgotten."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "broken.py").write_text("def fail():\n    return 1 / 0\n\nfail()\n")
    (tmp_path / "garbled.py").write_text("def\n")
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_serve_runs_a_module_of_the_current_directory(
    number: signal.Signals, folder: Path
) -> None:
    with Program("-m", "conduit", "serve", "app:server", cwd=folder) as server:
        at = (await asyncio.to_thread(server.wait_for, r"^listening on (\S+)$"))[1]
        assert (await run("call", at, "add", "a=1", "b=2")).output == "3\n"
        await asyncio.to_thread(end_cleanly, server, number)
        assert f"listens on {at}" in server.error_output
        assert "has stopped" in server.error_output


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("app", r"^'app' must be module:name, such as app:server$"),
        ("app.py:", r"^'app.py:' must be module:name"),
        ("../app:server", r"must be module:name"),
        ("nothing:server", r"^no module 'nothing'; modules in .*: app, broken, garbled, lacking$"),
        ("app.py:server", r"^no module 'app.py'; modules in .*: app, "),
        ("app:nothing", r"^app:nothing is not there; servers in app: server$"),
        ("app:password", r"^app:password is of type str; servers in app: server$"),
        ("json:loads", r"^json:loads is of type function; servers in json: none$"),
        ("lacking:server", r"^lacking cannot be imported: No module named 'no_such_package'$"),
    ],
)
def test_serve_says_what_it_found_instead(target: str, problem: str, folder: Path) -> None:
    assert conduit("serve", target).failed(2, problem)


def test_serve_shows_where_a_module_fails_and_nothing_of_its_own(folder: Path) -> None:
    done = conduit("serve", "broken:server")
    assert done.code == 2
    first, second, *trace = done.errors.splitlines()
    assert first == "broken cannot be imported:"
    assert second.startswith("Traceback")
    assert trace[0] == f'  File "{folder / "broken.py"}", line 4, in <module>'
    assert trace[-1] == "ZeroDivisionError: division by zero"
    done = conduit("serve", "garbled:server")
    assert done.code == 2
    assert f'File "{folder / "garbled.py"}", line 1' in done.errors
    assert "SyntaxError" in done.errors
    assert "importlib" not in done.errors


def test_serve_on_a_port_in_use_is_3(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = APP.replace("port=0", f"port={port}")
        (folder / "taken.py").write_text(text)
        assert conduit("serve", "taken:server").failed(3, f"127.0.0.1:{port}")


def test_serve_without_a_password_for_everybody_is_2(folder: Path) -> None:
    (folder / "unsafe.py").write_text("from conduit import Server\nserver = Server(port=0)\n")
    done = conduit("serve", "unsafe:server")
    assert done.code == 2
    assert "needs a password" in done.errors


def test_ctrl_c_before_serve_has_begun_is_0(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "run", interrupted)
    assert conduit("serve", "app:server").code == 0


def test_load_server_takes_a_dotted_module(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "inner.py").write_text("from app import server\n")
    assert isinstance(load_server("package.inner:server"), Server)
    with pytest.raises(ValueError, match=r"no module 'package\.other'"):
        load_server("package.other:server")


# the command itself


def test_help_lists_commands_and_exit_codes() -> None:
    done = conduit("--help")
    assert done.code == 0
    for name in ("serve", "call", "discover", "stub", "ping", "hash-password", "gen-password"):
        assert re.search(rf"^  {name} +[A-Z].*\.$", done.output, re.M), name
    for code in range(7):
        assert re.search(rf"^ +{code}  \w", done.output, re.M), code
    assert "$base64" in done.output
    assert "Commands" in conduit().output + conduit().errors
    for name in ("call", "discover", "stub", "ping"):
        for word in ("CONDUIT_PASSWORD", "--user", "--timeout", "--ca", "--insecure-tls"):
            assert word in conduit(name, "--help").output


def test_version() -> None:
    assert re.fullmatch(r"conduit \d+\.\d+\.\d+\n", conduit("--version").output)


def test_the_entry_point_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/conduit", "gen-password"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) == 23


def test_output_that_the_terminal_cannot_encode_is_escaped() -> None:
    command = ("-m", "conduit", "call", "localhost:1", "add", "\N{SNOWMAN}")
    done = run_python(*command, PYTHONIOENCODING="latin-1")
    assert done.returncode == 2
    assert done.stderr == "'\\u2603' is not name=value\n"


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this conduit in reach."""
    path = os.pathsep.join(
        filter(None, [environment.pop("first", ""), str(ROOT), os.environ.get("PYTHONPATH")])
    )
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=20,
    )


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "output"),
    [
        ("stdin", ["call", "{at}", "add", "-"], 2, ""),
        ("stdin", ["stream", "{at}", "total", "--send", "numbers"], 0, '["", []]\n'),
        ("stdout", ["call", "{at}", "add", "a=1"], 0, ""),
    ],
)
async def test_a_stream_that_is_closed_is_no_terminal(
    closed: str, arguments: list[str], code: int, output: str
) -> None:
    # Python has None in the place of what was closed before it began.
    program = f"import sys; sys.{closed} = None; from conduit.__main__ import main; main()"
    async with serving() as at:
        given = [one.format(at=at) for one in arguments]
        run = asyncio.to_thread(run_python, "-c", program, *given, CONDUIT_PASSWORD=PASSWORD)
        done = await within(run)
    assert (done.returncode, done.stdout) == (code, output)
    assert "Traceback" not in done.stderr


WRITERS = [
    ["call", "{at}", "add", "a=1", "b=2"],
    ["stream", "{at}", "count", "to=3"],
    ["discover", "{at}"],
    ["ping", "{at}", "--count", "2"],
    ["gen-password"],
]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="Linux alone has a full disk to write to"
)
@pytest.mark.parametrize("arguments", WRITERS, ids=lambda one: one[0])
async def test_output_that_cannot_be_written_is_told_in_one_line(arguments: list[str]) -> None:
    assert await outcome_of_writing_to("/dev/full", arguments) == (
        6,
        "the output cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("arguments", WRITERS, ids=lambda one: one[0])
async def test_output_that_nobody_reads_any_more_ends_it_silently(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert await outcome_of_writing_to(write, arguments) == (6, "")
    finally:
        os.close(write)


async def outcome_of_writing_to(output: str | int, arguments: list[str]) -> tuple[int, str]:
    """Run a command that writes there; return its exit code and what it has to say."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONDUIT_PASSWORD": PASSWORD}
    async with serving() as at:
        with open(output, "wb", closefd=isinstance(output, str)) as stdout:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "conduit", *(one.format(at=at) for one in arguments)),
                env=environment,
                stdout=stdout,
                stderr=subprocess.PIPE,
            )
        _, errors = await within(process.communicate())
    assert process.returncode is not None
    return process.returncode, errors.decode()


async def test_a_reader_that_takes_its_time_does_not_stop_the_heartbeat() -> None:
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    server = new_server()

    @server.rpc
    async def pages() -> AsyncIterator[str]:
        while True:
            yield "x" * 1_000_000  # more than a pipe takes

    def waits() -> bool:
        """Whether the pipe is full, so that who writes to it waits."""
        held = fcntl.ioctl(read, termios.FIONREAD, bytes(4))
        return int.from_bytes(held, sys.byteorder) == int(fcntl.fcntl(read, fcntl.F_GETPIPE_SZ))

    read, write = os.pipe()
    async with server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "conduit", "stream", "{}:{}".format(*server.address), "pages"),
            env={**os.environ, "PYTHONPATH": str(ROOT), "CONDUIT_PASSWORD": PASSWORD},
            stdout=write,
        )
        os.close(write)
        try:
            await until(waits)
            (connection,) = server.connections.values()
            await within(connection.ping())
        finally:
            os.close(read)
            code = await within(process.wait())
    assert code == 6


def test_without_typer_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from conduit.__main__ import main; main()"
    done = run_python("-c", code)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pip install 'netconduit[cli]'" in done.stderr


def test_a_typer_that_is_broken_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import no_such_package\n")
    done = run_python("-m", "conduit", "--help", first=str(tmp_path))
    assert done.returncode == 1
    assert "no_such_package" in done.stderr


# what it reads and shows


def test_parameters() -> None:
    words = ["a=1", "b=x", 'c={"$base64": "AA=="}', 'd={"$base64": 1}', "e=Infinity"]
    assert parse_parameters(words, None) == {
        "a": 1,
        "b": "x",
        "c": b"\0",
        "d": {"$base64": 1},
        "e": "Infinity",
    }
    assert parse_parameters([], None) == {}


def test_values_that_json_lacks() -> None:
    value = {
        "data": b"\xff",
        b"\x01": [math.nan, math.inf, -math.inf, 1.5],
        "text": "\x1b[2J\u202eü",
    }
    text = json_text(value)
    assert text == (
        '{"data": {"$base64": "/w=="}, "AQ==": ["NaN", "Infinity", "-Infinity", 1.5], '
        '"text": "\\u001b[2J\\u202eü"}'
    )
    assert json.loads(text)["text"] == value["text"]
    assert json_text("ü", ascii=True) == '"\\u00fc"'
    assert json_text([1], indent=2) == "[\n  1\n]"


def test_a_value_that_is_nested_too_deeply() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match="nested too deeply"):
        json_text(value)


async def test_a_result_that_cannot_be_shown_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(value: Any, **options: Any) -> str:
        raise ValueError("nested too deeply to be shown")

    monkeypatch.setattr("conduit.__main__.json_text", refuse)
    async with serving() as at:
        assert (await run("call", at, "echo", "value=1")).failed(1, "nested too deeply")


def test_text_of_a_peer_cannot_act_on_the_terminal() -> None:
    assert shown("plain ü \N{SNOWMAN}") == "plain ü \N{SNOWMAN}"
    assert shown("\x1b[2J\n\x9b\U000e0001") == "\\u001b[2J\\n\\u009b\\udb40\\udc01"


class User(BaseModel):
    name: str
    age: Annotated[int, Field(ge=0)] = 3


def plain(
    a: int,
    b: float = 0.5,
    *,
    c: Literal["x", "y"] = "x",
    user: User | None = None,
    when: datetime | None = None,
    key: uuid.UUID,
    numbers: list[int],
    kinds: set[str],
    pair: tuple[int, str],
    counts: dict[str, int],
    anything: dict[str, Any],
    flag: Literal[1],
) -> list[User]:
    raise NotImplementedError


def by_position(first_one: int, other: str = "x", /) -> None:
    raise NotImplementedError


def quantities(price: Decimal, span: timedelta = timedelta(1)) -> tuple[Decimal, timedelta]:
    raise NotImplementedError


def lone(user: User) -> User:
    raise NotImplementedError


class Tree(BaseModel):
    name: str
    children: list[Tree] = []


def lone_tree(tree: Tree) -> Tree:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            plain,
            "plain(a: int, b: float = 0.5, c: 'x' | 'y' = 'x', user: User | None = None, "
            "when: datetime | None = None, key: UUID, numbers: list[int], kinds: set[str], "
            "pair: tuple[int, str], counts: dict[str, int], anything: dict, flag: 1) -> list[User]",
        ),
        (by_position, "by_position(first_one: int, other: str = 'x', /) -> None"),
        (lone, "lone(name: str, age: int = 3) -> User"),
        (lone_tree, "lone_tree(name: str, children: list[Tree] = []) -> Tree"),
        (
            quantities,
            "quantities(price: Decimal, span: timedelta = 'P1D') -> tuple[Decimal, timedelta]",
        ),
    ],
)
def test_signatures_are_read_from_json_schema(function: Any, expected: str) -> None:
    assert signature(Method(function, function.__name__).describe()) == expected


def test_completion_knows_the_parameters_of_a_recursive_model() -> None:
    assert [*python_signature(Method(lone_tree, "lone_tree").describe()).parameters] == [
        "name",
        "children",
    ]
    assert str(python_signature({"parameters": {"$ref": "#/$defs/Nowhere"}})) == "(**others)"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "f"}, "f(...)"),
        ({"name": "f", "parameters": {}}, "f()"),
        ({"name": "f", "parameters": {"properties": {"a": True}}}, "f(a: Any = ...)"),
        (
            {"name": "f", "parameters": {"prefixItems": [{}, None]}},
            "f(_0: Any = ..., _1: Any = ..., /)",
        ),
        ({"name": "f", "parameters": {}, "returns": {"type": "frob"}}, "f() -> Any"),
        ({"name": "f", "parameters": {}, "returns": {"type": "array"}}, "f() -> list"),
        (
            {
                "name": "f",
                "parameters": {},
                "returns": {"oneOf": [{"type": "null"}, {"type": "object"}]},
            },
            "f() -> None | dict",
        ),
        ({"name": "f", "parameters": {}, "returns": {"const": 1}}, "f() -> 1"),
    ],
)
def test_signatures_of_servers_in_other_languages(method: dict[str, Any], expected: str) -> None:
    assert signature(method) == expected
