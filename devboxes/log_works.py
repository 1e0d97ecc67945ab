"""Commands as a log sees them: what one is, where its output can be read, and the entries that it makes.

In charge of: the entries of one command, its newest ones or those behind a cursor. Not in charge of: which commands a
devbox has (the sources in `devboxes.logs`), putting several in order (`devboxes.log_reading`, `devboxes.log_tail`).

A cursor holds byte positions, never times: what has been told ends at a byte, so that reading on neither loses nor
repeats a line, whether the output is still on its host, in a row or in S3 by then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from devboxes.log_lines import (
    BEGAN,
    ENDED,
    LATER,
    LEVELS,
    LINE_BYTES,
    STDERR,
    STDOUT,
    STREAM_NAMES,
    WROTE,
    LogEntry,
    Times,
    cut,
)
from hostd.messages import LateStream, Stream
from hosts.client import AsyncHostClient

NEWEST_BYTES: Final = 1024 * 1024
"""So much of the end of each stream is looked at for the newest entries."""
PIECE_BYTES: Final = 64 * 1024
COMMAND_LIMIT: Final = 16 * 1024

Read = Callable[[int, int, int], Awaitable[tuple[int, bytes]]]
"""(stream, start, length): bytes from `start`, and where they really begin if those there were not kept."""


@dataclass(slots=True)
class Output:
    """Where the output of a command can be read. `sizes`: bytes of stdout and stderr; `first`: where what is kept of
    them begins."""

    sizes: tuple[int, int]
    records: bytes | None
    read: Read
    first: tuple[int, int] = (0, 0)


@dataclass(slots=True, kw_only=True)
class Work:
    """A command of a devbox. Without `ended_ms` it has not completed, and its output is read from the host. `cmd` is
    None when another entry tells it. `output` opens what is kept of one that has completed, None if nothing is."""

    id: str
    source: str
    cmd: str | None
    began_ms: int | None
    ended_ms: int | None = None
    exit_code: int | None = None
    why: str | None = None
    shell_name: str | None = None
    output: Callable[[], Awaitable[Output | None]] | None = None

    def entry(self, at_ms: int, place: tuple[int, ...], **what: str | int | None) -> LogEntry:
        """An entry of this command."""
        return LogEntry(
            at_ms,
            self.source,
            cmd_id=self.id,
            shell_name=self.shell_name,
            place=place,
            **what,  # type: ignore[arg-type]
        )

    def beginning(self, began_ms: int) -> list[LogEntry]:
        """What says that it was started."""
        if self.cmd is None:
            return []
        cut_off = " […]" if len(self.cmd) > COMMAND_LIMIT else ""
        return [self.entry(began_ms, (BEGAN,), cmd=self.cmd[:COMMAND_LIMIT] + cut_off)]

    def ending(self) -> list[LogEntry]:
        """What says how it ended; nothing of one that was not seen to end."""
        if self.ended_ms is None or (self.exit_code is None and self.why is None):
            return []
        level = "error" if self.exit_code else "info"
        return [self.entry(self.ended_ms, (ENDED,), level=level, message=self.why, exit_code=self.exit_code)]

    def times(self, output: Output) -> Times:
        """When the bytes of its output came."""
        return Times(output.records, self.began_ms or 0, self.ended_ms)


@dataclass(slots=True)
class Cursor:
    """How far a command has been told: bytes of stdout and stderr, and of what came after its exit."""

    told: list[int] = field(default_factory=lambda: [0, 0])
    late: list[int] = field(default_factory=lambda: [0, 0])
    begun: bool = False
    seen: list[int] = field(default_factory=lambda: [-1, -1])  # the sizes up to which it was told as far as it goes
    late_seen: list[int] = field(default_factory=lambda: [-1, -1])


async def host_output(
    client: AsyncHostClient, devbox_id: str, work_id: str, last: int | None = None
) -> tuple[Output, int]:
    """The output of a command from its host, and when it was started, in ms. `last`: so many records of its index are
    enough. Raises HostError."""
    found = await client.index(box=devbox_id, id=work_id, last=last)

    async def read(stream: int, start: int, length: int) -> tuple[int, bytes]:
        name: Stream = "stdout" if stream == STDOUT else "stderr"
        got = await client.read(box=devbox_id, id=work_id, stream=name, offset=start, limit=length)
        return got.offset, got.data

    return Output(found.sizes, found.records, read), found.started_at_ms


async def late_output(client: AsyncHostClient, devbox_id: str, work_id: str) -> Output:
    """What a command's background processes wrote after its exit, as far as it is kept. Raises HostError."""
    found = await client.index(box=devbox_id, id=work_id, late=True)

    async def read(stream: int, start: int, length: int) -> tuple[int, bytes]:
        name: LateStream = "late_stdout" if stream == STDOUT else "late_stderr"
        got = await client.read(box=devbox_id, id=work_id, stream=name, offset=start, limit=length)
        return got.offset, got.data

    return Output(found.late, found.records, read)


@dataclass(slots=True)
class Told:
    """What was found of one command. `left_out`: there is more before it."""

    entries: list[LogEntry] = field(default_factory=list)
    left_out: bool = False


async def newest(work: Work, output: Output, told: list[int], limit: int, *, whole: bool, phase: int = WROTE) -> Told:
    """The newest lines of an output, `limit` of each stream at most, and moves `told` behind them. What follows the
    last line end is told if `whole`. Raises what reading raises."""
    found = Told()
    times = work.times(output) if phase == WROTE else Times(output.records, work.ended_ms or work.began_ms or 0, None)
    for stream in (STDOUT, STDERR):
        size, first = output.sizes[stream - 1], output.first[stream - 1]
        at = asked = max(first, size - NEWEST_BYTES)
        lines: list[LogEntry] = []
        while at < size:
            start, data = await output.read(stream, at, size - at)
            if start > at:
                lines.append(_gap(work, stream, start - at, start, times, phase))
                told[stream - 1] = start
            if not data:
                break
            last = start + len(data) >= size
            begin = 0
            if start == asked and asked > 0:
                begin = _next_start(data)  # the line it begins in is not all there
                found.left_out = True
            begin = max(begin, _start_of_last(data, limit))
            found.left_out = found.left_out or begin > 0
            end = begin
            for after, line in cut(data[begin:], whole=whole or not last, limit=limit):
                end = begin + after
                lines.append(_line(work, stream, start + end - 1, line, times, phase))
            told[stream - 1] = start + end
            at = start + len(data)
        found.left_out = found.left_out or len(lines) > limit
        found.entries += lines[-limit:]
    return found


async def onwards(work: Work, output: Output, told: list[int], limit: int, *, whole: bool, phase: int = WROTE) -> Told:
    """The next lines behind `told`, which moves: a piece of each stream at most. `left_out`: there is more after them.
    Raises what reading raises."""
    found = Told()
    times = work.times(output) if phase == WROTE else Times(output.records, work.ended_ms or work.began_ms or 0, None)
    for stream in (STDOUT, STDERR):
        size, at = output.sizes[stream - 1], max(told[stream - 1], output.first[stream - 1])
        if at > told[stream - 1]:
            found.entries.append(_gap(work, stream, at - told[stream - 1], at, times, phase))
            told[stream - 1] = at
        if at >= size:
            continue
        length = min(PIECE_BYTES, size - at)
        start, data = await output.read(stream, at, length)
        if start > at:
            found.entries.append(_gap(work, stream, start - at, start, times, phase))
            told[stream - 1] = start
        end = 0
        # Fewer bytes than there should be: behind them something was not kept, so no more of this line will come.
        last = (whole and start + len(data) >= size) or 0 < len(data) < length
        for after, line in cut(data, whole=last, limit=limit):
            end = after
            found.entries.append(_line(work, stream, start + end - 1, line, times, phase))
        told[stream - 1] = max(told[stream - 1], start + end)
        found.left_out = found.left_out or (end > 0 and told[stream - 1] < size)
    return found


def _line(work: Work, stream: int, last: int, line: str, times: Times, phase: int) -> LogEntry:
    return work.entry(times.at(stream, last), (phase, stream, last), level=LEVELS[stream], message=line)


def _gap(work: Work, stream: int, count: int, at: int, times: Times, phase: int) -> LogEntry:
    message = f"[{count} bytes of {STREAM_NAMES[stream]} were not kept]"
    return work.entry(times.at(stream, at), (phase, stream, at - 1), level="warning", message=message)


def _next_start(data: bytes) -> int:
    """Where the next line begins, or, in one that is too long to be one entry, the next character."""
    end = data.find(b"\n", 0, LINE_BYTES)
    if end >= 0:
        return end + 1
    return next((at for at in range(min(4, len(data))) if data[at] & 0xC0 != 0x80), 0)


def _start_of_last(data: bytes, count: int) -> int:
    at = len(data) - 1 if data.endswith(b"\n") else len(data)
    for _ in range(count):
        at = data.rfind(b"\n", 0, at)
        if at < 0:
            return 0
    return at + 1


__all__ = ["LATER", "Cursor", "Output", "Told", "Work", "host_output", "late_output", "newest", "onwards"]
