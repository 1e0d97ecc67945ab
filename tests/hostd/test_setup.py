"""Set-up and tear-down: twice, cut short anywhere, after a restart of the machine; nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd import boxes, config, disks, namespaces, network, setup, teardown
from tests.hostd.trial import LIMITS, Trial, traces, why_not


def nothing() -> dict[str, list[str]]:
    kinds = ("files", "mounts", "loops", "links", "addresses", "routes", "tables", "cgroups", "sockets", "processes")
    return {kind: [] for kind in kinds}


def _but_files(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {kind: names for kind, names in found.items() if kind != "files"}


@pytest.fixture
def fresh() -> Iterator[Trial]:
    """An install that is not set up yet."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    made = Trial()
    try:
        yield made
    finally:
        made.tear_down()


def test_kernel_versions() -> None:
    assert setup.kernel_version("6.18.44-fc-v782") == (6, 18)
    assert setup.kernel_version("5.10.0-32-amd64") == (5, 10)
    assert setup.kernel_version("weird") == (0, 0)


def test_missing_packages_are_installed_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, object]] = []
    ran: list[list[str]] = []

    def fake(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(argv)
        if len(ran) == 1:  # the lists are too old at first
            return subprocess.CompletedProcess(argv, 100, "", "E: Unable to locate package")
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(setup, "PACKAGES", {"there": "/bin/sh", "gone": "/no/such/file"})
    monkeypatch.setattr(subprocess, "run", fake)
    setup.install_packages(said.append)
    assert said == [{"step": "packages", "installing": ["gone"]}]
    assert [argv[1] for argv in ran] == ["install", "update", "install"]
    assert ran[0][-1] == "gone"


def test_packages_that_cannot_be_installed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PACKAGES", {"gone": "/no/such/file"})
    monkeypatch.setattr(
        subprocess, "run", lambda argv, **_: subprocess.CompletedProcess(argv, 100, "", "E: no such package")
    )
    with pytest.raises(Exception, match="no such package"):
        setup.install_packages(lambda _: None)


def test_a_folder_nobody_may_pass_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    cfg = config.from_dict({"cluster": "c", "host": "h", "install": 1, "root": f"{closed}/root"})
    with pytest.raises(Exception, match="chmod o\\+x"):
        setup._check_passable(cfg)


def test_an_install_number_is_taken_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LOCK_FOLDER", str(tmp_path / "lock"))
    monkeypatch.setattr(config, "DEFAULT_ROOTS", str(tmp_path / "roots"))
    path = tmp_path / "host.json"
    path.write_text(json.dumps({"cluster": "c", "host": "hst_x", "pool_bytes": 2 << 30}))
    cfg = setup.load(str(path))
    assert (cfg.install, cfg.root) == (0, str(tmp_path / "roots/0"))
    assert setup.load(str(path)) == cfg
    assert json.loads(path.read_text())["install"] == 0


@pytest.mark.live
def test_set_up_twice_and_torn_down_twice(fresh: Trial) -> None:
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    fresh.set_up()
    assert fresh.said[-1]["done"] is True
    assert fresh.said[-1]["image"] == fresh.cfg.image
    fresh.set_up()
    made = fresh.make()
    kept = fresh.make()
    fresh.destroy(kept, keep_disk=True)
    fresh.set_up()  # a living box does not mind
    assert fresh.run(made, "echo alive").stdout == "alive\n"
    said: list[dict[str, object]] = []
    assert teardown.run(fresh.cfg, said.append) == 0, said
    assert traces(fresh.cfg) == nothing()
    assert teardown.run(fresh.cfg, said.append) == 0, said
    assert traces(fresh.cfg) == nothing()
    others = [root for number, root in config.installs_on_machine().items() if number != fresh.cfg.install]
    if not others:
        assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before


@pytest.mark.live
@pytest.mark.parametrize("seed", range(4))
def test_a_set_up_killed_anywhere_is_finished_or_undone(fresh: Trial, seed: int) -> None:
    said: list[dict[str, object]] = []
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        setup.run(fresh.cfg, said.append)
        os._exit(0)
    time.sleep(random.Random(seed).uniform(0.01, 2.5))
    os.kill(child, 9)
    os.waitpid(child, 0)
    # What it had started (mkfs, a stream being received) is left alone to end by itself, as after a lost connection.
    if seed % 2:
        fresh.set_up()
        with fresh.box() as made:
            assert fresh.run(made, "echo alive").stdout == "alive\n"
    said.clear()
    assert teardown.run(fresh.cfg, said.append) == 0, said
    assert traces(fresh.cfg) == nothing()


@pytest.mark.live
def test_what_a_restart_of_the_machine_takes_is_brought_back(fresh: Trial) -> None:
    fresh.set_up()
    made = fresh.make(box="dbx_" + "0" * 26)
    fresh.run(made, "echo kept > f", check=True)
    said: list[dict[str, object]] = []
    assert teardown.run(fresh.cfg, said.append, keep_data=True) == 0, said
    deadline = time.monotonic() + 10
    while (left := _but_files(traces(fresh.cfg))) != _but_files(nothing()):  # a mount namespace may end a moment later
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    setup.bring_up(fresh.cfg)
    setup.bring_up(fresh.cfg)
    assert network.is_machine_up(fresh.cfg)
    [state] = fresh.do(boxes.list_slots)
    assert (state.slot, state.box, state.state) == (made.slot, "dbx_" + "0" * 26, "disk")
    again = fresh.do(boxes.make_box, made.slot, made.n, LIMITS, "trial")
    assert fresh.run(again, "cat f").stdout == "kept\n"


@pytest.mark.live
def test_the_mount_namespace_is_one_for_all(trial: Trial) -> None:
    def where(cfg: config.HostConfig) -> tuple[int, bool, bool]:
        with open("/proc/self/mounts") as file:
            hybrid = "/sys/fs/cgroup/unified" in file.read()
        namespaces.enter(cfg)  # inside already
        return os.stat("/proc/self/ns/mnt").st_ino, namespaces.is_inside(cfg), hybrid

    first, second = trial.do(where), trial.do(where)
    assert first == second
    assert first[0] != os.stat("/proc/self/ns/mnt").st_ino
    assert first[1:] == (True, False)
    assert not namespaces.is_inside(trial.cfg)
    assert namespaces.is_pinned(trial.cfg)
    assert disks.is_pool_mounted(trial.cfg)
