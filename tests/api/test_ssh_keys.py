"""SSH keys through the API: a pair per call, of which the public half's hash is kept, and what ends them."""

from __future__ import annotations

import base64
from typing import Any

import asyncssh
import pytest
from django.db import connection

from hosts.client import use_fake
from ssh_access import names, services
from tests.conftest import Party
from tests.devbox_world import make_host, row, work


@pytest.fixture
def devbox(alice: Party) -> Any:
    fake = make_host("machine-s")
    box = alice.post("/v1/devboxes", {"name": "mine"}).json()["id"]
    work()
    assert row(box).status == "running", row(box).why
    yield box
    use_fake(fake.host_id, None)


def made(party: Party, box: str) -> dict[str, str]:
    answer = party.post(f"/v1/devboxes/{box}/create_ssh_key")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def public(told: dict[str, str]) -> bytes:
    """The public half as it travels in SSH."""
    return asyncssh.import_private_key(told["ssh_private_key"]).public_data


def execute(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def test_a_key_opens_one_devbox_and_several_are_valid(alice: Party, devbox: str) -> None:
    first, second = made(alice, devbox), made(alice, devbox)
    assert first.keys() == {"id", "url", "ssh_private_key", "ssh_user"}
    assert (first["id"], first["ssh_user"]) == (devbox, "user")
    assert first["url"] == second["url"] == devbox.replace("_", "-") + ".ssh.berth.localhost"
    assert names.devbox_of_host(first["url"].upper()) == devbox
    for told in (first, second):
        access = services.authorize(devbox, "user", public(told))
        assert access is not None
        assert (access.devbox_id, access.caller.account_id) == (devbox, alice.account_id)
    other = alice.post("/v1/devboxes", {"name": "other"}).json()["id"]
    assert services.authorize(other, "user", public(first)) is None
    assert services.authorize(devbox, "root", public(first)) is None
    assert services.authorize(devbox, "user", public(first) + b"x") is None
    assert services.authorize(None, None, public(first)) is None


def test_nothing_of_the_private_half_is_kept(alice: Party, devbox: str) -> None:
    told = made(alice, devbox)
    with connection.cursor() as cursor:
        cursor.execute("SELECT t::text FROM ssh_access_sshkey t")
        kept = "\n".join(text for (text,) in cursor.fetchall())
    assert kept
    middle = "".join(told["ssh_private_key"].splitlines()[1:-1])
    assert base64.b64decode(middle)[-80:].hex() not in kept
    assert public(told).hex() not in kept


@pytest.mark.parametrize(
    "end",
    [
        "UPDATE ssh_access_sshkey SET expires_at = now() - interval '1 second'",
        "UPDATE accounts_apikey SET revoked_at = now()",
        "UPDATE accounts_apikey SET expires_at = now() - interval '1 second'",
        "UPDATE accounts_account SET status = 'disabled'",
        "UPDATE devboxes_devbox SET ended_at = now()",
    ],
)
def test_what_ends_a_key(alice: Party, devbox: str, end: str) -> None:
    blob = public(made(alice, devbox))
    assert services.authorize(devbox, None, blob) is not None
    execute(end)
    assert services.authorize(devbox, None, blob) is None


def test_keys_that_are_over_are_deleted_and_no_others(alice: Party, devbox: str) -> None:
    expired = public(made(alice, devbox))
    execute("UPDATE ssh_access_sshkey SET expires_at = now() - interval '1 second'")
    valid = public(made(alice, devbox))
    assert services.delete_expired_keys() == 1
    assert services.authorize(devbox, None, expired) is None
    assert services.authorize(devbox, None, valid) is not None
    execute("UPDATE devboxes_devbox SET ended_at = now()")
    assert services.delete_expired_keys() == 1


def test_whose_devbox_it_is(alice: Party, bob: Party, charlie: Party, devbox: str) -> None:
    assert charlie.post(f"/v1/devboxes/{devbox}/create_ssh_key").status_code == 404
    assert bob.post(f"/v1/devboxes/{devbox}/create_ssh_key").status_code == 200
    assert alice.post(f"/v1/devboxes/{devbox}/create_ssh_key", {"x": 1}).status_code == 400
    execute("UPDATE accounts_apikey SET access = 'read_only'")
    assert alice.post(f"/v1/devboxes/{devbox}/create_ssh_key").status_code == 403
    execute("UPDATE accounts_apikey SET access = 'full'")
    assert alice.post(f"/v1/devboxes/{devbox}/shutdown").status_code == 200
    answer = alice.post(f"/v1/devboxes/{devbox}/create_ssh_key")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_there_is_a_bound(alice: Party, devbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "KEYS_MAX", 2)
    made(alice, devbox)
    made(alice, devbox)
    answer = alice.post(f"/v1/devboxes/{devbox}/create_ssh_key")
    assert answer.status_code == 429
    assert "2 valid SSH keys" in answer.json()["message"]


def test_the_services_own_key_stays(alice: Party) -> None:
    private, told = services.host_key()
    assert services.host_key() == (private, told)
    assert asyncssh.import_private_key(private).export_public_key().decode().split()[:2] == told.split()[:2]


@pytest.mark.parametrize("name", ["", "user", "dbx_", "user+dbx_1", "dbx-01k9", "+", "a+b+c", "../dbx_x"])
def test_names_that_name_no_devbox(name: str) -> None:
    assert names.devbox_of_user(name)[0] is None
    assert names.devbox_of_host(f"{name}.ssh.berth.test") is None


def test_names_that_do() -> None:
    box = "dbx_01k9zzzzzzzzzzzzzzzzzzzzzz"
    assert names.devbox_of_user(box) == (box, None)
    assert names.devbox_of_user(f"user+{box}") == (box, "user")
    assert names.devbox_of_host(f"{box.replace('_', '-')}.ssh.example.com") == box
    assert names.devbox_of_host(f"{box.replace('_', '-')}.example.com") is None
