"""What `client.rpc` and `connection.rpc` are: the methods of the peer, to be called."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from types import GenericAlias
from typing import Any, TypeVar, cast, get_args, get_origin, overload

from pydantic import TypeAdapter

from ..exceptions import ConnectionClosed, RPCError
from ..transport.answers import Response
from ..transport.handling import HANDLING, inherit
from ..transport.requests import DEFAULT, Default, Headers, Params
from ..transport.stream_call import StreamCall
from .bind import Bound, Call, OpenStream, bound_class
from .compatibility import differences
from .interface import ASYNC, Style, operations
from .retry import Attempts, Budget, Retry

__all__ = ["Caller", "by_name_only", "convert", "data"]

T = TypeVar("T")
R = TypeVar("R")

Ready = Callable[["float | None"], Coroutine[Any, Any, bool]]


def data(**parameters: Any) -> dict[str, Any]:
    """Return the keyword arguments as a dict: `args=data(a=1, b=2)`."""
    return parameters


class Caller:
    """Calls the methods of the peer.

    `rpc.call("add", {"a": 1, "b": 2})` takes any name, any arguments and a timeout;
    `rpc.add(a=1, b=2)` is the short form, in which every keyword is a parameter.

    Args:
        call: Makes a call.
        stream: Makes a call with streams.
        timeout: Seconds that a call has by default, or None.
        ready: Waits until the peer can be called, so many seconds at most; False when it cannot be
            then. None where a connection that is lost does not come back.
    """

    __slots__ = ("_budget", "_call", "_ready", "_stream", "_timeout")

    def __init__(
        self,
        call: Call,
        stream: OpenStream,
        *,
        timeout: float | None = None,
        ready: Ready | None = None,
    ) -> None:
        self._call = call
        self._stream = stream
        self._timeout = timeout
        self._ready = ready
        self._budget: Budget | None = None

    def use(self, call: Call, stream: OpenStream) -> None:
        """Call through another connection from now on."""
        self._call = call
        self._stream = stream

    @overload
    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        headers: Headers = None,
        retry: Retry | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]: ...

    @overload
    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: type[T],
        headers: Headers = None,
        retry: Retry | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any,
        headers: Headers = None,
        retry: Retry | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]: ...

    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
        headers: Headers = None,
        retry: Retry | None = None,
        key: str | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Call a method and return its result.

        Cancelling the call, and its timeout, cancel the handler at the peer as well. The call waits
        in line while the peer serves as many calls as it grants; a call that is made inside a
        handler is refused instead, because two peers could otherwise wait for each other.

        Args:
            method: The name, at most 256 bytes.
            args: Parameters: a mapping by name, a list or tuple by position, or a Pydantic model.
            timeout: Seconds; the descriptor's `rpc_timeout` by default, None for no deadline. A
                call that a handler makes has no more time than the handler; see `no_deadline`.
            returns: A type that the result is validated against and turned into; `Response` gives
                the result together with its headers, `Response[int]` one that is validated.
            headers: Plain data beside the arguments, which `Context.headers` gives to the handler.
            retry: Make the call again where it is safe, and wait for a client that connects again;
                the error is then that of the last attempt. Cancelling it ends a pause as well.

            key: An idempotency key: text of 1 to 64 bytes, such as `str(uuid.uuid4())`, that no
                other call has. However often a call with this key arrives, over whatever
                connection of this user, the handler runs once and all get its answer, as long as
                the peer remembers the key.

        Raises:
            RPCTimeout: No answer came in time.
            MethodNotFound: The peer has no such method; the text names the nearest.
            InvalidParams: The arguments do not fit; `errors` says where.
            InternalError: The handler failed; `error_id` finds the reason in its log.
            Overloaded: There is no free slot, and this call must not wait for one.
            IdempotencyMismatch: The key belongs to a call with other arguments.
            ConnectionLost: The connection went away before the answer.
            ConnectionClosed: The connection is closed.
            TypeError: An argument cannot be sent; ValueError for a number or text that cannot. The
                text begins with the path to it.
            pydantic.ValidationError: The result is not what `returns` says.
        """
        if returns is None and retry is None:
            return self._call(method, args, timeout, False, headers, key)
        return self._call_and_read(returns, retry, method, args, timeout, True, headers, key)

    async def _call_and_read(self, returns: Any, retry: Retry | None, *request: Any) -> Any:
        call = self._call if retry is None else partial(self._retried, retry, False)
        body: list[Any] = await call(*request)
        return _result(returns, body)

    async def _retried(
        self,
        retry: Retry,
        idempotent: bool,
        method: str,
        args: Params,
        timeout: float | None | Default,
        whole: bool,
        headers: Headers,
        key: str | None,
    ) -> Any:
        """Make a call, and make it again while `retry` says so.

        Args:
            retry: The attempts and the pauses.
            idempotent: Whether the method is marked.
            method, args, timeout, whole, headers, key: As for `Calls.call`.
        """
        seconds = self._timeout if isinstance(timeout, Default) else timeout
        handling = HANDLING.get()
        if handling is not None:
            seconds = inherit(handling, seconds)
        if self._budget is None:
            self._budget = Budget()
        now = asyncio.get_running_loop().time
        deadline = math.inf if seconds is None else now() + seconds
        idempotent = idempotent or key is not None
        attempts = Attempts(retry, self._budget, idempotent=idempotent, deadline=deadline)
        if self._ready is not None:
            await self._ready(attempts.left(now()))
        while True:
            try:
                left = attempts.left(now())
                result = await self._call(method, args, left, whole, headers, key)
            except (ConnectionClosed, RPCError) as exc:
                pause = attempts.failed(exc, now())
                if pause is None or not await self._again(exc, pause, deadline):
                    raise
            else:
                attempts.succeeded()
                return result

    async def _again(self, error: Exception, pause: float, deadline: float) -> bool:
        """Wait until a call may be made again; False when it cannot be.

        Args:
            error: What it failed with.
            pause: Seconds to wait.
            deadline: By when there must be a connection, and the pause be over.
        """
        if self._ready is None:
            if isinstance(error, ConnectionClosed):
                return False
            await asyncio.sleep(pause)
            return True
        now, forever = asyncio.get_running_loop().time, deadline == math.inf
        # The pause comes behind the wait, so that calls which wait together do not go on together.
        if not await self._ready(None if forever else deadline - pause - now()):
            return False
        await asyncio.sleep(pause)
        return await self._ready(None if forever else deadline - now())

    @overload
    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        headers: Headers = None,
    ) -> StreamCall[Any, Any]: ...

    @overload
    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        items: type[T],
        returns: type[R],
        headers: Headers = None,
    ) -> StreamCall[T, R]: ...

    @overload
    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        items: type[T],
        headers: Headers = None,
    ) -> StreamCall[T, Any]: ...

    @overload
    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        returns: type[R],
        headers: Headers = None,
    ) -> StreamCall[Any, R]: ...

    @overload
    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        items: Any = None,
        returns: Any = None,
        headers: Headers = None,
    ) -> StreamCall[Any, Any]: ...

    def stream(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None = None,
        items: Any = None,
        returns: Any = None,
        headers: Headers = None,
    ) -> StreamCall[Any, Any]:
        """Call a method that sends items, takes them, or both.

            async with client.rpc.stream("count", {"to": 3}, items=int) as run:
                async for number in run:
                    print(number)

        One of the arguments may be an async iterable or an iterator, such as a generator: its items
        go to the parameter that is annotated `AsyncIterator`. It is closed when the call ends. A
        list is data and no stream; `iter(a_list)` is one.

        The call occupies one of the slots that the peer grants until it ends. A method that does
        not stream has a result and no items.

        Args:
            method: The name, at most 256 bytes.
            args: As for `call`, and one of them may be an iterator.
            timeout: Seconds for the whole call, the wait in line included; no deadline by default,
                unless a handler calls: it has no more time than that.
            items: A type that each item is validated against and turned into.
            returns: The same for the result; `Response` gives it together with its headers,
                `Response[int]` validated.
            headers: As for `call`.

        Returns:
            What is entered, iterated over and asked for its result; see `StreamCall`.
        """
        check = None if items is None else _adapter(GenericAlias(list, items)).validate_python
        return StreamCall(
            partial(self._stream, method, args, timeout, check, headers),
            partial(_result, returns),
        )

    def bind(self, interface: Callable[..., T]) -> T:
        """Return an object that calls the peer by the methods of an interface.

            class Calculator(Protocol):
                async def add(self, a: int, b: int = 0) -> int: ...
                def count(self, to: int) -> AsyncIterator[int]: ...

            calculator = client.rpc.bind(Calculator)
            total = await calculator.add(1, b=2)

        Nothing is sent, and it goes on working when the connection is made again. Arguments are
        sent by name, and only those that are given: defaults are those of the peer. Results and
        items are validated by the annotations. `async def` is `call`; `def` that is annotated
        `AsyncIterator[T]` is `stream`, and `StreamCall[T, R]` says of a stream that it has a result
        as well. Timeouts are those of `call` and `stream`; `options` gives others.

        Args:
            interface: A `typing.Protocol`, an ABC or another class. Its public methods are those
                of the peer, by the same names; what begins with `_` is left out.

        Raises:
            TypeError: The interface has something that cannot be called, such as a stream that is
                declared `async def`, a property or `*args`; the text says what and why.
        """
        return cast("T", self.bound(interface))

    def bound(self, interface: Any, style: Style = ASYNC) -> Bound:
        """Return what `bind` does, for an interface of any style."""
        # `use` changes what these two call.
        return bound_class(interface, style)(
            lambda *request: self._call(*request),  # pyright: ignore[reportUnknownLambdaType]
            lambda *request: self._stream(*request),  # pyright: ignore[reportUnknownLambdaType]
            self._retried,
        )

    async def differences(self, interface: Callable[..., Any]) -> list[str]:
        """Ask the peer what it offers, and return what keeps an interface from that.

        Names, parameters, results and streams are compared, and no call is made. A peer may offer
        more methods, optional parameters and properties of results, take more and send less than
        the interface knows of. A client asks this by itself for what `bind` has bound.

        Args:
            interface: As for `bind`.

        Returns:
            One sentence for each difference, with the method and the field; none if all fits.

        Raises:
            TypeError: As for `bind`.
            RPCError, ConnectionLost: As for `call`.
        """
        operations(interface)  # which may refuse it
        return differences(interface, await self.discover())

    async def discover(self) -> list[dict[str, Any]]:
        """Return what the peer offers, one map for each method.

        The keys are `name`, `description`, `parameters` and `returns` (JSON Schema), `streaming`
        (with `items` and `argument`), `requires`, `deprecated` and `examples`.
        """
        methods: list[dict[str, Any]] = await self._call(
            "conduit.discover", None, DEFAULT, False, None, None
        )
        return methods

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is not called by attribute because it starts with an underscore; "
                f"use call({name!r})"
            )

        def method(*positional: Any, **parameters: Any) -> Coroutine[Any, Any, Any]:
            if positional:
                raise by_name_only(name)
            return self._call(name, parameters, DEFAULT, False, None, None)

        method.__name__ = method.__qualname__ = name
        return method


def by_name_only(name: str) -> TypeError:
    """Return the error for `rpc.add(1, 2)`: nobody knows here what the parameters are called."""
    return TypeError(
        f"rpc.{name}(...) takes its arguments by name, such as rpc.{name}(a=1); "
        f"by position they go through rpc.call({name!r}, [1])"
    )


def _result(returns: Any, body: list[Any]) -> Any:
    """Return what a final frame carries as what `returns` asks for."""
    if returns is None:
        return body[0]
    if returns is Response:
        return Response(body[0], body[1] if len(body) > 1 else {})
    if not isinstance(returns, type) and get_origin(returns) is Response:
        (hint,) = get_args(returns)
        return Response(convert(body[0], hint), body[1] if len(body) > 1 else {})
    return convert(body[0], returns)


@lru_cache(maxsize=256)
def _cached_adapter(hint: Any, text: str) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _adapter(hint: Any) -> TypeAdapter[Any]:
    # Unions are equal whatever the order of their members, in which Pydantic looks at them.
    # (Not isinstance, which takes list[int] for a class on Python 3.10.)
    text = "" if issubclass(type(hint), type) else repr(hint)
    try:
        return _cached_adapter(hint, text)
    except TypeError:  # a type that cannot be hashed, such as one with Annotated metadata
        return TypeAdapter(hint)


def convert(value: Any, returns: Any) -> Any:
    """Validate a value against a type, and turn it into that type.

    Raises:
        pydantic.ValidationError: It does not fit.
    """
    return _adapter(returns).validate_python(value)
