"""Calls with an idempotency key: each runs once, however often it is made."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from conduit import (
    CallCancelled,
    Client,
    Connection,
    ConnectionLost,
    Context,
    IdempotencyMismatch,
    InternalError,
    InvalidParams,
    MemoryStore,
    Overloaded,
    PermissionDenied,
    Response,
    Retry,
    RPCError,
    RPCTimeout,
    Server,
    Status,
    Unavailable,
    User,
    blocking,
    options,
)
from conduit.transport import keyed
from tests.acceptance.raw import PASSWORD, TIMEOUT, VERIFIER
from tests.acceptance.support import (
    FAST_LOGIN,
    Program,
    free_port,
    new_client,
    new_server,
    until,
    within,
)

SURE = Retry(pause=0.001)


class Till:
    """A server that charges, and knows how often it did.

    `charge` waits until `go` is set, if there is one.
    """

    def __init__(self, **fields: Any) -> None:
        self.server = new_server(**fields)
        self.charged: list[int] = []
        self.begun = self.cancelled = 0
        self.go: asyncio.Event | None = None
        self.errors: list[Exception] = []
        self.context: Context | None = None
        self.server.rpc(self.charge)

    async def charge(self, amount: int, context: Context) -> int:
        self.begun += 1
        self.context = context
        try:
            if self.go is not None:
                await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop(0)
        self.charged.append(amount)
        return len(self.charged)


@contextlib.asynccontextmanager
async def running(till: Till) -> AsyncIterator[tuple[Client, Client]]:
    """Run a till with two clients of the same user."""
    async with till.server, new_client(till.server) as one, new_client(till.server) as other:
        yield one, other


def charge(client: Client, amount: int = 5, key: str = "k", **options: Any) -> asyncio.Task[Any]:
    call = client.rpc.call("charge", {"amount": amount}, key=key, **options)
    return asyncio.ensure_future(call)


# Once


async def test_a_second_call_gets_the_first_answer() -> None:
    till = Till()
    async with running(till) as (one, other):
        assert await within(charge(one)) == 1
        assert await within(charge(one)) == 1
        assert await within(charge(other)) == 1
        assert await within(charge(one, key="another")) == 2
        assert till.charged == [5, 5]


async def test_a_second_call_waits_for_the_first() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with running(till) as (one, other):
        calls = [charge(one), charge(one), charge(other)]
        await until(lambda: till.begun)
        await within(other.rpc.call("add", [1, 2]))
        till.go.set()
        assert await within(asyncio.gather(*calls)) == [1, 1, 1]
        assert (till.begun, till.charged) == (1, [5])


async def test_other_arguments_under_the_same_key_are_refused() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with running(till) as (one, other):
        first = charge(one)
        await until(lambda: till.begun)
        for late in (False, True):
            with pytest.raises(IdempotencyMismatch, match="'k'.*other parameters") as caught:
                await within(charge(other, amount=6))
            assert caught.value.code == "idempotency_mismatch"
            assert caught.value.details["executed"] is False
            if not late:
                till.go.set()
                assert await within(first) == 1
        assert till.charged == [5]


async def test_the_order_of_the_arguments_does_not_matter() -> None:
    server = new_server()
    made: list[Any] = []

    @server.rpc
    async def make(a: int, b: dict[str, Any]) -> int:
        made.append((a, b))
        return len(made)

    async with server, new_client(server) as client:
        for args in ({"a": 1, "b": {"x": [{"y": 1, "z": 2}], "w": 3}},) * 2 + (
            {"b": {"w": 3, "x": [{"z": 2, "y": 1}]}, "a": 1},
        ):
            assert await within(client.rpc.call("make", args, key="k")) == 1
        with pytest.raises(IdempotencyMismatch):
            await within(client.rpc.call("make", {"a": 1, "b": {"w": 3, "x": []}}, key="k"))


async def test_a_key_belongs_to_its_user_and_its_method() -> None:
    till = Till(users={"ann": VERIFIER, "bob": VERIFIER})
    till.server.rpc("refund")(till.charge)
    async with (
        till.server,
        new_client(till.server, user="ann") as ann,
        new_client(till.server, user="bob") as bob,
    ):
        assert await within(charge(ann)) == 1
        assert await within(charge(bob)) == 2
        assert await within(ann.rpc.call("refund", {"amount": 5}, key="k")) == 3


@pytest.mark.parametrize("thread", [True, False])
async def test_plain_functions_run_once_as_well(thread: bool) -> None:
    server = new_server()
    ran = 0

    @server.rpc(thread=None if thread else False)
    def work(context: Context) -> list[Any]:
        nonlocal ran
        ran += 1
        return [ran, context.key, Context.current().key, threading.current_thread().name]

    async with server, new_client(server) as client:
        answers = [await within(client.rpc.call("work", key="k")) for _ in range(2)]
        assert answers[0] == answers[1]
        assert answers[0][:3] == [1, "k", "k"]
        assert ("conduit-handler" in answers[0][3]) is thread


async def test_what_comes_back_is_the_same_with_all_that_belongs_to_it() -> None:
    server = new_server()
    ran = 0

    @server.rpc
    async def work(context: Context) -> Response[dict[str, Any]]:
        nonlocal ran
        ran += 1
        context.response_headers["ran"] = ran
        return Response({"ran": ran, "large": b"x" * 100_000, "none": None}, {"more": 1})

    async with server, new_client(server) as client:
        answers = [await within(client.rpc.call("work", key="k", returns=Response)) for _ in "ab"]
        assert answers[0] == answers[1]
        assert answers[0].headers == {"ran": 1, "more": 1}
        assert (await within(client.rpc.call("work", key="k")))["ran"] == 1


# Errors


class NothingLeft(RPCError):
    article: str

    def __init__(self, article: str) -> None:
        super().__init__(f"no {article} left")
        self.article = article


async def test_an_error_of_the_application_is_an_answer() -> None:
    till = Till()
    async with running(till) as (one, other):
        till.errors = [NothingLeft("ink")]
        for client in (one, one, other):
            with pytest.raises(NothingLeft, match="no ink left") as caught:
                await within(charge(client))
            assert caught.value.article == "ink"
        assert till.begun == 1


async def test_a_failure_is_an_answer_because_something_may_have_been_done() -> None:
    till = Till()
    async with running(till) as (one, other):
        till.errors = [ZeroDivisionError()]
        ids = set()
        for client in (one, other):
            with pytest.raises(InternalError) as caught:
                await within(charge(client))
            ids.add(caught.value.error_id)
        assert (till.begun, len(ids)) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [
        Overloaded(),
        Unavailable("no database"),
        RPCError("later", details={"retryable": True}),
        RPCError("not done", details={"executed": False}),
    ],
)
async def test_an_error_that_may_pass_is_none(error: RPCError) -> None:
    till = Till()
    async with running(till) as (one, other):
        till.errors = [error]
        with pytest.raises(type(error)):
            await within(charge(one))
        assert await within(charge(other)) == 1
        assert till.begun == 2


@pytest.mark.parametrize(
    "error", [Unavailable("no paper"), Overloaded(details={"executed": False})]
)
async def test_an_error_of_a_call_that_the_handler_made_is_an_answer(error: RPCError) -> None:
    server = new_server()
    charged = 0

    @server.rpc
    async def work(connection: Connection) -> None:
        nonlocal charged
        charged += 1
        await connection.rpc.call("receipt")

    async def receipt() -> None:
        raise error

    async with server:
        client = new_client(server)
        client.rpc(receipt)
        async with client:
            for _ in range(2):
                with pytest.raises(type(error)):
                    await within(client.rpc.call("work", key="k", retry=Retry(pause=0.001)))
            assert charged == 1


async def test_a_handler_that_ends_with_a_cancelled_call_of_its_own_runs_again() -> None:
    server = new_server()
    ran = 0

    @server.rpc
    async def work(connection: Connection) -> None:
        nonlocal ran
        ran += 1
        call = asyncio.ensure_future(connection.rpc.call("wait"))
        await asyncio.sleep(0)
        call.cancel()
        await call

    async def wait() -> None:
        await asyncio.Event().wait()

    async with server:
        client = new_client(server)
        client.rpc(wait)
        async with client:
            for _ in range(2):
                with pytest.raises(CallCancelled):
                    await within(client.rpc.call("work", key="k"))
            assert ran == 2


async def test_a_result_that_cannot_be_sent_is_an_answer() -> None:
    server = new_server()
    ran = 0

    @server.rpc
    async def work() -> Any:
        nonlocal ran
        ran += 1
        return object()

    async with server, new_client(server) as client:
        for _ in range(2):
            with pytest.raises(InternalError):
                await within(client.rpc.call("work", key="k"))
        assert ran == 1


async def test_a_store_that_fails_runs_nothing_and_keeps_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(MemoryStore):
        broken = "get"

        async def get(self, key: str) -> bytes | None:
            if self.broken == "get":
                raise OSError("the disk is gone")
            return await super().get(key)

        async def put(self, key: str, answer: bytes, ttl: float) -> None:
            if self.broken == "put":
                raise OSError("the disk is full")
            await super().put(key, answer, ttl)

    store = Broken()
    till = Till(idempotency=store)
    async with running(till) as (one, _):
        with pytest.raises(Unavailable, match="cannot be looked up") as caught:
            await within(charge(one))
        assert (caught.value.retryable, caught.value.details["executed"]) == (True, False)
        assert till.begun == 0
        store.broken = "put"
        assert await within(charge(one)) == 1  # it has been done, and the caller is told
        assert "the disk is full" in caplog.text and "may run again" in caplog.text
        store.broken = ""
        assert await within(charge(one)) == 2
        assert await within(charge(one)) == 2


# Who gives up


async def test_who_gives_up_leaves_the_handler_to_who_waits() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with running(till) as (one, other):
        first = charge(one)
        await until(lambda: till.begun)
        second = charge(other)
        third = charge(other, timeout=0.05)
        with pytest.raises(RPCTimeout):
            await within(third)
        first.cancel()
        await within(one.rpc.call("add", [1, 2]))
        till.go.set()
        assert await within(second) == 1
        assert (till.begun, till.cancelled, till.charged) == (1, 0, [5])


async def test_when_all_have_given_up_the_handler_is_cancelled_and_may_run_again() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with running(till) as (one, other):
        calls = [charge(one), charge(other)]
        await until(lambda: till.begun)
        await within(other.rpc.call("add", [1, 2]))
        for call in calls:
            call.cancel()
        await until(lambda: till.cancelled)
        assert till.context is not None
        with pytest.raises(CallCancelled):
            till.context.raise_if_cancelled()
        till.go.set()
        assert await within(charge(one)) == 1
        assert (till.begun, till.charged) == (2, [5])


async def test_the_handler_has_as_much_time_as_the_most_patient_caller() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with running(till) as (one, other):
        first = charge(one, timeout=0.2)
        await until(lambda: till.begun)
        assert till.context is not None and till.context.remaining is not None
        assert till.context.remaining <= 0.2
        second = charge(other, timeout=100)
        await until(lambda: (till.context and till.context.remaining or 0) > 50)
        with pytest.raises(RPCTimeout):
            await within(first)
        till.go.set()
        assert await within(second) == 1


async def test_the_time_of_the_method_counts_for_all_its_callers() -> None:
    server = new_server()
    begun = 0

    @server.rpc(timeout=0.2)
    async def slow() -> None:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()

    async with server, new_client(server) as one, new_client(server) as other:
        calls = [asyncio.ensure_future(one.rpc.call("slow", key="k"))]
        await until(lambda: begun)
        calls.append(asyncio.ensure_future(other.rpc.call("slow", key="k", timeout=None)))
        for call in calls:
            with pytest.raises(RPCTimeout, match="did not end in time"):
                await within(call)
        assert begun == 1


async def test_a_caller_that_comes_while_the_handler_cleans_up_has_it_run_again() -> None:
    server = new_server()
    begun, cleaned = 0, asyncio.Event()
    cleaning = asyncio.Event()

    @server.rpc
    async def work() -> int:
        nonlocal begun
        begun += 1
        if begun == 1:
            try:
                await asyncio.Event().wait()
            finally:
                cleaning.set()
                await cleaned.wait()
        return begun

    async with server, new_client(server) as one, new_client(server) as other:
        first = asyncio.ensure_future(one.rpc.call("work", key="k"))
        await until(lambda: begun)
        first.cancel()
        await within(cleaning.wait())
        second = asyncio.ensure_future(other.rpc.call("work", key="k"))
        await within(other.rpc.call("add", [1, 2]))
        assert begun == 1
        cleaned.set()
        assert await within(second) == 2


async def test_a_thread_that_nobody_waits_for_is_told_and_its_result_is_kept() -> None:
    server = new_server()
    go, told = threading.Event(), threading.Event()
    begun: list[int] = []

    @server.rpc
    def work(context: Context) -> int:
        begun.append(1)
        while True:
            try:
                context.raise_if_cancelled()
            except CallCancelled:
                told.set()
                break
            time.sleep(0.001)
        go.wait(TIMEOUT)
        return len(begun)

    async with server, new_client(server) as client:
        first = asyncio.ensure_future(client.rpc.call("work", key="k"))
        await until(lambda: begun)
        first.cancel()
        await within(asyncio.to_thread(told.wait, TIMEOUT))
        second = asyncio.ensure_future(client.rpc.call("work", key="k"))
        await within(client.rpc.call("add", [1, 2]))
        go.set()
        assert await within(second) == 1
        assert begun == [1]


async def test_what_a_handler_raises_when_it_is_stopped_is_logged_and_not_kept(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = new_server()
    begun = 0

    @server.rpc
    async def work() -> int:
        nonlocal begun
        begun += 1
        if begun == 1:
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError
        return begun

    async with server, new_client(server) as client:
        first = asyncio.ensure_future(client.rpc.call("work", key="k"))
        await until(lambda: begun)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await within(client.rpc.call("add", [1, 2]))  # behind the CANCEL
        assert await within(client.rpc.call("work", key="k")) == 2
        assert "'work' failed after it was stopped" in caplog.text


async def test_an_error_whose_details_cannot_be_sent_is_kept_without_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    till = Till()
    async with running(till) as (one, _):
        till.errors = [RPCError("no", details={"why": object()})]
        for _ in range(2):
            with pytest.raises(RPCError, match="no") as caught:
                await within(charge(one))
            assert caught.value.details == {}
        assert till.begun == 1
        assert "cannot be kept" in caplog.text


async def test_an_error_whose_text_cannot_be_sent_is_kept_as_what_can() -> None:
    till = Till()
    async with running(till) as (one, _):
        till.errors = [RPCError("\udc80")]
        for _ in range(2):
            with pytest.raises(RPCError) as caught:
                await within(charge(one))
            assert (type(caught.value), caught.value.message) == (RPCError, "?")
        assert till.begun == 1


# Lost connections


async def test_only_so_many_handlers_go_on_without_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conduit.transport.keyed.MOST_LEFT", 1)
    till = Till(resume_ttl=0)
    till.go = asyncio.Event()
    async with till.server:
        async with new_client(till.server) as client:
            calls = [charge(client, key=key) for key in "abc"]
            await until(lambda: till.begun == 3)
        for call in calls:
            with pytest.raises(ConnectionLost):
                await within(call)
        await until(lambda: till.cancelled == 2)
        till.go.set()
        await until(lambda: till.charged)
        async with new_client(till.server) as client:
            assert await within(charge(client, key="a")) == 1
        assert (till.begun, till.cancelled) == (3, 2)


async def test_a_lost_caller_gets_the_answer_over_its_next_session() -> None:
    till = Till(resume_ttl=0)
    till.go = go = asyncio.Event()
    async with till.server, new_client(till.server) as client:
        before = client.connection.id
        call = charge(client, retry=SURE)
        await until(lambda: till.begun)
        (connection,) = till.server.connections.values()
        await within(connection.close(4000, "cut off"))
        await until(lambda: client.status is Status.READY and client.connection.id != before)
        assert not call.done()
        go.set()
        assert await within(call) == 1
        assert (till.begun, till.cancelled, till.charged) == (1, 0, [5])


async def test_an_answer_that_was_lost_is_not_worked_out_again() -> None:
    till = Till(resume_ttl=0)
    lost = 0

    @till.server.rpc
    async def lose(context: Context) -> int:
        nonlocal lost
        lost += 1
        await context.connection.close(4000, "cut off")
        return lost

    async with till.server, new_client(till.server) as client:
        assert await within(client.rpc.call("lose", key="k", retry=SURE)) == 1
        with pytest.raises(ConnectionLost):
            await within(client.rpc.call("lose", key="other"))  # without retry
        assert lost == 2


async def test_who_does_not_come_back_leaves_the_handler_its_time_and_no_more() -> None:
    till = Till(resume_ttl=0)
    till.go = asyncio.Event()
    async with till.server:
        async with new_client(till.server) as client:
            call = charge(client, timeout=0.3)
            await until(lambda: till.begun)
        with pytest.raises(ConnectionLost):
            await within(call)
        assert not till.cancelled
        await until(lambda: till.cancelled)


async def test_a_server_that_stops_ends_what_nobody_waits_for() -> None:
    till = Till(resume_ttl=0)
    till.go = asyncio.Event()
    await till.server.start()
    async with new_client(till.server) as client:
        call = charge(client, timeout=None)
        await until(lambda: till.begun)
    with pytest.raises(ConnectionLost):
        await within(call)
    await within(till.server.stop(grace=0.01))
    assert till.cancelled == 1


async def test_a_server_that_stops_has_its_grace_for_calls_with_a_key() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with till.server, new_client(till.server, reconnect_enabled=False) as client:
        call = charge(client)
        await until(lambda: till.begun)
        stopping = asyncio.ensure_future(till.server.stop(grace=TIMEOUT))
        await asyncio.sleep(0)
        till.go.set()
        assert await within(call) == 1
        await within(stopping)


async def test_a_server_that_stops_tells_who_waits() -> None:
    till = Till()
    till.go = asyncio.Event()
    async with till.server, new_client(till.server, reconnect_enabled=False) as client:
        call = charge(client)
        await until(lambda: till.begun)
        stopping = asyncio.ensure_future(till.server.stop(grace=0.01))
        with pytest.raises(Unavailable, match="the server stops"):
            await within(call)
        await within(stopping)
        assert till.cancelled == 1


# How it is called


class Charges(Protocol):
    async def charge(self, amount: int) -> int: ...
    def watch(self) -> AsyncIterator[int]: ...


class PlainCharges(Protocol):
    def charge(self, amount: int) -> int: ...


async def test_every_way_to_call() -> None:
    till = Till()
    async with running(till) as (one, _):
        charges = one.rpc.bind(Charges)
        assert await within(options(charges, key="a").charge(5)) == 1
        assert await within(options(options(charges, key="a"), timeout=5).charge(5)) == 1
        assert await within(options(charges, key="a", retry=SURE).charge(5)) == 1
        assert await within(options(options(charges, key="a"), key=None).charge(5)) == 2
        assert await within(charge(one, key="a", returns=int, headers={"x": 1}, timeout=9)) == 1
        with pytest.raises(TypeError, match="'watch' has streams.*takes no key"):
            options(charges, key="a").watch()

        def in_thread() -> Any:
            fields: dict[str, Any] = {"password": PASSWORD, "limits": FAST_LOGIN}
            host, port = till.server.address
            with blocking.Client(f"tcp://{host}:{port}", **fields) as client:
                charges = client.rpc.bind(PlainCharges)
                return [
                    client.rpc.call("charge", {"amount": 5}, key="a"),
                    options(charges, key="a").charge(5),
                ]

        assert await within(asyncio.to_thread(in_thread)) == [1, 1]
        assert till.charged == [5, 5]


async def test_a_client_serves_calls_with_a_key_too() -> None:
    till = Till()
    ran = 0
    async with till.server:
        client = new_client(till.server)

        @client.rpc
        async def work(context: Context) -> list[Any]:
            nonlocal ran
            ran += 1
            return [ran, context.key]

        async with client:
            (connection,) = till.server.connections.values()
            for _ in range(2):
                assert await within(connection.rpc.call("work", key="k")) == [1, "k"]
            assert await within(connection.rpc.call("work")) == [2, None]


@pytest.mark.parametrize("key", ["", "x" * 65, "ü" * 33, 5, b"k"])
async def test_what_is_no_key_is_refused_here(key: Any) -> None:
    till = Till()
    async with running(till) as (one, _):
        with pytest.raises(ValueError, match="text of 1 to 64 bytes"):
            await within(charge(one, key=key))
        assert await within(charge(one, key="ü" * 32)) == 1


async def test_a_method_with_streams_takes_no_key() -> None:
    server = new_server()

    @server.rpc
    async def count() -> AsyncIterator[int]:
        yield 1

    async with server, new_client(server) as client:
        with pytest.raises(InvalidParams, match="rpc.stream"):
            await within(client.rpc.call("count", key="k"))


# Kept elsewhere


class Slow(MemoryStore):
    """A store that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.ttls: list[float] = []
        self.keys: set[str] = set()
        self.go = asyncio.Event()

    async def get(self, key: str) -> bytes | None:
        self.keys.add(key)
        await asyncio.sleep(0)
        return await super().get(key)

    async def put(self, key: str, answer: bytes, ttl: float) -> None:
        await self.go.wait()
        self.ttls.append(ttl)
        await super().put(key, answer, ttl)


async def test_an_answer_is_kept_before_it_is_told() -> None:
    store = Slow()
    till = Till(idempotency=store, idempotency_ttl=7)
    async with running(till) as (one, other):
        calls = [charge(one), charge(other)]
        await until(lambda: till.charged)
        await within(other.rpc.call("add", [1, 2]))
        calls[0].cancel()
        assert not calls[1].done()
        store.go.set()
        assert await within(calls[1]) == 1
        assert store.ttls == [7.0]
        (key,) = store.keys
        assert len(key) == 64 and int(key, 16)


async def test_a_store_that_never_keeps_an_answer_holds_nobody_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Slow()
    till = Till(idempotency=store)
    async with running(till) as (one, _):
        before = asyncio.all_tasks()
        with pytest.raises(RPCTimeout):
            await within(charge(one, timeout=0.05))
        await until(lambda: len(asyncio.all_tasks() - before) == 1)  # which waits for the store
        monkeypatch.setattr(keyed, "KEEPING", 0.05)
        assert await within(charge(one, key="another")) == 2
        assert "did not take the answer of 'charge' in time" in caplog.text
        assert store.ttls == []
        monkeypatch.setattr(keyed, "CLEAN_UP", 0.05)
        await within(till.server.stop(0))
    assert not asyncio.all_tasks() - before


async def test_answers_are_forgotten_behind_their_time() -> None:
    till = Till(idempotency_ttl=0.05)
    async with running(till) as (one, _):
        assert await within(charge(one)) == 1
        again = 1
        while again == 1:
            again = await within(charge(one))
        assert again == 2


PROGRAM = """
    import asyncio, os, signal, sqlite3, sys, time
    from conduit import Server

    class SqliteStore:
        def __init__(self, path):
            self.rows = sqlite3.connect(path)
            self.rows.execute("create table if not exists answers (key primary key, answer, ends)")

        async def get(self, key):
            query = "select answer from answers where key = ? and ends > ?"
            found = self.rows.execute(query, (key, time.time())).fetchone()
            return found and found[0]

        async def put(self, key, answer, ttl):
            with self.rows:
                row = (key, answer, time.time() + ttl)
                self.rows.execute("insert or replace into answers values (?, ?, ?)", row)
            if DIES:
                os.kill(os.getpid(), signal.SIGKILL)  # behind the work, and before the answer

    DIES = {dies}
    server = Server(host="127.0.0.1", port={port}, verifier="{verifier}",
                    idempotency=SqliteStore("answers.db"))
    done = sqlite3.connect("done.db")
    done.execute("create table if not exists charged (amount)")

    @server.rpc
    async def charge(amount: int) -> int:
        with done:
            return done.execute("insert into charged values (?)", (amount,)).lastrowid

    asyncio.run(server.run())
"""


async def test_a_server_that_is_killed_does_nothing_twice(tmp_path: Path) -> None:
    port = free_port()

    def start(dies: bool) -> Program:
        text = textwrap.dedent(PROGRAM).format(dies=dies, port=port, verifier=VERIFIER)
        (tmp_path / "server.py").write_text(text, encoding="ascii")
        return Program("server.py", cwd=tmp_path)

    with start(dies=True) as first:
        await asyncio.to_thread(first.wait_for_port, "127.0.0.1", port)
        client = new_client(("127.0.0.1", port), reconnect_attempts=0)
        async with client:
            call = charge(client, retry=SURE, timeout=60)
            assert await asyncio.to_thread(first.finish) == -9
            with start(dies=False) as second:
                assert await within(call, 30) == 1
                assert await within(charge(client)) == 1
                assert await within(charge(client, key="other")) == 2
                second.process.kill()
    with contextlib.closing(sqlite3.connect(tmp_path / "done.db")) as done:
        assert done.execute("select count(*) from charged").fetchone() == (2,)


def test_what_is_no_store_is_refused() -> None:
    with pytest.raises(ValueError, match="idempotency"):
        Server(idempotency={})


async def test_an_answer_that_is_kept_is_only_for_those_who_may_call() -> None:
    roles = ["cashier"]

    async def lookup(name: str) -> User:
        return User(verifier=VERIFIER, roles=roles)

    server = new_server(users=lookup)
    runs: list[int] = []

    @server.rpc(requires="cashier")
    async def pay(amount: int) -> int:
        runs.append(amount)
        return amount

    async with server:
        async with new_client(server, user="ann") as client:
            assert await within(client.rpc.call("pay", [5], key="once")) == 5
        roles.clear()
        async with new_client(server, user="ann") as client:
            with pytest.raises(PermissionDenied):
                await within(client.rpc.call("pay", [5], key="once"))
            with pytest.raises(PermissionDenied):
                await within(client.rpc.call("pay", [5], key="another"))
    assert runs == [5]
