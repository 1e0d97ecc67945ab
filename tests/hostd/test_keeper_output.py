"""Output of commands: exact, followed, read in parts, capped, held back; nothing dropped unsaid."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from hostd import executions, streams
from tests.hostd.bare_box import Box, Host, text

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")

PYTHON = ["/usr/bin/python3", "-S", "-c"]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(21)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "exe_" + "".join(c for c in request.node.name.lower() if c.isalnum())[-60:]


def test_binary_output_is_exact(box: Box, name: str) -> None:
    script = (
        "import hashlib,os,random\nrandom.seed(1)\nh=hashlib.sha256()\n"
        "for i in range(300):\n b=random.randbytes(random.randrange(1,20000)); h.update(b)\n"
        " while b: b=b[os.write(1,b):]\nos.write(2,h.hexdigest().encode())"
    )
    answer = box.run(name, argv=[*PYTHON, script])
    assert "stdout" not in answer, "too large to be inline"
    data = box.file(name)
    assert len(data) == answer["sizes"][0]
    assert hashlib.sha256(data).hexdigest() == box.file(name, 2).decode()


@pytest.mark.parametrize(("size", "inline"), [(65536, True), (65537, False)])
def test_inline_up_to_64_kib_together(box: Box, name: str, size: int, inline: bool) -> None:
    box.run(name, f"head -c {size - 5} /dev/zero; printf 12345 >&2")
    event = box.exit_event(name)
    assert ("stdout" in event, "stderr" in event) == (inline, inline)
    assert event["sizes"] == [size - 5, 5]


def test_follow_from_the_start_to_the_end(box: Box, name: str) -> None:
    box.spawn(name, "for i in 1 2 3; do echo line $i; sleep 0.1; done; exit 4")
    with box.open(verb="follow", id=name, stream="stdout", offset=0) as client:
        assert client.line() == {"ok": True, "offset": 0}
        data, trailer = client.frames()
        assert data == b"line 1\nline 2\nline 3\n"
        assert trailer == {"total": 21, "exit": 4, "reason": None, "complete": True}
        assert client.more(verb="state", box=box.name, id=name)["exit"] == 4, "the connection goes on"
    with box.open(verb="follow", id=name, stream="stdout", offset=7) as client:
        client.line()
        assert client.frames()[0] == b"line 2\nline 3\n"
    with box.open(verb="follow", id=name, stream="stderr") as client:
        client.line()
        assert client.frames() == (b"", {"total": 0, "exit": 4, "reason": None, "complete": True})


def test_follow_is_prompt(box: Box, name: str) -> None:
    box.spawn(name, "cat", stdin="pipe")
    delays = []
    with box.open(verb="follow", id=name, stream="stdout", offset=0) as client:
        client.line()
        for i in range(20):
            started = time.monotonic()
            box.ask(verb="stdin", id=name, request=f"r{i}", raw=b"x" * 10)
            assert client.frame() == b"x" * 10
            delays.append(time.monotonic() - started)
        box.ask(verb="stdin", id=name, request="end", eof=True)
        assert client.frames()[0] == b""
    assert sorted(delays)[10] < 0.05


def test_many_followers_of_a_fast_writer(box: Box, name: str) -> None:
    """Each gets every byte; one that does not read holds nobody up."""
    size = 30_000_000
    lazy = []
    box.spawn(name, f"sleep 0.3; yes 0123456 | head -c {size}")
    for _ in range(3):
        client = box.open(verb="follow", id=name, stream="stdout", offset=0)
        client.line()
        lazy.append(client)
    wanted = hashlib.sha256(b"0123456\n" * (size // 8)).hexdigest()
    got = []

    def follow() -> None:
        with box.open(verb="follow", id=name, stream="stdout", offset=0) as client:
            client.line()
            data, trailer = client.frames()
            got.append((hashlib.sha256(data).hexdigest(), trailer["total"], trailer["complete"]))

    threads = [threading.Thread(target=follow) for _ in range(5)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 25  # below every timer of the keeper that would set a forgotten follower going again
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert got == [(wanted, size, True)] * 5
    for client in lazy:
        data, trailer = client.frames()
        assert (hashlib.sha256(data).hexdigest(), trailer["complete"]) == (wanted, True)
        client.__exit__()


def test_a_follower_that_leaves_is_forgotten(box: Box, name: str) -> None:
    before = len(os.listdir(f"/proc/{box.pid}/fd"))
    box.spawn(name, "sleep 60")
    for _ in range(50):
        with box.open(verb="follow", id=name, stream="stdout", offset=0) as client:
            client.line()
    box.ask(verb="kill", id=name, fence=1, signal=9, group=True)
    box.wait(name)
    time.sleep(0.1)
    assert len(os.listdir(f"/proc/{box.pid}/fd")) <= before + 2


def test_read_in_parts(box: Box, name: str) -> None:
    box.run(name, "seq 1 1000; seq 1 5 >&2")
    whole = box.file(name)

    def read(**fields: object) -> tuple[dict, bytes]:
        with box.open(verb="read", id=name, **{"stream": "stdout", "offset": 0, "limit": 1 << 20, **fields}) as client:
            answer = client.line()
            return answer, client.file.read(answer["body"])

    answer, data = read()
    assert (answer["size"], answer["offset"], data) == (len(whole), 0, whole)
    answer, data = read(offset=100, limit=50)
    assert (answer["offset"], data) == (100, whole[100:150])
    assert read(offset=1 << 40)[0]["body"] == 0
    answer, data = read(last_lines=3)
    assert (answer["offset"], data) == (len(whole) - 13, b"998\n999\n1000\n")
    assert read(last_lines=5000)[1] == whole
    assert read(last_lines=5, limit=8)[1] == whole[-8:], "within the limit"
    assert read(stream="stderr", last_lines=2)[1] == b"4\n5\n"
    assert box.ask(verb="read", id=name, stream="stdout", limit=17 << 20)["error"]["code"] == "bad_request"


def test_last_lines_without_a_final_newline(box: Box, name: str) -> None:
    box.run(name, "printf 'a\\nb\\nc'; head -c 200000 /dev/zero | tr '\\0' x >&2; printf '\\nend' >&2")
    for stream, wanted in (("stdout", b"b\nc"), ("stderr", b"x" * 200_000 + b"\nend")):
        with box.open(verb="read", id=name, stream=stream, last_lines=2) as client:
            assert client.file.read(client.line()["body"]) == wanted


def test_head_and_tail_under_the_cap(host: Host, name: str) -> None:
    cap = 1 << 20
    box = host.box(22, stream_cap_bytes=cap)
    total = 8 * cap
    box.run(name, f"seq 1 100000000 | head -c {total}")
    script = f"seq 1 100000000 | head -c {total}"
    wanted = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout
    answer = box.ask(verb="state", id=name)
    assert answer["sizes"] == [total, 0]
    start, end = cap // 2, total - answer["dropped"][0]
    with box.open(verb="follow", id=name, stream="stdout", offset=0) as client:
        client.line()
        head, trailer = client.frames()
        assert trailer["complete"] is False
        start, end = trailer["dropped"]
        assert head == wanted[:start]
        assert (trailer["resume"], end - start) == (end, answer["dropped"][0])
        assert start == cap // 2
        assert total - end <= cap
        tail = client.more(verb="follow", box=box.name, id=name, stream="stdout", offset=trailer["resume"])
        assert tail == {"ok": True, "offset": end}
        data, trailer = client.frames()
        assert (data, trailer["complete"]) == (wanted[end:], True)
    with box.open(verb="follow", id=name, stream="stdout", offset=start + 10) as client:
        assert client.line() == {"ok": True, "offset": end, "dropped": [start, end]}
        assert client.frames()[0] == wanted[end:]
    with box.open(verb="read", id=name, stream="stdout", offset=start + 10, limit=100) as client:
        answer = client.line()
        assert (answer["offset"], answer["dropped"]) == (end, [start, end])
        assert client.file.read(100) == wanted[end : end + 100]
    used = os.stat(f"{box.out}/{name}.1").st_blocks * 512
    assert used < 2 * cap, f"{used} bytes on the disk"
    box.kill_keeper()
    assert box.ask(verb="state", id=name)["dropped"] == [end - start, 0], "its successor knows"
    box.close()


def test_the_rate_holds_a_writer_back_and_loses_nothing(host: Host, name: str) -> None:
    box = host.box(23, byte_rate=4 << 20, byte_burst=2 << 20)
    started = time.monotonic()
    answer = box.run(name, "yes 0123456 | head -c 6291456")
    took = time.monotonic() - started
    assert answer["sizes"] == [6 << 20, 0]
    assert box.file(name) == b"0123456\n" * (6 * 131072)
    assert 0.7 < took < 4, took
    box.close()


def test_yes_does_not_burn_the_host(host: Host, name: str) -> None:
    box = host.box(24, byte_rate=1 << 20, byte_burst=1 << 20, stream_cap_bytes=1 << 20)
    box.spawn(name, "exec yes")
    time.sleep(1.5)  # the burst is used up
    ticks = _cpu_ticks(box.pid)
    time.sleep(1)
    assert _cpu_ticks(box.pid) - ticks <= 10, "ten hundredths of a second in a second"
    box.ask(verb="kill", id=name, fence=1, signal=9, group=True)
    assert box.wait(name)["exit"] == 137
    assert box.run(name + "b", "echo quick")["exit"] == 0
    box.close()


def _cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_full_pool_stops_reading_and_drops_nothing(host: Host, name: str) -> None:
    box = host.box(25, out_mount="size=2m")
    box.spawn(name, "yes 0123456 | head -c 4000000; echo end >&2")
    time.sleep(1)
    assert box.ask(verb="state", id=name)["state"] == "running"
    answers = [box.spawn(f"{name}{i}", "true") for i in range(40)]  # until the journal's last block is full
    assert answers[-1]["error"]["code"] == "no_space"
    subprocess.run(["mount", "-o", "remount,size=20m", box.out], check=True)
    answer = box.wait(name)
    assert answer["exit"] == 0
    assert box.file(name) == b"0123456\n" * 500_000
    for i, early in enumerate(answers):
        assert box.run(f"{name}{i}", "true")["exit"] == 0, early
    box.close()


def test_late_output_is_kept_in_a_ring(box: Box, name: str) -> None:
    answer = box.run(name, "(sleep 0.2; head -c 3000000 /dev/zero; printf the-end) & echo started")
    assert text(answer) == "started\n"
    path = f"{box.out}/{name}.1.late"
    for _ in range(100):
        if b"the-end" in box.file(name, "1.late"):
            break
        time.sleep(0.05)
    assert os.stat(path).st_size == streams.LATE_BYTES


def test_oldest_acknowledged_outputs_go_first(host: Host, name: str) -> None:
    box = host.box(26, out_budget_bytes=250_000)
    for i in range(5):
        box.run(f"{name}{i}", "head -c 100000 /dev/zero")
    assert len([f for f in os.listdir(box.out) if f.endswith(".1")]) == 5
    box.ack(*(f"{name}{i}" for i in range(5)))
    deadline = time.monotonic() + 20
    while len([f for f in os.listdir(box.out) if f.endswith(".1")]) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert sorted(f for f in os.listdir(box.out) if f.endswith(".1")) == [f"{name}3.1", f"{name}4.1"]
    box.close()


def test_what_is_remembered_of_old_commands(host: Host, name: str) -> None:
    """Small old ones go, large ones wait for `forget`, the newest stay; a successor remembers the same."""
    box = host.box(27)
    for i in range(110):
        box.run(f"{name}{i}", "head -c 100000 /dev/zero" if i == 3 else "echo x")
    box.ack(*(f"{name}{i}" for i in range(110)))
    assert box.ask(verb="state", id=f"{name}0")["exit"] == 0
    os.kill(box.pid, 9)
    wait_until(lambda: not os.path.exists(f"/proc/{box.pid}"))
    box.restart()
    assert box.ask(verb="state", id=f"{name}0")["exit"] == 0, "acknowledged a moment ago"
    with open(f"{box.out}/journal") as file:
        aged = [json.loads(line) for line in file]
    for facts in aged:
        if "ack" in facts:
            facts["ack"] -= 1000 * (executions.REMEMBERED_S + 1)
    with open(f"{box.out}/journal", "w") as file:
        file.writelines(json.dumps(facts) + "\n" for facts in aged)
    box.kill_keeper()
    wait_until(lambda: "error" in box.ask(verb="state", id=f"{name}0"), 15)
    gone = [i for i in range(110) if "error" in box.ask(verb="state", id=f"{name}{i}")]
    assert gone == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert not os.path.exists(f"{box.out}/{name}0.1")
    box.close()


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
