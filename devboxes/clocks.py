"""The clocks of a devbox that runs: its keep-alive time, or how long it may be unused.

In charge of: when they fire, and of making sure first. Both sleep by the database's clock and are made sure of by the
host's own, which nobody sets: a jump of the wall clock ends nothing. Not in charge of: noting use (`services.touch`),
of what follows (`suspending`, `devbox_flow`).

Idle: once nothing was noted for long enough, the devbox goes to `last_look`, where it takes no new work, and a moment
later, when what was on its way has arrived, its host and the other rooms are asked whether anything goes on in it.
Then it runs on, or ends or is suspended; nothing that was accepted is cut off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from devboxes import states
from devboxes.flow_rows import DevboxRow
from flows.outcomes import DatabaseNow, Next, Outcome, Wait
from hosts import registry
from hosts.client import Activity, HostRefused

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 3600.0
SLACK_SECONDS: Final = 2.0
"""How far the two clocks may differ over a devbox's life without one of them having been set."""
DRIFT: Final = 0.001
"""And for each second that passes: two machines' clocks do not run alike."""
DOOR_SECONDS: Final = 1.0
"""From the closing of the door to the last look: requests that had come through have written what they were for."""


def idle_of(launch_parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is done on idling: `idle_time_seconds` and `on_idle`, of whichever field has them."""
    return (launch_parameters.get("lifecycle") or {}).get("after_idle") or launch_parameters.get("after_idle")


def first_look(row: DevboxRow) -> float:
    """How long one that starts now may sleep."""
    return float(min(row.idle_seconds or row.keep_alive_seconds, LOOK_SECONDS))


def running(row: DevboxRow) -> Outcome:
    """Nothing, until its clock may have fired."""
    return _keep_alive(row) if row.idle_seconds is None else _idle(row, row.idle_seconds)


def _keep_alive(row: DevboxRow) -> Outcome:
    if row.end_at is None:
        return Wait(row.keep_alive_seconds, {"end_at": DatabaseNow(row.keep_alive_seconds)})
    left = (row.end_at - row.now).total_seconds()
    if left > 0:
        return Wait(min(left, LOOK_SECONDS))
    if row.host_clock_at_start is not None:
        ran = row.host.hello()["monotonic"] - row.host_clock_at_start
        left = row.keep_alive_seconds - max(0.0, ran)
        if left > SLACK_SECONDS:
            log.warning("%s has run for %.0f s by its host's clock: the database's jumped", row.id, ran)
            return Wait(min(left, LOOK_SECONDS), {"end_at": DatabaseNow(left)})
    why = f"its keep-alive time of {row.keep_alive_seconds} s is over"
    cause = {"kind": "keep_alive_timeout", "seconds": row.keep_alive_seconds}
    learnt = {"wants": "shutdown", "shutdown_reason": "keep_alive_timeout", "why": why, "cause": cause}
    return Next(states.TEARDOWN, learnt)


def _idle(row: DevboxRow, seconds: int) -> Outcome:
    if row.last_activity_at is None or row.last_activity_at > row.now:  # the clock was set back
        return Wait(min(seconds, LOOK_SECONDS), {"last_activity_at": DatabaseNow()})
    left = seconds - (row.now - row.last_activity_at).total_seconds()
    return Wait(min(left, LOOK_SECONDS)) if left > 0 else Wait(DOOR_SECONDS, step=states.LAST_LOOK)


def last_look(row: DevboxRow) -> Outcome:
    """Ask its host, and those who run things in it; then act, or open the door again."""
    seconds = row.idle_seconds
    if seconds is None or row.last_activity_at is None:
        return Wait(0, step=states.RUNNING)
    left = seconds - (row.now - row.last_activity_at).total_seconds()
    if left > 0:
        return Wait(min(left, LOOK_SECONDS), step=states.RUNNING)
    told = _asked(row)
    kind = registry.doing(row.id) or next((kind for kind, count in told.going_on if count), None)
    if kind is not None:
        return _open_again(seconds, {"last_activity_at": DatabaseNow(), "last_activity_kind": kind})
    if (offset := _jumped(row, told.monotonic)) is not None:
        # What was noted before cannot be compared with now, so the clock begins anew.
        log.warning("the clock of %s begins anew: the database's or its host's was set", row.id)
        return _open_again(seconds, {"last_activity_at": DatabaseNow(), "clock_offset": offset})
    left = seconds - told.idle_seconds
    if left > 0.5:
        return _open_again(left, {"last_activity_at": DatabaseNow(-told.idle_seconds)})
    why = f"it was not used for {seconds} s"
    cause = {"kind": "idle", "seconds": seconds}
    if row.on_idle == "suspend":
        return Next(states.RUN_HOOKS, {"wants": "suspended", "why": why, "cause": cause}, also=_still_unused(row))
    learnt = {"wants": "shutdown", "shutdown_reason": "idle", "why": why, "cause": cause}
    return Next(states.TEARDOWN, learnt, also=_still_unused(row))


_UNUSED: Final = "SELECT FROM devboxes_devbox WHERE id = %s AND last_activity_at = %s"


def _still_unused(row: DevboxRow) -> Callable[[Any], bool]:
    """Nothing was noted while we asked: what needs no door, a keep-alive, may come at any time."""
    seen = row.last_activity_at

    def check(cursor: Any) -> bool:
        cursor.execute(_UNUSED, [row.id, seen])
        return cursor.fetchone() is not None

    return check


def _open_again(seconds: float, learnt: dict[str, object]) -> Wait:
    return Wait(min(seconds, LOOK_SECONDS), learnt, step=states.RUNNING)


def _asked(row: DevboxRow) -> Activity:
    """What its host says; of a keeper of an earlier release only the time is known."""
    try:
        return row.host.activity(box=row.id)
    except HostRefused as error:
        if error.code != "unknown_verb":
            raise
        return Activity(0, 0, 0, float("inf"), row.host.hello()["monotonic"])


def _jumped(row: DevboxRow, monotonic: float) -> float | None:
    """The present distance of the two clocks when it is another than it was, else None. How far they were apart is
    known from when it started, or from when this was found last."""
    if row.clock_offset is not None:
        before, since = row.clock_offset, 0.0
    elif row.started_at is not None and row.host_clock_at_start is not None:
        before = row.started_at.timestamp() - row.host_clock_at_start
        since = monotonic - row.host_clock_at_start
    else:
        return None
    offset = row.now.timestamp() - monotonic
    return offset if abs(offset - before) > SLACK_SECONDS + DRIFT * max(0.0, since) else None
