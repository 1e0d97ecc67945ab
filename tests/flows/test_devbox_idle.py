"""The idle clock: what puts it off, what it does, and what it never does."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from api.errors import Unavailable
from devboxes import selectors, services
from hosts import registry
from hosts.client import HostRefused
from tests.devbox_world import created_running, promised, row, sleep_over, statuses, work
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db

IDLE = 600


def idle(on_idle: str = "suspend", seconds: int = IDLE) -> dict[str, Any]:
    return {"lifecycle": {"after_idle": {"idle_time_seconds": seconds, "on_idle": on_idle}}}


def pass_by(fake: FakeHost, seconds: float) -> None:
    """So much time passes, by every clock; the database's stands still in a test, so all it knows is earlier."""
    fake.passed += seconds
    with connection.cursor() as cursor:
        for column in ("last_activity_at", "started_at", "end_at", "wake_at", "step_since"):
            cursor.execute(f"UPDATE devboxes_devbox SET {column} = {column} - make_interval(secs => %s)", [seconds])
        cursor.execute("UPDATE devboxes_devbox SET clock_offset = clock_offset - %s", [seconds])


def look(devbox_id: str) -> None:
    """It wakes, and once more for its last look if it comes to that."""
    for _ in range(2):
        sleep_over(devbox_id)
        work()


@pytest.mark.parametrize(("on_idle", "end"), [("suspend", "suspended"), ("shutdown", "shutdown")])
def test_what_is_not_used_goes(caller: Caller, fake: FakeHost, on_idle: str, end: str) -> None:
    devbox_id = created_running(caller, launch_parameters={**idle(on_idle), "keep_alive_time_seconds": 60})
    assert row(devbox_id).end_at is None, "instead of the keep-alive time"
    pass_by(fake, 300)
    look(devbox_id)
    assert row(devbox_id).status == "running"
    pass_by(fake, 300)
    sleep_over(devbox_id)
    work()
    assert (row(devbox_id).step, row(devbox_id).status) == ("last_look", "running")
    look(devbox_id)
    devbox = row(devbox_id)
    assert devbox.status == end and devbox.why == "it was not used for 600 s"
    assert devbox.shutdown_reason == ("idle" if end == "shutdown" else None)
    assert devbox.cause == {"kind": "idle", "seconds": 600}
    assert statuses(devbox_id)[3:] == (["shutdown"] if end == "shutdown" else ["suspending", "suspended"])


def test_a_resumed_one_begins_anew(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    pass_by(fake, 600)
    look(devbox_id)
    assert row(devbox_id).status == "suspended"
    pass_by(fake, 5000)
    services.request_resume(devbox_id)
    work()
    look(devbox_id)
    assert row(devbox_id).status == "running" and promised(fake.host_id)[0] == 1000


@pytest.mark.parametrize("what", ["a command", "a terminal", "what other rooms run", "a keep-alive"])
def test_use_puts_it_off(caller: Caller, fake: FakeHost, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devbox_id = created_running(caller, launch_parameters=idle(), entrypoint="serve")
    pass_by(fake, 600)
    kind = "keep_alive"
    if what == "a command":
        fake.spawn(box=devbox_id, id="exe_00000000000000000000000000", fence=1, body={"command": "make"})
        kind = "command"
    elif what == "a terminal":
        fake.attached, kind = 1, "terminal"
    elif what == "what other rooms run":
        monkeypatch.setitem(registry._kinds, "tst", registry.HostedKind(doing=lambda _: "ssh"))
        kind = "ssh"
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "last_look"
    if what == "a keep-alive":
        services.keep_alive(devbox_id)
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.last_activity_kind) == ("running", "running", kind)
    assert statuses(devbox_id) == ["provisioning", "initializing", "running"]
    if what == "a command":
        # It ends 200 s later; at the next look that was 400 s ago by the host's own clock.
        pass_by(fake, 200)
        fake.finish("exe_00000000000000000000000000")
        fake.used_at = fake.monotonic()
        pass_by(fake, 400)
        look(devbox_id)
        assert row(devbox_id).status == "running"
        pass_by(fake, 199)
        look(devbox_id)
        assert row(devbox_id).status == "running"
        pass_by(fake, 1)
        look(devbox_id)
        assert row(devbox_id).status == "suspended"


def test_a_keep_alive_while_the_host_is_asked_is_not_overlooked(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    pass_by(fake, 600)

    def keep_alive(**_: Any) -> None:
        services.keep_alive(devbox_id)

    fake.hooks["activity"] = keep_alive
    look(devbox_id)
    assert row(devbox_id).status == "running"
    del fake.hooks["activity"]
    look(devbox_id)
    assert (row(devbox_id).step, row(devbox_id).last_activity_kind) == ("running", "keep_alive")


def test_the_door_is_closed_for_the_last_look(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    context = services.use_running(caller, devbox_id, "files", "file")
    pass_by(fake, 600)
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).step == "last_look" and context.status == "running"
    with pytest.raises(Unavailable) as refused:
        services.use_running(caller, devbox_id, "files", "file")
    assert refused.value.headers["retry-after"] == "2"
    assert selectors.view(selectors.access_devbox(caller, devbox_id))["status"] == "running"


@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_jump_of_the_wall_clock_ends_nothing(caller: Caller, fake: FakeHost, seconds: int) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    with connection.cursor() as cursor:  # what was noted was noted before the jump
        for column in ("last_activity_at", "started_at"):
            cursor.execute(f"UPDATE devboxes_devbox SET {column} = {column} - make_interval(secs => %s)", [seconds])
    look(devbox_id)
    assert row(devbox_id).status == "running" and row(devbox_id).step == "running"
    pass_by(fake, 599)
    look(devbox_id)
    assert row(devbox_id).status == "running"
    if seconds < 0:  # it has begun anew before the jump could be measured
        pass_by(fake, 2)
        look(devbox_id)
        assert row(devbox_id).status == "running"
        pass_by(fake, 598)
        look(devbox_id)
    pass_by(fake, 2)
    look(devbox_id)
    assert row(devbox_id).status == "suspended", "and once it begins anew it is as exact as before"


def test_a_host_that_cannot_be_asked_is_asked_again_with_the_door_open(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    pass_by(fake, 600)
    fake.unreachable = True
    look(devbox_id)
    assert (row(devbox_id).status, row(devbox_id).step) == ("running", "last_look")
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET deadline_at = now() - interval '1 s'")
    sleep_over(devbox_id)
    work()
    assert (row(devbox_id).status, row(devbox_id).step) == ("running", "running")
    fake.unreachable = False
    fake.fail("activity", HostRefused("unknown_verb", "an earlier release", host_id=fake.host_id))
    look(devbox_id)
    assert row(devbox_id).status == "suspended"


def test_a_box_that_ends_at_the_last_look_is_a_failure(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, launch_parameters=idle())
    pass_by(fake, 600)
    sleep_over(devbox_id)
    work()
    fake.box_exit(devbox_id)
    fake.deliver()
    assert row(devbox_id).status == "failure"


def test_the_next_clock_is_told(caller: Caller, fake: FakeHost) -> None:
    def clock(devbox_id: str) -> Any:
        return selectors.view(selectors.access_devbox(caller, devbox_id))["next_clock"]

    sleepy, plain = created_running(caller, launch_parameters=idle()), created_running(caller)
    told = clock(sleepy)
    assert (told["clock"], told["action"], told["seconds"], told["since"]) == ("after_idle", "suspend", IDLE, "start")
    assert told["at_ms"] == told["since_ms"] + 1000 * IDLE
    services.touch(sleepy, "file")
    assert clock(sleepy)["since"] == "file"
    told = clock(plain)
    assert (told["clock"], told["action"], told["at_ms"]) == ("keep_alive", "shutdown", told["since_ms"] + 3_600_000)
    services.request_suspend(sleepy, why="asked")
    assert clock(sleepy) is None
