"""The other half of `bind`: an object that implements an interface, as handlers.

The interface says what callers may rely on: names, parameters and types. The implementation says
how it wants to be called, and which defaults it has. Both are brought together here, and `Method`
compiles the outcome as it compiles every handler.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from types import GenericAlias
from typing import Any

from ..transport.stream import close_source
from ..transport.stream_call import StreamCall
from ..transport.streaming import Stream
from .contract import Contract, called, contract_of
from .interface import Operation, operations
from .method import Method, is_filled_in
from .streams import is_a

__all__ = ["implemented"]


def implemented(
    interface: Any, implementation: object, requires: frozenset[str] = frozenset()
) -> list[Method]:
    """Return the methods of an interface, compiled for an object that implements it.

    Raises:
        TypeError: One of them is missing or does not fit; the text says which and why.
    """
    if isinstance(implementation, type):
        raise TypeError(f"an object implements an interface: {implementation.__name__}(...)")
    return [
        _method(operation, interface, implementation, requires)
        for operation in operations(interface)
    ]


def _method(
    operation: Operation, interface: type, implementation: object, requires: frozenset[str]
) -> Method:
    name = operation.name
    place = f"{type(implementation).__name__}.{name}"
    inherited = inspect.getattr_static(implementation, name, None) is operation.function
    function = getattr(implementation, name, None)
    # What a Protocol has is a declaration; another class may implement what it declares.
    if not callable(function) or (inherited and getattr(interface, "_is_protocol", False)):
        raise TypeError(f"{place} is missing, and {operation.place} declares it")
    own = contract_of(function, place)
    filled = [
        parameter
        for key, parameter in own.signature.parameters.items()
        if is_filled_in(own.hints.get(key)) or is_a(own.hints.get(key), Stream)
    ]
    sends = any(is_a(own.hints.get(p.name), Stream) for p in filled)
    in_the_end = called(function)
    generator = inspect.isasyncgenfunction(in_the_end)
    if operation.streams and not (generator or sends or inspect.iscoroutinefunction(in_the_end)):
        function, generator = _generator(function), True
    _check_kind(operation, place, generator=generator, sends=sends)
    _check_parameters(operation, place, own, filled)
    contract = Contract(
        _signature(operation, own, filled),
        _hints(operation, own, filled, generator=generator),
        own.description or operation.contract.description,
        own.idempotent or operation.contract.idempotent,
        {},  # the annotations are those of the interface, which `operations` has looked through
    )
    marked = getattr(operation.function, "__deprecated__", False)
    return Method(function, name, contract=contract, deprecated=marked, requires=requires)


def _generator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a generator of what a plain `def` returns, such as the same method of another peer."""

    async def generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        items = function(*args, **kwargs)
        try:
            async for item in items:
                yield item
        finally:
            await (items.__aexit__() if isinstance(items, StreamCall) else close_source(items))

    return generator


def _check_kind(operation: Operation, place: str, *, generator: bool, sends: bool) -> None:
    """Refuse an implementation that answers in another way than the interface says."""
    if not operation.streams:
        if generator or sends:
            raise TypeError(f"{place} sends a stream, and {operation.place} has one answer")
    elif operation.result in (type(None), Any):
        if not generator and not sends:
            raise TypeError(
                f"{place} must be a generator, `async def` with `yield`, because {operation.place} "
                "is a stream"
            )
    elif not sends:
        raise TypeError(
            f"{place} must be `async def` with a parameter Stream[...], because {operation.place} "
            "is a stream with a result"
        )


def _check_parameters(
    operation: Operation, place: str, own: Contract, filled: list[inspect.Parameter]
) -> None:
    """Refuse an implementation that cannot be called as the interface says."""
    parameters = operation.parameters
    declared = f"{operation.place}{operation.contract.signature}"
    rest = [p for p in own.signature.parameters.values() if p not in filled]
    shared = own.signature.replace(parameters=rest)
    for parameter in parameters:
        mine = shared.parameters.get(parameter.name)
        if mine is None:
            raise TypeError(f"{place} has no parameter {parameter.name!r}, as {declared} has")
        if parameter.default is not parameter.empty and mine.default is mine.empty:
            raise TypeError(f"{place}: {parameter.name!r} needs a default, as in {declared}")
    by_name = {p.name: p.name for p in parameters}
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    rest_by_name = {name: name for name in by_name if name not in positional}
    try:  # `Method` calls in one of these two ways
        own.signature.bind(**by_name, **{p.name: None for p in filled})
        by_position = shared.bind(*positional, **rest_by_name)
    except TypeError as exc:
        raise TypeError(f"{place}{own.signature} cannot be called as {declared}: {exc}") from None
    if by_position.arguments != by_name:
        raise TypeError(f"{place}{own.signature} has its parameters in another order: {declared}")


def _signature(
    operation: Operation, own: Contract, filled: list[inspect.Parameter]
) -> inspect.Signature:
    """Return the parameters of the interface, then those that are filled in.

    A default is a promise of the interface, and its value is the implementation's: in an interface
    it is often `...`.
    """
    parameters = [
        p if p.default is p.empty else p.replace(default=own.signature.parameters[p.name].default)
        for p in operation.parameters
    ]
    parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in filled]
    return operation.contract.signature.replace(parameters=parameters)


def _hints(
    operation: Operation, own: Contract, filled: list[inspect.Parameter], *, generator: bool
) -> dict[str, Any]:
    """Return the annotations of the interface, as a handler has them."""
    hints = dict(operation.contract.hints)
    for parameter in filled:
        hint = own.hints[parameter.name]
        sends = is_a(hint, Stream)
        hints[parameter.name] = GenericAlias(Stream, (operation.items,)) if sends else hint
    hints["return"] = operation.result
    if generator:
        hints["return"] = GenericAlias(AsyncIterator, (operation.items,))
    return hints
