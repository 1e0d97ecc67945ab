"""Fences: the highest one seen per devbox, on disk, and one request at a time per devbox.

A worker whose lease lapsed may still send a late `boot` or `destroy`. Every changing verb carries the fence of the
claim it was sent under; the lock is held across check and effect, so an older request can neither overtake nor follow a
newer one. A destroyed devbox leaves a tombstone for a day, so that a late verb cannot raise it from the dead.

The file survives the kill of any process. It is not forced to the platter: a machine that loses power loses its boxes,
and with them everything a stale verb could reach.

Not in charge of: fences of executions, which the keeper holds in its box's journal.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hostd.messages import TOMBSTONE_SECONDS, Refused

WAITERS_MAX = 32  # requests queued behind one devbox; a healthy server sends one at a time
_COMPACT_SLACK = 1000  # superseded lines the file may hold before it is written anew


@dataclass(slots=True)
class Fence:
    """The state of one devbox. ``gone_at`` is the wall time of its destruction in seconds, None while it may live."""

    fence: int
    gone_at: float | None = None


class Fences:
    """All fences of a host. Single-threaded; raises OSError when the file cannot be read or written."""

    def __init__(self, path: str, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._known: dict[str, Fence] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._lines = 0
        self._load()
        self._compact()

    def of(self, box: str) -> int:
        """The highest fence seen for a devbox, 0 when there is none."""
        known = self._known.get(box)
        return known.fence if known else 0

    @asynccontextmanager
    async def held(self, box: str, fence: int, *, ending: bool = False) -> AsyncIterator[None]:
        """Hold the devbox while its verb takes effect.

        Raises Refused: stale_fence (with the fence that was seen) for an older request, or for one that is not newer
        than the tombstone unless it is ``ending``; busy when :data:`WAITERS_MAX` requests wait already.
        """
        waiting = self._waiting.get(box, 0)
        if waiting >= WAITERS_MAX:
            raise Refused("busy", f"{WAITERS_MAX} requests wait for this box already")
        self._waiting[box] = waiting + 1
        lock = self._locks.setdefault(box, asyncio.Lock())
        try:
            async with lock:
                self._enter(box, fence, ending)
                yield
        finally:
            self._waiting[box] -= 1
            if not self._waiting[box]:
                del self._waiting[box]
                del self._locks[box]

    def is_held(self, box: str) -> bool:
        """True while a request for this devbox runs or waits."""
        return box in self._waiting

    def bury(self, box: str, fence: int) -> None:
        """Write the tombstone. Called inside :meth:`held` after the last trace of the devbox is gone."""
        self._put(box, Fence(max(fence, self.of(box)), self._now()))

    def forget_old(self) -> None:
        """Drop tombstones older than a day and tidy the file. Cheap enough for once a minute."""
        limit = self._now() - TOMBSTONE_SECONDS
        for box in [box for box, known in self._known.items() if known.gone_at is not None and known.gone_at < limit]:
            if not self.is_held(box):
                del self._known[box]
        if self._lines > 2 * len(self._known) + _COMPACT_SLACK:
            self._compact()

    def _enter(self, box: str, fence: int, ending: bool) -> None:
        known = self._known.get(box)
        if known is not None:
            if fence < known.fence:
                raise Refused("stale_fence", "a newer request for this box was served", fence=known.fence)
            if known.gone_at is not None and fence == known.fence and not ending:
                raise Refused("stale_fence", "this box was destroyed under the same fence", fence=known.fence)
            if fence == known.fence:
                return
        # Before the effect: if we die in its middle, the older request must be refused all the same.
        self._put(box, Fence(fence, known.gone_at if known is not None and ending else None))

    def _put(self, box: str, known: Fence) -> None:
        self._append([_line(box, known)], os.O_APPEND)
        self._known[box] = known

    def _append(self, lines: list[bytes], flags: int, path: str | None = None) -> None:
        handle = os.open(path or self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)
        self._lines += len(lines)

    def _load(self) -> None:
        try:
            with open(self._path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                box, fence, gone_at = json.loads(line)
                known = Fence(int(fence), None if gone_at is None else float(gone_at))
            except (ValueError, TypeError):
                continue  # the end of a line that a kill cut short, or the empty one after the last newline
            if fence >= self.of(str(box)):
                self._known[str(box)] = known

    def _compact(self) -> None:
        temporary = f"{self._path}.new"
        self._lines = 0
        self._append([_line(box, known) for box, known in self._known.items()], os.O_TRUNC, temporary)
        os.rename(temporary, self._path)


def _line(box: str, known: Fence) -> bytes:
    # The newline comes first as well: after a line cut short, the next one must not be glued to it.
    return b"\n" + json.dumps([box, known.fence, known.gone_at], separators=(",", ":")).encode() + b"\n"
