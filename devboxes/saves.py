"""The copy that follows a suspended devbox's disk to S3: the seam to the room that keeps disks.

In charge of the shape of that seam. Not in charge of when a save is begun, asked after and dropped (`suspending`). The
room registers itself from its `apps.py`; where there is none, disks stay on their hosts. A save is in no list of
snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Save:
    """`stored`: all of it is in S3 and was read back; `failed`: why it never will be."""

    stored: bool
    failed: str
    size_bytes: int


class Saves(Protocol):
    """Who keeps disks."""

    def begin(self, devbox_id: str, turn: int) -> str:
        """Have the disk of a suspended devbox saved; the save's id, the same for the same `turn` of its sleep."""

    def look(self, id: str) -> Save | None:
        """How far it is; None when it is gone."""

    def fetch(self, id: str, host_id: str) -> bool:
        """Have it on that host; False: it is on its way, ask again. Raises HostError."""

    def drop(self, id: str) -> None:
        """It is not needed any more. Repeatable."""


_saves: list[Saves] = []


def register(saves: Saves) -> None:
    """Say who keeps disks. Once, from `AppConfig.ready`."""
    _saves[:] = [saves]


def keeper() -> Saves | None:
    """Who keeps disks; None: nobody does."""
    return _saves[0] if _saves else None


def drop(save_id: str) -> None:
    """Let go of a devbox's save, if it has one."""
    if save_id and _saves:
        _saves[0].drop(save_id)
