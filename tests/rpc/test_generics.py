"""Interfaces and handlers of generic classes: what stands for their type variables."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import AsyncIterator
from typing import Annotated, Any, Generic, Protocol

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypeVar

from conduit import Connection, Stream
from conduit.exceptions import InvalidParams
from conduit.rpc.bind import bound_class
from conduit.rpc.compatibility import differences
from conduit.rpc.fingerprint import fingerprint
from conduit.rpc.implementation import implemented
from conduit.rpc.interface import Operation, operations
from conduit.rpc.router import Router
from conduit.transport.answers import Response
from conduit.transport.stream_call import StreamCall
from tests.rpc.test_bind import Peer

T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K", default=str)
NAMED = Field(title="a")


class Cat(BaseModel):
    lives: int


class Page(BaseModel, Generic[T]):
    items: list[T]


class Box(BaseModel, Generic[U]):
    content: U


class Crud(Protocol[T]):
    async def get(self, id: int) -> T: ...

    async def put(self, item: T, again: bool = False) -> None: ...

    async def some(self, ids: list[T] | None, more: T | int, two: tuple[T, T]) -> Page[T]: ...

    async def boxed(self, box: Box[T], named: Annotated[T, NAMED]) -> Response[T]: ...

    async def add_up(self, items: AsyncIterator[T]) -> dict[str, list[T]]: ...

    def all(self) -> AsyncIterator[T]: ...

    def train(self, bare: Box, page: Page[int]) -> StreamCall[list[T], T]: ...


class Cats(Crud[Cat], Protocol): ...


class WrittenOut(Protocol):
    async def get(self, id: int) -> Cat: ...

    async def put(self, item: Cat, again: bool = False) -> None: ...

    async def some(
        self, ids: list[Cat] | None, more: Cat | int, two: tuple[Cat, Cat]
    ) -> Page[Cat]: ...

    async def boxed(self, box: Box[Cat], named: Annotated[Cat, NAMED]) -> Response[Cat]: ...

    async def add_up(self, items: AsyncIterator[Cat]) -> dict[str, list[Cat]]: ...

    def all(self) -> AsyncIterator[Cat]: ...

    def train(self, bare: Box, page: Page[int]) -> StreamCall[list[Cat], Cat]: ...


class Crate(Crud[list[U]], Protocol[U]): ...


class Crates(Crate["Cat"], Protocol):
    """Over two classes, by a name that is defined later."""


class Silent(Crud, Protocol): ...


class Both(Silent, Crate[int], Protocol):
    """One whose first base says nothing."""


class Keyed(Protocol[K]):
    async def find(self, key: K) -> list[K]: ...


class ByText(Keyed, Protocol): ...


class ByNumber(Keyed[int], Protocol): ...


def one(interface: Any, name: str) -> Operation:
    return next(one for one in operations(interface) if one.name == name)


# What stands for a variable


@pytest.mark.parametrize("operation", operations(WrittenOut), ids=lambda one: str(one.name))
def test_a_class_of_a_generic_one_is_like_one_that_is_written_out(operation: Operation) -> None:
    found = one(Cats, operation.name)
    assert found.contract.hints == operation.contract.hints
    assert (found.result, found.items, found.lone) == (
        operation.result,
        operation.items,
        operation.lone,
    )


@pytest.mark.parametrize(
    ("interface", "method", "result"),
    [
        (Crates, "get", list[Cat]),
        (Crates, "some", Page[list[Cat]]),
        (Both, "get", list[int]),
        (Keyed, "find", list[str]),
        (ByText, "find", list[str]),
        (ByNumber, "find", list[int]),
    ],
)
def test_variables_are_followed_through_all_bases(interface: Any, method: str, result: Any) -> None:
    assert one(interface, method).result == result


async def test_results_and_items_are_what_checkers_take_them_for() -> None:
    cats = Peer({"lives": 7}).rpc.bind(Cats)
    assert await cats.get(3) == Cat(lives=7)
    assert (await cats.boxed(Box[Cat](content=Cat(lives=1)), Cat(lives=2))).value == Cat(lives=7)
    crates = Peer([{"lives": 7}]).rpc.bind(Crates)
    assert await crates.get(3) == [Cat(lives=7)]
    assert bound_class(Cats) is bound_class(Cats) is not bound_class(Crates)


class Shelf:
    """Implements `Cats`."""

    def __init__(self) -> None:
        self.cats: list[Cat] = []

    async def get(self, id: int) -> Cat:
        return self.cats[id]

    async def put(self, item: Cat, again: bool = False) -> None:
        self.cats.append(item)

    async def some(self, ids: Any, more: Any, two: Any) -> Page[Cat]:
        return Page(items=self.cats)

    async def boxed(self, box: Box[Cat], named: Cat) -> Response[Cat]:
        return Response(box.content)

    async def add_up(self, items: AsyncIterator[Cat]) -> dict[str, list[Cat]]:
        return {}

    async def all(self) -> AsyncIterator[Cat]:
        for cat in self.cats:
            yield cat

    async def train(self, bare: Any, page: Any, stream: Stream[list[Cat]]) -> Cat:
        return self.cats[0]


async def test_an_implementation_gets_and_returns_what_the_class_says() -> None:
    shelf = Shelf()
    methods = {one.name: one for one in implemented(Cats, shelf)}
    await methods["put"].start({"item": {"lives": "7"}}, None)
    assert shelf.cats == [Cat(lives=7)]
    with pytest.raises(InvalidParams):
        methods["put"].start({"item": {"lives": "x"}}, None)
    assert methods["get"].finish is not None
    assert methods["get"].finish(Cat(lives=7)) == {"lives": 7}
    plain = {one.name: one for one in implemented(WrittenOut, shelf)}
    told = [method.describe() for method in methods.values()]
    assert told == [method.describe() for method in plain.values()]
    assert fingerprint(told) == fingerprint(method.describe() for method in plain.values())
    assert differences(Cats, told) == [] == differences(WrittenOut, told)
    assert "Crates.get: " in "".join(differences(Crates, told))


class Store(Generic[T]):
    """One whose methods are registered by themselves."""

    async def put(self, item: T, connection: Connection[T]) -> list[T]:
        return [item]

    async def told(self, connection: Connection[T], message: T) -> None: ...

    async def __call__(self, item: T) -> None: ...


class CatStore(Store[Cat]): ...


@pytest.mark.parametrize("store", [CatStore(), Store[Cat]()])
async def test_methods_of_an_object_are_what_its_class_says(store: Store[Cat]) -> None:
    router = Router(with_connection=True)
    router.add_method(store.put, "put", timeout=None, extra="forbid", thread=None)
    router.add_method(store, "store", timeout=None, extra="forbid", thread=None)
    router.message_decorator("told", concurrent=False, thread=None)(store.told)
    for name in ("put", "store"):
        with pytest.raises(InvalidParams):
            router.methods[name].start({"lives": "x"}, None)
    assert await router.methods["put"].start({"lives": 7}, None) == [Cat(lives=7)]
    with pytest.raises(InvalidParams):
        router.messages["told"].start({"lives": "x"}, None)


# What may be anything


class OfMethods(Protocol):
    """One whose methods have variables of their own."""

    async def first(self, items: list[U]) -> U: ...

    def again(self, item: U) -> AsyncIterator[U]: ...


async def echo(item: T) -> T:
    return item


async def test_a_variable_of_a_function_is_anything() -> None:
    bound = Peer("5").rpc.bind(OfMethods)
    first: Any = await bound.first([1, 2])
    assert first == "5"
    assert [one(OfMethods, name).items for name in ("first", "again")] == [Any, Any]
    router = Router(with_connection=True)
    router.add_method(echo, "echo", timeout=None, extra="forbid", thread=None)
    assert await router.methods["echo"].start({"item": "5"}, None) == "5"


# What is refused


class OfSeveral(Protocol[T]):
    async def all(self, page: Page[T]) -> None: ...


class OfOthers(Generic[U]):
    async def boxed(self) -> Box[U]:
        raise NotImplementedError


class Nowhere(Crud["NotKnown"], Protocol): ...  # type: ignore[name-defined]


@pytest.mark.parametrize(
    ("interface", "text"),
    [
        (Crud, r"Crud.get: the result is annotated with the type variable ~T, and nothing says"),
        (Crud, r"derive a class from Crud\[...\] with a type in the brackets, or Any"),
        (Crate, r"Crate.get: the result is annotated with the type variable ~U"),
        (OfSeveral, r"OfSeveral.all: 'page' .* variable ~T"),
        (OfOthers, r"OfOthers.boxed: the result .* variable ~U"),
        (Nowhere, r"'Nowhere.get' cannot be resolved: .*'NotKnown'"),
        (Crud[Cat], r"not .*Crud\[.*Cat\]; class Mine\(Crud\[...\], Protocol\) makes one of it"),
    ],
)
def test_a_variable_that_nobody_has_bound_is_refused(interface: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Peer().rpc.bind(interface)
    with pytest.raises(TypeError, match=text):
        Router(with_connection=True).add_interface(interface, Shelf())


@pytest.mark.parametrize("function", [Store[Cat].put, Store().put])
def test_so_it_is_in_a_handler(function: Any) -> None:
    router = Router(with_connection=True)
    text = "takes `self`|handler 'echo': 'item' .* from Store"
    with pytest.raises(TypeError, match=text):
        router.add_method(function, "echo", timeout=None, extra="forbid", thread=None)


def test_so_it_is_in_a_handler_of_messages() -> None:
    router = Router(with_connection=True)
    with pytest.raises(TypeError, match="handler 'told': 'message' is annotated with .* ~T"):
        router.message_decorator("told", concurrent=False, thread=None)(Store().told)
    router.message_decorator("told", concurrent=False, thread=None)(Store[Any]().told)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the brackets are new in 3.12")
@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_the_brackets_of_a_class_are_known(future: str) -> None:
    module: dict[str, Any] = {"__name__": __name__}
    body = """
        from typing import Protocol
        class Bag[Item](Protocol):
            async def get(self, id: int) -> list[Item]: ...
        class Numbers(Bag[int], Protocol): ...
    """
    exec(compile(future + textwrap.dedent(body), "bag", "exec", dont_inherit=True), module)
    assert one(module["Numbers"], "get").result == list[int]
    with pytest.raises(TypeError, match="Bag.get: the result .* variable Item"):
        operations(module["Bag"])
