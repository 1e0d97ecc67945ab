"""What launch work, the entrypoint and background processes leave in a devbox's log, and what their ends mean.

In charge of fetching their output from the host and of the words. Not in charge of running them (`devbox_flow`,
`suspending`), or of how a log is kept (`logs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from django.db import connection, transaction

from devboxes import launch, logs
from devboxes.flow_rows import WHY_LIMIT, DevboxRow
from devboxes.models import Devbox, DevboxLog
from hostd.messages import LateStream, Sizes, Stream
from hosts import delivery
from hosts.client import HostClient, HostRefused, HostUnreachable, index_records, outputs

LATE_KEPT: Final = 200
LAUNCH_LOOK_SECONDS: Final = 15.0
"""An exit wakes the flow; this is for one that nobody reported."""
LAUNCH_HOLD_MS: Final = 300
WHY_LINES: Final = 10


def keep_entrypoint(row: DevboxRow) -> None:
    """Log what the entrypoint has written, unless its exit has brought that. Without its host there is nothing."""
    if row.started_at is None or not Devbox.objects.filter(pk=row.id).exclude(entrypoint="").exists():
        return
    work_id = launch.work_id(row.id, launch.ENTRYPOINT, row.starts)
    if DevboxLog.objects.filter(devbox_id=row.id, execution_id=work_id, started_at__isnull=False).exists():
        return
    host = row.host
    try:
        state = host.state(box=row.id, id=work_id)
        told = _output(host, row.id, work_id, state)
    except (HostRefused, HostUnreachable):
        return
    code = state.get("exit")
    entry = logs.Entry(
        launch.ENTRYPOINT, work_id, "error" if code else "info",
        exit_code=code, at_ms=state.get("exited_at_ms"), output=told,
    )  # fmt: skip
    with transaction.atomic(), connection.cursor() as cursor:
        logs.write(cursor, row.id, [entry])


def keep_late(row: DevboxRow) -> None:
    """Log the end of what background processes wrote after their commands had ended, of LATE_KEPT commands."""
    host = row.host
    entries: list[logs.Entry] = []
    try:
        moving = [told for told in host.sizes(box=row.id) if any(told["late"])]
        kept = set(
            DevboxLog.objects.filter(
                devbox_id=row.id, started_at__isnull=False, execution_id__in=[told["id"] for told in moving]
            ).values_list("execution_id", flat=True)
        )
        for told in [told for told in moving if told["id"] not in kept][-LATE_KEPT:]:
            row.check()
            entries.append(logs.Entry("exec", told["id"], output=_late(host, row.id, told)))
    except (HostRefused, HostUnreachable):
        pass  # what is had is kept
    if entries:
        with transaction.atomic(), connection.cursor() as cursor:
            logs.write(cursor, row.id, entries)


def writing(devbox_id: str, entries: Sequence[logs.Entry]) -> Callable[[Any], bool]:
    def write(cursor: Any) -> bool:
        logs.write(cursor, devbox_id, entries)
        return True

    return write


def short(title: str) -> str:
    line = title.strip().splitlines()[0] if title.strip() else title
    return line if len(line) <= 80 else line[:79] + "…"


@dataclass(slots=True)
class Ended:
    entries: list[logs.Entry]
    failure: tuple[str, str, dict[str, object]] | None


def item(piece: launch.Work, state: Any) -> dict[str, Any]:
    """What is kept of a piece of launch work; times are the host's."""
    found = {
        "id": piece.id,
        "title": short(logs.readable(piece.title.encode(), piece.secrets)),
        "source": piece.source,
        "started_at_ms": state.get("started_at_ms"),
    }
    if state["state"] == "exited":
        found |= {"ended_at_ms": state.get("exited_at_ms"), "exit_status": state.get("exit")}
    return {name: value for name, value in found.items() if value is not None}


def ended(host: HostClient, devbox_id: str, piece: launch.Work, state: Any) -> Ended:
    """What a finished piece of launch work leaves in the log, and whether the devbox fails by it."""
    wrote = _output(host, devbox_id, piece.id, state, piece.secrets)
    stdout, stderr = wrote.stdout, wrote.stderr
    code = state["exit"]
    out, err = logs.readable(stdout, piece.secrets), logs.readable(stderr, piece.secrets)
    title = logs.readable(piece.title.encode(), piece.secrets)
    level: logs.Level = "error" if code else "info"
    at_ms = state.get("exited_at_ms")
    entries = [logs.Entry(piece.source, piece.id, level, cmd=title, exit_code=code, at_ms=at_ms, output=wrote)]
    if code == 0:
        return Ended(entries, None)
    told = delivery.told(state.get("reason")) or {}
    lines = [line[:WHY_LIMIT] for line in logs.last_lines(err, WHY_LINES) or logs.last_lines(out, WHY_LINES)]
    tail = ":\n" + "\n".join(lines) if lines else ""
    evidence: dict[str, object] = {"exit_status": code, "output": lines, "reported": told or None}
    if told.get("kind") == "lost":
        detail = told.get("detail") or "its end was not seen"
        return Ended(entries, ("health_check_failed", f"was lost: {detail}", evidence))
    if told.get("kind") == "oom":
        return Ended(entries, ("out_of_memory", f"was ended because the devbox's memory was used up{tail}", evidence))
    if "No space left on device" in err or "Disk quota exceeded" in err:
        return Ended(entries, ("out_of_disk", f"ended with {code} because the disk is full{tail}", evidence))
    return Ended(entries, ("execution_failed", f"ended with {code}{tail}", evidence))


def _output(host: HostClient, devbox_id: str, work_id: str, state: Any, secrets: Sequence[str] = ()) -> logs.Output:
    """What a piece of launch work has written, for its log."""
    found = outputs(state)
    if found is not None:
        stdout, stderr = found
        index = index_records(state)
    else:
        stdout, stderr = (_tail(host, devbox_id, work_id, stream, secrets) for stream in ("stdout", "stderr"))
        index = _index(host, devbox_id, work_id)
    sizes = state["sizes"]
    if secrets:  # the index speaks of places in the output as it was
        stdout, stderr, index = logs.redacted(stdout, secrets), logs.redacted(stderr, secrets), None
        sizes = [len(stdout), len(stderr)]
    return logs.Output(
        started_ms=state.get("started_at_ms") or int(datetime.now().timestamp() * 1000),
        stdout=stdout,
        stderr=stderr,
        sizes=(max(sizes[0], len(stdout)), max(sizes[1], len(stderr))),
        index=index,
    )


def _tail(host: HostClient, devbox_id: str, work_id: str, stream: Stream, secrets: Sequence[str]) -> bytes:
    limit = logs.OUTPUT_LIMIT
    try:
        size = host.read(box=devbox_id, id=work_id, stream=stream, offset=0, limit=0).size
        data = host.read(box=devbox_id, id=work_id, stream=stream, offset=max(0, size - limit), limit=limit).data
    except HostRefused:
        return b""  # of a command that was lost there may be nothing
    if secrets and size > limit:
        return data.partition(b"\n")[2]  # half a secret would not be known for one
    return data


def _late(host: HostClient, devbox_id: str, told: Sizes) -> logs.Output:
    def tail(stream: LateStream, size: int) -> bytes:
        start = max(0, size - logs.OUTPUT_LIMIT)
        return host.read(box=devbox_id, id=told["id"], stream=stream, offset=start, limit=logs.OUTPUT_LIMIT).data

    out, err = told["late"]
    return logs.Output(
        started_ms=told["started_at_ms"],
        stdout=tail("late_stdout", out),
        stderr=tail("late_stderr", err),
        sizes=(out, err),
        index=host.index(box=devbox_id, id=told["id"], late=True).records,
    )


def _index(host: HostClient, devbox_id: str, work_id: str) -> bytes | None:
    try:
        return host.index(box=devbox_id, id=work_id).records
    except HostRefused:
        return None
