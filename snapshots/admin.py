"""Snapshots in the admin: to look at, and to make public or not; all else is the flow's and its user's."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from snapshots.models import DiskSnapshot, DiskSnapshotHost


@admin.register(DiskSnapshot)
class DiskSnapshotAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """A read-only list of snapshots."""

    list_display = ("id", "name", "account", "devbox", "status", "public", "size_bytes", "step", "created_at")
    list_filter = ("status", "public", "step")
    list_select_related = ("account", "devbox")
    search_fields = ("id", "name", "devbox__id", "account__id")
    ordering = ("-id",)
    show_full_result_count = False
    exclude = ("upload",)
    actions = ("make_public", "make_private")

    @admin.action(description="Let every account create from them")
    def make_public(self, request: HttpRequest, queryset: QuerySet[DiskSnapshot]) -> None:
        """Mark them as public."""
        queryset.update(public=True)

    @admin.action(description="Keep them to their own account")
    def make_private(self, request: HttpRequest, queryset: QuerySet[DiskSnapshot]) -> None:
        """Mark them as not public."""
        queryset.update(public=False)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Only the list's actions: the flow is the writer."""
        return obj is None

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Snapshots are taken through the API."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A deleted row would leave its bytes behind."""
        return False


@admin.register(DiskSnapshotHost)
class DiskSnapshotHostAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """A read-only list of the hosts that have copies."""

    list_display = ("snapshot", "host", "at")
    list_select_related = ("snapshot", "host")
    search_fields = ("snapshot__id", "host__id", "host__name")
    ordering = ("-id",)
    show_full_result_count = False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Hosts' own reports put it right."""
        return False

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Hosts' own reports put it right."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Hosts' own reports put it right."""
        return False
