"""The watcher with a stand-in host: exits reach their owners and are acknowledged after; leases, silence, reconcile."""

from __future__ import annotations

import dataclasses
import datetime
import threading
import time

import pytest
from django.db import connection
from django.utils import timezone

from api.ids import new_id
from hosts import registry, shipping
from hosts.client import use_fake
from hosts.models import Host, WatcherReplica
from hosts.policy import policy
from hosts.registry import BoxExitEvent, ExitEvent, ExpectedBox, ExpectedExecution, HostedKind
from hosts.watcher import HostWatch, Watcher
from tests.fake_host import FakeHost
from tests.flows.test_host_placement import host as host_row

pytestmark = pytest.mark.django_db(transaction=True)


FENCE = 2**60
"""What the owner of a command that is over says to stop it by."""


class Owner:
    """Who answers for `dbx_` and `exe_` here: remembers what it is told and does as it is told."""

    def __init__(self) -> None:
        self.exits: list[ExitEvent] = []
        self.box_exits: list[BoxExitEvent] = []
        self.rows: list[ExpectedBox | ExpectedExecution] = []
        self.takes = True
        self.broken = 0
        self.is_over: set[str] = set()
        self.heard: list[str] = []

    def on_exits(self, events):
        if self.broken:
            self.broken -= 1
            raise RuntimeError("the commit failed")
        self.exits += events
        return [event.id for event in events] if self.takes else []

    def on_box_exits(self, events):
        self.box_exits += events
        return [event.box for event in events]

    def kinds(self) -> dict[str, HostedKind]:
        return {
            "dbx": HostedKind(on_box_exits=self.on_box_exits, expected_on_host=lambda _: list(self.rows)),
            "exe": HostedKind(
                on_exits=self.on_exits,
                over=lambda ids: {id: FENCE for id in ids if id in self.is_over},
                on_heard=self.heard.append,
            ),
        }


@pytest.fixture
def owner(monkeypatch):
    owner = Owner()
    monkeypatch.setattr(registry, "_kinds", owner.kinds())
    return owner


@pytest.fixture
def fake():
    row = host_row(seen_at=timezone.now() - datetime.timedelta(seconds=60))
    fake = FakeHost(row.pk)
    fake.digest = shipping.bundle().digest
    use_fake(row.pk, fake)
    yield fake
    use_fake(row.pk, None)


@pytest.fixture
def watcher():
    """Started on demand, stopped at the end."""
    running: list[tuple[Watcher, threading.Event, threading.Thread]] = []

    def start() -> Watcher:
        watcher, stop = Watcher(), threading.Event()

        def run() -> None:
            try:
                watcher.run(stop)
            finally:
                connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        running.append((watcher, stop, thread))
        return watcher

    start.running = running
    yield start
    for _, stop, thread in running:
        stop.set()
        thread.join(15)


def eventually(check, seconds=8.0):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come to be in time"
        time.sleep(0.02)


def box_on(fake, command="sleep 1000"):
    box, exe = new_id("dbx"), new_id("exe")
    fake.prepare_disk(box=box, fence=1, image="base", disk_bytes=1)
    fake.boot(box=box, fence=1, cpu_millis=1, memory_bytes=1, pids=1, disk_bytes=1, hostname="h")
    fake.spawn(box=box, id=exe, fence=1, body={"command": command})
    return box, exe


def test_an_exit_is_committed_then_acknowledged(fake, owner, watcher):
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1), ExpectedExecution(exe, box, 1)]
    watcher()
    eventually(lambda: Host.objects.get().seen_at > timezone.now() - datetime.timedelta(seconds=5))
    fake.finish(exe, exit=3, stdout=b"out")
    eventually(lambda: not fake.unacked)
    (event,) = owner.exits
    assert (event.id, event.box, event.exit, event.stdout, event.out_size) == (exe, box, 3, b"out", 3)


def test_exits_from_before_the_watcher_are_told(fake, owner, watcher):
    _, exe = box_on(fake)
    fake.finish(exe)
    watcher()
    eventually(lambda: [event.id for event in owner.exits] == [exe])


def test_a_failed_commit_is_not_acknowledged_and_told_again(fake, owner, watcher, monkeypatch):
    monkeypatch.setattr("hosts.watcher.REPORT_SECONDS", 0.2)
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1)]
    owner.broken = 1
    fake.finish(exe)
    watcher()
    eventually(lambda: owner.exits and not fake.unacked)


def test_an_exit_that_its_owner_holds_is_offered_again(fake, owner, watcher, monkeypatch):
    monkeypatch.setattr("hosts.watcher.REPORT_SECONDS", 0.2)
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1)]
    owner.takes = False
    fake.finish(exe)
    watcher()
    eventually(lambda: len(owner.exits) >= 2)
    assert fake.unacked
    owner.takes = True
    eventually(lambda: not fake.unacked)


def test_a_cut_channel_is_dialled_again(fake, owner, watcher):
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1)]
    watcher()
    eventually(lambda: fake.watching)
    fake.unreachable = True
    fake.watching[-1].close()
    time.sleep(0.2)
    fake.unreachable = False
    fake.finish(exe)
    eventually(lambda: [event.id for event in owner.exits] == [exe])


def test_a_channel_without_heartbeats_is_given_up(fake, owner, watcher, monkeypatch):
    monkeypatch.setattr("hosts.watcher.QUIET_SECONDS", 0.3)
    watcher()
    eventually(lambda: fake.watching)
    first = fake.watching[-1]
    first.mute = True
    eventually(lambda: fake.watching[-1] is not first and first.closed)


def test_the_end_of_a_box_is_told(fake, owner, watcher):
    box, _ = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1)]
    watcher()
    eventually(lambda: fake.watching)
    fake.box_exit(box, oom=True)
    eventually(lambda: owner.box_exits and not fake.unacked)
    assert owner.box_exits[0].box == box and owner.box_exits[0].oom


def test_a_host_that_was_restarted_has_lost_its_boxes(fake, owner, watcher):
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1), ExpectedExecution(exe, box, 1)]
    Host.objects.update(boot_id="boot-1")
    fake.reboot()
    fake.unacked.clear()  # it may know too little to tell
    watcher()
    eventually(lambda: owner.box_exits and owner.exits)
    assert owner.box_exits[0].lost == "its host was restarted" and owner.box_exits[0].rebooted
    assert owner.exits[0].exit == -1 and owner.exits[0].reason == {"kind": "lost", "detail": "its host was restarted"}
    assert Host.objects.get().boot_id == "boot-2"


def test_an_unknown_box_is_stopped_at_its_second_sight_and_its_disk_kept(fake, owner, watcher, monkeypatch):
    monkeypatch.setattr("hosts.watcher.REPORT_SECONDS", 0.2)
    box, _ = box_on(fake)
    watcher()
    eventually(lambda: box not in fake.boxes)
    assert len(fake.called("report")) >= 2 and box in fake.kept_disks


def test_nothing_of_another_cluster_is_touched(fake, owner, watcher, monkeypatch, settings):
    monkeypatch.setattr("hosts.watcher.REPORT_SECONDS", 0.2)
    settings.BERTH = dataclasses.replace(settings.BERTH, cluster="ours")
    fake.cluster = "theirs"
    box, _ = box_on(fake)
    watcher()
    eventually(lambda: len(fake.called("hello")) >= 2)
    assert not fake.called("report") and box in fake.boxes


def test_a_command_that_was_given_up_is_killed(fake, owner, watcher, monkeypatch):
    monkeypatch.setattr("hosts.watcher.REPORT_SECONDS", 0.2)
    box, exe = box_on(fake)
    other = new_id("exe")
    fake.spawn(box=box, id=other, fence=1, body={"command": "sleep 5"})
    owner.rows = [ExpectedBox(box, True, 1)]  # neither has a row that runs: one is over, one is being spawned
    owner.is_over = {exe}
    watcher()
    eventually(lambda: fake.boxes[box].executions[exe].state == "exited")
    assert [call["fence"] for call in fake.called("kill")] == [FENCE]
    time.sleep(0.5)
    assert fake.boxes[box].executions[other].state == "running"


def test_owners_are_told_on_each_connect_that_a_host_is_heard(fake, owner, watcher):
    fake.unreachable = True
    watcher()
    time.sleep(0.3)
    assert owner.heard == []
    fake.unreachable = False
    eventually(lambda: owner.heard == [fake.host_id])
    fake.watching[-1].close()
    eventually(lambda: owner.heard == [fake.host_id] * 2)


def test_silence_is_declared_after_we_tried_for_long_enough(fake, owner, watcher, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, LOST_AFTER=1.0)
    policy.cache_clear()
    box, exe = box_on(fake)
    owner.rows = [ExpectedBox(box, True, 1), ExpectedExecution(exe, box, 1)]
    fake.unreachable = True
    started_at = time.monotonic()
    watcher()
    eventually(lambda: owner.box_exits and owner.exits)
    assert time.monotonic() - started_at >= 1.0  # though the row was a minute old
    assert "silent" in owner.box_exits[0].lost and owner.exits[0].reason["kind"] == "lost"
    eventually(lambda: Host.objects.get().lost_at)
    time.sleep(1)
    assert len(owner.box_exits) == 1  # once per silence
    owner.rows = []
    fake.unreachable = False
    eventually(lambda: Host.objects.get().lost_at is None)
    policy.cache_clear()


def test_another_bundle_is_replaced(fake, owner, watcher, monkeypatch):
    fake.digest = "0" * 64
    watcher()
    eventually(lambda: fake.digest == shipping.bundle().digest)
    assert fake.shipped[shipping.bundle().digest] == shipping.bundle().data
    eventually(lambda: fake.called("report"))


def test_replicas_share_and_take_over(owner, watcher):
    fakes = []
    for number in range(4):
        row = host_row(f"h{number}")
        fakes.append(FakeHost(row.pk))
        fakes[-1].digest = shipping.bundle().digest
        use_fake(row.pk, fakes[-1])
    first = watcher()
    eventually(lambda: Host.objects.filter(watcher=first.me).count() == 4)
    second = watcher()
    eventually(lambda: Host.objects.filter(watcher=second.me).count() == 2, 15)
    assert Host.objects.filter(watcher=first.me).count() == 2 and WatcherReplica.objects.count() == 2
    _, stop, thread = watcher.running[0]
    stop.set()
    thread.join(15)
    eventually(lambda: Host.objects.filter(watcher=second.me).count() == 4, 15)
    for fake in fakes:
        use_fake(fake.host_id, None)


def test_a_watch_without_its_lease_writes_nothing(fake, owner):
    watch = HostWatch(fake.host_id, "somebody else")
    before = Host.objects.get().seen_at
    watch._note_seen()
    assert Host.objects.get().seen_at == before
