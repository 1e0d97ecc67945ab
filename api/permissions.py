"""Who calls a DRF view, and whether the method is allowed to them; the raw body and the request's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from api.callers import Caller
from api.errors import Forbidden, Unauthorized

if TYPE_CHECKING:  # DRF imports this module while it makes its own views
    from rest_framework.views import APIView

READ_ONLY_MESSAGE = "this API key may only read"


class CallerMay(BasePermission):
    """Needs a caller. A read-only key is kept to GET and to views marked ``reads = True``: waits are POSTs."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        caller: Any = request.user
        if not isinstance(caller, Caller):
            raise Unauthorized
        if caller.read_only and request.method not in SAFE_METHODS and not getattr(view, "reads", False):
            raise Forbidden(READ_ONLY_MESSAGE)
        return True


def caller_of(request: Request) -> Caller:
    """The caller of a DRF request that has passed CallerMay."""
    caller: Any = request.user
    if not isinstance(caller, Caller):
        raise Unauthorized
    return caller


def request_id_of(request: Request) -> str | None:
    """The ``x-request-id`` a client deduplicates by, or None."""
    return request.headers.get("x-request-id")


def raw_body_of(request: Request) -> bytes:
    """The body's bytes, for the idempotency digest."""
    body: bytes = request._request.body
    return body
