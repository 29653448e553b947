"""Every error that conduit raises, and how an error crosses the wire.

    ConduitError
     ├─ ConnectionClosed (also ConnectionError)   .code .reason
     │   └─ ConnectionLost                        .executed
     ├─ AuthenticationError                       .code
     ├─ ProtocolError                             .close_code
     ├─ InterfaceMismatch                         .differences
     └─ RPCError                                  .code .message .details .retryable .retry_after
         ├─ MethodNotFound
         ├─ InvalidParams                         .errors
         ├─ PermissionDenied
         ├─ PayloadTooLarge
         ├─ Overloaded
         ├─ Unavailable
         ├─ CallCancelled
         ├─ IdempotencyMismatch
         ├─ RPCTimeout (also TimeoutError)
         └─ InternalError                         .error_id

An `RPCError` travels as `[code, message, details]`. The code is the class name in snake case, and a
class is found again by its code, so a handler raises the very class that the caller catches. A code
that no class of this process has arrives as a plain `RPCError`.
"""

from __future__ import annotations

import enum
import inspect
import logging
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

if sys.version_info >= (3, 11):
    _Timeout = TimeoutError
else:
    import asyncio

    class _Timeout(TimeoutError, asyncio.TimeoutError):
        """Before 3.11 these are two classes, and callers catch either."""


__all__ = [
    "AuthenticationError",
    "CallCancelled",
    "ConduitError",
    "ConnectionClosed",
    "ConnectionLost",
    "IdempotencyMismatch",
    "InterfaceMismatch",
    "InternalError",
    "InvalidParams",
    "MethodNotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "ProtocolError",
    "RPCError",
    "RPCTimeout",
    "Unavailable",
]


logger = logging.getLogger("conduit.connection")

E = TypeVar("E", bound=BaseException)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_FIXED: Final[dict[str, type]] = {"code": str, "message": str, "details": dict}
"""What every error has, and what each is on the wire."""


def _is_set(cls: type, name: str) -> bool:
    """Whether an attribute can be set, which one that is computed cannot be."""
    attribute = inspect.getattr_static(cls, name, None)
    return not isinstance(attribute, property) or attribute.fset is not None


def _check_fixed(cls: type, hints: Mapping[str, Any]) -> None:
    """Refuse annotations of what every error has that cannot be true of an error that arrives."""
    names = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    for name in _FIXED.keys() & hints.keys():
        stand_in = types.SimpleNamespace(__annotations__={name: hints[name]})
        try:
            hint = typing.get_type_hints(stand_in, names)[name]
        except Exception:  # noqa: BLE001  # a name that is not known yet, or only to checkers
            continue
        if not _may_be(hint, _FIXED[name]):
            what = "text" if _FIXED[name] is str else "a map"
            raise TypeError(
                f"{cls.__qualname__} annotates `{name}` as {hints[name]!r}, and the {name} of an "
                f"RPCError is {what}; give the attribute a name of its own"
            )


def _may_be(hint: Any, kind: type) -> bool:
    """Whether what an annotation allows may be of a class; true where that is not known."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Annotated, ClassVar, Final):
        return _may_be(inner[0], kind)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be(one, kind) for one in inner)
    if origin is typing.Literal:
        return any(isinstance(one, kind) for one in inner)
    found = origin or hint
    if not isinstance(found, type) or issubclass(found, enum.Enum):  # it is sent as its value
        return True
    return issubclass(found, kind) or issubclass(kind, found)


class ConduitError(Exception):
    """The base of every error that conduit raises on its own account."""


class ConnectionClosed(ConduitError, ConnectionError):
    """The connection is closed, so the operation was not done.

    Args:
        reason: Why, in words, from the side that closed.
        code: Close code as in docs/protocol.md; 1000 is a normal end.
        message: The error's text, where the reason alone would not say enough.

    Attributes:
        code: The close code.
        reason: Why, in words, from the side that closed.
    """

    def __init__(
        self,
        reason: str = "the connection is closed",
        *,
        code: int = 1000,
        message: str | None = None,
    ) -> None:
        super().__init__(message or reason)
        self.code = code
        self.reason = reason


class ConnectionLost(ConnectionClosed):
    """The connection went away while a call was in flight.

    Attributes:
        executed: False when the call surely did not run at the peer, True when it surely did, None
            when that is not known.
    """

    def __init__(
        self,
        reason: str = "the connection was lost",
        *,
        code: int = 1006,
        message: str | None = None,
        executed: bool | None = None,
    ) -> None:
        super().__init__(reason, code=code, message=message)
        self.executed = executed


class AuthenticationError(ConduitError):
    """The login failed: refused by the server, or the server could not prove itself.

    Attributes:
        code: `invalid_credentials` for an unknown user and a wrong password alike, else the code of
            AUTH_FAILURE in docs/protocol.md.
    """

    def __init__(self, message: str, *, code: str = "invalid_credentials") -> None:
        super().__init__(message)
        self.code = code


class ProtocolError(ConduitError):
    """The peer broke the rules of the wire; the connection is closed.

    Attributes:
        close_code: The code that the CLOSE frame carries.
    """

    def __init__(self, message: str, *, close_code: int = 1002) -> None:
        super().__init__(message)
        self.close_code = close_code


class InterfaceMismatch(ConduitError):
    """The server does not offer what an interface that is bound to it relies on.

    Attributes:
        differences: One sentence for each, naming the method and what is different.
    """

    def __init__(self, message: str, *, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)


class RPCError(ConduitError):
    """The peer answered with an error, or this side refused what the peer would refuse.

    Derive from it to give an error of your own a name that survives the wire. The class needs to be
    imported on both ends; its code is its name in snake case, or a class attribute `code`. The
    attributes that it annotates are its fields and cross as well. In `details` they are plain data;
    the attributes are what their annotations say, where the value fits and the annotation is known:

        class JobNotFound(RPCError):
            job: str

            def __init__(self, job: str) -> None:
                super().__init__(f"there is no job {job}")
                self.job = job

    Attributes:
        code: The error's name on the wire.
        message: A text for people.
        details: A map of plain data; `retryable`, `retry_after`, `executed` and `error_id` have a
            fixed meaning.
    """

    code: str = "rpc_error"
    message: str
    details: dict[str, Any]
    _registry: ClassVar[dict[str, type[RPCError]]] = {}
    _fields: ClassVar[tuple[str, ...]] = ()
    _typed: ClassVar[dict[str, Callable[[Any], Any]]]

    def __getattr__(self, name: str) -> Any:
        # A derived class need not call our __init__, and the error still has to cross the wire.
        if name == "message":
            return self.args[0] if self.args and isinstance(self.args[0], str) else ""
        if name == "details":
            return {}
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(self, message: str = "", *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = _snake_case(cls.__name__)
        if not isinstance(cls.code, str):
            raise TypeError(f"the code of {cls.__qualname__} must be text, not {cls.code!r}")
        hints = inspect.get_annotations(cls)
        _check_fixed(cls, hints)
        other = cls._registry.get(cls.code)
        if other is not None and (other.__module__, other.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise TypeError(
                f"error code {cls.code!r} belongs to {other.__module__}.{other.__qualname__}; "
                f"give {cls.__qualname__} a class attribute `code` of its own"
            )
        cls._registry[cls.code] = cls
        inherited = (
            name for base in cls.__mro__[:0:-1] for name in base.__dict__.get("_fields", ())
        )
        own = (name for name, hint in hints.items() if "ClassVar" not in str(hint))
        fields = dict.fromkeys((*inherited, *own))
        cls._fields = tuple(name for name in fields if name not in _FIXED and _is_set(cls, name))

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without a change by the caller."""
        return bool(self.details.get("retryable", False))

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait before another try, when the peer said so; milliseconds in `details`."""
        value = self.details.get("retry_after")
        return value / 1000 if isinstance(value, (int, float)) else None

    def to_wire(self) -> dict[str, Any]:
        """Return the details that cross the wire, the fields of a derived class among them."""
        fields = {name: getattr(self, name) for name in self._fields if hasattr(self, name)}
        return {**fields, **self.details}

    @staticmethod
    def from_wire(code: str, message: str, details: Mapping[str, Any]) -> RPCError:
        """Rebuild the error that the peer sent.

        The class is made without its `__init__`, whose parameters the wire does not know. One that
        cannot be made so, or does not take what has come, is logged, and a plain `RPCError` is in
        its place: the connection does not depend on what an application's class does.
        """
        cls = RPCError._registry.get(code, RPCError)
        try:
            return cls._rebuilt(code, message, details)
        except Exception:
            logger.exception("%s cannot be made of what the peer has sent", cls.__qualname__)
            return RPCError._rebuilt(code, message, details)

    @classmethod
    def _rebuilt(cls, code: str, message: str, details: Mapping[str, Any]) -> RPCError:
        error = _without_init(cls, (message,))
        error.message = message
        error.details = dict(details)
        error.code = code
        if cls._fields and "_typed" not in cls.__dict__:
            cls._typed = _validators(cls, cls._fields)
        for name in cls._fields:
            if name in details:
                setattr(error, name, cls._typed[name](details[name]))
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # For `copy` and `pickle`, which would call __init__ with what the text is made of.
        return _without_init, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        return str(self.message or self.code)


def _without_init(cls: type[E], args: tuple[Any, ...]) -> E:
    error = cls.__new__(cls, *args)
    error.args = args
    return error


def _validators(cls: type, fields: Sequence[str]) -> dict[str, Callable[[Any], Any]]:
    """Return for each field what makes of plain data what its annotation says, if it can be."""
    from pydantic import TypeAdapter  # here, because protocol/ imports the module and goes without

    def validator(name: str, hint: Any) -> Callable[[Any], Any]:
        try:
            validate = TypeAdapter(hint).validate_python
        except Exception:  # noqa: BLE001  # no type, or none that Pydantic knows
            return _unchanged

        def validated(value: Any) -> Any:
            try:
                return validate(value)
            except Exception as exc:  # noqa: BLE001  # the error has to arrive all the same
                text = "%s of %s is not what its annotation says, and stays as it came: %s"
                logger.warning(text, name, cls.__qualname__, type(exc).__name__)
                return value

        return validated

    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception:  # noqa: BLE001  # a name that is not known here, or not at run time
        hints = {}
    return {name: validator(name, hints.get(name, Any)) for name in fields}


def _unchanged(value: Any) -> Any:
    return value


class MethodNotFound(RPCError):
    """The peer has no method, or no message handler, of that name."""


class InvalidParams(RPCError):
    """The arguments do not fit the handler's annotations.

    The offending values are not repeated: an error must not carry what may be a secret.
    """

    @property
    def errors(self) -> list[dict[str, Any]]:
        """One map for each field: `path` (`"user.age"`), `message` and `type`; ten at most."""
        found = self.details.get("errors")
        return found if isinstance(found, list) else []


class PermissionDenied(RPCError):
    """The caller may not do that."""


class PayloadTooLarge(RPCError):
    """A value is larger than the side that should receive it accepts."""


class Overloaded(RPCError):
    """A limit on work in flight is reached; try again later."""

    def __init__(
        self, message: str = "too many calls in flight", *, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message, details={"retryable": True, "executed": False, **(details or {})})


class Unavailable(RPCError):
    """The service cannot be used now, for example because the server is full or stops."""


class CallCancelled(RPCError):
    """The call was cancelled at the side that ran it."""


class IdempotencyMismatch(RPCError):
    """The idempotency key belongs to an earlier call with other parameters; nothing was done."""


class RPCTimeout(RPCError, _Timeout):
    """No answer came in time; the handler has been told to stop."""


class InternalError(RPCError):
    """The handler failed unexpectedly; the text of that error stays in its own log."""

    @property
    def error_id(self) -> str:
        """The id under which the failing side logged the traceback."""
        return str(self.details.get("error_id", ""))
