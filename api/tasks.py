"""Periodic clean-up of the frame's own rows."""

from __future__ import annotations

from celery import shared_task
from django.db import connection

from api.idempotency import KEPT_HOURS

BATCH = 5000


@shared_task(name="api.purge_requests", ignore_result=True)
def purge_requests() -> int:
    """Delete honoured request ids that have expired, in batches; how many."""
    gone = 0
    while True:
        with connection.cursor() as cursor:
            cursor.execute(
                f"DELETE FROM api_idempotencyrecord WHERE id IN (SELECT id FROM api_idempotencyrecord "
                f"WHERE created_at < now() - interval '{KEPT_HOURS} hours' LIMIT {BATCH})"
            )
            deleted = int(cursor.rowcount)
        gone += deleted
        if deleted < BATCH:
            return gone


BEAT = {"purge-requests": {"task": "api.purge_requests", "schedule": 600.0}}
