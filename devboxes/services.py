"""What changes devboxes at a caller's request: create, update, shut down, keep alive.

In charge of: rules that need the database (caps, room, repetition) and of writing intent. Not in charge of: doing it
(`devboxes.devbox_flow`), nor of what a field may contain (`devboxes.schemas`).
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import orjson
from django.db import connection, transaction

from accounts.caps import limits
from accounts.sealing import seal
from api.callers import Caller
from api.errors import BadRequest, TooManyRequests, Unavailable
from api.idempotency import body_digest, idempotent
from api.ids import new_id
from devboxes import clocks, extensions, launch, schemas, selectors, sizes, states
from devboxes.devbox_flow import devbox_flow
from devboxes.flow_rows import DISK_LEFT_MIN, MIB, entering, transition
from devboxes.models import Devbox
from devboxes.origins import origins
from flows.outcomes import DatabaseNow
from flows.statements import RELAXED
from hosts import placement
from hosts.models import Host, HostState

CREATE = "POST /v1/devboxes"
CREATE_AND_WAIT = "POST /v1/devboxes/create_and_await_running"
TOUCH_SECONDS = 10.0
SIZE_FIELDS = ("resource_size_request", "custom_cpu_cores", "custom_gb_memory", "custom_disk_size")
CAP_MARGIN = 64
"""So near to its cap an account's creations are made one after the other, so that the cap is exact."""


def create_devbox(
    caller: Caller,
    parameters: Mapping[str, Any],
    *,
    raw_body: bytes,
    request_id: str | None,
    route: str = CREATE,
    id: str | None = None,
) -> str:
    """Make a devbox of validated `DevboxCreateParameters` and return its id, `id` if it is new; its flow does the rest.

    Raises BadRequest when no host could ever hold it or the request id was used for another body, TooManyRequests at
    the account's cap, Unavailable when there is no host at all.
    """
    devbox_id = id or new_id("dbx")
    columns = _columns(caller, parameters)
    with transaction.atomic():

        def create() -> str:
            _check_room(columns)
            _check_cap(caller.account_id)
            _insert(devbox_id, columns)
            extensions.created(devbox_id, parameters)
            return devbox_id

        made, replayed = idempotent(caller, request_id, route, body_digest(raw_body), create, devbox_id)
    if not replayed:
        devbox_flow.nudge(made)
    return made


def _columns(caller: Caller, parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in (parameters.get("launch_parameters") or {}).items() if value is not None}
    origin = origins().access(caller, parameters["snapshot_id"]) if parameters.get("snapshot_id") else None
    if origin is not None:
        given = _inherited(origin.launch_parameters, given)
    size = sizes.size_of(given)
    if origin is not None and size.disk_mb * MIB - (origin.size_bytes or 0) < DISK_LEFT_MIN:
        raise BadRequest(
            f"launch_parameters.resource_size_request: snapshot {origin.id} has {origin.size_bytes} bytes, "
            f"too many for a disk of {size.disk_mb} MiB"
        )
    keep_alive = given.get("keep_alive_time_seconds") or schemas.KEEP_ALIVE_DEFAULT
    idle = clocks.idle_of(given)
    user = given.get("user_parameters") or {"username": launch.DEFAULT_USER, "uid": launch.DEFAULT_UID}
    mounts = schemas.all_mounts(dict(parameters))
    commands = given.get("launch_commands") or []
    entrypoint = parameters.get("entrypoint") or ""
    environment = parameters.get("environment_variables") or {}
    shown = {
        "resource_size_request": sizes.DEFAULT,
        "keep_alive_time_seconds": keep_alive,
        "architecture": "x86_64",
        **given,
    }
    return {
        "account_id": caller.account_id,
        "name": parameters.get("name") or "",
        "metadata": parameters.get("metadata") or {},
        "architecture": given.get("architecture") or "x86_64",
        "cpu_millis": size.cpu_millis,
        "memory_mb": size.memory_mb,
        "disk_mb": size.disk_mb,
        "launch_parameters": shown,
        "environment_sealed": seal(environment) if environment else None,
        "mounts_sealed": seal(mounts) if mounts else None,
        "launch_commands": commands,
        "entrypoint": entrypoint,
        "user_name": user["username"],
        "user_uid": user["uid"],
        "user_home": "/root" if user["uid"] == 0 else f"/home/{user['username']}",
        "keep_alive_seconds": keep_alive,
        "idle_seconds": idle["idle_time_seconds"] if idle else None,
        "on_idle": idle["on_idle"] if idle else "",
        "launch_total": launch.count(
            user_name=user["username"],
            user_uid=user["uid"],
            mounts=mounts,
            launch_commands=commands,
            entrypoint=entrypoint,
            is_copy=origin is not None,
        ),
        "snapshot_id": origin.id if origin is not None else None,
        "source_bytes": 0,
        "initiator_type": "api",
        "initiator_id": caller.key_id or caller.member_id or "",
    }


def _inherited(of_origin: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The launch parameters given, and for what is not given those of the devbox that the disk is from: its size (as a
    whole), user, architecture and keep-alive time. What it ran is not run again for being on its disk."""
    names = ["user_parameters", "architecture", "keep_alive_time_seconds"]
    if not any(name in given for name in SIZE_FIELDS):
        names += SIZE_FIELDS
    return {**{name: of_origin[name] for name in names if of_origin.get(name) is not None}, **given}


def _check_room(columns: Mapping[str, Any]) -> None:
    size = columns["cpu_millis"], columns["memory_mb"], columns["disk_mb"]
    if placement.fits_any(*size, columns["architecture"]):
        return
    # Of a host that is being enrolled the size is not known yet: with no other it is too early to say never.
    hosts = Host.objects.filter(state__in=[HostState.READY, HostState.RETIRING])
    if not hosts.exists():
        raise Unavailable(
            "no VM host is enrolled yet; the operator enrols one with manage.py enrol_host", retry_after=5
        )
    if not hosts.filter(architecture=columns["architecture"]).exists():
        raise BadRequest(f"launch_parameters.architecture: no host is {columns['architecture']}")
    raise BadRequest(
        f"launch_parameters.resource_size_request: no host is large enough for {size[0] / 1000:g} CPU, "
        f"{size[1] / 1024:g} GiB of memory and {size[2] / 1024:g} GiB of disk"
    )


def _check_cap(account_id: str) -> None:
    cap = limits(account_id).running_devboxes
    with connection.cursor() as cursor:
        count = _live(cursor, account_id, cap)
        if count >= cap - CAP_MARGIN:
            cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"devboxes:{account_id}"])
            count = _live(cursor, account_id, cap)
    if count >= cap:
        raise TooManyRequests(
            f"this account may have {cap} devboxes at once and has as many; shut one down first", retry_after=10
        )


def _live(cursor: Any, account_id: str, cap: int) -> int:
    cursor.execute(
        "SELECT count(*) FROM (SELECT FROM devboxes_devbox "
        "WHERE account_id = %s AND ended_at IS NULL AND status <> 'suspended' LIMIT %s) x",
        [account_id, cap + 1],
    )
    return int(cursor.fetchone()[0])


def _insert(devbox_id: str, columns: Mapping[str, Any]) -> None:
    table = devbox_flow.table
    assigned: dict[str, Any] = {
        "id": devbox_id,
        "step": states.PLACE,
        "wants": "running",
        **_DEFAULTS,
        **columns,
        "status": states.STATUS[states.PLACE],
    }
    names = ", ".join(table.column(name) for name in assigned)
    values: list[Any] = [table.prepare(name, value) for name, value in assigned.items()]
    sql = (
        f"WITH settled AS (INSERT INTO devboxes_devbox ({names}, created_at, deadline_at) "
        f"VALUES ({', '.join(['%s'] * len(values))}, now(), now() + make_interval(secs => %s)) RETURNING id) "
        "INSERT INTO devboxes_devboxtransition (devbox_id, status, at) SELECT id, %s, clock_timestamp() FROM settled"
    )
    with connection.cursor() as cursor:
        cursor.execute(sql, [*values, states.seconds_for(states.PLACE), states.STATUS[states.PLACE]])


_DEFAULTS: dict[str, Any] = {
    "seen": "",
    "reserved": False,
    "compute_reserved": True,
    "slot": "",
    "address": "",
    "image_id": "",
    "launch_index": 0,
    "launch_items": [],
    "why": "",
}


def update_devbox(
    caller: Caller, devbox_id: str, parameters: Mapping[str, Any], *, raw_body: bytes, request_id: str | None
) -> None:
    """Change name and metadata; what is None stays. Raises NotFound, BadRequest for a reused request id."""
    selectors.access_devbox(caller, devbox_id)
    sets: list[str] = []
    values: list[Any] = []
    if parameters.get("name") is not None:
        sets.append("name = %s")
        values.append(parameters["name"])
    if parameters.get("metadata") is not None:
        sets.append("metadata = %s::jsonb")
        values.append(orjson.dumps(parameters["metadata"]).decode())

    def update() -> str:
        if sets:
            with connection.cursor() as cursor:
                cursor.execute(f"UPDATE devboxes_devbox SET {', '.join(sets)} WHERE id = %s", [*values, devbox_id])
        return devbox_id

    with transaction.atomic():
        idempotent(caller, request_id, f"POST /v1/devboxes/{devbox_id}", body_digest(raw_body), update, devbox_id)
    touch(devbox_id, "call")


def request_shutdown(
    devbox_id: str,
    *,
    reason: str = "api_shutdown",
    why: str = "it was asked to shut down",
    caller: Caller | None = None,
) -> bool:
    """Let a devbox end, whatever it is doing: its status is `shutdown` on return, its box goes in a moment. `caller`:
    who asked; None for the operator's tools.

    False: it was over already. Whoever works on it loses it, and its host refuses their late calls.
    """
    return devbox_flow.request(
        devbox_id,
        {
            "wants": "shutdown",
            "step": states.TEARDOWN,
            "step_since": DatabaseNow(),
            **entering(states.TEARDOWN),
            "shutdown_reason": reason,
            "why": why,
            "cause": {"kind": "shutdown_requested", **_asked_by(caller)},
        },
        guard="ended_at IS NULL",
        alongside=transition("shutdown", None),
    )


def suspend_devbox(caller: Caller, devbox_id: str, *, request_id: str | None) -> None:
    """Suspend a devbox of the caller's that runs, whatever it is doing; its flow does the rest. Raises NotFound,
    BadRequest when it does not run."""
    row = selectors.access_devbox(caller, devbox_id)

    def suspend() -> str:
        if not request_suspend(devbox_id, why="it was asked to be suspended", caller=caller):
            status = selectors.access_devbox(caller, devbox_id).status
            raise BadRequest(f"devbox {devbox_id} is {status}; only a running one can be suspended")
        return devbox_id

    with transaction.atomic():
        idempotent(caller, request_id, f"POST /v1/devboxes/{row.id}/suspend", body_digest(b""), suspend, devbox_id)


def request_suspend(devbox_id: str, *, why: str, caller: Caller | None = None) -> bool:
    """Record that a running devbox shall be suspended: it is `suspending` on return. False: it does not run."""
    return devbox_flow.request(
        devbox_id,
        {
            "wants": "suspended",
            "step": states.RUN_HOOKS,
            "step_since": DatabaseNow(),
            **entering(states.RUN_HOOKS),
            "why": why,
            "cause": {"kind": "suspend_requested", **_asked_by(caller)},
        },
        guard="status = 'running'",
        alongside=transition("suspending", None),
    )


def resume_devbox(caller: Caller, devbox_id: str, *, request_id: str | None) -> None:
    """Start a suspended devbox of the caller's again. Raises NotFound, BadRequest when it is not suspended,
    TooManyRequests at the account's cap of running devboxes."""
    row = selectors.access_devbox(caller, devbox_id)

    def resume() -> str:
        if row.status != "suspended" or not request_resume(devbox_id):
            status = selectors.access_devbox(caller, devbox_id).status
            raise BadRequest(f"devbox {devbox_id} is {status}; only a suspended one can be resumed")
        return devbox_id

    with transaction.atomic():
        idempotent(caller, request_id, f"POST /v1/devboxes/{row.id}/resume", body_digest(b""), resume, devbox_id)


_WANT_RUNNING = """
UPDATE devboxes_devbox SET wants = 'running', wakes = wakes + 1, wake_at = now()
 WHERE id = %s AND status = 'suspending' AND completed_at IS NULL RETURNING id
"""


def request_resume(devbox_id: str) -> bool:
    """Record that a devbox that is suspended shall run: it is `provisioning` on return. One that is still being
    suspended starts again as soon as it is. True, too, when it is on its way already or runs; False: it is over.

    Raises TooManyRequests at the account's cap of running devboxes.
    """
    with transaction.atomic():
        found = Devbox.objects.values_list("account_id", "status").filter(pk=devbox_id).first()
        if found is None or found[1] in states.OVER:
            return False
        if found[1] == "suspended":
            _check_cap(found[0])
            columns = {
                "wants": "running",
                "step": states.READMIT,
                "step_since": DatabaseNow(),
                **entering(states.READMIT),
                "why": "",
                "cause": None,
            }
            beside = transition(states.STATUS[states.READMIT], None)
            if devbox_flow.request(devbox_id, columns, guard="status = 'suspended'", alongside=beside):
                return True
        elif found[1] == "suspending":
            with connection.cursor() as cursor:
                cursor.execute(_WANT_RUNNING, [devbox_id])
                if cursor.fetchone() is not None:
                    devbox_flow.nudge(devbox_id)
                    return True
    # Somebody was quicker. What they made of it is what counts.
    return bool(Devbox.objects.filter(pk=devbox_id, ended_at__isnull=True).exists())


def _asked_by(caller: Caller | None) -> dict[str, str]:
    asked = {"key_id": caller.key_id, "member_id": caller.member_id} if caller else {}
    return {name: value for name, value in asked.items() if value}


def keep_alive(devbox_id: str) -> None:
    """Note that the devbox shall count as in use, now."""
    _note(devbox_id, "keep_alive")


def _note(devbox_id: str, what: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE devboxes_devbox SET last_activity_at = now(), last_activity_kind = %s WHERE id = %s "
            f"RETURNING {RELAXED}",
            [what, devbox_id],
        )


class _Touched:
    """When this process last noted which use of which devbox: a busy one costs an UPDATE every few seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at: dict[tuple[str, str], float] = {}

    def due(self, use: tuple[str, str]) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._at.get(use, -TOUCH_SECONDS) < TOUCH_SECONDS:
                return False
            if len(self._at) > 10_000:
                self._at = {key: at for key, at in self._at.items() if now - at < TOUCH_SECONDS}
            self._at[use] = now
            return True


_touched = _Touched()


def touch(devbox_id: str, what: str) -> None:
    """Note that the devbox was used, and as what (one of `states.ACTIVITIES`). Cheap: of one kind it writes once in
    ten seconds per process, so the time and the kind in the row are right to ten seconds."""
    if _touched.due((devbox_id, what)):
        _note(devbox_id, what)


def use_running(caller: Caller, devbox_id: str, what: str, activity: str) -> selectors.ExecutionContext:
    """The context of a running devbox, whose use as `activity` is noted. `what` is possible while it runs only, for
    the error.

    Raises NotFound, BadRequest when it does not run.
    """
    context = selectors.execution_context(caller, devbox_id)
    if context.status != "running" or context.host_id is None:
        raise BadRequest(f"devbox {context.devbox_id} is {context.status}; {what} while it is running")
    context.check_door()
    touch(context.devbox_id, activity)
    return context
