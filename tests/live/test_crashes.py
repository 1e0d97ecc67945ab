"""Everything is killed, and every devbox and command still comes to a true end in time, with nothing left over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import redis

from tests.live.crashes import TAKEN_OVER_WITHIN, alive, hostd_pid, wait_until

pytestmark = pytest.mark.live

CREATE_POINTS = [
    f"devboxes.{step}.{moment}"
    for step in ("place", "prepare_disk", "boot", "launch")
    for moment in ("claimed", "acted")
]


@pytest.mark.parametrize("point", CREATE_POINTS)
def test_a_worker_killed_while_it_creates_a_devbox(berth, fault, no_orphans, point: str) -> None:
    killed = fault.arm(point)
    # With nothing to launch a devbox goes over that step.
    box = berth.owner.post("/v1/devboxes", {"name": "crash", "launch_parameters": {"launch_commands": ["true"]}})["id"]
    view = berth.owner.wait(box, "running", "failure", within=TAKEN_OVER_WITHIN)
    assert fault.struck(), "the worker never came to this point"
    assert not alive(killed)
    assert view["status"] == "running", view
    assert [move["status"] for move in view["state_transitions"]] == ["provisioning", "initializing", "running"]
    assert berth.owner.run(box, "echo usable") == ("usable\n", "", 0)
    berth.owner.shutdown(box)


@pytest.mark.parametrize("moment", ["claimed", "acted"])
def test_a_worker_killed_while_it_takes_a_devbox_apart(berth, fault, no_orphans, moment: str) -> None:
    box = berth.owner.create(name="crash")
    fault.arm(f"devboxes.teardown.{moment}")
    berth.owner.shutdown(box)
    assert berth.owner.get(f"/v1/devboxes/{box}")["status"] == "shutdown"
    wait_until(fault.struck, 20, "the worker came to the point")
    wait_until(
        lambda: berth.rows("SELECT 1 FROM devboxes_devbox WHERE id = %s AND completed_at IS NOT NULL", box),
        TAKEN_OVER_WITHIN,
        "taken apart",
    )


@pytest.mark.parametrize("point", ["executions.spawn.claimed", "executions.spawn.acted"])
def test_a_worker_killed_while_it_starts_a_command_which_runs_once(
    berth, fault, no_orphans, box: str, point: str
) -> None:
    fault.arm(point)
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "echo ran | tee -a /tmp/count"})
    path = f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
    wait_until(lambda: berth.owner.get(path)["status"] == "completed", TAKEN_OVER_WITHIN, "the command is over")
    assert fault.struck()
    done = berth.owner.get(path)
    assert (done["stdout"], done["exit_status"]) == ("ran\n", 0)
    assert berth.owner.run(box, "cat /tmp/count")[0] == "ran\n"


@pytest.mark.parametrize("moment", ["claimed", "acted"])
def test_a_worker_killed_while_it_kills_a_command(berth, fault, no_orphans, box: str, moment: str) -> None:
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "sleep 3000"})
    path = f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
    fault.arm(f"executions.kill.{moment}")
    berth.owner.post(f"{path}/kill")
    wait_until(lambda: berth.owner.get(path)["status"] == "completed", TAKEN_OVER_WITHIN, "the command is over")
    wait_until(fault.struck, 20, "the worker came to the point")
    assert berth.owner.get(path)["exit_status"] == 137
    assert berth.owner.run(box, "pgrep -x sleep || echo none") == ("none\n", "", 0)


@pytest.mark.parametrize("moment", ["claimed", "acted"])
def test_a_worker_killed_while_it_looks_after_a_command(berth, fault, no_orphans, box: str, moment: str) -> None:
    command = "while [ ! -e /tmp/enough ]; do sleep 0.1; done; echo over; exit 3"
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": command})["execution_id"]
    row = "FROM executions_execution WHERE id = %s AND step = 'await_exit' AND lease IS NULL"
    wait_until(lambda: berth.rows(f"SELECT 1 {row}", begun), 20, "the command runs")
    killed = fault.arm(f"executions.await_exit.{moment}")
    berth.rows("UPDATE executions_execution SET wake_at = now() WHERE id = %s RETURNING 1", begun)
    wait_until(fault.struck, 20, "the worker came to the point")
    assert not alive(killed)
    # Another one has looked, and sleeps until it is told.
    wait_until(lambda: berth.rows(f"SELECT 1 {row} AND wake_at > now()", begun), TAKEN_OVER_WITHIN, "looked after")
    assert berth.owner.run(box, "touch /tmp/enough") == ("", "", 0)
    path = f"/v1/devboxes/{box}/executions/{begun}"
    wait_until(lambda: berth.owner.get(path)["status"] == "completed", TAKEN_OVER_WITHIN, "the command is over")
    done = berth.owner.get(path)
    assert (done["stdout"], done["exit_status"], done["why"]) == ("over\n", 3, None)


@pytest.mark.parametrize("moment", ["claimed", "acted"])
def test_a_worker_killed_while_it_cleans_up_after_a_failure(berth, fault, no_orphans, moment: str) -> None:
    box = berth.owner.create(name="crash")
    fault.arm(f"devboxes.clean_up.{moment}")
    behead(berth, box)
    view = berth.owner.wait(box, "failure", within=40)
    assert view["failure_reason"] == "health_check_failed", view
    wait_until(fault.struck, 20, "the worker came to the point")
    wait_until(
        lambda: berth.rows("SELECT 1 FROM devboxes_devbox WHERE id = %s AND step = 'failed' AND NOT reserved", box),
        TAKEN_OVER_WITHIN,
        "cleaned up",
    )


def behead(berth, box: str) -> None:
    """Kill the first process of a devbox's box, as the kernel might."""
    host = berth.host_config()
    (slot,) = berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", box)[0]
    os.kill(json.loads(Path(host.bundle(slot), "made.json").read_text())["init_pid"], signal.SIGKILL)


@pytest.mark.parametrize("moment", ["claimed", "acted"])
def test_a_worker_killed_while_it_stores_a_large_output(berth, fault, no_orphans, box: str, moment: str) -> None:
    fault.arm(f"executions.store.{moment}")
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "seq 1 200000"})
    path = f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
    wait_until(fault.struck, 30, "the worker came to the point")
    wait_until(
        lambda: berth.rows("SELECT 1 FROM executions_execution WHERE id = %s AND step = 'done'", begun["execution_id"]),
        TAKEN_OVER_WITHIN,
        "stored",
    )
    assert berth.owner.get(path)["exit_status"] == 0
    assert streamed(berth, path) == "".join(f"{n}\n" for n in range(1, 200_001))


def streamed(berth, path: str, into: list[str] | None = None) -> str:
    """A whole stream of stdout, as a patient client takes it: from offset to offset when it is cut."""
    parts = [] if into is None else into
    deadline = time.monotonic() + 90
    while True:
        assert time.monotonic() < deadline, "the stream did not end"
        with contextlib.suppress(httpx.TransportError):
            if _stream_on(berth, path, parts):
                return "".join(parts)
        time.sleep(0.1)


def _stream_on(berth, path: str, parts: list[str]) -> bool:
    """Take what comes from where we are; whether that was all there will ever be."""
    over = bool(berth.owner.client.get(path).json().get("status") == "completed")
    offset = str(len("".join(parts).encode()))
    with berth.owner.client.stream("GET", f"{path}/stream_stdout_updates", params={"offset": offset}) as answer:
        if answer.status_code != 200:
            return False
        event = ""
        for line in answer.iter_lines():
            if line.startswith("event:"):
                event = line[6:].strip()
            elif line.startswith("data:"):
                if event == "error":
                    return False
                parts.append(json.loads(line[5:]).get("output", ""))
            elif not line:
                event = ""
    return over


TICKS = "for i in $(seq 1 80); do echo tick $i; sleep 0.1; done"
ALL_TICKS = "".join(f"tick {n}\n" for n in range(1, 81))


class Watched:
    """A command that runs for 8 s with a client that streams it."""

    def __init__(self, berth, box: str) -> None:
        begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": TICKS})
        self.berth, self.path = berth, f"/v1/devboxes/{box}/executions/{begun['execution_id']}"
        self.parts: list[str] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._stream)
        self.thread.start()
        wait_until(lambda: "tick 5\n" in "".join(self.parts), 15, "the stream has begun")

    def _stream(self) -> None:
        try:
            streamed(self.berth, self.path, self.parts)
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        self.thread.join(120)
        assert self.error is None, self.error
        assert not self.thread.is_alive()
        assert "".join(self.parts) == ALL_TICKS
        assert self.berth.owner.get(self.path)["exit_status"] == 0


def answers(berth) -> bool:
    try:
        return bool(berth.owner.client.get("/v1/accounts/me").status_code == 200)
    except httpx.TransportError:
        return False


def test_hostd_killed_under_a_command_that_streams(berth, no_orphans, box: str) -> None:
    watched = Watched(berth, box)
    killed = hostd_pid(berth)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: hostd_pid(berth) != killed and alive(hostd_pid(berth)), 30, "hostd again")
    watched.check()
    assert berth.owner.run(box, "echo still mine") == ("still mine\n", "", 0)


@pytest.mark.parametrize("role", ["watcher", "worker", "web"])
def test_a_role_killed_under_a_command_that_streams(berth, no_orphans, box: str, role: str) -> None:
    watched = Watched(berth, box)
    killed = berth.pids()[role]
    os.killpg(killed, signal.SIGKILL)
    wait_until(lambda: berth.pids().get(role, killed) != killed, 20, f"{role} again")
    wait_until(lambda: answers(berth), 30, "the API answers")
    watched.check()


def test_redis_flushed_and_stopped_while_work_comes_in(berth, no_orphans, box: str) -> None:
    watched = Watched(berth, box)
    broker = redis.Redis.from_url(berth.env["REDIS_URL"])
    broker.flushall()
    assert berth.owner.run(box, "echo after the flush") == ("after the flush\n", "", 0)
    stopped = berth.pids()["redis"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        other = berth.owner.create(name="without-redis")
        assert berth.owner.run(other, "echo without redis", timeout=60) == ("without redis\n", "", 0)
        berth.owner.shutdown(other)
        watched.check()
    finally:
        os.kill(stopped, signal.SIGCONT)
    os.kill(stopped, signal.SIGKILL)
    wait_until(lambda: berth.pids().get("redis", stopped) != stopped, 20, "redis again")
    assert berth.owner.run(box, "echo and after", timeout=60) == ("and after\n", "", 0)


def test_postgresql_killed_while_work_comes_in(berth, no_orphans, box: str) -> None:
    watched = Watched(berth, box)
    killed = berth.pids()["postgres"]
    os.killpg(killed, signal.SIGKILL)
    wait_until(lambda: berth.pids().get("postgres", killed) != killed, 40, "postgres again")

    wait_until(lambda: answers(berth), 40, "the API answers again")
    watched.check()
    assert berth.owner.run(box, "echo well", timeout=60) == ("well\n", "", 0)


def test_a_box_whose_init_is_killed_is_a_failure_with_its_reason(berth, no_orphans) -> None:
    box = berth.owner.create(name="beheaded")
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "sleep 300"})
    behead(berth, box)
    view = berth.owner.wait(box, "failure", within=40)
    assert view["failure_reason"] == "health_check_failed", view
    done = berth.owner.get(f"/v1/devboxes/{box}/executions/{begun['execution_id']}")
    assert done["status"] == "completed" and done["exit_status"] != 0
