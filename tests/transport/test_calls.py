"""The calls that a side makes: ids, slots, deadlines, cancellation, and the end of it all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import MappingProxyType
from typing import Any

import msgpack
import pytest
from pydantic import BaseModel

from conduit.exceptions import (
    CallCancelled,
    ConnectionClosed,
    ConnectionLost,
    InvalidParams,
    Overloaded,
    PayloadTooLarge,
    RPCTimeout,
    Unavailable,
)
from conduit.protocol.frames import REPLY, SEQUENCED, CloseCode, FrameType
from conduit.transport.answers import Response
from conduit.transport.connection import Connection
from tests.transport.pair import (
    MemoryLink,
    Pair,
    Side,
    SocketPair,
    settings,
    turns,
    until,
    within,
)


class Gate:
    """A method `hold` that ends when a test says so, and knows who came in which order."""

    def __init__(self, side: Side) -> None:
        self.came: list[Any] = []
        self.cancelled: list[Any] = []
        self.ended: list[Any] = []
        self._open = asyncio.Event()
        self._gates: dict[Any, asyncio.Event] = {}

        @side.rpc
        async def hold(name: Any = None) -> Any:
            self.came.append(name)
            gate = self._gates.setdefault(name, asyncio.Event())
            try:
                if not self._open.is_set():
                    await gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            self.ended.append(name)
            return name

    def open(self, name: Any = None) -> None:
        """Let one go on, or everybody who is there and who will come."""
        if name is None:
            self._open.set()
            for gate in self._gates.values():
                gate.set()
        else:
            self._gates.setdefault(name, asyncio.Event()).set()


def bodies(side: Side, type: FrameType) -> list[Any]:
    """Return what a side has written in frames of a type."""
    return [frame.body for frame in side.link.sent(type)]


# Answers


async def test_answers_find_their_calls_in_any_order() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        calls = [pair.client.start("hold", [number]) for number in range(20)]
        await until(lambda: len(gate.came) == 20)
        for number in reversed(range(20)):
            gate.open(number)
            assert await within(calls[number]) == number
        assert len(pair.server.link.sent(FrameType.RPC_RESPONSE)) == 20


async def test_both_sides_number_their_calls_upwards_one_odd_one_even() -> None:
    async with Pair() as pair:
        for side, other in ((pair.client, pair.server), (pair.server, pair.client)):
            gate = Gate(other)
            gate.open()
            for _ in range(3):
                await within(side.call("hold"))
        client = [frame.id for frame in pair.client.link.sent(FrameType.RPC_REQUEST)]
        server = [frame.id for frame in pair.server.link.sent(FrameType.RPC_REQUEST)]
        assert (client, server) == ([1, 3, 5], [2, 4, 6])


@pytest.mark.parametrize("pair_of", [Pair, SocketPair])
async def test_512_tasks_share_256_slots(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        busiest = 0

        @pair.server.rpc
        async def double(number: int) -> int:
            nonlocal busiest
            busiest = max(busiest, pair.server.connection.running + 1)
            await asyncio.sleep(0)
            return 2 * number

        calls = [pair.client.call("double", [number]) for number in range(512)]
        assert await within(asyncio.gather(*calls)) == [2 * number for number in range(512)]
        assert 200 < busiest <= 256


@pytest.mark.parametrize(
    "pair_of, value",
    [(Pair, bytes(1_048_000)), (SocketPair, bytes(1_048_000)), (SocketPair, "x" * 1_048_000)],
    ids=["memory, bytes", "sockets, bytes", "sockets, text"],
)
async def test_two_peers_that_call_each_other_through_a_full_pipe_do_not_deadlock(
    pair_of: type[Pair], value: Any
) -> None:
    async with pair_of() as pair:
        for side in (pair.client, pair.server):

            @side.rpc(thread=False)
            def echo(value: Any) -> Any:
                return value

        sides = [pair.client, pair.server] * 40
        answers = await within(asyncio.gather(*(side.call("echo", [value]) for side in sides)), 20)
        assert len(answers) == 80 and all(answer == value for answer in answers)


@pytest.mark.parametrize("size", [1, 7, 33, 1000])
async def test_answers_that_arrive_in_pieces_are_answers(size: int) -> None:
    async with Pair() as pair:
        pair.client.link.split = pair.server.link.split = size
        gate = Gate(pair.server)
        gate.open()
        calls = [pair.client.call("hold", [number]) for number in range(10)]
        assert await within(asyncio.gather(*calls)) == list(range(10))


async def test_a_long_way_delays_and_loses_nothing() -> None:
    async with Pair() as pair:
        pair.client.link.delay = pair.server.link.delay = 0.01
        gate = Gate(pair.server)
        gate.open()
        loop = asyncio.get_running_loop()
        started = loop.time()
        calls = [pair.client.call("hold", [number]) for number in range(10)]
        assert await within(asyncio.gather(*calls)) == list(range(10))
        assert loop.time() - started >= 0.02 - 0.002  # there and back; uvloop's clock has 1 ms


async def test_an_answer_with_a_map_that_has_other_keys_than_text_fails_its_call() -> None:
    async with Pair() as pair:
        Gate(pair.server)
        call = pair.client.start("hold")
        await turns()
        pair.server.write(FrameType.RPC_RESPONSE, 1, [{(1,): 2}])
        with pytest.raises(InvalidParams, match="keys"):
            await within(call)
        assert not pair.client.connection.closed


@pytest.mark.parametrize(
    "type, body",
    [
        (FrameType.RPC_RESPONSE, 5),
        (FrameType.RPC_RESPONSE, []),
        (FrameType.RPC_RESPONSE, [1, {}, 3]),
        (FrameType.RPC_ERROR, 5),
        (FrameType.RPC_ERROR, ["code", "message"]),
        (FrameType.RPC_ERROR, [1, "message", {}]),
        (FrameType.RPC_ERROR, ["code", 2, {}]),
        (FrameType.RPC_ERROR, ["code", "message", []]),
        (FrameType.MESSAGE, 5),
        (FrameType.MESSAGE, ["name"]),
        (FrameType.MESSAGE, ["name", 1, 2]),
    ],
)
async def test_an_answer_of_another_shape_closes(type: FrameType, body: Any) -> None:
    async with Pair() as pair:
        Gate(pair.server)

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None:
            await asyncio.Event().wait()

        if type == FrameType.MESSAGE:
            flags, waiting = SEQUENCED | REPLY, pair.client.connection.request("news")
        else:
            flags, waiting = SEQUENCED, pair.client.call("hold")
        task = asyncio.ensure_future(waiting)
        await turns()
        pair.server.write(type, 1, body, flags)
        with pytest.raises(ConnectionLost):
            await within(task, 1)
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


async def test_headers_are_there_for_who_asks() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def tagged() -> Any:
            return Response(5, {"trace": "abc"})

        assert await within(pair.client.call("tagged")) == 5
        answer = await within(pair.client.call("tagged", returns=Response))
        assert (answer.value, answer.headers) == (5, {"trace": "abc"})


# What is sent


class Point(BaseModel):
    x: int
    y: int = 0


@pytest.mark.parametrize(
    "args, expected",
    [
        (None, {}),
        ({}, {}),
        ({"x": 1}, {"x": 1}),
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (Point(x=1), {"x": 1, "y": 0}),
        (MappingProxyType({"x": 1}), {"x": 1}),
        ({"point": Point(x=1)}, {"point": {"x": 1, "y": 0}}),
    ],
    ids=repr,
)
async def test_arguments_are_a_map_or_an_array(args: Any, expected: Any) -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        gate.open()
        with contextlib.suppress(InvalidParams):
            await within(pair.client.call("hold", args))
        assert bodies(pair.client, FrameType.RPC_REQUEST) == [["hold", expected]]


@pytest.mark.parametrize("args", ["text", 5, {1, 2}, b"bytes", object()], ids=type)
async def test_other_arguments_are_refused(args: Any) -> None:
    async with Pair() as pair:
        with pytest.raises(TypeError, match=type(args).__name__):
            await within(pair.client.call("hold", args))
        assert pair.client.link.writes == []


@pytest.mark.parametrize("name", ["", "x" * 257, "ä" * 129, 5, None])
async def test_a_name_that_cannot_be_sent_is_refused(name: Any) -> None:
    async with Pair() as pair:
        with pytest.raises(ValueError, match="1 to 256 bytes"):
            await within(pair.client.call(name))
        assert pair.client.link.writes == []


async def test_a_name_of_256_bytes_is_sent() -> None:
    async with Pair() as pair:
        pair.server.rpc("ä" * 128)(Gate(pair.server).open)
        assert await within(pair.client.call("ä" * 128, {"name": "anybody"})) is None


async def test_more_names_than_are_remembered_work() -> None:
    async with Pair() as pair:

        @pair.server.rpc("last")
        async def last() -> str:
            return "here"

        for number in range(1100):
            assert not pair.client.connection.closed
            call = pair.client.start(f"nobody {number}")
            await turns(1)
            call.cancel()
        assert await within(pair.client.call("last")) == "here"


async def test_the_time_that_a_call_has_is_told_where_it_is_not_the_usual_one() -> None:
    async with Pair(client=settings(timeout=2.0)) as pair:
        gate = Gate(pair.server)
        gate.open()
        for timeout in (2.0, 5, 0.25, None):
            await within(pair.client.call("hold", timeout=timeout))
        await within(pair.client.call("hold"))
        sent = [body[2:] for body in bodies(pair.client, FrameType.RPC_REQUEST)]
        assert sent == [[], [{"ttl": 5000}], [{"ttl": 250}], [{"ttl": 0}], []]


@pytest.mark.parametrize("timeout", [30.0, 5.0], ids=["usual", "other"])
async def test_large_arguments_arrive_as_they_were(timeout: float) -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def look(first: int, body: bytes) -> list[int]:
            return [first, len(body), sum(body[:10]), body[-1]]

        body = bytes(range(1, 201)) * 1000
        for _ in range(3):  # the second time it is known that they are large, and they go uncopied
            arguments = {"first": 7, "body": body}
            answer = await within(pair.client.call("look", arguments, timeout=timeout))
            assert answer == [7, 200_000, 55, 200]
        assert await within(pair.client.call("look", {"first": 1, "body": b"\x05"})) == [1, 1, 5, 5]
        requests = bodies(pair.client, FrameType.RPC_REQUEST)
        assert [body[1]["first"] for body in requests] == [7, 7, 7, 1]


async def test_arguments_may_have_exactly_the_size_that_the_peer_accepts() -> None:
    async with Pair(server=settings(frame_max=10_000)) as pair:

        @pair.server.rpc
        async def take(body: bytes) -> int:
            return len(body)

        most = 10_000 - len(msgpack.packb([bytes(1000)])) + 1000
        assert await within(pair.client.call("take", [bytes(most)])) == most
        with pytest.raises(PayloadTooLarge, match=r"10001 bytes.*10000.*max_payload"):
            await within(pair.client.call("take", [bytes(most + 1)]))
        assert len(pair.client.link.sent(FrameType.RPC_REQUEST)) == 1


# Deadlines


async def test_each_call_ends_at_its_own_deadline() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        ended: list[float] = []
        # Both sides keep a deadline. On a busy machine the peer may be heard before the own timer.
        heard = 0

        async def call(seconds: float) -> None:
            nonlocal heard
            text = rf"'hold' (within {seconds} s|did not end in time)"
            with pytest.raises(RPCTimeout, match=text) as caught:
                await pair.client.call("hold", [seconds], timeout=seconds)
            heard += "did not end" in str(caught.value)
            ended.append(seconds)

        await within(asyncio.gather(*map(call, (0.15, 0.01, 0.08))))
        assert ended == [0.01, 0.08, 0.15]
        await until(lambda: len(gate.cancelled) == 3)
        assert len(pair.client.link.sent(FrameType.CANCEL)) == 3 - heard


async def test_the_usual_deadline_is_that_of_the_side() -> None:
    async with Pair(client=settings(timeout=0.01)) as pair:
        gate = Gate(pair.server)
        with pytest.raises(RPCTimeout):
            await within(pair.client.call("hold"))
        patient = pair.client.start("hold", ["patient"], timeout=None)
        await until(lambda: "patient" in gate.came)
        gate.open()
        assert await within(patient) == "patient"


async def test_a_call_without_time_ends_at_once() -> None:
    async with Pair() as pair:
        Gate(pair.server)
        for timeout in (0, -5):
            with pytest.raises(RPCTimeout):
                await within(pair.client.call("hold", timeout=timeout))


async def test_calls_of_both_directions_share_the_timer() -> None:
    async with Pair() as pair:
        gates = Gate(pair.server), Gate(pair.client)

        @pair.server.rpc(timeout=0.02)
        async def short() -> None:
            await asyncio.Event().wait()

        mine = pair.client.start("hold", timeout=0.05)
        theirs = pair.server.start("hold", timeout=0.01)
        served = pair.client.start("short")
        for call in (theirs, served, mine):
            with pytest.raises(RPCTimeout):
                await within(call)
        await until(lambda: all(gate.cancelled for gate in gates))


async def test_what_comes_after_the_deadline_is_counted_and_harms_nothing() -> None:
    async with Pair() as pair:
        release = asyncio.Event()

        @pair.server.rpc
        async def stubborn() -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
            await release.wait()
            return "too late"

        with pytest.raises(RPCTimeout):
            await within(pair.client.call("stubborn", timeout=0.01))
        call = pair.client.start("stubborn")
        await turns()
        call.cancel()
        await turns()
        release.set()
        await until(lambda: len(pair.server.link.sent(FrameType.RPC_ERROR)) == 2)
        await turns()
        # Nothing but the counter tells that they came at all.
        assert pair.client.connection._calls.late == 2
        assert not pair.client.connection.closed


async def test_an_answer_to_nothing_is_counted_and_harms_nothing() -> None:
    async with Pair() as pair:
        pair.server.write(FrameType.RPC_RESPONSE, 99, ["?"])
        pair.server.write(FrameType.RPC_ERROR, 97, ["unknown", "?", {}])
        pair.server.write(FrameType.MESSAGE, 95, ["name", "?"], SEQUENCED | REPLY)
        await turns()
        assert pair.client.connection._calls.late == 3  # as above
        assert not pair.client.connection.closed


# Cancellation


async def test_cancelling_a_call_tells_the_peer_once() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        call = pair.client.start("hold", ["me"])
        await until(lambda: gate.came)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: gate.cancelled)
        await turns()
        (cancel,) = pair.client.link.sent(FrameType.CANCEL)
        (request,) = pair.client.link.sent(FrameType.RPC_REQUEST)
        (answer,) = pair.server.link.sent(FrameType.RPC_ERROR)
        assert cancel.id == request.id == answer.id
        assert answer.body[0] == CallCancelled.code
        assert pair.server.connection.running == 0


async def test_a_slot_is_free_when_the_handler_has_ended_and_not_before() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        release = asyncio.Event()

        @pair.server.rpc
        async def stubborn() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()
            await release.wait()

        gate = Gate(pair.server)
        gate.open()
        first = pair.client.start("stubborn")
        await until(lambda: pair.server.connection.running)
        first.cancel()
        second = pair.client.start("hold", ["second"])
        await turns()
        assert gate.came == [] and not second.done()
        release.set()
        assert await within(second) == "second"


async def test_a_call_that_was_answered_in_the_same_moment_is_not_cancelled() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        call = pair.client.start("hold", ["me"])
        await until(lambda: gate.came)
        pair.server.link.stall()
        gate.open()
        await until(lambda: gate.ended)
        await turns()
        pair.server.link.flow()
        while not pair.client.link.peer.unsent() == 0:
            await turns(1)
        call.cancel()  # its answer has been read, but it has not run yet
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await turns()
        assert pair.client.link.sent(FrameType.CANCEL) == []


# The line


@contextlib.asynccontextmanager
async def full_house(count: int = 1) -> AsyncIterator[tuple[Pair, Gate, list[asyncio.Future[Any]]]]:
    """Give a pair whose server serves `count` calls, all of which are running."""
    async with Pair(server=settings(calls=count)) as pair:
        gate = Gate(pair.server)
        inside = [pair.client.start("hold", [f"inside {number}"]) for number in range(count)]
        await until(lambda: len(gate.came) == count)
        gate.came.clear()
        yield pair, gate, inside
        gate.open()
        await within(asyncio.gather(*inside, return_exceptions=True))


async def answer_arrives(pair: Pair, gate: Gate, then: Callable[[], object]) -> None:
    """Let the first call be answered, and do something before the next in line has run."""
    pair.server.link.stall()
    gate.open("inside 0")
    await until(lambda: pair.server.link.sent(FrameType.RPC_RESPONSE))
    pair.server.link.flow()
    asyncio.get_running_loop().call_soon(then)


async def test_first_come_first_served() -> None:
    async with full_house() as (pair, gate, _):
        calls = [pair.client.start("hold", [number]) for number in range(50)]
        await turns()
        assert gate.came == []
        gate.open()
        assert await within(asyncio.gather(*calls)) == list(range(50))
        assert gate.came == list(range(50))


async def test_one_that_comes_when_there_is_room_does_not_overtake_the_line() -> None:
    async with full_house() as (pair, gate, _):
        waiting = pair.client.start("hold", ["waiting"])
        late: list[asyncio.Future[Any]] = []
        await turns()
        await answer_arrives(pair, gate, lambda: late.append(pair.client.start("hold", ["late"])))
        gate.open()
        await within(waiting)
        await within(late[0])
        assert gate.came == ["waiting", "late"]


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_one_that_leaves_the_line_changes_nothing_for_the_others(how: str) -> None:
    async with full_house() as (pair, gate, _):
        calls = []
        for number in range(5):
            leaves = how == "deadline" and number == 2
            calls.append(pair.client.start("hold", [number], timeout=0.01 if leaves else 30))
            await turns(2)
        if how == "cancelled":
            calls[2].cancel()
        await within(asyncio.wait({calls[2]}))
        await turns()
        gate.open()
        await within(asyncio.wait(calls))
        assert gate.came == [0, 1, 3, 4]
        assert len(pair.client.link.sent(FrameType.RPC_REQUEST)) == 5
        assert pair.client.link.sent(FrameType.CANCEL) == []
        if how == "cancelled":
            assert calls[2].cancelled()
        else:
            error = calls[2].exception()
            assert isinstance(error, RPCTimeout)
            assert error.retryable and error.details["executed"] is False


async def test_one_that_is_cancelled_when_its_turn_comes_passes_it_on() -> None:
    async with full_house() as (pair, gate, _):
        calls = [pair.client.start("hold", [number]) for number in range(3)]
        await turns()
        await answer_arrives(pair, gate, calls[0].cancel)
        gate.open()
        assert await within(asyncio.gather(*calls[1:])) == [1, 2]
        assert calls[0].cancelled() and gate.came == [1, 2]


async def test_a_full_buffer_when_a_turn_comes_does_not_change_the_order() -> None:
    async with full_house() as (pair, gate, inside):
        calls = [pair.client.start("hold", [number]) for number in range(4)]
        await turns()
        await answer_arrives(pair, gate, pair.client.connection.pause_writing)  # as its link would
        await within(inside[0])
        await turns()
        assert gate.came == []
        gate.open()
        pair.client.connection.resume_writing()
        await within(asyncio.wait(calls))
        assert gate.came == [0, 1, 2, 3]


async def test_a_turn_that_comes_with_the_end_of_the_connection_is_the_end() -> None:
    async with full_house() as (pair, gate, inside):
        waiting = pair.client.start("hold", ["waiting"], timeout=None)
        await turns()
        pair.server.link.stall()
        gate.open("inside 0")
        await until(lambda: pair.server.link.sent(FrameType.RPC_RESPONSE))
        closing = asyncio.ensure_future(pair.server.connection.close(4403, "that is all"))
        await turns()
        pair.server.link.flow()  # the answer, which gives the slot, and CLOSE arrive together
        assert await within(inside[0]) == "inside 0"
        with pytest.raises(ConnectionClosed, match="that is all"):
            await within(waiting, 1)
        await within(closing)


async def test_inside_a_handler_nobody_waits_in_line() -> None:
    async with full_house(2) as (pair, gate, _):
        refused: list[Overloaded] = []

        @pair.client.rpc
        async def nested(connection: Connection) -> str:
            try:
                await connection.rpc.call("hold", ["nested"])
            except Overloaded as exc:
                refused.append(exc)
                await asyncio.sleep(0)
                with pytest.raises(Overloaded):
                    await connection.rpc.call("hold", ["nested"])
            return "went on"

        assert await within(pair.server.call("nested")) == "went on"
        assert "2 calls are in flight" in str(refused[0]) and "'hold'" in str(refused[0])
        assert refused[0].retryable and refused[0].details["executed"] is False
        assert gate.came == []


async def test_inside_a_handler_a_call_is_made_while_there_are_slots() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        gate.open()

        @pair.client.rpc
        async def nested(connection: Connection) -> Any:
            return await connection.rpc.call("hold", ["nested"])

        assert await within(pair.server.call("nested")) == "nested"


async def test_without_backpressure_nobody_waits_in_line() -> None:
    async with Pair(client=settings(backpressure=False), server=settings(calls=1)) as pair:
        gate = Gate(pair.server)
        inside = pair.client.start("hold")
        await until(lambda: gate.came)
        with pytest.raises(Overloaded, match="the peer serves 1"):
            await within(pair.client.call("hold"))
        gate.open()
        await within(inside)
        await within(pair.client.call("hold"))


async def test_message_requests_take_no_slot() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        done = asyncio.Event()
        gate = Gate(pair.server)
        gate.open()

        @pair.server.on("slow")
        async def slow(connection: Connection, message: Any) -> str:
            await done.wait()
            return "answered"

        request = asyncio.ensure_future(pair.client.connection.request("slow"))
        await turns()
        try:
            assert await within(pair.client.call("hold", ["a call"]), 1) == "a call"
        finally:
            done.set()
            assert await within(request) == "answered"


async def test_calls_wait_while_the_link_is_full_and_go_on_when_it_is_not() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        gate.open()
        pair.client.connection.pause_writing()
        calls = [pair.client.start("hold", [number]) for number in range(5)]
        await turns()
        assert pair.client.link.writes == []
        pair.client.connection.resume_writing()
        assert await within(asyncio.gather(*calls)) == list(range(5))


async def test_calls_wait_for_the_end_of_the_login() -> None:
    pair = Pair()
    Gate(pair.client).open()
    calls = [pair.server.start("hold", [number]) for number in range(3)]
    request = asyncio.ensure_future(pair.server.connection.request("double", 4))

    @pair.client.on("double")
    async def double(message: int) -> int:
        return 2 * message

    late = pair.server.start("hold", timeout=0.01)
    with pytest.raises(RPCTimeout, match=r"'hold' waited 0\.01 s for the login to end"):
        await within(late)
    async with pair:
        assert await within(asyncio.gather(*calls)) == [0, 1, 2]
        assert await within(request) == 8


async def test_requests_that_waited_for_the_login_stand_in_no_line_behind_calls() -> None:
    pair = Pair(client=settings(calls=1))
    gate = Gate(pair.client)
    calls = [pair.server.start("hold", [number]) for number in range(3)]
    given_up = asyncio.ensure_future(pair.server.connection.request("double", 3))
    requests = [asyncio.ensure_future(pair.server.connection.request("double", n)) for n in (4, 5)]

    @pair.client.on("double")
    async def double(message: int) -> int:
        return 2 * message

    await turns()
    given_up.cancel()
    async with pair:
        assert await within(asyncio.gather(*requests)) == [8, 10]
        assert gate.came == [0]
        gate.open()
        assert await within(asyncio.gather(*calls)) == [0, 1, 2]


async def test_calls_that_waited_for_the_login_do_not_wait_for_slots_without_backpressure() -> None:
    pair = Pair(server=settings(backpressure=False), client=settings(calls=1))
    gate = Gate(pair.client)
    calls = [pair.server.start("hold", [number]) for number in range(3)]
    await turns()
    async with pair:
        for call in calls[1:]:
            with pytest.raises(Overloaded):
                await within(call)
        gate.open()
        assert await within(calls[0]) == 0


async def test_calls_that_wait_for_a_login_end_with_it() -> None:
    pair = Pair()
    calls = [pair.server.start("hold"), pair.server.start("hold")]
    calls.append(asyncio.ensure_future(pair.server.connection.request("hello")))
    await turns()  # nobody has begun to log in
    await within(pair.server.connection.abort())
    for call in calls:
        with pytest.raises(ConnectionClosed):
            await within(call)


async def test_calls_that_waited_for_the_login_of_a_peer_that_serves_none_are_refused() -> None:
    pair = Pair(client=settings(calls=0))
    calls = [pair.server.start("hold") for _ in range(3)]
    await turns()
    async with pair:
        for call in calls:
            with pytest.raises(Unavailable, match="the peer serves no calls"):
                await within(call)


# The end


async def lost(call: Any) -> ConnectionLost:
    with pytest.raises(ConnectionLost) as caught:
        await within(call)
    assert caught.value.executed is None
    assert isinstance(caught.value, ConnectionClosed) and isinstance(caught.value, ConnectionError)
    return caught.value


async def test_a_lost_link_fails_everything_at_once() -> None:
    async with full_house(2) as (pair, gate, inside):
        waiting = pair.client.start("hold", ["waiting"])
        await turns()
        pair.client.link.cut()
        errors = [await lost(call) for call in inside]
        assert len({id(error) for error in errors}) == 2
        for error in errors:
            assert "'hold'" in str(error) and "the link was reset" in str(error)
            assert error.code == 1006
            assert isinstance(error.__cause__, ConnectionResetError)
        with pytest.raises(ConnectionClosed) as caught:
            await within(waiting)
        assert not isinstance(caught.value, ConnectionLost), "it was never sent"
        with pytest.raises(ConnectionClosed) as caught:
            await within(pair.client.call("hold"))
        assert not isinstance(caught.value, ConnectionLost)
        await until(lambda: len(gate.cancelled) == 2)
        assert gate.came == []


async def test_a_peer_that_closes_fails_everything_at_once() -> None:
    async with full_house() as (pair, _, inside):
        await within(pair.server.connection.close(4403, "go away"))
        error = await lost(inside[0])
        assert (error.code, error.reason) == (4403, "go away")
        assert "go away" in str(error)


async def test_to_close_fails_ones_own_calls() -> None:
    async with full_house() as (pair, gate, inside):
        await within(pair.client.connection.close())
        error = await lost(inside[0])
        assert error.code == 1000 and "closed by this side" in str(error)
        await until(lambda: gate.cancelled)


async def test_one_that_was_cancelled_or_late_is_not_failed_again() -> None:
    async with Pair() as pair:
        gate = Gate(pair.server)
        cancelled = pair.client.start("hold")
        await until(lambda: gate.came)
        pair.server.link.stall()
        cancelled.cancel()
        with pytest.raises(RPCTimeout):
            await within(pair.client.call("hold", timeout=0.01))
        pair.client.link.cut()
        await within(pair.client.connection.wait_closed())
        assert cancelled.cancelled()


async def test_the_errors_of_one_end_are_told_apart() -> None:
    """Each waiter raises an exception of its own: a shared one would collect their tracebacks."""
    async with full_house() as (pair, _, _):
        waiting = [pair.client.start("hold") for _ in range(3)]
        await turns()
        pair.client.link.cut()
        results = await within(asyncio.gather(*waiting, return_exceptions=True))
        assert all(type(result) is ConnectionClosed for result in results)
        assert len({id(result) for result in results}) == 3


def test_the_link_of_these_tests_has_the_methods_of_a_link() -> None:
    for name in ("write", "unsent", "finish", "abort"):
        assert callable(getattr(MemoryLink, name))
