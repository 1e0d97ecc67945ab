"""The life of a devbox as literal tables: step -> public status, legal moves, and how long each step may take.

    place ──► prepare_disk ──► boot ──► launch ──► running          provisioning: place, prepare_disk, boot
      │            │            │         │           │             initializing: launch
      ├────────────┴────────────┴─────────┴───────────┤             running:      running
      │                                               │
      │ asked to end, keep-alive over, entrypoint out │ it failed, or its time was up
      ▼                                               ▼
    teardown ──► gone                             clean_up ──► failed
      (shutdown)                                      (failure)

A warm box needs no `boot`, a devbox without launch work no `launch`: such a step is gone over.

In charge of: the tables. Not in charge of: making the moves (`devboxes.devbox_flow`, `devboxes.services`).

The status is always STATUS[step] and is written in the same UPDATE as the step, so the two cannot disagree. `teardown`
and `clean_up` already carry their final status: for its user a devbox is over from the moment that is decided, while
its box is still being taken apart. `completed_at` tells when nothing of it is left.
"""

from typing import Final

from django.conf import settings

PLACE: Final = "place"
PREPARE_DISK: Final = "prepare_disk"
BOOT: Final = "boot"
LAUNCH: Final = "launch"
RUNNING: Final = "running"
TEARDOWN: Final = "teardown"
GONE: Final = "gone"
CLEAN_UP: Final = "clean_up"
FAILED: Final = "failed"

STATUS: Final[dict[str, str]] = {
    PLACE: "provisioning",
    PREPARE_DISK: "provisioning",
    BOOT: "provisioning",
    LAUNCH: "initializing",
    RUNNING: "running",
    TEARDOWN: "shutdown",
    GONE: "shutdown",
    CLEAN_UP: "failure",
    FAILED: "failure",
}

MOVES: Final[dict[str, frozenset[str]]] = {
    PLACE: frozenset({PREPARE_DISK, TEARDOWN, CLEAN_UP}),
    PREPARE_DISK: frozenset({BOOT, LAUNCH, RUNNING, TEARDOWN, CLEAN_UP}),
    BOOT: frozenset({LAUNCH, RUNNING, TEARDOWN, CLEAN_UP}),
    LAUNCH: frozenset({RUNNING, TEARDOWN, CLEAN_UP}),
    RUNNING: frozenset({TEARDOWN, CLEAN_UP}),
    TEARDOWN: frozenset({GONE}),
    CLEAN_UP: frozenset({FAILED}),
    GONE: frozenset(),
    FAILED: frozenset(),
}

STATUSES: Final = (
    "provisioning",
    "initializing",
    "running",
    "suspending",
    "suspended",
    "resuming",
    "failure",
    "shutdown",
)
"""Every status of the contract, in its order. Those of suspend are not reached yet."""

OVER: Final = frozenset({"failure", "shutdown"})
"""Statuses that never change again."""

FAILURE_REASONS: Final = ("out_of_memory", "out_of_disk", "execution_failed", "health_check_failed")
SHUTDOWN_REASONS: Final = ("api_shutdown", "keep_alive_timeout", "entrypoint_exit", "idle", "ttl_expired")

ACTIVITIES: Final = ("call", "command", "file", "terminal", "tunnel", "ssh", "keep_alive")
"""What a devbox may last have been used as. Whatever reaches into it or changes it counts, and each byte of a terminal
or a file; what only reads our records (get, lists, waits, logs, why) does not: who waits for a devbox to fall asleep
would keep it awake. `call` is any other change."""

ON_HOST: Final = frozenset({PREPARE_DISK, BOOT, LAUNCH, RUNNING, TEARDOWN, CLEAN_UP})
"""Steps in which a host may have something of the devbox."""

UP: Final = frozenset({LAUNCH, RUNNING})
"""Steps in which the box's processes are expected to run."""


def seconds_for(step: str) -> float | None:
    """How long a devbox may stay in a step before it fails; None: as long as it takes."""
    timeouts: dict[str, float | None] = {
        PLACE: settings.BERTH.PLACE_FOR,
        PREPARE_DISK: 120.0,
        BOOT: 120.0,
        LAUNCH: 3600.0,
        RUNNING: None,  # its end is `end_at`
        TEARDOWN: None,  # until its host has answered, or is declared lost
        CLEAN_UP: None,
        GONE: None,
        FAILED: None,
    }
    return timeouts[step]


def may_move(step: str, to: str) -> bool:
    """Whether a devbox in `step` may go to `to` (or stay)."""
    return to == step or to in MOVES[step]
