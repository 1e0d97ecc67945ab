"""hostd on real boxes: what survives which kill, and that nothing is left behind."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hostd import bundle
from hostd.messages import ProtocolError, Refused
from tests.hostd.client import LIMITS, new_id, outputs
from tests.hostd.live_host import LiveHost, alive, why_not

pytestmark = [pytest.mark.live, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def whole_host() -> Iterator[LiveHost]:
    host = LiveHost()
    try:
        host.set_up()
        host.start()
        yield host
    finally:
        host.remove()


@pytest.fixture
def host(whole_host: LiveHost) -> Iterator[LiveHost]:
    """The module's host, with every box of the test gone without a trace afterwards."""
    logged = len(whole_host.log())
    yield whole_host
    print(whole_host.log()[logged:][-4000:])  # shown when the test failed
    for box in whole_host.report():
        whole_host.client.destroy(box)
    until(lambda: not whole_host.traces(), 5, whole_host.traces)


def until(true: Callable[[], object], seconds: float = 10.0, why: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s {why()}"
        time.sleep(0.01)


def create(host: LiveHost, fence: int = 1, **limits: int) -> tuple[str, dict]:
    box = new_id("dbx")
    return box, host.client.create(box, host.image, fence, **limits)


def insist(call: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Do what a client of hostd does: ask again when the connection broke or it is told to."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except (OSError, ProtocolError) as error:
            assert time.monotonic() < deadline, error
        except Refused as refused:
            if refused.code not in ("busy", "not_ready", "internal") or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def test_each_verb_twice(host: LiveHost):
    box, exe = new_id("dbx"), new_id("exe")
    disk: dict[str, Any] = {"box": box, "fence": 1, "image": host.image, "disk_bytes": 1 << 30}
    assert host.client.call("prepare_disk", **disk) == host.client.call("prepare_disk", **disk)
    up = host.client.create(box, host.image)
    assert host.client.create(box, host.image) == up
    for _ in range(2):
        host.client.spawn(box, exe, "echo once >> ~/f; hostname; echo bad >&2; exit 3")
    state = host.client.wait(box, exe)
    assert state["exit"] == 3 and outputs(state) == (b"devbox\n", b"bad\n")
    again = new_id("exe")
    host.client.spawn(box, again, "cat ~/f")
    assert outputs(host.client.wait(box, again))[0] == b"once\n"
    entry = host.report()[box]
    assert (entry["state"], entry["slot"]) == ("up", up["slot"])
    assert {item["id"]: item["state"] for item in entry["executions"]} == {exe: "exited", again: "exited"}
    for _ in range(2):
        host.client.destroy(box, 2)
    assert box not in host.report() and not host.traces()


def test_new_limits_reach_a_box_that_is_up(host: LiveHost):
    box, _ = create(host, memory_bytes=256 << 20)
    host.client.create(box, host.image, memory_bytes=300 << 20)
    exe = new_id("exe")
    host.client.spawn(box, exe, "python3 -c 'x = bytearray(400 << 20)'")
    state = host.client.wait(box, exe)
    assert state["exit"] == 137 and state["reason"]["kind"] == "oom"
    host.client.create(box, host.image, memory_bytes=700 << 20)
    exe = new_id("exe")
    host.client.spawn(box, exe, "python3 -c 'x = bytearray(400 << 20)'")
    assert host.client.wait(box, exe)["exit"] == 0


def test_a_kept_disk(host: LiveHost):
    box, up = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, "echo mine > ~/f; sync")
    host.client.wait(box, exe)
    host.client.destroy(box, 2, keep_disk=True)
    assert box not in host.report() and not host.traces()
    (kept,) = (host.root / "pool" / "boxes-kept").iterdir()
    assert up["slot"] in kept.name and (kept / "home/user/f").read_text() == "mine\n"


LINES = 400
WRITER = f"for i in $(seq {LINES}); do echo line $i; sleep 0.005; done; exit 6"
WRITTEN = "".join(f"line {i}\n" for i in range(1, LINES + 1)).encode()


def test_a_killed_hostd_cuts_nothing(host: LiveHost):
    box, up = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, WRITER)
    with host.client.watch() as watch, host.client.follow(box, exe) as follower:
        seen = bytearray()
        for piece in follower:  # this connection is the keeper's: hostd's death does not touch it
            seen += piece
            if len(seen) > 200 and alive(host.pid) and "killed" not in locals():
                killed = True
                host.kill()
        with pytest.raises(ProtocolError):
            watch.next()
    assert bytes(seen) == WRITTEN
    assert follower.trailer is not None and follower.trailer["exit"] == 6 and follower.trailer["total"] == len(WRITTEN)
    host.start()
    assert host.client.create(box, host.image) == up
    with host.client.watch() as watch:
        event = watch.next()
        assert (event["id"], event["exit"]) == (exe, 6) and base64.b64decode(event["stdout"]) == WRITTEN
        watch.ack((box, exe))
    assert host.client.read(box, exe, offset=5, limit=10) == WRITTEN[5:15]


def test_a_killed_keeper_loses_no_byte(host: LiveHost):
    box, up = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, WRITER)
    pid = up["keeper_pid"]
    for _ in range(3):
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        insist(lambda: host.client.call("state", box=box, id=exe))
        pid = host.client.create(box, host.image)["keeper_pid"]
    assert pid != up["keeper_pid"]
    state = host.client.wait(box, exe)
    assert state["exit"] == 6 and outputs(state)[0] == WRITTEN


def test_a_killed_zygote_is_replaced_and_serves_the_keepers_it_did_not_bear(host: LiveHost):
    box, up = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, WRITER)
    os.kill(zygote(host), signal.SIGKILL)
    other, _ = create(host)
    time.sleep(0.3)
    os.kill(up["keeper_pid"], signal.SIGKILL)
    insist(lambda: host.client.call("state", box=box, id=exe))
    state = host.client.wait(box, exe)
    assert state["exit"] == 6 and outputs(state)[0] == WRITTEN
    assert host.report()[other]["state"] == "up"


def zygote(host: LiveHost) -> int:
    from hostd import config, keeper_spec

    with keeper_spec.start_zygote(config.load(str(host.config))) as conn:
        return keeper_spec.zygote_pid(conn)


def test_everything_killed_at_once_but_the_box(host: LiveHost):
    box, up = create(host)
    done, running = new_id("exe"), new_id("exe")
    host.client.spawn(box, done, "echo kept; exit 4")
    host.client.wait(box, done)
    host.client.spawn(box, running, "sleep 60")
    victims = [zygote(host), host.pid, up["keeper_pid"]]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, victims)))
    host.start()
    born = zygote(host)
    host.kill()
    host.start()
    assert zygote(host) == born, "one of our own release is kept"
    state = insist(lambda: host.client.call("state", box=box, id=done))
    assert state["exit"] == 4 and outputs(state)[0] == b"kept\n"
    lost = host.client.wait(box, running)
    assert lost["exit"] == -1 and lost["reason"]["kind"] == "lost"
    with host.client.watch() as watch:
        assert {watch.next()["id"], watch.next()["id"]} == {done, running}
    after = new_id("exe")
    host.client.spawn(box, after, "exit 5")
    assert host.client.wait(box, after)["exit"] == 5


def test_a_shipped_bundle_takes_over_while_a_command_runs(host: LiveHost):
    box, _ = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, WRITER)
    data = bundle.build().data + b"\0"  # a zip may be followed by anything: another digest, the same code
    digest = hashlib.sha256(data).hexdigest()
    host.client.call("ship", data, digest=digest)
    pid, old_zygote = host.pid, zygote(host)
    with host.client.follow(box, exe) as follower:
        host.client.call("restart", digest=digest)
        until(lambda: insist(lambda: host.client.call("hello"))["digest"] == digest)
        assert zygote(host) != old_zygote, "keepers of new boxes are to be of the new release"
        os.kill(host.client.create(box, host.image)["keeper_pid"], signal.SIGKILL)
        with pytest.raises(ProtocolError):
            b"".join(follower)
    with host.client.follow(box, exe) as follower:  # from a successor, born of a zygote that never knew the command
        assert b"".join(follower) == WRITTEN and follower.trailer is not None and follower.trailer["exit"] == 6
    assert host.client.call("hello")["digest"] == digest and host.pid == pid
    with host.client.watch() as watch:
        assert watch.next()["id"] == exe
    other, _ = create(host)
    assert host.report()[other]["state"] == "up"


def test_init_killed(host: LiveHost):
    box, up = create(host)
    exe = new_id("exe")
    host.client.spawn(box, exe, "echo said; sleep 60")
    until(lambda: host.client.call("state", box=box, id=exe)["sizes"][0])
    with host.client.watch() as watch:
        os.kill(up["init_pid"], signal.SIGKILL)
        events = {event.get("id", "box"): event for event in (watch.next(), watch.next())}
        assert events["box"]["event"] == "box_exit" and events["box"]["exit"] == 137 and not events["box"]["oom"]
        assert events[exe]["exit"] == 137 and base64.b64decode(events[exe]["stdout"]) == b"said\n"
        watch.ack((box, exe), (box, "box"))
    assert host.report()[box]["state"] == "down"
    assert host.client.create(box, host.image)["init_pid"] != up["init_pid"]
    assert host.report()[box]["state"] == "up"
    after = new_id("exe")
    host.client.spawn(box, after, "exit 5")
    assert host.client.wait(box, after)["exit"] == 5


def test_warm_boxes(host: LiveHost):
    host.client.call("set_warm", count=2, image=host.image)
    try:
        until(lambda: host.client.call("hello")["warm"] == 2)
        host.kill()
        host.start()
        assert host.client.call("hello")["warm"] == 2
        box, exe = new_id("dbx"), new_id("exe")
        began = time.perf_counter()
        claimed = host.client.call("prepare_disk", box=box, fence=1, image=host.image, disk_bytes=1 << 30)
        host.client.call("boot", box=box, fence=1, hostname="dbx-mine", **LIMITS)
        up = time.perf_counter()
        host.client.spawn(box, exe, argv=["/bin/hostname"], hold_ms=2000)
        print(f"warm: up after {(up - began) * 1000:.1f} ms, first command {(time.perf_counter() - up) * 1000:.1f} ms")
        done = host.client.wait(box, exe)
        assert claimed["warm"] and outputs(done) == (b"dbx-mine\n", b"") and done["exit"] == 0
        host.client.destroy(box, 1)
    finally:
        host.client.call("set_warm", count=0, image=host.image)
        until(lambda: host.client.call("hello")["warm"] == 0)


def test_many_at_once(host: LiveHost):
    def one(number: int) -> None:
        box, exe = new_id("dbx"), new_id("exe")
        host.client.create(box, host.image)
        host.client.spawn(box, exe, f"echo {number}; exit {number}")
        state = host.client.wait(box, exe)
        assert state["exit"] == number and outputs(state)[0] == b"%d\n" % number
        host.client.destroy(box, 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(24)))
    assert not host.report()


@pytest.mark.parametrize("victim", ["hostd", "makers"])
def test_kills_at_any_moment_of_making_and_destroying(host: LiveHost, victim: str):
    """Whoever insists gets what it asked for, once; whoever gives up can destroy; nothing is left."""
    stop = threading.Event()
    failures: list[object] = []
    finished: list[int] = []

    def life(number: int) -> None:
        while not stop.is_set():
            box, exe = new_id("dbx"), new_id("exe")
            try:
                insist(partial(host.client.create, box, host.image), 60)
                insist(partial(host.client.spawn, box, exe, "echo x >> ~/f; cat ~/f"), 60)
                state = insist(partial(host.client.wait, box, exe), 60)
                if outputs(state)[0] != b"x\n":
                    failures.append(state)
                insist(partial(host.client.destroy, box, 2), 60)
                finished.append(number)
            except BaseException as error:
                failures.append((box, error))
                return

    threads = [threading.Thread(target=life, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    rounds = 8
    for _ in range(rounds):
        time.sleep(random.uniform(0.05, 0.4))
        if victim == "hostd":
            host.kill()
            host.start()
        else:
            for pid in children(host.pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
    stop.set()
    for thread in threads:
        thread.join(90)
    assert not failures, (failures, host.log()[-3000:])
    assert len(finished) >= rounds


def children(pid: int) -> list[int]:
    """Makers, not what hostd inherited from them."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        pids = [int(word) for word in file.read().split()]
    found = []
    for child in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(child)
    return found


def test_commands_survive_kills_of_everything_around_them(host: LiveHost):
    """hostd, keepers and zygotes, killed in turn under running commands: not a byte and no exit is lost."""
    writers: dict[str, str] = {}
    for _ in range(3):
        box, _up = create(host)
        writers[box] = new_id("exe")
        host.client.spawn(box, writers[box], WRITER)
    for victim in ("keeper", "hostd", "zygote", "keeper", "zygote", "hostd", "keeper"):
        time.sleep(random.uniform(0.1, 0.3))
        if victim == "hostd":
            host.kill()
            host.start()
        elif victim == "zygote":
            os.kill(zygote(host), signal.SIGKILL)
            time.sleep(0.3)  # until the keepers have met the new one: two deaths at once are another test's
        else:
            for box in writers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(insist(partial(host.client.create, box, host.image))["keeper_pid"], signal.SIGKILL)
    for box, exe in writers.items():
        state = insist(partial(host.client.wait, box, exe), 20)
        assert (state["exit"], state["reason"]) == (6, None)
        assert outputs(state)[0] == WRITTEN
    with host.client.watch() as watch:
        events = {event["id"]: event for event in (watch.next() for _ in writers)}
    assert set(events) == set(writers.values()) and {event["exit"] for event in events.values()} == {6}
