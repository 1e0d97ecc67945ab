"""The steps of a devbox: what each asks of its host, replayed after a lost settle, with hosts that fail."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from devboxes import launch, services, states
from devboxes.devbox_flow import DevboxRow, devbox_flow
from devboxes.schemas import DevboxCreateParameters
from flows.engine import registered
from flows.outcomes import Next, Outcome
from hosts import delivery, registry
from hosts.client import HostRefused, use_fake
from hosts.models import Host
from tests.devbox_world import lapse, logged, make_host, promised, row, sleep_over, statuses, work
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db


@pytest.fixture
def caller(db: None) -> Caller:
    from accounts.services import create_account

    return Caller(account_id=create_account("A").pk, key_id="key_x")


@pytest.fixture
def fake(db: None) -> Any:
    host = make_host()
    yield host
    use_fake(host.host_id, None)


def create(caller: Caller, **parameters: Any) -> str:
    checked = DevboxCreateParameters(data=parameters)
    checked.is_valid(raise_exception=True)
    return services.create_devbox(caller, checked.validated_data, raw_body=b"", request_id=None)


def created_running(caller: Caller, **parameters: Any) -> str:
    devbox_id = create(caller, **parameters)
    work()
    assert row(devbox_id).status == "running", row(devbox_id).why
    return devbox_id


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
    stale = _claim(devbox_id)
    assert stale.step == "boot"
    services.request_shutdown(devbox_id)
    work()
    assert row(devbox_id).step == "gone"
    devbox_flow.advance(stale)
    assert len(fake.called("boot")) == 2
    assert fake.boxes == {} and row(devbox_id).step == "gone" and row(devbox_id).error_code is None


def _claim(devbox_id: str) -> DevboxRow:
    sleep_over(devbox_id)
    claimed = devbox_flow.claim(devbox_id)
    assert claimed is not None
    return claimed


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
    _expire(devbox_id)
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
    _expire(devbox_id)
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


# --- launch work ---

EVERYTHING: dict[str, Any] = {
    "environment_variables": {"COLOUR": "blue"},
    "file_mounts": {"/etc/app.conf": "a=1\n", "notes.txt": "ü"},
    "mounts": [
        {"type": "file_mount", "target": "~/bin/run", "content": ""},
        {
            "type": "code_mount",
            "repo_owner": "acme",
            "repo_name": "site",
            "git_ref": "main",
            "token": "t0ps3cret",
            "install_command": "npm ci",
        },
    ],
    "entrypoint": "exec ./serve",
    "launch_parameters": {
        "launch_commands": ["first", "second"],
        "user_parameters": {"username": "dev", "uid": 1234},
    },
}


def test_launch_work_runs_in_order(caller: Caller, fake: FakeHost) -> None:
    fake.script("*", exit=0, stdout=b"ok\n")
    devbox_id = created_running(caller, **EVERYTHING)
    spawned = fake.called("spawn")
    assert len(spawned) == row(devbox_id).launch_total == 9
    user = {"name": "dev", "uid": 1234, "gid": 1234, "home": "/home/dev"}
    bodies = [call["body"] for call in spawned]
    assert bodies[0]["user"]["uid"] == 0 and bodies[0]["argv"][-3:] == ["dev", "1234", "/home/dev"]
    files = [(body["argv"][-2:], base64.b64decode(body.get("input", ""))) for body in bodies[1:4]]
    assert files == [
        (["/etc/app.conf", "1234:1234"], b"a=1\n"),
        (["/home/dev/notes.txt", "1234:1234"], "ü".encode()),
        (["/home/dev/bin/run", "1234:1234"], b""),
    ]
    clone = bodies[4]
    assert clone["argv"][-3:] == ["https://github.com/acme/site.git", "/home/dev/site", "main"]
    assert clone["user"] == user and base64.b64decode(clone["input"]) == b"t0ps3cret\n"
    assert (bodies[5]["command"], bodies[5]["cwd"]) == ("npm ci", "/home/dev/site")
    assert [body["command"] for body in bodies[6:]] == ["first", "second", "exec ./serve"]
    for body in bodies[5:]:
        assert body["user"] == user and body["login"] is True
        assert body["env"]["COLOUR"] == "blue" and body["env"]["HOME"] == "/home/dev"
    assert len({call["id"] for call in spawned}) == 9
    assert statuses(devbox_id) == ["provisioning", "initializing", "running"]
    commands = [cmd for cmd, _, _ in logged(devbox_id) if cmd]
    assert commands == [
        "make user dev",
        "write /etc/app.conf",
        "write /home/dev/notes.txt",
        "write /home/dev/bin/run",
        "git clone https://github.com/acme/site.git at main",
        "npm ci",
        "first",
        "second",
        "exec ./serve",
    ]


def test_secrets_are_sealed_and_never_told(caller: Caller, fake: FakeHost) -> None:
    fake.script("*", exit=128, stderr=b"fatal: https://x:t0ps3cret@github.com/acme/site.git not found\n")
    devbox_id = create(caller, **{**EVERYTHING, "file_mounts": None, "mounts": EVERYTHING["mounts"][1:]})
    fake.script("*", exit=0)
    with connection.cursor() as cursor:
        cursor.execute("SELECT d::text FROM devboxes_devbox d WHERE id = %s", [devbox_id])
        text = cursor.fetchone()[0]
    assert "t0ps3cret" not in text and "blue" not in text
    fake._scripts.clear()
    work()  # makes the user, which runs on
    first = fake.called("spawn")[0]["id"]
    fake.finish(first)
    fake.deliver()
    work()
    clone = fake.called("spawn")[-1]
    assert all("t0ps3cret" not in part for part in [*clone["body"]["argv"], *clone["body"]["env"].values()])
    fake.finish(clone["id"], exit=128, stderr=b"fatal: https://x:t0ps3cret@github.com/ not found\n")
    fake.deliver()
    work()
    devbox = row(devbox_id)
    assert devbox.failure_reason == "execution_failed"
    assert devbox.why.endswith("fatal: https://x:***@github.com/ not found") and "ended with 128" in devbox.why
    assert "t0ps3cret" not in str(logged(devbox_id))


def test_a_long_launch_command_holds_no_thread(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["slow", "slower"]})
    work()
    assert (row(devbox_id).step, row(devbox_id).status, row(devbox_id).lease) == ("launch", "initializing", None)
    first, second = (launch.work_id(devbox_id, index) for index in (0, 1))
    fake.finish(first, exit=0, stdout=b"line 1\nline 2\n")
    assert fake.deliver() == [], "the flow has not taken it in yet"
    work()
    assert row(devbox_id).launch_index == 1
    assert fake.deliver() == [(devbox_id, first)]
    fake.finish(second, exit=0, stderr=b"warned\n")
    fake.deliver()
    work()
    assert row(devbox_id).status == "running"
    assert logged(devbox_id) == [
        ("slow", None, None),
        (None, "line 1", None),
        (None, "line 2", None),
        (None, None, 0),
        ("slower", None, None),
        (None, "warned", None),
        (None, None, 0),
    ]


def test_an_exit_that_nobody_reported_is_found(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["slow"]})
    work()
    fake.finish(launch.work_id(devbox_id, 0))
    fake.unacked.clear()
    sleep_over(devbox_id)
    work()
    assert row(devbox_id).status == "running"


@pytest.mark.parametrize(
    ("exit", "stderr", "reason", "failure", "words"),
    [
        (1, b"npm ERR! missing\n", None, "execution_failed", "ended with 1:\nnpm ERR! missing"),
        (137, b"", {"kind": "oom"}, "out_of_memory", "memory was used up"),
        (1, b"cp: write error: No space left on device\n", None, "out_of_disk", "because the disk is full"),
        (-1, b"", {"kind": "lost", "detail": "its keeper died"}, "health_check_failed", "was lost: its keeper died"),
        (2, b"\xff\x00bad", None, "execution_failed", "\ufffd\ufffdbad"),
    ],
)
def test_a_failing_launch_command_fails_the_devbox(
    caller: Caller, fake: FakeHost, exit: int, stderr: bytes, reason: Any, failure: str, words: str
) -> None:
    fake.script("break", exit=exit, stderr=stderr, reason=reason)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["break", "never"]})
    work()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.step, devbox.failure_reason) == ("failure", "failed", failure)
    assert devbox.why.startswith("launch work 1 of 2 (break) ") and words in devbox.why
    assert [call["body"]["command"] for call in fake.called("spawn")] == ["break"]
    assert (None, None, exit) in logged(devbox_id)
    assert fake.boxes == {} and promised(fake.host_id) == (0, 0, 0)
    assert statuses(devbox_id) == ["provisioning", "initializing", "failure"]


def test_long_output_of_launch_work_is_read_from_the_host(caller: Caller, fake: FakeHost) -> None:
    output = b"".join(b"line %d\n" % n for n in range(20_000))
    fake.script("loud", exit=3, stdout=output)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["loud"]})
    work()
    assert row(devbox_id).why.endswith("line 19998\nline 19999")
    messages = [message for _, message, _ in logged(devbox_id) if message]
    assert len(messages) == 50 and messages[-1] == "line 19999"


def test_launch_work_that_takes_too_long_names_its_clock(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["sleep infinity"]})
    work()
    _expire(devbox_id)
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert devbox.failure_reason == "execution_failed" and "took longer than 3600 s" in devbox.why


# --- ends ---


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
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.status, devbox.shutdown_reason) == ("gone", "shutdown", "keep_alive_timeout")
    assert fake.boxes == {}


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
    ending = created_over(caller, fake)
    gone = created_over(caller, fake)
    work()
    services.request_shutdown(ending)
    expected = {box.box: (box.up, box.settled) for box in kind.expected_on_host(fake.host_id)}  # type: ignore[union-attr]
    assert expected == {running: (True, True), launching: (True, True), booting: (False, False)}
    assert gone not in expected and kind.expected_on_host("hst_other") == []


def created_over(caller: Caller, fake: FakeHost) -> str:
    devbox_id = create(caller)
    services.request_shutdown(devbox_id)
    work()
    return devbox_id


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
        devbox_flow.settle(_claim(devbox_id), Next(states.LAUNCH))


def _expire(devbox_id: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE devboxes_devbox SET deadline_at = now() - interval '1 s', wake_at = now() WHERE id = %s",
            [devbox_id],
        )
