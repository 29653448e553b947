"""A short hash of what can be called, by which a peer sees that it knows the methods already.

It changes whenever a name, a parameter, a result or a stream does, and not for words about them.
Peers only compare it; it may differ between versions of Pydantic for the same methods, which costs
them one question more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["fingerprint"]

_TOLD: Final = ("name", "streaming", "parameters", "argument", "items", "returns")
_SCHEMAS: Final = ("properties", "$defs")
"""Maps of schemas, whose keys are names and no keywords."""
_VALUES: Final = ("default", "const", "enum")
_WORDS: Final = ("title", "description", "examples", "deprecated")
_BYTES: Final = 8


def fingerprint(methods: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the fingerprint of methods, in whatever order; nothing if there are none.

    Args:
        methods: What discovery tells of each.
    """
    told = [{key: _plain(method.get(key)) for key in _TOLD} for method in methods]
    if not told:
        return b""
    told.sort(key=lambda method: str(method["name"]))
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:_BYTES]


def _plain(schema: Any) -> Any:
    """Return a schema without words."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS and isinstance(value, dict):
            plain[key] = {name: _plain(one) for name, one in value.items()}
        elif key in _VALUES:
            plain[key] = value
        elif key not in _WORDS:
            plain[key] = _plain(value)
    return plain
