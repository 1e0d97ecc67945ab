"""When the bytes of a command's output came: an index over its two streams.

In charge of: at most one record for every GAP_MS of a stream, in memory and, for commands that run for a while, in a
file beside the output; the bound on their number; reading them back. Not in charge of: the bytes (streams.py), lines,
which whoever reads the output cuts by the index.

A record says: at that time, that stream had so many bytes. So consecutive records of a stream bound what came in
between, and every byte belongs to exactly one record. When there are MAX_RECORDS, every second one of each stream is
merged into the next and the gap doubles: times become coarser, and never is a byte without one.

Commands that end within a second and write little never touch the file: their records travel in the journal.
"""

from __future__ import annotations

import binascii
import os
import struct

from hostd import polling
from hostd.execution import now_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RECORD = struct.Struct("<QQ")
"""(milliseconds since 1970) * 2 + (0 for stdout, 1 for stderr); bytes of that stream so far."""
GAP_MS = 10
MAX_RECORDS = 4096
EVENT_RECORDS = 1024
"""Records that travel in an exit event."""
JOURNAL_RECORDS = 64
"""Records that are kept in the journal instead of a file."""
QUICK_MS = 1000
"""For so long nothing is written to the file."""


class Index:
    """The records of one command, or of what came after its exit."""

    __slots__ = ("_began", "_directory", "_gap", "_last", "_name", "_records", "_saved", "_sealed", "_through")

    def __init__(self, directory: int, name: str, began_ms: int, *, through: bool = False) -> None:
        """`through`: every change is in the file at once."""
        self._directory, self._name, self._began, self._through = directory, name, began_ms, through
        self._records = bytearray()
        self._last: dict[int, tuple[int, int]] = {}  # stream -> place of its last record, its time
        self._gap = GAP_MS
        self._saved = 0  # bytes of it that are in the file
        self._sealed = False  # ended: read back from where it is kept

    def note(self, number: int, end: int) -> None:
        """Stream `number` has `end` bytes now."""
        now = now_ms()
        last = self._last.get(number)
        if last is not None and 0 <= now - last[1] < self._gap:
            RECORD.pack_into(self._records, last[0], last[1] * 2 + number - 1, end)
            self._saved = min(self._saved, last[0])
            if self._through:
                self._save(len(self._records))
            return
        self._append(now, number, end)
        if len(self._records) >= MAX_RECORDS * RECORD.size:
            self._thin()
        elif self._through or now - self._began > QUICK_MS:
            changing = [place for place, at_ms in self._last.values() if now - at_ms < self._gap]
            self._save(len(self._records) if self._through else min(changing))

    def _append(self, at_ms: int, number: int, end: int) -> None:
        self._last[number] = (len(self._records), at_ms)
        self._records += RECORD.pack(at_ms * 2 + number - 1, end)

    def ends(self) -> dict[int, int]:
        """Return how far the records of each stream reach."""
        found: dict[int, int] = {}
        for stamp, end in RECORD.iter_unpack(self.read()):
            found[stamp % 2 + 1] = end
        return found

    def read(self) -> bytes:
        """Return all records, in the order in which they were made."""
        return bytes(self._records) if self._records or not self._sealed else self._load()

    def for_event(self) -> str | None:
        """Return at most EVENT_RECORDS records as base64 text, None if there are none."""
        records = bytearray(self.read())
        while len(records) > EVENT_RECORDS * RECORD.size:
            records = thinned(records)
        return binascii.b2a_base64(records, newline=False).decode("ascii") if records else None

    # --- what a successor gets

    def seal(self) -> dict[str, Any]:
        """The streams have ended: keep the records in the file, or return the journal's facts that hold them."""
        if self._records and not self._saved and len(self._records) <= JOURNAL_RECORDS * RECORD.size:
            self._sealed = True
            return {"index": binascii.b2a_base64(self._records, newline=False).decode("ascii")}
        self._save(len(self._records))
        if self._saved == len(self._records):
            self._sealed = True
            self._records = bytearray()
            self._saved = 0
            self._last.clear()
        return {}

    def recover(self, facts: dict[str, Any], sealed: bool, written: dict[int, tuple[int, int]]) -> None:
        """Take up what a dead keeper left. `written`: stream -> its bytes and when the last of them came."""
        self._sealed = sealed
        kept = facts.get("index")
        if isinstance(kept, str):
            self._records = bytearray(binascii.a2b_base64(kept))
            return
        if sealed:
            return
        self._records = bytearray(self._load())
        self._saved = len(self._records)
        self._find_last()
        for number, (size, at_ms) in written.items():
            reached = 0
            if number in self._last:
                reached = RECORD.unpack_from(self._records, self._last[number][0])[1]
            if size > reached:
                self._append(at_ms, number, size)

    def remove(self) -> None:
        """Delete the file."""
        try:
            os.unlink(self._name, dir_fd=self._directory)
        except FileNotFoundError:
            pass

    def _load(self) -> bytes:
        try:
            descriptor = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return b""
        try:
            data = os.pread(descriptor, (MAX_RECORDS + 2) * RECORD.size, 0)
        finally:
            os.close(descriptor)
        return data[: len(data) // RECORD.size * RECORD.size]

    def _find_last(self) -> None:
        self._last.clear()
        for place in range(0, len(self._records), RECORD.size):
            stamp, _ = RECORD.unpack_from(self._records, place)
            self._last[stamp % 2 + 1] = (place, stamp // 2)

    def _thin(self) -> None:
        self._records = thinned(self._records)
        self._gap *= 2
        self._find_last()
        self.remove()
        self._saved = 0
        self._save(len(self._records))

    def _save(self, until: int) -> None:
        """Append the records up to a place to the file. On a full pool they stay in memory only."""
        if until <= self._saved:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(self._name, flags, 0o600, dir_fd=self._directory)
            try:
                # At its place, not at the end: a record that was cut off is written over.
                if os.pwrite(descriptor, self._records[self._saved : until], self._saved) == until - self._saved:
                    self._saved = until
            finally:
                os.close(descriptor)
        except OSError as error:
            polling.log(f"{self._name}: not written down: {error.strerror}")


def thinned(records: bytearray) -> bytearray:
    """Merge every second record of each stream into the one after it."""
    places: dict[int, list[int]] = {0: [], 1: []}
    for place in range(0, len(records), RECORD.size):
        places[records[place] & 1].append(place)
    kept = sorted(place for found in places.values() for place in found[::-1][::2])
    return bytearray(b"".join(records[place : place + RECORD.size] for place in kept))
