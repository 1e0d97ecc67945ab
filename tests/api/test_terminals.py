"""Keys to terminals through the API: made while the devbox runs, kept as hashes, gone after their day."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from api.errors import Unauthorized
from hosts.client import use_fake
from pty import services
from tests.conftest import Party
from tests.devbox_world import make_host, row, work


@pytest.fixture
def devbox(alice: Party) -> Any:
    fake = make_host("machine-t")
    box = alice.post("/v1/devboxes", {"name": "mine"}).json()["id"]
    work()
    assert row(box).status == "running", row(box).why
    yield box
    use_fake(fake.host_id, None)


def made(party: Party, box: str) -> tuple[str, str]:
    answer = party.post(f"/v1/devboxes/{box}/create_pty_tunnel")
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return told["tunnel_key"], told["auth_token"]


def test_a_key_and_its_token_open_one_devbox(alice: Party, devbox: str) -> None:
    key, token = made(alice, devbox)
    caller, box = services.authenticate_tunnel(key, token)
    assert (caller.account_id, box) == (alice.account_id, devbox)
    assert made(alice, devbox) != (key, token), "fresh each time"
    assert services.authenticate_tunnel(key, token)[1] == devbox, "and the earlier one still opens"
    for wrong in ((key, token + "x"), (key[:-1] + "u", token), (key, ""), ("", token)):
        with pytest.raises(Unauthorized):
            services.authenticate_tunnel(*wrong)


def test_only_hashes_are_kept(alice: Party, devbox: str) -> None:
    key, token = made(alice, devbox)
    with connection.cursor() as cursor:
        cursor.execute("SELECT t::text FROM pty_ptytunnel t")
        kept = "\n".join(text for (text,) in cursor.fetchall())
    assert kept
    assert key not in kept
    assert token not in kept


def test_its_day_ends(alice: Party, devbox: str) -> None:
    key, token = made(alice, devbox)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE pty_ptytunnel SET expires_at = now() - interval '1 second'")
    with pytest.raises(Unauthorized):
        services.authenticate_tunnel(key, token)
    still = made(alice, devbox)
    assert services.delete_expired_tunnels() == 1
    assert services.authenticate_tunnel(*still)[1] == devbox


def test_it_ends_with_the_api_key_that_made_it(alice: Party, devbox: str) -> None:
    key, token = made(alice, devbox)
    assert services.authenticate_tunnel(key, token)[1] == devbox
    with connection.cursor() as cursor:
        cursor.execute("UPDATE accounts_apikey SET revoked_at = now()")
    with pytest.raises(Unauthorized):
        services.authenticate_tunnel(key, token)


def test_whose_devbox_it_is(alice: Party, bob: Party, charlie: Party, devbox: str) -> None:
    assert charlie.post(f"/v1/devboxes/{devbox}/create_pty_tunnel").status_code == 404
    assert bob.post(f"/v1/devboxes/{devbox}/create_pty_tunnel").status_code == 200
    assert alice.post(f"/v1/devboxes/{devbox}/shutdown").status_code == 200
    answer = alice.post(f"/v1/devboxes/{devbox}/create_pty_tunnel")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert alice.post(f"/v1/devboxes/{devbox}/create_pty_tunnel", {"x": 1}).status_code == 400
