"""Calls with streams of items, of both sides of one connection.

A streaming call is a call like any other: its request, slot, deadline, cancellation and final
frame are those of `Calls` and `Serving`. What is here is what it has beside them: which items
belong to which call, and the run of a handler that streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from ..exceptions import ConnectionClosed, ConnectionLost, InvalidParams, ProtocolError, RPCError
from ..protocol.events import Peer
from ..protocol.frames import CloseCode, FrameType, Payload
from ..protocol.payload import Encoder, decode, read_credit
from .calls import Calls
from .outlet import Outlet
from .requests import Headers, Params
from .running import Handler
from .serving import Serving
from .stream import Check, Explain, Receiver, Sender
from .stream_call import OpenCall, without_iterator
from .tasks import Start

__all__ = ["Stream", "Streaming", "Streams"]

_ITEM: Final = int(FrameType.STREAM_ITEM)
_END: Final = int(FrameType.STREAM_END)

T = TypeVar("T")

_Open = tuple["Sender | None", "Receiver | None", "asyncio.Future[list[Any]] | None"]
"""The items of a call that go out, those that come in, and the answer where this side calls."""
_NOTHING: Final[_Open] = (None, None, None)


@dataclass(frozen=True, slots=True)
class Streaming:
    """What a handler that streams declares.

    Attributes:
        direction: "out" for one that sends items, "in" for one that takes them, or "both".
        generator: Whether it sends what it yields; its result is None.
        argument: How callers may name the parameter whose items they send: its name, its position.
        sent: Checks an item that the handler sends and makes it plain; None for any.
        taken: Checks the items that the handler takes; None for any.
        explain: Makes of an error of `taken` what the caller is told.
        start: Validates the parameters for a connection, a `Stream` and the caller's items, and
            returns the coroutine or the generator.
    """

    direction: Literal["out", "in", "both"]
    generator: bool
    argument: tuple[str, int] | None
    sent: Callable[[Any], Any] | None
    taken: Check | None
    explain: Explain
    start: Callable[[Any, Any, Any, Any], Any]


class Stream(Generic[T]):
    """Where a handler sends items, beside the result that it returns.

    A parameter annotated `Stream[T]` is filled in. The caller gets the items in order, before the
    result; those that were sent before the handler raised arrive before the error.
    """

    __slots__ = ("_sender",)

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    async def send(self, item: T) -> None:
        """Send one item.

        Returns when the item is packed and there is room for the next; items that are sent without
        waiting in between leave together. A caller that does not read makes the handler wait here.
        A handler whose caller has left, or whose connection is lost, is cancelled. Cancelling it
        while it waits may have sent the item or not.

        Raises:
            pydantic.ValidationError: The item does not fit the annotation.
            PayloadTooLarge: The caller does not accept so much.
            TypeError: The item cannot be sent; ValueError for a number or text that cannot.
            RuntimeError: The handler has returned.
            ConnectionLost: The connection went away.
        """
        await self._sender.put(item)


class Streams:
    """The streaming calls of one connection.

    Args:
        loop: The event loop.
        connection: What handlers get when they ask for their connection.
        outlet: Where frames go.
        encoder: Packs items.
        calls: Makes the requests.
        serving: Runs the handlers.
        start: Starts those that stream; see `Starter.start`.
        window: Items and bytes of a stream that the peer may send before any was handed out.
        peer: Tells what the peer accepts, once it is in.
    """

    __slots__ = (
        "_calls",
        "_connection",
        "_encoder",
        "_loop",
        "_open",
        "_outlet",
        "_peer",
        "_serving",
        "_start",
        "_window",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Any,
        outlet: Outlet,
        encoder: Encoder,
        calls: Calls,
        serving: Serving,
        start: Start,
        *,
        window: tuple[int, int],
        peer: Peer,
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._outlet = outlet
        self._encoder = encoder
        self._calls = calls
        self._serving = serving
        self._start = start
        self._window = window
        self._peer = peer
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def receive(self, type: int, id: int, payload: Payload) -> None:
        """Take STREAM_ITEM, STREAM_END or STREAM_CREDIT of a call.

        What comes for a call that is over, or has no such stream, is late and means nothing.

        Raises:
            ProtocolError: The payload has another shape, or there was no credit for it.
        """
        sender, receiver, answer = self._open.get(id, _NOTHING)
        if answer is not None and answer.done():
            return  # its caller does not know yet that it is over
        if type == _ITEM:
            if receiver is not None:
                _receive_items(receiver, payload)
        elif type == _END:
            if receiver is not None:
                receiver.end()
        elif sender is not None:
            sender.credit(*read_credit(payload))

    def room(self) -> None:
        """Go on: the outlet has room again; whoever was let go on is the last next time."""
        for id, entry in list(self._open.items()):
            if self._outlet.blocked:
                return
            sender = entry[0]
            if sender is not None and sender.waits:
                self._open[id] = self._open.pop(id)
                sender.flush()

    def held_bytes(self) -> tuple[int, int]:
        """Return the bytes of the items that nobody has taken yet, and of those still unsent."""
        taken = sent = 0
        for sender, receiver, _ in self._open.values():
            taken += receiver.held_bytes if receiver is not None else 0
            sent += sender.held_bytes if sender is not None else 0
        return taken, sent

    def fail(self, error: ConnectionClosed) -> None:
        """End everything: the connection is gone.

        A call whose items have come has surely run, and its caller is told so. The others that this
        side has made are for `Calls.fail`.
        """
        for sender, receiver, answer in list(self._open.values()):
            if sender is not None:
                sender.close(_lost(error))
            if receiver is not None and answer is None:  # the answer tells a caller
                receiver.end(_lost(error))
            elif receiver is not None and receiver.started and answer and not answer.done():
                answer.set_exception(_lost(error, executed=True))

    # Calls that this side makes.

    async def call(
        self,
        method: str,
        args: Params,
        timeout: float | None,
        check: Check | None,
        headers: Headers,
    ) -> OpenCall:
        """Send the request of a streaming call; see `StreamCall`."""
        args, argument, source = without_iterator(args)
        timeout, _ = self._calls.deadline(timeout)
        id, answer = await self._calls.open(method, args, argument, timeout, headers)
        receiver = self._receiver(id, check)
        call = OpenCall(self._loop, self._calls, id, answer, receiver, drops=timeout is not None)
        sender = None
        if source is not None:
            sender = self._sender(id)
            call.send(sender, source)
        self._open[id] = (sender, receiver, answer)
        answer.add_done_callback(lambda _: self._open.pop(id, None))
        return call

    def _sender(self, id: int, finish: Callable[[Any], Any] | None = None) -> Sender:
        accepts = self._peer.capabilities
        return Sender(
            self._loop,
            self._outlet,
            self._encoder,
            id,
            credit=accepts.stream,
            value_max=accepts.frame_max,
            finish=finish,
        )

    def _receiver(
        self,
        id: int,
        check: Check | None,
        explain: Explain | None = None,
    ) -> Receiver:
        return Receiver(
            self._loop,
            self._outlet,
            self._encoder,
            id,
            window=self._window,
            check=check,
            explain=explain,
        )

    # Calls of the peer.

    def serve(self, id: int, handler: Handler, params: Any, argument: Any) -> Any:
        """Run a handler for a streaming call until it suspends; see `Serving.execute`.

        A handler that does not stream is run as for any call: it has a result and no items.

        Args:
            id: The call.
            handler: The handler.
            params: Its parameters, but for the stream.
            argument: Name or position of the parameter whose items the caller sends, or None.
        """
        if handler.guard is not None:
            handler.guard(self._connection)  # before anything is said of its parameters
        streaming: Streaming | None = handler.streaming
        known = streaming.argument if streaming is not None else None
        if known is None and argument is not None:
            raise InvalidParams(
                f"{handler.name!r} takes no stream, and one came as {argument!r:.80}"
            )
        if known is not None and argument is None:
            raise InvalidParams(
                f"{handler.name!r} takes a stream as {known[0]!r}: pass an async iterable, "
                "or an iterator such as iter([...])"
            )
        if known is not None and argument not in known:
            raise InvalidParams(
                f"{handler.name!r} takes a stream as {known[0]!r}, not as {argument!r:.80}"
            )
        if streaming is None:
            return self._serving.execute(handler, params)
        return self._start(self._run(id, streaming, params))

    async def _run(self, id: int, streaming: Streaming, params: Any) -> Any:
        sender = receiver = None
        if streaming.direction != "in":
            sender = self._sender(id, streaming.sent)
        if streaming.direction != "out":
            receiver = self._receiver(id, streaming.taken, streaming.explain)
        self._open[id] = (sender, receiver, None)
        stream: Stream[Any] | None = None
        if sender is not None:
            stream = Stream(sender)
        items = receiver.items() if receiver is not None else None
        try:
            work = streaming.start(params, self._connection, stream, items)
            if sender is None:
                return await work
            return await self._run_sending(work, sender, streaming)
        finally:
            self._open.pop(id, None)
            if sender is not None:
                sender.close()
            if receiver is not None:
                receiver.close()

    async def _run_sending(self, work: Any, sender: Sender, streaming: Streaming) -> Any:
        result = None
        try:
            if streaming.generator:
                await sender.feed(work)
            else:
                result = await work
        except Exception:
            if sender.closed is None:
                await sender.finish()  # the caller gets what was sent before
            raise
        await sender.finish()
        return result


def _lost(error: ConnectionClosed, *, executed: bool | None = None) -> ConnectionLost:
    text = f"the connection was lost while a stream was open: {error}"
    lost = ConnectionLost(error.reason, code=error.code, message=text, executed=executed)
    lost.__cause__ = error.__cause__
    return lost


def _receive_items(receiver: Receiver, payload: Payload) -> None:
    try:
        items = decode(payload)
    except RPCError as exc:  # well formed, and yet refused: that is the end of this stream
        receiver.end(exc)
        return
    if type(items) is not list or not items:
        raise ProtocolError(
            "STREAM_ITEM must carry an array of 1 or more items", close_code=CloseCode.BAD_PAYLOAD
        )
    receiver.receive(items, payload)
