"""What follows a suspended devbox to S3 is a snapshot that nobody sees, and its devbox wakes from it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection

from devboxes import services
from hosts.client import use_fake
from snapshots import services as snapshot_services
from snapshots.models import DiskSnapshot
from snapshots.saves import SnapshotSaves
from tests import devbox_world
from tests.conftest import Party
from tests.devbox_world import make_host, promised
from tests.fake_host import FakeHost
from tests.snapshot_world import MemoryStore, sleep_over, work

pytestmark = pytest.mark.django_db


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    made = make_host()
    yield made
    use_fake(made.host_id, None)


@pytest.fixture
def other(db: None) -> Iterator[FakeHost]:
    made = make_host("other", cordoned=True)
    yield made
    use_fake(made.host_id, None)


@pytest.fixture
def store(fake: FakeHost, other: FakeHost, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    return MemoryStore(monkeypatch, fake, other)


def asleep(devbox_id: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = step_since - interval '11 s'")
    devbox_world.sleep_over(devbox_id)
    work()


@pytest.fixture
def devbox_id(alice: Party, fake: FakeHost, store: MemoryStore) -> str:
    """One that sleeps, and whose disk is in S3."""
    made = str(alice.post("/v1/devboxes", {}).json()["id"])
    work()
    services.request_suspend(made, why="asked")
    work()
    asleep(made)
    (save,) = DiskSnapshot.objects.all()
    for _ in range(5):
        sleep_over(save.pk)
        work()
    asleep(made)
    assert devbox_world.row(made).stored_at is not None, DiskSnapshot.objects.values().get()
    return made


def test_it_is_nobodys_snapshot(alice: Party, devbox_id: str) -> None:
    (save,) = DiskSnapshot.objects.all()
    assert (save.status, save.own_turn, save.devbox_id) == ("complete", 0, devbox_id)
    assert alice.get("/v1/devboxes/disk_snapshots").json()["snapshots"] == []
    assert alice.get(f"/v1/devboxes/disk_snapshots/{save.pk}/status").status_code == 404
    assert alice.post(f"/v1/devboxes/disk_snapshots/{save.pk}/delete").status_code == 404
    assert alice.post("/v1/devboxes", {"snapshot_id": save.pk}).status_code == 400
    view = alice.get(f"/v1/devboxes/{devbox_id}").json()
    assert view["snapshot_id"] is None and view["disk_stored_time_ms"] is not None
    assert SnapshotSaves().begin(devbox_id, 0) == save.pk, "asked for again, it is the same"


def test_it_goes_when_its_devbox_wakes(fake: FakeHost, store: MemoryStore, devbox_id: str) -> None:
    (save,) = DiskSnapshot.objects.all()
    assert store.objects and save.pk in fake.snapshots
    services.request_resume(devbox_id)
    work()
    assert devbox_world.row(devbox_id).status == "running"
    sleep_over(save.pk)
    work()
    assert DiskSnapshot.objects.get().status == "deleted"
    assert store.objects == {} and fake.snapshots == {}


def test_its_devbox_wakes_on_another_host(fake: FakeHost, other: FakeHost, store: MemoryStore, devbox_id: str) -> None:
    (save,) = DiskSnapshot.objects.all()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = false, seen_at = clock_timestamp() + interval '1 h'")
        sql = "UPDATE hosts_host SET seen_at = now() - interval '1 h', lost_at = now() WHERE id = %s"
        cursor.execute(sql, [fake.host_id])
    fake.unreachable = True
    services.request_resume(devbox_id)
    work()
    devbox = devbox_world.row(devbox_id)
    assert (devbox.status, devbox.host_id) == ("running", other.host_id), devbox.why
    assert devbox.source_bytes == save.size_bytes
    (resumed,) = [call for call in other.called("resume") if call.get("snapshot")]
    assert resumed["snapshot"] == save.pk and resumed["disk_bytes"] == (4096 << 20) - devbox.source_bytes
    assert promised(other.host_id) == (1000, 2048, 4096)


def test_it_is_no_reason_not_to_shut_down(alice: Party, fake: FakeHost, store: MemoryStore) -> None:
    fake.slow_sends = 99
    made = str(alice.post("/v1/devboxes", {}).json()["id"])
    work()
    services.request_suspend(made, why="asked")
    work()
    asleep(made)
    assert DiskSnapshot.objects.get().status == "in_progress"
    assert snapshot_services.why_not_shut_down(made) is None
    assert alice.post(f"/v1/devboxes/{made}/shutdown").json()["status"] == "shutdown"
    work()
    sleep_over(DiskSnapshot.objects.get().pk)
    work()
    assert devbox_world.row(made).step == "gone" and DiskSnapshot.objects.get().status == "deleted"
    assert store.uploads == {} and fake.snapshots == {} and fake.asleep == {}
