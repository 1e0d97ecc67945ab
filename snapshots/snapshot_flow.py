"""The flow of a snapshot: taken on its host, sent to S3, sealed, read back; thrown away when that fails; deleted.

In charge of the steps and of what failures mean. Not in charge of which steps there are (`snapshots.states`), of S3
(`snapshots.storing`) or of requests from outside (`snapshots.services`).

Only the host knows how far a copy or an upload is, and is asked again until it is done: a killed worker, hostd or S3
costs the time since the last part. What one S3 refuses twice in a row is an error; what is merely away is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

from django.conf import settings
from django.db import connection

from devboxes.flow_rows import host_is_lost
from flows.engine import Flow, Row, Settled
from flows.outcomes import DatabaseNow, Done, Next, Outcome, Superseded, Wait
from hosts import placement
from hosts.client import HostClient, HostRefused, HostUnreachable, StaleFence, client_for
from snapshots import holders, states, storing
from snapshots.models import DiskSnapshot
from storage.objects import StorageError

AGAIN_SECONDS: Final = 0.2
LONG_AGAIN_SECONDS: Final = 2.0
LONG: Final = timedelta(seconds=10)
"""What takes longer is looked at more seldom."""
SILENCE_LOOK_SECONDS: Final = 5.0
KEPT_LOOK_SECONDS: Final = 30 * 86_400.0
IN_USE_AGAIN_SECONDS: Final = 1.0
DELETE_AGAIN_SECONDS: Final = 15.0
REFUSED_TRIES: Final = 2
UPLOADS: Final = 3
FOR_GOOD: Final = frozenset({"missing", "denied", "full", "refused"})
WHY_LIMIT: Final = 1000


@dataclass(slots=True, kw_only=True)
class SnapshotRow(Row):
    """What the steps see of a snapshot."""

    status: str
    devbox_id: str
    host_id: str
    base_bytes: int
    upload: dict[str, Any] | None
    object_size: int | None
    sha256: str
    verified_parts: int
    error_detail: str | None

    @property
    def host(self) -> HostClient:
        """The host it was taken on."""
        return client_for(self.host_id)

    @property
    def started(self) -> storing.Upload:
        """Its upload, which is begun."""
        assert self.upload is not None
        return cast(storing.Upload, self.upload)


def fail(kind: str, message: str) -> Next:
    """It cannot be had: say why, and throw away what there is."""
    return Next(states.DISCARD, {"error_kind": kind, "error_message": message[:WHY_LIMIT]})


class SnapshotFlow(Flow[SnapshotRow]):
    """See `snapshots.states` for the picture."""

    model = DiskSnapshot
    queue = "snapshots"
    row = SnapshotRow

    def __init__(self) -> None:
        self.steps: dict[str, Callable[[SnapshotRow], Outcome]] = {
            states.TAKE: self.take,
            states.SEND: self.send,
            states.SEAL: self.seal,
            states.VERIFY: self.verify,
            states.KEPT: self.kept,
            states.DISCARD: self.discard,
            states.DELETE: self.delete,
        }

    def settled(self, row: SnapshotRow, step: str, outcome: Outcome) -> Settled:
        """Status and deadline follow from the step."""
        if step == row.step:
            return Settled(hint=False)
        seconds = states.SECONDS.get(step)
        return Settled({"status": states.STATUS[step], "deadline_at": DatabaseNow(seconds) if seconds else None})

    def expired(self, row: SnapshotRow) -> Outcome | None:
        """Past a step's time it fails; a host's silence is waited for besides, until the host is lost."""
        if row.step == states.DISCARD:
            return Done(step=states.FAILED)  # the host's reports tell of what it still has
        seconds = states.SECONDS.get(row.step)
        if seconds is None:
            return None
        if row.step in (states.TAKE, states.SEND) and not placement.is_heard(row.host_id):
            if host_is_lost(row.host_id):
                return fail("host_lost", "its host was lost before it was in S3")
            if row.now - row.step_since < timedelta(seconds=seconds + settings.BERTH.LOST_AFTER):
                return Wait(SILENCE_LOOK_SECONDS, {"deadline_at": DatabaseNow(seconds)})
        last = f"; the last trouble was: {row.error_detail}" if row.error_detail else ""
        return fail("timeout", f"to {row.step} it took longer than {seconds:g} s{last}")

    def on_exception(self, row: SnapshotRow, error: Exception) -> Outcome | None:
        """What the host or S3 has against it; None: try again later."""
        if isinstance(error, StaleFence):
            raise Superseded(row.id) from error
        if row.step in (states.DISCARD, states.DELETE, states.KEPT):
            return None
        if isinstance(error, storing.Damaged):
            return fail("corrupt", f"S3 does not give it back as it was sent: {error}")
        if isinstance(error, StorageError):
            return self._refused_by_s3(row, error.kind, str(error))
        if isinstance(error, HostRefused):
            if error.code == "storage":
                return self._refused_by_s3(row, str(error.extra.get("kind")), error.message)
            if error.code in ("unknown_box", "unknown_id", "unknown_image"):
                what = "its devbox was gone" if row.step == states.TAKE else "its host lost the copy"
                return fail("gone", f"{what} before it was in S3: {error.message}")
            if error.code in ("no_space", "too_large", "bad_request"):
                return fail(error.code, f"its host refused to {row.step} it: {error.message}")
        if isinstance(error, HostUnreachable) and host_is_lost(row.host_id):
            return fail("host_lost", f"its host was lost before it was in S3: {error.reason}")
        return None

    def _refused_by_s3(self, row: SnapshotRow, kind: str, message: str) -> Outcome | None:
        if kind not in FOR_GOOD or row.attempts < REFUSED_TRIES:
            return None
        tries = int((row.upload or {}).get("tries", 0))
        if kind == "missing" and row.upload is not None and tries < UPLOADS and row.step != states.VERIFY:
            # The bucket, or only what was begun in it? A new upload tells.
            return Next(states.SEND, {"upload": storing.begin(row.id, tries + 1), "sent_bytes": 0})
        return fail(f"storage_{kind}", f"S3 refused it ({kind}): {message}")

    # The steps.

    def take(self, row: SnapshotRow) -> Outcome:
        """Have the disk copied."""
        reply = row.host.snapshot(box=row.devbox_id, snapshot=row.id, fence=row.fence, base_bytes=row.base_bytes)
        if reply["state"] != "taken":
            return self._again(row)
        learnt: dict[str, object] = {"size_bytes": reply["size_bytes"], "freeze_ms": reply["freeze_ms"]}
        learnt |= {"frozen": reply["frozen"], "image_id": reply["image"], "taken_at": DatabaseNow()}
        return Next(states.SEND, learnt, also=holders.noting(row.id, row.host_id))

    def send(self, row: SnapshotRow) -> Outcome:
        """Have it uploaded: give the host URLs as it wants them, and look how far it is."""
        if row.upload is None:
            return Next(states.SEND, {"upload": storing.begin(row.id, 1), "part_bytes": storing.PART_BYTES})
        upload = row.started
        reply = row.host.send_snapshot(
            snapshot=row.id,
            fence=row.fence,
            upload=upload["name"],
            part_bytes=storing.PART_BYTES,
            urls=storing.urls(upload),
        )
        learnt: dict[str, object] = {"sent_bytes": reply["sent_bytes"]}
        if reply["state"] == "sealed":
            learnt |= {"upload": {**upload, "want": None, "parts": reply["parts"]}}
            learnt |= {"object_size": reply["size"], "sha256": reply["sha256"], "verified_parts": 0}
            return Next(states.SEAL, learnt)
        want = reply.get("want")
        if want != upload.get("want"):
            learnt["upload"] = {**upload, "want": want}
        if want is not None:
            return Next(states.SEND, learnt)
        return self._again(row, learnt)

    def seal(self, row: SnapshotRow) -> Outcome:
        """Make the parts one object."""
        assert row.object_size is not None
        storing.seal(row.started, row.object_size)
        return Next(states.VERIFY, {"object_key": row.started["key"]})

    def verify(self, row: SnapshotRow) -> Outcome:
        """Read it back, and only then say that it is complete."""
        done = storing.verify(row.started, row.sha256, row.verified_parts)
        if done < len(row.started["parts"]):
            return Next(states.VERIFY, {"verified_parts": done})
        learnt = {"verified_parts": done, "stored_at": DatabaseNow(), "upload": None}
        return Wait(KEPT_LOOK_SECONDS, learnt, step=states.KEPT)

    def kept(self, row: SnapshotRow) -> Outcome:
        """Nothing, until it is deleted."""
        return Wait(KEPT_LOOK_SECONDS)

    def discard(self, row: SnapshotRow) -> Outcome:
        """Leave nothing of one that failed."""
        storing.remove(row.id, row.upload)
        if not self._dropped(row):
            return Wait(DELETE_AGAIN_SECONDS)
        return Done({"upload": None}, step=states.FAILED)

    def delete(self, row: SnapshotRow) -> Outcome:
        """Delete its bytes, in S3 and on every host, once no devbox is being made of it any more. A devbox that was
        made of it has its own disk."""
        if holders.in_use(row.id):
            return Wait(IN_USE_AGAIN_SECONDS)
        storing.remove(row.id, row.upload)
        if not self._dropped(row):
            return Wait(DELETE_AGAIN_SECONDS)
        return Done({"upload": None}, step=states.DELETED)

    def _dropped(self, row: SnapshotRow) -> bool:
        """Whether no host has it any more; one that is lost does not count."""
        everywhere = True
        for host_id in {row.host_id, *holders.of(row.id)}:
            row.check()
            try:
                client_for(host_id).delete_snapshot(snapshot=row.id, fence=row.fence)
            except HostUnreachable:
                if not host_is_lost(host_id):
                    everywhere = False
                    continue
            except HostRefused as error:
                if isinstance(error, StaleFence):
                    raise
                everywhere = False
                continue
            with connection.cursor() as cursor:
                holders.forget(cursor, row.id, host_id)
        return everywhere

    def _again(self, row: SnapshotRow, learnt: dict[str, object] | None = None) -> Wait:
        pause = LONG_AGAIN_SECONDS if row.now - row.step_since > LONG else AGAIN_SECONDS
        return Wait(pause, learnt or {})


snapshot_flow = SnapshotFlow()
