"""The operations on tunnels: parse, call one service, answer."""

from __future__ import annotations

from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from api.permissions import caller_of
from api.schema import problem
from api.validation import StrictSerializer, validated
from devboxes.schemas import TunnelConfig, TunnelView
from tunnels import services

_TAGS = ["Devbox"]


class EnableTunnel(APIView):
    """A devbox's tunnel."""

    @extend_schema(
        operation_id="enableDevboxTunnel",
        summary="Enable the tunnel of a running devbox",
        description="Its port N is then `https://{N}-{tunnel_key}.tunnel.<domain>`, for HTTP and WebSockets; servers "
        "on the devbox's own loopback are reached, too. A devbox has one tunnel: asked again for what it has, or for "
        "nothing in particular, this answers with it.",
        tags=_TAGS,
        request=TunnelConfig,
        responses={
            200: TunnelView,
            400: problem("The devbox is not running, or has a tunnel that is not what was asked for."),
            404: problem("No such devbox."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        return Response(services.enable_tunnel(caller_of(request), id, validated(TunnelConfig, request.data)))


class Nothing(StrictSerializer):
    """A body without a field."""


class RemoveTunnel(APIView):
    """The end of a devbox's tunnel."""

    @extend_schema(
        operation_id="removeDevboxTunnel",
        summary="Remove a devbox's tunnel",
        description="Its key is worth nothing from then on, and what is open through it is cut. Harmless when there "
        "is none.",
        tags=_TAGS,
        request=None,
        responses={200: {"type": "object", "properties": {}}, 404: problem("No such devbox.")},
    )
    def post(self, request: Request, id: str) -> Response:
        validated(Nothing, request.data)
        services.remove_tunnel(caller_of(request), id)
        return Response({})
