"""What the frame itself keeps: which request made which object."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class IdempotencyRecord(models.Model):
    """A request id that has been honoured. Written in the transaction that made the object; good for 24 h."""

    account_id = models.TextField()
    route_key = models.TextField()
    request_id = models.TextField()
    body_sha256 = models.BinaryField()
    object_id = models.TextField()
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["account_id", "route_key", "request_id"], name="api_idempotency_once")
        ]
        indexes = [models.Index(fields=["created_at"], name="api_idempotency_age")]

    def __str__(self) -> str:
        return f"{self.request_id} made {self.object_id}"
