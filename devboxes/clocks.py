"""The clock of a devbox that runs: its keep-alive time.

In charge of: when it fires, and of making sure first. It sleeps by the database's clock and is made sure of by the
host's own, which nobody sets: a jump of the wall clock ends nothing. Not in charge of what follows (`devbox_flow`).
"""

from __future__ import annotations

import logging
from typing import Final

from devboxes import states
from devboxes.flow_rows import DevboxRow
from flows.outcomes import DatabaseNow, Next, Outcome, Wait

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 3600.0
SLACK_SECONDS: Final = 2.0
"""How far the two clocks may differ over a devbox's life without one of them having been set."""


def first_look(row: DevboxRow) -> float:
    """How long one that starts now may sleep."""
    return float(min(row.keep_alive_seconds, LOOK_SECONDS))


def running(row: DevboxRow) -> Outcome:
    """Nothing, until its keep-alive time is over."""
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
