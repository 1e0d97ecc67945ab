"""Honoured request ids in the admin, to look at."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from api.models import IdempotencyRecord


@admin.register(IdempotencyRecord)
class IdempotencyRecordAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    list_display = ("request_id", "route_key", "object_id", "account_id", "created_at")
    search_fields = ("request_id", "object_id", "account_id")
    exclude = ("body_sha256",)
    ordering = ("-created_at",)
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
