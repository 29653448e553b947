"""The tree of errors, their codes, and how they cross the wire."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import inspect
import pickle
from collections.abc import Mapping
from datetime import date
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic_core import core_schema

from conduit import exceptions
from conduit.exceptions import (
    AuthenticationError,
    CallCancelled,
    ConduitError,
    ConnectionClosed,
    ConnectionLost,
    InternalError,
    InvalidParams,
    MethodNotFound,
    Overloaded,
    PayloadTooLarge,
    PermissionDenied,
    ProtocolError,
    RPCError,
    RPCTimeout,
    Unavailable,
)

CODES = {
    MethodNotFound: "method_not_found",
    InvalidParams: "invalid_params",
    PermissionDenied: "permission_denied",
    PayloadTooLarge: "payload_too_large",
    Overloaded: "overloaded",
    Unavailable: "unavailable",
    CallCancelled: "call_cancelled",
    RPCTimeout: "rpc_timeout",
    InternalError: "internal_error",
}


# The tree


def test_every_error_is_a_conduit_error_and_what_python_has_for_it() -> None:
    for name in exceptions.__all__:
        assert issubclass(getattr(exceptions, name), ConduitError)
    assert issubclass(ConnectionClosed, ConnectionError)
    assert issubclass(ConnectionLost, ConnectionClosed)
    assert issubclass(RPCTimeout, TimeoutError) and issubclass(RPCTimeout, asyncio.TimeoutError)
    assert not issubclass(RPCError, ConnectionError)
    for cls in CODES:
        assert issubclass(cls, RPCError)


def test_every_error_that_the_module_has_is_exported() -> None:
    found = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, Exception) and not name.startswith("_")
    }
    assert found == set(exceptions.__all__)


def test_what_the_errors_carry() -> None:
    closed = ConnectionClosed("why", code=4403, message="in other words")
    assert (closed.reason, closed.code, str(closed)) == ("why", 4403, "in other words")
    assert (str(ConnectionClosed()), ConnectionClosed().code) == ("the connection is closed", 1000)
    lost = ConnectionLost()
    assert (str(lost), lost.code, lost.executed) == ("the connection was lost", 1006, None)
    assert ConnectionLost(executed=False).executed is False
    assert AuthenticationError("no").code == "invalid_credentials"
    assert AuthenticationError("no", code="refused").code == "refused"
    assert ProtocolError("no").close_code == 1002
    assert ProtocolError("no", close_code=1009).close_code == 1009


# Codes


def test_the_code_of_each_class() -> None:
    assert {cls: cls.code for cls in CODES} == CODES
    assert RPCError.code == RPCError("x").code == "rpc_error"


@pytest.mark.parametrize(
    "name, code",
    [
        ("ErrorOfTheseTests", "error_of_these_tests"),
        ("HTTPFailed", "http_failed"),
        ("NoSuchURL", "no_such_url"),
        ("V2Only", "v2_only"),
        ("Lowercase1x", "lowercase1x"),
        ("Under_score", "under_score"),
    ],
)
def test_the_code_of_a_class_is_its_name_in_snake_case(name: str, code: str) -> None:
    cls: Any = type(name, (RPCError,), {})
    assert cls.code == code
    assert type(RPCError.from_wire(code, "x", {})) is cls


def test_a_class_may_have_a_code_of_its_own_which_is_not_inherited() -> None:
    class WithCode(RPCError):
        code = "e-4711"

    class Derived(WithCode):
        pass

    assert type(RPCError.from_wire("e-4711", "x", {})) is WithCode
    assert Derived.code == "derived" and type(RPCError.from_wire("derived", "x", {})) is Derived


def test_a_code_belongs_to_one_class() -> None:
    with pytest.raises(TypeError, match=r"'overloaded' belongs to conduit\.exceptions\.Overloaded"):

        class Mine(RPCError):
            code = "overloaded"

    assert type(RPCError.from_wire("overloaded", "x", {})) is Overloaded


def test_a_class_of_the_same_name_in_another_module_is_another_class() -> None:
    def define(module: str) -> type[RPCError]:
        return type("DefinedTwice", (RPCError,), {"__module__": module})

    first = define("shop.errors")
    again = define("shop.errors")  # as a module that is loaded again does
    assert type(RPCError.from_wire("defined_twice", "x", {})) is again is not first
    with pytest.raises(TypeError, match=r"'defined_twice' belongs to shop\.errors\.DefinedTwice"):
        define("billing.errors")


@pytest.mark.parametrize("hint", ["int", int, "int | None", Literal[404], Annotated[bytes, 1]])
def test_a_code_that_is_annotated_as_something_else_than_text_is_refused(hint: Any) -> None:
    with pytest.raises(TypeError, match=r"Http annotates `code` as .*give the attribute a name"):
        type("Http", (RPCError,), {"__annotations__": {"code": hint}, "__module__": __name__})
    assert type(RPCError.from_wire("http", "x", {})) is RPCError, "it has taken no code"


def test_what_every_error_has_may_be_annotated_as_what_it_is() -> None:
    fits: list[tuple[str, Any]] = [
        ("code", "str"),
        ("code", Literal["fits"]),
        ("code", ClassVar[str]),
        ("code", enum.Enum("Level", ["LOW"])),
        ("code", "NotKnownYet"),
        ("message", "str | None"),
        ("details", Mapping[str, Any]),
        ("details", dict[str, int]),
    ]
    for name, hint in fits:
        body = {"__annotations__": {name: hint}, "__module__": __name__, "code": "fits"}
        assert issubclass(type("Fits", (RPCError,), body), RPCError)
    for name, what in (("message", "text"), ("details", "a map")):
        with pytest.raises(TypeError, match=f"the {name} of an RPCError is {what}"):
            type("No", (RPCError,), {"__annotations__": {name: list[str]}, "__module__": __name__})


# Over the wire


class OutOfApples(RPCError):
    """An error with parameters of its own."""

    def __init__(self, what: str, *, left: int) -> None:
        super().__init__(f"no {what} left", details={"left": left})
        self.what = what

    @property
    def left(self) -> int:
        return int(self.details["left"])


class JobFailed(RPCError):
    """An error with fields."""

    kind: ClassVar[str] = "jobs"
    job: str
    tries: int

    def __init__(self, job: str, tries: int) -> None:
        super().__init__(f"job {job} failed", details={"retryable": True})
        self.job, self.tries = job, tries


class NightlyJobFailed(JobFailed):
    """One with a field more, which is not set."""

    until: str


def test_fields_cross_the_wire() -> None:
    for cls in (JobFailed, NightlyJobFailed):
        sent = cls("backup", 3)
        details = sent.to_wire()
        assert details == {"job": "backup", "tries": 3, "retryable": True}
        error = RPCError.from_wire(sent.code, sent.message, details)
        assert type(error) is cls
        assert (error.job, error.tries, error.retryable) == ("backup", 3, True)
        assert str(error) == "job backup failed"


def test_a_field_that_did_not_come_is_missing_and_one_that_is_unknown_stays_in_details() -> None:
    error = RPCError.from_wire("job_failed", "x", {"job": "backup", "_registry": {}, "more": 1})
    assert isinstance(error, JobFailed)
    assert error.job == "backup"
    assert not hasattr(error, "tries") and not hasattr(error, "more")
    assert error.details["more"] == 1
    assert RPCError._registry["job_failed"] is JobFailed


class Odd(RPCError):
    """One whose annotations say little."""

    other: Nowhere  # type: ignore[name-defined]  # noqa: F821
    when: date


class Strange(RPCError):
    """One with fields that cannot be set, or that Pydantic does not know."""

    retryable: bool  # a property of the base
    any: Any
    thing: Unknown
    level: Level


class Unknown:
    pass


class Level:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        def fail(value: Any) -> Any:
            raise KeyError(value)

        return core_schema.no_info_plain_validator_function(fail)


def test_what_does_not_fit_its_annotation_stays_plain(caplog: pytest.LogCaptureFixture) -> None:
    error = RPCError.from_wire("strange", "x", {"any": 1, "thing": [2], "level": 3, "retryable": 4})
    assert type(error) is Strange and error.retryable is True
    assert vars(error).items() >= {"any": 1, "thing": [2], "level": 3}.items()
    assert Strange("x").to_wire() == {}
    error = RPCError.from_wire("odd", "x", {"other": 1, "when": "2028-02-29"})
    assert type(error) is Odd
    assert vars(error)["when"] == "2028-02-29", "another name of the class is not known"
    error = RPCError.from_wire("job_failed", "x", {"job": [1], "tries": "2"})
    assert type(error) is JobFailed
    assert vars(error).items() >= {"job": [1], "tries": 2}.items()
    assert "job of JobFailed is not what its annotation says" in caplog.text
    assert "tries of" not in caplog.text


@dataclasses.dataclass(eq=False)
class QuotaExceeded(RPCError):
    """One whose fields have defaults."""

    used: int
    limit: int = 5


class DiskFull(RPCError):
    disk: str


class QuotaOfDiskExceeded(QuotaExceeded, DiskFull):
    """One with two errors for bases."""

    user: str = "nobody"


def test_fields_with_defaults_cross_the_wire() -> None:
    sent = QuotaExceeded(9, limit=7)
    error = RPCError.from_wire(sent.code, sent.message, sent.to_wire())
    assert isinstance(error, QuotaExceeded)
    assert (error.used, error.limit) == (9, 7)
    error = RPCError.from_wire(sent.code, sent.message, {"used": 9})
    assert isinstance(error, QuotaExceeded) and error.limit == 5


def test_fields_of_all_bases_cross_the_wire() -> None:
    sent = QuotaOfDiskExceeded(9, limit=7)
    sent.disk = "sda"
    error = RPCError.from_wire(sent.code, sent.message, sent.to_wire())
    assert isinstance(error, QuotaOfDiskExceeded)
    assert (error.used, error.limit, error.disk, error.user) == (9, 7, "sda", "nobody")


class Busy(RPCError):
    """One that says once more what `details` tell."""

    retryable: bool


def test_what_is_computed_is_no_field() -> None:
    sent = Busy("x", details={"retryable": True})
    error = RPCError.from_wire(sent.code, sent.message, sent.to_wire())
    assert isinstance(error, Busy) and error.retryable
    assert Busy("x").to_wire() == {}


class Choosy(RPCError):
    """One that does not take everything."""

    amount: int

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "amount" and value < 0:
            raise ValueError("an amount is not negative")
        super().__setattr__(name, value)


class Peculiar(RPCError):
    """One that cannot be made of its text."""

    def __new__(cls, one: str, other: str) -> Peculiar:
        return super().__new__(cls, one, other)


@pytest.mark.parametrize(
    ("cls", "details"), [(Choosy, {"amount": -1}), (Choosy, {"amount": "x"}), (Peculiar, {})]
)
def test_a_class_that_does_not_take_what_has_come_is_logged(
    cls: type[RPCError], details: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    error = RPCError.from_wire(cls.code, "text", details)
    assert type(error) is RPCError
    assert (error.code, error.message, error.details) == (cls.code, "text", details)
    assert f"{cls.__name__} cannot be made" in caplog.text


@pytest.mark.parametrize("cls", [RPCError, *CODES], ids=lambda cls: cls.__name__)
def test_an_error_arrives_as_what_it_was(cls: type[RPCError]) -> None:
    sent = cls("some text", details={"a": [1], "retryable": True})
    error = RPCError.from_wire(sent.code, sent.message, sent.details)
    assert type(error) is cls
    assert (error.code, error.message, str(error)) == (sent.code, "some text", "some text")
    assert error.args == ("some text",)
    assert error.details == sent.details and error.details is not sent.details
    assert error.retryable is True


def test_a_class_with_an_init_of_its_own_arrives_without_calling_it() -> None:
    sent = OutOfApples("apples", left=2)
    error = RPCError.from_wire(sent.code, sent.message, sent.details)
    assert type(error) is OutOfApples and error.left == 2
    assert str(error) == "no apples left"
    assert not hasattr(error, "what"), "what is not in the details does not travel"


def test_a_code_that_nobody_knows_arrives_as_an_rpc_error() -> None:
    error = RPCError.from_wire("of_another_program", "text", {"x": 1})
    assert type(error) is RPCError
    assert (error.code, error.message, error.details) == ("of_another_program", "text", {"x": 1})
    assert RPCError("x").code == "rpc_error", "only that one error has the code"


def test_an_error_without_a_text_shows_its_code() -> None:
    assert str(RPCError()) == "rpc_error"
    assert str(Unavailable("")) == "unavailable"
    assert str(RPCError.from_wire("odd", "", {})) == "odd"


# Details


def test_retry_after_is_in_seconds() -> None:
    assert RPCError("x", details={"retry_after": 1500}).retry_after == 1.5
    for nothing in ({}, {"retry_after": None}, {"retry_after": "soon"}):
        assert RPCError("x", details=nothing).retry_after is None
    assert RPCError("x").retryable is False


def test_overloaded_means_that_nothing_was_done() -> None:
    assert Overloaded().details == {"retryable": True, "executed": False}
    error = Overloaded("full", details={"executed": None, "queue": 5})
    assert error.details == {"retryable": True, "executed": None, "queue": 5}
    assert "calls in flight" in str(Overloaded())


@pytest.mark.parametrize(
    "found, expected", [([{"path": "a"}], [{"path": "a"}]), (None, []), ("x", [])]
)
def test_errors_of_parameters_are_a_list(found: Any, expected: Any) -> None:
    assert InvalidParams("x", details={"errors": found}).errors == expected
    assert InvalidParams("x").errors == []


def test_an_internal_error_has_an_id() -> None:
    assert InternalError("x", details={"error_id": "abc"}).error_id == "abc"
    assert InternalError("x").error_id == ""


def test_details_are_a_copy() -> None:
    mine = {"a": 1}
    error = RPCError("x", details=mine)
    error.details["b"] = 2
    assert mine == {"a": 1}
    assert RPCError("x").details is not RPCError("x").details


# As other exceptions


@pytest.mark.parametrize(
    "error",
    [
        ConnectionClosed("why", code=4403, message="in other words"),
        ConnectionLost("why", executed=False),
        AuthenticationError("no", code="refused"),
        ProtocolError("no", close_code=1009),
        RPCError("x", details={"a": 1}),
        Overloaded("full", details={"executed": None}),
        RPCTimeout("late", details={"retryable": True}),
        InternalError("x", details={"error_id": "abc"}),
        RPCError.from_wire("of_another_program", "text", {"x": 1}),
        OutOfApples("apples", left=2),
        JobFailed("backup", 3),
        RPCError.from_wire("job_failed", "text", {"job": "backup", "tries": 3}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_copied_and_pickled(error: Exception) -> None:
    for again in (
        copy.copy(error),
        copy.deepcopy(error),
        pickle.loads(pickle.dumps(error)),
    ):
        assert type(again) is type(error)
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_a_timeout_is_caught_as_any_other() -> None:
    with pytest.raises(TimeoutError):
        raise RPCTimeout("late")
    with pytest.raises(asyncio.TimeoutError):
        raise RPCTimeout("late")
    with pytest.raises(RPCError):
        raise RPCError.from_wire("rpc_timeout", "late", {})
    assert str(RPCTimeout("late")) == "late"
