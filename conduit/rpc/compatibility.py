"""Whether the methods of an interface fit those that a peer offers, without calling one.

What travels is compared by its JSON Schemas: arguments as the interface sends them with what the
peer takes, results and items as the peer sends them with what the interface takes. A difference is
reported only if it is sure to fail: for every kind of value that may be sent there must be one that
is taken. So a peer may offer more, take more and send less than an interface knows of.

A type of the interface that writes another kind of value than it reads, such as a number that a
serializer makes text of, takes from its peers what it writes.

What is not looked at: formats (but that a `Decimal` goes for a number, and a number for a date or a
time), patterns, lengths, ranges and other bounds, all but the first level of `allOf`, `not`, `if`
and `patternProperties`. A schema that says nothing fits everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, get_origin

from pydantic import TypeAdapter

from ..schemas import methods_of, readable
from ..signatures import annotation, shown
from ..transport.answers import Response
from .interface import ASYNC, Operation, Style, operations
from .streams import item_of
from .validation import AS_SENT, AS_TAKEN, adapter_of

__all__ = ["differences", "misfits"]

COMPARISONS: Final = 20_000
"""What is looked at of one schema; a peer chooses its size, and references multiply it."""
REFERENCES: Final = 16
DEPTH: Final = 100
"""Levels of two schemas that are compared; what lies deeper fits."""
TEXT: Final = 80

_KINDS: Final[dict[type, str]] = {
    type(None): "null",
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}


_TIMES: Final = ("date", "date-time", "time")
"""Formats of text for which numbers are taken."""
_NOT_SENT: Final = "it is required, and not sent"
_NOT_TAKEN: Final = "it is sent, and not taken"


class Misfit(NamedTuple):
    """Something that is sent and not taken: where it is below the value, and what is wrong."""

    path: str
    problem: str


def differences(interface: Any, offered: Any, style: Style = ASYNC) -> list[str]:
    """Return what keeps an interface from what a peer offers, one sentence each.

    Args:
        interface: What `rpc.bind` takes.
        offered: What `rpc.discover` has returned; it may come from anybody.
        style: How the interface is written.

    Raises:
        TypeError: The interface cannot be called at all.
    """
    methods = {str(one.get("name")): one for one in methods_of(readable(offered))}
    found: list[str] = []
    for operation in operations(interface, style):
        method = methods.get(operation.name)
        if method is None:
            found.append(f"{operation.place}: the peer has no method {operation.name!r}")
        else:
            found += (f"{operation.place}: {one}" for one in _method(operation, method))
    return found


def misfits(sent: Any, taken: Any) -> list[Misfit]:
    """Return what may be sent by one JSON Schema and is never taken by another."""
    return _Comparison(sent, taken).of(sent, taken, "")


def _method(operation: Operation, method: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is different about one method."""
    streaming = ("both" if operation.input else "out") if operation.streams else None
    streaming = streaming or ("in" if operation.input else None)
    offered = method.get("streaming", streaming)
    if offered != streaming:
        known = offered is None or isinstance(offered, str)
        there = _STREAMING.get(offered, "differs") if known else "differs"
        yield f"{_STREAMING[streaming]}, and at the peer it {there}"
    parameters = method.get("parameters")
    if isinstance(parameters, dict):
        yield from _parameters(operation, parameters, method.get("argument"))
    if operation.streams and operation.items is not Any:
        found = _read(method.get("items"), adapter_of(operation.place, operation.items))
        yield from _sentences("items", found)
    result = operation.result
    if result is Response or get_origin(result) is Response:
        result = item_of(result)
    # A stream that is only iterated over does not look at its result.
    if result is not Any and not (operation.streams and result is type(None)):
        found = _read(method.get("returns"), adapter_of(operation.place, result))
        yield from _sentences("result", found)


def _read(sent: Any, adapter: TypeAdapter[Any]) -> list[Misfit]:
    """Return what a peer may send and the interface never takes."""
    taken = adapter.json_schema(**AS_TAKEN)
    return _but_for_own(misfits(sent, taken), adapter.json_schema(**AS_SENT), taken)


def _but_for_own(found: list[Misfit], sent: Any, taken: Any) -> list[Misfit]:
    """Leave out where a type of the interface writes another kind of value than it reads.

    Args:
        found: What does not fit between the interface and the peer.
        sent: The type as it is written.
        taken: The type as it is read.
    """
    if not found:
        return []
    own = [one for one in misfits(sent, taken) if one.problem not in (_NOT_SENT, _NOT_TAKEN)]
    return [one for one in found if one not in own]


_STREAMING: Final[dict[Any, str]] = {
    None: "has one answer",
    "out": "sends a stream",
    "in": "takes a stream",
    "both": "takes and sends a stream",
}


def _parameters(operation: Operation, parameters: dict[str, Any], argument: Any) -> Iterator[str]:
    """Yield what is different about what a caller gives."""
    sent, required = _sent(operation)
    stream = argument.get("name") if isinstance(argument, dict) else None
    if operation.input is not None and isinstance(argument, dict):
        if stream != operation.input:
            yield f"the stream {operation.input!r} is {_named(stream)} at the peer"
        item = operation.contract.hints[operation.input]
        if (item := item_of(item)) is not Any:
            schema, own = _both_ways(adapter_of(operation.place, item))
            found = _but_for_own(misfits(schema, argument.get("items")), schema, own)
            yield from _sentences(f"items of {operation.input!r}", found)
    whole = _Document(parameters).resolved(parameters)
    if "prefixItems" in whole or whole.get("type") == "array":
        if sent:
            yield "the peer takes its parameters by position only"
        return
    properties, needed = _map(whole, "properties"), _names(whole, "required")
    for name, (schema, own) in sent.items():
        if name in properties:
            found = _Comparison(schema, parameters).of(schema, properties[name], "")
            yield from _sentences(f"parameter {name!r}", _but_for_own(found, schema, own))
        elif name == stream:
            yield f"the parameter {name!r} is a stream at the peer"
        elif whole.get("additionalProperties") is False:
            yield f"the peer knows no parameter {name!r}"
    if required is None:
        return
    for name in needed:
        if name not in sent:
            yield f"the peer requires the parameter {_named(name)}, which is not sent"
        elif name not in required:
            yield f"the peer requires the parameter {name!r}, which may be left out"


_BothWays = tuple[Any, Any]
"""The schema of a type as it is written, and as it is read."""


def _both_ways(adapter: TypeAdapter[Any]) -> _BothWays:
    return adapter.json_schema(**AS_SENT), adapter.json_schema(**AS_TAKEN)


def _sent(operation: Operation) -> tuple[dict[str, _BothWays], set[str] | None]:
    """Return the schemas of what is sent, by name, and the names that always are.

    Those are None where others may be sent as well, by a model that writes itself or takes extras.
    """
    hints = operation.contract.hints
    if operation.lone is not None:
        model = _both_ways(adapter_of(operation.place, hints[operation.lone]))
        written, read = map(_fields, model)
        more = _Document(model[0]).resolved(model[0]).get("additionalProperties")
        always = set(written) if written and not more else None
        return {name: (one, read.get(name, {})) for name, one in written.items()}, always
    schemas, required = dict[str, _BothWays](), set[str]()
    for parameter in operation.parameters:
        if parameter.name == operation.input:
            continue
        hint = hints.get(parameter.name, Any)
        schemas[parameter.name] = (
            ({}, {}) if hint is Any else _both_ways(adapter_of(operation.place, hint))
        )
        if parameter.default is parameter.empty:
            required.add(parameter.name)
    return schemas, required


def _fields(model: Any) -> dict[str, Any]:
    """Return the schemas of the fields of a model, each with the definitions."""
    document = _Document(model)
    fields = _map(document.resolved(model), "properties")
    return {name: document.alone(field) for name, field in fields.items()}


def _sentences(where: str, found: list[Misfit]) -> list[str]:
    return [f"{where}{path}: {problem}" for path, problem in found]


class _Document:
    """A JSON Schema with its definitions."""

    def __init__(self, root: Any) -> None:
        self._definitions = _map(root, "$defs") if isinstance(root, dict) else {}

    def resolved(self, schema: Any) -> dict[str, Any]:
        """Return what a schema refers to; nothing for what says nothing, or leads nowhere."""
        for _ in range(REFERENCES):
            if not isinstance(schema, dict):
                break
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            name = reference.removeprefix("#/$defs/")
            schema = self._definitions.get(name.replace("~1", "/").replace("~0", "~"))
        return {}

    def alone(self, schema: Any) -> Any:
        """Return a part of the document with the definitions."""
        return {**schema, "$defs": self._definitions} if isinstance(schema, dict) else schema


class _Comparison:
    """Compares two schemas and what they refer to."""

    def __init__(self, sent: Any, taken: Any) -> None:
        self._sent, self._taken = _Document(sent), _Document(taken)
        self._left = COMPARISONS
        self._open: set[tuple[int, int]] = set()

    def of(self, sent: Any, taken: Any, path: str) -> list[Misfit]:
        """Return what of one is not taken by the other."""
        sent, taken = self._sent.resolved(sent), self._taken.resolved(taken)
        pair = (id(sent), id(taken))
        self._left -= 1
        deep = len(self._open) > DEPTH
        if not sent or not taken or self._left < 0 or deep or pair in self._open:
            return []  # a pair that is being compared, in a recursive type, has said all it can
        self._open.add(pair)
        try:
            return self._compared(sent, taken, path)
        finally:
            self._open.discard(pair)

    def _compared(self, sent: dict[str, Any], taken: dict[str, Any], path: str) -> list[Misfit]:
        if (parts := _list(sent, "allOf")) is not None:
            return self.of(parts[0], taken, path) if len(parts) == 1 else []
        if (parts := _list(taken, "allOf")) is not None:
            return [one for part in parts for one in self.of(sent, part, path)]
        if (choices := _alternatives(sent)) is not None:
            return [one for choice in choices for one in self.of(choice, taken, path)]
        if (choices := _alternatives(taken)) is not None:
            values = _values(sent)
            if values is None or len(values) == 1:
                return self._one_of(sent, choices, path, taken)
            refused = [one for one in values if self._one_of({"const": one}, choices, path, taken)]
            return [Misfit(path, _problem({"enum": refused}, taken))] if refused else []
        if (values := _values(sent)) is not None:
            refused = [value for value in values if not _is_taken(value, taken)]
            return [Misfit(path, _problem({"enum": refused}, taken))] if refused else []
        kind, other = sent.get("type"), taken.get("type")
        if (values := _values(taken)) is not None:
            if any(_is_taken(value, sent) for value in values):
                return []
            return [Misfit(path, _problem(sent, taken))]
        if not isinstance(kind, str) or not isinstance(other, str):
            return []
        if not _fits(kind, other) and not _goes_for(sent, taken):
            return [Misfit(path, _problem(sent, taken))]
        if kind == "object":
            return self._object(sent, taken, path)
        return self._array(sent, taken, path) if kind == "array" else []

    def _one_of(
        self, sent: dict[str, Any], choices: list[Any], path: str, taken: dict[str, Any]
    ) -> list[Misfit]:
        deeper: list[list[Misfit]] = []
        for choice in choices:
            found = self.of(sent, choice, path)
            if not found:
                return []
            if found[0].path != path:
                deeper.append(found)
        # Of `Order | None` it is the order whose fields are wrong.
        return deeper[0] if len(deeper) == 1 else [Misfit(path, _problem(sent, taken))]

    def _object(self, sent: dict[str, Any], taken: dict[str, Any], path: str) -> list[Misfit]:
        ours, theirs = _map(sent, "properties"), _map(taken, "properties")
        more, others = sent.get("additionalProperties"), taken.get("additionalProperties")
        found: list[Misfit] = []
        if ours and not more:
            found += (
                Misfit(f"{path}.{_plain(name)}", _NOT_SENT)
                for name in _names(taken, "required")
                if name not in ours
            )
        always = _names(sent, "required")
        for name, schema in ours.items():
            if name in theirs or isinstance(others, dict):
                found += self.of(schema, theirs.get(name, others), f"{path}.{_plain(name)}")
            elif others is False and name in always:
                found.append(Misfit(f"{path}.{_plain(name)}", _NOT_TAKEN))
        if isinstance(more, dict) and isinstance(others, dict):
            found += self.of(more, others, f"{path}.*")
        return found

    def _array(self, sent: dict[str, Any], taken: dict[str, Any], path: str) -> list[Misfit]:
        least, most = sent.get("minItems"), taken.get("maxItems")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            return [Misfit(path, f"at least {least} items are sent, and at most {most} taken")]
        least, most = taken.get("minItems"), sent.get("maxItems")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            return [Misfit(path, f"at most {most} items are sent, and at least {least} taken")]
        ours, theirs = _list(sent, "prefixItems") or [], _list(taken, "prefixItems") or []
        found: list[Misfit] = []
        for place in range(max(len(ours), len(theirs))):
            one = ours[place] if place < len(ours) else sent.get("items")
            other = theirs[place] if place < len(theirs) else taken.get("items")
            found += self.of(one, other, f"{path}[{place}]")
        return found + self.of(sent.get("items"), taken.get("items"), f"{path}[]")


def _problem(sent: dict[str, Any], taken: dict[str, Any]) -> str:
    return f"{_plain(annotation(sent))} is sent, and {_plain(annotation(taken))} is taken"


def _alternatives(schema: dict[str, Any]) -> list[Any] | None:
    """Return the alternatives of a schema that has some."""
    for key in ("anyOf", "oneOf"):
        if (found := _list(schema, key)) is not None:
            return found
    kinds = _list(schema, "type")
    return None if kinds is None else [{**schema, "type": kind} for kind in kinds]


def _values(schema: dict[str, Any]) -> list[Any] | None:
    """Return the values of a schema that has only some."""
    return [schema["const"]] if "const" in schema else _list(schema, "enum")


def _is_taken(value: Any, schema: dict[str, Any]) -> bool:
    values = _values(schema)
    if values is not None:
        return any(one == value and type(one) is type(value) for one in values)
    kind = schema.get("type")
    return not isinstance(kind, str) or _fits(_KINDS.get(type(value), ""), kind)


def _fits(sent: str, taken: str) -> bool:
    """Whether values of one kind are taken for another; `True` is a number as in Python."""
    numbers = ("integer", "number")
    return sent == taken or (taken in numbers and sent in (*numbers, "boolean"))


def _goes_for(sent: dict[str, Any], taken: dict[str, Any]) -> bool:
    """Whether the formats say that values of different kinds are taken all the same."""
    numbers = ("integer", "number")
    if sent.get("format") == "decimal":
        return taken.get("type") in numbers
    return sent.get("type") in numbers and taken.get("format") in _TIMES


def _map(schema: Any, key: str) -> dict[str, Any]:
    found = schema.get(key)
    return found if isinstance(found, dict) else {}


def _list(schema: Any, key: str) -> list[Any] | None:
    found = schema.get(key)
    return found if isinstance(found, list) and found else None


def _names(schema: Any, key: str) -> list[str]:
    return [name for name in _list(schema, key) or () if isinstance(name, str)]


def _named(name: Any) -> str:
    return repr(_plain(str(name)))


def _plain(text: str) -> str:
    """Return text of a peer as one short line."""
    text = shown(text)
    return text if len(text) <= TEXT else f"{text[: TEXT - 3]}..."
