"""What follows a suspended devbox's disk to S3, and how it wakes on a host that has never had it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection

from api.callers import Caller
from devboxes import saves, selectors, services, suspending
from devboxes.saves import Save
from hosts import reconcile
from tests.devbox_world import created_running, expire, heard, promised, row, sleep_over, statuses, work
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db

WHOLE, DISK_ONLY, NOTHING = (1000, 2048, 4096), (0, 0, 4096), (0, 0, 0)


class Keeper:
    """A room that keeps disks, in memory."""

    def __init__(self) -> None:
        self.saves: dict[str, Save] = {}
        self.fetched: list[tuple[str, str]] = []
        self.slow = 0

    def begin(self, devbox_id: str, turn: int) -> str:
        save_id = f"snp_{devbox_id[4:24]}{turn}"
        self.saves.setdefault(save_id, Save(False, "", 0))
        return save_id

    def look(self, id: str) -> Save | None:
        return self.saves.get(id)

    def fetch(self, id: str, host_id: str) -> bool:
        assert self.saves[id].stored
        if self.slow:
            self.slow -= 1
            return False
        self.fetched.append((id, host_id))
        return True

    def drop(self, id: str) -> None:
        self.saves.pop(id, None)


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    made = Keeper()
    monkeypatch.setattr(saves, "_saves", [made])
    yield made


def asleep(devbox_id: str, seconds: float = 11) -> None:
    """It has slept for so long, and looks."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = step_since - make_interval(secs => %s)", [seconds])
    sleep_over(devbox_id)
    work()


def created_suspended(caller: Caller) -> str:
    devbox_id = created_running(caller)
    services.request_suspend(devbox_id, why="asked")
    work()
    assert row(devbox_id).status == "suspended"
    return devbox_id


def created_stored(caller: Caller, keeper: Keeper) -> str:
    devbox_id = created_suspended(caller)
    asleep(devbox_id)
    save_id = row(devbox_id).save_id
    keeper.saves[save_id] = Save(True, "", 100 << 20)
    asleep(devbox_id)
    assert row(devbox_id).stored_at is not None
    return devbox_id


def full(host_id: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET used_cpu_millis = cpu_millis * 100 WHERE id = %s", [host_id])


def open_for_placements(host_id: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = false WHERE id = %s", [host_id])


def test_a_disk_follows_to_s3_and_that_is_shown(caller: Caller, fake: FakeHost, keeper: Keeper) -> None:
    devbox_id = created_suspended(caller)
    sleep_over(devbox_id)
    work()
    assert keeper.saves == {}, "one that is resumed at once is not worth it"
    asleep(devbox_id)
    (save_id,) = keeper.saves
    assert row(devbox_id).save_id == save_id
    asleep(devbox_id)
    view = selectors.view(selectors.access_devbox(caller, devbox_id))
    assert view["disk_stored_time_ms"] is None
    keeper.saves[save_id] = Save(True, "", 5)
    asleep(devbox_id)
    view = selectors.view(selectors.access_devbox(caller, devbox_id))
    assert view["disk_stored_time_ms"] is not None and view["status"] == "suspended"
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "running" and row(devbox_id).host_id == fake.host_id
    assert keeper.fetched == [] and keeper.saves == {}, "its own host has it, and what was saved is old now"
    assert row(devbox_id).stored_at is None
    services.request_suspend(devbox_id, why="asked")
    work()
    asleep(devbox_id)
    assert list(keeper.saves) != [save_id], "another sleep, another save"


def test_a_save_that_failed_is_tried_again(caller: Caller, fake: FakeHost, keeper: Keeper) -> None:
    devbox_id = created_suspended(caller)
    asleep(devbox_id)
    (save_id,) = keeper.saves
    keeper.saves[save_id] = Save(False, "S3 is full", 0)
    asleep(devbox_id)
    assert keeper.saves == {} and row(devbox_id).save_id == "" and row(devbox_id).status == "suspended"
    asleep(devbox_id)
    assert list(keeper.saves) == [row(devbox_id).save_id]


def test_a_shutdown_takes_the_save_along(caller: Caller, fake: FakeHost, keeper: Keeper) -> None:
    devbox_id = created_stored(caller, keeper)
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and keeper.saves == {} and fake.asleep == {}


@pytest.mark.parametrize("why", ["full", "lost", "silent"])
def test_one_that_is_in_s3_wakes_on_another_host(
    caller: Caller, fake: FakeHost, other: FakeHost, keeper: Keeper, why: str
) -> None:
    devbox_id = created_stored(caller, keeper)
    save_id, machine = row(devbox_id).save_id, row(devbox_id).machine_id
    open_for_placements(other.host_id)
    before = promised(fake.host_id)
    if why == "full":
        full(fake.host_id)
        before = promised(fake.host_id)
    else:
        fake.unreachable = True
        with connection.cursor() as cursor:
            sql = "UPDATE hosts_host SET seen_at = now() - interval '1 h', lost_at = %s WHERE id = %s"
            cursor.execute(sql, ["now" if why == "lost" else None, fake.host_id])
    keeper.slow = 2
    services.request_resume(devbox_id)
    for _ in range(4):
        work()
        sleep_over(devbox_id)
    devbox = row(devbox_id)
    assert (devbox.status, devbox.host_id) == ("running", other.host_id), devbox.why
    assert keeper.fetched == [(save_id, other.host_id)] and keeper.saves == {}
    assert other.boxes[devbox_id].machine_id == machine
    assert promised(other.host_id) == WHOLE and promised(fake.host_id) == (before[0], before[1], before[2] - 4096)
    assert statuses(devbox_id)[3:] == ["suspending", "suspended", "provisioning", "initializing", "running"]
    # What the old host still has belongs to nobody: it is kept for a day.
    fake.unreachable = False
    heard(fake.host_id)
    seen: frozenset[str] = frozenset()
    for _ in range(2):
        plan = reconcile.plan(reconcile.expected_on(fake.host_id), fake.report(), seen)
        seen = plan.seen
        reconcile.apply(fake, plan)  # type: ignore[arg-type]
    assert fake.asleep == {} and fake.kept_disks == {devbox_id} and row(devbox_id).status == "running"


@pytest.mark.parametrize("verb", ["resume", "boot"])
def test_a_host_that_falls_silent_while_it_wakes_there_is_left(
    caller: Caller, fake: FakeHost, other: FakeHost, keeper: Keeper, verb: str
) -> None:
    devbox_id = created_stored(caller, keeper)
    open_for_placements(other.host_id)
    fake.fail(verb, times=99, after=verb == "resume")
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "provisioning" and promised(fake.host_id) == WHOLE
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET seen_at = now() - interval '60 s' WHERE id = %s", [fake.host_id])
    for _ in range(4):
        sleep_over(devbox_id)
        work()
    assert (row(devbox_id).status, row(devbox_id).host_id) == ("running", other.host_id)
    assert promised(fake.host_id) == NOTHING and promised(other.host_id) == WHOLE


def test_without_a_save_its_own_host_is_waited_for(
    caller: Caller, fake: FakeHost, other: FakeHost, keeper: Keeper
) -> None:
    devbox_id = created_suspended(caller)
    open_for_placements(other.host_id)
    full(fake.host_id)
    services.request_resume(devbox_id)
    work()
    assert (row(devbox_id).step, row(devbox_id).host_id) == ("readmit", fake.host_id)
    expire(devbox_id)
    work()
    assert row(devbox_id).status == "suspended" and promised(other.host_id) == NOTHING


def test_a_disk_that_its_host_has_lost_comes_from_s3(caller: Caller, fake: FakeHost, keeper: Keeper) -> None:
    devbox_id = created_stored(caller, keeper)
    save_id = row(devbox_id).save_id
    del fake.asleep[devbox_id]
    plan = reconcile.plan(reconcile.expected_on(fake.host_id), fake.report())
    reconcile.apply(fake, plan)  # type: ignore[arg-type]
    assert row(devbox_id).status == "suspended"
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "running" and keeper.fetched == [(save_id, fake.host_id)]
    assert suspending.SAVE_AFTER_SECONDS < 60
