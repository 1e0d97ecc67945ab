"""The list of a devbox's executions: who may see it, its order, filters and pages, and what it costs."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from api.ids import new_id
from executions.models import Execution
from tests.execution_world import World, make_devbox


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def listed(party, world, query="", url=None):
    answer = party.get(f"{url or world.url}/executions{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(body):
    return [item["execution_id"] for item in body["executions"]]


def test_newest_first_without_output(world, alice):
    world.fake.script("echo hello", stdout=b"hello\n", exit=3)
    with world.working():
        body = {"command": "echo hello", "command_id": "mine"}
        first = alice.post(f"{world.url}/execute", body).json()["execution_id"]
    second = world.started(alice, "sleep 1000")
    page = listed(alice, world)
    assert ids(page) == [second, first]
    assert (page["has_more"], page["total_count"]) == (False, 2)
    running, done = page["executions"]
    assert (running["status"], running["exit_status"], running["end_time_ms"]) == ("running", None, None)
    assert (done["status"], done["exit_status"], done["command"]) == ("completed", 3, "echo hello")
    assert (done["command_id"], done["command_truncated"], done["stdout_bytes"]) == ("mine", False, 6)
    assert "stdout" not in done
    assert done["create_time_ms"] > 0 and done["start_time_ms"] <= done["end_time_ms"]


def test_a_colleague_sees_it_and_a_stranger_no_devbox(world, alice, bob, charlie):
    execution_id = world.started(alice)
    assert ids(listed(bob, world)) == [execution_id]
    assert charlie.get(f"{world.url}/executions").status_code == 404
    assert alice.get(f"/v1/devboxes/dbx_{'0' * 26}/executions").status_code == 404
    assert alice.get("/v1/devboxes/nonsense/executions").status_code == 404
    other = make_devbox(alice.account_id, world.fake)
    assert ids(listed(alice, world, url=f"/v1/devboxes/{other}")) == []


def test_pages_follow_one_another(world, alice, charlie):
    made = [world.started(alice, f"sleep {n}") for n in range(5)][::-1]
    seen, after = [], ""
    while True:
        page = listed(alice, world, f"?limit=2&include_total_count=false{after}")
        assert "total_count" not in page
        seen += ids(page)
        if not page["has_more"]:
            break
        after = f"&starting_after={ids(page)[-1]}"
    assert seen == made
    assert alice.get(f"{world.url}/executions?starting_after=exe_{'0' * 26}").status_code == 404
    other = make_devbox(alice.account_id, world.fake)
    assert alice.get(f"/v1/devboxes/{other}/executions?starting_after={made[0]}").status_code == 404


def test_filters_by_status_and_shell(world, alice):
    world.fake.script("true")
    running = world.started(alice, "sleep 1000")
    done = world.started(alice, "true")
    world.paused = True
    queued = alice.post(f"{world.url}/execute_async", {"command": "later"}).json()["execution_id"]
    Execution.objects.filter(pk=done).update(shell_name="main")
    for status, wanted in (("running", [running]), ("completed", [done]), ("queued", [queued])):
        page = listed(alice, world, f"?status={status}")
        assert (ids(page), page["total_count"]) == (wanted, 1)
    assert ids(listed(alice, world, "?shell_name=main")) == [done]
    assert ids(listed(alice, world, "?shell_name=main&status=running")) == []
    assert len(ids(listed(alice, world, "?status=&shell_name=&limit="))) == 3


@pytest.mark.parametrize("query", ["?status=lost", "?limit=x", "?shell_name=%00", "?include_total_count=perhaps"])
def test_nonsense_is_400(world, alice, query):
    answer = alice.get(f"{world.url}/executions{query}")
    assert answer.status_code == 400 and answer.json()["message"]


def test_a_long_command_is_shown_in_part(world, alice):
    world.started(alice, "x" * 5000)
    (item,) = listed(alice, world)["executions"]
    assert (item["command"], item["command_truncated"]) == ("x" * 1024, True)


def test_the_number_of_statements_does_not_grow(world, alice):
    def count():
        with CaptureQueriesContext(connection) as caught:
            listed(alice, world, "?limit=100")
        return len(caught)

    world.started(alice)
    first = count()
    for n in range(10):
        world.started(alice, f"sleep {n}")
    assert count() == first


def test_the_pages_are_served_by_indexes(world, alice):
    row = Execution.objects.get(pk=world.started(alice))
    other = make_devbox(alice.account_id, world.fake)
    done = {"status": "completed", "exit_status": 0, "step": "done", "wake_at": None, "completed_at": row.created_at}
    same = {"devbox_id": other, "account_id": row.account_id, "host_id": row.host_id, "user_uid": 1000, "command": "x"}
    Execution.objects.bulk_create([Execution(id=new_id("exe"), **same, **done) for _ in range(3000)])
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE executions_execution")
        for condition, indexes in (
            ("", {"executions_list"}),
            ("shell_name = 'main' AND ", {"executions_shell", "executions_list"}),
            (f"account_id = '{row.account_id}' AND completed_at IS NULL AND ", {"executions_open", "executions_list"}),
        ):
            where = f"{condition} devbox_id = %s"
            sql = f"EXPLAIN SELECT id FROM executions_execution WHERE {where} ORDER BY id DESC LIMIT 20"
            cursor.execute(sql, [world.devbox_id])
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert any(index in plan for index in indexes), plan
