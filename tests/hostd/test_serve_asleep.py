"""Suspended boxes on the real thing: only the disk stays, under the devbox's name, and a box comes up on it again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from hostd import asleep, btrfs, config, disks
from hostd.messages import Refused
from tests.hostd.client import LIMITS, new_id, outputs
from tests.hostd.live_host import LiveHost, why_not
from tests.hostd.test_serve_live import insist, until

pytestmark = [pytest.mark.live, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

DISK = LIMITS["disk_bytes"]


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
    yield whole_host
    for box in whole_host.report():
        whole_host.client.destroy(box)
    until(lambda: not whole_host.traces(), 5, whole_host.traces)
    assert not asleep.listed(config.load(str(whole_host.config)))


def run(host: LiveHost, box: str, command: str) -> bytes:
    exe = new_id("exe")
    host.client.spawn(box, exe, command)
    state = host.client.wait(box, exe)
    assert state["exit"] == 0, state
    return outputs(state)[0]


def suspend(host: LiveHost, box: str, fence: int) -> None:
    until(lambda: insist(lambda: host.client.call("suspend", box=box, fence=fence), 60)["done"], 60)


def resume(host: LiveHost, box: str, fence: int, **more: Any) -> dict[str, Any]:
    """Its slot back, and up on it."""
    asked = {"box": box, "fence": fence, "image": host.image, "disk_bytes": DISK, **more}
    insist(lambda: host.client.call("resume", **asked), 60)
    up: dict[str, Any] = insist(lambda: host.client.call("boot", box=box, fence=fence, hostname="devbox", **LIMITS), 60)
    up.pop("monotonic")
    return up


def test_only_the_disk_stays_and_comes_back(host: LiveHost) -> None:
    cfg = config.load(str(host.config))
    box = new_id("dbx")
    up = host.client.create(box, host.image)
    machine = run(host, box, "cat /etc/machine-id").decode().strip()
    assert machine == up["machine_id"]
    run(host, box, "head -c 5000000 /dev/urandom > ~/data; ln ~/data ~/linked; sleep 100 > /dev/null 2>&1 &")
    digest = run(host, box, "sha256sum < ~/data")
    held = disks.disk_usage(cfg, up["slot"])[0]
    for fence in (2, 2, 3):
        suspend(host, box, fence)
    entry = host.report()[box]
    assert (entry["state"], entry["fence"], entry["executions"]) == ("asleep", 3, [])
    assert not host.traces(), "processes, cgroups, network, slot, outputs: all is given back"
    assert {name: (one.slot, one.image) for name, one in asleep.listed(cfg).items()} == {box: (up["slot"], host.image)}
    # An hour's tidying takes nothing from it.
    disks.drop_kept(cfg, 0)
    disks.drop_idle_groups(cfg)
    with pytest.raises(Refused) as refused:
        host.client.call("boot", box=box, fence=1, hostname="devbox", **LIMITS)
    assert refused.value.code == "stale_fence"
    with pytest.raises(Refused) as refused:
        host.client.call("boot", box=box, fence=4, hostname="devbox", **LIMITS)
    assert refused.value.code == "unknown_box"

    # The number it had is taken by then.
    others = [new_id("dbx") for _ in range(2)]
    for other in others:
        host.client.create(other, host.image)
    again = resume(host, box, 5, machine_id=machine)
    assert again == resume(host, box, 5, machine_id=machine)
    assert again["slot"] != up["slot"] and again["machine_id"] == machine
    assert asleep.listed(cfg) == {} and host.report()[box]["state"] == "up"
    assert run(host, box, "cat /etc/machine-id").decode().strip() == machine
    assert run(host, box, "sha256sum < ~/data") == digest
    assert run(host, box, "stat -c %h ~/data; pgrep -x sleep || echo fresh") == b"2\nfresh\n"
    # What it had written counts on, and so does its limit.
    now, limit = disks.disk_usage(cfg, again["slot"])
    assert limit == DISK and now >= held * 9 // 10
    assert btrfs.quota_kind(cfg.pool) != "simple" or disks.group_of(again["slot"]) in btrfs.quota_groups(cfg.pool, 1)
    suspend(host, box, 6)
    host.client.destroy(box, 7)
    host.client.destroy(box, 7)
    assert box not in host.report() and asleep.listed(cfg) == {}
    with pytest.raises(Refused) as refused:
        host.client.call("resume", box=box, fence=7, image=host.image, disk_bytes=DISK)
    assert refused.value.code == "stale_fence"
    for _ in range(2):
        deadline = time.monotonic() + 60
        while disks.group_of(again["slot"]) in btrfs.quota_groups(cfg.pool, 1):
            assert time.monotonic() < deadline, "the quota group of a deleted disk stays"
            btrfs.sync(cfg.pool)
            disks.drop_idle_groups(cfg)
            time.sleep(0.2)


def test_what_goes_on_in_a_box_is_told(host: LiveHost) -> None:
    box = new_id("dbx")
    host.client.create(box, host.image)

    def told() -> dict[str, Any]:
        return host.client.call("activity", box=box)

    host.client.spawn(box, new_id("set"), "sleep 100")  # launch work does not count
    before = told()
    assert (before["running"], before["attached"], before["served"]) == (0, 0, 0)
    exe = new_id("exe")
    host.client.spawn(box, exe, "sleep 1")
    busy = told()
    assert (busy["running"], busy["idle_seconds"]) == (1, 0)
    host.client.wait(box, exe)
    time.sleep(0.5)
    quiet = told()
    assert quiet["running"] == 0 and 0.4 < quiet["idle_seconds"] <= quiet["monotonic"] - busy["monotonic"]
    assert abs(quiet["monotonic"] - time.monotonic()) < 5


def test_a_limit_holds_after_a_resume(host: LiveHost) -> None:
    box = new_id("dbx")
    host.client.create(box, host.image)
    run(host, box, "head -c 30000000 /dev/urandom > ~/data")
    suspend(host, box, 2)
    asked: dict[str, Any] = {"box": box, "fence": 3, "image": host.image, "disk_bytes": 64 << 20}
    host.client.call("resume", **asked)
    host.client.call("boot", box=box, fence=3, hostname="devbox", **{**LIMITS, "disk_bytes": 64 << 20})
    exe = new_id("exe")
    host.client.spawn(box, exe, "head -c 60000000 /dev/urandom > ~/more && sync ~/more")
    state = host.client.wait(box, exe)
    assert state["exit"] != 0 and b"quota" in outputs(state)[1]


def test_one_that_sleeps_is_copied_and_wakes_from_the_copy_elsewhere(host: LiveHost) -> None:
    box, copy = new_id("dbx"), new_id("snp")
    up = host.client.create(box, host.image)
    run(host, box, "head -c 3000000 /dev/urandom > ~/data")
    digest = run(host, box, "sha256sum < ~/data")
    suspend(host, box, 2)
    taken: dict[str, Any] = {}
    for _ in range(2):
        until(
            lambda: (
                taken.update(host.client.call("snapshot", box=box, snapshot=copy, fence=1)) or taken["state"] == "taken"
            ),
            30,
        )
    assert (taken["image"], taken["freeze_ms"]) == (host.image, 0) and 3_000_000 <= taken["size_bytes"] < 9_000_000
    host.client.destroy(box, 3)  # as if it were another host, which has never heard of it
    again = resume(host, box, 4, machine_id=up["machine_id"], snapshot=copy)
    assert again == resume(host, box, 4, machine_id=up["machine_id"], snapshot=copy)
    assert again["machine_id"] == up["machine_id"] and run(host, box, "sha256sum < ~/data") == digest
    # With its disk here the copy is not looked at.
    run(host, box, "echo newer > ~/data")
    suspend(host, box, 5)
    resume(host, box, 6, snapshot=copy)
    assert run(host, box, "cat ~/data") == b"newer\n"
    host.client.call("delete_snapshot", snapshot=copy, fence=2)


def test_a_disk_that_nobody_has_is_not_made_up(host: LiveHost) -> None:
    both: list[tuple[str, dict[str, Any]]] = [("suspend", {}), ("resume", {"image": host.image, "disk_bytes": DISK})]
    for verb, more in both:
        with pytest.raises(Refused) as refused:
            host.client.call(verb, box=new_id("dbx"), fence=1, **more)
        assert refused.value.code == "unknown_box"


def test_a_kept_one_lies_with_the_others(host: LiveHost) -> None:
    box = new_id("dbx")
    up = host.client.create(box, host.image)
    run(host, box, "echo mine > ~/f")
    suspend(host, box, 2)
    host.client.destroy(box, 3, keep_disk=True)
    (kept,) = [path for path in (host.root / "pool" / "boxes-kept").iterdir() if up["slot"] in path.name]
    assert (kept / "home/user/f").read_text() == "mine\n"


@pytest.mark.parametrize("victim", ["hostd", "makers"])
def test_kills_at_any_moment_of_suspending_and_resuming(host: LiveHost, victim: str) -> None:
    """Whoever insists gets what it asked for, with every byte."""
    from tests.hostd.test_serve_live import children

    box = new_id("dbx")
    host.client.create(box, host.image)
    run(host, box, "echo 0 > ~/f")
    stop, failures, fence = threading.Event(), list[object](), 1

    def life() -> None:
        nonlocal fence
        try:
            for turn in range(1, 6):
                suspend(host, box, fence := fence + 1)
                resume(host, box, fence := fence + 1)
                exe = new_id("exe")
                insist(partial(host.client.spawn, box, exe, f"cat ~/f; echo {turn} > ~/f"), 60)
                state = insist(partial(host.client.wait, box, exe), 60)
                if outputs(state)[0].split() != [str(turn - 1).encode()]:
                    failures.append(state)
        except BaseException as error:
            failures.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=life)
    thread.start()
    while not stop.wait(0.15):
        if victim == "hostd":
            host.kill()
            host.start()
            stop.wait(0.3)
        else:
            for pid in children(host.pid):
                try:
                    os.kill(pid, 9)
                except OSError:
                    pass
    thread.join(120)
    assert not failures, (failures, host.log()[-3000:])
