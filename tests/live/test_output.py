"""Output and ends of commands in real boxes: nothing lost, nothing that hangs, and every end says of what."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.live

CAP = 64 << 20
"""BERTH_OUTPUT_CAP of the session's installation."""


@pytest.fixture(scope="module")
def shared(berth) -> Iterator[str]:
    """One devbox for the commands that leave it as it was."""
    box = berth.owner.create(name="output")
    yield box
    berth.owner.shutdown(box)


class Command:
    """A command that was started."""

    def __init__(self, key: Any, box: str, command: str, **body: Any) -> None:
        self.key, self.box = key, box
        self.id = key.post(f"/v1/devboxes/{box}/execute_async", {"command": command, **body})["execution_id"]
        self.path = f"/v1/devboxes/{box}/executions/{self.id}"

    def get(self) -> dict[str, Any]:
        return dict(self.key.get(self.path))

    def why(self) -> dict[str, Any]:
        return dict(self.key.get(f"{self.path}/why"))

    def wait(self, within: float = 60.0, status: str = "completed") -> dict[str, Any]:
        deadline = time.monotonic() + within
        while True:
            assert time.monotonic() < deadline, f"not {status} within {within} s: {self.get()}"
            answer = self.key.client.post(f"{self.path}/wait_for_status", json={"statuses": [status]}, timeout=60)
            if answer.status_code == 200:
                return dict(answer.json())
            assert answer.status_code == 408, answer.text

    def send(self, request: str | None = None, **body: Any) -> bool:
        headers = {"x-request-id": request} if request else {}
        return bool(self.key.post(f"{self.path}/send_std_in", body, headers=headers)["success"])

    def events(self, offset: int = 0, stream: str = "stdout", pause: float = 0.0) -> Iterator[tuple[str, Any]]:
        """(event, data) of a stream until it ends; with `pause` a slow reader."""
        parameters = {"offset": str(offset)}
        url = f"{self.path}/stream_{stream}_updates"
        with self.key.client.stream("GET", url, params=parameters, timeout=60) as answer:
            assert answer.status_code == 200
            event = "message"
            for line in answer.iter_lines():
                if line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("data:"):
                    yield event, json.loads(line[5:])
                    event = "message"
                    if pause:
                        time.sleep(pause)

    def text(self, offset: int = 0, stream: str = "stdout") -> str:
        parts = []
        for event, data in self.events(offset, stream):
            assert event == "message", data
            parts.append(data["output"])
        return "".join(parts)


def slot_of(berth: Any, box: str) -> str:
    return str(berth.rows("SELECT slot FROM devboxes_devbox WHERE id = %s", box)[0][0])


def host_files(berth: Any, command: Command) -> list[str]:
    folder = Path(berth.host_config().output(slot_of(berth, command.box)))
    return sorted(path.name for path in folder.glob(f"{command.id}.*"))


def wait_until(true: Any, within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.05)


# --- input ---


def test_input_and_interrupts_arrive_once_and_in_order(berth, shared) -> None:
    script = "trap 'echo interrupted' INT; while read -r line; do echo \"$line\"; done; echo end"
    command = Command(berth.owner, shared, script, attach_stdin=True)
    said: list[str] = []

    def until(text: str) -> None:
        wait_until(lambda: "".join(said) == text, 20, f"{text!r}, not {''.join(said)!r}")

    reader = threading.Thread(target=lambda: said.extend(data["output"] for _, data in command.events()))
    reader.start()
    for _ in range(2):
        assert command.send("r1", text="one\n")
    until("one\n")
    for _ in range(2):
        assert command.send("i1", signal="INTERRUPT")
    until("one\ninterrupted\n")
    assert command.send("r2", text="two\n")
    for _ in range(2):
        assert command.send("e1", signal="EOF")
    until("one\ninterrupted\ntwo\nend\n")
    reader.join(20)
    assert command.send("e1", signal="EOF"), "the same again, of a command that has ended"
    assert command.wait()["stdout"] == "one\ninterrupted\ntwo\nend\n"
    assert not command.send(text="late\n") and not command.send(signal="INTERRUPT")


def test_a_command_that_does_not_read_refuses_more_than_its_buffer(berth, shared) -> None:
    command = Command(berth.owner, shared, "sleep 1.5; wc -c", attach_stdin=True)
    command.wait(status="running")
    began = time.monotonic()
    assert command.send(text="x" * 900_000)
    assert not command.send(text="x" * 200_000), "it does not read, and its buffer is full"
    assert time.monotonic() - began < 1.2, "neither waited for the command"
    assert command.send(signal="EOF")
    assert command.wait()["stdout"] == "900000\n"


# --- output ---


def test_bytes_that_are_no_text_never_break_a_stream(berth, shared) -> None:
    raw = bytes(range(256)) + "grüße 🙂".encode()[:-1] + b"\xf0\x9f" + b"end\n"
    octal = "".join(f"\\{byte:03o}" for byte in raw)
    command = Command(berth.owner, shared, f"for i in 1 2 3; do printf '{octal}'; sleep 0.2; done")
    offsets = [data["offset"] for _, data in command.events()]
    assert offsets == sorted(offsets) and offsets[-1] == 3 * len(raw)
    whole = (raw * 3).decode("utf-8", "replace")
    assert command.text() == whole == command.get()["stdout"]
    for offset in offsets[:-1]:  # an event never ends inside a character, so what follows begins with one
        head = (raw * 3)[:offset].decode("utf-8", "replace")
        assert head + command.text(offset) == whole


def test_head_and_tail_of_what_is_over_the_cap(berth, shared) -> None:
    total = 160_000_000
    command = Command(berth.owner, shared, f"seq 1 100000000 | head -c {total}; echo done >&2")
    live: list[Any] = []
    follower = threading.Thread(target=lambda: live.extend(command.events()))
    follower.start()
    done = command.wait(within=120)
    assert (done["exit_status"], done["stderr"], done["stdout_truncated"]) == (0, "done\n", True)
    ((size, dropped),) = berth.rows("SELECT out_size, out_dropped FROM executions_execution WHERE id = %s", command.id)
    assert size == total and CAP - (1 << 20) <= size - dropped <= CAP + (18 << 20)
    wait_until(lambda: berth.rows("SELECT 1 FROM executions_execution WHERE id = %s AND step = 'done'", command.id),
               60, "stored")  # fmt: skip
    digits = numbers(total)
    ((hole,),) = berth.rows("SELECT out_hole FROM executions_execution WHERE id = %s", command.id)
    marker = f"\n[{dropped} bytes of output were not kept]\n"
    for offset, wanted in (
        (0, digits[:hole] + marker + digits[hole + dropped :]),
        (hole - 5, digits[hole - 5 : hole] + marker + digits[hole + dropped :]),
        (hole + dropped // 2, None),
        (hole + dropped, digits[hole + dropped :]),
        (total - 7, digits[total - 7 :]),
        (total, ""),
    ):
        found = command.text(offset)
        if wanted is None:
            assert found.endswith(digits[hole + dropped :]) and found.count("not kept") == 1
        else:
            assert same(found, wanted), (offset, len(found), len(wanted))
    follower.join(60)
    assert all(event == "message" for event, _ in live)
    text = "".join(data["output"] for _, data in live)
    assert live[-1][1]["offset"] == total and text.startswith(digits[: hole // 2]) and text.endswith(digits[-1000:])


def numbers(total: int) -> str:
    parts, size, n = [], 0, 1
    while size < total:
        block = "\n".join(map(str, range(n, n + 100_000))) + "\n"
        parts.append(block)
        size, n = size + len(block), n + 100_000
    return "".join(parts)[:total]


def same(one: str, other: str) -> bool:
    return hashlib.sha256(one.encode()).digest() == hashlib.sha256(other.encode()).digest()


def test_a_slow_reader_goes_on_from_s3_when_the_host_forgets(berth, shared) -> None:
    """The output is on its way to a reader from the host's file while that is stored and deleted."""
    command = Command(berth.owner, shared, "for i in $(seq 1 30); do seq $i 7 400000 ; sleep 0.02; done")
    parts: list[str] = []
    errors: list[Any] = []

    def read() -> None:
        for event, data in command.events(pause=0.03):
            (parts if event == "message" else errors).append(data["output"] if event == "message" else data)

    reader = threading.Thread(target=read)
    reader.start()
    command.wait()
    wait_until(lambda: f"{command.id}.1" not in host_files(berth, command), 40, "the host deleted what is stored")
    forgotten_with = len("".join(parts))
    reader.join(90)
    assert not reader.is_alive() and not errors
    whole = "".join(f"{n}\n" for i in range(1, 31) for n in range(i, 400_001, 7))
    assert same("".join(parts), whole)
    assert forgotten_with < len(whole), "the reader was not done by then"
    assert command.why()["output_kept"] == "stored"


def test_background_processes_do_not_hold_an_execution_open(berth, shared) -> None:
    command = Command(berth.owner, shared, "(sleep 1; echo late) & sleep 1000 & echo started; exit 3")
    done = command.wait(within=15)
    assert (done["stdout"], done["exit_status"]) == ("started\n", 3)
    assert berth.owner.run(shared, "pgrep -xc sleep")[0].strip() in ("1", "2")
    wait_until(lambda: f"{command.id}.1.late" in host_files(berth, command), 10, "what came later is kept in its tail")
    assert command.text() == "started\n", "the command's own output is closed"
    berth.owner.run(shared, "pkill -x sleep")


# --- ends ---


def test_an_end_reads_the_same_wherever_it_is_read(berth, shared) -> None:
    eat = "python3 -c \"x = 'x' * (8 << 30)\""
    for shell, kind, words in (
        ("echo before; kill -9 $$", "signal", "SIGKILL"),
        ("kill -TERM $$", "signal", "SIGTERM"),
        (f"echo before; exec {eat}", "out_of_memory", "memory"),
    ):
        request = {"x-request-id": f"end-{time.monotonic_ns()}"}
        sync = berth.owner.post(f"/v1/devboxes/{shared}/execute_sync", {"command": shell}, headers=request)
        (item,) = berth.owner.get(f"/v1/devboxes/{shared}/executions?limit=1")["executions"]
        path = f"/v1/devboxes/{shared}/executions/{item['execution_id']}"
        waited = berth.owner.post(f"{path}/wait_for_status", {"statuses": ["completed"]})
        account = berth.owner.get(f"{path}/why")
        got = berth.owner.get(path)
        assert {(one["exit_status"], one["why"]) for one in (sync, item, waited, got)} == {
            (account["exit_status"], account["cause"]["message"])
        }
        assert account["cause"]["kind"] == kind and words in account["cause"]["message"]
        assert sync["exit_status"] == 128 + (15 if words == "SIGTERM" else 9)
        reached = [phase["phase"] for phase in account["phases"]]
        assert reached == [
            "queued",
            "placed",
            "spawned",
            *(["first_byte"] if sync["stdout"] else []),
            "exited",
            "stored",
        ]
        assert account["worker"]
        if kind == "out_of_memory":
            cause = account["cause"]
            assert cause["kills"] >= 1 and cause["limit_bytes"] == 2 << 30
            assert cause["usage_bytes"] <= cause["peak_bytes"] <= cause["limit_bytes"] < 2 * cause["peak_bytes"]


def test_a_kill_may_be_repeated_and_says_who_asked(berth, shared) -> None:
    trap = "trap '' TERM INT; sleep 1000 & echo $!; wait; sleep 1000"
    for group in (False, True):
        command = Command(berth.owner, shared, trap)
        wait_until(lambda command=command: command.why()["phases"][-1]["phase"] == "spawned", 10, "it runs")
        time.sleep(0.3)
        for _ in range(3):
            berth.colleague.post(f"{command.path}/kill", {"kill_process_group": group})
        done = command.wait()
        assert done["exit_status"] == 137
        child = done["stdout"].strip()
        alive = berth.owner.run(shared, f"kill -0 {child} 2>/dev/null && echo alive || echo gone; kill -9 {child}")[0]
        assert alive == ("gone\n" if group else "alive\n")
        cause = command.why()["cause"]
        assert cause["kind"] == "kill_requested" and cause["by"]["member_id"] and cause["by"]["key_id"]


def test_a_client_that_leaves_kills_nothing(berth, shared) -> None:
    headers = {"x-request-id": f"leaves-{time.monotonic_ns()}"}
    body = {"command": "sleep 2; echo still here"}
    with pytest.raises(httpx.TimeoutException):
        berth.owner.client.post(f"/v1/devboxes/{shared}/execute_sync", json=body, headers=headers, timeout=0.5)
    again = berth.owner.post(f"/v1/devboxes/{shared}/execute_sync", body, headers=headers)
    assert (again["stdout"], again["exit_status"]) == ("still here\n", 0)


def test_what_a_box_s_root_does_to_our_processes_harms_that_box_alone(berth, shared) -> None:
    box = berth.owner.create(name="hostile")
    command = Command(berth.owner, box, "sleep 1000")
    command.wait(status="running")
    berth.owner.run(box, "sudo kill -9 -1")
    assert command.wait(within=15)["why"] == "it was ended by signal 9 (SIGKILL)"
    assert berth.owner.run(box, "echo again") == ("again\n", "", 0)
    stopped = berth.owner.run(box, "sudo pkill -STOP -u 65533; echo $?")
    assert stopped[0] == "0\n"
    held_up = [Command(berth.owner, box, f"echo late {n}") for n in range(6)]
    for n in range(5):  # others are served as ever, meanwhile
        began = time.monotonic()
        assert berth.owner.run(shared, f"echo {n}") == (f"{n}\n", "", 0)
        assert time.monotonic() - began < 3
    wait_until(
        lambda: held_up[0].why()["trouble"] or held_up[0].get()["status"] == "completed", 10, "its trouble is told"
    )
    for n, late in enumerate(held_up):
        assert late.wait(within=40)["stdout"] == f"late {n}\n"
    berth.owner.shutdown(box)


def test_a_box_whose_init_was_killed_says_so(berth) -> None:
    box = berth.owner.create(name="beheaded", launch_parameters={"launch_commands": ["sleep 0.2; echo ready"]})
    command = Command(berth.owner, box, "echo before; sleep 1000")
    command.wait(status="running")
    made = json.loads(Path(berth.host_config().bundle(slot_of(berth, box)), "made.json").read_text())
    os.kill(made["init_pid"], signal.SIGKILL)
    done = command.wait(within=40)
    assert done["exit_status"] == 137 and done["stdout"] == "before\n"
    assert command.why()["cause"]["kind"] == "devbox_ended"
    berth.owner.wait(box, "failure", within=40)
    account = berth.owner.get(f"/v1/devboxes/{box}/why")
    assert account["cause"]["kind"] == "box_ended" and account["cause"]["at_ms"]
    reached = [phase["phase"] for phase in account["phases"]]
    assert reached[:6] == ["queued", "placed", "disk_ready", "booted", "running", "ended"]
    (item,) = account["launch"]
    assert item["exit_status"] == 0 and item["duration_ms"] >= 200


def test_a_devbox_that_failed_to_launch_shows_what_it_was(berth) -> None:
    commands = ["echo fine", "echo reason >&2; exit 7"]
    box = berth.owner.post("/v1/devboxes", {"launch_parameters": {"launch_commands": commands}})["id"]
    berth.owner.wait(box, "failure", within=60)
    account = berth.owner.get(f"/v1/devboxes/{box}/why")
    cause = account["cause"]
    assert (cause["kind"], cause["item"], cause["exit_status"], cause["output"]) == ("launch_failed", 1, 7, ["reason"])
    assert [item["exit_status"] for item in account["launch"]] == [0, 7]


def test_keeper_and_zygote_killed_together_is_an_end_with_a_reason(berth) -> None:
    box = berth.owner.create(name="orphaned")
    command = Command(berth.owner, box, "echo before; sleep 1000")
    command.wait(status="running")
    slot = slot_of(berth, box)
    host = berth.host_config()
    keepers = [int(line) for path in Path("/sys/fs/cgroup").glob(f"*/{host.keeper_cgroup(slot)}/cgroup.procs")
               for line in path.read_text().split()]  # fmt: skip
    zygote = int(Path(f"/proc/{keepers[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert Path(f"/proc/{zygote}/comm").read_text().strip() == "zygote"
    os.kill(zygote, signal.SIGSTOP)  # so that it forks no successor between the two
    for pid in {*keepers, zygote}:
        os.kill(pid, signal.SIGKILL)
    done = command.wait(within=60)
    assert done["exit_status"] == -1 and "lost" in done["why"]
    assert command.why()["cause"]["kind"] == "lost"
    assert berth.owner.run(box, "echo usable")[0] == "usable\n"
    wait_until(lambda: berth.owner.run(box, "pgrep -xc sleep || true")[0] == "0\n", 10, "the lost command is ended")
    berth.owner.shutdown(box)


def test_a_host_that_is_cut_off_is_waited_for_and_nothing_is_lost(berth, shared) -> None:
    """Its sshd and every connection to it stand still for a while: waits answer in time, and all goes on afterwards."""
    command = Command(berth.owner, shared, "for i in $(seq 1 150); do echo tick $i; sleep 0.1; done")
    command.wait(status="running")
    stopped = tree(berth.pids()["sshd"])
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = berth.owner.client.post(
            f"{command.path}/wait_for_status", json={"statuses": ["completed"], "timeout_seconds": 3}
        )
        assert answer.status_code == 408 and 2.9 < time.monotonic() - began < 5
        queued = Command(berth.owner, shared, "sleep 1000")
        assert queued.get()["status"] == "queued"
        wait_until(lambda: queued.why()["trouble"], 15, "what it waits for is told")
        assert berth.owner.client.post(f"{queued.path}/kill", json={}, timeout=10).json()["status"] == "queued"
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    assert command.wait(within=60)["exit_status"] == 0
    assert command.text() == "".join(f"tick {n}\n" for n in range(1, 151))
    done = queued.wait(within=60)
    assert done["exit_status"] == 137 and queued.why()["cause"]["kind"] == "kill_requested"


def tree(pid: int) -> list[int]:
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += tree(int(child))
    return found
