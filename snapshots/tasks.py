"""Celery tasks of snapshots: `snapshots.advance`, on the queue `snapshots`, the end of uploads nobody is at, and room
on hosts."""

from __future__ import annotations

import logging
from typing import Any, Final

from celery import shared_task

from flows.engine import register
from flows.tasks import advance_task
from snapshots import room, storing
from snapshots.snapshot_flow import snapshot_flow
from storage import objects

log = logging.getLogger(__name__)

BEAT: Final[dict[str, Any]] = {
    "snapshots-abandon-uploads": {"task": "snapshots.abandon_uploads", "schedule": 1800.0},
    "snapshots-make-room": {"task": "snapshots.make_room", "schedule": 30.0},
}

advance = advance_task(register(snapshot_flow))


@shared_task(name="snapshots.abandon_uploads", ignore_result=True)
def abandon_uploads() -> int:
    """Throw away uploads that no row can know any more: who began one may have been killed before it was written
    down."""
    try:
        found = objects.abandon_uploads(storing.PREFIX, storing.UPLOAD_SECONDS)
    except objects.StorageError as error:
        log.warning("unfinished uploads are looked for later: %s", error)
        return 0
    if found:
        log.info("%d unfinished uploads of snapshots were thrown away", found)
    return found


@shared_task(name="snapshots.make_room", ignore_result=True)
def make_room() -> int:
    """Drop copies of snapshots on hosts whose pool fills up. Two runs at once drop the same."""
    return room.make_room()
