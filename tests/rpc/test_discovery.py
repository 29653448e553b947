"""What a method tells of itself beside its signature: schemas as they travel, marks, examples."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, Protocol

import pydantic
import pytest
from pydantic import BaseModel, Field
from typing_extensions import deprecated

from conduit.protocol.payload import Encoder, decode
from conduit.rpc.implementation import implemented
from conduit.rpc.method import Method


def described(function: Callable[..., Any], **options: Any) -> Any:
    return Method(function, "method", **options).describe()


def echo_of(hint: Any) -> Callable[..., Any]:
    """Return a handler that takes and returns one kind of value."""

    def echo(value, other=None):
        return value

    echo.__annotations__ = {"value": hint, "return": hint}
    return echo


def add(a: int, b: int = 2) -> int:
    return a + b


def by_position(a: int, b: int = 2, /) -> int:
    return a + b


class Item(BaseModel):
    name: str
    count: int = 1


def lone(item: Item) -> str:
    return item.name


async def add_up(start: int, numbers: AsyncIterator[int]) -> int:
    return start


# Marks


def test_a_method_that_is_not_to_be_used_any_more_says_so() -> None:
    told = [described(add, deprecated=mark)["deprecated"] for mark in (False, True, "use sum")]
    assert told == [False, True, "use sum"]


def test_the_mark_of_pep_702_is_told_wherever_it_stands() -> None:
    @deprecated("use sum")
    async def below() -> int:
        return 1

    async def above() -> int:
        return 1

    methods = [Method(below, "method"), Method(above, "method")]
    deprecated("use sum")(above)  # behind the registration
    assert [method.describe()["deprecated"] for method in methods] == ["use sum"] * 2


async def test_the_warning_of_pep_702_is_not_for_peers() -> None:
    class Shop:
        @deprecated("use sum")
        async def add(self, a: int) -> int:
            return a

    @deprecated("use sum")
    async def add(a: int) -> int:
        return a

    for function in (add, Shop().add):
        method = Method(function, "method")
        assert await method.start({"a": 1}, None) == 1  # warnings are errors in these tests
        assert method.describe()["deprecated"] == "use sum"


def test_the_mark_of_an_interface_is_told() -> None:
    class Old(Protocol):
        @deprecated("use sum")
        async def add(self, a: int) -> int: ...

    class Implementation:
        async def add(self, a: int) -> int:
            return a

    (method,) = implemented(Old, Implementation())
    assert method.describe()["deprecated"] == "use sum"


# Examples


@pytest.mark.parametrize(
    ("function", "example"),
    [
        (add, {"a": 1, "b": 2}),
        (add, [1, 2]),
        (by_position, [1, 2]),
        (lone, {"name": "nail", "count": 2}),
        (lone, [{"name": "nail"}]),
        (add_up, {"start": 1, "numbers": [2, 3]}),
        (add_up, {"start": 1}),
    ],
)
def test_examples_are_told(function: Any, example: Any) -> None:
    assert described(function, examples=[example])["examples"] == [example]


def test_examples_are_told_as_they_would_be_sent() -> None:
    def book(day: datetime.date, items: list[Item]) -> None: ...

    example = {"day": datetime.date(2026, 1, 2), "items": [Item(name="nail")]}
    (told,) = described(book, examples=[example])["examples"]
    assert told == {"day": "2026-01-02", "items": [{"name": "nail", "count": 1}]}


@pytest.mark.parametrize(
    ("function", "example"),
    [
        (add, {"a": "x"}),
        (add, {}),
        (add, {"a": 1, "c": 1}),
        (add, {"a": object()}),
        (add, {1: 1}),
        (add, 5),
        (add, {"a": 2**64}),
        (lone, {"count": 1}),
        (add_up, {"start": 1, "numbers": ["x"]}),
        (add_up, {"start": 1, "numbers": 5}),
    ],
)
def test_an_example_that_does_not_fit_is_refused(function: Any, example: Any) -> None:
    fits = {"name": "nail"} if function is lone else {"start": 1} if function is add_up else [1]
    with pytest.raises(ValueError, match="example 2 of method 'method' does not fit: "):
        Method(function, "method", examples=[fits, example])


# Schemas


class Scale(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Magic(enum.Enum):
    PNG = b"\x89PNG"
    GIF = b"GIF8"


PAIR = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}


@pytest.mark.parametrize(
    ("hint", "value", "taken", "sent"),
    [
        (bytes, b"x", {"type": "string", "format": "binary"}, None),
        (
            datetime.datetime,
            datetime.datetime(2026, 1, 2),
            {"type": "string", "format": "date-time"},
            None,
        ),
        (datetime.date, datetime.date(2026, 1, 2), {"type": "string", "format": "date"}, None),
        (
            datetime.timedelta,
            datetime.timedelta(seconds=3),
            {"type": ["number", "string"], "format": "duration"},
            {"type": "string", "format": "duration"},
        ),
        (uuid.UUID, uuid.UUID(int=5), {"type": "string", "format": "uuid"}, None),
        (Scale, Scale.LARGE, {"type": "integer", "enum": [1, 2]}, None),
        (Right, Right.READ | Right.WRITE, {"type": "integer"}, None),
        (Magic, Magic.PNG, {"type": "string", "format": "binary"}, None),
        (Literal[b"a", b"b"], b"b", {"type": "string", "format": "binary"}, None),
        (Literal["a", "b"], "b", {"type": "string", "enum": ["a", "b"]}, None),
        (
            set[int],
            {1},
            {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            None,
        ),
        (tuple[int, str], (1, "a"), {**PAIR, "minItems": 2, "maxItems": 2}, None),
    ],
)
def test_types_are_described_as_they_travel(hint: Any, value: Any, taken: Any, sent: Any) -> None:
    method = Method(echo_of(hint), "echo", thread=False)
    description = method.describe()
    parameters = description["parameters"]
    found = parameters.get("$defs", {}).get(
        getattr(hint, "__name__", ""), parameters["properties"]["value"]
    )
    assert {key: one for key, one in found.items() if key != "title"} == taken
    returns = {key: one for key, one in description["returns"].items() if key != "title"}
    assert returns == (sent or taken)
    kinds: dict[str, Any] = {"string": (str, bytes), "number": float, "integer": int, "array": list}
    assert method.finish is not None
    travels = decode(Encoder().pack(method.finish(method.start({"value": value}, None))))
    assert isinstance(travels, kinds[returns["type"]])


class Anything(enum.Enum):
    ONE = object()
    TWO = 2


@pytest.mark.parametrize("hint", [Literal["a", b"b"], Literal[b"\xff", 1], Anything])
def test_values_that_json_cannot_name_are_left_open(hint: Any) -> None:
    told = described(echo_of(hint))
    assert set(told["returns"]) <= {"title"}
    assert set(told["parameters"]["properties"]["value"]) <= {"title", "$ref"}


def test_a_decimal_is_text_and_is_taken_as_a_number_too() -> None:
    description = described(echo_of(decimal.Decimal))
    assert description["returns"]["type"] == "string"
    assert description["returns"]["format"] == "decimal"
    value = description["parameters"]["properties"]["value"]
    assert {one["type"] for one in value["anyOf"]} == {"number", "string"}
    assert value["format"] == "decimal"


class Aliased(BaseModel):
    kind: str = Field(alias="class")


@pydantic.dataclasses.dataclass
class AliasedData:
    kind: str = Field(alias="class")


@pytest.mark.parametrize("model", [Aliased, AliasedData])
def test_names_are_those_that_travel(model: Any) -> None:
    method = Method(echo_of(list[model]), "echo", thread=False)
    description = method.describe()
    (name,) = next(iter(description["returns"]["$defs"].values()))["properties"]
    assert name == "class"
    (taken,) = next(iter(description["parameters"]["$defs"].values()))["properties"]
    assert taken == "class"
    assert method.finish is not None
    assert method.finish(method.start({"value": [{taken: "x"}]}, None)) == [{"class": "x"}]


class ForJson(BaseModel):
    """A model that wants its JSON to be something else than what is sent."""

    model_config = pydantic.ConfigDict(ser_json_bytes="base64", ser_json_temporal="seconds")
    data: bytes
    at: datetime.datetime
    on: datetime.date
    clock: datetime.time
    took: datetime.timedelta
    big: int
    always: int = 0

    @pydantic.field_serializer("big", when_used="json")
    def _big(self, value: int) -> str:
        return str(value)

    @pydantic.field_serializer("always")
    def _always(self, value: int) -> float:
        return float(value)


class TookSeconds(BaseModel):
    model_config = pydantic.ConfigDict(ser_json_timedelta="float")
    took: datetime.timedelta


def test_what_is_for_json_only_is_not_told() -> None:
    told = described(echo_of(ForJson))["returns"]["properties"]
    shown = {name: (one["type"], one.get("format")) for name, one in told.items()}
    assert shown == {
        "data": ("string", "binary"),
        "at": ("string", "date-time"),
        "on": ("string", "date"),
        "clock": ("string", "time"),
        "took": ("string", "duration"),
        "big": ("integer", None),
        "always": ("number", None),
    }
    now = datetime.datetime(2028, 2, 29, 12, 30)
    day = datetime.timedelta(days=1)
    value = ForJson(data=b"\xff", at=now, on=now.date(), clock=now.time(), took=day, big=5)
    finish = Method(echo_of(ForJson), "method").finish
    assert finish is not None
    sent = decode(Encoder().pack(finish(value)))
    kinds = {bytes: "string", str: "string", int: "integer", float: "number"}
    assert {name: kinds[type(one)] for name, one in sent.items()} == {
        name: kind for name, (kind, _) in shown.items()
    }
    told = described(echo_of(TookSeconds))["returns"]["properties"]["took"]
    assert (told["type"], told["format"]) == ("string", "duration")


def test_a_default_that_is_no_text_is_left_out() -> None:
    def method(data: bytes = b"\xff") -> None: ...

    assert "default" not in described(method)["parameters"]["properties"]["data"]


@dataclasses.dataclass
class Node:
    children: list[Node]


def test_every_reference_leads_somewhere() -> None:
    def method(a: Node, b: Item, c: Scale) -> dict[str, Node]:
        raise NotImplementedError

    description = described(method)
    assert set(description["parameters"]["$defs"]) == {"Node", "Item", "Scale"}
    assert set(description["returns"]["$defs"]) == {"Node"}
