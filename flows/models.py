"""The columns that every durable row carries.

In charge of: the abstract model `Durable` and its key field. Not in charge of: who may write these columns, which is
`flows.engine` alone once the row exists (never `.save()`), and the columns of a domain.

A concrete table also wants `ALTER TABLE … SET (fillfactor = 70)` in its first migration: claim and settle touch no
indexed column but `wake_at`, and room on the page keeps most of the other updates off the indexes.
"""

from typing import Any

from django.db import models
from django.db.models.functions import Now


class IdField(models.TextField[str, str]):
    """A prefixed, sortable id.

    The column is `character varying` (the same thing as `text`) because Django gives every unique `text` column a
    second index for LIKE, which nothing here ever uses and every insert would pay for.
    """

    def db_type(self, connection: Any) -> str:
        return "character varying"

    def cast_db_type(self, connection: Any) -> str:
        return "character varying"


class Durable(models.Model):
    """A thing that is worked on until it is done: the row is the work, a message only a nudge.

    `wake_at` is when the row is next due (null: never again); `lease`, `lease_until` who works on it; `fence` rises
    with every claim and every request, and goes along with every verb to a host; `wakes` counts wakes, so that one
    which comes during a step is not lost; `attempts` counts failures of the present step; past `deadline_at` the flow
    is asked to give up.
    """

    id = IdField(primary_key=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    completed_at = models.DateTimeField(null=True, blank=True, editable=False)
    step = models.TextField()
    step_since = models.DateTimeField(db_default=Now(), editable=False)
    attempts = models.IntegerField(db_default=0, editable=False)
    wake_at = models.DateTimeField(null=True, blank=True, db_default=Now(), editable=False)
    wakes = models.IntegerField(db_default=0, editable=False)
    lease = models.TextField(null=True, blank=True, editable=False)
    lease_until = models.DateTimeField(null=True, blank=True, editable=False)
    fence = models.BigIntegerField(db_default=0, editable=False)
    deadline_at = models.DateTimeField(null=True, blank=True, editable=False)
    error_code = models.TextField(null=True, blank=True, editable=False)
    error_detail = models.TextField(null=True, blank=True, editable=False)

    class Meta:
        abstract = True
        indexes = [
            models.Index(
                fields=["wake_at"],
                condition=models.Q(wake_at__isnull=False),
                name="%(app_label)s_%(class)s_due",
            )
        ]
