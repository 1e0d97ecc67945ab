"""The operations on snapshots, for their owner, her colleague and a stranger; and devboxes made of them."""

from __future__ import annotations

from typing import Any

import pytest

from api.ids import new_id
from hosts import reconcile
from hosts.client import use_fake
from hosts.models import Host
from snapshots import room
from snapshots.models import DiskSnapshot, DiskSnapshotHost
from tests import devbox_world
from tests.conftest import Party
from tests.devbox_world import make_host
from tests.fake_host import FakeHost
from tests.snapshot_world import MemoryStore, row, running, sleep_over, taken, work

SNAPSHOTS = "/v1/devboxes/disk_snapshots"


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
def devbox_id(alice: Party, fake: FakeHost, store: MemoryStore) -> str:
    return running(alice)


def begun(party: Party, devbox_id: str, body: Any = None, **rest: Any) -> Any:
    return party.post(f"/v1/devboxes/{devbox_id}/snapshot_disk_async", body, **rest)


def listed(party: Party, query: str = "") -> list[str]:
    answer = party.get(f"{SNAPSHOTS}{query}")
    assert answer.status_code == 200, answer.text
    return [one["id"] for one in answer.json()["snapshots"]]


def status(party: Party, snapshot_id: str) -> Any:
    return party.get(f"{SNAPSHOTS}/{snapshot_id}/status").json()


def test_a_snapshot_is_in_progress_until_it_was_read_back(
    alice: Party, bob: Party, charlie: Party, devbox_id: str, store: MemoryStore
) -> None:
    body = {"name": "first", "commit_message": "why", "metadata": {"a": "1"}}
    view = begun(alice, devbox_id, body).json()
    assert view == {
        "id": view["id"],
        "name": "first",
        "create_time_ms": view["create_time_ms"],
        "metadata": {"a": "1"},
        "source_devbox_id": devbox_id,
        "source_blueprint_id": None,
        "commit_message": "why",
        "size_bytes": None,
        "freeze_ms": None,
    }
    snapshot_id = view["id"]
    assert status(bob, snapshot_id) == {"status": "in_progress", "error_message": None, "snapshot": None}
    assert charlie.get(f"{SNAPSHOTS}/{snapshot_id}/status").status_code == 404
    assert alice.post(f"{SNAPSHOTS}/{snapshot_id}/delete").status_code == 409
    work()
    told = status(bob, snapshot_id)
    assert told["status"] == "complete" and told["snapshot"]["size_bytes"] == 5 << 20
    assert told["snapshot"]["freeze_ms"] == 4.5
    assert row(snapshot_id).stored_at is not None and len(store.objects) == 1
    assert listed(alice) == listed(bob) == [snapshot_id] and listed(charlie) == []


def test_what_is_refused(alice: Party, charlie: Party, devbox_id: str) -> None:
    wrongs: list[Any] = [{"commit_message": "x" * 1001}, {"metadata": {"a": 1}}, {"name": 3}, {"colour": 1}, []]
    for wrong in wrongs:
        assert begun(alice, devbox_id, wrong).status_code == 400
    assert begun(charlie, devbox_id).status_code == begun(alice, new_id("dbx")).status_code == 404
    alice.post(f"/v1/devboxes/{devbox_id}/shutdown")
    assert begun(alice, devbox_id).status_code == 400
    assert not DiskSnapshot.objects.exists()
    for path in ("snp_1", new_id("snp"), "x" * 300):
        assert alice.get(f"{SNAPSHOTS}/{path}/status").status_code == 404
        assert alice.post(f"{SNAPSHOTS}/{path}/delete").status_code == 404
        assert alice.post(f"{SNAPSHOTS}/{path}", {}).status_code == 404


def test_a_repetition_is_the_same_snapshot(alice: Party, devbox_id: str) -> None:
    headers = {"x-request-id": "r1"}
    first = begun(alice, devbox_id, {}, headers=headers).json()["id"]
    assert begun(alice, devbox_id, {}, headers=headers).json()["id"] == first
    assert begun(alice, devbox_id, {"name": "b"}, headers=headers).status_code == 400
    assert begun(alice, devbox_id, {}).json()["id"] != first


def test_snapshot_disk_holds_until_it_is_over(
    alice: Party, devbox_id: str, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapshots.api.HOLD_SECONDS", 0.2)
    path, headers = f"/v1/devboxes/{devbox_id}/snapshot_disk", {"x-request-id": "r1"}
    assert alice.post(path, {}, headers=headers).status_code == 408
    work()
    answer = alice.post(path, {}, headers=headers)
    assert answer.status_code == 200 and answer.json()["size_bytes"] == 5 << 20
    assert DiskSnapshot.objects.count() == 1
    store.hosts[0].boxes.clear()
    assert alice.post(path, {}, headers={"x-request-id": "r2"}).status_code == 408
    work()
    failed = alice.post(path, {}, headers={"x-request-id": "r2"})
    assert failed.status_code == 500 and failed.json()["code"] == "snapshot_failed"
    assert "devbox was gone" in failed.json()["message"] and failed.headers["x-should-retry"] == "false"


def test_lists_pages_filters_and_metadata(alice: Party, charlie: Party, devbox_id: str) -> None:
    other = running(alice)
    ids = [taken(alice, devbox_id, metadata={"n": str(n), "all": "x"}) for n in range(3)]
    ids.append(taken(alice, other, metadata={"n": "9"}))
    assert listed(alice) == ids[::-1]
    assert listed(alice, f"?devbox_id={devbox_id}") == ids[2::-1]
    assert listed(alice, "?metadata[n]=1") == [ids[1]]
    assert listed(alice, "?metadata[n][in]=0,9") == [ids[3], ids[0]]
    assert listed(alice, "?source_blueprint_id=bpt_1") == []
    page = alice.get(f"{SNAPSHOTS}?limit=2").json()
    assert page["has_more"] is True and page["total_count"] == 4
    assert listed(alice, f"?limit=2&starting_after={page['snapshots'][-1]['id']}") == [ids[1], ids[0]]
    assert "total_count" not in alice.get(f"{SNAPSHOTS}?include_total_count=false").json()
    assert alice.get(f"{SNAPSHOTS}?devbox_id={new_id('dbx')}").status_code == 404
    assert charlie.get(f"{SNAPSHOTS}?devbox_id={devbox_id}").status_code == 404
    assert alice.get(f"{SNAPSHOTS}?starting_after={new_id('snp')}").status_code == 404
    assert alice.get(f"{SNAPSHOTS}?metadata[a b]=1").status_code == 400
    assert alice.get(f"{SNAPSHOTS}/metadata/keys").json() == {"keys": ["all", "n"]}
    assert alice.get(f"{SNAPSHOTS}/metadata/keys/n/values").json() == {"key": "n", "values": ["0", "1", "2", "9"]}
    assert charlie.get(f"{SNAPSHOTS}/metadata/keys").json() == {"keys": []}


def test_update_replaces_what_is_given(alice: Party, charlie: Party, devbox_id: str) -> None:
    snapshot_id = taken(alice, devbox_id, name="a", commit_message="m", metadata={"a": "1"})
    path = f"{SNAPSHOTS}/{snapshot_id}"
    assert alice.post(path, {"name": None}).json()["name"] == "a"
    view = alice.post(path, {"metadata": {"b": "2"}, "commit_message": ""}).json()
    assert (view["name"], view["commit_message"], view["metadata"]) == ("a", None, {"b": "2"})
    assert charlie.post(path, {"name": "mine"}).status_code == 404


def test_deleted_is_deleted_and_its_bytes_are_gone(
    alice: Party, charlie: Party, devbox_id: str, fake: FakeHost, store: MemoryStore
) -> None:
    snapshot_id = taken(alice, devbox_id)
    assert store.objects and snapshot_id in fake.snapshots
    assert charlie.post(f"{SNAPSHOTS}/{snapshot_id}/delete").status_code == 404
    for _ in range(2):
        assert alice.post(f"{SNAPSHOTS}/{snapshot_id}/delete").json() == {}
        assert status(alice, snapshot_id)["status"] == "deleted" and listed(alice) == []
    work()
    assert not store.objects and not fake.snapshots and not DiskSnapshotHost.objects.exists()
    assert row(snapshot_id).completed_at is not None
    assert alice.post(f"{SNAPSHOTS}/{snapshot_id}/delete").json() == {}
    assert alice.post("/v1/devboxes", {"snapshot_id": snapshot_id}).status_code == 400


def test_public_ones_are_everybodys_to_read_and_the_owners_to_change(
    alice: Party, charlie: Party, devbox_id: str
) -> None:
    private = taken(alice, devbox_id, metadata={"p": "no"})
    public = taken(alice, devbox_id, metadata={"p": "yes"})
    DiskSnapshot.objects.filter(pk=public).update(public=True)
    page = charlie.get(f"{SNAPSHOTS}/list_public").json()
    assert [one["id"] for one in page["snapshots"]] == [public] and page["total_count"] == 1
    assert charlie.get(f"{SNAPSHOTS}/public/metadata/keys").json() == {"keys": ["p"]}
    assert charlie.get(f"{SNAPSHOTS}/public/metadata/keys/p/values").json() == {"key": "p", "values": ["yes"]}
    assert status(charlie, public)["status"] == "complete"
    assert charlie.post(f"{SNAPSHOTS}/{public}", {"name": "x"}).status_code == 404
    assert charlie.post(f"{SNAPSHOTS}/{public}/delete").status_code == 404
    assert charlie.post("/v1/devboxes", {"snapshot_id": private}).status_code == 400
    copy = charlie.post("/v1/devboxes", {"snapshot_id": public}).json()
    work()
    assert devbox_world.row(copy["id"]).status == "running"


def test_shutdown_waits_for_nobody_but_says_so(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    snapshot_id = begun(alice, devbox_id).json()["id"]
    answer = alice.post(f"/v1/devboxes/{devbox_id}/shutdown")
    assert answer.status_code == 409 and snapshot_id in answer.json()["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert alice.post(f"/v1/devboxes/{devbox_id}/shutdown?force=true").json()["status"] == "shutdown"
    work()  # the box waits until its copy is taken
    sleep_over(snapshot_id)
    devbox_world.sleep_over(devbox_id)
    work()
    assert status(alice, snapshot_id)["status"] == "complete"
    assert devbox_id not in fake.boxes


# --- devboxes made of snapshots ---


def test_a_devbox_of_a_snapshot(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    parameters = {"resource_size_request": "MEDIUM", "user_parameters": {"username": "dev", "uid": 1500}}
    source = running(alice, launch_parameters={**parameters, "launch_commands": ["true"]})
    snapshot_id = taken(alice, source)
    view = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id, "metadata": {"a": "b"}}).json()
    assert view["snapshot_id"] == snapshot_id and view["metadata"] == {"a": "b"}
    assert view["launch_parameters"]["resource_size_request"] == "MEDIUM"
    assert view["launch_parameters"]["user_parameters"] == {"username": "dev", "uid": 1500}
    assert "launch_commands" not in view["launch_parameters"]
    work()
    made = devbox_world.row(view["id"])
    assert made.status == "running" and made.source_bytes == 5 << 20
    asked = fake.called("prepare_disk")[-1]
    assert asked["snapshot"] == snapshot_id and asked["disk_bytes"] == (8 << 30) - (5 << 20)
    assert fake.called("boot")[-1]["disk_bytes"] == (8 << 30) - (5 << 20)
    assert any("ssh-keygen" in str(call["body"]) for call in fake.called("spawn") if call["box"] == made.pk)
    # Overridden, and taken again: what it was made with counts.
    small = alice.post(
        "/v1/devboxes", {"snapshot_id": snapshot_id, "launch_parameters": {"resource_size_request": "X_SMALL"}}
    ).json()
    assert small["launch_parameters"]["resource_size_request"] == "X_SMALL"
    again = taken(alice, view["id"])
    assert row(again).size_bytes == 2 * (5 << 20)


def test_it_waits_for_one_in_progress(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    fake.slow_sends = 1
    snapshot_id = begun(alice, devbox_id).json()["id"]
    work()
    assert row(snapshot_id).status == "in_progress"
    copy = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id}).json()["id"]
    work()
    assert devbox_world.row(copy).status == "provisioning"
    sleep_over(snapshot_id)
    work()
    devbox_world.sleep_over(copy)
    work()
    assert devbox_world.row(copy).status == "running"


def test_one_that_failed_or_is_too_large_is_refused(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    snapshot_id = taken(alice, devbox_id)
    DiskSnapshot.objects.filter(pk=snapshot_id).update(size_bytes=4 << 30)
    answer = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id})
    assert answer.status_code == 400 and "4294967296 bytes" in answer.json()["message"]
    wanted = {"launch_parameters": {"resource_size_request": "MEDIUM"}}
    assert alice.post("/v1/devboxes", {"snapshot_id": snapshot_id, **wanted}).status_code == 200
    fake.boxes.pop(devbox_id)
    failed = begun(alice, devbox_id).json()["id"]
    waiting = alice.post("/v1/devboxes", {"snapshot_id": failed}).json()["id"]
    work()
    devbox_world.sleep_over(waiting)
    work()
    assert status(alice, failed)["status"] == "error"
    assert "devbox was gone" in status(alice, failed)["error_message"]
    assert alice.post("/v1/devboxes", {"snapshot_id": failed}).status_code == 400
    assert devbox_world.row(waiting).status == "failure" and "devbox was gone" in devbox_world.row(waiting).why


def test_a_host_without_it_receives_it_first(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    snapshot_id = taken(alice, devbox_id)
    second = make_host("second")
    second.script("*")
    second.slow_receives = 2
    Host.objects.filter(pk=fake.host_id).update(cordoned=True)
    copy = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id}).json()["id"]
    for _ in range(3):
        work()
        devbox_world.sleep_over(copy)
    work()
    made = devbox_world.row(copy)
    assert made.status == "running" and made.host_id == second.host_id
    assert {held.host_id for held in DiskSnapshotHost.objects.all()} == {fake.host_id, second.host_id}
    # The next goes where it is already.
    Host.objects.filter(pk=fake.host_id).update(cordoned=False)
    DiskSnapshotHost.objects.filter(host_id=fake.host_id).delete()
    next_one = alice.post("/v1/devboxes", {"snapshot_id": snapshot_id}).json()["id"]
    work()
    assert devbox_world.row(next_one).host_id == second.host_id
    use_fake(second.host_id, None)


def test_hosts_delete_what_nobody_wants(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    kept, gone, unknown = taken(alice, devbox_id), taken(alice, devbox_id), new_id("snp")
    alice.post(f"{SNAPSHOTS}/{gone}/delete")
    work()
    fake.snapshots |= {gone: 1, unknown: 1}
    DiskSnapshotHost.objects.all().delete()
    reconcile.drop_superfluous(fake, fake.report())  # type: ignore[arg-type]
    assert set(fake.snapshots) == {kept}
    assert [held.snapshot_id for held in DiskSnapshotHost.objects.all()] == [kept]


def test_copies_make_room_and_come_back(alice: Party, devbox_id: str, fake: FakeHost) -> None:
    first, second = taken(alice, devbox_id), taken(alice, devbox_id)
    assert room.make_room() == 0 and set(fake.snapshots) == {first, second}
    Host.objects.filter(pk=fake.host_id).update(pool_free_mb=1024, disk_mb=1024 * 1024)
    waiting = alice.post("/v1/devboxes", {"snapshot_id": second}).json()["id"]  # not placed yet: it is kept for that
    assert room.make_room() == 1 and set(fake.snapshots) == {second}
    alice.post(f"/v1/devboxes/{waiting}/shutdown")
    assert room.make_room() == 1 and not fake.snapshots
    Host.objects.filter(pk=fake.host_id).update(pool_free_mb=1024 * 1024)
    copy = alice.post("/v1/devboxes", {"snapshot_id": first}).json()["id"]
    work()
    assert devbox_world.row(copy).status == "running" and set(fake.snapshots) == {first}
    deleted, received = fake.called("delete_snapshot")[0], fake.called("receive_snapshot")[-1]
    assert deleted["snapshot"] == received["snapshot"] == first and deleted["fence"] < received["fence"]


def test_a_cap_on_those_in_progress(alice: Party, devbox_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapshots.services.IN_PROGRESS_MAX", 2)
    assert [begun(alice, devbox_id).status_code for _ in range(3)] == [200, 200, 429]
    work()
    assert begun(alice, devbox_id).status_code == 200
