"""A handler, compiled once: its validator, what is injected, and how its result is made plain.

Pydantic turns the signature into one validator, which takes the parameters of a call as they come
out of MessagePack and returns positional and keyword arguments. Nothing of the signature is looked
at again when the handler is called.
"""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import SchemaValidator, core_schema

from ..exceptions import InvalidParams, RPCError
from ..protocol.payload import Encoder, decode
from ..roles import guard, guarded
from ..transport.answers import Response
from ..transport.connection import Connection
from .context import Context
from .contract import Contract, called, contract_of, lone_model
from .generics import check_bound
from .streams import YIELDS, Declared, shown
from .validation import AS_SENT, AS_TAKEN, adapter_of, finisher, invalid_params

__all__ = ["Example", "Kind", "MessageHandler", "Method", "is_filled_in"]

Kind = Literal["coroutine", "thread", "inline"]

Example = Mapping[str, Any] | Sequence[Any]
"""Parameters of a call, by name or by position."""


class Method:
    """A handler for calls.

    Args:
        function: The user's function.
        name: Its name on the wire.
        timeout: Seconds that it may run, whatever the caller allows; None for no limit of its own.
        extra: Whether unknown parameters are an error or are ignored.
        thread: False runs a plain `def` on the event loop.
        deprecated: Whether callers are to use something else, or what. `warnings.deprecated` on the
            function says the same.
        examples: Parameters of calls, each as `rpc.call` takes them; the items of a stream that
            the caller sends are a list.
        contract: What callers rely on, if that is not what the function says of itself.
        requires: The roles that a caller must have.

    Raises:
        TypeError: The signature cannot be served; the text says why.
        ValueError: An example does not fit.
    """

    concurrent = True

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
        contract: Contract | None = None,
        requires: frozenset[str] = frozenset(),
    ) -> None:
        self.function = function = _without_warning(function)
        self.name = name
        self.requires = requires
        self.guard = guard(name, requires)
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
            raise ValueError(
                f"timeout of method {name!r} must be a number of seconds above 0, not {timeout!r}"
            )
        self.timeout: float | None = timeout
        self.kind: Kind = _kind(function, name, thread)
        self._contract = contract = contract or _bound_contract(function, name)
        signature, hints = contract.signature, contract.hints
        annotations = {key: shown(hint) for key, hint in hints.items()}
        self._connections = [p for p in signature.parameters if _is(hints.get(p), Connection)]
        self._contexts = [p for p in signature.parameters if _is(hints.get(p), Context)]
        self._streams = declared = Declared(called(function), name, signature, hints)
        unseen = [*self._connections, *self._contexts]
        injected = [*unseen, *declared.parameters]
        everything = signature.parameters.values()
        self._positional_only = [p for p in everything if p.kind is p.POSITIONAL_ONLY]
        self._by_name = [p.name for p in everything if p.kind is not p.POSITIONAL_ONLY]
        self._data = parameters = [
            p.replace(annotation=annotations.get(key, p.annotation))
            for key, p in signature.parameters.items()
            if key not in injected
        ]
        seen = [
            p.replace(annotation=annotations.get(p.name, p.annotation))
            for p in everything
            if p.name not in unseen and p.name != declared.output
        ]
        self._shown = inspect.Signature(
            seen,
            return_annotation=annotations.get("return", signature.return_annotation),
        )
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"method {name!r}: *{parameter.name} cannot be validated; name the parameters"
                )
        self._model = lone_model(parameters, hints)
        self._optional = all(p.default is not p.empty for p in parameters)
        self._model_adapter = None if self._model is None else adapter_of(name, hints[self._model])
        self._adapter: TypeAdapter[Any] = _parameters_adapter(name, parameters, hints, extra)
        self._validate = _arguments_validator(self._adapter)
        self._pick = _fields_validator(self._adapter, parameters)
        plain = self._model is None and extra == "forbid" and not injected
        self.streaming = declared.compiled([p.name for p in seen], self._start)
        self.start: Callable[[Any, Any], Any] = self._start
        """Checks the roles, validates the parameters and calls the function; see `_start`."""
        if self.streaming is not None:
            self.start = self._refuse_call
        elif plain and self.kind != "thread":
            self.start = self._plain_start()
        self.start = guarded(self.guard, self.start)
        if declared.generator:
            hints["return"] = type(None)
        self._returns = _returns_adapter(name, hints)
        self.finish = finisher(self._returns, hints.get("return", Any))
        self._deprecated = deprecated
        self._examples = [self._example(*numbered) for numbered in enumerate(examples, 1)]

    def _start(self, data: Any, connection: Any, stream: Any = None, items: Any = None) -> Any:
        """Validate the parameters and call the function.

        Args:
            data: The parameters.
            connection: What parameters annotated with `Connection` get.
            stream: What a parameter annotated with `Stream` gets.
            items: What a parameter annotated with `AsyncIterator` gets.

        Returns:
            The coroutine; for kind `thread` the function to be run, arguments bound; for kind
            `inline` the result.

        Raises:
            InvalidParams: The parameters do not fit the annotations.
        """
        try:
            if self._model is not None and type(data) is dict and (data or not self._optional):
                data = {self._model: data} if self._model in self._by_name else (data,)
            args, kwargs = self._validate(data)
        except ValidationError as exc:
            raise invalid_params(self.name, exc, lone=self._model is not None) from None
        injected = dict.fromkeys(self._connections, connection)
        if self._contexts:
            injected.update(dict.fromkeys(self._contexts, Context.current()))
        injected.update(self._streams.injected(stream, items))
        call = self._bound(args, kwargs, injected)
        return call if self.kind == "thread" else call()

    def _refuse_call(self, data: Any, connection: Any) -> Any:
        raise InvalidParams(
            f"{self.name!r} is a method with streams: call it by rpc.stream({self.name!r}, ...)",
            details={"executed": False},
        )

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], injected: dict[str, Any]
    ) -> Callable[[], Any]:
        """Return the call, with what is injected in its place and unknown parameters left out."""
        given = dict(zip((p.name for p in self._data), args, strict=False))
        given.update(kwargs)
        given.update(injected)
        positional = [given.get(p.name, p.default) for p in self._positional_only]
        named = {name: given[name] for name in self._by_name if name in given}
        return functools.partial(self.function, *positional, **named)

    def _plain_start(self) -> Callable[[Any, Any], Any]:
        """Return `start` for a handler that needs nothing but its validated parameters.

        Nearly every handler is one, and this is what each of its calls runs through.
        """
        validate, function, name = self._validate, self.function, self.name

        def start(data: Any, connection: Any) -> Any:
            try:
                args, kwargs = validate(data)
            except ValidationError as exc:
                raise invalid_params(name, exc) from None
            return function(*args, **kwargs)

        if self._pick is None:
            return start
        pick, validate_fields, count = self._pick

        def start_by_name(data: Any, connection: Any) -> Any:
            if type(data) is not dict or len(data) != count:
                return start(data, connection)
            try:
                args = validate_fields(pick(data))
            except (KeyError, ValidationError):
                return start(data, connection)  # which says what is wrong
            return function(*args)

        return start_by_name

    @property
    def signature(self) -> str:
        """The signature as its callers see it: `add(a: int, b: int) -> int`."""
        return f"{self.name}{self._shown}".replace("collections.abc.", "")

    @functools.cached_property
    def told(self) -> dict[str, Any]:
        """What discovery tells of the method, made when the first caller asks.

        Pydantic takes half a millisecond for it, and a thousand callers may ask at once.
        """
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Return what discovery tells of the method."""
        adapter, returns = self._model_adapter or self._adapter, self._returns
        return {
            "name": self.name,
            "description": self._contract.description,
            "parameters": adapter.json_schema(**AS_TAKEN),
            "returns": {} if returns is None else returns.json_schema(**AS_SENT),
            **self._streams.describe(),
            "idempotent": self._contract.idempotent,
            "requires": sorted(self.requires) or None,
            "deprecated": self._deprecated or getattr(self.function, "__deprecated__", False),
            "examples": self._examples,
        }

    def _example(self, number: int, given: Example) -> Any:
        """Return an example as plain data, once it is one.

        Raises:
            ValueError: It is not what a caller could send.
        """
        try:
            example = decode(Encoder().pack(given))
            data = example
            if self._streams.input is not None and isinstance(example, dict):
                data = dict(example)
                self._streams.check_items(data.pop(self._streams.input, []))
            if self._model is not None and isinstance(data, dict):
                data = {self._model: data} if self._model in self._by_name else (data,)
            self._validate(data)
        except (TypeError, ValueError, OverflowError, RPCError) as exc:
            raise ValueError(
                f"example {number} of method {self.name!r} does not fit: {exc}"
            ) from exc
        return example


class MessageHandler:
    """A handler for messages.

    Args:
        function: The user's function: `(connection, message)` on a server, `(message)` on a client.
        name: The message's name.
        with_connection: Whether the connection is the first parameter.
        concurrent: Whether it may run beside other messages of its connection.
        thread: False runs a plain `def` on the event loop.
        requires: The roles that a sender must have.

    Raises:
        TypeError: The signature cannot be served; the text says why.
    """

    timeout: float | None = None
    streaming = None

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        with_connection: bool,
        concurrent: bool,
        thread: bool | None = None,
        requires: frozenset[str] = frozenset(),
    ) -> None:
        self.function = function
        self.name = name
        self.requires = requires
        self.guard = guard(name, requires)
        self.concurrent = concurrent
        self.kind: Kind = _kind(function, name, thread)
        if inspect.isasyncgenfunction(called(function)):
            raise TypeError(f"handler {name!r} is a generator; messages have no streams")
        signature, hints, *_ = _bound_contract(function, name)
        parameters = list(signature.parameters.values())
        self._contexts = {p.name for p in parameters if _is(hints.get(p.name), Context)}
        injected = {p.name for p in parameters if _is(hints.get(p.name), Connection)}
        injected.update(self._contexts, (p.name for p in parameters[:with_connection]))
        needed = [p for p in parameters if p.name not in injected and p.default is p.empty]
        if len(needed) != 1 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            wanted = "(connection, message)" if with_connection else "(message)"
            raise TypeError(f"handler for message {name!r} must take {wanted}, not {signature}")
        self._message = needed[0].name
        filled = [p for p in parameters if p.name in injected or p.name == self._message]
        self._by_position = [p.name for p in filled if p.kind is not p.KEYWORD_ONLY]
        self._by_name = [p.name for p in filled if p.kind is p.KEYWORD_ONLY]
        annotation = hints.get(self._message, Any)
        self._validate: Callable[[Any], Any] | None = None
        if annotation is not Any:
            self._validate = adapter_of(name, annotation).validator.validate_python
        self.finish = finisher(_returns_adapter(name, hints), hints.get("return", Any))
        alone = self._by_position == [self._message] and not self._by_name
        self.start: Callable[[Any, Any], Any] = (
            self._plain_start() if alone and self.kind != "thread" else self._start
        )
        self.start = guarded(self.guard, self.start)
        """Checks the roles, validates the message and calls the function; see `Method`."""

    def _plain_start(self) -> Callable[[Any, Any], Any]:
        """Return `start` for a handler that takes nothing but the message, as on most clients."""
        validate, function = self._validate, self.function
        if validate is None:
            return lambda data, connection: function(data)

        def start(data: Any, connection: Any) -> Any:
            try:
                data = validate(data)
            except ValidationError as exc:
                raise invalid_params(self.name, exc) from None
            return function(data)

        return start

    def _start(self, data: Any, connection: Any) -> Any:
        if self._validate is not None:
            try:
                data = self._validate(data)
            except ValidationError as exc:
                raise invalid_params(self.name, exc) from None
        given: dict[str, Any] = {self._message: data}
        if self._contexts:
            given |= dict.fromkeys(self._contexts, Context.current())
        args = [given.get(name, connection) for name in self._by_position]
        named = {name: given.get(name, connection) for name in self._by_name}
        if self.kind == "thread":
            return functools.partial(self.function, *args, **named)
        return self.function(*args, **named)


def _kind(function: Callable[..., Any], name: str, thread: bool | None) -> Kind:
    if not callable(function):
        raise TypeError(f"handler {name!r} must be a function, not {type(function).__name__}")
    call = called(function)
    if inspect.isgeneratorfunction(call):
        raise TypeError(f"handler {name!r} is a plain generator; write it as `async def`")
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        if thread:
            raise TypeError(f"handler {name!r} is async, so it runs on the event loop: no thread=")
        return "coroutine"
    return "inline" if thread is False else "thread"


def _bound_contract(function: Callable[..., Any], name: str) -> Contract:
    """Return what a function promises, unless it is a method that still lacks its object."""
    contract = contract_of(function, name)
    first = next(iter(contract.signature.parameters.values()), None)
    if first is not None and first.name == "self" and first.annotation is first.empty:
        raise TypeError(
            f"handler {name!r} takes `self`, and there is no object yet; register the method of "
            "an object, as in server.rpc(thing.method)"
        )
    unbound = contract.unbound.items()
    data = {key: why for key, why in unbound if not is_filled_in(contract.hints[key])}
    check_bound(f"handler {name!r}", data)
    return contract


def _without_warning(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `warnings.deprecated` has wrapped: it warns code, and peers are told otherwise.

    Where warnings are errors, no peer could call such a method.
    """
    module = getattr(function, "__globals__", {}).get("__name__")
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None or module not in ("warnings", "_py_warnings", "typing_extensions"):
        return function
    owner = getattr(function, "__self__", None)
    below: Callable[..., Any] = wrapped if owner is None else wrapped.__get__(owner)
    return below


def _is(hint: Any, wanted: type) -> bool:
    hint = get_origin(hint) or hint
    return isinstance(hint, type) and issubclass(hint, wanted)


def is_filled_in(hint: Any) -> bool:
    """Whether a parameter with this annotation is filled in with what is known of the call."""
    return _is(hint, Connection) or _is(hint, Context)


def _parameters_adapter(
    name: str,
    parameters: list[inspect.Parameter],
    hints: Mapping[str, Any],
    extra: Literal["forbid", "ignore"],
) -> TypeAdapter[Any]:
    """Return an adapter for a function that has just these parameters."""

    def stand_in() -> None: ...

    annotated = [p.replace(annotation=hints.get(p.name, Any)) for p in parameters]
    if extra == "ignore":
        annotated.append(inspect.Parameter("_ignored", inspect.Parameter.VAR_KEYWORD))
    stand_in.__signature__ = inspect.Signature(annotated)  # type: ignore[attr-defined]
    stand_in.__annotations__ = {p.name: p.annotation for p in annotated}
    stand_in.__name__ = stand_in.__qualname__ = name
    return adapter_of(name, stand_in)


def _arguments_validator(adapter: TypeAdapter[Any]) -> Callable[[Any], tuple[Any, dict[str, Any]]]:
    """Return the part of an adapter that makes arguments, without calling the function."""
    schema, wrap = _arguments_schema(adapter)
    return SchemaValidator(wrap(schema)).validate_python


def _arguments_schema(adapter: TypeAdapter[Any]) -> tuple[Any, Callable[[Any], Any]]:
    """Return the schema of the arguments, and what adds to a schema the definitions it uses."""
    schema: Any = adapter.core_schema
    if schema["type"] != "definitions":
        return schema["arguments_schema"], lambda one: one
    definitions = schema["definitions"]
    return (
        schema["schema"]["arguments_schema"],
        lambda one: core_schema.definitions_schema(one, definitions),
    )


_Pick = tuple[Callable[[dict[str, Any]], Any], Callable[[Any], tuple[Any, ...]], int]
"""Takes the values out of the parameters, in order; validates them; and their number."""


def _fields_validator(
    adapter: TypeAdapter[Any], parameters: list[inspect.Parameter]
) -> _Pick | None:
    """Return a shorter way for calls that name every parameter, which most do.

    The same validators, applied to a tuple. Positional arguments are faster to make and to pass
    than keywords: 160 ns of the 2.4 us that a call takes its server (CPython 3.11).

    Not for parameters that functions validate: in a tuple they are not told the name of their
    parameter, a value that they omit would let the others move up, and where one refuses a value
    all would run a second time.
    """
    schema, wrap = _arguments_schema(adapter)
    fields = schema["arguments_schema"]
    either_way = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    if len(fields) < 2 or not either_way or any("alias" in field for field in fields):
        return None
    if any(_runs_functions(field["schema"]) for field in fields):
        return None
    names = [field["name"] for field in fields]
    validator = SchemaValidator(wrap(core_schema.tuple_schema([f["schema"] for f in fields])))
    return operator.itemgetter(*names), validator.validate_python, len(names)


_OF_THEIR_OWN = ("model", "dataclass", "typed-dict", "definition-ref")
"""Schemas whose validators deal with the fields inside."""


def _runs_functions(schema: Any) -> bool:
    """Whether functions validate a value, or what is inside it, or it may be omitted."""
    if isinstance(schema, (list, tuple)):
        return any(map(_runs_functions, schema))
    if not isinstance(schema, dict) or schema.get("type") in _OF_THEIR_OWN:
        return False
    if str(schema.get("type")).startswith("function-") or schema.get("on_error") == "omit":
        return True
    skipped = ("default", "metadata", "serialization")
    return any(_runs_functions(part) for key, part in schema.items() if key not in skipped)


def _returns_adapter(name: str, hints: Mapping[str, Any]) -> TypeAdapter[Any] | None:
    hint = hints.get("return", Any)
    origin = get_origin(hint)
    if hint is Response or origin is Response:
        inner = typing.get_args(hint)
        hint = inner[0] if inner else Any
    if hint is Any or isinstance(hint, TypeVar):
        return None
    if hint in YIELDS or origin in YIELDS:
        raise TypeError(
            f"handler {name!r} is annotated {hint}, and does not yield; what streams is an async "
            "generator, also what passes on: async for item in ...: yield item"
        )
    return adapter_of(name, hint)
