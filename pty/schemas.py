"""What the terminals' operations take and answer, as DRF serializers: field rules and the OpenAPI document."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from api.schema import problem
from api.validation import StrictSerializer, TextField, WholeField
from api.views import AsyncElsewhere

ACTIONS = ("resize", "signal", "close")


class PtyTunnelView(serializers.Serializer[Any]):
    """A key to the devbox's terminals, for a day: `https://13-{tunnel_key}.tunnel.<domain>`."""

    tunnel_key = serializers.CharField(help_text="Part of the host name.")
    auth_token = serializers.CharField(help_text="A bearer token, or the WebSocket's subprotocol.")


class PtyConnectView(serializers.Serializer[Any]):
    """A terminal session."""

    session_name = serializers.CharField(required=False)
    status = serializers.CharField(required=False)
    protocol_version = serializers.CharField(required=False)
    connect_url = serializers.CharField(
        required=False,
        help_text="The WebSocket's path. `replay=1` repeats the last 256 KiB first, `mode=view` only watches, "
        "`takeover=1` takes the place of the client that is attached.",
    )
    created = serializers.BooleanField()
    attached = serializers.BooleanField()
    cols = serializers.IntegerField(required=False)
    rows = serializers.IntegerField(required=False)
    idle_ttl_seconds = serializers.IntegerField(
        required=False,
        max_value=2**63 - 1,
        min_value=-(2**63),
        help_text="How long it is kept when nobody is attached.",
    )


class PtyControlParameters(StrictSerializer):
    """What to do to the session."""

    action = serializers.ChoiceField(choices=ACTIONS)
    cols = WholeField(required=False, allow_null=True)
    rows = WholeField(required=False, allow_null=True)
    signal = TextField(required=False, allow_null=True, help_text="Such as SIGTERM; to the foreground process group.")


class PtyControlResultView(serializers.Serializer[Any]):
    """The session after it."""

    session_name = serializers.CharField(required=False)
    status = serializers.CharField(required=False)


_DEVBOX = OpenApiParameter(
    "devbox_id", str, OpenApiParameter.QUERY, description="Which devbox, where the host name does not say it."
)
_CELLS = [
    OpenApiParameter(side, int, OpenApiParameter.QUERY, description="1 to 1000; both or neither.")
    for side in ("cols", "rows")
]


class CreatePtyTunnel(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/create_pty_tunnel."""

    @extend_schema(
        operation_id="createDevboxPtyTunnel",
        summary="Make a key to the terminals of a running devbox.",
        request=None,
        responses={
            200: PtyTunnelView,
            400: problem("The devbox is not running."),
            404: problem("No such devbox."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class PtySession(AsyncElsewhere):
    """Declares GET /pty/{session_name}."""

    @extend_schema(
        operation_id="connectDevboxPtySession",
        summary="Make a terminal session, or find it.",
        parameters=[*_CELLS, _DEVBOX],
        responses={
            200: PtyConnectView,
            400: problem("The session's name is none, or the devbox is not running."),
            503: problem("No shell can be started at the moment."),
        },
    )
    def get(self, request: Request, session_name: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]


class PtySessionControl(AsyncElsewhere):
    """Declares POST /pty/{session_name}/control."""

    @extend_schema(
        operation_id="controlDevboxPtySession",
        summary="Resize, signal or close a terminal session.",
        parameters=[_DEVBOX],
        request=PtyControlParameters,
        responses={
            200: PtyControlResultView,
            400: problem("A size out of range, no signal's name, or nothing in the foreground to signal."),
            404: problem("No such session."),
        },
    )
    def post(self, request: Request, session_name: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]
