"""Writing a devbox's own log: what its launch work and its entrypoint did, and what happened to it.

In charge of: rows, bounded in size. Not in charge of: the output of executions, which is theirs; reading
(`devboxes.log_sources`); how long rows are kept (`devboxes.tasks`).

Whoever has something to tell of a devbox (files, shells) writes it here, in the transaction that makes it true.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from django.db import connection, transaction

from flows import hints

Source = Literal["setup_commands", "entrypoint", "exec", "files", "stats", "kmsg"]
Level = Literal["info", "warning", "error"]

LINE_LIMIT = 4096
COMMAND_LIMIT = 4096
LAST_MS = 4_102_444_800_000
OUTPUT_LIMIT = 64 * 1024
"""Bytes of each stream of a piece of launch work that are kept."""


@dataclass(frozen=True, slots=True)
class Output:
    """The end of what a piece of launch work wrote. `sizes`: bytes of the whole; `index`: when it came."""

    started_ms: int
    stdout: bytes
    stderr: bytes
    sizes: tuple[int, int]
    index: bytes | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. `at_ms`: when it happened, now if not given; `notice_id`: one that is there already is not written
    again."""

    source: Source
    execution_id: str = ""
    level: Level = "info"
    cmd: str | None = None
    message: str | None = None
    exit_code: int | None = None
    shell_name: str = ""
    at_ms: int | None = None
    notice_id: str | None = None
    output: Output | None = None


_INSERT = """
INSERT INTO devboxes_devboxlog (devbox_id, at, source, level, execution_id, shell_name, cmd, message, exit_code,
                                notice_id, started_at, stdout, stderr, out_size, err_size, output_index)
SELECT %s, coalesce(to_timestamp(x.at / 1000.0), clock_timestamp()), x.source, x.level, x.execution_id, x.shell_name,
       x.cmd, x.message, x.exit_code, x.notice_id, to_timestamp(x.started / 1000.0), x.stdout, x.stderr,
       coalesce(x.out_size, 0), coalesce(x.err_size, 0), x.output_index
  FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::int[],
              %s::text[], %s::bigint[], %s::bytea[], %s::bytea[], %s::bigint[], %s::bigint[], %s::bytea[])
       WITH ORDINALITY AS x(at, source, level, execution_id, shell_name, cmd, message, exit_code,
                            notice_id, started, stdout, stderr, out_size, err_size, output_index, place)
 WHERE EXISTS (SELECT 1 FROM devboxes_devbox WHERE id = %s)
 ORDER BY x.place
ON CONFLICT (notice_id) DO NOTHING
"""


def channel(devbox_id: str) -> str:
    """What those who wait for new entries listen to."""
    return f"log_{devbox_id}"


def write(cursor: Any, devbox_id: str, entries: Sequence[Entry]) -> None:
    """Append entries, in the caller's transaction; those who follow the log hear of them after the commit. A devbox
    that is not there (any more) has no log."""
    if not entries:
        return
    columns = zip(*[_columns(entry) for entry in entries], strict=True)
    cursor.execute(_INSERT, [devbox_id, *(list(column) for column in columns), devbox_id])
    transaction.on_commit(lambda: hints.publish(channel(devbox_id)))


def note(devbox_id: str, *entries: Entry) -> None:
    """Append entries in a transaction of their own."""
    with transaction.atomic(), connection.cursor() as cursor:
        write(cursor, devbox_id, entries)


def _time(at_ms: int | None) -> int | None:
    """What a box's keeper calls a time may be anything; PostgreSQL's end."""
    return None if at_ms is None else max(0, min(at_ms, LAST_MS))


def _columns(entry: Entry) -> tuple[Any, ...]:
    told = entry.output
    return (
        _time(entry.at_ms),
        entry.source,
        entry.level,
        entry.execution_id,
        entry.shell_name,
        _readable(entry.cmd, COMMAND_LIMIT),
        _readable(entry.message, LINE_LIMIT),
        entry.exit_code,
        entry.notice_id,
        *((_time(told.started_ms), told.stdout, told.stderr, *told.sizes, told.index) if told else (None,) * 6),
    )


def _readable(text: str | None, limit: int) -> str | None:
    return None if text is None else text[:limit].replace("\0", "\ufffd")


def readable(data: bytes, secrets: Iterable[str] = ()) -> str:
    """Output as text that PostgreSQL takes, with secrets cut out."""
    return redacted(data, secrets).decode("utf-8", "replace").replace("\0", "\ufffd")


def redacted(data: bytes, secrets: Iterable[str]) -> bytes:
    """Output with secrets cut out."""
    for secret in secrets:
        if secret:
            data = data.replace(secret.encode(), b"***")
    return data


def last_lines(text: str, limit: int) -> list[str]:
    """The last lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()][-limit:]
