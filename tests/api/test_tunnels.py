"""Tunnels through the API: enabled, shown, given at creation, removed. What goes through one is tried elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection

from hosts.client import use_fake
from tests.conftest import Party
from tests.devbox_world import make_host, row, work
from tunnels import doors, services

DEFAULT = {"auth_mode": "open", "http_keep_alive": True, "wake_on_http": False}


@pytest.fixture
def host() -> Any:
    fake = make_host("machine-t")
    yield fake
    use_fake(fake.host_id, None)


@pytest.fixture
def devbox(alice: Party, host: Any) -> str:
    box: str = alice.post("/v1/devboxes", {"name": "mine"}).json()["id"]
    work()
    assert row(box).status == "running", row(box).why
    return box


def enable(party: Party, box: str, body: Any = None) -> Any:
    return party.post(f"/v1/devboxes/{box}/enable_tunnel", body)


def shown(party: Party, box: str) -> Any:
    return party.get(f"/v1/devboxes/{box}").json()["tunnel"]


def test_enabled_once_and_shown_as_often_as_asked(alice: Party, devbox: str) -> None:
    assert shown(alice, devbox) is None
    made = enable(alice, devbox)
    assert made.status_code == 200, made.text
    view = made.json()
    assert view == DEFAULT | {"tunnel_key": view["tunnel_key"], "create_time_ms": view["create_time_ms"]}
    assert len(view["tunnel_key"]) == 26 and view["tunnel_key"].isalnum() and view["tunnel_key"].islower()
    for same in ({}, None, DEFAULT, {"auth_mode": None}, {"http_keep_alive": True}):
        again = enable(alice, devbox, same)
        assert (again.status_code, again.json()) == (200, view)
    assert shown(alice, devbox) == view
    assert [one["tunnel"] for one in alice.get("/v1/devboxes").json()["devboxes"]] == [view]
    for other in ({"auth_mode": "authenticated"}, {"http_keep_alive": False}, {"wake_on_http": True}):
        answer = enable(alice, devbox, other)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
        assert next(iter(other)) in answer.json()["message"]


def test_an_authenticated_one_has_a_token(alice: Party, devbox: str) -> None:
    view = enable(alice, devbox, {"auth_mode": "authenticated", "wake_on_http": True, "http_keep_alive": False}).json()
    assert len(view["auth_token"]) == 64
    assert shown(alice, devbox) == view
    assert (view["http_keep_alive"], view["wake_on_http"]) == (False, True)


def test_keys_and_tokens_lie_sealed(alice: Party, devbox: str) -> None:
    view = enable(alice, devbox, {"auth_mode": "authenticated"}).json()
    with connection.cursor() as cursor:
        cursor.execute("SELECT t::text, encode(t.sealed, 'escape') FROM tunnels_tunnel t")
        kept = "\n".join(text for found in cursor.fetchall() for text in found)
    assert view["tunnel_key"] not in kept and view["auth_token"] not in kept


@pytest.mark.parametrize(
    "body",
    [
        {"auth_mode": "public"},
        {"auth_mode": 1},
        {"http_keep_alive": "yes"},
        {"wake_on_http": 1},
        {"port": 80},
        [],
    ],
)
def test_what_is_wrong_is_named(alice: Party, devbox: str, body: Any) -> None:
    answer = enable(alice, devbox, body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert alice.post("/v1/devboxes", {"tunnel": body}).status_code == 400
    assert shown(alice, devbox) is None


def test_removed_as_often_as_asked_and_made_anew(alice: Party, devbox: str) -> None:
    first = enable(alice, devbox).json()["tunnel_key"]
    assert doors.find(first) is not None
    for _ in range(2):
        answer = alice.post(f"/v1/devboxes/{devbox}/remove_tunnel")
        assert (answer.status_code, answer.json()) == (200, {})
        assert shown(alice, devbox) is None
    assert doors.find(first) is None
    assert enable(alice, devbox, {"auth_mode": "authenticated"}).json()["tunnel_key"] != first


def test_given_at_creation(alice: Party, host: Any) -> None:
    made = alice.post("/v1/devboxes", {"tunnel": {"auth_mode": "authenticated"}}).json()
    assert made["tunnel"]["auth_mode"] == "authenticated" and made["tunnel"]["auth_token"]
    work()
    assert shown(alice, made["id"]) == made["tunnel"]
    assert enable(alice, made["id"]).json() == made["tunnel"]
    assert alice.post("/v1/devboxes", {"tunnel": {}}).json()["tunnel"]["auth_mode"] == "open"
    assert alice.post("/v1/devboxes", {"tunnel": None}).json()["tunnel"] is None


def test_a_repeated_creation_has_one_tunnel(alice: Party, host: Any) -> None:
    body = {"tunnel": {"auth_mode": "open"}}
    made = [alice.post("/v1/devboxes", body, headers={"x-request-id": "once"}).json() for _ in range(2)]
    assert made[0]["tunnel"] == made[1]["tunnel"]


def test_only_of_a_running_devbox_and_gone_with_it(alice: Party, host: Any) -> None:
    box = alice.post("/v1/devboxes", {}).json()["id"]
    early = enable(alice, box)
    assert (early.status_code, early.json()["code"]) == (400, "bad_request") and "provisioning" in early.json()[
        "message"
    ]
    work()
    key = enable(alice, box).json()["tunnel_key"]
    assert doors.find(key) is not None
    alice.post(f"/v1/devboxes/{box}/shutdown")
    assert shown(alice, box) is None and doors.find(key) is None
    assert enable(alice, box).status_code == 400
    assert alice.post(f"/v1/devboxes/{box}/remove_tunnel").status_code == 200
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tunnels_tunnel")
        assert cursor.fetchone()[0] == 0


def test_tunnels_of_ended_devboxes_are_deleted(alice: Party, devbox: str) -> None:
    enable(alice, devbox)
    assert services.delete_of_ended() == 0
    alice.post(f"/v1/devboxes/{devbox}/shutdown")
    assert services.delete_of_ended() == 1


def test_whose_devbox_it_is(alice: Party, bob: Party, charlie: Party, devbox: str) -> None:
    for operation in ("enable_tunnel", "remove_tunnel"):
        assert charlie.post(f"/v1/devboxes/{devbox}/{operation}").status_code == 404
        assert bob.post(f"/v1/devboxes/{devbox}/{operation}").status_code == 200
        assert alice.post(f"/v1/devboxes/dbx_{'0' * 26}/{operation}").status_code == 404


def test_an_account_that_is_disabled_has_no_doors(alice: Party, devbox: str) -> None:
    key = enable(alice, devbox).json()["tunnel_key"]
    with connection.cursor() as cursor:
        cursor.execute("UPDATE accounts_account SET status = 'disabled' WHERE id = %s", [alice.account_id])
    assert doors.find(key) is None


def test_what_wakes_it(alice: Party, devbox: str) -> None:
    key = enable(alice, devbox, {"wake_on_http": True}).json()["tunnel_key"]
    for told, wakes in (("{}", True), ('{"lifecycle": {"resume_triggers": {"http": false}}}', False)):
        with connection.cursor() as cursor:
            cursor.execute("UPDATE devboxes_devbox SET launch_parameters = %s WHERE id = %s", [told, devbox])
        door = doors.find(key)
        assert door is not None and door.wake_on_http is wakes, "the lifecycle's own word counts for more"
