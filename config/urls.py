"""URLs that Django serves: the API's plain operations, the admin, the OpenAPI document and its page, health."""

from __future__ import annotations

from functools import lru_cache

from django.conf import settings
from django.contrib import admin
from django.db import connection
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.urls import path
from drf_spectacular.views import SpectacularRedocView

from config import checks  # noqa: F401  (registers the system checks)
from config.routes import url_patterns


@lru_cache(maxsize=1)
def _document() -> bytes:
    return (settings.PROJECT / "openapi.yaml").read_bytes()


def openapi(request: HttpRequest) -> HttpResponse:
    """The committed document, which a test keeps current; making it takes a second of CPU."""
    return HttpResponse(_document(), content_type="application/yaml")


def health(request: HttpRequest) -> HttpResponse:
    """200 while this process can read the database: for load balancers and supervisors."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "ok"})


def home(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/docs/")


_docs = SpectacularRedocView.as_view(
    url_name="openapi", template_name="docs.html", authentication_classes=[], permission_classes=[]
)

urlpatterns = [
    *url_patterns(),
    path("admin/", admin.site.urls),
    path("openapi.yaml", openapi, name="openapi"),
    path("docs", _docs),
    path("docs/", _docs),
    path("healthz", health),
    path("", home),
]


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    message = f"there is no {request.method} {request.path[:200]}"
    return JsonResponse({"code": "not_found", "message": message}, status=404)


def server_error(request: HttpRequest) -> HttpResponse:
    """Views outside of DRF: the API's own errors are rendered by ``api.errors``."""
    return JsonResponse({"code": "internal", "message": "something went wrong on our side"}, status=500)


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    return JsonResponse({"code": "bad_request", "message": "this server cannot take such a request"}, status=400)


handler400 = bad_request
handler404 = not_found
handler500 = server_error
