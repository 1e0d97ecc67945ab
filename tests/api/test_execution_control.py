"""Stopping commands and giving them input, through HTTP."""

import pytest

from tests.execution_world import World


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def execute(world, party, command):
    with world.working():
        return party.post(f"{world.url}/execute", {"command": command, "command_id": "only"})


def kill(world, party, execution_id, body=None):
    with world.working():
        return party.post(world.execution_url(execution_id, "/kill"), body)


def test_kill_stops_a_running_command(world, alice):
    execution_id = world.started(alice)
    body = kill(world, alice, execution_id).json()
    assert (body["status"], body["exit_status"]) == ("completed", 137)
    assert "request" in body["why"]
    assert world.fake.called("kill")[0]["signal"] == 9
    assert world.fake.called("kill")[0]["group"] is False
    again = kill(world, alice, execution_id)
    assert (again.status_code, again.json()["exit_status"]) == (200, 137)
    assert len(world.fake.called("kill")) == 1


def test_kill_of_the_group(world, alice):
    execution_id = world.started(alice)
    kill(world, alice, execution_id, {"kill_process_group": True})
    assert world.fake.called("kill")[0]["group"] is True


def test_kill_before_the_start_means_that_it_never_starts(world, alice, monkeypatch):
    monkeypatch.setattr("executions.api.KILL_HOLD_SECONDS", 0.1)
    world.paused = True
    execution_id = alice.post(f"{world.url}/execute_async", {"command": "echo once"}).json()["execution_id"]
    assert kill(world, alice, execution_id).json()["status"] == "queued"
    world.paused = False
    world.work()
    body = alice.get(world.execution_url(execution_id)).json()
    assert (body["status"], body["exit_status"]) == ("completed", 137)
    assert world.fake.called("spawn") == []


def test_kill_of_a_completed_command_changes_nothing(world, alice):
    world.fake.script("true", stdout=b"x")
    execution_id = execute(world, alice, "true").json()["execution_id"]
    answer = kill(world, alice, execution_id)
    assert (answer.status_code, answer.json()["exit_status"], answer.json()["stdout"]) == (200, 0, "x")
    assert kill(world, alice, execution_id, {"signal": 9}).status_code == 400


def test_input_reaches_the_command(world, alice):
    execution_id = world.started(alice, "cat", attach_stdin=True)
    url = world.execution_url(execution_id, "/send_std_in")
    want = {"devbox_id": world.devbox_id, "execution_id": execution_id, "success": True}
    headers = {"x-request-id": "only once"}
    for _ in range(2):
        assert alice.post(url, {"text": "héllo\n"}, headers=headers).json() == want
    assert world.fake.boxes[world.devbox_id].executions[execution_id].stdin == "héllo\n".encode()
    assert alice.post(url, {"signal": "EOF"}).json()["success"] is True
    assert alice.post(url, {"text": "late"}).json()["success"] is False
    world.fake.finish(execution_id)
    world.work()
    assert alice.post(url, {"text": "late"}).json()["success"] is False
    assert alice.post(url, {"text": "late"}, headers={"x-request-id": "another"}).json()["success"] is False
    assert alice.post(url, {"text": "héllo\n"}, headers=headers).json() == want, "taken when it was asked first"
    world.fake.unreachable = True
    assert alice.post(url, {"text": "héllo\n"}, headers=headers).json()["success"] is False


def test_input_waits_for_a_queued_command(world, alice):
    execution_id = alice.post(f"{world.url}/execute_async", {"command": "cat", "attach_stdin": True}).json()[
        "execution_id"
    ]
    with world.working():
        answer = alice.post(world.execution_url(execution_id, "/send_std_in"), {"text": "x"})
    assert answer.json()["success"] is True


def test_input_to_a_command_without_any_is_no_success(world, alice):
    url = world.execution_url(world.started(alice), "/send_std_in")
    assert alice.post(url, {"text": "x"}).json()["success"] is False
    assert alice.post(url, {"signal": "EOF"}).json()["success"] is False


def test_an_interrupt_needs_no_attached_input(world, alice):
    execution_id = world.started(alice)
    answer = alice.post(world.execution_url(execution_id, "/send_std_in"), {"signal": "INTERRUPT"})
    assert answer.json()["success"] is True
    call = world.fake.called("kill")[0]
    assert (call["signal"], call["group"]) == (2, True)
    world.work()
    assert world.row(execution_id).exit_status == 130


def test_a_repeated_interrupt_is_sent_once(world, alice):
    execution_id = world.started(alice)
    url = world.execution_url(execution_id, "/send_std_in")
    sent = []
    world.fake._end = lambda box, execution, code, reason: sent.append(code)  # it handles the interrupt and goes on
    for request in ("a", "a", "b"):
        answer = alice.post(url, {"signal": "INTERRUPT"}, headers={"x-request-id": request})
        assert answer.json()["success"] is True
    assert sent == [130, 130]
    assert [call["request"] for call in world.fake.called("kill")] == ["a", "a", "b"]


@pytest.mark.parametrize(
    "body", [{}, {"text": "a", "signal": "EOF"}, {"signal": "HUP"}, {"text": 5}, {"text": None, "signal": None}]
)
def test_input_is_exactly_one_thing(world, alice, body):
    url = world.execution_url(world.started(alice, "cat", attach_stdin=True), "/send_std_in")
    assert alice.post(url, body).status_code == 400


def test_input_while_the_host_is_silent_is_503(world, alice):
    url = world.execution_url(world.started(alice, "cat", attach_stdin=True), "/send_std_in")
    world.fake.unreachable = True
    assert alice.post(url, {"text": "x"}).status_code == 503
