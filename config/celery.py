"""The Celery application. ``celery -A config worker -Q executions`` is all a further machine needs.

Messages are nudges, so everything here errs towards forgetting them quickly. The Django fixup stays off: it closes the
database connection around every task. Threads, because a paramiko Transport does not survive a fork. Events and remote
control cost half of a task's CPU and are off.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import config  # noqa: F401  (settles the name ``pty``)

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

import django

django.setup()

from celery import Celery
from django.conf import settings
from kombu import Queue

QUEUES = ("devboxes", "executions", "snapshots", "hosts")


def broker_url(redis_url: str) -> str:
    """REDIS_URL as kombu spells it: a Unix socket is ``redis+socket://`` there and ``unix://`` everywhere else."""
    if redis_url.startswith("unix://"):
        path, _, query = redis_url.removeprefix("unix://").partition("?")
        return f"redis+socket://{path}" + (f"?{query.replace('db=', 'virtual_host=')}" if query else "")
    return redis_url


def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **rest: Any) -> dict[str, str]:
    """A task's queue is the first part of its name where that is a queue."""
    first = name.partition(".")[0]
    return {"queue": first if first in QUEUES else "devboxes"}


def beat_schedule() -> dict[str, Any]:
    """Every app's ``tasks.BEAT``: name -> {"task", "schedule" in seconds}."""
    schedule: dict[str, Any] = {}
    for name in settings.APPS:
        if importlib.util.find_spec(f"{name}.tasks") is not None:
            schedule.update(getattr(importlib.import_module(f"{name}.tasks"), "BEAT", {}))
    return schedule


app = Celery("berth", broker=broker_url(settings.REDIS_URL), fixups=[], set_as_current=True)
app.conf.update(
    result_backend=None,
    task_ignore_result=True,
    task_store_errors_even_if_ignored=False,
    task_serializer="json",
    accept_content=["json"],
    task_acks_late=False,
    task_queues=[Queue(name) for name in QUEUES],
    task_default_queue="devboxes",
    task_routes=(route,),
    task_publish_retry=False,
    task_send_sent_event=False,
    worker_pool="threads",
    worker_concurrency=settings.BERTH.WORKER_THREADS,
    worker_prefetch_multiplier=4,
    worker_disable_rate_limits=True,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
    worker_redirect_stdouts=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_heartbeat=0,
    # A dead broker must fail at once, a frozen one within the socket's timeout.
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 1,
        "socket_keepalive": True,
        "health_check_interval": 10,
        # A receipt costs two transactions a message, and the sweep finds what a dying worker had taken.
        "ack_emulation": False,
        "max_retries": 0,
        "interval_start": 0,
        "interval_step": 0,
        "interval_max": 0,
    },
    timezone="UTC",
    enable_utc=True,
    beat_schedule=beat_schedule(),
    beat_schedule_filename=str((settings.STATE or settings.PROJECT / "build") / "beat-schedule"),
)
app.autodiscover_tasks(list(settings.APPS), force=True)
