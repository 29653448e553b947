"""Retries, without a socket: which calls are made again, when, and that they end in time."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator
from typing import Any, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conduit import Retry, Server, idempotent, options
from conduit.exceptions import (
    CallCancelled,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from conduit.rpc.caller import Caller
from conduit.rpc.retry import Attempts, Budget
from conduit.transport.requests import DEFAULT
from tests.transport.pair import until, within

NOT_RUN = {"executed": False}
AGAIN = {"retryable": True}


def attempts(retry: Retry | None = None, **options: Any) -> Attempts:
    """Return the attempts at a call that has pauses as long as they can be."""
    budget = options.pop("budget", None) or Budget()
    return Attempts(retry or Retry(), budget, **{"chance": lambda: 1.0, **options})


def pauses(made: Attempts, error: Exception, count: int = 10) -> list[float]:
    """Return the pauses of a call that fails all the time, and takes no time itself."""
    found: list[float] = []
    while len(found) < count:
        pause = made.failed(error, sum(found))
        if pause is None:
            break
        found.append(pause)
    return found


# What may be given


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"attempts": 0}, "attempts must be a whole number from 1 on, not 0"),
        ({"attempts": -1}, "attempts must be"),
        ({"attempts": 2.5}, "attempts must be a whole number from 1 on, not 2.5"),
        ({"attempts": "3"}, "attempts must be"),
        ({"pause": -0.1}, "pause must be seconds from 0 to longest_pause, not -0.1 of 5.0"),
        ({"pause": 6}, "not 6 of 5.0"),
        ({"longest_pause": 0.01}, "not 0.1 of 0.01"),
        ({"longest_pause": math.inf}, "not 0.1 of inf"),
        ({"pause": math.nan}, "not nan of 5.0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Retry(**fields)


def test_a_retry_is_a_frozen_value() -> None:
    retry = Retry(attempts=5)
    assert retry == Retry(attempts=5) != Retry() and len({retry, Retry(attempts=5)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        retry.attempts = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Retry(3)  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [3, True, {"attempts": 3}, Retry])
async def test_what_is_no_retry_is_refused(wrong: Any) -> None:
    peer = Peer()
    with pytest.raises(TypeError, match=r"retry must be a Retry\(...\), not"):
        await peer.rpc.call("get", retry=wrong)
    assert peer.calls == []


# Which calls


class PrinterBusy(RPCError):
    """One that may pass by its class, and so says it in no detail."""

    @property
    def retryable(self) -> bool:
        return True


@pytest.mark.parametrize(
    "error",
    [
        ConnectionClosed("between two connections"),
        ConnectionLost(executed=False),
        Overloaded(),
        Unavailable("stopping", details=NOT_RUN),
        RPCError("later", details=NOT_RUN | AGAIN),
    ],
    ids=repr,
)
def test_what_surely_did_not_run_is_made_again(error: Exception) -> None:
    assert len(pauses(attempts(), error)) == 2
    assert len(pauses(attempts(Retry(idempotent=True)), error)) == 2


@pytest.mark.parametrize(
    "error",
    [
        ConnectionLost(),
        ConnectionLost(executed=True),
        Unavailable("the database is away"),
        Overloaded(details={"executed": None}),
        Overloaded(details={"executed": True}),
        RPCError("later", details=AGAIN),
        PrinterBusy("out of paper"),
        RPCTimeout("no slot at another peer", details=AGAIN),
    ],
    ids=repr,
)
def test_what_may_have_run_is_made_again_only_if_it_is_idempotent(error: Exception) -> None:
    assert pauses(attempts(), error) == []
    assert len(pauses(attempts(Retry(idempotent=True)), error)) == 2
    assert len(pauses(attempts(idempotent=True), error)) == 2


@pytest.mark.parametrize(
    "error",
    [
        InvalidParams("no", details=NOT_RUN),
        MethodNotFound("no", details=NOT_RUN),
        PermissionDenied("no"),
        PayloadTooLarge("no"),
        CallCancelled("no"),
        InternalError("no"),
        RPCTimeout("no", details=NOT_RUN),
        RPCError("the application's own"),
        Unavailable("for good", details=NOT_RUN | {"retryable": False}),
        Overloaded(details={"retryable": False}),
        PrinterBusy("for good", details={"retryable": False}),
        ValueError("no error of a call"),
    ],
    ids=repr,
)
def test_what_does_not_pass_is_not_made_again(error: Exception) -> None:
    budget = Budget()
    assert pauses(attempts(Retry(idempotent=True), budget=budget), error) == []
    assert budget.tokens == 10


# When


def test_pauses_double_up_to_the_longest() -> None:
    made = attempts(Retry(attempts=9))
    lost = ConnectionLost(executed=False)
    assert pauses(made, lost) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert pauses(attempts(Retry(attempts=4, pause=1, longest_pause=1)), lost) == [1, 1, 1]
    assert pauses(attempts(Retry(attempts=2, pause=0, longest_pause=0)), lost) == [0]
    assert pauses(attempts(Retry(attempts=1)), lost) == []
    assert Retry().grown(100_000) == 5.0


def test_pauses_are_random_from_nothing_on() -> None:
    chances = iter([0.0, 0.25, 0.5])
    made = attempts(Retry(attempts=4), chance=lambda: next(chances))
    assert pauses(made, Overloaded()) == [0.0, 0.05, 0.2]


@pytest.mark.parametrize(
    ("asked", "pause"),
    [(10, 0.11), (1500, 1.6), (0, 0.1), (-5, 0.1), (math.nan, 0.1), (None, 0.1), ("soon", 0.1)],
)
def test_the_pause_that_the_peer_asks_for_comes_first(asked: Any, pause: float) -> None:
    error = Overloaded(details={"retry_after": asked})
    assert attempts().failed(error, 0.0) == pytest.approx(pause)
    assert attempts(chance=lambda: 0.0).failed(error, 0.0) == pytest.approx(pause - 0.1)


def test_a_pause_that_does_not_fit_is_not_made() -> None:
    error = Overloaded(details={"retry_after": 2000})
    assert attempts(deadline=2.2).failed(error, 0.0) == 2.1
    assert attempts(deadline=2.1).failed(error, 0.0) is None
    assert attempts(deadline=3.0).failed(error, 1.0) is None
    assert attempts(deadline=3.0).failed(Overloaded(), 3.5) is None
    assert attempts().failed(Overloaded(details={"retry_after": math.inf}), 0.0) is None


def test_an_attempt_has_the_time_that_is_left() -> None:
    made = attempts(deadline=10.0)
    assert (made.left(0.0), made.left(7.5), made.left(9.99951), made.left(11.0)) == (
        10.0,
        2.5,
        0.001,
        0.001,
    )
    assert attempts().left(5.0) is None


def executed(error: Exception) -> Any:
    """Return what an error says of whether the call ran."""
    return error.details["executed"] if isinstance(error, RPCError) else error.executed  # type: ignore[attr-defined]


errors = st.one_of(
    st.builds(ConnectionLost, executed=st.sampled_from([None, True, False])),
    st.builds(
        Overloaded,
        details=st.fixed_dictionaries(
            {},
            optional={
                "retry_after": st.floats() | st.integers(-(2**63), 2**64 - 1),
                "executed": st.sampled_from([None, True, False]),
            },
        ),
    ),
)


@given(
    st.builds(
        Retry,
        attempts=st.integers(1, 10),
        pause=st.floats(0, 5),
        longest_pause=st.floats(5, 1e9),
        idempotent=st.booleans(),
    ),
    st.floats(0, 60),
    st.lists(st.tuples(errors, st.floats(0, 5), st.floats(0, 1)), max_size=20),
)
def test_attempts_and_pauses_lie_within_the_deadline(
    retry: Retry, seconds: float, course: list[tuple[Exception, float, float]]
) -> None:
    now = 1000.0
    deadline = now + seconds
    chances = iter([chance for *_, chance in course])
    made = attempts(retry, deadline=deadline, chance=lambda: next(chances))
    begun = 1
    for error, took, _ in course:
        left = made.left(now)
        assert left is not None and 0 < left <= max(seconds, 0.001) + 0.0005
        now = min(now + took, deadline)  # where the attempt's own timeout ends it
        pause = made.failed(error, now)
        if pause is None:
            break
        assert 0 <= pause < deadline - now
        now += pause
        begun += 1
        assert retry.idempotent or executed(error) is False
    assert begun <= retry.attempts and now <= deadline


# The budget


def test_a_peer_that_fails_is_soon_called_once_only() -> None:
    budget = Budget()
    again = [len(pauses(attempts(budget=budget), Overloaded())) for _ in range(20)]
    assert again == [2, 1] + 18 * [0]
    assert budget.tokens == 0


def test_results_refill_the_budget() -> None:
    budget = Budget()
    for _ in range(20):
        budget.spend()
    for _ in range(60):
        assert attempts(budget=budget).failed(Overloaded(), 0.0) is None
        for _ in range(10):
            attempts(budget=budget).succeeded()
    assert budget.tokens == 1.0  # a failure each is as much as ten results return
    for _ in range(1000):
        budget.earn()
    assert budget.tokens == 10


def test_a_lost_connection_is_no_answer_and_costs_nothing() -> None:
    budget = Budget()
    for _ in range(100):
        assert len(pauses(attempts(budget=budget), ConnectionLost(executed=False))) == 2
    assert budget.tokens == 10


@given(st.lists(st.booleans(), max_size=500))
def test_the_budget_keeps_its_bounds(course: list[bool]) -> None:
    budget = Budget()
    allowed = results = 0
    for succeeds in course:
        if succeeds:
            budget.earn()
            results += 1
        else:
            allowed += budget.spend()
        assert 0 <= budget.tokens <= 10
        assert allowed <= 5 + results / 10


# How calls use it


class Peer:
    """Answers calls one after the other as it was told, and remembers them."""

    def __init__(self, *answers: Any, timeout: float | None = 30.0, ready: Any = None) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []
        self.rpc = Caller(self._call, self._open, timeout=timeout, ready=ready)

    async def _call(
        self, method: str, args: Any, timeout: Any, whole: bool, headers: Any, key: Any
    ) -> Any:
        self.calls.append((method, args, timeout, headers))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return [answer] if whole else answer

    async def _open(self, *request: Any) -> Any:
        self.calls.append(request)
        raise self.answers.pop(0)


FAST = Retry(pause=0.001)


async def test_every_attempt_is_the_same_call() -> None:
    for returns in (None, int):
        peer = Peer(Overloaded(), Overloaded(), 5)
        call = peer.rpc.call(
            "get", {"a": 1}, returns=returns, headers={"b": 2}, retry=FAST, timeout=None
        )
        assert await call == 5
        assert peer.calls == 3 * [("get", {"a": 1}, None, {"b": 2})]


async def test_the_last_error_is_raised() -> None:
    last = Overloaded("the third")
    peer = Peer(Overloaded(), Overloaded(), last, 5)
    with pytest.raises(Overloaded) as caught:
        await peer.rpc.call("get", retry=FAST)
    assert caught.value is last and peer.answers == [5]


async def test_a_result_that_does_not_fit_is_not_asked_for_again() -> None:
    peer = Peer("five", 5)
    with pytest.raises(ValueError, match="int_parsing"):
        await peer.rpc.call("get", returns=int, retry=Retry(idempotent=True))
    assert len(peer.calls) == 1


async def test_without_a_retry_there_is_one_attempt() -> None:
    peer = Peer(Overloaded(), 5)
    with pytest.raises(Overloaded):
        await peer.rpc.call("get")
    assert peer.calls == [("get", None, DEFAULT, None)]


async def test_the_timeout_is_that_of_all_attempts() -> None:
    peer = Peer(Overloaded(), Overloaded(), 5)
    await peer.rpc.call("get", retry=Retry(pause=0.02), timeout=10)
    first, second, third = [timeout for _, _, timeout, _ in peer.calls]
    assert 10 >= first >= second >= third > 5
    peer = Peer(5, timeout=7)
    await peer.rpc.call("get", retry=FAST)
    assert peer.calls[0][2] == pytest.approx(7, abs=0.5)


async def test_a_call_that_is_cancelled_in_a_pause_is_over() -> None:
    peer = Peer(Overloaded(details={"retry_after": 60_000}), 5)
    call = asyncio.ensure_future(peer.rpc.call("get", retry=FAST, timeout=None))
    await until(lambda: peer.calls)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await within(call)
    assert len(peer.calls) == 1


async def test_all_calls_of_a_peer_share_the_budget() -> None:
    peer = Peer(*(Overloaded() for _ in range(100)))
    one, other = peer.rpc, options(peer.rpc.bind(Store), retry=FAST)
    for _ in range(3):
        with pytest.raises(Overloaded):
            await one.call("get", retry=FAST)
        with pytest.raises(Overloaded):
            await other.put("a", "b")
    assert len(peer.calls) == 6 + 3


async def test_a_connection_that_does_not_come_back_is_not_waited_for() -> None:
    for error in (ConnectionClosed(), ConnectionLost(executed=False)):
        peer = Peer(error, 5)
        with pytest.raises(ConnectionClosed):
            await within(peer.rpc.call("get", retry=Retry(idempotent=True), timeout=None))
        assert len(peer.calls) == 1


@pytest.mark.parametrize("back", [True, False])
async def test_a_connection_that_is_made_again_is_waited_for(back: bool) -> None:
    waits: list[float | None] = []
    returned = asyncio.Event()

    async def ready(seconds: float | None) -> bool:
        waits.append(seconds)
        if len(waits) > 1:
            await returned.wait()
        return len(waits) == 1 or back

    peer = Peer(ConnectionLost(executed=False), 5, ready=ready)
    call = asyncio.ensure_future(peer.rpc.call("get", retry=FAST, timeout=20))
    await until(lambda: len(waits) == 2)
    assert len(peer.calls) == 1 and waits == [pytest.approx(20, abs=2), pytest.approx(20, abs=2)]
    returned.set()
    if back:
        assert await within(call) == 5
    else:
        with pytest.raises(ConnectionLost):
            await within(call)
        assert len(peer.calls) == 1


# Who is marked


class Store(Protocol):
    async def add(self, key: str, value: str) -> int: ...

    @idempotent
    async def put(self, key: str, value: str) -> None: ...

    @idempotent
    def keys(self) -> AsyncIterator[str]: ...


class Memory:
    async def add(self, key: str, value: str) -> int:
        return 1

    async def put(self, key: str, value: str) -> None:
        pass

    async def keys(self) -> AsyncIterator[str]:
        yield "a"


async def test_the_interface_says_which_methods_are_idempotent() -> None:
    lost = RPCError("it may have run", details=AGAIN)
    peer = Peer(lost, None, lost, lost)
    store = options(peer.rpc.bind(Store), retry=FAST)
    await store.put("a", "b")
    with pytest.raises(RPCError):
        await store.add("a", "b")
    assert [method for method, *_ in peer.calls] == ["put", "put", "add"]
    with pytest.raises(RPCError):
        await anext(store.keys())
    assert len(peer.calls) == 4  # a stream is not made again


async def test_options_leave_what_they_are_not_given() -> None:
    peer = Peer(Overloaded(), 1, Overloaded(), Overloaded())
    plain = peer.rpc.bind(Store)
    store = options(options(plain, retry=FAST), timeout=2)
    assert await options(store).add("a", "b") == 1
    assert [0 < timeout <= 2 for _, _, timeout, _ in peer.calls] == [True, True]
    with pytest.raises(Overloaded):
        await options(store, retry=None).add("a", "b")
    assert peer.calls[-1][2] == 2
    with pytest.raises(Overloaded):
        await plain.add("a", "b")
    assert peer.calls[-1][2] is DEFAULT


def test_the_mark_changes_nothing_and_is_shown() -> None:
    server = Server(host="127.0.0.1", port=0)

    async def get(key: str) -> str:
        return key

    assert idempotent(get) is get
    server.rpc(get)
    server.rpc("other")(lambda: None)
    server.serve(Store, Memory())
    shown = {method.name: method.describe()["idempotent"] for method in server._router.described()}
    assert shown == {"get": True, "other": False, "add": False, "put": True, "keys": True}
