"""From the bytes of a body to a request model, or to an error that names the field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from lmcache_kit_http_api.errors import ApiError, clip
from lmcache_kit_http_api.models import TokensRequest

if TYPE_CHECKING:
    from multidict import MultiMapping
    from pydantic_core import ErrorDetails

_R = TypeVar("_R", bound=BaseModel)

_SHOWN_ERRORS = 5


def parse(model: type[_R], body: bytes, limits: Mapping[str, int]) -> _R:
    """Raises ApiError: 400 for what is not JSON, 422 for JSON that does not fit the model."""
    if not body:
        raise ApiError(
            400, "missing_body", "the request has no body", hint=f"Send JSON; {_fields(model)}"
        )
    try:
        return model.model_validate_json(body, context=limits)
    except ValidationError as error:
        raise _explain(model, error) from None


def parse_url(model: type[_R], names: Mapping[str, str], query: MultiMapping[str]) -> _R:
    """The same for names in the path and parameters in the query; a value is as it is written.

    Raises ApiError 422.
    """
    for key in query:
        if len(query.getall(key)) > 1 or key in names:
            raise ApiError(
                422, "invalid_request", f"{clip(key)}: stands twice", hint=_fields(model)
            )
    try:
        return model.model_validate_strings({**query, **names})
    except ValidationError as error:
        raise _explain(model, error) from None


def field_names(model: type[BaseModel]) -> list[str]:
    """Return the fields that have an effect, as they stand in a request."""
    passed_over = TokensRequest.model_fields if issubclass(model, TokensRequest) else {}
    return [
        field.alias or name for name, field in model.model_fields.items() if name not in passed_over
    ]


def _explain(model: type[BaseModel], error: ValidationError) -> ApiError:
    details = error.errors(include_url=False)
    if details[0]["type"] == "json_invalid":
        return ApiError(
            400, "invalid_json", clip(details[0]["msg"]), hint="Send one JSON object in UTF-8"
        )
    told = "; ".join(_tell(detail) for detail in details[:_SHOWN_ERRORS])
    return ApiError(422, "invalid_request", told, hint=_hint(model, details))


def _tell(detail: ErrorDetails) -> str:
    where = _path(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"{where}: unknown field"
        case "missing":
            return f"{where}: required, and missing"
        case "model_type":
            return "the body: must be a JSON object"
        case "int_type" | "bool_type" | "string_type" | "greater_than_equal" | "less_than_equal":
            return f"{where}: {_lower(detail['msg'])}, got {_short(detail['input'])}"
        case _:
            return f"{where}: {_lower(detail['msg'])}"


def _hint(model: type[BaseModel], details: list[ErrorDetails]) -> str:
    for detail in details:
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(detail["loc"][-1])[:64], field_names(model), n=1)
            if near:
                return f"Did you mean {near[0]!r}? {_fields(model)}"
    return _fields(model)


def _fields(model: type[BaseModel]) -> str:
    return f"Fields: {', '.join(field_names(model))}. See GET /openapi.json"


def _path(loc: tuple[int | str, ...]) -> str:
    """``("tokens", 3)`` as ``tokens[3]``."""
    shown = ""
    for part in loc:
        shown += f"[{part}]" if isinstance(part, int) else ("." if shown else "") + part
    return clip(shown) or "the body"


def _short(value: object) -> str:
    """A scalar as JSON would show it; of anything else only its kind."""
    match value:
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]
        case int() if value.bit_length() > 256:
            return "a huge number"
        case int() | float():
            return str(value)
        case str():
            return repr(value[:40])
        case list():
            return "an array"
        case _:
            return "an object"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
