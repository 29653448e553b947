"""What the signature of a handler says about streams.

    async def count(to: int) -> AsyncIterator[int]: yield ...      sends what it yields
    async def train(stream: Stream[Progress]) -> Model: ...        sends, and has a result
    async def add_up(numbers: AsyncIterator[int]) -> int: ...      takes what its caller sends

The second and third, or the first and third, go together. The types of the items are compiled once;
items that come are validated as whole lists.
"""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Mapping
from types import GenericAlias
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from ..transport.streaming import Stream, Streaming
from .validation import AS_SENT, AS_TAKEN, adapter_of, finisher, invalid_params

__all__ = ["TAKES", "Declared", "check_parameter", "is_a", "item_of", "shown"]

TAKES = (collections.abc.AsyncIterator, collections.abc.AsyncIterable)
YIELDS = (*TAKES, collections.abc.AsyncGenerator)


class Declared:
    """The streams of one handler.

    Args:
        function: The function that is called, behind partials and decorators.
        name: The handler's name.
        signature: Its signature.
        hints: Its annotations.

    Attributes:
        generator: Whether the function is an async generator.
        output: The parameter that gets a `Stream`, or None.
        input: The parameter that gets the caller's items, or None.

    Raises:
        TypeError: Streams are declared that do not go together; the text says why.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        signature: inspect.Signature,
        hints: Mapping[str, Any],
    ) -> None:
        self._name = name
        self.generator = inspect.isasyncgenfunction(function)
        outputs = [key for key in signature.parameters if is_a(hints.get(key), Stream)]
        inputs = [key for key in signature.parameters if is_a(hints.get(key), *TAKES)]
        if len(outputs) > 1 or len(inputs) > 1:
            both = " and ".join(outputs if len(outputs) > 1 else inputs)
            raise TypeError(f"handler {name!r} has two streams in one direction: {both}")
        self.output = outputs[0] if outputs else None
        self.input = inputs[0] if inputs else None
        if self.generator and self.output is not None:
            raise TypeError(
                f"handler {name!r} is a generator and has a Stream as well; yield the items, "
                "or send them and return a result"
            )
        for key in self.parameters:
            check_parameter(name, signature.parameters[key])
        if self.parameters and not self.generator and not inspect.iscoroutinefunction(function):
            raise TypeError(f"handler {name!r} has a stream, so it must be `async def`")
        self._sent: Any = Any
        self._taken: Any = Any
        if self.generator:
            self._sent = self._item(hints.get("return", Any), YIELDS)
        elif self.output is not None:
            self._sent = self._item(hints[self.output], (Stream,))
        if self.input is not None:
            self._taken = self._item(hints[self.input], TAKES)

    @property
    def parameters(self) -> list[str]:
        """The parameters that are filled in."""
        return [key for key in (self.output, self.input) if key is not None]

    @property
    def direction(self) -> Literal["out", "in", "both"] | None:
        """Whether the handler sends items ("out"), takes some ("in"), "both", or neither (None)."""
        if self.generator or self.output is not None:
            return "both" if self.input is not None else "out"
        return "in" if self.input is not None else None

    def injected(self, stream: Any, items: Any) -> dict[str, Any]:
        """Return the arguments for the parameters that are filled in."""
        given = {self.output: stream, self.input: items}
        return {key: value for key, value in given.items() if key is not None}

    def compiled(
        self, seen: list[str], start: Callable[[Any, Any, Any, Any], Any]
    ) -> Streaming | None:
        """Return what the transport needs to know, or None for a handler without streams.

        Args:
            seen: The parameters that callers give, in their order.
            start: Validates the other parameters and calls the function.
        """
        direction = self.direction
        if direction is None:
            return None
        sent = taken = None
        if self._sent is not Any:
            sent = finisher(adapter_of(self._name, self._sent), self._sent)
        if self._taken is not Any:
            taken = adapter_of(self._name, GenericAlias(list, (self._taken,))).validate_python
        return Streaming(
            direction=direction,
            generator=self.generator,
            argument=None if self.input is None else (self.input, seen.index(self.input)),
            sent=sent,
            taken=taken,
            explain=self._explain,
            start=start,
        )

    def check_items(self, items: Any) -> None:
        """Refuse what is no list of items for the parameter that takes them.

        Raises:
            ValueError: It is none.
        """
        adapter_of(self._name, GenericAlias(list, (self._taken,))).validate_python(items)

    def describe(self) -> dict[str, Any]:
        """Return what discovery tells of the streams."""
        described: dict[str, Any] = {"streaming": self.direction}
        if self.direction in ("out", "both"):
            described["items"] = self._schema(self._sent, AS_SENT)
        if self.input is not None:
            schema = self._schema(self._taken, AS_TAKEN)
            described["argument"] = {"name": self.input, "items": schema}
        return described

    def _schema(self, item: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        return {} if item is Any else adapter_of(self._name, item).json_schema(**options)

    def _item(self, hint: Any, kinds: tuple[Any, ...]) -> Any:
        """Return the type of an item of a stream, or Any."""
        hint = shown(hint)
        if hint is not Any and not is_a(hint, *kinds):
            raise TypeError(
                f"handler {self._name!r} is a generator, so its result is to be annotated "
                f"AsyncIterator[...], not {hint}"
            )
        return item_of(hint)

    def _explain(self, error: Exception, index: int) -> Exception:
        """Return what the caller is told of an item of its own that does not fit."""
        if not isinstance(error, ValidationError):
            return error
        return invalid_params(self._name, error, lone=True, place=f"{self.input}.{index}")


def shown(hint: Any) -> Any:
    """Return an annotation as people write it: None for its type, and no metadata."""
    if hint is type(None):
        return None
    return get_args(hint)[0] if get_origin(hint) is typing.Annotated else hint


def item_of(hint: Any) -> Any:
    """Return the first type in the brackets of an annotation, or Any."""
    arguments = get_args(shown(hint))
    return Any if not arguments or isinstance(arguments[0], TypeVar) else arguments[0]


def is_a(hint: Any, *kinds: Any) -> bool:
    """Whether an annotation is one of some classes, with or without the type of its items."""
    hint = shown(hint)
    return hint in kinds or get_origin(hint) in kinds


def check_parameter(name: str, parameter: inspect.Parameter) -> None:
    """Refuse a parameter that cannot be a stream."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(f"handler {name!r}: *{parameter.name} cannot be a stream")
    if parameter.default is not parameter.empty:
        raise TypeError(f"handler {name!r}: the stream {parameter.name!r} cannot have a default")
