"""Celery tasks of hosts.

In charge of noticing what no watcher can tell: that no watcher runs. Without one no exit is heard and, after
SILENT_AFTER, no devbox is placed. Hosts themselves are watched and mended by `manage.py watch_hosts`.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from celery import shared_task
from django.db import connection

log = logging.getLogger(__name__)

UNWATCHED_SECONDS: Final = 20.0
BEAT: Final[dict[str, Any]] = {"hosts-unwatched": {"task": "hosts.notice_unwatched", "schedule": 30.0}}

_UNWATCHED = """
    SELECT name FROM hosts_host
     WHERE state IN ('ready', 'retiring')
       AND (watcher_until IS NULL OR watcher_until < now() - make_interval(secs => %s)) ORDER BY name LIMIT 20
"""


def unwatched() -> list[str]:
    """The names of hosts in service that no watcher has held for 20 s, at most 20 of them."""
    with connection.cursor() as cursor:
        cursor.execute(_UNWATCHED, [UNWATCHED_SECONDS])
        return [row[0] for row in cursor.fetchall()]


@shared_task(name="hosts.notice_unwatched")
def notice_unwatched() -> None:
    """Say so in the log, with what to do about it."""
    names = unwatched()
    if names:
        log.error("nobody watches the hosts %s: start `manage.py watch_hosts`", ", ".join(names))
