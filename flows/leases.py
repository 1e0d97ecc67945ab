"""Leases held by this process, and the one thread that renews them.

In charge of: knowing which rows are being worked on here, renewing them every few seconds in one UPDATE per table, and
telling a step that its lease is gone. Not in charge of: claiming and settling (`flows.engine`).

A step that blocks for ever must not keep its row for ever: after `HOLD_LIMIT_SECONDS` it is no longer renewed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.db import Error, connection

if TYPE_CHECKING:
    from flows.engine import Flow, Row

log = logging.getLogger(__name__)

RENEW_EVERY_SECONDS = 3.0
HOLD_LIMIT_SECONDS = 60.0

_lock = threading.Lock()
_held: dict[tuple[str, str], tuple[Flow[Any], Row, float]] = {}
_thread: threading.Thread | None = None
_stop = threading.Event()


@contextlib.contextmanager
def held(flow: Flow[Any], row: Row) -> Iterator[None]:
    """Have the row's lease renewed while the block runs."""
    key = (flow.queue, row.lease + row.id)
    with _lock:
        _held[key] = (flow, row, time.monotonic())
    try:
        yield
    finally:
        with _lock:
            _held.pop(key, None)


def renew_once() -> int:
    """Renew everything held here. Returns how many leases were found lost."""
    now = time.monotonic()
    by_flow: dict[str, list[tuple[Flow[Any], Row]]] = {}
    with _lock:
        for (queue, _), (flow, row, since) in _held.items():
            if now - since < HOLD_LIMIT_SECONDS:
                by_flow.setdefault(queue, []).append((flow, row))
    lost = 0
    for rows in by_flow.values():
        flow = rows[0][0]
        mine = [(row.id, row.lease, row.fence) for _, row in rows]
        with connection.cursor() as cursor:
            cursor.execute(flow.table.renew, [list(column) for column in zip(*mine, strict=True)])
            kept = {found[0] for found in cursor.fetchall()}
        for _, row in rows:
            # A step that settled meanwhile is not in `kept` either; the flag then means nothing to anybody.
            if row.id not in kept:
                row.lost = True
                lost += 1
    return lost


def start() -> None:
    """Start the renewal thread of this process, once."""
    global _thread
    with _lock:
        if _thread is None or not _thread.is_alive():
            _stop.clear()
            _thread = threading.Thread(target=_run, name="leases", daemon=True)
            _thread.start()


def stop() -> None:
    """Stop the renewal thread and wait for it (at most two seconds)."""
    _stop.set()
    if _thread is not None:
        _thread.join(2)


def _run() -> None:
    while not _stop.wait(RENEW_EVERY_SECONDS):
        try:
            renew_once()
        except Error as error:
            log.warning("leases could not be renewed: %s", error)
            connection.close()
        except Exception:
            log.exception("leases could not be renewed")
    connection.close()
