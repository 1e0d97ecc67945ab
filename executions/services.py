"""Writing executions: making one, asking for its stop, completing it, and closing what a devbox leaves behind.

In charge of every statement that makes or ends an execution outside of its steps. Not in charge of the steps
(`execution_flow`), or of waiting for anything.

Each function is one guarded statement for the row or the batch; a repetition finds nothing left to do.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import orjson
from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction

from api import prepared
from api.callers import Caller
from api.errors import BadRequest, TooManyRequests
from api.ids import new_id
from devboxes import selectors as devboxes
from devboxes.devbox_flow import devbox_flow
from devboxes.services import touch
from executions import shells
from executions.endings import ASKED, DEVBOX_ENDING, DEVBOX_SUSPENDED
from executions.execution_flow import START_WITHIN_SECONDS, STORE_WITHIN_SECONDS, execution_flow
from executions.models import Kept
from flows import hints
from flows.statements import FENCE
from hosts.registry import ExitEvent, ExpectedExecution

log = logging.getLogger(__name__)

COMMAND_ID_MAX: Final = 128
REQUEST_ID_MAX: Final = 255
CAP_MARGIN: Final = 128
"""So near to its cap an account's commands are made one after the other, so that the cap is exact."""

Operation = Literal["execute", "execute_async", "execute_sync"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewExecution:
    """What a caller asks for. `request_id` is the request's x-request-id; `id` the one it gets if it is new."""

    operation: Operation
    command: str
    id: str = dataclasses.field(default_factory=lambda: new_id("exe"))
    command_id: str | None = None
    request_id: str | None = None
    attach_stdin: bool = False
    shell_name: str | None = None


# One statement checks that the devbox is the caller's and runs, that the cap leaves room, and makes the row. It is
# the whole cost of a command in the request that brings it.
_MAY: Final = """
       d.id = %(devbox)s AND d.account_id = %(account)s AND d.status = 'running' AND d.step <> 'last_look'
   AND (SELECT count(*) FROM executions_execution e WHERE e.account_id = %(account)s AND e.completed_at IS NULL)
       < coalesce((SELECT a.max_executions_at_once FROM accounts_account a WHERE a.id = %(account)s), %(cap)s::int)
         - %(margin)s::int
"""
_CREATE: Final = f"""
INSERT INTO executions_execution
       (id, devbox_id, account_id, host_id, user_name, user_uid, user_home,
        command, command_id, request_key, attach_stdin, step, deadline_at)
SELECT %(id)s, d.id, d.account_id, d.host_id, d.user_name, d.user_uid, d.user_home,
       %(command)s, %(command_id)s, %(request_key)s, %(attach_stdin)s::boolean, 'spawn',
       now() + interval '{START_WITHIN_SECONDS} s'
  FROM devboxes_devbox d
 WHERE {_MAY}
ON CONFLICT DO NOTHING
RETURNING id
"""
# In a shell: the row of its line is taken first, so places are in the order of the commits. The clock of its start
# begins to run when it is its turn.
_CREATE_IN_SHELL: Final = f"""
WITH may AS (
SELECT d.id, d.account_id, d.host_id, d.user_name, d.user_uid, d.user_home FROM devboxes_devbox d
 WHERE {_MAY}
   AND (SELECT count(*) < %(shells)s::int OR count(*) FILTER (WHERE s.name = %(shell)s) > 0
          FROM executions_shellline s WHERE s.devbox_id = d.id)
), line AS (
INSERT INTO executions_shellline (devbox_id, name, last_place) SELECT may.id, %(shell)s, 1 FROM may
ON CONFLICT (devbox_id, name) DO UPDATE SET last_place = executions_shellline.last_place + 1
RETURNING last_place
)
INSERT INTO executions_execution
       (id, devbox_id, account_id, host_id, user_name, user_uid, user_home,
        command, command_id, request_key, attach_stdin, shell_name, shell_place, step)
SELECT %(id)s, may.id, may.account_id, may.host_id, may.user_name, may.user_uid, may.user_home,
       %(command)s, %(command_id)s, %(request_key)s, %(attach_stdin)s::boolean, %(shell)s, line.last_place, 'await_turn'
  FROM may, line
ON CONFLICT DO NOTHING
RETURNING id
"""

_EARLIER: Final = """
SELECT id, command, command_id, request_key, attach_stdin, shell_name
  FROM executions_execution
 WHERE devbox_id = %s AND account_id = %s AND (command_id = %s OR request_key = %s OR id = %s)
 LIMIT 3
"""


def create_execution(caller: Caller, devbox_id: str, new: NewExecution) -> str:
    """Make the execution, or find the one that an earlier request with the same id made; returns its id.

    Raises NotFound for a devbox that is not the caller's, BadRequest when it is not running, when the command is too
    long or the id stands for another command, TooManyRequests at the account's cap.
    """
    _check(new)
    request_key = f"{new.operation}:{new.request_id}" if new.request_id is not None else None
    execution_id = new.id
    columns = {
        "id": execution_id,
        "devbox": devbox_id,
        "account": caller.account_id,
        "command": new.command,
        "command_id": new.command_id,
        "request_key": request_key,
        "attach_stdin": new.attach_stdin,
        "cap": settings.BERTH.CAP_EXECUTIONS,
        "margin": CAP_MARGIN,
    }
    create = _CREATE
    if new.shell_name is not None:
        create, columns = _CREATE_IN_SHELL, columns | {"shell": new.shell_name, "shells": settings.BERTH.CAP_SHELLS}
    if _fetch_one(create, columns) is not None:
        return _made(execution_id, devbox_id)
    # 1. The same request again, or the same command id: it is the same execution, whatever the devbox does by now.
    #    (The id itself is found when the statement ran twice, over a connection that broke after the first time.)
    keys = (new.command_id, request_key, execution_id)
    found = prepared.fetch_all(_EARLIER, (devbox_id, caller.account_id, *keys))
    if found:
        return _attach(found, new, request_key)
    # 2. No devbox of the caller's, or one that does not run.
    context = devboxes.execution_context(caller, devbox_id)
    if context.status != "running":
        raise BadRequest(f"devbox {devbox_id} is {context.status}; commands run only while it is running")
    context.check_door()
    if new.shell_name is not None:
        shells.check_room(devbox_id, new.shell_name)
    # 3. The cap is near: counted and made with no other creation of the account in between, it is exact.
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"executions:{caller.account_id}"])
        made = _fetch_one(create, columns | {"margin": 0}) is not None
    if made:
        return _made(execution_id, devbox_id)
    found = prepared.fetch_all(_EARLIER, (devbox_id, caller.account_id, *keys))
    if found:  # made in the meantime by the same request
        return _attach(found, new, request_key)
    # 4. What is left is the cap (or a devbox whose shutdown has just been asked for).
    raise TooManyRequests(
        "this account has as many unfinished executions as it may have at once; wait for one to end", retry_after=2
    )


def _made(execution_id: str, devbox_id: str) -> str:
    execution_flow.nudge(execution_id)
    touch(devbox_id, "command")
    return execution_id


def _check(new: NewExecution) -> None:
    if len(new.command.encode()) > settings.BERTH.COMMAND_MAX:
        raise BadRequest(f"command: longer than the {settings.BERTH.COMMAND_MAX} bytes a command may have")
    if new.command_id is not None and not 0 < len(new.command_id) <= COMMAND_ID_MAX:
        raise BadRequest(f"command_id: must be 1 to {COMMAND_ID_MAX} characters")
    if new.shell_name is not None:
        shells.check_name(new.shell_name)
    if new.request_id is not None and not 0 < len(new.request_id) <= REQUEST_ID_MAX:
        raise BadRequest(f"x-request-id must be 1 to {REQUEST_ID_MAX} characters")


def _attach(found: Sequence[tuple[Any, ...]], new: NewExecution, request_key: str | None) -> str:
    for execution_id, command, command_id, key, *rest in found:
        same = command == new.command and rest == [new.attach_stdin, new.shell_name]
        if new.command_id is not None and command_id == new.command_id:
            if not same:
                raise BadRequest("command_id: this id was used for another command or shell; use a new one")
            return str(execution_id)
        if request_key is not None and key == request_key:
            if not same or command_id != new.command_id:
                raise BadRequest("x-request-id: this id was used for another request; use a new one")
            return str(execution_id)
    return str(found[0][0])


def request_kill(execution_id: str, *, group: bool, by: Caller | None = None) -> None:
    """Record that the execution shall be stopped; its flow does it. Nothing happens to one that has ended. `by`: who
    asked for it, unless somebody else did before."""
    columns: dict[str, object] = {"stop_why": ASKED, "stop_group": group}
    if by is not None:
        asked = {"key_id": by.key_id, "member_id": by.member_id, "at_ms": time.time_ns() // 1_000_000}
        columns["stop_by"] = {name: value for name, value in asked.items() if value is not None}
    execution_flow.request(execution_id, columns, hint=False)


# The reason of a stop that was wanted explains the death; outputs that did not come with the exit are to be stored.
# The spawn's own settle is mostly overtaken by this: the lease then tells who it was, and since when.
_FINISH: Final = rf"""
UPDATE executions_execution e
   SET status = 'completed', completed_at = now(), exit_status = x.code,
       deadline_at = CASE WHEN x.kept = 'host' THEN now() + interval '{STORE_WITHIN_SECONDS:g} s' END,
       reason = CASE WHEN e.stop_why IS NOT NULL AND x.code <> 0 AND x.reason->>'kind' IS DISTINCT FROM 'lost'
                     THEN jsonb_strip_nulls(jsonb_build_object('kind', e.stop_why, 'reported', x.reason))
                     ELSE x.reason END,
       out_size = x.out_size, err_size = x.err_size, out_dropped = x.out_dropped, err_dropped = x.err_dropped,
       stdout = x.stdout, stderr = x.stderr, kept = x.kept, output_index = x.output_index,
       stored_at = CASE WHEN x.kept = 'row' THEN now() END,
       worker = coalesce(e.worker, substring(e.lease FROM '^(.*)\.[0-9]+\.[0-9]+$')),
       placed_at = coalesce(e.placed_at, to_timestamp(substring(e.lease FROM '\.([0-9]+)\.[0-9]+$')::float8 / 1000)),
       first_byte_at = to_timestamp(x.first_byte / 1000.0),
       started_at = coalesce(to_timestamp(x.started / 1000.0), e.started_at),
       exited_at = coalesce(to_timestamp(x.exited / 1000.0), now()),
       step = CASE WHEN x.kept = 'host' THEN 'store' ELSE 'done' END, step_since = now(),
       wake_at = CASE WHEN x.kept = 'host' THEN now() END, wakes = e.wakes + 1, attempts = 0,
       lease = NULL, lease_until = NULL, error_code = NULL, error_detail = NULL
  FROM unnest(%s::text[], %s::text[], %s::text[], %s::int[], %s::jsonb[], %s::bigint[], %s::bigint[], %s::bigint[],
              %s::bigint[], %s::bytea[], %s::bytea[], %s::text[], %s::bigint[], %s::bigint[], %s::bytea[],
              %s::bigint[])
       AS x(id, box, host, code, reason, out_size, err_size, out_dropped, err_dropped, stdout, stderr, kept, started,
            exited, output_index, first_byte)
 WHERE e.id = x.id AND e.devbox_id = x.box AND e.host_id = x.host AND e.completed_at IS NULL
RETURNING e.id, e.devbox_id, e.step, e.stop_why, e.shell_name
"""
_NOT_THEIRS: Final = """
SELECT e.id, e.devbox_id, e.host_id, x.box, x.host
  FROM unnest(%s::text[], %s::text[], %s::text[]) AS x(id, box, host) JOIN executions_execution e ON e.id = x.id
 WHERE e.devbox_id <> x.box OR e.host_id <> x.host
"""


def finish_executions(events: Sequence[ExitEvent]) -> list[str]:
    """Complete what has ended, in one statement for the batch, and return the ids a host may forget: all of them.

    The first to write an end wins, whoever holds the row: a step that is still at work loses its lease. Committed
    (synchronously) before it returns. An event that comes again, of a row that is not there, or from a host that the
    command was never on, changes nothing; the last is logged.
    """
    if not events:
        return []
    latest = {event.id: event for event in events}
    batch = [latest[execution_id] for execution_id in sorted(latest)]  # the same order for all: no deadlocks
    finished = _finish(
        batch,
        (
            [event.id for event in batch],
            [event.box for event in batch],
            [event.host_id for event in batch],
            [event.exit for event in batch],
            [None if event.reason is None else orjson.dumps(event.reason).decode() for event in batch],
            [event.out_size for event in batch],
            [event.err_size for event in batch],
            [event.out_dropped for event in batch],
            [event.err_dropped for event in batch],
            [event.stdout for event in batch],
            [event.stderr for event in batch],
            [_kept(event) for event in batch],
            [event.started_at_ms for event in batch],
            [event.exited_at_ms for event in batch],
            [event.index for event in batch],
            [event.first_byte_at_ms for event in batch],
        ),
    )
    if len(finished) < len(batch):
        ended = {row[0] for row in finished}
        _note_false_reports({event.id: event for event in batch if event.id not in ended})
    hints.publish(*[row[0] for row in finished])
    for execution_id, _, step, *_ in finished:
        if step == "store":
            execution_flow.nudge(execution_id)
    devboxes_ending = {
        devbox_id for _, devbox_id, _, stop_why, _ in finished if stop_why in (DEVBOX_ENDING, DEVBOX_SUSPENDED)
    }
    if devboxes_ending:
        devbox_flow.wake(*devboxes_ending)
    lines = [(devbox_id, shell) for _, devbox_id, _, _, shell in finished if shell is not None]
    if lines:
        execution_flow.wake(*shells.next_in(lines))
    return list(latest)


def _finish(batch: Sequence[ExitEvent], columns: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    notes = shells.noted(batch)
    if not notes:
        return _fetch_all(_FINISH, columns)
    with transaction.atomic(), connection.cursor() as cursor:
        finished = _fetch_all(_FINISH, columns)
        for execution_id, devbox_id, _, _, shell in finished:
            if execution_id in notes and shell is not None:
                shells.write_notes(cursor, devbox_id, execution_id, shell, notes[execution_id])
    return finished


def _note_false_reports(events: Mapping[str, ExitEvent]) -> None:
    boxes, hosts = [event.box for event in events.values()], [event.host_id for event in events.values()]
    for row in _fetch_all(_NOT_THEIRS, (list(events), boxes, hosts)):
        log.error("%s of %s on host %s: an end was reported for %s by host %s, which is not believed", *row)


def _kept(event: ExitEvent) -> str:
    if event.stdout is not None and event.stderr is not None:
        return Kept.ROW
    if event.reason is not None and event.reason.get("kind") == "lost":
        return Kept.NOWHERE
    return Kept.HOST


def expected_on_host(host_id: str) -> list[ExpectedExecution]:
    """The executions whose rows say that they run on that host: it has acknowledged them and told no end."""
    rows = _fetch_all(
        "SELECT id, devbox_id, fence FROM executions_execution "
        "WHERE completed_at IS NULL AND host_id = %s AND step IN ('await_exit', 'kill') AND status = 'running'",
        (host_id,),
    )
    return [ExpectedExecution(id=row[0], box=row[1], fence=row[2]) for row in rows]


def on_heard(host_id: str) -> None:
    """Go on with the commands that wait for that host to answer."""
    execution_flow.wake_refused("host_id", host_id)


_OVER: Final = f"""
SELECT x.id, {FENCE.format("e.")}
  FROM unnest(%s::text[]) AS x(id) LEFT JOIN executions_execution e ON e.id = x.id
 WHERE e.id IS NULL OR e.completed_at IS NOT NULL
"""


def over(ids: Sequence[str]) -> dict[str, int]:
    """Those of the ids that must not run any more, completed or never heard of, each with the fence to stop it by."""
    return dict(_fetch_all(_OVER, (list(ids),)))


_STOP_ALL: Final = f"""
UPDATE executions_execution
   SET stop_why = %s, stop_group = true, wakes = wakes + 1, wake_at = now(), attempts = 0,
       lease = NULL, lease_until = NULL, fence = {FENCE.format("")}
 WHERE devbox_id = %s AND completed_at IS NULL AND stop_why IS NULL
RETURNING id
"""
_LEFT: Final = """
SELECT EXISTS (SELECT 1 FROM executions_execution WHERE devbox_id = %s AND completed_at IS NULL)
    OR EXISTS (SELECT 1 FROM executions_execution WHERE devbox_id = %s AND wake_at IS NOT NULL AND step = 'store')
"""


def before_destroy(devbox_id: str) -> bool:
    """Stop what still runs in a devbox that is going away. True once all have ended and their outputs are kept.

    The devbox is woken when the last end comes in.
    """
    return _stop_all(devbox_id, DEVBOX_ENDING)


_DOING: Final = "SELECT EXISTS (SELECT 1 FROM executions_execution WHERE devbox_id = %s AND completed_at IS NULL)"


def doing(devbox_id: str) -> str | None:
    """Whether a command has no end yet, which counts as use."""
    return "command" if _fetch_all(_DOING, (devbox_id,))[0][0] else None


def before_suspend(devbox_id: str) -> bool:
    """The same, of one that is to be suspended."""
    return _stop_all(devbox_id, DEVBOX_SUSPENDED)


def _stop_all(devbox_id: str, why: str) -> bool:
    for (execution_id,) in _fetch_all(_STOP_ALL, (why, devbox_id)):
        execution_flow.nudge(execution_id)
    left = _fetch_all(_LEFT, (devbox_id, devbox_id))
    return not left[0][0]


_CLOSE_ALL: Final = """
UPDATE executions_execution
   SET status = 'completed', exit_status = coalesce(exit_status, %s), reason = coalesce(reason, %s::jsonb),
       completed_at = coalesce(completed_at, now()), exited_at = coalesce(exited_at, now()), deadline_at = NULL,
       kept = CASE WHEN status = 'queued' THEN 'row' ELSE 'nowhere' END,  -- never started: it has written nothing
       upload = NULL, step = 'done', step_since = now(), wake_at = NULL, wakes = wakes + 1,
       lease = NULL, lease_until = NULL
 WHERE devbox_id = %s AND (completed_at IS NULL OR (step = 'store' AND wake_at IS NOT NULL))
RETURNING id
"""


def after_destroy(devbox_id: str, reason: str) -> None:
    """The devbox's box is gone: what has not ended ends as killed, or as lost with a devbox that failed without saying
    how; outputs that were not copied are gone. `reason` is the devbox's shutdown or failure reason."""
    exit_status = -1 if reason == "health_check_failed" else 137
    _close_all(devbox_id, exit_status, {"kind": "devbox_ended", "detail": reason})


def after_suspend(devbox_id: str, why: str) -> None:
    """Only the devbox's disk is left: what has not ended ends as killed, or as lost when that was not our doing."""
    if why == "suspended":
        _close_all(devbox_id, 137, {"kind": DEVBOX_SUSPENDED})
    else:
        _close_all(devbox_id, -1, {"kind": "lost", "detail": why})


def _close_all(devbox_id: str, exit_status: int, reason: Mapping[str, str]) -> None:
    told = orjson.dumps(reason).decode()
    closed = _fetch_all(_CLOSE_ALL, (exit_status, told, devbox_id))
    hints.publish(*[row[0] for row in closed])


def _fetch_one(sql: str, params: Any) -> tuple[Any, ...] | None:
    rows = _fetch_all(sql, params)
    return rows[0] if rows else None


def _fetch_all(sql: str, params: Any) -> list[tuple[Any, ...]]:
    """One statement; a broken connection is dropped, so that this thread's next statement dials again."""
    try:
        return prepared.fetch_all(sql, params)
    except (OperationalError, InterfaceError):
        if not connection.in_atomic_block:
            connection.close()
        raise
