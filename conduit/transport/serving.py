"""The handlers that run for the peer: its calls, each answered by exactly one final frame.

A handler that does not suspend is run and answered while the batch it came in is being read, and
leaves no trace. One that suspends, or runs in a thread, has an entry in `_running` until it has
ended *and* its answer has left; that entry is the slot that the peer occupies.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol

from ..exceptions import (
    CallCancelled,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Unavailable,
)
from ..idempotency import KEY_BYTES
from ..protocol.events import Capabilities
from ..protocol.frames import CloseCode, Payload
from ..protocol.payload import Encoder, decode
from .answers import Answers
from .handling import Handled, Handling, PartOf
from .loop import Sweep
from .running import (
    Handler,
    Running,
    as_rpc_error,
    exit_behind,
    headers_of,
    none_or,
    why_stopped,
)
from .tasks import Start, Suspended
from .threads import ThreadFuture, run_in_thread

__all__ = ["Routes", "Serving"]

REFUSALS: Final = 100
"""Calls beyond its limit that a peer may make within `REFUSAL_TIME` seconds, or twice the limit."""
REFUSAL_TIME: Final = 10.0

CLOSING: Final = 0.1
"""Seconds that a side has to close in, behind the grace that it gives its handlers."""

LONG: Final = 5.0
"""Seconds from which the usual time of a peer's calls is not looked at when their turn comes.

To ask for the time costs a call 1 %, and whoever keeps a single batch of calls waiting that long
has stalled everybody. Calls that say their own time are always looked at.
"""

_NO_REQUESTS: Final[dict[int, Running]] = {}
"""The messages that want an answer, of all peers that have sent none; never written to."""


class Routes(Protocol):
    """What a connection needs of a router."""

    @property
    def methods(self) -> Mapping[str, Handler]: ...
    @property
    def messages(self) -> Mapping[str, Handler]: ...
    def unknown_method(self, name: str, roles: frozenset[str]) -> MethodNotFound: ...
    def unknown_message(self, name: str, roles: frozenset[str]) -> MethodNotFound: ...


class Keys(Protocol):
    """What serving needs of `keyed.Keyed`."""

    def once(
        self, handler: Handler, handled: Handled, encoder: Encoder, *, debug: bool
    ) -> Handler: ...


class Serving:
    """The calls of the peer.

    Args:
        connection: What handlers get when they ask for their connection.
        routes: Names to handlers.
        answers: What goes back.
        encoder: Packs what is kept for calls with a key.
        start: Runs a coroutine up to its first suspension; see `Starter.start`.
        sweep: Watches the deadlines.
        handling: The handlers that run on the loop.
        keyed: Runs the calls with a key.
        limit: Calls that may run at once.
        limit_of_all: Handlers on the event loop, whoever they run for, from which calls are refused
            beyond the first of this peer.
        longest: Seconds that a handler may run which has no timeout of its own and does not stream.
        debug: Whether the peer is shown the tracebacks of handlers that fail.

    Attributes:
        draining: When this side closes, by the loop's clock, if new calls are refused because of
            that; else 0.
        handling: As above.
    """

    __slots__ = (
        "_answers",
        "_connection",
        "_encoder",
        "_hasty",
        "_keyed",
        "_limit",
        "_limit_of_all",
        "_longest",
        "_loop",
        "_methods",
        "_refusals",
        "_refused_since",
        "_requests",
        "_routes",
        "_running",
        "_start",
        "_sweep",
        "_ttl",
        "debug",
        "draining",
        "handling",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Any,
        routes: Routes,
        answers: Answers,
        encoder: Encoder,
        start: Start,
        sweep: Sweep,
        handling: Handling,
        *,
        keyed: Keys,
        limit: int,
        limit_of_all: int,
        longest: float,
        debug: bool,
    ) -> None:
        self._loop = loop
        self._connection: Any = connection
        self._routes = routes
        self._methods = routes.methods
        self._answers = answers
        self._encoder = encoder
        self._start = start
        self._sweep = sweep
        self._keyed = keyed
        self.handling = handling
        self._limit = limit
        self._limit_of_all = limit_of_all
        self._longest = longest
        self.debug = debug
        self.draining = 0.0
        self._ttl: float | None = None
        self._hasty = False
        self._running: dict[int, Running] = {}
        self._requests = _NO_REQUESTS
        self._refusals = 0
        self._refused_since = 0.0

    def opened(self, peer: Capabilities) -> None:
        """Learn what deadline the peer's calls have by default."""
        self._ttl = peer.ttl / 1000 if peer.ttl else None
        self._hasty = self._ttl is not None and self._ttl < LONG

    def __len__(self) -> int:
        return len(self._running)

    def request(self, id: int, payload: Payload) -> None:
        """Take RPC_REQUEST and see to its answer."""
        try:
            body = decode(payload)
        except RPCError as exc:
            self._answers.error(id, exc)
            return
        ttl = meta = None
        if type(body) is list and len(body) == 2:
            name, params = body
        else:
            name, params, ttl, meta = _with_meta(body)
        if type(name) is not str or (type(params) is not dict and type(params) is not list):
            raise _bad_request("the method must be text, and params a map or an array")
        handler = self._methods.get(name)
        if handler is None:
            self._answers.check()
            self._answers.error(id, self._routes.unknown_method(name, self._connection.roles))
            return
        if (self._running or self._answers.held or self.draining) and self._refuses(id):
            return
        if (ttl is not None or self._hasty) and self._sheds(id, name, ttl):
            return
        handling = self.handling
        handling.call = body
        try:
            if meta is not None and ("stream" in meta or "key" in meta):
                handler, result = self._run_special(id, handler, params, meta)
            elif handler.kind == "coroutine":
                result = self._start(handler.start(params, self._connection))
            else:
                result = self.execute(handler, params)
            if type(result) is not Suspended:
                if handling.call is body:
                    self._answers.result(id, handler, result)
                else:
                    self._answers.result(id, handler, result, handling.call.response_headers)
                return
        except BaseException as exc:  # noqa: BLE001  # _failed lets out what is not the handler's
            self._failed(id, handler, exc)
            return
        self._track(id, handler, result.future, ttl)
        if type(result.future) is ThreadFuture:
            result.future.size = len(payload)

    def _run_special(
        self, id: int, handler: Handler, params: Any, meta: dict[str, Any]
    ) -> tuple[Handler, Any]:
        """Run the handler of a call with streams or with a key until it suspends.

        Returns:
            What sees to the result, and the result as from `execute`.
        """
        if "key" not in meta:
            return handler, self._connection.streams.serve(id, handler, params, meta["stream"])
        if "stream" in meta:
            raise InvalidParams(
                f"{handler.name!r} was called with streams and a key; a call with streams takes "
                "no key",
                details={"executed": False},
            )
        self.handling.call = handled = self.handled(self.handling.call)
        once = self._keyed.once(handler, handled, self._encoder, debug=self.debug)
        return once, self.execute(once, params)

    def _sheds(self, id: int, name: str, ttl: int | None) -> bool:
        """Refuse a call whose time is up before its turn: nobody waits for it any more."""
        seconds = self._ttl if ttl is None else ttl / 1000
        if not seconds or monotonic() - self.handling.arrived <= seconds:
            return False
        text = f"the time of {name!r} was up before its turn"
        self._answers.error(id, RPCTimeout(text, details={"executed": False}))
        return True

    def _refuses(self, id: int) -> bool:
        """Refuse a call that must not run now."""
        if self.draining:
            self._answers.error(id, self.stopping())
            return True
        too_many = len(self._running) + self._answers.held_calls >= self._limit
        if too_many or self._answers.waits():
            self._answers.check()
            if too_many:
                self._count_refusal()
            self._answers.error(id, Overloaded(f"{self._limit} calls are running here already"))
            return True
        if len(self.handling.suspended) >= self._limit_of_all:
            self._answers.check()
            most = f"{self._limit_of_all} handlers (max_running)"
            self._answers.error(
                id, Overloaded(f"{most} are running here already, for all peers together")
            )
            return True
        return False

    def _count_refusal(self) -> None:
        """Refuse to go on with a peer that knows its limit, and calls beyond it all the time."""
        now, most = self.handling.started, max(REFUSALS, 2 * self._limit)
        if now - self._refused_since >= REFUSAL_TIME:
            self._refusals, self._refused_since = 0, now
        self._refusals += 1
        if self._refusals > most:
            raise ProtocolError(
                f"more than {most} calls in {REFUSAL_TIME:g} s beyond the {self._limit} that may "
                "run at once (max_calls)",
                close_code=CloseCode.FLOOD,
            )

    def unknown_message(self, name: str) -> MethodNotFound:
        """Return the error for a message that has no handler."""
        return self._routes.unknown_message(name, self._connection.roles)

    def stopping(self) -> Unavailable:
        """Return the error for what comes while this side only ends what it has begun.

        Whoever is told to wait until it has closed does not use up its attempts before.
        """
        seconds = max(0.0, self.draining - self._loop.time()) + CLOSING
        details = {"executed": False, "retryable": True, "retry_after": round(seconds * 1000)}
        return Unavailable("the server stops", details=details)

    def execute(self, handler: Handler, data: Any) -> Any:
        """Run a handler until it suspends.

        Returns:
            Its result, or else `Suspended`.
        """
        work = handler.start(data, self._connection)
        kind = handler.kind
        if kind == "coroutine":
            return self._start(work)
        if kind == "thread":
            handled = self.handling.handled()
            assert handled is not None
            return Suspended(run_in_thread(self._loop, partial(PartOf(handled).run, work)))
        return work

    def handled(self, call: Any) -> Handled:
        """Return what is known of a call whose first step runs.

        Args:
            call: The body of the request, or the handler of a message.
        """
        if type(call) is not list:
            return Handled(self._connection, call.name)
        name, meta = call[0], call[2] if len(call) == 3 else {}
        ends = self.handling.arrived + self._allowed(self._methods[name], meta.get("ttl"))
        return Handled(self._connection, name, none_or(ends), headers_of(call), key=meta.get("key"))

    def _allowed(self, handler: Handler, ttl: int | None) -> float:
        """Return the seconds that a call has from the arrival of its batch, or infinity.

        The time that a handler allows itself begins now. One that has said nothing of its time does
        not run for as long as any caller likes.
        """
        allowed = (self._ttl if ttl is None else ttl / 1000) or math.inf
        if handler.timeout is not None:
            allowed = min(allowed, monotonic() - self.handling.arrived + handler.timeout)
        if allowed > self._longest and self._is_bounded(handler.name):
            return self._longest
        return allowed

    def _is_bounded(self, name: str) -> bool:
        handler = self._methods[name]
        return handler.timeout is None and handler.streaming is None

    def _track(
        self, id: int, handler: Handler, future: asyncio.Future[Any], ttl: int | None
    ) -> None:
        handling = self.handling
        allowed = self._allowed(handler, ttl)
        ends = handling.arrived + allowed
        running = Running(self._connection, handler, future, handling.call, ends)
        self._running[id] = handling.suspended[future] = running
        if allowed != math.inf:
            running.allowed = allowed
            running.deadline = handling.started + allowed
            self._sweep.arm(running.deadline)
        future.add_done_callback(partial(self._ended, id))

    def track_message(self, id: int, handler: Handler, future: asyncio.Future[Any]) -> None:
        """Let a message that wants an answer be cancelled like a call. It takes no slot."""
        running = Running(self._connection, handler, future, self.handling.call)
        self.handling.suspended[future] = running
        if id:
            if self._requests is _NO_REQUESTS:
                self._requests = {}
            self._requests[id] = running

    def untrack(self, id: int, future: asyncio.Future[Any]) -> RPCError | None:
        """Forget a message, and return why its handler was stopped, if it was."""
        self.handling.suspended.pop(future, None)
        running = self._requests.pop(id, None)
        return running.stopped if running is not None else None

    def _ended(self, id: int, future: asyncio.Future[Any]) -> None:
        self.handling.suspended.pop(future, None)
        running = self._running.get(id)
        if running is None:  # the connection has gone
            if not future.cancelled():
                future.exception()
            return
        try:
            if running.stopped is not None:
                raise why_stopped(future, running.stopped, running.handler.name)
            self._answers.result(id, running.handler, future.result(), running.response_headers)
        except BaseException as exc:  # noqa: BLE001  # _failed lets out what is not the handler's
            self._failed(id, running.handler, exc)
        finally:
            self._running.pop(id, None)

    def queued_bytes(self) -> int:
        """Return the bytes of the calls that wait for a thread."""
        threads = (one.future for one in self._running.values() if type(one.future) is ThreadFuture)
        return sum(thread.size for thread in threads if thread.queued)

    def _failed(self, id: int, handler: Handler, error: BaseException) -> None:
        self._answers.error(id, as_rpc_error(error, handler.name, debug=self.debug))
        exit_behind(self._loop, error)

    def cancel(self, id: int) -> bool:
        """Take CANCEL; False when no handler runs for that id."""
        running = self._running.get(id) or self._requests.get(id)
        if running is None:
            return False
        running.stop(CallCancelled("the caller has given up"))
        return True

    def expire(self, now: float) -> float:
        """Stop the handlers whose deadline has passed, and return the next deadline."""
        upcoming = math.inf
        for running in list(self._running.values()):
            if running.deadline <= now:
                running.deadline = math.inf
                text = f"{running.handler.name!r} did not end in time"
                if running.allowed == self._longest:
                    text = f"{text}; a call may take {self._longest:g} s here (max_timeout)"
                running.stop(RPCTimeout(text))
            else:
                upcoming = min(upcoming, running.deadline)
        return upcoming

    def futures(self) -> set[asyncio.Future[Any]]:
        """Return what tells the end of each running handler."""
        return {entry.future for entry in (*self._running.values(), *self._requests.values())}

    def stop_all(self, reason: RPCError) -> None:
        """Stop every handler, each of which is answered with the reason."""
        for running in (*self._running.values(), *self._requests.values()):
            running.stop(reason)

    def forget(self) -> None:
        """Let go of the connection: no handler will be started any more."""
        self._connection = None

    def end(self) -> None:
        """Stop every handler: the connection has gone, and with it who would read the answers."""
        self.stop_all(CallCancelled("the connection has gone"))
        self._running, self._requests = {}, _NO_REQUESTS


def _with_meta(body: Any) -> tuple[Any, Any, int | None, dict[str, Any]]:
    """Read `[method, params, meta]`; the milliseconds that are left stand before meta.

    Raises:
        ProtocolError: It is none.
    """
    if type(body) is not list or len(body) != 3:
        raise _bad_request("it must be [method, params] or [method, params, meta]")
    name, params, meta = body
    if type(meta) is not dict:
        raise _bad_request("meta must be a map")
    headers = meta.get("headers", {})
    if type(headers) is not dict or not all(type(key) is str for key in headers):
        raise _bad_request("headers must be a map with keys of text")
    if "key" in meta:
        key = meta["key"]
        if type(key) is not str or not 0 < len(key.encode()) <= KEY_BYTES:
            raise _bad_request(f"key must be text of 1 to {KEY_BYTES} bytes")
    if "ttl" not in meta:
        return name, params, None, meta
    ttl = meta["ttl"]
    if type(ttl) is not int or ttl < 0:
        raise _bad_request("ttl must be a number of milliseconds, 0 for no deadline")
    return name, params, ttl, meta


def _bad_request(text: str) -> ProtocolError:
    return ProtocolError(f"bad RPC_REQUEST: {text}", close_code=CloseCode.BAD_PAYLOAD)
