"""What the `conduit` command reads and shows: parameters, results, signatures, a module's server.

Without typer, which only `__main__` needs. A ValueError of these functions is for the user to read.
"""

from __future__ import annotations

import base64
import importlib
import json
import math
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .server import Server

__all__ = ["json_text", "load_server", "parse_parameters", "shown", "signature"]

BYTES: Final = "$base64"

_TYPES: Final = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "null": "None",
    "array": "list",
    "object": "dict",
}
_FORMATS: Final = {
    "binary": "bytes",
    "date": "date",
    "date-time": "datetime",
    "duration": "timedelta",
    "time": "time",
    "uuid": "UUID",
}


def shown(text: str) -> str:
    """Return text of a peer as one line that a terminal does not act upon."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


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
        try:
            parameters[name] = _from_json(text)
        except ValueError:
            parameters[name] = text
    return parameters


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


# Signatures.


def signature(method: Mapping[str, Any]) -> str:
    """Return what discovery tells of a method as `add(a: int, b: int = 0) -> int`."""
    schema = method.get("parameters")
    parameters = _parameters(schema) if isinstance(schema, dict) else ["..."]
    returns = method.get("returns")
    argument, items = method.get("argument"), method.get("items")
    if isinstance(argument, dict):
        parameters.append(f"{argument.get('name')}: AsyncIterator[{_type(argument.get('items'))}]")
    if items is not None and returns == {"type": "null"}:
        return f"{method.get('name')}({', '.join(parameters)}) -> AsyncIterator[{_type(items)}]"
    if items is not None:
        parameters.append(f"stream: Stream[{_type(items)}]")
    result = f" -> {_type(returns)}" if returns else ""
    return f"{method.get('name')}({', '.join(parameters)}){result}"


def _parameters(schema: dict[str, Any]) -> list[str]:
    by_position = schema.get("prefixItems")
    if isinstance(by_position, list):
        # Such parameters have no names on the wire; the title is made of the name.
        named = [(_identifier(one, number), one) for number, one in enumerate(by_position)]
        required = {name for name, _ in named[: schema.get("minItems", 0)]}
        last = ["/"]
    else:
        named = list(schema.get("properties", {}).items())
        required = set(schema.get("required", ()))
        last = []
    parameters: list[str] = []
    for name, one in named:
        text = f"{name}: {_type(one)}"
        if name not in required:
            text += f" = {_default(one)}"
        parameters.append(text)
    return parameters + last


def _identifier(schema: Any, number: int) -> str:
    title = schema.get("title") if isinstance(schema, dict) else None
    return re.sub(r"\W+", "_", title).lower() if isinstance(title, str) else f"_{number}"


def _default(schema: Any) -> str:
    if not isinstance(schema, dict) or "default" not in schema:
        return "..."
    return repr(schema["default"])


def _type(schema: Any) -> str:
    """Return a JSON Schema as a Python annotation, as far as one line tells it."""
    if not isinstance(schema, dict):
        return "Any"
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        return " | ".join(repr(one) for one in schema.get("enum", [schema.get("const")]))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " | ".join(_type(one) for one in schema[key])
    kind = schema.get("type")
    if kind == "array":
        return _array(schema)
    if kind == "object":
        if "properties" in schema:
            return str(schema.get("title", "dict"))
        values = schema.get("additionalProperties")
        return f"dict[str, {_type(values)}]" if isinstance(values, dict) else "dict"
    if kind == "string" and schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    return _TYPES.get(str(kind), "Any")


def _array(schema: dict[str, Any]) -> str:
    name = "set" if schema.get("uniqueItems") else "list"
    if "prefixItems" in schema:
        return f"tuple[{', '.join(_type(one) for one in schema['prefixItems'])}]"
    return f"{name}[{_type(schema['items'])}]" if schema.get("items") else name


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
