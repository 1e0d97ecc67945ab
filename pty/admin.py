"""Keys to terminals in the admin: to look at, and to delete, which closes that door at once."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from pty.models import PtyTunnel, WebTicket


@admin.register(PtyTunnel)
class PtyTunnelAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """Who can reach which terminals until when."""

    list_display = ("id", "devbox", "account_id", "created_at", "expires_at")
    list_select_related = ("devbox",)
    search_fields = ("id", "devbox__id", "account_id")
    ordering = ("-id",)
    exclude = ("key_sha256", "token_sha256")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Made by the API only."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nothing of one changes."""
        return False


@admin.register(WebTicket)
class WebTicketAdmin(ModelAdmin):  # type: ignore[misc]
    """Tickets of the web terminal that were not used."""

    list_display = ("id", "devbox", "user", "expires_at")
    list_select_related = ("devbox", "user")
    search_fields = ("devbox__id", "user__username")
    ordering = ("-id",)
    exclude = ("ticket_sha256",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Made by the page only."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nothing of one changes."""
        return False
