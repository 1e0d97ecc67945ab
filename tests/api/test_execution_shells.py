"""Named shells through HTTP: the line is visible, ids mean one command in one shell, caps, who may."""

import dataclasses

import pytest

from executions.models import Execution
from tests.execution_world import World, make_devbox


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def start(world, party, command="sleep 1000", shell="main", **body):
    answer = party.post(f"{world.url}/execute_async", {"command": command, "shell_name": shell, **body})
    assert answer.status_code == 200, answer.text
    world.work()
    return answer.json()


def test_later_commands_are_queued_and_seen_so(world, alice):
    first = start(world, alice)
    second = start(world, alice)
    assert (second["status"], second["shell_name"]) == ("queued", "main")
    url = world.execution_url(second["execution_id"])
    assert alice.get(url).json()["status"] == "queued"
    assert alice.get(world.execution_url(first["execution_id"])).json()["status"] == "running"
    answer = alice.post(f"{url}/wait_for_status", {"statuses": ["running"], "timeout_seconds": 0})
    assert answer.status_code == 408
    world.fake.finish(first["execution_id"])
    world.work()
    world.work()
    assert alice.get(url).json()["status"] == "running"


def test_execute_and_execute_sync_take_a_shell(world, alice):
    world.fake.script("pwd", stdout=b"/usr\n")
    with world.working():
        answer = alice.post(f"{world.url}/execute_sync", {"command": "pwd", "shell_name": "main"}).json()
        assert (answer["stdout"], answer["shell_name"]) == ("/usr\n", "main")
        body = {"command": "pwd", "shell_name": "ünï code", "command_id": "a"}
        answer = alice.post(f"{world.url}/execute", body).json()
        assert (answer["stdout"], answer["shell_name"]) == ("/usr\n", "ünï code")


def test_a_queued_command_is_killed_without_running(world, alice):
    start(world, alice)
    queued = start(world, alice)["execution_id"]
    with world.working():
        answer = alice.post(f"{world.execution_url(queued)}/kill").json()
    assert (answer["status"], answer["exit_status"]) == ("completed", 137)
    assert len(world.fake.called("spawn")) == 1


def test_an_id_stands_for_one_command_in_one_shell(world, alice):
    body = {"command": "sleep 9", "command_id": "one", "shell_name": "main", "optimistic_timeout": 0}
    first = alice.post(f"{world.url}/execute", body).json()["execution_id"]
    assert alice.post(f"{world.url}/execute", body).json()["execution_id"] == first
    for other in ("other", None):
        answer = alice.post(f"{world.url}/execute", {**body, "shell_name": other})
        assert answer.status_code == 400 and "command_id" in answer.json()["message"]
    assert Execution.objects.count() == 1


def test_as_many_shells_as_a_devbox_may_have(world, alice, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, CAP_SHELLS=2)
    start(world, alice, shell="a")
    start(world, alice, shell="b")
    answer = alice.post(f"{world.url}/execute_async", {"command": "true", "shell_name": "c"})
    assert answer.status_code == 400 and "2 named shells" in answer.json()["message"]
    assert start(world, alice, shell="a")["status"] == "queued"
    assert alice.post(f"{world.url}/execute_async", {"command": "true"}).status_code == 200
    other = make_devbox(alice.account_id, world.fake)
    answer = alice.post(f"/v1/devboxes/{other}/execute_async", {"command": "true", "shell_name": "c"})
    assert answer.status_code == 200


def test_the_account_s_cap_counts_the_queued(world, alice, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, CAP_EXECUTIONS=2)
    start(world, alice)
    start(world, alice)
    answer = alice.post(f"{world.url}/execute_async", {"command": "true", "shell_name": "main"})
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_requests")


def test_a_stranger_has_no_part_in_a_line(world, alice, bob, charlie):
    start(world, alice)
    assert start(world, bob)["status"] == "queued"
    answer = charlie.post(f"{world.url}/execute_async", {"command": "true", "shell_name": "main"})
    assert answer.status_code == 404
    assert Execution.objects.count() == 2


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", "a\u200bb", 7, ["a"]])
def test_names_that_are_refused(world, alice, name):
    answer = alice.post(f"{world.url}/execute_async", {"command": "true", "shell_name": name})
    assert answer.status_code == 400 and "shell_name" in answer.json()["message"]
