"""Celery tasks of the devboxes: the one that advances a row, and the end of old log entries.

In charge of: how long entries of logs are kept, in batches, so that no statement is long. What executions keep of their
output ends with them.
"""

from __future__ import annotations

from typing import Any, Final

from celery import shared_task
from django.conf import settings
from django.db import connection

from devboxes.devbox_flow import devbox_flow
from flows.tasks import advance_task

advance = advance_task(devbox_flow)

BATCH: Final = 5000
BATCHES: Final = 100
"""In one run: what is left is the next one's."""

_OLD: Final = """
DELETE FROM devboxes_devboxlog WHERE id IN (
  SELECT id FROM devboxes_devboxlog WHERE at < now() - make_interval(secs => %s) ORDER BY at LIMIT %s)
"""
_OLD_STATS: Final = """
DELETE FROM devboxes_devboxlog WHERE id IN (
  SELECT id FROM devboxes_devboxlog
   WHERE at < now() - make_interval(secs => %s) AND source = 'stats' ORDER BY at LIMIT %s)
"""
_CROWDED: Final = """
SELECT devbox_id FROM devboxes_devboxlog GROUP BY devbox_id HAVING count(*) > %s LIMIT 100
"""
_OVERFLOW: Final = """
DELETE FROM devboxes_devboxlog WHERE id IN (
  SELECT id FROM devboxes_devboxlog WHERE devbox_id = %s ORDER BY at DESC, id DESC OFFSET %s LIMIT %s)
"""


@shared_task(name="devboxes.purge_logs", ignore_result=True)
def purge_logs() -> int:
    """Delete entries older than LOGS_KEPT, samples older than STATS_KEPT, and the oldest of a devbox that has more than
    LOGS_ROWS_MAX; how many."""
    berth = settings.BERTH
    gone = _delete(_OLD, berth.LOGS_KEPT) + _delete(_OLD_STATS, min(berth.STATS_KEPT, berth.LOGS_KEPT))
    with connection.cursor() as cursor:
        cursor.execute(_CROWDED, [berth.LOGS_ROWS_MAX])
        crowded = [pk for (pk,) in cursor.fetchall()]
    return gone + sum(_delete(_OVERFLOW, devbox_id, berth.LOGS_ROWS_MAX) for devbox_id in crowded)


def _delete(sql: str, *parameters: str | float) -> int:
    gone = 0
    for _ in range(BATCHES):
        with connection.cursor() as cursor:
            cursor.execute(sql, [*parameters, BATCH])
            deleted = int(cursor.rowcount)
        gone += deleted
        if deleted < BATCH:
            break
    return gone


BEAT: Final[dict[str, Any]] = {"devboxes-purge-logs": {"task": "devboxes.purge_logs", "schedule": 600.0}}
