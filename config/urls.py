"""URLs that Django serves: the API's plain operations, the admin, the OpenAPI document and its page."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularRedocView

from config.routes import url_patterns

urlpatterns = [
    *url_patterns(),
    path("admin/", admin.site.urls),
    path("openapi.yaml", SpectacularAPIView.as_view(authentication_classes=[], permission_classes=[]), name="openapi"),
    path(
        "docs",
        SpectacularRedocView.as_view(url_name="openapi", authentication_classes=[], permission_classes=[]),
        name="docs",
    ),
]


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return JsonResponse(
        {"code": "not_found", "message": f"there is no {request.method} {request.path[:200]}"}, status=404
    )


def server_error(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"code": "internal", "message": "something went wrong on our side"}, status=500)


handler404 = not_found
handler500 = server_error
