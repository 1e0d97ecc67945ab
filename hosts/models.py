"""The host's row: how it is reached, what it has, what of it is promised, and when it was last heard.

In charge of columns and constraints only. Reservations are written by `hosts.placement`, observations by
`hosts.watcher`, enrolment by `hosts.services`; nobody calls `.save()` on a row that exists.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from flows.models import Durable


class HostState(models.TextChoices):
    """Where a host is in its life.

    enrolling -> ready -> retiring -> retired; enrolling -> failed -> enrolling (enrolled again by hand).
    Only `ready` gets placements; `retiring` serves what it has until it is empty.
    """

    ENROLLING = "enrolling"
    READY = "ready"
    RETIRING = "retiring"
    RETIRED = "retired"
    FAILED = "failed"


class Host(Durable):
    """A VM host: one row per (cluster, machine, install)."""

    name = models.TextField()
    state = models.TextField(choices=HostState.choices, default=HostState.ENROLLING)
    cordoned = models.BooleanField(default=False, help_text="No new devboxes are placed here; those it has go on.")

    # How it is reached. The admin login is used by enrolment, retirement and to start a dead hostd; the link login
    # can reach one Unix socket and nothing else.
    address = models.TextField()
    port = models.PositiveIntegerField(default=22)
    host_key = models.TextField(help_text='The pinned host key, "type base64".')
    admin_user = models.TextField()
    admin_key_sealed = models.BinaryField()
    link_user = models.TextField(blank=True, default="")
    link_key_sealed = models.BinaryField(null=True)

    # Where hostd lives on it.
    install = models.PositiveSmallIntegerField(default=0)
    root = models.TextField(blank=True, default="")
    run_dir = models.TextField(blank=True, default="")
    socket_path = models.TextField(blank=True, default="")
    digest = models.TextField(blank=True, default="", help_text="sha256 of the hostd bundle it runs.")
    image_id = models.TextField(blank=True, default="")
    architecture = models.TextField(default="x86_64")
    boot_id = models.TextField(blank=True, default="")
    warm = models.PositiveIntegerField(default=0, help_text="Boxes hostd keeps ready ahead of need.")

    # What it has.
    cpu_millis = models.BigIntegerField(default=0)
    memory_mb = models.BigIntegerField(default=0)
    disk_mb = models.BigIntegerField(default=0)

    # How often each may be promised; null: the setting.
    overcommit_cpu = models.FloatField(null=True, blank=True)
    overcommit_memory = models.FloatField(null=True, blank=True)
    overcommit_disk = models.FloatField(null=True, blank=True)

    # What of it is promised (guarded reservations; corrected by nobody else).
    used_cpu_millis = models.BigIntegerField(default=0)
    used_memory_mb = models.BigIntegerField(default=0)
    used_disk_mb = models.BigIntegerField(default=0)

    # What it last said.
    seen_at = models.DateTimeField(null=True, blank=True)
    memory_free_mb = models.BigIntegerField(null=True, blank=True)
    pool_free_mb = models.BigIntegerField(null=True, blank=True)
    lost_at = models.DateTimeField(
        null=True, blank=True, help_text="When its silence passed LOST_AFTER and its work was declared lost."
    )

    # Which watcher replica holds its event channel. Apart from the flow's lease: both run at the same time.
    watcher = models.TextField(blank=True, default="")
    watcher_until = models.DateTimeField(null=True, blank=True)

    class Meta(Durable.Meta):
        ordering = ["name"]
        constraints = [
            models.UniqueConstraint(name="host_name_once", fields=["name"], condition=~Q(state="retired")),
            models.CheckConstraint(
                name="host_promises_not_negative",
                condition=Q(used_cpu_millis__gte=0) & Q(used_memory_mb__gte=0) & Q(used_disk_mb__gte=0),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"


class WatcherReplica(models.Model):
    """A watcher that runs: how many there are decides how many hosts each may hold."""

    id = models.TextField(primary_key=True)
    until = models.DateTimeField()

    def __str__(self) -> str:
        return self.id
