"""Messages: credit for what goes out, order for what comes in, and what is dropped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import tracemalloc
from typing import Any

import msgpack
import pytest

from conduit.exceptions import (
    CallCancelled,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    RPCTimeout,
)
from conduit.protocol.frames import HEADER, PRIORITY, REPLY, SEQUENCED, CloseCode, FrameType, word
from conduit.transport import inbox, messages
from conduit.transport.connection import Connection
from conduit.transport.threads import run_in_thread
from tests.transport.pair import Pair, Side, SocketPair, settings, turns, until, within


def best_effort(name: str, data: Any) -> bytes:
    """Return a broadcast as a server makes it."""
    payload = msgpack.packb([name, data])
    return HEADER.pack(word(FrameType.MESSAGE, PRIORITY), len(payload), 0, 0, 0) + payload


class Slow:
    """A message handler of a client that suspends at each message until a test lets it go on."""

    def __init__(self, side: Side, name: str = "news", **options: Any) -> None:
        self.began: list[Any] = []
        self.ended: list[Any] = []
        self._gate = asyncio.Semaphore(0)

        @side.on(name, **options)
        async def handle(message: Any) -> None:
            self.began.append(message)
            await self._gate.acquire()
            self.ended.append(message)

    async def let_go(self, count: int = 1) -> None:
        for _ in range(count):
            self._gate.release()
        await turns()


# Order


async def test_messages_are_handled_in_order_also_when_handlers_suspend() -> None:
    async with Pair() as pair:
        handled: list[int] = []

        @pair.server.on("news")
        async def news(connection: Connection, message: int) -> None:
            if message % 3 == 0:
                await asyncio.sleep(0)
            if message % 7 == 0:
                await asyncio.sleep(0.001)
            handled.append(message)

        @pair.server.on("threaded")
        def threaded(connection: Connection, message: int) -> None:
            handled.append(message)

        @pair.server.on("inline", thread=False)
        def inline(connection: Connection, message: int) -> None:
            handled.append(message)

        for number in range(60):
            name = ("news", "threaded", "inline")[number % 3 if number % 2 else 0]
            await within(pair.client.connection.send(name, number))
        await until(lambda: len(handled) == 60)
        assert handled == list(range(60))


async def test_one_message_at_a_time() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        for number in range(3):
            await pair.server.connection.send("news", number)
        await turns()
        for number in range(3):
            assert (slow.began, slow.ended) == (list(range(number + 1)), list(range(number)))
            await slow.let_go()
        assert slow.ended == [0, 1, 2]


async def test_a_concurrent_handler_neither_waits_nor_holds_up() -> None:
    async with Pair() as pair:
        slow, beside = Slow(pair.client), Slow(pair.client, "beside", concurrent=True)
        for name in ("news", "beside", "news", "beside"):
            await pair.server.connection.send(name, name)
        await turns()
        assert slow.began == ["news"] and beside.began == ["beside"] * 2
        await slow.let_go(2)
        assert slow.ended == ["news"] * 2 and beside.ended == []
        await beside.let_go(2)


async def test_messages_of_both_directions_do_not_wait_for_each_other() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return message

        await pair.server.connection.send("news")
        await turns()
        assert await within(pair.client.connection.request("question", 5)) == 5
        await slow.let_go()


async def test_a_call_does_not_wait_for_a_message() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)

        @pair.client.rpc
        async def quick() -> int:
            return 1

        await pair.server.connection.send("news")
        await turns()
        assert await within(pair.server.call("quick")) == 1
        assert slow.ended == []
        await slow.let_go()


async def test_a_reply_without_an_id_keeps_its_place_among_messages() -> None:
    async with Pair() as pair:
        order: list[Any] = []
        gate = asyncio.Event()

        @pair.client.on("news")
        async def news(message: Any) -> None:
            order.append(message)
            await gate.wait()

        @pair.client.on("question_response")
        async def question_response(message: Any) -> None:
            order.append(message)

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return message

        await pair.server.connection.send("news", 1)
        await pair.server.connection.send("news", 2)
        await turns()
        await pair.client.connection.send("question", "a reply")
        await turns()
        await pair.server.connection.send("news", 3)
        await turns()
        gate.set()
        await until(lambda: len(order) == 4)
        assert order == [1, 2, "a reply", 3]


async def test_replies_are_not_dropped_however_many_wait() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client, "question_response")

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return message

        sends = [
            asyncio.ensure_future(pair.client.connection.send("question", number))
            for number in range(400)
        ]
        await turns(50)
        assert not all(send.done() for send in sends), "who does not read its replies has to wait"
        await slow.let_go(400)
        await within(asyncio.gather(*sends))
        await turns()
        assert slow.ended == list(range(400))


async def test_the_handler_of_a_reply_may_send_however_many_replies_wait() -> None:
    async with Pair(client=settings(window=(4, 100_000))) as pair:
        heard: list[Any] = []

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return message

        @pair.server.on("thanks")
        async def thanks(connection: Connection, message: Any) -> None:
            heard.append(message)

        @pair.client.on("question_response")
        async def question_response(message: Any, connection: Connection) -> None:
            await asyncio.sleep(0)
            await connection.send("thanks", message)

        sends = [pair.client.connection.send("question", number) for number in range(40)]
        await within(asyncio.gather(*sends))
        await asyncio.wait_for(until(lambda: len(heard) == 40), 1)
        assert heard == list(range(40))


@pytest.mark.parametrize("ending", ["catches up", "closes"])
async def test_who_does_not_handle_its_replies_sends_no_more(ending: str) -> None:
    async with Pair(client=settings(window=(4, 100_000))) as pair:
        slow = Slow(pair.client, "question_response")

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return message

        async def ask() -> None:
            for number in range(40):
                await pair.client.connection.send("question", number)
                await turns(5)

        asking = asyncio.ensure_future(ask())
        await turns(400)
        assert 4 <= len(pair.client.link.sent(FrameType.MESSAGE)) <= 6
        if ending == "closes":
            await within(pair.server.connection.close())
            with pytest.raises(ConnectionClosed):
                await within(asking, 1)
            await slow.let_go(40)  # what was accepted is still handled
            return
        while len(slow.ended) < 40:
            await slow.let_go()
        await within(asking)
        assert slow.ended == list(range(40))


# Credit


async def test_a_sender_waits_when_its_credit_is_spent() -> None:
    async with Pair(client=settings(window=(4, 100_000))) as pair:
        slow = Slow(pair.client)
        sends = [asyncio.ensure_future(pair.server.connection.send("news", n)) for n in range(10)]
        await turns()
        assert [send.done() for send in sends] == [True] * 4 + [False] * 6
        await slow.let_go()
        assert sum(send.done() for send in sends) == 4, "credit comes back by halves of the window"
        await slow.let_go()
        assert [send.done() for send in sends] == [True] * 6 + [False] * 4
        for _ in range(8):
            await slow.let_go()
        assert slow.ended == list(range(10)) and all(send.done() for send in sends)
        given = [frame.body[0] for frame in pair.client.link.sent(FrameType.STREAM_CREDIT)]
        assert given == [2] * 5


async def test_the_bytes_count_as_well_and_one_message_may_exceed_them() -> None:
    async with Pair(client=settings(window=(100, 1000))) as pair:
        slow = Slow(pair.client)
        sizes = [600, 5000, 10]
        sends = [
            asyncio.ensure_future(pair.server.connection.send("news", "x" * size)) for size in sizes
        ]
        await turns()
        assert [send.done() for send in sends] == [True, True, False]
        await slow.let_go()
        assert not sends[2].done(), "600 of the 5600 bytes are not enough"
        await slow.let_go()
        assert sends[2].done()
        await slow.let_go()
        assert list(map(len, slow.ended)) == sizes
        written = [len(frame.payload) for frame in pair.server.link.sent(FrameType.MESSAGE)]
        given = [frame.body for frame in pair.client.link.sent(FrameType.STREAM_CREDIT)]
        assert sum(body[1] for body in given) == sum(written[:2])


async def test_no_more_than_half_of_the_window_is_held_back() -> None:
    async with Pair(server=settings(window=(16, 1000))) as pair:

        @pair.server.on("news")
        async def news(connection: Connection, message: Any) -> None: ...

        outstanding = []
        for _ in range(100):
            await within(pair.client.connection.send("news", "x" * 10))
            await turns(5)
            sent = pair.client.link.sent(FrameType.MESSAGE)
            given = [frame.body for frame in pair.server.link.sent(FrameType.STREAM_CREDIT)]
            outstanding.append(
                (
                    len(sent) - sum(body[0] for body in given),
                    sum(len(frame.payload) for frame in sent) - sum(body[1] for body in given),
                )
            )
        assert max(count for count, _ in outstanding) < 8
        assert max(size for _, size in outstanding) < 500


async def test_credit_comes_back_for_whatever_happens_to_a_message() -> None:
    async with Pair(server=settings(window=(2, 100_000))) as pair:

        @pair.server.on("fails")
        async def fails(connection: Connection, message: Any) -> None:
            raise LookupError("no")

        @pair.server.on("fails later")
        async def fails_later(connection: Connection, message: Any) -> None:
            await asyncio.sleep(0)
            raise LookupError("no")

        @pair.server.on("picky")
        async def picky(connection: Connection, message: int) -> None: ...

        @pair.server.on("cancels itself")
        async def cancels_itself(connection: Connection, message: Any) -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

        @pair.server.on("unpackable")
        async def unpackable(connection: Connection, message: Any) -> Any:
            return object()

        names = ["fails", "fails later", "picky", "cancels itself", "unpackable", "nobody"]
        for name in names * 5:
            await within(pair.client.connection.send(name, "x"))
        for name in names * 5:
            with pytest.raises((InternalError, InvalidParams, MethodNotFound, CallCancelled)):
                await within(pair.client.connection.request(name, "x"))
        assert not pair.client.connection.closed


async def test_a_message_that_cannot_be_decoded_costs_and_gives_back_its_credit() -> None:
    async with Pair(server=settings(window=(2, 100_000))) as pair:
        for _ in range(5):
            pair.client.write(FrameType.MESSAGE, 0, ["news", {(1,): 2}])
            await turns()
        pair.client.write(FrameType.MESSAGE, 101, ["news", {(1,): 2}])
        await turns()
        (error,) = pair.server.link.sent(FrameType.RPC_ERROR)
        assert (error.id, error.body[0]) == (101, InvalidParams.code)
        given = [frame.body for frame in pair.server.link.sent(FrameType.STREAM_CREDIT)]
        assert sum(body[0] for body in given) == 6


async def test_a_message_without_credit_ends_the_connection() -> None:
    async with Pair(client=settings(window=(4, 100_000))) as pair:
        slow = Slow(pair.client)
        for number in range(5):
            pair.server.write(FrameType.MESSAGE, 0, ["news", number])
        await within(pair.server.connection.wait_closed())
        reason = pair.server.connection.reason
        assert reason is not None and reason.code == CloseCode.FLOOD
        assert "4 messages" in str(reason)
        assert slow.began == [0]


@pytest.mark.parametrize(
    "credit",
    [5, [], [1], [1, 2, 3], [-1, 0], [1, "2"], [True, 1], {"a": 1}, [2**32, 0], [0, 2**64 - 1]],
)
async def test_credit_that_cannot_be_read_closes(credit: Any) -> None:
    async with Pair() as pair:
        pair.client.write(FrameType.STREAM_CREDIT, 0, credit)
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


async def test_credit_of_a_stream_that_nobody_has_is_ignored() -> None:
    async with Pair() as pair:
        pair.client.write(FrameType.STREAM_CREDIT, 7, ["?"])
        await turns()
        assert not pair.server.connection.closed


async def test_compressed_messages_cost_what_their_handlers_get() -> None:
    """The receiver's memory is what credit bounds, and there a message is as large as before."""
    on = settings(window=(100, 20_000), compress=True)
    async with Pair(client=on, server=on) as pair:
        slow = Slow(pair.client)
        sends = [
            asyncio.ensure_future(pair.server.connection.send("news", "x" * 10_000))
            for _ in range(10)
        ]
        await turns()
        assert sum(len(write) for write in pair.server.link.writes) < 10_000
        assert sum(send.done() for send in sends) == 2
        await slow.let_go(10)
        await within(asyncio.gather(*sends))
        assert len(slow.ended) == 10


@pytest.mark.parametrize("body", [5, [], ["name"], [5, 1], ["name", 1, 2], {"a": 1}])
async def test_a_message_of_another_shape_closes(body: Any) -> None:
    async with Pair() as pair:
        pair.client.write(FrameType.MESSAGE, 0, body)
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.BAD_PAYLOAD


async def test_without_backpressure_a_sender_is_refused() -> None:
    async with Pair(client=settings(window=(2, 1000)), server=settings(backpressure=False)) as pair:
        slow = Slow(pair.client)
        for number in range(2):
            await pair.server.connection.send("news", number)
        with pytest.raises(Overloaded, match="'news' was not sent"):
            await within(pair.server.connection.send("news", 2))
        with pytest.raises(Overloaded):
            await within(pair.server.connection.request("news", 2))
        await turns()
        await slow.let_go(2)
        await pair.server.connection.send("news", 3)
        await slow.let_go()
        assert slow.ended == [0, 1, 3]


async def test_replies_and_calls_cost_no_credit() -> None:
    async with Pair(client=settings(window=(1, 100)), server=settings(window=(1, 100))) as pair:
        slow = Slow(pair.client)

        @pair.client.rpc
        async def quick() -> int:
            return 1

        @pair.server.on("question")
        async def question(connection: Connection, message: Any) -> Any:
            return "x" * 200

        await pair.server.connection.send("news")
        await turns()
        for _ in range(5):
            assert len(await within(pair.client.connection.request("question"))) == 200
            await within(pair.client.connection.send("question"))
            assert await within(pair.server.call("quick")) == 1
        await slow.let_go()


# The line for credit


async def test_who_waits_for_credit_is_served_in_order() -> None:
    async with Pair(client=settings(window=(1, 1000))) as pair:
        slow = Slow(pair.client)
        sends = [asyncio.ensure_future(pair.server.connection.send("news", n)) for n in range(8)]
        await turns()
        sends[3].cancel()
        await turns()
        for _ in range(7):
            await slow.let_go()
        assert slow.ended == [0, 1, 2, 4, 5, 6, 7]
        assert sends[3].cancelled()


async def test_a_message_that_waits_is_not_sent_when_it_is_cancelled_or_late() -> None:
    async with Pair(client=settings(window=(1, 1000))) as pair:
        slow = Slow(pair.client)
        await pair.server.connection.send("news", 0)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pair.server.connection.send("news", 1), 0.01)
        with pytest.raises(RPCTimeout, match="waited 0.01 s for credit") as caught:
            await within(pair.server.connection.request("news", 2, timeout=0.01))
        assert caught.value.retryable and caught.value.details["executed"] is False
        await slow.let_go()
        await pair.server.connection.send("news", 3)
        await turns()
        await slow.let_go()
        assert slow.ended == [0, 3]


async def test_a_message_waits_while_the_link_is_full() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        pair.server.connection.pause_writing()
        send = asyncio.ensure_future(pair.server.connection.send("news", 1))
        await turns()
        assert not send.done() and pair.server.link.writes == []
        pair.server.connection.resume_writing()
        await within(send)
        await turns()
        await slow.let_go()


async def test_a_turn_that_comes_with_the_end_of_the_connection_is_the_end() -> None:
    async with Pair(client=settings(window=(1, 1000))) as pair:
        slow = Slow(pair.client)
        await pair.server.connection.send("news", 0)
        waiting = [
            asyncio.ensure_future(pair.server.connection.send("news", 1)),
            asyncio.ensure_future(pair.server.connection.request("news", 2, timeout=None)),
        ]
        await turns()
        pair.client.link.stall()
        await slow.let_go()
        assert pair.client.link.sent(FrameType.STREAM_CREDIT)
        closing = asyncio.ensure_future(pair.client.connection.close(4403, "that is all"))
        await turns()
        pair.client.link.flow()  # the credit and CLOSE arrive together
        for one in waiting:
            with pytest.raises(ConnectionClosed, match="that is all"):
                await within(one, 1)
        await within(closing)


# Requests


async def test_a_request_has_its_own_deadline() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        with pytest.raises(RPCTimeout, match=r"no answer to 'news' within 0.01 s"):
            await within(pair.server.connection.request("news", timeout=0.01))
        await turns()
        assert slow.began == [None] and slow.ended == []
        (cancel,) = pair.server.link.sent(FrameType.CANCEL)
        (answer,) = pair.client.link.sent(FrameType.RPC_ERROR)
        assert answer.id == cancel.id and answer.body[0] == CallCancelled.code


@pytest.mark.parametrize("how", ["is cancelled", "fails", "stays"])
async def test_a_cancelled_request_cancels_its_handler_and_the_next_one_runs(how: str) -> None:
    async with Pair() as pair:
        ended: list[str] = []

        @pair.server.on("slow")
        async def slow(connection: Connection, message: Any) -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(how)
                if how == "fails":
                    raise LookupError("in the clean-up") from None
                if how == "is cancelled":
                    raise
            return "a result that comes too late"

        @pair.server.on("next")
        async def next(connection: Connection, message: Any) -> str:
            return "next"

        request = asyncio.ensure_future(pair.client.connection.request("slow"))
        follower = asyncio.ensure_future(pair.client.connection.request("next"))
        await turns()
        assert not follower.done()
        request.cancel()
        assert await within(follower) == "next"
        assert ended == [how]
        (error,) = pair.server.link.sent(FrameType.RPC_ERROR)
        assert error.body[0] == CallCancelled.code
    gc.collect()  # an exception that nobody has looked at is told now, and fails the test


async def test_a_request_that_waits_for_its_turn_can_be_cancelled() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        await pair.server.connection.send("news", "first")
        request = asyncio.ensure_future(pair.server.connection.request("news", "cancelled"))
        await turns()
        request.cancel()
        await turns()
        (error,) = pair.client.link.sent(FrameType.RPC_ERROR)
        assert error.body[0] == CallCancelled.code
        await slow.let_go(2)
        assert slow.ended == ["first"], "the handler of the second has never run"


async def test_a_message_that_waits_for_a_thread_is_not_handled_behind_the_end() -> None:
    async with Pair() as pair:
        release, handled = threading.Event(), []

        @pair.server.on("later")
        def later(connection: Connection, message: int) -> None:
            handled.append(message)

        loop = asyncio.get_running_loop()
        threads = [run_in_thread(loop, lambda: release.wait(5)) for _ in range(64)]  # all there are
        await pair.client.connection.send("later", 1)
        await until(lambda: bool(pair.server.connection._inbox.futures()))
        pair.server.connection.link_lost(None)
        release.set()
        await within(asyncio.gather(*threads))
        await within(run_in_thread(loop, lambda: None))  # behind which nothing else waits
        assert handled == []


async def test_a_thread_that_handles_a_request_is_not_ended_but_answered() -> None:
    async with Pair() as pair:
        began, release, ended = threading.Event(), threading.Event(), threading.Event()

        @pair.server.on("block")
        def block(connection: Connection, message: Any) -> str:
            began.set()
            release.wait(5)
            ended.set()
            return "a result that comes too late"

        request = asyncio.ensure_future(pair.client.connection.request("block"))
        await until(began.is_set)
        request.cancel()
        await turns()
        assert pair.server.link.sent(FrameType.RPC_ERROR) == []
        release.set()
        await until(lambda: pair.server.link.sent(FrameType.RPC_ERROR))
        assert ended.is_set()


async def test_an_acknowledged_send_waits_for_its_handler_and_drops_the_value() -> None:
    async with Pair() as pair:
        gate = asyncio.Event()

        @pair.server.on("slow")
        async def slow(connection: Connection, message: Any) -> Any:
            await gate.wait()
            return "a value"

        send = asyncio.ensure_future(pair.client.connection.send("slow", ack=True))
        await turns()
        assert not send.done()
        gate.set()
        assert await within(send) is None  # type: ignore[func-returns-value]


async def test_an_answer_is_converted_where_that_is_asked_for() -> None:
    async with Pair() as pair:

        @pair.server.on("number")
        async def number(connection: Connection, message: Any) -> Any:
            return "5"

        assert await within(pair.client.connection.request("number")) == "5"
        assert await within(pair.client.connection.request("number", returns=int)) == 5
        with pytest.raises(ValueError):
            await within(pair.client.connection.request("number", returns=list[int]))


async def test_values_may_have_exactly_the_size_that_the_peer_accepts() -> None:
    limit = 10_000
    small = settings(frame_max=limit)
    async with Pair(client=small, server=small) as pair:

        @pair.server.on("echo")
        async def echo(connection: Connection, message: bytes) -> bytes:
            return message

        @pair.server.on("make")
        async def make(connection: Connection, message: int) -> bytes:
            return bytes(message)

        most = limit - 3
        with pytest.raises(PayloadTooLarge, match=r"'echo' take \d+ bytes .* accepts 10000"):
            await within(pair.client.connection.request("echo", bytes(most + 1)))
        with pytest.raises(PayloadTooLarge, match="10000"):
            await within(pair.client.connection.request("make", most + 1))
        assert len(await within(pair.client.connection.request("make", most))) == most
        assert len(await within(pair.client.connection.request("echo", bytes(most)))) == most


@pytest.mark.parametrize("name", ["", "x" * 257, 5, None])
async def test_a_name_that_cannot_be_sent_is_refused(name: Any) -> None:
    async with Pair() as pair:
        with pytest.raises(ValueError, match="1 to 256 bytes"):
            await within(pair.client.connection.send(name))
        with pytest.raises(ValueError, match="1 to 256 bytes"):
            await within(pair.client.connection.request(name))
        assert pair.client.link.writes == []


async def test_a_message_that_nobody_handles_is_told_to_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "conduit.connection")
    async with Pair() as pair:

        @pair.server.on("greeting")
        async def greeting(connection: Connection, message: int) -> None: ...

        await pair.client.connection.send("greetings")
        await pair.client.connection.send("greeting", "secret")
        with pytest.raises(MethodNotFound, match=r"'greetings'.*did you mean 'greeting'"):
            await within(pair.client.connection.request("greetings"))
    assert "no handler for message 'greetings'" in caplog.text
    assert "'greeting' refused" in caplog.text and "secret" not in caplog.text


async def test_a_reply_that_nobody_handles_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "conduit.connection")
    async with Pair() as pair:

        @pair.server.on("greeting")
        async def greeting(connection: Connection, message: Any) -> str:
            return "hello"

        await pair.client.connection.send("greeting")
        await until(lambda: pair.server.link.sent(FrameType.MESSAGE))
        await turns()
        assert pair.client.link.sent(FrameType.MESSAGE)[1:] == []
        assert not pair.client.connection.closed


# Best effort


async def test_of_broadcasts_that_wait_the_oldest_are_dropped() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        for number in range(300):
            assert pair.server.connection.push(best_effort("news", number))
        await until(lambda: slow.began)
        await turns()
        await slow.let_go(300)
        await turns()
        assert slow.ended == [0, *range(300 - 256, 300)]
        # Nothing but the counter tells of what was dropped.
        assert pair.client.connection._inbox.dropped == 300 - 257
        assert pair.client.link.sent(FrameType.STREAM_CREDIT) == [], "they cost nothing"


@pytest.mark.parametrize("size, kept", [(1000, 9), (5000, 1), (20_000, 1)])
async def test_so_are_those_that_are_too_many_bytes(size: int, kept: int) -> None:
    async with Pair(client=settings(window=(256, 10_000))) as pair:
        slow = Slow(pair.client)
        for number in range(20):
            assert pair.server.connection.push(best_effort("news", [number, bytes(size)]))
            await turns(3)
        await until(lambda: slow.began)
        await turns()
        assert pair.client.connection._inbox.held_bytes < max(10_000, size + 100)
        await slow.let_go(20)
        await turns()
        assert [number for number, _ in slow.ended] == [0, *range(20 - kept, 20)]
        assert pair.client.connection.dropped == 19 - kept
        assert pair.client.connection._inbox.held_bytes == 0


async def test_a_broadcast_is_not_pushed_to_a_peer_that_does_not_keep_up() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client)
        pair.server.connection.pause_writing()
        assert not pair.server.connection.push(best_effort("news", 1))
        pair.server.connection.resume_writing()
        assert pair.server.connection.push(best_effort("news", 2))
        await turns()
        await slow.let_go()
        assert slow.ended == [2]
        await within(pair.server.connection.close())
        assert not pair.server.connection.push(best_effort("news", 3))


async def test_broadcasts_are_gathered_into_few_writes() -> None:
    async with Pair() as pair:
        slow = Slow(pair.client, concurrent=True)
        for number in range(150):
            pair.server.connection.push(best_effort("news", number))
        await until(lambda: len(slow.began) == 150)
        sizes = [write.count(b"\xa4news") for write in pair.server.link.writes]
        assert sizes == [64, 64, 22]
        await slow.let_go(150)


async def test_a_broadcast_that_is_too_large_for_a_peer_is_not_sent_to_it() -> None:
    async with Pair(client=settings(frame_max=1000)) as pair:
        slow = Slow(pair.client, concurrent=True)
        large = "x" * 2000
        assert not pair.server.connection.push(best_effort("news", large))
        assert not pair.server.connection.send_reliably(msgpack.packb(["news", large]), 10_000)
        assert pair.server.connection.push(best_effort("news", 1))
        assert pair.server.connection.send_reliably(msgpack.packb(["news", 2]), 10_000)
        await turns()
        assert sorted(slow.began) == [1, 2]
        await slow.let_go(2)


async def test_replies_that_nobody_asked_for_cannot_pile_up() -> None:
    async with Pair(client=settings(window=(4, 1000)), server=settings(window=(4, 1000))) as pair:
        slow = Slow(pair.client, "made_up")
        for number in range(100):
            pair.server.write(FrameType.MESSAGE, 0, ["made_up", number], SEQUENCED | REPLY)
            await turns(3)
        assert slow.began == [0]
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.FLOOD


async def test_replies_that_nobody_asked_for_are_bounded_whatever_their_sender_grants() -> None:
    grants = settings(window=(2**32 - 1, 2**32 - 1))
    async with Pair(client=settings(window=(4, 1000)), server=grants) as pair:
        Slow(pair.client, "made_up")
        for number in range(14):
            pair.server.write(FrameType.MESSAGE, 0, ["made_up", number], SEQUENCED | REPLY)
            await turns(3)
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.FLOOD


async def test_what_costs_nothing_is_not_handled_beside_without_end() -> None:
    most = inbox.FREE
    async with Pair() as pair:
        beside = Slow(pair.client, "beside", concurrent=True)
        for number in range(most + 2):
            assert pair.server.connection.push(best_effort("beside", number))
            await turns(2)
        for number in range(3):
            pair.server.write(
                FrameType.MESSAGE, 0, ["beside", f"reply {number}"], SEQUENCED | REPLY
            )
        await pair.server.connection.send("beside", "what has cost credit")
        await turns()
        assert beside.began == [*range(most), "what has cost credit"]
        await beside.let_go(most + 6)
        await turns()
        assert beside.ended[most + 1 :] == [most, most + 1, "reply 0", "reply 1", "reply 2"]
        assert pair.client.connection.dropped == 0
        # And once there is room again, as before.
        assert pair.server.connection.push(best_effort("beside", "later"))
        await turns()
        assert beside.began[-1] == "later"
        await beside.let_go()


async def test_messages_keep_their_order_behind_one_that_has_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inbox, "FREE", 1)
    async with Pair() as pair:
        beside, one_by_one = Slow(pair.client, "beside", concurrent=True), Slow(pair.client)
        for name in ("beside", "beside", "news", "news"):
            pair.server.write(FrameType.MESSAGE, 0, [name, 1], SEQUENCED | REPLY)
        await pair.server.connection.send("news", 2)
        await turns()
        assert (beside.began, one_by_one.began) == ([1], [])
        await beside.let_go()
        assert (beside.began, one_by_one.began) == ([1, 1], [1])
        await one_by_one.let_go(3)
        await turns()
        assert one_by_one.ended == [1, 1, 2]
        await beside.let_go()


@pytest.mark.parametrize("pair_of", [Pair, SocketPair])
async def test_a_large_message_takes_no_more_memory_while_it_waits_than_it_came_in(
    pair_of: type[Pair],
) -> None:
    text = ["ab", "cd"] * 100_000
    async with pair_of(client=settings(window=(256, 100 << 20))) as pair:
        slow = Slow(pair.client)
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(10):
                await pair.server.connection.send("news", [number, text])
            await until(lambda: pair.client.connection._inbox.held_bytes > 9 * 600_000)
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert taken < 40 << 20, "decoded they are ten times as large"
        await slow.let_go(10)
        await until(lambda: len(slow.ended) == 10)
        assert [number for number, _ in slow.ended] == list(range(10))
        assert all(got == text for _, got in slow.ended)


async def test_large_bytes_wait_as_they_are() -> None:
    large = [bytes([number]) * (5 << 20) for number in range(3)]
    wide = settings(window=(256, 100 << 20), frame_max=8 << 20)
    async with SocketPair(client=wide) as pair:
        slow = Slow(pair.client)
        for one in large:
            await pair.server.connection.send("news", one)
        await until(lambda: pair.client.connection._inbox.held_bytes > 10 << 20)
        await slow.let_go(3)
        await until(lambda: len(slow.ended) == 3)
        assert slow.ended == large


async def test_a_broadcast_is_not_pushed_before_the_login_is_done() -> None:
    pair = Pair()
    assert not pair.server.connection.push(best_effort("news", 1))
    assert not pair.server.connection.send_reliably(msgpack.packb(["news", 1]), 100)


# Reliable broadcasts


async def test_what_is_sent_reliably_waits_for_credit_in_order() -> None:
    async with Pair(client=settings(window=(2, 1000))) as pair:
        slow = Slow(pair.client)
        for number in range(10):
            assert pair.server.connection.send_reliably(msgpack.packb(["news", number]), 10_000)
        await turns()
        send = asyncio.ensure_future(pair.server.connection.send("news", "after them"))
        await turns()
        assert slow.began == [0] and not send.done()
        for _ in range(11):
            await slow.let_go()
        assert slow.ended == [*range(10), "after them"]
        await within(send)


async def test_what_waits_for_credit_is_counted_as_it_comes_and_goes() -> None:
    payload = msgpack.packb(["news", "x" * 100])
    async with Pair(client=settings(window=(2, 1000))) as pair:
        slow = Slow(pair.client)
        waiting = pair.server.connection._messages
        for _ in range(10):
            assert pair.server.connection.send_reliably(payload, 10_000)
        assert waiting.reliable_bytes == 8 * len(payload)
        await slow.let_go(5)
        await turns()
        assert waiting.reliable_bytes == 3 * len(payload)
        await slow.let_go(5)
        await turns()
        assert waiting.reliable_bytes == 0
        for _ in range(10):
            assert pair.server.connection.send_reliably(payload, 10_000)
        assert len(waiting.leave()) * len(payload) > 0 == waiting.reliable_bytes
        await slow.let_go(5)


async def test_a_peer_that_lets_too_much_pile_up_is_closed() -> None:
    async with Pair(client=settings(window=(1, 1000))) as pair:
        slow = Slow(pair.client)
        payload = msgpack.packb(["news", "x" * 100])
        accepted = [pair.server.connection.send_reliably(payload, 500) for _ in range(8)]
        assert accepted == [True] * 5 + [False] * 3  # one is sent and four are kept
        await within(pair.client.connection.wait_closed())
        reason = pair.client.connection.reason
        assert reason is not None and reason.code == CloseCode.TOO_SLOW
        assert str(5 * len(payload)) in str(reason) and "500" in str(reason)
        await turns()
        assert len(slow.began) == 1 and slow.ended == []


# Many, and the end


@pytest.mark.parametrize("pair_of", [Pair, SocketPair])
async def test_more_messages_than_credit_all_arrive_in_order(pair_of: type[Pair]) -> None:
    async with pair_of() as pair:
        handled: list[int] = []

        @pair.server.on("news")
        async def news(connection: Connection, message: int) -> None:
            if message % 10 == 0:
                await asyncio.sleep(0)
            handled.append(message)

        sends = [pair.client.connection.send("news", number) for number in range(2000)]
        await within(asyncio.gather(*sends))
        await until(lambda: len(handled) == 2000)
        assert handled == list(range(2000))


async def test_the_end_of_the_connection_is_the_end_of_its_messages() -> None:
    async with Pair(client=settings(window=(2, 1000))) as pair:
        slow = Slow(pair.client)
        request = asyncio.ensure_future(pair.server.connection.request("news", 0))
        await turns(1)
        await pair.server.connection.send("news", 1)
        waiting = asyncio.ensure_future(pair.server.connection.send("news", 2))
        await turns()
        assert not waiting.done()
        pair.server.link.cut()
        with pytest.raises(ConnectionLost) as lost:
            await within(request)
        assert lost.value.executed is None and "'news'" in str(lost.value)
        with pytest.raises(ConnectionClosed) as closed:
            await within(waiting)
        assert not isinstance(closed.value, ConnectionLost)
        for late in (pair.server.connection.send("news"), pair.server.connection.request("news")):
            with pytest.raises(ConnectionClosed) as closed:
                await within(late)
            assert not isinstance(closed.value, ConnectionLost)
        await turns()
        await slow.let_go(3)
        assert (slow.began, slow.ended) == ([0], []), "the handler was cancelled, the rest dropped"


async def test_too_large_or_not_a_closed_connection_is_closed() -> None:
    async with Pair(client=settings(frame_max=1000)) as pair:
        await within(pair.server.connection.close())
        with pytest.raises(ConnectionClosed):
            await within(pair.server.connection.send("news", "x" * 2000))


async def test_a_handler_of_a_message_may_send_and_call() -> None:
    async with Pair() as pair:
        heard: list[Any] = []

        @pair.client.rpc
        async def double(number: int) -> int:
            return 2 * number

        @pair.client.on("answer")
        async def answer(message: Any) -> None:
            heard.append(message)

        @pair.server.on("question")
        async def question(connection: Connection, message: int) -> None:
            await connection.send("answer", await connection.rpc.double(number=message))

        for number in range(5):
            await pair.client.connection.send("question", number)
        await until(lambda: len(heard) == 5)
        assert heard == [0, 2, 4, 6, 8]


async def test_handlers_that_wait_for_each_others_credit_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "LONG_WAIT", 0.05)
    async with Pair(client=settings(window=(2, 100_000)), server=settings(window=(2, 100_000))) as (
        pair
    ):

        @pair.server.on("ping")
        async def ping(connection: Connection, message: int) -> None:
            for _ in range(4):
                await connection.send("pong", message)

        @pair.client.on("pong")
        async def pong(message: int) -> None:
            for _ in range(4):
                await pair.client.connection.send("ping", message)

        await pair.client.connection.send("ping", 1)
        await until(lambda: caplog.text.count("to send 'ping'") and "to send 'pong'" in caplog.text)
        assert "a handler has waited 0.05 s" in caplog.text
        assert "return the value instead" in caplog.text


async def test_who_waits_for_credit_outside_of_a_handler_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "LONG_WAIT", 0.0)
    async with Pair(client=settings(window=(1, 100_000))) as pair:
        slow = Slow(pair.client)
        sends = [asyncio.ensure_future(pair.server.connection.send("news", n)) for n in range(2)]
        await turns()
        assert not sends[1].done()
        await slow.let_go(2)
        await within(asyncio.gather(*sends))
    assert "has waited" not in caplog.text


async def test_a_handler_that_is_cancelled_by_itself_lets_the_next_one_run() -> None:
    async with Pair() as pair:
        handled: list[int] = []

        @pair.server.on("news")
        async def news(connection: Connection, message: int) -> None:
            task = asyncio.current_task()
            assert task is not None
            if message == 1:
                task.cancel()
            with contextlib.suppress(LookupError):
                await asyncio.sleep(0)
            handled.append(message)

        for number in range(4):
            await pair.client.connection.send("news", number)
        await until(lambda: len(handled) == 3)
        assert handled == [0, 2, 3]


@pytest.mark.parametrize("suspend", [0, 1])
@pytest.mark.parametrize("kind", ["message", "call"])
async def test_a_handler_that_closes_its_connection_goes_on_to_its_end(
    kind: str, suspend: int
) -> None:
    async with Pair() as pair:
        steps: list[str] = []

        async def close(connection: Connection) -> None:
            for _ in range(suspend):
                await asyncio.sleep(0)
            steps.append("closing")
            await connection.close(4403, "enough")
            steps.append("closed")

        @pair.server.on("close")
        async def on_message(connection: Connection, message: Any) -> None:
            await close(connection)

        @pair.server.rpc("close")
        async def on_call(connection: Connection) -> None:
            await close(connection)

        if kind == "message":
            await pair.client.connection.send("close")
        else:
            with pytest.raises(ConnectionLost, match="enough"):
                await within(pair.client.call("close"))
        await within(pair.client.connection.wait_closed())
        await within(pair.server.connection.wait_closed())
        await turns()
        assert steps == ["closing", "closed"]
