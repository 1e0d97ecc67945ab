"""The keeper's journal: what a successor must know of each command, one JSON line a change.

In charge of: appending changes before they are acted upon, merging the lines of a command into its facts, starting over
with a short file when the long one is mostly history.
Not in charge of: what the facts mean (executions.py). It is written for the death of the keeper, not for the machine's:
there is no fsync, because after a power loss there is no box either.

A line is {"id": …, changed facts}; facts of equal name replace older ones. {"id": …, "gone": true} ends a command.
The id "" holds the box's own facts. A last line that was cut off is ignored, and the next one starts on a line of its
own.
"""

from __future__ import annotations

import os

from hostd import packets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "journal"
REWRITE_BYTES = 1 << 20
"""A journal shorter than this is never rewritten."""
MAX_BYTES = 64 << 20
"""More than this is not read back: it cannot come from here."""


class Journal:
    """The facts of all commands, in memory and in a file of the output directory."""

    def __init__(self, directory: int) -> None:
        """Read what is there. Raises OSError when the directory cannot be used."""
        self._directory = directory
        self._file = os.open(NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600, dir_fd=directory)
        self.facts: dict[str, dict[str, Any]] = {}
        self._size = self._read()
        self._live = self._size

    def _read(self) -> int:
        text = bytearray()
        while len(text) < MAX_BYTES:
            piece = os.pread(self._file, 1 << 20, len(text))
            if not piece:
                break
            text += piece
        for line in bytes(text).split(b"\n"):
            if not line:
                continue
            try:
                change = packets.loads(line)
                self._merge(str(change.pop("id")), change)
            except (packets.Malformed, KeyError):
                continue  # the keeper died while it wrote this line
        if text and not text.endswith(b"\n"):
            os.write(self._file, b"\n")
        return len(text)

    def _merge(self, execution: str, change: dict[str, Any]) -> None:
        if change.get("gone"):
            self.facts.pop(execution, None)
        else:
            self.facts.setdefault(execution, {}).update(change)

    def write(self, execution: str, change: dict[str, Any]) -> None:
        """Append a change; when this returns, a successor will see it.

        Raises OSError (a full pool) and changes nothing. A line that could be written only in part is ended, so that it
        is ignored.
        """
        line = packets.dumps({"id": execution, **change}) + b"\n"
        written = os.write(self._file, line)
        if written < len(line):
            os.write(self._file, b"\n")
            raise OSError(28, "the journal's line was cut off")
        self._size += len(line)
        self._merge(execution, change)
        if self._size > REWRITE_BYTES and self._size > 4 * self._live:
            self.rewrite()

    def rewrite(self) -> None:
        """Replace the file by one that says the same in one line a command; on a full pool the old one stays."""
        lines = [packets.dumps({"id": execution, **facts}) + b"\n" for execution, facts in self.facts.items()]
        text = b"".join(lines)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._live = max(len(text), REWRITE_BYTES // 4)
        try:
            fresh = os.open(NAME + ".new", flags, 0o600, dir_fd=self._directory)
        except OSError:
            return
        try:
            view = memoryview(text)
            while view:
                view = view[os.write(fresh, view) :]
            os.rename(NAME + ".new", NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError:
            os.close(fresh)
            return
        os.close(self._file)
        self._file = fresh
        self._size = len(text)
