"""The steps of a devbox: what each asks of its host, replayed after a lost settle, with hosts that fail."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from devboxes import services
from devboxes.devbox_flow import devbox_flow
from devboxes.flow_rows import DevboxRow
from flows.engine import registered
from flows.outcomes import Outcome
from hosts import registry
from hosts.client import HostRefused
from tests.devbox_world import (
    claim,
    create,
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


def test_the_flow_is_registered_for_the_sweep() -> None:
    assert registered()["devboxes"] is devbox_flow


def test_a_devbox_comes_up_and_goes(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller)
    assert (row(devbox_id).step, row(devbox_id).status) == ("place", "provisioning")
    work()
    box = fake.boxes[devbox_id]
    assert [name for name, _ in fake.calls] == ["prepare_disk", "boot"]
    assert box.limits == {
        "cpu_millis": 1000,
        "memory_bytes": 2 << 30,
        "pids": 4096,
        "disk_bytes": 4 << 30,
        "hostname": devbox_id.replace("_", "-"),
    }
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.host_id, devbox.slot) == ("running", "running", fake.host_id, box.slot)
    assert devbox.address and devbox.image_id == "base" and devbox.deadline_at is None
    assert statuses(devbox_id) == ["provisioning", "initializing", "running"]
    assert promised(fake.host_id) == (1000, 2048, 4096)
    fences = [arguments["fence"] for _, arguments in fake.calls]
    assert services.request_shutdown(devbox_id)
    assert row(devbox_id).status == "shutdown" and row(devbox_id).completed_at is None
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.shutdown_reason) == ("gone", "shutdown", "api_shutdown")
    assert devbox.completed_at is not None and devbox.wake_at is None
    assert devbox.ended_at is not None and devbox.ended_at <= devbox.completed_at
    assert devbox_id not in fake.boxes and devbox_id in fake.tombstones
    assert promised(fake.host_id) == (0, 0, 0)
    assert statuses(devbox_id) == ["provisioning", "initializing", "running", "shutdown"]
    fences.append(fake.called("destroy")[0]["fence"])
    assert fences == sorted(fences) and fences[-1] > fences[0]


def test_shutdown_may_be_asked_for_again(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    assert services.request_shutdown(devbox_id)
    ended = row(devbox_id).ended_at
    assert not services.request_shutdown(devbox_id)
    work()
    assert not services.request_shutdown(devbox_id)
    assert row(devbox_id).ended_at == ended
    assert statuses(devbox_id).count("shutdown") == 1


@pytest.mark.parametrize("verb", ["prepare_disk", "boot", "spawn"])
def test_shutdown_in_the_middle_of_a_step_wins(caller: Caller, fake: FakeHost, verb: str) -> None:
    """The worker's answer comes back too late, its settle is refused, and whatever it did is taken apart."""
    devbox_id = create(caller, launch_parameters={"launch_commands": ["make"]})

    def shut_down(**_: Any) -> None:
        services.request_shutdown(devbox_id)

    fake.hooks[verb] = shut_down
    work()
    assert (row(devbox_id).step, row(devbox_id).status) == ("gone", "shutdown")
    assert fake.boxes == {} and promised(fake.host_id) == (0, 0, 0)
    assert statuses(devbox_id)[-1] == "shutdown" and "running" not in statuses(devbox_id)


def test_a_late_boot_is_refused_after_the_teardown(caller: Caller, fake: FakeHost) -> None:
    """A worker that was stopped before its call goes on after the devbox is gone: the host refuses, nothing is made."""
    devbox_id = create(caller)
    fake.fail("boot")
    work()
    stale = claim(devbox_id)
    assert stale.step == "boot"
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone"
    devbox_flow.advance(stale)
    assert len(fake.called("boot")) == 2
    assert fake.boxes == {} and row(devbox_id).step == "gone" and row(devbox_id).error_code is None


def silent(host_id: str, seconds: float = 60) -> None:
    """Nobody has heard the host for so long."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE hosts_host SET seen_at = clock_timestamp() - make_interval(secs => %s) WHERE id = %s",
            [seconds, host_id],
        )


def stuck_in_boot(caller: Caller, fake: FakeHost) -> str:
    """A devbox whose host fell silent before it could be booted, and whose time for that is up."""
    fake.hooks["prepare_disk"] = lambda **_: setattr(fake, "unreachable", True)
    devbox_id = create(caller)
    work()
    assert row(devbox_id).step == "boot" and row(devbox_id).attempts
    silent(fake.host_id)
    expire(devbox_id)
    work()
    return devbox_id


def test_the_silence_of_its_host_does_not_count(caller: Caller, fake: FakeHost) -> None:
    devbox_id = stuck_in_boot(caller, fake)
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.failure_reason) == ("boot", "provisioning", None)
    assert devbox.deadline_at is not None and devbox.wake_at is not None and devbox.deadline_at > devbox.wake_at
    fake.unreachable = False
    heard(fake.host_id)
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running"


def test_a_host_that_is_declared_lost_fails_what_waits_for_it(caller: Caller, fake: FakeHost) -> None:
    devbox_id = stuck_in_boot(caller, fake)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET lost_at = now() WHERE id = %s", [fake.host_id])
    expire(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.failure_reason) == ("failure", "health_check_failed")
    assert devbox.why == "its host was lost while it was in boot"


def test_where_nobody_listens_to_hosts_the_wait_ends_all_the_same(caller: Caller, fake: FakeHost) -> None:
    devbox_id = stuck_in_boot(caller, fake)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = now() - interval '1020 s' WHERE id = %s", [devbox_id])
    expire(devbox_id)
    work()
    assert row(devbox_id).status == "failure" and "not heard for too long" in row(devbox_id).why


def test_a_host_that_is_heard_again_wakes_what_it_has_refused(caller: Caller, fake: FakeHost, other: FakeHost) -> None:
    ending, running = created_running(caller), created_running(caller)
    fake.unreachable = True
    services.request_shutdown(ending)
    for _ in range(6):
        sleep_over(ending)
        work()
    wakes = row(ending).wakes, row(running).wakes
    assert row(ending).attempts >= 6
    registry.heard(other.host_id)
    assert (row(ending).wakes, row(running).wakes) == wakes
    fake.unreachable = False
    registry.heard(fake.host_id)
    assert (row(ending).wakes, row(running).wakes) == (wakes[0] + 1, wakes[1]), "what waits for nothing sleeps on"
    work()
    assert row(ending).step == "gone"


@pytest.mark.parametrize("after", [False, True], ids=["before the effect", "the answer is lost"])
@pytest.mark.parametrize("verb", ["prepare_disk", "boot", "spawn", "destroy"])
def test_a_host_that_does_not_answer_is_asked_again(caller: Caller, fake: FakeHost, verb: str, after: bool) -> None:
    fake.script("make", exit=0)
    fake.fail(verb, times=2, after=after)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["make"]})
    for _ in range(3):
        work()
        sleep_over(devbox_id)
    assert row(devbox_id).status == "running"
    assert len(fake.boxes) == 1 and len(fake.boxes[devbox_id].executions) == 1
    services.request_shutdown(devbox_id)
    for _ in range(3):
        work()
        sleep_over(devbox_id)
    assert row(devbox_id).step == "gone" and fake.boxes == {}
    assert promised(fake.host_id) == (0, 0, 0)


@pytest.mark.parametrize("lost", ["place", "prepare_disk", "boot", "launch", "teardown"])
def test_every_step_may_run_twice(caller: Caller, fake: FakeHost, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker dies between the host's answer and its settle; another one runs the step again."""
    fake.script("make", exit=0)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["make"]})
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

    go()
    assert row(devbox_id).status == "running"
    assert len(fake.boxes) == 1 and len(fake.boxes[devbox_id].executions) == 1
    assert promised(fake.host_id) == (1000, 2048, 4096)
    services.request_shutdown(devbox_id)
    go()
    assert killed == [lost]
    assert row(devbox_id).step == "gone" and fake.boxes == {} and promised(fake.host_id) == (0, 0, 0)
    assert statuses(devbox_id) == ["provisioning", "initializing", "running", "shutdown"]
    assert [exit_code for _, _, exit_code in logged(devbox_id) if exit_code is not None] == [0]


def test_a_host_unreachable_for_too_long_fails_the_devbox(caller: Caller, fake: FakeHost) -> None:
    fake.unreachable = True
    devbox_id = create(caller)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.error_code, devbox.attempts) == ("prepare_disk", "HostUnreachable", 1)
    expire(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.failure_reason, devbox.step) == ("failure", "health_check_failed", "clean_up")
    assert "prepare_disk took longer than 120 s" in devbox.why
    fake.unreachable = False
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "failed" and promised(fake.host_id) == (0, 0, 0)


def test_a_lost_host_needs_no_destroying(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    fake.unreachable = True
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "teardown"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET lost_at = now() WHERE id = %s", [fake.host_id])
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and promised(fake.host_id) == (0, 0, 0)


def test_full_hosts_are_waited_for_and_then_not(caller: Caller, fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = true")
    devbox_id = create(caller)
    work()
    assert (row(devbox_id).status, row(devbox_id).step) == ("provisioning", "place")
    sleep_over(devbox_id)
    work()
    expire(devbox_id)
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.step, devbox.failure_reason) == ("failure", "failed", "health_check_failed")
    assert devbox.why == "no host had room for it within 300 s"
    assert fake.calls == []


def test_room_that_comes_in_time_is_taken(caller: Caller, fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = true")
    devbox_id = create(caller)
    work()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET cordoned = false")
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running"


def test_a_promise_that_somebody_else_got_is_not_made(
    caller: Caller, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    devbox_id = create(caller)
    from hosts import placement

    monkeypatch.setattr(placement, "reserve", lambda *_: False)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.reserved, devbox.error_code) == ("place", False, "refused")
    assert devbox.host_id is None
    assert fake.calls == []


@pytest.mark.parametrize(
    ("verb", "code", "reason"),
    [
        ("prepare_disk", "no_space", "out_of_disk"),
        ("boot", "no_space", "out_of_disk"),
        ("spawn", "no_space", "out_of_disk"),
        ("prepare_disk", "unknown_image", "health_check_failed"),
        ("boot", "unknown_box", "health_check_failed"),
        ("spawn", "unknown_box", "health_check_failed"),
    ],
)
def test_what_a_refusal_means(caller: Caller, fake: FakeHost, verb: str, code: str, reason: str) -> None:
    fake.fail(verb, HostRefused(code, "because", host_id=fake.host_id))
    devbox_id = create(caller, launch_parameters={"launch_commands": ["make"]})
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.step, devbox.failure_reason) == ("failure", "failed", reason)
    assert "because" in devbox.why
    assert promised(fake.host_id) == (0, 0, 0) and fake.boxes == {}
    transition = devbox.transitions.last()
    assert transition is not None and (transition.status, transition.failure_reason) == ("failure", reason)


def test_a_busy_host_is_asked_again(caller: Caller, fake: FakeHost) -> None:
    fake.fail("boot", HostRefused("busy", "later", host_id=fake.host_id))
    devbox_id = create(caller)
    work()
    assert row(devbox_id).step == "boot"
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running"


def test_a_host_that_has_served_a_newer_fence_is_asked_again_with_a_newer_one(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller)
    fake.hooks["prepare_disk"] = lambda *, box, fence, **_: fake.fences.update({box: fence + 1})
    work()
    assert (row(devbox_id).status, row(devbox_id).attempts) == ("running", 0), "no lease had to lapse"
    assert len(fake.called("boot")) == 2
