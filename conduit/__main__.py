"""The `conduit` command: serve, call, discover and ping, from a terminal or from a script.

It needs the extra `cli`. What it answers with for scripts is in `conduit --help`.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
import json
import logging
import math
import os
import secrets
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import ValidationError

from . import (
    TLS,
    AuthenticationError,
    Client,
    ConduitError,
    ConnectionClosed,
    Limits,
    RPCError,
    RPCTimeout,
    Server,
    __version__,
)
from .protocol.scram import DEFAULT_ITERATIONS, Verifier

try:
    import typer
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    sys.stderr.write("conduit: the command needs typer; pip install 'netconduit[cli]'\n")
    raise SystemExit(2) from None

__all__ = ["app", "main"]

T = TypeVar("T")

ANSWERED, USAGE, UNREACHABLE, REFUSED, TIMEOUT = 1, 2, 3, 4, 5
LARGEST = 64 * 1024 * 1024
FEWEST_ITERATIONS = 100_000
"""What clients accept without being told otherwise."""

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

# What the commands that connect have in common.
At = Annotated[
    str, typer.Argument(metavar="HOST:PORT", help="Or tcp://HOST:PORT, or tls://HOST:PORT.")
]
Password = Annotated[
    str | None,
    typer.Option(
        envvar="CONDUIT_PASSWORD",
        help="Without it a terminal is asked. Others can see it here: prefer the variable.",
    ),
]
User = Annotated[str, typer.Option(help="Who logs in.")]
Timeout = Annotated[float, typer.Option(help="Seconds for the login, and again for each answer.")]
CA = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Trust the certificates that this PEM signed."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure-tls",
        help="Trust any certificate; the password still proves that it is the server's.",
    ),
]


@app.callback(invoke_without_command=True)
def conduit(version: Annotated[bool, typer.Option("--version", is_eager=True)] = False) -> None:
    """Serve, call, discover and ping conduit servers.

    \b
    Exit codes:
      0  done
      1  the server answered with an error; `code: message` is on stderr
      2  the command line, or the module to be served, is not right
      3  cannot connect, cannot listen, or the connection was lost
      4  the login was refused
      5  no answer in time

    \b
    Values are JSON. Bytes are {"$base64": "..."}, in arguments as well as in
    results; the numbers that JSON lacks are "NaN", "Infinity" and "-Infinity".
    """  # noqa: D301  # \b keeps the lines as they are
    if version:
        typer.echo(f"conduit {__version__}")
        raise typer.Exit


@app.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="MODULE:SERVER", help="Such as app:server.")],
) -> None:
    """Run the Server object of a module, until Ctrl-C or SIGTERM.

    The module is looked for in the current directory first. Unless it configures logging itself,
    the log goes to stderr.
    """
    server = _load(target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(server.run())
    except OSError as exc:
        _fail(UNREACHABLE, exc)
    except ValueError as exc:
        _fail(USAGE, exc)
    except KeyboardInterrupt:  # before the server took over the signals
        pass


@app.command()
def call(
    at: At,
    method: str,
    parameters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE... | -",
            help="A value that is not JSON is text. - reads all parameters from stdin, as JSON.",
            show_default=False,
        ),
    ] = None,
    whole: Annotated[
        str | None,
        typer.Option("--json", metavar="TEXT", help="All parameters: a JSON object or array."),
    ] = None,
    password: Password = None,
    user: User = "default",
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Call a method and print its result as JSON: conduit call HOST:PORT add a=10 b=20."""
    args = _parameters(parameters or [], whole)
    client = _client(at, password, user, timeout, ca, insecure)

    async def work(client: Client) -> Any:
        try:
            return await client.rpc.call(method, args)
        except (TypeError, ValueError, OverflowError) as exc:
            _fail(USAGE, f"the call cannot be sent: {exc}")

    typer.echo(_as_json(_talk(client, work)))


@app.command()
def discover(
    at: At,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON Schema.")] = False,
    password: Password = None,
    user: User = "default",
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """List the methods of a server, one a line."""
    client = _client(at, password, user, timeout, ca, insecure)
    methods = _talk(client, lambda client: client.rpc.discover())
    if as_json:
        typer.echo(_as_json(methods))
        return
    signatures = [_shown(_signature(method)) for method in methods]
    width = max((len(text) for text in signatures if len(text) <= 48), default=0)
    for method, signature in zip(methods, signatures, strict=True):
        first = str(method.get("description") or "").partition("\n")[0]
        typer.echo(f"{signature:<{width}}  {_shown(first)}".rstrip())


@app.command()
def ping(
    at: At,
    count: Annotated[int, typer.Option(min=1)] = 4,
    password: Password = None,
    user: User = "default",
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Measure the time to a server and back."""

    async def work(client: Client) -> None:
        times: list[float] = []
        for number in range(1, count + 1):
            times.append(await asyncio.wait_for(client.ping(), timeout) * 1000)
            typer.echo(f"{number}: {times[-1]:.3f} ms")
        mean = sum(times) / count
        typer.echo(f"min {min(times):.3f}, mean {mean:.3f}, max {max(times):.3f} ms")

    _talk(_client(at, password, user, timeout, ca, insecure), work)


@app.command()
def hash_password(
    iterations: Annotated[
        int, typer.Option(min=4096, max=2_000_000, help="PBKDF2 iterations.")
    ] = DEFAULT_ITERATIONS,
) -> None:
    """Print the verifier of a password, for Server(verifier=...) and Server(users=...).

    The password is asked for twice, or is the first line of stdin.
    """
    if iterations < FEWEST_ITERATIONS:
        note = f"clients refuse fewer than {FEWEST_ITERATIONS} without Limits(min_iterations=...)"
        typer.echo(f"conduit: note: {note}", err=True)
    try:
        if sys.stdin.isatty():
            password = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        else:
            password = sys.stdin.readline().rstrip("\r\n")
        salt = secrets.token_bytes(16)
        verifier = Verifier.from_password(password, salt=salt, iterations=iterations)
    except ValueError as exc:
        _fail(USAGE, exc)
    typer.echo(verifier.text())


@app.command()
def gen_password() -> None:
    """Print a new random password of 128 bits."""
    typer.echo(secrets.token_urlsafe(16))


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="conduit")


# Connecting, and the exit codes.


def _fail(code: int, problem: Exception | str, prefix: str = "conduit: ") -> NoReturn:
    """End with an exit code and one line."""
    # Not the number in front of an OSError's text.
    text = getattr(problem, "strerror", None) or str(problem)
    typer.echo(f"{prefix}{_shown(text)}", err=True)
    raise typer.Exit(code)


def _client(
    at: str, password: str | None, user: str, timeout: float, ca: Path | None, insecure: bool
) -> Client:
    if password is None and sys.stdin.isatty():
        question = f"Password of {user!r} (none: Enter)"
        password = typer.prompt(question, "", hide_input=True, show_default=False, err=True)
    try:
        return Client(
            at if "://" in at else f"tcp://{at}",
            password=password or None,
            user=user,
            name="conduit-command",
            version=__version__,
            reconnect_enabled=False,
            rpc_timeout=timeout,
            connect_timeout=timeout,
            tls=TLS(ca=ca, verify=not insecure) if ca is not None or insecure else None,
            limits=Limits(max_payload=LARGEST),
        )
    except ValidationError as exc:  # its own text would repeat the password
        _fail(USAGE, "; ".join(error["msg"].removeprefix("Value error, ") for error in exc.errors()))


def _talk(client: Client, work: Callable[[Client], Awaitable[T]]) -> T:
    """Connect, do the work and disconnect; what goes wrong ends the program."""

    async def session() -> T:
        try:
            await client.connect()
        except AuthenticationError as exc:
            _fail(REFUSED, exc)
        except TimeoutError as exc:
            _fail(TIMEOUT, exc)
        except (ConduitError, OSError) as exc:
            _fail(UNREACHABLE, exc)
        try:
            return await work(client)
        finally:
            await client.disconnect()

    try:
        return asyncio.run(session())
    except RPCTimeout as exc:
        _fail(TIMEOUT, exc, f"{exc.code}: ")
    except RPCError as exc:
        _fail(ANSWERED, exc.message, f"{exc.code}: ")
    except ConnectionClosed as exc:
        _fail(UNREACHABLE, exc)
    except asyncio.TimeoutError:
        _fail(TIMEOUT, f"no answer within {client.descriptor.rpc_timeout:g} s")


def _load(target: str) -> Server:
    """Import the server of `module:name`."""
    module_name, _, name = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        _fail(USAGE, f"{target!r} must be module:name, such as app:server")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            _fail(USAGE, f"{module_name} cannot be imported: {exc}")
        here = ", ".join(sorted(path.stem for path in Path.cwd().glob("*.py"))[:20])
        _fail(USAGE, f"no module {exc.name!r}; in {Path.cwd()} there is {here or 'none'}")
    except Exception as exc:  # noqa: BLE001  # the module's own; shown from its own line on
        trace = exc.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != _file_of(module_name):
            trace = trace.tb_next
        typer.echo("".join(traceback.format_exception(type(exc), exc, trace)), err=True, nl=False)
        _fail(USAGE, f"{module_name} cannot be imported")
    found = getattr(module, name, None)
    if isinstance(found, Server):
        return found
    servers = ", ".join(key for key, value in vars(module).items() if isinstance(value, Server))
    what = f"is a {type(found).__name__}, not a Server" if hasattr(module, name) else "is not there"
    _fail(USAGE, f"{target} {what}; servers in {module_name}: {servers or 'none'}")
