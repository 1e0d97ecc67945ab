"""The OpenAPI document: what drf-spectacular does not know by itself.

Strict bodies say ``additionalProperties: false``; every operation names the errors it shares with all others and the
header that repetitions are recognised by. ``manage.py spectacular --file openapi.yaml`` writes it.
"""

from __future__ import annotations

from typing import Any

from drf_spectacular.openapi import AutoSchema
from drf_spectacular.utils import OpenApiResponse, extend_schema_serializer
from rest_framework import serializers

from api.idempotency import REQUEST_ID_MAX
from api.validation import StrictSerializer

_ERROR = {
    "type": "object",
    "description": "Every answer that is not a success.",
    "properties": {
        "code": {"type": "string", "description": "What went wrong, for programs."},
        "message": {"type": "string", "description": "What went wrong and what to do, for people."},
    },
    "required": ["code", "message"],
}
_REQUEST_ID = {
    "in": "header",
    "name": "x-request-id",
    "required": False,
    "description": "Requests that repeat it within 24 h on the same route answer with the object that the first made.",
    "schema": {"type": "string", "minLength": 1, "maxLength": REQUEST_ID_MAX},
}
_SHARED = {
    "401": "The API key is missing, unknown, revoked or expired.",
    "403": "The key may not do this, or its account is disabled.",
    "default": "Any other error.",
}


@extend_schema_serializer(component_name="Error")
class ErrorBody(serializers.Serializer[Any]):
    """Every answer that is not a success."""

    code = serializers.CharField(help_text="What went wrong, for programs.")
    message = serializers.CharField(help_text="What went wrong and what to do, for people.")


class Schema(AutoSchema):
    """drf-spectacular's schema of a view."""

    def _map_basic_serializer(self, serializer: Any, direction: Any) -> Any:
        schema = super()._map_basic_serializer(serializer, direction)  # type: ignore[no-untyped-call]
        if isinstance(serializer, StrictSerializer):
            schema["additionalProperties"] = False
        return schema


def finish(result: dict[str, Any], generator: Any, request: Any, public: bool) -> dict[str, Any]:
    """The last pass over the document."""
    schemas = result.setdefault("components", {}).setdefault("schemas", {})
    schemas["Error"] = _ERROR
    for path in result["paths"].values():
        for method, operation in path.items():
            for status, meaning in _SHARED.items():
                operation["responses"].setdefault(status, _error(meaning))
            for response in operation["responses"].values():
                response["description"] = response.get("description") or "OK"
            if method != "get" and not operation["operationId"].lower().startswith("wait"):
                operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/RequestId"})
    result["components"]["parameters"] = {"RequestId": _REQUEST_ID}
    result["components"]["schemas"] = dict(sorted(schemas.items()))
    return result


def _error(description: str) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Error"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def problem(description: str) -> OpenApiResponse:
    """An error answer of an operation, for ``extend_schema(responses={404: problem("…")})``."""
    return OpenApiResponse(response=ErrorBody, description=description)
