"""The verbs about copies of disks: their fields and what they are answered.

In charge of names and bounds. Part of `messages`, through which everybody else imports; it is a file of its own for its
length only.

A snapshot is a read-only copy of a disk under an id. It depends on its image alone. On its way to S3 it is packed with
zstd and cut into parts, each with a sha256; the seal of the whole is the sha256 of the parts' digests, in order.
Uploads and downloads are work of their own: the verb starts it, or finds it going on, and tells how far it is.
"""

from __future__ import annotations

from typing import Final, Literal, NotRequired, TypedDict

from hostd.checks import REQUEST as _REQUEST
from hostd.checks import Check, is_box_id, is_digest, is_image_id, is_work_id, matches, whole

PART_MIN: Final = 5 << 20  # S3's own least size of all parts but the last
PART_MAX: Final = 64 << 20
PARTS_MAX: Final = 10_000
URLS_MAX: Final = 64  # in one request
URL_MAX: Final = 4096  # characters
BODY_MAX: Final = 512 * 1024
HOLD_SECONDS: Final = 2.0  # a reply about work that goes on is held for so long

StorageKind = Literal["unreachable", "missing", "denied", "full", "corrupt", "refused"]
"""What S3 had against it: it did not answer or failed; no such bucket or object; not allowed; no room; other bytes than
were sealed; anything else."""

_fence = whole(0, 2**62)

VERBS: Final[dict[str, dict[str, tuple[Check, bool]]]] = {
    "snapshot": {
        "box": (is_box_id, True),
        "snapshot": (is_work_id, True),
        "fence": (_fence, True),
        "base_bytes": (whole(0, 2**50), False),  # what the box's disk was cloned with, beyond its image
    },
    "send_snapshot": {
        "snapshot": (is_work_id, True),
        "fence": (_fence, True),
        "upload": (matches(_REQUEST), True),  # names the object that is made: parts of one do not count for another
        "part_bytes": (whole(PART_MIN, PART_MAX), True),
        "body": (whole(2, BODY_MAX), True),  # {"urls": {"<number of the part, from 1>": "<where to PUT it>"}}
    },
    "receive_snapshot": {
        "snapshot": (is_work_id, True),
        "fence": (_fence, True),
        "image": (is_image_id, True),
        "size": (whole(1, 2**50), True),  # bytes of the object
        "sha256": (is_digest, True),  # its seal
        "part_bytes": (whole(PART_MIN, PART_MAX), True),
        "size_bytes": (whole(0, 2**50), True),  # of the disk beyond its image
        "body": (whole(2, BODY_MAX), True),  # {"url": "<where to GET it>"}
    },
    "delete_snapshot": {"snapshot": (is_work_id, True), "fence": (_fence, True)},
}


class ReportedSnapshot(TypedDict):
    snapshot: str
    image: str
    size_bytes: int
    taken_at_ms: int  # or received


class SnapshotReply(TypedDict):
    """``state`` is `taking` until it is there. ``size_bytes``: of the disk beyond its image. ``freeze_ms``: how long
    the box stood still, 0 for one that is not up; ``frozen``: whether it came to a halt."""

    state: Literal["taking", "taken"]
    image: NotRequired[str]
    size_bytes: NotRequired[int]
    freeze_ms: NotRequired[float]
    flush_ms: NotRequired[float]
    frozen: NotRequired[bool]
    taken_at_ms: NotRequired[int]


class SendReply(TypedDict):
    """``want``: the first part for which no URL that works is here. Sealed: ``parts`` are (size, sha256, ETag)."""

    state: Literal["sending", "sealed"]
    sent_bytes: int
    want: NotRequired[int | None]
    size: NotRequired[int]
    sha256: NotRequired[str]
    parts: NotRequired[list[tuple[int, str, str]]]


class ReceiveReply(TypedDict):
    state: Literal["receiving", "here"]
    received_bytes: int
