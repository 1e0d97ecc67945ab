"""Hosts in the admin: cordoned by an action, never typed in, deleted or moved; and the task that misses the watcher."""

from __future__ import annotations

import datetime

import pytest
from django.contrib.auth.models import User
from django.urls import reverse
from django.utils import timezone

from hosts.models import Host
from hosts.tasks import unwatched
from tests.flows.test_host_placement import host

pytestmark = pytest.mark.django_db
LIST = "admin:hosts_host_changelist"


@pytest.fixture
def operator(client):
    client.force_login(User.objects.create_superuser("operator", password="a long enough password"))
    return client


def act(operator, action, *hosts):
    data = {"action": action, "_selected_action": [one.pk for one in hosts]}
    return operator.post(reverse(LIST), data, follow=True)


def test_hosts_are_cordoned_and_uncordoned(operator):
    one, other = host("one"), host("other")
    assert b"1 hosts are cordoned" in act(operator, "cordon_hosts", one).content
    assert set(Host.objects.filter(cordoned=True)) == {one}
    assert b"1 hosts are open again" in act(operator, "uncordon_hosts", one, other).content
    assert not Host.objects.filter(cordoned=True).exists()


def test_a_host_is_found_and_shown_without_its_keys(operator):
    one = host("one", admin_key_sealed=b"sealed-secret", link_key_sealed=b"sealed-secret")
    assert one.pk.encode() in operator.get(reverse(LIST) + "?q=one").content
    page = operator.get(reverse("admin:hosts_host_change", args=[one.pk])).content
    assert b"ssh-ed25519 AAAA" in page and b"sealed-secret" not in page and b"key_sealed" not in page


def test_nothing_dangerous_can_be_changed(operator):
    one = host("one")
    change = reverse("admin:hosts_host_change", args=[one.pk])
    told = {"warm": 3, "overcommit_cpu": "2.5", "overcommit_memory": "", "overcommit_disk": ""}
    operator.post(change, {**told, "address": "6.6.6.6", "state": "retired", "used_memory_mb": 5, "host_key": "x"})
    one.refresh_from_db()
    assert (one.warm, one.overcommit_cpu, one.overcommit_memory) == (3, 2.5, None)
    assert (one.address, one.state, one.used_memory_mb, one.host_key) == ("127.0.0.1", "ready", 0, "ssh-ed25519 AAAA")
    assert operator.get(reverse("admin:hosts_host_add")).status_code == 403
    assert operator.post(reverse("admin:hosts_host_delete", args=[one.pk]), {"post": "yes"}).status_code == 403


def test_hosts_that_nobody_watches_are_named():
    now = timezone.now()
    host("watched", watcher_until=now + datetime.timedelta(seconds=5))
    host("just lapsed", watcher_until=now - datetime.timedelta(seconds=5))
    host("long ago", watcher_until=now - datetime.timedelta(seconds=60))
    host("never")
    host("gone", state="retired")
    assert unwatched() == ["long ago", "never"]
