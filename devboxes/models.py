"""The devbox's rows: what is wanted, what we do, what its host said, and what its user may read afterwards.

In charge of: columns, constraints and indexes. Not in charge of: changing a row that exists, which is the flow's and
the services' business, by guarded UPDATEs only.
"""

from django.contrib.postgres.indexes import GinIndex
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from devboxes import states
from flows.models import Durable


class Devbox(Durable):
    """A devbox. `wants` is the intent, `step` and `status` what we do about it, `seen` what the host last said."""

    class Wants(models.TextChoices):
        RUNNING = "running"
        SUSPENDED = "suspended"
        SHUTDOWN = "shutdown"

    account = models.ForeignKey("accounts.Account", on_delete=models.PROTECT, related_name="devboxes", db_index=False)
    name = models.TextField(blank=True, default="")
    metadata = models.JSONField(default=dict, blank=True)

    wants = models.TextField(choices=Wants.choices, default=Wants.RUNNING)
    status = models.TextField(
        choices=[(status, status) for status in states.STATUSES], default=states.STATUS[states.PLACE]
    )
    seen = models.TextField(blank=True, default="", help_text="What its host last said of its box.")
    seen_at = models.DateTimeField(null=True, blank=True)

    host = models.ForeignKey("hosts.Host", on_delete=models.PROTECT, related_name="devboxes", null=True, blank=True)
    reserved = models.BooleanField(default=False, help_text="Its size is promised to it on its host.")
    compute_reserved = models.BooleanField(
        db_default=True, default=True, help_text="CPU and memory, too, are promised to it: not while it is suspended."
    )
    slot = models.TextField(blank=True, default="", help_text="Its name on the host.")
    address = models.TextField(blank=True, default="")
    machine_id = models.TextField(blank=True, db_default="", default="", help_text="What its /etc/machine-id says.")
    image_id = models.TextField(blank=True, default="")
    snapshot_id = models.TextField(null=True, blank=True, help_text="What its disk was made of, if not of the image.")
    source_bytes = models.BigIntegerField(
        default=0, db_default=0, help_text="What its disk was made with beyond the image: counted as used."
    )
    architecture = models.TextField(default="x86_64")
    cpu_millis = models.IntegerField()
    memory_mb = models.IntegerField()
    disk_mb = models.IntegerField()

    launch_parameters = models.JSONField(default=dict, help_text="What was asked for, as the API shows it.")
    environment_sealed = models.BinaryField(null=True, blank=True)
    mounts_sealed = models.BinaryField(null=True, blank=True)
    launch_commands = models.JSONField(default=list, blank=True)
    entrypoint = models.TextField(blank=True, default="")
    user_name = models.TextField(default="user")
    user_uid = models.IntegerField(default=1000)
    user_home = models.TextField(default="/home/user")

    keep_alive_seconds = models.IntegerField()
    end_at = models.DateTimeField(null=True, blank=True, help_text="When its keep-alive time is over.")
    host_clock_at_start = models.FloatField(
        null=True, blank=True, help_text="Its host's monotonic clock when it began to run, in seconds."
    )
    idle_seconds = models.IntegerField(null=True, blank=True, help_text="After so long unused, `on_idle` is done.")
    on_idle = models.TextField(blank=True, db_default="", default="", help_text="shutdown or suspend")
    clock_offset = models.FloatField(
        null=True, blank=True, help_text="From its host's monotonic clock to the database's, in seconds, if compared."
    )
    save_id = models.TextField(blank=True, db_default="", default="", help_text="The copy that follows its disk to S3.")
    stored_at = models.DateTimeField(null=True, blank=True, help_text="When its disk was in S3, while it is suspended.")
    starts = models.IntegerField(db_default=0, default=0, help_text="How often it was started again.")
    launch_total = models.IntegerField(default=0, help_text="How many pieces of launch work it has.")
    launch_index = models.IntegerField(default=0, help_text="How many pieces of its launch work are done.")
    launch_items = models.JSONField(default=list, blank=True, help_text="What became of each piece of launch work.")
    placed_at = models.DateTimeField(null=True, blank=True, help_text="When a host was found for it.")
    disk_at = models.DateTimeField(null=True, blank=True, help_text="When its disk was made.")
    booted_at = models.DateTimeField(null=True, blank=True, help_text="When its box was up.")
    started_at = models.DateTimeField(null=True, blank=True, help_text="When it was last started.")
    suspended_at = models.DateTimeField(null=True, blank=True, help_text="When it was last suspended.")
    last_activity_at = models.DateTimeField(null=True, blank=True)
    last_activity_kind = models.TextField(blank=True, db_default="", default="", help_text="What it was last used as.")

    ended_at = models.DateTimeField(null=True, blank=True, help_text="When its final status was decided.")
    failure_reason = models.TextField(null=True, blank=True)
    shutdown_reason = models.TextField(null=True, blank=True)
    why = models.TextField(blank=True, default="", help_text="Why it ended, was suspended or started again, in words.")
    cause = models.JSONField(null=True, blank=True, help_text="The same: its kind, and the evidence.")

    initiator_type = models.TextField(default="api")
    initiator_id = models.TextField(blank=True, default="", help_text="The API key that made it.")

    class Meta(Durable.Meta):
        verbose_name_plural = "devboxes"
        indexes = [
            *Durable.Meta.indexes,
            # The list, newest first; and the short list of what is not over yet, for filters by status and for caps.
            models.Index("account", models.F("created_at").desc(), models.F("id").desc(), name="devboxes_devbox_list"),
            models.Index(
                "account",
                models.F("created_at").desc(),
                models.F("id").desc(),
                condition=Q(ended_at__isnull=True),
                name="devboxes_devbox_live",
            ),
            GinIndex(fields=["metadata"], opclasses=["jsonb_path_ops"], name="devboxes_devbox_metadata"),
            models.Index(fields=["snapshot_id"], condition=Q(snapshot_id__isnull=False), name="devboxes_devbox_origin"),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(step__in=list(states.STATUS)), name="devboxes_devbox_step"),
            models.CheckConstraint(condition=Q(status__in=states.STATUSES), name="devboxes_devbox_status"),
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})" if self.name else self.id


class DevboxTransition(models.Model):
    """A public status that a devbox reached. Written in the transaction that changed the status."""

    devbox = models.ForeignKey(Devbox, on_delete=models.CASCADE, related_name="transitions")
    status = models.TextField()
    at = models.DateTimeField(db_default=Now())
    failure_reason = models.TextField(null=True, blank=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.status} at {self.at:%F %T}"


class DevboxLog(models.Model):
    """An entry of a devbox's log: something that happened, or a piece of its launch work (`started_at` is set) with the
    end of its output and when that came. Executions keep their output themselves."""

    devbox = models.ForeignKey(Devbox, on_delete=models.CASCADE, db_index=False, related_name="logs")
    at = models.DateTimeField(db_default=Now())
    written_at = models.DateTimeField(db_default=Now(), editable=False)
    source = models.TextField(help_text="setup_commands, entrypoint, exec, files, stats or kmsg")
    level = models.TextField(default="info")
    execution_id = models.TextField(blank=True, default="")
    shell_name = models.TextField(blank=True, db_default="", default="")
    cmd = models.TextField(null=True, blank=True)
    message = models.TextField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    notice_id = models.TextField(null=True, blank=True, help_text="What its host told it as.")

    started_at = models.DateTimeField(null=True, blank=True)
    stdout = models.BinaryField(null=True, blank=True, help_text="The end of it; out_size is the size of the whole.")
    stderr = models.BinaryField(null=True, blank=True)
    out_size = models.BigIntegerField(db_default=0, default=0)
    err_size = models.BigIntegerField(db_default=0, default=0)
    # As hostd.messages.INDEX_RECORD describes it.
    output_index = models.BinaryField(null=True, blank=True, help_text="When the output came.")

    class Meta:
        ordering = ["id"]
        indexes = [
            models.Index("devbox", "at", "id", name="devboxes_devboxlog_list"),
            models.Index("devbox", "written_at", name="devboxes_devboxlog_new"),
            models.Index("at", name="devboxes_devboxlog_old"),
        ]
        constraints = [models.UniqueConstraint(fields=["notice_id"], name="devboxes_devboxlog_notice_once")]

    def __str__(self) -> str:
        return f"{self.source}: {self.message or self.cmd or self.exit_code}"
