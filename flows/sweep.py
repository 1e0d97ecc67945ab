"""The sweep: a thread in every worker that finds due rows in PostgreSQL and does the work itself.

In charge of: rows whose nudge was lost, rows booked for a later time, rows whose worker died, and everything while
Redis is away. Not in charge of: what is done with a row (`flows.engine`).

It takes only as many rows as it has free threads, so what it cannot do at once stays free for others. A row that this
very process put to sleep for a short while is remembered and run on time; all others are taken two seconds late at
most, which leaves nudges the first try.
"""

import heapq
import itertools
import logging
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.signals import worker_init, worker_shutdown
from django.db import Error, connection

from flows import leases
from flows.engine import Flow, Row, registered, set_reminder

log = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
OVERDUE_SECONDS = 2.0
THREADS = 4
REMIND_WITHIN_SECONDS = 30.0
REMINDERS_LIMIT = 10_000


class Sweep:
    """The sweep of one process over the flows of some queues (None: all that are registered)."""

    def __init__(self, queues: Sequence[str] | None = None, threads: int = THREADS) -> None:
        self._queues = None if queues is None else frozenset(queues)
        self._free = threading.Semaphore(threads)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sweep")
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._order = itertools.count()
        self._reminders: list[tuple[float, int, Flow[Any], str]] = []
        self._busy = 0

    def flows(self) -> list[Flow[Any]]:
        """The flows this process sweeps."""
        return [flow for queue, flow in registered().items() if self._queues is None or queue in self._queues]

    def remind(self, flow: Flow[Any], pk: str, seconds: float) -> None:
        """Run the row in `seconds`, if that is soon; the ordinary sweep finds it otherwise."""
        if seconds > REMIND_WITHIN_SECONDS or (self._queues is not None and flow.queue not in self._queues):
            return
        with self._changed:
            if len(self._reminders) < REMINDERS_LIMIT:
                heapq.heappush(self._reminders, (time.monotonic() + seconds, next(self._order), flow, pk))
                self._changed.notify()

    def sweep_once(self) -> int:
        """Claim what is overdue and start it, as far as threads are free. Returns how many rows were taken."""
        taken = 0
        for flow in self.flows():
            free = self._acquire_free()
            if not free:
                break
            rows: list[Any] = []
            try:
                rows = flow.claim_due(free, OVERDUE_SECONDS)
            finally:
                for _ in range(free - len(rows)):
                    self._free.release()
            for row in rows:
                self._pool.submit(self._advance, flow, row)
            taken += len(rows)
        return taken

    def _acquire_free(self) -> int:
        free = 0
        while free < self._threads and self._free.acquire(blocking=False):
            free += 1
        return free

    def _advance(self, flow: Flow[Any], row: Row) -> None:
        try:
            flow.advance(row)
        except Exception:
            log.exception("sweep: %s", row.id)
        finally:
            self._free.release()

    def _run_reminded(self, flow: Flow[Any], pk: str) -> None:
        try:
            flow.run(pk)
        except Exception as error:
            log.warning("sweep: %s could not be run on time: %s", pk, error)
        finally:
            self._free.release()

    def _start_due_reminders(self) -> None:
        """Start the reminders that are due, as far as threads are free."""
        with self._changed:
            while self._reminders and self._reminders[0][0] <= time.monotonic():
                if not self._free.acquire(blocking=False):
                    return
                _, _, flow, pk = heapq.heappop(self._reminders)
                self._pool.submit(self._run_reminded, flow, pk)

    def _rest(self, next_sweep: float) -> None:
        """Sleep until the next sweep or reminder. What is due is looked up under the lock that a new reminder takes
        to be heard, so one that came during the sweep is not slept over."""
        with self._changed:
            now = time.monotonic()
            until = next_sweep - now
            if self._reminders:
                # One that is due already waits for a thread: look again soon.
                until = min(until, max(self._reminders[0][0] - now, 0.05))
            if until > 0 and not self._stopping.is_set():
                self._changed.wait(until)

    def run(self) -> None:
        """Sweep until `stop`. Survives the loss of the database."""
        next_sweep = 0.0
        while not self._stopping.is_set():
            self._start_due_reminders()
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + EVERY_SECONDS * random.uniform(0.7, 1.3)  # noqa: S311
                try:
                    if self.sweep_once() >= self._threads:
                        next_sweep = time.monotonic() + 0.02
                except Error as error:
                    log.warning("sweep: the database does not answer: %s", error)
                    connection.close()
                except Exception:
                    log.exception("sweep")
            self._rest(next_sweep)
        connection.close()

    def start(self) -> None:
        """Start the thread and have sleeping rows of this process remembered."""
        set_reminder(self.remind)
        threading.Thread(target=self.run, name="sweep", daemon=True).start()

    def stop(self) -> None:
        """Take nothing more; what runs is waited for (steps are short)."""
        set_reminder(None)
        self._stopping.set()
        with self._changed:
            self._changed.notify()
        self._pool.shutdown(wait=True, cancel_futures=True)


_sweep: Sweep | None = None


@worker_init.connect(dispatch_uid="flows.sweep.start")
def _start(**options: Any) -> None:
    # Not worker_ready: that one waits for the broker, and the point is to work without it.
    global _sweep
    queues = (options.get("options") or {}).get("queues")
    if isinstance(queues, str):
        queues = [name for name in queues.split(",") if name]
    leases.start()
    if _sweep is None:
        _sweep = Sweep(queues or None)
        _sweep.start()


@worker_shutdown.connect(dispatch_uid="flows.sweep.stop")
def _stop(**_options: Any) -> None:
    global _sweep
    if _sweep is not None:
        _sweep.stop()
        _sweep = None
    leases.stop()
