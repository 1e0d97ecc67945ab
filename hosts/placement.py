"""Where a devbox may run: guarded reservations on the hosts' rows, and who comes first.

In charge of the arithmetic of promises: `reserve` is one UPDATE that hits the row or does not, so two workers can
never promise the same megabyte. Reads no host and makes no box.

A reservation holds when, on that one row,
  1. the host is ready, not cordoned and was heard within SILENT_AFTER;
  2. what is promised stays within capacity times overcommit, of the disk only 90 %;
  3. the host's real free memory and real free pool are above the shares that are kept free;
  4. the box alone is not larger than the machine's memory and pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from django.db import connection

from hosts.policy import policy


class Cursor(Protocol):
    """What is used of a database cursor."""

    rowcount: int

    def execute(self, sql: str, params: Any = None) -> Any: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


_ROOM = """
    state = 'ready' AND NOT cordoned
    AND seen_at > clock_timestamp() - make_interval(secs => %(silent_after)s)
    AND used_cpu_millis + %(cpu)s <= cpu_millis * coalesce(overcommit_cpu, %(over_cpu)s)
    AND used_memory_mb + %(memory)s <= memory_mb * coalesce(overcommit_memory, %(over_memory)s)
    AND used_disk_mb + %(disk)s <= disk_mb * (1 - %(pool_kept)s) * coalesce(overcommit_disk, %(over_disk)s)
    AND coalesce(memory_free_mb, memory_mb) >= memory_mb * %(memory_kept)s
    AND coalesce(pool_free_mb, disk_mb) >= disk_mb * %(pool_kept)s
"""

# One box against a whole machine. A core is shared in time, so more cores than the machine has are granted within
# the overcommit; memory and disk that do not exist are not.
_HOLDS = """
    %(cpu)s <= cpu_millis * coalesce(overcommit_cpu, %(over_cpu)s)
    AND %(memory)s <= memory_mb
    AND %(disk)s <= disk_mb * (1 - %(pool_kept)s)
"""

# For a box that is there already and whose disk is promised: one that was suspended. A host that takes no new ones goes
# on with those it has.
_COMPUTE = """
    id = %(id)s AND state IN ('ready', 'retiring')
    AND seen_at > clock_timestamp() - make_interval(secs => %(silent_after)s)
    AND used_cpu_millis + %(cpu)s <= cpu_millis * coalesce(overcommit_cpu, %(over_cpu)s)
    AND used_memory_mb + %(memory)s <= memory_mb * coalesce(overcommit_memory, %(over_memory)s)
    AND coalesce(memory_free_mb, memory_mb) >= memory_mb * %(memory_kept)s
"""

_RESERVE = f"""
    UPDATE hosts_host
       SET used_cpu_millis = used_cpu_millis + %(cpu)s, used_memory_mb = used_memory_mb + %(memory)s,
           used_disk_mb = used_disk_mb + %(disk)s
     WHERE id = %(id)s AND {_ROOM} AND {_HOLDS}
"""

_RELEASE = """
    UPDATE hosts_host
       SET used_cpu_millis = greatest(0, used_cpu_millis - %(cpu)s),
           used_memory_mb = greatest(0, used_memory_mb - %(memory)s),
           used_disk_mb = greatest(0, used_disk_mb - %(disk)s)
     WHERE id = %(id)s
"""

# The host whose scarcest resource would be the least promised comes first, so boxes spread.
_CHOOSE = f"""
    SELECT id, image_id FROM hosts_host
     WHERE {_ROOM} AND {_HOLDS}
       AND (%(architecture)s::text IS NULL OR architecture = %(architecture)s)
       AND (%(image)s::text IS NULL OR image_id = %(image)s)
     ORDER BY id = ANY(%(prefer)s) DESC, greatest(
               (used_cpu_millis + %(cpu)s) / nullif(cpu_millis * coalesce(overcommit_cpu, %(over_cpu)s), 0),
               (used_memory_mb + %(memory)s) / nullif(memory_mb * coalesce(overcommit_memory, %(over_memory)s), 0),
               (used_disk_mb + %(disk)s) / nullif(disk_mb * coalesce(overcommit_disk, %(over_disk)s), 0)
           ), id
     LIMIT %(limit)s
"""

_FITS_ANY = f"""
    SELECT EXISTS (
        SELECT FROM hosts_host
         WHERE state IN ('ready', 'enrolling', 'retiring') AND {_HOLDS}
           AND (%(architecture)s::text IS NULL OR architecture = %(architecture)s)
    )
"""


def _params(
    cpu_millis: int, memory_mb: int, disk_mb: int, **more: str | int | list[str] | None
) -> dict[str, str | int | float | list[str] | None]:
    rules = policy()
    return {
        "cpu": cpu_millis,
        "memory": memory_mb,
        "disk": disk_mb,
        "silent_after": rules.silent_after,
        "over_cpu": rules.overcommit_cpu,
        "over_memory": rules.overcommit_memory,
        "over_disk": rules.overcommit_disk,
        "pool_kept": rules.pool_kept_free,
        "memory_kept": rules.memory_kept_free,
        **more,
    }


def reserve(cursor: Cursor, host_id: str, cpu_millis: int, memory_mb: int, disk_mb: int) -> bool:
    """Promise the resources on that host, in the caller's transaction. False: there is no room (any more)."""
    cursor.execute(_RESERVE, _params(cpu_millis, memory_mb, disk_mb, id=host_id))
    return cursor.rowcount == 1


def has_compute(host_id: str, cpu_millis: int, memory_mb: int) -> bool:
    """Whether that host has CPU and memory for a box whose disk it has. Only `reserve_compute` makes it a promise."""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT FROM hosts_host WHERE {_COMPUTE}", _params(cpu_millis, memory_mb, 0, id=host_id))
        return cursor.fetchone() is not None


def reserve_compute(cursor: Cursor, host_id: str, cpu_millis: int, memory_mb: int) -> bool:
    """Promise CPU and memory on the host that has the box's disk, in the caller's transaction. False: no room."""
    cursor.execute(
        f"UPDATE hosts_host SET used_cpu_millis = used_cpu_millis + %(cpu)s, "
        f"used_memory_mb = used_memory_mb + %(memory)s WHERE {_COMPUTE}",
        _params(cpu_millis, memory_mb, 0, id=host_id),
    )
    return cursor.rowcount == 1


def release(cursor: Cursor, host_id: str, cpu_millis: int, memory_mb: int, disk_mb: int) -> None:
    """Take a promise back, in the transaction that guards against taking it back twice."""
    cursor.execute(_RELEASE, {"id": host_id, "cpu": cpu_millis, "memory": memory_mb, "disk": disk_mb})


def choose(
    cpu_millis: int,
    memory_mb: int,
    disk_mb: int,
    architecture: str | None = None,
    image: str | None = None,
    *,
    prefer: Sequence[str] = (),
    limit: int = 8,
) -> list[tuple[str, str]]:
    """Hosts with room now, each with its image, those of `prefer` and then the best first, at most `limit`. Only
    `reserve` makes it a promise."""
    with connection.cursor() as cursor:
        cursor.execute(
            _CHOOSE,
            _params(
                cpu_millis, memory_mb, disk_mb, architecture=architecture, image=image, limit=limit, prefer=list(prefer)
            ),
        )
        return list(cursor.fetchall())


def fits_any(cpu_millis: int, memory_mb: int, disk_mb: int, architecture: str | None = None) -> bool:
    """Whether some enrolled host could hold such a box if it were empty, heard and open for placements."""
    with connection.cursor() as cursor:
        cursor.execute(_FITS_ANY, _params(cpu_millis, memory_mb, disk_mb, architecture=architecture))
        return bool(cursor.fetchone()[0])


def is_heard(host_id: str) -> bool:
    """Whether the host was heard within SILENT_AFTER."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT FROM hosts_host WHERE id = %s AND seen_at > clock_timestamp() - make_interval(secs => %s)",
            [host_id, policy().silent_after],
        )
        return cursor.fetchone() is not None
