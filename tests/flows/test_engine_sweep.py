"""The sweep: overdue rows are done by it, as many at once as it has threads, on time where it was told; and a real
Celery worker with its broker away and back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import OperationalError, connection, connections

from api.ids import new_id
from flows import engine, nudge
from flows.outcomes import Done, Outcome, Wait
from flows.sweep import Sweep
from tests.flows.test_engine import Job, JobFlow, JobRow, flow, make, past, published, read
from tests.servers import Redis

__all__ = ["flow", "published"]  # fixtures

pytestmark = pytest.mark.django_db(transaction=True)


def until(happened: Callable[[], bool], within: float = 15.0) -> float:
    """Wait for it; how long it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def sweep(flow: JobFlow, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweep]:
    monkeypatch.setattr(engine, "_flows", {"jobs": flow})
    made = Sweep(["jobs"], threads=3)
    yield made
    made.stop()
    # Its threads' connections would keep the test database from being dropped.
    until(lambda: not any(thread.name.startswith("sweep") for thread in threading.enumerate()))
    _drop_other_sessions()


def _drop_other_sessions() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_overdue_rows_are_done_and_fresh_ones_left_to_their_nudge(flow: JobFlow, sweep: Sweep) -> None:
    flow.steps = {"first": lambda row: Done()}
    for number in range(2):
        make(f"job_{number}")
        past(f"job_{number}", column="wake_at", seconds=3)
    make("job_fresh")
    assert sweep.sweep_once() == 2
    until(lambda: Job.objects.filter(completed_at__isnull=False).count() == 2)
    assert read("job_fresh").completed_at is None


def test_no_more_is_claimed_than_there_are_threads(flow: JobFlow, sweep: Sweep) -> None:
    gate, running = threading.Event(), []

    def first(row: JobRow) -> Outcome:
        running.append(row.id)
        gate.wait(10)
        return Done()

    flow.steps = {"first": first}
    for number in range(5):
        make(f"job_{number}")
        past(f"job_{number}", column="wake_at", seconds=3)
    assert sweep.sweep_once() == 3
    until(lambda: len(running) == 3)
    assert sweep.sweep_once() == 0
    assert Job.objects.filter(lease=None).count() == 2, "what it cannot do now stays free for others"
    gate.set()
    until(lambda: Job.objects.filter(completed_at__isnull=False).count() == 3)
    assert sweep.sweep_once() == 2


def test_a_step_that_raises_costs_no_thread(flow: JobFlow, sweep: Sweep) -> None:
    def first(row: JobRow) -> Outcome:
        raise RuntimeError

    flow.steps = {"first": first}
    for _ in range(3):
        for number in range(3):
            Job.objects.filter(pk=f"job_{number}").delete()
            make(f"job_{number}")
            past(f"job_{number}", column="wake_at", seconds=3)
        assert sweep.sweep_once() == 3
        until(lambda: Job.objects.filter(attempts=1).count() == 3)
        until(lambda: sweep._free._value == 3)


def test_a_row_put_to_sleep_here_runs_on_time(flow: JobFlow, sweep: Sweep) -> None:
    woken: list[float] = []

    def first(row: JobRow) -> Outcome:
        woken.append(time.monotonic())
        return Wait(0.3) if len(woken) < 3 else Done()

    flow.steps = {"first": first}
    sweep.start()
    make()
    flow.run("job_1")
    until(lambda: read().completed_at is not None, 5)
    # Never early; and two seconds late would have been the ordinary sweep of overdue rows, not the reminder.
    assert all(0.25 < later - earlier < 2 for earlier, later in itertools.pairwise(woken))


def test_the_sweep_survives_the_loss_of_the_database(
    flow: JobFlow, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow.steps = {"first": lambda row: Done()}
    real, failures = flow.claim_due, iter([True, True])

    def claim_due(limit: int, overdue_seconds: float = 2.0) -> list[JobRow]:
        if next(failures, False):
            raise OperationalError("the server went away")
        return real(limit, overdue_seconds)

    monkeypatch.setattr(flow, "claim_due", claim_due)
    monkeypatch.setattr("flows.sweep.EVERY_SECONDS", 0.05)
    make()
    past(column="wake_at", seconds=3)
    sweep.start()
    until(lambda: read().completed_at is not None, 5)


# --- a real worker ---


def over(count: int) -> list[str]:
    """Devboxes that have only to be recognised as gone: the shortest work that needs no host."""
    from accounts.services import create_account
    from devboxes.models import Devbox

    account = create_account("w")
    size = {"cpu_millis": 1, "memory_mb": 1, "disk_mb": 1, "keep_alive_seconds": 1}
    ids = [new_id("dbx") for _ in range(count)]
    for pk in ids:
        Devbox.objects.create(id=pk, account_id=account.pk, step="teardown", status="shutdown", **size)
    return ids


def left(ids: list[str]) -> int:
    from devboxes.models import Devbox

    return Devbox.objects.filter(pk__in=ids, completed_at=None).count()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start `celery -A config worker -Q devboxes` against the test's database and a Redis."""
    started: list[subprocess.Popen[bytes]] = []
    database = connection.settings_dict
    url = f"postgresql://{database['USER']}@/{database['NAME']}?host={database['HOST']}&port={database['PORT'] or 5432}"

    def start(redis_url: str) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "DATABASE_URL": url,
            "REDIS_URL": redis_url,
            "BERTH_SEAL_KEYS": django_settings.SEAL_KEYS[0],
            "BERTH_SECRET_KEY": "for tests",
        }
        with open(tmp_path / "worker.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "config", "worker", "-Q", "devboxes", "-c", "4"],
                env=env,
                stdout=log,
                stderr=log,
                cwd=django_settings.PROJECT,
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        print((tmp_path / "worker.log").read_text()[-5000:])
        _drop_other_sessions()
        connections.close_all()


def test_a_worker_does_everything_without_its_broker_and_consumes_once_it_is_there(
    worker: Callable[[str], Any], redis_server: Redis, settings: Any
) -> None:
    redis_server.stop()
    settings.REDIS_URL = redis_server.url
    nudge.broker.reset()
    try:
        ids = over(30)
        process = worker(redis_server.url)
        until(lambda: left(ids) == 0, 30)
        redis_server.start()

        def nudged() -> bool:
            """A devbox is over sooner after its nudge than the sweep would find it."""
            more = over(1)
            assert nudge.publish("devboxes", "devboxes.advance", more[0])
            until(lambda: left(more) == 0, 15)
            from devboxes.models import Devbox

            devbox = Devbox.objects.get(pk=more[0])
            assert devbox.completed_at is not None
            return (devbox.completed_at - devbox.created_at).total_seconds() < 1

        until(nudged, 40)
        # Its messages wiped, the row is still found.
        ids = over(5)
        until(lambda: left(ids) == 0, 10)
        redis_server.stop(kill=True)
        ids = over(5)
        until(lambda: left(ids) == 0, 10)
        redis_server.start()
        nudge.broker.reset()
        until(nudged, 40)
        assert process.poll() is None
    finally:
        nudge.broker.reset()
        if redis_server.process is None:
            redis_server.start()
