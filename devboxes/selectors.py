"""Reads of devboxes: one guarded door, the view, lists, and what other rooms need to know of one.

In charge of: every SELECT on devboxes that a request waits for, hand-written because they are hot. Not in charge of:
changing anything. Everything takes the caller and sees its account only.

The view is assembled from JSON that PostgreSQL has already made (`orjson.Fragment`), so a read parses nothing.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from accounts.sealing import unseal
from api.callers import Caller
from api.errors import NotFound, Unavailable
from api.ids import is_id
from api.pages import Page
from api.prepared import fetch_all, fetch_one
from devboxes import extensions
from devboxes.states import OVER

_MS = "(extract(epoch from {0}) * 1000)::bigint"

_OWN_COLUMNS = f"""
d.id, d.account_id, d.status, d.name, d.metadata::text, d.launch_parameters::text, {_MS.format("d.created_at")},
{_MS.format("d.ended_at")}, d.initiator_type, d.initiator_id, d.failure_reason, d.shutdown_reason, d.why,
{_MS.format("d.last_activity_at")}, d.last_activity_kind, {_MS.format("d.end_at")}, d.idle_seconds, d.on_idle,
d.keep_alive_seconds, d.snapshot_id, {_MS.format("d.stored_at")},
(SELECT coalesce(json_agg(json_strip_nulls(json_build_object(
    'status', t.status, 'transition_time_ms', {_MS.format("t.at")}, 'failure_reason', t.failure_reason
 )) ORDER BY t.id), '[]')::text FROM devboxes_devboxtransition t WHERE t.devbox_id = d.id)
"""


@lru_cache(maxsize=1)
def _columns() -> str:
    """Not before all rooms are registered."""
    return f"{_OWN_COLUMNS}, {extensions.columns()}"


@dataclass(frozen=True, slots=True)
class DevboxRow:
    """A devbox as it is shown. Times in milliseconds since the epoch; `metadata`, `launch_parameters`,
    `transitions` and `extensions` are JSON texts."""

    id: str
    account_id: str
    status: str
    name: str
    metadata: str
    launch_parameters: str
    created_ms: int
    ended_ms: int | None
    initiator_type: str
    initiator_id: str
    failure_reason: str | None
    shutdown_reason: str | None
    why: str
    last_activity_ms: int | None
    last_activity_kind: str
    end_ms: int | None
    idle_seconds: int | None
    on_idle: str
    keep_alive_seconds: int
    snapshot_id: str | None
    stored_ms: int | None
    transitions: str
    extensions: str

    @property
    def over(self) -> bool:
        """Whether its status is final."""
        return self.status in OVER


def access_devbox(caller: Caller, devbox_id: str) -> DevboxRow:
    """The caller's devbox. Raises NotFound, for a stranger's too."""
    sql = f"SELECT {_columns()} FROM devboxes_devbox d WHERE d.id = %s AND d.account_id = %s"
    row = fetch_one(sql, [devbox_id, caller.account_id]) if is_id("dbx", devbox_id) else None
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    return DevboxRow(*row)


def view(row: DevboxRow) -> dict[str, Any]:
    """The contract's DevboxView, for orjson. Beyond it: `why`, the last activity, when its keep-alive time ends
    and which clock fires next."""
    return {
        "id": row.id,
        "name": row.name or None,
        "status": row.status,
        "create_time_ms": row.created_ms,
        "end_time_ms": row.ended_ms,
        "initiator_type": row.initiator_type,
        "initiator_id": row.initiator_id or None,
        "blueprint_id": None,
        "snapshot_id": row.snapshot_id,
        "metadata": orjson.Fragment(row.metadata),
        "failure_reason": row.failure_reason,
        "shutdown_reason": row.shutdown_reason,
        "why": row.why or None,
        "launch_parameters": orjson.Fragment(row.launch_parameters),
        "capabilities": [],
        "state_transitions": orjson.Fragment(row.transitions),
        "tunnel": None,
        "gateway_specs": None,
        "mcp_specs": None,
        "last_activity_time_ms": row.last_activity_ms,
        "last_activity_kind": row.last_activity_kind or None,
        "keep_alive_end_time_ms": None if row.over else row.end_ms,
        "next_clock": _next_clock(row),
        "disk_stored_time_ms": row.stored_ms if row.status == "suspended" else None,
        **extensions.shown(row.extensions),
    }


def _next_clock(row: DevboxRow) -> dict[str, Any] | None:
    """Which clock will fire next when nothing happens, what it does, and why then."""
    if row.status != "running":
        return None
    if row.idle_seconds is not None and row.last_activity_ms is not None:
        return {
            "clock": "after_idle",
            "action": row.on_idle,
            "at_ms": row.last_activity_ms + 1000 * row.idle_seconds,
            "seconds": row.idle_seconds,
            "since_ms": row.last_activity_ms,
            "since": row.last_activity_kind or "start",
        }
    if row.end_ms is None:
        return None
    return {
        "clock": "keep_alive",
        "action": "shutdown",
        "at_ms": row.end_ms,
        "seconds": row.keep_alive_seconds,
        "since_ms": row.end_ms - 1000 * row.keep_alive_seconds,
        "since": "start",
    }


# --- lists ---


@dataclass(frozen=True, slots=True)
class Filters:
    """What a list is narrowed to. `metadata`: pairs of a key and the values of which it must have one."""

    status: str | None = None
    name: str | None = None
    metadata: Sequence[tuple[str, Sequence[str]]] = ()


@dataclass(frozen=True, slots=True)
class Listed:
    """A page of devboxes, newest first. `total` is None when it was not asked for."""

    rows: list[DevboxRow]
    has_more: bool
    total: int | None


def list_devboxes(caller: Caller, filters: Filters, page: Page) -> Listed:
    """A page of the caller's devboxes. Raises NotFound when `starting_after` is not one of them."""
    where, params = ["d.account_id = %s"], [caller.account_id]
    extra: list[Any] = []
    if filters.status is not None:
        where.append("d.status = %s")
        extra.append(filters.status)
        if filters.status not in OVER:
            where.append("d.ended_at IS NULL")
    if filters.name is not None:
        where.append("d.name = %s")
        extra.append(filters.name)
    for key, values in filters.metadata:
        where.append("(" + " OR ".join(["d.metadata @> %s::jsonb"] * len(values)) + ")")
        extra += [orjson.dumps({key: value}).decode() for value in values]
    condition = " AND ".join(where)
    total = None
    if page.include_total_count:
        counted = fetch_one(f"SELECT count(*) FROM devboxes_devbox d WHERE {condition}", [*params, *extra])
        total = counted[0] if counted else 0
    after: list[Any] = []
    if page.starting_after is not None:
        at = None
        if is_id("dbx", page.starting_after):
            at = fetch_one(
                "SELECT created_at, id FROM devboxes_devbox WHERE id = %s AND account_id = %s",
                [page.starting_after, caller.account_id],
            )
        if at is None:
            raise NotFound(f"starting_after: there is no devbox {page.starting_after[:60]}")
        condition += " AND (d.created_at, d.id) < (%s, %s)"
        after = list(at)
    rows = fetch_all(
        f"SELECT {_columns()} FROM devboxes_devbox d WHERE {condition} ORDER BY d.created_at DESC, d.id DESC LIMIT %s",
        [*params, *extra, *after, page.limit + 1],
    )
    return Listed([DevboxRow(*row) for row in rows[: page.limit]], len(rows) > page.limit, total)


def metadata_keys(caller: Caller) -> list[str]:
    """Every metadata key in use on the caller's devboxes, sorted."""
    rows = fetch_all(
        "SELECT DISTINCT k FROM devboxes_devbox d, jsonb_object_keys(d.metadata) k WHERE d.account_id = %s ORDER BY k",
        [caller.account_id],
    )
    return [row[0] for row in rows]


def metadata_values(caller: Caller, key: str) -> list[str]:
    """Every value of a metadata key on the caller's devboxes, sorted."""
    rows = fetch_all(
        "SELECT DISTINCT d.metadata ->> %s AS v FROM devboxes_devbox d "
        "WHERE d.account_id = %s AND jsonb_exists(d.metadata, %s) ORDER BY v",
        [key, caller.account_id, key],
    )
    return [row[0] for row in rows]


# --- for other rooms ---


@dataclass(frozen=True, slots=True)
class ExecutionContext:
    """What running something in a devbox needs to know."""

    devbox_id: str
    account_id: str
    status: str
    host_id: str | None
    user_name: str
    user_uid: int
    user_home: str
    door_closed: bool

    def check_door(self) -> None:
        """Raises Unavailable for the moment in which a devbox that seems to be idle takes no new work."""
        if self.door_closed:
            raise Unavailable(f"devbox {self.devbox_id} is about to be idle for too long; ask again", retry_after=2)

    @property
    def user(self) -> dict[str, Any]:
        """The user as hosts want it."""
        return {"name": self.user_name, "uid": self.user_uid, "gid": self.user_uid, "home": self.user_home}


_CONTEXT = """
SELECT id, account_id, status, host_id, user_name, user_uid, user_home, step = 'last_look' FROM devboxes_devbox
 WHERE id = %s AND account_id = %s
"""


def execution_context(caller: Caller, devbox_id: str) -> ExecutionContext:
    """The context for a devbox of the caller, in any status. Raises NotFound."""
    row = fetch_one(_CONTEXT, [devbox_id, caller.account_id]) if is_id("dbx", devbox_id) else None
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    return ExecutionContext(*row)


def is_running(devbox_id: str) -> bool:
    """Whether a devbox, whoever's, runs."""
    return fetch_one("SELECT 1 FROM devboxes_devbox WHERE id = %s AND status = 'running'", [devbox_id]) is not None


@lru_cache(maxsize=1024)
def _environment(devbox_id: str, _hour: int) -> Mapping[str, str]:
    row = fetch_one("SELECT environment_sealed FROM devboxes_devbox WHERE id = %s", [devbox_id])
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    return dict(unseal(row[0])) if row[0] else {}


def environment(devbox_id: str) -> dict[str, str]:
    """The environment variables given at creation. They never change; kept unsealed for an hour at most."""
    return dict(_environment(devbox_id, int(time.monotonic() // 3600)))
