"""What discovery tells of a method, as Python: for the command and for completion."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from .schemas import has_default, is_name, map_of, readable, required_names, resolved

__all__ = ["annotation", "deprecation", "python_signature", "shown", "signature"]

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
_NONE: Final = inspect.Parameter.empty


def shown(text: str) -> str:
    """Return text of a peer as one line that a terminal does not act upon."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def signature(method: Mapping[str, Any]) -> str:
    """Return what discovery tells of a method as `add(a: int, b: int = 0) -> int`."""
    method = readable(method)
    schema = resolved(method.get("parameters"), method.get("parameters"))
    parameters = _parameters(schema) if isinstance(schema, dict) else ["..."]
    returns = method.get("returns")
    argument, items = method.get("argument"), method.get("items")
    if isinstance(argument, dict):
        # Not told is where it stands; with no default of its own it cannot stand behind one.
        place = next((at for at, one in enumerate(parameters) if " = " in one), len(parameters))
        text = f"{argument.get('name')}: AsyncIterator[{annotation(argument.get('items'))}]"
        parameters.insert(place, text)
    if items is not None and returns == {"type": "null"}:
        return (
            f"{method.get('name')}({', '.join(parameters)}) -> AsyncIterator[{annotation(items)}]"
        )
    if items is not None:
        parameters.append(f"stream: Stream[{annotation(items)}]")
    result = f" -> {annotation(returns)}" if returns else ""
    return f"{method.get('name')}({', '.join(parameters)}){result}"


def deprecation(method: Mapping[str, Any]) -> str:
    """Return `deprecated`, with what to use instead where discovery tells it; else nothing."""
    told = method.get("deprecated")
    if isinstance(told, str) and told:
        return f"deprecated: {told}"
    return "deprecated" if told else ""


def _parameters(schema: dict[str, Any]) -> list[str]:
    by_position = schema.get("prefixItems")
    if isinstance(by_position, list):
        # Such parameters have no names on the wire; the title is made of the name.
        named = [(_identifier(one, number), one) for number, one in enumerate(by_position)]
        least = schema.get("minItems")
        needed = {name for name, _ in named[: least if isinstance(least, int) else 0]}
        last = ["/"]
    else:
        named = list(map_of(schema, "properties").items())
        needed = required_names(schema)
        last = []
    parameters: list[str] = []
    for name, one in named:
        text = f"{name}: {annotation(one)}"
        if name not in needed:
            text += f" = {_default(one)}"
        parameters.append(text)
    return parameters + last


def _identifier(schema: Any, number: int) -> str:
    title = schema.get("title") if isinstance(schema, dict) else None
    return re.sub(r"\W+", "_", title).lower() if isinstance(title, str) else f"_{number}"


def _default(schema: Any) -> str:
    return repr(schema["default"]) if has_default(schema) else "..."


def annotation(schema: Any) -> str:
    """Return a JSON Schema as a Python annotation, as far as one line tells it."""
    if not isinstance(schema, dict):
        return "Any"
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema:
        return repr(schema["const"])
    if isinstance(schema.get("enum"), list):
        return " | ".join(map(repr, schema["enum"]))
    if schema.get("format") == "decimal":
        return "Decimal"
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return " | ".join(map(annotation, schema[key]))
    kind = schema.get("type")
    if kind == ["number", "string"]:  # what a timedelta is taken as
        return _FORMATS.get(str(schema.get("format")), "Any")
    if kind == "array":
        return _array(schema)
    if kind == "object":
        if "properties" in schema:
            return str(schema.get("title", "dict"))
        values = schema.get("additionalProperties")
        return f"dict[str, {annotation(values)}]" if isinstance(values, dict) else "dict"
    if kind == "string" and str(schema.get("format")) in _FORMATS:
        return _FORMATS[schema["format"]]
    return _TYPES.get(str(kind), "Any")


def _array(schema: dict[str, Any]) -> str:
    name = "set" if schema.get("uniqueItems") else "list"
    if isinstance(schema.get("prefixItems"), list):
        return f"tuple[{', '.join(map(annotation, schema['prefixItems']))}]"
    return f"{name}[{annotation(schema['items'])}]" if schema.get("items") else name


class _Annotation(str):
    """The text of an annotation, which `inspect` shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def python_signature(method: Mapping[str, Any]) -> inspect.Signature:
    """Return what discovery tells of a method as a signature in which every name is a keyword.

    Parameters whose names Python does not take are summed up as `**others`.
    """
    method = readable(method)
    schema = resolved(method.get("parameters"), method.get("parameters"))
    argument, returns = method.get("argument"), method.get("returns")
    found: dict[str, inspect.Parameter] = {}
    others = not isinstance(schema, dict) or "properties" not in schema and "prefixItems" in schema
    if isinstance(schema, dict):
        needed = required_names(schema)
        for name, one in map_of(schema, "properties").items():
            if not is_name(name):
                others = True
                continue
            default = one["default"] if has_default(one) else ...
            found[name] = _keyword(name, annotation(one), _NONE if name in needed else default)
    if isinstance(argument, dict) and is_name(argument.get("name")):
        name = argument["name"]
        found[name] = _keyword(name, f"Iterator[{annotation(argument.get('items'))}]", _NONE)
    if others:
        found.setdefault("others", inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD))
    result = _Annotation(annotation(returns)) if returns else _NONE
    return inspect.Signature(list(found.values()), return_annotation=result)


def _keyword(name: str, annotation: str, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=_Annotation(annotation))
