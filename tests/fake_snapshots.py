"""Kept disks of a fake host: taken at once, sent part by part to nowhere, received when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hosts.errors import HostRefused
from tests.fake_boxes import verb

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = (b"first part ", b"second part")
SIZE = 5 << 20


class FakeSnapshots:
    """Part of `FakeHost`. `slow_takes`, `slow_sends`, `slow_receives`: so many calls are answered with "not yet"."""

    host_id: str
    image: str
    boxes: dict[str, Any]
    asleep: dict[str, Any]
    _fence: Callable[[str, int], None]

    def __init__(self) -> None:
        self.snapshots: dict[str, int] = {}
        """Id -> bytes beyond the image."""
        self.slow_takes = 0
        self.slow_sends = 0
        self.slow_receives = 0
        self.store: dict[str, bytes] = {}
        """Where uploads end up, by the name of the upload."""

    def reported_snapshots(self) -> list[dict[str, Any]]:
        return [
            {"snapshot": id, "image": self.image, "size_bytes": size, "taken_at_ms": 0}
            for id, size in self.snapshots.items()
        ]

    @verb
    def snapshot(self, *, box: str, snapshot: str, fence: int, base_bytes: int = 0) -> dict[str, Any]:
        self._fence(snapshot, fence)
        if box not in self.boxes and box not in self.asleep and snapshot not in self.snapshots:
            raise HostRefused("unknown_box", f"no box {box}", host_id=self.host_id)
        if self.slow_takes > 0:
            self.slow_takes -= 1
            return {"state": "taking"}
        size = self.snapshots.setdefault(snapshot, base_bytes + SIZE)
        told = {"state": "taken", "image": self.image, "size_bytes": size, "freeze_ms": 4.5, "frozen": True}
        return {**told, "flush_ms": 1.0, "taken_at_ms": 1}

    @verb
    def send_snapshot(
        self, *, snapshot: str, fence: int, upload: str, part_bytes: int, urls: Mapping[int, str]
    ) -> dict[str, Any]:
        self._fence(snapshot, fence)
        if snapshot not in self.snapshots:
            raise HostRefused("unknown_id", f"no snapshot {snapshot}", host_id=self.host_id)
        if self.slow_sends > 0:
            self.slow_sends -= 1
            return {"state": "sending", "sent_bytes": 1, "want": None}
        self.store[upload] = b"".join(PARTS)
        digests = [hashlib.sha256(part) for part in PARTS]
        return {
            "state": "sealed",
            "sent_bytes": sum(map(len, PARTS)),
            "size": sum(map(len, PARTS)),
            "want": None,
            "sha256": hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
            "parts": [
                [len(part), digest.hexdigest(), f"etag{n}"]
                for n, (part, digest) in enumerate(zip(PARTS, digests, strict=True))
            ],
        }

    @verb
    def receive_snapshot(
        self,
        *,
        snapshot: str,
        fence: int,
        image: str,
        size: int,
        sha256: str,
        part_bytes: int,
        size_bytes: int,
        url: str,
    ) -> dict[str, Any]:
        self._fence(snapshot, fence)
        if self.slow_receives > 0 and snapshot not in self.snapshots:
            self.slow_receives -= 1
            return {"state": "receiving", "received_bytes": 0}
        self.snapshots.setdefault(snapshot, size_bytes)
        return {"state": "here", "received_bytes": size}

    @verb
    def delete_snapshot(self, *, snapshot: str, fence: int) -> None:
        self._fence(snapshot, fence)
        self.snapshots.pop(snapshot, None)
