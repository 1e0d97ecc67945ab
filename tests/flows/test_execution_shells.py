"""The line of a named shell: places, whose turn it is, stops before that, and wakes that were lost."""

import datetime

import pytest
from django.db import connection

from api.callers import Caller
from devboxes.models import DevboxLog
from executions import services, shells
from executions.execution_flow import execution_flow
from executions.models import Execution, ShellLine
from hosts.client import HostRefused
from tests.execution_world import make_devbox, make_host

pytestmark = pytest.mark.django_db


@pytest.fixture
def account():
    from accounts.services import create_account

    return create_account("acme").pk


@pytest.fixture
def fake():
    return make_host()


@pytest.fixture
def devbox(account, fake):
    return make_devbox(account, fake)


@pytest.fixture
def create(account, devbox):
    def create(command="sleep 1000", shell="main", box=None):
        new = services.NewExecution(operation="execute_async", command=command, shell_name=shell)
        return services.create_execution(Caller(account_id=account), box or devbox, new)

    return create


def row(pk):
    return Execution.objects.get(pk=pk)


def states(*ids):
    return [(row(pk).status, row(pk).step) for pk in ids]


def is_due(pk):
    with connection.cursor() as cursor:
        cursor.execute("SELECT wake_at <= clock_timestamp() FROM executions_execution WHERE id = %s", [pk])
        return cursor.fetchone()[0]


def run(*ids):
    """What a worker does with these rows, if they are due."""
    for pk in ids:
        with connection.cursor() as cursor:
            # Inside one transaction now() stands still, and what is due "now" would never be.
            cursor.execute(
                "UPDATE executions_execution SET wake_at = now() "
                "WHERE wake_at > now() AND wake_at <= clock_timestamp() AND id = %s",
                [pk],
            )
        execution_flow.run(pk)


def test_one_at_a_time_in_the_order_of_creation(create, fake):
    first, second, third = create("1"), create("2"), create("3")
    assert [row(pk).shell_place for pk in (first, second, third)] == [1, 2, 3]
    assert row(first).deadline_at is None, "waiting for its turn has no deadline"
    run(third, second, first)
    assert states(first, second, third) == [
        ("running", "await_exit"),
        ("queued", "await_turn"),
        ("queued", "await_turn"),
    ]
    assert not is_due(second)
    assert [call["body"]["shell"] for call in fake.called("spawn")] == ["main"]
    fake.finish(first)
    fake.deliver()
    assert (is_due(second), is_due(third)) == (True, False), "the end of one wakes the next, and no other"
    run(second, third)
    assert states(second, third) == [("running", "await_exit"), ("queued", "await_turn")]
    fake.finish(second)
    fake.deliver()
    run(third)
    assert [call["id"] for call in fake.called("spawn")] == [first, second, third]


def test_an_end_that_comes_with_the_spawn_wakes_the_next_one(create, fake):
    fake.script("quick")
    ids = [create("quick") for _ in range(3)]
    run(*reversed(ids))
    for pk in ids[1:]:
        assert is_due(pk)
        run(pk)
    assert states(*ids) == [("completed", "done")] * 3


def test_shells_and_devboxes_and_plain_commands_do_not_wait_for_each_other(create, account, fake):
    other_box = make_devbox(account, fake)
    ids = [create(shell="a"), create(shell="b"), create(shell=None), create(shell="a", box=other_box)]
    run(*ids)
    assert states(*ids) == [("running", "await_exit")] * 4
    assert row(ids[2]).shell_place is None
    assert ShellLine.objects.count() == 3


def test_one_that_is_stopped_before_its_turn_never_runs_and_the_others_go_on(create, fake):
    first, second, third = create(), create(), create()
    run(first, second, third)
    services.request_kill(second, group=False)
    run(second)
    done = row(second)
    assert (done.status, done.exit_status, done.reason["kind"]) == ("completed", 137, "asked")
    assert (done.kept, bytes(done.stdout)) == ("row", b"")
    assert second not in [call["id"] for call in fake.called("spawn") + fake.called("kill")]
    fake.finish(first)
    fake.deliver()
    run(third)
    assert states(third) == [("running", "await_exit")]


def test_stopping_the_one_that_runs_gives_the_turn_to_the_next(create, fake):
    first, second = create(), create()
    run(first, second)
    services.request_kill(first, group=True)
    run(first)
    assert row(first).exit_status == 137
    assert is_due(second)
    run(second)
    assert states(second) == [("running", "await_exit")]


def test_a_wake_that_was_lost_with_its_worker_is_made_up_for(create, fake, monkeypatch):
    first, second = create(), create()
    run(first, second)
    monkeypatch.setattr(shells, "next_in", lambda lines: [])  # it died after the commit
    fake.finish(first)
    fake.deliver()
    monkeypatch.undo()
    assert not is_due(second)
    assert row(second).wake_at < datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE executions_execution SET wake_at = now() - interval '3 s' WHERE id = %s", [second])
    (claimed,) = execution_flow.claim_due(10)
    execution_flow.advance(claimed)
    assert states(second) == [("running", "await_exit")]


def test_the_clock_of_its_start_begins_with_its_turn(create, fake):
    first, second = create(), create()
    run(first, second)
    fake.finish(first)
    fake.deliver()
    fake.fail("spawn", HostRefused("busy", "the shell is not free yet", host_id=fake.host_id))
    run(second)
    waiting = row(second)
    assert (waiting.status, waiting.step, waiting.attempts) == ("queued", "spawn", 1)
    assert waiting.deadline_at > datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=800)


def test_a_devbox_that_ends_ends_the_whole_line(create, devbox, fake):
    ids = [create() for _ in range(3)]
    run(*ids)
    assert not services.before_destroy(devbox)
    run(*ids)
    fake.deliver()
    assert services.before_destroy(devbox)
    assert {row(pk).exit_status for pk in ids} == {137}
    assert len(fake.called("spawn")) == 1


@pytest.mark.parametrize("by", ["report", "spawn"])
def test_what_happened_to_a_shell_is_in_the_log_once(create, devbox, fake, by):
    pk = create("exit 3")
    if by == "spawn":
        fake.hooks["spawn"] = lambda **call: fake.finish(pk, exit=3, notes=["shell main ended"])
        run(pk)
        fake.hooks.clear()
        with connection.cursor() as cursor:
            cursor.execute("UPDATE executions_execution SET wake_at = now() WHERE id = %s", [pk])
        run(pk)  # the look finds it ended
    else:
        run(pk)
        fake.finish(pk, exit=3, notes=["shell main ended"])
    fake.deliver()
    fake.deliver()
    assert row(pk).exit_status == 3
    entry = DevboxLog.objects.get(devbox_id=devbox)
    assert (entry.source, entry.shell_name, entry.execution_id, entry.message) == (
        "exec",
        "main",
        pk,
        "shell main ended",
    )
