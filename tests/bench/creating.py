"""Devboxes: cold, warm and fifty at once, and what they hold in memory while they idle."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import sdk
from hostd import cgroups
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.shares import pss_mb

SMALLEST = {"launch_parameters": {"resource_size_request": "X_SMALL"}}

_SDK = """
import json, sys, time
from runloop_api_client import Runloop
client = Runloop(base_url=sys.argv[1], bearer_token=sys.argv[2])
took = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    box = client.devboxes.create_and_await_running(launch_parameters={"resource_size_request": "X_SMALL"})
    took.append((time.perf_counter() - began) * 1000)
    assert box.status == "running", box
    client.devboxes.shutdown(box.id)
    time.sleep(0.1)
print(json.dumps(took))
"""

_HOST = """
import json, time
from api.ids import new_id
from hosts.client import client_for
from hosts.models import Host
host = Host.objects.get(state="ready")
client, took = client_for(host.pk), []
for _ in range({count}):
    box, began = new_id("dbx"), time.perf_counter()
    client.prepare_disk(box=box, fence=1, image=host.image_id, disk_bytes=4 << 30)
    client.boot(box=box, fence=1, cpu_millis=500, memory_bytes=1 << 30, pids=512, disk_bytes=4 << 30, hostname="bench")
    took.append((time.perf_counter() - began) * 1000)
    client.destroy(box=box, fence=2, keep_disk=False)
print(json.dumps(took))
"""

_WARM = """
from hosts.client import client_for
from hosts.models import Host
host = Host.objects.get(state="ready")
Host.objects.filter(pk=host.pk).update(warm={count})
client_for(host.pk).set_warm(count={count}, image=host.image_id)
"""

_WARM_NOW = """
from hosts.client import client_for
from hosts.models import Host
print(client_for(Host.objects.get(state="ready").pk).hello()["warm"])
"""


def timed(call: Callable[[], object]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def last_json(printed: str) -> list[float]:
    """The numbers in the last line."""
    return [float(value) for value in json.loads(printed.strip().splitlines()[-1])]


def until(true: Callable[[], bool], seconds: float) -> None:
    """Ask again and again. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.02)


def create_to_running(target: Target) -> Iterator[Figure]:
    """Cold, asked by the published SDK; the baseline is crun alone with the same configuration. Between the two stands
    the host's own part, through SSH: disk, network, user namespace, limits, crun, keeper."""
    with plain_crun(target) as run:
        crun = figure("plain_crun", "ms", [timed(run) for _ in range(10 if target.quick else 30)])
    yield crun
    assert crun.median is not None
    made = last_json(target.python(_HOST.format(count=8 if target.quick else 25)))
    yield figure("host_make_box", "ms", made, crun.median)
    count = 9 if target.quick else 41
    argv = [str(sdk.python(sdk.PYTHON_VERSIONS[0])), "-c", _SDK, target.base_url, target.key, str(count)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True, env={"PATH": "/usr/bin:/bin"})
    yield figure("create_to_running", "ms", last_json(done.stdout)[1:], crun.median)


@contextlib.contextmanager
def plain_crun(target: Target) -> Iterator[Callable[[], object]]:
    """`crun run` of `true` with a devbox's own configuration, but namespaces made on the spot and the image as root.
    May be called by several threads at once."""
    host = target.host
    box = target.create(**SMALLEST)
    slot = next(name[2:] for name in cgroups.detect().children(host.cgroup) if name.startswith("b-"))
    config = json.loads(Path(host.bundle(slot), "config.json").read_text())
    target.shutdown(box)
    image = next(Path(host.pool, "images").iterdir())
    config["root"] = {"path": str(image), "readonly": True}
    config["process"]["args"] = ["/bin/true"]
    linux = config["linux"]
    linux["namespaces"] = [{"type": one["type"]} for one in linux["namespaces"] if one["type"] != "user"]
    linux.pop("uidMappings", None)
    linux.pop("gidMappings", None)
    config["mounts"] = [one for one in config["mounts"] if one["type"] != "bind"]
    numbers = iter(range(1_000_000))
    with tempfile.TemporaryDirectory(prefix="berth-bench-crun-") as bundle:
        Path(bundle, "config.json").write_text(json.dumps(config))
        enter = ["nsenter", f"--mount={host.run}/mounts/ns"]
        argv = [*enter, "crun", f"--root={bundle}/state", "--cgroup-manager=disabled", "run", "-b", bundle]

        def run() -> object:
            return subprocess.run(
                [*argv, f"bench-{next(numbers)}"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                timeout=60,
            )  # fmt: skip

        yield run


def warm_create_to_result(target: Target) -> Iterator[Figure]:
    """Create until the first command's output is in hand, with boxes made ahead of need; the baseline is the same
    with none made."""
    count = 6
    cold = [_to_result(target) for _ in range(4 if target.quick else 20)]
    took: list[float] = []
    try:
        for _ in range(1 if target.quick else 4):
            target.python(_WARM.format(count=count))
            until(lambda: int(target.python(_WARM_NOW).split()[-1]) >= count, 30)
            took += [_to_result(target) for _ in range(count - 1)]
    finally:
        target.python(_WARM.format(count=0))
    first = figure("cold_create_to_result", "ms", cold)
    yield first
    yield figure("warm_create_to_result", "ms", took, first.median)


def _to_result(target: Target) -> float:
    began = time.perf_counter()
    box = target.create(**SMALLEST)
    printed = target.run(box, "echo ready")
    took = (time.perf_counter() - began) * 1000
    if printed != "ready\n":
        raise RuntimeError(printed)
    target.shutdown(box)
    return took


def burst_50(target: Target) -> Iterator[Figure]:
    """Fifty creates at once until all of them run, beside fifty of crun alone at once; then what they cost while they
    idle, beside one `sleep` that crun alone keeps."""
    count = 20 if target.quick else 50
    with plain_crun(target) as run:
        alone = [timed(lambda: _at_once(run, count)) / 1000 for _ in range(1 if target.quick else 3)]
    took: list[float] = []
    for last in [True] if target.quick else [False, False, True]:
        began = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            boxes = [str(box["id"]) for box in pool.map(lambda _: target.post("/v1/devboxes", SMALLEST), range(count))]
        try:
            until(lambda boxes=boxes: _running(target, boxes) == len(boxes), 90)  # type: ignore[misc]
            took.append(time.perf_counter() - began)
            if last:
                time.sleep(2)
                memory = figure("idle_devbox_pss_mb", "MB", _pss_by_box(target))
        finally:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(target.shutdown, boxes))
            until(lambda boxes=boxes: _running(target, boxes) == 0, 60)  # type: ignore[misc]
    baseline = figure("plain_crun_50", "s", alone)
    yield baseline
    yield figure("burst_50", "s", took, baseline.median)
    yield memory


def _at_once(run: Callable[[], object], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda _: run(), range(count)))


def _running(target: Target, boxes: list[str]) -> int:
    answer = target.client.get("/v1/devboxes", params={"limit": 500, "status": "running"}).json()
    return len({box["id"] for box in answer["devboxes"]} & set(boxes))


def _pss_by_box(target: Target) -> list[float]:
    driver = cgroups.detect()
    found: dict[str, float] = {}
    for name in driver.children(target.host.cgroup):
        kind, _, slot = name.partition("-")
        if kind in ("b", "k"):
            pids = Path(driver.procs(f"{target.host.cgroup}/{name}")[0]).read_text().split()
            found[slot] = found.get(slot, 0.0) + pss_mb(int(pid) for pid in pids)
    return list(found.values())
