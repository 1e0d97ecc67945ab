"""Tunnels in the admin: to look at, and to delete, which closes them within a second."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from tunnels.models import Tunnel


@admin.register(Tunnel)
class TunnelAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """Which devboxes can be reached from outside, and how."""

    list_display = ("id", "devbox", "is_open", "http_keep_alive", "wake_on_http", "created_at")
    list_select_related = ("devbox",)
    search_fields = ("id", "devbox__id", "devbox__account__id")
    ordering = ("-id",)
    exclude = ("sealed", "key_sha256", "token_sha256")

    @admin.display(boolean=True, description="open to who knows the key")
    def is_open(self, tunnel: Tunnel) -> bool:
        return tunnel.token_sha256 is None

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Made by the API only."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nothing of one changes."""
        return False
