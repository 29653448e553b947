"""The handlers that run for the peer: one answer each, limits, deadlines, all kinds of errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgpack
import pytest
from pydantic import BaseModel

from conduit.exceptions import (
    CallCancelled,
    ConnectionClosed,
    InternalError,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from conduit.protocol.frames import CloseCode, FrameType
from conduit.rpc.context import Context
from conduit.transport.answers import Response
from conduit.transport.connection import Connection
from tests.transport.pair import Pair, Side, SocketPair, run, settings, turns, until, within


def answers(side: Side) -> list[tuple[int, Any]]:
    """Return the final frames that a side has written, as id and body."""
    return [
        (frame.id, frame.body)
        for frame in side.link.frames
        if frame.type in (FrameType.RPC_RESPONSE, FrameType.RPC_ERROR)
    ]


def ask(side: Side, id: int, method: str, params: Any = None, *meta: Any) -> None:
    """Write a request by hand, of which the side itself knows nothing."""
    side.write(FrameType.RPC_REQUEST, id, [method, params or {}, *meta])


# One answer each


async def test_every_request_has_exactly_one_answer_whatever_its_handler_does() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> int:
            return 1

        @pair.server.rpc
        async def slow() -> int:
            await asyncio.sleep(0.001)
            return 2

        @pair.server.rpc
        def threaded() -> int:
            return 3

        @pair.server.rpc(thread=False)
        def inline() -> int:
            return 4

        @pair.server.rpc
        async def fails() -> int:
            raise PermissionDenied("no")

        @pair.server.rpc
        async def fails_later() -> int:
            await asyncio.sleep(0)
            raise PermissionDenied("no")

        methods = ["quick", "slow", "threaded", "inline", "fails", "fails_later", "nobody"]
        calls = [pair.client.start(name) for name in methods * 3]
        results = await within(asyncio.gather(*calls, return_exceptions=True))
        kinds = [result if isinstance(result, int) else type(result) for result in results]
        denied = PermissionDenied
        assert kinds == [1, 2, 3, 4, denied, denied, MethodNotFound] * 3
        assert sorted(id for id, _ in answers(pair.server)) == list(range(1, 43, 2))


async def test_a_batch_of_requests_is_answered_in_one_write() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def double(number: int) -> int:
            return 2 * number

        calls = [pair.client.call("double", [number]) for number in range(50)]
        assert await within(asyncio.gather(*calls)) == [2 * number for number in range(50)]
        assert len(pair.client.link.writes) == 1
        assert len(pair.server.link.writes) == 1


async def test_64_frames_are_written_at_once() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def double(number: int) -> int:
            return 2 * number

        pair.server.link.drops.add(FrameType.ACK)  # its acknowledgements are not the question
        calls = [pair.client.call("double", [number]) for number in range(200)]
        await within(asyncio.gather(*calls))
        for side, type in (
            (pair.client, FrameType.RPC_REQUEST),
            (pair.server, FrameType.RPC_RESPONSE),
        ):
            counts = [write.count(bytes([1, type, 0, 2])) for write in side.link.writes]
            assert [count for count in counts if count] == [64, 64, 64, 8]


# The limit


async def test_a_peer_that_ignores_the_limit_is_told_so() -> None:
    async with Pair(server=settings(calls=2)) as pair:
        gate = asyncio.Event()

        @pair.server.rpc
        async def hold() -> str:
            await gate.wait()
            return "done"

        for id in (101, 103, 105, 107):
            ask(pair.client, id, "hold")
        await until(lambda: len(answers(pair.server)) == 2)
        for id, body in answers(pair.server):
            assert id in (105, 107)
            assert body[0] == Overloaded.code and body[2] == {"retryable": True, "executed": False}
        assert pair.server.connection.running == 2
        gate.set()
        await until(lambda: len(answers(pair.server)) == 4)
        assert pair.server.connection.running == 0
        ask(pair.client, 109, "hold")
        await until(lambda: (109, ["done"]) in answers(pair.server))


async def test_one_that_suspends_and_one_that_does_not_count_alike() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        release = threading.Event()

        @pair.server.rpc
        def threaded() -> str:
            release.wait(5)
            return "thread"

        @pair.server.rpc
        async def quick() -> str:
            return "quick"

        ask(pair.client, 101, "threaded")
        ask(pair.client, 103, "quick")
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[0][1][0] == Overloaded.code
        release.set()
        await until(lambda: (101, ["thread"]) in answers(pair.server))
        ask(pair.client, 105, "quick")
        await until(lambda: (105, ["quick"]) in answers(pair.server))


# The outbox: answers are held while the peer does not acknowledge what it has


def acknowledge(side: Side) -> None:
    """Let a side acknowledge what it has received, as its timer does after 200 ms."""
    side.link.drops.discard(FrameType.ACK)
    side.connection.protocol.acknowledge()
    side.connection.flush()


async def test_answers_are_held_while_the_outbox_is_full_and_flow_after_an_ack() -> None:
    async with Pair(server=settings(outbox_bytes=2000)) as pair:
        pair.client.link.drops.add(FrameType.ACK)
        gate = asyncio.Event()

        @pair.server.rpc
        async def quick(number: int) -> list[Any]:
            return [number, "x" * 600]

        @pair.server.rpc
        async def slow(number: int) -> list[Any]:
            await gate.wait()
            return [number, "x" * 600]

        later = [pair.client.start("slow", [number]) for number in range(2)]
        await turns()
        calls = []
        for number in range(12):
            calls.append(pair.client.start("quick", [number]))
            await turns(5)
        gate.set()
        await turns()
        sent = len(answers(pair.server))
        assert 3 <= sent <= 4, "enough to fill 2000 bytes and no more"
        assert sum(call.done() for call in (*calls, *later)) == sent
        for _ in range(10):
            acknowledge(pair.client)
            await turns()
        results = [result[0] for result in await within(asyncio.gather(*calls, *later))]
        assert results == [*range(12), 0, 1]
        order = [body[0][0] for _, body in answers(pair.server)]
        assert order == [*range(12), 0, 1], "the answers kept their order"


async def test_a_large_answer_is_held_like_any_other() -> None:
    async with Pair(server=settings(outbox_bytes=1000)) as pair:
        pair.client.link.drops.add(FrameType.ACK)

        @pair.server.rpc
        async def large(size: int) -> bytes:
            return bytes(size)

        assert len(await within(pair.client.call("large", [100_000]))) == 100_000
        call = pair.client.start("large", [70_000])
        await turns()
        assert not call.done() and len(answers(pair.server)) == 1
        acknowledge(pair.client)
        assert len(await within(call)) == 70_000


async def test_a_held_answer_occupies_its_slot() -> None:
    async with Pair(server=settings(outbox_bytes=1000, calls=3)) as pair:
        pair.client.link.drops.add(FrameType.ACK)

        @pair.server.rpc
        async def fill() -> str:
            return "x" * 1000

        for id in (101, 103, 105, 107, 109):
            ask(pair.client, id, "fill")
            await turns()
        assert [id for id, _ in answers(pair.server)] == [101]
        acknowledge(pair.client)
        await turns()
        pair.client.link.drops.add(FrameType.ACK)
        acknowledge(pair.client)
        for _ in range(5):
            acknowledge(pair.client)
            await turns()
        codes = {id: body[0] for id, body in answers(pair.server)}
        assert codes.pop(109) == Overloaded.code
        assert set(codes.values()) == {"x" * 1000}


async def test_held_answers_to_messages_occupy_no_slot() -> None:
    async with Pair(server=settings(outbox_bytes=1000, calls=2)) as pair:
        pair.client.link.drops.add(FrameType.ACK)

        @pair.server.on("fill")
        async def fill(client: Any, message: Any) -> str:
            return "x" * 1000

        @pair.server.rpc
        async def quick() -> int:
            return 1

        requests = []
        for _ in range(5):
            requests.append(asyncio.ensure_future(pair.client.connection.request("fill")))
            await turns()
        assert [request.done() for request in requests] == [True, False, False, False, False]
        calls = [pair.client.start("quick") for _ in range(2)]
        await turns()
        for _ in requests:
            acknowledge(pair.client)
            await turns()
        assert await within(asyncio.gather(*requests)) == ["x" * 1000] * 5
        assert await within(asyncio.gather(*calls)) == [1, 1]


async def test_who_asks_for_more_than_it_takes_is_made_to_wait_and_not_closed() -> None:
    async with Pair(server=settings(outbox_bytes=20_000, window=(8, 100_000), calls=8)) as pair:

        @pair.server.on("fill")
        async def fill(client: Any, message: int) -> list[Any]:
            return [message, bytes(5000)]

        requests = [pair.client.connection.request("fill", number) for number in range(60)]
        answers = await within(asyncio.gather(*requests))
        assert [answer[0] for answer in answers] == list(range(60))


@pytest.mark.parametrize("what", ["hold", "nobody", "refuses", "message", "unknown message"])
async def test_a_peer_that_never_acknowledges_cannot_pile_up_answers(what: str) -> None:
    async with Pair(server=settings(outbox_bytes=1000, calls=4, window=(8, 1000))) as pair:
        pair.client.link.drops.add(FrameType.ACK)

        @pair.server.rpc
        async def hold() -> str:
            return "x" * 100

        @pair.server.rpc
        async def refuses(number: int) -> None: ...

        @pair.server.on("message")
        async def message(connection: Connection, message: Any) -> str:
            return "x" * 100

        for id in range(101, 1101, 2):
            if "message" in what:
                # Credit that was given back is spent; more would be a flood of its own.
                pair.client.write(FrameType.MESSAGE, id, [what, None])
            else:
                ask(pair.client, id, what)
            await turns(2)
            if pair.server.connection.closed:
                break
        reason = pair.server.connection.reason
        assert reason is not None, "500 answers wait for a peer that does not acknowledge"
        assert reason.code == CloseCode.FLOOD


# Deadlines and cancellation


async def test_the_deadline_that_the_caller_tells_ends_the_handler() -> None:
    async with Pair() as pair:
        cancelled: list[str] = []

        @pair.server.rpc
        async def hold(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.append(name)

        # Written by hand, so that nothing comes but the request: no CANCEL either.
        ask(pair.client, 101, "hold", ["late"], {"ttl": 40})
        ask(pair.client, 103, "hold", ["early"], {"ttl": 10})
        ask(pair.client, 105, "hold", ["never"], {"ttl": 0})
        await until(lambda: len(answers(pair.server)) == 2)
        assert cancelled == ["early", "late"]
        for id, body in answers(pair.server):
            assert id in (101, 103)
            assert body[0] == RPCTimeout.code and "'hold'" in body[1]
        assert pair.server.connection.running == 1


@pytest.mark.parametrize(
    "usual, told, own, expected",
    [
        (0.01, None, None, True),
        (0.01, 0, None, False),
        (0.01, 0, 0.01, True),
        (None, None, None, False),
        (None, None, 0.01, True),
        (None, 10, None, True),
        (30.0, 10_000, 0.01, True),
        (0.01, None, 30.0, True),
    ],
)
async def test_the_shortest_of_all_deadlines_counts(
    usual: float | None, told: int | None, own: float | None, expected: bool
) -> None:
    async with Pair(client=settings(timeout=usual)) as pair:
        loop = asyncio.get_running_loop()

        @pair.server.rpc(timeout=own)
        async def hold() -> None:
            await asyncio.Event().wait()

        ask(pair.client, 101, "hold", {}, *([{"ttl": told}] if told is not None else []))
        if expected:
            await until(lambda: answers(pair.server))
            assert answers(pair.server)[0][1][0] == RPCTimeout.code
        else:
            late = loop.create_future()
            loop.call_later(0.03, late.set_result, None)  # after the deadline that there is not
            await late
            assert pair.server.connection.running == 1


@pytest.mark.parametrize("meta", [[], [{"ttl": 0}], [{"ttl": 10**12}]], ids=["usual", "0", "ages"])
async def test_no_caller_has_a_handler_run_for_longer_than_calls_may(meta: list[Any]) -> None:
    server = settings(longest=0.01, calls=1)
    async with Pair(client=settings(timeout=None), server=server) as pair:
        left: list[float | None] = []

        @pair.server.rpc
        async def hold(context: Context) -> None:
            left.append(context.remaining)
            await asyncio.Event().wait()

        ask(pair.client, 101, "hold", {}, *meta)
        await until(lambda: answers(pair.server))
        ((id, (code, text, _)),) = answers(pair.server)
        assert (id, code) == (101, RPCTimeout.code)
        assert text == "'hold' did not end in time; a call may take 0.01 s here (max_timeout)"
        assert left[0] is not None and left[0] <= 0.01
        assert pair.server.connection.running == 0


async def test_a_method_with_a_time_of_its_own_and_a_stream_may_take_longer() -> None:
    async with Pair(server=settings(longest=0.01)) as pair:
        release, late = asyncio.Event(), asyncio.get_running_loop().create_future()

        @pair.server.rpc(timeout=30)
        async def long() -> str:
            await release.wait()
            return "done"

        @pair.server.rpc
        async def ticks() -> AsyncIterator[int]:
            await release.wait()
            yield 1

        ask(pair.client, 101, "long", {}, {"ttl": 0})
        ask(pair.client, 103, "ticks", {}, {"ttl": 0, "stream": None})
        ask(pair.client, 105, "long", {}, {"ttl": 0, "key": "k"})
        asyncio.get_running_loop().call_later(0.03, late.set_result, None)
        await late
        assert pair.server.connection.running == 3
        release.set()
        await until(lambda: len(answers(pair.server)) == 3)
        assert sorted(answers(pair.server)) == [(101, ["done"]), (103, [None]), (105, ["done"])]


async def test_what_streams_is_known_by_its_handler_and_not_by_its_caller() -> None:
    async with Pair(server=settings(longest=0.01)) as pair:

        @pair.server.rpc
        async def hold() -> None:
            await asyncio.Event().wait()

        ask(pair.client, 101, "hold", {}, {"ttl": 0, "stream": None})
        ask(pair.client, 103, "hold", {}, {"ttl": 0, "key": "k"})
        await until(lambda: len(answers(pair.server)) == 2)
        assert {body[0] for _, body in answers(pair.server)} == {RPCTimeout.code}


@pytest.mark.parametrize(
    "meta", [5, [], "x", {"ttl": -1}, {"ttl": True}, {"ttl": 1.5}, {"ttl": "1"}, {"ttl": None}]
)
async def test_meta_that_cannot_be_read_closes(meta: Any) -> None:
    async with Pair() as pair:
        ask(pair.client, 101, "hold", {}, meta)
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


@pytest.mark.parametrize(
    "body", [5, [], ["name"], [5, {}], ["name", 5], ["name", None], ["name", {}, {}, {}], {"a": 1}]
)
async def test_a_request_of_another_shape_closes(body: Any) -> None:
    async with Pair() as pair:
        pair.client.write(FrameType.RPC_REQUEST, 101, body)
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


async def test_a_request_with_other_keys_than_text_is_refused() -> None:
    async with Pair() as pair:
        ask(pair.client, 101, "anything", {(1,): 2})
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[0][1][0] == "invalid_params"
        assert not pair.server.connection.closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_a_handler_is_answered_and_ends_the_program(
    error: type[BaseException],
) -> None:
    written: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with Pair() as pair:

            @pair.server.rpc(thread=False)
            def interrupted() -> None:
                raise error

            call = pair.client.start("interrupted")
            try:
                await call
            finally:
                pair.server.connection.flush()
                written.extend(answers(pair.server))

    with pytest.raises(error):
        run(main)
    assert [body[0] for _, body in written] == [InternalError.code]


async def test_meta_may_have_keys_that_nobody_knows() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> int:
            return 1

        ask(pair.client, 101, "quick", {}, {"headers": {}, "what": [1], "key": "k"})
        await until(lambda: answers(pair.server) == [(101, [1])])


async def test_a_key_and_a_stream_do_not_go_together() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> int:
            raise AssertionError("it ran")

        ask(pair.client, 101, "quick", {}, {"key": "k", "stream": None})
        await until(lambda: pair.server.link.sent(FrameType.RPC_ERROR))
        (refused,) = pair.server.link.sent(FrameType.RPC_ERROR)
        code, _, details = refused.body
        assert (refused.id, code, details["executed"]) == (101, "invalid_params", False)


async def test_a_handler_that_swallows_its_cancellation_is_still_answered_as_cancelled() -> None:
    async with Pair() as pair:
        ended = asyncio.Event()

        @pair.server.rpc
        async def stubborn() -> str:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            ended.set()
            return "a result that comes too late"

        ask(pair.client, 101, "stubborn")
        await turns()
        pair.client.write(FrameType.CANCEL, 101, ["enough"])
        await within(ended.wait())
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[0][1][0] == CallCancelled.code


async def test_a_handler_that_cancels_itself_fails_its_own_call_only() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def cancels_itself() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

        @pair.server.rpc
        async def quick() -> int:
            await asyncio.sleep(0)
            return 1

        names = ["quick", "cancels_itself", "quick", "cancels_itself", "quick"]
        calls = [pair.client.call(name) for name in names]
        first, second, third, *_ = await within(asyncio.gather(*calls, return_exceptions=True))
        assert first == third == 1
        assert isinstance(second, CallCancelled) and "'cancels_itself'" in str(second)


async def test_a_cancel_for_a_call_that_is_over_or_never_was_means_nothing() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def quick() -> int:
            return 1

        assert await within(pair.client.call("quick")) == 1
        for id in (1, 99):
            pair.client.write(FrameType.CANCEL, id, ["enough"])
        assert await within(pair.client.call("quick")) == 1
        assert len(answers(pair.server)) == 2


async def test_a_thread_keeps_its_slot_until_it_ends() -> None:
    async with Pair(server=settings(calls=1)) as pair:
        began, release = threading.Event(), threading.Event()

        @pair.server.rpc
        def block() -> str:
            began.set()
            release.wait(5)
            return "a result that comes too late"

        call = pair.client.start("block")
        await until(began.is_set)
        call.cancel()
        await turns()
        assert pair.server.connection.running == 1 and answers(pair.server) == []
        release.set()
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[0][1][0] == CallCancelled.code
        assert pair.server.connection.running == 0


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_the_end_of_the_connection_ends_its_handlers_in_silence(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    cleaned = asyncio.Event()
    async with Pair() as pair:

        @pair.server.rpc
        async def hold() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.set()
                raise LookupError("nobody hears this any more")

        @pair.server.rpc
        def block() -> None:
            release.wait(5)
            raise LookupError("nobody hears this any more")

        call = pair.client.start("hold" if kind == "async" else "block")
        await until(lambda: pair.server.connection.running)
        pair.client.link.cut()
        with pytest.raises(ConnectionClosed):
            await within(call)
        await until(lambda: pair.server.connection.running == 0)
        if kind == "async":
            await within(cleaned.wait())
        release.set()
    await turns()


# Results


async def test_a_result_may_have_exactly_the_size_that_the_caller_accepts() -> None:
    limit = 10_000
    async with Pair(client=settings(frame_max=limit)) as pair:

        @pair.server.rpc
        async def text(size: int) -> str:
            return "x" * size

        most = limit - len(msgpack.packb("x" * 1000)) + 1000
        assert len(await within(pair.client.call("text", [most]))) == most
        with pytest.raises(PayloadTooLarge, match=r"10001 bytes.*10000"):
            await within(pair.client.call("text", [most + 1]))


async def test_a_large_result_of_bytes_has_the_same_limit() -> None:
    limit = 100_000
    async with Pair(client=settings(frame_max=limit)) as pair:

        @pair.server.rpc
        async def body(size: int) -> bytes:
            return bytes(size)

        most = limit - 5  # the header of a long bin
        assert len(await within(pair.client.call("body", [most]))) == most
        with pytest.raises(PayloadTooLarge, match="100000"):
            await within(pair.client.call("body", [limit + 1]))


class Thing(BaseModel):
    name: str
    parts: list[int] = []


@pytest.mark.parametrize(
    "value, headers",
    [(5, None), (5, {}), ([1], {"a": 1}), (Thing(name="x"), {"trace": "abc"})],
    ids=repr,
)
async def test_a_response_carries_its_headers(value: Any, headers: Any) -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def typed() -> Response[Any]:
            return Response(value, headers)

        @pair.server.rpc
        async def plain():
            return Response(value, headers)

        for name in ("typed", "plain"):
            answer = await within(pair.client.call(name, returns=Response))
            expected = value.model_dump() if isinstance(value, Thing) else value
            assert (answer.value, answer.headers) == (expected, headers or {})


async def test_the_value_of_a_response_is_checked_and_dumped() -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def good() -> Response[Thing]:
            return Response(Thing(name="x", parts=[1]), {"n": 1})

        @pair.server.rpc
        async def bare() -> Response[Thing]:
            return Thing(name="x")  # type: ignore[return-value]  # allowed: there are no headers

        @pair.server.rpc
        async def bad() -> Response[int]:
            return Response("no number")  # type: ignore[arg-type]

        assert await within(pair.client.call("good")) == {"name": "x", "parts": [1]}
        assert await within(pair.client.call("bare")) == {"name": "x", "parts": []}
        with pytest.raises(InternalError):
            await within(pair.client.call("bad"))


@pytest.mark.parametrize(
    "value",
    [object(), 2**64, {1: object()}, "\ud800", [lambda: 0]],
    ids=["object", "integer", "dict", "text", "list"],
)
async def test_a_result_that_cannot_be_packed_is_an_internal_error(value: Any) -> None:
    async with Pair() as pair:

        @pair.server.rpc
        async def odd():
            return value

        @pair.server.rpc
        async def odd_later():
            await asyncio.sleep(0)
            return value

        for name in ("odd", "odd_later"):
            with pytest.raises(InternalError, match=f"'{name}' failed"):
                await within(pair.client.call(name))
        assert not pair.server.connection.closed


# Errors


class ShelfIsEmpty(RPCError):
    """An error of an application, with parameters of its own."""

    def __init__(self, what: str, left: int) -> None:
        super().__init__(f"no {what} left", details={"left": left})


class Forgetful(RPCError):
    """An error whose author forgot to call `super().__init__`."""

    def __init__(self, what: str) -> None:
        self.what = what


async def fail_with(make: Callable[[], BaseException]) -> RPCError:
    """Return what a caller gets when its handler raises something, at once and later alike."""
    caught: list[RPCError] = []
    async with Pair() as pair:

        @pair.server.rpc
        async def fails(later: bool) -> None:
            if later:
                await asyncio.sleep(0)
            raise make()

        @pair.server.rpc
        async def quick() -> int:
            return 1

        for later in (False, True):
            with pytest.raises(RPCError) as info:
                await within(pair.client.call("fails", [later]))
            caught.append(info.value)
        assert await within(pair.client.call("quick")) == 1, "the connection is alive"
        assert (
            type(caught[0]) is type(caught[1]) and caught[0].message[:20] == caught[1].message[:20]
        )
    return caught[0]


async def test_an_error_arrives_as_the_class_that_was_raised() -> None:
    error = await fail_with(lambda: ShelfIsEmpty("apples", 0))
    assert type(error) is ShelfIsEmpty
    assert (error.message, error.details, str(error)) == (
        "no apples left",
        {"left": 0},
        "no apples left",
    )


async def test_details_that_cannot_be_sent_are_left_out() -> None:
    error = await fail_with(lambda: PermissionDenied("no", details={"why": object()}))
    assert (type(error), error.message, error.details) == (PermissionDenied, "no", {})


async def test_a_message_that_is_too_long_is_cut() -> None:
    error = await fail_with(lambda: PermissionDenied("long " * 1_000_000))
    assert type(error) is PermissionDenied
    assert error.message == ("long " * 200)


@pytest.mark.parametrize(
    "make, code",
    [
        (lambda: PermissionDenied(LookupError("an exception is no text")), "permission_denied"),  # type: ignore[arg-type]
        (lambda: PermissionDenied(404), "permission_denied"),  # type: ignore[arg-type]
        (lambda: PermissionDenied(None), "permission_denied"),  # type: ignore[arg-type]
        (lambda: PermissionDenied("no such file: \udcff"), "permission_denied"),
        (lambda: Forgetful("everything"), "forgetful"),
    ],
    ids=["an exception", "a number", "nothing", "surrogates", "without super().__init__"],
)
async def test_an_error_with_an_odd_message_harms_only_its_call(
    make: Callable[[], RPCError], code: str
) -> None:
    error = await fail_with(make)
    assert error.code in (code, InternalError.code)


@pytest.mark.parametrize("details", [{404: "x"}, {"deep": [{404: "x"}]}, {b"a": 1}, {None: 1}])
async def test_details_with_other_keys_than_text_harm_only_their_call(details: Any) -> None:
    error = await fail_with(lambda: PermissionDenied("no", details=details))
    assert error.code in (PermissionDenied.code, InternalError.code)


async def test_details_that_are_too_large_are_left_out_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = await fail_with(lambda: PermissionDenied("no", details={"list": "x" * 2_000_000}))
    assert type(error) is PermissionDenied and (str(error), error.details) == ("no", {})
    assert "the details of PermissionDenied take 2000" in caplog.text


async def test_a_code_that_is_no_text_is_refused_or_harms_only_its_call() -> None:
    try:
        numbered: Any = type("Numbered", (RPCError,), {"code": 404})
    except TypeError:
        return
    await fail_with(lambda: numbered("no"))


async def test_an_error_that_cannot_be_shown_harms_only_its_call() -> None:
    class Rude:
        def __str__(self) -> str:
            raise LookupError("no text")

    error = await fail_with(lambda: PermissionDenied(Rude()))  # type: ignore[arg-type]
    assert error.code in (PermissionDenied.code, InternalError.code)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ValueError("secret"),
        lambda: GeneratorExit("secret"),
        lambda: ConnectionClosed("secret"),
        lambda: asyncio.InvalidStateError("secret"),
        lambda: StopAsyncIteration("secret"),
        lambda: StopIteration("secret"),
        lambda: type("Own", (BaseException,), {})("secret"),
    ],
)
async def test_what_is_no_rpc_error_becomes_an_internal_one(
    make: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "conduit.connection")
    error = await fail_with(make)
    assert type(error) is InternalError and error.error_id in caplog.text
    assert "secret" not in f"{error!r} {error.details}"
    assert "secret" in caplog.text


@pytest.mark.parametrize("error", [StopIteration(1), LookupError("x"), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("thread", [None, False], ids=["thread", "inline"])
async def test_a_plain_function_may_raise_anything(error: BaseException, thread: Any) -> None:
    async with Pair(server=settings(calls=1)) as pair:

        @pair.server.rpc(thread=thread)
        def fails() -> None:
            raise error

        for _ in range(2):  # the slot is free again
            with pytest.raises(InternalError):
                await within(pair.client.call("fails"), 1)


async def test_what_a_cancelled_call_raises_is_that_it_was_cancelled() -> None:
    """The error of the clean-up goes to the log, if anywhere, and not to a caller who is gone."""
    async with Pair() as pair:

        @pair.server.rpc
        async def fails() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise LookupError("in the clean-up") from None

        ask(pair.client, 101, "fails")
        await turns()
        pair.client.write(FrameType.CANCEL, 101, ["enough"])
        await until(lambda: answers(pair.server))
        assert answers(pair.server)[0][1][0] in (CallCancelled.code, InternalError.code)


# The end of the service


@pytest.mark.parametrize("pair_of", [Pair, SocketPair])
async def test_a_handler_may_close_its_connection_while_more_requests_wait(
    pair_of: type[Pair],
) -> None:
    async with pair_of() as pair:
        served: list[str] = []

        @pair.server.rpc
        async def end(connection: Connection) -> None:
            await connection.close(4403, "enough")

        @pair.server.rpc
        async def count(name: str) -> str:
            served.append(name)
            return name

        calls = [
            pair.client.start("count", ["before"]),
            pair.client.start("end"),
            pair.client.start("count", ["after"]),
        ]
        results = await within(asyncio.gather(*calls, return_exceptions=True))
        assert results[0] == "before"
        assert all(isinstance(result, ConnectionClosed) for result in results[1:])
        await within(pair.server.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and (reason.code, reason.reason) == (4403, "enough")
        assert served == ["before"], "nobody would have got the answer"


async def test_a_server_that_stops_serves_what_it_has_and_nothing_new() -> None:
    async with Pair() as pair:
        gate = asyncio.Event()

        @pair.server.rpc
        async def hold() -> str:
            await gate.wait()
            return "served"

        running = pair.client.start("hold")
        await until(lambda: pair.server.connection.running)
        draining = asyncio.ensure_future(pair.server.connection.drain(5))
        await turns()
        (away,) = pair.server.link.sent(FrameType.GOAWAY)
        assert away.body == [CloseCode.GOING_AWAY, "the server stops", 5000, 1]
        with pytest.raises(Unavailable) as caught:
            await within(pair.client.call("hold"))
        assert caught.value.retryable and caught.value.details["executed"] is False
        with pytest.raises(MethodNotFound):
            await within(pair.client.call("nobody"))
        gate.set()
        assert await within(running) == "served"
        await within(draining)
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.GOING_AWAY


async def test_a_server_that_stops_takes_no_new_messages() -> None:
    async with Pair() as pair:
        gate = asyncio.Event()
        handled: list[Any] = []

        @pair.server.rpc
        async def hold() -> None:
            await gate.wait()

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None:
            handled.append(message)

        running = pair.client.start("hold")
        await until(lambda: pair.server.connection.running)
        draining = asyncio.ensure_future(pair.server.connection.drain(5))
        await turns()
        try:
            with pytest.raises(Unavailable) as caught:
                await within(pair.client.connection.request("news", 1))
            assert caught.value.retryable and caught.value.details["executed"] is False
            await within(pair.client.connection.send("news", 2))
            await turns()
            assert handled == []
        finally:
            gate.set()
            await within(asyncio.gather(running, draining))


async def test_what_does_not_end_in_time_is_cancelled_and_its_caller_told() -> None:
    async with Pair() as pair:
        cancelled = asyncio.Event()

        @pair.server.rpc
        async def hold() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        call = pair.client.start("hold")
        await until(lambda: pair.server.connection.running)
        await within(pair.server.connection.drain(0.01))
        assert cancelled.is_set()
        with pytest.raises(Unavailable, match="the server stops"):
            await within(call)
