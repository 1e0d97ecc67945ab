"""A snapshot's object in S3: its key, the URLs a host puts its parts to, sealing, reading back, deletion.

In charge of what the flow asks of `storage`. Not in charge of when (`snapshots.snapshot_flow`).
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, Final, TypedDict

from api.ids import new_id
from storage import objects

PREFIX: Final = "snapshots/"
PART_BYTES: Final = 16 << 20
"""S3 allows 10,000 parts: an object may have 160 GB."""
URLS_AT_ONCE: Final = 16
VERIFY_SECONDS: Final = 3.0
"""How long one go of reading back may take before it is written down how far it came."""
UPLOAD_SECONDS: Final = 24 * 3600.0
"""No upload of a snapshot is worked at for longer."""


class Upload(TypedDict, total=False):
    """An upload that was begun: `name` for the host, `want` the first part that has no URL yet."""

    key: str
    id: str
    name: str
    want: int | None
    tries: int
    parts: list[tuple[int, str, str]]


class Damaged(Exception):
    """What S3 gives back is not what was sealed."""


def prefix(snapshot_id: str) -> str:
    """Of every object of a snapshot."""
    return f"{PREFIX}{snapshot_id}/"


def begin(snapshot_id: str, tries: int) -> Upload:
    """Begin an upload under a key of its own: a late worker's can never replace a later one's. Raises StorageError."""
    name = new_id("upl")
    key = f"{prefix(snapshot_id)}{name}.btrfs.zst"
    return Upload(key=key, id=objects.begin_upload(key), name=name, want=1, tries=tries)


def urls(upload: Upload) -> dict[int, str]:
    """For the parts that are wanted next."""
    first = upload.get("want")
    if first is None:
        return {}
    last = min(first + URLS_AT_ONCE - 1, objects.PARTS_MAX)
    return objects.part_urls(upload["key"], upload["id"], range(first, last + 1))


def seal(upload: Upload, size: int) -> None:
    """Make the parts one object. Repeatable. Raises StorageError."""
    objects.complete_upload(upload["key"], upload["id"], [part[2] for part in upload["parts"]], size)


def verify(upload: Upload, sha256: str, done: int) -> int:
    """Read part after part back and compare, from part `done` on, for a few seconds; how many are right by then.

    Raises Damaged, StorageError.
    """
    key, parts = upload["key"], upload["parts"]
    if done == 0:
        found = objects.head(key)
        whole = sum(part[0] for part in parts)
        if found is None or found.size != whole:
            raise Damaged(f"S3 has {found.size if found else 'none'} of its {whole} bytes")
        if hashlib.sha256(b"".join(bytes.fromhex(part[1]) for part in parts)).hexdigest() != sha256:
            raise Damaged("its parts are not those of its seal")
    until = time.monotonic() + VERIFY_SECONDS
    offset = sum(part[0] for part in parts[:done])
    for size, digest, _ in parts[done:]:
        if hashlib.sha256(objects.get_range(key, offset, size)).hexdigest() != digest:
            raise Damaged(f"part {done + 1} of {len(parts)} is not what was sent")
        done, offset = done + 1, offset + size
        if time.monotonic() > until:
            break
    return done


def remove(snapshot_id: str, upload: dict[str, Any] | None) -> None:
    """Leave nothing of it in S3. Repeatable. Raises StorageError."""
    if upload and upload.get("id"):
        objects.abandon_upload(upload["key"], upload["id"])
    while objects.delete_prefix(prefix(snapshot_id), 1000) == 1000:
        pass
