"""What is written down of a devbox's phases, launch work and end, as its steps and its host's events find it."""

import pytest

from api.callers import Caller
from devboxes import launch
from devboxes.why import CAUSES, explain
from tests.devbox_world import create, created_running, row, work
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db


def told(caller: Caller, devbox_id: str) -> tuple[dict, list[str]]:
    account = explain(caller, devbox_id)
    cause = account["cause"]
    assert cause is None or cause["kind"] in CAUSES
    return account, [phase["phase"] for phase in account["phases"]]


def test_the_phases_up_to_running(caller: Caller, fake: FakeHost) -> None:
    fake.script("make", exit=0)
    devbox_id = created_running(caller, launch_parameters={"launch_commands": ["make", "make"]}, entrypoint="serve")
    account, phases = told(caller, devbox_id)
    assert phases == ["queued", "placed", "disk_ready", "booted", "running"]
    assert [(item["title"], item["exit_status"]) for item in account["launch"]] == [
        ("make", 0),
        ("make", 0),
        ("serve", None),
    ]
    assert [item["duration_ms"] is not None for item in account["launch"]] == [True, True, False]
    assert account["launch_total"] == 3
    times = [phase["at_ms"] for phase in account["phases"]]
    assert times == sorted(times)


def test_an_entrypoint_s_end(caller: Caller, fake: FakeHost) -> None:
    devbox_id = created_running(caller, entrypoint="serve")
    fake.finish(launch.work_id(devbox_id, launch.ENTRYPOINT), exit=3, stdout=b"bye\n", stderr=b"one\ntwo\n")
    fake.deliver()
    work()
    account, phases = told(caller, devbox_id)
    assert phases == ["queued", "placed", "disk_ready", "booted", "running", "ended", "removed"]
    cause = account["cause"]
    assert (cause["kind"], cause["exit_status"], cause["output"]) == ("entrypoint_exit", 3, ["one", "two"])
    assert cause["message"] == "its entrypoint ended with 3" and cause["at_ms"]


def test_a_launch_command_that_is_killed_for_memory(caller: Caller, fake: FakeHost) -> None:
    reason = {"kind": "oom", "detail": "1 process", "kills": 1, "limit_bytes": 64, "peak_bytes": 64, "usage_bytes": 9}
    fake.script("eat", exit=137, stderr=b"Killed\n", reason=reason)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["eat"]})
    work()
    account, _ = told(caller, devbox_id)
    cause = account["cause"]
    assert row(devbox_id).failure_reason == "out_of_memory"
    assert (cause["kind"], cause["item"], cause["title"], cause["exit_status"]) == ("launch_failed", 0, "eat", 137)
    assert (cause["kills"], cause["limit_bytes"], cause["peak_bytes"], cause["output"]) == (1, 64, 64, ["Killed"])
    assert account["launch"][0]["exit_status"] == 137


def test_a_piece_of_launch_work_that_runs_is_shown(caller: Caller, fake: FakeHost) -> None:
    fake.script("quick", exit=0)
    devbox_id = create(caller, launch_parameters={"launch_commands": ["quick", "slow"]})
    work()
    account, phases = told(caller, devbox_id)
    assert phases == ["queued", "placed", "disk_ready", "booted"] and account["cause"] is None
    assert [(item["title"], item["exit_status"]) for item in account["launch"]] == [("quick", 0), ("slow", None)]
    fake.finish(launch.work_id(devbox_id, 1))
    fake.deliver()
    work()
    account, phases = told(caller, devbox_id)
    assert phases[-1] == "running"
    assert [item["exit_status"] for item in account["launch"]] == [0, 0]
