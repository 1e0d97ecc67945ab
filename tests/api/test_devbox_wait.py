"""`wait_for_status` and the evictions stream: never early, never long after, gone clients, junk."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from api.waiting import hub
from devboxes import services
from tests.conftest import Party
from tests.devbox_world import make_host, row, work, working
from tests.execution_world import Streaming
from tests.fake_host import FakeHost


@pytest.fixture
def fake(db: None) -> FakeHost:
    return make_host()


@pytest.fixture
def devbox_id(alice: Party, fake: FakeHost) -> str:
    return str(alice.post("/v1/devboxes", {}).json()["id"])


def wait(party: Party, devbox_id: str, *statuses: str, **body: Any) -> Any:
    return party.post(f"/v1/devboxes/{devbox_id}/wait_for_status", {"statuses": list(statuses), **body})


def test_a_status_that_is_there_is_answered_at_once(alice: Party, bob: Party, devbox_id: str) -> None:
    began = time.monotonic()
    answer = wait(bob, devbox_id, "running", "provisioning")
    assert time.monotonic() - began < 1
    assert answer.status_code == 200
    assert answer.json() == alice.get(f"/v1/devboxes/{devbox_id}").json()


def test_a_status_that_comes_is_answered_then(alice: Party, web: Any, fake: FakeHost, devbox_id: str) -> None:
    with working(web, fake):
        answer = wait(alice, devbox_id, "running", "failure", "shutdown", timeout_seconds=5.5)
    assert answer.status_code == 200 and answer.json()["status"] == "running"


@pytest.mark.parametrize("seconds", [0.0999, 0.7, 1])
def test_time_over_is_408_and_never_early(alice: Party, devbox_id: str, seconds: float) -> None:
    began = time.monotonic()
    answer = wait(alice, devbox_id, "suspended", timeout_seconds=seconds)
    took = time.monotonic() - began
    assert answer.status_code == 408 and seconds <= took < seconds + 1
    assert answer.json()["code"] == "timeout" and "is provisioning" in answer.json()["message"]


def test_nothing_said_means_ten_seconds_and_thirty_are_the_most(
    alice: Party, devbox_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    async def wait_until(name: str, read: Any, done: Any, deadline: float, gone: Any = None) -> Any:
        waited.append(deadline - asyncio.get_running_loop().time())
        return await asyncio.to_thread(lambda: None) or _Provisioning

    monkeypatch.setattr(hub, "wait_until", wait_until)
    for body in ({}, {"timeout_seconds": None}, {"timeout_seconds": 10_000}, {"timeout_seconds": 0}):
        assert wait(alice, devbox_id, "running", **body).status_code == 408
    assert [round(seconds) for seconds in waited] == [10, 10, 30, 0]


class _Provisioning:
    status = "provisioning"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"statuses": []},
        {"statuses": ["happy"]},
        {"statuses": "running"},
        {"statuses": [1]},
        {"statuses": ["running"], "timeout_seconds": "5"},
        {"statuses": ["running"], "timeout_seconds": -1},
        {"statuses": ["running"], "wait": 1},
    ],
)
def test_waits_that_make_no_sense_are_refused(alice: Party, devbox_id: str, body: Any) -> None:
    assert alice.post(f"/v1/devboxes/{devbox_id}/wait_for_status", body).status_code == 400


def test_the_request_id_of_a_wait_is_not_remembered(alice: Party, devbox_id: str) -> None:
    path = f"/v1/devboxes/{devbox_id}/wait_for_status"
    headers = {"x-request-id": "same"}
    assert alice.post(path, {"statuses": ["running"], "timeout_seconds": 0.1}, headers=headers).status_code == 408
    work()
    assert alice.post(path, {"statuses": ["running"], "timeout_seconds": 0.1}, headers=headers).status_code == 200


def test_a_read_only_key_may_wait(alice: Party, web: Any, devbox_id: str) -> None:
    from tests.conftest import make_party

    reader = make_party(alice.account_id, "reader", web, read_only=True)
    assert wait(reader, devbox_id, "provisioning").status_code == 200


def test_a_shutdown_ends_a_wait(alice: Party, web: Any, devbox_id: str) -> None:
    async def scenario() -> Any:
        body = {"statuses": ["running", "failure", "shutdown"], "timeout_seconds": 20}
        path = f"/v1/devboxes/{devbox_id}/wait_for_status"
        task = asyncio.ensure_future(web.send("POST", path, key=alice.secret, json=body))
        await asyncio.sleep(0.1)
        assert not task.done()
        from api.asynchronous import in_database

        await in_database(services.request_shutdown, devbox_id)
        hub.wake(devbox_id)
        return await asyncio.wait_for(task, 5)

    answer = web.run(scenario())
    assert answer.status_code == 200 and answer.json()["status"] == "shutdown"
    assert row(devbox_id).status == "shutdown"


def test_evictions_is_a_stream_of_heartbeats(alice: Party, web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devboxes.api.HEARTBEAT_SECONDS", 0.05)

    async def scenario() -> Streaming:
        stream = Streaming(alice, "/v1/devboxes/evictions/watch")
        await stream.until(lambda events: events.comments >= 3)
        await stream.leave()
        return stream

    stream = web.run(scenario())
    assert stream.status == 200 and stream.headers["content-type"].startswith("text/event-stream")
    assert stream.events.updates == [] and stream.events.error is None
    assert web.get("/v1/devboxes/evictions/watch").status_code == 401


def test_evictions_count_as_open_streams(alice: Party, bob: Party, web: Any) -> None:
    from accounts.models import Account

    Account.objects.filter(pk=alice.account_id).update(max_open_streams=1)

    async def scenario() -> tuple[int | None, int]:
        first = Streaming(alice, "/v1/devboxes/evictions/watch")
        await first.until(lambda events: events.comments >= 1)
        refused = await web.send("GET", "/v1/devboxes/evictions/watch", key=alice.secret)
        await first.leave()
        again = Streaming(alice, "/v1/devboxes/evictions/watch")
        await again.until(lambda events: events.comments >= 1)
        await again.leave()
        return again.status, refused.status_code

    assert web.run(scenario()) == (200, 429)
