"""Reads of snapshots: the doors, the views, the lists.

In charge of every SELECT that a request waits for. Everything takes the caller: its own account's snapshots, or those
that are public. Not in charge of changing anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from api.callers import Caller
from api.errors import NotFound
from api.ids import is_id
from api.pages import Page
from api.prepared import fetch_all, fetch_one
from snapshots import states

_COLUMNS: Final = """
s.id, s.account_id, s.status, s.name, s.metadata::text, (extract(epoch from s.created_at) * 1000)::bigint, s.devbox_id,
s.commit_message, s.size_bytes, s.freeze_ms, s.error_message
"""
_THEIRS: Final = "s.own_turn IS NULL"
"""What is kept of a suspended devbox is no user's snapshot."""
_SHOWN: Final = f"{_THEIRS} AND s.status IN ('{states.COMPLETE}', '{states.IN_PROGRESS}')"
_PUBLIC: Final = f"s.public AND s.status = '{states.COMPLETE}'"


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """A snapshot as it is shown. `metadata` is JSON text."""

    id: str
    account_id: str
    status: str
    name: str
    metadata: str
    created_ms: int
    devbox_id: str
    commit_message: str
    size_bytes: int | None
    freeze_ms: float | None
    error_message: str

    @property
    def over(self) -> bool:
        """Whether it is not in progress any more."""
        return self.status != states.IN_PROGRESS


def access_snapshot(caller: Caller, snapshot_id: str) -> SnapshotView:
    """The caller's snapshot, deleted ones too. Raises NotFound, for a stranger's as well."""
    row = None
    if is_id("snp", snapshot_id):
        row = fetch_one(
            f"SELECT {_COLUMNS} FROM snapshots_disksnapshot s WHERE s.id = %s AND s.account_id = %s AND {_THEIRS}",
            [snapshot_id, caller.account_id],
        )
    if row is None:
        raise NotFound(f"there is no snapshot {snapshot_id[:60]}")
    return SnapshotView(*row)


def read_snapshot(caller: Caller, snapshot_id: str) -> SnapshotView:
    """The caller's snapshot, or a public one. Raises NotFound."""
    row = None
    if is_id("snp", snapshot_id):
        row = fetch_one(
            f"SELECT {_COLUMNS} FROM snapshots_disksnapshot s "
            f"WHERE s.id = %s AND {_THEIRS} AND (s.account_id = %s OR ({_PUBLIC}))",
            [snapshot_id, caller.account_id],
        )
    if row is None:
        raise NotFound(f"there is no snapshot {snapshot_id[:60]}")
    return SnapshotView(*row)


def view(row: SnapshotView) -> dict[str, Any]:
    """The contract's DevboxDiskSnapshotView, for orjson."""
    return {
        "id": row.id,
        "name": row.name or None,
        "create_time_ms": row.created_ms,
        "metadata": orjson.Fragment(row.metadata),
        "source_devbox_id": row.devbox_id,
        "source_blueprint_id": None,
        "commit_message": row.commit_message or None,
        "size_bytes": row.size_bytes,
        "freeze_ms": row.freeze_ms,
    }


def status_view(row: SnapshotView) -> dict[str, Any]:
    """The contract's DevboxSnapshotAsyncStatusView."""
    return {
        "status": row.status,
        "error_message": row.error_message or None,
        "snapshot": view(row) if row.status == states.COMPLETE else None,
    }


@dataclass(frozen=True, slots=True)
class Filters:
    """What a list is narrowed to. `metadata`: pairs of a key and the values of which it must have one."""

    devbox_id: str | None = None
    blueprint_id: str | None = None
    metadata: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of snapshots, newest first. `total` is None when it was not asked for."""

    rows: list[SnapshotView]
    has_more: bool
    total: int | None


def list_snapshots(caller: Caller, filters: Filters, page: Page, *, public: bool = False) -> Listed:
    """A page of the caller's snapshots, or of the public ones; neither deleted nor failed ones are among them.

    Raises NotFound when `starting_after` is not one that could be listed.
    """
    where, params = _scope(caller, public)
    extra: list[Any] = []
    if filters.devbox_id is not None:
        where.append("s.devbox_id = %s")
        extra.append(filters.devbox_id)
    if filters.blueprint_id is not None:
        where.append("false")  # nothing is made of blueprints yet
    for key, values in filters.metadata:
        where.append("(" + " OR ".join(["s.metadata @> %s::jsonb"] * len(values)) + ")")
        extra += [orjson.dumps({key: value}).decode() for value in values]
    condition = " AND ".join(where)
    total = None
    if page.include_total_count:
        counted = fetch_one(f"SELECT count(*) FROM snapshots_disksnapshot s WHERE {condition}", [*params, *extra])
        total = counted[0] if counted else 0
    after: list[Any] = []
    if page.starting_after is not None:
        at = None
        if is_id("snp", page.starting_after):
            # One that was deleted since is still a place in the list.
            own = "s.public" if public else "s.account_id = %s"
            at = fetch_one(
                f"SELECT s.created_at, s.id FROM snapshots_disksnapshot s WHERE s.id = %s AND {own}",
                [page.starting_after, *params],
            )
        if at is None:
            raise NotFound(f"starting_after: there is no snapshot {page.starting_after[:60]}")
        condition += " AND (s.created_at, s.id) < (%s, %s)"
        after = list(at)
    rows = fetch_all(
        f"SELECT {_COLUMNS} FROM snapshots_disksnapshot s WHERE {condition} "
        "ORDER BY s.created_at DESC, s.id DESC LIMIT %s",
        [*params, *extra, *after, page.limit + 1],
    )
    return Listed([SnapshotView(*row) for row in rows[: page.limit]], len(rows) > page.limit, total)


def metadata_keys(caller: Caller, *, public: bool = False) -> list[str]:
    """Every metadata key in use, sorted."""
    where, params = _scope(caller, public)
    rows = fetch_all(
        "SELECT DISTINCT k FROM snapshots_disksnapshot s, jsonb_object_keys(s.metadata) k "
        f"WHERE {' AND '.join(where)} ORDER BY k",
        params,
    )
    return [row[0] for row in rows]


def metadata_values(caller: Caller, key: str, *, public: bool = False) -> list[str]:
    """Every value of a metadata key in use, sorted."""
    where, params = _scope(caller, public)
    rows = fetch_all(
        "SELECT DISTINCT s.metadata ->> %s AS v FROM snapshots_disksnapshot s "
        f"WHERE {' AND '.join(where)} AND jsonb_exists(s.metadata, %s) ORDER BY v",
        [key, *params, key],
    )
    return [row[0] for row in rows]


def _scope(caller: Caller, public: bool) -> tuple[list[str], list[Any]]:
    return ([_PUBLIC], []) if public else (["s.account_id = %s", _SHOWN], [caller.account_id])
