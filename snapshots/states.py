"""The life of a snapshot as literal tables.

    take -> send -> seal -> verify -> kept -> delete -> deleted       in_progress until verify, complete from kept on
      |       |       |       |
      +-------+-------+-------+--> discard -> failed                  error

In charge of the tables. Not in charge of making the moves (`snapshots.snapshot_flow`, `snapshots.services`).

`complete` is said only in `kept`, which is entered when every byte of the sealed object has been read back and was
right. `delete` already says `deleted`: for its user it is gone from then on.
"""

from __future__ import annotations

from typing import Final

TAKE: Final = "take"
SEND: Final = "send"
SEAL: Final = "seal"
VERIFY: Final = "verify"
KEPT: Final = "kept"
DISCARD: Final = "discard"
FAILED: Final = "failed"
DELETE: Final = "delete"
DELETED: Final = "deleted"

IN_PROGRESS: Final = "in_progress"
ERROR: Final = "error"
COMPLETE: Final = "complete"
GONE: Final = "deleted"
STATUSES: Final = (IN_PROGRESS, ERROR, COMPLETE, GONE)

STATUS: Final[dict[str, str]] = {
    TAKE: IN_PROGRESS,
    SEND: IN_PROGRESS,
    SEAL: IN_PROGRESS,
    VERIFY: IN_PROGRESS,
    KEPT: COMPLETE,
    DISCARD: ERROR,
    FAILED: ERROR,
    DELETE: GONE,
    DELETED: GONE,
}

SECONDS: Final[dict[str, float]] = {TAKE: 300.0, SEND: 6 * 3600.0, SEAL: 1800.0, VERIFY: 6 * 3600.0, DISCARD: 3600.0}
"""How long it may stay in a step before it fails; absent: as long as it takes."""
