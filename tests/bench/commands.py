"""Short commands one after another and many at once, and a thousand long ones that are open together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import psycopg
import redis

from config.state import CHECKOUT
from hostd import cgroups
from tests.bench.creating import last_json, timed, until
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.load import Load, apart, per_second
from tests.bench.noop import REPLIES
from tests.bench.shares import Meter, Parts, processes, pss_mb
from tests.bench.ssh import loopback_ssh
from tests.bench.wire import Unexpected, exchange


def execute_true(target: Target) -> Iterator[Figure]:
    """A command through the API; the baseline is a Celery round trip that does nothing."""
    count = 60 if target.quick else 400
    hop = figure("celery_noop", "ms", _celery_hops(target, count))
    yield hop
    with target.boxes(1) as (box,):
        path, took = f"/v1/devboxes/{box}/execute", []
        for number in range(count + 20):
            body = {"command": "true", "command_id": f"bench-{number}"}
            took.append(timed(lambda body=body: target.post(path, body)))  # type: ignore[misc]
    yield figure("execute_true", "ms", took[20:], hop.median)


def _celery_hops(target: Target, count: int) -> list[float]:
    settings = target.environment
    argv = [sys.executable, "-m", "celery", "-A", "tests.bench.noop", "worker", "-Q", "bench", "--without-mingle"]
    worker = subprocess.Popen(argv, cwd=CHECKOUT, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    send = (
        "import json, os, time, redis\nfrom tests.bench.noop import REPLIES, noop\n"
        "replies = redis.Redis.from_url(os.environ['REDIS_URL'])\ntook = []\n"
        f"for number in range({count + 20}):\n    began = time.perf_counter()\n    noop.delay()\n"
        "    assert replies.blpop(REPLIES, 20)\n    took.append((time.perf_counter() - began) * 1000)\n"
        "print(json.dumps(took[20:]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", send], cwd=CHECKOUT, env=settings, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return last_json(done.stdout)
    finally:
        worker.terminate()
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(5)
        redis.Redis.from_url(settings["REDIS_URL"]).delete(REPLIES)


def short_commands(target: Target) -> Iterator[Figure]:
    """`true` as often as it goes, by so many at once: through the API, by `crun exec` into the same box (the baseline)
    and by a loopback `ssh` to the machine itself, each with a connection of its own as a tool would make it."""
    seconds = 3.0 if target.quick else 8.0
    parts = Parts(target.up)
    with target.boxes(1, cores=2) as (box,), loopback_ssh(target) as ssh:
        _warm_up(target, box)
        slot = next(name[2:] for name in cgroups.detect().children(target.host.cgroup) if name.startswith("b-"))
        enter = ["nsenter", f"--mount={target.host.run}/mounts/ns"]
        crun = [*enter, "crun", f"--root={target.host.runtime_state}", "exec", slot, "/bin/true"]
        for connections in (1, 8, 32):
            exec_rate = figure(f"crun_exec_per_s_c{connections}", "1/s", _rates(crun, connections, seconds / 2))
            ssh_rate = figure(
                f"loopback_ssh_per_s_c{connections}", "1/s", _rates(ssh("true"), connections, seconds / 2)
            )
            load = Load(
                base_url=target.base_url,
                key=target.key,
                method="POST",
                path=f"/v1/devboxes/{box}/execute",
                body=f'{{"command": "true", "command_id": "short-{connections}-NUMBER"}}',
                want='"exit_status":0',
                connections=connections,
                seconds=seconds,
            )
            with Meter(parts) as meter:
                taken = apart(load)
            name = f"short_commands_per_s_c{connections}"
            yield figure(name, "1/s", per_second(taken), exec_rate.median).with_cpu(meter.shares())
            yield figure(f"short_command_ms_c{connections}", "ms", [one.ms for one in taken])
            yield exec_rate
            yield ssh_rate


def _warm_up(target: Target, box: str) -> None:
    for _ in range(5):
        target.run(box, "true")


def _rates(argv: Sequence[str], at_once: int, seconds: float) -> list[float]:
    """How many of these end well in each second, by so many at once. Raises RuntimeError when one fails."""
    # A pool of shells, since a Python that starts processes would be what is measured.
    loop = (
        'end=$1; shift; while [ "${EPOCHREALTIME%.*}" -lt "$end" ]; do "$@" </dev/null >/dev/null || exit 1; '
        'echo "$EPOCHREALTIME"; done'
    )
    end = int(time.time() + seconds) + 1
    running = [
        subprocess.Popen(["bash", "-c", loop, "bash", str(end), *argv], stdout=subprocess.PIPE, text=True)
        for _ in range(at_once)
    ]
    ends: list[float] = []
    try:
        for process in running:
            printed, _ = process.communicate(timeout=seconds + 60)
            if process.returncode:
                raise RuntimeError(f"{argv[0]} … {argv[-1]} failed")
            ends += [float(line) for line in printed.split()]
    finally:
        for process in running:
            process.kill()
            process.wait()
    whole = range(int(min(ends)) + 1, end)
    counts = [float(sum(1 for one in ends if second <= one < second + 1)) for second in whole]
    return counts or [len(ends) / seconds]


def get_devbox_rps(target: Target) -> Iterator[Figure]:
    """With authentication and the database in it; the baseline is a view that does nothing."""
    parts, seconds = Parts(target.up), 3.0 if target.quick else 8.0
    with target.boxes(1) as (box,):

        def load(path: str) -> Load:
            return Load(base_url=target.base_url, key=target.key, path=path, connections=16, seconds=seconds)

        bare = figure("bare_view_rps", "1/s", per_second(apart(load("/healthz"), 2)))
        with Meter(parts) as meter:
            taken = apart(load(f"/v1/devboxes/{box}"), 2)
    yield bare
    yield figure("get_devbox_rps", "1/s", per_second(taken), bare.median).with_cpu(meter.shares())
    yield figure("get_devbox_ms_c32", "ms", [one.ms for one in taken])


_STATES = "SELECT status, count(*) FROM executions_execution WHERE devbox_id = ANY(%s) GROUP BY status"


def open_executions_1000(target: Target) -> Iterator[Figure]:
    """A thousand `sleep`s open at once on one host, in four devboxes: until all run, what each holds in memory, and
    from their common end until the last is completed; every exit status is looked at."""
    count, lasts = (100, 15) if target.quick else (1000, 75)
    parts = Parts(target.up)
    with (
        target.boxes(4) as boxes,
        psycopg.connect(target.environment["DATABASE_URL"], autocommit=True) as database,
    ):

        def states() -> dict[str, int]:
            return {str(name): int(many) for name, many in database.execute(_STATES, [boxes]).fetchall()}

        for box in boxes:
            target.run(box, "true")
        before = _memory(parts)
        began, end = time.perf_counter(), time.time() + lasts

        def requests() -> Iterator[bytes]:
            for number in range(count):
                body = {"command": f"sleep {max(1.0, end - time.time()):.2f}"}
                yield target.server.request("POST", f"/v1/devboxes/{boxes[number % 4]}/execute_async", body)

        paths: list[str] = []
        with Meter(parts) as meter:
            for number, answer, _, _ in exchange(target.server, requests(), 16, lasts):
                if answer.status != 200:
                    raise Unexpected(f"status {answer.status}: {answer.body[:200]!r}")
                paths.append(f"/v1/devboxes/{boxes[number % 4]}/executions/{answer.json()['execution_id']}")
            until(lambda: states().get("running", 0) == count, max(1.0, end - time.time() - 3))
            took = time.perf_counter() - began
        during = _memory(parts)
        time.sleep(max(0.0, end - time.time()))
        until(lambda: states() == {"completed": count + len(boxes)}, 60)
        late = time.time() - end
        asked = (target.server.request("GET", path) for path in paths)
        exits = [answer.json().get("exit_status") for _, answer, _, _ in exchange(target.server, asked, 8, 60)]
        if exits != [0] * count:
            raise Unexpected(f"{sum(1 for one in exits if one != 0)} of {count} did not end with 0")
    yield figure("open_executions_1000", "s", [took]).with_cpu(meter.shares())
    yield figure("open_executions_end_s", "s", [late])
    for side, kilobytes in ((side, (during[side] - before[side]) * 1024 / count) for side in during):
        yield Figure(f"open_execution_{side}_kb", "KB", round(kilobytes, 1), round(kilobytes, 1), count)


def _memory(parts: Parts) -> dict[str, float]:
    """MiB on the host's side and on the servers'."""
    found = parts.pids(processes())
    hosts = {"keepers", "boxes", "hostd"}
    servers = {"web", "worker", "watcher", "postgres", "redis", "sshd"}
    return {
        "host": pss_mb(pid for name, pids in found.items() if name in hosts for pid in pids),
        "server": pss_mb(pid for name, pids in found.items() if name in servers for pid in pids),
    }
