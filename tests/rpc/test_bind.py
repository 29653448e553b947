"""Interfaces: how they are read, called and implemented, without a connection."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable
from typing import Any, Protocol, overload

import pytest
from pydantic import BaseModel, Field, ValidationError

from conduit import Connection, Response, Stream, StreamCall, options
from conduit.exceptions import ConnectionClosed, InvalidParams
from conduit.rpc.caller import Caller
from conduit.rpc.compatibility import differences
from conduit.rpc.implementation import implemented
from conduit.rpc.router import Router
from conduit.transport.requests import DEFAULT
from conduit.transport.stream_call import OpenCall


class Order(BaseModel):
    article: str
    pieces: int = 1


class Calculator(Protocol):
    async def add(self, a: int, b: int = 0) -> int:
        """Add two numbers."""
        ...

    async def round(self, number: float, *, digits: int = ...) -> float: ...

    async def order(self, order: Order) -> Order: ...

    async def cached(self) -> Response[int]: ...

    async def loose(self, anything): ...

    def count(self, to: int) -> AsyncIterator[int]: ...

    def train(self, rounds: int) -> StreamCall[Order, Order]: ...

    async def _private(self) -> None: ...


class Abstract(ABC):
    @abstractmethod
    async def add(self, a: int, b: int = 0) -> int: ...


class Plain:
    async def add(self, a: int, b: int = 0) -> int:
        return a + b

    async def numbers(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    async def anything(self):
        yield 1


class Peer:
    """Answers calls and remembers them."""

    def __init__(self, *body: Any) -> None:
        self.body = list(body)
        self.calls: list[tuple[Any, ...]] = []
        self.rpc = Caller(self._call, self._stream)

    async def _call(
        self, method: str, args: Any, timeout: Any, whole: bool, headers: Any, key: Any
    ) -> Any:
        assert whole
        self.calls.append((method, args, timeout))
        return self.body

    async def _stream(
        self, method: str, args: Any, timeout: Any, check: Any, headers: Any
    ) -> OpenCall:
        self.calls.append((method, args, timeout))
        self.check = check
        raise ConnectionClosed("this peer has no streams")


# How methods are called


async def test_arguments_go_by_name_and_defaults_stay_here() -> None:
    peer = Peer(5)
    calculator = peer.rpc.bind(Calculator)
    assert await calculator.add(1) == 5
    assert await calculator.add(1, 2) == 5
    assert await calculator.add(b=2, a=1) == 5
    assert await calculator.round(1.5, digits=1) == 5.0
    assert peer.calls == [
        ("add", {"a": 1}, DEFAULT),
        ("add", {"a": 1, "b": 2}, DEFAULT),
        ("add", {"b": 2, "a": 1}, DEFAULT),
        ("round", {"number": 1.5, "digits": 1}, DEFAULT),
    ]


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "Calculator.round: missing a required argument: 'number'"),
        ((1.5, 2), {}, "Calculator.round: too many positional arguments"),
        ((1.5,), {"number": 2}, "Calculator.round: multiple values for argument 'number'"),
        ((1.5,), {"timeout": 2}, "got an unexpected keyword argument 'timeout'"),
    ],
)
async def test_arguments_that_do_not_fit_are_not_sent(args: Any, kwargs: Any, text: str) -> None:
    peer = Peer(5)
    with pytest.raises(TypeError, match=text):
        await peer.rpc.bind(Calculator).round(*args, **kwargs)
    assert peer.calls == []


async def test_a_lone_model_is_the_whole_map() -> None:
    peer = Peer({"article": "nail", "pieces": "2"})
    order = await peer.rpc.bind(Calculator).order(Order(article="nut"))
    assert order == Order(article="nail", pieces=2)
    untyped: Any = {"article": "bolt"}
    await peer.rpc.bind(Calculator).order(untyped)
    assert [args for _, args, _ in peer.calls] == [
        {"article": "nut", "pieces": 1},
        {"article": "bolt"},
    ]


async def test_results_are_validated_by_the_annotation() -> None:
    assert await Peer("5").rpc.bind(Calculator).add(1) == 5
    assert await Peer("5").rpc.bind(Calculator).loose(1) == "5"
    with pytest.raises(ValidationError):
        await Peer("five").rpc.bind(Calculator).add(1)
    assert await Peer("5", {"a": 1}).rpc.bind(Calculator).cached() == Response(5, {"a": 1})
    assert await Peer(5).rpc.bind(Calculator).cached() == Response(5, {})


async def test_a_stream_is_a_stream_call() -> None:
    peer = Peer()
    calculator = peer.rpc.bind(Calculator)
    call = calculator.count(to=3)
    assert isinstance(call, StreamCall)
    assert peer.calls == []
    with pytest.raises(ConnectionClosed):
        await call.result()
    assert peer.check(["1", 2]) == [1, 2]
    with pytest.raises(ConnectionClosed):
        await calculator.train(2).result()
    assert peer.check([{"article": "nail"}]) == [Order(article="nail")]
    assert peer.calls == [("count", {"to": 3}, None), ("train", {"rounds": 2}, None)]


async def test_the_connection_may_change() -> None:
    old, new = Peer(1), Peer(2)
    calculator: Any = old.rpc.bind(Calculator)
    assert await calculator.add(1) == 1
    old.rpc.use(new._call, new._stream)
    assert await calculator.add(1) == 2
    with pytest.raises(ConnectionClosed):
        await calculator.count(1).result()
    assert new.calls == [("add", {"a": 1}, DEFAULT), ("count", {"to": 1}, None)]


async def test_options_are_for_a_copy() -> None:
    peer = Peer(5)
    calculator: Any = peer.rpc.bind(Calculator)
    quick = options(calculator, timeout=2)
    assert type(quick) is type(calculator) and quick is not calculator
    await quick.add(1)
    await options(quick, timeout=None).add(1)
    await calculator.add(1)
    with pytest.raises(ConnectionClosed):
        await quick.count(1).result()
    assert [timeout for *_, timeout in peer.calls] == [2, None, DEFAULT, 2]
    with pytest.raises(TypeError, match=r"options are for what rpc.bind\(...\) returns, not 5"):
        options(5, timeout=2)


def test_the_class_is_made_once_and_shows_the_interface() -> None:
    calculator = Peer().rpc.bind(Calculator)
    assert type(calculator) is type(Peer().rpc.bind(Calculator))
    assert repr(calculator) == "<Calculator of a peer>"
    assert calculator.add.__doc__ == "Add two numbers."
    assert str(inspect.signature(calculator.add)) == "(a: 'int', b: 'int' = 0) -> 'int'"
    assert inspect.iscoroutinefunction(calculator.add)
    assert not inspect.iscoroutinefunction(calculator.count)


def test_nothing_but_the_interface_is_there() -> None:
    calculator: Any = Peer().rpc.bind(Calculator)
    assert not hasattr(calculator, "_private")
    assert not hasattr(calculator, "subtract")
    with pytest.raises(AttributeError):
        calculator.cache = {}
    assert [name for name in dir(calculator) if not name.startswith("_")] == [
        "add",
        "cached",
        "count",
        "loose",
        "order",
        "round",
        "train",
    ]


class Scientific(Calculator, Protocol):
    async def sine(self, angle: float) -> float: ...


class Renamed(Protocol):
    async def method(this, self: int, name: str = "") -> int: ...


async def test_each_kind_of_class() -> None:
    for interface in (Abstract, Plain, Scientific):
        bound: Any = Peer("5").rpc.bind(interface)
        assert await bound.add(1) == 5
    assert await Peer(0).rpc.bind(Scientific).sine(1.0) == 0.0
    plain = Peer().rpc.bind(Plain)
    assert isinstance(plain.numbers(1), StreamCall)
    peer = Peer()
    with pytest.raises(ConnectionClosed):
        await peer.rpc.bind(Plain).anything().__anext__()
    assert peer.check is None
    peer = Peer(1)
    await peer.rpc.bind(Renamed).method(5, name="x")
    assert peer.calls == [("method", {"self": 5, "name": "x"}, DEFAULT)]


# What is refused when it is bound


class AsyncStream(Protocol):
    async def count(self, to: int) -> AsyncIterator[int]: ...


class AsyncStreamCall(Protocol):
    async def count(self, to: int) -> StreamCall[int, None]: ...


class PlainDef(Protocol):
    def add(self, a: int) -> int: ...


class OfAwaitable(Protocol):
    def add(self, a: int) -> Awaitable[int]: ...


class NoAnnotation(Protocol):
    def add(self, a: int): ...


class Unresolvable(Protocol):
    async def add(self, a: Nowhere) -> int: ...  # type: ignore[name-defined] # noqa: F821


class Overloaded(Protocol):
    @overload
    async def add(self, a: int) -> int: ...
    @overload
    async def add(self, a: str) -> str: ...


class Positional(Protocol):
    async def add(self, *numbers: int) -> int: ...


class Keywords(Protocol):
    async def add(self, **numbers: int) -> int: ...


class PositionalOnly(Protocol):
    async def add(self, a: int, /) -> int: ...


class Property(Protocol):
    @property
    def size(self) -> int: ...


class Attribute(Protocol):
    size: int


class Value:
    size = 5


class Static(Protocol):
    @staticmethod
    async def add(a: int) -> int: ...


class OfClass(Protocol):
    @classmethod
    async def add(cls, a: int) -> int: ...


class Nested(Protocol):
    class Inner: ...


class NoSelf(Protocol):
    async def add() -> int: ...  # type: ignore[misc]


class Generator(Protocol):
    def count(self) -> AsyncGenerator[int, None]: ...


class TwoInputs(Protocol):
    async def zip(self, a: AsyncIterator[int], b: AsyncIterable[int]) -> int: ...


class DefaultInput(Protocol):
    async def add(self, a: AsyncIterator[int] = ...) -> int: ...


class WithStream(Protocol):
    async def train(self, stream: Stream[int]) -> int: ...


class WithConnection(Protocol):
    async def who(self, connection: Connection) -> str: ...


class Opaque:
    """Pydantic knows nothing of it."""


class OpaqueResult(Protocol):
    async def make(self) -> Opaque: ...


class OpaqueItems(Protocol):
    def make(self) -> AsyncIterator[Opaque]: ...


class Empty(Protocol):
    async def _private(self) -> None: ...


@pytest.mark.parametrize(
    ("interface", "text"),
    [
        (AsyncStream, r"AsyncStream.count is declared `async def` and returns a stream, .*; "),
        (AsyncStream, r"declare it `def count\(...\) -> AsyncIterator\[...\]`"),
        (AsyncStreamCall, "declared `async def` and returns a stream"),
        (PlainDef, "PlainDef.add is a plain `def` that returns <class 'int'>; declare it `async"),
        (OfAwaitable, "is a plain `def` that returns .*Awaitable"),
        (NoAnnotation, "is a plain `def` that returns typing.Any"),
        (Unresolvable, "annotation of handler 'Unresolvable.add' cannot be resolved: .*Nowhere"),
        (Overloaded, r"Overloaded.add: \*args cannot be sent"),
        (Positional, r"Positional.add: \*numbers cannot be sent"),
        (Keywords, r"Keywords.add: \*numbers cannot be sent"),
        (PositionalOnly, "PositionalOnly.add: 'a' cannot be positional-only"),
        (Property, "Property.size is a property"),
        (Attribute, "Attribute.size is no method"),
        (Value, "Value.size is no method"),
        (Static, "Static.add is a static method"),
        (OfClass, "OfClass.add is a class method"),
        (Nested, "Nested.Inner is no method"),
        (NoSelf, r"NoSelf.add\(\).* has no `self`"),
        (Generator, r"Generator.count is to be annotated AsyncIterator\[...\]"),
        (TwoInputs, "TwoInputs.zip has two streams in one direction: a and b"),
        (DefaultInput, "the stream 'a' cannot have a default"),
        (WithStream, "WithStream.train: 'stream' is filled in where the method is served"),
        (WithConnection, "'WithConnection.who' .* cannot be validated"),
        (OpaqueResult, "'OpaqueResult.make' .* cannot be validated"),
        (OpaqueItems, "'OpaqueItems.make' .* cannot be validated"),
        (Empty, "Empty has no public methods"),
        (5, "an interface is a class, such as a typing.Protocol, not 5"),
        ([], "an interface is a class"),
        (Plain(), "an interface is a class"),
    ],
)
def test_an_interface_that_cannot_be_called_is_refused(interface: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Peer().rpc.bind(interface)


# How interfaces are implemented


class Small(Protocol):
    async def add(self, a: int, b: int = ..., *, negative: bool = False) -> int:
        """Add two numbers."""
        ...


class Out(Protocol):
    def count(self, to: int) -> AsyncIterator[int]: ...


class OutWithResult(Protocol):
    def train(self, rounds: int) -> StreamCall[int, str]: ...


class In(Protocol):
    async def total(self, numbers: AsyncIterator[int]) -> int: ...


def compiled(interface: Any, implementation: object) -> Any:
    """Return the only method of an implementation."""
    (method,) = implemented(interface, implementation)
    return method


class Loose:
    """Its annotations are its own affair."""

    async def add(self, a, b=40, *, negative=False, more=None):
        return (a, b, negative)


class WithCaller:
    async def add(self, connection: Connection, a: int, b: int = 40, negative: bool = False):
        return (a, b, negative, connection)


class InThread:
    def add(self, a, b=40, *, negative=True):
        """Add two numbers, slowly."""
        return a + b


async def test_the_interface_validates_and_the_implementation_has_the_defaults() -> None:
    method = compiled(Small, Loose())
    assert await method.start({"a": "1"}, None) == (1, 40, False)
    assert await method.start({"a": 1, "b": "2", "negative": "yes"}, None) == (1, 2, True)
    assert await method.start([1, 2], None) == (1, 2, False)
    for params in ({"a": "one"}, {}, {"a": 1, "more": 2}):
        with pytest.raises(InvalidParams):
            await method.start(params, None)
    assert method.finish("5") == 5
    with pytest.raises(ValidationError):
        method.finish((1, 2, False))
    assert method.signature == "add(a: int, b: int = 40, *, negative: bool = False) -> int"
    assert method.describe()["description"] == "Add two numbers."


class WithFields(Protocol):
    async def order(
        self,
        article: str = Field(min_length=2, description="what"),
        pieces: int = Field(default=3, ge=1),
        tags: list[str] = Field(default_factory=list, max_length=1),  # noqa: B008
    ) -> list[Any]: ...


class Orders:
    async def order(self, article, pieces=4, tags=()):
        return [article, pieces, len(tags)]


async def test_fields_of_the_interface_count_whatever_the_defaults_of_the_implementation() -> None:
    method = compiled(WithFields, Orders())
    assert await method.start({"article": "nut"}, None) == ["nut", 4, 0]
    assert await method.start(["nut", "5", ["a"]], None) == ["nut", 5, 1]
    for params, path in [
        ({}, "article"),
        ({"article": "n"}, "article"),
        ({"article": "nut", "pieces": 0}, "pieces"),
        ({"article": "nut", "tags": ["a", "b"]}, "tags"),
    ]:
        with pytest.raises(InvalidParams) as caught:
            await method.start(params, None)
        assert caught.value.errors[0]["path"] == path
    told = method.describe()
    assert told["parameters"]["properties"]["article"]["description"] == "what"
    assert differences(WithFields, [told]) == []
    with pytest.raises(TypeError, match="missing a required argument: 'article'"):
        await Peer().rpc.bind(WithFields).order()


def test_a_field_without_a_default_cannot_follow_one_that_has_one() -> None:
    class Wrong(Protocol):
        async def order(self, article: str = "nut", pieces: int = Field(ge=1)) -> int: ...

    with pytest.raises(TypeError, match=r"Wrong\.order.* has its parameters out of order"):
        Peer().rpc.bind(Wrong)


async def test_the_implementation_may_ask_who_calls() -> None:
    method = compiled(Small, WithCaller())
    assert await method.start({"a": "1", "negative": 1}, "peer") == (1, 40, True, "peer")
    assert method.signature == "add(a: int, b: int = 40, *, negative: bool = False) -> int"


def test_a_plain_def_runs_in_a_thread() -> None:
    method = compiled(Small, InThread())
    assert method.kind == "thread"
    assert method.start({"a": 1}, None)() == 41
    assert method.describe()["description"] == "Add two numbers, slowly."


class Counts:
    async def count(self, to):
        for number in range(to):
            yield number


class CountsPlainly:
    def __init__(self, items: Any) -> None:
        self.items = items

    def count(self, to):
        return self.items


class CountsBySending:
    async def count(self, to: int, stream: Stream[Any]) -> None: ...


class Trains:
    async def train(self, stream: Stream[Any], rounds: int, connection: Connection): ...


class Totals:
    async def total(self, numbers):
        return sum([number async for number in numbers])


def test_streams_are_validated_by_the_interface() -> None:
    for implementation in (Counts(), CountsBySending(), CountsPlainly(None)):
        method = compiled(Out, implementation)
        assert method.streaming.direction == "out"
        assert method.streaming.sent("1") == 1
        assert method.finish(None) is None
    method = compiled(OutWithResult, Trains())
    assert (method.streaming.direction, method.streaming.generator) == ("out", False)
    assert method.streaming.sent("1") == 1
    assert method.finish("the model") == "the model"
    with pytest.raises(ValidationError):
        method.finish(5)
    streaming = compiled(In, Totals()).streaming
    assert (streaming.direction, streaming.argument) == ("in", ("numbers", 0))
    assert streaming.taken(["1"]) == [1]


async def test_a_plain_def_that_returns_a_stream_is_one() -> None:
    closed = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    def served() -> Any:
        method = compiled(Out, CountsPlainly(numbers()))
        return method.streaming.start({"to": 3}, None, None, None)

    assert [number async for number in served()] == [1, 2]
    left = served()
    assert await anext(left) == 1
    await left.aclose()
    assert closed == [True, True]


def test_a_class_may_be_its_own_interface() -> None:
    names = [method.name for method in implemented(Plain, Plain())]
    assert names == ["add", "numbers", "anything"]


class Missing:
    minus = 1


class Inherits(Small):
    """Has nothing but the declaration."""


class NotCallable:
    add = 5


class OtherName:
    async def add(self, a, second=0, *, negative=False): ...


class OtherOrder:
    async def add(self, b=1, a=2, *, negative=False): ...


class NoDefault:
    async def add(self, a, b, *, negative=False): ...


class KeywordOnly:
    async def add(self, *, a, b=0, negative=False): ...


class OneMore:
    async def add(self, a, b=0, *, negative=False, more): ...


class ByPosition:
    async def add(self, connection: Connection, /, a, b=0, *, negative=False): ...


class Anything:
    async def add(self, *args, **kwargs): ...


class Unreadable:
    async def add(self, a: Nowhere, b=0, *, negative=False): ...  # type: ignore[name-defined] # noqa: F821


class Streams:
    async def add(self, a, b=0, *, negative=False):
        yield 1


class CountsAtOnce:
    async def count(self, to): ...


class CountsTwice:
    async def count(self, to, stream: Stream[int]):
        yield 1


class TrainsWithoutResult:
    async def train(self, rounds):
        yield 1


class TotalsInThread:
    def total(self, numbers): ...


@pytest.mark.parametrize(
    ("interface", "implementation", "text"),
    [
        (Small, Missing(), "Missing.add is missing, and Small.add declares it"),
        (Small, Inherits(), "Inherits.add is missing"),  # type: ignore[abstract]
        (Small, NotCallable(), "NotCallable.add is missing"),
        (Small, OtherName(), r"OtherName.add has no parameter 'b', as Small.add\(a"),
        (Small, OtherOrder(), r"OtherOrder.add\(b=1.* has its parameters in another order: Small"),
        (Small, NoDefault(), "NoDefault.add: 'b' needs a default, as in Small.add"),
        (Small, KeywordOnly(), r"KeywordOnly.add.* cannot be called as Small.add.*: too many"),
        (Small, OneMore(), "cannot be called as Small.add.*: missing a required .*'more'"),
        (Small, ByPosition(), "ByPosition.add.* cannot be called as Small.add"),
        (Small, Anything(), "Anything.add has no parameter 'a'"),
        (Small, Unreadable(), "annotation of handler 'Unreadable.add' cannot be resolved"),
        (Small, Streams(), "Streams.add sends a stream, and Small.add has one answer"),
        (Small, Loose, r"an object implements an interface: Loose\(...\)"),
        (Out, CountsAtOnce(), "CountsAtOnce.count must be a generator, .* Out.count is a stream"),
        (Out, CountsTwice(), "'count' is a generator and has a Stream as well"),
        (OutWithResult, TrainsWithoutResult(), r"must be `async def` with a parameter Stream\["),
        (In, TotalsInThread(), "'total' has a stream, so it must be `async def`"),
        (AsyncStream, Counts(), "declared `async def` and returns a stream"),
        (5, Counts(), "an interface is a class"),
    ],
)
def test_an_implementation_that_does_not_fit_is_refused(
    interface: Any, implementation: object, text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        implemented(interface, implementation)


def test_all_methods_are_registered_or_none() -> None:
    router = Router(with_connection=False)
    router.add_interface(Small, Loose())
    before = dict(router.methods)
    with pytest.raises(ValueError, match="'add' has a handler already"):
        router.add_interface(Plain, Plain())
    assert router.methods == before
