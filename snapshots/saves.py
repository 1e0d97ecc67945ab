"""The saves of suspended devboxes: snapshots of their own, which are in no list. See `devboxes.saves`."""

from __future__ import annotations

from api.ids import new_id
from devboxes.models import Devbox
from devboxes.saves import Save
from flows.outcomes import DatabaseNow
from snapshots import states
from snapshots.models import DiskSnapshot
from snapshots.origins import SnapshotOrigins
from snapshots.snapshot_flow import snapshot_flow

_ALIVE = (states.IN_PROGRESS, states.COMPLETE)


class SnapshotSaves:
    """See `devboxes.saves.Saves`."""

    def begin(self, devbox_id: str, turn: int) -> str:
        mine = DiskSnapshot.objects.filter(devbox_id=devbox_id, own_turn=turn, status__in=_ALIVE)
        found = mine.values_list("pk", flat=True).first()
        if found is not None:
            return found
        devbox = Devbox.objects.values("account_id", "host_id", "source_bytes", "launch_parameters").get(pk=devbox_id)
        row = DiskSnapshot(
            id=new_id("snp"),
            account_id=devbox["account_id"],
            devbox_id=devbox_id,
            own_turn=turn,
            step=states.TAKE,
            host_id=devbox["host_id"],
            base_bytes=devbox["source_bytes"],
            launch_parameters=devbox["launch_parameters"],
        )
        DiskSnapshot.objects.bulk_create([row], ignore_conflicts=True)
        made = mine.values_list("pk", flat=True).get()
        snapshot_flow.nudge(made)
        return made

    def look(self, id: str) -> Save | None:
        row = DiskSnapshot.objects.values_list("status", "error_message", "size_bytes").filter(pk=id).first()
        if row is None or row[0] == states.GONE:
            return None
        status, error, size = row
        return Save(status == states.COMPLETE, error or "it failed" if status == states.ERROR else "", size or 0)

    def fetch(self, id: str, host_id: str) -> bool:
        return SnapshotOrigins().fetch(id, host_id)

    def drop(self, id: str) -> None:
        columns = {
            "step": states.DELETE,
            "step_since": DatabaseNow(),
            "status": states.STATUS[states.DELETE],
            "deadline_at": None,
        }
        snapshot_flow.request(id, columns, guard=f"status <> '{states.GONE}'", hint=False)
