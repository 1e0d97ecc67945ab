"""The devbox's own log: what its launch work and its entrypoint did.

In charge of: writing entries, bounded in number and size. Not in charge of: the output of executions, which is theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LINES_KEPT = 50
LINE_LIMIT = 4096
COMMAND_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log. `level`: info or error."""

    source: str
    execution_id: str
    level: str = "info"
    cmd: str | None = None
    message: str | None = None
    exit_code: int | None = None


_INSERT = """
INSERT INTO devboxes_devboxlog (devbox_id, at, source, level, execution_id, cmd, message, exit_code)
SELECT %s, clock_timestamp(), x.source, x.level, x.execution_id, x.cmd, x.message, x.exit_code
  FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::int[])
       WITH ORDINALITY AS x(source, level, execution_id, cmd, message, exit_code, place)
 ORDER BY x.place
"""


def write(cursor: Any, devbox_id: str, entries: Sequence[Entry]) -> None:
    """Append entries, in the caller's transaction."""
    if not entries:
        return
    columns = zip(
        *[
            (
                entry.source,
                entry.level,
                entry.execution_id,
                entry.cmd[:COMMAND_LIMIT] if entry.cmd is not None else None,
                entry.message[:LINE_LIMIT] if entry.message is not None else None,
                entry.exit_code,
            )
            for entry in entries
        ],
        strict=True,
    )
    cursor.execute(_INSERT, [devbox_id, *(list(column) for column in columns)])


def readable(data: bytes, secrets: Iterable[str] = ()) -> str:
    """Output as text that PostgreSQL takes, with secrets cut out."""
    text = data.decode("utf-8", "replace").replace("\0", "\ufffd")
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text


def last_lines(text: str, limit: int = LINES_KEPT) -> list[str]:
    """The last lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()][-limit:]
