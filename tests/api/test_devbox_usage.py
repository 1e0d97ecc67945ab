"""`GET …/usage`: seconds from recorded transitions, exact over suspends, and seen by its owner's account only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection

from devboxes.models import DevboxTransition
from hosts.client import use_fake
from tests.conftest import Party
from tests.devbox_world import make_host, work
from tests.fake_host import FakeHost

pytestmark = pytest.mark.django_db

FIELDS = ("total_elapsed_seconds", "total_active_seconds", "vcpu_seconds", "memory_gb_seconds", "disk_gb_seconds")


@pytest.fixture
def fake(db: None) -> Iterator[FakeHost]:
    host = make_host()
    yield host
    use_fake(host.host_id, None)


def lived(devbox_id: str, *past: tuple[str, float], ended: float | None = None) -> None:
    """Let it have reached these statuses so many seconds ago, the first at its creation."""
    DevboxTransition.objects.filter(devbox_id=devbox_id).delete()
    with connection.cursor() as cursor:
        for status, ago in past:
            cursor.execute(
                "INSERT INTO devboxes_devboxtransition (devbox_id, status, at) "
                "VALUES (%s, %s, clock_timestamp() - make_interval(secs => %s))",
                [devbox_id, status, ago],
            )
        cursor.execute(
            "UPDATE devboxes_devbox SET created_at = clock_timestamp() - make_interval(secs => %s), status = %s, "
            "ended_at = clock_timestamp() - make_interval(secs => %s) WHERE id = %s",
            [past[0][1], past[-1][0], ended, devbox_id],
        )


def test_what_was_suspended_costs_its_disk_only(alice: Party, bob: Party, fake: FakeHost) -> None:
    asked = {"launch_parameters": {"resource_size_request": "MEDIUM"}}  # 2 CPUs, 4 GiB, 8 GiB
    box = alice.post("/v1/devboxes", asked).json()["id"]
    lived(
        box,
        ("provisioning", 1000.5),
        ("initializing", 990.5),
        ("running", 980.5),
        ("suspending", 880.5),
        ("suspended", 870.5),
        ("provisioning", 370.5),
        ("initializing", 360.5),
        ("running", 350.5),
    )
    view = bob.get(f"/v1/devboxes/{box}/usage").json()
    # 120 until it slept, 360 since it woke.
    assert [view[name] for name in FIELDS] == [1000, 480, 960, 1920, 8000]
    assert (view["id"], view["status"], view["end_time_ms"]) == (box, "running", None)
    assert view["start_time_ms"] == alice.get(f"/v1/devboxes/{box}").json()["create_time_ms"]


def test_what_is_over_uses_nothing_more(alice: Party, fake: FakeHost) -> None:
    box = alice.post("/v1/devboxes", {}).json()["id"]
    past = [("provisioning", 500.5), ("initializing", 450.5), ("running", 440.5), ("shutdown", 100.5)]
    lived(box, *past, ended=100.5)
    view = alice.get(f"/v1/devboxes/{box}/usage").json()
    assert [view[name] for name in FIELDS] == [400, 350, 350, 700, 1600]
    assert view["end_time_ms"] - view["start_time_ms"] == pytest.approx(400_000, abs=100)


def test_half_a_cpu_and_one_that_has_never_run(alice: Party, fake: FakeHost) -> None:
    asked = {"launch_parameters": {"resource_size_request": "X_SMALL"}}  # half a CPU, 1 GiB, 4 GiB
    box = alice.post("/v1/devboxes", asked).json()["id"]
    lived(box, ("provisioning", 300.5))
    view = alice.get(f"/v1/devboxes/{box}/usage").json()
    assert [view[name] for name in FIELDS] == [300, 0, 0, 0, 1200]
    lived(box, ("provisioning", 300.5), ("running", 101.5))
    view = alice.get(f"/v1/devboxes/{box}/usage").json()
    assert [view[name] for name in FIELDS] == [300, 101, 50, 101, 1200]


def test_a_clock_that_was_set_back_takes_nothing_away(alice: Party, fake: FakeHost) -> None:
    box = alice.post("/v1/devboxes", {}).json()["id"]
    lived(box, ("provisioning", 300.5), ("running", 200.5), ("suspending", 250.5), ("suspended", 240.5))
    assert alice.get(f"/v1/devboxes/{box}/usage").json()["total_active_seconds"] == 10


def test_it_follows_what_really_happens(alice: Party, charlie: Party, fake: FakeHost) -> None:
    box = alice.post("/v1/devboxes", {}).json()["id"]
    work()
    assert alice.get(f"/v1/devboxes/{box}/usage").json()["status"] == "running"
    alice.post(f"/v1/devboxes/{box}/suspend")
    work()
    assert alice.get(f"/v1/devboxes/{box}/usage").json()["status"] == "suspended"
    assert charlie.get(f"/v1/devboxes/{box}/usage").status_code == 404
    assert alice.get("/v1/devboxes/dbx_00000000000000000000000000/usage").status_code == 404
    assert alice.get("/v1/devboxes/x/usage").status_code == 404
