"""The `conduit` command: serve, call, stream, discover, stub, ping; from a terminal or a script.

It needs the extra `cli`. `conduit --help` lists the exit codes.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import secrets
import sys
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
    InvalidParams,
    Limits,
    RPCError,
    RPCTimeout,
    __version__,
    users,
)
from .cli import (
    is_terminal,
    items_of,
    json_text,
    load_server,
    parse_parameters,
    stdin,
    takes_at_once,
)
from .protocol import tokens
from .protocol.scram import DEFAULT_ITERATIONS
from .schemas import methods_of
from .signatures import deprecation, shown, signature
from .stub import stub as stub_of
from .transport import limited
from .transport.thread_items import in_thread

try:
    import typer
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    sys.stderr.write("the conduit command needs typer: pip install 'netconduit[cli]'\n")
    raise SystemExit(2) from None

__all__ = ["app", "main"]

T = TypeVar("T")

ANSWERED, USAGE, UNREACHABLE, REFUSED, TIMEOUT, UNWRITTEN = 1, 2, 3, 4, 5, 6  # exit codes
LARGEST = 64 * 1024 * 1024
FEWEST_ITERATIONS = 100_000  # that clients accept without being told otherwise
AT_ONCE, PAUSE = 25, 0.5  # pings; a client sends no more than 50 within 10 s
COLUMN = 48  # where descriptions begin at the latest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# What the commands that connect have in common.
At = Annotated[str, typer.Argument(metavar="HOST:PORT", help="tcp:// or tls:// may come before.")]
Password = Annotated[
    str | None,
    typer.Option(
        envvar="CONDUIT_PASSWORD",
        show_default=False,
        help="Other users can see it here; the variable is better. Else a terminal is asked.",
    ),
]
User = Annotated[
    str | None,
    typer.Option(show_default=False, help="Who logs in: default, unless a token says it itself."),
]
Timeout = Annotated[
    float, typer.Option(min=0.001, help="Seconds for the login, and for each answer.")
]
CA = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, show_default=False, help="PEM file to trust."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure-tls",
        help="Trust any certificate; the login still proves that it is the server's own.",
    ),
]


Method = Annotated[str, typer.Argument(metavar="METHOD", help="Its name.")]
Parameters = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME=VALUE",
        help="A value that is not JSON is text. A single - reads all of them from stdin.",
    ),
]
Whole = Annotated[
    str | None,
    typer.Option("--json", metavar="TEXT", help="All parameters as a JSON object or array."),
]


@app.callback(invoke_without_command=True)
def conduit(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Serve, call, stream, discover, stub and ping.

    \b
    Exit codes:
      0  done
      1  the server answered with an error: `code: message` is on stderr
      2  the command line, or the module to serve, is not right
      3  cannot connect, cannot listen, or the connection was lost
      4  the login was refused
      5  no answer in time
      6  nobody reads the output any more, or it cannot be written

    \b
    Arguments and results are JSON. In both, bytes are {"$base64": "..."};
    NaN and the infinities are "NaN", "Infinity" and "-Infinity".
    """
    if version:
        _print(f"conduit {__version__}")
        raise typer.Exit


@app.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="MODULE:SERVER", help="Such as app:server.")],
) -> None:
    """Run the Server object of a module until Ctrl-C or SIGTERM.

    The current directory comes first in the search for the module. Unless the module configures
    logging, the log goes to stderr.
    """
    try:
        server = load_server(target)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        asyncio.run(server.run())
    except OSError as exc:
        _fail(UNREACHABLE, exc)
    except ValueError as exc:
        _fail(USAGE, exc, lines=True)
    except KeyboardInterrupt:  # before the server listens for the signal
        pass


@app.command()
def call(
    at: At,
    method: Method,
    parameters: Parameters = None,
    whole: Whole = None,
    password: Password = None,
    user: User = None,
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Call a method and print its result as JSON.

    For example: conduit call localhost:8080 add a=10 b=20
    """
    args = _arguments(parameters or [], whole)
    client = _client(at, password, user, timeout, ca, insecure)

    async def work() -> Any:
        try:
            return await client.rpc.call(method, args)
        except InvalidParams as exc:
            hint = "; in a shell: conduit stream ..." if "rpc.stream(" in exc.message else ""
            _fail(ANSWERED, f"{exc.code}: {exc.message}{hint}")
        except (TypeError, ValueError, OverflowError) as exc:
            _fail(USAGE, f"the call cannot be sent: {exc}")

    _print_json(_talk(client, work))


@app.command()
def stream(
    at: At,
    method: Method,
    parameters: Parameters = None,
    whole: Whole = None,
    send: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="The parameter that takes a stream. Its items are the lines of stdin, as they "
            "come; a line that is not JSON is text.",
        ),
    ] = None,
    password: Password = None,
    user: User = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for the login.")] = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Call a method that streams, and print its items as lines of JSON.

    It goes on until the method ends, or Ctrl-C. A result behind the items is the last line.
    For example: conduit stream localhost:8080 count to=3
    """
    args = _arguments(parameters or [], whole)
    if send is not None:
        if not isinstance(args, dict) or parameters == ["-"]:
            _fail(USAGE, "--send needs parameters by name, and stdin for its items")
        args[send] = in_thread(items_of(stdin()))
    client = _client(at, password, user, timeout, ca, insecure)

    async def work() -> None:
        try:
            async with client.rpc.stream(method, args) as run:
                async for item in run:
                    await _print_item(item)
                result = await run.result()
        except (TypeError, ValueError, OverflowError) as exc:
            _fail(USAGE, f"the call cannot be sent: {exc}")
        if result is not None:
            _print_json(result, whole=False)

    _talk(client, work)


@app.command()
def discover(
    at: At,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, with JSON Schema.")] = False,
    password: Password = None,
    user: User = None,
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """List the methods of a server."""
    client = _client(at, password, user, timeout, ca, insecure)
    methods = _talk(client, client.rpc.discover)
    if as_json:
        _print_json(methods)
        return
    methods = methods_of(methods)
    signatures = [shown(signature(method)) for method in methods]
    width = max((len(text) for text in signatures if len(text) <= COLUMN), default=0)
    for method, text in zip(methods, signatures, strict=True):
        about = str(method.get("description", "")).partition("\n")[0]
        if mark := deprecation(method):
            about = f"{about} ({mark})".lstrip()
        _print(f"{text:<{width}}  {shown(about)}".rstrip())


@app.command()
def stub(
    at: At,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, show_default=False, help="The file; stdout without it."),
    ] = None,
    blocking: Annotated[
        bool, typer.Option("--blocking", help="For conduit.blocking.Client.")
    ] = False,
    password: Password = None,
    user: User = None,
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Write a typed client module for a server.

    It has a typing.Protocol for rpc.bind with the methods of the server, and models of what they
    take and return. Its docstring shows how it is used. What cannot be told in Python is left out.
    """
    client = _client(at, password, user, timeout, ca, insecure)

    async def work() -> str:
        return stub_of(
            await client.rpc.discover(),
            server=client.server_name,
            version=client.server_version,
            module=output.stem if output is not None else "",
            blocking=blocking,
        )

    text = _talk(client, work)
    if output is None:
        _print(text, nl=False)
        return
    try:
        output.write_text(text, "utf-8")
    except OSError as exc:
        _fail(USAGE, f"{output}: {exc.strerror}")


@app.command()
def ping(
    at: At,
    count: Annotated[int, typer.Option(min=1, help="How many times.")] = 4,
    password: Password = None,
    user: User = None,
    timeout: Timeout = 10.0,
    ca: CA = None,
    insecure: Insecure = False,
) -> None:
    """Measure the time to a server and back."""
    client = _client(at, password, user, timeout, ca, insecure)

    async def work() -> None:
        times: list[float] = []
        for number in range(1, count + 1):
            if number > AT_ONCE:
                await asyncio.sleep(PAUSE)
            async with limited.timeout(timeout):
                times.append(await client.ping() * 1000)
            _print(f"{number}: {times[-1]:.3f} ms")
        mean = sum(times) / count
        _print(f"min {min(times):.3f} ms, mean {mean:.3f} ms, max {max(times):.3f} ms")

    _talk(client, work)


@app.command()
def hash_password(
    iterations: Annotated[
        int | None,
        typer.Option(
            min=4096,
            max=2_000_000,
            show_default=False,
            help=f"Iterations of PBKDF2; {DEFAULT_ITERATIONS} by default, and few for a token.",
        ),
    ] = None,
) -> None:
    """Print the verifier of a password or a token.

    That is what Server(verifier=...) and Server(users=...) take. The password is the first line of
    stdin; a terminal is asked for it twice.
    """
    if iterations is not None and iterations < FEWEST_ITERATIONS:
        typer.echo(f"note: clients refuse fewer than {FEWEST_ITERATIONS} iterations", err=True)
    try:
        if is_terminal(sys.stdin):
            password = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
        else:
            password = stdin().readline().rstrip("\r\n")
        verifier = users.hash_password(password, iterations=iterations)
    except ValueError as exc:
        _fail(USAGE, exc)
    _print(verifier)


@app.command()
def new_token(
    id: Annotated[str, typer.Argument(metavar="ID", help="What it is known by, such as ci.")],
) -> None:
    """Print a new token, its user, and the verifier for Server(users=...).

    A client takes the token as its password, and needs no user. The token is printed this once.
    """
    try:
        token = users.new_token(id)
    except ValueError as exc:
        _fail(USAGE, exc)
    _print(f"token     {token}")
    _print(f"user      {tokens.user_of(token)}")
    _print(f"verifier  {users.hash_password(token)}")


@app.command()
def gen_password() -> None:
    """Print a new random password of 128 bits."""
    _print(secrets.token_urlsafe(16))


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode must not end the program
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="conduit")


def _client(
    at: str, password: str | None, user: str | None, timeout: float, ca: Path | None, insecure: bool
) -> Client:
    """Make the client that the options describe."""
    if password is None and is_terminal(sys.stdin):
        question = f"Password of {shown(user or users.DEFAULT_USER)} (Enter for none)"
        password = typer.prompt(question, "", hide_input=True, show_default=False, err=True)
    try:
        return Client(
            at if "://" in at else f"tcp://{at}",
            password=password or None,
            **({} if user is None else {"user": user}),
            name="conduit-command",
            version=__version__,
            reconnect_enabled=False,
            rpc_timeout=timeout,
            connect_timeout=timeout,
            tls=TLS(ca=ca, verify=not insecure) if ca is not None or insecure else None,
            limits=Limits(max_payload=LARGEST),
        )
    except ValidationError as exc:  # whose own text repeats what was given, the password included
        problems = [
            f"{one['loc'][0]}: {one['msg']}" if one["loc"] else one["msg"] for one in exc.errors()
        ]
        _fail(USAGE, "; ".join(problems).replace("Value error, ", ""))


def _talk(client: Client, work: Callable[[], Awaitable[T]]) -> T:
    """Connect, do the work and disconnect; an error ends the program with its exit code."""

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
            return await work()
        finally:
            await client.disconnect()

    try:
        return asyncio.run(session())
    except RPCTimeout as exc:
        _fail(TIMEOUT, exc)
    except asyncio.TimeoutError:
        _fail(TIMEOUT, f"no answer within {client.descriptor.connect_timeout:g} s")
    except RPCError as exc:
        _fail(ANSWERED, f"{exc.code}: {exc.message}")
    except ConnectionClosed as exc:
        _fail(UNREACHABLE, exc)


def _arguments(words: list[str], whole: str | None) -> dict[str, Any] | list[Any]:
    """Read the parameters of a call from the command line, or from stdin."""
    try:
        if words == ["-"] and whole is None:
            words, whole = [], stdin().read()
        return parse_parameters(words, whole)
    except ValueError as exc:
        _fail(USAGE, exc)


def _print_json(value: Any, *, whole: bool = True) -> None:
    """Print a value; `whole` if it is all that is printed, which a terminal shows in many lines."""
    _print(_json(value, whole=whole))


async def _print_item(item: Any) -> None:
    """Print one of many values, and let the heartbeat go on while whoever reads takes its time.

    A pager reads when its user does. A thread for each would cost more than all else together.
    """
    text = _json(item, whole=False)
    if takes_at_once(sys.stdout, 4 * len(text) + 1):
        _print(text)
    else:
        await asyncio.to_thread(_print, text)


def _json(value: Any, *, whole: bool) -> str:
    ascii = "utf" not in (getattr(sys.stdout, "encoding", None) or "").lower()
    indent = 2 if whole and is_terminal(sys.stdout) else None
    try:
        return json_text(value, indent=indent, ascii=ascii)
    except ValueError as exc:
        _fail(ANSWERED, exc)


def _print(text: str, *, nl: bool = True) -> None:
    """Write to stdout."""
    try:
        typer.echo(text, nl=nl)
    except OSError as exc:
        # What is left in the buffer would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):  # as `head` leaves when it has seen enough
            raise typer.Exit(UNWRITTEN) from None
        _fail(UNWRITTEN, f"the output cannot be written: {exc.strerror}")


def _fail(code: int, problem: Exception | str, *, lines: bool = False) -> NoReturn:
    """End with an exit code and one line on stderr, or with all of its lines."""
    text = getattr(problem, "strerror", None) or str(problem)  # without an OSError's number
    typer.echo(text if lines else shown(text), err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
