"""Entries of a devbox's log, and how lines of output become some.

In charge of: the shape and the order of entries, cutting bytes at line ends, the time of a line by the index of its
output. Not in charge of: where bytes and index come from (`devboxes.log_works`).

A line's time is that of its last byte: then it was whole. A line longer than LINE_BYTES becomes several entries, so
nothing is left out; bytes that are no UTF-8 become U+FFFD. stderr has the level `error`, for an entry has no other
field that would tell it from stdout.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from hostd.messages import INDEX_RECORD

LINE_BYTES: Final = 16 * 1024
STDOUT: Final = 1
STDERR: Final = 2
LEVELS: Final = {STDOUT: "info", STDERR: "error"}
STREAM_NAMES: Final = {STDOUT: "stdout", STDERR: "stderr"}

# What of one command comes first when several entries have the same millisecond.
BEGAN: Final = 0
WROTE: Final = 1
ENDED: Final = 2
LATER: Final = 3


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry as it is shown. `place` orders entries of the same millisecond and the same command."""

    at_ms: int
    source: str
    level: str = "info"
    cmd_id: str | None = None
    shell_name: str | None = None
    cmd: str | None = None
    message: str | None = None
    exit_code: int | None = None
    place: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[Any, ...]:
        """All sources have one order: by time, then by what they belong to, then as it happened there."""
        return self.at_ms, self.cmd_id or "", self.place

    @property
    def weight(self) -> int:
        """About how many bytes it takes in an answer."""
        return 150 + len(self.message or "") + len(self.cmd or "")

    def view(self) -> dict[str, Any]:
        """The contract's DevboxLog, without the fields that are null."""
        found: dict[str, Any] = {"level": self.level, "timestamp_ms": self.at_ms, "source": self.source}
        for name in ("cmd_id", "shell_name", "cmd", "message", "exit_code"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        return found


class Times:
    """When the bytes of a command's output came. Without records all is as old as the command's end, or start."""

    def __init__(self, records: bytes | None, earliest: int, latest: int | None) -> None:
        self._ends: dict[int, list[int]] = {STDOUT: [], STDERR: []}
        self._times: dict[int, list[int]] = {STDOUT: [], STDERR: []}
        self._earliest, self._latest = earliest, latest
        whole = (records or b"")[: len(records or b"") // INDEX_RECORD.size * INDEX_RECORD.size]
        for stamp, end in INDEX_RECORD.iter_unpack(whole):
            self._ends[stamp % 2 + 1].append(end)
            self._times[stamp % 2 + 1].append(stamp // 2)

    def at(self, stream: int, position: int) -> int:
        """The time of the byte at a position, in ms."""
        ends, times = self._ends[stream], self._times[stream]
        place = bisect.bisect_right(ends, position)
        if place < len(times):
            found = times[place]
        else:
            found = times[-1] if times else self._latest if self._latest is not None else self._earliest
        found = max(found, self._earliest)
        return found if self._latest is None else min(found, self._latest)

    @property
    def last(self) -> int:
        """The time of the last byte of all."""
        found = max((times[-1] for times in self._times.values() if times), default=self._earliest)
        return found if self._latest is None else min(found, self._latest)


def cut(data: bytes, *, whole: bool, limit: int) -> Iterator[tuple[int, str]]:
    """Up to `limit` lines of `data` from its beginning, each with the index just after it. What is behind the last
    line end is one more line if `whole`, and else only once it is too long for one."""
    at = 0
    for _ in range(limit):
        end = data.find(b"\n", at, at + LINE_BYTES + 1)
        if end >= 0:
            yield end + 1, text(data[at:end].removesuffix(b"\r"))
            at = end + 1
            continue
        left = len(data) - at
        if left > LINE_BYTES:
            end = _character_start(data, at + LINE_BYTES)
            yield end, text(data[at:end])
            at = end
            continue
        if whole and left:
            yield len(data), text(data[at:])
        return


def text(data: bytes) -> str:
    """Bytes of any kind as text."""
    return data.decode("utf-8", "replace")


def _character_start(data: bytes, at: int) -> int:
    """The index at or up to three before `at` where a character begins."""
    for back in range(4):
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at
