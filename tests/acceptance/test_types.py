"""Types that survive: what Python values become on their way, with annotations and without."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import enum
import re
import sys
import types
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from fractions import Fraction
from types import GenericAlias
from typing import Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, SerializeAsAny

from conduit import (
    Client,
    InternalError,
    InvalidParams,
    Response,
    Server,
    Stream,
    blocking,
    data,
)
from tests.acceptance.raw import PASSWORD
from tests.acceptance.support import (
    FAST_LOGIN,
    ROOT,
    new_client,
    new_server,
    round_trips,
    within,
)
from tests.acceptance.typed_values import (
    CASES,
    DAY,
    Aliased,
    Colour,
    Dog,
    Leaf,
    Names,
    Open,
    Point,
    Puppy,
    Right,
    Sensor,
    name_of,
    same,
)


def annotated(function: Any, **annotations: Any) -> Any:
    """Give a function annotations that are only known when the test runs."""
    function.__annotations__ = annotations
    return function


def register(peer: Server | Client, annotation: Any, seen: list[Any]) -> None:
    """Give a peer handlers that take and return values of a type, and note what they took."""

    async def echo(value, more=None):  # a lone model would take the whole map
        seen.append(value)
        return value

    async def echo_all(values):
        async for value in values:
            seen.append(value)
            yield value

    async def greet(*arguments):
        seen.append(arguments[-1])
        return arguments[-1]

    async def on_server(connection, message):
        return await greet(connection, message)

    async def on_client(message):
        return await greet(message)

    peer.rpc(annotated(echo, value=annotation, **{"return": annotation}))
    items = AsyncIterator[annotation]
    peer.rpc(annotated(echo_all, values=items, **{"return": items}))
    on_message = on_server if isinstance(peer, Server) else on_client
    peer.on("echo")(annotated(on_message, message=annotation, **{"return": annotation}))


def interface_of(annotation: Any) -> type:
    """Return an interface with the methods that `register` has."""

    async def echo(self, value, more=None): ...

    def echo_all(self, values): ...

    items = AsyncIterator[annotation]
    annotated(echo, value=annotation, **{"return": annotation})
    annotated(echo_all, values=items, **{"return": items})
    return type("Echo", (), {"echo": echo, "echo_all": echo_all})


async def cross(peer: Any, annotation: Any, values: list[Any]) -> dict[str, list[Any]]:
    """Send values in every way there is, and return what came back by each."""
    rpc, came = peer.rpc, {}
    came["call"] = [await rpc.call("echo", data(value=one), returns=annotation) for one in values]
    came["request"] = [await peer.request("echo", one, returns=annotation) for one in values]
    items = {"values": iter(values)}
    async with rpc.stream("echo_all", items, items=annotation) as run:
        came["stream"] = [one async for one in run]
    bound = rpc.bind(interface_of(annotation))
    came["bound"] = [await bound.echo(one) for one in values]

    async def produced() -> AsyncIterator[Any]:
        for one in values:
            yield one

    came["bound stream"] = [one async for one in bound.echo_all(produced())]
    return came


def cross_blocking(server: Server, annotation: Any, values: list[Any]) -> dict[str, list[Any]]:
    """Do the same with the blocking client."""
    url = "tcp://{}:{}".format(*server.address)
    with blocking.Client(url, password=PASSWORD, limits=FAST_LOGIN) as client:
        rpc, came = client.rpc, {}
        came["blocking call"] = [
            rpc.call("echo", data(value=one), returns=annotation) for one in values
        ]
        came["blocking request"] = [
            client.request("echo", one, returns=annotation) for one in values
        ]
        with rpc.stream("echo_all", {"values": iter(values)}, items=annotation) as run:
            came["blocking stream"] = list(run)
        return came


def check(values: list[Any], came: dict[str, list[Any]], seen: list[Any]) -> None:
    """Fail unless all values came as they were, and were seen so by the handlers."""
    wrong = {
        way: [pair for pair in zip(values, got, strict=True) if not same(*pair)]
        for way, got in came.items()
    }
    assert {way: pairs for way, pairs in wrong.items() if pairs} == {}
    assert len(seen) == len(values) * len(came)
    for number, value in enumerate(seen):
        assert same(value, values[number % len(values)]), (value, values[number % len(values)])


@pytest.mark.parametrize(("annotation", "values"), CASES, ids=[name_of(one) for one, _ in CASES])
async def test_a_value_crosses_as_what_it_is(annotation: Any, values: list[Any]) -> None:
    at_server: list[Any] = []
    at_client: list[Any] = []
    async with new_server() as server, new_client(server) as client:
        register(server, annotation, at_server)
        register(client, annotation, at_client)
        connection = server.connections[client.connection.id]
        check(values, await within(cross(client, annotation, values)), at_server)
        check(values, await within(cross(connection, annotation, values)), at_client)
        at_server.clear()
        came = await asyncio.to_thread(cross_blocking, server, annotation, values)
        check(values, came, at_server)
        await round_trips(client, 2)


# What does not cross as what it is, as docs/reference.md says.

PAGE = (ROOT / "docs" / "reference.md").read_text("utf-8")
SECTION = PAGE.partition("\n## Types on the wire\n")[2].partition("\n## ")[0]
ROW = re.compile(r"^\| `(?P<sent>.+?)` \| `(?P<arrives>.+?)` \|", re.M)
ROWS = [(row["sent"].replace("\\|", "|"), row["arrives"]) for row in ROW.finditer(SECTION)]


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What the page defines for the rows of its table."""
    module = types.ModuleType("types_page")
    sys.modules["types_page"] = module  # where dataclasses and Pydantic look names up
    block = re.search(r"With these types\n\n```python\n(.*?)```", SECTION, re.S)
    assert block is not None
    exec("from decimal import Decimal\n" + block[1], module.__dict__)
    yield module.__dict__
    del sys.modules["types_page"]


def test_the_table_is_found() -> None:
    assert len(ROWS) == len(re.findall("^\\| `", SECTION, re.M)) > 15


@pytest.mark.parametrize(("sent", "arrives"), ROWS)
async def test_without_annotations_values_arrive_as_the_page_says(
    sent: str, arrives: str, names: dict[str, Any]
) -> None:
    value, expected = eval(sent, names), eval(arrives, names)
    seen: list[Any] = []

    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def take(value):
            seen.append(value)
            return eval(sent, names)

        @server.rpc
        async def stream(values: AsyncIterator[Any]):
            async for value in values:
                seen.append(value)
                yield eval(sent, names)

        @server.on("take")
        async def message(connection, message):
            seen.append(message)
            return eval(sent, names)

        async def use() -> list[Any]:
            came = [await client.rpc.take(value=value), await client.request("take", value)]
            async with client.rpc.stream("stream", {"values": iter([value])}) as run:
                return came + [item async for item in run]

        came = await within(use())
    for one in (*seen, *came):
        assert same(one, expected), (one, expected)
    assert len(seen) == len(came) == 3


async def test_unions_of_what_looks_alike_arrive_as_the_plain_one() -> None:
    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def kinds(date: dt.date | str, numbers: set[int] | list[int]) -> list[str]:
            return [type(date).__name__, type(numbers).__name__]

        assert await client.rpc.kinds(date=DAY, numbers={1}) == ["str", "list"]


async def test_a_result_has_the_fields_of_its_annotation() -> None:
    puppy = Puppy(born=DAY, toy="ball")
    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def dog() -> Dog:
            return puppy

        @server.rpc
        async def any_dog() -> SerializeAsAny[Dog]:
            return puppy

        @server.rpc
        async def plain():
            return puppy

        everything = {"kind": "dog", "born": "2028-02-29", "toy": "ball"}
        assert await client.rpc.dog() == {"kind": "dog", "born": "2028-02-29"}
        assert await client.rpc.any_dog() == everything
        assert await client.rpc.plain() == everything
        assert await client.rpc.call("plain", returns=Puppy) == puppy
        assert await client.rpc.call("plain", returns=Dog) == Dog(born=DAY)


async def test_lone_models_take_the_map_by_their_aliases() -> None:
    ada = Aliased(firstName="Ada", bornOn=DAY)

    class People(Protocol):
        async def person(self, person: Aliased) -> Aliased: ...

        async def names(self, names: Names) -> Names: ...

    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def person(person: Aliased) -> Aliased:
            return person

        @server.rpc
        async def names(names: Names) -> Names:
            return names

        people = client.rpc.bind(People)
        assert await client.rpc.call("person", ada, returns=Aliased) == ada
        assert await people.person(ada) == ada
        assert await client.rpc.person(firstName="Ada", bornOn=DAY) == {
            "firstName": "Ada",
            "bornOn": "2028-02-29",
        }
        assert await people.names(Names(["a"])) == Names(["a"])  # no fields: a value like others
        assert await client.rpc.names(names=["a", "b"]) == ["a", "b"]


class Started(enum.Enum):
    THEN = dt.date(2000, 1, 1)


@dataclasses.dataclass
class Hashed:
    name: str
    secret: dataclasses.InitVar[str]


async def test_what_has_no_way_back_is_refused_by_the_receiver() -> None:
    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def take(value: Started | Hashed) -> None: ...

        for value in (Started.THEN, Hashed("a", "b")):
            with pytest.raises(InvalidParams, match="value"):
                await client.rpc.take(value=value)
        await round_trips(client, 1)


async def test_nan_in_a_decimal_is_asked_for() -> None:
    async with new_server() as server, new_client(server) as client:
        register(server, Decimal, [])
        with pytest.raises(InvalidParams, match="finite"):
            await client.rpc.call("echo", [Decimal("NaN")])
        await round_trips(client, 1)


@pytest.mark.parametrize("key", [(1, 2), frozenset({1}), ()])
async def test_keys_that_no_map_has_are_refused_by_the_receiver(key: Any) -> None:
    async with new_server() as server, new_client(server) as client:
        register(server, Any, [])

        @server.rpc
        async def keyed():
            return {"a": [{key: 1}]}

        for asked in (
            client.rpc.call("echo", [[{key: 1}]]),
            client.rpc.call("keyed"),
            client.request("echo", {key: 1}),
        ):
            with pytest.raises(InvalidParams, match="keys of maps must be text or numbers"):
                await within(asked)
        run = client.rpc.stream("echo_all", {"values": iter([1, {key: 1}])})
        with pytest.raises(InvalidParams, match="keys of maps must be text or numbers"):
            await within(run.result())
        await round_trips(client, 2)


async def test_254_levels_cross() -> None:
    async with new_server() as server, new_client(server) as client:
        register(server, Any, [])
        value = nested(251)  # and the list around it, the parameters and the envelope
        assert await client.rpc.call("echo", [value]) == value
        assert await client.request("echo", value) == value


# What cannot be sent.


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def endless() -> Any:
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


class Secretive:
    def __repr__(self) -> str:
        return "hunter2"


def unsendable_values() -> list[Any]:
    surrogate = "text with a lone surrogate"
    return [
        pytest.param(Secretive(), TypeError, "type .*test_types.Secretive", id="object"),
        pytest.param(lambda: None, TypeError, "type builtins.function", id="function"),
        pytest.param(Sensor, TypeError, "type .*ModelMetaclass", id="class"),
        pytest.param(iter([1]), TypeError, "iterator can be an argument", id="iterator"),
        pytest.param(1 + 2j, TypeError, "type builtins.complex", id="complex"),
        pytest.param(Fraction(1, 3), TypeError, "type fractions.Fraction", id="Fraction"),
        pytest.param(SecretStr("hunter2"), TypeError, "type pydantic.types.SecretStr", id="secret"),
        pytest.param(asyncio, TypeError, "type builtins.module", id="module"),
        pytest.param(2**64, ValueError, "integer of 65 bits", id="2**64"),
        pytest.param(-(2**63) - 1, ValueError, "integer of 65 bits", id="-2**63-1"),
        pytest.param(10**100, ValueError, "integer of 333 bits", id="10**100"),
        pytest.param(10**5000, ValueError, "integer of 16610 bits", id="10**5000"),
        pytest.param("a\ud800", ValueError, surrogate + ", at position 1", id="surrogate"),
        pytest.param({"\udcff": 1}, ValueError, f"a key: cannot send {surrogate}", id="key"),
        pytest.param({2**64: 1}, ValueError, "a key: .* integer", id="large key"),
        pytest.param(nested(1100), ValueError, "more than 254 levels", id="levels"),
        pytest.param(endless(), ValueError, "contains itself", id="endless"),
        pytest.param(Leaf(1j), TypeError, r"1\.weight: .*complex", id="in a dataclass"),  # type: ignore[arg-type]
        pytest.param({"a": (0, {1j})}, TypeError, r"1\.a\.1\.0: .*complex", id="in a set"),
        pytest.param(Open(name="a", b=[1j]), TypeError, r"1\.b\.0: .*complex", id="in a model"),  # type: ignore[call-arg]
    ]


UNSENDABLE = pytest.mark.parametrize(("value", "error", "text"), unsendable_values())


@UNSENDABLE
async def test_what_cannot_be_sent_is_an_error_where_it_is_sent(
    value: Any, error: type[Exception], text: str
) -> None:
    class Echo(Protocol):
        async def echo(self, value: Any) -> Any: ...

    async with new_server() as server, new_client(server) as client:
        register(server, Any, [])
        release = asyncio.Event()

        @server.rpc
        async def wait():
            await release.wait()
            return "undisturbed"

        connection = server.connections[client.connection.id]
        waiting = asyncio.ensure_future(client.rpc.wait())
        bad = [0, value]
        sent: list[tuple[str, Any]] = [
            ("value", client.rpc.echo(value=bad)),
            ("value", client.rpc.call("echo", data(value=bad), returns=int)),
            ("value", client.rpc.bind(Echo).echo(bad)),
            ("0", client.rpc.call("echo", [bad])),
            ("values", client.rpc.stream("echo_all", {"values": bad}).result()),
            ("headers.h", client.rpc.call("echo", [1], headers={"h": bad})),
            ("", client.send("echo", bad)),
            ("", client.request("echo", bad)),
            ("", connection.send("echo", bad)),
            ("", server.broadcast("news", bad)),
            ("", client.rpc.stream("echo_all", {"values": iter([bad])}).result()),
        ]
        for place, asked in sent:
            with pytest.raises(error, match=text) as caught:
                await within(asked)
            where = f"{place}.1" if place else "1"
            assert str(caught.value).startswith(where), (where, str(caught.value))
            assert type(caught.value) is error
            assert "hunter2" not in str(caught.value)
        release.set()
        assert await within(waiting) == "undisturbed"
        await round_trips(client, 2)


@UNSENDABLE
async def test_a_result_that_cannot_be_sent_costs_its_caller_only(
    value: Any, error: type[Exception], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with new_server() as server, new_client(server) as client:

        @server.rpc
        async def result():
            return [0, value]

        @server.rpc
        async def later():
            await asyncio.sleep(0)
            return Response([0, value], {"a": 1})

        @server.rpc
        async def items() -> AsyncIterator[Any]:
            yield "good"
            yield [0, value]

        @server.rpc
        async def sends(stream: Stream[Any]) -> str:
            with pytest.raises(error, match=text):
                await stream.send([0, value])
            await stream.send("good")
            return "caught"

        @server.on("message")
        async def message(connection, message):
            return [0, value]

        async def collect(into: list[Any]) -> None:
            async for item in client.rpc.stream("items"):
                into.append(item)  # noqa: PERF401  # what came before the error counts

        came: list[Any] = []
        for asked in (
            client.rpc.result(),
            client.rpc.later(),
            client.request("message"),
            collect(came),
        ):
            caplog.clear()
            with pytest.raises(InternalError) as caught:
                await within(asked)
            assert "cannot send" not in str(caught.value)
            assert caught.value.error_id in caplog.text
            assert re.search(text, caplog.text)
        assert came == ["good"]
        async with client.rpc.stream("sends") as run:
            assert [item async for item in run] == ["good"]
            assert await run.result() == "caught"
        await round_trips(client, 2)


# Random ones.


Values = st.SearchStrategy[Any]


def moments() -> Values:
    """Return datetimes with and without an offset."""
    offsets = st.integers(-23 * 60, 23 * 60)
    zones = offsets.map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
    naive = st.datetimes(dt.datetime(2, 1, 1), dt.datetime(9998, 1, 1))
    return naive | st.builds(lambda moment, zone: moment.replace(tzinfo=zone), naive, zones)


SCALARS: dict[Any, Values] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=20),
    dt.datetime: moments(),
    dt.date: st.dates(),
    dt.time: st.times(),
    dt.timedelta: st.timedeltas(),
    uuid.UUID: st.uuids(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False),
    Colour: st.sampled_from(Colour),
    Right: st.sampled_from([Right.READ, Right.READ | Right.WRITE]),
    Leaf: st.builds(Leaf, st.decimals(-10, 10), st.none() | moments(), st.sets(st.text())),
    Point: st.builds(Point, st.integers(-5, 5), moments(), st.text()),
    Sensor: st.builds(Sensor, id=st.uuids(), last=moments(), raw=st.binary()),
}
MEMBERS = [bool, str, bytes, dt.datetime, dt.date, dt.time, dt.timedelta, uuid.UUID, Colour]
KEYS = [int, str, dt.date, dt.timedelta, uuid.UUID, Colour, bool, float]


def containers_of(typed: tuple[Any, Values], key: Any) -> Values:
    """Return annotations, each with its values, of containers of what has this one."""
    hint, values = typed
    keys = SCALARS[key].filter(lambda one: one == one)  # NaN is none, as it is not found again
    containers: list[tuple[Any, Values]] = [
        (GenericAlias(list, (hint,)), st.lists(values, max_size=3)),
        (GenericAlias(tuple, (hint, ...)), st.lists(values, max_size=3).map(tuple)),
        (GenericAlias(tuple, (int, hint)), st.tuples(st.integers(0, 9), values)),
        (hint | None, st.none() | values),
        (GenericAlias(dict, (key, hint)), st.dictionaries(keys, values, max_size=3)),
    ]
    return st.sampled_from(containers)


def typed_values() -> Values:
    """Return annotations, each with one value of it."""
    scalars = st.sampled_from([*SCALARS.items()])
    sets = st.sampled_from(MEMBERS).map(
        lambda hint: (GenericAlias(set, (hint,)), st.sets(SCALARS[hint], max_size=3))
    )
    nested = st.recursive(
        scalars | sets,
        lambda inner: st.builds(containers_of, inner, st.sampled_from(KEYS)).flatmap(lambda it: it),
        max_leaves=4,
    )
    return nested.flatmap(lambda typed: st.tuples(st.just(typed[0]), typed[1]))


@settings(max_examples=60)
@given(cases=st.lists(typed_values(), min_size=5, max_size=5))
async def test_random_values_cross_as_what_they_are(cases: list[tuple[Any, Any]]) -> None:
    async with new_server() as server, new_client(server) as client:
        for number, (annotation, value) in enumerate(cases):

            async def echo(value, more=None):
                return value

            async def produced(value, more=None):
                yield value

            annotated(echo, value=annotation, **{"return": annotation})
            items = AsyncIterator[annotation]  # type: ignore[valid-type]
            annotated(produced, value=annotation, **{"return": items})
            server.rpc(f"echo {number}")(echo)
            server.rpc(f"produced {number}")(produced)
            came = await within(client.rpc.call(f"echo {number}", [value], returns=annotation))
            assert same(came, value), (annotation, came, value)
            run = client.rpc.stream(f"produced {number}", [value], items=annotation)
            [came] = [item async for item in run]
            assert same(came, value), (annotation, came, value)
