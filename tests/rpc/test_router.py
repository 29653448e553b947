"""Names to handlers: registration, names that are near, and discovery."""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace
from typing import Any

import pytest

from conduit.exceptions import MethodNotFound
from conduit.rpc.method import MessageHandler, Method
from conduit.rpc.router import SUGGESTING, Router


@pytest.fixture
def router() -> Router:
    return Router(with_connection=False)


def rpc(router: Router, name: Any = None, **options: Any) -> Any:
    known = {"timeout": None, "extra": "forbid", "thread": None}
    return router.method_decorator(name, **{**known, **options})


def on(router: Router, name: str, **options: Any) -> Any:
    return router.message_decorator(name, **{"concurrent": False, "thread": None, **options})


def discover(router: Router) -> Any:
    return router.methods["conduit.discover"].start({}, SimpleNamespace(roles=frozenset()))


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


async def news(message: Any) -> None: ...


def test_the_decorator_works_with_and_without_brackets(router: Router) -> None:
    assert rpc(router, add) is add
    assert rpc(router, "sum")(add) is add
    assert {"add", "sum"} <= set(router.methods)


def test_options_reach_the_method(router: Router) -> None:
    rpc(router, "slow", timeout=5.0, extra="ignore", thread=False)(add)
    method = router.methods["slow"]
    assert (method.name, method.timeout, method.kind) == ("slow", 5.0, "inline")
    assert method.start({"a": 1, "unknown": 1}, None) == 3
    on(router, "news", concurrent=True)(news)
    assert router.messages["news"].concurrent


def test_a_method_without_brackets_has_the_name_of_its_function(router: Router) -> None:
    rpc(router)(add)
    assert isinstance(router.methods["add"], Method)
    with pytest.raises(ValueError, match="needs a printable name"):
        rpc(router)(functools.partial(add))
    rpc(router, "partial")(functools.partial(add))


@pytest.mark.parametrize(
    "name", ["", "x" * 257, "ä" * 129, "new\nline", "zero\x00", "\u200b", 5, b"bytes", "\ud800"]
)
def test_a_name_that_nobody_could_call_is_refused(router: Router, name: Any) -> None:
    with pytest.raises(ValueError):
        rpc(router, name)(add)
    with pytest.raises(ValueError):
        on(router, name)(news)
    assert set(router.methods) == {"conduit.discover"} and not router.messages


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 128, "with space", "a.b/c", "größe", "_private"])
def test_any_other_name_is_accepted(router: Router, name: str) -> None:
    rpc(router, name)(add)
    on(router, name)(news)
    assert name in router.methods and name in router.messages


def test_a_name_is_given_once(router: Router) -> None:
    rpc(router, add)
    with pytest.raises(ValueError, match="'add' has a handler already"):
        rpc(router, "add")(lambda: None)
    assert router.methods["add"].start({"a": 1}, None)() == 3
    on(router, "news")(news)
    with pytest.raises(ValueError, match="'news' has a handler already"):
        on(router, "news")(news)
    on(router, "add")(news)  # messages and methods do not get in each other's way


def test_names_of_the_library_are_not_given(router: Router) -> None:
    for name in ("conduit.discover", "conduit.mine"):
        with pytest.raises(ValueError, match="built in|already"):
            rpc(router, name)(add)
    rpc(router, "conduits")(add)
    on(router, "conduit.news")(news)


def test_what_cannot_be_served_is_not_registered(router: Router) -> None:
    with pytest.raises(TypeError):
        rpc(router, "bad")(lambda *values: None)
    with pytest.raises(TypeError):
        on(router, "bad")(lambda: None)
    assert "bad" not in router.methods and "bad" not in router.messages
    rpc(router, "bad")(add)


def test_the_side_decides_what_a_message_handler_takes() -> None:
    def handler(first, second): ...

    on(Router(with_connection=True), "news")(handler)
    with pytest.raises(TypeError):
        on(Router(with_connection=False), "news")(handler)
    router = Router(with_connection=False)
    on(router, "news")(news)
    assert isinstance(router.messages["news"], MessageHandler)


# Names that are not there


def test_a_near_name_is_suggested_with_its_signature(router: Router) -> None:
    rpc(router, add)
    rpc(router, "multiply")(add)
    error = router.unknown_method("ad")
    assert type(error) is MethodNotFound
    assert str(error) == "no method 'ad'; did you mean add(a: int, b: int = 2) -> int?"
    assert error.details == {"executed": False}
    on(router, "greeting")(news)
    assert str(router.unknown_message("greting")) == (
        "no handler for message 'greting'; did you mean 'greeting'?"
    )


def test_a_name_like_no_other_is_only_named(router: Router) -> None:
    rpc(router, add)
    assert str(router.unknown_method("zzz")) == "no method 'zzz'"
    assert str(router.unknown_message("zzz")) == "no handler for message 'zzz'"
    assert router.unknown_message("zzz").details == {"executed": False}


def test_what_is_built_in_is_not_suggested(router: Router) -> None:
    assert "did you mean" not in str(router.unknown_method("conduit.discovery"))


def test_a_long_name_is_cut_and_costs_nothing(router: Router) -> None:
    for number in range(2000):
        rpc(router, f"method number {number}")(add)
    started = time.perf_counter()
    error = router.unknown_method("method number " * 10_000)
    assert len(str(error)) < 100 and "did you mean" not in str(error)
    router.unknown_method("method numbr 17")
    assert time.perf_counter() - started < 0.5


# Discovery


def test_names_are_suggested_for_as_long_as_that_takes_little_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router = Router(with_connection=False)
    for number in range(100):

        @rpc(router, f"a_method_of_the_server_{number}")
        async def method() -> None: ...

    now = 1000.0
    monkeypatch.setattr("conduit.rpc.router.time.monotonic", lambda: now)

    def suggests() -> bool:
        return "did you mean" in str(router.unknown_method("a_method_of_the_server"))

    assert all(suggests() for _ in range(3)), "they took no time"
    router._suggesting = SUGGESTING
    assert not suggests()
    assert "did you mean" not in str(router.unknown_message("a_method"))
    now += 1
    assert suggests()
    monkeypatch.undo()
    began = time.process_time()
    for number in range(2000):
        router.unknown_method(f"a_method_of_the_serv_{number}")
    assert time.process_time() - began < 1, "a millisecond and more for each"


def test_discovery_lists_what_the_application_registered_in_order(router: Router) -> None:
    assert discover(router) == []
    for name in ("zeta", "alpha", "mid"):
        rpc(router, name)(add)
    on(router, "news")(news)
    methods = discover(router)
    assert [method["name"] for method in methods] == ["zeta", "alpha", "mid"]
    assert all(method["description"] == "Add two numbers." for method in methods)
    assert methods[0]["parameters"]["properties"]["b"] == {
        "default": 2,
        "title": "B",
        "type": "integer",
    }


def test_discovery_takes_no_parameters_and_runs_on_the_loop(router: Router) -> None:
    method = router.methods["conduit.discover"]
    assert method.kind == "inline" and method.timeout is None and method.concurrent
    assert method.finish is None
    nothing: list[Any] = [{}, []]
    for data in nothing:
        assert method.start(data, SimpleNamespace(roles=frozenset())) == []


def test_a_method_is_described_once_however_often_it_is_asked_for(router: Router) -> None:
    for number in range(100):
        rpc(router, f"method_{number}")(add)
    first = discover(router)
    began = time.process_time()
    for _ in range(200):
        assert discover(router) == first
    assert time.process_time() - began < 1, "fifty milliseconds and more for each"
    rpc(router, "later")(add)
    assert [method["name"] for method in discover(router)[100:]] == ["later"]
