"""A set-up install for tests: its own install number, pool, addresses and rules, gone afterwards.

Whatever must happen in the install's mount namespace happens in a forked child (`Trial.do`), as in a maker process: the
test process may have threads, and a process with threads cannot enter a mount namespace.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from hostd import boxes, bundles, cgroups, config, namespaces, setup, teardown
from hostd.boxes import Limits, Made
from hostd.config import HostConfig
from hostd.messages import Refused

POOL_BYTES = 2 << 30
LIMITS = Limits(cpu_millis=1000, memory_bytes=256 << 20, pids=64, disk_bytes=256 << 20)
TOOLS = ("crun", "btrfs", "nft", "zstd")


def why_not() -> str | None:
    """The reason this machine cannot carry boxes, None when it can."""
    if os.geteuid() != 0:
        return "boxes need root"
    missing = [tool for tool in TOOLS if not shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")]
    return f"boxes need {', '.join(missing)}" if missing else None


class Trial:
    """One install. ``cfg`` has the image's id after `set_up`."""

    def __init__(self, install: int | None = None) -> None:
        # mkdtemp's folder is closed to others, and a box's root must pass through it.
        self.folder = tempfile.mkdtemp(prefix="berth-trial-")
        os.chmod(self.folder, 0o711)
        self.cfg = self._claim(install)
        self.said: list[dict[str, Any]] = []

    def _claim(self, install: int | None) -> HostConfig:
        root = f"{self.folder}/root"
        # From above: real installs take the lowest free number.
        wanted = range(config.INSTALLS - 1, 0, -1) if install is None else [install]
        for number in wanted:
            with contextlib.suppress(config.ConfigError):
                config.claim_install(root, number)
                return config.from_dict(
                    {
                        "cluster": "trial",
                        "host": "hst_trial",
                        "install": number,
                        "root": root,
                        "run": f"{self.folder}/run",
                        "pool_bytes": POOL_BYTES,
                    }
                )
        shutil.rmtree(self.folder)
        raise RuntimeError(f"no install number of {list(wanted)} is free")

    def set_up(self) -> Trial:
        assert setup.run(self.cfg, self.said.append) == 0, self.said
        self.cfg = config.load(self.cfg.path)
        return self

    def tear_down(self) -> None:
        said: list[dict[str, Any]] = []
        try:
            assert teardown.run(self.cfg, said.append) == 0, said
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def do(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What a maker would do: ``action(cfg, …)`` in the private mount namespace. Its exception is raised."""
        return self.answer(*self.start(action, *arguments, **named))

    def answer(self, child: int, descriptor: int) -> Any:
        """What a child of `start` returned or raised."""
        with open(descriptor, "rb") as file:
            data = file.read()
        os.waitpid(child, 0)
        assert data, f"child {child} died"
        return _unpack(data)

    def start(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[int, int]:
        """Like `do`, not waited for: the child's pid and the descriptor its answer comes out of."""
        read, write = os.pipe2(os.O_CLOEXEC)
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.close(write)
            return child, read
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            namespaces.enter(self.cfg)
            try:
                answer = ("returned", action(self.cfg, *arguments, **named))
            except Refused as refused:
                answer = ("refused", (refused.code, refused.message))
            except BaseException as error:
                answer = ("raised", error)
            with contextlib.suppress(OSError):
                os.write(write, pickle.dumps(answer))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    # --- boxes

    def make(self, limits: Limits = LIMITS, hostname: str = "trial", box: str | None = None) -> Made:
        slot = boxes.new_slot(self.cfg, self.cfg.image, limits.disk_bytes, box)
        self.do(boxes.make_disk, slot.slot, slot.n, slot.image, limits.disk_bytes)
        made: Made = self.do(boxes.make_box, slot.slot, slot.n, limits, hostname)
        return made

    def destroy(self, made: Made, **named: Any) -> None:
        self.do(boxes.destroy_box, made.slot, made.n, **named)

    @contextlib.contextmanager
    def box(self, limits: Limits = LIMITS) -> Iterator[Made]:
        made = self.make(limits)
        try:
            yield made
        finally:
            self.destroy(made)

    def run(
        self, made: Made, command: str, *, root: bool = False, seconds: float = 20, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """A shell command in the box, under its filter and limits, as its user or its root; output in ``stdout``."""
        value = self.do(_crun_exec, made.slot, command, root, seconds)
        done = subprocess.CompletedProcess([command], value[0], value[1].decode(errors="replace"))
        if check:
            assert done.returncode == 0, done.stdout
        return done


def _unpack(data: bytes) -> Any:
    kind, value = pickle.loads(data)
    if kind == "refused":
        raise Refused(*value)
    if kind == "raised":
        raise value
    return value


def _crun_exec(cfg: HostConfig, slot: str, command: str, root: bool, seconds: float) -> tuple[int, bytes]:
    user = "0:0" if root else "1000:1000"
    home = "/root" if root else "/home/user"
    # crun does not join the box's cgroups by itself: whoever starts it does.
    join = [os.open(path, os.O_WRONLY) for path in cgroups.detect().procs(cfg.box_cgroup(slot))]
    done = subprocess.run(
        [
            *(bundles.CRUN, "--root", cfg.runtime_state, "--cgroup-manager=disabled", "exec", "--user", user),
            *("--cwd", home, "--env", f"HOME={home}", slot, "/bin/bash", "-lc", command),
        ],
        input=b"",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        preexec_fn=lambda: [os.write(file, b"0") for file in join],
        check=False,
    )
    return done.returncode, done.stdout[-30_000:]


def traces(cfg: HostConfig) -> dict[str, list[str]]:
    """Everything on this machine that carries the install's marks, by kind; empty lists when nothing is left."""

    def lines(text: str, *marks: str) -> list[str]:
        return [line for line in text.splitlines() if any(mark in line for mark in marks)]

    def output(*argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False).stdout

    with open("/proc/self/mounts") as file:
        mounts = file.read()
    with open("/proc/net/unix") as file:
        sockets = file.read()
    folders = [f"{cgroups.MOUNT}/{name}" for name in os.listdir(cgroups.MOUNT)]
    return {
        "files": [path for path in (cfg.root, cfg.run, config.install_lock(cfg.install)) if os.path.lexists(path)],
        "mounts": lines(mounts, cfg.root, cfg.run),
        "loops": lines(output("losetup", "--noheadings", "--output", "BACK-FILE"), cfg.root),
        "links": lines(output("ip", "-o", "link"), f" {cfg.link_prefix}"),
        "addresses": lines(output("ip", "-o", "address"), cfg.gateway),
        "routes": lines(output("ip", "route"), f"dev {cfg.link_prefix}"),
        "tables": lines(output("nft", "list", "tables"), f"berth_{cfg.install}"),
        "cgroups": [folder for folder in folders if os.path.isdir(f"{folder}/{cfg.cgroup}")],
        "sockets": lines(sockets, cfg.run),
        "processes": _processes(cfg),
    }


def _processes(cfg: HostConfig) -> list[str]:
    """Processes whose uid is one of the install's boxes' or keepers'."""
    low, high = cfg.uid_base(0), cfg.uid_base(config.BOXES - 1) + config.UIDS_PER_BOX
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and bundles.start_time(int(name)) is not None:  # a dead one is its parent's to collect
            with contextlib.suppress(OSError):
                uid = os.stat(f"/proc/{name}").st_uid
                if low <= uid < high or cfg.keeper_uid(0) <= uid <= cfg.keeper_uid(config.BOXES - 1):
                    found.append(name)
    return found
