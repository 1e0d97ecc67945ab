"""The Celery application over a real Redis: the plain command line is a right worker; a dead broker hurts nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from kombu.exceptions import OperationalError

from config.celery import QUEUES, app, beat_schedule, broker_url, route
from tests.sockets.conftest import PROJECT, process_environment


def test_threads_by_configuration_and_nothing_that_costs():
    conf = app.conf
    assert conf.worker_pool == "threads"
    assert list(app.fixups) == [] and not app._fixups
    assert not conf.worker_enable_remote_control and not conf.worker_send_task_events
    assert {queue.name for queue in conf.task_queues} == set(QUEUES)
    assert conf.task_ignore_result and conf.result_backend is None


@pytest.mark.parametrize(
    ("given", "kombu"),
    [
        ("redis://:pw@127.0.0.1:6379/0", "redis://:pw@127.0.0.1:6379/0"),
        ("unix:///run/x/redis.sock", "redis+socket:///run/x/redis.sock"),
        ("unix:///run/x/redis.sock?db=3", "redis+socket:///run/x/redis.sock?virtual_host=3"),
        ("unix://:pw@/run/x/redis.sock?db=0", "redis+socket://:pw@/run/x/redis.sock?virtual_host=0"),
    ],
)
def test_one_address_for_both_libraries(given, kombu):
    assert broker_url(given) == kombu


def test_a_task_goes_to_the_queue_of_its_name():
    for queue in QUEUES:
        assert route(f"{queue}.advance", (), {}, {}) == {"queue": queue}
    assert route("api.purge_requests", (), {}, {}) == {"queue": "devboxes"}


def test_every_periodic_task_exists():
    for name, entry in beat_schedule().items():
        assert entry["task"] in app.tasks, f"{name}: there is no task {entry['task']}"
        assert entry["schedule"] > 0


@pytest.fixture
def publisher(redis_url):
    """The application's broker settings, pointed at the test's Redis."""
    from celery import Celery

    other = Celery("publisher", broker=broker_url(redis_url), fixups=[], set_as_current=False)
    other.conf.update(
        {
            key: app.conf[key]
            for key in (
                "broker_transport_options",
                "task_queues",
                "task_routes",
                "task_default_queue",
                "task_publish_retry",
            )
        }
    )
    yield other
    other.close()


def test_publishing_to_a_dead_broker_fails_at_once(publisher, redis_server):
    publisher.send_task("api.purge_requests")
    redis_server.stop(kill=True)
    try:
        before = time.monotonic()
        with pytest.raises(OperationalError):
            publisher.send_task("api.purge_requests")
        assert time.monotonic() - before < 2
    finally:
        redis_server.start()


def test_publishing_to_a_frozen_broker_ends_with_the_sockets_timeout(publisher, redis_server):
    publisher.send_task("api.purge_requests")
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        before = time.monotonic()
        with pytest.raises(OperationalError):
            publisher.send_task("api.purge_requests")
        assert time.monotonic() - before < 12
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)


def test_the_plain_command_is_a_worker(transactional_db, redis_url, redis_server, publisher, tmp_path):
    """``celery -A config worker -Q …``: threads, takes a task, survives a restart of Redis, stops when told to."""
    from django.utils import timezone

    from api.models import IdempotencyRecord

    def old_request(name):
        IdempotencyRecord.objects.create(
            account_id="acc", route_key="x", request_id=name, body_sha256=b"", object_id="o",
            created_at=timezone.now() - timezone.timedelta(days=2),
        )  # fmt: skip

    def wait_until_purged(log):
        deadline = time.monotonic() + 30
        while IdempotencyRecord.objects.exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    log = tmp_path / "log"
    command = [sys.executable, "-m", "celery", "-A", "config", "worker", "-Q", "devboxes", "--loglevel", "INFO"]
    with log.open("wb") as out:
        worker = subprocess.Popen(command, cwd=PROJECT, env=process_environment(redis_url), stdout=out, stderr=out)
    try:
        old_request("before")
        publisher.send_task("api.purge_requests")
        wait_until_purged(log)
        assert "(thread)" in log.read_text()
        redis_server.stop(kill=True)
        time.sleep(0.5)
        redis_server.start()
        old_request("after")
        publisher.send_task("api.purge_requests")
        wait_until_purged(log)
        worker.terminate()
        assert worker.wait(15) == 0
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait(5)
