"""Python's own types as what MessagePack has, and what is said of a value that cannot be sent."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import ipaddress
import pathlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from typing import Any, Final

__all__ = ["plain", "unsendable"]

_NATIVE: Final = (type(None), bool, float, str, bytes, bytearray, memoryview, list, tuple, dict)
_AS_TEXT: Final = (
    uuid.UUID,
    decimal.Decimal,
    pathlib.PurePath,
    ipaddress.IPv4Address,  # interfaces are addresses
    ipaddress.IPv6Address,
    ipaddress.IPv4Network,
    ipaddress.IPv6Network,
)
_STEPS: Final = 8
"""From a RootModel of an Enum of models of dates, say, to text; who needs more goes in circles."""
_LEVELS: Final = 254
_LEVELS_SHOWN: Final = 4
"""Of the path into a value that is too deep: to look farther takes long and tells nothing."""


def plain(value: Any) -> Any:
    """Turn a Python object that MessagePack has no type for into one that it has.

    Dates, times and timedeltas become ISO 8601 text; UUID, Decimal, paths and addresses become
    text, an Enum its value, sets and deques lists; mappings, dataclasses and Pydantic models become
    maps. What is inside is left as it is. The receiver's annotation turns them back.

    Raises:
        TypeError: The type cannot be sent.
        ValueError: It is an integer beyond 64 bits.
    """
    given = value
    for _ in range(_STEPS):
        value = _plainer(value)
        fits = isinstance(value, int) and -(2**63) <= value < 2**64
        if isinstance(value, _NATIVE) or (fits and not isinstance(value, enum.Enum)):
            return value
    raise _cannot_send(given, "its model_dump() is nothing plain")


def _plainer(value: Any) -> Any:
    """Take one step: the value of an Enum, for example, can be a date."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, int):
        bits = value.bit_length() + (value < 0)  # one for the sign
        raise ValueError(f"cannot send an integer of {bits} bits; 64 are the most, send text")
    if isinstance(value, datetime.datetime):
        return _with_whole_minutes(value).isoformat()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return _duration(value)
    if isinstance(value, _AS_TEXT):
        return str(value)
    kind = type(value)
    if hasattr(kind, "model_dump"):
        return value.model_dump(by_alias=True)
    if isinstance(value, (Set, deque)):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(kind, "__pydantic_serializer__"):  # one of Pydantic's own
            return kind.__pydantic_serializer__.to_python(value, by_alias=True)
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(kind, "unicode_string"):  # every kind of URL that Pydantic has
        return str(value)
    hint = "send plain data, a dataclass or a Pydantic model"
    if isinstance(value, Awaitable):
        hint = "is an `await` missing?"
    if hasattr(value, "__aiter__") or hasattr(value, "__next__"):
        hint = "an iterator can be an argument of rpc.stream(...), and nothing else"
    raise _cannot_send(value, hint)


def _cannot_send(value: Any, hint: str) -> TypeError:
    kind = type(value)
    return TypeError(f"cannot send a value of type {kind.__module__}.{kind.__qualname__}; {hint}")


def _with_whole_minutes(value: datetime.datetime) -> datetime.datetime:
    """Return the same instant with an offset that ISO 8601 can tell, which has no seconds.

    Local times before there were time zones have some.
    """
    offset = value.utcoffset()
    if offset is None or not offset % datetime.timedelta(minutes=1):
        return value
    return value.astimezone(datetime.timezone.utc)


def _duration(value: datetime.timedelta) -> str:
    """Return a timedelta as ISO 8601 text, exactly: a float of seconds would be none for years."""
    sign = "-" if value.days < 0 else ""
    # Not abs(), which is too large for the least one.
    seconds, micros = divmod(
        value // datetime.timedelta(microseconds=1 - 2 * bool(sign)), 1_000_000
    )
    days, seconds = divmod(seconds, 86_400)
    fraction = f".{micros:06}".rstrip("0") if micros else ""
    date = f"{days}D" if days else ""
    time = f"T{seconds}{fraction}S" if seconds or micros or not days else ""
    return f"{sign}P{date}{time}"


def unsendable(error: Exception, value: Any, pack: Callable[[Any], bytes]) -> Exception:
    """Say of a value that could not be packed which part of it is the reason.

    Args:
        error: What `pack` has raised.
        value: What it was given.
        pack: Packs a value, or raises.

    Returns:
        TypeError for a type that cannot be sent, else ValueError. The text begins with the path to
        the part, as that of `InvalidParams` does; the part itself is not shown.
    """
    path: list[str] = []
    deep = "recursion limit" in str(error)
    while len(path) < (_LEVELS_SHOWN if deep else _LEVELS):
        for name, part in _parts(value):
            try:
                pack(part)
            except Exception as exc:  # noqa: BLE001  # a model's own code may raise anything
                error, value = exc, part
                path.append(name)
                break
        else:
            break
    place = f"{'.'.join(path)}: " if path else ""
    if deep:
        text = f"cannot send a value that contains itself, or has far more than {_LEVELS} levels"
        return ValueError(place + text)
    if isinstance(error, UnicodeEncodeError):
        text = f"cannot send text with a lone surrogate, at position {error.start}"
        return ValueError(place + text)
    return (TypeError if isinstance(error, TypeError) else ValueError)(f"{place}{error}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values inside a value, each with its name there."""
    if not isinstance(value, (dict, list, tuple)):
        try:
            value = plain(value)
        except Exception:  # noqa: BLE001  # it is the reason itself
            return
    if isinstance(value, dict):
        for key, part in value.items():
            yield "a key", key
            yield str(key), part
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), part) for number, part in enumerate(value))
