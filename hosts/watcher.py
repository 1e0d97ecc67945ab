"""The watcher: one event channel per host, shared out between replicas by leases in the rows.

In charge of hearing hosts: heartbeats become `seen_at`, exits go to their owners in batches and are acknowledged after
the commit, every connect and every 30 s a whole report is reconciled, and a silence of LOST_AFTER is declared. What an
exit means is the owners' business (`hosts.registry`).

One thread per host, because each blocks on its own channel and writes its own batches. A replica that dies is replaced
when its leases lapse; what it heard and did not acknowledge is told again by the host.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from typing import Any, Final

from django.db import DatabaseError, connection

from hostd import messages
from hosts import reconcile, registry
from hosts.client import HostClient, HostRefused, HostUnreachable, client_for
from hosts.delivery import deliver
from hosts.policy import policy
from hosts.streams import Watching
from hosts.upkeep import WrongHost, keep_up

LEASE_SECONDS: Final = 6
"""Shorter than SILENT_AFTER, so that a watcher that was killed is replaced before its hosts count as silent."""
ROUND_SECONDS: Final = 2.0
"""How often leases are renewed and shared out anew."""
REPORT_SECONDS: Final = 30.0
QUIET_SECONDS: Final = 3 * messages.HEARTBEAT_SECONDS
"""Without a heartbeat for so long, the channel is given up and dialled again."""
SEEN_EVERY: Final = 1.0
CATCH_UP_SECONDS: Final = 0.3
BATCH_MAX: Final = 500
HELD_MAX: Final = 10_000
"""Events that their owners did not take and that are offered again with the next report, per host."""
BACKOFF_SECONDS: Final = (0.5, 5.0)

log = logging.getLogger(__name__)

# The one statement's commit is relaxed: a lost heartbeat is told again in two seconds.
_SEEN = """
    UPDATE hosts_host SET seen_at = clock_timestamp() WHERE id = %s AND watcher = %s
    RETURNING set_config('synchronous_commit', 'off', true)
"""
_IS_SILENT = """
    SELECT (extract(epoch FROM seen_at) * 1000)::bigint FROM hosts_host
     WHERE id = %s AND watcher = %s AND lost_at IS NULL AND seen_at < clock_timestamp() - make_interval(secs => %s)
"""
_LOST = "UPDATE hosts_host SET lost_at = clock_timestamp() WHERE id = %s AND watcher = %s"
_HELLO = """
    INSERT INTO hosts_watcherreplica (id, until) VALUES (%(me)s, clock_timestamp() + make_interval(secs => %(lease)s))
    ON CONFLICT (id) DO UPDATE SET until = excluded.until
"""
_SHARE = """
    SELECT ceil(count(*)::numeric / greatest(1, (SELECT count(*) FROM hosts_watcherreplica WHERE until > now())))::int
      FROM hosts_host WHERE state IN ('ready', 'retiring')
"""
_RENEW = """
    UPDATE hosts_host SET watcher_until = clock_timestamp() + make_interval(secs => %(lease)s)
     WHERE watcher = %(me)s AND state IN ('ready', 'retiring') RETURNING id
"""
_TAKE = """
    UPDATE hosts_host SET watcher = %(me)s, watcher_until = clock_timestamp() + make_interval(secs => %(lease)s)
     WHERE id IN (SELECT id FROM hosts_host
                   WHERE state IN ('ready', 'retiring') AND watcher <> %(me)s
                     AND (watcher_until IS NULL OR watcher_until < clock_timestamp())
                   ORDER BY id LIMIT %(free)s FOR UPDATE SKIP LOCKED)
    RETURNING id
"""
_GOODBYE = "DELETE FROM hosts_watcherreplica WHERE id = %s OR until < now() - interval '1 day'"
_LEAVE = "UPDATE hosts_host SET watcher = '', watcher_until = NULL WHERE watcher = %s AND id = ANY(%s)"


class Watcher:
    """A replica: holds a fair share of the hosts and a thread for each."""

    def __init__(self) -> None:
        self.me = f"wtc_{uuid.uuid4().hex}"
        self._hosts: dict[str, HostWatch] = {}

    def run(self, stop: threading.Event) -> None:
        """Until `stop` is set. The database may go away and come back."""
        log.info("watcher %s starts", self.me)
        while not stop.is_set():
            try:
                self.round()
            except DatabaseError as error:
                log.warning("the database cannot be asked: %s", error)
                connection.close()
            stop.wait(ROUND_SECONDS)
        self.leave()

    def round(self) -> None:
        """Renew what is held, take what is free up to the share, give back what is over it."""
        asked_at = time.monotonic()
        parameters: dict[str, Any] = {"me": self.me, "lease": LEASE_SECONDS}
        with connection.cursor() as cursor:
            cursor.execute(_HELLO, parameters)
            cursor.execute(_SHARE)
            share: int = cursor.fetchone()[0]
            cursor.execute(_RENEW, parameters)
            held = {row[0] for row in cursor.fetchall()}
            if len(held) < share:
                cursor.execute(_TAKE, {**parameters, "free": share - len(held)})
                held |= {row[0] for row in cursor.fetchall()}
            extra = sorted(held)[share:]
            if extra:
                cursor.execute(_LEAVE, [self.me, extra])
                held -= set(extra)
        for host_id in set(self._hosts) - held:
            self._hosts.pop(host_id).stop()
        for host_id in held:
            watch = self._hosts.get(host_id)
            if watch is None or not watch.thread.is_alive():
                watch = self._hosts[host_id] = HostWatch(host_id, self.me)
                watch.thread.start()
            watch.until = asked_at + LEASE_SECONDS

    def leave(self) -> None:
        """Stop every thread and give every lease back, so that another replica takes over at once."""
        for watch in self._hosts.values():
            watch.stop()
        for watch in self._hosts.values():
            watch.thread.join(7)
        try:
            with connection.cursor() as cursor:
                cursor.execute(_LEAVE, [self.me, list(self._hosts)])
                cursor.execute(
                    "DELETE FROM hosts_watcherreplica WHERE id = %s OR until < now() - interval '1 day'", [self.me]
                )
        except DatabaseError as error:
            log.warning("the leases could not be given back, they lapse in %d s: %s", LEASE_SECONDS, error)
        self._hosts.clear()


class HostWatch:
    """One host's event channel."""

    def __init__(self, host_id: str, watcher: str, client: HostClient | None = None) -> None:
        self.host_id = host_id
        self.watcher = watcher
        self.client = client or client_for(host_id)
        self.until = time.monotonic() + LEASE_SECONDS
        self.thread = threading.Thread(target=self._run, name=f"watch-{host_id}", daemon=True)
        self._stop = threading.Event()
        self._watching: Watching | None = None
        self._odd: frozenset[str] = frozenset()
        self._held: dict[tuple[str, str], Any] = {}
        self._since = time.monotonic()
        self._heard_at = 0.0
        self._seen_noted = 0.0
        self._reported_at = 0.0

    def stop(self) -> None:
        """End soon: the channel is closed under it."""
        self._stop.set()
        watching = self._watching
        if watching is not None:
            watching.close()

    def holds(self) -> bool:
        """Whether the lease is surely still ours."""
        return not self._stop.is_set() and time.monotonic() < self.until

    def _run(self) -> None:
        failures = 0
        try:
            while not self._stop.is_set():
                try:
                    started_at = time.monotonic()
                    self.watch()
                except (HostUnreachable, HostRefused, WrongHost, messages.ProtocolError) as error:
                    if self._stop.is_set():
                        break
                    failures = 0 if time.monotonic() - started_at > 30 else failures + 1
                    log.warning("host %s is not heard: %s", self.host_id, error)
                except DatabaseError as error:
                    failures += 1
                    log.warning("host %s: the database cannot be asked: %s", self.host_id, error)
                    connection.close()
                except Exception:
                    failures += 1
                    log.exception("host %s: its watch broke and is begun anew", self.host_id)
                self._silence()
                pause = min(BACKOFF_SECONDS[1], BACKOFF_SECONDS[0] * 2 ** min(failures, 6))
                self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  (spread, not secrecy)
        finally:
            connection.close()

    def watch(self) -> None:
        """Hear the host until something breaks, which raises, or until the lease is gone."""
        with self.client.watch(stats_seconds=int(policy().stats_seconds)) as watching:
            self._watching = watching
            try:
                self._heard_at = time.monotonic()
                self._catch_up(watching)
                self.compare()
                registry.heard(self.host_id)
                while self.holds():
                    events = watching.events(messages.HEARTBEAT_SECONDS)
                    if not events:
                        if time.monotonic() - self._heard_at > QUIET_SECONDS:
                            raise HostUnreachable(self.host_id, f"no heartbeat for {QUIET_SECONDS:g} s")
                        continue
                    self._heard_at = time.monotonic()
                    self._note_seen()
                    told = [event for event in events if event["event"] != "heartbeat"]
                    for at in range(0, len(told), BATCH_MAX):
                        self.take(watching, told[at : at + BATCH_MAX])
                    if time.monotonic() - self._reported_at > REPORT_SECONDS:
                        self.compare()
                        self.take(watching, list(self._held.values()))
            finally:
                self._watching = None

    def _catch_up(self, watching: Watching) -> None:
        """What is waiting is told first on a new channel: take it before a report is compared, for it knows more."""
        for _ in range(HELD_MAX // BATCH_MAX):
            events = watching.events(CATCH_UP_SECONDS)
            self.take(watching, [event for event in events if event["event"] != "heartbeat"])
            if not events or events[-1]["event"] == "heartbeat":
                return

    def take(self, watching: Watching, events: list[Any]) -> None:
        """A batch to its owners, then acknowledge what they have committed; the rest is kept to be offered again."""
        if not events:
            return
        acks = deliver(self.host_id, events)
        for event in events:
            self._held[_key(event)] = event
        for pair in acks:
            self._held.pop(pair, None)
        while len(self._held) > HELD_MAX:
            self._held.pop(next(iter(self._held)))  # the host still has it, and tells it on the next connect
        watching.ack(acks)

    def compare(self) -> None:
        """Bring row and hostd up to date, then reconcile a whole report."""
        kept = keep_up(self.client)
        self._reported_at = time.monotonic()
        if kept.upgraded:
            self._reported_at -= REPORT_SECONDS - 3  # once more when the new one is up
            return
        expected = reconcile.expected_on(self.host_id)  # before the report: see hosts.reconcile
        report = self.client.report()
        corrections = reconcile.plan(expected, report, self._odd, rebooted=kept.rebooted)
        self._odd = corrections.seen
        if self.holds():
            reconcile.apply(self.client, corrections)
            reconcile.drop_superfluous(self.client, report)

    def _note_seen(self) -> None:
        if time.monotonic() - self._seen_noted >= SEEN_EVERY:
            self._seen_noted = time.monotonic()
            with connection.cursor() as cursor:
                cursor.execute(_SEEN, [self.host_id, self.watcher])

    def _silence(self) -> None:
        """Declare what was there lost when nobody heard the host for LOST_AFTER. Once per silence.

        We must have tried for that long ourselves: after an outage of our own side the row is old, the host is not.
        """
        limit = policy().lost_after
        if not self.holds() or time.monotonic() - self._since < limit:
            return
        try:
            with connection.cursor() as cursor:
                cursor.execute(_IS_SILENT, [self.host_id, self.watcher, limit])
                found = cursor.fetchone()
                if found is None:
                    return
                why = f"its host has been silent for {limit:.0f} s"
                count = reconcile.declare_lost(self.host_id, why, found[0])
                cursor.execute(_LOST, [self.host_id, self.watcher])
            log.error("host %s is silent for %.0f s: %d of its boxes and commands are lost", self.host_id, limit, count)
        except DatabaseError as error:
            log.warning("host %s: its silence could not be noted: %s", self.host_id, error)
            connection.close()


def _key(event: Any) -> tuple[str, str]:
    return event["box"], event.get("id", messages.BOX_EXIT_ID)
