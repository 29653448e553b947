"""The `rpc` of a client: it calls the server, and registers what the server may call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar, overload

from .expected import Expected
from .offline import Offline
from .rpc.caller import Caller
from .rpc.interface import ASYNC
from .rpc.method import Example
from .rpc.router import Router

__all__ = ["ClientCaller"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class ClientCaller(Caller):
    """`client.rpc`: calls the server, and registers methods that the server may call."""

    __slots__ = ("_router", "expected")

    def __init__(
        self, offline: Offline, router: Router, timeout: float | None, expected: Expected
    ) -> None:
        super().__init__(offline.call, offline.stream, timeout=timeout, ready=offline.ready)
        self._router = router
        self.expected = expected

    def bind(self, interface: Callable[..., T], *, check: bool = True) -> T:
        """Return an object that calls the server by the methods of an interface.

        See `Caller.bind`. The interface is held against what the server offers: when the client
        connects, which raises `InterfaceMismatch`; when it connects again, or is connected by now,
        which is logged. A server whose methods are known by their fingerprint is not asked again.

        Args:
            interface: As for `Caller.bind`.
            check: False leaves the check out; calls that do not fit then fail when they are made.

        Raises:
            TypeError: The interface has something that cannot be called; the text says what.
        """
        bound = super().bind(interface)
        if check:
            self.expected.add(interface, ASYNC)
        return bound

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(
        self,
        name: str | None = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
    ) -> Callable[[F], F]: ...

    def __call__(
        self,
        name: Any = None,
        /,
        *,
        timeout: float | None = None,
        extra: Literal["forbid", "ignore"] = "forbid",
        thread: bool | None = None,
        deprecated: bool | str = False,
        examples: Iterable[Example] = (),
    ) -> Any:
        """Register a method that the server may call; see `Server.rpc`."""
        return self._router.method_decorator(
            name,
            timeout=timeout,
            extra=extra,
            thread=thread,
            deprecated=deprecated,
            examples=examples,
        )
