"""What `rpc` of a blocking client is: the calls of `rpc.caller`, waited for in any thread."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import lru_cache
from typing import Any, Final, Generic, TypeVar, cast, overload

from ..exceptions import ConduitError, ConnectionClosed
from ..schemas import methods_of
from ..signatures import deprecation, python_signature, shown, signature
from ..transport import stream_call
from ..transport.loop_thread import LoopThread
from ..transport.requests import DEFAULT, Default, Headers, Params
from ..transport.thread_items import in_thread, in_threads
from .bind import Bound, WithOptions
from .caller import Caller, by_name_only
from .compatibility import differences
from .interface import Operation, Style, operations
from .retry import Retry

__all__ = ["BLOCKING", "BlockingCaller", "StreamCall"]

R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound="StreamCall[Any, Any]")

_Offered = dict[str, dict[str, Any]]
"""What discovery tells, by the names of the methods."""

_ANYTHING = inspect.Signature(
    [inspect.Parameter("parameters", inspect.Parameter.VAR_KEYWORD, annotation=Any)],
    return_annotation=Any,
)
"""The signature of a method of which the server has told nothing."""
COMPLETION_TIME = 5.0
"""Seconds that completion and `help()` wait for the server."""


class StreamCall(Generic[T, R]):
    """A call with streams; `rpc.stream(...)` returns it. See `conduit.StreamCall`.

        with client.rpc.stream("train", {"rounds": 9}, items=Progress, returns=Model) as run:
            for progress in run:
                ...
            model = run.result()

    Whoever leaves the block before the end of the call, by `break`, an error or Ctrl-C, cancels the
    handler at the server. A plain `for item in client.rpc.stream(...)` works as well.

    It is for one loop at a time. Items come in batches of what the server has sent together.
    """

    def __init__(self, thread: LoopThread, call: stream_call.StreamCall[T, R]) -> None:
        self._thread = thread
        self._call = call
        self._ready: deque[T] = deque()

    def __enter__(self: S) -> S:
        """Make the call; see `result` for what it may raise."""
        self._thread.run(self._call.__aenter__)
        return self

    def __exit__(self, *exc: object) -> None:
        # If the client has disconnected meanwhile, its calls are over.
        with contextlib.suppress(ConnectionClosed):
            self._thread.run(self._call.__aexit__)

    def __iter__(self) -> Iterator[T]:
        """Yield the items; a slow loop makes the server's handler wait.

        Raises:
            pydantic.ValidationError: An item is not what `items` says.
            RPCError, ConnectionLost: As for `result`.
        """
        items = aiter(self._call)
        while True:
            if not self._ready and not self._thread.run(self._fetch, items):
                return
            yield self._ready.popleft()

    def __next__(self) -> T:
        """Return the next item, for `next(run)`; errors as in a loop over the items.

        Raises:
            StopIteration: There are no more.
        """
        if not self._ready and not self._thread.run(self._fetch, self._call):
            raise StopIteration
        return self._ready.popleft()

    async def _fetch(self, items: AsyncIterator[T]) -> bool:
        """Wait for an item, and take those that have come with it; False at the end."""
        try:
            self._ready.append(await anext(items))
        except StopAsyncIteration:
            return False
        for _ in range(self._call.ready):
            self._ready.append(await anext(items))
        return True

    def result(self) -> R:
        """Wait for the end of the call and return its result; None for a generator.

        Items that no loop takes are thrown away. Ctrl-C inside the block leaves the call to the
        end of the block; without a block it cancels the handler.

        Raises:
            RPCTimeout: The deadline has passed.
            RPCError: As for `rpc.call`.
            ConnectionLost: The connection went away before the end.
            ConnectionClosed: The connection is closed.
            Exception: What the iterator among the arguments raised; the handler is cancelled.
            pydantic.ValidationError: The result is not what `returns` says.
        """
        return self._thread.run(self._call.result)


BLOCKING: Final = Style(False, (Iterator,), StreamCall)
"""Interfaces whose methods wait by themselves."""


class BlockingBound(WithOptions):
    """The methods of the server that an interface declares; what `rpc.bind` returns is one.

    Args:
        bound: Makes the calls, on the loop.
        thread: Returns the thread of the loop, or raises ConnectionClosed.
    """

    __slots__ = ("_bound", "_thread")

    def __init__(self, bound: Bound, thread: Callable[[], LoopThread]) -> None:
        self._bound = bound
        self._thread = thread

    def __init_subclass__(cls, interface: type) -> None:
        for operation in operations(interface, BLOCKING):
            method = cls._streaming(operation) if operation.streams else cls._plain(operation)
            setattr(cls, operation.name, functools.wraps(operation.function)(method))

    def __replace__(
        self,
        *,
        timeout: float | None | Default,
        retry: Retry | None | Default,
        key: str | None | Default,
    ) -> BlockingBound:
        bound = self._bound.__replace__(timeout=timeout, retry=retry, key=key)
        return type(self)(bound, self._thread)

    def __repr__(self) -> str:
        return repr(self._bound)

    @staticmethod
    def _plain(operation: Operation) -> Callable[..., Any]:
        """Return a method that waits for its answer."""
        name = operation.name

        def method(self: BlockingBound, /, *args: Any, **kwargs: Any) -> Any:
            call, thread = getattr(self._bound, name), self._thread()
            if operation.input is not None:
                args, kwargs = _threaded(args, kwargs)
            return thread.run(call, *args, **kwargs)

        return method

    @staticmethod
    def _streaming(operation: Operation) -> Callable[..., Any]:
        """Return a method that sends items, and may take some."""
        name = operation.name

        def method(self: BlockingBound, /, *args: Any, **kwargs: Any) -> StreamCall[Any, Any]:
            call, thread = getattr(self._bound, name), self._thread()
            if operation.input is not None:
                args, kwargs = _threaded(args, kwargs)
            return StreamCall(thread, call(*args, **kwargs))

        return method


def _threaded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return arguments in which iterators do not block the loop."""
    return tuple(map(in_thread, args)), {name: in_thread(one) for name, one in kwargs.items()}


@lru_cache(maxsize=256)
def _blocking_class(interface: type) -> type[BlockingBound]:
    made = types.new_class(
        interface.__name__,
        (BlockingBound,),
        {"interface": interface},
        lambda body: body.update(
            __slots__=(), __doc__=interface.__doc__, __module__=interface.__module__
        ),
    )
    return cast("type[BlockingBound]", made)


class Method:
    # A method of the server, to be called. What it says of itself comes from discovery, which is
    # asked only when somebody wants to know.

    def __init__(
        self, name: str, call: Callable[..., Any], offered: Callable[[], _Offered]
    ) -> None:
        self._call = call
        self._offered = offered
        self.__name__ = self.__qualname__ = name

    def __call__(self, /, *positional: Any, **parameters: Any) -> Any:
        if positional:
            raise by_name_only(self.__name__)
        return self._call(self.__name__, parameters)

    def __repr__(self) -> str:
        return f"<method {self.__name__!r} of the server>"

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        method = self._offered().get(self.__name__)
        if method is None:
            return f"Call {self.__name__!r}, of which the server has told nothing."
        parts = [[signature(method)], str(method.get("description", "")).splitlines()]
        if mark := deprecation(method):
            parts.append([f"{mark[0].upper()}{mark[1:]}"])
        examples = method.get("examples")
        if isinstance(examples, list) and examples:
            parts.append(["For example:", *(f"    {example}" for example in examples)])
        if method.get("streaming"):
            parts.append([f"Call it by rpc.stream({self.__name__!r}, ...)."])
        return "\n\n".join("\n".join(map(shown, lines)) for lines in parts if lines)

    @property
    def __signature__(self) -> inspect.Signature:
        method = self._offered().get(self.__name__)
        return _ANYTHING if method is None else python_signature(method)


class BlockingCaller:
    """Calls the methods of the server: `rpc.add(a=1)` or `rpc.call("add", {"a": 1}, timeout=5)`.

    In a notebook, completion and `help()` know the methods of the server. It is asked for them
    when somebody first wants to know, once per connection, and never by a call.

    Args:
        rpc: Makes the calls, on the loop.
        thread: Returns the thread of the loop, or raises ConnectionClosed.
        connection_id: Returns the id of the connection, or raises ConnectionClosed.
    """

    def __init__(
        self, rpc: Caller, thread: Callable[[], LoopThread], connection_id: Callable[[], str]
    ) -> None:
        self._thread = thread
        self._connection_id = connection_id
        self._call: Callable[..., Coroutine[Any, Any, Any]] = rpc.call
        self._stream: Callable[..., stream_call.StreamCall[Any, Any]] = rpc.stream
        self._discover = rpc.discover
        self._bound = rpc.bound
        self._offered: tuple[str, _Offered] = ("", {})

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
    ) -> Any: ...

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
    ) -> T: ...

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
    ) -> Any: ...

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
    ) -> Any:
        """Call a method and return its result; arguments and errors are those of `conduit.Client`.

        Ctrl-C while it waits cancels the handler at the server, and the client can be used again.
        """
        return self._thread().run(
            self._call,
            method,
            args,
            timeout=timeout,
            returns=returns,
            headers=headers,
            retry=retry,
            key=key,
        )

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
        """Call a method that sends items, takes them, or both; see `conduit.Client`.

        One of the arguments may be an iterator, such as a generator. A thread of its own advances
        it, up to 64 items ahead, so it may block. It is closed when the call ends, or when it comes
        back from where it blocks.

        Raises:
            ConnectionClosed: The client is not connected.
        """
        thread, args = self._thread(), in_threads(args)
        call = self._stream(
            method, args, timeout=timeout, items=items, returns=returns, headers=headers
        )
        return StreamCall(thread, call)

    def bind(self, interface: Callable[..., T]) -> T:
        """Return an object that calls the server by the methods of an interface, and waits.

            class Calculator(Protocol):
                def add(self, a: int, b: int = 0) -> int: ...
                def count(self, to: int) -> Iterator[int]: ...

            calculator = client.rpc.bind(Calculator)
            total = calculator.add(1, b=2)

        See `conduit.Client`. The methods of the interface are plain `def`; a stream is annotated
        `Iterator[T]`, and `conduit.blocking.StreamCall[T, R]` says that it has a result as well.

        Args:
            interface: A `typing.Protocol`, an ABC or another class.

        Raises:
            TypeError: The interface has something that cannot be called, such as a method that is
                declared `async def`; the text says what and why.
        """
        bound = self._bound(interface, BLOCKING)
        return cast("T", _blocking_class(cast("type", interface))(bound, self._thread))

    def differences(self, interface: Callable[..., Any]) -> list[str]:
        """Ask the server what it offers, and return what keeps an interface from that.

        See `conduit.Client`.
        """
        operations(interface, BLOCKING)  # which may refuse it
        return differences(interface, self.discover(), BLOCKING)

    def discover(self) -> list[dict[str, Any]]:
        """Return what the server offers, one map for each method; see `conduit.Client`."""
        return self._thread().run(self._discover)

    def _what_is_offered(self) -> _Offered:
        """Return what the server offers, or nothing where it cannot be asked."""
        try:
            connection = self._connection_id()
            if self._offered[0] != connection:
                found = self.call("conduit.discover", timeout=COMPLETION_TIME)
                by_name = {str(one.get("name")): one for one in methods_of(found)}
                self._offered = (connection, by_name)
        except (ConduitError, RuntimeError):  # no connection, no answer, or not in this thread
            return {}
        return self._offered[1]

    def __dir__(self) -> list[str]:
        names = [name for name in self._what_is_offered() if name.isidentifier()]
        return sorted({*super().__dir__(), *(name for name in names if name[0] != "_")})

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is not called by attribute because it starts with an underscore; "
                f"use call({name!r})"
            )
        return Method(name, self.call, self._what_is_offered)
