"""Suspending a devbox and bringing it back: the steps between `running` and `suspended`, and from there to `boot`.

    run_hooks -> quiet -> suspend -> suspended -> readmit -> take_disk -> boot

In charge of: what each of them asks of the host and of the other rooms, and of the promise of CPU and memory, which
goes back with the settle into `suspended` and is made again with the one out of `readmit`. The disk stays promised.
Not in charge of: who may ask (`services`), which moves are legal (`states`), the box once it boots (`devbox_flow`).

Every step may run twice: the host's verbs answer a repetition with what is, and the promise moves only with a settle.
A shutdown takes the row from any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from devboxes import launch, launch_logs, logs, saves, states
from devboxes.flow_rows import DISK_LEFT_MIN, MIB, DevboxRow, fail, host_is_lost, host_lost
from devboxes.launch_logs import LAUNCH_HOLD_MS, LAUNCH_LOOK_SECONDS
from flows.outcomes import DatabaseNow, Next, Outcome, Wait
from hostd.messages import StateReply
from hosts import placement, registry
from hosts.client import HostRefused

log = logging.getLogger(__name__)

SIGKILL: Final = 9
QUIET_WITHIN: Final = timedelta(seconds=60)
QUIET_AGAIN_SECONDS: Final = 0.5
SUSPEND_AGAIN_SECONDS: Final = 0.3
ROOM_AGAIN_SECONDS: Final = 1.0
SUSPENDED_LOOK_SECONDS: Final = 3600.0
SAVE_AFTER_SECONDS: Final = 5.0
"""One that is resumed at once is not worth a way to S3."""
SAVE_LOOK_SECONDS: Final = 3.0
SAVE_AGAIN_SECONDS: Final = 300.0
FETCH_AGAIN_SECONDS: Final = 0.5


def run_hooks(row: DevboxRow) -> Outcome:
    """Run its suspend commands, one after the other, for as long as they may take together. Whatever becomes of them is
    logged and stops nothing."""
    hooks = launch.suspend_work(row.id)
    left = (hooks.within - (row.now - row.step_since)).total_seconds()
    entries: list[logs.Entry] = []
    for piece in hooks.work:
        row.check()
        state = _run(row, piece) if left > 0 else _became(row, piece)
        if state is None:
            break
        if state["state"] == "running":
            if left > 0:
                return Wait(min(left, LAUNCH_LOOK_SECONDS))
            text = f"it was stopped: suspend commands may take {hooks.within.total_seconds():g} s together"
            entries.append(logs.Entry(piece.source, piece.id, "warning", cmd=piece.title, message=text))
            row.host.kill(box=row.id, id=piece.id, fence=row.fence, signal=SIGKILL)
            state = row.host.state(box=row.id, id=piece.id)
            if state["state"] == "running":
                break  # on its way down; its box follows
        entries += launch_logs.ended(row.host, row.id, piece, state).entries
    return Next(states.QUIET, also=launch_logs.writing(row.id, entries) if entries else None)


def _run(row: DevboxRow, piece: launch.Work) -> StateReply:
    return row.host.spawn(box=row.id, id=piece.id, fence=row.fence, body=piece.body, hold_ms=LAUNCH_HOLD_MS)


def _became(row: DevboxRow, piece: launch.Work) -> StateReply | None:
    """What became of it; None when it was not begun."""
    try:
        return row.host.state(box=row.id, id=piece.id)
    except HostRefused as error:
        if error.code != "unknown_id":
            raise
        return None


def quiet(row: DevboxRow) -> Outcome:
    """Let the other rooms end what they run in it and bring home what they need, for a minute at most, and log what the
    entrypoint and background processes have written."""
    if row.now - row.step_since < QUIET_WITHIN and not registry.before_suspend(row.id):
        return Wait(QUIET_AGAIN_SECONDS)
    launch_logs.keep_entrypoint(row)
    launch_logs.keep_late(row)
    return Next(states.SUSPEND)


def suspend(row: DevboxRow) -> Outcome:
    """Have its box ended and its disk written, until the host says that this is done; then give CPU and memory back."""
    try:
        done = row.host.suspend(box=row.id, fence=row.fence)
    except HostRefused as error:
        if error.code != "unknown_box":
            raise
        return fail("health_check_failed", f"its host lost its disk: {error.message}", "disk_lost", step=row.step)
    if not done:
        return Wait(SUSPEND_AGAIN_SECONDS)
    registry.after_suspend(row.id)
    learnt: dict[str, object] = {
        "compute_reserved": False,
        "suspended_at": DatabaseNow(),
        "end_at": None,
        "slot": "",
        "address": "",
        "seen": "asleep",
        "seen_at": DatabaseNow(),
        "stored_at": None,
    }
    seconds = 0.0 if row.wants == "running" else SAVE_AFTER_SECONDS
    return Wait(seconds, learnt, also=_giving_back(row), step=states.SUSPENDED)


def suspended(row: DevboxRow) -> Outcome:
    """Have its disk saved to S3, once it has slept for a moment; then nothing, until somebody wants it to run: a
    request, which may have come while it was being suspended."""
    if row.wants == "running":
        return Next(states.READMIT, {"why": "", "cause": None})
    keeper = saves.keeper()
    if keeper is None or row.stored_at is not None:
        return Wait(SUSPENDED_LOOK_SECONDS)
    left = SAVE_AFTER_SECONDS - (row.now - row.step_since).total_seconds()
    if left > 0:
        return Wait(left)
    if not row.save_id:
        return Wait(SAVE_LOOK_SECONDS, {"save_id": keeper.begin(row.id, row.starts)})
    save = keeper.look(row.save_id)
    if save is None or save.failed:
        log.error("the disk of %s could not be saved and is tried again: %s", row.id, save.failed if save else "gone")
        keeper.drop(row.save_id)
        return Wait(SAVE_AGAIN_SECONDS, {"save_id": ""})
    if not save.stored:
        return Wait(SAVE_LOOK_SECONDS)
    return Wait(SUSPENDED_LOOK_SECONDS, {"stored_at": DatabaseNow()})


def readmit(row: DevboxRow) -> Outcome:
    """Promise it CPU and memory again on the host that has its disk; or, where that is full or away and its disk is in
    S3, all of its size on another one. Wait while there is no room."""
    assert row.host_id is not None
    is_lost = host_is_lost(row.host_id)
    if is_lost and row.stored_at is None:
        return host_lost(row.host_id, "its host was lost, and its disk with it")
    learnt: dict[str, object] = {
        "compute_reserved": True,
        "placed_at": DatabaseNow(),
        "starts": row.starts + 1,
        "launch_index": 0,
        "launch_items": [],
        "launch_total": launch.count_again(row.id),
        "seen": "",
    }
    if row.compute_reserved:  # its host was restarted under it: the promise stands, what ran is gone
        registry.after_suspend(row.id, "its host was restarted")
        return Next(states.TAKE_DISK, learnt)
    host_id, compute = row.host_id, (row.cpu_millis, row.memory_mb)
    if is_lost or not placement.has_compute(host_id, *compute):
        return _elsewhere(row, learnt) or Wait(ROOM_AGAIN_SECONDS)
    return Next(states.TAKE_DISK, learnt, also=lambda cursor: placement.reserve_compute(cursor, host_id, *compute))


def take_disk(row: DevboxRow) -> Outcome:
    """Have its disk made a box's again; one that still is a box's stays it. On a host that does not have it it is made
    of what is in S3."""
    asked: dict[str, Any] = {"box": row.id, "fence": row.fence, "image": row.image_id}
    asked |= {"disk_bytes": row.disk_bytes, "machine_id": row.machine_id or None}
    try:
        return Next(states.BOOT, {"slot": row.host.resume(**asked), "disk_at": DatabaseNow()})
    except HostRefused as error:
        keeper = saves.keeper()
        if error.code != "unknown_box" or row.stored_at is None or keeper is None:
            raise
    assert row.host_id is not None
    if not keeper.fetch(row.save_id, row.host_id):
        # Its host bounds how long that may take, and says so.
        return Wait(FETCH_AGAIN_SECONDS, {"deadline_at": DatabaseNow(states.seconds_for(row.step) or 0.0)})
    # What it is made of counts as used, and is held by the copy: the disk's own limit is for what comes on top.
    save = keeper.look(row.save_id)
    size = save.size_bytes if save is not None else 0
    asked["disk_bytes"] = max(DISK_LEFT_MIN, row.disk_mb * MIB - size)
    slot = row.host.resume(snapshot=row.save_id, **asked)
    return Next(states.BOOT, {"slot": slot, "disk_at": DatabaseNow(), "source_bytes": size})


def _elsewhere(row: DevboxRow, learnt: dict[str, object]) -> Outcome | None:
    """Another host for one whose disk is in S3. What its old host has of it is unknown to that from then on: it is kept
    there for a day and deleted."""
    if row.stored_at is None or saves.keeper() is None:
        return None
    hosts = placement.choose(*row.size, row.architecture, row.image_id, limit=2)
    found = next((host_id for host_id, _ in hosts if host_id != row.host_id), None)
    if found is None:
        return None
    old, disk = str(row.host_id), row.disk_mb

    def move(cursor: Any) -> bool:
        placement.release(cursor, old, 0, 0, disk)
        return placement.reserve(cursor, found, *row.size)

    return Next(states.TAKE_DISK, {**learnt, "host_id": found}, also=move)


def think_again(row: DevboxRow) -> Outcome | None:
    """Its host fell silent while it was to wake there: let go of that, if its disk is in S3. Nothing of the devbox has
    run yet, so whatever the host made of it, it is worth no more than what is in S3."""
    if row.stored_at is None or row.host_id is None or placement.is_heard(row.host_id):
        return None
    return Next(states.READMIT, {"compute_reserved": False}, also=_giving_back(row))


def _no_room(row: DevboxRow) -> Outcome | None:
    """No room came in time. A disk is worth more than an answer: it sleeps on, and may be asked for again."""
    assert row.host_id is not None
    if row.compute_reserved or (host_is_lost(row.host_id) and row.stored_at is None):
        return None
    seconds = states.seconds_for(row.step)
    heard = placement.is_heard(row.host_id)
    what = "its host had no room for it" if heard else "its host was not heard"
    learnt = {
        "wants": "suspended",
        "why": f"it was not resumed: {what} for {seconds:g} s",
        "cause": {"kind": "no_room"},
    }
    return Wait(SUSPENDED_LOOK_SECONDS, learnt, step=states.SUSPENDED)


EXPIRED: Final[dict[str, Callable[[DevboxRow], Outcome | None]]] = {
    states.LAST_LOOK: lambda row: Wait(ROOM_AGAIN_SECONDS, step=states.RUNNING),
    states.RUN_HOOKS: lambda row: Next(states.QUIET),
    states.READMIT: _no_room,
}
"""What to do when the time of one of these steps is up; the others' devbox fails."""


def _giving_back(row: DevboxRow) -> Callable[[Any], bool] | None:
    if not row.compute_reserved or row.host_id is None:
        return None
    host_id, cpu, memory = row.host_id, row.cpu_millis, row.memory_mb

    def give_back(cursor: Any) -> bool:
        placement.release(cursor, host_id, cpu, memory, 0)
        return True

    return give_back
