"""A step that came to its host behind a newer fence: what becomes of its row."""

from __future__ import annotations

import pytest

from flows.outcomes import Outcome, Superseded
from tests.flows.test_engine import JobFlow, JobRow, Log, flow, in_thread, make, published, read

__all__ = ["flow", "published"]  # fixtures

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_stale_fence_gives_the_lease_back_at_once(flow: JobFlow, published: Log) -> None:
    make()

    def behind(error: Exception) -> Outcome | None:
        raise Superseded("job_1") from error

    fences: list[int] = []

    def first(row: JobRow) -> Outcome:
        fences.append(row.fence)
        raise OSError("the host has served a newer fence")

    flow.steps, flow.on_error = {"first": first}, behind
    assert flow.run("job_1")
    job = read()
    assert (job.lease, job.lease_until, job.attempts, job.error_code) == (None, None, 1, "stale_fence")
    assert published == [("nudge", "job_1")], "nobody has to wait for a lease to lapse"
    assert flow.run("job_1") and fences[1] > fences[0]
    job = read()
    assert (job.lease, job.attempts) == (None, 2)
    assert not flow.run("job_1"), "a second time it pauses"


def test_a_stale_fence_of_a_row_that_has_moved_on_changes_nothing(flow: JobFlow) -> None:
    make()

    def behind(error: Exception) -> Outcome | None:
        raise Superseded("job_1") from error

    def first(row: JobRow) -> Outcome:
        assert in_thread(lambda: flow.request("job_1", {"note": "stop"}))
        assert in_thread(lambda: flow.claim("job_1")) is not None
        raise OSError("the host has served a newer fence")

    flow.steps, flow.on_error = {"first": first}, behind
    assert flow.run("job_1")
    job = read()
    assert job.lease is not None and job.note == "stop" and job.error_code is None and job.attempts == 0
