"""What the operation answers, as a DRF serializer: the OpenAPI document."""

from __future__ import annotations

from typing import Any

from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from api.schema import problem
from api.views import AsyncElsewhere


class DevboxCreateSshKeyView(serializers.Serializer[Any]):
    """A key to the devbox. It ends with the devbox, with the API key that made it, or after a day."""

    id = serializers.CharField(help_text="The devbox's id.")
    url = serializers.CharField(help_text="The server name to ask the SSH service's TLS listener for.")
    ssh_private_key = serializers.CharField(help_text="In OpenSSH's own PEM format. It is told once and kept nowhere.")
    ssh_user = serializers.CharField(help_text="The user to log in as.")


class CreateSshKey(AsyncElsewhere):
    """Declares POST /v1/devboxes/{id}/create_ssh_key."""

    @extend_schema(
        operation_id="createDevboxSshKey",
        summary="Make an SSH key for a devbox.",
        request=None,
        responses={
            200: DevboxCreateSshKeyView,
            400: problem("The devbox is over."),
            404: problem("No such devbox."),
            429: problem("It has as many valid keys as it may."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        """Declared only."""
        return self._elsewhere(request)  # type: ignore[no-any-return]
