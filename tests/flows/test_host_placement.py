"""Reservations on hosts' rows: never more than there is, by anybody at once, and never on a host that is not there."""

from __future__ import annotations

import dataclasses
import datetime
import threading
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from api.ids import new_id
from hosts.models import Host
from hosts.placement import choose, fits_any, release, reserve
from hosts.policy import policy

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def rules(settings):
    """Overcommit of one, so that the tests' numbers are the machine's."""
    settings.BERTH = dataclasses.replace(
        django_settings.BERTH, OVERCOMMIT_CPU=1, OVERCOMMIT_MEMORY=1, OVERCOMMIT_DISK=1
    )
    policy.cache_clear()
    yield
    policy.cache_clear()


def host(name="one", **more) -> Host:
    fields = {
        "id": new_id("hst"),
        "name": name,
        "state": "ready",
        "step": "ready",
        "wake_at": None,
        "address": "127.0.0.1",
        "host_key": "ssh-ed25519 AAAA",
        "admin_user": "root",
        "admin_key_sealed": b"",
        "image_id": "base",
        "cpu_millis": 8000,
        "memory_mb": 16_000,
        "disk_mb": 100_000,
        "memory_free_mb": 15_000,
        "pool_free_mb": 90_000,
        "seen_at": timezone.now(),
    }
    return Host.objects.create(**(fields | more))


def take(host: Host, cpu=1000, memory=1000, disk=1000) -> bool:
    with transaction.atomic(), connection.cursor() as cursor:
        return reserve(cursor, host.pk, cpu, memory, disk)


def used(host: Host) -> tuple[int, int, int]:
    host.refresh_from_db()
    return host.used_cpu_millis, host.used_memory_mb, host.used_disk_mb


def test_a_reservation_is_written_and_given_back():
    there = host()
    assert take(there, 1000, 2000, 4000) and used(there) == (1000, 2000, 4000)
    with connection.cursor() as cursor:
        release(cursor, there.pk, 1000, 2000, 4000)
    assert used(there) == (0, 0, 0)


def test_giving_back_too_much_never_goes_below_nothing():
    there = host()
    with connection.cursor() as cursor:
        release(cursor, there.pk, 1000, 2000, 4000)
    assert used(there) == (0, 0, 0)


@pytest.mark.parametrize("over", [{"cpu": 8001}, {"memory": 16_001}, {"disk": 90_001}])
def test_no_resource_is_promised_beyond_what_there_is(over):
    there = host()
    assert not take(there, **over)
    exact = {name: value - 1 for name, value in over.items()}
    assert take(there, **exact)
    assert not take(there, **dict.fromkeys(over, 1))


def test_a_tenth_of_the_pool_stays_free():
    there = host(pool_free_mb=9_999)
    assert not take(there, disk=1)
    Host.objects.update(pool_free_mb=10_001)
    assert take(there, disk=1)


def test_a_host_without_real_free_memory_gets_nothing():
    assert not take(host(memory_free_mb=700))


def test_overcommit_of_the_host_goes_before_the_setting():
    there = host(overcommit_cpu=2.0)
    assert take(there, cpu=8000) and take(there, cpu=8000) and not take(there, cpu=1)


@pytest.mark.parametrize(
    "change",
    [
        {"cordoned": True},
        {"state": "retiring"},
        {"state": "enrolling"},
        {"state": "failed"},
        {"seen_at": None},
        {"seen_at": timezone.now() - datetime.timedelta(seconds=60)},
    ],
)
def test_hosts_that_get_no_placements(change):
    there = host(**change)
    assert not take(there) and chosen(1000, 1000, 1000) == []


def chosen(*size: Any) -> list[str]:
    return [host_id for host_id, _ in choose(*size)]


def test_the_emptiest_host_comes_first_and_full_ones_not_at_all():
    full, half, empty = host("full", used_cpu_millis=8000), host("half", used_memory_mb=8000), host("empty")
    assert chosen(1000, 1000, 1000) == [empty.pk, half.pk]
    assert full.pk not in chosen(1000, 1000, 1000)


def test_architecture_and_image_decide():
    arm, old, there = host("arm", architecture="aarch64"), host("old", image_id="older"), host("there")
    assert chosen(1, 1, 1, "aarch64") == [arm.pk]
    assert set(chosen(1, 1, 1, "x86_64")) == {old.pk, there.pk}
    assert chosen(1, 1, 1, "x86_64", "older") == [old.pk]


def test_what_could_ever_fit():
    assert not fits_any(1, 1, 1)
    host(used_cpu_millis=8000, cordoned=True, seen_at=None)
    assert fits_any(8000, 16_000, 90_000)  # full, cordoned and silent: it may be waited for
    assert not fits_any(8001, 1, 1) and not fits_any(1, 16_001, 1) and not fits_any(1, 1, 90_001)
    assert not fits_any(1, 1, 1, "aarch64")
    Host.objects.update(state="retired")
    assert not fits_any(1, 1, 1)


def test_memory_that_does_not_exist_is_not_granted_to_one_box_whatever_the_overcommit():
    host(overcommit_memory=4.0, overcommit_cpu=4.0)
    assert not fits_any(1000, 20_000, 1000)
    assert fits_any(32_000, 1000, 1000)  # cores are shared in time


def test_a_name_is_free_again_once_its_host_is_retired():
    first = host("local")
    with pytest.raises(IntegrityError), transaction.atomic():
        host("local")
    Host.objects.filter(pk=first.pk).update(state="retired")
    assert host("local").pk != first.pk


@pytest.mark.django_db(transaction=True)
def test_many_at_once_promise_no_more_than_there_is():
    there = host()
    granted = []

    def work():
        try:
            for _ in range(10):
                if take(there, cpu=500, memory=100, disk=100):
                    granted.append(1)
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 16 and used(there)[0] == 8000
