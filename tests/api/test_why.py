"""What is told of why: the phases of executions and devboxes with their times, and causes with their evidence."""

import pytest

from devboxes.models import Devbox
from executions.models import Execution
from tests.execution_world import World


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def why(party, world, execution_id):
    answer = party.get(world.execution_url(execution_id, "/why"))
    assert answer.status_code == 200, answer.text
    return answer.json()


def of_devbox(party, world):
    answer = party.get(f"{world.url}/why")
    assert answer.status_code == 200, answer.text
    return answer.json()


def reached(account):
    return [phase["phase"] for phase in account["phases"]]


def ended(world, alice, **how):
    execution_id = world.started(alice)
    world.fake.finish(execution_id, **how)
    world.work()
    return execution_id


def everywhere(world, alice, execution_id):
    """What get, wait and execute_sync's like say of an end: (exit status, sentence)."""
    got = alice.get(world.execution_url(execution_id)).json()
    waited = alice.post(world.execution_url(execution_id, "/wait_for_status"), {"statuses": ["completed"]}).json()
    (item,) = alice.get(f"{world.url}/executions?limit=1").json()["executions"]
    found = {(one["exit_status"], one["why"]) for one in (got, waited, item)}
    account = why(alice, world, execution_id)
    found.add((account["exit_status"], account["cause"]["message"] if account["cause"] else None))
    return found


def test_the_phases_of_a_command(world, alice):
    world.paused = True
    execution_id = alice.post(f"{world.url}/execute_async", {"command": "sleep 1000"}).json()["execution_id"]
    account = why(alice, world, execution_id)
    assert (account["status"], reached(account), account["cause"], account["worker"]) == (
        "queued",
        ["queued"],
        None,
        None,
    )
    world.paused = False
    world.work()
    account = why(alice, world, execution_id)
    assert reached(account) == ["queued", "placed", "spawned"]
    assert account["worker"] and account["host"] == {"id": world.fake.host_id, "silent_since_ms": None}
    assert account["output_kept"] is None
    world.fake.finish(execution_id, stdout=b"x")
    world.work()
    account = why(alice, world, execution_id)
    assert reached(account) == ["queued", "placed", "spawned", "first_byte", "exited", "stored"]
    times = [phase["at_ms"] for phase in account["phases"]]
    assert all(type(at) is int and at > 1_700_000_000_000 for at in times)
    assert (account["cause"], account["output_kept"], account["exit_status"]) == (None, "stored", 0)


def test_a_command_whose_exit_overtook_its_spawn_knows_its_worker(world, alice):
    """The watcher completes it while the worker still waits for the spawn's answer."""
    world.fake.script("true", stdout=b"x")
    world.fake.hooks["spawn"] = lambda **_: world.fake.deliver()
    execution_id = alice.post(f"{world.url}/execute_async", {"command": "true"}).json()["execution_id"]
    world.work()
    account = why(alice, world, execution_id)
    assert reached(account) == ["queued", "placed", "spawned", "first_byte", "exited", "stored"]
    assert account["worker"].count(":") == 2


def test_what_a_start_waits_for(world, alice):
    first = world.started(alice, shell_name="main")
    body = {"command": "true", "shell_name": "main"}
    second = alice.post(f"{world.url}/execute_async", body).json()["execution_id"]
    assert why(alice, world, second)["trouble"] == "it waits for an earlier command of shell main to end"
    assert why(alice, world, first)["trouble"] is None
    world.fake.fail("spawn")
    third = alice.post(f"{world.url}/execute_async", {"command": "true"}).json()["execution_id"]
    world.work()
    assert why(alice, world, third)["trouble"] == "its host does not answer; it is asked again"


def test_nothing_written_and_nothing_known_is_left_out(world, alice):
    account = why(alice, world, ended(world, alice))
    assert "first_byte" not in reached(account)


def test_who_may_see_it(world, alice, bob, charlie):
    execution_id = world.started(alice)
    assert why(bob, world, execution_id) == why(alice, world, execution_id)
    assert of_devbox(bob, world)["id"] == world.devbox_id
    for path in (world.execution_url(execution_id, "/why"), f"{world.url}/why"):
        assert charlie.get(path).status_code == 404
    assert alice.get(world.execution_url(f"exe_{'0' * 26}", "/why")).status_code == 404
    assert alice.get("/v1/devboxes/nonsense/why").status_code == 404
    assert alice.get(f"/v1/devboxes/dbx_{'0' * 26}/executions/{execution_id}/why").status_code == 404


@pytest.mark.parametrize(
    ("exit_status", "reason", "kind", "evidence", "words"),
    [
        (3, None, "exit_status", {}, "exit status 3"),
        (143, {"kind": "signal", "signal": 15}, "signal", {"signal": 15, "signal_name": "15 (SIGTERM)"}, "SIGTERM"),
        (
            137,
            {
                "kind": "oom",
                "detail": "2 processes",
                "kills": 2,
                "limit_bytes": 64,
                "usage_bytes": 10,
                "peak_bytes": 64,
            },
            "out_of_memory",
            {"kills": 2, "limit_bytes": 64, "usage_bytes": 10, "peak_bytes": 64},
            "ran out of memory",
        ),
        (
            127,
            {"kind": "exec_failed", "detail": "no such file"},
            "not_started",
            {"detail": "no such file"},
            "no such file",
        ),
        (137, {"kind": "killed", "detail": "the box stopped"}, "devbox_ended", {}, "the box stopped"),
    ],
)
def test_an_end_reads_the_same_everywhere(world, alice, exit_status, reason, kind, evidence, words):
    execution_id = ended(world, alice, exit=exit_status, reason=reason)
    cause = why(alice, world, execution_id)["cause"]
    assert cause["kind"] == kind and words in cause["message"]
    assert {name: cause[name] for name in evidence} == evidence
    found = everywhere(world, alice, execution_id)
    if reason is None:
        assert found == {(exit_status, None), (exit_status, cause["message"])}  # the number tells it elsewhere
    else:
        assert found == {(exit_status, cause["message"])}


def test_a_kill_says_who_asked_and_when(world, alice, bob):
    execution_id = world.started(alice)
    with world.working():
        alice.post(world.execution_url(execution_id, "/kill"))
        bob.post(world.execution_url(execution_id, "/kill"))
    account = why(bob, world, execution_id)
    cause = account["cause"]
    assert (cause["kind"], cause["signal"]) == ("kill_requested", 9)
    assert cause["by"] == {"key_id": alice.key_id, "member_id": alice.member_id}
    assert account["phases"][0]["at_ms"] - 60_000 < cause["at_ms"] <= account["phases"][-1]["at_ms"] + 60_000
    assert account["kill_request"] == {"by": cause["by"], "at_ms": cause["at_ms"]}
    assert everywhere(world, alice, execution_id) == {(137, cause["message"])}


def test_a_host_that_is_silent_and_then_lost(world, alice):
    from django.db import connection

    from hosts import reconcile

    execution_id = world.started(alice)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET seen_at = clock_timestamp() - interval '60 s'")
    since = why(alice, world, execution_id)["host"]["silent_since_ms"]
    assert since > 1_700_000_000_000
    assert of_devbox(alice, world)["host"]["silent_since_ms"] == since
    reconcile.declare_lost(world.fake.host_id, "its host has been silent for 900 s", since)
    account = why(alice, world, execution_id)
    assert (account["exit_status"], account["output_kept"]) == (-1, "lost")
    assert (account["cause"]["kind"], account["cause"]["silent_since_ms"]) == ("host_lost", since)
    assert "silent for 900 s" in account["cause"]["message"]
    assert everywhere(world, alice, execution_id) == {(-1, account["cause"]["message"])}
    devbox = of_devbox(alice, world)
    assert (devbox["status"], devbox["cause"]["kind"], devbox["cause"]["silent_since_ms"]) == (
        "failure",
        "host_lost",
        since,
    )


def test_a_command_that_ended_with_its_devbox_says_how_that_ended(world, alice, bob):
    execution_id = world.started(alice)
    bob.post(f"{world.url}/shutdown")
    from executions.services import before_destroy

    before_destroy(world.devbox_id)
    world.work()
    cause = why(alice, world, execution_id)["cause"]
    assert cause["kind"] == "devbox_ended"
    assert (cause["devbox"]["status"], cause["devbox"]["shutdown_reason"]) == ("shutdown", "api_shutdown")
    devbox = of_devbox(alice, world)
    assert devbox["cause"]["kind"] == "shutdown_requested"
    assert devbox["cause"]["by"] == {"key_id": bob.key_id, "member_id": bob.member_id}
    assert reached(devbox)[-1] == "ended" and devbox["cause"]["at_ms"] == devbox["phases"][-1]["at_ms"]


def test_what_is_known_of_a_box_that_ran_out_of_memory(world, alice):
    world.fake.box_exit(world.devbox_id, oom=True)
    event = world.fake.unacked[world.devbox_id, "box"]
    event["memory"] = {"kills": 1, "limit_bytes": 1024, "peak_bytes": 1024, "nonsense": "x", "usage_bytes": -5}
    world.work()
    devbox = of_devbox(alice, world)
    cause = {name: value for name, value in devbox["cause"].items() if name not in ("at_ms", "message")}
    assert cause == {"kind": "out_of_memory", "kills": 1, "limit_bytes": 1024, "peak_bytes": 1024}


def test_what_a_box_tells_of_an_end_is_bounded(world, alice):
    reason = {"kind": "oom" * 100, "detail": "x\0" * 5000, "kills": "many", "limit_bytes": True, "more": ["y"] * 1000}
    execution_id = ended(world, alice, exit=137, reason=reason)
    kept = Execution.objects.get(pk=execution_id).reason
    assert set(kept) == {"kind", "detail"} and len(kept["kind"]) == 40 and len(kept["detail"]) == 1000
    assert "\0" not in kept["detail"]
    assert why(alice, world, execution_id)["cause"]["kind"] == "lost"


def test_a_running_devbox_has_no_cause(world, alice):
    Devbox.objects.filter(pk=world.devbox_id).update(placed_at="2026-01-01T00:00Z", why="some trouble, long ago")
    account = of_devbox(alice, world)
    assert (account["status"], account["cause"], reached(account)) == ("running", None, ["queued", "placed"])
