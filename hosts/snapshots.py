"""The verbs about copies of disks, as methods of the client that threads use.

In charge of what they are called with and answer. Not in charge of how bytes travel (`hosts.client`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from hostd.messages import ReceiveReply, SendReply, SnapshotReply


class SnapshotVerbs:
    """Part of `HostClient`. All of it may be sent twice; HostRefused `storage` tells what S3 had against it in
    `extra["kind"]`."""

    def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> dict[str, Any]:
        raise NotImplementedError

    def snapshot(self, *, box: str, snapshot: str, fence: int, base_bytes: int = 0) -> SnapshotReply:
        """Copy the box's disk, or tell how far that is. HostRefused: unknown_box, no_space."""
        return cast(
            SnapshotReply, self._ask("snapshot", box=box, snapshot=snapshot, fence=fence, base_bytes=base_bytes)
        )

    def send_snapshot(
        self, *, snapshot: str, fence: int, upload: str, part_bytes: int, urls: Mapping[int, str]
    ) -> SendReply:
        """Have it sent to these URLs, or tell how far that is. HostRefused: unknown_id, storage."""
        body = json.dumps({"urls": urls}).encode()
        fields = {"snapshot": snapshot, "fence": fence, "upload": upload, "part_bytes": part_bytes}
        return cast(SendReply, self._ask("send_snapshot", body, **fields))

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
    ) -> ReceiveReply:
        """Have it received, or tell how far that is. HostRefused: unknown_image, no_space, storage."""
        fields: dict[str, Any] = {"snapshot": snapshot, "fence": fence, "image": image, "size": size, "sha256": sha256}
        fields |= {"part_bytes": part_bytes, "size_bytes": size_bytes}
        return cast(ReceiveReply, self._ask("receive_snapshot", json.dumps({"url": url}).encode(), **fields))

    def delete_snapshot(self, *, snapshot: str, fence: int) -> None:
        """Leave nothing of it on the host; unknown ones get a tombstone."""
        self._ask("delete_snapshot", snapshot=snapshot, fence=fence)
