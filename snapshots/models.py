"""Rows of snapshots: what was taken of which devbox, where its bytes are, and which hosts have a copy.

In charge of columns, constraints and indexes. A row that exists is changed by its flow and by the guarded UPDATEs of
`snapshots.services` alone.
"""

from __future__ import annotations

from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from flows.models import Durable
from snapshots import states


class DiskSnapshot(Durable):
    """A copy of a devbox's disk, kept in S3 as the change against the disk's image."""

    account = models.ForeignKey("accounts.Account", on_delete=models.PROTECT, related_name="+", db_index=False)
    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.PROTECT, related_name="snapshots")
    own_turn = models.IntegerField(
        null=True,
        blank=True,
        help_text="Set: not a user's, but what follows its suspended devbox to S3, in that sleep.",
    )
    name = models.TextField(blank=True, default="")
    commit_message = models.TextField(blank=True, default="")
    metadata = models.JSONField(default=dict, blank=True)
    public = models.BooleanField(default=False, db_default=False, help_text="Every account may create from it.")
    status = models.TextField(choices=[(status, status) for status in states.STATUSES], default=states.IN_PROGRESS)
    error_kind = models.TextField(blank=True, default="", db_default="")
    error_message = models.TextField(blank=True, default="", db_default="")

    host = models.ForeignKey("hosts.Host", on_delete=models.PROTECT, related_name="+", db_index=False)
    image_id = models.TextField(blank=True, default="", db_default="")
    base_bytes = models.BigIntegerField(default=0, db_default=0, help_text="What the devbox's disk was cloned with.")
    launch_parameters = models.JSONField(default=dict, help_text="Of its devbox: what a copy is like unless told.")
    size_bytes = models.BigIntegerField(null=True, blank=True, help_text="Of the disk, beyond its image.")
    freeze_ms = models.FloatField(null=True, blank=True, help_text="How long the devbox stood still for it.")
    frozen = models.BooleanField(null=True, blank=True, help_text="Whether its devbox came to a halt for it.")
    taken_at = models.DateTimeField(null=True, blank=True)

    upload = models.JSONField(null=True, blank=True, help_text="How far it has come on its way to S3.")
    sent_bytes = models.BigIntegerField(default=0, db_default=0)
    object_key = models.TextField(blank=True, default="", db_default="")
    object_size = models.BigIntegerField(null=True, blank=True)
    sha256 = models.TextField(blank=True, default="", db_default="", help_text="The seal: of its parts' digests.")
    part_bytes = models.IntegerField(default=0, db_default=0)
    verified_parts = models.IntegerField(default=0, db_default=0, help_text="How many parts were read back.")
    stored_at = models.DateTimeField(null=True, blank=True, help_text="When all of it had been read back from S3.")

    class Meta(Durable.Meta):
        verbose_name = "snapshot"
        indexes = [
            *Durable.Meta.indexes,
            models.Index(
                "account", models.F("created_at").desc(), models.F("id").desc(), name="snapshots_disksnapshot_list"
            ),
            models.Index(
                models.F("created_at").desc(),
                models.F("id").desc(),
                condition=Q(public=True),
                name="snapshots_disksnapshot_public",
            ),
            GinIndex(fields=["metadata"], opclasses=["jsonb_path_ops"], name="snapshots_disksnapshot_meta"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["devbox", "own_turn"],
                condition=Q(own_turn__isnull=False, status__in=[states.IN_PROGRESS, states.COMPLETE]),
                name="snapshots_disksnapshot_own_once",
            ),
            models.CheckConstraint(condition=Q(step__in=list(states.STATUS)), name="snapshots_disksnapshot_step"),
            models.CheckConstraint(condition=Q(status__in=states.STATUSES), name="snapshots_disksnapshot_status"),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})" if self.name else self.id


class DiskSnapshotHost(models.Model):
    """A host that has a copy of the snapshot, as far as we know; its reports put it right."""

    snapshot = models.ForeignKey(DiskSnapshot, on_delete=models.CASCADE, related_name="hosts")
    host = models.ForeignKey("hosts.Host", on_delete=models.CASCADE, related_name="+")
    at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [models.UniqueConstraint(fields=["snapshot", "host"], name="snapshots_host_once")]

    def __str__(self) -> str:
        return f"{self.snapshot_id} on {self.host_id}"
