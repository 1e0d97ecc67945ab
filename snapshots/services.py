"""What changes snapshots at a caller's request, and what they mean for their devboxes.

In charge of rules that need the database and of writing intent. Not in charge of doing it (`snapshots.snapshot_flow`),
nor of what a field may contain (`snapshots.schemas`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from django.db import connection, transaction

from api.callers import Caller
from api.errors import BadRequest, Conflict, TooManyRequests
from api.idempotency import body_digest, idempotent
from api.ids import new_id
from devboxes.models import Devbox
from devboxes.selectors import access_devbox
from devboxes.services import use_running
from flows.outcomes import DatabaseNow
from snapshots import selectors, states
from snapshots.models import DiskSnapshot
from snapshots.snapshot_flow import snapshot_flow

IN_PROGRESS_MAX: Final = 50
"""Snapshots of an account that may be in progress at once."""


def take_snapshot(
    caller: Caller,
    devbox_id: str,
    parameters: Mapping[str, Any],
    *,
    raw_body: bytes,
    request_id: str | None,
    route: str,
    id: str | None = None,
) -> str:
    """Begin a snapshot of a running devbox and return its id, `id` if it is new.

    Raises NotFound, BadRequest when the devbox does not run or the request id was used for another body,
    TooManyRequests.
    """
    snapshot_id = id or new_id("snp")
    with transaction.atomic():

        def create() -> str:
            use_running(caller, devbox_id, "snapshots are taken", "call")
            going_on = DiskSnapshot.objects.filter(
                account_id=caller.account_id, completed_at__isnull=True, status=states.IN_PROGRESS, own_turn=None
            )
            if going_on.count() >= IN_PROGRESS_MAX:
                raise TooManyRequests(f"{IN_PROGRESS_MAX} snapshots of this account are in progress", retry_after=5)
            devbox = Devbox.objects.values("host_id", "source_bytes", "launch_parameters").get(pk=devbox_id)
            DiskSnapshot.objects.create(
                id=snapshot_id,
                account_id=caller.account_id,
                devbox_id=devbox_id,
                name=parameters.get("name") or "",
                commit_message=parameters.get("commit_message") or "",
                metadata=parameters.get("metadata") or {},
                step=states.TAKE,
                host_id=devbox["host_id"],
                base_bytes=devbox["source_bytes"],
                launch_parameters=devbox["launch_parameters"],
            )
            return snapshot_id

        access_devbox(caller, devbox_id)
        key = f"{route} {devbox_id}"
        made, replayed = idempotent(caller, request_id, key, body_digest(raw_body), create, snapshot_id)
    if not replayed:
        snapshot_flow.nudge(made)
    return made


def update_snapshot(caller: Caller, snapshot_id: str, parameters: Mapping[str, Any]) -> None:
    """Change name, message and metadata; what is None stays. Raises NotFound."""
    row = selectors.access_snapshot(caller, snapshot_id)
    if row.status == states.GONE:
        raise BadRequest(f"snapshot {snapshot_id} is deleted")
    sets, values = [], list[Any]()
    for name in ("name", "commit_message"):
        if parameters.get(name) is not None:
            sets.append(f"{name} = %s")
            values.append(parameters[name])
    if parameters.get("metadata") is not None:
        sets.append("metadata = %s::jsonb")
        values.append(orjson.dumps(parameters["metadata"]).decode())
    if sets:
        with connection.cursor() as cursor:
            cursor.execute(f"UPDATE snapshots_disksnapshot SET {', '.join(sets)} WHERE id = %s", [*values, snapshot_id])


def delete_snapshot(caller: Caller, snapshot_id: str) -> None:
    """Let a snapshot be gone: at once for its user, its bytes soon after. One that is deleted stays so.

    Raises NotFound, Conflict for one that is in progress or failed.
    """
    row = selectors.access_snapshot(caller, snapshot_id)
    columns = {
        "step": states.DELETE,
        "step_since": DatabaseNow(),
        "status": states.STATUS[states.DELETE],
        "deadline_at": None,
    }
    if snapshot_flow.request(snapshot_id, columns, guard=f"status = '{states.COMPLETE}'"):
        return
    row = selectors.access_snapshot(caller, snapshot_id)
    if row.status != states.GONE:
        what = "is in progress" if row.status == states.IN_PROGRESS else "failed"
        raise Conflict(f"snapshot {snapshot_id} {what}: only complete ones can be deleted")


# --- for other rooms ---


def why_not_shut_down(devbox_id: str) -> str | None:
    """Why the devbox should not be shut down just now: a snapshot of it is in progress."""
    found = (
        DiskSnapshot.objects.filter(devbox_id=devbox_id, status=states.IN_PROGRESS, own_turn=None)
        .order_by("id")
        .values_list("pk", flat=True)
        .first()
    )
    return f"its snapshot {found} is in progress" if found else None


def disk_is_taken(devbox_id: str) -> bool:
    """Whether no snapshot needs the devbox's box any more: a copy that is taken does not."""
    return not DiskSnapshot.objects.filter(devbox_id=devbox_id, step=states.TAKE).exists()


def on_heard(host_id: str) -> None:
    """Go on with what waits for that host to answer."""
    snapshot_flow.wake_refused("host_id", host_id)
