"""Typed calls without generated code: an object with the methods of an interface.

`rpc.bind(Calculator)` makes a class for `Calculator` once. Its methods take what those of the
interface take, send it by name, and validate what comes back by the annotations.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Coroutine, Mapping
from functools import lru_cache, partial
from types import GenericAlias
from typing import Any, TypeVar, cast, get_origin

from pydantic import BaseModel

from ..transport.answers import Response
from ..transport.requests import DEFAULT, Default, Headers, Params
from ..transport.stream import Check
from ..transport.stream_call import OpenCall, StreamCall
from .interface import ASYNC, Operation, Style, operations
from .retry import Retry
from .streams import item_of
from .validation import adapter_of

__all__ = ["Bound", "Call", "OpenStream", "Retried", "WithOptions", "bound_class", "options"]

T = TypeVar("T")

Call = Callable[
    [str, Params, "float | None | Default", bool, Headers, "str | None"], Coroutine[Any, Any, Any]
]
"""Method, arguments, timeout, whether the whole body of the answer is wanted, headers, and key."""

OpenStream = Callable[
    [str, Params, "float | None", "Check | None", Headers], Coroutine[Any, Any, OpenCall]
]
"""Method, arguments, timeout, what validates the items, and headers."""

Retried = Callable[
    [Retry, bool, str, Params, "float | None | Default", bool, Headers, "str | None"],
    Coroutine[Any, Any, Any],
]
"""How to try again, whether the method is marked idempotent, and then as for `Call`."""


class WithOptions:
    """What `options` takes."""

    __slots__ = ()

    def __replace__(
        self,
        *,
        timeout: float | None | Default,
        retry: Retry | None | Default,
        key: str | None | Default,
    ) -> WithOptions:
        raise NotImplementedError


class Bound(WithOptions):
    """The methods of a peer that an interface declares; what `rpc.bind` returns is one.

    Args:
        call: Makes a call.
        open: Makes a call with streams.
        retried: Makes a call, and makes it again.
        timeout: Seconds for each call, None for no deadline; `DEFAULT` is what `rpc.call` and
            `rpc.stream` have.
        retry: How calls are made again that have no streams, or None.
        key: The idempotency key of each call, or None.
    """

    __slots__ = ("_call", "_key", "_open", "_retried", "_retry", "_timeout")

    def __init__(
        self,
        call: Call,
        open: OpenStream,
        retried: Retried,
        timeout: float | None | Default = DEFAULT,
        retry: Retry | None = None,
        key: str | None = None,
    ) -> None:
        self._call = call
        self._open = open
        self._retried = retried
        self._timeout = timeout
        self._retry = retry
        self._key = key

    def __init_subclass__(cls, interface: type, style: Style) -> None:
        for operation in operations(interface, style):
            if operation.streams:
                method = cls._streaming(operation)
            elif operation.input is not None:
                method = cls._taking(operation)
            else:
                method = cls._plain(operation)
            setattr(cls, operation.name, functools.wraps(operation.function)(method))

    def __replace__(
        self,
        *,
        timeout: float | None | Default,
        retry: Retry | None | Default,
        key: str | None | Default,
    ) -> Bound:
        return type(self)(
            self._call,
            self._open,
            self._retried,
            self._timeout if isinstance(timeout, Default) else timeout,
            self._retry if isinstance(retry, Default) else retry,
            self._key if isinstance(key, Default) else key,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of a peer>"

    @staticmethod
    def _plain(operation: Operation) -> Callable[..., Any]:
        """Return a method that has an answer."""
        name, params, read = operation.name, _params(operation), _reader(operation)
        marked = operation.contract.idempotent

        async def method(self: Bound, /, *args: Any, **kwargs: Any) -> Any:
            call = (
                self._call if self._retry is None else partial(self._retried, self._retry, marked)
            )
            return read(
                await call(name, params(args, kwargs), self._timeout, True, None, self._key)
            )

        return method

    @staticmethod
    def _streaming(operation: Operation) -> Callable[..., Any]:
        """Return a method that sends items, and may take some."""
        name, params, read = operation.name, _params(operation), _reader(operation)
        check = _check(operation)

        def method(self: Bound, /, *args: Any, **kwargs: Any) -> StreamCall[Any, Any]:
            if self._key is not None:
                raise TypeError(f"{name!r} has streams, and a call with streams takes no key")
            timeout = None if isinstance(self._timeout, Default) else self._timeout
            arguments = params(args, kwargs)
            return StreamCall(partial(self._open, name, arguments, timeout, check, None), read)

        return method

    @staticmethod
    def _taking(operation: Operation) -> Callable[..., Any]:
        """Return a method that takes items, and has an answer."""
        open = Bound._streaming(operation)

        async def method(self: Bound, /, *args: Any, **kwargs: Any) -> Any:
            async with open(self, *args, **kwargs) as run:  # closes the items whatever happens
                return await run.result()

        return method


def bound_class(interface: Any, style: Style = ASYNC) -> type[Bound]:
    """Return the class whose instances have the methods of an interface.

    Args:
        interface: The class that declares them.
        style: How it is written. The methods of the instances are coroutines all the same.

    Raises:
        TypeError: The interface cannot be called; the text says why.
    """
    if not isinstance(interface, type):
        operations(interface)  # which refuses it
    return _bound_class(interface, style)


@lru_cache(maxsize=256)
def _bound_class(interface: type, style: Style) -> type[Bound]:
    made = types.new_class(
        interface.__name__,
        (Bound,),
        {"interface": interface, "style": style},
        lambda body: body.update(
            __slots__=(), __doc__=interface.__doc__, __module__=interface.__module__
        ),
    )
    return cast("type[Bound]", made)


def options(
    bound: T,
    *,
    timeout: float | None | Default = DEFAULT,
    retry: Retry | None | Default = DEFAULT,
    key: str | None | Default = DEFAULT,
) -> T:
    """Return the same methods with other options; the object that is given stays as it is.

        await options(calculator, timeout=2).add(1, 2)

    Args:
        bound: What `rpc.bind` or `options` has returned. What is not given here is as it is there.
        timeout: Seconds for each call, the wait in line included; for a stream, for the whole of
            it. None for no deadline.
        retry: How calls are made again; None for once only. Methods that are marked `@idempotent`
            are made again also when they may have run. Calls with streams are made once.
        key: The idempotency key, for one call; see `Caller.call`. None for none.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(bound, WithOptions):
        raise TypeError(f"options are for what rpc.bind(...) returns, not {bound!r}")
    return cast("T", bound.__replace__(timeout=timeout, retry=retry, key=key))


def _params(operation: Operation) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return what makes the parameters of a call from its arguments, without the defaults."""
    signature, place, lone = operation.contract.signature, operation.place, operation.lone
    parameters = operation.parameters
    by_position = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = frozenset(p.name for p in parameters if p.default is p.empty)
    known = frozenset(p.name for p in parameters)

    def params(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(by_position, args, strict=False))
        given.update(kwargs)
        if len(given) != len(args) + len(kwargs) or not required <= given.keys() <= known:
            try:
                signature.bind(*args, **kwargs)  # which says what is wrong
            except TypeError as exc:
                raise TypeError(f"{place}: {exc}") from None
        if lone is not None and lone in given:
            return {**_fields(given.pop(lone)), **given}
        return given

    return params


def _fields(value: BaseModel | Mapping[str, Any]) -> Mapping[str, Any]:
    return value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value


def _check(operation: Operation) -> Check | None:
    """Return what validates the items of the peer, many at a time."""
    if operation.items is Any:
        return None
    adapter = adapter_of(operation.place, GenericAlias(list, (operation.items,)))
    return adapter.validator.validate_python


def _reader(operation: Operation) -> Callable[[list[Any]], Any]:
    """Return what makes the result of the body of a final frame."""
    hint = operation.result
    wrapped = hint is Response or get_origin(hint) is Response
    if wrapped:
        hint = item_of(hint)
    validate: Callable[[Any], Any] | None = None
    if hint is not Any:
        validate = adapter_of(operation.place, hint).validator.validate_python

    def read(body: list[Any]) -> Any:
        value = body[0] if validate is None else validate(body[0])
        if not wrapped:
            return value
        return Response(value, body[1] if len(body) > 1 else {})

    return read
