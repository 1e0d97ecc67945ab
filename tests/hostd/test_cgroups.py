"""Both cgroup drivers on a plain tree of files, and this machine's own on the kernel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import boxes, cgroups, syscalls
from hostd.cgroups import V1, V2
from hostd.config import HostConfig
from tests.hostd.trial import LIMITS, Trial

V2_FILES = {
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cgroup.freeze": "0",
    "cgroup.kill": "",
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "memory.current": "1000",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
    "memory.max": "max",
    "memory.swap.max": "max",
    "pids.events": "max 4\n",
    "pids.max": "max",
}
V1_FILES = {
    "memory": {
        "memory.limit_in_bytes": "9223372036854771712",
        "memory.memsw.limit_in_bytes": "9223372036854771712",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
    },
    "pids": {"pids.max": "max", "pids.events": "max 0\n"},
    "cpu": {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "-1", "cpu.shares": "1024"},
    "freezer": {"freezer.state": "THAWED"},
}


class TreeV2(V2):
    """The driver on files; a new folder is filled as the kernel fills a cgroup."""

    def _mkdir(self, folder: str) -> None:
        super()._mkdir(folder)
        for name, text in V2_FILES.items():
            path = Path(folder, name)
            if not path.exists():
                path.write_text(text)


class TreeV1(V1):
    def _mkdir(self, folder: str) -> None:
        super()._mkdir(folder)
        controller = Path(folder).relative_to(self.mount).parts[0]
        for name, text in {"cgroup.procs": "", **V1_FILES[controller]}.items():
            path = Path(folder, name)
            if not path.exists():
                path.write_text(text)


def text(driver: cgroups.Hierarchies, name: str) -> str:
    return Path(driver.mount, name).read_text()


@pytest.fixture
def v2(tmp_path: Path) -> TreeV2:
    for name, content in V2_FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids\n")
    driver = TreeV2(str(tmp_path))
    driver.prepare("berth_3")
    return driver


@pytest.fixture
def v1(tmp_path: Path) -> TreeV1:
    for controller in V1.controllers:
        (tmp_path / controller).mkdir()
    driver = TreeV1(str(tmp_path))
    driver.prepare("berth_3")
    return driver


def test_the_right_driver_is_found(v2: TreeV2, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert cgroups.detect(v2.mount).kind == "v2"
    other = tmp_path_factory.mktemp("v1")
    with pytest.raises(FileNotFoundError, match="memory"):
        cgroups.detect(str(other))
    for controller in V1.controllers:
        (other / controller).mkdir()
    assert cgroups.detect(str(other)).kind == "v1"
    (Path(v2.mount) / "cgroup.controllers").write_text("cpu memory\n")
    with pytest.raises(FileNotFoundError, match="pids"):
        cgroups.detect(v2.mount)


def test_v2_gives_the_install_its_controllers(v2: TreeV2) -> None:
    for name in ("cgroup.subtree_control", "berth_3/cgroup.subtree_control"):
        assert text(v2, name) == "+memory +pids +cpu"


def test_v2_limits(v2: TreeV2) -> None:
    v2.make("berth_3/b-s1-000000")
    v2.make("berth_3/b-s1-000000")
    v2.limit("berth_3/b-s1-000000", cpu_millis=1500, memory_bytes=1 << 30, pids=100)
    said = {name: text(v2, f"berth_3/b-s1-000000/{name}") for name in ("cpu.max", "memory.max", "pids.max")}
    assert said == {"cpu.max": "150000 100000", "memory.max": str(1 << 30), "pids.max": "100"}
    assert text(v2, "berth_3/b-s1-000000/memory.swap.max").startswith("0")
    assert text(v2, "berth_3/b-s1-000000/cpu.weight") == "150"
    with pytest.raises(OSError, match="more memory is in use"):
        v2.limit("berth_3/b-s1-000000", cpu_millis=1500, memory_bytes=999, pids=100)


def test_v2_freezing_counting_and_joining(v2: TreeV2) -> None:
    path = "berth_3/b-s1-000000"
    v2.make(path)
    v2.freeze(path)
    assert text(v2, f"{path}/cgroup.freeze") == "1"
    v2.thaw(path)
    assert text(v2, f"{path}/cgroup.freeze") == "0"
    assert v2.oom_kills(path) == 2
    assert v2.oom_kills("berth_3/none") == 0
    assert v2.procs(path) == [f"{v2.mount}/{path}/cgroup.procs"]
    Path(v2.procs(path)[0]).write_text("12\n13\n")
    assert v2.members(path) == {12, 13}
    assert v2.children("berth_3") == ["b-s1-000000"]


def test_v2_kills_by_one_write(v2: TreeV2) -> None:
    path = "berth_3/b-s1-000000"
    v2.make(path)
    Path(v2.procs(path)[0]).write_text("999999999\n")
    with pytest.raises(cgroups.Stuck, match="1 processes"):
        v2.kill(path, seconds=0.01)
    assert text(v2, f"{path}/cgroup.kill") == "1"


def test_v1_limits_memory_and_swap_in_the_right_order(v1: TreeV1) -> None:
    path = "berth_3/b-s1-000000"
    v1.make(path)
    v1.limit(path, cpu_millis=250, memory_bytes=1 << 20, pids=30)
    assert text(v1, f"memory/{path}/memory.limit_in_bytes").startswith(str(1 << 20))
    assert text(v1, f"memory/{path}/memory.memsw.limit_in_bytes").startswith(str(1 << 20))
    assert text(v1, f"cpu/{path}/cpu.cfs_quota_us") == "25000"
    assert text(v1, f"pids/{path}/pids.max").startswith("30")
    assert v1.oom_kills(path) == 5
    v1.freeze(path)
    assert text(v1, f"freezer/{path}/freezer.state") == "FROZEN"
    v1.thaw(path)
    assert text(v1, f"freezer/{path}/freezer.state") == "THAWED"
    assert len(v1.procs(path)) == 4


# --- the kernel's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Iterator[tuple[cgroups.Hierarchies, str]]:
    if os.geteuid():
        pytest.skip("needs root")
    driver = cgroups.detect()
    base = f"berth_test_{os.getpid()}"
    driver.prepare(base)
    yield driver, base
    for name in driver.children(base):
        driver.kill(f"{base}/{name}")
        driver.remove(f"{base}/{name}")
    driver.remove(base)


@pytest.mark.live
def test_processes_join_are_limited_and_killed(real: tuple[cgroups.Hierarchies, str]) -> None:
    driver, base = real
    path = f"{base}/b-x"
    driver.make(path)
    driver.make(path)
    driver.limit(path, cpu_millis=500, memory_bytes=64 << 20, pids=8)
    driver.limit(path, cpu_millis=500, memory_bytes=128 << 20, pids=8)
    driver.limit(path, cpu_millis=500, memory_bytes=64 << 20, pids=8)
    join = [os.open(file, os.O_WRONLY) for file in driver.procs(path)]
    sleeper = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: [os.write(file, b"0") for file in join])
    for file in join:
        os.close(file)
    assert driver.members(path) == {sleeper.pid}
    driver.freeze(path)
    began = time.monotonic()
    driver.kill(path)
    assert sleeper.wait(timeout=5) == -9
    driver.remove(path)
    driver.remove(path)
    assert time.monotonic() - began < 2
    assert driver.children(base) == []


@pytest.mark.live
def test_a_cgroup_in_use_is_not_removed_silently(real: tuple[cgroups.Hierarchies, str]) -> None:
    driver, base = real
    path = f"{base}/b-x"
    driver.make(path)
    driver.make(f"{path}/below")
    with pytest.raises(cgroups.Stuck, match="cannot be removed"):
        driver.remove(path, seconds=0.05)
    driver.remove(f"{path}/below")


class Both(V1):
    """The limits of a hybrid machine's v1, with the box in a v2 cgroup as well."""

    def folders(self, path: str) -> list[str]:
        return [*super().folders(path), f"{cgroups.MOUNT}/{path}"]


@pytest.mark.live
def test_a_box_where_only_cgroup_v2_is_shown(trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """crun as on a pure v2 machine, and the v2 driver's freezer and killing on the kernel. Its limits cannot be tried
    where v1 holds the controllers."""
    if cgroups.detect().kind == "v2":
        pytest.skip("this machine is one: the other tests try it")
    tmp_path.chmod(0o711)

    def check(cfg: HostConfig) -> tuple[bool, bool, bool]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(cgroups.MOUNT, str(tmp_path), None, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount("cgroup2", cgroups.MOUNT, "cgroup2")
        driver = Both(str(tmp_path))
        driver.prepare(cfg.cgroup)
        monkeypatch.setattr(cgroups, "detect", lambda *_: driver)
        slot = boxes.new_slot(cfg, cfg.image, LIMITS.disk_bytes)
        try:
            boxes.make_disk(cfg, slot.slot, slot.n, cfg.image, LIMITS.disk_bytes)
            made = boxes.make_box(cfg, slot.slot, slot.n, LIMITS, "trial")
            unified = V2()
            path = cfg.box_cgroup(slot.slot)
            inside = unified.members(path) == {made.init_pid}
            unified.freeze(path)
            deadline = time.monotonic() + 5
            while not (frozen := "frozen 1" in Path(unified.mount, path, "cgroup.events").read_text()):
                assert time.monotonic() < deadline
            unified.kill(path)
            return inside, frozen, boxes.find_made(cfg, slot.slot) is None
        finally:
            boxes.destroy_box(cfg, slot.slot, slot.n)
            os.rmdir(f"{cgroups.MOUNT}/{cfg.cgroup}")

    assert trial.do(check) == (True, True, True)
