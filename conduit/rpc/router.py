"""Names to handlers. A server has one for all its connections, and so has a client."""

from __future__ import annotations

import difflib
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

from ..exceptions import MethodNotFound
from ..roles import Guard, Roles, role_names
from ..transport.requests import NAME_BYTES
from ..transport.running import Handler
from ..transport.streaming import Streaming
from .contract import called
from .fingerprint import fingerprint
from .implementation import implemented
from .method import Example, Kind, MessageHandler, Method

__all__ = ["Router"]

logger = logging.getLogger("conduit.connection")

F = TypeVar("F", bound=Callable[..., Any])

BUILT_IN = "conduit."
"""Names that begin so belong to conduit."""
DISCOVER = f"{BUILT_IN}discover"
SUGGESTED_FROM = 256
SUGGESTED_LENGTH = 64
SUGGESTING = 0.02
"""Seconds in each second after which no names are suggested: to look for one takes milliseconds,
and thousands of calls may come at once.
"""


class Router:
    """The handlers of one side.

    Args:
        with_connection: Whether message handlers get the connection as their first parameter.

    Attributes:
        methods: Handlers of calls, by name.
        messages: Handlers of messages, by name.
    """

    def __init__(self, *, with_connection: bool) -> None:
        self._with_connection = with_connection
        self.methods: dict[str, Handler] = {DISCOVER: _Discovery(self)}
        self.messages: dict[str, MessageHandler] = {}
        self._required: frozenset[str] = frozenset()
        self._fingerprints: dict[frozenset[str], bytes] = {}
        self._suggested_since = self._suggesting = 0.0

    def add_method(
        self,
        function: F,
        name: str | None,
        *,
        timeout: float | None,
        extra: Literal["forbid", "ignore"],
        thread: bool | None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
        requires: Roles = (),
    ) -> F:
        """Register a handler for calls and return it unchanged.

        Raises:
            ValueError: The name is taken or is none, an example does not fit, or a role is none.
            TypeError: The signature cannot be served.
        """
        name = _name_of(function) if name is None else name
        _check_name(name, self.methods)
        if name.startswith(BUILT_IN):
            raise ValueError(
                f"method name {name!r}: names that begin with {BUILT_IN!r} are built in"
            )
        self._add(
            Method(
                function,
                name,
                timeout=timeout,
                extra=extra,
                thread=thread,
                deprecated=deprecated,
                examples=examples,
                requires=role_names(requires),
            )
        )
        return function

    def add_interface(
        self, interface: type[Any], implementation: object, *, requires: Roles = ()
    ) -> None:
        """Register the methods of an interface, all of them or none; see `Server.serve`.

        Raises:
            ValueError: A name is taken, or a role is none.
            TypeError: The interface or its implementation cannot be served.
        """
        methods = implemented(interface, implementation, role_names(requires))
        for method in methods:
            _check_name(method.name, self.methods)
        self._add(*methods)

    def _add(self, *methods: Method) -> None:
        self.methods.update((method.name, method) for method in methods)
        self._required = self._required.union(*(method.requires for method in methods))
        self._fingerprints.clear()

    def method_decorator(
        self,
        name: Any,
        *,
        timeout: float | None,
        extra: Literal["forbid", "ignore"],
        thread: bool | None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
        requires: Roles = (),
    ) -> Any:
        """Serve `@rpc`, `@rpc()` and `@rpc("name")` alike."""

        def register(function: F, name: str | None = None) -> F:
            return self.add_method(
                function,
                name,
                timeout=timeout,
                extra=extra,
                thread=thread,
                deprecated=deprecated,
                examples=examples,
                requires=requires,
            )

        if callable(name):
            return register(name)
        return partial(register, name=name)

    def message_decorator(
        self, name: str, *, concurrent: bool, thread: bool | None, requires: Roles = ()
    ) -> Callable[[F], F]:
        """Serve `@on("name")`."""
        if callable(name):  # it would never be registered, and nobody would know
            raise TypeError(
                f"a handler of messages needs the name of the message: @on({_name_of(name)!r})"
            )

        def register(function: F) -> F:
            return self.add_message(
                function, name, concurrent=concurrent, thread=thread, requires=requires
            )

        return register

    def add_message(
        self,
        function: F,
        name: str,
        *,
        concurrent: bool,
        thread: bool | None,
        requires: Roles = (),
    ) -> F:
        """Register a handler for messages and return it unchanged.

        Raises:
            ValueError: The name is taken or is none, or a role is none.
            TypeError: The signature cannot be served.
        """
        _check_name(name, self.messages)
        self.messages[name] = MessageHandler(
            function,
            name,
            with_connection=self._with_connection,
            concurrent=concurrent,
            thread=thread,
            requires=role_names(requires),
        )
        return function

    def unknown_method(self, name: str, roles: frozenset[str] = frozenset()) -> MethodNotFound:
        """Return the error for a name that is not there, with the nearest that is.

        Args:
            name: The name.
            roles: Those of the caller, who is told of nothing that it may not call.
        """
        known = {method.name: method for method in self.described(roles)}
        nearest = self._nearest(name, known)
        hint = f"; did you mean {known[nearest].signature}?" if nearest else ""
        return MethodNotFound(
            f"no method {name[:SUGGESTED_LENGTH]!r}{hint}", details={"executed": False}
        )

    def unknown_message(self, name: str, roles: frozenset[str] = frozenset()) -> MethodNotFound:
        """Return the error for a message that has no handler; see `unknown_method`."""
        allowed = (one.name for one in self.messages.values() if one.requires <= roles)
        nearest = self._nearest(name, allowed)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        return MethodNotFound(
            f"no handler for message {name[:SUGGESTED_LENGTH]!r}{hint}", details={"executed": False}
        )

    def _nearest(self, name: str, known: Iterable[str]) -> str | None:
        """Return the known name that is most like another, if there is time to look for one."""
        began = time.monotonic()
        if began - self._suggested_since >= 1:
            self._suggested_since, self._suggesting = began, 0.0
        if self._suggesting >= SUGGESTING:
            return None
        nearest = _nearest(name, known)
        self._suggesting += time.monotonic() - began
        return nearest

    def fingerprint(self, roles: frozenset[str] = frozenset()) -> bytes:
        """Return what identifies the methods that a caller with these roles may call.

        Nothing if there are none, or if one has a type of the application that cannot be described.
        """
        key = roles & self._required  # others make no difference, and a user may have any number
        known = self._fingerprints.get(key)
        if known is None:
            try:
                known = fingerprint(method.describe() for method in self.described(roles))
            except Exception:  # a type's own JSON Schema may fail; nobody is to be kept out by it
                logger.exception("a method cannot be described, so peers are not told of changes")
                known = b""
            self._fingerprints[key] = known
        return known

    def described(self, roles: frozenset[str] = frozenset()) -> Iterator[Method]:
        """Yield the methods of the application that a caller with these roles may call.

        They come in the order in which they were registered.
        """
        methods = self.methods.values()
        return (one for one in methods if isinstance(one, Method) and one.requires <= roles)


class _Discovery:
    """The built-in method that tells what can be called."""

    name = DISCOVER
    kind: Kind = "inline"
    timeout: float | None = None
    concurrent = True
    streaming: Streaming | None = None
    guard: Guard | None = None
    finish: Callable[[Any], Any] | None = None

    def __init__(self, router: Router) -> None:
        self._router = weakref.ref(router)  # which keeps this method

    def start(self, data: Any, connection: Any) -> Any:
        """Describe every method that the caller may call; parameters are ignored."""
        router = self._router()
        return [method.told for method in router.described(connection.roles)] if router else []


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", ""))


def _place_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"


def _check_name(name: str, taken: dict[str, Any]) -> None:
    if (
        not isinstance(name, str)
        or not 0 < len(name.encode()) <= NAME_BYTES
        or not name.isprintable()
    ):
        raise ValueError(
            f"a handler needs a printable name of 1 to {NAME_BYTES} bytes, not {name!r:.80}"
        )
    if name in taken:
        function = getattr(taken[name], "function", None)
        there = "" if function is None else f": {_place_of(called(function))}"
        raise ValueError(f"{name!r} has a handler already{there}")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like another; bounded, because a peer chooses the name."""
    if len(name) > SUGGESTED_LENGTH:
        return None
    candidates = [one for one, _ in zip(known, range(SUGGESTED_FROM), strict=False)]
    return next(iter(difflib.get_close_matches(name, candidates, n=1)), None)
