"""Executions as a devbox's log sees them.

In charge of: which there are in a scope, and opening what is kept of their output. Not in charge of: cutting it into
entries, which `devboxes.log_works` does for all commands alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final

import orjson

from api import prepared
from api.callers import Caller
from api.ids import is_id
from api.threads import in_database
from devboxes.log_lines import STDOUT
from devboxes.log_sources import Scope, milliseconds
from devboxes.log_works import Output, Work
from executions import endings, outputs
from executions.models import Kept, Status
from executions.selectors import ExecutionView, access_execution

_LIGHT: Final = f"""
SELECT id, command, shell_name, started_at,
       CASE WHEN status = '{Status.COMPLETED}' THEN coalesce(exited_at, completed_at) END AS ended_at,
       exit_status, reason, created_at
  FROM executions_execution
 WHERE devbox_id = %(devbox)s AND account_id = %(account)s
   AND (%(execution)s::text IS NULL OR id = %(execution)s) AND (%(shell)s::text IS NULL OR shell_name = %(shell)s)
"""
_NEWEST: Final = f"{_LIGHT} ORDER BY ended_at DESC NULLS FIRST, id DESC LIMIT %(limit)s"
_MOVING: Final = (
    f"{_LIGHT} AND (completed_at IS NULL OR completed_at > clock_timestamp() - make_interval(secs => %(seconds)s))"
)
_SOME: Final = f"{_LIGHT} AND id = ANY(%(ids)s)"
_INDEX: Final = "SELECT output_index FROM executions_execution WHERE id = %s"


class ExecutionLogs:
    """See devboxes.log_sources.LogSource."""

    def newest(self, scope: Scope, limit: int) -> Sequence[Work]:
        """What has not completed, then what has, the last to end first."""
        return _works(scope, _NEWEST, {"limit": limit})

    def moving(self, scope: Scope, seconds: float) -> Sequence[Work]:
        """What has not completed or did so in the last `seconds`."""
        return _works(scope, _MOVING, {"seconds": seconds})

    def some(self, scope: Scope, ids: Sequence[str]) -> Sequence[Work]:
        """Those of the ids that are in the scope."""
        wanted = [execution_id for execution_id in ids if is_id("exe", execution_id)]
        return _works(scope, _SOME, {"ids": wanted}) if wanted else []


def _works(scope: Scope, sql: str, more: Mapping[str, Any]) -> list[Work]:
    if scope.execution_id is not None and not is_id("exe", scope.execution_id):
        return []
    parameters = {
        "devbox": scope.devbox_id,
        "account": scope.account_id,
        "execution": scope.execution_id,
        "shell": scope.shell_name,
    }
    return [_work(scope, *row) for row in prepared.fetch_all(sql, {**parameters, **more})]


def _work(
    scope: Scope,
    execution_id: str,
    command: str,
    shell_name: str | None,
    started_at: datetime | None,
    ended_at: datetime | None,
    exit_status: int | None,
    reason: str | dict[str, Any] | None,
    created_at: datetime,
) -> Work:
    work = Work(
        id=execution_id,
        source="exec",
        cmd=command,
        began_ms=milliseconds(started_at or created_at),
        shell_name=shell_name,
    )
    if ended_at is None:
        return work
    return replace(
        work,
        ended_ms=max(milliseconds(ended_at), work.began_ms or 0),
        exit_code=exit_status,
        why=endings.why(orjson.loads(reason) if isinstance(reason, str) else reason),
        output=partial(_kept, scope, execution_id),
    )


async def _kept(scope: Scope, execution_id: str) -> Output | None:
    """The output of one that has completed. None when it was lost. Raises what the database raises."""
    view, records = await in_database(_read, scope, execution_id)
    if view.kept == Kept.NOWHERE:
        return None

    async def read(stream: int, start: int, length: int) -> tuple[int, bytes]:
        return await outputs.piece(view, "stdout" if stream == STDOUT else "stderr", start, length)

    return Output((view.out_size, view.err_size), records, read)


def _read(scope: Scope, execution_id: str) -> tuple[ExecutionView, bytes | None]:
    view = access_execution(Caller(account_id=scope.account_id), scope.devbox_id, execution_id)
    row = prepared.fetch_one(_INDEX, [execution_id])
    return view, bytes(row[0]) if row and row[0] is not None else None
