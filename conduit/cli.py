"""What the `conduit` command reads and shows: parameters, results, a module's server.

Without typer, which only `__main__` needs. A ValueError of these functions is for the user to read.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import math
import select
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from .server import Server
from .signatures import shown

__all__ = [
    "is_terminal",
    "items_of",
    "json_text",
    "load_server",
    "parse_parameters",
    "stdin",
    "takes_at_once",
]

BYTES: Final = "$base64"


# Parameters and results.


def parse_parameters(words: Sequence[str], whole: str | None) -> dict[str, Any] | list[Any]:
    """Return the parameters of a call.

    Args:
        words: `name=value`, where a value that is not JSON is text.
        whole: All parameters instead, as a JSON object or array.

    Raises:
        ValueError: They cannot be read; the text says which.
    """
    if whole is not None:
        if words:
            raise ValueError(f"give name=value or the whole as JSON, not both: {words[0]!r}")
        try:
            value = _from_json(whole)
        except ValueError as exc:
            raise ValueError(f"the parameters are not JSON: {exc}") from None
        if not isinstance(value, (dict, list)):
            raise ValueError("the parameters must be a JSON object or array")
        return value
    parameters: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name:
            raise ValueError(f"{word!r} is not name=value")
        if name in parameters:
            raise ValueError(f"{name!r} is given twice")
        parameters[name] = _json_or_text(text)
    return parameters


def items_of(lines: Iterable[str]) -> Iterator[Any]:
    """Yield what each line is, as it comes: JSON, or else text. Empty ones are nothing."""
    for line in lines:
        if text := line.rstrip("\r\n"):
            yield _json_or_text(text)


def _json_or_text(text: str) -> Any:
    try:
        return _from_json(text)
    except ValueError:
        return text


def _from_json(text: str) -> Any:
    try:
        return json.loads(text, object_hook=_bytes_from_json, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _bytes_from_json(value: dict[str, Any]) -> Any:
    if value.keys() == {BYTES} and isinstance(value[BYTES], str):
        return base64.b64decode(value[BYTES], validate=True)
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def json_text(value: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """Return a value of the wire as JSON.

    `bytes` become `{"$base64": "..."}`, as a key their base64 alone; the numbers that JSON lacks
    become text. What a terminal might act upon is escaped.

    Raises:
        ValueError: The value is nested too deeply.
    """
    try:
        text = json.dumps(_plain(value), indent=indent, ensure_ascii=ascii, allow_nan=False)
    except RecursionError:
        raise ValueError("the result is nested too deeply to be shown") from None
    return "\n".join(shown(line) for line in text.split("\n"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return {BYTES: _base64(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _key(key: Any) -> str:
    return _base64(key) if isinstance(key, bytes) else str(key)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


# The streams of the process, of which there may be none.


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sits there."""
    return stream is not None and stream.isatty()  # None if whoever starts the command closes it


def stdin() -> TextIO:
    """Return what is to be read, which is nothing where there is no stdin."""
    stream: TextIO | None = sys.stdin
    return io.StringIO() if stream is None else stream


def takes_at_once(stream: TextIO | None, size: int) -> bool:
    """Whether so many bytes can surely be written there without waiting."""
    if stream is None:
        return True
    try:
        return size <= select.PIPE_BUF and bool(select.select([], [stream], [], 0)[1])
    except (AttributeError, OSError, ValueError):  # this is Windows, or it is no file
        return False


# A server in a module.


def load_server(target: str) -> Server:
    """Import the server that `module:name` names, from the current directory or what is installed.

    Raises:
        ValueError: There is no such thing; the text names what there is. A module that fails shows
            its own traceback.
    """
    module_name, _, name = target.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise ValueError(f"{target!r} must be module:name, such as app:server")
    here = Path.cwd()
    sys.path.insert(0, str(here))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise ValueError(f"{module_name} cannot be imported: {exc}") from None
        modules = ", ".join(sorted(path.stem for path in here.glob("*.py"))[:20])
        raise ValueError(
            f"no module {exc.name!r}; modules in {here}: {modules or 'none'}"
        ) from None
    except Exception as exc:  # noqa: BLE001  # whatever the module raises
        raise ValueError(f"{module_name} cannot be imported:\n{_own_traceback(exc)}") from None
    found = getattr(module, name, None)
    if isinstance(found, Server):
        return found
    what = f"is of type {type(found).__name__}" if hasattr(module, name) else "is not there"
    servers = [key for key, value in vars(module).items() if isinstance(value, Server)]
    raise ValueError(f"{target} {what}; servers in {module_name}: {', '.join(servers) or 'none'}")


def _own_traceback(error: Exception) -> str:
    """Return the traceback without what led to the module."""
    trace = error.__traceback__
    while trace is not None and _leads_there(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _leads_there(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")
