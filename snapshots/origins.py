"""Snapshots as what devboxes are made of: see `devboxes.origins`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from django.db import connection

from api.callers import Caller
from api.errors import BadRequest
from api.ids import is_id
from devboxes.origins import Origin
from hosts.client import client_for
from snapshots import holders, states
from snapshots.models import DiskSnapshot
from storage import objects

_FIELDS: Final = ("id", "status", "error_message", "image_id", "size_bytes", "launch_parameters")


def _origin(row: tuple[Any, ...]) -> Origin:
    id, status, error, image, size, parameters = row
    failed = ""
    if status not in (states.COMPLETE, states.IN_PROGRESS):
        failed = f"snapshot {id} is deleted" if status == states.GONE else f"snapshot {id} failed: {error}"
    return Origin(id, status == states.COMPLETE, failed, image, size, parameters)


class SnapshotOrigins:
    """See `devboxes.origins.Origins`."""

    def access(self, caller: Caller, id: str) -> Origin:
        row = None
        if is_id("snp", id):
            found = (
                DiskSnapshot.objects.filter(pk=id, own_turn=None).values_list("account_id", "public", *_FIELDS).first()
            )
            if found is not None and (found[0] == caller.account_id or (found[1] and found[3] == states.COMPLETE)):
                row = found[2:]
        if row is None or row[1] == states.GONE:
            raise BadRequest(f"snapshot_id: there is no snapshot {id[:60]}")
        origin = _origin(row)
        if origin.failed:
            raise BadRequest(f"snapshot_id: {origin.failed}")
        return origin

    def look(self, id: str) -> Origin | None:
        row = DiskSnapshot.objects.filter(pk=id).values_list(*_FIELDS).first()
        return _origin(row) if row is not None else None

    def holders(self, id: str) -> Sequence[str]:
        return holders.of(id)

    def fetch(self, id: str, host_id: str) -> bool:
        row = DiskSnapshot.objects.get(pk=id)
        reply = client_for(host_id).receive_snapshot(
            snapshot=id,
            # The snapshot's own fence, which its deletion raises: many may fetch it at once, none after that.
            fence=row.fence,
            image=row.image_id,
            size=row.object_size or 0,
            sha256=row.sha256,
            part_bytes=row.part_bytes,
            size_bytes=row.size_bytes or 0,
            url=objects.object_url(row.object_key),
        )
        if reply["state"] != "here":
            return False
        with connection.cursor() as cursor:
            holders.note(cursor, id, host_id)
        return True
