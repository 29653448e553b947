"""Messages of both directions: credit for what goes out, order for what comes in.

A side may send as many messages as the other has granted. Each is paid back when its handler has
ended, so a receiver that is slow makes its own sender wait, and nobody else. Replies cost no
credit, nor do broadcasts that are sent at best effort.

Messages of one connection are handled in the order in which they came. A queue exists only while a
handler is suspended.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections import deque
from functools import partial
from typing import Any, Final, NamedTuple

from ..exceptions import (
    CallCancelled,
    ConnectionClosed,
    ConnectionLost,
    Overloaded,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from ..protocol.events import Capabilities
from ..protocol.frames import REPLY, SEQUENCED, CloseCode, FrameType, Payload, word
from ..protocol.payload import UNSENDABLE, Encoder, decode, read_credit
from .calls import Calls, Moved, closed_again, unserved
from .handling import HANDLING
from .line import NOBODY, Line
from .outlet import Outlet
from .requests import DEFAULT, NAME_BYTES, Default, too_large
from .running import Handler, as_rpc_error, why_stopped
from .serving import Routes, Serving
from .tasks import Suspended

__all__ = ["Messages", "encode_message"]

logger = logging.getLogger("conduit.connection")

_MESSAGE: Final = word(FrameType.MESSAGE, SEQUENCED)
_REPLY: Final = word(FrameType.MESSAGE, SEQUENCED | REPLY)
_CREDIT: Final = word(FrameType.STREAM_CREDIT, SEQUENCED)

BEST_EFFORT: Final = 256
"""Broadcasts that wait for a busy handler; of more than that, or of more bytes than the window
has, the oldest are dropped."""


class _Incoming(NamedTuple):
    """A message that was received, from its decoding to the end of its handler.

    Attributes:
        size: What it costs in credit; 0 for one that costs nothing.
        reply: Whether it answers a message that was sent with `send`.
    """

    name: str
    data: Any
    handler: Handler
    id: int
    size: int
    reply: bool


class Messages:
    """The messages of one connection.

    Args:
        outlet: Where frames go.
        encoder: Packs data.
        routes: Names to handlers.
        calls: Keeps what waits for an answer.
        serving: Runs handlers and sends answers.
        window: Messages and bytes that the peer may send before any was handled.
        backpressure: Whether a sender waits for credit, or is refused.

    Attributes:
        dropped: Broadcasts that were dropped because the handler was busy.
    """

    __slots__ = (
        "_best_effort",
        "_best_effort_bytes",
        "_busy",
        "_bytes",
        "_calm",
        "_count",
        "_encoder",
        "_expected",
        "_granted",
        "_handlers",
        "_inbox",
        "_inbox_bytes",
        "_line",
        "_loop",
        "_open_bytes",
        "_open_count",
        "_outlet",
        "_owed_bytes",
        "_owed_count",
        "_reliable",
        "_replies",
        "_running",
        "_serving",
        "_value_max",
        "_waits",
        "_window",
        "_calls",
        "dropped",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outlet: Outlet,
        encoder: Encoder,
        routes: Routes,
        calls: Calls,
        serving: Serving,
        *,
        window: tuple[int, int],
        backpressure: bool,
    ) -> None:
        self._loop = loop
        self._calm: asyncio.Future[None] | None = None
        self._outlet = outlet
        self._encoder = encoder
        self._handlers = routes.messages
        self._calls = calls
        self._serving = serving
        self._window = window
        self._waits = backpressure
        self._line = NOBODY
        self._count = self._bytes = self._granted = 0
        self._value_max = sys.maxsize
        self._open_count = self._open_bytes = 0
        self._owed_count = self._owed_bytes = 0
        self._replies = 0
        self._expected = 0
        self._busy = False
        self._running: set[asyncio.Future[Any]] | None = None
        # Each message with the bytes that it came in, which are more than its cost if that is none.
        self._inbox: deque[tuple[_Incoming, int]] | None = None
        self._best_effort: deque[tuple[_Incoming, int]] | None = None
        self._inbox_bytes = self._best_effort_bytes = 0
        self._reliable: deque[bytes] | None = None
        self.dropped = 0

    def opened(self, peer: Capabilities) -> None:
        """Learn what the peer grants."""
        self._count, self._bytes = peer.window
        self._granted = peer.window[0]
        self._value_max = peer.frame_max

    # Out.

    async def send(self, name: str, data: Any) -> None:
        """Send a message; returns when it is in the outbox.

        Who does not handle the replies to earlier messages waits, unless it is a handler itself.
        """
        payload = self._encode(name, data)
        while self._replies >= self._window[0] and HANDLING.get() is None:
            if self._calm is None:
                self._calm = self._loop.create_future()
            await asyncio.shield(self._calm)
        if not self._may_send():
            try:
                await self._turn(name, math.inf, None)
            except Moved:
                assert self._calls.elsewhere is not None
                await self._calls.elsewhere.send(name, data)
                return
        self._put(0, payload)

    async def request(self, name: str, data: Any, timeout: float | None | Default = DEFAULT) -> Any:
        """Send a message and return what its handler answers."""
        payload = self._encode(name, data)
        calls = self._calls
        seconds, deadline = calls.deadline(timeout)
        try:
            if not self._may_send():
                await self._turn(name, deadline, seconds)
            id = calls.take_id()
            self._put(id, payload)
            return await calls.reply(id, name, seconds, deadline)
        except Moved:
            pass
        except (Unavailable, ConnectionLost) as exc:
            if calls.elsewhere is None or not unserved(exc):
                raise
        assert calls.elsewhere is not None
        return await calls.elsewhere.request(name, data, calls.left(deadline))

    def leave(self) -> list[bytes]:
        """Send nothing more: the peer goes away.

        Returns:
            The payloads of the reliable messages that were not sent yet.
        """
        self._count = -sys.maxsize  # no credit makes up for it, so that nobody may send
        self._line.fail(Moved)
        unsent, self._reliable = self._reliable, None
        return list(unsent or ())

    def send_reliably(self, payload: bytes) -> int:
        """Send an encoded message without waiting; what has no credit yet is kept in order.

        Returns:
            The bytes that are kept.
        """
        if self._reliable or not self._may_send():
            if self._reliable is None:
                self._reliable = deque()
            self._reliable.append(payload)
            self._outlet.head.grown()
            return self.reliable_bytes
        self._put(0, payload)
        return 0

    def _encode(self, name: str, data: Any) -> bytes:
        if self._outlet.closed is not None and self._calls.elsewhere is None:
            raise closed_again(self._outlet.closed)
        return encode_message(self._encoder, name, data, self._value_max)

    def _may_send(self) -> bool:
        return not self._line.waiters and not self._reliable and self._has_room()

    async def _turn(self, name: str, deadline: float, seconds: float | None) -> None:
        """Wait in line for credit and for room in the outbox."""
        again = False
        while True:
            if self._calls.elsewhere is not None:
                raise Moved
            if self._outlet.closed is not None:
                raise closed_again(self._outlet.closed)
            if not self._waits:
                raise Overloaded(f"the peer does not keep up, so {name!r} was not sent")
            if self._line is NOBODY:
                self._line = Line()
            try:
                await self._line.wait(None if deadline == math.inf else deadline, again=again)
            except asyncio.TimeoutError:
                raise RPCTimeout(
                    f"{name!r} waited {seconds} s for credit",
                    details={"retryable": True, "executed": False},
                ) from None
            if self._has_room():
                return
            again = True

    def _has_room(self) -> bool:
        return self._count > 0 and self._bytes > 0 and not self._outlet.blocked

    def _put(self, id: int, payload: bytes) -> None:
        self._spend_credit(payload)
        self._expected += not id
        self._outlet.protocol.send(_MESSAGE, id, payload)
        if self._line.waiters:
            self.room()

    def _spend_credit(self, payload: bytes) -> None:
        self._count -= 1
        self._bytes -= len(payload)

    def room(self) -> None:
        """Go on: there is more credit, or the outbox has room again."""
        if self._owed_count and not self._serving.held:
            self._give_credit()
        while self._reliable and self._has_room():
            payload = self._reliable.popleft()
            self._spend_credit(payload)
            self._expected += 1
            self._outlet.protocol.send(_MESSAGE, 0, payload)
        if self._line.waiters and self._has_room():
            self._line.move()

    def credit(self, payload: Payload) -> None:
        """Take STREAM_CREDIT of stream 0."""
        count, size = read_credit(payload)
        self._count += count
        self._bytes += size
        self.room()

    # In.

    def receive(self, flags: int, id: int, payload: Payload) -> None:
        """Take MESSAGE that is not a reply to a request, and see to its handler."""
        serving = self._serving
        if serving.held:
            serving.check_held()
        reply, size = False, 0
        if flags & SEQUENCED:
            reply = bool(flags & REPLY)
            size = 0 if reply else len(payload)
        try:
            body = decode(payload)
        except RPCError as exc:
            if size:
                self._spend(size)
            self._unhandled(id, exc, size)
            return
        if type(body) is not list or len(body) != 2 or type(body[0]) is not str:
            raise ProtocolError("MESSAGE must carry [name, data]", close_code=CloseCode.BAD_PAYLOAD)
        if size:
            self._spend(size)
        name, data = body
        if serving.draining and not reply:
            self._unhandled(id, serving.stopping(), size)
            return
        handler = self._handlers.get(name)
        if handler is None:
            if not reply:
                self._unhandled(id, serving.unknown_message(name), size)
            return
        if not self._busy or handler.concurrent:
            self._run(name, data, handler, id, size, reply)
        else:
            self._queue(_Incoming(name, data, handler, id, size, reply), len(payload))

    def _queue(self, message: _Incoming, size: int) -> None:
        """Keep a message, which came in `size` bytes, until the handler that runs has ended."""
        if message.size or message.reply:
            if self._inbox is None:
                self._inbox = deque()
            self._inbox.append((message, size))
            self._inbox_bytes += size
            if message.reply:
                self._keep_reply()
        else:
            if self._best_effort is None:
                self._best_effort = deque()
            self._make_room(self._best_effort, size)
            self._best_effort.append((message, size))
            self._best_effort_bytes += size

    def _make_room(self, queue: deque[tuple[_Incoming, int]], size: int) -> None:
        """Drop the oldest broadcasts for one of `size` bytes; a single one may have any size."""
        most = self._window[1] - size
        while queue and (len(queue) >= BEST_EFFORT or self._best_effort_bytes > most):
            self._best_effort_bytes -= queue.popleft()[1]
            self.dropped += 1

    @property
    def held_bytes(self) -> int:
        """Bytes of the messages that wait for a handler to end."""
        return self._inbox_bytes + self._best_effort_bytes

    @property
    def reliable_bytes(self) -> int:
        """Bytes of the reliable broadcasts that wait for credit."""
        return sum(map(len, self._reliable or ()))

    def _spend(self, size: int) -> None:
        """Count what the peer has sent and was not paid back."""
        if self._open_count >= self._window[0] or self._open_bytes >= self._window[1]:
            raise ProtocolError(
                f"a message without credit: {self._open_count} messages of "
                f"{self._open_bytes} bytes wait here, of {self._window}",
                close_code=CloseCode.FLOOD,
            )
        self._open_count += 1
        self._open_bytes += size

    def _keep_reply(self) -> None:
        """Count a reply that waits for its handler.

        Those that answer a message are bounded by what this side sends; made up ones by the window.
        """
        self._replies += 1
        if self._expected:
            self._expected -= 1
        elif self._replies > 2 * self._window[0] + self._granted:
            raise ProtocolError(
                f"{self._replies} replies wait here, more than there were messages",
                close_code=CloseCode.FLOOD,
            )

    def _calm_down(self) -> None:
        if self._calm is not None and self._replies < self._window[0]:
            self._calm.set_result(None)
            self._calm = None

    def _unhandled(self, id: int, error: RPCError, size: int) -> None:
        if id:
            self._serving.refuse(id, error, slot=False)
        else:
            logger.info("message dropped: %s", error)
        if size:
            self._pay_back(size)

    def _run(self, name: str, data: Any, handler: Handler, id: int, size: int, reply: bool) -> None:
        """Run the handler of a message; the parameters are those of `_Incoming`."""
        self._serving.handling.call = handler
        try:
            result = self._serving.execute(handler, data)
        except BaseException as exc:  # noqa: BLE001  # _settle raises what is not the handler's
            self._settle(_Incoming(name, data, handler, id, size, reply), None, exc)
            return
        if result is None and not id and not size:
            return  # nothing to answer and nothing to pay back: a broadcast
        message = _Incoming(name, data, handler, id, size, reply)
        if type(result) is not Suspended:
            self._settle(message, result, None)
            return
        future = result.future
        if self._running is None:
            self._running = set()
        self._running.add(future)
        if not handler.concurrent:
            self._busy = True
        self._serving.track_message(id, handler, future)
        future.add_done_callback(partial(self._ended, message))

    def _ended(self, message: _Incoming, future: asyncio.Future[Any]) -> None:
        if self._running is not None:
            self._running.discard(future)
        stopped = self._serving.untrack(message.id, future)
        if stopped is not None:
            self._settle(message, None, why_stopped(future, stopped, message.name))
        elif future.cancelled():
            self._settle(message, None, asyncio.CancelledError())
        else:
            error = future.exception()
            self._settle(message, None if error is not None else future.result(), error)
        if not message.handler.concurrent:
            self._busy = False
            self._drain()

    def cancel(self, id: int) -> None:
        """Take CANCEL for a request that still waits for its turn; any other means nothing."""
        for message, size in self._inbox or ():
            if message.id == id and id:
                assert self._inbox is not None
                self._inbox.remove((message, size))
                self._inbox_bytes -= size
                self._settle(message, None, CallCancelled("the caller has given up"))
                return

    def _drain(self) -> None:
        """Handle what has waited for a handler to end."""
        handling = self._serving.handling
        handling.enter(self._serving)
        try:
            while not self._busy:
                if self._best_effort:
                    message, size = self._best_effort.popleft()
                    self._best_effort_bytes -= size
                    self._run(*message)
                elif self._inbox:
                    message, size = self._inbox.popleft()
                    self._inbox_bytes -= size
                    if message.reply:
                        self._replies -= 1
                        self._calm_down()
                    self._run(*message)
                else:
                    break
        finally:
            handling.leave()

    def _settle(self, message: _Incoming, result: Any, error: BaseException | None) -> None:
        """Answer a message whose handler has ended, and pay it back."""
        if self._outlet.closed is None:
            if error is None:
                try:
                    self._answer(message, result)
                except Exception as exc:  # noqa: BLE001  # becomes the answer
                    error = exc
            if error is not None:
                failure = as_rpc_error(error, message.name, debug=self._serving.debug)
                if message.id:
                    self._serving.refuse(message.id, failure, slot=False)
                elif isinstance(error, RPCError):
                    logger.warning("message %r refused: %s", message.name, error)
            if message.size:
                self._pay_back(message.size)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error

    def _answer(self, message: _Incoming, result: Any) -> None:
        if message.handler.finish is not None:
            result = message.handler.finish(result)
        if message.id:
            name = message.name
        elif result is not None and not message.reply:
            name = f"{message.name}_response"
        else:
            return
        payload = encode_message(self._encoder, name, result, self._value_max)
        self._serving.send(_REPLY, message.id, payload, slot=False)

    def _pay_back(self, size: int) -> None:
        self._owed_count += 1
        self._owed_bytes += size
        if not self._serving.held:
            self._give_credit()

    def _give_credit(self) -> None:
        """Give back what is owed, if that is worth a frame.

        Not while answers are held: credit would overtake them, and a peer that asks for more than
        it can take would be told to go on asking.
        """
        if self._owed_count * 2 >= self._window[0] or self._owed_bytes * 2 >= self._window[1]:
            self._open_count -= self._owed_count
            self._open_bytes -= self._owed_bytes
            credit = self._encoder.pack([self._owed_count, self._owed_bytes])
            self._owed_count = self._owed_bytes = 0
            self._outlet.protocol.send(_CREDIT, 0, credit)

    def fail(self, error: ConnectionClosed, *, handle_rest: bool) -> None:
        """End everything: the connection is gone.

        Args:
            error: Why.
            handle_rest: The peer has closed as it should, so what it sent before is still handled;
                only requests are not, whose answers nobody would get.
        """
        self._replies = 0
        self._calm_down()
        self._line.fail(partial(closed_again, error))
        self._reliable = None
        if not handle_rest:
            self.stop()
        elif self._inbox:
            self._inbox = deque(entry for entry in self._inbox if not entry[0].id)
            self._inbox_bytes = sum(size for _, size in self._inbox)

    def futures(self) -> set[asyncio.Future[Any]]:
        """Return what tells the end of each running handler."""
        return set(self._running or ())

    def stop(self) -> None:
        """Stop every handler, and forget what waits for one."""
        self._inbox = self._best_effort = None
        self._inbox_bytes = self._best_effort_bytes = 0
        me = asyncio.current_task()
        for future in self._running or ():
            if future is not me:  # a handler that stops the server goes on to its end
                reason = CallCancelled("the connection has gone")
                self._serving.handling.suspended[future].tell(reason)
                future.cancel()


def encode_message(encoder: Encoder, name: str, data: Any, limit: int = sys.maxsize) -> bytes:
    """Return the payload of a MESSAGE.

    Raises:
        PayloadTooLarge: The data take more than `limit` bytes.
        TypeError: The data cannot be sent; ValueError for a number or text that cannot.
        ValueError: The name is none.
    """
    if not isinstance(name, str) or not 0 < len(name.encode()) <= NAME_BYTES:
        raise ValueError(f"a message name is text of 1 to {NAME_BYTES} bytes, not {name!r:.80}")
    try:
        value = encoder.pack(data)
    except UNSENDABLE as exc:
        raise encoder.explained(exc, data) from exc
    if len(value) > limit:
        raise too_large(f"the data of {name!r}", len(value), limit)
    return b"\x92" + encoder.pack(name) + value
