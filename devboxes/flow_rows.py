"""A claimed devbox as its steps see it, and what goes with a change of its step: columns, transition, failure.

In charge of what all steps of a devbox share. Not in charge of the steps (`devbox_flow`, `suspending`, `clocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from devboxes import states
from flows.engine import Row
from flows.outcomes import DatabaseNow, Next
from flows.statements import Alongside
from hosts.client import HostClient, client_for
from hosts.models import Host, HostState

MIB: Final = 1 << 20
DISK_LEFT_MIN: Final = 64 * MIB
"""What a disk may grow by at the least, however much it was made of."""
WHY_LIMIT: Final = 2000


@dataclass(slots=True, kw_only=True)
class DevboxRow(Row):
    """What the steps see of a devbox. Its secrets and texts are read by the launch step alone."""

    status: str
    host_id: str | None
    reserved: bool
    image_id: str
    snapshot_id: str | None
    source_bytes: int
    architecture: str
    cpu_millis: int
    memory_mb: int
    disk_mb: int
    keep_alive_seconds: int
    end_at: datetime | None
    host_clock_at_start: float | None
    ended_at: datetime | None
    started_at: datetime | None
    launch_index: int
    launch_total: int
    launch_items: list[dict[str, Any]]
    failure_reason: str | None
    shutdown_reason: str | None
    why: str
    wants: str
    compute_reserved: bool
    machine_id: str
    save_id: str
    stored_at: datetime | None
    starts: int
    idle_seconds: int | None
    on_idle: str
    last_activity_at: datetime | None
    clock_offset: float | None

    @property
    def size(self) -> tuple[int, int, int]:
        """Its size: CPU in thousandths, memory and disk in MiB."""
        return self.cpu_millis, self.memory_mb, self.disk_mb

    @property
    def disk_bytes(self) -> int:
        """What its disk may grow by: what it was made with counts."""
        return max(DISK_LEFT_MIN, self.disk_mb * MIB - self.source_bytes)

    @property
    def host(self) -> HostClient:
        """Its host. Raises RuntimeError when it has none."""
        if self.host_id is None:
            raise RuntimeError(f"devbox {self.id} is in step {self.step} without a host")
        return client_for(self.host_id)


def transition(status: str, failure_reason: str | None, passed: Sequence[str] = ()) -> Alongside:
    """The public transition row that goes with a change of status, after those of statuses `passed` on the way."""
    return Alongside(
        "INSERT INTO devboxes_devboxtransition (devbox_id, status, at, failure_reason) "
        "SELECT settled.id, via.status, clock_timestamp(), %s FROM settled, unnest(%s::text[]) AS via (status)",
        (failure_reason, [*passed, status]),
    )


def entering(step: str) -> dict[str, object]:
    """The columns that follow from being in a step, for those who put a devbox there."""
    seconds = states.seconds_for(step)
    status = states.STATUS[step]
    columns: dict[str, object] = {"status": status, "deadline_at": DatabaseNow(seconds) if seconds else None}
    if status in states.OVER:
        columns["ended_at"] = DatabaseNow()
    return columns


def fail(reason: str, why: str, kind: str, /, **evidence: object) -> Next:
    """The devbox has failed: take its box apart and say why, in words and as a kind of cause with its evidence."""
    cause = {"kind": kind, **{name: value for name, value in evidence.items() if value is not None}}
    return Next(states.CLEAN_UP, {"failure_reason": reason, "why": why[:WHY_LIMIT], "cause": cause})


def host_is_lost(host_id: str) -> bool:
    """Whether nothing of that host will be heard again, as far as we have decided."""
    return (
        Host.objects.filter(pk=host_id, lost_at__isnull=False).exists()
        or not Host.objects.filter(
            pk=host_id, state__in=[HostState.READY, HostState.RETIRING, HostState.ENROLLING]
        ).exists()
    )


def host_lost(host_id: str, why: str) -> Next:
    seen_at = Host.objects.values_list("seen_at", flat=True).filter(pk=host_id).first()
    since = int(seen_at.timestamp() * 1000) if seen_at else None
    return fail("health_check_failed", why, "host_lost", silent_since_ms=since)
