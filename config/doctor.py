"""Whether an installation is well: what it stands on is asked one by one, and what is wrong is told with its cure.

In charge of the looking only: it changes nothing, but for an object of its own in S3 that it writes, reads and deletes.
Not in charge of settings that contradict each other (`config.checks`, which it asks too), nor of how it is printed.

Every look has a bound of its own, so that a doctor always answers.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import redis
from cryptography import x509
from django.apps import apps
from django.conf import settings
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor

from accounts.sealing import unseal
from api.ids import new_id
from config import checks
from flows.models import Durable
from hosts import shipping
from hosts.client import HostError, client_for
from hosts.models import Host, HostState, WatcherReplica
from hosts.policy import policy
from storage import objects

CLOCKS_APART: Final = 2.0
"""Seconds between two clocks that are worth a word: leases and presigned URLs go by them."""
CLOCKS_BAD: Final = 60.0
WAITING_SECONDS: Final = 60.0
"""Work that is due for so long is taken by nobody."""
CERTIFICATE_DAYS: Final = 21
REDIS_SECONDS: Final = 3.0
STATEMENT: Final = "SET LOCAL statement_timeout = '5s'"
PROBE_KEY: Final = "doctor/"

Verdict = Literal["well", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `cure` says what to do, empty when all is well."""

    what: str
    verdict: Verdict
    said: str
    cure: str = ""


def examine() -> Iterator[Finding]:
    """All findings, each as soon as it is had. Raises nothing: what cannot be looked at is a finding."""
    yield from _guarded("settings", _settings)
    database = list(_guarded("database", _database))
    yield from database
    yield from _guarded("redis", _redis)
    yield from _guarded("S3", _storage)
    yield from _guarded("certificate", _certificate)
    if any(finding.verdict == "bad" and finding.what == "database" for finding in database):
        yield Finding("hosts", "warning", "not looked at: they are known to the database", "mend the database first")
        return
    yield from _guarded("roles", _roles)
    yield from _guarded("hosts", _hosts)


def _guarded(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except Exception as error:  # whatever it is, the next organ is looked at
        yield Finding(what, "bad", f"{type(error).__name__}: {error}", "this look itself failed: the words say why")


def _settings() -> Iterator[Finding]:
    problems = checks.problems()
    for problem in problems:
        verdict: Verdict = "bad" if problem.is_serious() else "warning"
        yield Finding("settings", verdict, str(problem.msg), str(problem.hint or f"see {problem.id}"))
    if not problems:
        yield Finding("settings", "well", "they fit each other")


def _database() -> Iterator[Finding]:
    try:
        with connection.cursor() as cursor:
            began = time.time()
            cursor.execute("SELECT current_setting('server_version'), extract(epoch FROM clock_timestamp())")
            version, theirs = cursor.fetchone()
            took, apart = time.time() - began, float(theirs) - (began + time.time()) / 2
            cursor.execute(
                "SELECT current_setting('fsync'), current_setting('full_page_writes'), "
                "current_setting('max_connections')::int, (SELECT count(*) FROM pg_stat_activity)"
            )
            fsync, pages, most, used = cursor.fetchone()
    except DatabaseError as error:
        said = " ".join(str(error).split())
        yield Finding("database", "bad", said, "start PostgreSQL, or correct DATABASE_URL")
        return
    yield Finding(
        "database", "well", f"PostgreSQL {version} answers in {took * 1000:.1f} ms; {used} of {most} connections"
    )
    if fsync != "on" or pages != "on":
        said = f"fsync is {fsync}, full_page_writes is {pages}: a power loss would take acknowledged work"
        yield Finding("database", "bad", said, "set both to on in postgresql.conf")
    if used > 0.9 * most:
        yield Finding("database", "warning", f"{used} of {most} connections are taken", "raise max_connections")
    yield _clock("the database", apart)
    executor = MigrationExecutor(connection)
    plan = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if plan:
        names = ", ".join(f"{one.app_label}.{one.name}" for one, _ in plan[:5])
        yield Finding("database", "bad", f"{len(plan)} migrations are not applied: {names}", "manage.py migrate")


def _clock(whose: str, apart: float) -> Finding:
    said = f"{whose}'s is {abs(apart):.2f} s {'ahead of' if apart > 0 else 'behind'} ours"
    if abs(apart) < CLOCKS_APART:
        return Finding("clocks", "well", said)
    verdict: Verdict = "warning" if abs(apart) < CLOCKS_BAD else "bad"
    return Finding("clocks", verdict, said, "let both machines follow a time server (chrony, systemd-timesyncd)")


def _redis() -> Iterator[Finding]:
    client = redis.Redis.from_url(
        settings.REDIS_URL, socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS, retry=None
    )
    try:
        began = time.monotonic()
        client.ping()
        took = time.monotonic() - began
        told = client.info("server")
        waiting = {queue: int(client.llen(queue)) for queue in ("executions", "devboxes", "hosts", "snapshots")}
    except redis.RedisError as error:
        cure = "start it, or correct REDIS_URL; until then work goes on by the workers' own sweeps, more slowly"
        yield Finding("redis", "bad", " ".join(str(error).split()), cure)
        return
    finally:
        client.close()
    name = told.get("server_name", "redis")
    yield Finding("redis", "well", f"{name} {told.get('redis_version', '')} answers in {took * 1000:.1f} ms")
    if full := {queue: count for queue, count in waiting.items() if count > 1000}:
        said = ", ".join(f"{count} in {queue}" for queue, count in full.items())
        yield Finding("redis", "warning", f"nudges pile up: {said}", "start more workers for these queues")


def _storage() -> Iterator[Finding]:
    where = f"bucket {settings.S3['bucket']!r} at {settings.S3['endpoint_url'] or 'the default endpoint'}"
    key, data = f"{PROBE_KEY}{new_id('req')}", os.urandom(1024)
    began = time.monotonic()
    try:
        objects.put(key, data)
        try:
            if objects.get_range(key, 0, len(data)) != data:
                yield Finding("S3", "bad", f"{where} gives back other bytes than it took", "do not use this server")
                return
        finally:
            objects.delete(key)
    except objects.StorageError as error:
        yield Finding("S3", "bad", f"{where}: {error}", _storage_cure(str(error)))
        return
    yield Finding("S3", "well", f"{where}: written, read and deleted in {(time.monotonic() - began) * 1000:.0f} ms")


def _storage_cure(said: str) -> str:
    cures = {
        "NoSuchBucket": "make the bucket, or correct S3_BUCKET",
        "AccessDenied": "let this key put, get, list and delete in the bucket",
        "Forbidden": "let this key put, get, list and delete in the bucket",
        "InvalidAccessKeyId": "correct S3_ACCESS_KEY_ID",
        "SignatureDoesNotMatch": "correct S3_SECRET_ACCESS_KEY",
        "RequestTimeTooSkewed": "correct this machine's clock",
        "connect": "start the server, or correct S3_ENDPOINT_URL",
    }
    return next((cure for sign, cure in cures.items() if sign in said), "see what the server says")


def _certificate() -> Iterator[Finding]:
    named = settings.TLS_CERTIFICATE
    if not named or not Path(named).exists():
        yield Finding("certificate", "well", "none: nothing listens with TLS")
        return
    found = x509.load_pem_x509_certificate(Path(named).read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    left = (found.not_valid_after_utc - now).days
    said = f"{named} is valid for {left} days more"
    if found.not_valid_before_utc > now:
        yield Finding("certificate", "bad", f"{named} is not valid yet", "correct this machine's clock")
    elif left < 0:
        yield Finding("certificate", "bad", f"{named} ended {-left} days ago", "renew it; `make up` renews its own")
    elif left < CERTIFICATE_DAYS:
        yield Finding("certificate", "warning", said, "renew it; `make up` renews its own")
    else:
        yield Finding("certificate", "well", said)


def _roles() -> Iterator[Finding]:
    watchers = WatcherReplica.objects.filter(until__gt=datetime.datetime.now(datetime.UTC)).count()
    if watchers:
        yield Finding("watcher", "well", f"{watchers} at work")
    else:
        yield Finding("watcher", "bad", "none is at work: nobody hears the hosts", "manage.py watch_hosts")
    late = 0
    for model in [one for one in apps.get_models() if issubclass(one, Durable)]:
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT count(*), coalesce(extract(epoch FROM max(now() - wake_at)), 0) FROM {model._meta.db_table} "
                "WHERE wake_at < now() - make_interval(secs => %s) AND (lease_until IS NULL OR lease_until < now())",
                [WAITING_SECONDS],
            )
            count, longest = cursor.fetchone()
        late += count
        if count:
            said = f"{count} {model._meta.verbose_name_plural} due and taken by nobody, the oldest for {longest:.0f} s"
            yield Finding("worker", "bad", said, "celery -A config worker, of all queues")
    if not late:
        yield Finding("worker", "well", f"no work has been due for more than {WAITING_SECONDS:.0f} s")


def _hosts() -> Iterator[Finding]:
    rows = list(Host.objects.filter(state__in=[HostState.READY, HostState.RETIRING]).order_by("name"))
    if not rows:
        yield Finding("hosts", "bad", "no VM host is enrolled", "manage.py enrol_host")
    for row in rows:
        yield from _guarded(f"host {row.name}", lambda row=row: _host(row))  # type: ignore[misc]


def _host(row: Host) -> Iterator[Finding]:
    what = f"host {row.name}"
    if row.link_key_sealed is not None:
        unseal(row.link_key_sealed)  # a key that cannot be read is said as such
    try:
        began = time.time()
        told = client_for(row.id).hello()
        report = client_for(row.id).report()
        apart = report["at_ms"] / 1000 - (began + time.time()) / 2
    except HostError as error:
        silent = f"last heard {row.seen_at:%Y-%m-%d %H:%M:%S} UTC" if row.seen_at else "never heard"
        cure = f"look at sshd and hostd on {row.address}:{row.port}; `manage.py enrol_host` again repairs both"
        yield Finding(what, "bad", f"does not answer ({error}); {silent}", cure)
        return
    yield Finding(
        what, "well", f"{told['boxes']} boxes, {told['warm']} warm; kernel {told['kernel']}, {told['cgroup']}"
    )
    yield _clock(what, apart)
    if told["cluster"] != settings.BERTH.cluster:
        yield Finding(
            what, "bad", f"says it belongs to cluster {told['cluster']}", "retire it there, and enrol it here"
        )
    if told["digest"] != shipping.bundle().digest:
        cure = "restart the watcher; it ships ours" if row.state == HostState.READY else "it is retiring: none"
        yield Finding(what, "warning", "runs another version of hostd than ours", cure)
    if row.image_id and row.image_id not in told["images"]:
        yield Finding(what, "bad", f"lacks its image {row.image_id}", "enrol it again: the image is sent to it")
    free = told["pool_free_bytes"] / max(1, told["pool_bytes"])
    if free < policy().pool_kept_free:
        said = f"{free:.0%} of its pool is free: nothing is placed there"
        yield Finding(what, "bad", said, "end or move devboxes, delete snapshots, or give it a larger pool")
    if told["memory_free_bytes"] / max(1, told["memory_bytes"]) < policy().memory_kept_free:
        said = f"{told['memory_free_bytes'] >> 20} MiB of memory are free: nothing is placed there"
        yield Finding(what, "bad", said, "end devboxes, or lower its overcommit_memory")
    if (
        row.seen_at is None
        or (datetime.datetime.now(datetime.UTC) - row.seen_at).total_seconds() > policy().silent_after
    ):
        yield Finding(what, "bad", "answers us, and its watcher does not hear it", "restart the watcher, see its log")
