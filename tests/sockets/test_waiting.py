"""Long-polls over a real Redis: woken by a hint, honest about time, alive without it, woken again when it is back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from api import threads, waiting
from api.bodies import ClientGone
from api.stopping import GoingDown
from api.waiting import Hub


@pytest.fixture(autouse=True)
def pool():
    """Threads without a database: nothing here reads one."""
    previous = threads.use_pool(ThreadPoolExecutor(4))
    yield
    used = threads.use_pool(previous)
    used.shutdown()


class Row:
    """Something that changes, and counts how often it is read."""

    def __init__(self):
        self.value, self.reads = 0, 0

    def read(self):
        self.reads += 1
        return self.value


def run(coroutine):
    return asyncio.run(coroutine)


async def connected(hub, within=10.0):
    hub.start()
    deadline = time.monotonic() + within
    while not hub.connected:
        assert time.monotonic() < deadline, "the hub did not subscribe"
        await asyncio.sleep(0.01)


def publish(url, *names):
    with redis.Redis.from_url(url) as client:
        client.publish("hints", ",".join(names))


def after(seconds):
    return asyncio.get_running_loop().time() + seconds


def test_a_hint_wakes_at_once(redis_url):
    async def main():
        hub, row = Hub(), Row()
        await connected(hub)
        wait = asyncio.ensure_future(hub.wait_until("dbx_1", row.read, lambda value: value == 1, after(10)))
        await asyncio.sleep(0.2)
        reads = row.reads
        publish(redis_url, "dbx_2")
        await asyncio.sleep(0.1)
        assert row.reads == reads, "somebody else's hint"
        row.value = 1
        before = time.monotonic()
        publish(redis_url, "exe_9", "dbx_1")
        assert await wait == 1
        assert time.monotonic() - before < 0.5
        assert not hub._watches, "a waiter was left behind"
        await hub.stop()

    run(main())


def test_a_change_between_reading_and_waiting_is_not_missed(redis_url):
    """The hint comes while the row is being read: the waiter has registered before."""

    async def main():
        hub, row = Hub(), Row()
        await connected(hub)

        def read():
            value = row.read()
            if row.reads == 1:
                row.value = 1
                publish(redis_url, "dbx_1")
                time.sleep(0.2)
            return value

        before = time.monotonic()
        assert await hub.wait_until("dbx_1", read, lambda value: value == 1, after(10)) == 1
        assert time.monotonic() - before < 1
        await hub.stop()

    run(main())


def test_it_ends_at_its_deadline_and_not_before(redis_url):
    async def main():
        hub, row = Hub(), Row()
        await connected(hub)
        for seconds in (0.0999, 0.7):
            before = time.monotonic()
            assert await hub.wait_until("dbx_1", row.read, bool, after(seconds)) == 0
            assert seconds <= time.monotonic() - before < seconds + 0.5
        await hub.stop()

    run(main())


def test_idle_waiters_cost_no_reads_and_no_threads(redis_url):
    async def main():
        hub, row = Hub(), Row()
        await connected(hub)
        waits = [hub.wait_until(f"dbx_{n}", row.read, bool, after(3)) for n in range(500)]
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.sleep(1)
        reads = row.reads
        await asyncio.sleep(1)
        assert row.reads == reads == 500
        row.value = 1
        publish(redis_url, *(f"dbx_{n}" for n in range(500)))
        before = time.monotonic()
        await asyncio.gather(*tasks)
        assert time.monotonic() - before < 1
        await hub.stop()

    run(main())


def test_without_redis_rows_are_read_again_every_two_seconds(settings):
    settings.REDIS_URL = "redis://127.0.0.1:1/0"

    async def main():
        hub, row = Hub(), Row()
        wait = asyncio.ensure_future(hub.wait_until("dbx_1", row.read, bool, after(10)))
        await asyncio.sleep(0.3)
        row.value = 1
        before = time.monotonic()
        assert await wait == 1
        assert time.monotonic() - before < 2.5
        await hub.stop()

    run(main())


@pytest.mark.django_db(transaction=True)
def test_without_redis_one_query_finds_what_changed(settings, monkeypatch):
    """Hundreds of waiters: two queries of the hub, and a read by those whose row has another version."""
    from accounts.models import Account
    from accounts.services import create_account

    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    monkeypatch.setattr(waiting, "REREAD_WITHOUT_REDIS", 0.3)
    ids = [create_account(f"{n}").pk for n in range(200)]
    rows = {pk: Row() for pk in ids}
    compared = []
    versions = waiting._versions
    monkeypatch.setattr(
        waiting, "_versions", lambda table, names: compared.append(len(names)) or versions(table, names)
    )

    async def main():
        hub = Hub()
        hub.register("acc", "accounts_account")
        waits = [hub.wait_until(pk, rows[pk].read, lambda value: value == 1, after(20)) for pk in ids]
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.sleep(1.5)
        assert compared and set(compared) == {200}
        reads = [row.reads for row in rows.values()]
        assert max(reads) <= 2, "the first read, and one after the first comparison"
        rows[ids[7]].value = 1
        await asyncio.to_thread(lambda: (Account.objects.filter(pk=ids[7]).update(name="changed"), close()))
        before = time.monotonic()
        assert await tasks[7] == 1
        assert time.monotonic() - before < 1
        await asyncio.sleep(0.5)
        assert sum(row.reads for row in rows.values()) == sum(reads) + 1
        for task in tasks:
            task.cancel()
        await hub.stop()

    def close():
        from django.db import connection

        connection.close()

    run(main())
    for _ in range(8):  # the pool's threads must let go of the database
        threads.database_pool().submit(lambda: (close(), time.sleep(0.05)))


@pytest.mark.django_db(transaction=True)
def test_a_hint_that_was_lost_is_made_up_for_by_a_comparison(redis_url, monkeypatch):
    from accounts.models import Account
    from accounts.services import create_account

    monkeypatch.setattr(waiting, "REREAD_WITHOUT_REDIS", 0.2)
    monkeypatch.setattr(waiting, "REREAD_WITH_REDIS", 0.2)
    known, row = create_account("lost").pk, Row()

    def close():
        from django.db import connection

        connection.close()

    async def main():
        hub = Hub()
        hub.register("acc", "accounts_account")
        await connected(hub)
        wait = asyncio.ensure_future(hub.wait_until(known, row.read, lambda value: value == 1, after(20)))
        await asyncio.sleep(1.0)
        assert row.reads == 1, "nothing changed, so nobody reads"
        row.value = 1
        await asyncio.to_thread(lambda: (Account.objects.filter(pk=known).update(name="found"), close()))
        before = time.monotonic()
        assert await wait == 1
        assert time.monotonic() - before < 5
        await hub.stop()

    run(main())
    for _ in range(8):  # the pool's threads must let go of the database
        threads.database_pool().submit(lambda: (close(), time.sleep(0.05)))


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_redis_goes_and_comes_back(redis_server, redis_url, how, monkeypatch):
    monkeypatch.setattr(waiting, "REREAD_WITH_REDIS", 60.0)

    async def main():
        hub, row = Hub(), Row()
        await connected(hub)
        wait = asyncio.ensure_future(hub.wait_until("dbx_1", row.read, lambda value: value == 1, after(50)))
        await asyncio.sleep(0.1)
        if how == "killed":
            redis_server.stop(kill=True)
        else:
            os.kill(redis_server.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while hub.connected:
            assert time.monotonic() < deadline, "the loss was not noticed"
            await asyncio.sleep(0.05)
        row.value = 1
        before = time.monotonic()
        assert await wait == 1
        assert time.monotonic() - before < 3
        # Back again: everybody reads once, and hints work.
        wait = asyncio.ensure_future(hub.wait_until("dbx_1", row.read, lambda value: value == 2, after(50)))
        await asyncio.sleep(0.1)
        if how == "killed":
            redis_server.start()
        else:
            os.kill(redis_server.process.pid, signal.SIGCONT)
        await connected(hub)
        row.value = 2
        publish(redis_url, "dbx_1")
        before = time.monotonic()
        assert await wait == 2
        assert time.monotonic() - before < 1
        await hub.stop()

    try:
        run(main())
    finally:
        if redis_server.process is None:
            redis_server.start()
        else:
            os.kill(redis_server.process.pid, signal.SIGCONT)


def test_a_client_that_left_ends_the_wait(redis_url):
    async def main():
        hub, row = Hub(), Row()
        gone = asyncio.get_running_loop().create_future()
        gone.set_result(None)
        with pytest.raises(ClientGone):
            await hub.wait_until("dbx_1", row.read, bool, after(10), gone)
        await hub.stop()

    run(main())


def test_a_process_that_stops_ends_every_wait(redis_url, monkeypatch):
    async def main():
        hub, row = Hub(), Row()
        going = GoingDown()
        monkeypatch.setattr(waiting, "going_down", going)
        await connected(hub)
        wait = asyncio.ensure_future(hub.wait_until("dbx_1", row.read, bool, after(20)))
        await asyncio.sleep(0.1)
        going.begin()
        hub.wake_all()
        assert await asyncio.wait_for(wait, 1) == 0
        await hub.stop()

    run(main())


def test_errors_of_the_read_come_through(redis_url):
    async def main():
        hub = Hub()

        def broken():
            raise LookupError

        with pytest.raises(LookupError):
            await hub.wait_until("dbx_1", broken, bool, after(10))
        assert not hub._watches
        await hub.stop()

    run(main())
