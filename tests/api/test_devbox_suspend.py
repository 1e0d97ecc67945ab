"""`suspend` and `resume` through HTTP: answers, refusals, repetitions, callers, and what ends with the box."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hosts.client import use_fake
from tests.conftest import Party, make_party
from tests.devbox_world import make_host, row, statuses, work, working
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    host = make_host()
    yield host
    use_fake(host.host_id, None)


@pytest.fixture
def box(alice: Party, fake: FakeHost) -> str:
    """A running devbox of Alice's."""
    devbox_id = str(alice.post("/v1/devboxes", {}).json()["id"])
    work()
    return devbox_id


def test_it_sleeps_and_wakes(alice: Party, bob: Party, fake: FakeHost, box: str) -> None:
    answer = alice.post(f"/v1/devboxes/{box}/suspend")
    assert answer.status_code == 200 and answer.json()["status"] == "suspending"
    work()
    view = bob.get(f"/v1/devboxes/{box}").json()
    assert (view["status"], view["end_time_ms"], view["keep_alive_end_time_ms"]) == ("suspended", None, None)
    assert view["why"] == "it was asked to be suspended"
    why = alice.get(f"/v1/devboxes/{box}/why").json()
    assert (why["cause"]["kind"], why["cause"]["by"]["key_id"]) == ("suspend_requested", alice.key_id)
    assert why["phases"][-1]["phase"] == "suspended"
    answer = bob.post(f"/v1/devboxes/{box}/resume")
    assert answer.status_code == 200 and answer.json()["status"] == "provisioning", "clients take `resuming` for an end"
    work()
    view = alice.get(f"/v1/devboxes/{box}").json()
    assert (view["status"], view["why"]) == ("running", None) and view["keep_alive_end_time_ms"] is not None
    told = [move["status"] for move in view["state_transitions"]]
    assert told == ["provisioning", "initializing", "running", "suspending", "suspended", *told[:3]]


def test_who_waits_for_it(alice: Party, web: Any, fake: FakeHost, box: str) -> None:
    asked = {"statuses": ["suspended", "failure", "shutdown"], "timeout_seconds": 20}
    alice.post(f"/v1/devboxes/{box}/suspend")
    with working(web, fake):
        assert alice.post(f"/v1/devboxes/{box}/wait_for_status", asked).json()["status"] == "suspended"
        alice.post(f"/v1/devboxes/{box}/resume")
        asked["statuses"] = ["running", "failure", "shutdown"]
        assert alice.post(f"/v1/devboxes/{box}/wait_for_status", asked).json()["status"] == "running"


def test_only_what_runs_is_suspended_and_only_what_sleeps_resumed(alice: Party, fake: FakeHost, box: str) -> None:
    answer = alice.post(f"/v1/devboxes/{box}/resume")
    assert answer.status_code == 400 and "is running" in answer.json()["message"]
    alice.post(f"/v1/devboxes/{box}/suspend")
    for verb in ("suspend", "resume"):
        answer = alice.post(f"/v1/devboxes/{box}/{verb}")
        assert answer.status_code == 400 and "is suspending" in answer.json()["message"], verb
    work()
    assert alice.post(f"/v1/devboxes/{box}/suspend").status_code == 400
    for verb, body in (("execute_async", {"command": "x"}), ("read_file_contents", {"file_path": "x"})):
        answer = alice.post(f"/v1/devboxes/{box}/{verb}", body)
        assert answer.status_code == 400 and "is suspended" in answer.json()["message"], verb
    new = create_provisioning(alice)
    assert alice.post(f"/v1/devboxes/{new}/suspend").status_code == 400
    alice.post(f"/v1/devboxes/{box}/shutdown")
    for verb in ("suspend", "resume"):
        assert alice.post(f"/v1/devboxes/{box}/{verb}").status_code == 400
    work()
    assert row(box).step == "gone" and fake.asleep == {}


def create_provisioning(alice: Party) -> str:
    return str(alice.post("/v1/devboxes", {}).json()["id"])


def test_a_repeated_request_is_the_same_one(alice: Party, fake: FakeHost, box: str) -> None:
    """A client that lost the answer asks again with the same id, whatever became of the devbox since."""
    for verb in ("suspend", "resume"):
        for _ in range(2):
            answer = alice.post(f"/v1/devboxes/{box}/{verb}", headers={"x-request-id": f"r-{verb}"})
            assert answer.status_code == 200, answer.text
            work()
    assert row(box).status == "running"
    assert alice.post(f"/v1/devboxes/{box}/suspend", headers={"x-request-id": "r-suspend"}).status_code == 200
    assert row(box).status == "running" and statuses(box).count("suspending") == 1


def test_a_stranger_and_a_reader_may_not(alice: Party, charlie: Party, web: Any, fake: FakeHost, box: str) -> None:
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    for verb in ("suspend", "resume"):
        assert charlie.post(f"/v1/devboxes/{box}/{verb}").status_code == 404
        assert charlie.post("/v1/devboxes/dbx_00000000000000000000000000/resume").status_code == 404
        assert reader.post(f"/v1/devboxes/{box}/{verb}").status_code == 403
        assert web.request("POST", f"/v1/devboxes/{box}/{verb}").status_code == 401
    assert row(box).status == "running"


def test_it_is_listed_by_its_status(alice: Party, fake: FakeHost, box: str) -> None:
    alice.post(f"/v1/devboxes/{box}/suspend")
    work()
    assert [one["id"] for one in alice.get("/v1/devboxes?status=suspended").json()["devboxes"]] == [box]
    assert alice.get("/v1/devboxes?status=running").json()["devboxes"] == []


def test_its_log_is_read_while_it_sleeps_without_asking_the_host(alice: Party, fake: FakeHost, box: str) -> None:
    alice.post(f"/v1/devboxes/{box}/suspend")
    work()
    before = len(fake.calls)
    answer = alice.get(f"/v1/devboxes/{box}/logs")
    assert answer.status_code == 200 and len(fake.calls) == before


@pytest.mark.parametrize(
    ("hooks", "field"),
    [
        ({"suspend_commands": "x"}, "suspend_commands"),
        ({"suspend_commands": ["x"], "suspend_deadline_ms": 60_001}, "suspend_deadline_ms"),
        ({"suspend_commands": ["x"], "suspend_deadline_ms": 0}, "suspend_deadline_ms"),
        ({"resume_commands": ["x"]}, "resume_commands"),
    ],
)
def test_hooks_that_cannot_be(alice: Party, fake: FakeHost, hooks: Any, field: str) -> None:
    asked = {"launch_parameters": {"lifecycle": {"lifecycle_hooks": hooks}}}
    answer = alice.post("/v1/devboxes", asked)
    assert answer.status_code == 400 and field in answer.json()["message"]


def test_hooks_are_shown(alice: Party, fake: FakeHost) -> None:
    hooks = {"suspend_commands": ["sync"], "suspend_deadline_ms": 1000}
    asked = {"launch_parameters": {"lifecycle": {"lifecycle_hooks": hooks}}}
    view = alice.post("/v1/devboxes", asked).json()
    assert view["launch_parameters"]["lifecycle"] == {"lifecycle_hooks": hooks}


IDLE = {"idle_time_seconds": 60, "on_idle": "suspend"}


@pytest.mark.parametrize(
    "asked",
    [
        {"after_idle": IDLE},
        {"lifecycle": {"after_idle": IDLE}},
        {"after_idle": IDLE, "lifecycle": {"after_idle": IDLE, "resume_triggers": {"http": True, "axon_event": False}}},
    ],
)
def test_an_idle_time_may_be_asked_for_in_either_place(alice: Party, fake: FakeHost, asked: Any) -> None:
    view = alice.post("/v1/devboxes", {"launch_parameters": asked}).json()
    assert {name: view["launch_parameters"][name] for name in asked} == asked
    assert (row(view["id"]).idle_seconds, row(view["id"]).on_idle) == (60, "suspend")
    assert view["next_clock"] is None, "it does not run yet"
    work()
    clock = alice.get(f"/v1/devboxes/{view['id']}").json()["next_clock"]
    assert (clock["clock"], clock["action"], clock["seconds"]) == ("after_idle", "suspend", 60)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"after_idle": {**IDLE, "idle_time_seconds": 0}}, "idle_time_seconds"),
        ({"after_idle": {**IDLE, "on_idle": "hibernate"}}, "on_idle"),
        ({"after_idle": {"on_idle": "suspend"}}, "idle_time_seconds"),
        ({"after_idle": IDLE, "lifecycle": {"after_idle": {**IDLE, "on_idle": "shutdown"}}}, "after_idle"),
        ({"lifecycle": {"resume_triggers": {"axon_event": True}}}, "axon_event"),
        ({"lifecycle": {"wake": True}}, "wake"),
    ],
)
def test_clocks_that_cannot_be(alice: Party, fake: FakeHost, asked: Any, field: str) -> None:
    answer = alice.post("/v1/devboxes", {"launch_parameters": asked})
    assert answer.status_code == 400 and field in answer.json()["message"], answer.text
