"""What `client.rpc` and `connection.rpc` are: the methods of the peer, to be called."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter

from ..transport.calls import DEFAULT, Default, Params
from ..transport.serving import Response

__all__ = ["Caller", "convert", "data"]

T = TypeVar("T")

Call = Callable[[str, Params, "float | None | Default", bool], Coroutine[Any, Any, Any]]
"""Method, arguments, timeout, and whether the whole body of the answer is wanted."""


def data(**parameters: Any) -> dict[str, Any]:
    """Return the keyword arguments as a dict: `args=data(a=1, b=2)`."""
    return parameters


class Caller:
    """Calls the methods of the peer.

    `rpc.call("add", {"a": 1, "b": 2})` takes any name, any arguments and a timeout;
    `rpc.add(a=1, b=2)` is the short form, in which every keyword is a parameter.
    """

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def use(self, call: Call) -> None:
        """Call through another connection from now on."""
        self._call = call

    @overload
    def call(
        self, method: str, args: Params = None, *, timeout: float | None | Default = DEFAULT
    ) -> Coroutine[Any, Any, Any]: ...

    @overload
    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: type[T],
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any,
    ) -> Coroutine[Any, Any, Any]: ...

    def call(
        self,
        method: str,
        args: Params = None,
        *,
        timeout: float | None | Default = DEFAULT,
        returns: Any = None,
    ) -> Coroutine[Any, Any, Any]:
        """Call a method and return its result.

        Cancelling the call, and its timeout, cancel the handler at the peer as well. The call waits
        in line while the peer serves as many calls as it grants; a call that is made inside a
        handler is refused instead, because two peers could otherwise wait for each other.

        Args:
            method: The name, at most 256 bytes.
            args: Parameters: a mapping by name, a list or tuple by position, or a Pydantic model.
            timeout: Seconds; the descriptor's `rpc_timeout` by default, None for no deadline.
            returns: A type that the result is validated against and turned into; `Response` gives
                the result together with its headers.

        Raises:
            RPCTimeout: No answer came in time.
            MethodNotFound: The peer has no such method; the text names the nearest.
            InvalidParams: The arguments do not fit; `errors` says where.
            InternalError: The handler failed; `error_id` finds the reason in its log.
            Overloaded: There is no free slot, and this call must not wait for one.
            ConnectionLost: The connection went away before the answer.
            ConnectionClosed: The connection is closed.
            pydantic.ValidationError: The result is not what `returns` says.
        """
        if returns is None:
            return self._call(method, args, timeout, False)
        return self._typed_result(method, args, timeout, returns)

    async def _typed_result(
        self, method: str, args: Params, timeout: float | None | Default, returns: Any
    ) -> Any:
        body: list[Any] = await self._call(method, args, timeout, True)
        if returns is Response:
            return Response(body[0], body[1] if len(body) > 1 else {})
        return convert(body[0], returns)

    async def discover(self) -> list[dict[str, Any]]:
        """Return what the peer offers, one map for each method.

        The keys are `name`, `description`, `parameters` and `returns` (JSON Schema), `requires`.
        """
        methods: list[dict[str, Any]] = await self._call("conduit.discover", None, DEFAULT, False)
        return methods

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):
            raise AttributeError(
                f"{name!r} is not called by attribute because it starts with an underscore; "
                f"use call({name!r})"
            )

        def method(**parameters: Any) -> Coroutine[Any, Any, Any]:
            return self._call(name, parameters, DEFAULT, False)

        method.__name__ = method.__qualname__ = name
        return method


@lru_cache(maxsize=256)
def _cached_adapter(returns: Any) -> TypeAdapter[Any]:
    return TypeAdapter(returns)


def convert(value: Any, returns: Any) -> Any:
    """Validate a value against a type, and turn it into that type.

    Raises:
        pydantic.ValidationError: It does not fit.
    """
    try:
        adapter = _cached_adapter(returns)
    except TypeError:  # a type that cannot be hashed, such as one with Annotated metadata
        adapter = TypeAdapter(returns)
    return adapter.validate_python(value)
