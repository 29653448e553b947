"""What the type variables of a generic class stand for, in a class that is derived from it.

    class Crud(Protocol[T]):
        async def get(self, id: int) -> T: ...

    class Cats(Crud[Cat], Protocol): ...

In `Cats` the annotation of `get` is `Cat`, as for type checkers. A variable of a class for which
nothing stands says nothing to whoever has to validate a value, so it is refused.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel

__all__ = ["bound_variables", "check_bound", "owner_of", "substituted", "unbound_in"]

Known = Mapping[Any, Any]
"""Type variables, and what stands for each."""


def owner_of(function: Any, cls: Any) -> type | None:
    """Return the class that has a function in its body, among a class and its bases."""
    function = getattr(function, "__func__", function)
    for base in getattr(_class(cls), "__mro__", ()):
        if any(getattr(one, "__func__", one) is function for one in vars(base).values()):
            found: type = base
            return found
    return None


def bound_variables(cls: Any, owner: type) -> Known:
    """Return what stands for the variables of a class in one that is derived from it.

    Args:
        cls: The class, or one with types in brackets.
        owner: The class itself, or one of its bases.
    """
    made = _class(cls)
    known = _given(cls)
    if made is owner:
        return known
    for base in vars(made).get("__orig_bases__", made.__bases__):
        if owner in getattr(_class(base), "__mro__", ()):
            found = bound_variables(_resolved(base, made), owner)
            if found:  # else another base may say more
                return {one: substituted(hint, known) for one, hint in found.items()}
    return {}


def substituted(hint: Any, known: Known) -> Any:
    """Return an annotation with types in place of its variables, as far as they are known."""
    if isinstance(hint, TypeVar):
        if hint not in known and getattr(hint, "has_default", bool)():
            return substituted(hint.__default__, known)  # type: ignore[attr-defined,unused-ignore]
        return known.get(hint, hint)
    if _is_model(hint):
        # `Page[T]` is `Page` itself where both have the same T, so that one is taken for the other.
        inner: tuple[Any, ...] = _parameters(hint)
        outcome = tuple(substituted(one, known) for one in inner)
        return hint if outcome == inner else hint[outcome]
    inner = get_args(hint)
    outcome = tuple(substituted(one, known) for one in inner)
    if outcome == inner:
        return hint
    origin: Any = get_origin(hint)
    if origin is Annotated:
        outcome = (outcome[0], *hint.__metadata__)
    if origin is types.UnionType:
        origin = typing.Union
    return origin[outcome]


def unbound_in(hints: Mapping[str, Any], cls: Any, owner: type | None) -> dict[str, str]:
    """Return which annotations have a variable of a class for which nothing stands, and why not.

    Those of the function itself, as in `def echo(value: T) -> T`, may be anything in each call.

    Args:
        hints: The annotations.
        cls: The class of which the function is a method, or None.
        owner: The one of its bases, or itself, in whose body it stands.
    """
    bases = getattr(_class(cls), "__mro__", ())
    generic = {one: base for base in bases for one in getattr(base, "__parameters__", ())}
    own = getattr(owner, "__parameters__", ())
    return {
        name: f"is annotated with the type variable {variable}, and nothing says what it stands "
        f"for; derive a class from {generic[variable].__name__}[...] with a type in the brackets, "
        "or Any, and use that"
        for name, hint in hints.items()
        for variable in _variables(hint, own)
        if variable in generic
    }


def check_bound(place: str, unbound: Mapping[str, str]) -> None:
    """Refuse a function with annotations that `unbound_in` has found.

    Args:
        place: The function, for the error.
        unbound: They, by name.
    """
    for name, why in unbound.items():
        raise TypeError(f"{place}: {'the result' if name == 'return' else repr(name)} {why}")


def _variables(hint: Any, own: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the variables in an annotation; `own` are those of the class in which it stands."""
    if isinstance(hint, TypeVar):
        yield hint
    elif _is_model(hint):
        bare = hint.__pydantic_generic_metadata__["origin"] is None
        yield from (one for one in _parameters(hint) if one in own or not bare)
    else:
        for one in get_args(hint):
            yield from _variables(one, own)


def _class(hint: Any) -> Any:
    return get_origin(hint) or hint


def _given(cls: Any) -> Known:
    """Return what stands in the brackets behind a class, by its variables."""
    parameters, inner = getattr(_class(cls), "__parameters__", ()), get_args(cls)
    return dict(zip(parameters, inner, strict=True)) if len(parameters) == len(inner) else {}


def _resolved(base: Any, cls: type) -> Any:
    """Return a base of a class with types in place of text in its brackets."""
    stand_in = types.SimpleNamespace(__annotations__={"base": base})
    names = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    return typing.get_type_hints(stand_in, names, include_extras=True)["base"]


def _is_model(hint: Any) -> bool:
    return get_origin(hint) is None and isinstance(hint, type) and issubclass(hint, BaseModel)


def _parameters(model: type[BaseModel]) -> tuple[Any, ...]:
    return model.__pydantic_generic_metadata__["parameters"]
