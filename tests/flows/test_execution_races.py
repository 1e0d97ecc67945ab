"""Commands under real concurrency: several connections, real commits."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection

from accounts.models import Account
from api.callers import Caller
from api.errors import TooManyRequests
from executions import services
from executions.execution_flow import execution_flow
from executions.models import Execution
from tests.execution_world import make_devbox, make_host

pytestmark = pytest.mark.django_db(transaction=True)

THREADS = 8


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


def at_once(functions):
    """Run them on threads that start together; their results or exceptions."""
    ready = threading.Barrier(len(functions))

    def run(function):
        try:
            connection.ensure_connection()
            ready.wait(10)
            return function()
        except Exception as error:
            return error
        finally:
            connection.close()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def create(account, devbox, **values):
    new = services.NewExecution(**{"operation": "execute", "command": "sleep 1000", **values})
    return services.create_execution(Caller(account_id=account), devbox, new)


@pytest.mark.parametrize("identity", [{"command_id": "same"}, {"request_id": "same"}])
def test_the_same_request_many_times_at_once_is_one_execution(account, devbox, identity):
    found = at_once([lambda: create(account, devbox, **identity)] * THREADS)
    assert len(set(found)) == 1, found
    assert Execution.objects.count() == 1


@pytest.mark.parametrize(("cap", "before"), [(10, 0), (services.CAP_MARGIN + 60, 50)])
def test_the_cap_on_commands_at_once_is_exact(account, devbox, cap, before):
    """Fifty threads, each asking until it is refused: with a small cap, and over the step from no lock to the lock."""
    Account.objects.filter(pk=account).update(max_executions_at_once=cap)
    most = []

    def fill():
        while True:
            try:
                create(account, devbox)
            except TooManyRequests:
                return
            most.append(Execution.objects.filter(completed_at=None).count())

    for _ in range(before):
        create(account, devbox)
    found = at_once([fill] * 50)
    assert found == [None] * 50, found
    assert max(most) == cap == Execution.objects.filter(account_id=account, completed_at=None).count()
    # A place that is given back is taken once.
    Execution.objects.filter(pk=Execution.objects.first().pk).update(
        status="completed", exit_status=0, completed_at=datetime.datetime.now(datetime.UTC)
    )
    found = at_once([lambda: create(account, devbox)] * 20)
    assert sum(isinstance(one, str) for one in found) == 1, found


def test_workers_that_are_nudged_at_once_spawn_once(account, devbox, fake):
    pk = create(account, devbox)
    ran = at_once([lambda: execution_flow.run(pk)] * THREADS)
    assert ran.count(True) == 1, ran
    assert len(fake.called("spawn")) == 1
    assert Execution.objects.get().status == "running"


def test_the_end_and_the_settle_of_the_spawn_at_once(account, devbox, fake):
    for n in range(15):
        pk = create(account, devbox)
        spawned = threading.Event()
        fake.hooks["spawn"] = lambda spawned=spawned, **_: spawned.set()

        def end(pk=pk, spawned=spawned, n=n):
            spawned.wait(10)
            fake.finish(pk, exit=n, stdout=b"out")
            return fake.deliver()

        results = at_once([lambda pk=pk: execution_flow.run(pk), end])
        assert not [one for one in results if isinstance(one, Exception)], results
        row = Execution.objects.get(pk=pk)
        assert (row.status, row.step, row.exit_status, row.lease, row.wake_at) == ("completed", "done", n, None, None)


def test_a_stop_and_the_spawn_at_once(account, devbox, fake):
    for _ in range(15):
        pk = create(account, devbox)
        results = at_once([lambda pk=pk: execution_flow.run(pk), lambda pk=pk: services.request_kill(pk, group=False)])
        assert not [one for one in results if isinstance(one, Exception)], results
        execution_flow.run(pk)
        fake.deliver()
        row = Execution.objects.get(pk=pk)
        assert (row.status, row.exit_status, row.reason["kind"]) == ("completed", 137, "asked")
        assert fake.boxes[devbox].executions[pk].state == "exited"


def test_ends_of_one_batch_told_by_two_watchers_at_once(account, devbox, fake):
    ids = [create(account, devbox) for _ in range(20)]
    for pk in ids:
        execution_flow.run(pk)
        fake.finish(pk, exit=1)
    results = at_once([fake.deliver] * 4)
    assert not [one for one in results if isinstance(one, Exception)], results
    assert Execution.objects.filter(status="completed", exit_status=1).count() == len(ids)


def test_places_in_a_line_are_given_out_once_and_only_one_runs(account, devbox, fake):
    def fill():
        return [create(account, devbox, shell_name="main") for _ in range(5)]

    found = at_once([fill] * THREADS)
    assert all(isinstance(one, list) for one in found), found
    rows = list(Execution.objects.order_by("shell_place").values_list("pk", "shell_place"))
    assert [place for _, place in rows] == list(range(1, 5 * THREADS + 1))
    for mine in found:
        assert [pk for pk, _ in rows if pk in mine] == mine, "in the order in which one caller made them"
    line = [pk for pk, _ in rows]
    for _ in range(len(line)):
        at_once([lambda pk=pk: execution_flow.run(pk) for pk in line[:THREADS]])
        (running,) = Execution.objects.filter(status="running").values_list("pk", flat=True)
        assert running == line.pop(0)
        # The end, and whoever works at the next one meanwhile: it is woken, or sees for itself that it is its turn.
        fake.finish(running)
        at_once([fake.deliver, *[lambda pk=pk: execution_flow.run(pk) for pk in line[:2]]])
    assert [call["id"] for call in fake.called("spawn")] == [pk for pk, _ in rows]
