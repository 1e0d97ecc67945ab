"""SSH keys in the admin: to look at, and to delete, which closes that door."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from ssh_access.models import HostKey, SshKey


class _LookOnly(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    def has_add_permission(self, request: HttpRequest) -> bool:
        """Made by us only."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nothing of one changes."""
        return False


@admin.register(SshKey)
class SshKeyAdmin(_LookOnly):
    """Who can reach which devbox until when."""

    list_display = ("id", "devbox", "account_id", "created_at", "expires_at")
    list_select_related = ("devbox",)
    search_fields = ("id", "devbox__id", "account_id")
    ordering = ("-id",)
    exclude = ("public_sha256",)


@admin.register(HostKey)
class HostKeyAdmin(_LookOnly):
    """What users compare when their client meets the SSH service for the first time."""

    list_display = ("public", "created_at")
    exclude = ("private_sealed",)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Every client would be warned of an attack."""
        return False
