"""The flow of a command: each step's outcome and host calls, replays, races, and what the host's answers mean."""

import datetime
import time

import pytest
from django.db import connection

from api.callers import Caller
from api.ids import new_id
from executions import services
from executions.execution_flow import execution_flow
from executions.models import Execution
from flows.engine import Flow
from hosts import registry
from hosts.client import HostRefused
from hosts.registry import ExitEvent
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
    def create(command="sleep 1000", **rest):
        new = services.NewExecution(operation="execute_async", command=command, **rest)
        return services.create_execution(Caller(account_id=account), devbox, new)

    return create


def due(pk, seconds=0):
    """Let time pass: the row is due, and an old lease has lapsed."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE executions_execution SET wake_at = now(), lease_until = now() - interval '1 s', "
            "step_since = step_since - make_interval(secs => %s), "
            "deadline_at = deadline_at - make_interval(secs => %s) "
            "WHERE id = %s AND wake_at IS NOT NULL",
            [seconds, seconds, pk],
        )


def run(pk, seconds=0):
    due(pk, seconds)
    execution_flow.run(pk)
    return row(pk)


def row(pk):
    return Execution.objects.get(pk=pk)


def event(pk, devbox, fake, **columns):
    values = {
        "host_id": fake.host_id,
        "box": devbox,
        "id": pk,
        "exit": 0,
        "reason": None,
        "out_size": 2,
        "err_size": 0,
        "out_dropped": 0,
        "err_dropped": 0,
        "stdout": b"ok",
        "stderr": b"",
        "started_at_ms": 1_700_000_000_000,
        "exited_at_ms": 1_700_000_001_500,
    }
    return ExitEvent(**{**values, **columns})


# --- the usual way ---


def test_a_long_command_is_spawned_once_and_waited_for(create, fake, devbox):
    pk = create()
    assert (row(pk).status, row(pk).step) == ("queued", "spawn")
    first = run(pk)
    assert (first.status, first.step, first.lease, first.deadline_at) == ("running", "await_exit", None, None)
    assert first.started_at is not None
    assert first.wake_at > datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    assert run(pk).step == "await_exit"
    assert [verb for verb, _ in fake.calls] == ["spawn", "state"]
    fake.finish(pk, exit=7, stdout=b"out", stderr=b"err")
    assert fake.deliver() == [(devbox, pk)]
    done = row(pk)
    assert (done.status, done.step, done.exit_status, done.kept) == ("completed", "done", 7, "row")
    assert (bytes(done.stdout), bytes(done.stderr), done.out_size, done.err_size) == (b"out", b"err", 3, 3)
    assert (done.wake_at, done.lease, done.reason) == (None, None, None)
    assert done.completed_at is not None


def test_a_quick_command_is_completed_by_the_spawn_itself(create, fake):
    fake.script("true", exit=1, stdout=b"x")
    done = run(create("true"))
    assert (done.status, done.step, done.exit_status, bytes(done.stdout)) == ("completed", "done", 1, b"x")
    assert done.exited_at is not None
    fake.deliver()
    assert not fake.unacked


def test_an_exit_that_nobody_reported_is_found_by_looking(create, fake):
    pk = create()
    run(pk)
    fake.finish(pk, exit=9)
    assert run(pk).exit_status == 9


# --- replays and races ---


@pytest.fixture
def lost_settle(monkeypatch):
    """The next settle never reaches the database: the worker died before it."""
    real = Flow.settle
    state = {"armed": False}

    def settle(self, row, outcome):
        if state["armed"]:
            state["armed"] = False
            from flows.outcomes import LeaseLost

            raise LeaseLost(row.id)
        real(self, row, outcome)

    monkeypatch.setattr(Flow, "settle", settle)

    def arm():
        state["armed"] = True

    return arm


def test_a_spawn_whose_settle_was_lost_starts_nothing_twice(create, fake, devbox, lost_settle):
    pk = create()
    lost_settle()
    assert run(pk).step == "spawn"
    assert run(pk).step == "await_exit"
    assert len(fake.called("spawn")) == 2
    assert list(fake.boxes[devbox].executions) == [pk]
    fences = [call["fence"] for call in fake.called("spawn")]
    assert fences[0] < fences[1]


def test_a_spawn_whose_answer_was_lost_starts_nothing_twice(create, fake, devbox):
    pk = create()
    fake.fail("spawn", after=True)
    waiting = run(pk)
    assert (waiting.step, waiting.attempts, waiting.error_code) == ("spawn", 1, "HostUnreachable")
    assert run(pk).step == "await_exit"
    assert list(fake.boxes[devbox].executions) == [pk]


def test_the_end_beats_the_settle_of_the_spawn(create, fake, devbox):
    pk = create()
    fake.hooks["spawn"] = lambda **_: (fake.finish(pk, exit=4, stdout=b"quick"), fake.deliver())
    done = run(pk)
    assert (done.status, done.step, done.exit_status, bytes(done.stdout)) == ("completed", "done", 4, b"quick")
    assert (done.lease, done.wake_at) == (None, None)
    # Neither a late nudge nor the sweep moves it again.
    assert execution_flow.run(pk) is False


def test_an_end_told_twice_changes_nothing(create, fake, devbox):
    pk = create()
    run(pk)
    assert services.finish_executions([event(pk, devbox, fake, exit=3)]) == [pk]
    before = row(pk)
    assert services.finish_executions([event(pk, devbox, fake, exit=5), event(pk, devbox, fake, exit=6)]) == [pk]
    after = row(pk)
    assert (after.exit_status, after.completed_at) == (3, before.completed_at)
    assert after.started_at.timestamp() == 1_700_000_000
    assert after.exited_at.timestamp() == 1_700_000_001.5


def test_an_end_of_an_unknown_execution_is_acknowledged(fake, devbox):
    stranger = new_id("exe")
    assert services.finish_executions([event(stranger, devbox, fake)]) == [stranger]
    assert services.finish_executions([]) == []


def test_an_end_from_another_host_is_not_believed(create, fake, devbox, caplog):
    pk, other = create(), make_host("other")
    run(pk)
    before = Execution.objects.values().get(pk=pk)
    lie = event(pk, devbox, other, exit=0, stdout=b"forged")
    assert services.finish_executions([lie]) == [pk]
    assert Execution.objects.values().get(pk=pk) == before
    (told,) = [record.getMessage() for record in caplog.records if "not believed" in record.getMessage()]
    assert pk in told and fake.host_id in told and other.host_id in told
    fake.finish(pk, exit=4)
    fake.deliver()
    assert row(pk).exit_status == 4


def test_an_end_from_another_box_is_not_believed(create, account, fake):
    pk = create()
    run(pk)
    other = make_devbox(account, fake)
    services.finish_executions([event(pk, other, fake)])
    assert row(pk).status == "running"


def test_a_batch_of_ends_is_one_statement(create, fake, devbox):
    ids = [create() for _ in range(5)]
    for pk in ids:
        run(pk)
    events = [event(pk, devbox, fake, exit=n) for n, pk in enumerate(ids)]
    with connection.execute_wrapper(count := Counter()):
        services.finish_executions(events)
    assert count.calls == 0  # none but the prepared one
    assert [row(pk).exit_status for pk in ids] == [0, 1, 2, 3, 4]


class Counter:
    """Counts what goes through Django's cursors."""

    def __init__(self):
        self.calls = 0

    def __call__(self, execute, sql, params, many, context):
        self.calls += 1
        return execute(sql, params, many, context)


def test_an_end_before_the_spawn_was_acknowledged_is_taken(create, fake, devbox):
    pk = create()
    services.finish_executions([event(pk, devbox, fake, exit=2)])
    assert row(pk).exit_status == 2
    assert execution_flow.run(pk) is False
    assert fake.calls == []


# --- stopping ---


def test_kill_before_spawn_buries_it(create, fake, devbox):
    pk = create()
    services.request_kill(pk, group=False)
    done = run(pk)
    assert (done.status, done.exit_status, done.reason["kind"]) == ("completed", 137, "asked")
    assert [verb for verb, _ in fake.calls] == ["kill"]
    # A spawn that was on its way finds the grave.
    late = fake.spawn(box=devbox, id=pk, fence=fake.fences[pk], body={"command": "x"})
    assert (late["state"], late["exit"]) == ("exited", 137)


def test_kill_during_a_spawn_in_flight(create, fake, devbox):
    pk = create()
    fake.hooks["spawn"] = lambda **_: services.request_kill(pk, group=True)
    between = run(pk)
    assert (between.step, between.lease) == ("spawn", None)  # the worker that spawned has lost it
    done = run(pk)
    assert (done.exit_status, done.step, done.reason["kind"]) == (137, "done", "asked")
    assert fake.called("kill")[0]["fence"] > fake.called("spawn")[0]["fence"]


def test_kill_of_one_that_will_not_die_is_asked_again(create, fake):
    pk = create()
    run(pk)
    services.request_kill(pk, group=False)
    stubborn = fake.kill
    fake.kill = lambda **arguments: {"id": pk, "state": "running", "sizes": [0, 0], "started_at_ms": 1}
    assert (run(pk).step, row(pk).status) == ("kill", "running")
    assert run(pk).step == "kill"
    fake.kill = stubborn
    assert run(pk).exit_status == 137


def test_a_command_that_ended_well_before_its_kill_keeps_its_own_end(create, fake):
    pk = create()
    run(pk)
    services.request_kill(pk, group=False)
    fake.finish(pk, exit=0, stdout=b"made it")
    fake.deliver()
    assert (row(pk).exit_status, row(pk).reason) == (0, None)


def test_kill_of_a_completed_one_changes_nothing(create, fake):
    fake.script("true")
    pk = create("true")
    run(pk)
    fence = row(pk).fence
    services.request_kill(pk, group=False)
    assert (row(pk).stop_why, row(pk).fence, row(pk).wake_at) == (None, fence, None)


def test_a_stale_worker_frees_the_row_and_starts_nothing(create, fake, devbox):
    pk = create()
    fake.fences[pk] = 2**60
    left = run(pk)
    assert (left.step, left.lease, left.error_code, left.attempts) == ("spawn", None, "stale_fence", 1)
    assert fake.boxes[devbox].executions == {}


# --- hosts that do not answer, refuse or have lost it ---


def test_a_silent_host_is_waited_for(create, fake):
    pk = create()
    fake.unreachable = True
    for attempt in (1, 2, 3):
        waiting = run(pk)
        assert (waiting.status, waiting.step, waiting.attempts) == ("queued", "spawn", attempt)
    fake.unreachable = False
    assert run(pk).step == "await_exit"
    fake.unreachable = True
    assert run(pk).status == "running"


def test_a_start_has_a_deadline_and_a_running_command_none(create, fake):
    pk = create()
    fake.unreachable = True
    run(pk)
    done = run(pk, seconds=services.START_WITHIN_SECONDS + 1)
    assert (done.status, done.exit_status, done.reason["kind"]) == ("completed", -1, "lost")
    assert "nothing answers" in done.reason["detail"]
    fake.unreachable = False
    other = create()
    run(other)
    assert run(other, seconds=10 * services.START_WITHIN_SECONDS).status == "running"


def test_a_stop_of_one_that_never_started_ends_with_its_deadline(create, fake):
    pk = create()
    services.request_kill(pk, group=False)
    fake.unreachable = True
    assert run(pk).status == "queued"
    done = run(pk, seconds=services.START_WITHIN_SECONDS + 1)
    assert (done.status, done.exit_status, done.reason["kind"]) == ("completed", 137, "asked")


def test_an_execution_the_host_has_never_heard_of_is_lost(create, fake, devbox):
    pk = create()
    run(pk)
    fake.boxes[devbox].executions.clear()
    done = run(pk)
    assert (done.status, done.exit_status, done.reason["kind"], done.kept) == ("completed", -1, "lost", "nowhere")


def test_a_lost_one_that_the_host_concludes(create, fake, devbox):
    pk = create()
    run(pk)
    services.finish_executions(
        [event(pk, devbox, fake, exit=-1, reason={"kind": "lost", "detail": "reboot"}, stdout=None, stderr=None)]
    )
    done = row(pk)
    assert (done.exit_status, done.step, done.kept, done.wake_at) == (-1, "done", "nowhere", None)
    assert done.reason == {"kind": "lost", "detail": "reboot"}


def test_a_verdict_of_lost_stands(create, fake, devbox):
    pk = create()
    run(pk)
    services.finish_executions([event(pk, devbox, fake, exit=-1, reason={"kind": "lost"}, stdout=None, stderr=None)])
    services.finish_executions([event(pk, devbox, fake, exit=0)])
    assert row(pk).exit_status == -1


@pytest.mark.parametrize("code", ["bad_request", "too_large"])
def test_a_command_that_the_host_cannot_take_ends(create, fake, code):
    pk = create()
    fake.fail("spawn", HostRefused(code, "the environment is too large"))
    done = run(pk)
    assert (done.exit_status, done.reason["kind"]) == (-1, "exec_failed")
    assert "too large" in done.reason["detail"]


@pytest.mark.parametrize("code", ["busy", "not_ready", "internal", "no_space"])
def test_a_host_that_says_not_now_is_asked_again(create, fake, code):
    pk = create()
    fake.fail("spawn", HostRefused(code, "later"))
    assert run(pk).step == "spawn"
    assert run(pk).step == "await_exit"


def test_a_box_that_is_gone_from_under_a_running_devbox_is_not_believed_at_once(create, fake):
    pk = create()
    fake.fail("spawn", HostRefused("unknown_box", "no such box"))
    assert run(pk).step == "spawn"
    assert run(pk).step == "await_exit"
    other = create()
    fake.fail("spawn", HostRefused("unknown_box", "no such box"), times=10)
    for _ in range(5):
        last = run(other)
    assert (last.status, last.exit_status) == ("completed", -1)


@pytest.mark.parametrize(
    ("status", "step", "exit_status", "kind"),
    [("shutdown", "gone", 137, "devbox_ended"), ("failure", "failed", -1, "lost")],
)
@pytest.mark.parametrize("started", [True, False])
def test_a_box_that_is_gone_with_its_devbox_ends_it(create, fake, devbox, status, step, exit_status, kind, started):
    from devboxes.models import Devbox

    pk = create()
    if started:
        run(pk)
    Devbox.objects.filter(pk=devbox).update(status=status, step=step)
    fake.destroy(box=devbox, fence=2)
    done = run(pk)
    assert (done.status, done.exit_status, done.reason["kind"]) == ("completed", exit_status, kind)
    assert done.kept == ("nowhere" if started else "row")


# --- what is expected, and the end of the devbox ---


def test_only_acknowledged_running_ones_are_expected_on_their_host(create, fake, devbox):
    queued, running, ended = create(), create(), create()
    run(running)
    run(ended)
    fake.finish(ended)
    fake.deliver()
    assert [(e.id, e.box) for e in services.expected_on_host(fake.host_id)] == [(running, devbox)]
    assert services.expected_on_host("hst_other") == []
    assert row(queued).step == "spawn"


def test_what_is_completed_or_unknown_must_not_run(create, fake):
    queued, running, ended = create(), create(), create()
    run(running)
    run(ended)
    fake.finish(ended)
    fake.deliver()
    stranger = new_id("exe")
    ahead = 2**61  # a fence that was raised while the database's clock was ahead
    Execution.objects.filter(pk=ended).update(fence=ahead)
    before = time.time_ns() // 1000
    over = services.over([queued, ended, stranger, running])
    assert set(over) == {ended, stranger} and over[ended] == ahead + 1
    assert abs(over[stranger] - before) < 60_000_000
    assert services.over([]) == {}


def test_an_insert_that_ran_twice_over_a_broken_connection_is_found_by_its_id(create, monkeypatch):
    ids = iter([new_id("exe")] * 2)
    monkeypatch.setattr(services, "new_id", lambda prefix: next(ids))
    assert create() == create()
    assert Execution.objects.count() == 1


def test_a_devbox_on_its_way_down_stops_its_commands_first(create, fake, devbox):
    running, queued, killed = create(), create(), create()
    run(running)
    run(killed)
    services.request_kill(killed, group=False)
    assert registry.kind_of(running).before_destroy(devbox) is False
    assert services.before_destroy(devbox) is False
    for pk in (running, queued, killed):
        run(pk)
    fake.deliver()
    assert services.before_destroy(devbox) is True
    assert [row(pk).exit_status for pk in (running, queued, killed)] == [137] * 3
    assert row(running).reason["kind"] == "devbox_ending"
    assert row(killed).reason["kind"] == "asked"
    assert bytes(row(running).stdout) == b""


def test_what_is_left_when_the_box_is_gone_is_closed(create, fake, devbox):
    running, done, queued = create(), create(), create()
    run(running)
    run(done)
    fake.finish(done, exit=3)
    fake.deliver()
    services.after_destroy(devbox, "api_shutdown")
    services.after_destroy(devbox, "api_shutdown")
    closed = row(running)
    assert (closed.status, closed.exit_status, closed.kept, closed.wake_at) == ("completed", 137, "nowhere", None)
    assert closed.reason == {"kind": "devbox_ended", "detail": "api_shutdown"}
    assert (row(done).exit_status, row(done).kept) == (3, "row")
    assert (row(queued).exit_status, row(queued).kept) == (137, "row")


def test_a_devbox_that_failed_loses_its_commands(create, devbox):
    pk = create()
    services.after_destroy(devbox, "health_check_failed")
    assert row(pk).exit_status == -1
