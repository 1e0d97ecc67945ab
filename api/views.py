"""Views that exist for the OpenAPI document only."""

from __future__ import annotations

from typing import Any

from rest_framework.request import Request
from rest_framework.views import APIView


class AsyncElsewhere(APIView):
    """For the schema only: the operation's URL is taken by an async route before Django sees it.

    Declare one on the same URL with ``extend_schema`` on its method. Reached only with a method the route does not
    have, which answers 405.
    """

    def _elsewhere(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{request.method} {request.path} belongs to an async route and came to Django")
