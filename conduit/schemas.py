"""What discovery says, whatever it says: JSON Schemas that a peer has chosen, read with care."""

from __future__ import annotations

import json
import keyword
import unicodedata
from collections.abc import Iterator
from typing import Any, Final

__all__ = [
    "entry",
    "has_default",
    "is_name",
    "list_of",
    "map_of",
    "meaning",
    "methods_of",
    "property_names",
    "readable",
    "required_names",
    "resolved",
]

LEVELS: Final = 200
"""Maps and lists that are read within each other."""
REFERENCES: Final = 24
"""References that are followed, each to the next."""
REACHED: Final = 200
"""Definitions that one may refer to, in the end, and still be compared by what it means."""

_VALUES: Final = (
    "$ref",
    "const",
    "default",
    "enum",
    "format",
    "maxItems",
    "minItems",
    "type",
    "uniqueItems",
)
_SCHEMAS: Final = ("additionalProperties", "allOf", "anyOf", "items", "oneOf", "prefixItems")


def readable(told: Any, levels: int = LEVELS) -> Any:
    """Return what discovery says without keys that are no text, and without what lies too deep."""
    if isinstance(told, dict):
        inner = told.items() if levels else ()
        return {key: readable(one, levels - 1) for key, one in inner if isinstance(key, str)}
    if isinstance(told, list):
        return [readable(one, levels - 1) for one in told] if levels else []
    return told


def methods_of(told: Any) -> list[dict[str, Any]]:
    """Return what discovery says of each method; nothing of what is none."""
    return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def entry(schema: Any, key: str) -> Any:
    """Return what a schema says under a key; None if it is none, or says nothing there."""
    return schema.get(key) if isinstance(schema, dict) else None


def map_of(schema: Any, key: str) -> dict[str, Any]:
    """Return the map under a key; an empty one if there is none."""
    found = entry(schema, key)
    return found if isinstance(found, dict) else {}


def list_of(schema: Any, key: str) -> list[Any]:
    """Return the list under a key; an empty one if there is none."""
    found = entry(schema, key)
    return found if isinstance(found, list) else []


def required_names(schema: Any) -> set[str]:
    """Return the names of the properties that cannot be left out."""
    return {name for name in list_of(schema, "required") if isinstance(name, str)}


def has_default(schema: Any) -> bool:
    """Whether a schema tells a default, which may be None."""
    return isinstance(schema, dict) and "default" in schema


def resolved(schema: Any, root: Any) -> Any:
    """Return what a schema refers to, or itself; None if it refers to nothing.

    Args:
        schema: A part of a JSON Schema.
        root: The whole, in whose `$defs` the others are.
    """
    for _ in range(REFERENCES):
        reference = entry(schema, "$ref")
        if not isinstance(reference, str):
            return schema
        name = reference.removeprefix("#/$defs/")
        schema = map_of(root, "$defs").get(name.replace("~1", "/").replace("~0", "~"))
    return None


def property_names(methods: Any) -> Iterator[str]:
    """Yield the names of properties anywhere in what discovery says."""
    rest = [methods]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield from map_of(one, "properties")
            rest += one.values()
        elif isinstance(one, list):
            rest += one


def meaning(schema: Any, root: Any) -> str:
    """Return text that is the same for definitions that mean the same, in whichever document."""
    reached: dict[str, Any] = {}
    rest = [schema]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            reference = one.get("$ref")
            if isinstance(reference, str) and reference not in reached:
                if len(reached) >= REACHED:
                    return f"{id(root)} {id(schema)}"
                reached[reference] = resolved(one, root)
                rest.append(reached[reference])
            rest += (value for key, value in one.items() if key != "$defs")
        elif isinstance(one, list):
            rest += one
    forms = {reference: _form(one) for reference, one in reached.items()}
    return json.dumps([_form(schema), forms], sort_keys=True, default=str)


def _form(schema: Any) -> Any:
    """Return what of a schema makes a type, the same for what is sent and for what is taken."""
    if isinstance(schema, list):
        return [_form(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") in ("decimal", "duration"):
        return {key: schema[key] for key in ("format", "default") if key in schema}
    form = {key: schema[key] for key in _VALUES if key in schema}
    form |= {key: _form(schema[key]) for key in _SCHEMAS if key in schema}
    names = map_of(schema, "properties")
    if "properties" in schema:
        form["properties"] = {name: _form(one) for name, one in names.items()}
    # What is always sent may have a default all the same.
    form["required"] = [
        name
        for name in list_of(schema, "required")
        if not isinstance(name, str) or not has_default(names.get(name))
    ]
    return form


def is_name(name: Any) -> bool:
    """Whether Python takes this for a name, and for no other than it says."""
    return (
        isinstance(name, str)
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and unicodedata.normalize("NFKC", name) == name
    )
