"""Devboxes in the admin: listed, searchable, linked, not editable, and shut down by an action."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

from devboxes.models import Devbox
from hosts.client import use_fake
from tests.conftest import Party
from tests.devbox_world import make_host, row, work

URL = "/admin/devboxes/devbox/"


@pytest.fixture
def operator(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("operator", password="x"))
    return client


@pytest.fixture
def devbox_id(alice: Party) -> Any:
    fake = make_host("machine-7")
    body = {
        "name": "mine",
        "environment_variables": {"KEY": "s3cret-value"},
        "launch_parameters": {"launch_commands": ["true"]},
    }
    fake.script("true")
    made = alice.post("/v1/devboxes", body).json()["id"]
    work()
    yield made
    use_fake(fake.host_id, None)


@pytest.mark.parametrize("query", ["", "?q=mine", "?q=machine-7", "?q=Alice", "?status=running"])
def test_it_is_found_and_linked(operator: Client, alice: Party, devbox_id: str, query: str) -> None:
    page = operator.get(URL + query)
    text = page.content.decode()
    assert page.status_code == 200 and devbox_id in text
    assert f"/admin/accounts/account/{alice.account_id}/change/" in text
    assert f"/admin/hosts/host/{row(devbox_id).host_id}/change/" in text


def test_nothing_can_be_edited_added_or_deleted(operator: Client, devbox_id: str) -> None:
    page = operator.get(f"{URL}{devbox_id}/change/")
    text = page.content.decode()
    assert page.status_code == 200 and "initializing" in text
    assert 'name="status"' not in text and 'name="host"' not in text and "sealed" not in text
    before = Devbox.objects.filter(pk=devbox_id).values().get()
    operator.post(f"{URL}{devbox_id}/change/", {"status": "failure", "host": "", "name": "other"})
    assert Devbox.objects.filter(pk=devbox_id).values().get() == before
    assert operator.get(f"{URL}add/").status_code == 403
    assert operator.post(f"{URL}{devbox_id}/delete/", {"post": "yes"}).status_code == 403


def test_the_action_shuts_down(operator: Client, devbox_id: str) -> None:
    data = {"action": "shut_down", "_selected_action": [devbox_id]}
    page = operator.post(URL, data, follow=True)
    assert "1 of 1 shut down" in page.content.decode()
    devbox = row(devbox_id)
    assert (devbox.status, devbox.shutdown_reason) == ("shutdown", "api_shutdown")
    assert devbox.why == "the operator operator shut it down"
    work()
    assert row(devbox_id).step == "gone"
    assert "0 of 1 shut down" in operator.post(URL, data, follow=True).content.decode()


@pytest.mark.parametrize("model", ["devboxtransition", "devboxlog"])
def test_the_lines_are_listed_and_searchable(operator: Client, devbox_id: str, model: str) -> None:
    page = operator.get(f"/admin/devboxes/{model}/?q={devbox_id}")
    assert page.status_code == 200
    assert f"/admin/devboxes/devbox/{devbox_id}/change/" in page.content.decode()


def test_a_tenant_s_key_opens_no_admin(alice: Party, web: Any, devbox_id: str) -> None:
    assert alice.get(URL).status_code in (302, 403)
