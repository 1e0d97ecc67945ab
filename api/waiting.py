"""Long-polls: waiting for a row to change without holding a thread.

One Redis subscription per process feeds a hub of waiters by id. A hint is only a hint: every waiter reads the row
itself, after it has registered, so no change is missed. One query asks now and then which of all the awaited rows have
changed, and wakes those: every 2 s while Redis is away, else every 15 s. When the subscription is back everybody reads
once. A slow re-read remains as a safety net.

The channel carries ids separated by spaces or commas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import redis.asyncio
from django.conf import settings
from django.db import InterfaceError, OperationalError

from api.bodies import ClientGone
from api.errors import Unavailable, WaitInterrupted, WaitTimedOut
from api.prepared import fetch_all
from api.stopping import going_down
from api.threads import in_database

log = logging.getLogger("api.waiting")

T = TypeVar("T")

REREAD_WITHOUT_REDIS = 2.0
REREAD_WITHOUT_DATABASE = 0.5
REREAD_WITH_REDIS = 15.0
REREAD_COMPARED = 60.0
PING_AFTER = 2.0
PINGS = 2
COMPARED_AT_ONCE = 5000


class Watch:
    """One waiter's ear for one id."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()

    async def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for a hint that came since the last call; whether one did."""
        if timeout > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._event.wait()
        heard = self._event.is_set()
        self._event.clear()
        return heard


class Hub:
    """The waiters of this process and the one subscription that wakes them. Belongs to the running event loop."""

    def __init__(self) -> None:
        self._watches: dict[str, set[Watch]] = {}
        self._tables: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.connected = False

    def register(self, prefix: str, table: str) -> None:
        """Say in which table the rows of ids with this prefix are, for the times without Redis."""
        self._tables[f"{prefix}_"] = table

    def start(self) -> None:
        """Subscribe, unless that has been done on this loop. The task is kept: a collected one would wake nobody."""
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._loop is not loop:
            self._loop = loop
            self.connected = False
            self._task = loop.create_task(self._run(), name="hints")

    async def stop(self) -> None:
        """Unsubscribe and wake everybody, for the last time."""
        if self._task is not None and self._loop is asyncio.get_running_loop():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._task = None
        self.wake_all()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._compare())

    async def _compare(self) -> None:
        """Ask which awaited rows have another version than at the last time: every 2 s without Redis; with it every
        15 s, in case a hint was lost."""
        known: dict[str, str] = {}
        clock = asyncio.get_running_loop().time
        due = 0.0
        while True:
            await asyncio.sleep(REREAD_WITHOUT_REDIS)
            if self.connected and clock() < due:
                continue
            due = clock() + REREAD_WITH_REDIS
            fresh: dict[str, str] = {}
            try:
                for prefix, table in self._tables.items():
                    names = [name for name in self._watches if name.startswith(prefix)]
                    for start in range(0, len(names), COMPARED_AT_ONCE):
                        fresh |= await in_database(_versions, table, names[start : start + COMPARED_AT_ONCE])
            except Exception as error:
                log.warning("awaited rows could not be compared: %s", error)
                continue
            for name, version in fresh.items():
                # Without hints, a row not compared before may have changed since its waiter read it.
                if known.get(name) != version and (name in known or not self.connected):
                    self.wake(name)
            known = fresh

    async def _listen(self) -> None:
        delay = 0.1
        while True:
            client = redis.asyncio.Redis.from_url(
                settings.REDIS_URL,
                socket_connect_timeout=2,
                socket_timeout=5,
                health_check_interval=0,
            )
            try:
                async with client.pubsub(ignore_subscribe_messages=False) as subscription:
                    await subscription.subscribe(settings.BERTH.HINTS_CHANNEL)
                    asked = 0
                    while True:
                        message = await subscription.get_message(timeout=PING_AFTER)
                        if message is None:  # silence: is anybody there?
                            if asked == PINGS:
                                raise TimeoutError(f"no answer for {PINGS * PING_AFTER:g} s")
                            asked += 1
                            await subscription.ping()
                            continue
                        asked = 0
                        if message["type"] == "subscribe":
                            self.connected, delay = True, 0.1
                            self.wake_all()
                        elif message["type"] == "message":
                            for name in message["data"].decode("utf-8", "replace").replace(",", " ").split():
                                self.wake(name)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if self.connected or delay == 0.1:
                    log.warning("no hints from Redis, re-reading every %g s instead: %s", REREAD_WITHOUT_REDIS, error)
            finally:
                lost, self.connected = self.connected, False
                with contextlib.suppress(Exception):
                    await client.aclose()
            if lost:  # a hint may have gone with it, and whoever cannot be compared must read more often from now on
                self.wake_all()
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311
            delay = min(delay * 2, 2.0)

    def wake(self, name: str) -> None:
        for watch in self._watches.get(name, ()):
            watch.notify()

    def wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.notify()

    @contextlib.asynccontextmanager
    async def watch(self, *names: str) -> AsyncIterator[Watch]:
        """Be registered for hints about these ids; read the rows only inside."""
        self.start()
        watch = Watch()
        for name in names:
            self._watches.setdefault(name, set()).add(watch)
        try:
            yield watch
        finally:
            for name in names:
                watches = self._watches.get(name)
                if watches is not None:
                    watches.discard(watch)
                    if not watches:
                        del self._watches[name]

    def reread_after(self, name: str = "") -> float:
        """How many seconds to sleep before reading ``name`` without a hint; jittered. Compared rows need it least: ten
        thousand waiters that each read theirs would leave no time for anybody else."""
        if any(name.startswith(prefix) for prefix in self._tables):
            interval = REREAD_COMPARED
        else:
            interval = REREAD_WITH_REDIS if self.connected else REREAD_WITHOUT_REDIS
        return interval * random.uniform(0.85, 1.0)  # noqa: S311

    async def make(self, name: str, make: Callable[[], str], deadline: float) -> str:
        """Run ``make`` in a database thread and wait for the first hint about the row it made: there is nothing to be
        read before that. Returns the id: ``name``, or that of a row which was found instead and is not waited for.
        """
        async with self.watch(name) as changed:
            made = await in_database(make)
            if made == name and self.connected:
                await changed.wait(min(deadline - asyncio.get_running_loop().time(), self.reread_after(name)))
        return made

    async def wait_until(
        self,
        name: str,
        read: Callable[[], T],
        done: Callable[[T], bool],
        deadline: float,
        gone: asyncio.Future[None] | None = None,
    ) -> T:
        """Read, in a database thread, until ``done`` or until ``deadline`` (the loop's time); the last value.

        The caller tells the two apart by asking ``done`` again. The row is read at least once, and once more at the
        deadline. A process that is going down ends every wait early. Raises ClientGone once ``gone`` is done, and
        whatever ``read`` raises, but for a broken database connection, which is tried again until the deadline.
        """
        loop = asyncio.get_running_loop()
        async with self.watch(name) as changed:
            while True:
                try:
                    value = await in_database(read)
                except (OperationalError, InterfaceError) as error:
                    # PostgreSQL may be restarting: nobody has to hear of it who was going to wait anyway.
                    if loop.time() + REREAD_WITHOUT_DATABASE >= deadline or going_down.is_set():
                        raise Unavailable("the database is not answering; try again shortly") from error
                    await asyncio.sleep(REREAD_WITHOUT_DATABASE)
                    continue
                left = deadline - loop.time()
                if done(value) or left <= 0 or going_down.is_set():
                    return value
                if gone is not None and gone.done():
                    raise ClientGone
                await changed.wait(min(left, self.reread_after(name)))


def wait_over(deadline: float, timed_out: str, now: str) -> WaitTimedOut:
    """The error of a wait that did not see what it waited for: ``timed_out`` once ``deadline`` has passed, else that
    this process stops, and how things stand (``now``)."""
    if going_down.is_set() and asyncio.get_running_loop().time() < deadline:
        return WaitInterrupted(f"this server is being stopped, so the wait ends early: {now}; ask again")
    return WaitTimedOut(timed_out)


def _versions(table: str, names: list[str]) -> dict[str, str]:
    """What PostgreSQL calls the version of each row: any update gives it another."""
    return dict(fetch_all(f"SELECT id, xmin::text FROM {table} WHERE id = ANY(%s)", [names]))


hub = Hub()
