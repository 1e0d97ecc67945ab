"""Hosts in the admin: looked at, searched, cordoned. Nothing about how they are reached can be changed here."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin

from hosts.models import Host, WatcherReplica
from hosts.policy import policy
from hosts.services import cordon

_CHANGEABLE = ("overcommit_cpu", "overcommit_memory", "overcommit_disk", "warm")
_SECRET = ("admin_key_sealed", "link_key_sealed")


@admin.register(Host)
class HostAdmin(ModelAdmin):  # type: ignore[misc]  # unfold brings no types
    """Made and unmade by `enrol_host` and `retire_host` alone."""

    list_display = ("name", "id", "state", "cordoned", "heard", "cpu", "memory", "disk", "digest_short")
    list_filter = ("state", "cordoned", "architecture")
    search_fields = ("id", "name", "address")
    actions = ("cordon_hosts", "uncordon_hosts")
    exclude = _SECRET

    def get_readonly_fields(self, request: HttpRequest, obj: Host | None = None) -> list[str]:
        """All but how often it may be promised and how many boxes it keeps ready."""
        return [f.name for f in Host._meta.fields if f.name not in _CHANGEABLE and f.name not in _SECRET]

    def has_add_permission(self, request: HttpRequest) -> bool:
        """A host is enrolled, not typed in."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A host is retired; its row stays."""
        return False

    def save_model(self, request: HttpRequest, obj: Host, form: Any, change: bool) -> None:
        """Only the columns that may be changed: the flows and the watcher write the others meanwhile."""
        Host.objects.filter(pk=obj.pk).update(**{name: getattr(obj, name) for name in _CHANGEABLE})

    @admin.display(description="heard", ordering="seen_at")
    def heard(self, host: Host) -> str:
        """How long ago, and whether that counts as silence."""
        if host.seen_at is None:
            return "never"
        age = (timezone.now() - host.seen_at).total_seconds()
        return f"{age:.0f} s ago{', silent' if age > policy().silent_after else ''}"

    @admin.display(description="CPUs promised")
    def cpu(self, host: Host) -> str:
        """Promised of what there is."""
        return f"{host.used_cpu_millis / 1000:g} of {host.cpu_millis / 1000:g}"

    @admin.display(description="GiB memory promised")
    def memory(self, host: Host) -> str:
        """Promised of what there is."""
        return f"{host.used_memory_mb / 1024:.1f} of {host.memory_mb / 1024:.1f}"

    @admin.display(description="GiB disk promised")
    def disk(self, host: Host) -> str:
        """Promised of what there is."""
        return f"{host.used_disk_mb / 1024:.1f} of {host.disk_mb / 1024:.1f}"

    @admin.display(description="hostd", ordering="digest")
    def digest_short(self, host: Host) -> str:
        """The beginning of the bundle's digest."""
        return host.digest[:12]

    @admin.action(description="Cordon host: no new devboxes there")
    def cordon_hosts(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        """Devboxes that are there go on."""
        changed = cordon(list(queryset.values_list("pk", flat=True)))
        self.message_user(request, f"{changed} hosts are cordoned", messages.SUCCESS)

    @admin.action(description="Uncordon host")
    def uncordon_hosts(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        """Placements go there again."""
        changed = cordon(list(queryset.values_list("pk", flat=True)), cordoned=False)
        self.message_user(request, f"{changed} hosts are open again", messages.SUCCESS)


@admin.register(WatcherReplica)
class WatcherReplicaAdmin(ModelAdmin):  # type: ignore[misc]
    """To look at."""

    list_display = ("id", "until")
    search_fields = ("id",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        """They write themselves down."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """They renew themselves."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """They strike themselves out."""
        return False
