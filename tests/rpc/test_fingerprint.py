"""What identifies the methods of a side: what can be called, and no words about it."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field
from pydantic_core import core_schema

from conduit.rpc.fingerprint import fingerprint
from conduit.rpc.method import Method
from conduit.rpc.router import Router


class Colour(enum.Enum):
    RED = "red"


class Item(BaseModel):
    title: str
    description: Annotated[str, Field(description="words")] = ""


def of(*functions: Callable[..., Any], **options: Any) -> bytes:
    return fingerprint(Method(one, one.__name__, **options).describe() for one in functions)


def named(function: Callable[..., Any]) -> bytes:
    return fingerprint([Method(function, "method").describe()])


def add(a: int, b: int = 0) -> int:
    return a + b


def buy(item: Item, colour: Colour) -> list[Item]:
    return [item]


def test_it_is_short_and_stable() -> None:
    assert of(add, buy) == of(buy, add)
    assert len(of(add)) == 8
    assert of(add, buy) != of(add)
    assert of() == b""


def test_it_does_not_depend_on_where_it_is_made() -> None:
    # Peers keep it; a change of this value costs each of them a question, and nothing else.
    assert fingerprint([{"name": "add", "parameters": {"type": "object"}}]).hex() == (
        "66c4ee32cff477b8"
    )


def test_words_do_not_change_it() -> None:
    def described(a: Annotated[int, Field(description="a number", title="A")], b: int = 0) -> int:
        """Add."""
        return a + b

    assert named(described) == named(add)
    assert of(add, deprecated="use sum", examples=[{"a": 1}]) == of(add)


@pytest.mark.parametrize(
    "other",
    [
        lambda a, b=0: None,
        buy,
    ],
)
def test_other_parameters_and_results_change_it(other: Any) -> None:
    assert named(other) != named(add)


def test_a_property_may_be_called_like_a_word() -> None:
    class Without(BaseModel):
        description: str = ""

    def one(item: Item) -> None: ...
    def other(item: Without) -> None: ...

    one.__annotations__["item"], other.__annotations__["item"] = Item, Without
    assert named(one) != named(other)


def test_streams_change_it() -> None:
    async def sends(a: int, b: int = 0) -> AsyncIterator[int]:
        yield a

    async def sends_text(a: int, b: int = 0) -> AsyncIterator[str]:
        yield ""

    async def answers(a: int, b: int = 0) -> None: ...

    assert len({named(sends), named(sends_text), named(answers)}) == 3


class Unspeakable:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        raise RuntimeError("no words")


def test_a_type_that_cannot_be_described_keeps_nobody_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def speak(value: Unspeakable) -> None: ...

    router = Router(with_connection=False)
    router.add_method(speak, None, timeout=None, extra="forbid", thread=None)
    assert router.fingerprint() == router.fingerprint() == b""
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_router_follows_its_methods() -> None:
    router = Router(with_connection=False)
    options: dict[str, Any] = {"timeout": None, "extra": "forbid", "thread": None}
    assert router.fingerprint() == b""
    router.add_method(add, None, **options)
    first = router.fingerprint()
    assert first == router.fingerprint() == of(add)

    class Shop:
        async def buy(self) -> None: ...

    router.add_interface(Shop, Shop())
    assert router.fingerprint() not in (b"", first)
