"""The engine: takes a due row, runs its steps, writes down what they found, once and guarded.

In charge of: claim, settle, wake, retries, deadlines, and the loop that runs steps in place. Not in charge of: what
the steps do, nor which statuses they mean (each flow), nor of finding due rows without a nudge (`flows.sweep`).

The rules, which every flow may rely on and must keep:

1. A step talks to hosts first, with no transaction open, and ends in exactly one of `Next`, `Wait`, `Done`.
2. What it learnt is written by one UPDATE that matches the lease *and* the fence of the claim. No row: `LeaseLost`,
   and all of it is thrown away. So any step may run twice, and every verb to a host must stand that.
3. Only exceptions and lapsed leases raise `attempts`, which only lengthens the pause before the next try. A row fails
   by its flow's own decision or by its deadline, never by a count.
"""

import itertools
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Generic, TypeVar

import psycopg
from django.db import Error, InterfaceError, OperationalError, connection, transaction

from flows import faults, hints, nudge
from flows.leases import held
from flows.models import Durable
from flows.outcomes import Done, LeaseLost, Next, Outcome, Superseded, Wait
from flows.statements import Alongside, Table, payload_names

log = logging.getLogger(__name__)

STEPS_IN_PLACE = 32
RETRY_FIRST_SECONDS = 0.25
RETRY_CAP_SECONDS = 30.0
DETAIL_LIMIT = 2000

_process = f"{socket.gethostname()[:64]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
_count = itertools.count()


def new_lease() -> str:
    """A lease nobody else ever holds: the process, the time in ms, a counter."""
    return f"{_process}.{time.time_ns() // 1_000_000}.{next(_count)}"


def holder(lease: str) -> tuple[str, datetime]:
    """The process that a lease names, and when it took it, by that process's clock."""
    process, at, _ = lease.rsplit(".", 2)
    return process, datetime.fromtimestamp(int(at) / 1000, UTC)


@dataclass(slots=True, kw_only=True)
class Row:
    """A claimed row. A flow's own subclass adds the columns its steps want to see, by their attribute names."""

    id: str
    step: str
    fence: int
    wakes: int
    attempts: int
    lease: str
    now: datetime
    step_since: datetime
    expired: bool
    lost: bool = field(default=False)

    def check(self) -> None:
        """Raise LeaseLost if the renewal found the lease gone. For steps that do several things at a host."""
        if self.lost:
            raise LeaseLost(self.id)


@dataclass(slots=True)
class Settled:
    """What a flow adds to a settle: columns derived from the step, a statement in the same transaction, and whether
    those who wait for the row should hear of it."""

    columns: dict[str, object] = field(default_factory=dict)
    alongside: Alongside | None = None
    hint: bool = True


_OWN = ("id", "step", "fence", "wakes", "attempts", "lease", "now", "step_since", "expired")


class _AlsoRefused(Exception):
    """What had to be true together with the settle was not."""


R = TypeVar("R", bound=Row)


class Flow(Generic[R]):
    """The life of one kind of durable row. A subclass names its model, queue, row class and steps."""

    model: type[Durable]
    queue: str
    row: type[R]
    steps: Mapping[str, Callable[[R], Outcome]]

    # What a flow may say besides its steps.

    def divert(self, row: R) -> str | None:
        """The step to run instead of the one the row is in, if what is wanted of it has changed."""
        return None

    def on_exception(self, row: R, error: Exception) -> Outcome | None:
        """What an exception of a step means; None: "try again later". Raises Superseded after a stale fence."""
        return None

    def expired(self, row: R) -> Outcome | None:
        """What to do past `deadline_at`. None: run the step all the same."""
        return None

    def settled(self, row: R, step: str, outcome: Outcome) -> Settled:
        """What goes into the settle besides what the step learnt. `step` is the one the row goes to."""
        return Settled(hint=step != row.step)

    # The statements.

    @property
    def task(self) -> str:
        """The Celery task that advances a row of this flow."""
        return f"{self.queue}.advance"

    @cached_property
    def table(self) -> Table:
        """The statements for this flow's table."""
        return Table(self.model, payload_names(self.row, Row))

    def claim(self, pk: str) -> R | None:
        """Take the row if it is due and free. None: it is not, or somebody was first."""
        found = _query(self.table.claim, (new_lease(), pk))
        return self._row(found[0]) if found else None

    def claim_due(self, limit: int, overdue_seconds: float = 2.0) -> list[R]:
        """Take up to `limit` free rows that have been due for some seconds, the longest first."""
        return [self._row(found) for found in _query(self.table.claim_due, (overdue_seconds, limit, new_lease()))]

    def _row(self, values: Sequence[Any]) -> R:
        _, pk, step, fence, wakes, attempts, lease, now, since, expired, *payload = values
        own = (pk, step, fence, wakes, attempts, lease, now, since, expired)
        columns = dict(zip(self.table.payload, self.table.load(payload), strict=True))
        return self.row(**dict(zip(_OWN, own, strict=True)), **columns)

    def settle(self, row: R, outcome: Outcome) -> None:
        """Write down how a step ended. For `Next` the lease is kept and `row` brought up to date.

        Raises LeaseLost when the row is no longer ours, _AlsoRefused when `also` said no.
        """
        step = (outcome.step or row.step) if isinstance(outcome, Wait) else outcome.step
        extra = self.settled(row, step, outcome)
        learnt = self.table.assign({**extra.columns, **outcome.learnt})
        own: tuple[object, ...]
        if isinstance(outcome, Wait):
            sql, own = self.table.settle(learnt, extra.alongside), (step, step, row.wakes, outcome.seconds)
        elif isinstance(outcome, Next):
            sql, own = self.table.settle_next(learnt, extra.alongside), (step, step)
        else:
            sql, own = self.table.done(learnt, extra.alongside), (step, step)
        params = (*own, *learnt.params, row.id, row.lease, row.fence)
        if extra.alongside is not None:
            params += extra.alongside.params
        result = _write(sql, params, outcome.also)
        if result is None:
            raise LeaseLost(row.id)
        if isinstance(outcome, Next):
            _, _, row.wakes, row.now, row.step_since, row.expired, *payload = result
            for name, value in zip(self.table.payload, self.table.load(payload), strict=True):
                setattr(row, name, value)
            row.attempts = 0
        row.step = step
        if extra.hint:
            hints.publish(row.id)
        if isinstance(outcome, Wait):
            if result[-1]:
                self.nudge(row.id)
            else:
                _remind(self, row.id, outcome.seconds)

    def _give_back(self, row: R) -> None:
        """After a stale fence: free the row, unless that has been done by whoever raised the fence."""
        try:
            self._retry(row, "stale_fence", f"step {row.step} came to its host behind a newer one", at_once=True)
            log.info("%s: %s in step %s came with a stale fence and is tried again", self.queue, row.id, row.step)
        except LeaseLost:
            log.debug("%s: %s was taken from step %s", self.queue, row.id, row.step)

    def _retry(self, row: R, code: str, detail: str, *, at_once: bool = False) -> None:
        """Free the row and book the next try: after a pause that grows with the tries; `at_once`: the first without."""
        pause = min(RETRY_CAP_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(row.attempts, 16)) * random.uniform(0.75, 1.25)  # noqa: S311
        pause = 0.0 if at_once and row.attempts == 0 else pause
        params = (row.wakes, pause, code, detail[:DETAIL_LIMIT], row.id, row.lease, row.fence)
        found = _query(self.table.retry, params)
        if not found:
            raise LeaseLost(row.id)
        if found[0][0]:
            self.nudge(row.id)
        else:
            _remind(self, row.id, pause)

    # Running.

    def run(self, pk: str) -> bool:
        """Claim the row and run its steps until it sleeps, is done, or is somebody else's. False: not claimed."""
        row = self.claim(pk)
        if row is None:
            return False
        self.advance(row)
        return True

    def advance(self, row: R) -> None:
        """Run the steps of a claimed row. Never raises for what a step did wrong: that is booked as a retry."""
        try:
            with held(self, row):
                for _ in range(STEPS_IN_PLACE):
                    if not self._advance_once(row):
                        return
                self.settle(row, Wait(0))  # others want this thread too
        except Superseded:
            self._give_back(row)
        except LeaseLost:
            log.debug("%s: the lease of %s was lost in step %s", self.queue, row.id, row.step)
        except Error:
            # The database itself: nothing was written, the lease lapses and the sweep takes the row again.
            log.exception("%s: %s in step %s could not be settled", self.queue, row.id, row.step)

    def _advance_once(self, row: R) -> bool:
        row.step = self.divert(row) or row.step
        outcome: Outcome | None = None
        faults.reach(self.queue, row.step, "claimed")
        try:
            if row.expired:
                outcome = self.expired(row)
            if outcome is None:
                outcome = self.steps[row.step](row)
        except LeaseLost:
            raise
        except Exception as error:
            outcome = self.on_exception(row, error)
            if outcome is None:
                log.warning("%s: %s in step %s: %r", self.queue, row.id, row.step, error, exc_info=row.attempts < 1)
                self._retry(row, type(error).__name__, str(error) or repr(error))
                return False
        faults.reach(self.queue, row.step, "acted")
        try:
            self.settle(row, outcome)
        except _AlsoRefused:
            self._retry(row, "refused", f"what had to go with the end of step {row.step} was refused")
            return False
        except (OperationalError, InterfaceError):
            raise
        except Error as error:
            log.exception("%s: %s in step %s: the outcome cannot be written", self.queue, row.id, row.step)
            self._retry(row, type(error).__name__, str(error))
            return False
        return isinstance(outcome, Next)

    # From outside a step.

    def wake(self, *ids: str) -> int:
        """Make rows due now, whatever they sleep for. Returns how many there were; done rows stay done."""
        found = _query(self.table.wake, (list(ids),))
        for pk, free in found:
            if free:
                self.nudge(pk)
        return len(found)

    def wake_refused(self, column: str, value: object) -> int:
        """Wake the rows with this value in `column` that sleep after a failed try, for its cause is gone."""
        found = _query(self.table.refused(column), (value,))
        return self.wake(*(pk for (pk,) in found)) if found else 0

    def request(
        self,
        pk: str,
        columns: Mapping[str, object],
        *,
        guard: str = "true",
        guard_params: Sequence[object] = (),
        alongside: Alongside | None = None,
        hint: bool = True,
    ) -> bool:
        """Record an intent that overrides whoever works on the row: their lease is cleared and the fence raised, so
        that neither their settle nor their late calls to a host count. `guard` is a condition on the row.

        False: the row is done, or the guard did not hold.
        """
        learnt = self.table.assign(columns)
        sql = self.table.request(learnt, guard, alongside)
        extra = alongside.params if alongside else ()
        if not _query(sql, (*learnt.params, pk, *guard_params, *extra)):
            return False
        if hint:
            transaction.on_commit(lambda: hints.publish(pk))
        self.nudge(pk)
        return True

    def finish(self, entries: Mapping[str, Mapping[str, object]], *, step: str = "done") -> list[str]:
        """Complete a batch of rows by what somebody else saw (a host's report), whoever holds them.

        All entries name the same columns. Returns the ids that were not complete before; committed on return unless
        the caller has a transaction open.
        """
        if not entries:
            return []
        names = list(next(iter(entries.values())))
        arrays = [[self.table.prepare(name, entry[name]) for entry in entries.values()] for name in names]
        found = _query(self.table.finish(names), (step, list(entries), *arrays))
        ids = [str(pk) for (pk,) in found]
        transaction.on_commit(lambda: hints.publish(*ids))
        return ids

    def nudge(self, pk: str) -> None:
        """Tell a worker that the row is due: after the commit, best effort."""
        transaction.on_commit(lambda: nudge.publish(self.queue, self.task, pk))


def _execute(sql: str, params: Sequence[Any]) -> list[Any]:
    """Bound by the server, which keeps the plan of what it is asked again; Django's cursors plan each time."""
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        return cursor.execute(sql, params).fetchall()


def _query(sql: str, params: Sequence[Any]) -> list[Any]:
    """One statement, one transaction (unless the caller has one open). A broken connection is dropped, so that this
    thread's next statement dials again."""
    try:
        return _execute(sql, params)
    except (OperationalError, InterfaceError):
        if not connection.in_atomic_block:
            connection.close()
        raise


def _write(sql: str, params: Sequence[Any], also: Callable[[Any], bool] | None) -> tuple[Any, ...] | None:
    if also is None:
        found = _query(sql, params)
        return tuple(found[0]) if found else None
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            found = _execute(sql, params)
            if found and not also(cursor):
                raise _AlsoRefused
            return tuple(found[0]) if found else None
    except (OperationalError, InterfaceError):
        if not connection.in_atomic_block:
            connection.close()
        raise


_flows: dict[str, Flow[Any]] = {}
_reminder: Callable[[Flow[Any], str, float], None] | None = None


def register(flow: Flow[Any]) -> Flow[Any]:
    """Make a flow known to the sweep. Once per queue and process, from its app's `tasks.py` or `apps.py`."""
    _flows[flow.queue] = flow
    return flow


def registered() -> dict[str, Flow[Any]]:
    """The flows of this process by queue."""
    return dict(_flows)


def set_reminder(reminder: Callable[[Flow[Any], str, float], None] | None) -> None:
    """Who is told that a row of this process sleeps for some seconds (the sweep, where one runs)."""
    global _reminder
    _reminder = reminder


def _remind(flow: Flow[Any], pk: str, seconds: float) -> None:
    if _reminder is not None:
        _reminder(flow, pk, seconds)


__all__ = ["Done", "Flow", "LeaseLost", "Next", "Row", "Settled", "Wait", "register", "registered", "set_reminder"]
