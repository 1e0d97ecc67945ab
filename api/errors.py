"""Errors an endpoint may answer with, and their one rendering: ``{"code", "message"}``.

An error is a class that owns its status and code; the message says what to do next. Anything else that escapes an
endpoint is ours: it is logged once under a reference and answered as 500 without a word about its cause.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404
from rest_framework import exceptions as drf
from rest_framework.response import Response

from api.ids import new_id

log = logging.getLogger("api.errors")


class ApiError(Exception):
    """An answer that is not a success. ``headers`` go out with it."""

    status = 500
    code = "internal"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status if status is not None else type(self).status
        self.code = code if code is not None else type(self).code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


class BadRequest(ApiError):
    status = 400
    code = "bad_request"


class Unauthorized(ApiError):
    status = 401
    code = "unauthorized"

    def __init__(self, message: str = "give a valid API key: Authorization: Bearer ak_…", **rest: Any) -> None:
        super().__init__(message, **rest)
        self.headers.setdefault("www-authenticate", "Bearer")


class Forbidden(ApiError):
    status = 403
    code = "forbidden"


class NotFound(ApiError):
    status = 404
    code = "not_found"


class WaitTimedOut(ApiError):
    """The time a long-poll may take is over; asking again is the right thing to do."""

    status = 408
    code = "timeout"

    def __init__(self, message: str, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.headers.setdefault("x-should-retry", "true")


class WaitInterrupted(WaitTimedOut):
    """A long-poll that this server ends early, being stopped. Clients' own loops take 408 alone for "ask again"."""

    code = "interrupted"


class Conflict(ApiError):
    """Permanent unless said otherwise: clients would repeat a 409 for half a minute."""

    status = 409
    code = "conflict"

    def __init__(self, message: str, *, retry: bool = False, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.headers.setdefault("x-should-retry", "true" if retry else "false")


class TooLarge(ApiError):
    status = 413
    code = "too_large"


class TooManyRequests(ApiError):
    """A cap was reached. ``retry_after`` in seconds."""

    status = 429
    code = "too_many_requests"

    def __init__(self, message: str, *, retry_after: float = 1.0, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.headers.setdefault("retry-after", str(max(1, round(retry_after))))


class Unavailable(ApiError):
    """Not now: a queue is full or a server behind us is away. ``retry_after`` in seconds."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0, **rest: Any) -> None:
        super().__init__(message, **rest)
        self.headers.setdefault("retry-after", str(max(1, round(retry_after))))


_DRF_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    413: "too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
}


def to_api_error(error: Exception) -> ApiError:
    """The answer to any exception; an unexpected one is logged here, once, under the reference in its message."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Http404):
        return NotFound("there is nothing here")
    if isinstance(error, PermissionDenied):
        return Forbidden("you may not do this")
    if isinstance(error, drf.ValidationError):
        return BadRequest(_flatten(error.detail))
    if isinstance(error, drf.NotAuthenticated | drf.AuthenticationFailed):
        return Unauthorized()
    if isinstance(error, drf.APIException):
        code = _DRF_CODES.get(error.status_code, "internal")
        return ApiError(str(error.detail), status=error.status_code, code=code)
    if isinstance(error, OperationalError | InterfaceError):
        log.error("the database failed: %s", error)
        return Unavailable("the database is not answering; try again shortly")
    reference = new_id("err")
    log.error("unexpected error %s", reference, exc_info=error)
    return ApiError(f"something went wrong on our side; the reference is {reference}")


def _flatten(detail: Any, path: str = "") -> str:
    """DRF's nested details as one sentence that names each field: ``launch_parameters.custom_cpu_cores: …``."""
    if isinstance(detail, Mapping):
        parts = []
        for key, value in detail.items():
            if key == "non_field_errors":
                inner = path
            elif isinstance(key, int):
                inner = f"{path}[{key}]"
            else:
                inner = f"{path}.{key}" if path else str(key)
            parts.append(_flatten(value, inner))
        return "; ".join(parts)
    if isinstance(detail, list | tuple):
        if any(isinstance(item, Mapping | list) for item in detail):
            return "; ".join(_flatten(item, f"{path}[{index}]") for index, item in enumerate(detail) if item)
        sentence = " ".join(str(item) for item in detail)
        return f"{path}: {sentence}" if path else sentence
    return f"{path}: {detail}" if path else str(detail)


def handle_exception(error: Exception, context: Mapping[str, Any]) -> Response:
    """DRF's exception handler."""
    from rest_framework.views import set_rollback  # that module imports this one, by way of the settings

    set_rollback()
    answer = to_api_error(error)
    response = Response(answer.body(), status=answer.status, headers=answer.headers)
    response._has_been_logged = True  # type: ignore[attr-defined]  # Django would log a 500 a second time
    return response
