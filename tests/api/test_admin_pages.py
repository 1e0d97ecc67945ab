"""Every model has its pages in the admin, every page opens, and none of them saves a durable row."""

from __future__ import annotations

from typing import Any

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.admin.utils import quote
from django.contrib.auth.models import Group, User
from django.db import connection
from django.db.models import Model
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from devboxes.models import Devbox
from flows.models import Durable
from hosts.client import use_fake
from hosts.models import Host, WatcherReplica
from snapshots import holders
from tests.conftest import Party
from tests.devbox_world import make_host, row, work
from tests.house.tree import ROOMS

MODELS = [model for model in apps.get_models() if model._meta.app_label in ROOMS]
ROWS_OF: list[type[Model]] = [*MODELS, User, Group]


def page(thing: Model, name: str = "change") -> str:
    args = [] if name == "changelist" else [quote(thing.pk)]
    return reverse(f"admin:{thing._meta.app_label}_{thing._meta.model_name}_{name}", args=args)


@pytest.fixture
def operator(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("operator", password="a long enough password"))
    return client


@pytest.fixture
def world(alice: Party, operator: Client) -> Any:
    """At least one row of every model: a devbox on a host with a launch command, a command, a replica, a group."""
    fake = make_host("machine-7")
    fake.script("true")
    body = {"name": "mine", "launch_parameters": {"launch_commands": ["true"]}}
    devbox_id = alice.post("/v1/devboxes", body, headers={"x-request-id": "once"}).json()["id"]
    work()
    fake.deliver()
    work()
    assert row(devbox_id).status == "running", row(devbox_id).why
    assert (
        alice.post(f"/v1/devboxes/{devbox_id}/execute_async", {"command": "true", "shell_name": "a"}).status_code == 200
    )
    assert alice.post(f"/v1/devboxes/{devbox_id}/create_pty_tunnel").status_code == 200
    assert alice.post(f"/v1/devboxes/{devbox_id}/enable_tunnel", {}).status_code == 200
    snapshot = alice.post(f"/v1/devboxes/{devbox_id}/snapshot_disk_async").json()["id"]
    with connection.cursor() as cursor:
        holders.note(cursor, snapshot, fake.host_id)
        cursor.execute("INSERT INTO hosts_watcherreplica (id, until) VALUES ('one', now())")
    Group.objects.create(name="readers")
    ticket = operator.post(reverse("web_terminal_ticket", args=[devbox_id]))
    assert ticket.status_code == 200, ticket.content
    yield fake
    use_fake(fake.host_id, None)


def test_every_model_is_registered() -> None:
    assert MODELS
    assert [model._meta.label for model in MODELS if not admin.site.is_registered(model)] == []


def test_every_page_opens_and_no_durable_row_is_saved(operator: Client, world: Any) -> None:
    durable = [model for model in MODELS if issubclass(model, Durable)]
    assert len(durable) >= 3
    for model in ROWS_OF:
        thing: Any = model._default_manager.order_by("pk").last()
        assert thing is not None, f"the test has no row of {model._meta.label}"
        for name in ("changelist", "change", "history"):
            assert operator.get(page(thing, name)).status_code == 200, (name, model._meta.label)
        text = operator.get(page(thing, "changelist")).content.decode()
        assert page(thing) in text, f"the list of {model._meta.label} does not lead to its rows"
        if model not in durable:
            continue
        with CaptureQueriesContext(connection) as queries:
            operator.post(page(thing), {"name": "by hand", "status": "failure", "step": "gone", "state": "failed"})
            operator.post(page(thing, "delete"), {"post": "yes"})
        written = [
            query["sql"] for query in queries.captured_queries
            if model._meta.db_table in query["sql"] and not query["sql"].startswith("SELECT")
        ]  # fmt: skip
        if model is Host:  # how much is promised there and how many boxes are kept ready, nothing else
            written = [sql for sql in written if any(word in sql for word in ("state", "step", "lease", "fence"))]
        assert written == []
        assert model._default_manager.filter(pk=thing.pk).exists()


def test_devboxes_are_shut_down_and_hosts_cordoned_from_their_lists(operator: Client, world: Any) -> None:
    host = Host.objects.get(pk=world.host_id)
    devbox = Devbox.objects.get()
    for thing, action in ((devbox, "shut_down"), (host, "cordon_hosts")):
        chosen = {"action": action, "_selected_action": [thing.pk]}
        assert operator.post(page(thing, "changelist"), chosen, follow=True).status_code == 200
    assert row(devbox.pk).status == "shutdown"
    host.refresh_from_db()
    assert host.cordoned


def test_replicas_are_looked_at_only(operator: Client, world: Any) -> None:
    replica = WatcherReplica.objects.get(pk="one")
    assert operator.post(page(replica, "delete"), {"post": "yes"}).status_code == 403
    assert operator.post(page(replica), {"id": "two"}).status_code == 403
