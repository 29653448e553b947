"""The blocking client against a server on another loop: threads, Ctrl-C, the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import logging
import logging.handlers
import pydoc
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest
from pydantic import BaseModel, ValidationError

import conduit
from conduit import (
    AuthenticationError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Context,
    InvalidParams,
    MethodNotFound,
    Retry,
    RPCTimeout,
    Server,
    Status,
    Stream,
    blocking,
    no_deadline,
    options,
)
from tests.acceptance.raw import PASSWORD, TIMEOUT
from tests.acceptance.support import FAST_LOGIN, Program, new_server
from tests.conftest import LOOPS


class Progress(BaseModel):
    done: int


class Hub:
    """A server on a loop of its own, and what its handlers tell."""

    def __init__(self) -> None:
        self.server = new_server()
        self.told: queue.Queue[str] = queue.Queue()
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        register(self.server, self.told.put)
        register_more(self.server)

    def __enter__(self) -> Hub:
        self._thread.start()
        assert self._up.wait(TIMEOUT)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._down.set)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._down = asyncio.Event()
        async with self.server:
            self._up.set()
            await self._down.wait()

    @property
    def url(self) -> str:
        return "tcp://{}:{}".format(*self.server.address)

    def client(self, **fields: Any) -> blocking.Client:
        """Return a client of this server; it is not connected yet."""
        known = {"password": PASSWORD, "limits": FAST_LOGIN, "reconnect_delay": 0.01}
        return blocking.Client(self.url, **{**known, **fields})

    def heard(self) -> str:
        """Return what a handler tells next."""
        return self.told.get(timeout=TIMEOUT)


def register(server: Server, tell: Callable[[str], None]) -> None:
    """Give a server a handler for everything that the tests call."""

    @contextlib.contextmanager
    def told(name: str) -> Iterator[None]:
        tell(f"{name} begins")
        try:
            yield
        finally:
            tell(f"{name} ends")

    @server.rpc
    async def sleep() -> None:
        """Wait until the caller gives up."""
        with told("sleep"):
            await asyncio.sleep(600)

    @server.rpc
    async def ticks() -> AsyncIterator[int]:
        with told("ticks"):
            for number in range(10**9):
                yield number

    @server.rpc
    async def silence() -> AsyncIterator[int]:
        with told("silence"):
            await asyncio.sleep(600)
            yield 0

    @server.rpc
    async def call_back_and_sleep(connection: Connection) -> None:
        with told("sleep"):
            await connection.rpc.call("begun")
            await asyncio.sleep(600)

    @server.on("tell")
    async def on_tell(connection: Connection, message: str) -> None:
        tell(message)

    @server.on_client_disconnect
    async def gone(connection: Connection, reason: ConnectionClosed) -> None:
        tell(f"gone: {reason.code}")


def register_more(server: Server) -> None:
    """Give it what tells nothing of itself."""

    @server.rpc
    async def count(to: int) -> AsyncIterator[int]:
        """Count from 0."""
        for number in range(to):
            yield number

    @server.rpc
    async def train(rounds: int, stream: Stream[Progress]) -> str:
        for done in range(rounds):
            await stream.send(Progress(done=done))
        return "the model"

    @server.rpc
    async def average(numbers: AsyncIterator[float]) -> float:
        taken = [number async for number in numbers]
        return sum(taken) / len(taken)

    @server.rpc
    async def first(numbers: AsyncIterator[int]) -> int:
        return await anext(numbers)

    @server.rpc
    async def odd_names(self: int, function: int, method: int, args: int = 0) -> list[int]:
        return [self, function, method, args]

    @server.rpc("stock.count")
    async def stock(article: str, *, minimum: int = 3) -> int:
        return minimum

    @server.rpc
    async def call_back(connection: Connection, method: str) -> Any:
        return await connection.rpc.call(method)

    @server.on("echo")
    async def echo(connection: Connection, message: str) -> str:
        return message

    @server.on("call")
    async def call(connection: Connection, method: str) -> None:
        with contextlib.suppress(conduit.InternalError, ConnectionClosed):
            await connection.rpc.call(method)

    @server.on("close")
    async def close(connection: Connection, code: int) -> None:
        server.start_task(connection.close(code, "as told"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub
    assert conduit_threads() == []


@pytest.fixture
def client(hub: Hub) -> Iterator[blocking.Client]:
    with hub.client() as client:
        yield client


def conduit_threads() -> list[threading.Thread]:
    """Return the loops and iterators that are still running in this process."""
    names = ("conduit-client", "conduit-items")
    threads = [one for one in threading.enumerate() if one.name in names]
    for thread in threads:
        thread.join(TIMEOUT)
    return [one for one in threads if one.is_alive()]


# The same names.


# How the parts talk to each other.
INNER = {"asked", "opened", "away", "returned", "ended", "use", "ready"}
INNER |= {"bound", "expected", "leaving"}
ATTRIBUTES = {"descriptor"}  # of each object there, and a property here


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (conduit.Client, blocking.Client),
        (conduit.client.ClientCaller, blocking.ClientCaller),
        (conduit.StreamCall, blocking.StreamCall),
    ],
)
def test_the_names_are_those_of_the_async_client(one: type, other: type) -> None:
    names = {name for name in dir(one) if not name.startswith("_")} - INNER
    assert {name for name in dir(other) if not name.startswith("_")} - ATTRIBUTES == names
    for name in names:
        theirs, ours = getattr(one, name), getattr(other, name)
        assert ours.__doc__
        assert not inspect.iscoroutinefunction(ours)
        if inspect.isfunction(theirs) and name != "wait_closed":
            assert list(inspect.signature(ours).parameters) == list(
                inspect.signature(theirs).parameters
            ), name


def test_calls(client: blocking.Client) -> None:
    assert client.rpc.add(a=1, b=2) == 3
    assert client.rpc.call("add", [1, 2]) == 3
    assert client.rpc.call("add", {"a": 1, "b": 2}, timeout=5, returns=float) == 3.0
    assert client.rpc.call("stock.count", {"article": "nail"}) == 3
    with pytest.raises(InvalidParams):
        client.rpc.add(a=1, b="two")
    with pytest.raises(MethodNotFound, match="did you mean"):
        client.rpc.ad(a=1)
    with pytest.raises(ValidationError):
        client.rpc.call("add", [1, 2], returns=list)
    assert [one["name"] for one in client.rpc.discover()][0] == "add"


def test_a_timeout_ends_the_call_and_the_handler(hub: Hub, client: blocking.Client) -> None:
    with pytest.raises(RPCTimeout):
        client.rpc.call("sleep", timeout=0.05)
    assert [hub.heard(), hub.heard()] == ["sleep begins", "sleep ends"]


def test_messages(hub: Hub, client: blocking.Client) -> None:
    client.send("tell", "hello")
    assert hub.heard() == "hello"
    client.send("tell", "again", ack=True)
    assert hub.told.get_nowait() == "again"
    assert client.request("echo", "hi", timeout=5, returns=str) == "hi"
    assert 0 < client.ping() < TIMEOUT


def test_what_a_client_tells_of_itself(hub: Hub) -> None:
    client = hub.client(name="Ada")
    states = [client.status]
    with client:
        states.append(client.status)
        assert client.descriptor.name == "Ada"
        assert client.connection.identity == "default"
        assert (client.server_name, client.server_version) == (
            hub.server.name,
            hub.server.version,
        )
    assert [*states, client.status] == [Status.IDLE, Status.READY, Status.CLOSED]


# Streams.


def test_a_stream_gives_all_items_in_order_then_its_result(client: blocking.Client) -> None:
    with client.rpc.stream("count", {"to": 20_000}, items=int) as run:
        assert list(run) == list(range(20_000))
        assert run.result() is None
    with client.rpc.stream("train", {"rounds": 3}, items=Progress, returns=str) as training:
        assert [progress.done for progress in training] == [0, 1, 2]
        assert training.result() == "the model"
    assert list(client.rpc.stream("count", {"to": 3})) == [0, 1, 2]
    assert client.rpc.stream("train", {"rounds": 20_000}).result() == "the model"


def test_a_loop_goes_on_where_the_one_before_has_stopped(client: blocking.Client) -> None:
    with client.rpc.stream("count", {"to": 2000}) as run:
        for item in run:
            if item == 700:
                break
        assert list(run) == list(range(701, 2000))


def test_the_result_after_a_loop_that_was_left(client: blocking.Client) -> None:
    with client.rpc.stream("train", {"rounds": 20_000}) as run:
        for _ in run:
            break
        assert run.result() == "the model"  # nobody takes the rest, so it is thrown away


def test_leaving_the_block_ends_the_handler(hub: Hub, client: blocking.Client) -> None:
    with client.rpc.stream("ticks") as run:
        for tick in run:
            if tick == 5:
                break
        assert hub.heard() == "ticks begins"
        assert hub.told.empty()
    assert hub.heard() == "ticks ends"


def test_a_plain_loop_that_is_left_ends_the_handler(hub: Hub, client: blocking.Client) -> None:
    for tick in client.rpc.stream("ticks"):
        if tick == 5:
            break
    assert [hub.heard(), hub.heard()] == ["ticks begins", "ticks ends"]


def test_errors_of_streams(client: blocking.Client) -> None:
    with pytest.raises(ValidationError):
        next(iter(client.rpc.stream("count", {"to": 3}, items=bytes)))
    with pytest.raises(MethodNotFound):
        list(client.rpc.stream("nothing"))
    with pytest.raises(RPCTimeout):
        list(client.rpc.stream("silence", timeout=0.05))


# Iterators among the arguments.


def test_an_iterator_that_blocks_holds_up_nobody(client: blocking.Client) -> None:
    said: queue.Queue[float | None] = queue.Queue()
    with client.rpc.stream("average", {"numbers": iter(said.get, None)}) as run:
        said.put(1.0)
        assert client.rpc.add(a=1, b=2) == 3
        said.put(3.0)
        said.put(None)
        assert run.result() == 2.0


def test_an_iterator_is_closed_in_its_own_thread_when_the_call_ends(
    client: blocking.Client,
) -> None:
    threads: set[str] = set()
    closed: list[int] = []

    def numbers() -> Iterator[int]:
        try:
            for number in range(10**9):
                threads.add(threading.current_thread().name)
                yield number
        finally:
            threads.add(threading.current_thread().name)
            closed.append(number)

    with client.rpc.stream("first", [numbers()], returns=int) as run:
        assert run.result() == 0
    assert len(closed) == 1
    assert threads == {"conduit-items"}


def test_an_iterator_that_fails(client: blocking.Client) -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise LookupError("no more numbers")

    with pytest.raises(LookupError, match="no more numbers"):
        client.rpc.stream("average", [numbers()]).result()


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, StopAsyncIteration])
def test_an_iterator_that_raises_what_is_no_error_of_a_call(
    client: blocking.Client, error: type[BaseException]
) -> None:
    def numbers() -> Iterator[float]:
        yield 1
        raise error

    with pytest.raises(RuntimeError, match=f"arguments raised {error.__name__}") as caught:
        client.rpc.stream("average", [numbers()], timeout=TIMEOUT).result()
    assert isinstance(caught.value.__cause__, error)
    assert client.rpc.add(a=1, b=2) == 3


def test_an_iterator_that_never_comes_back_does_not_hold_up_the_end(
    hub: Hub, client: blocking.Client
) -> None:
    said: queue.Queue[int] = queue.Queue()
    said.put(7)
    with client.rpc.stream("first", [iter(said.get, None)]) as run:
        assert run.result() == 7
    assert client.rpc.add(a=1, b=2) == 3
    said.put(0)  # the thread ends as soon as it comes back


def test_the_items_of_one_call_go_to_another(client: blocking.Client) -> None:
    with client.rpc.stream("count", {"to": 5}) as counted:
        assert client.rpc.stream("average", [iter(counted)]).result() == 2.0


def test_an_async_iterator_runs_on_the_loop(client: blocking.Client) -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    assert client.rpc.stream("average", [numbers()]).result() == 1.0


# Threads.


def test_many_threads_use_one_client(client: blocking.Client) -> None:
    def work(start: int) -> list[int]:
        called = [client.rpc.add(a=start, b=number) for number in range(25)]
        streamed = list(client.rpc.stream("count", {"to": 25}))
        return [value - start for value in called] + streamed

    with ThreadPoolExecutor(16) as pool:
        for outcome in pool.map(work, range(0, 1600, 100)):
            assert outcome == [*range(25), *range(25)]


def test_disconnecting_ends_the_calls_of_other_threads(hub: Hub) -> None:
    client = hub.client()
    client.connect()
    with ThreadPoolExecutor(3) as pool:
        call = pool.submit(client.rpc.sleep)
        items = pool.submit(list, client.rpc.stream("silence"))
        closed = pool.submit(client.wait_closed)
        assert {hub.heard(), hub.heard()} == {"sleep begins", "silence begins"}
        client.disconnect()
        for future in (call, items):
            assert isinstance(future.exception(TIMEOUT), ConnectionClosed)
        assert isinstance(call.exception(), ConnectionLost)
        assert closed.result(TIMEOUT) is None


def test_it_works_beside_a_loop_that_runs_in_the_same_thread(client: blocking.Client) -> None:
    async def cell_of_a_notebook() -> int:
        result: int = client.rpc.add(a=1, b=2)
        return result

    assert asyncio.run(cell_of_a_notebook()) == 3


def test_the_loop_is_the_one_that_was_asked_for(hub: Hub) -> None:
    import uvloop

    for fields, name in ({}, "asyncio"), ({"loop_factory": uvloop.new_event_loop}, "uvloop"):
        client = hub.client(**fields)

        @client.rpc
        async def loop() -> str:
            return type(asyncio.get_running_loop()).__module__.partition(".")[0]

        with client:
            assert client.rpc.call_back(method="loop") == name


# Handlers and hooks.


def test_plain_handlers_use_the_client(hub: Hub) -> None:
    client = hub.client()

    @client.rpc
    def plain() -> int:
        result: int = client.rpc.add(a=20, b=22)
        return result

    @client.rpc("named", timeout=5)
    def named() -> str:
        return threading.current_thread().name

    @client.on("echo_response")
    def echoed(message: str) -> None:
        client.send("tell", f"{message} came back")

    with client:
        assert client.rpc.call_back(method="plain") == 42
        assert client.rpc.call_back(method="named").startswith("conduit-handler")
        client.send("echo", "it")
        assert hub.heard() == "it came back"


def test_plain_handlers_have_no_more_time_than_their_callers_give_them(hub: Hub) -> None:
    client = hub.client()

    @hub.server.rpc
    async def remaining(context: Context) -> float | None:
        return context.remaining

    @hub.server.rpc
    async def ask(connection: Connection, method: str) -> Any:
        return await connection.rpc.call(method)

    @client.rpc
    def inherited() -> list[float | None]:
        rpc = client.rpc
        with rpc.stream("remaining") as run:
            streamed = run.result()
        return [rpc.remaining(), rpc.call("remaining", timeout=60, retry=Retry()), streamed]

    @client.rpc
    def unbounded() -> float | None:
        with no_deadline():
            found: float | None = client.rpc.remaining()
        return found

    with client:
        found = client.rpc.call("ask", {"method": "inherited"}, timeout=8)
        assert len(found) == 3 and all(0 < one <= 8 for one in found)
        assert client.rpc.call("ask", {"method": "unbounded"}, timeout=8) > 8


def test_handlers_on_the_loop_are_refused_and_may_await(hub: Hub) -> None:
    client = hub.client()
    refusals: queue.Queue[str] = queue.Queue()

    def attempt(function: Callable[[], Any]) -> None:
        try:
            function()
        except RuntimeError as error:
            refusals.put(str(error))

    @client.rpc
    async def asynchronous() -> int:
        for function in (client.ping, client.disconnect, client.wait_closed, client.connect):
            attempt(function)
        result: int = await client.connection.rpc.call("add", [1, 2])
        return result

    @client.rpc(thread=False)
    def inline() -> int:
        attempt(client.ping)
        assert "call" in dir(client.rpc)  # completion does not ask the server here
        return 4

    with client:
        assert client.rpc.call_back(method="asynchronous") == 3
        assert client.rpc.call_back(method="inline") == 4
        assert client.rpc.add(a=1, b=2) == 3
    texts = [refusals.get_nowait() for _ in range(5)]
    assert refusals.empty()
    assert all("plain def" in text for text in texts)


def test_hooks_get_the_blocking_client_and_may_use_it(hub: Hub) -> None:
    client = hub.client()
    seen: queue.Queue[object] = queue.Queue()

    @client.on_connect
    def connected(it: blocking.Client) -> None:
        seen.put((it is client, it.rpc.add(a=1, b=2)))

    @client.on_disconnect()
    def disconnected(it: blocking.Client, reason: ConnectionClosed) -> None:
        seen.put(reason.code)

    @client.on_reconnect
    async def reconnected(it: blocking.Client) -> None:
        seen.put(await it.connection.rpc.call("add", [3, 4]))

    with client:
        assert seen.get(timeout=TIMEOUT) == (True, 3)
        client.send("close", 1001)
        assert seen.get(timeout=TIMEOUT) == 1001
        assert seen.get(timeout=TIMEOUT) == 7
        assert client.status is Status.READY
    assert seen.get(timeout=TIMEOUT) == 1000


def test_a_hook_that_is_async_below_a_decorator_is_awaited(hub: Hub) -> None:
    client = hub.client()
    seen: list[Any] = []

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    class Hook:
        async def __call__(self, it: blocking.Client) -> None:
            seen.append(await it.connection.rpc.call("add", {"a": 1, "b": 2}))

    async def connected(it: blocking.Client) -> None:
        seen.append(threading.current_thread().name)

    client.on_connect(Hook())
    client.on_connect(logged(connected))
    with client:
        assert seen == [3, "conduit-client"]


def test_a_hook_may_disconnect(hub: Hub) -> None:
    client = hub.client(connect_timeout=600)  # how long the end would wait for the hook
    left = threading.Event()

    @client.on_disconnect
    def disconnected(it: blocking.Client, reason: ConnectionClosed) -> None:
        it.disconnect()
        left.set()

    client.connect()
    client.send("close", 4403)
    assert left.wait(TIMEOUT)
    client.wait_closed(TIMEOUT)
    assert client.status is Status.CLOSED


@pytest.mark.parametrize("on_loop", [False, True])
def test_a_hook_cannot_connect_a_client_that_waits_for_it(hub: Hub, on_loop: bool) -> None:
    client = hub.client()
    seen: queue.Queue[Exception] = queue.Queue()

    def connect(it: blocking.Client, reason: ConnectionClosed) -> None:
        try:
            it.connect()
        except RuntimeError as exc:
            seen.put(exc)

    async def connect_on_loop(it: blocking.Client, reason: ConnectionClosed) -> None:
        connect(it, reason)

    client.on_disconnect(connect_on_loop if on_loop else connect)
    for _ in range(2):
        client.connect()
        leaving = threading.Thread(target=client.disconnect, daemon=True)
        leaving.start()
        assert "waits for this handler or hook to end" in str(seen.get(timeout=TIMEOUT))
        leaving.join(TIMEOUT)
        assert not leaving.is_alive()


@pytest.mark.parametrize("on_loop", [False, True])
def test_a_hook_cannot_connect_while_another_thread_waits_to(hub: Hub, on_loop: bool) -> None:
    client = hub.client(connect_timeout=600)  # how long the end would wait for the hook
    begun, go_on = threading.Event(), threading.Event()
    seen: queue.Queue[Exception] = queue.Queue()

    def connect(it: blocking.Client, reason: ConnectionClosed) -> None:
        begun.set()
        go_on.wait(TIMEOUT)
        try:
            it.connect()
        except RuntimeError as exc:
            seen.put(exc)

    async def connect_on_loop(it: blocking.Client, reason: ConnectionClosed) -> None:
        connect(it, reason)

    client.on_disconnect(connect_on_loop if on_loop else connect)
    client.connect()
    threading.Thread(target=client.disconnect, daemon=True).start()
    assert begun.wait(TIMEOUT)
    again = threading.Thread(target=client.connect, daemon=True)
    again.start()
    again.join(0.1)  # it waits for the hook, and nobody else may come in between
    go_on.set()
    assert "waits for this handler or hook to end" in str(seen.get(timeout=TIMEOUT))
    again.join(TIMEOUT)
    assert client.status is Status.READY
    client.disconnect()


def test_a_hook_may_disconnect_while_connecting(hub: Hub) -> None:
    client = hub.client()

    @client.on_connect
    def connected(it: blocking.Client) -> None:
        it.disconnect()

    with pytest.raises(ConnectionClosed):
        client.connect()
    with pytest.raises(ConnectionClosed):
        client.ping()


def test_tasks_that_handlers_leave_behind_end_with_the_client(hub: Hub) -> None:
    client = hub.client()
    tasks = []

    @client.rpc
    async def leave_behind() -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(600)))

    with client:
        client.rpc.call_back(method="leave_behind")
    assert tasks[0].cancelled()


@pytest.mark.parametrize("where", ["in_thread", "on_loop", "at_once"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_handler_that_exits_ends_the_client_and_leaves_nobody_waiting(
    hub: Hub, where: str, loop: str
) -> None:
    client = hub.client(loop_factory=importlib.import_module(loop).new_event_loop)
    ended: queue.Queue[BaseException] = queue.Queue()

    @client.rpc
    def in_thread() -> None:
        sys.exit("as told")

    @client.rpc
    async def on_loop() -> None:
        await asyncio.sleep(0)
        sys.exit("as told")

    @client.rpc
    async def at_once() -> None:
        sys.exit("as told")

    def wait() -> None:
        try:
            client.rpc.call("sleep", timeout=None)
        except ConnectionClosed as exc:
            ended.put(exc)

    for _ in range(2):  # it can be connected again
        client.connect()
        threading.Thread(target=wait, daemon=True).start()
        assert hub.heard() == "sleep begins"
        threading.Thread(target=lambda: client.send("call", where), daemon=True).start()
        assert isinstance(ended.get(timeout=TIMEOUT), ConnectionLost)
        assert {hub.heard(), hub.heard()} == {"sleep ends", "gone: 1000"}
        client.wait_closed(TIMEOUT)
        with pytest.raises(ConnectionClosed):
            client.ping()


def test_a_hook_that_exits_does_so_for_whoever_connects(hub: Hub) -> None:
    client = hub.client()
    ended: queue.Queue[BaseException] = queue.Queue()

    @client.on_connect
    def connected(it: blocking.Client) -> None:
        sys.exit("as told")

    def connect() -> None:
        try:
            client.connect()
        except SystemExit as exc:
            ended.put(exc)

    threading.Thread(target=connect, daemon=True).start()
    assert str(ended.get(timeout=TIMEOUT)) == "as told"
    assert client.status is Status.CLOSED


# Life.


def test_use_without_a_connection(hub: Hub) -> None:
    client = hub.client()
    client.disconnect()
    client.wait_closed()
    uses: list[Callable[[], Any]] = [
        client.ping,
        lambda: client.send("tell"),
        lambda: client.request("echo"),
        lambda: client.rpc.add(a=1, b=2),
        lambda: client.rpc.stream("ticks"),
        client.rpc.discover,
        lambda: client.connection,
    ]
    for use in uses:
        with pytest.raises(ConnectionClosed, match="not connected"):
            use()
    with client:
        run = client.rpc.stream("ticks")
        left = client.rpc.stream("ticks")
        left.__enter__()
    with pytest.raises(ConnectionClosed):
        run.result()
    left.__exit__()
    client.wait_closed()
    client.disconnect()
    for use in uses[:-3]:
        with pytest.raises(ConnectionClosed, match="has disconnected"):
            use()
    with client:
        assert client.rpc.add(a=1, b=2) == 3


def test_connecting_twice_changes_nothing(client: blocking.Client) -> None:
    with pytest.raises(RuntimeError, match="ready already"):
        client.connect()
    assert client.rpc.add(a=1, b=2) == 3


def test_a_connection_that_cannot_be_made(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=str(port)):
        blocking.Client(f"tcp://127.0.0.1:{port}").connect()
    client = hub.client(password="wrong")
    with pytest.raises(AuthenticationError):
        client.connect()
    assert client.status is Status.CLOSED
    assert conduit_threads() == []


def test_waiting_for_the_end(hub: Hub, client: blocking.Client) -> None:
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        client.wait_closed(0.05)
    with pytest.raises(ValueError, match="number of seconds"):
        client.wait_closed(float("nan"))
    client.send("close", 4403)
    client.wait_closed(TIMEOUT)
    assert client.status is Status.CLOSED
    client.connect()  # the server has closed for good, and the client may come back
    assert client.rpc.add(a=1, b=2) == 3


# Interfaces.


class Api(Protocol):
    def add(self, a: int, b: int) -> int: ...
    def count(self, to: int) -> Iterator[int]: ...
    def average(self, numbers: Iterator[float]) -> float: ...
    def sleep(self) -> None: ...


class Newer(Protocol):
    def add(self, a: int, b: int) -> int: ...
    def count(self, to: int) -> blocking.StreamCall[str, int]: ...
    def missing(self) -> None: ...


DIFFERENCES = [
    "Newer.count: items: int is sent, and str is taken",
    "Newer.count: result: None is sent, and int is taken",
    "Newer.missing: the peer has no method 'missing'",
]


def test_an_interface_is_plain_functions(client: blocking.Client) -> None:
    api = client.rpc.bind(Api)
    assert api.add(1, b=2) == 3
    assert list(api.count(3)) == [0, 1, 2]
    assert next(api.count(1)) == 0
    with pytest.raises(StopIteration):
        next(api.count(0))
    assert api.average(iter([1.0, 3.0])) == api.average(numbers=iter([1.0, 3.0])) == 2.0
    assert repr(api) == "<Api of a peer>"
    with pytest.raises(TypeError, match="Api.add: missing a required argument: 'b'"):
        api.add(1)  # type: ignore[call-arg]
    with pytest.raises(RPCTimeout):
        options(api, timeout=0.05).sleep()


class OddNames(Protocol):
    def odd_names(this, self: int, function: int, method: int, args: int = 0) -> list[int]: ...


def test_parameters_may_have_any_name(client: blocking.Client) -> None:
    assert client.rpc.odd_names(self=1, function=2, method=3) == [1, 2, 3, 0]
    api = client.rpc.bind(OddNames)
    assert api.odd_names(self=1, function=2, method=3, args=4) == [1, 2, 3, 4]


def test_an_interface_is_held_against_the_server(hub: Hub) -> None:
    client = hub.client()
    client.rpc.bind(Newer)
    with pytest.raises(conduit.InterfaceMismatch) as caught:
        client.connect()
    assert caught.value.differences == DIFFERENCES


def test_an_interface_that_is_bound_later_is_logged(client: blocking.Client) -> None:
    told: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = logging.handlers.QueueHandler(told)
    logging.getLogger("conduit.client").addHandler(handler)
    try:
        assert client.rpc.differences(Api) == []
        assert client.rpc.differences(Newer) == DIFFERENCES
        client.rpc.bind(Newer, check=False)
        client.rpc.bind(Newer)
        logged = [told.get(timeout=TIMEOUT).getMessage() for _ in DIFFERENCES]
        assert logged == [f"'conduit-server' does not fit: {one}" for one in DIFFERENCES]
        assert told.empty()
    finally:
        logging.getLogger("conduit.client").removeHandler(handler)


def test_interfaces_of_the_event_loop_are_refused(client: blocking.Client) -> None:
    class Wrong(Protocol):
        async def add(self, a: int, b: int) -> int: ...

    with pytest.raises(TypeError, match=r"a blocking client waits by itself; .* `def add\(...\)`"):
        client.rpc.bind(Wrong)
    with pytest.raises(TypeError, match="an interface is a class"):
        client.rpc.bind(5)  # type: ignore[arg-type]


# Completion and help.


def asked(caplog: pytest.LogCaptureFixture) -> int:
    """Return how often the server was asked what it offers."""
    return sum("> RPC_REQUEST" in text and "discover" in text for text in caplog.messages)


def test_completion_asks_once_and_calls_never(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "conduit.wire")
    with hub.client() as client:
        method = client.rpc.add
        assert method(a=1, b=2) == 3
        assert repr(method) == "<method 'add' of the server>"
        with pytest.raises(AttributeError, match="underscore"):
            str(client.rpc._repr_html_)
        assert asked(caplog) == 0
        assert {"add", "ticks", "call", "stream", "discover"} <= set(dir(client.rpc))
        assert "stock.count" not in dir(client.rpc)
        assert client.rpc.count.__doc__
        assert asked(caplog) == 1


def test_help_comes_from_discovery(client: blocking.Client) -> None:
    assert str(inspect.signature(client.rpc.add)) == "(*, a: int, b: int) -> int"
    assert inspect.getdoc(client.rpc.add) == "add(a: int, b: int) -> int\n\nAdd two numbers."
    text = pydoc.plain(pydoc.render_doc(client.rpc.add))
    assert "add(a: int, b: int) -> int" in text
    assert "Add two numbers." in text
    assert "rpc.stream('count', ...)" in str(client.rpc.count.__doc__)
    assert str(inspect.signature(client.rpc.average)) == "(*, numbers: Iterator[float]) -> float"
    stock = getattr(client.rpc, "stock.count")
    assert str(inspect.signature(stock)) == "(*, article: str, minimum: int = 3) -> int"


@pytest.mark.parametrize("told", [None, 5, [5]])
def test_help_of_a_server_that_tells_nothing(
    hub: Hub, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conduit.rpc.router._Discovery.start", lambda *_: told)
    with hub.client() as client:
        assert "call" in dir(client.rpc)
        assert "has told nothing" in str(client.rpc.add.__doc__)


def test_help_tells_of_marks_and_examples(hub: Hub) -> None:
    @hub.server.rpc(deprecated="use Add", examples=[{"a": 1}])
    async def old(a: int) -> None: ...

    with hub.client() as client:
        text = str(client.rpc.old.__doc__)
    assert text == "old(a: int) -> None\n\nDeprecated: use Add\n\nFor example:\n    {'a': 1}"


def test_help_without_an_answer(hub: Hub) -> None:
    client = hub.client()
    assert "call" in dir(client.rpc)
    assert "nothing" in str(client.rpc.add.__doc__)
    assert str(inspect.signature(client.rpc.add)) == "(**parameters: Any) -> Any"


def test_another_connection_is_asked_anew(hub: Hub) -> None:
    client = hub.client()
    with client:
        assert "later" not in dir(client.rpc)

    @hub.server.rpc
    async def later() -> None:
        """Come later."""

    with client:
        assert "later" in dir(client.rpc)


# Processes.


START = """
    import contextlib, os, queue, signal, sys, threading
    import conduit
    from conduit import Limits, blocking
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # to be waited for
    client = blocking.Client(sys.argv[1], password=sys.argv[2], limits=Limits(min_iterations=4096))
"""


@contextlib.contextmanager
def program(text: str, *arguments: str, folder: Path) -> Iterator[Program]:
    """Run a program that has a client, and check that it ends by itself and without complaint."""
    (folder / "program.py").write_text(textwrap.dedent(START) + textwrap.dedent(text))
    with Program("program.py", *arguments, cwd=folder) as running:
        yield running
        assert running.finish() == 0, running.error_output
        assert running.error_output == ""


def test_ctrl_c_cancels_a_call_and_leaves_the_client(hub: Hub, tmp_path: Path) -> None:
    text = """
        with client:
            try:
                client.rpc.sleep()
            except KeyboardInterrupt:
                print("interrupted:", client.rpc.add(a=1, b=2), flush=True)
            signal.sigwait({signal.SIGUSR1})
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path) as running:
        assert hub.heard() == "sleep begins"
        running.signal(signal.SIGINT)
        running.wait_for("interrupted: 3")
        assert hub.heard() == "sleep ends"
        running.signal(signal.SIGUSR1)
        assert hub.heard() == "gone: 1000"


@pytest.mark.parametrize(
    "wait",
    [
        """
        with client.rpc.stream("silence") as run:
            next(iter(run))
        """,
        """
        with client.rpc.stream("silence") as run:
            run.result()
        """,
        """next(iter(client.rpc.stream("silence")))""",
        """client.rpc.stream("silence").result()""",
    ],
)
def test_ctrl_c_ends_a_stream(hub: Hub, tmp_path: Path, wait: str) -> None:
    text = f"""
        def wait():
{textwrap.indent(textwrap.dedent(wait), " " * 12)}
        with client:
            try:
                wait()
            except KeyboardInterrupt:
                print("interrupted:", client.rpc.add(a=1, b=2), flush=True)
            signal.sigwait({{signal.SIGUSR1}})
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path) as running:
        assert hub.heard() == "silence begins"
        running.signal(signal.SIGINT)
        running.wait_for("interrupted: 3")
        assert hub.heard() == "silence ends"
        running.signal(signal.SIGUSR1)


def test_ctrl_c_leaves_a_client_unconnected(tmp_path: Path) -> None:
    text = """
        try:
            client.connect()
        except KeyboardInterrupt:
            names = [one.name for one in threading.enumerate()]
            print(client.status.value, "conduit-client" in names, flush=True)
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT)
        url = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with program(text, url, PASSWORD, folder=tmp_path) as running:
            accepted, _ = silent.accept()
            with accepted:
                assert accepted.recv(1)  # the login has begun
                running.signal(signal.SIGINT)
                running.wait_for("closed False")


def test_a_process_that_forgets_to_disconnect_ends_and_says_goodbye(
    hub: Hub, tmp_path: Path
) -> None:
    text = """
        client.connect()
        run = client.rpc.stream("average", [iter(queue.Queue().get, None)]).__enter__()
        ticks = iter(client.rpc.stream("ticks"))
        print("tick", next(ticks), client.rpc.add(a=1, b=2))
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path) as running:
        running.wait_for("tick 0 3")
        told = {hub.heard(), hub.heard(), hub.heard()}
        assert told == {"ticks begins", "ticks ends", "gone: 1000"}


def test_a_process_ends_while_a_thread_waits(hub: Hub, tmp_path: Path) -> None:
    text = """
        client.connect()
        started = threading.Event()

        @client.rpc
        def begun():
            started.set()

        def work():
            with contextlib.suppress(conduit.ConnectionClosed):
                client.rpc.call("call_back_and_sleep", timeout=None)

        threading.Thread(target=work, daemon=True).start()
        started.wait()
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path):
        assert [hub.heard(), hub.heard(), hub.heard()] == [
            "sleep begins",
            "sleep ends",
            "gone: 1000",
        ]


def test_a_process_ends_although_the_loop_of_its_client_is_stuck(hub: Hub, tmp_path: Path) -> None:
    text = """
        import time

        @client.rpc
        async def begun():
            print("stuck", flush=True)
            stuck.set()
            time.sleep(600)

        def work():
            with contextlib.suppress(conduit.ConnectionClosed):
                client.rpc.call("call_back_and_sleep", timeout=None)

        client.connect()
        stuck = threading.Event()
        threading.Thread(target=work, daemon=True).start()
        stuck.wait()
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path) as running:
        running.wait_for("stuck")


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_fork_is_refused_and_its_parent_goes_on(hub: Hub, tmp_path: Path) -> None:
    text = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork itself, from Python 3.12 on
        client.connect()
        child = os.fork()
        if not child:
            for use in (client.ping, client.connect, client.disconnect):
                try:
                    use()
                except RuntimeError as error:
                    print(error, flush=True)
            sys.exit()  # runs what is registered for the end of the process
        assert os.waitpid(child, 0)[1] == 0
        print("parent:", client.rpc.add(a=1, b=2), flush=True)
        client.disconnect()
    """
    with program(text, hub.url, PASSWORD, folder=tmp_path) as running:
        for _ in range(3):
            running.wait_for("connected in process .* make another client there")
        running.wait_for("parent: 3")
        assert hub.heard() == "gone: 1000"


def test_importing_conduit_is_enough() -> None:
    code = "import conduit; print(conduit.blocking.Client.__name__)"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert shown.stdout.strip() == "Client"
