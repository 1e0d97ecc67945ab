"""Suspending and resuming: what the host is asked for, what is promised when, replays and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from api.errors import TooManyRequests
from devboxes import launch, services, states
from devboxes.devbox_flow import devbox_flow
from devboxes.flow_rows import DevboxRow
from flows.outcomes import Outcome
from hosts import reconcile, registry
from hosts.client import HostRefused
from hosts.reconcile import RESTARTED
from hosts.registry import BoxExitEvent
from tests.devbox_world import (
    claim,
    created_running,
    expire,
    heard,
    lapse,
    logged,
    promised,
    row,
    sleep_over,
    statuses,
    work,
)
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db

UP = ["provisioning", "initializing", "running"]
DOWN = ["suspending", "suspended"]
WHOLE, DISK_ONLY = (1000, 2048, 4096), (0, 0, 4096)


def suspend(devbox_id: str) -> None:
    assert services.request_suspend(devbox_id, why="it was asked to be suspended")
    assert row(devbox_id).status == "suspending"


def created_suspended(caller: Caller, **parameters: Any) -> str:
    devbox_id = created_running(caller, **parameters)
    suspend(devbox_id)
    work()
    assert (row(devbox_id).step, row(devbox_id).status) == ("suspended", "suspended"), row(devbox_id).why
    return devbox_id


def test_a_devbox_sleeps_and_wakes(caller: Caller, fake: FakeHost) -> None:
    fake.script("make", exit=0)
    fake.script("None", exit=0)  # the mount, which is no command
    devbox_id = created_running(
        caller,
        launch_parameters={"launch_commands": ["make"], "keep_alive_time_seconds": 60},
        file_mounts={"/etc/mark": "x"},
        entrypoint="serve",
    )
    machine, first = row(devbox_id).machine_id, set(fake.boxes[devbox_id].executions)
    assert machine and promised(fake.host_id) == WHOLE
    for turn in (1, 2):
        suspend(devbox_id)
        work()
        devbox = row(devbox_id)
        assert (devbox.step, devbox.status, devbox.seen, devbox.slot) == ("suspended", "suspended", "asleep", "")
        assert devbox.why == "it was asked to be suspended" and devbox.end_at is None and devbox.ended_at is None
        assert fake.boxes == {} and list(fake.asleep) == [devbox_id]
        assert promised(fake.host_id) == DISK_ONLY and devbox.reserved and not devbox.compute_reserved
        assert services.request_resume(devbox_id)
        assert row(devbox_id).status == "provisioning"
        work()
        devbox = row(devbox_id)
        assert (devbox.step, devbox.why, devbox.starts) == ("running", "", turn)
        assert devbox.end_at is not None and devbox.started_at is not None
        assert (devbox.end_at - devbox.started_at).total_seconds() == 60, "counted from each start"
        box = fake.boxes[devbox_id]
        assert box.machine_id == machine and devbox.slot == box.slot and fake.asleep == {}
        assert promised(fake.host_id) == WHOLE
        # Launch commands and entrypoint anew, mounts not.
        again = list(box.executions.values())
        assert [one.body["command"] for one in again] == ["make", "serve"]
        assert not first & {one.id for one in again}
        first |= {one.id for one in again}
    assert statuses(devbox_id) == [*UP, *DOWN, *UP, *DOWN, *UP]
    assert row(devbox_id).launch_total == 2
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and fake.boxes == {} and promised(fake.host_id) == (0, 0, 0)


@pytest.mark.parametrize("step", ["run_hooks", "quiet", "suspend", "readmit", "take_disk", "boot", "launch"])
def test_shutdown_at_every_step_leaves_nothing(
    caller: Caller, fake: FakeHost, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script("make", exit=0)
    devbox_id = created_running(caller, launch_parameters={"launch_commands": ["make"]})
    suspend(devbox_id)
    real = devbox_flow.settle

    def settle(claimed: DevboxRow, outcome: Outcome) -> None:
        if claimed.step == step and not row(devbox_id).ended_at:
            services.request_shutdown(devbox_id)
        real(claimed, outcome)

    monkeypatch.setattr(devbox_flow, "settle", settle)
    work()
    if not row(devbox_id).ended_at:
        services.request_resume(devbox_id)
        work()
    assert (row(devbox_id).step, row(devbox_id).shutdown_reason) == ("gone", "api_shutdown")
    assert fake.boxes == {} and fake.asleep == {} and promised(fake.host_id) == (0, 0, 0)
    assert statuses(devbox_id)[-1] == "shutdown"


def test_shutdown_of_one_that_sleeps_takes_its_disk(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_suspended(caller)
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and fake.asleep == {} and promised(fake.host_id) == (0, 0, 0)


@pytest.mark.parametrize("lost", ["run_hooks", "quiet", "suspend", "readmit", "take_disk", "boot", "launch"])
def test_every_step_may_run_twice(caller: Caller, fake: FakeHost, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker dies between the host's answer and its settle; another one runs the step again."""
    fake.script("make", exit=0)
    fake.script("flush", exit=0)
    hooks = {"lifecycle_hooks": {"suspend_commands": ["flush"]}}
    devbox_id = created_running(caller, launch_parameters={"launch_commands": ["make"], "lifecycle": hooks})
    killed: list[str] = []
    real = devbox_flow.settle

    def settle(claimed: DevboxRow, outcome: Outcome) -> None:
        if claimed.step == lost and not killed:
            killed.append(lost)
            raise SystemExit
        real(claimed, outcome)

    monkeypatch.setattr(devbox_flow, "settle", settle)

    def go() -> None:
        try:
            work()
        except SystemExit:
            lapse(devbox_id)
            work()

    suspend(devbox_id)
    go()
    assert row(devbox_id).status == "suspended" and promised(fake.host_id) == DISK_ONLY
    services.request_resume(devbox_id)
    go()
    assert killed == [lost]
    assert row(devbox_id).status == "running" and promised(fake.host_id) == WHOLE and row(devbox_id).starts == 1
    assert statuses(devbox_id) == [*UP, *DOWN, *UP]
    ran = [cmd for cmd, _, _ in logged(devbox_id) if cmd is not None]
    assert ran == ["make", "flush", "make"]


@pytest.mark.parametrize("after", [False, True], ids=["before the effect", "the answer is lost"])
@pytest.mark.parametrize("verb", ["suspend", "resume", "boot"])
def test_a_host_that_does_not_answer_is_asked_again(caller: Caller, fake: FakeHost, verb: str, after: bool) -> None:
    devbox_id = created_running(caller)
    fake.fail(verb, times=2, after=after)
    suspend(devbox_id)
    for _ in range(3):
        work()
        sleep_over(devbox_id)
    assert row(devbox_id).status == "suspended"
    services.request_resume(devbox_id)
    for _ in range(3):
        work()
        sleep_over(devbox_id)
    assert row(devbox_id).status == "running" and list(fake.boxes) == [devbox_id] and fake.asleep == {}


def test_a_disk_that_takes_long_to_write_is_waited_for(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    fake.slow_suspends = 2
    suspend(devbox_id)
    for _ in range(2):
        work()
        assert row(devbox_id).status == "suspending" and promised(fake.host_id) == WHOLE
        sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "suspended" and len(fake.called("suspend")) == 3


def test_late_verbs_of_an_earlier_life_are_refused(caller: Caller, fake: FakeHost) -> None:
    """A worker that was stopped before its `suspend` goes on after the devbox was resumed."""
    devbox_id = created_running(caller)
    fake.unreachable = True
    suspend(devbox_id)
    work()
    stale = claim(devbox_id)
    assert stale.step == "suspend"
    fake.unreachable = False
    lapse(devbox_id)
    sleep_over(devbox_id)
    work()
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "running"
    devbox_flow.advance(stale)
    assert row(devbox_id).status == "running" and list(fake.boxes) == [devbox_id]


# --- suspend commands ---


def hooked(caller: Caller, *commands: str, within_ms: int = 5000) -> str:
    hooks = {"lifecycle_hooks": {"suspend_commands": list(commands), "suspend_deadline_ms": within_ms}}
    return created_running(caller, launch_parameters={"lifecycle": hooks})


def test_suspend_commands_run_in_order_and_stop_nothing(caller: Caller, fake: FakeHost) -> None:
    fake.script("first", exit=3, stderr=b"no\n")
    devbox_id = hooked(caller, "first", "second")
    suspend(devbox_id)
    work()
    assert row(devbox_id).step == "run_hooks" and fake.called("suspend") == []
    spawned = [call["body"]["command"] for call in fake.called("spawn")]
    assert spawned == ["first", "second"]
    second = launch.suspend_work(devbox_id).work[1].id
    fake.finish(second, stdout=b"done\n")
    assert fake.deliver() == [], "they stay until the flow has moved on"
    work()
    assert row(devbox_id).status == "suspended"
    assert logged(devbox_id) == [
        ("first", None, None), (None, "no", None), (None, None, 3),
        ("second", None, None), (None, "done", None), (None, None, 0),
    ]  # fmt: skip


def test_suspend_commands_have_their_deadline(caller: Caller, fake: FakeHost) -> None:
    fake.script("first", exit=3)
    devbox_id = hooked(caller, "first", "forever", "never")
    suspend(devbox_id)
    work()
    assert row(devbox_id).step == "run_hooks"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = now() - interval '6 s'")
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "suspended"
    assert {call["body"]["command"] for call in fake.called("spawn")} == {"first", "forever"}
    assert ("forever", "it was stopped: suspend commands may take 5 s together", None) in logged(devbox_id)
    assert {(None, None, 3), (None, None, 137)} <= set(logged(devbox_id))


def test_a_box_that_cannot_run_them_is_suspended_all_the_same(caller: Caller, fake: FakeHost) -> None:
    devbox_id = hooked(caller, "flush")
    fake.fail("spawn", HostRefused("lost", "the box has ended", host_id=fake.host_id))
    suspend(devbox_id)
    work()
    assert row(devbox_id).status == "suspended"


# --- other rooms, ends on the way ---


def test_other_rooms_are_waited_for_a_minute_at_most(
    caller: Caller, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[tuple[str, str]] = []
    kind = registry.HostedKind(before_suspend=lambda _: False, after_suspend=lambda pk, why: closed.append((pk, why)))
    monkeypatch.setitem(registry._kinds, "tst", kind)
    devbox_id = created_running(caller)
    suspend(devbox_id)
    work()
    assert row(devbox_id).step == "quiet" and closed == []
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = now() - interval '61 s'")
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "suspended" and closed == [(devbox_id, "suspended")]


def test_ends_of_what_is_being_suspended_change_nothing(
    caller: Caller, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = [False]
    monkeypatch.setitem(registry._kinds, "tst", registry.HostedKind(before_suspend=lambda _: ready[0]))
    devbox_id = created_running(caller, entrypoint="serve")
    suspend(devbox_id)
    work()
    assert row(devbox_id).step == "quiet"
    fake.finish(launch.work_id(devbox_id, launch.ENTRYPOINT), exit=137)
    fake.box_exit(devbox_id)
    fake.deliver()
    assert row(devbox_id).status == "suspending" and fake.unacked == {}
    ready[0] = True
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "suspended"
    services.request_resume(devbox_id)
    work()
    fake.finish(launch.work_id(devbox_id, launch.ENTRYPOINT, 1), exit=4)
    fake.deliver()
    assert (row(devbox_id).shutdown_reason, row(devbox_id).why) == ("entrypoint_exit", "its entrypoint ended with 4")


# --- who may be asked for what, when ---


def test_only_a_running_one_is_suspended_and_only_a_sleeping_one_resumed(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    assert services.request_resume(devbox_id), "it runs"
    assert row(devbox_id).status == "running" and statuses(devbox_id) == UP
    suspend(devbox_id)
    assert not services.request_suspend(devbox_id, why="again")
    work()
    assert not services.request_suspend(devbox_id, why="again")
    services.request_shutdown(devbox_id)
    assert not services.request_suspend(devbox_id, why="again") and not services.request_resume(devbox_id)
    assert not services.request_resume("dbx_00000000000000000000000000")


def test_a_wish_to_run_that_comes_while_it_is_being_suspended_is_kept(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)

    def wish(**_: Any) -> None:
        services.request_resume(devbox_id)

    fake.hooks["suspend"] = wish
    suspend(devbox_id)
    work()
    assert row(devbox_id).status == "running"
    assert statuses(devbox_id) == [*UP, *DOWN, *UP]


def test_a_sleeping_one_does_not_count_as_running(caller: Caller, fake: FakeHost) -> None:
    from accounts.models import Account

    Account.objects.filter(pk=caller.account_id).update(max_running_devboxes=1)
    sleeping = created_suspended(caller)
    created_running(caller)
    with pytest.raises(TooManyRequests):
        services.request_resume(sleeping)
    assert row(sleeping).status == "suspended"


# --- room ---


def test_room_is_waited_for_and_then_it_sleeps_on(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_suspended(caller)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET used_memory_mb = memory_mb * 10")
    services.request_resume(devbox_id)
    work()
    assert (row(devbox_id).step, row(devbox_id).status) == ("readmit", "provisioning")
    expire(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.wants) == ("suspended", "suspended", "suspended")
    assert devbox.why == "it was not resumed: its host had no room for it for 300 s"
    assert list(fake.asleep) == [devbox_id], "nothing of it is lost"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET used_memory_mb = 0")
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "running" and row(devbox_id).why == ""


def test_a_host_that_takes_no_new_ones_wakes_its_own(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_suspended(caller)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = true, used_disk_mb = disk_mb * 10")
    services.request_resume(devbox_id)
    work()
    assert row(devbox_id).status == "running"


def test_a_silent_host_is_waited_for_and_a_lost_one_is_a_failure(caller: Caller, fake: FakeHost) -> None:
    waiting, lost = created_suspended(caller), created_suspended(caller)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET seen_at = now() - interval '60 s'")
    for devbox_id in (waiting, lost):
        services.request_resume(devbox_id)
    work()
    assert row(waiting).status == row(lost).status == "provisioning"
    heard(fake.host_id)
    sleep_over(waiting)
    work()
    assert row(waiting).status == "running"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step = 'readmit' WHERE id = %s", [lost])
        cursor.execute("UPDATE hosts_host SET lost_at = now()")
    services.request_shutdown(waiting)
    other = row(lost)
    if other.status == "provisioning":
        sleep_over(lost)
        work()
        assert (row(lost).status, row(lost).failure_reason) == ("failure", "health_check_failed")
        assert row(lost).why == "its host was lost, and its disk with it"


# --- what the host tells ---


def corrected(fake: FakeHost) -> None:
    """Two reports, compared with the rows."""
    before: frozenset[str] = frozenset()
    for _ in range(2):
        plan = reconcile.plan(reconcile.expected_on(fake.host_id), fake.report(), before)
        before = plan.seen
        reconcile.apply(fake, plan)  # type: ignore[arg-type]


def test_the_disk_of_one_that_sleeps_is_left_alone_and_a_strangers_is_kept_for_a_day(
    caller: Caller, fake: FakeHost
) -> None:
    mine, stranger = created_suspended(caller), created_suspended(caller)
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM devboxes_devboxtransition WHERE devbox_id = %s", [stranger])
        cursor.execute("DELETE FROM devboxes_devbox WHERE id = %s", [stranger])
    corrected(fake)
    assert list(fake.asleep) == [mine] and fake.kept_disks == {stranger}
    assert row(mine).status == "suspended"


def test_a_disk_that_its_host_has_no_more_is_a_failure(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_suspended(caller)
    del fake.asleep[devbox_id]
    corrected(fake)
    assert (row(devbox_id).status, row(devbox_id).failure_reason) == ("failure", "health_check_failed")
    assert row(devbox_id).why == "its box was lost: its host does not have its disk any more"
    work()
    assert row(devbox_id).step == "failed" and promised(fake.host_id) == (0, 0, 0)


@pytest.mark.parametrize("told", ["by an event", "by a report"])
def test_a_host_that_was_restarted_starts_its_devboxes_again(caller: Caller, fake: FakeHost, told: str) -> None:
    fake.script("make", exit=0)
    running = created_running(caller, launch_parameters={"launch_commands": ["make"]}, entrypoint="serve")
    sleeping = created_suspended(caller)
    fake.reboot()
    if told == "by an event":
        fake.deliver()
        fake.deliver()
    else:
        fake.unacked.clear()
        plan = reconcile.plan(reconcile.expected_on(fake.host_id), fake.report(), rebooted=True)
        reconcile.apply(fake, plan)  # type: ignore[arg-type]
        assert plan.lost_boxes == ((running, RESTARTED),)
    assert row(running).status == "provisioning"
    work()
    devbox = row(running)
    assert (devbox.status, devbox.starts) == ("running", 1)
    assert devbox.why == "its host was restarted, and it was started again on its disk"
    assert [one.body["command"] for one in fake.boxes[running].executions.values()] == ["make", "serve"]
    assert statuses(running) == [*UP, *UP] and row(sleeping).status == "suspended"
    assert promised(fake.host_id) == (1000, 2048, 2 * 4096)


def test_news_of_an_old_end_does_not_start_a_sleeping_one(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_suspended(caller)
    event = BoxExitEvent(fake.host_id, devbox_id, -1, False, 0, rebooted=True)
    kind = registry.kind_of(devbox_id)
    assert kind is not None and kind.on_box_exits([event]) == [devbox_id]
    assert row(devbox_id).status == "suspended"
    assert states.SUSPENDED not in states.UP
