"""A ready host's row with its stand-in, and a worker for the devboxes' flow inside the test's transaction.

`work()` runs what is due until nothing is; time passes by `sleep_over(devbox_id)`, which makes a sleeping row due.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from django.db import connection

from api.asynchronous import in_database
from api.callers import Caller
from api.ids import new_id
from api.waiting import hub
from devboxes import services
from devboxes.devbox_flow import devbox_flow
from devboxes.flow_rows import DevboxRow
from devboxes.models import Devbox, DevboxLog, DevboxTransition
from devboxes.schemas import DevboxCreateParameters
from hosts.client import use_fake
from hosts.models import Host
from tests.fake_host import FakeHost

GIB = 1024


def make_host(name: str = "fake", **columns: Any) -> FakeHost:
    """A ready host with 64 cores, 256 GiB and 1 TiB, and its stand-in, in use."""
    host = Host.objects.create(
        id=new_id("hst"),
        name=name,
        wake_at=None,
        address="127.0.0.1",
        host_key="ssh-ed25519 AAAA",
        admin_user="root",
        admin_key_sealed=b"",
        image_id="base",
        **{
            "state": "ready",
            "step": "ready",
            "cpu_millis": 64_000,
            "memory_mb": 256 * GIB,
            "disk_mb": 1024 * GIB,
            **columns,
        },
    )
    heard(host.pk)
    fake = FakeHost(host.pk)
    use_fake(host.pk, fake)
    return fake


def heard(host_id: str) -> None:
    """The host is heard now, and for the rest of the test."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE hosts_host SET seen_at = clock_timestamp() + interval '1 h' WHERE id = %s", [host_id])


def promised(host_id: str) -> tuple[int, int, int]:
    """What of the host is promised: CPU in thousandths, memory and disk in MiB."""
    host = Host.objects.get(pk=host_id)
    return host.used_cpu_millis, host.used_memory_mb, host.used_disk_mb


def work(limit: int = 50) -> list[str]:
    """Run every due row of the flow, again and again until none is due; the ids in the order they were run."""
    ran: list[str] = []
    for _ in range(limit):
        with connection.cursor() as cursor:
            # Inside one transaction now() stands still, and what is due "now" would never be.
            cursor.execute(
                "UPDATE devboxes_devbox SET wake_at = now() WHERE wake_at > now() AND wake_at <= clock_timestamp()"
            )
            cursor.execute(
                "SELECT id FROM devboxes_devbox WHERE wake_at <= now() AND (lease_until IS NULL OR lease_until < now())"
            )
            due = [pk for (pk,) in cursor.fetchall() if devbox_flow.run(pk)]
        if not due:
            return ran
        ran += due
    raise AssertionError(f"still due after {limit} rounds: {ran[-3:]}")


def sleep_over(devbox_id: str) -> None:
    """Make a sleeping row due, without a wake."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET wake_at = now() WHERE id = %s AND wake_at IS NOT NULL", [devbox_id])


def lapse(devbox_id: str) -> None:
    """Let the lease of a dead worker lapse."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE devboxes_devbox SET lease_until = now() - interval '1 s' WHERE id = %s", [devbox_id])


def row(devbox_id: str) -> Devbox:
    """The devbox's row as it is now."""
    return Devbox.objects.get(pk=devbox_id)


def statuses(devbox_id: str) -> list[str]:
    """Its public transitions."""
    return list(DevboxTransition.objects.filter(devbox_id=devbox_id).order_by("id").values_list("status", flat=True))


def logged(devbox_id: str) -> list[tuple[str | None, str | None, int | None]]:
    """Its log: command, message, exit code of each entry."""
    found: list[tuple[str | None, str | None, int | None]] = []
    for entry in DevboxLog.objects.filter(devbox_id=devbox_id).order_by("id"):
        if entry.started_at is None:
            found.append((entry.cmd, entry.message, entry.exit_code))
            continue
        if entry.cmd is not None:
            found.append((entry.cmd, None, None))
        for output in (entry.stdout, entry.stderr):
            found += [(None, _text(line), None) for line in bytes(output or b"").splitlines()]
        found.append((None, None, entry.exit_code))
    return found


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").replace("\0", "\ufffd")


@contextlib.contextmanager
def working(web: Any, *fakes: FakeHost) -> Iterator[None]:
    """A worker and a watcher run on the client's loop while a request is being made."""

    def once() -> list[str]:
        ran = work()
        for fake in fakes:
            if fake.unacked:
                ran += [box for box, _ in fake.deliver()]
        return ran

    async def forever() -> None:
        while True:
            for pk in await in_database(once):
                hub.wake(pk)
            await asyncio.sleep(0.005)

    task = web.loop.create_task(forever())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            web.run(task)


def create(caller: Caller, **parameters: Any) -> str:
    """A devbox of these `DevboxCreateParameters`."""
    checked = DevboxCreateParameters(data=parameters)
    checked.is_valid(raise_exception=True)
    return services.create_devbox(caller, checked.validated_data, raw_body=b"", request_id=None)


def created_running(caller: Caller, **parameters: Any) -> str:
    """One that runs."""
    devbox_id = create(caller, **parameters)
    work()
    assert row(devbox_id).status == "running", row(devbox_id).why
    return devbox_id


def created_over(caller: Caller) -> str:
    """One that was shut down before it came to a host."""
    devbox_id = create(caller)
    services.request_shutdown(devbox_id)
    work()
    return devbox_id


def claim(devbox_id: str) -> DevboxRow:
    """The row as a worker holds it."""
    sleep_over(devbox_id)
    claimed = devbox_flow.claim(devbox_id)
    assert claimed is not None
    return claimed


def expire(devbox_id: str) -> None:
    """Let the time of its step be up."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE devboxes_devbox SET deadline_at = now() - interval '1 s', wake_at = now() WHERE id = %s",
            [devbox_id],
        )
