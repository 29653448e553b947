"""A typed client module from what a server tells of its methods, for `conduit stub`.

The server is not trusted: whatever it says becomes a name that has been checked, the `repr` of
plain data, or text inside a docstring. So the module has imports, assignments and classes, and
importing it runs nothing that a server chose. The same methods give the same text.

It is written by hand and not by a library: those that make models from JSON Schema know nothing of
methods and streams, bring a dozen packages, and mean to read what their user has written.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from .schemas import (
    entry,
    has_default,
    is_name,
    list_of,
    map_of,
    meaning,
    methods_of,
    property_names,
    readable,
    required_names,
    resolved,
)
from .signatures import deprecation, shown

__all__ = ["stub"]

DEPTH: Final = 24
"""Levels of a schema that are told apart; what lies deeper is Any."""
SCHEMAS: Final = 100_000
"""Parts of schemas that are looked at; a server chooses them, and references multiply them."""
CLASSES: Final = 2000
EXAMPLES: Final = 10
LINE: Final = 100

_SOURCES: Final = {
    "Any": "typing",
    "AsyncIterator": "collections.abc",
    "BaseModel": "pydantic",
    "ConfigDict": "pydantic",
    "Decimal": "decimal",
    "Field": "pydantic",
    "Iterator": "collections.abc",
    "Literal": "typing",
    "NotRequired": "typing_extensions",
    "Protocol": "typing",
    "StreamCall": "conduit",
    "TypedDict": "typing_extensions",
    "UUID": "uuid",
    "date": "datetime",
    "datetime": "datetime",
    "deprecated": "typing_extensions",
    "idempotent": "conduit",
    "time": "datetime",
    "timedelta": "datetime",
}
"""What the module may import, and from where."""

_SCALARS: Final = {
    "boolean": "bool",
    "integer": "int",
    "null": "None",
    "number": "float",
    "string": "str",
}
_FORMATS: Final = {
    "binary": "bytes",
    "date": "date",
    "date-time": "datetime",
    "decimal": "Decimal",
    "duration": "timedelta",
    "time": "time",
    "uuid": "UUID",
}
_PLAIN: Final = ("bool", "int", "float", "str")
_FORBIDDEN: Final = {*dir(builtins), *keyword.kwlist, *keyword.softkwlist, "self"}
_OF_MODELS: Final = frozenset(dir(BaseModel))


def stub(
    methods: Any, *, server: str, version: str, module: str = "", blocking: bool = False
) -> str:
    """Return the source of a module with an interface for `rpc.bind`, and its models.

    Args:
        methods: What `rpc.discover` has returned.
        server: What the server calls itself, after which the interface is named.
        version: The version of the server's application.
        module: What the module is going to be called, if that is known.
        blocking: Write the interface for `conduit.blocking.Client`.
    """
    return _Module(methods_of(readable(methods)), blocking).source(server, version, module)


class _Module:
    """The module while it is written."""

    def __init__(self, methods: list[dict[str, Any]], blocking: bool) -> None:
        self._blocking = blocking
        self._stream = "Iterator" if blocking else "AsyncIterator"
        self._methods = {str(one.get("name")): one for one in methods}
        # In a class these would hide the types that its annotations mean.
        members = {*self._methods, *property_names(list(self._methods.values()))}
        self._members = {name for name in members if is_name(name)}
        self._used: set[str] = set()
        self._names = {*_FORBIDDEN, *_SOURCES, *self._members}
        self._known: dict[str, str] = {}
        self._keys: dict[tuple[int, int], str] = {}
        self._kept: list[Any] = []  # so that the ids above stay theirs
        self._open: set[int] = set()
        self._left = SCHEMAS
        self._definitions: list[str] = []

    def source(self, server: str, version: str, module: str) -> str:
        """Return the whole text."""
        name = self._new_name("".join(part.title() for part in re.split(r"[\W_]+", server)))
        written, left_out = [], []
        for method in self._methods.values():
            reason = _unwritable(method)
            if reason:
                left_out.append(f"{str(method.get('name'))!r}: {reason}")
            else:
                written.append(self._method(method))
        body = "\n\n".join(written) or "    pass"
        head = f"class {name}({self._type_name('Protocol')}):\n"
        head += f'    """The methods of {_in_docstring(server)}."""\n\n'
        used = _usage(module if is_name(module) else "this_module", name, self._blocking)
        parts = [
            f'"""{_about(server, version, used, left_out)}"""\n\n'
            "from __future__ import annotations\n\n" + "\n".join(self._imports()),
            *self._definitions,
            f"{head}{body}",
        ]
        return "\n\n\n".join(part for part in parts if part) + "\n"

    # Names.

    def _type_name(self, name: str) -> str:
        """Return how a known type is called in this module, and remember that it is."""
        self._used.add(name)
        return self._called(name)

    def _called(self, name: str) -> str:
        return f"_{name}" if name in self._members else name

    def _imports(self) -> Iterator[str]:
        sources: dict[str, list[str]] = {}
        for name in sorted(self._used & _SOURCES.keys()):
            alias = f"{name} as {self._called(name)}" if name in self._members else name
            source = _SOURCES[name]
            if self._blocking and name == "StreamCall":
                source = "conduit.blocking"
            sources.setdefault(source, []).append(alias)
        for source in sorted(sources):
            yield f"from {source} import {', '.join(sources[source])}"
        for name in sorted((self._used - _SOURCES.keys() - {"None"}) & self._members):
            yield f"\n{self._called(name)} = {name}"

    def _new_name(self, wanted: str) -> str:
        """Return a free name for a class, as near to the wanted one as can be."""
        name = unicodedata.normalize("NFKC", re.sub(r"\W+", "_", wanted)).strip("_")[:60]
        if not name.isidentifier():
            name = f"Type{name}" if f"Type{name}".isidentifier() else "Type"
        free, number = name, 2
        while free in self._names:
            free, number = f"{name}{number}", number + 1
        self._names.add(free)
        return free

    # Methods.

    def _method(self, method: dict[str, Any]) -> str:
        result = self._type(method.get("returns"), "Result")
        sends = method.get("streaming") in ("out", "both")
        returned, first = result, "def" if self._blocking else "async def"
        if sends:
            items, first = self._type(method.get("items"), "Item"), "def"
            if result == "None":
                returned = f"{self._type_name(self._stream)}[{items}]"
            else:
                returned = f"{self._type_name('StreamCall')}[{items}, {result}]"
        parameters = ["self", *self._parameters(method)]
        name = str(method["name"])
        line = f"    {first} {name}({', '.join(parameters)}) -> {returned}:"
        if len(f"{line} ...") > LINE:
            rows = "".join(f"        {one},\n" for one in parameters)
            line = f"    {first} {name}(\n{rows}    ) -> {returned}:"
        if method.get("idempotent") is True:
            line = f"    @{self._type_name('idempotent')}\n{line}"
        if mark := deprecation(method):
            text = mark.removeprefix("deprecated").removeprefix(": ") or "it is deprecated"
            line = f"    @{self._type_name('deprecated')}({repr(text)})\n{line}"
        words = _words(method)
        return f'{line}\n        """{words}"""\n        ...' if words else f"{line} ..."

    def _parameters(self, method: dict[str, Any]) -> list[str]:
        """Return the parameters, those without a default first."""
        whole = method.get("parameters")
        schema = resolved(whole, whole)
        required, optional = [], []
        needed = required_names(schema)
        for name, one in map_of(schema, "properties").items():
            hint = self._type(one, name, whole)
            if name in needed:
                required.append(f"{name}: {hint}")
            else:
                optional.append(f"{name}: {hint} = {_default_of_parameter(one, hint)}")
        argument = method.get("argument")
        if isinstance(argument, dict):
            hint = f"{self._type_name(self._stream)}[{self._type(argument.get('items'), 'Item')}]"
            required.append(f"{argument['name']}: {hint}")
        return required + optional

    # Types.

    def _type(self, schema: Any, wanted: str, root: Any = None, depth: int = 0) -> str:
        """Return a schema as an annotation.

        Args:
            schema: A part of a JSON Schema.
            wanted: A name for it, if it needs one and has none.
            root: The whole, whose `$defs` it may refer to; itself by default.
            depth: How deep in the whole it stands.
        """
        root = schema if root is None else root
        self._left -= 1
        if not isinstance(schema, dict) or depth > DEPTH or self._left < 0:
            return self._type_name("Any")
        if isinstance(schema.get("$ref"), str):
            name = schema["$ref"].rpartition("/")[2]
            return self._defined(resolved(schema, root), name, root, depth)
        values = [schema["const"]] if "const" in schema else list_of(schema, "enum")
        if values:
            return self._literal(values)
        if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1:
            return self._type(schema["allOf"][0], wanted, root, depth + 1)
        kind, format = schema.get("type"), schema.get("format")
        if format in ("decimal", "duration"):
            return self._type_name(_FORMATS[format])
        choices = list_of(schema, "anyOf") or list_of(schema, "oneOf")
        if isinstance(kind, list):
            choices = [{**schema, "type": one} for one in kind]
            self._kept += choices
        if choices:
            union = [self._type(one, wanted, root, depth + 1) for one in choices]
            anything = self._called("Any")
            return anything if anything in union else " | ".join(dict.fromkeys(union))
        if kind == "array":
            return self._array(schema, wanted, root, depth)
        if kind == "object":
            return self._object(schema, wanted, root, depth)
        if kind == "string" and isinstance(format, str) and format in _FORMATS:
            return self._type_name(_FORMATS[format])
        known = _SCALARS.get(kind) if isinstance(kind, str) else None
        return self._type_name(known or "Any")

    def _array(self, schema: dict[str, Any], wanted: str, root: Any, depth: int) -> str:
        parts = list_of(schema, "prefixItems")
        if parts and schema.get("minItems") == len(parts) == schema.get("maxItems"):
            inner = ", ".join(self._type(one, wanted, root, depth + 1) for one in parts)
            return f"{self._type_name('tuple')}[{inner}]"
        item = self._type(schema.get("items"), wanted, root, depth + 1)
        hashable = item in map(self._called, (*_PLAIN, *_FORMATS.values()))
        kind = "set" if schema.get("uniqueItems") is True and hashable else "list"
        return f"{self._type_name(kind)}[{item}]"

    def _literal(self, values: list[Any]) -> str:
        if all(type(one) in (str, int, bool, type(None)) for one in values):
            return f"{self._type_name('Literal')}[{', '.join(map(repr, values))}]"
        numbers = all(type(one) in (int, float) for one in values)
        return self._type_name("float" if numbers else "Any")

    def _object(self, schema: dict[str, Any], wanted: str, root: Any, depth: int) -> str:
        if "properties" not in schema:
            values = schema.get("additionalProperties")
            inner = self._type(
                values if isinstance(values, dict) else None, wanted, root, depth + 1
            )
            return f"{self._type_name('dict')}[{self._type_name('str')}, {inner}]"
        title = schema.get("title")
        return self._defined(schema, title if isinstance(title, str) else wanted, root, depth)

    def _defined(self, schema: Any, wanted: str, root: Any, depth: int) -> str:
        """Return a definition by its name, or written out where it needs none."""
        choice = list_of(schema, "enum")
        is_object = isinstance(entry(schema, "properties"), dict) and schema.get("type") == "object"
        if not is_object and not choice:
            return self._written_out(schema, wanted, root, depth)
        if len(self._known) >= CLASSES:
            return self._type_name("Any")
        place = (id(schema), id(root))
        if place not in self._keys:
            self._keys[place] = meaning(schema, root)
        key = self._keys[place]
        if key in self._known:
            return self._known[key]
        if choice:
            hint = self._literal(choice)
            if not hint.startswith(self._called("Literal")):
                return hint
            self._known[key] = name = self._new_name(wanted)
            self._definitions.append(f"{name} = {hint}")
            return name
        self._known[key] = name = self._new_name(wanted)
        names = map_of(schema, "properties")
        needed = required_names(schema)
        optional = [one for one in names if one not in needed]
        if all(map(_is_field, names)) and not any(
            _repr_of_default(names[one]) is None for one in optional
        ):
            text = self._model(name, schema, root, depth)
        else:
            text = self._typed_dict(name, schema, root, depth)
        self._definitions.append(text)
        return name

    def _written_out(self, schema: Any, wanted: str, root: Any, depth: int) -> str:
        """Return a definition as an annotation; inside itself, where it has no end, it is Any."""
        place = id(schema)
        if place in self._open:
            return self._type_name("Any")
        self._open.add(place)
        hint = self._type(schema, wanted, root, depth + 1)
        self._open.remove(place)
        return hint

    def _model(self, name: str, schema: dict[str, Any], root: Any, depth: int) -> str:
        lines: list[str] = []
        if words := _in_docstring(str(schema.get("description") or ""), 4):
            lines.append(f'    """{words}"""\n')
        if schema.get("additionalProperties"):
            lines.append(f"    model_config = {self._type_name('ConfigDict')}(extra='allow')\n")
        for field, one in map_of(schema, "properties").items():
            hint = self._type(one, f"{name}{field.title()}", root, depth + 1)
            # What is always sent has its default all the same, so both are one class.
            default = _repr_of_default(one)
            if default is None:
                lines.append(f"    {field}: {hint}")
            elif _is_of(one.get("default"), hint):
                lines.append(f"    {field}: {hint} = {default}")
            else:
                value = f"{self._type_name('Field')}(default={default}, validate_default=True)"
                lines.append(f"    {field}: {hint} = {value}")
        body = "\n".join(lines) or "    pass"
        return f"class {name}({self._type_name('BaseModel')}):\n{body}"

    def _typed_dict(self, name: str, schema: dict[str, Any], root: Any, depth: int) -> str:
        """Return a definition that takes any name for a key."""
        rows: list[str] = []
        needed = required_names(schema)
        for field, one in map_of(schema, "properties").items():
            hint = repr(self._type(one, f"{name}{field.title()}", root, depth + 1))
            if field not in needed or has_default(one):
                hint = f"{self._type_name('NotRequired')}[{hint}]"
            rows.append(f"        {repr(field)}: {hint},\n")
        inner = f"{{\n{''.join(rows)}    }}" if rows else "{}"
        return f"{name} = {self._type_name('TypedDict')}(\n    {repr(name)},\n    {inner},\n)"


# What a module can have.


def _unwritable(method: Mapping[str, Any]) -> str:
    """Return why an interface cannot have a method; nothing if it can."""
    name = method.get("name")
    if not is_name(name) or str(name).startswith("_"):
        return "no name of a Python method"
    parameters = resolved(method.get("parameters"), method.get("parameters"))
    if list_of(parameters, "prefixItems") or entry(parameters, "type") == "array":
        return "its parameters have no names"
    argument = entry(method.get("argument"), "name")
    names = [*map_of(parameters, "properties")]
    if isinstance(method.get("argument"), dict):
        names.append(argument)
    wrong = [one for one in names if not is_name(one) or one == "self" or one.startswith("__")]
    if wrong or len(set(names)) < len(names):
        told = ", ".join(map(repr, wrong)) or "one is there twice"
        return f"no name of a Python parameter: {told}"
    return ""


def _is_field(name: str) -> bool:
    """Whether a Pydantic model can have a field of this name."""
    return is_name(name) and not name.startswith(("_", "model_")) and name not in _OF_MODELS


# Values and words.


def _repr_of_default(schema: Any) -> str | None:
    """Return the default of a property as Python, or None if it has none that can be written."""
    if not has_default(schema):
        return None
    return repr(schema["default"]) if _is_finite(schema["default"]) else None


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list) else True


def _is_of(value: Any, hint: str) -> bool:
    """Whether a default is of the annotated type as it stands."""
    choices = [one.lstrip("_") for one in hint.split(" | ")]
    if value is None:
        return "None" in choices
    if isinstance(value, (list, dict)):
        return not value and any(one.startswith(f"{type(value).__name__}[") for one in choices)
    kind = type(value).__name__
    return kind in _PLAIN and (kind in choices or kind == "int" and "float" in choices)


def _default_of_parameter(schema: Any, hint: str) -> str:
    """Return the default of a parameter, which is for the reader: the server's counts."""
    default = _repr_of_default(schema)
    value = schema.get("default") if default is not None else ...
    if isinstance(value, (list, dict)) or not _is_of(value, hint):
        return "..."
    return str(default)


def _words(method: Mapping[str, Any]) -> str:
    """Return the docstring of a method."""
    lines = [*_lines(str(method.get("description") or ""))]
    examples = [f"    {one!r}" for one in list_of(method, "examples")[:EXAMPLES]]
    if examples:
        lines += [*([""] if lines else []), "For example:", *examples]
    text = _in_docstring("\n".join(lines), 8)
    return f"{text}\n        " if "\n" in text else text


def _in_docstring(text: str, indent: int = 0) -> str:
    """Return text that can stand between three quotes, its lines indented but for the first."""
    lines = [_escaped(shown(line.rstrip())) for line in _lines(text)]
    space = " " * indent
    return "\n".join([*lines[:1], *(f"{space}{line}".rstrip() for line in lines[1:])])


def _escaped(line: str) -> str:
    return line.replace("\\", "\\\\").replace('"', '\\"')


def _lines(text: str) -> Sequence[str]:
    return text.strip().split("\n") if text.strip() else []


def _usage(module: str, name: str, blocking: bool) -> list[str]:
    """Return the program that shows how the module is used."""
    connect = "client.connect()" if blocking else "await client.connect()"
    return [
        f"from conduit{'.blocking' * blocking} import Client",
        f"from {module} import {name}",
        "",
        "client = Client('tcp://...', password='...')",
        f"server = client.rpc.bind({name})",
        f"{connect}  # which says so if the server does not fit any more",
    ]


def _about(server: str, version: str, usage: list[str], left_out: list[str]) -> str:
    """Return the docstring of the module."""
    title = " ".join(_in_docstring(one).replace("\n", " ") for one in (server, version))
    lines = [
        f"The methods of {title}, written by conduit stub.",
        "",
        *(f"    {line}".rstrip() for line in usage),
    ]
    if left_out:
        lines += ["", "Left out, but for client.rpc.call(name, ...):", ""]
        lines += (f"    {_in_docstring(one)}" for one in left_out)
    return "\n".join(lines) + "\n"
