"""A server that is being stopped: every hold ends early, says why, and is worth another try."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api import waiting
from api.stopping import GoingDown
from api.waiting import hub
from tests.conftest import Party
from tests.execution_world import World


@pytest.fixture
def world(web: Any, alice: Party) -> World:
    world = World(web, alice.account_id)
    world.paused = True
    return world


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch) -> GoingDown:
    going = GoingDown()
    monkeypatch.setattr(waiting, "going_down", going)
    return going


def stopped_under(world: World, going: GoingDown, party: Party, path: str, body: dict[str, Any]) -> Any:
    """The answer to a request under which the server is asked to stop."""

    async def scenario() -> Any:
        task = asyncio.ensure_future(world.web.send("POST", path, key=party.secret, json=body))
        await asyncio.sleep(0.2)
        assert not task.done()
        going.begin()
        hub.wake_all()
        return await asyncio.wait_for(task, 5)

    return world.web.run(scenario())


def check(answer: Any, *words: str) -> None:
    """An interrupted wait: 408, which clients' own loops take for "ask again", with the truth about it."""
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "true"), answer.text
    assert answer.json()["code"] == "interrupted"
    message = answer.json()["message"]
    assert "being stopped" in message and " s " not in message and all(word in message for word in words), message


def test_a_wait_for_a_devbox(world: World, going: GoingDown, alice: Party) -> None:
    body = {"statuses": ["suspended"], "timeout_seconds": 20}
    check(stopped_under(world, going, alice, f"{world.url}/wait_for_status", body), world.devbox_id, "is running")


def test_a_wait_for_a_command(world: World, going: GoingDown, alice: Party) -> None:
    begun = alice.post(f"{world.url}/execute_async", {"command": "sleep 1000"}).json()["execution_id"]
    path = world.execution_url(begun, "/wait_for_status")
    check(stopped_under(world, going, alice, path, {"statuses": ["completed"]}), begun, "is queued")


def test_input_for_a_command_that_has_not_begun(world: World, going: GoingDown, alice: Party) -> None:
    begun = alice.post(f"{world.url}/execute_async", {"command": "cat", "attach_stdin": True}).json()["execution_id"]
    check(stopped_under(world, going, alice, world.execution_url(begun, "/send_std_in"), {"text": "x"}), "queued")


def test_a_command_that_is_held_for(world: World, going: GoingDown, alice: Party) -> None:
    answer = stopped_under(world, going, alice, f"{world.url}/execute_sync", {"command": "sleep 1000"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "true"), answer.text
    assert "goes on" in answer.json()["message"]


def test_holds_that_promise_nothing_answer_how_things_stand(world: World, going: GoingDown, alice: Party) -> None:
    body = {"command": "sleep 1000", "command_id": "one"}
    answer = stopped_under(world, going, alice, f"{world.url}/execute", body)
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")


def test_a_wait_whose_time_is_over_as_the_server_stops_is_a_plain_408(
    world: World, going: GoingDown, alice: Party
) -> None:
    going.begin()
    body = {"statuses": ["suspended"], "timeout_seconds": 0}
    answer = alice.post(f"{world.url}/wait_for_status", body)
    assert (answer.status_code, answer.json()["code"]) == (408, "timeout")
    assert "after 0 s" in answer.json()["message"]
