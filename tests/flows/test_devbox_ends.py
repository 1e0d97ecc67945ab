"""How a devbox ends: entrypoint, keep-alive time, its box, and what goes on around its end."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from api.ids import new_id
from devboxes import launch, services, states
from devboxes.devbox_flow import devbox_flow
from devboxes.models import Devbox
from flows.outcomes import Next
from hosts import delivery, registry
from hosts.client import HostRefused, use_fake
from hosts.models import Host
from tests.devbox_world import (
    claim,
    create,
    created_over,
    created_running,
    logged,
    make_host,
    row,
    sleep_over,
    work,
)
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db


def test_the_entrypoint_s_end_is_the_devbox_s(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, entrypoint="serve")
    fake.finish(launch.work_id(devbox_id, launch.ENTRYPOINT), exit=3, stdout=b"bye\n")
    assert fake.deliver() == [(devbox_id, launch.work_id(devbox_id, launch.ENTRYPOINT))]
    assert (row(devbox_id).status, row(devbox_id).shutdown_reason) == ("shutdown", "entrypoint_exit")
    work()
    assert row(devbox_id).step == "gone" and fake.boxes == {}
    assert logged(devbox_id) == [("serve", None, None), (None, "bye", None), (None, None, 3)]
    assert row(devbox_id).why == "its entrypoint ended with 3"


def test_an_entrypoint_that_ends_before_the_flow_has_settled(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, entrypoint="true")
    fake.script("true", exit=0)

    def deliver(**_: Any) -> None:
        fake.deliver()

    fake.hooks["spawn"] = deliver
    work()
    assert (row(devbox_id).step, row(devbox_id).shutdown_reason) == ("gone", "entrypoint_exit")


def test_a_lost_entrypoint_is_a_failure(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, entrypoint="serve")
    reason = {"kind": "lost", "detail": "gone"}
    fake.finish(launch.work_id(devbox_id, launch.ENTRYPOINT), exit=-1, reason=reason)
    fake.deliver()
    assert (row(devbox_id).status, row(devbox_id).failure_reason) == ("failure", "health_check_failed")


def test_the_keep_alive_time_ends_the_devbox(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters={"keep_alive_time_seconds": 60})
    devbox = row(devbox_id)
    assert devbox.end_at is not None and devbox.started_at is not None and devbox.wake_at is not None
    assert (devbox.end_at - devbox.started_at).total_seconds() == 60
    assert abs((devbox.wake_at - devbox.end_at).total_seconds()) < 1
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running", "woken early, it sleeps on"
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET end_at = now() WHERE id = %s", [devbox_id])
    fake.passed += 60
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.shutdown_reason) == ("gone", "shutdown", "keep_alive_timeout")
    assert fake.boxes == {}


@pytest.mark.parametrize("commands", [[], ["make"]], ids=["at once", "after launch work"])
def test_a_jump_of_the_database_s_clock_ends_nothing(caller: Caller, fake: FakeHost, commands: list[str]) -> None:
    fake.script("make")
    fake.hooks["boot"] = lambda **_: setattr(fake, "passed", 500.0 if commands else 0.0)  # launch work takes its time
    asked = {"keep_alive_time_seconds": 60, "launch_commands": commands}
    devbox_id = created_running(caller, launch_parameters=asked)
    fake.passed += 40
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET end_at = end_at - interval '1 day' WHERE id = %s", [devbox_id])
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert devbox.status == "running" and devbox.end_at is not None and devbox.wake_at is not None
    assert abs((devbox.wake_at - devbox.end_at).total_seconds()) < 1
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT extract(epoch FROM end_at - now())::float FROM devboxes_devbox WHERE id = %s", [devbox_id]
        )
        assert 18 < cursor.fetchone()[0] < 21, "what its host says is left"
        cursor.execute("UPDATE devboxes_devbox SET end_at = now() WHERE id = %s", [devbox_id])
    fake.passed += 20
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).shutdown_reason == "keep_alive_timeout"


def test_a_devbox_is_not_ended_behind_the_back_of_a_host_that_cannot_be_asked(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters={"keep_alive_time_seconds": 60})
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET end_at = now() WHERE id = %s", [devbox_id])
    fake.unreachable = True
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running"


def test_an_entrypoint_that_its_host_does_not_know_is_lost(caller: Caller, fake: FakeHost) -> None:
    devbox_id, plain = created_running(caller, entrypoint="serve"), created_running(caller)
    kind = registry.kind_of("set_x")
    assert kind is not None
    (expected,) = kind.expected_on_host(fake.host_id)
    assert (expected.box, expected.id) == (devbox_id, launch.work_id(devbox_id, launch.ENTRYPOINT))  # type: ignore[union-attr]
    delivery.deliver_exits([delivery.lost_event(fake.host_id, devbox_id, expected.id, "its box does not know it")])  # type: ignore[union-attr]
    assert row(devbox_id).why == "its entrypoint was lost: its box does not know it"
    assert row(plain).status == "running" and list(kind.expected_on_host(fake.host_id)) == []


@pytest.mark.parametrize(("oom", "reason"), [(True, "out_of_memory"), (False, "health_check_failed")])
def test_a_box_that_ends_by_itself_is_a_failure(caller: Caller, fake: FakeHost, oom: bool, reason: str) -> None:
    devbox_id = created_running(caller)
    fake.box_exit(devbox_id, oom=oom)
    assert fake.deliver() == [(devbox_id, "box")]
    assert (row(devbox_id).status, row(devbox_id).failure_reason) == ("failure", reason)
    assert fake.deliver() == []
    work()
    assert row(devbox_id).step == "failed" and fake.boxes == {}
    assert fake.kept_disks == (set() if oom else {devbox_id})


def test_a_box_that_ends_on_its_way_down_changes_nothing(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    services.request_shutdown(devbox_id)
    fake.box_exit(devbox_id)
    assert fake.deliver() == [(devbox_id, "box")]
    assert (row(devbox_id).status, row(devbox_id).failure_reason) == ("shutdown", None)


def test_news_of_strangers_is_acknowledged(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller)
    fake.spawn(box=devbox_id, id="set_00000000000000000000000000", fence=2**60, body={"command": "x"})
    fake.finish("set_00000000000000000000000000")
    assert fake.deliver() == [(devbox_id, "set_00000000000000000000000000")]


def test_other_rooms_are_waited_for_before_the_box_goes(
    caller: Caller, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready, after = [False], list[tuple[str, str]]()
    kind = registry.HostedKind(
        before_destroy=lambda pk: ready[0], after_destroy=lambda pk, why: after.append((pk, why))
    )
    monkeypatch.setitem(registry._kinds, "tst", kind)
    devbox_id = created_running(caller)
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "teardown" and fake.called("destroy") == []
    ready[0] = True
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "gone" and after == [(devbox_id, "api_shutdown")]


def test_other_rooms_are_waited_for_a_minute_at_most(
    caller: Caller, fake: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._kinds, "tst", registry.HostedKind(before_destroy=lambda pk: False))
    devbox_id = created_running(caller)
    services.request_shutdown(devbox_id)
    work()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET step_since = now() - interval '61 s'")
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "gone"


def test_what_reconcile_expects(caller: Caller, fake: FakeHost) -> None:
    kind = registry.kind_of("dbx_x")
    assert kind is not None
    running, launching = created_running(caller), create(caller, launch_parameters={"launch_commands": ["x"]})
    work()
    fake.fail("boot", times=9)
    booting = create(caller)
    work()
    ending = created_over(caller)
    gone = created_over(caller)
    work()
    services.request_shutdown(ending)
    expected = {box.box: (box.up, box.settled) for box in kind.expected_on_host(fake.host_id)}  # type: ignore[union-attr]
    assert expected == {running: (True, True), launching: (True, True), booting: (False, False)}
    assert gone not in expected and kind.expected_on_host("hst_other") == []


def test_places_are_spread_and_the_arithmetic_holds(caller: Caller, fake: FakeHost) -> None:
    other = make_host("other")
    devboxes = [created_running(caller) for _ in range(4)]
    assert sorted(row(pk).host_id or "" for pk in devboxes) == sorted([fake.host_id, other.host_id] * 2)
    for pk in devboxes:
        services.request_shutdown(pk)
    work()
    assert Host.objects.filter(used_cpu_millis=0, used_memory_mb=0, used_disk_mb=0).count() == 2
    use_fake(other.host_id, None)


def test_a_move_that_is_not_in_the_table_is_refused(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller)
    with pytest.raises(RuntimeError, match="may not go from place to launch"):
        devbox_flow.settle(claim(devbox_id), Next(states.LAUNCH))


def test_what_another_host_tells_of_a_devbox_is_not_believed(
    caller: Caller, fake: FakeHost, other: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    serving = created_running(caller, entrypoint="serve")
    launching = create(caller, launch_parameters={"launch_commands": ["x"]})
    work()
    before = {pk: Devbox.objects.values().get(pk=pk) for pk in (serving, launching)}
    for devbox_id, what in ((serving, launch.ENTRYPOINT), (launching, 0)):
        piece = launch.work_id(devbox_id, what)
        other.prepare_disk(box=devbox_id, fence=2**60, image="base", disk_bytes=1)
        other.boot(box=devbox_id, fence=2**60, cpu_millis=1, memory_bytes=1, pids=1, disk_bytes=1, hostname="x")
        other.spawn(box=devbox_id, id=piece, fence=2**60, body={"command": "x"})
        other.finish(piece)
        other.box_exit(devbox_id)
    other.deliver()
    assert other.unacked == {}, "it has said it, and need not say it again"
    assert {pk: Devbox.objects.values().get(pk=pk) for pk in (serving, launching)} == before
    assert logged(serving) == [("serve", None, None)]
    told = [record.getMessage() for record in caplog.records if "not believed" in record.getMessage()]
    assert len(told) == 4 and all(other.host_id in line and fake.host_id in line for line in told), told


def test_what_the_entrypoint_and_background_processes_wrote_outlives_the_box(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, entrypoint="serve")
    work_id = launch.work_id(devbox_id, launch.ENTRYPOINT)
    entrypoint = fake.boxes[devbox_id].executions[work_id]
    entrypoint.stdout = b"".join(b"request %d\n" % n for n in range(10_000))
    left = new_id("exe")
    fake.spawn(box=devbox_id, id=left, fence=1, body={"command": "server &"})
    fake.finish(left, exit=0)
    fake.boxes[devbox_id].executions[left].late = [b"served\n", b""]
    services.request_shutdown(devbox_id)
    fake.fail("destroy")
    work()
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "gone"
    found = logged(devbox_id)
    assert found.count((None, "request 9999", None)) == 1 and found.count((None, "served", None)) == 1


def test_a_host_that_cannot_tell_what_was_written_holds_up_no_end(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, entrypoint="serve")
    services.request_shutdown(devbox_id)
    fake.fail("sizes", HostRefused("unknown_verb", "an earlier release"))
    fake.fail("state", HostRefused("unknown_id", "never heard of it"))
    work()
    assert row(devbox_id).step == "gone"
