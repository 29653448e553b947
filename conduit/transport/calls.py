"""The calls that this side makes: from the line for a slot to the answer, or to the reason why not.

Every call has an entry in `_pending` until its final frame arrives, also when its caller has given
up: the peer's handler may still be running, and it occupies one of the slots that the peer grants.
"""

from __future__ import annotations

import asyncio
import math
import sys
from functools import partial
from operator import itemgetter
from typing import Any, Final, NoReturn, Protocol

from ..exceptions import (
    ConnectionClosed,
    ConnectionLost,
    Overloaded,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from ..protocol.events import Capabilities
from ..protocol.frames import SEQUENCED, CloseCode, FrameType, Payload, word
from ..protocol.payload import LARGE, UNSENDABLE, Encoder, decode
from .handling import HANDLING, inherit
from .hooked import hook_of_caller
from .line import NOBODY, Line
from .loop import Sweep
from .outlet import FLUSH_FRAMES, Outlet
from .requests import (
    DEFAULT,
    Default,
    Headers,
    Params,
    Requests,
    checked_key,
    no_timeout,
    plain,
    too_large,
)

__all__ = [
    "Calls",
    "Elsewhere",
    "Moved",
    "closed_again",
    "unserved",
]


_handling: Final = HANDLING.get
_REQUEST: Final = word(FrameType.RPC_REQUEST, SEQUENCED)
_CANCEL: Final = word(FrameType.CANCEL, SEQUENCED)
_NEVER: Final = math.inf
FEW: Final = 4
"""Calls in flight up to which the first of several is written by itself."""
LEAST_SHARE: Final = 8
"""Frames that are worth a write of their own."""
_NOTHING_LARGE: Final[frozenset[str]] = frozenset()
"""Shared by most connections, because an empty set takes 216 bytes."""
_Table = dict[int, tuple["asyncio.Future[list[Any]]", float, str, "float | None"]]
_NO_REPLIES: Final[_Table] = {}
"""What waits for replies where nobody has asked yet; never written to."""
"""Id -> what its caller waits on, the deadline, the name, and the timeout in seconds."""


class Elsewhere(Protocol):
    """Does what is asked of a connection whose peer goes away; see `Calls.call` and `Messages`."""

    async def call(
        self,
        method: str,
        args: Params,
        timeout: float | None | Default,
        whole: bool,
        headers: Headers,
        key: str | None,
    ) -> Any: ...
    async def stream(
        self, method: str, args: Params, timeout: float | None, check: Any, headers: Headers
    ) -> Any: ...
    async def send(self, name: str, data: Any) -> None: ...
    async def request(self, name: str, data: Any, timeout: float | None | Default) -> Any: ...


class Moved(Exception):
    """The peer goes away, so that what was not sent to it is to be done elsewhere."""


class Calls:
    """The outgoing calls of one connection.

    Args:
        loop: The event loop.
        outlet: Where frames go.
        encoder: Packs arguments.
        requests: Writes what a request says beside them.
        sweep: Watches the deadlines; `expire` is what it calls.
        first_id: 1 on the connecting side and 2 on the accepting one.
        timeout: Seconds that a call has by default, or None.
        backpressure: Whether a call waits for a slot, or is refused.

    Attributes:
        late: Answers that came when nobody waited for them any more.
        elsewhere: Who makes the calls that the peer does not serve, because it goes away.
    """

    __slots__ = (
        "_backpressure",
        "_door",
        "_encoder",
        "_large",
        "_limit",
        "_line",
        "_loop",
        "_next_id",
        "_opened",
        "_outlet",
        "_pending",
        "_prefixes",
        "_replies",
        "_requests",
        "_sweep",
        "_timeout",
        "_unsent_from",
        "_value_max",
        "elsewhere",
        "late",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        outlet: Outlet,
        encoder: Encoder,
        requests: Requests,
        sweep: Sweep,
        *,
        first_id: int,
        timeout: float | None,
        backpressure: bool,
    ) -> None:
        self._loop = loop
        self._outlet = outlet
        self._encoder = encoder
        self._sweep = sweep
        self._next_id = first_id
        self._timeout = timeout
        self._backpressure = backpressure
        self._opened = False
        self._limit = 0
        self._value_max = sys.maxsize
        self._line = self._door = NOBODY
        self._pending: _Table = {}
        self._replies = _NO_REPLIES
        self._requests = requests
        self._prefixes = requests.prefixes
        self._large = _NOTHING_LARGE
        self._unsent_from: float | None = None
        self.late = 0
        self.elsewhere: Elsewhere | None = None

    def opened(self, peer: Capabilities) -> None:
        """Learn what the peer grants."""
        self._opened = True
        self._limit = peer.calls
        self._value_max = peer.frame_max
        self._door.move()
        self._line.move()

    async def call(  # noqa: C901  # the hot path: a function more would cost each call
        self,
        method: str,
        args: Params = None,
        timeout: float | None | Default = DEFAULT,
        whole: bool = False,
        headers: Headers = None,
        key: str | None = None,
    ) -> Any:
        """Call a method of the peer and return its result.

        Args:
            method: The name.
            args: Parameters by name or by position.
            timeout: Seconds until `RPCTimeout`, the wait in line included; None waits for ever. A
                handler that calls waits no longer than it may run itself.
            whole: Return `[result]` or `[result, headers]`, as it came.
            headers: What travels beside the parameters.
            key: The idempotency key.
        """
        prefix = self._prefixes.get(method) or self._requests.prefix(method)
        loop = self._loop
        suffix = b""
        handling = _handling()
        if handling is not None:
            timeout = inherit(handling, self._timeout if isinstance(timeout, Default) else timeout)
        if timeout is DEFAULT:
            seconds = self._timeout
        else:
            assert not isinstance(timeout, Default)
            seconds = timeout
            prefix, suffix = self._requests.with_ttl(prefix, seconds)
        if headers or key is not None:
            meta = {} if key is None else {"key": checked_key(key)}
            prefix, suffix = self._requests.with_meta(
                self._prefixes[method], seconds, headers, **meta
            )
        deadline = _NEVER if seconds is None else loop.time() + seconds
        if type(args) is not dict:
            args = plain(args)
        tail = b""
        try:
            if self._large and method in self._large:
                packed, tail = self._split(args)
            else:
                packed = self._encoder.pack(args)
                if len(packed) >= LARGE:
                    self._large |= {method}
        except UNSENDABLE as exc:
            raise self._encoder.explained(exc, args) from exc
        if len(packed) + len(tail) > self._value_max:
            raise too_large("the arguments", len(packed) + len(tail), self._value_max)
        outlet, pending = self._outlet, self._pending
        if len(pending) >= self._limit or self._line.waiters or outlet.blocked:
            try:
                await self._turn(method, deadline, seconds)
            except Moved:
                return await self._move_on(method, args, deadline, whole, headers, key)
        future: asyncio.Future[list[Any]] = loop.create_future()
        id = self._next_id
        self._next_id = id + 2
        pending[id] = (future, deadline, method, seconds)
        if tail:
            outlet.send_split(_REQUEST, id, prefix + packed, tail, suffix)
        elif suffix:
            outlet.protocol.send(_REQUEST, id, prefix + packed + suffix)
        else:
            outlet.protocol.send(_REQUEST, id, prefix + packed)
        if deadline < self._sweep.at:
            self._sweep.arm(deadline)
        if self._line.waiters:
            self._move()
        try:
            body = await future
        except asyncio.CancelledError:
            self.abandon(id, "the caller was cancelled")
            raise
        except (Unavailable, ConnectionLost) as exc:
            if self.elsewhere is None or not unserved(exc):
                raise
        else:
            return body if whole else body[0]
        return await self._move_on(method, args, deadline, whole, headers, key)

    async def _move_on(
        self,
        method: str,
        args: Params,
        deadline: float,
        whole: bool,
        headers: Headers,
        key: str | None,
    ) -> Any:
        """Have a call made elsewhere, within the time that it has left."""
        assert self.elsewhere is not None
        return await self.elsewhere.call(method, args, self.left(deadline), whole, headers, key)

    def left(self, deadline: float) -> float | None:
        """Return the seconds until a deadline, in whole milliseconds; None for none."""
        if deadline == math.inf:
            return None
        return max(0.001, round(deadline - self._loop.time(), 3))

    def leave(self, elsewhere: Elsewhere, unserved_from: float) -> None:
        """Make no more calls here: the peer goes away.

        Args:
            elsewhere: Who makes them.
            unserved_from: The first id that the peer does not serve.
        """
        self.elsewhere = elsewhere
        self._unsent_from = unserved_from
        self._limit = 0  # so that each call takes the way through `_turn`
        self._line.fail(Moved)

    def _split(self, args: Any) -> tuple[bytes, bytes]:
        return self._encoder.split(args) or (self._encoder.pack(args), b"")

    async def open(
        self,
        method: str,
        args: Params,
        argument: str | int | None,
        timeout: float | None,
        headers: Headers,
    ) -> tuple[int, asyncio.Future[list[Any]]]:
        """Send the request of a call with streams.

        Args:
            method: The name.
            args: Parameters by name or by position, but for the stream.
            argument: Name or position of the parameter whose items follow, if any do.
            timeout: Seconds, the wait in line included; None for no deadline.
            headers: What travels beside the parameters.

        Returns:
            The id, and what will have the body of the final frame.
        """
        prefix = self._prefixes.get(method) or self._requests.prefix(method)
        deadline = math.inf if timeout is None else self._loop.time() + timeout
        args = plain(args)
        try:
            packed = self._encoder.pack(args)
        except UNSENDABLE as exc:
            raise self._encoder.explained(exc, args) from exc
        if len(packed) > self._value_max:
            raise too_large("the arguments", len(packed), self._value_max)
        prefix, suffix = self._requests.with_meta(prefix, timeout, headers, stream=argument)
        payload = prefix + packed + suffix
        if len(self._pending) >= self._limit or self._line.waiters or self._outlet.blocked:
            await self._turn(method, deadline, timeout)
        answer: asyncio.Future[list[Any]] = self._loop.create_future()
        id = self.take_id()
        self._pending[id] = (answer, deadline, method, timeout)
        self._outlet.protocol.send(_REQUEST, id, payload)
        self._sweep.arm(deadline)
        if self._line.waiters:
            self._move()
        return id, answer

    async def refuse_stream(self, *request: object) -> NoReturn:
        """Refuse what `Streams.call` would send: the connection is closed."""
        assert self._outlet.closed is not None
        raise closed_again(self._outlet.closed)

    async def reply(self, id: int, name: str, timeout: float | None, deadline: float) -> Any:
        """Wait for the answer to a message that was sent with an id from `take_id`."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self._replies is _NO_REPLIES:
            self._replies = {}
        self._replies[id] = (future, deadline, name, timeout)
        if deadline != math.inf:
            self._sweep.arm(deadline)
        try:
            return (await future)[0]
        except asyncio.CancelledError:
            self.abandon(id, "the caller was cancelled")
            raise

    async def until_opened(self, name: str, deadline: float, seconds: float | None) -> None:
        """Wait until the peer is in: for what needs no slot, and so stands in no line for one.

        Raises:
            RuntimeError: A hook asks that the login waits for.
            RPCTimeout: It was not in time.
            ConnectionClosed: It will not be.
        """
        while not self._opened:
            if self._outlet.closed is not None:
                raise closed_again(self._outlet.closed)
            if self._door is NOBODY:
                self._door = Line()
            await self._stand_in_line(self._door, name, deadline, seconds)
            self._door.move()

    def take_id(self) -> int:
        """Return a correlation id, whose frame must be sent before the next id is taken."""
        id = self._next_id
        self._next_id = id + 2
        return id

    def deadline(self, timeout: float | None | Default) -> tuple[float | None, float]:
        """Return how many seconds a call may take, and when they are over.

        Raises:
            RPCTimeout: The time of the handler that calls is up.
        """
        seconds = self._timeout if isinstance(timeout, Default) else timeout
        handling = HANDLING.get()
        if handling is not None:
            seconds = inherit(handling, seconds)
        try:
            return seconds, math.inf if seconds is None else self._loop.time() + seconds
        except TypeError:
            raise no_timeout(seconds) from None

    async def _turn(self, method: str, deadline: float, seconds: float | None) -> None:
        """Wait in line until the peer grants a slot and there is room to send."""
        again = False
        while True:
            if self.elsewhere is not None:
                raise Moved
            if self._outlet.closed is not None:
                raise closed_again(self._outlet.closed)
            if self._opened:
                self._check_wait(method)
            if self._line is NOBODY:
                self._line = Line()
            await self._stand_in_line(self._line, method, deadline, seconds, again=again)
            if not self._backpressure:
                self._line.move()  # it was the login they waited for; now they are refused
            if self._opened and len(self._pending) < self._limit and not self._outlet.blocked:
                return
            again = True

    def _check_wait(self, method: str) -> None:
        """Refuse a call that must not wait for a slot, or never gets one."""
        if not self._limit:
            self._line.move()  # whoever is next never gets one either
            details = {"retryable": False, "executed": False}
            raise Unavailable("the peer serves no calls", details=details)
        if HANDLING.get() is not None or not self._backpressure:
            raise Overloaded(
                f"{len(self._pending)} calls are in flight and the peer serves {self._limit} "
                f"at once, so {method!r} was not sent"
            )

    async def _stand_in_line(
        self,
        line: Line,
        name: str,
        deadline: float,
        seconds: float | None,
        *,
        again: bool = False,
    ) -> None:
        if not self._opened and hook_of_caller() == "client_connect":
            raise RuntimeError(
                f"{name!r} cannot be called before the peer is in, and a hook that its login waits "
                "for must not wait for that; call it from server.start_task(...)"
            )
        try:
            await line.wait(None if deadline == math.inf else deadline, again=again)
        except asyncio.TimeoutError:
            what = f"one of {self._limit} call slots" if self._opened else "the login to end"
            raise RPCTimeout(
                f"{name!r} waited {seconds} s for {what}",
                details={"retryable": True, "executed": False},
            ) from None

    def _move(self) -> None:
        if len(self._pending) < self._limit and not self._outlet.blocked:
            self._line.move()

    def share(self, answered: int) -> int:
        """Return after how many frames to write, so that both sides have something to do.

        A quarter of what is in flight: with all of it in one write, each side would wait while the
        other works. 0 when so few are in flight that the first is better written by itself.

        Args:
            answered: Answers that have just come, whose callers will probably call again.
        """
        in_flight = len(self._pending) + answered
        return max(LEAST_SHARE, min(FLUSH_FRAMES, in_flight >> 2)) if in_flight > FEW else 0

    def room(self) -> None:
        """Go on: the outlet has room again."""
        if self._line.waiters:
            self._move()

    def answered(self, id: int, payload: Payload) -> bool:
        """Take RPC_RESPONSE; True when somebody waited for it."""
        try:
            body = decode(payload)
        except RPCError as exc:
            return self._fail(id, exc)
        if type(body) is not list or not body or len(body) > 2:
            raise _bad_body("RPC_RESPONSE must carry [result] or [result, headers]")
        entry = self._pending.pop(id, None)
        if self._line.waiters:
            self._move()
        if entry is not None:
            future = entry[0]
            if not future.done():
                future.set_result(body)
                return True
        self.late += 1
        return False

    def replied(self, id: int, payload: Payload) -> bool:
        """Take the reply to a message; True when somebody waited for it."""
        try:
            body = decode(payload)
        except RPCError as exc:
            return self._fail(id, exc)
        if type(body) is not list or len(body) != 2:
            raise _bad_body("a reply must carry [name, result]")
        entry = self._replies.pop(id, None)
        if entry is None or entry[0].done():
            self.late += 1
            return False
        entry[0].set_result(body[1:])
        return True

    def refused(self, id: int, payload: Payload) -> bool:
        """Take RPC_ERROR; True when somebody waited for it."""
        body = decode(payload)
        if (
            type(body) is not list
            or len(body) != 3
            or not (isinstance(body[0], str) and isinstance(body[1], str))
            or not isinstance(body[2], dict)
        ):
            raise _bad_body("RPC_ERROR must carry [code, message, details]")
        return self._fail(id, RPCError.from_wire(*body))

    def _fail(self, id: int, error: RPCError) -> bool:
        entry = self._pending.pop(id, None) or self._replies.pop(id, None)
        if self._line.waiters:
            self._move()
        if entry is None or entry[0].done():
            self.late += 1
            return False
        entry[0].set_exception(error)
        return True

    def expire(self, now: float) -> float:
        """End the calls whose deadline has passed, and return the next deadline.

        After a stall of the loop there may be several; they end in the order of their deadlines.
        """
        upcoming, due = math.inf, []
        for table in (self._pending, self._replies):
            for id, entry in table.items():
                if entry[1] <= now:
                    due.append((entry[1], id, entry))
                else:
                    upcoming = min(upcoming, entry[1])
        for _, id, (future, _, name, seconds) in sorted(due, key=itemgetter(0)):
            if not future.done():
                text = f"no answer to {name!r} within {seconds} s"
                future.set_exception(RPCTimeout(text))
            self.abandon(id, "the deadline has passed")
        return upcoming

    def abandon(self, id: int, reason: str) -> None:
        """Tell the peer to stop; its final frame still ends the entry."""
        table = self._pending if id in self._pending else self._replies
        entry = table.get(id)
        if entry is not None and self._outlet.closed is None:
            table[id] = (entry[0], math.inf, entry[2], entry[3])
            self._outlet.protocol.send(_CANCEL, id, self._encoder.pack([reason]))

    def detached(self) -> None:
        """Know that nothing is written from now on."""
        self._unsent_from = self._next_id

    def attached(self) -> None:
        """Know that everything is being written."""
        self._unsent_from = None

    def fail(self, error: ConnectionClosed) -> None:
        """End everything: the connection is gone."""
        entries = [*self._pending.items(), *self._replies.items()]
        self._pending, self._replies = {}, _NO_REPLIES
        unsent_from = math.inf if self._unsent_from is None else self._unsent_from
        for id, (future, _, name, _) in entries:
            if not future.done():
                lost = ConnectionLost(
                    error.reason,
                    code=error.code,
                    message=f"the connection was lost while {name!r} was in flight: {error}",
                    executed=False if id >= unsent_from else None,
                )
                lost.__cause__ = error.__cause__
                future.set_exception(lost)
        self._door.fail(partial(closed_again, error))
        self._line.fail(partial(closed_again, error))


def unserved(error: Unavailable | ConnectionLost) -> bool:
    """Whether an error says that the peer has not begun to do what it was asked for."""
    if isinstance(error, ConnectionLost):
        return error.executed is False
    return error.details.get("executed") is False


def _bad_body(text: str) -> ProtocolError:
    return ProtocolError(text, close_code=CloseCode.BAD_PAYLOAD)


def closed_again(error: ConnectionClosed) -> ConnectionClosed:
    """Return a fresh exception, because raising one object twice mixes up its tracebacks."""
    fresh = ConnectionClosed(error.reason, code=error.code, message=str(error))
    fresh.__cause__ = error.__cause__
    return fresh
