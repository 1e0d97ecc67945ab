"""Which hosts have a copy of which snapshot, and what a host is to delete.

In charge of the rows about it: written when a copy is made or received, put right by the hosts' own reports. They only
say where to look first; the host itself knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from django.db import connection

from devboxes import states as devbox_states
from hostd.messages import ReportedSnapshot

UNKNOWN_KEPT_MS: Final = 24 * 3600 * 1000
"""What is in no row may be of a database that was lost: it is kept for a day."""


def note(cursor: Any, snapshot_id: str, host_id: str) -> None:
    """The host has it."""
    cursor.execute(
        "INSERT INTO snapshots_disksnapshothost (snapshot_id, host_id) VALUES (%s, %s) ON CONFLICT DO NOTHING",
        [snapshot_id, host_id],
    )


def noting(snapshot_id: str, host_id: str) -> Callable[[Any], bool]:
    """`note`, to go with a settle."""

    def write(cursor: Any) -> bool:
        note(cursor, snapshot_id, host_id)
        return True

    return write


def forget(cursor: Any, snapshot_id: str, host_id: str) -> None:
    """The host has it no more."""
    cursor.execute(
        "DELETE FROM snapshots_disksnapshothost WHERE snapshot_id = %s AND host_id = %s", [snapshot_id, host_id]
    )


def of(snapshot_id: str) -> list[str]:
    """The hosts that have it, as far as we know."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT host_id FROM snapshots_disksnapshothost WHERE snapshot_id = %s ORDER BY id", [snapshot_id]
        )
        return [host_id for (host_id,) in cursor.fetchall()]


def in_use(snapshot_id: str) -> bool:
    """Whether a devbox is just being made of it."""
    steps = [devbox_states.PLACE, devbox_states.PREPARE_DISK]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT FROM devboxes_devbox WHERE snapshot_id = %s AND step = ANY(%s) LIMIT 1", [snapshot_id, steps]
        )
        return cursor.fetchone() is not None


def on_report(host_id: str, kept: Sequence[ReportedSnapshot]) -> list[tuple[str, int]]:
    """What a host has, by its own report: bring the rows up to date. Returns what it is to delete, each with a fence:
    copies of snapshots that failed or are deleted, and those nobody has known for a day."""
    ids = [one["snapshot"] for one in kept]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, fence, completed_at IS NOT NULL FROM snapshots_disksnapshot WHERE id = ANY(%s)", [ids]
        )
        rows = {pk: (fence, over) for pk, fence, over in cursor.fetchall()}
        cursor.execute(
            "DELETE FROM snapshots_disksnapshothost WHERE host_id = %s AND NOT snapshot_id = ANY(%s) "
            "AND at < now() - interval '1 minute'",
            [host_id, ids],
        )
        alive = [pk for pk, (_, over) in rows.items() if not over]
        cursor.execute(
            "INSERT INTO snapshots_disksnapshothost (snapshot_id, host_id) "
            "SELECT id, %s FROM snapshots_disksnapshot WHERE id = ANY(%s) ON CONFLICT DO NOTHING",
            [host_id, alive],
        )
    old = time.time() * 1000 - UNKNOWN_KEPT_MS
    now = time.time_ns() // 1000
    unknown = [(one["snapshot"], now) for one in kept if one["snapshot"] not in rows and one["taken_at_ms"] < old]
    return [*((pk, max(fence, now)) for pk, (fence, over) in rows.items() if over), *unknown]
