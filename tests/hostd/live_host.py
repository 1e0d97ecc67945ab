"""A real install on this machine, for tests marked live: set up from the bundle, served, torn down without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from hostd import bundle, config
from tests.hostd.client import Client

PYTHON = "/usr/bin/python3"
POOL_BYTES = 4 << 30


def why_not() -> str | None:
    """Why no box can be made here; None when one can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists(PYTHON):
        return f"needs {PYTHON}"
    return None


class LiveHost:
    """An install under a folder of its own. Start it, use its client, remove it."""

    def __init__(self, *, warm: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="berth-live-"))
        self.folder.chmod(0o711)
        self.root, self.run = self.folder / "root", self.folder / "run"
        self.root.mkdir(0o711)
        install, _ = config.claim_install(str(self.root))
        built = bundle.build()
        (self.root / "bundles").mkdir()
        self.bundle = self.root / "bundles" / f"{built.digest}.pyz"
        self.bundle.write_bytes(built.data)
        self.digest = built.digest
        wanted = {"cluster": "live-test", "host": "hst_live", "install": install, "warm": warm}
        wanted |= {"root": str(self.root), "run": str(self.run), "pool_bytes": POOL_BYTES}
        self.given = self.folder / "given.json"
        self.given.write_text(json.dumps(wanted))
        self.config = self.root / "host.json"
        self.client = Client(str(self.run / "hostd.sock"))
        self.image = ""

    def command(self, *argv: str, seconds: float = 900) -> dict[str, Any]:
        """Run the bundle; its last line."""
        done = subprocess.run([PYTHON, "-I", self.bundle, *argv], capture_output=True, text=True, timeout=seconds)
        lines = done.stdout.splitlines()
        assert done.returncode == 0 and lines, f"{argv}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return dict(json.loads(lines[-1]))

    def set_up(self) -> None:
        self.image = self.command("setup", "--config", str(self.given))["image"]

    def start(self) -> None:
        assert self.command("serve", "--config", str(self.config), "--detach", seconds=90)["done"]

    @property
    def pid(self) -> int:
        return int((self.root / "hostd.lock").read_text())

    def kill(self) -> None:
        """kill -9 of hostd; returns once it is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def report(self) -> dict[str, dict[str, Any]]:
        return {entry["box"]: entry for entry in self.client.call("report")["boxes"]}

    def log(self) -> str:
        """hostd's log and what the zygote and its children complained of."""
        return "".join(path.read_text() for path in (self.root / "log" / "hostd.log", self.root / "zygote.log"))

    def traces(self) -> list[str]:
        """What is left of boxes on the machine, whoever made them; empty when all were destroyed."""
        cfg = config.load(str(self.config))
        found: list[str] = []
        for folder in (
            cfg.disks,
            cfg.slots,
            cfg.names,
            cfg.outputs,
            f"{cfg.run}/b",
            f"{cfg.run}/k",
            f"{cfg.root}/keepers",
        ):
            found += [f"{folder}/{name}" for name in os.listdir(folder) if not name.endswith(".lock")]
        for controller in Path("/sys/fs/cgroup").glob(f"*/{cfg.cgroup}"):
            found += [str(path) for path in controller.iterdir() if path.is_dir()]
        low, high = cfg.uid_base(0), cfg.uid_base(1999) + 65536
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                uid, state = os.stat(f"/proc/{pid}").st_uid, process_state(int(pid))
            except OSError:
                continue
            if (low <= uid < high or cfg.keeper_uid(0) <= uid <= cfg.keeper_uid(1999)) and state not in (None, "Z"):
                found.append(f"process {pid} of uid {uid}")
        return found

    def remove(self) -> None:
        if self.config.exists():
            self.command("teardown", "--config", str(self.config), seconds=120)
        else:
            config.release_install(json.loads(self.given.read_text())["install"], str(self.root))
        shutil.rmtree(self.folder, ignore_errors=True)


def process_state(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def alive(pid: int) -> bool:
    return process_state(pid) not in (None, "Z", "X")
