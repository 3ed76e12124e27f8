"""Every reply that is not the one asked for, in one shape.

``{"error": {"code", "message", "hint"}}``: the code is for programs, the message names what is
wrong, the hint says what to do next.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from lmcache_kit.errors import (
    ControlError,
    DeadlineExceeded,
    InvalidQuery,
    NoWorker,
    OperationFailed,
    UnknownName,
)
from lmcache_kit_http_api.models import ErrorBody, ErrorReply

log = logging.getLogger(__name__)

_LISTED_NAMES = 20
_WHY_NONE = {
    "instance": " yet; does its configuration say enable_controller: true?",
    "model": " yet; instances register theirs once vLLM has loaded it",
    "method": "; install a codec beside the cache process, such as lmcache-kit-cachegen",
}
_SHOWN_CHARACTERS = 200


_HEADERS: dict[str, str] = {hdrs.CONTENT_TYPE: "application/json", hdrs.SERVER: "lmcache-kit"}
"""Headers of every response. The versions that serve are not told."""


def respond(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    """Build a response. Its body is JSON unless ``headers`` have another type."""
    return web.Response(
        status=status, body=body, headers={**_HEADERS, **headers} if headers else _HEADERS
    )


class ApiError(Exception):
    """An error that is answered with ``status`` and ``body``."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorReply(error=ErrorBody(code=code, message=message, hint=hint))
        self.headers = headers

    def response(self) -> web.Response:
        """Build the response to send."""
        return respond(self.status, self.body.model_dump_json().encode(), self.headers)


_CONTROL_ERRORS: tuple[tuple[type[ControlError], int, str], ...] = (
    (InvalidQuery, 422, "invalid_request"),
    (NoWorker, 503, "no_worker"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (OperationFailed, 502, "operation_failed"),
    (ControlError, 409, "conflict"),
)

_TOO_LATE = ApiError(
    504,
    "deadline_exceeded",
    "the operation did not finish in time",
    hint="Try again; if it persists, look into the log of the controller",
)
_BROKEN_BODY = ApiError(
    400,
    "bad_body",
    "the body ends early or does not decode",
    hint="Check Content-Length, Transfer-Encoding and Content-Encoding",
)


def clip(text: str) -> str:
    """Shorten text of a client, to send it back."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def too_large(limit_bytes: int) -> ApiError:
    """Build the error for a body over ``max_body_bytes``."""
    return ApiError(
        413,
        "body_too_large",
        f"the body is larger than the {limit_bytes} bytes allowed",
        hint="Send fewer tokens, or raise max_body_bytes of the frontend",
    )


def from_exception(error: BaseException) -> ApiError:
    """Convert an exception of a handler. An unexpected one is logged, and none of it is shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownName):
        code = f"unknown_{error.kind.replace(' ', '_')}"
        return ApiError(404, code, clip(error.message), hint=_known(error.kind, error.known))
    for kind, status, code in _CONTROL_ERRORS:
        if isinstance(error, kind):
            return ApiError(status, code, error.message, hint=error.hint)
    if isinstance(error, TimeoutError):
        return _TOO_LATE
    if isinstance(error, (web.RequestPayloadError, HttpProcessingError)):
        return _BROKEN_BODY
    return defect_of("the controller", error)


def defect_of(owner: str, error: BaseException) -> ApiError:
    """Log an unexpected exception under a reference, and build the error that names it."""
    reference = uuid.uuid4().hex[:12]
    log.error("%s failed on a request, reference %s", owner, reference, exc_info=error)
    return ApiError(
        500,
        "internal_error",
        f"{owner} failed to answer; this is a defect of {owner}",
        hint=f"The controller's log has the cause under reference {reference}",
    )


def _known(kind: str, names: list[str]) -> str:
    if not names:
        return f"Known: none{_WHY_NONE.get(kind, '')}"
    listed = ", ".join(clip(name) for name in names[:_LISTED_NAMES])
    more = len(names) - _LISTED_NAMES
    return f"Known: {listed}" + (f" and {more} more" if more > 0 else "")
