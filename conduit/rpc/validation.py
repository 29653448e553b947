"""What Pydantic does for handlers: validators, plain results, schemas, errors for the caller."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, core_schema, to_jsonable_python

from ..exceptions import InvalidParams
from ..transport.answers import Response

__all__ = ["AS_SENT", "AS_TAKEN", "adapter_of", "finisher", "invalid_params"]

ERRORS_SHOWN = 10
ERRORS_LOOKED_AT = 1000
"""Of more than that a caller is told the number alone. Pydantic cannot tell the first few: all half
a million of a payload of a megabyte would take a second and 400 MB.
"""
ERRORS_BYTES = 2500
"""Bytes of all errors that a caller is shown, whatever it has put into the names of parameters."""
MESSAGE_SHOWN = 200
TEXT_BYTES = 1200
"""Bytes of the sentence that says the same."""

_PLAIN_TYPES = (int, str, bool, float, bytes, type(None))


class Schema(GenerateJsonSchema):
    """Describes whatever can be served; what JSON Schema has no words for is left open.

    What a model wants its JSON to be does not count, because what is sent is MessagePack: neither
    `ser_json_bytes` and its like, nor serializers that are for JSON only.
    """

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}

    def ser_schema(self, schema: Any) -> dict[str, Any] | None:
        by_function = schema["type"] in ("function-plain", "function-wrap")
        if by_function and schema.get("when_used") in ("json", "json-unless-none"):
            return None
        return super().ser_schema(schema)

    def bytes_schema(self, schema: core_schema.BytesSchema) -> dict[str, Any]:
        return {**super().bytes_schema(schema), "format": "binary"}

    def date_schema(self, schema: core_schema.DateSchema) -> dict[str, Any]:
        return {"type": "string", "format": "date"}

    def time_schema(self, schema: core_schema.TimeSchema) -> dict[str, Any]:
        return {"type": "string", "format": "time"}

    def datetime_schema(self, schema: core_schema.DatetimeSchema) -> dict[str, Any]:
        return {"type": "string", "format": "date-time"}

    def timedelta_schema(self, schema: core_schema.TimedeltaSchema) -> dict[str, Any]:
        # Sent as ISO 8601; seconds are taken as well.
        kinds: Any = ["number", "string"] if self.mode == "validation" else "string"
        return {"type": kinds, "format": "duration"}

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> dict[str, Any]:
        return {**super().decimal_schema(schema), "format": "decimal"}

    def enum_schema(self, schema: core_schema.EnumSchema) -> dict[str, Any]:
        kind, values = schema["cls"], [member.value for member in schema["members"]]
        if not _are_text(values):
            return {"title": kind.__name__, **_not_text(values)}
        told = super().enum_schema(schema)
        if issubclass(kind, enum.Flag):
            del told["enum"]  # every combination is a value as well
        return told

    def literal_schema(self, schema: core_schema.LiteralSchema) -> dict[str, Any]:
        members = schema["expected"]
        values = [one.value if isinstance(one, enum.Enum) else one for one in members]
        return super().literal_schema(schema) if _are_text(values) else _not_text(values)

    def encode_default(self, dft: Any) -> Any:
        try:
            return super().encode_default(dft)
        except ValueError as exc:  # bytes that are no text; Pydantic leaves these out
            raise PydanticSerializationError(str(exc)) from exc

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}

    def arguments_schema(self, schema: core_schema.ArgumentsSchema) -> dict[str, Any]:
        try:
            return super().arguments_schema(schema)
        except PydanticInvalidForJsonSchema:  # some by position only, others by name only
            return self.kw_arguments_schema(
                schema["arguments_schema"], schema.get("var_kwargs_schema")
            )


def _are_text(values: list[Any]) -> bool:
    """Whether JSON can name all of these values."""
    try:
        to_jsonable_python(values)
    except ValueError:
        return False
    return not any(isinstance(one, bytes) for one in values)


def _not_text(values: list[Any]) -> dict[str, Any]:
    """Return the schema of values of which JSON cannot name some."""
    if all(isinstance(one, bytes) for one in values):
        return {"type": "string", "format": "binary"}
    return {}


AS_TAKEN: Any = {"schema_generator": Schema}
AS_SENT: Any = {"mode": "serialization", "schema_generator": Schema}


def finisher(adapter: TypeAdapter[Any] | None, hint: Any) -> Callable[[Any], Any] | None:
    """Return what checks a result and makes it plain."""
    if adapter is None:
        return None
    validate = adapter.validator.validate_python
    if hint in _PLAIN_TYPES or (isinstance(hint, types.UnionType) and _all_plain(hint)):
        return validate
    dump = partial(adapter.serializer.to_python, by_alias=True)  # as validators want them

    def finish(result: Any) -> Any:
        if type(result) is Response:
            return Response(dump(validate(result.value)), result.headers)
        return dump(validate(result))

    return finish


def _all_plain(union: types.UnionType) -> bool:
    return all(member in _PLAIN_TYPES for member in typing.get_args(union))


def adapter_of(name: str, annotation: Any) -> TypeAdapter[Any]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.core_schema["type"]  # raises for a model with names that are not defined yet
        return adapter
    except PydanticUserError as exc:
        signature = getattr(annotation, "__signature__", annotation)
        # What comes behind is about models, and about code inside of Pydantic.
        told, _, more = exc.message.partition(". Set `arbitrary_types_allowed=True`")
        hint = "; take plain data, a dataclass or a Pydantic model" if more else ""
        raise TypeError(
            f"handler {name!r} with {signature} cannot be validated by Pydantic: {told}{hint}"
        ) from exc


def _message(error: Any) -> str:
    """Return the message of one error; Pydantic's own would repeat a wrong tag."""
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        return f"{context['discriminator']} should be one of {context['expected_tags']}"
    return str(error["msg"])


def invalid_params(
    name: str, error: ValidationError, *, lone: bool = False, place: str = ""
) -> InvalidParams:
    """Say which parameters do not fit, without the values: they may be secrets.

    Args:
        name: The handler's name.
        error: What Pydantic says.
        lone: Leave the first part of the paths out, because it is no parameter.
        place: Stands before the paths.
    """
    if error.error_count() > ERRORS_LOOKED_AT:
        text = f"{error.error_count()} faults, too many to be told apart"
        errors = [{"path": place, "message": text, "type": "too_many_faults"}]
        return InvalidParams(f"{name!r}: {text}", details={"errors": errors})
    at = [place] if place else []
    found = error.errors(include_url=False, include_input=False)
    shown, left = list[dict[str, str]](), ERRORS_BYTES
    for one in found[:ERRORS_SHOWN]:
        told = {
            "path": ".".join([*at, *(str(part) for part in one["loc"][lone:])])[:MESSAGE_SHOWN],
            "message": _message(one)[:MESSAGE_SHOWN],
            "type": one["type"],
        }
        left -= sum(len(text.encode(errors="replace")) for text in told.values())
        if left < 0:
            break
        shown.append(told)
    listed = "; ".join(
        f"{one['path']}: {one['message']}" if one["path"] else one["message"] for one in shown
    )
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    text = f"{name!r}: {listed}".encode(errors="replace")[:TEXT_BYTES].decode(errors="ignore")
    return InvalidParams(text + more, details={"errors": shown})
