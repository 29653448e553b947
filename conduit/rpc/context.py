"""What a handler can know of the call that it handles."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import Any

from ..exceptions import RPCTimeout
from ..transport.connection import Connection
from ..transport.handling import Handled, current
from ..transport.running import again

__all__ = ["Context"]


class Context:
    """The call, or the message, that a handler handles.

    A handler gets it in a parameter that is annotated with it. `Context.current()` finds it from
    anywhere in the task, or the thread, of the handler. Another task that is handed a context may
    use it as well, and is told by it when nobody waits any more.
    """

    __slots__ = ("_handled",)

    def __init__(self, handled: Handled) -> None:
        self._handled = handled

    @classmethod
    def current(cls) -> Context:
        """Return the context of the handler that asks.

        Raises:
            RuntimeError: No handler asks. A task that a handler has started is none.
        """
        handled = current()
        if handled is None:
            raise RuntimeError(
                "there is a context only in the task or the thread of a handler; "
                "hand it on to what the handler starts"
            )
        return cls(handled)

    @property
    def connection(self) -> Connection[Any]:
        """Who calls."""
        connection: Connection[Any] = self._handled.connection
        return connection

    @property
    def identity(self) -> str:
        """Who is logged in there, or `anonymous`."""
        return self.connection.identity

    @property
    def method(self) -> str:
        """The name of the method or the message."""
        return self._handled.name

    @property
    def deadline(self) -> float | None:
        """When the time is up, by `time.monotonic()`; None for no deadline."""
        return self._handled.deadline

    @property
    def remaining(self) -> float | None:
        """Seconds that are left, 0 when none are; None for no deadline."""
        deadline = self._handled.deadline
        return None if deadline is None else max(0.0, deadline - monotonic())

    @property
    def headers(self) -> Mapping[str, Any]:
        """What the caller sent beside the parameters: `rpc.call(..., headers={...})`."""
        return self._handled.headers

    @property
    def key(self) -> str | None:
        """The idempotency key of the call: `rpc.call(..., key="...")`; None without one.

        The handler may hand it on, such as to a payment service that knows such keys.
        """
        return self._handled.key

    @property
    def response_headers(self) -> dict[str, Any]:
        """What goes back beside the result, as from `Response`; an error goes back without.

        A stream's go back with its result. Those of a message go nowhere.
        """
        if self._handled.response_headers is None:
            self._handled.response_headers = {}
        return self._handled.response_headers

    @property
    def state(self) -> dict[str, Any]:
        """A dict for whatever the application wants to remember until the handler ends."""
        if self._handled.state is None:
            self._handled.state = {}
        return self._handled.state

    def raise_if_cancelled(self) -> None:
        """Raise when nobody waits for the result any more.

        A thread cannot be cancelled, so a plain `def` handler that takes long asks now and then.

        Raises:
            CallCancelled: The caller has given up, or the connection is lost.
            RPCTimeout: The deadline has passed.
            Unavailable: This side stops.
        """
        stopped, remaining = self._handled.stopped, self.remaining
        if stopped is not None:
            raise again(stopped)
        if remaining == 0:
            raise RPCTimeout(f"{self.method!r} did not end in time")
