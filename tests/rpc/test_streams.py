"""What signatures say about streams: directions, types of items, and what is refused."""

from __future__ import annotations

import collections.abc
import functools
import typing
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from typing import Annotated, Any, TypeVar

import pytest
from pydantic import BaseModel, ValidationError

from conduit import Connection, Stream
from conduit.exceptions import InvalidParams
from conduit.rpc.method import Method
from conduit.signatures import signature

T = TypeVar("T")


class Point(BaseModel):
    x: int
    y: int = 0


class Tree(BaseModel):
    branches: list[Tree] = []


def declared(function: Any) -> Any:
    """Return what the transport is told of a handler's streams."""
    return Method(function, "method").streaming


async def out(a: int) -> AsyncIterator[int]:
    yield a


async def out_generator(a: int) -> AsyncGenerator[int, None]:
    yield a


async def out_iterable(a: int) -> typing.AsyncIterable[int]:
    yield a


async def out_of_anything(a: int):
    yield a


async def out_with_result(a: int, stream: Stream[int]) -> str:
    return "x"


async def in_(a: int, numbers: AsyncIterator[int]) -> int:
    return a


async def in_iterable(numbers: AsyncIterable[int], a: int, /) -> int:
    return a


async def in_annotated(numbers: Annotated[AsyncIterator[int], "some"]) -> int:
    return 1


async def in_bare(numbers: collections.abc.AsyncIterator) -> int:
    return 1


async def both(numbers: AsyncIterator[int]) -> AsyncIterator[int]:
    async for number in numbers:
        yield number


async def both_with_result(c: Connection, stream: Stream, numbers: AsyncIterator) -> int:
    return 1


async def neither(a: int) -> int:
    return a


class Methods:
    async def out(self, a: int) -> AsyncIterator[int]:
        yield a

    async def __call__(self, numbers: AsyncIterator[int]) -> int:
        return 1


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    ("function", "direction", "generator", "argument"),
    [
        (out, "out", True, None),
        (out_generator, "out", True, None),
        (out_iterable, "out", True, None),
        (out_of_anything, "out", True, None),
        (Methods().out, "out", True, None),
        (decorated(out), "out", True, None),
        (functools.partial(out, a=5), "out", True, None),
        (out_with_result, "out", False, None),
        (in_, "in", False, ("numbers", 1)),
        (in_iterable, "in", False, ("numbers", 0)),
        (in_annotated, "in", False, ("numbers", 0)),
        (in_bare, "in", False, ("numbers", 0)),
        (Methods(), "in", False, ("numbers", 0)),
        (both, "both", True, ("numbers", 0)),
        (decorated(both), "both", True, ("numbers", 0)),
        (both_with_result, "both", False, ("numbers", 0)),
    ],
)
def test_directions(function: Any, direction: str, generator: bool, argument: Any) -> None:
    streaming = declared(function)
    assert (streaming.direction, streaming.generator) == (direction, generator)
    assert streaming.argument == argument
    assert Method(function, "method").kind == "coroutine"


def test_a_handler_without_streams_says_nothing() -> None:
    assert declared(neither) is None


@pytest.mark.parametrize("function", [out, in_, out_with_result])
def test_a_method_with_streams_cannot_be_called_plainly(function: Any) -> None:
    with pytest.raises(InvalidParams, match=r"call it by rpc.stream\('method', ...\)") as caught:
        Method(function, "method").start({}, None)
    assert caught.value.details == {"executed": False}


# What is refused


async def two_outputs(a: Stream[int], b: Stream[int]) -> None: ...


async def two_inputs(a: AsyncIterator[int], b: AsyncIterable[int]) -> None: ...


async def generator_with_stream(a: Stream[int]) -> AsyncIterator[int]:
    yield 1


async def generator_of_the_wrong_kind() -> int:  # type: ignore[misc]
    yield 1


def plain_with_stream(a: Stream[int]) -> None: ...


def plain_with_iterator(a: AsyncIterator[int]) -> None: ...


async def many(*a: Stream[int]) -> None: ...


async def many_named(**a: AsyncIterator[int]) -> None: ...


async def default(a: Stream[int] = 5) -> None: ...  # type: ignore[assignment]


async def optional(a: AsyncIterator[int] | None) -> None: ...


async def nested(a: list[AsyncIterator[int]]) -> None: ...


class Opaque:
    """Pydantic knows nothing of it."""


async def opaque(a: Stream[Opaque]) -> None: ...


async def opaque_items() -> AsyncIterator[Opaque]:
    yield Opaque()


async def returns_an_iterator() -> AsyncIterator[int]:
    return out(1)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (two_outputs, "two streams in one direction: a and b"),
        (two_inputs, "two streams in one direction: a and b"),
        (generator_with_stream, "is a generator and has a Stream as well"),
        (generator_of_the_wrong_kind, r"annotated AsyncIterator\[...\], not <class 'int'>"),
        (plain_with_stream, "has a stream, so it must be `async def`"),
        (plain_with_iterator, "has a stream, so it must be `async def`"),
        (many, r"\*a cannot be a stream"),
        (many_named, r"\*a cannot be a stream"),
        (default, "the stream 'a' cannot have a default"),
        (optional, "cannot be validated"),
        (nested, "cannot be validated"),
        (opaque, "cannot be validated"),
        (opaque_items, "cannot be validated"),
        (returns_an_iterator, "and does not yield"),
    ],
)
def test_what_does_not_go_together_is_refused_at_registration(function: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text) as caught:
        Method(function, "method")
    assert "'method'" in str(caught.value)


# Items


async def points(given: AsyncIterator[Point]) -> AsyncIterator[Point]:
    async for point in given:
        yield point


async def loose(given: AsyncIterator[T]) -> AsyncIterator[Any]:
    async for point in given:
        yield point


def test_items_are_validated_and_made_plain() -> None:
    streaming = declared(points)
    assert streaming.taken([{"x": 1}, {"x": "2", "y": 3}]) == [Point(x=1), Point(x=2, y=3)]
    assert streaming.sent(Point(x=1)) == streaming.sent({"x": "1"}) == {"x": 1, "y": 0}
    streaming = declared(both)
    assert (streaming.sent(1), streaming.sent("2")) == (1, 2)
    with pytest.raises(ValidationError):
        streaming.sent("x")


@pytest.mark.parametrize("function", [loose, out_of_anything, both_with_result])
def test_items_of_any_kind_are_not_looked_at(function: Any) -> None:
    streaming = declared(function)
    assert streaming.sent is None
    assert streaming.taken is None


def test_an_item_that_does_not_fit_is_named_by_its_place() -> None:
    streaming = declared(points)
    with pytest.raises(ValidationError) as caught:
        streaming.taken([{"x": 1, "y": "?"}])
    error = streaming.explain(caught.value, 41)
    assert isinstance(error, InvalidParams)
    assert error.errors[0]["path"] == "given.41.y"
    other = ValueError("of a validator")
    assert streaming.explain(other, 41) is other


# Discovery


def test_streams_describe_themselves() -> None:
    described = Method(points, "points").describe()
    assert described["streaming"] == "both"
    assert described["items"]["properties"]["y"]["default"] == 0
    assert described["argument"]["name"] == "given"
    assert set(described["argument"]["items"]["properties"]) == {"x", "y"}
    assert described["parameters"]["properties"] == {}
    assert described["returns"] == {"type": "null"}
    described = Method(out_with_result, "method").describe()
    assert (described["streaming"], described["items"]) == ("out", {"type": "integer"})
    assert described["returns"] == {"type": "string"}
    assert "argument" not in described
    described = Method(in_bare, "method").describe()
    assert (described["streaming"], described["argument"]["items"]) == ("in", {})
    assert "items" not in described
    described = Method(neither, "method").describe()
    assert described["streaming"] is None
    assert not {"items", "argument"} & set(described)


async def trees() -> AsyncIterator[Tree]:
    yield Tree()


def test_types_that_refer_to_themselves_describe_themselves() -> None:
    described = Method(trees, "trees").describe()
    assert described["items"]["$ref"] == "#/$defs/Tree"
    assert "Tree" in described["items"]["$defs"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (out, "f(a: int) -> AsyncIterator[int]"),
        (in_, "f(a: int, numbers: AsyncIterator[int]) -> int"),
        (both, "f(numbers: AsyncIterator[int]) -> AsyncIterator[int]"),
        (out_with_result, "f(a: int, stream: Stream[int]) -> str"),
    ],
)
def test_the_command_shows_streams(function: Any, expected: str) -> None:
    assert signature(Method(function, "f").describe()) == expected


def test_the_signature_in_errors() -> None:
    assert Method(in_, "f").signature == "f(a: int, numbers: AsyncIterator[int]) -> int"
    assert Method(both_with_result, "f").signature == "f(numbers: AsyncIterator) -> int"
