"""The execution's row: a command, where it is in its life, how it ended and where its output is.

In charge of columns and constraints only. Rows are made by `executions.services`, worked on by
`executions.execution_flow` and completed by whoever first hears of the end; nobody calls `.save()` on one.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from flows.models import Durable


class Status(models.TextChoices):
    """What the API says. queued -> running -> completed; a quick command goes from queued to completed."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"


class Kept(models.TextChoices):
    """Where the output is.

    host -> row (small, it came with the exit) | store (large, copied to S3) | nowhere (its box ended before that).
    """

    HOST = "host"
    ROW = "row"
    STORE = "store"
    NOWHERE = "nowhere"


class Execution(Durable):
    """One command in a devbox.

    In a named shell: await_turn, and then as any other.
    Steps: spawn -> await_exit -> done, or -> store -> forget -> done when the output is too large for the row. A
    requested stop goes through kill. `completed_at` is set when the command has ended, before its output is stored.

    The columns about the user and the host are copied from the devbox at the beginning: they cannot change while the
    command runs, and its steps then need no second row.
    """

    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.PROTECT, db_index=False, related_name="executions")
    # No constraint on these two: each execution would lock the host's and the account's row.
    account_id = models.TextField()
    host = models.ForeignKey(
        "hosts.Host", on_delete=models.DO_NOTHING, db_constraint=False, db_index=False, related_name="+"
    )

    command_id = models.TextField(null=True, blank=True, help_text="The caller's own id, unique in its devbox.")
    request_key = models.TextField(null=True, blank=True, help_text="Operation and x-request-id, for repetitions.")
    command = models.TextField()
    shell_name = models.TextField(null=True, blank=True)
    shell_place = models.BigIntegerField(null=True, blank=True, help_text="Its place in the line of its shell.")
    attach_stdin = models.BooleanField(db_default=False)
    user_name = models.TextField()
    user_uid = models.PositiveBigIntegerField()
    user_home = models.TextField()

    status = models.TextField(choices=Status.choices, default=Status.QUEUED, db_default=Status.QUEUED)
    stop_why = models.TextField(null=True, blank=True, help_text="Who wants it stopped; null: nobody.")
    stop_group = models.BooleanField(db_default=False)
    stop_by = models.JSONField(null=True, blank=True, help_text="Key and member that asked for the stop, and when.")
    exit_status = models.IntegerField(null=True, blank=True)
    reason = models.JSONField(null=True, blank=True, help_text="Why it ended, when the exit status does not tell.")
    # When what happened. created_at, completed_at and stored_at are by the database's clock, placed_at is by the
    # worker's, the others by the host's; null where nobody can tell.
    worker = models.TextField(null=True, blank=True, help_text="The worker that had it started.")
    placed_at = models.DateTimeField(null=True, blank=True, help_text="When that worker took it up.")
    started_at = models.DateTimeField(null=True, blank=True)
    first_byte_at = models.DateTimeField(null=True, blank=True, help_text="When its first byte of output came.")
    exited_at = models.DateTimeField(null=True, blank=True)
    stored_at = models.DateTimeField(null=True, blank=True, help_text="When its output was where it is kept.")

    kept = models.TextField(choices=Kept.choices, default=Kept.HOST, db_default=Kept.HOST)
    stdout = models.BinaryField(null=True, blank=True)
    stderr = models.BinaryField(null=True, blank=True)
    out_size = models.BigIntegerField(db_default=0)
    err_size = models.BigIntegerField(db_default=0)
    out_dropped = models.BigIntegerField(db_default=0, help_text="Bytes the host did not keep.")
    err_dropped = models.BigIntegerField(db_default=0)
    # The middle of an output that was too long: where in the stream it began. Head and tail are stored as one object.
    out_hole = models.BigIntegerField(null=True, blank=True)
    err_hole = models.BigIntegerField(null=True, blank=True)
    upload = models.JSONField(null=True, blank=True, help_text="How far the copy to S3 has come.")
    # As hostd.messages.INDEX_RECORD describes it: what a log's lines get their times from.
    output_index = models.BinaryField(null=True, blank=True, help_text="When the output came.")

    class Meta(Durable.Meta):
        abstract = False
        indexes = [
            *Durable.Meta.indexes,
            # Caps and what is expected on a host count open rows only; the list of one devbox's open ones as well.
            models.Index(
                fields=["account_id", "devbox", "id"], condition=Q(completed_at__isnull=True), name="executions_open"
            ),
            # The list of a devbox, newest first: ids sort by creation.
            models.Index(fields=["devbox", "id"], name="executions_list"),
            # Whose turn it is.
            models.Index(
                fields=["devbox", "shell_name", "shell_place"],
                condition=Q(completed_at__isnull=True, shell_name__isnull=False),
                name="executions_line",
            ),
            models.Index(
                fields=["devbox", "shell_name", "id"], condition=Q(shell_name__isnull=False), name="executions_shell"
            ),
        ]
        constraints = [
            models.UniqueConstraint(fields=["devbox", "command_id"], name="executions_command_once"),
            models.UniqueConstraint(
                fields=["devbox", "request_key"],
                condition=Q(request_key__isnull=False),
                name="executions_request_once",
            ),
            models.CheckConstraint(
                condition=Q(status="completed", completed_at__isnull=False, exit_status__isnull=False)
                | Q(~Q(status="completed"), completed_at__isnull=True),
                name="executions_completed_has_exit",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.id}: {self.command[:60]}"


class ShellLine(models.Model):
    """The line before a named shell of a devbox: the last place that was given out in it."""

    devbox = models.ForeignKey("devboxes.Devbox", on_delete=models.CASCADE, db_index=False, related_name="shell_lines")
    name = models.TextField()
    last_place = models.BigIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["devbox", "name"], name="executions_shellline_once")]

    def __str__(self) -> str:
        return f"{self.name} in {self.devbox_id}"
