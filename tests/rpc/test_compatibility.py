"""What keeps an interface from what a peer offers; no sockets."""

# mypy: disable-error-code=empty-body

from __future__ import annotations

import copy
import datetime
import decimal
import enum
import inspect
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, computed_field, field_serializer, model_serializer
from typing_extensions import NotRequired, TypedDict

from conduit.rpc.compatibility import differences, misfits
from conduit.rpc.method import Method
from conduit.transport.answers import Response
from conduit.transport.stream_call import StreamCall
from conduit.transport.streaming import Stream


class Size(enum.Enum):
    SMALL = "s"
    LARGE = "l"


class Line(BaseModel):
    article: str
    pieces: int = 1


class Order(BaseModel):
    customer: str
    lines: list[Line]


@dataclass
class Point:
    x: float
    y: float = 0


class Options(TypedDict):
    depth: int
    verbose: NotRequired[bool]


class Tree(BaseModel):
    name: str
    left: Tree | None = None
    branches: list[Tree] = []


def interface(**functions: Any) -> Any:
    """Return an interface with these functions as its methods."""
    return type("Shop", (), functions)


def offered(*functions: Any, **named: Any) -> list[dict[str, Any]]:
    """Return what discovery tells of handlers."""
    methods = [Method(one, one.__name__) for one in functions]
    methods += [Method(one, name) for name, one in named.items()]
    return [method.describe() for method in methods]


def of(wanted: Any, handler: Any) -> list[str]:
    """Compare the only method of an interface with a handler."""
    return differences(interface(method=wanted), offered(method=handler))


# What fits, and what does not


class Shop(Protocol):
    async def price(self, article: str, pieces: int = ...) -> float: ...
    async def order(self, order: Order) -> Order: ...
    def count(self, to: int) -> AsyncIterator[int]: ...
    async def total(self, orders: AsyncIterator[Order], start: int = 0) -> int: ...
    def pack(self, order: Order) -> StreamCall[Line, str]: ...


async def price(article: str, pieces: int = 3) -> float:
    return 0.0


async def order(order: Order) -> Order:
    return order


async def count(to: int) -> AsyncIterator[int]:
    yield to


async def total(orders: AsyncIterator[Order], start: int = 0) -> int:
    return 0


async def pack(order: Order, stream: Stream[Line]) -> str:
    return ""


def test_what_was_written_for_each_other_fits() -> None:
    assert differences(Shop, offered(price, order, count, total, pack)) == []


def test_more_methods_are_no_difference() -> None:
    assert differences(interface(price=Shop.price), offered(count, price, total)) == []


def test_a_method_that_is_missing_is_named() -> None:
    found = differences(Shop, offered(price, order, count, total))
    assert found == ["Shop.pack: the peer has no method 'pack'"]
    assert len(differences(Shop, [])) == 5


async def asks(self: Any, a: int, b: int = 0) -> int:
    raise NotImplementedError


def test_parameters() -> None:
    async def same(a: int, b: int = 0) -> int: ...
    async def more(a: int, b: int = 0, c: int = 0) -> int: ...
    async def wider(a: float | str, b: int | None = 0) -> int: ...
    async def lazy(a, b=0): ...
    async def fewer(a: int) -> int: ...
    async def required(a: int, b: int, c: int) -> int: ...
    async def other(a: str, b: int = 0) -> int: ...
    async def positions(a: int, b: int = 0, /) -> int: ...
    async def items(a: AsyncIterator[int], b: int = 0) -> int: ...

    for handler in (same, more, wider, lazy):
        assert of(asks, handler) == []
    assert of(asks, fewer) == ["Shop.method: the peer knows no parameter 'b'"]
    assert of(asks, required) == [
        "Shop.method: the peer requires the parameter 'b', which may be left out",
        "Shop.method: the peer requires the parameter 'c', which is not sent",
    ]
    assert of(asks, other) == ["Shop.method: parameter 'a': int is sent, and str is taken"]
    assert of(asks, positions) == ["Shop.method: the peer takes its parameters by position only"]
    assert of(asks, items) == [
        "Shop.method: has one answer, and at the peer it takes a stream",
        "Shop.method: the parameter 'a' is a stream at the peer",
    ]
    ignoring = [Method(fewer, "method", extra="ignore").describe()]
    assert differences(interface(method=asks), ignoring) == []


def test_results() -> None:
    async def narrower() -> Literal[1, 2]: ...
    async def open_(): ...
    async def maybe() -> int | None: ...
    async def text() -> str: ...
    async def nothing() -> None: ...
    async def wrapped() -> Response[int]: ...

    async def wants(self: Any) -> int: ...
    async def wants_more(self: Any) -> Response[int]: ...
    async def wants_anything(self: Any): ...

    for handler in (narrower, open_, wrapped):
        assert of(wants, handler) == of(wants_more, handler) == []
    for handler in (narrower, open_, maybe, text, nothing):
        assert of(wants_anything, handler) == []
    assert of(wants, maybe) == ["Shop.method: result: None is sent, and int is taken"]
    assert of(wants, text) == of(wants_more, text)
    assert of(wants, text) == ["Shop.method: result: str is sent, and int is taken"]
    assert of(wants, nothing) == ["Shop.method: result: None is sent, and int is taken"]


def test_streams() -> None:
    def wants(self: Any, to: int) -> AsyncIterator[int]: ...
    def wants_result(self: Any, to: int) -> StreamCall[int, str]: ...
    async def gives(self: Any, numbers: AsyncIterator[int]) -> int: ...
    def both(self: Any, numbers: AsyncIterator[int]) -> AsyncIterator[int]: ...

    async def texts(to: int) -> AsyncIterator[str]:
        yield ""

    async def with_result(to: int, stream: Stream[int]) -> str: ...
    async def one(to: int) -> int: ...
    async def takes(numbers: AsyncIterator[int]) -> int: ...
    async def takes_texts(numbers: AsyncIterator[str]) -> int: ...
    async def takes_others(values: AsyncIterator[Any]) -> int: ...

    assert of(wants, count) == of(wants, with_result) == of(wants_result, with_result) == []
    assert of(gives, takes) == []
    assert of(wants, texts) == ["Shop.method: items: str is sent, and int is taken"]
    assert of(wants_result, count) == ["Shop.method: result: None is sent, and str is taken"]
    assert of(wants, one) == ["Shop.method: sends a stream, and at the peer it has one answer"]
    assert of(gives, takes_texts) == [
        "Shop.method: items of 'numbers': int is sent, and str is taken"
    ]
    assert of(gives, takes_others) == ["Shop.method: the stream 'numbers' is 'values' at the peer"]
    assert of(both, takes) == [
        "Shop.method: takes and sends a stream, and at the peer it takes a stream"
    ]


class NewLine(BaseModel):
    article: str
    pieces: int = 1
    price: float


class NewOrder(BaseModel):
    customer: str
    lines: list[NewLine]
    note: str | None = None


class ClosedLine(Line):
    model_config = ConfigDict(extra="forbid")


def test_models_are_compared_field_by_field() -> None:
    async def wants(self: Any, order: Order, express: bool = False) -> Order: ...
    async def newer(order: NewOrder, express: bool = False) -> NewOrder: ...
    async def wants_new(self: Any) -> NewOrder | None: ...
    async def older() -> Order: ...
    async def wants_closed(self: Any) -> ClosedLine: ...
    async def sends_more() -> NewLine: ...

    assert of(wants, newer) == [
        "Shop.method: parameter 'order'.lines[].price: it is required, and not sent"
    ]
    assert of(wants_new, older) == [
        "Shop.method: result.lines[].price: it is required, and not sent"
    ]
    assert of(wants_closed, sends_more) == ["Shop.method: result.price: it is sent, and not taken"]


def test_a_lone_model_is_its_fields() -> None:
    async def wants(self: Any, line: Line) -> None: ...
    async def fields(article: str, pieces: int) -> None: ...
    async def newer(line: NewLine) -> None: ...
    async def flat(self: Any, article: str, pieces: int = 1) -> None: ...
    async def closed(article: str) -> None: ...
    async def line(line: Line) -> None: ...

    assert of(wants, fields) == of(wants, line) == of(flat, line) == []
    assert of(wants, newer) == [
        "Shop.method: the peer requires the parameter 'price', which is not sent"
    ]
    assert of(wants, closed) == ["Shop.method: the peer knows no parameter 'pieces'"]


@pytest.mark.parametrize(
    ("sent", "taken", "fits"),
    [
        (int, float, True),
        (float, int, True),  # 3.0 is taken
        (bool, str, False),
        (Size, str, True),
        (str, Size, True),  # "s" is taken
        (int, Size, False),
        (Size, Literal["s", "l", "m"], True),
        (Literal["s", "m"], Size, False),
        (decimal.Decimal, float, True),
        (float, decimal.Decimal, True),
        (datetime.timedelta, float, False),  # it is text
        (float, datetime.timedelta, True),
        (float, datetime.datetime, True),  # seconds
        (int, datetime.date, True),
        (bool, datetime.datetime, False),
        (bool, int, True),
        (bool, float, True),
        (int, bool, False),
        (Literal["a", 1], int | str, True),
        (Literal["a", None], str | None, True),
        (Literal["a", 1, None], int | str, False),
        (Literal["s", 1], Size | int, True),
        (Literal["x", 1], Size | int, False),
        (Literal[True, "auto"], int | Literal["auto"], True),
        (datetime.datetime, str, True),
        (int | str, str, False),
        (int, int | str, True),
        (str | None, str, False),
        (list[int], set[int], True),
        (list[int], list[str], False),
        (tuple[int, str], tuple[int, str], True),
        (tuple[int, str], tuple[str, str], False),
        (tuple[int, str], tuple[int], False),
        (tuple[int], tuple[int, str], False),
        (tuple[int, int], list[int], True),
        (tuple[int, str], list[int], False),
        (list[int], tuple[int, str], False),
        (dict[str, int], dict[str, str], False),
        (dict[str, int], Line, True),
        (Line, dict[str, int], False),
        (Line, dict[str, int | str], True),
        (Point, Line, False),
        (Options, Options, True),
        (Tree, Tree, True),
        (Line, list[int], False),
        (Any, int, True),
        (int, Any, True),
        (Order | None, Order | None, True),
    ],
)
def test_types(sent: Any, taken: Any, fits: bool) -> None:
    async def handler(): ...
    async def wants(self): ...

    handler.__annotations__["return"] = sent
    wants.__annotations__["return"] = taken
    assert bool(of(wants, handler)) is not fits


class Account(BaseModel):
    """A model that writes other kinds than it reads, and takes both."""

    id: int
    since: datetime.datetime
    name: str = ""

    @field_serializer("id")
    def _id(self, value: int) -> str:
        return str(value)

    @field_serializer("since")
    def _since(self, value: datetime.datetime) -> float:
        return value.timestamp()


class OtherAccount(BaseModel):
    id: str
    since: float
    name: int


class Area(BaseModel, extra="forbid"):
    """A model that does not take what it writes."""

    width: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def area(self) -> int:
        return self.width**2


class Written(BaseModel):
    """A model of which only itself knows what it writes."""

    name: str

    @model_serializer
    def _written(self) -> dict[str, str]:
        return {"name": self.name}


class Extras(BaseModel, extra="allow"):
    name: str


def test_a_lone_model_that_may_send_anything_fits() -> None:
    async def written(written: Written) -> None: ...
    async def wants_written(self: Any, written: Written) -> None: ...
    async def wants_extras(self: Any, extras: Extras) -> None: ...
    async def more(name: str, pieces: int) -> None: ...

    assert of(wants_written, written) == of(wants_extras, more) == []


def test_a_model_that_writes_other_kinds_than_it_reads_fits_itself() -> None:
    async def handler(account: Account, more: list[Account]) -> list[Account]: ...
    async def wants(self: Any, account: Account, more: list[Account]) -> list[Account]: ...
    async def lone(account: Account) -> None: ...
    async def wants_lone(self: Any, account: Account) -> None: ...
    async def items(accounts: AsyncIterator[Account]) -> AsyncIterator[Account]:
        yield Account(id=1, since=datetime.datetime(2028, 2, 29))

    def wants_items(self: Any, accounts: AsyncIterator[Account]) -> AsyncIterator[Account]: ...
    async def other(account: OtherAccount) -> OtherAccount: ...
    async def wants_other(self: Any, account: Account) -> Account: ...
    async def area(area: Area) -> Area: ...
    async def wants_area(self: Any, area: Area) -> Area: ...

    assert of(wants, handler) == of(wants_lone, lone) == of(wants_items, items) == []
    assert of(wants_other, other) == [
        "Shop.method: parameter 'name': str is sent, and int is taken",
        "Shop.method: result.name: int is sent, and str is taken",
    ]
    assert of(wants_area, area) == [
        "Shop.method: the peer knows no parameter 'area'",
        "Shop.method: result.area: it is sent, and not taken",
    ]


# What a peer says of itself may be anything.


@pytest.mark.parametrize("told", [None, 5, [], [5, None], [{"name": "price"}], {}])
def test_discovery_that_says_nothing_is_no_difference(told: Any) -> None:
    found = differences(interface(price=Shop.price), told)
    missing = ["Shop.price: the peer has no method 'price'"]
    assert found == ([] if told == [{"name": "price"}] else missing)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "$ref $defs type anyOf oneOf allOf enum const properties required items "
                "prefixItems additionalProperties format minItems maxItems title a".split()
            )
            | st.text(max_size=3),
            inner
            | st.sampled_from(["#/$defs/a", "object", "array", "string", "decimal", ["string", 5]]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300)
@given(JSON, JSON)
def test_no_schema_of_a_peer_breaks_the_comparison(one: Any, other: Any) -> None:
    for found in misfits(one, other):
        assert "\n" not in found.path + found.problem
    told = {"name": "total", "parameters": one, "argument": other, "items": one, "returns": other}
    told["streaming"] = other
    for sentence in differences(interface(total=Shop.total), [told]):
        assert sentence.isprintable()


def test_schemas_that_multiply_end() -> None:
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for number in range(1, 60):
        below = {"$ref": f"#/$defs/d{number - 1}"}
        definitions[f"d{number}"] = {"anyOf": [below, dict(below)]}
    bomb = {"$defs": definitions, "$ref": "#/$defs/d59"}
    assert len(misfits(bomb, {"type": "integer"})) <= 20_000
    misfits({"type": "integer"}, bomb)
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert misfits(loop, loop) == []


def test_schemas_without_end_and_keys_of_bytes_are_no_error() -> None:
    async def tree(self: Any) -> Tree: ...

    chain = {
        f"n{number}": {"type": "object", "properties": {"left": {"$ref": f"#/$defs/n{number + 1}"}}}
        for number in range(900)
    }
    deep: Any = {"type": "integer"}
    for _ in range(900):
        deep = {"type": "array", "items": deep}
    wanted = interface(tree=tree)
    for returns in ({"$ref": "#/$defs/n0", "$defs": chain}, {"type": "object", b"type": 5}):
        assert all(
            map(str.isprintable, differences(wanted, [{"name": "tree", "returns": returns}]))
        )
    found = differences(wanted, [{"name": "tree", "returns": deep, "streaming": []}])
    assert "at the peer it differs" in found[0] and "list[list[" in found[1]


# Properties

SCALARS: list[Any] = [
    int, str, float, bool, bytes, None, decimal.Decimal, datetime.datetime, datetime.date,
    datetime.time, datetime.timedelta, uuid.UUID, Size, Literal["a", 5, None],
]  # fmt: skip
TYPES = st.recursive(
    st.sampled_from([*SCALARS, Line, Order, Point, Options, Tree, Any]),
    lambda inner: st.one_of(
        inner.map(lambda one: list[one]),  # type: ignore[valid-type]
        inner.map(lambda one: dict[str, one]),  # type: ignore[valid-type]
        st.tuples(inner, inner).map(lambda two: tuple[two]),  # type: ignore[valid-type]
        inner.map(lambda one: one if one is Any else one | None if one else None),
        st.sampled_from([frozenset[str], set[int]]),
    ),
    max_leaves=4,
)
NAMES = ["a", "b", "c"]
PARAMETERS = st.lists(st.tuples(TYPES, st.booleans()), max_size=3)


def function(types: list[tuple[Any, bool]], result: Any, *, method: bool) -> Any:
    """Return a function with parameters of these types, each with or without a default."""

    async def made(*args: Any, **kwargs: Any) -> Any: ...

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hint,
            default=None if default else inspect.Parameter.empty,
        )
        for name, (hint, default) in zip(NAMES, types, strict=False)
    ]
    itself = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)] if method else []
    signature = inspect.Signature([*itself, *parameters], return_annotation=result)
    made.__signature__ = signature  # type: ignore[attr-defined]
    made.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": result}
    return made


@settings(max_examples=150)
@given(PARAMETERS, TYPES)
def test_every_method_fits_itself(types: list[tuple[Any, bool]], result: Any) -> None:
    wanted = function(types, result, method=True)
    assert of(wanted, function(types, result, method=False)) == []


@settings(max_examples=100)
@given(PARAMETERS.filter(lambda types: len(types) < 3), TYPES, TYPES)
def test_an_optional_parameter_more_always_fits(
    types: list[tuple[Any, bool]], result: Any, added: Any
) -> None:
    # A model that is alone is spread over the parameters, so it must not come to be, nor cease.
    if len(types) < 2:
        types = [(int, False), (int, True)]
    wanted = function(types, result, method=True)
    assert of(wanted, function([*types, (added, True)], result, method=False)) == []


@settings(max_examples=100)
@given(TYPES)
def test_a_wider_parameter_and_a_narrower_result_fit(hint: Any) -> None:
    wider = Any if hint in (Any, None) else hint | Size
    wanted = function([(hint, False)], wider, method=True)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return  # alone it is spread over the parameters, and the union is not
    assert of(wanted, function([(wider, False)], hint, method=False)) == []


@settings(max_examples=100)
@given(TYPES)
def test_comparing_changes_nothing(hint: Any) -> None:
    told = offered(method=function([(hint, False)], hint, method=False))
    before = copy.deepcopy(told)
    differences(interface(method=function([(hint, True)], hint, method=True)), told)
    assert told == before
