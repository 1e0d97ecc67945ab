"""Named shells: whose turn it is.

In charge of the place of a command in the line of its shell, of finding the next one, and of what a shell's end leaves
in the devbox's log. The shells themselves are the host's: it has a bash per name. Not in charge of steps
(`execution_flow`) or of making rows (`services`).

Places come from one row per (devbox, name), which every INSERT into that line takes: so they are given out in the order
of the commits. A command waits as long as there is an open one with a lower place; numbers may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from django.conf import settings

from api import prepared
from api.errors import BadRequest
from devboxes import logs
from hosts.registry import ExitEvent

NAME_MAX: Final = 128

_AHEAD: Final = """
SELECT count(*) FROM (
SELECT 1 FROM executions_execution
 WHERE devbox_id = %s AND shell_name = %s AND shell_place < %s AND completed_at IS NULL LIMIT 2) AS open
"""
_NEXT: Final = """
SELECT id, step FROM executions_execution
 WHERE devbox_id = %s AND shell_name = %s AND completed_at IS NULL AND shell_name IS NOT NULL
 ORDER BY shell_place LIMIT 1
"""
_FULL: Final = """
SELECT count(*) >= %s::int AND count(*) FILTER (WHERE name = %s) = 0 FROM executions_shellline WHERE devbox_id = %s
"""


def check_name(name: str) -> None:
    """Raise BadRequest unless this can be the name of a shell."""
    if not 1 <= len(name) <= NAME_MAX or not name.isprintable():
        raise BadRequest(f"shell_name: must be 1 to {NAME_MAX} printable characters")


def check_room(devbox_id: str, name: str) -> None:
    """Raise BadRequest when the devbox has as many shells as it may have, and this is another one."""
    most: int = settings.BERTH.CAP_SHELLS
    if prepared.fetch_all(_FULL, (most, name, devbox_id))[0][0]:
        raise BadRequest(f"shell_name: this devbox has the {most} named shells it may have; use one of them")


def ahead(devbox_id: str, name: str, place: int) -> int:
    """How many commands before this one have not ended; 2 stands for more."""
    return int(prepared.fetch_all(_AHEAD, (devbox_id, name, place))[0][0])


def next_in(lines: Iterable[tuple[str, str]]) -> list[str]:
    """The commands whose turn it is now, of lines given as (devbox id, shell name), as far as they wait for it."""
    found = [row for line in sorted(set(lines)) for row in prepared.fetch_all(_NEXT, line)]
    return [execution_id for execution_id, step in found if step == "await_turn"]


def write_notes(cursor: Any, devbox_id: str, execution_id: str, name: str, notes: Sequence[str]) -> None:
    """Tell in the devbox's log what the host said of a shell, in the caller's transaction; once."""
    entries = [
        logs.Entry(
            "exec",
            execution_id=execution_id,
            shell_name=name,
            level="warning",
            message=note,
            notice_id=f"{execution_id}.{number}",
        )
        for number, note in enumerate(notes)
    ]
    logs.write(cursor, devbox_id, entries)


def noted(events: Iterable[ExitEvent]) -> dict[str, Sequence[str]]:
    """The notes of a batch of ends by execution id, for those that have any."""
    return {event.id: event.notes for event in events if event.notes}
