"""What a host tells of its boxes: whose a kill for want of memory is, and how much is told."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest

from hostd import cgroups, disks, notices
from hostd.boxes import Slot
from hostd.config import HostConfig, from_dict
from hostd.events import Events
from hostd.messages import parse_event
from hostd.notices import Notices

MINE, OTHER = "dbx_" + "0" * 26, "dbx_" + "1" * 26


@pytest.fixture
def cfg(tmp_path: Any) -> HostConfig:
    given = {
        "cluster": "c",
        "host": "hst_x",
        "install": 3,
        "root": str(tmp_path),
        "dns": ["10.0.0.1"],
        "pool_bytes": 1 << 30,
    }
    return from_dict(given)


class Told(Events):
    """Keeps what would be sent."""

    def __init__(self) -> None:
        super().__init__(lambda box, ids: None)

    @property
    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for lines in self._lines.values() for line in lines.values()]


@pytest.fixture
def events() -> Told:
    return Told()


@pytest.fixture
def told(cfg: HostConfig, events: Told) -> Notices:
    named = {MINE: Slot("s7-abcdef", 7, "img", 0), OTHER: Slot("s70-abcdef", 70, "img", 0)}
    limits = {"cpu_millis": 1000, "memory_bytes": 512 << 20, "pids": 100, "disk_bytes": 1 << 30}
    return Notices(cfg, events, named, lambda slot: limits, "boot")


def kill(
    cfg: HostConfig, slot: str = "s7-abcdef", n: int = 7, name: str = "python3", pid: int = 42, seq: int = 10
) -> list[bytes]:
    path, uid = f"/{cfg.box_cgroup(slot)}", cfg.uid_base(n) + 1000
    at = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6) - 2_000_000
    return [
        f"6,{seq},{at},-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
        f"oom_memcg={path},task_memcg={path},task={name},pid={pid},uid={uid}\n".encode(),
        f"3,{seq + 1},{at},-;Memory cgroup out of memory: Killed process {pid} ({name}) total-vm:217524kB, "
        f"anon-rss:63616kB, file-rss:5232kB, shmem-rss:0kB, UID:{uid} pgtables:184kB oom_score_adj:0\n".encode(),
    ]


def hear(told: Notices, records: list[bytes]) -> None:
    for record in records:
        told.hear(record)


def test_a_kill_is_told_with_its_figures_to_its_own_box(cfg: HostConfig, told: Notices, events: Told) -> None:
    hear(told, kill(cfg))
    event: dict[str, Any] = events.all[0]
    assert dict(parse_event(json.dumps(event).encode())) == event
    assert (event["box"], event["source"], event["level"]) == (MINE, "kmsg", "error")
    assert event["message"] == (
        "Out of memory: killed process python3 (virtual 212 MiB, anonymous 62 MiB, files 5 MiB, shared 0 MiB)"
    )
    assert abs(event["at_ms"] / 1000 - (time.time() - 2)) < 1
    hear(told, kill(cfg))
    assert len(events.all) == 1, "read again after a restart it is the same"
    hear(told, kill(cfg, "s70-abcdef", 70))
    assert {event["box"] for event in events.all} == {MINE, OTHER}


def test_of_many_kills_the_uid_alone_tells_whose_they_are(cfg: HostConfig, told: Notices, events: Told) -> None:
    hear(told, kill(cfg)[1:])
    assert [event["box"] for event in events.all] == [MINE]


def test_what_is_not_a_boxs_or_not_the_kernels_is_told_to_nobody(cfg: HostConfig, told: Notices, events: Told) -> None:
    first, second = kill(cfg)
    lines = [
        kill(cfg, "s8-abcdef", 8),  # no box here
        [
            line.replace(b"/berth_3/", b"/berth_4/").replace(b"uid=", b"uid=9").replace(b"UID:", b"UID:9")
            for line in (first, second)
        ],
        [b"1" + first, b"1" + second],  # written by a program: facility 1 and more
        [b"6,1,1,-;usb 1-1: new device\n", b"nonsense", b"", b"\xff\xfe", b"6,1,1,-;" + b"x" * 9000],
        [first.replace(b"CONSTRAINT_MEMCG", b"CONSTRAINT_NONE"), second.replace(b"Memory cgroup out", b"Out")],
    ]
    for records in lines:
        hear(told, records)
    assert events.all == []


def test_a_process_that_calls_itself_like_the_kernel_speaks_deceives_nobody(
    cfg: HostConfig, told: Notices, events: Told
) -> None:
    for name in (",pid=1,uid=0", "x) total-vm:1kB", ",task=a,pid=2", "\\x0a6,1,1,-;"):
        hear(told, kill(cfg, name=name, pid=1000 + len(name)))
    assert {event["box"] for event in events.all} <= {MINE}
    assert all("virtual 212 MiB" in event["message"] for event in events.all)


def test_what_is_told_is_bounded(cfg: HostConfig, told: Notices, events: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        hear(told, kill(cfg, seq=10 * number, pid=number + 1))
    assert len(events.all) == notices.RATE
    monkeypatch.setattr(notices, "RATE_SECONDS", 0.0)
    time.sleep(0.01)
    hear(told, kill(cfg, seq=9999))
    assert events.all[-1]["message"].endswith(f"({200 - notices.RATE} more before it were left out)")
    for number in range(50):
        told.tell(MINE, "stats", "info", "sample", at_ms=number, key=str(number))
    assert sum(event["source"] == "stats" for event in events.all) == notices.KEPT_STATS


def test_a_sample_says_what_is_used_and_what_is_nearly_full(
    told: Notices, events: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = [cgroups.Usage(1.0, 100 << 20, 3), cgroups.Usage(1.5, 510 << 20, 4)]
    monkeypatch.setattr(told._hierarchies, "usage", lambda path: usage.pop(0))
    monkeypatch.setattr(disks, "disk_usage", lambda cfg, slot: (64 << 20, None))
    slot = dataclasses.replace(told._named[MINE])
    told.sample(MINE, slot)
    time.sleep(0.5)
    told.sample(MINE, slot)
    first, second = events.all
    assert first["message"] == "memory 100 of 512 MiB, disk 64 of 1024 MiB, processes 3 of 100"
    assert second["level"] == "warning" and second["message"].endswith("; its memory is nearly full")
    assert 0.4 < float(second["message"].split()[1]) <= 1.0
