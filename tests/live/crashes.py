"""What tests that kill things share: how long a take-over may take, waiting, and who lives."""

from __future__ import annotations

import time
from pathlib import Path

#: A lease lapses after 10 s and the sweep looks every second; the rest is the work itself, on a loaded machine.
TAKEN_OVER_WITHIN = 45.0


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_until(true, within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.1)


def hostd_pid(berth) -> int:
    return int(Path(berth.host_config().root, "hostd.lock").read_text())
