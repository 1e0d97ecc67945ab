"""What is kept of commands, where and for how long: stored outputs leave the host, and everything goes in time."""

import pytest
from django.db import connection

from api.callers import Caller
from api.ids import first_id, is_id, new_id
from devboxes.models import Devbox
from executions import retention, services
from executions.execution_flow import execution_flow
from executions.models import Execution
from hosts.client import HostRefused
from storage.objects import StorageError
from tests.execution_world import make_devbox, make_host

pytestmark = pytest.mark.django_db

LARGE = b"x" * 70_000


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
def bucket(monkeypatch):
    """S3 in memory."""
    kept: dict[str, bytes] = {}

    def delete_prefix(prefix, limit=0):
        for key in [key for key in kept if key.startswith(prefix)]:
            del kept[key]

    monkeypatch.setattr("storage.objects.put", kept.__setitem__)
    monkeypatch.setattr("storage.objects.delete_prefix", delete_prefix)
    return kept


@pytest.fixture
def stored(account, devbox, fake, bucket):
    """Makes a command whose output is large, runs it to its end; its id."""

    def make(command="large", output=LARGE):
        fake.script(command, stdout=output)
        new = services.NewExecution(operation="execute_async", command=command)
        pk = services.create_execution(Caller(account_id=account), devbox, new)
        advance(pk)
        return pk

    return make


def advance(pk):
    with connection.cursor() as cursor:
        cursor.execute("UPDATE executions_execution SET wake_at = now(), lease = NULL, lease_until = NULL "
                       "WHERE id = %s AND wake_at IS NOT NULL", [pk])  # fmt: skip
    execution_flow.run(pk)


def row(pk):
    return Execution.objects.get(pk=pk)


# --- on the host ---


def test_a_stored_output_leaves_the_host_after_the_commit(stored, fake, bucket, devbox, monkeypatch):
    seen = []
    real = fake.forget
    monkeypatch.setattr(fake, "forget", lambda **call: seen.append(row(call["id"]).kept) or real(**call))
    pk = stored()
    done = row(pk)
    assert (done.kept, done.step, done.wake_at) == ("store", "done", None)
    assert seen == ["store"], "written down before the host deletes it"
    assert done.stored_at is not None and done.completed_at <= done.stored_at
    assert fake.called("forget") == [{"box": devbox, "id": pk, "fence": fake.fences[pk]}]
    assert list(bucket.values()) == [LARGE]
    assert fake.boxes[devbox].executions[pk].acked, "whoever has the output has the exit"


def test_a_small_output_is_not_forgotten(stored, fake):
    assert row(stored("small", b"x")).kept == "row"
    assert fake.called("forget") == []


def test_a_host_that_does_not_answer_is_asked_again_to_forget(stored, fake):
    fake.fail("forget", times=1)
    fake.fail("forget", after=True, times=1, when=lambda **_: True)
    pk = stored()
    assert (row(pk).kept, row(pk).step) == ("store", "forget")
    completed = row(pk).completed_at
    advance(pk)
    advance(pk)
    assert (row(pk).step, row(pk).completed_at) == ("done", completed)


@pytest.mark.parametrize("code", ["unknown_box", "unknown_id", "internal"])
def test_a_host_that_has_it_no_more_has_forgotten_it(stored, fake, code):
    fake.fail("forget", HostRefused(code, "gone", host_id=fake.host_id))
    done = row(stored())
    assert (done.kept, done.step, done.wake_at, done.exit_status) == ("store", "done", None, 0)


def test_a_host_that_never_answers_is_asked_for_an_hour(stored, fake):
    fake.fail("forget", times=100)
    pk = stored()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE executions_execution SET deadline_at = now() - interval '1 s' WHERE id = %s", [pk])
    advance(pk)
    assert (row(pk).kept, row(pk).step, row(pk).wake_at) == ("store", "done", None)


# --- in PostgreSQL and S3 ---


def age(pk, days, *, ended=None, devbox=None):
    """Let a command have completed so long ago, and its devbox have ended."""
    with connection.cursor() as cursor:
        old = first_id("exe", int(row(pk).created_at.timestamp() * 1000) - days * 86_400_000)[:14] + pk[14:]
        cursor.execute(
            "UPDATE executions_execution SET id = %s, created_at = created_at - make_interval(days => %s), "
            "completed_at = completed_at - make_interval(days => %s) WHERE id = %s",
            [old, days, days, pk],
        )
    if ended is not None:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE devboxes_devbox SET status = 'shutdown', step = 'gone', "
                "ended_at = now() - make_interval(days => %s) WHERE id = %s",
                [ended, devbox],
            )
    return old


def keys(bucket, pk):
    return [key for key in bucket if pk in key]


def test_first_ids_bound_the_ids_made_before():
    before = new_id("exe")
    bound = first_id("exe", 10**15)
    assert is_id("exe", bound) and before < bound
    assert first_id("exe", 0) < before


@pytest.mark.parametrize(
    ("completed", "ended", "goes"), [(31, None, True), (29, None, False), (40, 10, False), (40, 31, True)]
)
def test_commands_go_with_their_time(stored, devbox, bucket, completed, ended, goes):
    """Of a devbox that lives: by their own end; else by the devbox's."""
    small = age(stored("small", b"x"), completed, ended=ended, devbox=devbox)
    assert retention.delete_what_is_over() == int(goes)
    assert Execution.objects.filter(pk=small).exists() is not goes


def test_objects_go_first_and_a_cut_is_repeated(stored, bucket, monkeypatch):
    old, young = stored("a"), stored("b")
    old = rename(bucket, old, age(old, 31))
    failing = {"on": True}
    real = retention.objects.delete_prefix

    def refuse(prefix, limit=0):
        if failing["on"]:
            raise StorageError("delete", prefix, "away")
        assert Execution.objects.filter(pk=old).exists(), "the row goes after its objects"
        return real(prefix)

    monkeypatch.setattr("storage.objects.delete_prefix", refuse)
    assert retention.delete_what_is_over() == 0
    assert keys(bucket, old) and Execution.objects.filter(pk=old).exists()
    failing["on"] = False
    assert retention.delete_what_is_over() == 1
    assert not keys(bucket, old) and not Execution.objects.filter(pk=old).exists()
    assert keys(bucket, young) and Execution.objects.filter(pk=young).exists()
    assert retention.delete_what_is_over() == 0


def rename(bucket, pk, other):
    for key in keys(bucket, pk):
        bucket[key.replace(pk, other)] = bucket.pop(key)
    return other


def test_what_runs_or_is_not_stored_yet_never_goes(stored, account, devbox, fake):
    new = services.NewExecution(operation="execute_async", command="sleep 1000")
    running = services.create_execution(Caller(account_id=account), devbox, new)
    advance(running)
    age(running, 100)
    fake.fail("read", times=100)
    storing = stored("waits")
    assert row(storing).step == "store"
    age(storing, 100)
    assert retention.delete_what_is_over() == 0
    assert Execution.objects.count() == 2


def test_a_run_is_bounded_and_the_next_goes_on(stored, monkeypatch):
    monkeypatch.setattr(retention, "BATCH", 2)
    monkeypatch.setattr(retention, "RUN_ROWS", 4)
    for n in range(6):
        age(stored(f"small {n}", b"x"), 31 + n)
    assert [retention.delete_what_is_over() for _ in range(3)] == [4, 2, 0]


def test_the_time_is_a_setting(stored, settings):
    import dataclasses

    pk = age(stored("small", b"x"), 3)
    assert retention.delete_what_is_over() == 0
    settings.BERTH = dataclasses.replace(settings.BERTH, RETENTION_DAYS=2.0)
    assert retention.delete_what_is_over() == 1
    assert not Execution.objects.filter(pk=pk).exists()


def test_beat_looks_for_it():
    from executions.tasks import BEAT, delete_old

    assert BEAT["executions-retention"]["task"] == delete_old.name


def test_the_devbox_s_row_stays(stored, devbox):
    age(stored("small", b"x"), 40, ended=40, devbox=devbox)
    retention.delete_what_is_over()
    assert Devbox.objects.filter(pk=devbox).exists()
