"""The keeper's verbs for whoever shows a box's commands as a log.

In charge of: `index` (when the output of a command came), `sizes` (which commands have output to look at), `changes`
(the same, and again whenever something moved), reading what came after an exit.
Not in charge of: the wire (clients.py), lines, which the reader cuts.
"""

from __future__ import annotations

import time

from hostd import packets, requests
from hostd.output_index import MAX_RECORDS, RECORD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hostd.clients import Client
    from hostd.execution import Execution
    from hostd.executions import Executions

COALESCE_S = 0.01
"""Changes that come closer together are told as one."""
BUSY_S = 0.05
TOLD_AT_ONCE = 200
LATE_BYTES = 1 << 20


def sizes_of(execution: Execution) -> dict[str, Any]:
    """Return one command's line: its state and how much output there is."""
    return {
        "id": execution.id,
        "state": "exited" if execution.state == "exited" else "running",
        "sizes": execution.sizes(),
        "late": [stream.late for stream in execution.streams],
        "started_at_ms": execution.started_at_ms,
    }


def _moving(execution: Execution) -> bool:
    # What has ended and is not acknowledged is not known to have ended yet.
    return not execution.acked or execution.open_pipes() or any(s.late for s in execution.streams)


def index(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    """`index {box, id, late, last}`: the line of `sizes`, with the last so many records of the output, or of what came
    after the exit."""
    execution = executions.find(requests.execution_id(request))
    found = execution.late if requests.flag(request, "late", False) else execution.index
    last = requests.whole(request, "last", 1, MAX_RECORDS, default=MAX_RECORDS)
    records = found.read()[-last * RECORD.size :] if found is not None else b""
    client.answer({"ok": True, **sizes_of(execution), "body": len(records)}, records)


def sizes(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    """`sizes {box}`: commands that run, whose end is not acknowledged, that wrote after it or might still do so."""
    found = [sizes_of(e) for e in executions.known.values() if _moving(e)]
    client.answer({"ok": True, "executions": found})


def read_late(client: Client, executions: Executions, request: dict[str, Any]) -> None:
    """`read` of the streams late_stdout and late_stderr. Offsets count all bytes, only the last 1 MiB is kept."""
    execution = executions.find(requests.execution_id(request))
    stream = execution.streams[0 if request["stream"] == "late_stdout" else 1]
    offset = requests.whole(request, "offset", 0, 1 << 62, default=0)
    limit = min(LATE_BYTES, requests.whole(request, "limit", 0, requests.READ_BYTES, default=LATE_BYTES))
    start, data = stream.read_late(offset, limit)
    client.answer({"ok": True, "size": stream.late, "offset": start, "body": len(data)}, data)


class Changes:
    """A client that is told what moves. It holds names, not bytes, so that a slow one costs no memory."""

    def __init__(self, client: Client, executions: Executions) -> None:
        self._client, self._executions = client, executions
        self._moved = {e.id: None for e in executions.known.values() if _moving(e)}
        self._waiting = False
        self._told_at = 0.0
        executions.listeners.append(self._note)
        client.begin_frames({"ok": True, "offset": 0}, self._end)
        self._later(0)

    def _end(self) -> None:
        self._executions.listeners.remove(self._note)

    def _note(self, execution: Execution) -> None:
        self._moved[execution.id] = None
        if not self._waiting:
            self._later(max(0.0, self._told_at + COALESCE_S - time.monotonic()))

    def _later(self, seconds: float) -> None:
        self._waiting = True
        self._client.hold(seconds, self._tell)

    def _tell(self) -> None:
        self._waiting = False
        self._told_at = time.monotonic()
        if self._client.is_behind():
            self._later(BUSY_S)
            return
        lines: list[bytes] = []
        while self._moved and len(lines) < TOLD_AT_ONCE:
            name = next(iter(self._moved))
            del self._moved[name]
            execution = self._executions.known.get(name)
            if execution is not None:
                lines.append(packets.dumps(sizes_of(execution)) + b"\n")
        if self._moved:
            self._later(0)
        if lines:
            self._client.frame(b"".join(lines))


def changes(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    """`changes {box}`: frames of lines as `sizes` has them, what moves now first; never ends by itself."""
    Changes(client, executions)
