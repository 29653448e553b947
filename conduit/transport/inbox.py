"""The messages of the peer: handled in the order in which they came, and paid back.

A queue exists only while a handler is suspended. A message that is sequenced has cost the peer
credit; it is paid back when its handler has ended, so a receiver that is slow makes its own sender
wait, and nobody else. Replies cost no credit, nor do broadcasts that are sent at best effort.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from functools import partial
from typing import Any, Final, NamedTuple, TypeGuard

from ..exceptions import CallCancelled, ProtocolError, RPCError
from ..protocol.events import Capabilities, printable
from ..protocol.frames import REPLY, SEQUENCED, CloseCode, FrameType, Payload, word
from ..protocol.payload import Encoder, decode, kept
from .answers import Answers
from .messages import encode_message
from .outlet import Outlet
from .running import Handler, as_rpc_error, exit_behind, why_stopped
from .serving import Routes, Serving
from .tasks import Suspended
from .threads import ThreadFuture

__all__ = ["Inbox"]

logger = logging.getLogger("conduit.connection")

_REPLY: Final = word(FrameType.MESSAGE, SEQUENCED | REPLY)
_CREDIT: Final = word(FrameType.STREAM_CREDIT, SEQUENCED)

BEST_EFFORT: Final = 256
"""Broadcasts that wait for a busy handler; of more than that, or of more bytes than the window
has, the oldest are dropped."""
FREE: Final = 256
"""Messages without cost that are handled beside each other: broadcasts, and replies."""
SMALL: Final = 4096
"""Bytes of a message up to which it waits decoded. A larger one waits as it came: once decoded it
may take twenty times as much memory as is counted for it."""


class _Incoming(NamedTuple):
    """A message that was received, from its decoding to the end of its handler.

    Attributes:
        data: What it carries; while it waits, the whole payload of one that is not `SMALL`.
        size: What it costs in credit; 0 for one that costs nothing.
        reply: Whether it answers a message that was sent with `send`.
    """

    name: str
    data: Any
    handler: Handler
    id: int
    size: int
    reply: bool


class Inbox:
    """The messages that come in on one connection.

    Args:
        loop: The event loop.
        outlet: Where credit goes.
        encoder: Packs replies.
        routes: Names to handlers.
        answers: Where replies go.
        serving: Runs handlers.
        window: Messages and bytes that the peer may send before any was handled.

    Attributes:
        dropped: Broadcasts that were dropped because the handler was busy.
        expected: Messages that this side has sent, each of which may have one reply.
        replies: Those that wait here for their handlers.
    """

    __slots__ = (
        "_answers",
        "_best_effort",
        "_best_effort_bytes",
        "_busy",
        "_calm",
        "_encoder",
        "_free",
        "_granted",
        "_handlers",
        "_inbox",
        "_inbox_bytes",
        "_loop",
        "_open_bytes",
        "_open_count",
        "_outlet",
        "_owed_bytes",
        "_owed_count",
        "_running",
        "_serving",
        "_window",
        "dropped",
        "expected",
        "replies",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outlet: Outlet,
        encoder: Encoder,
        routes: Routes,
        answers: Answers,
        serving: Serving,
        *,
        window: tuple[int, int],
    ) -> None:
        self._loop = loop
        self._calm: asyncio.Future[None] | None = None
        self._outlet = outlet
        self._encoder = encoder
        self._handlers = routes.messages
        self._answers = answers
        self._serving = serving
        self._window = window
        self._granted = 0
        self._open_count = self._open_bytes = 0
        self._owed_count = self._owed_bytes = 0
        self.replies = self.expected = 0
        self._busy = False
        self._free = 0  # handlers that run for what costs nothing, beside the others
        self._running: set[asyncio.Future[Any]] | None = None
        # Each message with the bytes that it came in, which are more than its cost if that is none.
        self._inbox: deque[tuple[_Incoming, int]] | None = None
        self._best_effort: deque[tuple[_Incoming, int]] | None = None
        self._inbox_bytes = self._best_effort_bytes = 0
        self.dropped = 0

    def opened(self, peer: Capabilities) -> None:
        """Learn what the peer grants."""
        self._granted = peer.window[0]

    def receive(self, flags: int, id: int, payload: Payload) -> None:
        """Take MESSAGE that is not a reply to a request, and see to its handler."""
        serving = self._serving
        if self._answers.held:
            self._answers.check()
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
        waits = not handler.concurrent and (self._inbox or self._best_effort)
        if not waits and self._may_run(handler, size):
            self._run(name, data, handler, id, size, reply)
        else:
            waiting = data if len(payload) <= SMALL else kept(payload)
            self._queue(_Incoming(name, waiting, handler, id, size, reply), len(payload))

    def _may_run(self, handler: Handler, size: int) -> bool:
        """Whether a message of this cost need not wait; what costs nothing has no other bound."""
        if handler.concurrent:
            return size > 0 or self._free < FREE
        return not self._busy

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

        Those that answer a message are bounded by what this side sends; made up ones by the window,
        whatever the peer grants.
        """
        self.replies += 1
        if self.expected:
            self.expected -= 1
        elif self.replies > 2 * self._window[0] + min(self._granted, self._window[0]):
            raise ProtocolError(
                f"{self.replies} replies wait here, more than there were messages",
                close_code=CloseCode.FLOOD,
            )

    async def calm(self) -> None:
        """Wait until fewer replies wait for their handlers than messages may."""
        while self.replies >= self._window[0]:
            if self._calm is None:
                self._calm = self._loop.create_future()
            await asyncio.shield(self._calm)

    def _calm_down(self) -> None:
        if self._calm is not None and self.replies < self._window[0]:
            self._calm.set_result(None)
            self._calm = None

    def _unhandled(self, id: int, error: RPCError, size: int) -> None:
        if id:
            self._answers.error(id, error, slot=False)
        else:
            logger.info("message dropped: %s", error)
        if size:
            self._pay_back(size)

    def _run(self, name: str, data: Any, handler: Handler, id: int, size: int, reply: bool) -> None:
        """Run the handler of a message; the parameters are those of `_Incoming`."""
        self._serving.handling.call = handler
        try:
            result = self._serving.execute(handler, data)
        except BaseException as exc:  # noqa: BLE001  # _settle lets out what is not the handler's
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
        elif not size:
            self._free += 1
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
        elif not message.size:
            self._free -= 1
            if self._inbox or self._best_effort:
                self._drain()

    def cancel(self, id: int) -> None:
        """Take CANCEL for a request that still waits for its turn; any other means nothing."""
        for place, (message, size) in enumerate(self._inbox or ()):
            if message.id == id and id:
                assert self._inbox is not None
                del self._inbox[place]
                self._inbox_bytes -= size
                self._settle(message, None, CallCancelled("the caller has given up"))
                return

    def _drain(self) -> None:
        """Handle what has waited for a handler to end."""
        handling = self._serving.handling
        handling.enter(self._serving)
        try:
            while True:
                if self._is_ready(self._best_effort):
                    message, size = self._best_effort.popleft()
                    self._best_effort_bytes -= size
                elif self._is_ready(self._inbox):
                    message, size = self._inbox.popleft()
                    self._inbox_bytes -= size
                    if message.reply:
                        self.replies -= 1
                        self._calm_down()
                else:
                    break
                if size > SMALL:
                    message = message._replace(data=_data_of(message.data))
                self._run(*message)
        finally:
            handling.leave()

    def _is_ready(
        self, queue: deque[tuple[_Incoming, int]] | None
    ) -> TypeGuard[deque[tuple[_Incoming, int]]]:
        """Whether the first message of a queue need not wait any more."""
        if not queue:
            return False
        first = queue[0][0]
        return self._may_run(first.handler, first.size)

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
                    self._answers.error(message.id, failure, slot=False)
                elif isinstance(error, RPCError):
                    logger.warning("message %r refused: %s", message.name, printable(str(error)))
            if message.size:
                self._pay_back(message.size)
        if error is not None:
            exit_behind(self._loop, error)

    def _answer(self, message: _Incoming, result: Any) -> None:
        if message.handler.finish is not None:
            result = message.handler.finish(result)
        if message.id:
            name = message.name
        elif result is not None and not message.reply:
            name = f"{message.name}_response"
        else:
            return
        payload = encode_message(self._encoder, name, result, self._answers.value_max)
        self._answers.send(_REPLY, message.id, payload, slot=False)

    def _pay_back(self, size: int) -> None:
        self._owed_count += 1
        self._owed_bytes += size
        if not self._answers.held:
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

    def room(self) -> None:
        """Go on: answers that were held have left."""
        if self._owed_count and not self._answers.held:
            self._give_credit()

    def fail(self, *, handle_rest: bool) -> None:
        """End everything: the connection is gone.

        Args:
            handle_rest: The peer has closed as it should, so what it sent before is still handled;
                only requests are not, whose answers nobody would get.
        """
        self.replies = 0
        self._calm_down()
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
                if isinstance(future, ThreadFuture):
                    future.leave_queue()
                future.cancel()


def _data_of(payload: Payload) -> Any:
    """Return the data of a message that has waited; that it is one is known."""
    return decode(payload)[1]
