"""What a function promises: its signature, its annotations as objects, its docstring, its mark."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, RootModel

from .generics import bound_variables, owner_of, substituted, unbound_in

__all__ = ["Contract", "called", "contract_of", "idempotent", "lone_model"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__conduit_idempotent__"


class Contract(NamedTuple):
    """What callers may rely on.

    Attributes:
        signature: The parameters.
        hints: The annotations as objects, the one of the result as `return`. What is known of
            type variables stands in their place.
        description: The docstring, or nothing.
        idempotent: Whether it may run twice; see `idempotent`.
        unbound: The annotations with type variables for which nothing stands, and why not.
    """

    signature: inspect.Signature
    hints: dict[str, Any]
    description: str
    idempotent: bool
    unbound: dict[str, str]


def contract_of(function: Callable[..., Any], name: str, cls: Any = None) -> Contract:
    """Return what a function promises.

    Args:
        function: The function, or whatever else can be called.
        name: Its name in errors.
        cls: The class of which it is a method, if the function does not say so itself.

    Raises:
        TypeError: The signature cannot be read, or an annotation cannot be resolved.
    """
    if isinstance(_below_partials(function), type):
        # Its annotations are those of several methods, and what it returns is seldom plain data.
        raise TypeError(f"handler {name!r} is a class; write a function that makes one")
    try:
        signature = inspect.signature(_without_wrapped(function))
    except ValueError as exc:
        raise TypeError(f"handler {name!r} has no signature that could be read: {exc}") from exc
    below = _underlying(function)
    cls = _class_of(function) if cls is None else cls
    owner = owner_of(below, cls)
    try:
        # What a class has in brackets behind its name is no name where its module looks it up.
        names = {one.__name__: one for one in getattr(owner, "__type_params__", ())} or None
        hints = typing.get_type_hints(below, localns=names, include_extras=True)
        known = {} if owner is None else bound_variables(cls, owner)
        hints = {key: substituted(hint, known) for key, hint in hints.items()}
        unbound = unbound_in(hints, cls, owner)
    except Exception as exc:
        raise TypeError(
            f"an annotation of handler {name!r} cannot be resolved: {exc}; "
            "it must be importable at module level where the handler is defined"
        ) from exc
    marked = bool(getattr(function, _MARK, False) or getattr(called(function), _MARK, False))
    return Contract(signature, hints, inspect.getdoc(function) or "", marked, unbound)


def idempotent(function: F) -> F:
    """Mark a method: whether it runs once or twice makes no difference.

        class Store(Protocol):
            @idempotent
            async def write(self, key: str, value: bytes) -> None: ...

    In an interface it lets calls with `retry=` be made again also when the first one may have run;
    see `Retry`. Discovery shows it, of interfaces that are served and of handlers. It stands below
    `@server.rpc`. The function is returned as it is.
    """
    setattr(function, _MARK, True)
    return function


def called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called in the end, below partials and plain decorators.

    A decorator that is async or a generator is called itself, whatever it has wrapped.
    """
    in_the_end: Callable[..., Any] = inspect.unwrap(_underlying(function), stop=_is_not_plain)
    return in_the_end


def _is_not_plain(function: Callable[..., Any]) -> bool:
    return (
        inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    )


def lone_model(parameters: list[inspect.Parameter], hints: Mapping[str, Any]) -> str | None:
    """Return the name of the only parameter, if it is a model and so takes the whole map.

    A RootModel has no fields of its own, so it is a value like others.
    """
    if len(parameters) != 1:
        return None
    name = parameters[0].name
    hint = hints.get(name)
    if not isinstance(hint, type) or not issubclass(hint, BaseModel):
        return None
    return None if issubclass(hint, RootModel) else name


def _without_wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a partial without what `update_wrapper` has put onto it, and all else as it is.

    By `__wrapped__` the signature would be that of the function, what is bound included.
    """
    if not isinstance(function, functools.partial):
        return function
    return functools.partial(function.func, *function.args, **function.keywords)


def _below_partials(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _underlying(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that is behind a partial or a callable object."""
    function = _below_partials(function)
    return function if inspect.isroutine(function) else type(function).__call__


def _class_of(function: Callable[..., Any]) -> Any:
    """Return the class of the object that is called or whose method is; None for a function."""
    function = _below_partials(function)
    if inspect.ismethod(function):
        holder = function.__self__
        return (
            holder if isinstance(holder, type) else getattr(holder, "__orig_class__", type(holder))
        )
    return (
        None if inspect.isroutine(function) else getattr(function, "__orig_class__", type(function))
    )
