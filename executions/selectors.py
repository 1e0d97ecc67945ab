"""Reading executions: the one door to an execution, and the row as the API works with it.

In charge of the hot SELECT, which finds the execution and checks the caller's access in one statement. Not in charge
of the bytes that are not in the row (`outputs`), or of the shape of an answer (`answers`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import orjson

from api import prepared
from api.callers import Caller
from api.errors import NotFound
from api.ids import is_id
from executions.models import Kept, Status


@dataclasses.dataclass(frozen=True, slots=True)
class ExecutionView:
    """An execution as it was read. Sizes in bytes; `stdout` and `stderr` only when `kept` is row."""

    id: str
    devbox_id: str
    host_id: str
    status: str
    step: str
    fence: int
    shell_name: str | None
    attach_stdin: bool
    exit_status: int | None
    reason: dict[str, Any] | None
    kept: str
    stdout: bytes | None
    stderr: bytes | None
    out_size: int
    err_size: int
    out_dropped: int
    err_dropped: int
    out_hole: int | None
    err_hole: int | None
    stop_why: str | None
    stop_group: bool
    stop_by: dict[str, Any] | None

    @property
    def completed(self) -> bool:
        """Whether it has ended; nothing about it but where its output is kept changes any more."""
        return self.status == Status.COMPLETED

    def size(self, stream: str) -> int:
        """Bytes that the stream had, kept or not."""
        return self.out_size if stream == "stdout" else self.err_size

    def dropped(self, stream: str) -> int:
        """Bytes of the stream that the host did not keep."""
        return self.out_dropped if stream == "stdout" else self.err_dropped

    def hole(self, stream: str) -> int:
        """Where what was not kept begins in the stream; only when something was dropped and `kept` is store."""
        return (self.out_hole if stream == "stdout" else self.err_hole) or 0

    def row_bytes(self, stream: str) -> bytes:
        """The stream's bytes in the row; only when `kept` is row."""
        return (self.stdout if stream == "stdout" else self.stderr) or b""

    @property
    def lost(self) -> bool:
        """Whether output that was written may be gone."""
        return self.kept == Kept.NOWHERE


_COLUMNS: Final = ", ".join(field.name for field in dataclasses.fields(ExecutionView))
_READ: Final = f"SELECT {_COLUMNS} FROM executions_execution WHERE id = %s AND devbox_id = %s AND account_id = %s"
_JSON: Final = [n for n, field in enumerate(dataclasses.fields(ExecutionView)) if field.name in ("reason", "stop_by")]


def parsed(value: Any) -> dict[str, Any] | None:
    """A JSON column as a dict, however the driver gave it."""
    found: dict[str, Any] | None = orjson.loads(value) if isinstance(value, str) else value
    return found


def _view(row: tuple[Any, ...]) -> ExecutionView:
    values = list(row)
    for place in _JSON:
        values[place] = parsed(values[place])
    return ExecutionView(*values)


def access_execution(caller: Caller, devbox_id: str, execution_id: str) -> ExecutionView:
    """The execution, if it is one of that devbox and the caller's account. Raises NotFound otherwise."""
    if is_id("exe", execution_id) and is_id("dbx", devbox_id):
        row = prepared.fetch_one(_READ, (execution_id, devbox_id, caller.account_id))
        if row is not None:
            return _view(row)
    raise NotFound(f"devbox {devbox_id[:80]} has no execution {execution_id[:80]}")
