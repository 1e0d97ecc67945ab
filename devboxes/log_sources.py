"""What a devbox's log is made of: rows about it, and the commands that its owners of id prefixes know.

In charge of: the one guarded door to a log (`scope_of`), reading rows, and the seam by which upper rooms bring their
commands (`register`). Not in charge of: cutting output into lines, or putting entries in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final, Protocol

from accounts.sealing import SealBroken
from api.callers import Caller
from api.errors import NotFound
from api.ids import is_id
from api.prepared import fetch_all, fetch_one
from api.threads import in_database
from devboxes import launch, states
from devboxes.log_lines import STDOUT, LogEntry
from devboxes.log_works import Output, Read, Work

RECENT_SECONDS: Final = 30
"""Whoever follows looks back this far for what others commit late."""
ROWS_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose log is read, narrowed to one command or one shell. `over`: its final status is decided; `done`: and nothing
    will be added any more."""

    devbox_id: str
    account_id: str
    host_id: str | None
    step: str
    has_launch_work: bool
    over: bool
    done: bool
    execution_id: str | None = None
    shell_name: str | None = None

    def takes(self, work_id: str) -> bool:
        """Whether a command may be in it, by its id alone."""
        return self.execution_id is None or self.execution_id == work_id


class LogSource(Protocol):
    """What the owner of an id prefix says of its commands in a devbox. All run in a database thread."""

    def newest(self, scope: Scope, limit: int) -> Sequence[Work]:
        """What has not completed, then what has, the last to end first: `limit` in all."""

    def moving(self, scope: Scope, seconds: float) -> Sequence[Work]:
        """What has not completed or did so in the last `seconds`."""

    def some(self, scope: Scope, ids: Sequence[str]) -> Sequence[Work]:
        """Those of the ids that are in the scope."""


_sources: dict[str, LogSource] = {}


def register(prefix: str, source: LogSource) -> None:
    """Say who knows the commands whose ids start with `<prefix>_`. Called once per app from `AppConfig.ready`."""
    _sources[prefix] = source


def sources() -> list[LogSource]:
    """All of them, in the order of registration."""
    return list(_sources.values())


_SCOPE: Final = """
SELECT id, account_id, CASE WHEN step <> 'suspended' THEN host_id END, step, launch_total > 0,
       ended_at IS NOT NULL, completed_at IS NOT NULL
  FROM devboxes_devbox WHERE id = %s AND account_id = %s
"""


def scope_of(caller: Caller, devbox_id: str, execution_id: str | None, shell_name: str | None) -> Scope:
    """The scope as it is now. Raises NotFound for a devbox that is not the caller's."""
    row = fetch_one(_SCOPE, [devbox_id, caller.account_id]) if is_id("dbx", devbox_id) else None
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    return replace(Scope(*row), execution_id=execution_id, shell_name=shell_name)


# --- what happened to the devbox ---

_NARROWED: Final = (
    "devbox_id = %(devbox)s AND (%(execution)s::text IS NULL OR execution_id = %(execution)s) "
    "AND (%(shell)s::text IS NULL OR shell_name = %(shell)s)"
)
_EVENT: Final = (
    "id, (extract(epoch from at) * 1000)::bigint, source, level, execution_id, shell_name, cmd, message, exit_code"
)
_NEWEST_EVENTS: Final = f"""
SELECT {_EVENT} FROM devboxes_devboxlog
 WHERE {_NARROWED} AND started_at IS NULL ORDER BY at DESC, id DESC LIMIT %(limit)s
"""
_RECENT_EVENTS: Final = f"""
SELECT {_EVENT} FROM devboxes_devboxlog
 WHERE {_NARROWED} AND started_at IS NULL AND written_at > clock_timestamp() - make_interval(secs => %(seconds)s)
   AND id > %(after)s
 ORDER BY id LIMIT {ROWS_AT_ONCE}
"""


def newest_events(scope: Scope, limit: int) -> list[LogEntry]:
    """The newest entries that are no command's output, newest first."""
    return [_event(row) for row in fetch_all(_NEWEST_EVENTS, {**_parameters(scope), "limit": limit})]


def recent_events(scope: Scope, seconds: float, after: int) -> list[LogEntry]:
    """Those that were written in the last `seconds` with a number above `after`, by their numbers, which `place` has:
    ROWS_AT_ONCE at most."""
    return [
        _event(row) for row in fetch_all(_RECENT_EVENTS, {**_parameters(scope), "seconds": seconds, "after": after})
    ]


def _parameters(scope: Scope) -> dict[str, Any]:
    return {"devbox": scope.devbox_id, "execution": scope.execution_id, "shell": scope.shell_name}


def _event(row: Sequence[Any]) -> LogEntry:
    number, at_ms, source, level, execution_id, shell_name, cmd, message, exit_code = row
    return LogEntry(
        at_ms, source, level, execution_id or None, shell_name or None, cmd, message, exit_code, place=(-1, number)
    )


# --- launch work ---

_LAUNCHED: Final = """
SELECT execution_id, source, cmd, exit_code, started_at, at, out_size, err_size, id FROM devboxes_devboxlog
 WHERE devbox_id = %(devbox)s AND started_at IS NOT NULL
   AND (%(execution)s::text IS NULL OR execution_id = %(execution)s)
 ORDER BY at DESC, id DESC LIMIT %(limit)s
"""
_OUTPUT: Final = "SELECT stdout, stderr, output_index FROM devboxes_devboxlog WHERE id = %s"


_LAUNCHED_IN: Final = (states.LAUNCH, states.RUNNING, states.TEARDOWN, states.CLEAN_UP)


class LaunchWork:
    """The launch work of devboxes as a source: what has ended is in the rows, what runs is the plan's. Work with a
    secret in it is shown only when it has ended, for then its whole output has been looked through.

    Rows also have what commands' background processes wrote after their end, once the box is gone."""

    def newest(self, scope: Scope, limit: int) -> Sequence[Work]:
        """See LogSource."""
        if scope.shell_name is not None:
            return []
        rows = fetch_all(_LAUNCHED, {**_parameters(scope), "limit": limit})
        ended = [_launched(row) for row in rows]
        if not scope.has_launch_work or scope.done or scope.step not in _LAUNCHED_IN:
            return ended
        known = {work.id for work in ended}
        try:
            plan = launch.plan(scope.devbox_id)
        except SealBroken:
            return ended  # the flow says so
        running = [
            Work(id=piece.id, source=piece.source, cmd=piece.title if piece.awaited else None, began_ms=None)
            for piece in plan
            if piece.id not in known and not piece.secrets and scope.takes(piece.id)
        ]
        return [*running, *ended]

    def moving(self, scope: Scope, seconds: float) -> Sequence[Work]:
        """See LogSource. There are never many, and a follower knows what it has been told."""
        return self.newest(scope, ROWS_AT_ONCE)

    def some(self, scope: Scope, ids: Sequence[str]) -> Sequence[Work]:
        """See LogSource."""
        if not any(work_id.startswith(launch.PREFIX) for work_id in ids):
            return []
        return [work for work in self.newest(scope, ROWS_AT_ONCE) if work.id in ids]


def _launched(row: Sequence[Any]) -> Work:
    work_id, source, cmd, exit_code, started_at, at, out_size, err_size, number = row
    return Work(
        id=work_id,
        source=source,
        cmd=cmd,
        began_ms=milliseconds(started_at),
        ended_ms=milliseconds(at),
        exit_code=exit_code,
        output=partial(_kept, number, (out_size, err_size)),
    )


async def _kept(number: int, sizes: tuple[int, int]) -> Output | None:
    row = await in_database(fetch_one, _OUTPUT, [number])
    if row is None:
        return None
    tails = (bytes(row[0] or b""), bytes(row[1] or b""))
    first = (sizes[0] - len(tails[0]), sizes[1] - len(tails[1]))
    return Output(sizes, row[2], in_memory(tails, first), first)


def in_memory(tails: tuple[bytes, bytes], first: tuple[int, int]) -> Read:
    """Reads what is at hand: the two streams from where they begin."""

    async def read(stream: int, start: int, length: int) -> tuple[int, bytes]:
        tail, begin = (tails[0], first[0]) if stream == STDOUT else (tails[1], first[1])
        start = max(start, begin)
        return start, tail[start - begin : start - begin + length]

    return read


def milliseconds(at: datetime) -> int:
    """A database time as the API shows it."""
    return int(at.timestamp() * 1000)
