"""The flow of a snapshot: each step twice, answers that are lost, hosts and S3 that refuse or are away."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from hosts.client import HostRefused, HostUnreachable, use_fake
from snapshots import snapshot_flow as flow
from snapshots.models import DiskSnapshot
from storage.objects import StorageError
from tests.conftest import Party
from tests.devbox_world import make_host
from tests.fake_host import FakeHost
from tests.snapshot_world import MemoryStore, row, running, sleep_over, work


@pytest.fixture
def fake(db: None) -> Any:
    made = make_host()
    made.script("*")
    yield made
    use_fake(made.host_id, None)


@pytest.fixture
def store(fake: FakeHost, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    return MemoryStore(monkeypatch, fake)


@pytest.fixture
def snapshot_id(alice: Party, fake: FakeHost, store: MemoryStore) -> str:
    devbox_id = running(alice)
    return str(alice.post(f"/v1/devboxes/{devbox_id}/snapshot_disk_async", {}).json()["id"])


def until_over(snapshot_id: str, rounds: int = 30) -> DiskSnapshot:
    for _ in range(rounds):
        work()
        if row(snapshot_id).status != "in_progress":
            return row(snapshot_id)
        sleep_over(snapshot_id)
    raise AssertionError(f"still in {row(snapshot_id).step}: {row(snapshot_id).error_detail}")


def s3_says(code: str, status: int) -> StorageError:
    cause = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "x")
    error = StorageError("do", "key", cause)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("verb", ["snapshot", "send_snapshot"])
@pytest.mark.parametrize("after", [False, True])
def test_a_lost_answer_costs_a_try(fake: FakeHost, snapshot_id: str, verb: str, after: bool) -> None:
    fake.fail(verb, after=after, times=2)
    found = until_over(snapshot_id)
    assert found.status == "complete" and len(fake.called(verb)) >= 3
    assert list(fake.snapshots) == [snapshot_id]


def test_what_takes_long_is_asked_for_again(fake: FakeHost, snapshot_id: str) -> None:
    fake.slow_takes, fake.slow_sends = 3, 3
    found = until_over(snapshot_id)
    assert found.status == "complete" and found.verified_parts == 2
    names = {call["upload"] for call in fake.called("send_snapshot")}
    assert len(names) == 1  # one upload, whoever asked how often


@pytest.mark.parametrize(
    ("code", "status", "kind"), [("AccessDenied", 403, "denied"), ("NoSuchBucket", 404, "missing"), ("X", 507, "full")]
)
def test_what_s3_refuses_again_and_again_is_an_error_that_says_so(
    fake: FakeHost, store: MemoryStore, snapshot_id: str, code: str, status: int, kind: str
) -> None:
    store.failing = [s3_says(code, status) for _ in range(3)]
    found = until_over(snapshot_id)
    assert (found.status, found.error_kind) == ("error", f"storage_{kind}")
    assert kind in found.error_message
    work()
    assert row(snapshot_id).step == "failed" and not fake.snapshots and not store.objects and not store.uploads


def test_s3_that_is_away_is_waited_for(store: MemoryStore, snapshot_id: str) -> None:
    store.failing = [s3_says("SlowDown", 503) for _ in range(6)]
    assert until_over(snapshot_id).status == "complete"


def test_what_is_told_by_the_host_of_s3(fake: FakeHost, store: MemoryStore, snapshot_id: str) -> None:
    refused = HostRefused("storage", "S3 answered 403", {"kind": "denied"}, host_id=fake.host_id)
    fake.fail("send_snapshot", refused, times=2)  # credentials that are being changed
    assert until_over(snapshot_id).status == "complete"


def test_an_upload_that_s3_lost_is_begun_again(fake: FakeHost, snapshot_id: str) -> None:
    lost = HostRefused("storage", "S3 answered 404 NoSuchUpload", {"kind": "missing"}, host_id=fake.host_id)
    fake.fail("send_snapshot", lost, times=3)
    assert until_over(snapshot_id).status == "complete"
    assert len({call["upload"] for call in fake.called("send_snapshot")}) == 2


def test_what_comes_back_other_than_it_was_sent_is_never_complete(
    fake: FakeHost, store: MemoryStore, snapshot_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = store.get_range
    monkeypatch.setattr(
        "storage.objects.get_range", lambda key, start, length: whole(key, start, length).replace(b"second", b"sec0nd")
    )
    found = until_over(snapshot_id)
    assert (found.status, found.error_kind) == ("error", "corrupt")
    assert "part 2 of 2" in found.error_message
    work()
    assert not store.objects and not fake.snapshots


def test_a_host_that_is_lost_before_it_was_sent(fake: FakeHost, snapshot_id: str) -> None:
    fake.slow_sends = 1
    work()
    assert row(snapshot_id).step == "send"
    fake.fail("send_snapshot", HostUnreachable(fake.host_id, "gone"), times=50)
    fake.fail("delete_snapshot", HostUnreachable(fake.host_id, "gone"), times=50)
    from hosts.models import Host

    Host.objects.filter(pk=fake.host_id).update(lost_at="2026-01-01T00:00:00Z")
    found = until_over(snapshot_id)
    assert (found.status, found.error_kind) == ("error", "host_lost")
    work()
    assert row(snapshot_id).step == "failed"


def test_a_late_workers_settle_is_thrown_away(snapshot_id: str, fake: FakeHost) -> None:
    fake.slow_takes = 1
    sleep_over(snapshot_id)
    claimed = flow.snapshot_flow.claim(snapshot_id)
    assert claimed is not None
    flow.snapshot_flow.request(snapshot_id, {"name": "x"})
    flow.snapshot_flow.advance(claimed)
    assert row(snapshot_id).step == "take"
    assert until_over(snapshot_id).status == "complete"


def test_its_time_is_up(snapshot_id: str, fake: FakeHost) -> None:
    fake.slow_takes = 1
    work()
    DiskSnapshot.objects.filter(pk=snapshot_id).update(deadline_at="2026-01-01T00:00:00Z")
    sleep_over(snapshot_id)
    found = until_over(snapshot_id)
    assert (found.status, found.error_kind) == ("error", "timeout")


def test_a_deletion_waits_for_devboxes_that_are_made_of_it(
    alice: Party, fake: FakeHost, store: MemoryStore, snapshot_id: str
) -> None:
    assert until_over(snapshot_id).status == "complete"
    fake.slow_receives, fake.snapshots = 1, {}
    copy = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id}).json()["id"]
    from tests import devbox_world

    devbox_world.work()
    assert devbox_world.row(copy).step == "prepare_disk"
    assert alice.post(f"/v1/devboxes/disk_snapshots/{snapshot_id}/delete").status_code == 200
    work()
    assert row(snapshot_id).step == "delete" and store.objects
    devbox_world.sleep_over(copy)
    work()
    assert devbox_world.row(copy).status == "running"
    sleep_over(snapshot_id)
    work()
    assert row(snapshot_id).step == "deleted" and not store.objects and not fake.snapshots
