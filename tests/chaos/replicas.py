"""A second worker and a second watcher beside the supervisor's, as on another machine: a frozen one is then replaced
by somebody who is awake, and wakes to find that its rows are another's.

In charge of having them run, whatever happens to them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Any

from config import roles
from config.state import CHECKOUT
from tests.chaos.site import Site

LOOK_SECONDS = 0.5
STOP_SECONDS = 20.0
NAMES = ("worker", "watcher")


class Replicas:
    """Started by `with`, and started again when they end; ended when it is left."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._running: dict[str, subprocess.Popen[Any]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="replicas")

    def __enter__(self) -> Replicas:
        for name in NAMES:
            self._start(name)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for process in self._running.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def pids(self, name: str) -> set[int]:
        """Of those that run now."""
        process = self._running.get(name)
        return {process.pid} if process is not None and process.poll() is None else set()

    def _start(self, name: str) -> None:
        with open(self._site.state.logs / f"{name}-2.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *roles.ROLES[name][1:]],
                cwd=CHECKOUT,
                env=self._site.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    self._start(name)
