"""Snapshots on real boxes and a real S3: copies on this host and another, kills in the middle, an S3 that refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from config.state import CHECKOUT
from tests.hostd.test_snapshots import FILL, HASH
from tests.live.conftest import Berth, Key, environment
from tests.live.crashes import TAKEN_OVER_WITHIN, hostd_pid, wait_until
from tests.live.test_two_hosts import SIZE, Second, host_of, second

__all__ = ["second"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]

SNAPSHOTS = "/v1/devboxes/disk_snapshots"
LARGE = "head -c 100000000 /dev/urandom > /home/user/large && sha256sum < /home/user/large"


def tree(owner: Key, box: str) -> str:
    """A digest of all of the box's disk: names, contents, modes, owners, times, xattrs, hard links, holes. Left out are
    the host keys, which every copy has its own of."""
    script = HASH.replace("xattrs = [", "if path.startswith(b'/etc/ssh'): continue\n        xattrs = [")
    out, err, code = owner.run(box, f"sudo python3 -I - <<'END'\n{script}\nEND", timeout=120)
    assert code == 0, err
    return out.strip()


def begun(owner: Key, box: str, **body: Any) -> str:
    return str(owner.post(f"/v1/devboxes/{box}/snapshot_disk_async", body)["id"])


def status(owner: Key, snapshot: str) -> dict[str, Any]:
    return dict(owner.get(f"{SNAPSHOTS}/{snapshot}/status"))


def over(owner: Key, snapshot: str, within: float = 60.0) -> dict[str, Any]:
    deadline = time.monotonic() + within
    while (told := status(owner, snapshot))["status"] == "in_progress":
        assert time.monotonic() < deadline, told
        time.sleep(0.05)
    return told


def made_of(owner: Key, snapshot: str) -> str:
    """A running devbox that is made of it, received first where need be."""
    asked = str(owner.post("/v1/devboxes", {"snapshot_id": snapshot})["id"])
    view = owner.wait(asked, "running", "failure", within=90)
    assert view["status"] == "running", view
    return asked


@pytest.fixture
def small_box(berth: Berth) -> Iterator[str]:
    made = berth.owner.create(launch_parameters=SIZE)
    yield made
    berth.owner.post(f"/v1/devboxes/{made}/shutdown?force=true")


def test_copies_are_the_same_here_and_on_another_host(berth: Berth, small_box: str, second: Second) -> None:
    owner = berth.owner
    _, err, code = owner.run(small_box, f"sudo bash -s <<'END'\n{FILL}\nEND", timeout=120)
    assert code == 0, err
    owner.run(small_box, "sudo ssh-keygen -A && cat /etc/ssh/ssh_host_ed25519_key.pub /etc/machine-id > ~/identity")
    before = tree(owner, small_box)
    shot = owner.post(f"/v1/devboxes/{small_box}/snapshot_disk", {"name": "whole"}, timeout=120)
    assert 12_000_000 < shot["size_bytes"] < 100 << 20
    assert shot["freeze_ms"] > 0
    second.enrol()
    for place in ("local", "second"):
        berth.rows("UPDATE hosts_host SET cordoned = name <> %s WHERE state = 'ready' RETURNING id", place)
        asked = [str(owner.post("/v1/devboxes", {"snapshot_id": shot["id"]})["id"]) for _ in range(2)]
        copies = [str(owner.wait(copy, "running", "failure", within=90)["id"]) for copy in asked]
        for copy in copies:
            view = owner.get(f"/v1/devboxes/{copy}")
            assert (view["status"], view["snapshot_id"]) == ("running", shot["id"]), view
            assert host_of(berth, copy) == place
            # Host keys and machine id are its own: with them put back, every byte is as it was.
            mine, _, _ = owner.run(copy, "cat /etc/ssh/ssh_host_ed25519_key.pub /etc/machine-id | diff - ~/identity")
            assert mine.count("\n< ") + mine.startswith("< ") >= 2, mine
        assert tree(owner, copies[0]) == before
        for copy in copies:
            owner.shutdown(copy)
    # The second is cut off while it sends one of its own: the work there goes on, and nothing is lost.
    theirs = owner.create(launch_parameters=SIZE)
    assert host_of(berth, theirs) == "second"
    digest, _, _ = owner.run(theirs, LARGE)
    sent = begun(owner, theirs)
    wait_until(lambda: berth.rows("SELECT step FROM snapshots_disksnapshot WHERE id = %s", sent)[0][0] != "take",
               30, "it is taken")  # fmt: skip
    second.sshd.stop()
    time.sleep(2)
    second.sshd.start()
    assert over(owner, sent, within=90)["status"] == "complete"
    owner.post(f"/v1/devboxes/{theirs}/shutdown?force=true")
    berth.rows("UPDATE hosts_host SET cordoned = (name = 'second') WHERE state = 'ready' RETURNING id")
    copy = made_of(owner, sent)
    assert host_of(berth, copy) == "local" and owner.run(copy, "sha256sum < /home/user/large")[0] == digest
    owner.shutdown(copy)
    owner.post(f"{SNAPSHOTS}/{sent}/delete")
    berth.rows("UPDATE hosts_host SET cordoned = false WHERE state = 'ready' RETURNING id")
    owner.post(f"{SNAPSHOTS}/{shot['id']}/delete")
    gone = "SELECT completed_at IS NOT NULL FROM snapshots_disksnapshot WHERE id = %s"
    for one in (shot["id"], sent):  # on both hosts, before the second is taken out
        wait_until(lambda one=one: berth.rows(gone, one)[0][0], 60, "its bytes are gone")


@pytest.mark.parametrize("whom", ["worker", "hostd", "s3"])
def test_a_kill_in_the_middle_of_the_way_costs_nothing(berth: Berth, small_box: str, whom: str) -> None:
    owner = berth.owner
    digest, _, _ = owner.run(small_box, LARGE)
    snapshot = begun(owner, small_box)
    row = "SELECT step, sent_bytes FROM snapshots_disksnapshot WHERE id = %s"
    wait_until(lambda: berth.rows(row, snapshot)[0][0] != "take", 30, "it is on its way")
    pid = hostd_pid(berth) if whom == "hostd" else berth.pids()[whom]
    os.kill(pid, signal.SIGKILL)
    told = over(owner, snapshot, within=90 + TAKEN_OVER_WITHIN)
    assert told["status"] == "complete", told
    copy = made_of(owner, snapshot)
    assert owner.run(copy, "sha256sum < /home/user/large")[0] == digest
    owner.shutdown(copy)
    owner.post(f"{SNAPSHOTS}/{snapshot}/delete")


def test_no_devbox_is_made_of_a_damaged_object(berth: Berth, small_box: str) -> None:
    owner = berth.owner
    owner.run(small_box, "head -c 30000000 /dev/urandom > /home/user/large")
    snapshot = begun(owner, small_box)
    row = "SELECT step, object_key FROM snapshots_disksnapshot WHERE id = %s"
    assert over(owner, snapshot)["status"] == "complete"
    key = berth.rows(row, snapshot)[0][1]
    damage = (
        "import sys\nfrom storage import objects\nkey = sys.stdin.read().strip()\n"
        "size = objects.head(key).size\nobjects.put(key, b'\\0' * size)\n"
    )
    run(berth, damage, key)
    drop = (
        "import sys\nfrom hosts.client import client_for\nhost, snapshot, fence = sys.stdin.read().split()\n"
        "client_for(host).delete_snapshot(snapshot=snapshot, fence=int(fence))\n"
    )
    # What is deleted on a host under a fence comes back under a newer one only.
    newer = "UPDATE snapshots_disksnapshot SET fence = fence + 1 WHERE id = %s RETURNING host_id, fence - 1"
    host, fence = berth.rows(newer, snapshot)[0]
    run(berth, drop, f"{host} {snapshot} {fence}")
    copy = str(owner.post("/v1/devboxes", {"snapshot_id": snapshot})["id"])
    view = owner.wait(copy, "failure", "running", within=60)
    assert view["status"] == "failure" and "S3 does not give its snapshot" in view["why"], view
    owner.post(f"{SNAPSHOTS}/{snapshot}/delete")


def run(berth: Berth, script: str, given: str) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "shell", "--no-imports", "-c", script],
        cwd=CHECKOUT, env=environment(berth.state), input=given, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_shutdown_while_a_snapshot_is_in_progress(berth: Berth) -> None:
    owner = berth.owner
    box = owner.create(launch_parameters=SIZE)
    owner.run(box, LARGE)
    snapshot = begun(owner, box)
    answer: httpx.Response = owner.client.post(f"/v1/devboxes/{box}/shutdown")
    assert answer.status_code == 409 or status(owner, snapshot)["status"] == "complete"
    owner.post(f"/v1/devboxes/{box}/shutdown?force=true")
    told = over(owner, snapshot, within=90)
    assert told["status"] == "complete", told
    copy = made_of(owner, snapshot)
    assert owner.run(copy, "stat -c %s /home/user/large")[0] == "100000000\n"
    owner.shutdown(copy)
    owner.post(f"{SNAPSHOTS}/{snapshot}/delete")
