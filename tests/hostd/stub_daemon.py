"""A hostd on stubs (stub_host.py) as a process, for the tests of the daemon. Needs no root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostd.messages import Refused
from tests.hostd.client import Client

STUB = Path(__file__).with_name("stub_host.py")
IMAGE = "img_stub"


class Host:
    """A stub host's process and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = {
            "cluster": "c",
            "host": "hst_1",
            "install": 3,
            "root": str(folder),
            "run": str(folder / "run"),
            "image": IMAGE,
        }
        self.client = Client(str(folder / "run" / "hostd.sock"), timeout=10)
        self.process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}

    def start(self, **changes: object) -> None:
        self.config.update(changes)
        (self.folder / "host.json").write_text(json.dumps(self.config))
        self.process = subprocess.Popen(
            [sys.executable, STUB, "serve", "--config", self.folder / "host.json"],
            env={**os.environ, **self.environment},
        )
        until(self.answers)

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "hostd ended"
        try:
            self.client.call("hello")
        except OSError:
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(20)
        for folder in ("stub-keeper", "b"):
            for path in (self.folder / "run" / folder).glob("*"):
                if path.read_text():
                    try:
                        os.kill(int(path.read_text()), signal.SIGKILL)
                    except ProcessLookupError:
                        pass

    def create(self, box: str, fence: int = 1) -> dict:
        for _ in range(5):
            try:
                return self.client.create(box, IMAGE, fence)
            except Refused as refused:
                if refused.code != "not_ready":  # a stub keeper may take seconds to start on a busy machine
                    raise
        raise AssertionError("the keeper does not start")

    def report(self) -> dict[str, dict]:
        return {entry["box"]: entry for entry in self.client.call("report")["boxes"]}


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def code(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.code
