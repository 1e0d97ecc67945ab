"""The routes of all apps, collected.

An app brings them in its ``routes.py``: ``urlpatterns`` (DRF views, and the schema of its async routes),
``ASYNC_ROUTES`` and ``WEBSOCKET_ROUTES``; each may be missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from django.conf import settings

from api.asynchronous import Route


def _collect(name: str) -> list[Any]:
    found: list[Any] = []
    for app in settings.APPS:
        if importlib.util.find_spec(f"{app}.routes") is not None:
            found += getattr(importlib.import_module(f"{app}.routes"), name, [])
    return found


def url_patterns() -> list[Any]:
    return _collect("urlpatterns")


def async_routes() -> list[Route]:
    return _collect("ASYNC_ROUTES")


def websocket_routes() -> list[Any]:
    return _collect("WEBSOCKET_ROUTES")
