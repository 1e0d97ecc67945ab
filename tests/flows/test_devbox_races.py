"""Many at once, each on a connection of its own: exact caps, one devbox per request, rows that move once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import connection, connections

from api.callers import Caller
from api.errors import ApiError
from devboxes import services
from devboxes.devbox_flow import devbox_flow
from devboxes.models import Devbox, DevboxTransition
from hosts.client import use_fake
from tests.devbox_world import make_host, promised
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    host = make_host()
    yield host
    use_fake(host.host_id, None)


@pytest.fixture
def caller(db: None) -> Caller:
    from accounts.services import create_account

    return Caller(account_id=create_account("A").pk)


def at_once(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Run it on so many threads; results, ApiErrors among them."""
    barrier = threading.Barrier(count, timeout=20)
    results: list[Any] = [None] * count

    def run(number: int) -> None:
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            barrier.wait()
            results[number] = function(number)
        except Exception as error:
            results[number] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    wrong = [result for result in results if isinstance(result, Exception) and not isinstance(result, ApiError)]
    assert not wrong, wrong
    return results


def test_the_cap_is_exact(caller: Caller, fake: FakeHost) -> None:
    from accounts.models import Account

    Account.objects.filter(pk=caller.account_id).update(max_running_devboxes=5)
    results = at_once(12, lambda n: services.create_devbox(caller, {}, raw_body=b"", request_id=f"r{n}"))
    refused = [result for result in results if isinstance(result, ApiError)]
    assert len(refused) == 7 and {error.status for error in refused} == {429}
    assert Devbox.objects.count() == 5


def test_one_request_sent_many_times_at_once_makes_one_devbox(caller: Caller, fake: FakeHost) -> None:
    results = at_once(8, lambda n: services.create_devbox(caller, {}, raw_body=b"{}", request_id="same"))
    assert len(set(results)) == 1 and Devbox.objects.get().pk == results[0]
    assert DevboxTransition.objects.count() == 1


def test_many_workers_and_one_row(caller: Caller, fake: FakeHost) -> None:
    devbox_id = services.create_devbox(caller, {}, raw_body=b"", request_id=None)
    results = at_once(6, lambda n: devbox_flow.run(devbox_id))
    assert results.count(True) >= 1
    assert Devbox.objects.get().status == "running"
    assert len(fake.called("boot")) == 1 and promised(fake.host_id) == (1000, 2048, 4096)
    assert list(DevboxTransition.objects.order_by("id").values_list("status", flat=True)) == [
        "provisioning",
        "initializing",
        "running",
    ]


def test_many_shutdowns_are_one(caller: Caller, fake: FakeHost) -> None:
    devbox_id = services.create_devbox(caller, {}, raw_body=b"", request_id=None)
    devbox_flow.run(devbox_id)
    assert sorted(at_once(6, lambda n: services.request_shutdown(devbox_id))) == [False] * 5 + [True]
    at_once(4, lambda n: devbox_flow.run(devbox_id))
    assert Devbox.objects.get().step == "gone" and promised(fake.host_id) == (0, 0, 0)
    assert DevboxTransition.objects.filter(status="shutdown").count() == 1


def test_a_burst_is_placed_without_a_promise_too_many(caller: Caller, fake: FakeHost) -> None:
    """The host has room for six of these; the others wait."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET memory_mb = 6 * 2048, overcommit_memory = 1")
    ids = [services.create_devbox(caller, {}, raw_body=b"", request_id=None) for _ in range(10)]
    for _ in range(4):
        at_once(10, lambda n: devbox_flow.run(ids[n]))
        with connection.cursor() as cursor:
            cursor.execute("UPDATE devboxes_devbox SET wake_at = now() WHERE step = 'place'")
    assert Devbox.objects.filter(status="running").count() == 6
    assert Devbox.objects.filter(step="place").count() == 4
    assert promised(fake.host_id)[1] == 6 * 2048


def test_there_is_no_index_for_like(fake: FakeHost) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT indexname FROM pg_indexes WHERE tablename LIKE 'devboxes_devbox%%'")
        names = {name for (name,) in cursor.fetchall()}
        cursor.execute("SELECT reloptions FROM pg_class WHERE relname = 'devboxes_devbox'")
        options = cursor.fetchone()[0]
    assert not [name for name in names if name.endswith("_like")], names
    assert {"devboxes_devbox_due", "devboxes_devbox_list", "devboxes_devbox_live"} <= names
    assert options == ["fillfactor=70"]
