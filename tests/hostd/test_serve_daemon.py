"""The daemon on stubs (stub_host.py): routing, idempotence, kills, bounds. Needs no root."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostd import messages
from hostd.messages import Refused
from tests.hostd.client import LIMITS, Connection, new_id
from tests.hostd.stub_daemon import IMAGE, STUB, Host, code, until


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    found = Host(tmp_path)
    try:
        yield found
    finally:
        found.remove()


def test_a_box_from_birth_to_death_each_verb_twice(host: Host):
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    disk: dict[str, Any] = {"box": box, "fence": 1, "image": IMAGE, "disk_bytes": 1 << 30}
    first = host.client.call("prepare_disk", **disk)
    assert host.client.call("prepare_disk", **disk) == first and first["warm"] is False
    assert host.report()[box]["state"] == "disk"
    assert code(lambda: host.client.spawn(box, exe, "exit 0")) == "unknown_box"
    up = host.create(box)
    assert host.create(box) == up and up["slot"] == first["slot"] and up["address"].startswith("10.213.48.")
    assert host.client.spawn(box, exe, "exit 3")["id"] == exe
    host.client.spawn(box, exe, "exit 4")
    until(lambda: host.client.call("state", box=box, id=exe)["state"] == "exited")
    assert host.client.call("state", box=box, id=exe)["exit"] == 3
    entry = host.report()[box]
    assert entry["state"] == "up" and entry["executions"] == [{"id": exe, "state": "exited"}] and entry["fence"] == 1
    for _ in range(2):
        host.client.destroy(box, 2)
    assert host.report() == {} and host.client.call("hello")["boxes"] == 0
    assert code(lambda: host.client.call("state", box=box, id=exe)) == "unknown_box"
    assert code(lambda: host.create(box, 1)) == "stale_fence"
    assert not list((host.folder / "slots").iterdir()) and not list((host.folder / "keepers").iterdir())


def test_limits_of_a_box_that_is_up_are_written(host: Host):
    host.start()
    box = new_id("dbx")
    host.create(box)
    host.client.create(box, IMAGE, memory_bytes=1 << 30)
    assert json.loads((host.folder / "limits").read_text())["memory_bytes"] == 1 << 30


def test_refusals(host: Host):
    host.start()
    box = new_id("dbx")
    assert code(lambda: host.client.call("boot", box=box, fence=1, hostname="x", **LIMITS)) == "unknown_box"
    wrong: dict[str, Any] = {"box": box, "fence": 1, "image": "img_other", "disk_bytes": 1 << 30}
    assert code(lambda: host.client.call("prepare_disk", **wrong)) == "unknown_image"
    assert host.report() == {}
    host.create(box, 5)
    with pytest.raises(Refused) as caught:
        host.client.destroy(box, 4)
    assert (caught.value.code, caught.value.extra) == ("stale_fence", {"fence": 5})
    assert host.report()[box]["state"] == "up"


def test_a_destroy_that_overtakes_a_boot(host: Host):
    host.environment["STUB_BOOT_SECONDS"] = "0.5"
    host.start()
    box = new_id("dbx")
    outcome: list[str] = []

    def boot() -> None:
        try:
            host.create(box, 1)
            outcome.append("up")
        except Refused as refused:
            outcome.append(refused.code)

    thread = threading.Thread(target=boot)
    thread.start()
    until(lambda: list((host.folder / "run" / "b").glob("*")))
    host.client.destroy(box, 2)  # waits for the boot's end, then undoes it
    thread.join()
    assert outcome == ["up"]
    assert host.report() == {} and not list((host.folder / "slots").iterdir())
    assert code(lambda: host.create(box, 1)) == "stale_fence"


def test_events_reach_two_watchers_until_acknowledged(host: Host):
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    host.create(box)
    with host.client.watch() as one, host.client.watch() as two:
        host.client.spawn(box, exe, "exit 7")
        for watch in (one, two):
            event = watch.next()
            assert (event["event"], event["box"], event["id"], event["exit"]) == ("exit", box, exe, 7)
        assert one.next(3, heartbeats=True)["event"] == "heartbeat"
    with host.client.watch() as again:
        assert again.next()["id"] == exe
        again.ack((box, exe))
    with host.client.watch() as silent, pytest.raises(TimeoutError):
        silent.next(0.5)
    host.kill()
    host.start()
    with host.client.watch() as silent, pytest.raises(TimeoutError):
        silent.next(0.5)


def test_a_killed_hostd_loses_nothing(host: Host):
    host.start()
    box, running, unacked = new_id("dbx"), new_id("exe"), new_id("exe")
    up = host.create(box, 3)
    host.client.spawn(box, unacked, "exit 5")
    host.client.spawn(box, running, "sleep 1 6")
    with host.client.connect() as kept:  # belongs to the keeper by now: hostd's death must not cut it
        kept.call("state", box=box, id=running)
        host.kill()
        assert kept.call("state", box=box, id=running)["state"] == "running"
    host.start()
    assert host.create(box, 3) == up
    assert code(lambda: host.client.destroy(box, 2)) == "stale_fence"
    with host.client.watch() as watch:
        events = {event["id"]: event["exit"] for event in (watch.next(), watch.next())}
    assert events == {unacked: 5, running: 6}


def test_a_killed_keeper_gets_a_successor(host: Host):
    host.start()
    box, one, two = new_id("dbx"), new_id("exe"), new_id("exe")
    up = host.create(box)
    host.client.spawn(box, one, "exit 1")
    os.kill(up["keeper_pid"], signal.SIGKILL)
    try:
        state = host.client.call("state", box=box, id=one)  # waits for the successor
    except messages.ProtocolError:  # it was with the dying one already: an answer cut before its first byte
        state = host.client.call("state", box=box, id=one)
    assert state["exit"] == 1
    host.client.spawn(box, two, "exit 2")
    assert host.create(box)["keeper_pid"] != up["keeper_pid"]
    assert host.client.call("state", box=box, id=two)["named"] == box


def test_keeper_and_hostd_killed_together(host: Host):
    host.start()
    box, one = new_id("dbx"), new_id("exe")
    up = host.create(box)
    host.client.spawn(box, one, "exit 1")
    until(lambda: host.client.call("state", box=box, id=one)["state"] == "exited")
    host.kill()
    os.kill(up["keeper_pid"], signal.SIGKILL)
    host.start()
    assert host.client.call("state", box=box, id=one)["exit"] == 1


def test_init_that_ends_is_told_until_acknowledged_also_after_a_restart(host: Host):
    host.start()
    box = new_id("dbx")
    up = host.create(box)
    with host.client.watch() as watch:
        os.kill(up["init_pid"], signal.SIGKILL)
        event = watch.next()
        assert (event["event"], event["box"], event["exit"], event["oom"]) == ("box_exit", box, 137, False)
    assert host.report()[box]["state"] == "down"
    host.kill()
    host.start()
    with host.client.watch() as watch:
        assert watch.next() == event
        watch.ack((box, "box"))
        time.sleep(0.1)
    host.kill()
    host.start()
    with host.client.watch() as watch, pytest.raises(TimeoutError):
        watch.next(0.3)
    assert host.report()[box]["state"] == "down"
    again = host.create(box)  # it may be started anew
    assert again["init_pid"] != up["init_pid"] and host.report()[box]["state"] == "up"


def test_a_restart_of_the_machine(host: Host):
    """As hostd finds it afterwards: records of another boot, nothing alive."""
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    up = host.create(box)
    host.client.spawn(box, exe, "sleep 60 1")
    host.kill()
    for pid in (up["init_pid"], up["keeper_pid"]):
        os.kill(pid, signal.SIGKILL)
    path = host.folder / "keepers" / f"{up['slot']}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "another", "of_a_later_release": 1}))
    host.start()
    entry = host.report()[box]
    assert entry["state"] == "down" and entry["executions"] == []
    assert code(lambda: host.client.call("state", box=box, id=exe)) == "lost"
    with host.client.watch() as watch:
        event = watch.next()
        assert (event["event"], event["box"], event["exit"]) == ("box_exit", box, -1)
    host.create(box)
    assert host.report()[box]["state"] == "up"
    host.client.destroy(box, 2)


def test_a_box_whose_keeper_cannot_be_had_any_more(host: Host):
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    up = host.create(box)
    host.client.spawn(box, exe, "exit 1")
    host.kill()
    for pid in (up["init_pid"], up["keeper_pid"]):
        os.kill(pid, signal.SIGKILL)
    (host.folder / "run" / "stub-keeper" / up["slot"]).unlink()  # its zygote died as well
    host.start()
    until(lambda: host.report()[box]["executions"] == [])
    assert host.report()[box]["state"] == "down"
    assert code(lambda: host.client.call("state", box=box, id=exe)) == "lost"
    host.client.destroy(box, 2)


def test_hostd_killed_in_the_middle_of_a_boot(host: Host):
    host.environment["STUB_BOOT_SECONDS"] = "20"
    host.start()
    box = new_id("dbx")
    host.client.call("prepare_disk", box=box, fence=1, image=IMAGE, disk_bytes=1 << 30)
    with host.client.connect() as connection:
        connection.send("boot", box=box, fence=1, hostname="x", **LIMITS)
        until(lambda: list((host.folder / "run" / "b").glob("*")))
        host.kill()
    del host.environment["STUB_BOOT_SECONDS"]
    host.start()
    assert host.report()[box]["state"] == "disk"
    assert not list((host.folder / "run" / "b").glob("*"))
    host.create(box)
    assert host.report()[box]["state"] == "up"


def test_a_maker_killed_in_the_middle_of_a_boot(host: Host):
    host.environment["STUB_BOOT_SECONDS"] = "3"
    host.start()
    assert host.process is not None
    box = new_id("dbx")
    host.client.call("prepare_disk", box=box, fence=1, image=IMAGE, disk_bytes=1 << 30)
    with host.client.connect() as connection:
        connection.send("boot", box=box, fence=1, hostname="x", **LIMITS)
        until(lambda: list((host.folder / "run" / "b").glob("*")))
        for pid in children(host.process.pid):
            os.kill(pid, signal.SIGKILL)
        assert code(lambda: messages.parse_reply(connection.line())) == "internal"
    host.create(box)
    assert host.report()[box]["state"] == "up"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_warm_boxes_are_made_claimed_and_found_again(host: Host):
    host.start(warm=2)
    until(lambda: host.client.call("hello")["warm"] == 2)
    box, exe = new_id("dbx"), new_id("exe")
    ready = {entry["slot"] for entry in host.client.call("report")["warm"]}
    claimed = host.client.call("prepare_disk", box=box, fence=1, image=IMAGE, disk_bytes=2 << 30)
    assert claimed["warm"] and claimed["slot"] in ready
    assert host.client.call("prepare_disk", box=box, fence=1, image=IMAGE, disk_bytes=2 << 30) == claimed
    host.create(box)
    assert host.client.spawn(box, exe, "exit 0")["named"] == box
    until(lambda: host.client.call("hello")["warm"] == 2)
    host.kill()
    host.start()
    assert host.client.call("hello")["warm"] == 2 and host.report()[box]["state"] == "up"
    host.client.call("set_warm", count=0, image=IMAGE)
    until(lambda: host.client.call("hello")["warm"] == 0)
    assert host.report()[box]["state"] == "up"
    until(lambda: len(list((host.folder / "slots").iterdir())) == 1)
    assert json.loads((host.folder / "host.json").read_text())["warm"] == 0


def test_only_one_hostd(host: Host):
    host.start()
    second = subprocess.run(
        [sys.executable, STUB, "serve", "--config", host.folder / "host.json"],
        capture_output=True,
        timeout=20,
        text=True,
    )
    assert second.returncode != 0 and "another hostd" in second.stderr
    assert host.answers()


def test_host_verbs_share_a_connection(host: Host):
    host.start()
    with host.client.connect() as connection:
        connection.socket.sendall(messages.request("hello") * 3)
        replies = [messages.parse_reply(connection.line()) for _ in range(3)]
        assert all(reply["host"] == "hst_1" for reply in replies)


def test_lines_that_are_wrong_or_never_end(host: Host):
    host.start()
    for line, wanted in ((b"what\n", "bad_request"), (b"x" * messages.LINE_MAX, "too_large")):
        with host.client.connect() as connection:
            connection.socket.sendall(line)
            assert code(lambda: messages.parse_reply(connection.line())) == wanted
            assert connection.socket.recv(1) == b""


def test_many_at_once(host: Host):
    host.start()
    box = new_id("dbx")
    host.create(box)
    ids = [new_id("exe") for _ in range(200)]
    connections = [host.client.connect() for _ in ids]
    body = json.dumps({"command": "exit 0"}).encode()
    for id, connection in zip(ids, connections, strict=True):
        connection.send("spawn", body, box=box, id=id, fence=1)
    for id, connection in zip(ids, connections, strict=True):
        assert messages.parse_reply(connection.line())["id"] == id
        connection.socket.close()
    assert len(host.report()[box]["executions"]) == 200


def test_it_leaves_when_told_and_boxes_live_on(host: Host):
    host.start()
    box = new_id("dbx")
    up = host.create(box)
    assert host.process is not None
    host.process.terminate()
    assert host.process.wait(10) == 0
    os.kill(up["init_pid"], 0)
    with pytest.raises(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(host.client.path)
    host.start()
    assert host.create(box) == up


def test_the_log_tells_no_secret(host: Host):
    host.start()
    box = new_id("dbx")
    host.create(box)
    host.client.spawn(box, new_id("exe"), "exit 0 hunter2 1", env={"TOKEN": "hunter2"})
    host.remove()
    assert "hunter2" not in (host.folder / "log" / "hostd.log").read_text()


def test_a_hung_keeper_hangs_nobody_else(host: Host):
    host.start()
    box, other, exe = new_id("dbx"), new_id("dbx"), new_id("exe")
    up = host.create(box)
    host.create(other)
    host.client.spawn(box, exe, "sleep 60 1")
    os.kill(up["keeper_pid"], signal.SIGSTOP)
    connections = [host.client.connect() for _ in range(300)]
    try:
        for connection in connections:
            connection.send("state", box=box, id=exe)
        began = time.monotonic()
        told = host.report()
        assert told[box]["executions"] is None, "nobody could be asked: that must not look like nothing"
        assert told[other]["executions"] == [] and time.monotonic() - began < 8
        assert host.client.spawn(other, new_id("exe"), "exit 0")["id"]
        answers = [answer for connection in connections if (answer := early(connection))]
        assert set(answers) <= {"busy", "not_ready"}, answers
    finally:
        os.kill(up["keeper_pid"], signal.SIGCONT)
        for connection in connections:
            connection.socket.close()
    until(lambda: host.report()[box]["executions"] == [{"id": exe, "state": "running"}])


def test_a_keeper_that_reads_nothing_for_long_is_replaced(host: Host):
    host.environment["STUB_HUNG_SECONDS"] = "6"
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    up = host.create(box)
    host.client.spawn(box, exe, "exit 3")
    until(lambda: host.client.call("state", box=box, id=exe)["state"] == "exited")
    os.kill(up["keeper_pid"], signal.SIGSTOP)
    connections = [host.client.connect() for _ in range(300)]
    for connection in connections:
        connection.send("state", box=box, id=exe)
        connection.socket.settimeout(0.05)

    def heard() -> bool:
        with contextlib.suppress(OSError, messages.ProtocolError, Refused):
            with host.client.connect() as connection:
                connection.socket.settimeout(1)
                return bool(connection.call("state", box=box, id=exe)["exit"] == 3)
        return False

    until(heard, 30)
    assert host.create(box)["keeper_pid"] != up["keeper_pid"]
    for connection in connections:
        connection.socket.close()


def early(connection: Connection) -> str:
    """The refusal that has arrived by now, if any."""
    connection.socket.setblocking(False)
    try:
        return str(json.loads(connection.socket.recv(65536))["error"]["code"])
    except BlockingIOError:
        return ""


def test_a_box_is_destroyed_under_a_hung_keeper_and_waiting_clients(host: Host):
    host.start()
    box, exe = new_id("dbx"), new_id("exe")
    up = host.create(box)
    os.kill(up["keeper_pid"], signal.SIGSTOP)
    connections = [host.client.connect() for _ in range(200)]
    for connection in connections:
        connection.send("state", box=box, id=exe)
    host.client.destroy(box, 2)
    for connection in connections:
        connection.socket.settimeout(5)  # an end or a refusal: what it must not do is wait
        with contextlib.suppress(ConnectionResetError):
            connection.socket.recv(65536)
        connection.socket.close()
    assert host.report() == {}
