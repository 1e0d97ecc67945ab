"""Named shells in a real box: what survives, whose turn it is, and that nothing that ends a shell holds up its line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.site import Site

pytestmark = pytest.mark.live

SDK = """
import json, sys
from runloop_api_client import Runloop
client = Runloop(base_url=sys.argv[1], bearer_token=sys.argv[2])
box = sys.argv[3]
def run(command, shell):
    done = client.devboxes.execute_sync(box, command=command, shell_name=shell)
    return [done.stdout, done.exit_status, done.shell_name]
told = [run("cd /usr; export A=1; f() { echo f$A; }; alias g=f; set -o pipefail", "sdk"), run("pwd; f\\ng", "sdk"),
        run("pwd; echo $A", "other"), run("false | true", "sdk")]
first = client.devboxes.execute_async(box, command="sleep 1; echo first", shell_name="sdk")
second = client.devboxes.execute_async(box, command="echo second", shell_name="sdk")
told.append([client.devboxes.executions.retrieve(second.execution_id, devbox_id=box).status, second.shell_name])
told.append(run("echo at once", "other"))
told.append(client.devboxes.executions.retrieve(first.execution_id, devbox_id=box).status)
done = client.devboxes.executions.await_completed(second.execution_id, devbox_id=box)
told.append([done.status, done.stdout])
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def shared(berth):
    """One devbox for the whole file."""
    box = berth.owner.create(name="shells", launch_parameters={"resource_size_request": "X_SMALL"})
    yield box
    berth.owner.shutdown(box)


class Shell:
    def __init__(self, owner: Any, box: str, name: str) -> None:
        self.owner, self.box, self.name = owner, box, name

    def __call__(self, command: str) -> tuple[str, int]:
        body = {"command": command, "shell_name": self.name}
        done = self.owner.post(f"/v1/devboxes/{self.box}/execute_sync", body)
        return done["stdout"], done["exit_status"]

    def start(self, command: str, **more: Any) -> str:
        body = {"command": command, "shell_name": self.name, **more}
        path = f"/v1/devboxes/{self.box}/executions"
        return f"{path}/{self.owner.post(f'/v1/devboxes/{self.box}/execute_async', body)['execution_id']}"

    def end(self, path: str) -> dict[str, Any]:
        done = self.owner.post(f"{path}/wait_for_status", {"statuses": ["completed"], "timeout_seconds": 25})
        return dict(done)

    def said(self) -> list[str]:
        """What the devbox's log tells of the shell itself."""
        entries = self.owner.get(f"/v1/devboxes/{self.box}/logs?shell_name={self.name}")["logs"]
        return [entry["message"] for entry in entries if (entry.get("message") or "").startswith(f"shell {self.name} ")]


@pytest.fixture
def shell(berth, shared, request) -> Shell:
    return Shell(berth.owner, shared, request.node.name[5:40])


def test_the_published_sdk_keeps_a_shell_and_sees_its_line(berth, shared, python_sdk) -> None:
    argv = [str(python_sdk("1.29.0")), "-c", SDK, berth.base_url, berth.owner.secret, shared]
    quiet = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=quiet)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["", 0, "sdk"],
        ["/usr\nf1\nf1\n", 0, "sdk"],
        ["/home/user\n\n", 0, "other"],
        ["", 1, "sdk"],
        ["queued", "sdk"],
        ["at once\n", 0, "other"],
        "running",
        ["completed", "second\n"],
    ]


@pytest.mark.parametrize(
    ("command", "status", "note"),
    [
        ("exit 3", 3, "exited with status 3"),
        ("kill -9 $$", 137, "was killed by signal 9"),
        ("exec sh -c 'exit 7'", 7, "exited with status 7"),
        ("set -n", 137, "carried out nothing any more"),
        ("sudo kill -9 $$; sleep 9", 137, "was killed by signal 9"),
    ],
)
def test_what_ends_a_shell(berth, shared, command: str, status: int, note: str) -> None:
    shell = Shell(berth.owner, shared, f"ends-{status}-{len(command)}")
    assert shell("x=1; cd /usr") == ("", 0)
    ending, after = shell.start(command), shell.start("pwd; echo $x")
    assert shell.end(ending)["exit_status"] == status
    assert shell.end(after)["stdout"] == "/home/user\n\n"
    (said,) = shell.said()
    assert note in said and "fresh one" in said


def test_memory_exhaustion_holds_nothing_up(shell: Shell) -> None:
    eater, after = shell.start("x=a; while :; do x=$x$x$x$x; done"), shell.start("echo after")
    assert shell.end(eater)["exit_status"] in (2, 137)
    assert shell.end(after)["stdout"] == "after\n"


def test_the_line_goes_on_when_one_of_it_is_killed(shell: Shell) -> None:
    paths = [shell.start(f"sleep {seconds}; echo {seconds}") for seconds in ("60", "61", "0")]
    for path in paths[1::-1]:
        shell.owner.post(f"{path}/kill", {"kill_process_group": True})
    assert [shell.end(path)["exit_status"] for path in paths] == [137, 137, 0]
    assert len(shell.said()) == 1, "the one that was queued ended no shell"


def test_input_reaches_a_command_and_an_interrupt_spares_the_shell(shell: Shell) -> None:
    assert shell("x=kept") == ("", 0)
    reader = shell.start("read line; echo heard $line; cat; echo end", attach_stdin=True)
    for body in ({"text": "this\n"}, {"text": "and that\n"}, {"signal": "EOF"}):
        assert shell.owner.post(f"{reader}/send_std_in", body)["success"], body
    assert shell.end(reader)["stdout"] == "heard this\nand that\nend\n"
    sleeper = shell.start("sleep 60; echo no")
    shell.owner.post(f"{sleeper}/wait_for_status", {"statuses": ["running", "completed"]})
    assert shell.owner.post(f"{sleeper}/send_std_in", {"signal": "INTERRUPT"})["success"]
    assert shell.end(sleeper)["exit_status"] == 130
    assert shell("echo $? $x") == ("130 kept\n", 0)
    assert shell.said() == []


def test_everything_is_killed_in_the_middle(berth, shell: Shell) -> None:
    site = Site(berth.up, berth.base_url, berth.owner.secret)
    assert shell("x=kept; cd /usr") == ("", 0)
    running = shell.start("for i in $(seq 80); do echo $i; sleep 0.05; done; (exit 9)")
    queued = shell.start("echo $? $x; pwd")
    slot = berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", shell.box)[0][0]
    for _ in range(2):
        _kill(lambda: site.keepers().get(slot))
        _kill(site.hostd)
        _kill(lambda: berth.pids().get("worker"))
        _kill(lambda: berth.pids().get("watcher"))
    ended = _patiently(shell, running)
    assert (ended["exit_status"], ended["stdout"]) == (9, "".join(f"{n}\n" for n in range(1, 81)))
    assert _patiently(shell, queued)["stdout"] == "9 kept\n/usr\n"


def _kill(find: Callable[[], int | None]) -> None:
    """kill -9, once there is one (again)."""
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(ProcessLookupError):
            if pid := find():
                os.kill(pid, signal.SIGKILL)
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _patiently(shell: Shell, path: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (view := shell.owner.get(path))["status"] != "completed":
        assert time.monotonic() < deadline, view
        time.sleep(0.1)
    return dict(view)


def test_nothing_of_a_shell_is_left_on_the_host(berth, shared) -> None:
    assert not list(Path("/dev/shm").glob(".shell-*"))
