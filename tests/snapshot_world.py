"""Snapshots in tests of flows and of the API: an S3 in memory, and a worker for their flow inside the transaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from django.db import connection

from api.ids import new_id
from snapshots.models import DiskSnapshot
from snapshots.snapshot_flow import snapshot_flow
from storage.objects import ObjectInfo, StorageError
from tests import devbox_world
from tests.conftest import Party
from tests.fake_host import FakeHost

PATCHED = ("begin_upload", "part_urls", "object_url", "complete_upload", "head", "get_range")


class MemoryStore:
    """Uploads end up with what the fake hosts have sent under their names."""

    def __init__(self, patch: pytest.MonkeyPatch, *hosts: FakeHost) -> None:
        self.hosts = list(hosts)
        self.uploads: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.failing: list[StorageError] = []
        """What the next calls raise."""
        # Inside one transaction now() stands still: what sleeps shortly would be due again and again.
        for pause in ("snapshots.snapshot_flow.AGAIN_SECONDS", "devboxes.devbox_flow.ORIGIN_AGAIN_SECONDS"):
            patch.setattr(pause, 600.0)
        for name in (*PATCHED, "abandon_upload", "delete_prefix"):
            patch.setattr(f"storage.objects.{name}", getattr(self, name))

    def _fail(self) -> None:
        if self.failing:
            raise self.failing.pop(0)

    def begin_upload(self, key: str) -> str:
        self._fail()
        id = new_id("s3u")
        self.uploads[id] = key
        return id

    def part_urls(self, key: str, upload_id: str, numbers: Iterable[int]) -> dict[int, str]:
        return {number: f"http://s3/{key}?{number}" for number in numbers}

    def object_url(self, key: str) -> str:
        return f"http://s3/{key}"

    def complete_upload(self, key: str, upload_id: str, etags: list[str], size: int) -> None:
        self._fail()
        name = key.rpartition("/")[2].partition(".")[0]
        self.objects[key] = next(host.store[name] for host in self.hosts if name in host.store)
        self.uploads.pop(upload_id, None)

    def head(self, key: str) -> ObjectInfo | None:
        self._fail()
        return ObjectInfo(len(self.objects[key]), "e") if key in self.objects else None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self._fail()
        return self.objects[key][start : start + length]

    def abandon_upload(self, key: str, upload_id: str) -> None:
        self.uploads.pop(upload_id, None)

    def delete_prefix(self, prefix: str, limit: int = 10_000) -> int:
        self._fail()
        found = [key for key in self.objects if key.startswith(prefix)]
        for key in found:
            del self.objects[key]
        return len(found)


def work(limit: int = 60) -> None:
    """Run devboxes and snapshots that are due, until none is."""
    for _ in range(limit):
        devbox_world.work()
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE snapshots_disksnapshot SET wake_at = now() "
                "WHERE wake_at > now() AND wake_at <= clock_timestamp()"
            )
            cursor.execute("SELECT id FROM snapshots_disksnapshot WHERE wake_at <= now() AND lease_until IS NULL")
            due = [pk for (pk,) in cursor.fetchall() if snapshot_flow.run(pk)]
        if not due:
            return
    raise AssertionError(f"still due after {limit} rounds: {due}")


def sleep_over(snapshot_id: str) -> None:
    """Make a sleeping row due, without a wake."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE snapshots_disksnapshot SET wake_at = now() WHERE id = %s", [snapshot_id])


def row(snapshot_id: str) -> DiskSnapshot:
    """The row as it is now."""
    return DiskSnapshot.objects.get(pk=snapshot_id)


def running(party: Party, **body: Any) -> str:
    """A devbox of the party's that runs."""
    devbox_id = str(party.post("/v1/devboxes", body).json()["id"])
    work()
    assert devbox_world.row(devbox_id).status == "running", devbox_world.row(devbox_id).why
    return devbox_id


def taken(party: Party, devbox_id: str, **body: Any) -> str:
    """A snapshot that is complete."""
    answer = party.post(f"/v1/devboxes/{devbox_id}/snapshot_disk_async", body)
    assert answer.status_code == 200, answer.text
    work()
    assert row(answer.json()["id"]).status == "complete", row(answer.json()["id"]).error_message
    return str(answer.json()["id"])
