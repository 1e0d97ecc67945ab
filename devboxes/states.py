"""The life of a devbox as literal tables: step -> public status, legal moves, and how long each step may take.

    place ──► prepare_disk ──► boot ──► launch ──► running ◄──► last_look       provisioning: place, prepare_disk, boot,
                                 ▲                    │             │                         readmit, take_disk
                                 │                    ▼             ▼           initializing: launch
    suspended ──► readmit ──► take_disk         run_hooks ◄─────────┘           running:      running, last_look
        ▲                                             │                         suspending:   run_hooks, quiet, suspend
        └─────────────── suspend ◄── quiet ◄──────────┘                         suspended:    suspended

    from any of these:   asked to end, a clock over, entrypoint out:   teardown ──► gone     (shutdown)
                         it failed, or its time was up:                clean_up ──► failed   (failure)

A warm box needs no `boot`, a devbox without launch work no `launch`: such a step is gone over. A devbox whose host was
restarted goes from where it was to `readmit`, on the disk that its host still has. One that is resumed is provisioning,
and never says `resuming`, which clients take for an end.

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
LAST_LOOK: Final = "last_look"
"""Its idle time seems to be over: the door is closed to new work, and its host is asked."""
RUN_HOOKS: Final = "run_hooks"
QUIET: Final = "quiet"
SUSPEND: Final = "suspend"
SUSPENDED: Final = "suspended"
READMIT: Final = "readmit"
TAKE_DISK: Final = "take_disk"
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
    LAST_LOOK: "running",
    RUN_HOOKS: "suspending",
    QUIET: "suspending",
    SUSPEND: "suspending",
    SUSPENDED: "suspended",
    READMIT: "provisioning",
    TAKE_DISK: "provisioning",
    TEARDOWN: "shutdown",
    GONE: "shutdown",
    CLEAN_UP: "failure",
    FAILED: "failure",
}

MOVES: Final[dict[str, frozenset[str]]] = {
    PLACE: frozenset({PREPARE_DISK, TEARDOWN, CLEAN_UP}),
    PREPARE_DISK: frozenset({BOOT, LAUNCH, RUNNING, TEARDOWN, CLEAN_UP}),
    BOOT: frozenset({LAUNCH, RUNNING, READMIT, TEARDOWN, CLEAN_UP}),
    LAUNCH: frozenset({RUNNING, READMIT, TEARDOWN, CLEAN_UP}),
    RUNNING: frozenset({LAST_LOOK, RUN_HOOKS, READMIT, TEARDOWN, CLEAN_UP}),
    LAST_LOOK: frozenset({RUNNING, RUN_HOOKS, READMIT, TEARDOWN, CLEAN_UP}),
    RUN_HOOKS: frozenset({QUIET, TEARDOWN, CLEAN_UP}),
    QUIET: frozenset({SUSPEND, TEARDOWN, CLEAN_UP}),
    SUSPEND: frozenset({SUSPENDED, TEARDOWN, CLEAN_UP}),
    SUSPENDED: frozenset({READMIT, TEARDOWN, CLEAN_UP}),
    READMIT: frozenset({TAKE_DISK, SUSPENDED, TEARDOWN, CLEAN_UP}),
    TAKE_DISK: frozenset({BOOT, READMIT, TEARDOWN, CLEAN_UP}),
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
"""Every status of the contract, in its order. No devbox is ever `resuming`."""

OVER: Final = frozenset({"failure", "shutdown"})
"""Statuses that never change again."""

FAILURE_REASONS: Final = ("out_of_memory", "out_of_disk", "execution_failed", "health_check_failed")
SHUTDOWN_REASONS: Final = ("api_shutdown", "keep_alive_timeout", "entrypoint_exit", "idle", "ttl_expired")

ACTIVITIES: Final = ("call", "command", "file", "terminal", "tunnel", "ssh", "keep_alive")
"""What a devbox may last have been used as. Whatever reaches into it or changes it counts, and each byte of a terminal
or a file; what only reads our records (get, lists, waits, logs, why) does not: who waits for a devbox to fall asleep
would keep it awake. `call` is any other change."""

ON_HOST: Final = frozenset(set(STATUS) - {PLACE, GONE, FAILED})
"""Steps in which a host may have something of the devbox."""

UP: Final = frozenset({LAUNCH, RUNNING, LAST_LOOK})
"""Steps in which the box's processes are expected to run."""


def seconds_for(step: str) -> float | None:
    """How long a devbox may stay in a step before it fails; None: as long as it takes."""
    timeouts: dict[str, float | None] = {
        PLACE: settings.BERTH.PLACE_FOR,
        PREPARE_DISK: 120.0,
        BOOT: 120.0,
        LAUNCH: 3600.0,
        RUNNING: None,  # its clocks are `clocks`' business
        LAST_LOOK: 10.0,
        RUN_HOOKS: 75.0,  # a little over the longest time that may be asked for
        QUIET: None,  # the step itself goes on after a minute
        SUSPEND: 900.0,
        SUSPENDED: None,
        READMIT: settings.BERTH.PLACE_FOR,
        TAKE_DISK: 120.0,
        TEARDOWN: None,  # until its host has answered, or is declared lost
        CLEAN_UP: None,
        GONE: None,
        FAILED: None,
    }
    return timeouts[step]


def may_move(step: str, to: str) -> bool:
    """Whether a devbox in `step` may go to `to` (or stay)."""
    return to == step or to in MOVES[step]
