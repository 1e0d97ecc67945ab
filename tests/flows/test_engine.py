"""The engine on a real PostgreSQL: one table of its own, every statement committed, threads where threads matter."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from django.db import OperationalError, connection, connections, models, transaction

from flows import engine, hints, leases, nudge
from flows.engine import Flow, Row, Settled
from flows.models import Durable
from flows.outcomes import DatabaseNow, Done, LeaseLost, Next, Outcome, Wait
from flows.statements import RELAXED, Alongside

pytestmark = pytest.mark.django_db(transaction=True)


class Job(Durable):
    """A durable row with a few columns of its own."""

    objects: ClassVar[models.Manager[Job]] = models.Manager()
    note = models.TextField(default="")
    facts = models.JSONField(default=dict)
    data = models.BinaryField(null=True)
    seen_at = models.DateTimeField(null=True)

    class Meta(Durable.Meta):
        app_label = "flows"


@dataclass(slots=True, kw_only=True)
class JobRow(Row):
    note: str
    facts: dict[str, Any]


@dataclass
class JobFlow(Flow[JobRow]):
    """Steps are given by each test."""

    steps: dict[str, Callable[[JobRow], Outcome]] = field(default_factory=dict)
    on_error: Callable[[Exception], Outcome | None] = lambda error: None
    when_expired: Callable[[JobRow], Outcome | None] = lambda row: None

    model = Job
    queue = "jobs"
    row = JobRow

    def on_exception(self, row: JobRow, error: Exception) -> Outcome | None:
        return self.on_error(error)

    def expired(self, row: JobRow) -> Outcome | None:
        return self.when_expired(row)

    def divert(self, row: JobRow) -> str | None:
        return "stop" if row.note == "stop" and row.step != "stop" else None


class Log(list[tuple[str, str]]):
    """What was published."""


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(nudge, "publish", lambda queue, task, pk: log.append(("nudge", pk)))
    monkeypatch.setattr(hints, "publish", lambda *ids: log.extend(("hint", pk) for pk in ids))
    return log


@pytest.fixture
def flow(published: Log) -> JobFlow:
    # The test database has the table when this module was imported before it was made.
    if Job._meta.db_table not in connection.introspection.table_names():
        with connection.schema_editor() as editor:
            editor.create_model(Job)
    return JobFlow()


def make(pk: str = "job_1", step: str = "first", **columns: Any) -> Job:
    return Job.objects.create(id=pk, step=step, **columns)


def read(pk: str = "job_1") -> Job:
    return Job.objects.get(pk=pk)


def past(pk: str = "job_1", *, column: str = "lease_until", seconds: float = 1) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE flows_job SET {column} = now() - make_interval(secs => %s) WHERE id = %s", [seconds, pk]
        )


def in_thread(function: Callable[[], Any]) -> Any:
    """Run on a thread with a connection of its own."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:
            result.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def test_claim_takes_a_due_row_with_its_columns(flow: JobFlow) -> None:
    make(note="hello", facts={"a": [1, None, "ü"]})
    row = flow.claim("job_1")
    assert row is not None
    assert (row.note, row.facts, row.step, row.attempts) == ("hello", {"a": [1, None, "ü"]}, "first", 0)
    assert read().lease == row.lease
    assert abs((row.now - row.step_since).total_seconds()) < 5


def test_claim_leaves_rows_that_sleep_are_done_or_taken(flow: JobFlow) -> None:
    make("job_sleeps")
    past("job_sleeps", column="wake_at", seconds=-60)
    make("job_done", wake_at=None)
    make("job_taken")
    assert flow.claim("job_taken") is not None
    assert [flow.claim(pk) for pk in ("job_sleeps", "job_done", "job_taken", "job_unknown")] == [None] * 4


def test_two_claimers_one_row(flow: JobFlow) -> None:
    """Both hold a transaction open over the claim: the second waits for the first and then finds the row taken."""
    make()
    together, won = threading.Barrier(2, timeout=10), []

    def claim() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        together.wait()
        won.append(flow.claim("job_1"))
        connections.close_all()

    threads = [threading.Thread(target=claim) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len([row for row in won if row is not None]) == 1 and len(won) == 2


def test_a_lapsed_lease_is_taken_over_and_counted(flow: JobFlow) -> None:
    make()
    first = flow.claim("job_1")
    assert first is not None
    past()
    second = flow.claim("job_1")
    assert second is not None
    assert second.attempts == 1
    assert second.fence > first.fence
    with pytest.raises(LeaseLost):
        flow.settle(first, Wait(0))
    flow.settle(second, Done())


def test_fences_rise_over_a_plain_count_and_over_the_clock(flow: JobFlow) -> None:
    """A restored row does not repeat a number; a number from the future is still exceeded."""
    make()
    row = flow.claim("job_1")
    assert row is not None and row.fence > 1_600_000_000_000_000
    flow.settle(row, Wait(0))
    fences = [row.fence]
    for fence in (0, 2**62):
        Job.objects.update(fence=fence)
        row = flow.claim("job_1")
        assert row is not None
        fences.append(row.fence)
        flow.settle(row, Wait(0))
    assert fences == sorted(set(fences)) and fences[-1] == 2**62 + 1


def test_settle_writes_what_was_learnt_once(flow: JobFlow, published: Log) -> None:
    make()
    row = flow.claim("job_1")
    assert row is not None
    learnt = {"note": "learnt", "facts": {"x": 1}, "data": b"\0\xff", "seen_at": DatabaseNow(5)}
    flow.settle(row, Wait(60, learnt, step="second"))
    job = read()
    assert (job.step, job.note, job.facts, bytes(job.data or b""), job.lease) == (
        "second",
        "learnt",
        {"x": 1},
        b"\0\xff",
        None,
    )
    assert job.seen_at is not None and job.wake_at is not None
    assert (job.wake_at - job.seen_at).total_seconds() == pytest.approx(55)
    assert ("hint", "job_1") in published
    with pytest.raises(LeaseLost):
        flow.settle(row, Wait(60, {"note": "twice"}))
    assert read().note == "learnt"


def test_an_end_is_committed_synchronously_whatever_follows_it(flow: JobFlow) -> None:
    learnt = flow.table.assign({"note": "on its way"})
    ended = flow.table.assign({"note": "over", "completed_at": DatabaseNow()})
    assert RELAXED in flow.table.settle_next(learnt, None)
    assert RELAXED not in flow.table.settle_next(ended, None)
    assert RELAXED not in flow.table.done(learnt, None)


def test_settle_asks_for_lease_and_fence(flow: JobFlow) -> None:
    make()
    row = flow.claim("job_1")
    assert row is not None
    row.fence -= 1
    with pytest.raises(LeaseLost):
        flow.settle(row, Done())
    row.fence += 1
    row.lease = "somebody"
    with pytest.raises(LeaseLost):
        flow.settle(row, Done())
    assert read().completed_at is None


def test_a_wake_during_a_step_is_not_lost(flow: JobFlow, published: Log) -> None:
    make()

    def first(row: JobRow) -> Outcome:
        assert flow.wake("job_1") == 1
        return Wait(3600)

    flow.steps = {"first": first}
    assert flow.run("job_1")
    assert published.count(("nudge", "job_1")) == 1, "the wake found it taken, so the settle nudges"
    assert flow.claim("job_1") is not None


def test_a_wake_ends_a_sleep_and_leaves_the_done_alone(flow: JobFlow, published: Log) -> None:
    make()
    make("job_done", wake_at=None)
    past(column="wake_at", seconds=-60)
    assert flow.wake("job_1", "job_done", "job_unknown") == 1
    assert published == [("nudge", "job_1")]
    assert flow.claim("job_1") is not None
    assert read("job_done").wake_at is None


def test_steps_run_in_place_under_one_lease_and_fence(flow: JobFlow) -> None:
    make()
    seen: list[tuple[str, int, str]] = []

    def note(row: JobRow, outcome: Outcome) -> Outcome:
        seen.append((row.step, row.fence, row.note))
        return outcome

    flow.steps = {
        "first": lambda row: note(row, Next("second", {"note": "one"})),
        "second": lambda row: note(row, Next("third", {"note": "two"})),
        "third": lambda row: note(row, Done({"note": "three"}, step="end")),
    }
    flow.run("job_1")
    assert [(step, text) for step, _, text in seen] == [("first", ""), ("second", "one"), ("third", "two")]
    assert len({fence for _, fence, _ in seen}) == 1
    job = read()
    assert (job.step, job.note, job.wake_at, job.lease) == ("end", "three", None, None)
    assert job.completed_at is not None


def test_an_endless_flow_gives_its_thread_back(flow: JobFlow, published: Log) -> None:
    make()
    flow.steps = {"first": lambda row: Next("first")}
    flow.run("job_1")
    assert read().lease is None and ("nudge", "job_1") in published
    assert read().error_code is None


def test_a_change_of_mind_diverts_before_the_next_step(flow: JobFlow) -> None:
    make()
    ran: list[str] = []

    def first(row: JobRow) -> Outcome:
        ran.append("first")
        Job.objects.filter(pk=row.id).update(note="stop")
        return Next("second")

    def stop(row: JobRow) -> Outcome:
        ran.append("stop")
        return Done()

    flow.steps = {"first": first, "stop": stop}
    flow.run("job_1")
    assert ran == ["first", "stop"]


def test_a_request_takes_the_row_from_its_holder(flow: JobFlow, published: Log) -> None:
    make()
    held = flow.claim("job_1")
    assert held is not None
    assert flow.request("job_1", {"note": "stop"})
    with pytest.raises(LeaseLost):
        flow.settle(held, Next("second"))
    again = flow.claim("job_1")
    assert again is not None and again.fence > held.fence and again.note == "stop"
    assert published == [("hint", "job_1"), ("nudge", "job_1")]
    assert not flow.request("job_1", {"note": "x"}, guard="note = %s", guard_params=("other",))
    flow.settle(again, Done())
    assert not flow.request("job_1", {"note": "late"})


def test_an_exception_is_booked_with_a_growing_pause(flow: JobFlow) -> None:
    make()

    def first(row: JobRow) -> Outcome:
        raise ValueError("the host said " + "x" * 5000)

    flow.steps = {"first": first}
    pauses = []
    for attempt in range(1, 5):
        assert flow.run("job_1")
        job = read()
        assert (job.attempts, job.error_code, job.lease) == (attempt, "ValueError", None)
        assert job.error_detail is not None and len(job.error_detail) == engine.DETAIL_LIMIT
        assert job.wake_at is not None
        with connection.cursor() as cursor:
            cursor.execute("SELECT extract(epoch from wake_at - now())::float FROM flows_job")
            pauses.append(cursor.fetchone()[0])
        past(column="wake_at")
    assert 0.1 < pauses[0] < 0.5 and pauses == sorted(pauses)
    Job.objects.update(attempts=1000)
    flow.run("job_1")
    with connection.cursor() as cursor:
        cursor.execute("SELECT wake_at - now() < interval '40 s' FROM flows_job")
        assert cursor.fetchone()[0]
    past(column="wake_at")
    flow.steps = {"first": lambda row: Wait(5)}
    flow.run("job_1")
    assert (read().attempts, read().error_code, read().error_detail) == (0, None, None)


def test_an_exception_may_mean_an_outcome(flow: JobFlow) -> None:
    make()

    def first(row: JobRow) -> Outcome:
        raise KeyError("full")

    flow.steps = {"first": first, "failed": lambda row: Done({"note": "it was full"}, step="failed")}
    flow.on_error = lambda error: Next("failed") if isinstance(error, KeyError) else None
    flow.run("job_1")
    assert (read().step, read().note) == ("failed", "it was full")


def test_only_the_deadline_fails_a_row(flow: JobFlow) -> None:
    make(attempts=100)
    ran: list[str] = []

    def first(row: JobRow) -> Outcome:
        ran.append("first")
        return Wait(60)

    flow.steps = {"first": first, "failed": lambda row: Done(step="failed")}
    flow.when_expired = lambda row: Next("failed", {"deadline_at": None})
    flow.run("job_1")
    assert ran == ["first"]
    past(column="wake_at")
    past(column="deadline_at")
    flow.run("job_1")
    assert read().step == "failed" and ran == ["first"]


def test_a_lost_lease_inside_a_step_is_silent(flow: JobFlow) -> None:
    make()

    def first(row: JobRow) -> Outcome:
        raise LeaseLost(row.id)

    flow.steps = {"first": first}
    assert flow.run("job_1")
    job = read()
    assert job.attempts == 0 and job.error_code is None and job.lease is not None


def test_a_lost_settle_is_replayed(flow: JobFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database goes away between the host's answer and the settle: the step runs again, and once more is enough."""
    make()
    hosts: list[int] = []

    def first(row: JobRow) -> Outcome:
        hosts.append(row.fence)
        return Done({"note": "booted"})

    flow.steps = {"first": first}
    real = flow.settle

    def broken(row: JobRow, outcome: Outcome) -> None:
        raise OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(flow, "settle", broken)
    assert flow.run("job_1")
    assert read().completed_at is None
    monkeypatch.setattr(flow, "settle", real)
    assert not flow.run("job_1"), "the dead worker's lease still stands"
    past()
    assert flow.run("job_1")
    assert len(hosts) == 2 and hosts[1] > hosts[0]
    assert read().note == "booted"


def test_also_is_true_together_with_the_settle_or_not_at_all(flow: JobFlow) -> None:
    make()
    make("job_other", wake_at=None)

    def reserve(answer: bool) -> Callable[[Any], bool]:
        def also(cursor: Any) -> bool:
            cursor.execute("UPDATE flows_job SET note = 'reserved' WHERE id = 'job_other'")
            return answer

        return also

    flow.steps = {"first": lambda row: Wait(9, {"note": "placed"}, also=reserve(False), step="second")}
    flow.run("job_1")
    job = read()
    assert (job.step, job.note, job.error_code, job.attempts) == ("first", "", "refused", 1)
    assert read("job_other").note == ""
    past(column="wake_at")
    flow.steps = {"first": lambda row: Wait(9, {"note": "placed"}, also=reserve(True), step="second")}
    flow.run("job_1")
    assert (read().step, read().note, read("job_other").note) == ("second", "placed", "reserved")


def test_also_does_not_run_when_the_lease_is_lost(flow: JobFlow) -> None:
    make()
    row = flow.claim("job_1")
    assert row is not None
    flow.request("job_1", {})
    called: set[int] = set()
    with pytest.raises(LeaseLost):
        flow.settle(row, Next("second", also=lambda cursor: bool(called.add(1))))  # type: ignore[func-returns-value]
    assert called == set()


def test_an_outcome_that_cannot_be_written_is_a_retry(flow: JobFlow) -> None:
    make()
    flow.steps = {"first": lambda row: Done({"note": None})}
    flow.run("job_1")
    assert (read().error_code, read().completed_at) == ("IntegrityError", None)


@pytest.mark.parametrize("outcome", [Wait(5, step="second"), Done(step="second"), Next("second")])
def test_a_statement_alongside_is_part_of_the_settle(flow: JobFlow, outcome: Outcome) -> None:
    make()
    beside = Alongside(
        "UPDATE flows_job SET note = %s FROM settled WHERE flows_job.id = 'job_b_' || settled.id", ("hi",)
    )
    make("job_b_job_1", wake_at=None)
    flow.settled = lambda row, step, outcome: Settled({"note": step}, beside)  # type: ignore[method-assign]
    row = flow.claim("job_1")
    assert row is not None
    flow.settle(row, outcome)
    assert (read().note, read("job_b_job_1").note) == ("second", "hi")
    Job.objects.filter(pk="job_b_job_1").update(note="")
    row.lease = "nobody"
    with pytest.raises(LeaseLost):
        flow.settle(row, outcome)
    assert read("job_b_job_1").note == ""


def test_claim_due_takes_the_overdue_and_lapsed_oldest_first(flow: JobFlow) -> None:
    for name, seconds in (("job_a", 50), ("job_b", 70), ("job_c", 60), ("job_fresh", 0.5)):
        make(name)
        past(name, column="wake_at", seconds=seconds)
    make("job_later")
    past("job_later", column="wake_at", seconds=-60)
    make("job_dead")
    flow.claim("job_dead")
    past("job_dead", column="wake_at", seconds=100)
    make("job_held")
    flow.claim("job_held")
    past("job_held", column="wake_at", seconds=100)
    past("job_dead")
    taken = flow.claim_due(3, overdue_seconds=2)
    assert {row.id for row in taken} == {"job_dead", "job_b", "job_c"}
    assert {row.attempts for row in taken} == {0, 1}
    assert [row.id for row in flow.claim_due(10, overdue_seconds=2)] == ["job_a"]
    flow.settle(taken[0], Done())


def test_claim_due_skips_rows_that_another_session_is_claiming(flow: JobFlow) -> None:
    for name in ("job_a", "job_b"):
        make(name)
        past(name, column="wake_at", seconds=60)
    with transaction.atomic():
        mine = flow.claim_due(1)
        others = in_thread(lambda: [row.id for row in flow.claim_due(5)])
    assert sorted([*(row.id for row in mine), *others]) == ["job_a", "job_b"]


def test_finish_completes_a_batch_whoever_holds_it(flow: JobFlow, published: Log) -> None:
    for name in ("job_a", "job_b", "job_c"):
        make(name)
    held = flow.claim("job_a")
    assert held is not None
    Job.objects.filter(pk="job_c").update(completed_at=held.now)
    entries: dict[str, dict[str, Any]] = {
        pk: {"note": f"end {pk}", "facts": {"code": n}, "data": b"\0x"} for n, pk in enumerate(("job_a", "job_b"))
    }
    entries["job_c"] = {"note": "late", "facts": {}, "data": None}
    assert sorted(flow.finish(entries)) == ["job_a", "job_b"]
    job = read("job_a")
    assert (job.step, job.note, job.facts, bytes(job.data or b""), job.wake_at) == (
        "done",
        "end job_a",
        {"code": 0},
        b"\0x",
        None,
    )
    assert read("job_c").note == ""
    with pytest.raises(LeaseLost):
        flow.settle(held, Wait(1))
    assert flow.finish(entries) == []
    assert {pk for kind, pk in published if kind == "hint"} == {"job_a", "job_b"}


def test_renewal_keeps_a_lease_and_tells_a_step_that_lost_it(flow: JobFlow) -> None:
    make("job_kept")
    make("job_lost")
    kept, lost = flow.claim("job_kept"), flow.claim("job_lost")
    assert kept is not None and lost is not None
    with leases.held(flow, kept), leases.held(flow, lost):
        with connection.cursor() as cursor:
            cursor.execute("UPDATE flows_job SET lease_until = now() + interval '1 s'")
        flow.request("job_lost", {})
        assert leases.renew_once() == 1
    kept.check()
    with pytest.raises(LeaseLost):
        lost.check()
    with connection.cursor() as cursor:
        cursor.execute("SELECT lease_until > now() + interval '8 s' FROM flows_job WHERE id = 'job_kept'")
        assert cursor.fetchone()[0]
    assert leases.renew_once() == 0, "nothing is held any more"


def test_a_step_that_hangs_loses_its_lease_in_the_end(flow: JobFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    row = flow.claim("job_1")
    assert row is not None
    monkeypatch.setattr(leases, "HOLD_LIMIT_SECONDS", 0.0)
    before = read().lease_until
    with leases.held(flow, row):
        time.sleep(0.01)
        assert leases.renew_once() == 0
    assert read().lease_until == before


def test_wakes_and_nudges_wait_for_the_commit(flow: JobFlow, published: Log) -> None:
    make()
    with transaction.atomic():
        flow.wake("job_1")
        assert published == []
    assert published == [("nudge", "job_1")]


def test_a_broken_connection_is_dropped_and_dialled_again(flow: JobFlow) -> None:
    make()

    def scenario() -> tuple[bool, bool]:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            pid = cursor.fetchone()[0]
        in_thread(lambda: _terminate(pid))
        with pytest.raises(OperationalError):
            flow.claim("job_1")
        return flow.claim("job_1") is not None, connection.connection is not None

    assert in_thread(scenario) == (True, True)


def _terminate(pid: int) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_terminate_backend(%s)", [pid])
    time.sleep(0.1)
