"""A Celery application with one task that does nothing but say so: what the hop alone costs."""

from __future__ import annotations

import functools

import redis
from celery import Celery

from config import env

REPLIES = "bench-replies"

app = Celery("bench", broker=env.text("REDIS_URL") or None, fixups=[])
app.conf.update(
    task_ignore_result=True,
    worker_pool="threads",
    worker_concurrency=4,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    task_default_queue="bench",
    broker_connection_retry_on_startup=True,
)


@app.task(name="bench.noop")
def noop() -> None:
    """Answer."""
    _replies().rpush(REPLIES, b"1")


@functools.cache
def _replies() -> redis.Redis:
    return redis.Redis.from_url(env.text("REDIS_URL"))
