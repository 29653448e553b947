"""What `client.rpc` is, without anybody to call."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Annotated, Any, Generic, TypeVar

import pytest
from pydantic import BaseModel, Field, ValidationError

from conduit.exceptions import ConnectionClosed
from conduit.rpc.caller import Caller, convert, data
from conduit.transport.answers import Response
from conduit.transport.requests import DEFAULT
from conduit.transport.stream_call import OpenCall

T = TypeVar("T")


class Item(BaseModel):
    name: str
    count: int = 1


@dataclasses.dataclass
class Point:
    x: float


class Box(BaseModel, Generic[T]):
    content: T


class Peer:
    """Answers calls and remembers them."""

    def __init__(self, *body: Any) -> None:
        self.body = list(body)
        self.calls: list[tuple[Any, ...]] = []
        self.rpc = Caller(self._call, self._stream)

    async def _call(
        self, method: str, args: Any, timeout: Any, whole: bool, headers: Any, key: Any
    ) -> Any:
        self.calls.append((method, args, timeout, whole))
        return self.body if whole else self.body[0]

    async def _stream(
        self, method: str, args: Any, timeout: Any, check: Any, headers: Any
    ) -> OpenCall:
        self.calls.append((method, args, timeout, check))
        raise ConnectionClosed("this peer has no streams")


def test_data_is_a_dict_of_its_keywords() -> None:
    assert data(a=1, b=None) == {"a": 1, "b": None}
    assert data() == {}
    assert data(self=1, args=2) == {"self": 1, "args": 2}


async def test_call_hands_everything_on() -> None:
    peer = Peer(5)
    assert await peer.rpc.call("add") == 5
    assert await peer.rpc.call("add", {"a": 1}) == 5
    assert await peer.rpc.call("add", args=[1], timeout=3) == 5
    assert await peer.rpc.call("add", timeout=None) == 5
    assert peer.calls == [
        ("add", None, DEFAULT, False),
        ("add", {"a": 1}, DEFAULT, False),
        ("add", [1], 3, False),
        ("add", None, None, False),
    ]
    assert repr(DEFAULT) == "DEFAULT"


async def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        await Peer(5).rpc.call("add", [1], 3)  # type: ignore[call-overload]


async def test_attributes_are_methods_and_every_keyword_is_a_parameter() -> None:
    peer = Peer(5)
    assert await peer.rpc.add(a=1, timeout=2, returns=3, method=4, args=5, self=6) == 5
    assert await peer.rpc.nothing() == 5
    arguments = {"a": 1, "timeout": 2, "returns": 3, "method": 4, "args": 5, "self": 6}
    assert peer.calls == [("add", arguments, DEFAULT, False), ("nothing", {}, DEFAULT, False)]
    assert peer.rpc.add.__name__ == "add"
    with pytest.raises(TypeError):
        await peer.rpc.add(1)


@pytest.mark.parametrize("name", ["_private", "__len__", "__wrapped__", "_"])
def test_names_with_an_underscore_are_no_attributes(name: str) -> None:
    rpc = Peer(5).rpc
    with pytest.raises(AttributeError, match=rf"use call\('{name}'\)"):
        getattr(rpc, name)
    assert not hasattr(rpc, name)


async def test_methods_that_are_called_like_those_of_the_caller_are_reached_by_name() -> None:
    peer = Peer([])
    await peer.rpc.call("call")
    await peer.rpc.call("discover")
    await peer.rpc.call("_private")
    assert [name for name, *_ in peer.calls] == ["call", "discover", "_private"]


async def test_discover_asks_for_what_is_built_in() -> None:
    peer = Peer([{"name": "add"}])
    assert await peer.rpc.discover() == [{"name": "add"}]
    assert peer.calls == [("conduit.discover", None, DEFAULT, False)]


@pytest.mark.parametrize(
    "returns, value, expected",
    [
        (int, "5", 5),
        (list[int], ["1"], [1]),
        ("list[int]", ["1"], [1]),
        (Item, {"name": "x"}, Item(name="x")),
        (list[Item], [{"name": "x"}], [Item(name="x")]),
        (Point, {"x": 1}, Point(1.0)),
        (Box[int], {"content": "5"}, Box[int](content=5)),
        (Annotated[int, Field(gt=1)], "5", 5),
        (Annotated[Item, Field()], {"name": "x"}, Item(name="x")),
        (int | None, None, None),
        (Any, {"x": 1}, {"x": 1}),
    ],
    ids=str,
)
async def test_returns_is_what_the_result_becomes(returns: Any, value: Any, expected: Any) -> None:
    for _ in range(2):
        result = await Peer(value).rpc.call("get", returns=returns)
        assert result == expected and type(result) is type(expected)
    assert convert(value, returns) == expected


async def test_a_result_that_does_not_fit_is_an_error_of_the_caller() -> None:
    for returns in (int, Item, list[Item], Annotated[int, Field(gt=10)]):
        with pytest.raises(ValidationError):
            await Peer("five").rpc.call("get", returns=returns)


async def test_headers_are_there_for_who_asks() -> None:
    assert await Peer(5, {"a": 1}).rpc.call("get", returns=Response) == Response(5, {"a": 1})
    assert await Peer(5).rpc.call("get", returns=Response) == Response(5, {})
    assert await Peer("5", {"a": 1}).rpc.call("get", returns=int) == 5
    assert await Peer("5", {"a": 1}).rpc.call("get", returns=Response[int]) == Response(5, {"a": 1})
    assert await Peer([["5"]]).rpc.call("get", returns=Response[list[list[int]]]) == Response(
        [[5]], {}
    )
    with pytest.raises(ValidationError):
        await Peer("five").rpc.call("get", returns=Response[int])


async def test_types_that_cannot_be_hashed_are_converted_too() -> None:
    unhashable = Annotated[int, {"metadata": ["that", "is", "a", "list"]}]
    with pytest.raises(TypeError):
        hash(unhashable)
    assert convert("5", unhashable) == 5


def test_types_that_look_alike_are_not_mixed_up() -> None:
    from typing import Literal

    assert convert(1, Literal[1]) == 1 and convert(1, Literal[1]) is not True
    assert convert(True, Literal[True]) is True
    with pytest.raises(ValidationError):
        convert(2, Literal[True])


def test_unions_are_not_mixed_up_with_those_of_another_order() -> None:
    day = datetime.date(2028, 2, 29)
    midnight = datetime.datetime(2028, 2, 29)
    for _ in range(2):
        assert type(convert("2028-02-29", datetime.date | datetime.datetime)) is type(day)
        assert convert("2028-02-29", datetime.datetime | datetime.date) == midnight
        assert convert(["2028-02-29"], list[datetime.datetime | datetime.date]) == [midnight]
        assert convert(["2028-02-29"], list[datetime.date | datetime.datetime]) == [day]


async def test_an_error_of_the_call_is_raised_as_it_is() -> None:
    error = ConnectionClosed("gone")

    def broken() -> Callable[..., Any]:
        async def call(
            method: str, args: Any, timeout: Any, whole: bool, headers: Any, key: Any
        ) -> Any:
            raise error

        return call

    for returns in (None, int, Response):
        with pytest.raises(ConnectionClosed) as caught:
            await Caller(broken(), Peer()._stream).call("get", returns=returns)
        assert caught.value is error
