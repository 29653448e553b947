"""Handlers as they are compiled: the signatures that are served, validation, and results."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import (  # noqa: UP035  # the old names have to work as well
    Annotated,
    Any,
    Dict,
    Generic,
    List,
    Literal,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
    Union,
)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    OnErrorOmit,
    StrictInt,
    ValidationInfo,
    computed_field,
    field_validator,
)
from pydantic_core import PydanticOmit, SchemaError
from typing_extensions import TypedDict

from conduit.exceptions import InvalidParams
from conduit.rpc.method import MessageHandler, Method
from conduit.transport.answers import Response
from conduit.transport.connection import Connection

T = TypeVar("T")
THE_CONNECTION: Any = object()
"""Stands for the connection, which a handler is given as it is."""


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Item(BaseModel):
    name: str
    count: Annotated[int, Field(ge=1)] = 1


class Order(BaseModel):
    customer: str
    items: list[Item]


class Tree(BaseModel):
    name: str
    branches: list[Tree] = []


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Movie(TypedDict):
    title: str
    year: int


class Pair(NamedTuple):
    left: int
    right: str


def run(handler: Method | MessageHandler, data: Any) -> Any:
    """Call a handler as `Serving` does, without a loop; it must not suspend."""
    work = handler.start(data, THE_CONNECTION)
    if handler.kind == "thread":
        work = work()
    elif handler.kind == "coroutine":
        with pytest.raises(StopIteration) as stopped:
            work.send(None)
        work = stopped.value.value
    return work if handler.finish is None else handler.finish(work)


def call(function: Callable[..., Any], data: Any, **options: Any) -> Any:
    """Compile a method and call it once."""
    return run(Method(function, "method", **options), data)


def refused(function: Callable[..., Any], data: Any, **options: Any) -> InvalidParams:
    """Return the error of a call whose parameters do not fit."""
    with pytest.raises(InvalidParams) as caught:
        call(function, data, **options)
    return caught.value


def described(function: Callable[..., Any]) -> Any:
    return Method(function, "method").describe()


# What can be a handler


def plain(a: int, b: int = 2) -> int:
    return a * b


async def asynchronous(a: int, b: int = 2) -> int:
    return a * b


class Calculator:
    factor = 10

    def method(self, a: int, b: int = 2) -> int:
        return a * b

    async def asynchronous(self, a: int, b: int = 2) -> int:
        return a * b

    @classmethod
    def of_the_class(cls, a: int, b: int = 2) -> int:
        return a * b

    @staticmethod
    def static(a: int, b: int = 2) -> int:
        return a * b


class Callable_:
    def __call__(self, a: int, b: int = 2) -> int:
        return a * b


class AsyncCallable:
    async def __call__(self, a: int, b: int = 2) -> int:
        return a * b


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def logged_async(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def in_another_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a plain function async, without waiting for once."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def collected(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make one answer of an async generator."""

    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return [item async for item in function(*args, **kwargs)]

    wrapper.__annotations__ = {**function.__annotations__, "return": list[int]}
    return wrapper


FUNCTIONS = [
    pytest.param(plain, "thread", id="function"),
    pytest.param(asynchronous, "coroutine", id="async function"),
    pytest.param(Calculator().method, "thread", id="method"),
    pytest.param(Calculator().asynchronous, "coroutine", id="async method"),
    pytest.param(Calculator.of_the_class, "thread", id="class method"),
    pytest.param(Calculator.static, "thread", id="static method"),
    pytest.param(Callable_(), "thread", id="object"),
    pytest.param(AsyncCallable(), "coroutine", id="async object"),
    pytest.param(logged(plain), "thread", id="wrapped"),
    pytest.param(logged_async(asynchronous), "coroutine", id="wrapped async"),
    pytest.param(in_another_thread(plain), "coroutine", id="wrapped and made async"),
    pytest.param(logged(in_another_thread(plain)), "coroutine", id="made async, and wrapped"),
    pytest.param(functools.partial(plain), "thread", id="partial"),
    pytest.param(functools.partial(asynchronous), "coroutine", id="async partial"),
    pytest.param(functools.partial(Calculator().method), "thread", id="partial of a method"),
    pytest.param(functools.partial(AsyncCallable()), "coroutine", id="partial of an object"),
]


@pytest.mark.parametrize("function, kind", FUNCTIONS)
def test_everything_that_can_be_called_is_validated_and_run(
    function: Callable[..., Any], kind: str
) -> None:
    method = Method(function, "method")
    assert method.kind == kind
    assert run(method, {"a": "21"}) == 42
    assert run(method, {"a": 2, "b": "3"}) == 6
    assert run(method, [5, 4]) == 20
    assert method.signature == "method(a: int, b: int = 2) -> int"
    for wrong in ({"a": "x"}, {}, {"a": 1, "c": 1}, [1, 2, 3], ["x"]):
        assert refused(function, wrong).errors


def test_what_a_partial_has_bound_need_not_be_given() -> None:
    assert call(functools.partial(plain, b=5), {"a": "2"}) == 10
    assert call(functools.partial(plain, 5), {"b": "2"}) == 10
    assert call(functools.partial(plain, 5), ["2"]) == 10
    assert refused(functools.partial(plain, b=5), {"a": "x"}).errors[0]["path"] == "a"


def test_a_class_is_refused() -> None:
    for handler in (Item, Point, functools.partial(Point, y=1.0)):
        with pytest.raises(TypeError, match="handler 'method' is a class; write a function"):
            Method(handler, "method")
    with pytest.raises(TypeError, match="is a class"):
        MessageHandler(Item, "message", with_connection=False, concurrent=False)


def test_a_partial_may_have_the_name_of_its_function() -> None:
    named = functools.update_wrapper(functools.partial(plain, 5), plain)
    assert Method(named, "method").signature == "method(b: int = 2) -> int"
    assert call(named, {"b": "2"}) == call(named, {}) == 10
    assert refused(named, {"a": 1}).errors[0]["path"] == "a"


def test_a_decorator_may_make_one_answer_of_a_generator() -> None:
    async def numbers(to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    method = Method(collected(numbers), "method")
    assert (method.kind, method.streaming) == ("coroutine", None)
    assert run(method, {"to": "3"}) == [0, 1, 2]
    assert Method(logged(numbers), "method").streaming is not None


def test_a_plain_function_may_ask_for_the_loop_and_an_async_one_for_no_thread() -> None:
    assert Method(plain, "method", thread=False).kind == "inline"
    assert Method(plain, "method", thread=True).kind == "thread"
    assert call(plain, {"a": 1}, thread=False) == 2
    assert Method(asynchronous, "method", thread=False).kind == "coroutine"
    with pytest.raises(TypeError, match="'method' is async"):
        Method(asynchronous, "method", thread=True)


async def async_generator() -> AsyncIterator[int]:
    yield 1


def generator() -> Iterator[int]:
    yield 1


class Generators:
    def __call__(self) -> Iterator[int]:
        yield 1

    async def method(self) -> AsyncIterator[int]:
        yield 1


@pytest.mark.parametrize(
    "function", [generator, Generators(), functools.partial(generator)], ids=type
)
def test_plain_generators_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="'method' is a plain generator; write it as `async def`"):
        Method(function, "method")
    with pytest.raises(TypeError, match="'method' is a plain generator"):
        MessageHandler(function, "method", with_connection=False, concurrent=False)


@pytest.mark.parametrize(
    "function",
    [async_generator, Generators().method, functools.partial(async_generator)],
    ids=type,
)
def test_messages_have_no_streams(function: Any) -> None:
    assert Method(function, "method").streaming is not None
    with pytest.raises(TypeError, match="'method' is a generator; messages have no streams"):
        MessageHandler(function, "method", with_connection=False, concurrent=False)


@pytest.mark.parametrize("thing", [5, "text", None, [], {}], ids=repr)
def test_what_cannot_be_called_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=f"'method' must be a function, not {type(thing).__name__}"):
        Method(thing, "method")


def star_args(*values: int) -> None: ...


def star_kwargs(**values: int) -> None: ...


@pytest.mark.parametrize("function", [star_args, star_kwargs])
def test_parameters_without_names_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"'method': \*\w+ cannot be validated; name the param"):
        Method(function, "method")


def test_a_builtin_without_a_signature_is_refused() -> None:
    with pytest.raises(TypeError, match="method"):
        Method(int, "method")


# Annotations


def unresolvable(a: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def unresolvable_result(a: int) -> Nowhere: ...  # type: ignore[name-defined]  # noqa: F821


class Opaque:
    """A class that Pydantic knows nothing of."""


def opaque(a: Opaque) -> None: ...


def opaque_result() -> Opaque: ...  # type: ignore[empty-body]


class Unfinished(BaseModel):
    inner: Nowhere  # type: ignore[name-defined]  # noqa: F821


def unfinished(a: Unfinished) -> None: ...


def unfinished_among_others(a: Unfinished, b: int) -> None: ...


def unfinished_result() -> Unfinished: ...  # type: ignore[empty-body]


def optional_connection(a: int, connection: Connection | None) -> None: ...


@pytest.mark.parametrize(
    "function, reason",
    [
        (unresolvable, "Nowhere"),
        (unresolvable_result, "Nowhere"),
        (opaque, "Opaque"),
        (opaque_result, "Opaque"),
        (unfinished, "Unfinished|Nowhere"),
        (unfinished_among_others, "Unfinished|Nowhere"),
        (unfinished_result, "Unfinished|Nowhere"),
        (optional_connection, "Connection"),
    ],
)
def test_an_annotation_that_cannot_be_used_fails_at_once_and_says_why(
    function: Any, reason: str
) -> None:
    with pytest.raises(TypeError, match=f"'method'.*({reason})"):
        Method(function, "method")


def test_an_annotation_of_a_message_that_cannot_be_used_fails_at_once() -> None:
    for function in (unresolvable, opaque, opaque_result):
        with pytest.raises(TypeError, match="'news'"):
            MessageHandler(function, "news", with_connection=False, concurrent=False)


def test_annotations_may_be_objects_or_text() -> None:
    namespace: dict[str, Any] = {"Optional": Optional, "Item": Item}
    exec(  # this file has the future import, so its annotations are all text
        "def objects(a: int, b: int | None = None, *, item: Item) -> int: return a",
        namespace,
    )
    assert call(namespace["objects"], {"a": "1", "item": {"name": "x"}}) == 1
    assert refused(namespace["objects"], {"a": 1, "item": {"name": 5}}).errors[0]["path"] == (
        "item.name"
    )

    def text(a: int, b: int | None = None, *, item: Item) -> int:
        return a

    assert text.__annotations__["a"] == "int"
    assert call(text, {"a": "1", "item": {"name": "x"}}) == 1


def test_without_annotations_anything_goes() -> None:
    def show(a, b=5):
        return [a, b]

    assert call(show, {"a": {"x": [1]}}) == [{"x": [1]}, 5]
    assert call(show, {"a": 1, "b": None}) == [1, None]
    assert refused(show, {}).errors == [
        {"path": "a", "message": "Missing required argument", "type": "missing_argument"}
    ]


moment = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
number = uuid.UUID(int=5)


@pytest.mark.parametrize(
    "annotation, good, value, bad",
    [
        (Optional[int], None, None, "x"),  # noqa: UP045
        (int | None, 5, 5, []),
        ("int | None", None, None, "x"),
        (Union[int, str], "x", "x", []),  # noqa: UP007
        (Literal["a", "b"], "a", "a", "c"),
        (Annotated[int, Field(gt=5)], 6, 6, 5),
        (List[int], [1, "2"], [1, 2], ["x"]),  # noqa: UP006
        ("list[int]", [1, "2"], [1, 2], ["x"]),
        (Dict[str, int], {"a": "1"}, {"a": 1}, {"a": "x"}),  # noqa: UP006
        (Tuple[int, str], [1, "x"], (1, "x"), [1]),  # noqa: UP006
        ("set[int]", [1, 1], {1}, [[]]),
        (bytes, b"x", b"x", 5),
        (float, 1, 1.0, "x"),
        (Colour, "red", Colour.RED, "blue"),
        (datetime.datetime, moment.isoformat(), moment, "yesterday"),
        (datetime.timedelta, 1.5, datetime.timedelta(seconds=1.5), "x"),
        (decimal.Decimal, "1.10", decimal.Decimal("1.10"), "x"),
        (uuid.UUID, str(number), number, "x"),
        (Item, {"name": "x"}, Item(name="x"), {"name": 5}),
        (list[Item], [{"name": "x"}], [Item(name="x")], [{}]),
        (Item | None, None, None, {"count": 5}),
        (Tree, {"name": "a", "branches": [{"name": "b"}]}, None, {"branches": []}),
        (Point, {"x": 1}, Point(1.0), {"x": "x"}),
        (Movie, {"title": "x", "year": 1}, {"title": "x", "year": 1}, {"title": "x"}),
        (Pair, [1, "x"], Pair(1, "x"), [1]),
        (Any, {"x": 1}, {"x": 1}, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_each_kind_of_annotation(annotation: Any, good: Any, value: Any, bad: Any) -> None:
    seen: list[Any] = []

    def method(one: Any, before: int = 0) -> None:
        seen.append(one)

    method.__annotations__["one"] = annotation
    call(method, {"one": good})
    call(method, [good, 5])
    if annotation is Tree:
        assert seen[0].branches[0].name == "b"
    else:
        assert seen == [value] * 2 and type(seen[0]) is type(value)
    if bad is not None:
        errors = refused(method, {"one": bad}).errors
        assert errors and all(error["path"].split(".")[0] == "one" for error in errors)


def test_a_validator_of_the_user_counts() -> None:
    class Even(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def _even(cls, number: int) -> int:
            if number % 2:
                raise ValueError("must be even")
            return number

    def method(even: Even, other: int = 0) -> int:
        return even.number

    # Defined in this function, so it has to be handed over as an object.
    method.__annotations__["even"] = Even
    assert call(method, {"even": {"number": 2}}) == 2
    (error,) = refused(method, {"even": {"number": 3}}).errors
    assert error == {
        "path": "even.number",
        "message": "Value error, must be even",
        "type": "value_error",
    }


# Kinds of parameters


def every_kind(a: int, /, b: int, c: int = 3, *, d: int, e: int = 5) -> list[int]:
    return [a, b, c, d, e]


def keyword_only(*, a: int, b: int = 2) -> list[int]:
    return [a, b]


def positional_only(a: int, b: int = 2, /) -> list[int]:
    return [a, b]


def test_keyword_only_parameters_are_given_by_name() -> None:
    assert call(keyword_only, {"a": 1}) == [1, 2]
    assert call(keyword_only, {"a": 1, "b": 5}) == [1, 5]
    assert refused(keyword_only, [1]).errors


def test_positional_only_parameters_are_given_by_position() -> None:
    assert call(positional_only, [1]) == [1, 2]
    assert call(positional_only, [1, 5]) == [1, 5]
    assert refused(positional_only, {"a": 1}).errors
    assert refused(positional_only, []).errors


def test_a_default_is_what_the_function_says() -> None:
    def method(a: Any = THE_CONNECTION, b: int = "text") -> Any:  # type: ignore[assignment]
        return a, b

    assert call(method, {}) == (THE_CONNECTION, "text")
    assert call(method, []) == (THE_CONNECTION, "text")


def test_names_that_mean_something_elsewhere_are_ordinary_parameters() -> None:
    def method(self: int, args: int, kwargs: int, name: int, timeout: int, method: int) -> int:
        return self + args + kwargs + name + timeout + method

    names = ("self", "args", "kwargs", "name", "timeout", "method")
    assert call(method, dict.fromkeys(names, 1)) == 6


def test_unknown_parameters_are_an_error_unless_they_are_to_be_ignored() -> None:
    data = {"a": 1, "colour": "secret", "x": 1}
    errors = refused(plain, data).errors
    assert [error["path"] for error in errors] == ["colour", "x"]
    assert call(plain, data, extra="ignore") == 2
    assert call(plain, [4], extra="ignore") == 8
    assert refused(plain, {"b": 1, "x": 1}, extra="ignore").errors[0]["path"] == "a"


# A model alone


def lone(order: Order) -> str:
    return f"{order.customer}: {len(order.items)}"


async def lone_with_connection(connection: Connection, order: Order) -> str:
    assert connection is THE_CONNECTION
    return order.customer


def lone_by_name(*, order: Order) -> str:
    return order.customer


def lone_with_default(item: Item = Item(name="default")) -> str:  # noqa: B008
    return item.name


def test_a_model_alone_takes_all_parameters() -> None:
    order = {"customer": "Ann", "items": [{"name": "x"}, {"name": "y"}]}
    assert call(lone, order) == "Ann: 2"
    assert call(lone, [order]) == "Ann: 2"
    assert call(lone_with_connection, order) == "Ann"
    assert call(lone_by_name, order) == "Ann"


def test_the_errors_of_a_model_alone_name_its_fields() -> None:
    wrong = {"customer": 5, "items": [{"name": "x", "count": 0}]}
    for function in (lone, lone_with_connection, lone_by_name):
        paths = [error["path"] for error in refused(function, wrong).errors]
        assert paths == ["customer", "items.0.count"], function


def test_a_model_beside_others_is_one_of_them() -> None:
    def method(item: Item, times: int) -> int:
        return item.count * times

    assert call(method, {"item": {"name": "x", "count": 2}, "times": 3}) == 6
    assert refused(method, {"name": "x", "times": 1}).errors


def test_a_dataclass_alone_is_an_ordinary_parameter() -> None:
    def method(point: Point) -> float:
        return point.x

    assert call(method, {"point": {"x": 2}}) == 2.0


# The connection


def connection_first(connection: Connection, a: int, b: int) -> list[int]:
    assert connection is THE_CONNECTION
    return [a, b]


def connection_last(a: int, b: int, peer: Connection) -> list[int]:
    assert peer is THE_CONNECTION
    return [a, b]


def connection_in_between(a: int, whoever: Connection, b: int) -> list[int]:
    assert whoever is THE_CONNECTION
    return [a, b]


def connection_by_name(a: int, b: int, *, it: Connection) -> list[int]:
    assert it is THE_CONNECTION
    return [a, b]


def connection_positional_only(connection: Connection, /, a: int, b: int) -> list[int]:
    assert connection is THE_CONNECTION
    return [a, b]


def connection_twice(one: Connection, a: int, two: Connection, b: int) -> list[int]:
    assert one is THE_CONNECTION is two
    return [a, b]


WITH_CONNECTION = [
    connection_first,
    connection_last,
    connection_in_between,
    connection_by_name,
    connection_positional_only,
    connection_twice,
]


@pytest.mark.parametrize("function", WITH_CONNECTION)
@pytest.mark.parametrize("thread", [None, False])
def test_the_connection_is_given_wherever_it_is_asked_for(function: Any, thread: Any) -> None:
    assert call(function, {"a": 1, "b": 2}, thread=thread) == [1, 2]
    assert Method(function, "method").signature == "method(a: int, b: int) -> list[int]"
    assert "onnection" not in str(described(function)["parameters"])


@pytest.mark.parametrize("function", WITH_CONNECTION)
def test_the_others_may_be_given_by_position_all_the_same(function: Any) -> None:
    assert call(function, [1, 2]) == [1, 2]


@pytest.mark.parametrize("function", WITH_CONNECTION)
def test_the_connection_cannot_be_sent(function: Any) -> None:
    for name in inspect.signature(function).parameters:
        if name not in ("a", "b"):
            assert refused(function, {"a": 1, "b": 2, name: "me"}).errors[0]["path"] == name
    assert refused(function, [1, 2, "me"]).errors


def test_a_subclass_of_connection_is_a_connection() -> None:
    class Mine(Connection):
        pass

    def method(mine: Connection) -> bool:
        return mine is THE_CONNECTION

    method.__annotations__["mine"] = Mine
    assert call(method, {}) is True


# Errors


def test_an_error_tells_where_and_what_and_never_the_value() -> None:
    def method(order: Order, at: Point, colours: dict[str, Colour], n: int = 0) -> None: ...

    error = refused(
        method,
        {
            "order": {"customer": ["secret"], "items": [{"name": "x"}, {"name": "x", "count": -7}]},
            "at": {"x": "secret"},
            "colours": {"sky": "secret"},
            "n": "secret",
        },
    )
    assert [one["path"] for one in error.errors] == [
        "order.customer",
        "order.items.1.count",
        "at.x",
        "colours.sky",
        "n",
    ]
    assert all(set(one) == {"path", "message", "type"} for one in error.errors)
    assert error.errors[1]["type"] == "greater_than_equal"
    text = f"{error} {error!r} {error.details}"
    assert "secret" not in text and "-7" not in text
    assert str(error).startswith("'method': order.customer: Input should be a valid string; ")
    assert (error.code, error.details["errors"]) == ("invalid_params", error.errors)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[Cat | Dog, Field(discriminator="kind")],
        Cat | Dog,
        list[Annotated[Cat | Dog, Field(discriminator="kind")]],
    ],
    ids=["tagged", "untagged", "list of tagged"],
)
def test_not_even_the_tag_of_a_union_is_repeated(annotation: Any) -> None:
    def method(pet: Any, n: int = 0) -> None: ...

    method.__annotations__["pet"] = annotation
    pet: Any = {"kind": "secret"}
    error = refused(method, {"pet": [pet] if "list" in str(annotation) else pet})
    assert "secret" not in f"{error} {error.details}"
    assert error.errors[0]["path"].startswith("pet")


def test_at_most_ten_are_told_and_the_others_counted() -> None:
    def method(values: list[int]) -> None: ...

    error = refused(method, {"values": ["x"] * 25})
    assert [one["path"] for one in error.errors] == [f"values.{n}" for n in range(10)]
    assert str(error).endswith(" and 15 more")
    assert str(refused(method, {"values": ["x"] * 10})).endswith("as an integer")


def test_long_texts_are_cut() -> None:
    def method(values: dict[str, int]) -> None: ...

    def chatty(value: Any) -> Any:
        raise ValueError("long " * 1000)

    class Chatty(BaseModel):
        x: int
        _check = field_validator("x")(chatty)

    def other(chatty: Any, n: int = 0) -> None: ...

    other.__annotations__["chatty"] = Chatty
    error = refused(method, {"values": {"k" * 100_000: "x"}})
    assert len(error.errors[0]["path"]) == 200 and len(str(error)) <= 2000
    error = refused(other, {"chatty": {"x": 1}})
    assert len(error.errors[0]["message"]) == 200


# Results


def test_a_result_is_checked_and_made_plain() -> None:
    def item() -> Item:
        return Item(name="x", count=2)

    def items() -> list[Item]:
        return [Item(name="x")]

    def loose() -> Item:
        return {"name": "x"}  # type: ignore[return-value]  # as good as one

    def point() -> Point:
        return Point(1.0)

    def optional() -> Item | None:
        return None

    def pair() -> tuple[int, Point]:
        return 1, Point(2.0)

    def coerced() -> int:
        return "5"  # type: ignore[return-value]

    def nothing() -> None:
        return None

    def anything() -> Any:
        return THE_CONNECTION

    def typed_variable(a: Any) -> T:  # type: ignore[type-var]
        return a  # type: ignore[no-any-return]

    assert call(item, {}) == {"name": "x", "count": 2}
    assert call(items, {}) == [{"name": "x", "count": 1}]
    assert call(loose, {}) == {"name": "x", "count": 1}
    assert call(point, {}) == {"x": 1.0, "y": 0.0}
    assert call(optional, {}) is None
    assert call(pair, {}) == (1, {"x": 2.0, "y": 0.0})
    assert call(coerced, {}) == 5
    assert call(nothing, {}) is None
    assert call(anything, {}) is THE_CONNECTION
    assert call(typed_variable, {"a": 5}) == 5


@pytest.mark.parametrize("annotation", [int, int | None, "int | None", list[int], Item, None])
def test_a_result_that_does_not_fit_is_an_error_of_the_handler(annotation: Any) -> None:
    def method() -> Any:
        return "no"

    method.__annotations__["return"] = annotation
    with pytest.raises(ValueError) as caught:
        call(method, {})
    assert not isinstance(caught.value, InvalidParams)


def test_the_value_of_a_response_is_checked_and_made_plain() -> None:
    def typed() -> Response[Item]:
        return Response(Item(name="x"), {"n": 1})

    def untyped() -> Response:
        return Response(Item(name="x"), {"n": 1})

    def value_alone() -> Response[list[int]]:
        return ["1"]  # type: ignore[return-value]

    def wrong() -> Response[int]:
        return Response("no")  # type: ignore[arg-type]

    assert call(typed, {}) == Response({"name": "x", "count": 1}, {"n": 1})
    assert call(untyped, {}) == Response(Item(name="x"), {"n": 1})
    assert call(value_alone, {}) == [1]
    with pytest.raises(ValueError):
        call(wrong, {})


# Discovery


def test_a_method_describes_itself() -> None:
    def paint(colour: Colour, strength: Annotated[int, Field(le=100)] = 50, *, item: Item) -> Item:
        """Paint something.

        It takes a while.
        """
        return item

    description = described(paint)
    keys = {"name", "description", "parameters", "returns", "streaming", "idempotent", "requires"}
    assert set(description) == keys | {"deprecated", "examples"}
    assert (description["deprecated"], description["examples"]) == (False, [])
    assert description["streaming"] is None
    assert description["name"] == "method"
    assert description["description"] == "Paint something.\n\nIt takes a while."
    parameters = description["parameters"]
    assert parameters["type"] == "object" and parameters["additionalProperties"] is False
    assert set(parameters["properties"]) == {"colour", "strength", "item"}
    assert sorted(parameters["required"]) == ["colour", "item"]
    assert parameters["properties"]["strength"]["default"] == 50
    assert description["returns"]["properties"]["name"]["type"] == "string"
    assert description["requires"] is None


def test_a_method_that_says_nothing_describes_that() -> None:
    def silent():
        pass

    description = described(silent)
    assert (description["description"], description["returns"]) == ("", {})
    assert description["parameters"].get("properties", {}) == {}


def test_a_model_alone_describes_its_fields() -> None:
    parameters = described(lone)["parameters"]
    assert set(parameters["properties"]) == {"customer", "items"}
    assert described(lone_with_connection)["parameters"] == parameters


def test_who_ignores_what_is_unknown_says_so() -> None:
    parameters = Method(plain, "method", extra="ignore").describe()["parameters"]
    assert set(parameters["properties"]) == {"a", "b"}
    assert parameters.get("additionalProperties", True) is True


def test_a_recursive_model_describes_itself() -> None:
    def grow(tree: Tree, times: int = 1) -> Tree:
        return tree

    assert "Tree" in described(grow)["parameters"]["$defs"]
    assert call(grow, {"tree": {"name": "a", "branches": [{"name": "b"}]}})["branches"] == [
        {"name": "b", "branches": []}
    ]


class Rectangle(BaseModel):
    width: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> int:
        return self.width**2


def rectangle() -> Rectangle:
    return Rectangle(width=3)


def test_the_result_is_described_as_it_is_sent() -> None:
    assert call(rectangle, {}) == {"width": 3, "area": 9}
    assert set(described(rectangle)["returns"]["properties"]) == {"width", "area"}


def mixed_positional(a: int, /, *, b: int) -> None: ...


def takes_a_function(function: Callable[[int], int]) -> None: ...


def gives_a_function() -> Callable[[int], int]: ...  # type: ignore[empty-body]


def default_that_is_no_json(a: Any = THE_CONNECTION) -> None: ...


@pytest.mark.parametrize(
    "function",
    [
        positional_only,
        keyword_only,
        every_kind,
        mixed_positional,
        takes_a_function,
        gives_a_function,
        default_that_is_no_json,
    ],
)
def test_whatever_is_served_can_be_described(function: Any) -> None:
    """One method that cannot be described would take discovery away from all."""
    description = described(function)
    assert description["name"] == "method" and isinstance(description["parameters"], dict)


# Messages


def message(function: Callable[..., Any], data: Any, *, server: bool = True, **options: Any) -> Any:
    """Compile a message handler and call it once."""
    handler = MessageHandler(function, "news", with_connection=server, concurrent=False, **options)
    return run(handler, data)


def on_server(connection, message):
    return connection is THE_CONNECTION, message


def on_client(message):
    return message


def typed_on_server(client: Connection, message: Item) -> str:
    assert client is THE_CONNECTION
    return message.name


async def typed_on_client(item: Item) -> Item:
    return item


def injected_last(message: int, connection: Connection) -> int:
    assert connection is THE_CONNECTION
    return message


def injected_first(connection: Connection, message: int) -> int:
    assert connection is THE_CONNECTION
    return message


def injected_by_name(message: int, *, connection: Connection) -> int:
    assert connection is THE_CONNECTION
    return message


def injected_again(client, message: int, connection: Connection) -> int:
    assert connection is THE_CONNECTION is client
    return message


def positional_only_message(client, message, /):
    return message


def test_a_message_goes_to_its_handler() -> None:
    assert message(on_server, [1, {"a": 2}]) == (True, [1, {"a": 2}])
    assert message(on_client, [1], server=False) == [1]
    assert message(positional_only_message, 5) == 5


def test_an_annotated_message_is_validated_and_the_result_made_plain() -> None:
    assert message(typed_on_server, {"name": "x"}) == "x"
    assert message(typed_on_client, {"name": "x"}, server=False) == {"name": "x", "count": 1}
    with pytest.raises(InvalidParams) as caught:
        message(typed_on_server, {"name": "x", "count": "secret"})
    assert caught.value.errors[0]["path"] == "count"
    assert str(caught.value).startswith("'news': count: ") and "secret" not in str(caught.value)
    with pytest.raises(InvalidParams) as caught:
        message(typed_on_server, "secret")
    assert caught.value.errors[0]["path"] == "" and "secret" not in str(caught.value)


@pytest.mark.parametrize("function", [injected_last, injected_first, injected_by_name])
@pytest.mark.parametrize("thread", [None, False])
def test_a_client_may_ask_for_the_connection(function: Any, thread: Any) -> None:
    assert message(function, "5", server=False, thread=thread) == 5


def test_a_server_may_ask_for_the_connection_again() -> None:
    assert message(injected_again, "5") == 5


def nothing() -> None: ...


def only_connection(connection: Connection) -> None: ...


def three(connection, message, other): ...


def starred(connection, *message): ...


def double_starred(connection, **message): ...


def by_name_only(connection, *, message): ...


@pytest.mark.parametrize(
    "function, server",
    [
        (nothing, True),
        (nothing, False),
        (only_connection, True),
        (only_connection, False),
        (on_client, True),
        (on_server, False),
        (three, True),
        (double_starred, True),
    ],
)
def test_a_signature_that_no_message_fits_is_refused(function: Any, server: bool) -> None:
    wanted = r"\(connection, message\)" if server else r"\(message\)"
    with pytest.raises(TypeError, match=f"message 'news' must take {wanted}, not "):
        MessageHandler(function, "news", with_connection=server, concurrent=False)


@pytest.mark.parametrize("function", [starred, by_name_only])
def test_an_odd_signature_is_served_or_refused_but_never_fails_later(function: Any) -> None:
    try:
        handler = MessageHandler(function, "news", with_connection=True, concurrent=False)
    except TypeError:
        return
    run(handler, 5)


class Handlers:
    async def method(self, message: int) -> int:
        return 2 * message

    def __call__(self, message: int) -> int:
        return 2 * message


def doubled(message: int, factor: int) -> int:
    return factor * message


@pytest.mark.parametrize(
    "function, kind",
    [
        (Handlers().method, "coroutine"),
        (Handlers(), "thread"),
        (functools.partial(doubled, factor=2), "thread"),
        (functools.partial(Handlers().method), "coroutine"),
    ],
    ids=["method", "object", "partial", "async partial"],
)
def test_every_kind_of_function_may_handle_messages(function: Any, kind: str) -> None:
    handler = MessageHandler(function, "news", with_connection=False, concurrent=True)
    assert (handler.kind, handler.concurrent, handler.timeout) == (kind, True, None)
    assert run(handler, "4") == 8


class Box(BaseModel, Generic[T]):
    content: T


def test_a_generic_model_is_validated_by_its_parameter() -> None:
    def method(box: Box[int], n: int = 0) -> Box[int]:
        return box

    assert call(method, {"box": {"content": "5"}}) == {"content": 5}
    assert refused(method, {"box": {"content": "x"}}).errors[0]["path"] == "box.content"


# The short way of calls that name every parameter


def named(value: int, info: ValidationInfo) -> str:
    return f"{info.field_name}={value}"


def omitted(value: int) -> int:
    if value == 0:
        raise PydanticOmit
    return value


def odd(value: int) -> int:
    if value == 1:
        raise KeyError("another")
    if value % 2 == 0:
        raise ValueError("an odd number is wanted")
    return value


HINTS: list[Any] = [
    int, str, float, bool, bytes, Any, Colour, Item, Order, Tree, Point, Movie, Pair,
    int | None, str | int, Literal["a", 1], list[int], dict[str, Item], tuple[int, str],
    set[int], decimal.Decimal, datetime.datetime, uuid.UUID, Annotated[int, Field(ge=1)], StrictInt,
    Annotated[int, Field(alias="other")], Annotated[int, AfterValidator(named)],
    list[Annotated[int, AfterValidator(named)]], Annotated[int, AfterValidator(omitted)],
    Annotated[int, AfterValidator(odd)], T,
]  # fmt: skip
VALUES = st.sampled_from(
    [0, 1, 3, "1", "a", "red", 0.5, True, None, b"a", b"\xff", [], [1], [1, "a"], [0, "x"], {},
     {"name": "a"}, {"name": 1, "count": 0}, {"x": 1}, {"title": "a", "year": "1"},
     {"customer": "a", "items": [{"name": 1}]}, {"name": "a", "branches": [{"name": "b"}]},
     "2028-02-29", 2**63]
)  # fmt: skip
DEFAULTS: st.SearchStrategy[Any] = st.sampled_from([inspect.Parameter.empty, 1, None, "x", []])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(HINTS), DEFAULTS), min_size=2, max_size=3),
    st.lists(VALUES, min_size=3, max_size=3),
    st.sampled_from(["", "", "", "a", "c", "more", "other"]),
)
def test_calls_that_name_every_parameter_are_like_others(
    hints: list[tuple[Any, Any]], values: list[Any], changed: str
) -> None:
    taken = list[Any]()

    def handler(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(handler).bind(*args, **kwargs)
        bound.apply_defaults()
        taken.append(bound.arguments)

    optional = sorted(hints, key=lambda one: one[1] is not inspect.Parameter.empty)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint, default=d)
        for name, (hint, d) in zip("abc", optional, strict=False)
    ]
    handler.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    handler.__annotations__ = {one.name: one.annotation for one in parameters}
    method = Method(handler, "method", thread=False)
    data = {one.name: value for one, value in zip(parameters, values, strict=False)}
    if changed in data:
        del data[changed]
    elif changed:
        data[changed] = 1

    def outcome(start: Callable[[Any, Any], Any]) -> Any:
        taken.clear()
        try:
            start(copy.deepcopy(data), THE_CONNECTION)
        except InvalidParams as exc:
            return exc.message, exc.details
        except Exception as exc:  # noqa: BLE001  # whatever a validator raises
            return type(exc), str(exc)
        return repr(taken)

    assert outcome(method.start) == outcome(method._start)


def test_a_value_that_is_omitted_does_not_move_the_others() -> None:
    def handler(a: OnErrorOmit[int] = 0, b: int = 0, c: int = 0) -> list[int]:
        return [a, b, c]

    assert call(handler, {"a": 1, "b": 2, "c": 3}, thread=False) == [1, 2, 3]
    with pytest.raises(SchemaError, match="Uncaught Omit error"):
        call(handler, {"a": "x", "b": 2, "c": 3}, thread=False)


SEEN: list[int] = []


def note(value: int) -> int:
    SEEN.append(value)
    return odd(value)


def test_a_validator_runs_once_whatever_it_says() -> None:
    async def handler(a: Annotated[int, AfterValidator(note)], b: int) -> None: ...

    SEEN.clear()
    call(handler, {"a": 3, "b": 1})
    assert refused(handler, {"a": 2, "b": 1}).errors[0]["path"] == "a"
    assert SEEN == [3, 2]
