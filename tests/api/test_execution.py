"""Commands through HTTP: running them, who may, repetitions, waits, what an answer holds."""

import asyncio
import dataclasses
import time
import uuid

import pytest
from django.db import connection

from api.asynchronous import in_database
from api.ids import new_id
from api.waiting import hub
from executions import services
from executions.execution_flow import execution_flow
from executions.models import Execution
from tests.execution_world import World, make_devbox


@pytest.fixture
def world(web, alice):
    return World(web, alice.account_id)


def execute(world, party, command, last_n=None, command_id=None, **body):
    query = "" if last_n is None else f"?last_n={last_n}"
    body = {"command": command, "command_id": command_id or str(uuid.uuid4()), **body}
    with world.working():
        return party.post(f"{world.url}/execute{query}", body)


# --- running ---


def test_execute_answers_with_the_result(world, alice):
    world.fake.script("echo hi; exit 42", exit=42, stdout=b"hi\n", stderr=b"oops")
    answer = execute(world, alice, "echo hi; exit 42")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    execution_id = body.pop("execution_id")
    assert body == {
        "devbox_id": world.devbox_id,
        "status": "completed",
        "shell_name": None,
        "exit_status": 42,
        "stdout": "hi\n",
        "stderr": "oops",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "why": None,
    }
    row = world.row(execution_id)
    assert (row.step, row.wake_at, row.lease, row.kept) == ("done", None, None, "row")


def test_a_command_without_output_answers_with_empty_texts(world, alice):
    world.fake.script("true")
    body = execute(world, alice, "true").json()
    assert (body["stdout"], body["stderr"], body["exit_status"]) == ("", "", 0)


def test_execute_answers_running_when_the_time_is_up_and_never_before(world, alice):
    began = time.monotonic()
    body = execute(world, alice, "sleep 1000", optimistic_timeout=1).json()
    assert 1.0 <= time.monotonic() - began < 1.9
    assert body["status"] == "running"
    assert not {"stdout", "stderr", "exit_status", "stdout_truncated"} & set(body)


def test_an_end_during_the_hold_is_answered_at_once(world, alice):
    async def scenario():
        request = asyncio.ensure_future(
            world.web.send(
                "POST",
                f"{world.url}/execute",
                key=alice.secret,
                json={"command": "work", "command_id": "c-1", "optimistic_timeout": 20},
            )
        )
        while not world.fake.called("spawn"):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert not request.done()
        world.fake.finish(world.fake.called("spawn")[0]["id"], exit=3, stdout=b"done")
        began = time.monotonic()
        answer = await request
        assert time.monotonic() - began < 0.5
        return answer.json()

    with world.working():
        body = world.web.run(scenario())
    assert (body["status"], body["exit_status"], body["stdout"]) == ("completed", 3, "done")


def test_execute_async_answers_at_once_and_get_follows(world, alice):
    answer = alice.post(f"{world.url}/execute_async", {"command": "sleep 1000"})
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    url = world.execution_url(answer.json()["execution_id"])
    assert alice.get(url).json()["status"] == "queued"
    world.work()
    assert alice.get(url).json()["status"] == "running"
    world.fake.finish(answer.json()["execution_id"], exit=0, stdout=b"out")
    assert alice.get(url).json()["status"] == "running"
    world.work()
    assert alice.get(url).json()["stdout"] == "out"


def test_execute_sync_answers_with_the_whole_output(world, alice):
    text = "".join(f"line {n}\n" for n in range(1000))
    world.fake.script("seq", stdout=text.encode(), stderr=b"err")
    with world.working():
        answer = alice.post(f"{world.url}/execute_sync", {"command": "seq"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["stdout"], answer.json()["stderr"], answer.json()["exit_status"]) == (text, "err", 0)


def never_started(world, end):
    """Have the devbox's only command, which no host was ever asked to start or could start, come to its end."""
    (pk,) = Execution.objects.values_list("pk", flat=True)
    if end == "no host could start it":
        world.fake.unreachable = True
        execution_flow.run(pk)
        with connection.cursor() as cursor:
            cursor.execute("UPDATE executions_execution SET deadline_at = now(), wake_at = now()")
        execution_flow.run(pk)
    elif end == "killed before its start":
        services.request_kill(pk, group=False)
        execution_flow.run(pk)
    else:
        services.after_destroy(world.devbox_id, "api_shutdown")
    return pk


@pytest.mark.parametrize(
    ("end", "exit_status", "why"),
    [
        ("no host could start it", -1, "could not be started in time"),
        ("killed before its start", 137, "killed on request"),
        ("its devbox ended", 137, "its devbox ended"),
    ],
)
def test_a_command_that_never_started_is_answered_with_its_reason(world, alice, end, exit_status, why):
    world.paused = True

    async def scenario():
        task = asyncio.ensure_future(
            world.web.send("POST", f"{world.url}/execute_sync", key=alice.secret, json={"command": "x"})
        )
        while not await in_database(Execution.objects.exists):
            await asyncio.sleep(0.01)
        hub.wake(await in_database(never_started, world, end))
        return await asyncio.wait_for(task, 5)

    answer = world.web.run(scenario())
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["stdout"], body["stderr"], body["exit_status"]) == ("", "", exit_status)
    assert why in body["why"]
    view = alice.get(world.execution_url(body["execution_id"])).json()
    assert (view["status"], view["stdout_truncated"], view["stderr_truncated"]) == ("completed", False, False)


def test_execute_sync_refuses_too_large_an_output_by_name(world, alice, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, OUTPUT_INLINE_MAX=100)
    world.fake.script("yes", stdout=b"y" * 101, stderr=b"small")
    with world.working():
        answer = alice.post(f"{world.url}/execute_sync", {"command": "yes"})
    assert (answer.status_code, answer.json()["code"]) == (413, "output_too_large")
    assert "stdout" in answer.json()["message"]
    assert "stderr" not in answer.json()["message"]
    assert Execution.objects.get().pk in answer.json()["message"]


def test_what_a_command_is_started_with(world, alice, monkeypatch):
    monkeypatch.setattr("devboxes.selectors.environment", lambda devbox_id: {"TOKEN": "s3", "LANG": "de_DE.UTF-8"})
    world.fake.script("env")
    execute(world, alice, "env")
    body = world.fake.called("spawn")[0]["body"]
    assert body["command"] == "env"
    assert body["login"] is True
    assert body["cwd"] == "/home/user"
    assert body["user"] == {"name": "user", "uid": 1000, "gid": 1000, "home": "/home/user"}
    assert body["stdin"] == "none"
    env = body["env"]
    assert (env["TOKEN"], env["LANG"], env["HOME"], env["USER"]) == ("s3", "de_DE.UTF-8", "/home/user", "user")
    assert (env["LOGNAME"], env["SHELL"]) == ("user", "/bin/bash")
    assert "/usr/bin" in env["PATH"]


# --- who may ---


def test_a_colleague_may_and_a_stranger_finds_nothing(world, alice, bob, charlie, web):
    execution_id = world.started(alice)
    url = world.execution_url(execution_id)
    assert bob.get(url).status_code == 200
    assert bob.post(f"{url}/wait_for_status", {"statuses": ["running"]}).status_code == 200
    for answer in (
        charlie.get(url),
        charlie.post(f"{url}/wait_for_status", {"statuses": ["running"]}),
        charlie.post(f"{url}/kill"),
        charlie.post(f"{url}/send_std_in", {"text": "x"}),
        charlie.get(f"{url}/stream_stdout_updates"),
        charlie.post(f"{world.url}/execute", {"command": "true", "command_id": "x"}),
        charlie.post(f"{world.url}/execute_async", {"command": "true"}),
        charlie.post(f"{world.url}/execute_sync", {"command": "true"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), answer.text
    assert web.get(url).status_code == 401
    assert Execution.objects.count() == 1


def test_a_stranger_with_the_same_command_id_gets_no_ones_execution(world, alice, charlie):
    world.fake.script("true")
    execute(world, alice, "true", command_id="shared")
    answer = charlie.post(f"{world.url}/execute", {"command": "true", "command_id": "shared"})
    assert answer.status_code == 404


def test_an_execution_belongs_to_its_devbox(world, alice):
    execution_id = world.started(alice)
    other = make_devbox(alice.account_id, world.fake)
    assert alice.get(f"/v1/devboxes/{other}/executions/{execution_id}").status_code == 404
    assert alice.get(world.execution_url(new_id("exe"))).status_code == 404
    assert alice.get(world.execution_url("exe_nonsense")).status_code == 404
    assert alice.get(f"/v1/devboxes/{new_id('dbx')}/executions/{execution_id}").status_code == 404


# --- validation ---


@pytest.mark.parametrize(
    ("operation", "body", "named"),
    [
        ("execute", {"command": "true"}, "command_id"),
        ("execute", {"command_id": "a"}, "command"),
        ("execute", {"command": 1, "command_id": "a"}, "command"),
        ("execute", {"command": "true", "command_id": ""}, "command_id"),
        ("execute", {"command": "true", "command_id": "x" * 129}, "command_id"),
        ("execute", {"command": "true", "command_id": "a", "shell_name": ""}, "shell_name"),
        ("execute", {"command": "true", "command_id": "a", "attach_stdin": True}, "attach_stdin"),
        ("execute", {"command": "true", "command_id": "a", "optimistic_timeout": -1}, "optimistic_timeout"),
        ("execute", {"command": "true", "command_id": "a", "optimistic_timeout": "5"}, "optimistic_timeout"),
        ("execute", {"command": "true", "command_id": "a", "wish": 1}, "wish"),
        ("execute_async", {}, "command"),
        ("execute_async", {"command": None}, "command"),
        ("execute_async", {"command": "true", "shell_name": "x" * 129}, "shell_name"),
        ("execute_async", {"command": "true", "attach_stdin": "yes"}, "attach_stdin"),
        ("execute_async", {"command": "x" * (1024 * 1024 + 1)}, "command"),
        ("execute_sync", {"command": "true", "attach_stdin": True}, "attach_stdin"),
        ("execute_sync", {"command": "true", "shell_name": "a\nb"}, "shell_name"),
        ("execute_sync", {"command": "true\0"}, "NUL"),
    ],
)
def test_what_is_wrong_is_refused_by_name(world, alice, operation, body, named):
    answer = alice.post(f"{world.url}/{operation}", body)
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["message"]
    assert Execution.objects.count() == 0


def test_null_and_false_count_as_absent(world, alice):
    world.fake.script("true")
    assert execute(world, alice, "true", shell_name=None, optimistic_timeout=None).status_code == 200
    body = {"command": "true", "attach_stdin": False, "shell_name": None}
    with world.working():
        assert alice.post(f"{world.url}/execute_sync", body).status_code == 200


def test_a_command_of_a_mebibyte_is_taken(world, alice):
    command = "é" * (512 * 1024)
    answer = alice.post(f"{world.url}/execute_async", {"command": command})
    assert answer.status_code == 200, answer.text
    assert world.row(answer.json()["execution_id"]).command == command


@pytest.mark.parametrize("status", ["provisioning", "initializing", "failure", "shutdown"])
def test_a_devbox_that_does_not_run_takes_no_commands(world, alice, status):
    steps = {"provisioning": "place", "initializing": "launch", "failure": "failed", "shutdown": "gone"}
    devbox = make_devbox(alice.account_id, world.fake, status=status, step=steps[status])
    answer = alice.post(f"/v1/devboxes/{devbox}/execute_async", {"command": "true"})
    assert (answer.status_code, status in answer.json()["message"]) == (400, True)


def test_the_cap_of_an_account(world, alice, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, CAP_EXECUTIONS=2)
    first = world.started(alice)
    body = {"command": "sleep 1", "command_id": "again"}
    assert alice.post(f"{world.url}/execute", {**body, "optimistic_timeout": 0}).status_code == 200
    answer = alice.post(f"{world.url}/execute_async", {"command": "sleep 1"})
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_requests")
    assert int(answer.headers["retry-after"]) >= 1
    # A repetition of one that counts already is no new one.
    assert alice.post(f"{world.url}/execute", {**body, "optimistic_timeout": 0}).status_code == 200
    world.fake.finish(first)
    world.work()
    assert alice.post(f"{world.url}/execute_async", {"command": "sleep 1"}).status_code == 200


# --- repetitions ---


def test_the_same_command_id_attaches(world, alice):
    first = execute(world, alice, "sleep 1000", command_id="0190", optimistic_timeout=0).json()
    second = execute(world, alice, "sleep 1000", command_id="0190", optimistic_timeout=0).json()
    assert first["execution_id"] == second["execution_id"]
    assert Execution.objects.count() == 1
    assert len(world.fake.called("spawn")) == 1
    world.fake.finish(first["execution_id"], exit=5)
    assert execute(world, alice, "sleep 1000", command_id="0190").json()["exit_status"] == 5
    Execution.objects.first().devbox.__class__.objects.update(status="shutdown", step="gone")
    assert execute(world, alice, "sleep 1000", command_id="0190").json()["exit_status"] == 5


def test_the_same_command_id_with_another_command_is_refused(world, alice):
    execute(world, alice, "sleep 1000", command_id="0190", optimistic_timeout=0)
    answer = execute(world, alice, "sleep 2000", command_id="0190")
    assert (answer.status_code, "command_id" in answer.json()["message"]) == (400, True)


@pytest.mark.parametrize("operation", ["execute_async", "execute_sync"])
def test_the_same_request_id_is_the_same_execution(world, alice, operation):
    world.fake.script("true")
    headers = {"x-request-id": "stainless-python-retry-1"}
    ids = []
    with world.working():
        for _ in range(2):
            answer = alice.post(f"{world.url}/{operation}", {"command": "true"}, headers=headers)
            ids.append(answer.json()["execution_id"])
        other = alice.post(f"{world.url}/{operation}", {"command": "false"}, headers=headers)
        fresh = alice.post(f"{world.url}/{operation}", {"command": "true"}, headers={"x-request-id": "2"})
    assert ids[0] == ids[1] != fresh.json()["execution_id"]
    assert (other.status_code, "x-request-id" in other.json()["message"]) == (400, True)
    world.work()
    assert len(world.fake.called("spawn")) == 2


def test_the_same_request_id_with_another_command_id_is_refused(world, alice):
    headers = {"x-request-id": "1"}
    body = {"command": "sleep 1000", "command_id": "a", "optimistic_timeout": 0}
    first = alice.post(f"{world.url}/execute", body, headers=headers)
    assert alice.post(f"{world.url}/execute", body, headers=headers).json() == first.json()
    assert alice.post(f"{world.url}/execute", body, headers={"x-request-id": "2"}).json() == first.json()
    answer = alice.post(f"{world.url}/execute", {**body, "command_id": "b"}, headers=headers)
    assert (answer.status_code, "x-request-id" in answer.json()["message"]) == (400, True)


def test_a_request_id_has_a_bound(world, alice):
    headers = {"x-request-id": "x" * 256}
    assert alice.post(f"{world.url}/execute_async", {"command": "true"}, headers=headers).status_code == 400


def test_the_same_request_id_on_another_operation_is_another_request(world, alice):
    headers = {"x-request-id": "1"}
    world.fake.script("true")
    one = alice.post(f"{world.url}/execute_async", {"command": "true"}, headers=headers)
    with world.working():
        two = alice.post(f"{world.url}/execute_sync", {"command": "true"}, headers=headers)
    assert one.json()["execution_id"] != two.json()["execution_id"]


# --- waiting ---


def wait(world, party, execution_id, body, query=""):
    with world.working():
        return party.post(world.execution_url(execution_id, f"/wait_for_status{query}"), body)


def test_a_wait_is_answered_at_once_when_it_is_so_already(world, alice):
    execution_id = world.started(alice)
    assert wait(world, alice, execution_id, {"statuses": ["running", "completed"]}).json()["status"] == "running"


@pytest.mark.parametrize("seconds", [0.3, 1, 1.000001])
def test_a_wait_that_runs_out_is_408_and_never_early(world, alice, seconds):
    execution_id = world.started(alice)
    began = time.monotonic()
    answer = wait(world, alice, execution_id, {"statuses": ["completed"], "timeout_seconds": seconds})
    assert seconds <= time.monotonic() - began < seconds + 0.8
    assert (answer.status_code, answer.json()["code"]) == (408, "timeout")
    assert answer.headers["x-should-retry"] == "true"


def test_a_completed_command_never_becomes_running_again(world, alice):
    world.fake.script("true")
    execution_id = execute(world, alice, "true").json()["execution_id"]
    answer = wait(world, alice, execution_id, {"statuses": ["running"], "timeout_seconds": 0.2})
    assert answer.status_code == 408


def test_a_wait_over_the_maximum_is_cut_to_it(world, alice, monkeypatch):
    monkeypatch.setattr("executions.api.HOLD_MAX_SECONDS", 0.2)
    execution_id = world.started(alice)
    began = time.monotonic()
    assert wait(world, alice, execution_id, {"statuses": ["completed"], "timeout_seconds": 600}).status_code == 408
    assert wait(world, alice, execution_id, {"statuses": ["completed"], "timeout_seconds": None}).status_code == 408
    assert wait(world, alice, execution_id, {"statuses": ["completed"]}).status_code == 408
    assert 0.6 <= time.monotonic() - began < 3


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"statuses": []},
        {"statuses": ["done"]},
        {"statuses": "completed"},
        {"statuses": ["completed"], "timeout_seconds": "5"},
        {"statuses": ["completed"], "timeout_seconds": -1},
        {"statuses": ["completed"], "wish": 1},
    ],
)
def test_a_wait_for_nothing_sensible_is_refused(world, alice, body):
    assert wait(world, alice, world.started(alice), body).status_code == 400


def test_a_wait_hears_of_the_end(world, alice):
    execution_id = world.started(alice)

    async def scenario():
        request = asyncio.ensure_future(
            world.web.send(
                "POST",
                world.execution_url(execution_id, "/wait_for_status?last_n=1"),
                key=alice.secret,
                json={"statuses": ["completed"], "timeout_seconds": 20},
            )
        )
        await asyncio.sleep(0.1)
        assert not request.done()
        world.fake.finish(execution_id, stdout=b"a\nb\n")
        return (await asyncio.wait_for(request, 1)).json()

    with world.working():
        body = world.web.run(scenario())
    assert (body["stdout"], body["stdout_truncated"]) == ("b\n", True)


# --- output ---


@pytest.mark.parametrize(
    ("last_n", "want", "truncated"),
    [
        (None, "".join(f"{n}\n" for n in range(20, 120)), True),
        ("", "".join(f"{n}\n" for n in range(20, 120)), True),
        ("3", "117\n118\n119\n", True),
        ("120", "".join(f"{n}\n" for n in range(120)), False),
        ("99999999999", "".join(f"{n}\n" for n in range(120)), False),
        ("0", "", True),
    ],
)
def test_the_last_lines_and_the_flag_are_exact(world, alice, last_n, want, truncated):
    world.fake.script("seq", stdout="".join(f"{n}\n" for n in range(120)).encode(), stderr=b"one\ntwo")
    body = execute(world, alice, "seq", last_n=last_n).json()
    assert (body["stdout"], body["stdout_truncated"]) == (want, truncated)
    assert (body["stderr"], body["stderr_truncated"]) == (("", True) if last_n == "0" else ("one\ntwo", False))


def test_exactly_a_hundred_lines_are_whole(world, alice):
    text = "x\n" * 100
    world.fake.script("seq", stdout=text.encode())
    body = execute(world, alice, "seq").json()
    assert (body["stdout"], body["stdout_truncated"]) == (text, False)


@pytest.mark.parametrize("last_n", ["-1", "x", "1.5", "1e3"])
def test_a_last_n_that_is_no_number_is_refused(world, alice, last_n):
    assert execute(world, alice, "true", last_n=last_n).status_code == 400
    assert alice.get(world.execution_url(new_id("exe"), f"?last_n={last_n}")).status_code == 400


def test_bytes_that_are_no_text_are_replaced(world, alice):
    world.fake.script("cat", stdout=b"a\xff\xfeb\0c")
    body = execute(world, alice, "cat").json()
    assert (body["stdout"], body["stdout_truncated"]) == ("a\ufffd\ufffdb\0c", False)


def test_large_outputs_are_read_from_the_host_until_they_are_stored(world, alice, monkeypatch):
    def away(*args, **kwargs):
        from storage.objects import StorageError

        raise StorageError("store", "key", "away")

    monkeypatch.setattr("storage.objects.put", away)
    lines = b"".join(b"%d\n" % n for n in range(20000))
    world.fake.script("seq", stdout=lines, stderr=b"e")
    body = execute(world, alice, "seq", last_n=2).json()
    assert (body["stdout"], body["stdout_truncated"], body["stderr"]) == ("19998\n19999\n", True, "e")
    row = world.row(body["execution_id"])
    assert (row.step, row.kept, row.status) == ("store", "host", "completed")
    with world.working():
        whole = alice.get(world.execution_url(body["execution_id"], "?last_n=100000")).json()
    assert (whole["stdout"], whole["stdout_truncated"]) == (lines.decode(), False)


def test_an_output_that_cannot_be_read_now_is_503(world, alice, monkeypatch):
    monkeypatch.setattr("executions.answers.READ_PAUSE_SECONDS", 0.01)
    world.fake.script("seq", stdout=b"x" * 70000)
    world.fake.fail("read", times=100)
    answer = execute(world, alice, "seq")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


# --- keys, clients and the admin ---


def test_the_longest_command_id_is_kept(world, alice):
    world.fake.script("true")
    assert execute(world, alice, "true", command_id="x" * services.COMMAND_ID_MAX).status_code == 200


def test_a_sync_call_whose_client_has_left_goes_on_and_is_found_again(world, alice):
    headers = {"x-request-id": "retry"}
    body = {"command": "slow"}

    async def leave():
        request = asyncio.ensure_future(
            world.web.send("POST", f"{world.url}/execute_sync", key=alice.secret, json=body, headers=headers)
        )
        while not world.fake.called("spawn"):
            await asyncio.sleep(0.005)
        request.cancel()
        return world.fake.called("spawn")[0]["id"]

    with world.working():
        execution_id = world.web.run(leave())
        assert world.row(execution_id).status in ("queued", "running")
        world.fake.finish(execution_id, exit=8)
        answer = alice.post(f"{world.url}/execute_sync", body, headers=headers)
    assert (answer.json()["execution_id"], answer.json()["exit_status"]) == (execution_id, 8)


def test_a_read_only_key_reads_and_waits_but_runs_nothing(world, alice, web):
    from accounts.models import ApiKey
    from tests.conftest import make_party

    reader = make_party(alice.account_id, "reader", web)
    ApiKey.objects.filter(pk=reader.key_id).update(access="read_only")
    execution_id = world.started(alice)
    assert reader.get(world.execution_url(execution_id)).status_code == 200
    assert wait(world, reader, execution_id, {"statuses": ["running"]}).status_code == 200
    assert reader.post(f"{world.url}/execute_async", {"command": "true"}).status_code == 403
    assert reader.post(world.execution_url(execution_id, "/kill")).status_code == 403


def test_the_admin_lists_and_shows_and_never_edits(world, alice, client):
    from django.contrib.auth.models import User

    execution_id = world.started(alice, "echo <b>secret</b>")
    client.force_login(User.objects.create_superuser("operator"))
    page = client.get("/admin/executions/execution/")
    assert (page.status_code, execution_id in page.content.decode()) == (200, True)
    assert "<b>secret" not in page.content.decode()
    assert client.get(f"/admin/executions/execution/?q={execution_id}").status_code == 200
    page = client.get(f"/admin/executions/execution/{execution_id}/change/")
    assert page.status_code == 200
    assert client.get("/admin/executions/execution/add/").status_code == 403
    assert client.post(f"/admin/executions/execution/{execution_id}/change/", {"status": "completed"}).status_code in (
        302,
        403,
    )
    assert world.row(execution_id).status == "running"
