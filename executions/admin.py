"""Executions in the admin: to look at and to search, never to edit; the flow is the only writer."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from executions import endings
from executions.models import Execution, ShellLine


@admin.register(Execution)
class ExecutionAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """A read-only list of commands."""

    list_display = ("id", "devbox", "short_command", "status", "exit_status", "step", "created_at", "completed_at")
    list_filter = ("status", "step", "kept")
    list_select_related = ("devbox",)
    search_fields = ("id", "devbox__id", "account_id", "command_id")
    ordering = ("-id",)
    show_full_result_count = False
    # Outputs are the tenant's and may be large; what a command printed is read through the API.
    exclude = ("stdout", "stderr", "upload")
    readonly_fields = ("why",)

    @admin.display(description="command")
    def short_command(self, execution: Execution) -> str:
        """The beginning of the command."""
        return execution.command[:80]

    @admin.display(description="why")
    def why(self, execution: Execution) -> str:
        """The cause of its end, in words."""
        return endings.why(execution.reason) or ""

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """The flow is the only writer."""
        return False

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Commands are run through the API."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Rows go with their devbox."""
        return False


@admin.register(ShellLine)
class ShellLineAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """A read-only list of the named shells that were used."""

    list_display = ("name", "devbox", "last_place")
    list_select_related = ("devbox",)
    search_fields = ("name", "devbox__id")
    ordering = ("-id",)
    show_full_result_count = False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Places are given out by the statement that makes a command."""
        return False

    def has_add_permission(self, request: HttpRequest) -> bool:
        """A line is made with its first command."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Lines go with their devbox."""
        return False
