"""Copying a finished output from its host to S3, a part at a time.

In charge of reading it in order, over a dropped middle, in parts of exactly the size S3 wants, and of taking a copy up
where an earlier go left it. Not in charge of when a copy is made (`execution_flow`) or of reading it back (`outputs`).

What was dropped is left out of the object: head and tail are joined, and `hole` says where in the stream the joint is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

from hosts.client import client_for
from storage import objects

if TYPE_CHECKING:
    from hostd.messages import Stream


class Copy(TypedDict, total=False):
    """How far a copy has come, as it is kept in the row. `hole`: byte position of the dropped middle in the stream."""

    id: str
    etags: list[str]
    hole: int
    done: bool


class Copied(Protocol):
    """What is needed of the execution whose output is copied."""

    id: str
    devbox_id: str
    host_id: str

    def check(self) -> None:
        """Raises LeaseLost when somebody else has taken over."""


class Source:
    """One output on its host. Positions are in the stream, places in the object that leaves out what was dropped."""

    def __init__(self, row: Copied, stream: str, size: int, dropped: int) -> None:
        self.row = row
        self.kept = size - dropped
        self._stream = cast("Stream", stream)
        self._size, self._dropped = size, dropped
        self.hole: int | None = None

    def read(self, place: int, length: int) -> bytes:
        """Exactly `length` bytes from a place in the object. Raises HostError, and OSError when the host has less."""
        parts: list[bytes] = []
        have = 0
        while have < length:
            at = place + have
            position = at if not self._dropped or self.hole is None or at < self.hole else at + self._dropped
            got = client_for(self.row.host_id).read(
                box=self.row.devbox_id, id=self.row.id, stream=self._stream, offset=position, limit=length - have
            )
            if got.offset != position:
                # The first read behind the head: the host moved it to the tail.
                if self.hole is not None or got.offset - position != self._dropped:
                    raise OSError(f"{self._stream} of {self.row.id} goes on at {got.offset} instead of {position}")
                self.hole = position
            if not got.data:
                raise OSError(f"the host has no more of {self._stream} of {self.row.id} at byte {position}")
            parts.append(got.data)
            have += len(got.data)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def copy_some(source: Source, key: str, before: Copy, until: float) -> Copy:
    """Go on with a copy until it is done or `until` (monotonic) has passed, with one part at least. Returns how far it
    has come. Raises HostError, OSError, StorageError and LeaseLost; the parts of a go that failed are copied again."""
    copy = cast(Copy, dict[str, Any](before))
    source.hole = copy.get("hole")
    size = source.kept
    if size <= objects.PART_BYTES:
        objects.put(key, source.read(0, size))
        return _noted(source, {"done": True})
    if "id" not in copy:
        # Left behind when this go is never written down; `retention` takes it when its time is over.
        copy = {"id": objects.begin_upload(key), "etags": []}
    etags = list(copy["etags"])
    first = len(etags)
    while len(etags) * objects.PART_BYTES < size:
        source.row.check()
        if len(etags) > first and time.monotonic() >= until:
            return _noted(source, {**copy, "etags": etags})
        place = len(etags) * objects.PART_BYTES
        part = source.read(place, min(objects.PART_BYTES, size - place))
        etags.append(objects.put_part(key, copy["id"], len(etags) + 1, part))
    objects.complete_upload(key, copy["id"], etags, size)
    return _noted(source, {"done": True})


def _noted(source: Source, copy: Copy) -> Copy:
    if source.hole is not None:
        copy["hole"] = source.hole
    return copy
