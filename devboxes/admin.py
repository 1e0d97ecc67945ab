"""Devboxes in the admin: to look at, to search, and to shut down. The flow and the services are the only writers."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from unfold.admin import ModelAdmin, TabularInline

from devboxes import services
from devboxes.models import Devbox, DevboxLog, DevboxTransition

SEALED = ("environment_sealed", "mounts_sealed")


def link_to(thing: Model | None, text: str | None = None) -> str:
    """The thing's admin page as a link, or its text where it has none."""
    if thing is None:
        return "–"
    if not admin.site.is_registered(type(thing)):
        return text or str(thing)
    name = f"admin:{thing._meta.app_label}_{thing._meta.model_name}_change"
    return format_html('<a href="{}">{}</a>', reverse(name, args=[thing.pk]), text or str(thing))


class _Seen:
    """Rows that are only looked at."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """They are made by the product."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """They are its memory."""
        return False


class TransitionInline(_Seen, TabularInline):  # type: ignore[misc]  # unfold brings no types
    """The statuses a devbox reached."""

    model = DevboxTransition
    fields = readonly_fields = ("status", "at", "failure_reason")
    extra = 0


@admin.register(Devbox)
class DevboxAdmin(_Seen, ModelAdmin):  # type: ignore[misc]
    """Devboxes, newest first. What its user gave as secrets is not shown."""

    list_display = ("id", "name", "status", "step", "of_account", "on_host", "size", "created_at", "why_short")
    list_filter = ("status", "step", "host", "failure_reason", "shutdown_reason")
    list_select_related = ("account", "host")
    search_fields = ("id", "name", "account__id", "account__name", "host__name", "host__id", "slot", "address")
    ordering = ("-created_at", "-id")
    show_full_result_count = False
    actions = ("shut_down",)
    inlines = (TransitionInline,)
    readonly_fields = ("terminal",)
    exclude = SEALED

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Never: a row that was edited by hand would be a lie about its box, and even a form without a field saves the
        whole row, over what the flow wrote meanwhile."""
        return False

    @admin.action(description="Shut down devbox")
    def shut_down(self, request: HttpRequest, devboxes: QuerySet[Devbox]) -> None:
        """End the chosen devboxes as their users could."""
        ids = list(devboxes.values_list("pk", flat=True))
        why = f"the operator {request.user} shut it down"
        count = sum(services.request_shutdown(devbox_id, why=why) for devbox_id in ids)
        messages.success(request, f"{count} of {len(ids)} shut down; the others were over already")

    @admin.display(description="terminal")
    def terminal(self, devbox: Devbox) -> str:
        """The way to its web terminal while it runs."""
        if devbox.status != "running":
            return "–"
        return format_html('<a href="{}">open in this browser</a>', reverse("web_terminal", args=[devbox.pk]))

    @admin.display(description="account", ordering="account__name")
    def of_account(self, devbox: Devbox) -> str:
        """Whose it is."""
        return link_to(devbox.account, devbox.account.name)

    @admin.display(description="host", ordering="host__name")
    def on_host(self, devbox: Devbox) -> str:
        """Where it is."""
        return link_to(devbox.host, devbox.host.name if devbox.host else None)

    @admin.display(description="size")
    def size(self, devbox: Devbox) -> str:
        """CPU, memory and disk."""
        return f"{devbox.cpu_millis / 1000:g} CPU, {devbox.memory_mb / 1024:g} + {devbox.disk_mb / 1024:g} GiB"

    @admin.display(description="why")
    def why_short(self, devbox: Devbox) -> str:
        """The beginning of the cause of its end, or of its present trouble."""
        return (devbox.why or devbox.error_detail or "")[:100]


class _OfDevbox(_Seen, ModelAdmin):  # type: ignore[misc]
    list_select_related = ("devbox",)
    ordering = ("-id",)
    show_full_result_count = False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Looked at only."""
        return False

    @admin.display(description="devbox", ordering="devbox_id")
    def of_devbox(self, line: Any) -> str:
        """Whose line it is."""
        return link_to(line.devbox, line.devbox_id)


@admin.register(DevboxTransition)
class TransitionAdmin(_OfDevbox):
    """All status changes."""

    list_display = ("id", "of_devbox", "status", "at", "failure_reason")
    list_filter = ("status", "failure_reason")
    search_fields = ("devbox__id", "devbox__name")


@admin.register(DevboxLog)
class LogAdmin(_OfDevbox):
    """All entries about launch work and entrypoints."""

    list_display = ("id", "of_devbox", "at", "source", "level", "short", "exit_code")
    list_filter = ("source", "level")
    search_fields = ("devbox__id", "devbox__name", "execution_id", "cmd", "message")

    @admin.display(description="entry")
    def short(self, entry: DevboxLog) -> str:
        """The beginning of the command or the line."""
        return (entry.cmd or entry.message or "")[:120]
