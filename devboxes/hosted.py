"""What hosts tell the devboxes: ends of boxes, exits of launch work, and what reconcile expects to find.

In charge of: turning those events into guarded requests and wakes. Not in charge of: hearing them (`hosts.watcher`).
Everything here may be told twice and commits before it returns.
"""

import logging
import time
from collections.abc import Sequence

from django.db import connection, transaction

from devboxes import launch, logs, states
from devboxes.devbox_flow import devbox_flow
from devboxes.flow_rows import entering, transition
from flows.outcomes import DatabaseNow
from hosts import registry
from hosts.registry import BoxExitEvent, ExitEvent, ExpectedBox, ExpectedExecution, HostedKind, NoticeEvent

log = logging.getLogger(__name__)

_NOT_OVER = "ended_at IS NULL"


def on_box_exits(events: list[BoxExitEvent]) -> list[str]:
    """A box that ended by itself: its devbox has failed, unless it was on its way down anyway."""
    false = _false_reports(events)
    for event in events:
        if event.box in false:
            continue
        if event.rebooted and _starts_again(event):
            continue
        if event.oom:
            reason, why = "out_of_memory", "the memory of its box was used up"
            cause: dict[str, object] = {"kind": "out_of_memory", **(event.memory or {})}
        elif event.lost:
            reason, why = "health_check_failed", f"its box was lost: {event.lost}"
            cause = {"kind": "box_lost", "detail": event.lost}
            if event.silent_since_ms is not None:
                cause = {"kind": "host_lost", "detail": event.lost, "silent_since_ms": event.silent_since_ms}
        else:
            reason, why = "health_check_failed", f"its box ended by itself with {event.exit}"
            cause = {"kind": "box_ended", "exit_status": event.exit}
        if event.at_ms is not None:
            cause["at_ms"] = event.at_ms
        devbox_flow.request(
            event.box,
            {
                "step": states.CLEAN_UP,
                "step_since": DatabaseNow(),
                **entering(states.CLEAN_UP),
                "failure_reason": reason,
                "why": why,
                "cause": cause,
                "seen": "exited",
                "seen_at": DatabaseNow(),
            },
            # Only of the box this row has up: an event from its host, about a box that was started.
            guard=f"{_NOT_OVER} AND host_id = %s AND step = ANY(%s) AND (step <> 'suspended' OR stored_at IS NULL)",
            guard_params=(event.host_id, _steps_ended_by(event)),
            alongside=transition("failure", reason),
        )
    return [event.box for event in events]


def _steps_ended_by(event: BoxExitEvent) -> list[str]:
    """The steps in which the news ends the devbox. One that is being suspended needs its disk only; that of one that
    is suspended is missed by a comparison alone, and only while it is not in S3."""
    up = [states.BOOT, *states.UP]
    return [*up, states.SUSPENDED] if event.lost is not None and not event.rebooted else up


def _starts_again(event: BoxExitEvent) -> bool:
    """Its host was restarted and has its disk: it starts again on that, as if it were resumed."""
    why = "its host was restarted, and it was started again on its disk"
    return devbox_flow.request(
        event.box,
        {
            "step": states.READMIT,
            "step_since": DatabaseNow(),
            **entering(states.READMIT),
            "why": why,
            "cause": {"kind": "host_restarted"},
            "seen": "exited",
            "seen_at": DatabaseNow(),
        },
        guard=f"{_NOT_OVER} AND host_id = %s AND step = ANY(%s)",
        guard_params=(event.host_id, sorted(states.UP)),
        alongside=transition(states.STATUS[states.READMIT], None),
    )


def on_exits(events: list[ExitEvent]) -> list[str]:
    """Exits of launch work. A piece that the flow may wait for wakes it, and stays unacknowledged until it has moved
    on; the entrypoint's ends the devbox; all others are old news.

    A step runs several pieces before it writes down which one it waits for, so every piece from the row's on counts.
    """
    false = _false_reports(events)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, step, launch_index, launch_total, starts FROM devboxes_devbox "
            "WHERE id = ANY(%s) AND ended_at IS NULL",
            [list({event.box for event in events} - false)],
        )
        entrypoints: dict[str, str] = {}
        ahead: dict[str, set[str]] = {}
        for pk, step, index, total, starts in cursor.fetchall():
            if step in states.UP:  # else it was ended with the box
                entrypoints[pk] = launch.work_id(pk, launch.ENTRYPOINT, starts)
            if step == states.LAUNCH:
                ahead[pk] = {launch.work_id(pk, piece, starts) for piece in range(index, total)}
            elif step == states.RUN_HOOKS:
                ahead[pk] = {piece.id for piece in launch.suspend_work(pk).work}
    acknowledged: list[str] = []
    awaited: set[str] = set()
    for event in events:
        if event.id == entrypoints.get(event.box):
            _entrypoint_ended(event)
        elif event.id in ahead.get(event.box, ()):
            awaited.add(event.box)
            continue
        acknowledged.append(event.id)
    if awaited:
        devbox_flow.wake(*awaited)
    return acknowledged


def on_notices(events: list[NoticeEvent]) -> list[str]:
    """What happens to boxes goes into their logs, once each; from the host that has the box only."""
    false = _false_reports(events)
    by_box: dict[str, list[logs.Entry]] = {}
    for event in events:
        if event.box not in false:
            entry = logs.Entry(
                event.source, level=event.level, message=event.message, at_ms=event.at_ms, notice_id=event.id
            )
            by_box.setdefault(event.box, []).append(entry)
    with transaction.atomic(), connection.cursor() as cursor:
        for box in sorted(by_box):
            logs.write(cursor, box, by_box[box])
    return [event.id for event in events]


def _entrypoint_ended(event: ExitEvent) -> None:
    # Larger outputs are read from the host, and logged, when the box is taken apart.
    entries: list[logs.Entry] = []
    if event.stdout is not None and event.stderr is not None:
        ended_ms = event.exited_at_ms or int(time.time() * 1000)
        sizes = (event.out_size, event.err_size)
        wrote = logs.Output(event.started_at_ms or ended_ms, event.stdout, event.stderr, sizes, event.index)
        level: logs.Level = "error" if event.exit else "info"
        entries = [
            logs.Entry(launch.ENTRYPOINT, event.id, level, exit_code=event.exit, at_ms=ended_ms, output=wrote),
        ]
    columns: dict[str, object] = {"step_since": DatabaseNow()}
    lost = (event.reason or {}).get("kind") == "lost"
    if lost:
        entries = [logs.Entry(launch.ENTRYPOINT, event.id, "error", exit_code=event.exit)]
        reason = "health_check_failed"
        detail = (event.reason or {}).get("detail") or "its end was not seen"
        columns |= {"step": states.CLEAN_UP, **entering(states.CLEAN_UP), "failure_reason": reason}
        columns |= {"why": f"its entrypoint was lost: {detail}", "cause": {"kind": "entrypoint_lost", "detail": detail}}
        beside = transition("failure", reason)
    else:
        columns |= {"step": states.TEARDOWN, **entering(states.TEARDOWN), "wants": "shutdown"}
        columns |= {"shutdown_reason": "entrypoint_exit", "why": f"its entrypoint ended with {event.exit}"}
        ended = {"exit_status": event.exit, "at_ms": event.exited_at_ms, "reported": event.reason}
        output = logs.last_lines(logs.readable(event.stderr or event.stdout or b""), 10)
        told = {name: value for name, value in (ended | {"output": output}).items() if value is not None}
        columns["cause"] = {"kind": "entrypoint_exit", **told}
        beside = transition("shutdown", None)
    with transaction.atomic():  # a repetition of the event would find the devbox over and write no log any more
        guard = f"{_NOT_OVER} AND host_id = %s AND step = ANY(%s)"
        params = (event.host_id, sorted(states.UP))
        if devbox_flow.request(event.box, columns, guard=guard, guard_params=params, alongside=beside):
            with connection.cursor() as cursor:
                logs.write(cursor, event.box, entries)


def _false_reports(events: Sequence[ExitEvent | BoxExitEvent | NoticeEvent]) -> set[str]:
    """The boxes among them that another host has, or none: what is told of those is logged and not believed."""
    host_of = {event.box: event.host_id for event in events}
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT d.id, d.host_id, x.host FROM unnest(%s::text[], %s::text[]) AS x(box, host) "
            "JOIN devboxes_devbox d ON d.id = x.box WHERE d.host_id IS DISTINCT FROM x.host",
            [list(host_of), list(host_of.values())],
        )
        found = cursor.fetchall()
    for box, host_id, reporter in found:
        log.error("%s on host %s: an end was reported by host %s, which is not believed", box, host_id, reporter)
    return {box for box, _, _ in found}


def expected_on_host(host_id: str) -> Sequence[ExpectedBox]:
    """Every box that the rows say is on that host."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, step, fence, coalesce(lease_until < now(), true) FROM devboxes_devbox "
            "WHERE host_id = %s AND completed_at IS NULL AND step = ANY(%s)",
            [host_id, list(states.ON_HOST)],
        )
        return [
            ExpectedBox(
                box=pk,
                up=step in states.UP,
                fence=fence,
                settled=free and (step in states.UP or step == states.SUSPENDED),
                asleep=step == states.SUSPENDED,
            )
            for pk, step, fence, free in cursor.fetchall()
        ]


def expected_entrypoints(host_id: str) -> Sequence[ExpectedExecution]:
    """Every entrypoint that the rows say runs on that host. Other launch work is looked after by its flow."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT id, fence, starts FROM devboxes_devbox WHERE host_id = %s AND step = ANY(%s) AND entrypoint <> ''",
            [host_id, sorted(states.UP - {states.LAUNCH})],
        )
        return [
            ExpectedExecution(id=launch.work_id(pk, launch.ENTRYPOINT, starts), box=pk, fence=fence)
            for pk, fence, starts in cursor.fetchall()
        ]


def on_heard(host_id: str) -> None:
    """Go on with what waits for that host to answer: a start, or an end."""
    devbox_flow.wake_refused("host_id", host_id)


def register() -> None:
    """Answer for boxes (`dbx_`) and launch work (`set_`)."""
    registry.register(
        "dbx",
        HostedKind(
            on_box_exits=on_box_exits, on_notices=on_notices, expected_on_host=expected_on_host, on_heard=on_heard
        ),
    )
    registry.register("set", HostedKind(on_exits=on_exits, expected_on_host=expected_entrypoints))
