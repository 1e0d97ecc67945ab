"""Suspending and resuming: by hand of a client that waits, with a box at rest and with 100 MB just written."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.bench.creating import SMALLEST
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target

WRITE_MB = 100


def suspend_resume(target: Target) -> Iterator[Figure]:
    """Each from the request until the status is told; beside the time from a create until it runs, in the same run."""
    count = 5 if target.quick else 25
    created = [_create(target) for _ in range(count)]
    first = figure("cold_create_to_running", "ms", [took for _, took in created])
    target.shutdown(*[box for box, _ in created[1:]])
    box = created[0][0]
    down, up = list[float](), list[float]()
    for _ in range(count):
        down.append(_until(target, box, "suspend", "suspended"))
        up.append(_until(target, box, "resume", "running"))
    assert first.median is not None
    yield first
    yield figure("suspend", "ms", down, first.median)
    yield figure("resume", "ms", up, first.median)
    yield figure("suspend_resume", "ms", [one + other for one, other in zip(down, up, strict=True)])
    dirty = []
    for _ in range(2 if target.quick else 5):
        target.run(box, f"head -c {WRITE_MB}M /dev/urandom > ~/data")
        dirty.append(_until(target, box, "suspend", "suspended"))
        _until(target, box, "resume", "running")
    yield figure("suspend_100_mb_dirty", "ms", dirty)
    target.shutdown(box)


def _create(target: Target) -> tuple[str, float]:
    began = time.perf_counter()
    box = target.create(**SMALLEST)
    return box, (time.perf_counter() - began) * 1000


def _until(target: Target, box: str, verb: str, status: str) -> float:
    began = time.perf_counter()
    target.post(f"/v1/devboxes/{box}/{verb}")
    asked = {"statuses": [status, "failure", "shutdown"], "timeout_seconds": 30}
    view = target.post(f"/v1/devboxes/{box}/wait_for_status", asked)
    if view["status"] != status:
        raise RuntimeError(f"{verb} ended in {view['status']}: {view.get('why')}")
    return (time.perf_counter() - began) * 1000
