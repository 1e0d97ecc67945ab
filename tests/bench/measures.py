"""What is measured, one function a figure. Every one is bounded in count and time, and none asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis

from config import sdk, traces
from config.state import CHECKOUT
from hostd import cgroups
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.noop import REPLIES as _REPLIES

LOAD_PROCESSES, LOAD_CONNECTIONS, LOAD_SECONDS = 2, 16, 6.0

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
for _ in range(15):
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


def _last_json(printed: str) -> list[float]:
    return [float(value) for value in json.loads(printed.strip().splitlines()[-1])]


def create_to_running(target: Target) -> Iterator[Figure]:
    """Cold, asked by the published SDK; the baseline is crun alone with the same configuration. Between the two stands
    the host's own part, through SSH: disk, network, user namespace, limits, crun, keeper."""
    crun = figure("plain_crun", "ms", _plain_crun(target))
    yield crun
    yield figure("host_make_box", "ms", _last_json(target.python(_HOST)), crun.median)
    argv = [str(sdk.python(sdk.PYTHON_VERSIONS[0])), "-c", _SDK, target.base_url, target.key, "20"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True, env={"PATH": "/usr/bin:/bin"})
    yield figure("create_to_running", "ms", _last_json(done.stdout)[1:], crun.median)


def _plain_crun(target: Target) -> list[float]:
    """`crun run` of `true` with a devbox's own configuration, but namespaces made on the spot and the image as root."""
    host = traces.Marks.of(target.up.state).host
    assert host is not None
    box = target.create()
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
    with tempfile.TemporaryDirectory(prefix="berth-bench-crun-") as bundle:
        Path(bundle, "config.json").write_text(json.dumps(config))
        enter = ["nsenter", f"--mount={host.run}/mounts/ns"]
        argv = [*enter, "crun", f"--root={bundle}/state", "--cgroup-manager=disabled", "run", "-b", bundle, "bench"]
        return [timed(lambda: subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)) for _ in range(15)]


def warm_create_to_result(target: Target) -> Iterator[Figure]:
    """Create until the first command's output is in hand, with boxes made ahead of need."""
    count, took = 8, []
    target.python(_WARM.format(count=count))
    try:
        _until(lambda: int(target.python(_WARM_NOW).split()[-1]) >= count, 30)
        for _ in range(count - 2):
            began = time.perf_counter()
            box = target.create(launch_parameters={"resource_size_request": "X_SMALL"})
            result = target.post(f"/v1/devboxes/{box}/execute_sync", {"command": "echo ready"})
            took.append((time.perf_counter() - began) * 1000)
            if result["stdout"] != "ready\n":
                raise RuntimeError(str(result))
            target.shutdown(box)
    finally:
        target.python(_WARM.format(count=0))
    yield figure("warm_create_to_result", "ms", took)


def execute_true(target: Target) -> Iterator[Figure]:
    """A command through the API; the baseline is a Celery round trip that does nothing."""
    hop = figure("celery_noop", "ms", _celery_hops(target))
    yield hop
    box = target.create()
    path, took = f"/v1/devboxes/{box}/execute", []
    for number in range(220):
        body = {"command": "true", "command_id": f"bench-{number}"}
        took.append(timed(lambda body=body: target.post(path, body)))  # type: ignore[misc]
    target.shutdown(box)
    yield figure("execute_true", "ms", took[20:], hop.median)


def _celery_hops(target: Target) -> list[float]:
    settings = target.environment
    argv = [sys.executable, "-m", "celery", "-A", "tests.bench.noop", "worker", "-Q", "bench", "--without-mingle"]
    worker = subprocess.Popen(argv, cwd=CHECKOUT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    send = (
        "import json, os, time, redis\nfrom tests.bench.noop import REPLIES, noop\n"
        "replies = redis.Redis.from_url(os.environ['REDIS_URL'])\ntook = []\n"
        "for number in range(120):\n    began = time.perf_counter()\n    noop.delay()\n"
        "    assert replies.blpop(REPLIES, 20)\n    took.append((time.perf_counter() - began) * 1000)\n"
        "print(json.dumps(took[20:]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", send], cwd=CHECKOUT, env=settings, capture_output=True, text=True, timeout=90
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return _last_json(done.stdout)
    finally:
        worker.terminate()
        worker.wait(20)
        redis.Redis.from_url(settings["REDIS_URL"]).delete(_REPLIES)


def burst_50(target: Target) -> Iterator[Figure]:
    """Fifty creates at once until all of them run; then what they cost while they idle."""
    began = time.perf_counter()
    size = {"launch_parameters": {"resource_size_request": "X_SMALL"}}
    with ThreadPoolExecutor(50) as pool:
        boxes = [str(box["id"]) for box in pool.map(lambda _: target.post("/v1/devboxes", size), range(50))]
    _until(lambda: _running(target, boxes) == len(boxes), 90)
    yield figure("burst_50", "s", [time.perf_counter() - began])
    time.sleep(2)
    yield figure("idle_devbox_pss_mb", "MB", _pss_by_box(target))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(target.shutdown, boxes))


def _running(target: Target, boxes: list[str]) -> int:
    answer = target.client.get("/v1/devboxes", params={"limit": 500, "status": "running"}).json()
    return len({box["id"] for box in answer["devboxes"]} & set(boxes))


def _pss_by_box(target: Target) -> list[float]:
    host = traces.Marks.of(target.up.state).host
    assert host is not None
    driver = cgroups.detect()
    found: dict[str, float] = {}
    for name in driver.children(host.cgroup):
        kind, _, slot = name.partition("-")
        if kind in ("b", "k"):
            pids = Path(driver.procs(f"{host.cgroup}/{name}")[0]).read_text().split()
            found[slot] = found.get(slot, 0.0) + sum(_pss(pid) for pid in pids)
    return list(found.values())


def _pss(pid: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def get_devbox_rps(target: Target) -> Iterator[Figure]:
    """With authentication and the database in it; the baseline is a view that does nothing."""
    box = target.create()
    bare, _ = _load(target, "/healthz")
    rate, latencies = _load(target, f"/v1/devboxes/{box}")
    target.shutdown(box)
    yield figure("bare_view_rps", "1/s", [bare])
    yield figure("get_devbox_rps", "1/s", [rate], bare)
    yield figure("get_devbox_ms_c32", "ms", latencies)


def _load(target: Target, path: str) -> tuple[float, list[float]]:
    host, _, port = target.base_url.removeprefix("http://").rpartition(":")
    rest = [path, target.key, str(LOAD_CONNECTIONS), str(LOAD_SECONDS)]
    argv = [sys.executable, "-m", "tests.bench.load", host, port, *rest]
    running = [subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) for _ in range(LOAD_PROCESSES)]
    latencies: list[float] = []
    for process in running:
        printed, _ = process.communicate(timeout=LOAD_SECONDS + 20)
        latencies += _last_json(printed)
    return len(latencies) / LOAD_SECONDS, latencies


def _until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.02)


MEASURES: dict[str, Callable[[Target], Iterator[Figure]]] = {
    "create_to_running": create_to_running,
    "warm_create_to_result": warm_create_to_result,
    "execute_true": execute_true,
    "burst_50": burst_50,
    "get_devbox_rps": get_devbox_rps,
}
