"""Keepers before real boxes: disk, network, filter, cgroups and PID 1 are those of a devbox."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import boxes, keeper_spec, packets
from hostd.boxes import Limits, Made
from tests.hostd.bare_box import ROOT, Box, Host, keeper_start, pss_kb, text
from tests.hostd.trial import LIMITS, Trial, why_not

pytestmark = [pytest.mark.live, pytest.mark.skipif(bool(why_not()), reason=why_not() or "")]

USER = {"name": "user", "uid": 1000, "gid": 1000, "home": "/home/user"}


class RealHost(Host):
    """A zygote in a set-up install."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.config, self.directory = trial, trial.cfg, trial.cfg.run
        self.conn = keeper_spec.start_zygote(trial.cfg)
        self.boxes = []

    def close(self) -> None:
        for box in self.boxes:
            box.close()
        with contextlib.suppress(OSError):
            os.kill(self.zygote_pid(), signal.SIGKILL)
        self.conn.close()


class RealBox(Box):
    """A devbox's box, with a keeper."""

    def __init__(self, host: RealHost, limits: Limits = LIMITS) -> None:
        self.host, self.name, self.trial = host, "dbx_real", host.trial
        self.made: Made = self.trial.make(limits)
        cfg = self.trial.cfg
        self.slot, self.out = self.made.slot, cfg.output(self.made.slot)
        self.spec = keeper_spec.KeeperSpec(
            slot=self.slot,
            box=self.name,
            uid=cfg.keeper_uid(self.made.n),
            uid_base=cfg.uid_base(self.made.n),
            init_pid=self.made.init_pid,
        )
        listener = keeper_spec.listening_socket(cfg.run, self.slot)
        fds = boxes.open_keeper_fds(cfg, self.slot, self.made.n)
        with listener:
            self.pid, self.start = keeper_spec.start_keeper(
                host.conn, self.spec, [*fds, (keeper_spec.LISTEN, listener.fileno())]
            )
        packets.close_all(fd for _, fd in fds)
        self.link = self.connect()
        host.boxes.append(self)

    def spawn(self, name: str, command: str | None = None, **body: Any) -> Any:
        body.setdefault("user", USER)
        return super().spawn(name, command, **body)

    def spawner(self) -> int:
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
            for pid in map(int, file.read().split()):
                with open(f"/proc/{pid}/comm") as comm:
                    if comm.read() == "boxd\n":
                        return pid
        raise AssertionError("no spawner")

    def close(self) -> None:
        self.link.close()
        with contextlib.suppress(OSError, keeper_spec.ZygoteError):
            keeper_spec.forget(self.host.conn, self.slot)
        assert keeper_start(self.pid) is None
        self.trial.destroy(self.made)


@pytest.fixture(scope="module")
def host(trial: Trial) -> Iterator[RealHost]:
    host = RealHost(trial)
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: RealHost) -> RealBox:
    return RealBox(host)


def test_the_user_at_home(box: RealBox) -> None:
    answer = box.run("exe_home", "id -un; pwd; cat /proc/1/comm; hostname; sudo -n id -un; umask; echo $PATH")
    lines = text(answer).splitlines()
    assert lines[:2] == ["user", "/home/user"]
    assert lines[4] == "root"
    assert (answer["exit"], answer["stderr"]) == (0, "")


def test_the_filter_and_the_cgroups_are_the_box_s(box: RealBox) -> None:
    answer = box.run("exe_sec", "grep -E '^(Seccomp|NoNewPrivs)' /proc/self/status; cat /proc/self/cgroup | head -3")
    assert "Seccomp:\t2" in text(answer)
    assert "NoNewPrivs:\t0" in text(answer)
    assert all(line.endswith(":/") for line in text(answer).splitlines()[2:] if "memory" in line or "pids" in line)
    refused = box.run("exe_unshare", "unshare -U true; sudo unshare -m true; true")
    assert text(refused, "stderr").count("not permitted") == 2


def test_root_cannot_end_the_box_by_killing_everything(box: RealBox) -> None:
    box.run("exe_massacre", "sudo kill -9 -1; true")
    answer = box.run("exe_after", "echo alive")
    assert (answer["exit"], text(answer)) == (0, "alive\n")


def test_memory_is_the_box_s_and_the_keeper_lives(box: RealBox) -> None:
    answer = box.run("exe_oom", argv=["/usr/bin/python3", "-S", "-c", "x=b'x'*(1<<30)"])
    assert (answer["exit"], answer["reason"]["kind"]) == (137, "oom")
    assert text(box.run("exe_on", "echo on")) == "on\n"


def test_output_under_the_cap_on_the_pool(box: RealBox) -> None:
    size = 300 << 20
    answer = box.run("exe_big", f"yes 0123456 | head -c {size}")
    assert answer["sizes"] == [size, 0]
    assert 0 < answer["dropped"][0] < size
    with box.open(verb="read", id="exe_big", stream="stdout", last_lines=2) as client:
        assert client.file.read(client.line()["body"]) == b"0123456\n" * 2


def test_kills_with_a_real_box(box: RealBox) -> None:
    box.spawn("exe_count", "for i in $(seq 200); do echo $i; sleep 0.005; done; exit 9")
    for i in range(4):
        box.kill_keeper()
        assert box.run(f"exe_between{i}", "true")["exit"] == 0
        os.kill(box.spawner(), signal.SIGKILL)
        assert box.run(f"exe_again{i}", "true")["exit"] == 0
    answer = box.wait("exe_count")
    assert (answer["exit"], text(answer)) == (9, "".join(f"{i}\n" for i in range(1, 201)))


def test_devices_that_are_none(box: RealBox) -> None:
    """The box's root may put anything in the place of a file: no command hangs for it, no spawner either."""
    box.run("exe_fake", "rm /dev/null; mkfifo -m 666 /dev/null; mv /etc/group /etc/g; mkfifo /etc/group", user=ROOT)
    assert text(box.run("exe_with", "echo fine")) == "fine\n"
    os.kill(box.spawner(), signal.SIGKILL)
    assert text(box.run("exe_again", "echo fine")) == "fine\n"
    mend = "rm /dev/null /etc/group; mv /etc/g /etc/group; mknod -m 666 /dev/null c 1 3; ls -l /dev/null"
    box.run("exe_mend", mend, user=ROOT)


def test_a_fork_bomb_ends_in_refusals(box: RealBox) -> None:
    box.spawn("exe_bomb", "bomb() { bomb | bomb & }; bomb; sleep 2")
    answer = box.spawn("exe_under", "true", hold_ms=3000)
    assert answer.get("state") == "exited" or answer["error"]["code"] in ("internal", "not_ready")
    box.ask(verb="kill", id="exe_bomb", fence=1, signal=9, group=True)
    for i in range(50):
        answer = box.spawn(f"exe_calm{i}", "pkill -9 bash; echo calm", user=ROOT, hold_ms=2000)
        if answer.get("exit") in (0, 137):
            break
    assert box.ask(verb="state", id="exe_home")["exit"] == 0


def test_idle_boxes_are_small(host: RealHost) -> None:
    """Several, since what one alone maps of Python is charged to it, and is shared on any real host."""
    boxes = [RealBox(host) for _ in range(4)]
    for box in boxes:
        box.run("exe_one", "true")
    each = [sum(pss_kb(pid) for pid in (box.pid, box.spawner(), box.made.init_pid)) for box in boxes]
    assert sum(each) / len(each) < 8192, f"{each} kB"
    for box in boxes:
        box.close()
        host.boxes.remove(box)
