"""Room on hosts: copies of snapshots that are in S3 are dropped, the oldest first, where a pool fills up.

In charge of which copies go. What is dropped is received again when a devbox is made of it there.
"""

from __future__ import annotations

import logging
from typing import Final

from django.db import connection

from flows.statements import FENCE
from hosts.client import HostError, client_for
from hosts.policy import policy
from snapshots import holders, states

log = logging.getLogger(__name__)

FREE_BELOW: Final = 0.25
"""Share of the pool. Below a tenth of it nothing is placed on the host any more."""
AT_ONCE: Final = 10

_CROWDED: Final = """
SELECT id FROM hosts_host
 WHERE state = 'ready' AND pool_free_mb < disk_mb * %s AND seen_at > clock_timestamp() - make_interval(secs => %s)
"""
_OLDEST: Final = f"""
SELECT s.id FROM snapshots_disksnapshothost h JOIN snapshots_disksnapshot s ON s.id = h.snapshot_id
 WHERE h.host_id = %s AND s.step = '{states.KEPT}' ORDER BY h.at LIMIT %s
"""
_RAISE: Final = f"""
UPDATE snapshots_disksnapshot SET fence = {FENCE.format("")} WHERE id = %s AND step = '{states.KEPT}' RETURNING fence
"""


def make_room() -> int:
    """Drop some copies on every host whose pool fills up; how many."""
    with connection.cursor() as cursor:
        cursor.execute(_CROWDED, [FREE_BELOW, policy().silent_after])
        crowded = [host_id for (host_id,) in cursor.fetchall()]
    return sum(_drop_oldest(host_id) for host_id in crowded)


def _drop_oldest(host_id: str) -> int:
    dropped = 0
    with connection.cursor() as cursor:
        cursor.execute(_OLDEST, [host_id, AT_ONCE])
        oldest = [pk for (pk,) in cursor.fetchall()]
    for snapshot_id in oldest:
        if holders.in_use(snapshot_id):
            continue
        with connection.cursor() as cursor:
            # The host remembers the fence of a deletion: who has it received again needs a newer one.
            cursor.execute(_RAISE, [snapshot_id])
            raised = cursor.fetchone()
            if raised is None:
                continue
            try:
                client_for(host_id).delete_snapshot(snapshot=snapshot_id, fence=raised[0] - 1)
            except HostError as error:
                log.warning("host %s keeps its copy of %s for now: %s", host_id, snapshot_id, error)
                continue
            holders.forget(cursor, snapshot_id, host_id)
        dropped += 1
    if dropped:
        log.info("host %s: %d copies of snapshots were dropped for room", host_id, dropped)
    return dropped
