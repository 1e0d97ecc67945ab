"""Copies of disks on a real host: taken from a running box, sent, received, cloned; killed half-way; refused by S3."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd.messages import Refused
from tests.hostd.client import LIMITS, new_id, outputs
from tests.hostd.live_host import LiveHost, why_not
from tests.hostd.part_store import PartStore

pytestmark = [pytest.mark.live, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

PART = 5 << 20
ROOT = {"name": "root", "uid": 0, "gid": 0, "home": "/root"}

FILL = r"""
set -e
mkdir -p /data/dir && cd /data
head -c 12000000 /dev/urandom > random
printf text > plain; chmod 4751 plain; chown 1234:60000 plain
ln plain dir/hard; ln -s ../plain dir/soft; ln -s /nowhere dangling; mkfifo -m 640 fifo
truncate -s 1G sparse; printf end >> sparse; printf mid | dd of=sparse bs=1 seek=500000000 conv=notrunc status=none
mkdir -m 1777 sticky; touch -d '2001-02-03 04:05:06.789' old
python3 -c 'import os; os.setxattr("plain", "user.note", b"\x00\xff"); os.mkdir("\u00e9 \n")'
rm -rf /usr/share/perl* /etc/motd; echo changed >> /etc/issue
"""
HASH = r"""
import hashlib, os, stat
h = hashlib.sha256(); inodes = {}
top = os.lstat("/").st_dev
for folder, dirs, files in os.walk(b"/"):
    dirs[:] = sorted(d for d in dirs if os.lstat(os.path.join(folder, d)).st_dev == top
                     and os.path.join(folder, d) not in (b"/proc", b"/sys", b"/dev", b"/run"))
    for name in sorted(dirs + files):
        path = os.path.join(folder, name); s = os.lstat(path)
        if s.st_dev != top: continue
        xattrs = [(x, os.getxattr(path, x, follow_symlinks=False)) for x in os.listxattr(path, follow_symlinks=False)]
        link = inodes.setdefault(s.st_ino, path)
        h.update(repr((path, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_mtime_ns, xattrs, link)).encode())
        if stat.S_ISREG(s.st_mode):
            h.update(repr((s.st_size, s.st_blocks if name == b"sparse" else 0)).encode())
            with open(path, "rb") as f:
                while data := f.read(1 << 20): h.update(data)
        elif stat.S_ISLNK(s.st_mode): h.update(os.readlink(path))
print(h.hexdigest())
"""


@pytest.fixture(scope="module")
def host() -> Iterator[LiveHost]:
    made = LiveHost()
    try:
        made.set_up()
        made.start()
        yield made
    finally:
        print(made.log()[-6000:] if (made.root / "log").exists() else "")
        made.remove()


@pytest.fixture
def store() -> Iterator[PartStore]:
    made = PartStore()
    yield made
    made.close()


def create(host: LiveHost) -> str:
    box = new_id("dbx")
    host.client.create(box, host.image)
    return box


def run(host: LiveHost, box: str, command: str | None = None, *, argv: list[str] | None = None) -> str:
    id = new_id("exe")
    host.client.spawn(box, id, command, argv=argv, user=ROOT, cwd="/", login=False)
    state = host.client.wait(box, id, 60)
    out, err = outputs(state)
    assert state["exit"] == 0, (out[-500:], err[-500:])
    return out.decode()


def tree(host: LiveHost, box: str) -> str:
    return run(host, box, argv=["/usr/bin/python3", "-I", "-c", HASH]).strip()


def take(host: LiveHost, box: str, snapshot: str, fence: int = 1) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        told = host.client.call("snapshot", box=box, snapshot=snapshot, fence=fence)
        if told["state"] == "taken":
            return told
        assert time.monotonic() < deadline


def send_some(
    host: LiveHost, store: PartStore, snapshot: str, numbers: list[int], upload: str = "u1", fence: int = 1
) -> dict[str, Any]:
    body = json.dumps({"urls": {str(number): store.put_url(number) for number in numbers}}).encode()
    return host.client.call("send_snapshot", body, snapshot=snapshot, fence=fence, upload=upload, part_bytes=PART)


def send(host: LiveHost, store: PartStore, snapshot: str, upload: str = "u1") -> dict[str, Any]:
    """As a worker does it: two URLs at a time, more when they are wanted."""
    numbers = [1, 2]
    deadline = time.monotonic() + 90
    while True:
        told = send_some(host, store, snapshot, numbers, upload)
        if told["state"] == "sealed":
            return told
        assert time.monotonic() < deadline, told
        numbers = [told["want"], told["want"] + 1] if told["want"] else []


def receive(host: LiveHost, store: PartStore, snapshot: str, sealed: dict[str, Any], fence: int = 5) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        told = host.client.call(
            "receive_snapshot",
            json.dumps({"url": store.get_url}).encode(),
            snapshot=snapshot, fence=fence, image=host.image, size=sealed["size"], sha256=sealed["sha256"],
            part_bytes=PART, size_bytes=20 << 20,
        )  # fmt: skip
        if told["state"] == "here":
            return told
        assert time.monotonic() < deadline


def boot_from(host: LiveHost, snapshot: str) -> str:
    box = new_id("dbx")
    asked: dict[str, Any] = {"box": box, "fence": 1, "image": host.image, "disk_bytes": 256 << 20}
    assert host.client.call("prepare_disk", snapshot=snapshot, **asked)["warm"] is False
    limits = {**LIMITS, "disk_bytes": 256 << 20}
    host.client.call("boot", box=box, fence=1, hostname="copy", **limits)
    return box


def kept(host: LiveHost) -> dict[str, dict[str, Any]]:
    return {entry["snapshot"]: entry for entry in host.client.call("report")["snapshots"]}


def test_a_disk_taken_sent_deleted_received_and_cloned_is_the_same(host: LiveHost, store: PartStore) -> None:
    box, snapshot = create(host), new_id("snp")
    run(host, box, FILL)
    before = tree(host, box)
    taken = take(host, box, snapshot)
    assert take(host, box, snapshot, fence=2) == taken  # told again, not taken again
    assert taken["frozen"] and taken["freeze_ms"] > 0
    assert taken["image"] == host.image and 12_000_000 <= taken["size_bytes"] < 60 << 20
    run(host, box, "rm -rf /data; echo later > /later")
    assert kept(host)[snapshot]["size_bytes"] == taken["size_bytes"]

    local = boot_from(host, snapshot)
    assert tree(host, local) == before
    with pytest.raises(Refused) as late:
        send_some(host, store, snapshot, [1], fence=1)  # a worker that lost its lease
    assert late.value.code == "stale_fence"
    numbers, told = [1, 2], dict[str, Any]()
    while told.get("state") != "sealed":
        told = send_some(host, store, snapshot, numbers, fence=2)
        numbers = [told["want"]] if told["want"] else []
    whole = store.join()
    assert told["size"] == len(whole) and [part[0] for part in told["parts"][:-1]] == [PART] * (len(told["parts"]) - 1)
    digests = [hashlib.sha256(whole[at : at + PART]).digest() for at in range(0, len(whole), PART)]
    assert told["sha256"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert send_some(host, store, snapshot, [], fence=2) == told  # known, and not sent again
    assert len(store.puts) == len(digests)

    for _ in range(2):
        host.client.call("delete_snapshot", snapshot=snapshot, fence=4)
    assert snapshot not in kept(host)
    assert tree(host, local) == before  # what was cloned from it does not care
    with pytest.raises(Refused) as gone:
        boot_from(host, snapshot)
    assert gone.value.code == "unknown_id"

    receive(host, store, snapshot, told)
    receive(host, store, snapshot, told, fence=6)
    assert tree(host, boot_from(host, snapshot)) == before
    for made in host.report():
        host.client.destroy(made)
    host.client.call("delete_snapshot", snapshot=snapshot, fence=7)


def test_a_copy_has_a_limit_of_its_own(host: LiveHost) -> None:
    box, snapshot = create(host), new_id("snp")
    run(host, box, "head -c 30000000 /dev/urandom > /big")
    take(host, box, snapshot)
    copy = boot_from(host, snapshot)
    said = run(host, copy, "head -c 400000000 /dev/urandom > /more 2>&1 || echo full; stat -c %s /more")
    assert "full" in said and int(said.split()[-1]) <= 257 << 20
    for made in (box, copy):
        host.client.destroy(made)
    host.client.call("delete_snapshot", snapshot=snapshot, fence=2)


def test_a_kill_of_hostd_in_the_middle_costs_no_part_twice(host: LiveHost, store: PartStore) -> None:
    box, snapshot = create(host), new_id("snp")
    run(host, box, "head -c 40000000 /dev/urandom > /big")
    take(host, box, snapshot)
    host.client.destroy(box)  # the copy does not need its box
    told = send_some(host, store, snapshot, [1, 2, 3])
    deadline = time.monotonic() + 30
    while told["want"] != 4 or len(store.puts) < 3:
        told = send_some(host, store, snapshot, [1, 2, 3])
        assert time.monotonic() < deadline
    host.kill()
    host.start()
    assert snapshot in kept(host)
    sealed = send(host, store, snapshot)
    assert sorted(store.puts) == list(range(1, len(sealed["parts"]) + 1))
    assert store.join() and sealed["size"] == len(store.whole)
    host.client.call("delete_snapshot", snapshot=snapshot, fence=2)
    # Killed while it receives: nothing half made is ever told to be here.
    store.slow_seconds = 1.5
    body = json.dumps({"url": store.get_url}).encode()
    about: dict[str, Any] = {
        "image": host.image,
        "size": sealed["size"],
        "sha256": sealed["sha256"],
        "size_bytes": 40_000_000,
    }
    told = host.client.call("receive_snapshot", body, snapshot=snapshot, fence=3, part_bytes=PART, **about)
    assert told["state"] == "receiving"
    host.kill()
    host.start()
    assert snapshot not in kept(host)
    store.slow_seconds = 0
    receive(host, store, snapshot, sealed)
    assert snapshot in kept(host)
    host.client.call("delete_snapshot", snapshot=snapshot, fence=6)


def test_what_s3_says_no_to_is_told_as_what_it_is(host: LiveHost, store: PartStore) -> None:
    box, snapshot = create(host), new_id("snp")
    run(host, box, "head -c 12000000 /dev/urandom > /big")
    take(host, box, snapshot)
    host.client.destroy(box)
    for status, code, kind in ((404, "NoSuchBucket", "missing"), (403, "AccessDenied", "denied"), (507, "x", "full")):
        store.answers = [(status, code)] * 3
        with pytest.raises(Refused) as refused:
            send(host, store, snapshot)
        assert (refused.value.code, refused.value.extra["kind"]) == ("storage", kind)
        store.answers.clear()
    store.answers = [(500, "InternalError"), (503, "SlowDown")]  # tried again
    sealed = send(host, store, snapshot)

    store.join()
    right, store.whole = store.whole, store.whole[:-9] + b"corrupted"
    host.client.call("delete_snapshot", snapshot=snapshot, fence=2)
    for whole in (store.whole, right[: len(right) // 2], b"\0" * len(right)):
        store.whole = whole
        with pytest.raises(Refused) as corrupt:
            receive(host, store, snapshot, sealed)
        assert (corrupt.value.code, corrupt.value.extra["kind"]) == ("storage", "corrupt")
        assert snapshot not in kept(host)
    store.whole = right
    receive(host, store, snapshot, sealed)
    host.client.call("delete_snapshot", snapshot=snapshot, fence=6)


def test_urls_that_have_expired_are_asked_for_again(host: LiveHost, store: PartStore) -> None:
    box, snapshot = create(host), new_id("snp")
    run(host, box, "head -c 12000000 /dev/urandom > /big")
    take(host, box, snapshot)
    host.client.destroy(box)
    stale = {number: store.put_url(number) for number in (1, 2, 3)}
    store.stamp = "2"
    body = json.dumps({"urls": stale}).encode()
    told = host.client.call("send_snapshot", body, snapshot=snapshot, fence=1, upload="u1", part_bytes=PART)
    deadline = time.monotonic() + 20
    while told["want"] is None:
        told = send_some(host, store, snapshot, [])
        assert time.monotonic() < deadline
    assert send(host, store, snapshot)["state"] == "sealed"
    # Given up: who sends finds no work any more.
    host.client.call("delete_snapshot", snapshot=snapshot, fence=2)
    with pytest.raises(Refused) as gone:
        send_some(host, store, snapshot, [1], fence=3)
    assert gone.value.code == "unknown_id"
