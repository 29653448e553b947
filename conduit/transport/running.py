"""A handler that has not ended yet, and what its caller is told when it fails."""

from __future__ import annotations

import asyncio
import logging
import math
import reprlib
import secrets
import traceback
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Protocol

from pydantic import ValidationError

from ..exceptions import CallCancelled, InternalError, RPCError
from .handling import Handled
from .threads import ThreadFuture

__all__ = [
    "Handler",
    "Running",
    "again",
    "as_rpc_error",
    "exit_behind",
    "headers_of",
    "is_let_out",
    "none_or",
    "text_of",
    "why_stopped",
]

logger = logging.getLogger("conduit.connection")


class Handler(Protocol):
    """What serving needs of a handler that the router has compiled."""

    name: str
    kind: Literal["coroutine", "thread", "inline"]
    timeout: float | None
    concurrent: bool
    streaming: Any
    """Its `streaming.Streaming`; None when it neither sends nor takes items."""
    guard: Callable[[Any], None] | None
    """Raises for a connection that may not call it; None when everybody may. `start` asks it."""
    finish: Callable[[Any], Any] | None
    """Checks the result and turns it into plain data; None when there is nothing to check."""

    @property
    def start(self) -> Callable[[Any, Any], Any]:
        """Checks the roles of the connection, validates the data, and returns by `kind` the
        coroutine, the function that is to run in a thread, or the result.
        """
        ...


class Running:
    """A handler that has not ended yet.

    Args:
        connection: Whose call it handles.
        handler: The handler.
        future: Will have its result.
        call: What `Handling.call` was when it was suspended.
        ends: When its time is up, by `time.monotonic`; infinity for never.

    Attributes:
        allowed: Seconds that it has in all.
        deadline: When it is to be stopped, by the clock of the loop.
        stopped: Why it was stopped, if it was.
    """

    __slots__ = (
        "_call",
        "_connection",
        "_ends",
        "allowed",
        "deadline",
        "future",
        "handler",
        "stopped",
    )

    def __init__(
        self,
        connection: Any,
        handler: Handler,
        future: asyncio.Future[Any],
        call: Any,
        ends: float = math.inf,
    ) -> None:
        self._connection = connection
        self.handler = handler
        self.future = future
        # No more of a request than its headers, or its parameters would live as long.
        self._call = headers_of(call) if type(call) is list else call
        self._ends = ends
        self.allowed = self.deadline = math.inf
        self.stopped: RPCError | None = None

    @property
    def handled(self) -> Handled:
        """What it handles, made when somebody asks."""
        call = self._call
        if type(call) is not Handled:
            headers = call if type(call) is dict else None
            self._call = call = Handled(
                self._connection, self.handler.name, none_or(self._ends), headers, self.stopped
            )
        return call

    @property
    def response_headers(self) -> dict[str, Any] | None:
        """What goes back beside the result."""
        return self._call.response_headers if type(self._call) is Handled else None

    def tell(self, reason: RPCError) -> None:
        """Let the handler know, when it asks, that nobody waits for it any more."""
        self.stopped = reason
        if type(self._call) is Handled:
            self._call.stopped = reason

    def stop(self, reason: RPCError) -> None:
        """End the handler; a thread cannot be ended and is only told, when it asks."""
        if self.stopped is None:
            self.tell(reason)
            if isinstance(self.future, ThreadFuture):
                if self.future.leave_queue():
                    self.stopped = again(reason, executed=False)
            # A handler that stops the server, or closes its connection, goes on to its end.
            elif self.handler.kind == "coroutine" and self.future is not asyncio.current_task():
                self.future.cancel()


def headers_of(body: list[Any]) -> dict[str, Any] | None:
    """Return the headers in the body of a request."""
    return body[2].get("headers") if len(body) == 3 else None


def none_or(moment: float) -> float | None:
    """Return a moment, or None for infinity."""
    return None if moment == math.inf else moment


def again(error: RPCError, **details: Any) -> RPCError:
    """Return a fresh exception, because raising one object twice mixes up its tracebacks."""
    return type(error)(error.message, details={**error.details, **details})


def text_of(message: object) -> str:
    """Return a text that can be sent, whatever a handler has put into its error."""
    try:
        return str(message).encode(errors="replace").decode()
    except Exception:  # noqa: BLE001  # __str__ of an object of the application
        return ""


def why_stopped(future: asyncio.Future[Any], stopped: RPCError, name: str) -> RPCError:
    """Return why a handler was stopped; what it raised on its way out is only logged."""
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, RPCError):
        logger.error("handler %r failed after it was stopped", name, exc_info=error)
    return stopped


def as_rpc_error(error: BaseException, name: str, *, debug: bool) -> RPCError:
    """Return what the peer is told of an error.

    Args:
        error: What the handler raised.
        name: The handler.
        debug: Tell the traceback of an unexpected error too, which else stays in the log.
    """
    what = "handler %r failed, error id %s"
    if isinstance(error, RPCError):
        if _is_sendable_code(error.code):
            return _as_of_this_call(error)
        # A peer would close the connection for it, and with it end the calls of everybody else.
        kind = f"{type(error).__name__}, whose code is {reprlib.repr(error.code)} and not text"
        what = f"handler %r raised {kind.replace('%', '%%')}, error id %s"
    if isinstance(error, asyncio.CancelledError):
        return CallCancelled(f"{name!r} was cancelled by the side that ran it")
    error_id = secrets.token_hex(8)
    if _is_misfit(error):
        what = "what handler %r gives back does not fit its annotation, error id %s"
    logger.error(
        what,
        name,
        error_id,
        exc_info=(type(error), error, error.__traceback__),
    )
    text = f"{name!r} failed; its log has the reason under error id {error_id}"
    details = {"error_id": error_id}
    if debug:
        text += f": {type(error).__name__}: {text_of(error)}"
        details["traceback"] = text_of("".join(traceback.format_exception(error)))
    return InternalError(text, details=details)


def exit_behind(loop: asyncio.AbstractEventLoop, error: BaseException) -> None:
    """Let an error that ends a program or a thread end the loop, behind what is under way.

    uvloop takes what is raised in the middle of a batch for a link that broke, and the rest of the
    batch would be lost.
    """

    def leave() -> None:
        raise error

    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        loop.call_soon(leave)


def _is_sendable_code(code: object) -> bool:
    """Whether what an error has for its code is text on the wire, as the value of an `Enum` is."""
    value = code.value if isinstance(code, Enum) else code
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _is_misfit(error: BaseException) -> bool:
    """Whether it was a result that did not fit, and no validation of the application's own."""
    frames = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValidationError) and all(map(_in_conduit, frames))


def _in_conduit(frame: tuple[types.FrameType, int]) -> bool:
    return _package(frame[0].f_globals.get("__name__")) == _package(__name__)


def _as_of_this_call(error: RPCError) -> RPCError:
    """Return an error with an `executed` that is true of the call which it now answers.

    What a handler itself raises may say that nothing was done. But if a call that the handler made
    was not executed, and the handler lets that error out, then the handler was: whoever believed
    the opposite, and called again, would have it done twice.
    """
    if not isinstance(error.details, dict) or error.details.get("executed") is not False:
        return error
    if not is_let_out(error):
        return error
    details = {**error.to_wire(), "executed": True}
    return RPCError.from_wire(error.code, error.message, details)


def is_let_out(error: BaseException) -> bool:
    """Whether a handler has let out the error of a call of its own.

    Else the handler did not begin, only passes calls on, or has raised the error itself.
    """
    in_conduit = list(map(_in_conduit, traceback.walk_tb(error.__traceback__)))
    return not all(in_conduit) and in_conduit[-1]


def _package(module: object) -> str:
    return str(module).partition(".")[0]
