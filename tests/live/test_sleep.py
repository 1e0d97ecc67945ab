"""Suspending and resuming real boxes: what the published client sees, what ends and how, and everything killed on the
way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from config.sdk import PYTHON_VERSIONS
from tests.live.crashes import TAKEN_OVER_WITHIN, alive, hostd_pid, wait_until
from tests.live.test_terminals import terminal, until

pytestmark = pytest.mark.live

CLIENT = """
import sys, time
from runloop_api_client import Runloop
client = Runloop(base_url=sys.argv[1], bearer_token=sys.argv[2])
devboxes = client.devboxes
launch = {"launch_commands": ["date +%s%N > ~/launched"]}
box = devboxes.create_and_await_running(name="sleeper", launch_parameters=launch)
devboxes.execute_sync(box.id, command="head -c 3000000 /dev/urandom > ~/data; sudo touch /etc/mark; chmod 4750 ~/data")
digest = devboxes.execute_sync(box.id, command="sha256sum ~/data; stat -c '%a %U' ~/data; ls /etc/mark").stdout
launched = devboxes.execute_sync(box.id, command="cat ~/launched").stdout
for turn in range(2):
    assert devboxes.suspend(box.id).status == "suspending"
    assert devboxes.await_suspended(box.id).status == "suspended"
    assert devboxes.resume(box.id).status == "provisioning"
    assert devboxes.await_running(box.id).status == "running"
    again = devboxes.execute_sync(box.id, command="sha256sum ~/data; stat -c '%a %U' ~/data; ls /etc/mark").stdout
    assert again == digest, (again, digest)
    assert devboxes.execute_sync(box.id, command="cat ~/launched").stdout > launched, "launch commands run again"
devboxes.shutdown(box.id)
print("slept well")
"""


def test_the_published_client_suspends_and_resumes(berth, python_sdk, no_orphans) -> None:
    argv = [str(python_sdk(PYTHON_VERSIONS[0])), "-c", CLIENT, berth.base_url, berth.owner.secret]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0 and "slept well" in done.stdout, done.stdout + done.stderr


def suspended(berth, box: str, within: float = 60.0) -> None:
    berth.owner.post(f"/v1/devboxes/{box}/suspend")
    view = berth.owner.wait(box, "suspended", "failure", within=within)
    assert view["status"] == "suspended", view


def resumed(berth, box: str, within: float = 60.0) -> None:
    berth.owner.post(f"/v1/devboxes/{box}/resume")
    view = berth.owner.wait(box, "running", "failure", within=within)
    assert view["status"] == "running", view


def test_all_that_goes_on_in_it_ends_with_the_reason(berth, no_orphans) -> None:
    hooks = {"suspend_commands": ["echo going >> ~/hooks; id -un >> ~/hooks", "exit 9", "sleep 100"]}
    box = berth.owner.create(
        name="busy",
        launch_parameters={"lifecycle": {"lifecycle_hooks": {**hooks, "suspend_deadline_ms": 1500}}},
        entrypoint="while :; do echo serving; sleep 0.5; done",
    )
    path = f"/v1/devboxes/{box}/executions"
    silent = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "sleep 1000"})["execution_id"]
    large = "seq 1 100000; echo there; sleep 1000"
    talking = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": large})["execution_id"]
    told: list[str] = []

    def stream() -> None:
        with httpx.stream(
            "GET",
            f"{berth.base_url}{path}/{talking}/stream_stdout_updates",
            headers={"authorization": f"Bearer {berth.owner.secret}"},
            timeout=60,
            trust_env=False,
        ) as answer:
            told.extend(answer.iter_lines())

    following = threading.Thread(target=stream)
    following.start()
    wait_until(lambda: any("there" in line for line in told), 30, "the stream has come to the end of the output")
    with terminal(berth, box, "shell") as client:
        client.send(b"echo in the terminal\n")
        until(client, b"in the terminal")
        suspended(berth, box)
        with pytest.raises(ConnectionClosed) as closed:
            # Beyond the 20 s after which a client asks whether anybody is there.
            while True:
                client.recv(timeout=60)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 4000
    following.join(30)
    assert not following.is_alive() and not any(line.startswith("event: error") for line in told)
    for execution in (silent, talking):
        done = berth.owner.get(f"{path}/{execution}")
        assert (done["status"], done["exit_status"], done["why"]) == ("completed", 137, "its devbox was suspended")
        assert berth.owner.get(f"{path}/{execution}/why")["cause"]["kind"] == "devbox_suspended"
    with berth.owner.client.stream("GET", f"{path}/{talking}/stream_stdout_updates") as answer:
        text = "".join(json.loads(line[5:]).get("output", "") for line in answer.iter_lines() if line[:5] == "data:")
    assert text == "".join(f"{n}\n" for n in range(1, 100_001)) + "there\n", "what was written outlives the box"
    entries = berth.owner.get(f"/v1/devboxes/{box}/logs?limit=5000")["logs"]
    assert {"serving"} <= {entry.get("message") for entry in entries if entry["source"] == "entrypoint"}
    assert 9 in [entry.get("exit_code") for entry in entries if entry["source"] == "setup_commands"]
    assert any("suspend commands may take 1.5 s" in (entry.get("message") or "") for entry in entries)
    assert berth.rows("SELECT reserved, compute_reserved FROM devboxes_devbox WHERE id = %s", box) == [(True, False)]
    resumed(berth, box)
    assert berth.owner.run(box, "cat ~/hooks; pgrep -fc [s]erving") == ("going\nuser\n1\n", "", 0)
    with terminal(berth, box, "shell") as client:
        client.send(b"echo a $((1 + 1))nd one\n")
        assert b"in the terminal" not in until(client, b"a 2nd one"), "a fresh shell"
    berth.owner.post(f"/v1/devboxes/{box}/suspend")
    berth.owner.shutdown(box)
    assert berth.owner.get(f"/v1/devboxes/{box}")["status"] == "shutdown"
    wait_until(
        lambda: berth.rows("SELECT 1 FROM devboxes_devbox WHERE id = %s AND completed_at IS NOT NULL", box),
        30,
        "taken apart",
    )


def test_one_that_is_not_used_falls_asleep_and_one_that_works_does_not(berth, no_orphans) -> None:
    idle = {"lifecycle": {"after_idle": {"idle_time_seconds": 3, "on_idle": "suspend"}}}
    box = berth.owner.create(name="idle", launch_parameters=idle, entrypoint="sleep 3000")
    ending = {"after_idle": {"idle_time_seconds": 3, "on_idle": "shutdown"}}
    other = berth.owner.create(name="idle too", launch_parameters=ending)
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "sleep 8; echo worked"})["execution_id"]
    clock = berth.owner.get(f"/v1/devboxes/{box}")["next_clock"]
    assert (clock["clock"], clock["action"], clock["since"]) == ("after_idle", "suspend", "command")
    view = berth.owner.wait(other, "shutdown", within=40)
    assert (view["shutdown_reason"], view["why"]) == ("idle", "it was not used for 3 s")
    view = berth.owner.wait(box, "suspended", within=60)
    assert view["why"] == "it was not used for 3 s"
    done = berth.owner.get(f"/v1/devboxes/{box}/executions/{begun}")
    assert (done["status"], done["stdout"], done["exit_status"]) == ("completed", "worked\n", 0)
    asleep = view["state_transitions"][-2]["transition_time_ms"]
    (ended,) = berth.rows("SELECT extract(epoch FROM exited_at) * 1000 FROM executions_execution WHERE id = %s", begun)[
        0
    ]
    assert asleep - float(ended) > 2900, "so long after the last use, not after the look that found it"
    resumed(berth, box)
    berth.owner.shutdown(box)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("run_hooks.acted", "readmit.acted"),
        ("suspend.claimed", "take_disk.claimed"),
        ("suspend.acted", "take_disk.acted"),
    ],
)
def test_a_worker_killed_while_it_suspends_and_resumes(berth, fault, no_orphans, down: str, up: str) -> None:
    box = berth.owner.create(name="crash")
    berth.owner.run(box, "echo kept > ~/f")
    killed = fault.arm(f"devboxes.{down}")
    suspended(berth, box, within=TAKEN_OVER_WITHIN)
    assert fault.struck() and not alive(killed)
    wait_until(lambda: alive(berth.pids()["worker"]), 30, "a worker again")
    killed = fault.arm(f"devboxes.{up}")
    resumed(berth, box, within=TAKEN_OVER_WITHIN)
    assert fault.struck() and not alive(killed)
    view = berth.owner.get(f"/v1/devboxes/{box}")
    told = [move["status"] for move in view["state_transitions"]][3:]
    assert told == ["suspending", "suspended", "provisioning", "initializing", "running"]
    assert berth.owner.run(box, "cat ~/f") == ("kept\n", "", 0)
    berth.owner.shutdown(box)


def test_hostd_killed_again_and_again_while_devboxes_sleep_and_wake(berth, no_orphans) -> None:
    box = berth.owner.create(name="crash")
    berth.owner.run(box, "echo 0 > ~/f")
    stop, failures = threading.Event(), list[BaseException]()

    def life() -> None:
        try:
            for turn in range(1, 4):
                suspended(berth, box, 90)
                resumed(berth, box, 90)
                assert berth.owner.run(box, f"cat ~/f; echo {turn} > ~/f") == (f"{turn - 1}\n", "", 0)
        except BaseException as error:
            failures.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=life)
    thread.start()
    while not stop.wait(0.4):
        killed = hostd_pid(berth)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda killed=killed: hostd_pid(berth) != killed and alive(hostd_pid(berth)), 30, "hostd again")
        stop.wait(1.0)
    thread.join(200)
    assert not failures, failures
    berth.owner.shutdown(box)


def test_a_host_that_was_restarted_starts_its_devboxes_again(berth, no_orphans) -> None:
    """As after a restart of the machine: every process of the boxes is gone, the records are of another boot."""
    box = berth.owner.create(name="survivor", launch_parameters={"launch_commands": ["date +%N > ~/launched"]})
    berth.owner.run(box, "echo kept > ~/f; sync")
    begun = berth.owner.post(f"/v1/devboxes/{box}/execute_async", {"command": "sleep 1000"})["execution_id"]
    path = f"/v1/devboxes/{box}/executions/{begun}"
    wait_until(lambda: berth.owner.get(path)["status"] == "running", 20, "the command runs")
    host = berth.host_config()
    (slot,) = berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", box)[0]
    keeper, made = Path(host.root, "keepers", f"{slot}.json"), Path(host.bundle(slot), "made.json")
    killed = hostd_pid(berth)
    os.kill(killed, signal.SIGKILL)
    record = json.loads(keeper.read_text())
    for pid in (record["pid"], record["init_pid"]):
        os.kill(pid, signal.SIGKILL)
    for file in (keeper, made):
        file.write_text(json.dumps({**json.loads(file.read_text()), "boot_id": "an-earlier-boot"}))
    wait_until(
        lambda: (
            "provisioning"
            in [move["status"] for move in berth.owner.get(f"/v1/devboxes/{box}")["state_transitions"]][3:]
        ),
        60,
        "it is started again",
    )
    view = berth.owner.wait(box, "running", "failure", within=60)
    assert (view["status"], view["why"]) == ("running", "its host was restarted, and it was started again on its disk")
    assert berth.owner.run(box, "cat ~/f; pgrep -x sleep || echo none") == ("kept\nnone\n", "", 0)
    wait_until(lambda: berth.owner.get(path)["status"] == "completed", 60, "the command has an end")
    assert berth.owner.get(path)["exit_status"] == -1
    berth.owner.shutdown(box)
