"""What an interface says of a peer: a class whose public methods the peer serves.

    class Calculator(Protocol):
        async def add(self, a: int, b: int = 0) -> int: ...
        def count(self, to: int) -> AsyncIterator[int]: ...
        async def add_up(self, numbers: AsyncIterator[int]) -> int: ...
        def train(self, rounds: int) -> StreamCall[Progress, Model]: ...

A `typing.Protocol`, an ABC or any other class. Both ends read it here: `rpc.bind` to call, `serve`
to register. Whatever could not be called is refused when the interface is read.
"""

from __future__ import annotations

import collections.abc
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple, TypeVar, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from ..transport.stream_call import StreamCall
from ..transport.streaming import Stream
from .contract import Contract, called, contract_of, lone_model
from .generics import check_bound
from .streams import TAKES, check_parameter, is_a, item_of, shown
from .validation import adapter_of

__all__ = ["ASYNC", "Operation", "Style", "operations"]


class Style(NamedTuple):
    """How an interface is written.

    Attributes:
        waits: Whether its methods are `async def`.
        items: What a stream is annotated with, as a parameter and as a result.
        call: What a stream with a result is annotated with.
    """

    waits: bool
    items: tuple[Any, ...]
    call: Any


ASYNC: Final = Style(True, TAKES, StreamCall)

_NO_METHODS = {
    property: "is a property",
    staticmethod: "is a static method",
    classmethod: "is a class method",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of an interface.

    Attributes:
        name: Its name, also on the wire.
        place: Its name in errors: `Calculator.add`.
        function: The function in the class.
        contract: Its parameters without `self`, and its annotations.
        input: The parameter whose items the caller sends, or None.
        lone: The only parameter that is data, if it is a model and so takes the whole map.
        streams: Whether the peer sends items.
        items: The type of those items.
        result: The type of the result, which for `-> AsyncIterator[...]` is None.
    """

    name: str
    place: str
    function: types.FunctionType
    contract: Contract
    input: str | None
    lone: str | None
    streams: bool
    items: Any
    result: Any

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The parameters without `self`."""
        return list(self.contract.signature.parameters.values())


def operations(interface: Any, style: Style = ASYNC) -> list[Operation]:
    """Read an interface.

    Args:
        interface: The class.
        style: How it is written; the one for a blocking client differs.

    Returns:
        Its methods in the order in which they are written, those of base classes first. Names that
        begin with `_` are left out.

    Raises:
        TypeError: It is no class, has no method, or has one that cannot be called from afar; the
            text names it and says why.
    """
    if not isinstance(interface, type):
        text = f"an interface is a class, such as a typing.Protocol, not {interface!r}"
        if isinstance(generic := get_origin(interface), type):
            text += f"; class Mine({generic.__name__}[...], Protocol) makes one of it"
        raise TypeError(text)
    found = [_operation(interface, name, style) for name in dict.fromkeys(_public(interface))]
    if not found:
        raise TypeError(f"{interface.__name__} has no public methods, so there is nothing to call")
    return found


def _public(interface: type) -> Iterator[str]:
    """Yield the public names in a class and its bases, also those that have only an annotation."""
    for base in reversed(interface.__mro__):
        for name in (*vars(base), *inspect.get_annotations(base)):
            if not name.startswith("_"):
                yield name


def _operation(interface: type, name: str, style: Style) -> Operation:
    place = f"{interface.__name__}.{name}"
    function = inspect.getattr_static(interface, name, None)
    if not isinstance(function, types.FunctionType):
        what = _NO_METHODS.get(type(function), "is no method")
        raise TypeError(
            f"{place} {what}, and a peer has nothing but methods; let its name begin with _ "
            "to keep it out of the interface"
        )
    contract = _without_self(contract_of(function, place, interface), place)
    check_bound(place, contract.unbound)
    contract = _without_fields(contract, place)
    parameters = list(contract.signature.parameters.values())
    takes = [p for p in parameters if is_a(contract.hints.get(p.name), *style.items)]
    _check_parameters(place, parameters, contract, style)
    if len(takes) > 1:
        both = " and ".join(p.name for p in takes)
        raise TypeError(f"{place} has two streams in one direction: {both}")
    for parameter in takes:
        check_parameter(place, parameter)
    streams, items, result = _returned(place, function, contract.hints.get("return", Any), style)
    return Operation(
        name=name,
        place=place,
        function=function,
        contract=contract,
        input=takes[0].name if takes else None,
        lone=lone_model([p for p in parameters if p not in takes], contract.hints),
        streams=streams,
        items=items,
        result=result,
    )


def _without_self(contract: Contract, place: str) -> Contract:
    signature, hints = contract.signature, contract.hints
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TypeError(f"{place}{signature} has no `self`")
    if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return contract  # it is refused for that
    hints.pop(parameters[0].name, None)
    return contract._replace(signature=signature.replace(parameters=parameters[1:]))


_SAID: Final = ("title", "description", "examples", "discriminator", "alias")
"""What a `Field` says beside the bounds of its values and its default."""


def _without_fields(contract: Contract, place: str) -> Contract:
    """Return a contract in which `x: int = Field(ge=1)` is `x: Annotated[int, Field(ge=1)]`.

    So what it says of values counts whatever the default of the implementation is, and a parameter
    has a default only if the `Field` has one.
    """
    parameters: list[inspect.Parameter] = []
    for parameter in contract.signature.parameters.values():
        field = parameter.default
        if isinstance(field, FieldInfo):
            hint = contract.hints.get(parameter.name, Any)
            said = {
                name: getattr(field, name) for name in _SAID if getattr(field, name) is not None
            }
            more: tuple[Any, ...] = (hint, *field.metadata, Field(**said))
            contract.hints[parameter.name] = Annotated[more]
            parameter = parameter.replace(default=parameter.empty if field.is_required() else ...)
        parameters.append(parameter)
    try:
        return contract._replace(signature=contract.signature.replace(parameters=parameters))
    except ValueError as exc:
        raise TypeError(
            f"{place}{contract.signature} has its parameters out of order: {exc}"
        ) from None


def _check_parameters(
    place: str, parameters: list[inspect.Parameter], contract: Contract, style: Style
) -> None:
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{place}: *{parameter.name} cannot be sent; name the parameters")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"{place}: {parameter.name!r} cannot be positional-only, because parameters are "
                "sent by name"
            )
        hint = contract.hints.get(parameter.name, Any)
        if is_a(hint, Stream):
            raise TypeError(
                f"{place}: {parameter.name!r} is filled in where the method is served, so it is no "
                "part of the interface; the caller's side is `def ... -> StreamCall[item, result]`"
            )
        if hint is not Any and not is_a(hint, *style.items):
            adapter_of(place, hint)  # what cannot be validated cannot be served


def _returned(
    place: str, function: types.FunctionType, hint: Any, style: Style
) -> tuple[bool, Any, Any]:
    """Return whether a method streams, the type of the items and the type of the result."""
    in_the_end = called(function)
    streams = is_a(hint, *style.items, style.call)
    if not style.waits:
        if inspect.iscoroutinefunction(in_the_end) or inspect.isasyncgenfunction(in_the_end):
            raise TypeError(
                f"{place} is declared `async def`, and a blocking client waits by itself; declare "
                f"it `def {function.__name__}(...)`"
            )
        if not streams:
            return False, Any, Any if isinstance(hint, TypeVar) else hint
        return True, *_streamed(hint, style)
    if inspect.iscoroutinefunction(in_the_end):
        if streams:
            raise TypeError(
                f"{place} is declared `async def` and returns a stream, which would be a coroutine "
                f"of a stream; declare it `def {function.__name__}(...) -> AsyncIterator[...]`"
            )
        return False, Any, Any if isinstance(hint, TypeVar) else hint
    if is_a(hint, collections.abc.AsyncGenerator):
        raise TypeError(
            f"{place} is to be annotated AsyncIterator[...]: nothing can be sent into a generator "
            "of the peer"
        )
    if not streams and not (hint is Any and inspect.isasyncgenfunction(in_the_end)):
        raise TypeError(
            f"{place} is a plain `def` that returns {shown(hint)}; declare it `async def`, or as a "
            "stream: `def ... -> AsyncIterator[...]`"
        )
    return True, *_streamed(hint, style)


def _streamed(hint: Any, style: Style) -> tuple[Any, Any]:
    """Return the type of the items of a stream, and the type of its result."""
    if not is_a(hint, style.call):
        return item_of(hint), type(None)
    items, result = get_args(shown(hint)) or (Any, Any)
    return items, result
