"""The installation that is measured: a throwaway one, started by the code behind ``make up``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from config import first, traces
from config.state import CHECKOUT, free_port
from config.up import interrupts
from tests.live.conftest import Up, environment

#: Fifty of the smallest devboxes promise more than a small machine has; only the promise is in the way.
ROOM = {
    "BERTH_POOL_GB": "16",
    "BERTH_OVERCOMMIT_CPU": "32",
    "BERTH_OVERCOMMIT_MEMORY": "8",
    "BERTH_OVERCOMMIT_DISK": "32",
}


@dataclass
class Target:
    """What a measure gets."""

    up: Up
    base_url: str
    key: str
    client: httpx.Client

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the installation's settings spelt out."""
        return {**environment(self.up.state), **self.up.state.read_env()}

    def post(self, path: str, body: object = None) -> dict[str, object]:
        answer = self.client.post(path, json={} if body is None else body)
        answer.raise_for_status()
        return dict(answer.json())

    def create(self, **body: object) -> str:
        """A running devbox's id."""
        box = self.post("/v1/devboxes/create_and_await_running", body)
        if box["status"] != "running":
            raise RuntimeError(f"{box['id']} is {box['status']}: {box.get('failure_reason')}")
        return str(box["id"])

    def shutdown(self, box: str) -> None:
        self.post(f"/v1/devboxes/{box}/shutdown")

    def python(self, program: str) -> str:
        """Run a program inside Django with the installation's settings; what it printed."""
        done = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", program],
            cwd=CHECKOUT, env=self.environment,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return done.stdout


@contextlib.contextmanager
def throwaway(**settings: str) -> Iterator[Target]:
    """A running installation, with these settings besides; nothing is left of it afterwards."""
    with tempfile.TemporaryDirectory(prefix="berth-bench-") as name, interrupts():
        folder = Path(name)
        folder.chmod(0o755)  # sockets and boxes are below it
        up = Up(folder / "s", BERTH_BIND=f"127.0.0.1:{free_port()}", **(ROOM | settings))
        up.state.create()
        marks = traces.Marks.of(up.state)
        try:
            up.start()
            marks = traces.Marks.of(up.state)
            facts = first.running(up.state)
            assert facts is not None
            key = up.state.api_key_file.read_text().strip()
            headers = {"authorization": f"Bearer {key}"}
            with httpx.Client(base_url=facts["base_url"], headers=headers, timeout=60.0, trust_env=False) as client:
                yield Target(up, facts["base_url"], key, client)
            up.interrupt()
        finally:
            up.remove()
        deadline = time.monotonic() + 10
        while (left := traces.find(marks)) and time.monotonic() < deadline:
            time.sleep(0.2)  # the kernel takes apart network and mounts some moments later
        if left:
            raise RuntimeError(f"left behind: {left}")
