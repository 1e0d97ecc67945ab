"""The end of what is kept: commands and their outputs are deleted when their time is over.

In charge of which are over and of the order of deleting. Not in charge of when it is looked (`tasks`), or of outputs on
hosts, which go once they are stored (`execution_flow`).

A command of a devbox that is not over goes RETENTION_DAYS after it has completed; what is left when a devbox ends goes
RETENTION_DAYS after that end. What has not completed, or is not stored yet, never goes. The objects in S3 are deleted
first and the row after them, so that a run that is cut short is repeated by the next one.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from django.conf import settings
from django.db import connection

from api.ids import first_id
from executions.execution_flow import STORE_WITHIN_SECONDS
from executions.models import Kept
from executions.outputs import OUTPUTS_PREFIX, output_prefix
from storage import objects
from storage.objects import StorageError

log = logging.getLogger(__name__)

UPLOAD_SECONDS: Final = STORE_WITHIN_SECONDS + 3600.0
BATCH: Final = 200
RUN_ROWS: Final = 10_000
RUN_SECONDS: Final = 45.0
"""A run ends after so many rows or so long; the next one goes on."""

# Ids sort by creation, so that what may be over is the beginning of the primary key, and no index is needed for it.
_OVER: Final = """
SELECT e.id, e.devbox_id, e.kept FROM executions_execution e JOIN devboxes_devbox d ON d.id = e.devbox_id
 WHERE e.id > %s AND e.id < %s AND e.wake_at IS NULL
   AND e.completed_at < now() - make_interval(secs => %s)
   AND (d.ended_at IS NULL OR d.ended_at < now() - make_interval(secs => %s))
 ORDER BY e.id LIMIT %s
"""
_DELETE: Final = "DELETE FROM executions_execution WHERE id = ANY(%s) AND completed_at IS NOT NULL AND wake_at IS NULL"


def delete_what_is_over() -> int:
    """Delete commands whose time is over, within the bounds of a run. Returns how many were deleted.

    One whose objects cannot be deleted now keeps its row, and does not hold up the others.
    """
    seconds = settings.BERTH.RETENTION_DAYS * 86_400
    before = first_id("exe", int(time.time() * 1000 - seconds * 1000))
    until = time.monotonic() + RUN_SECONDS
    after, deleted = "", 0
    while deleted < RUN_ROWS and time.monotonic() < until:
        with connection.cursor() as cursor:
            cursor.execute(_OVER, [after, before, seconds, seconds, BATCH])
            rows = cursor.fetchall()
        if not rows:
            break
        gone: list[str] = []
        for execution_id, devbox_id, kept in rows:
            after = execution_id
            if kept == Kept.ROW or _emptied(output_prefix(devbox_id, execution_id)):
                gone.append(execution_id)
            if time.monotonic() >= until:
                break
        with connection.cursor() as cursor:
            cursor.execute(_DELETE, [gone])
            deleted += cursor.rowcount
    if deleted:
        log.info("%d commands were deleted after %g days", deleted, settings.BERTH.RETENTION_DAYS)
    return deleted


def abandon_uploads() -> int:
    """Throw away unfinished uploads of outputs that no step can be at any more: the worker that began one may have
    been killed before its row named it. Returns how many."""
    try:
        abandoned = objects.abandon_uploads(OUTPUTS_PREFIX, UPLOAD_SECONDS)
    except StorageError as error:
        log.warning("unfinished uploads are looked for later: %s", error)
        return 0
    if abandoned:
        log.info("%d unfinished uploads were thrown away", abandoned)
    return abandoned


def _emptied(prefix: str) -> bool:
    try:
        objects.delete_prefix(prefix)
    except StorageError as error:
        log.warning("%s is deleted later: %s", prefix, error)
        return False
    return True
