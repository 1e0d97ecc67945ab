"""Launch work: what is asked of the host and in which order, how it fails, and what is never told."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from django.db import connection

from api.callers import Caller
from devboxes import launch
from devboxes.devbox_flow import devbox_flow
from tests.devbox_world import (
    create,
    created_running,
    expire,
    logged,
    promised,
    row,
    sleep_over,
    statuses,
    work,
)
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db


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


def test_an_exit_of_a_piece_that_the_row_does_not_name_yet_wakes_it(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["quick", "slow"]})
    fake.script("quick", exit=0)
    settle = devbox_flow.settle

    def late(row: Any, outcome: Any) -> None:
        # The second piece ends, and that is told, while its step is about to write down that it waits for it.
        if row.step == "launch" and fake.boxes[devbox_id].executions[second].state == "running":
            fake.finish(second, exit=0)
            assert (devbox_id, second) not in fake.deliver()
        settle(row, outcome)

    second = launch.work_id(devbox_id, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devbox_flow, "settle", late)
        work()
    assert row(devbox_id).status == "running"
    assert (devbox_id, second) in fake.deliver()


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
    assert messages[-1] == "line 19999" and sum(len(message) + 1 for message in messages) == 64 * 1024


def test_launch_work_that_takes_too_long_names_its_clock(caller: Caller, fake: FakeHost) -> None:
    devbox_id = create(caller, launch_parameters={"launch_commands": ["sleep infinity"]})
    work()
    expire(devbox_id)
    sleep_over(devbox_id)
    work()
    devbox = row(devbox_id)
    assert devbox.failure_reason == "execution_failed" and "took longer than 3600 s" in devbox.why


def test_secrets_whose_key_is_gone_fail_the_devbox(caller: Caller, fake: FakeHost, settings: Any) -> None:
    from accounts.sealing import new_seal_key

    devbox_id = create(caller, entrypoint="serve", environment_variables={"A": "b"})
    settings.SEAL_KEYS = [new_seal_key()]
    work()
    devbox = row(devbox_id)
    assert (devbox.step, devbox.failure_reason) == ("failed", "execution_failed")
    assert "BERTH_SEAL_KEYS" in devbox.why and fake.boxes == {}
