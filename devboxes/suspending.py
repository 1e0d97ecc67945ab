"""Suspending a devbox and bringing it back: the steps between `running` and `suspended`, and from there to `boot`.

    run_hooks -> quiet -> suspend -> suspended -> readmit -> take_disk -> boot

In charge of: what each of them asks of the host and of the other rooms, and of the promise of CPU and memory, which
goes back with the settle into `suspended` and is made again with the one out of `readmit`. The disk stays promised.
Not in charge of: who may ask (`services`), which moves are legal (`states`), the box once it boots (`devbox_flow`).

Every step may run twice: the host's verbs answer a repetition with what is, and the promise moves only with a settle.
A shutdown takes the row from any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from devboxes import launch, launch_logs, logs, states
from devboxes.flow_rows import DevboxRow, fail, host_is_lost, host_lost
from devboxes.launch_logs import LAUNCH_HOLD_MS, LAUNCH_LOOK_SECONDS
from flows.outcomes import DatabaseNow, Next, Outcome, Wait
from hostd.messages import StateReply
from hosts import placement, registry
from hosts.client import HostRefused

SIGKILL: Final = 9
QUIET_WITHIN: Final = timedelta(seconds=60)
QUIET_AGAIN_SECONDS: Final = 0.5
SUSPEND_AGAIN_SECONDS: Final = 0.3
ROOM_AGAIN_SECONDS: Final = 1.0
SUSPENDED_LOOK_SECONDS: Final = 3600.0


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
    }
    seconds = 0.0 if row.wants == "running" else SUSPENDED_LOOK_SECONDS
    return Wait(seconds, learnt, also=_giving_back(row), step=states.SUSPENDED)


def suspended(row: DevboxRow) -> Outcome:
    """Nothing, until somebody wants it to run: a request, which may have come while it was being suspended."""
    if row.wants == "running":
        return Next(states.READMIT, {"why": "", "cause": None})
    return Wait(SUSPENDED_LOOK_SECONDS)


def readmit(row: DevboxRow) -> Outcome:
    """Promise it CPU and memory again on the host that has its disk; wait while that is full."""
    assert row.host_id is not None
    if host_is_lost(row.host_id):
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
    if not placement.has_compute(host_id, *compute):
        return Wait(ROOM_AGAIN_SECONDS)
    return Next(states.TAKE_DISK, learnt, also=lambda cursor: placement.reserve_compute(cursor, host_id, *compute))


def take_disk(row: DevboxRow) -> Outcome:
    """Have its disk made a box's again; one that still is a box's stays it."""
    slot = row.host.resume(
        box=row.id,
        fence=row.fence,
        image=row.image_id,
        disk_bytes=row.disk_bytes,
        machine_id=row.machine_id or None,
    )
    return Next(states.BOOT, {"slot": slot, "disk_at": DatabaseNow()})


def _no_room(row: DevboxRow) -> Outcome | None:
    """No room came in time. A disk is worth more than an answer: it sleeps on, and may be asked for again."""
    assert row.host_id is not None
    if row.compute_reserved or host_is_lost(row.host_id):
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
