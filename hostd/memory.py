"""What the kernel says of a box's memory: how often it killed for want of it, and the figures that go with that.

In charge of: reading the box's memory cgroup, of either version, through descriptors that root opened.
Not in charge of: limits (cgroups.py), what a kill means for a command (executions.py).
"""

from __future__ import annotations

import os

FILES = {
    "limit_bytes": ("memory.limit_in_bytes", "memory.max"),
    "usage_bytes": ("memory.usage_in_bytes", "memory.current"),
    "peak_bytes": ("memory.max_usage_in_bytes", "memory.peak"),
}
UNLIMITED = 1 << 60
"""A limit above this is none."""


class Memory:
    """The memory cgroup of a box. `oom`: memory.oom_control or memory.events; `folder`: its directory; -1: unknown."""

    def __init__(self, oom: int, folder: int) -> None:
        self._oom, self._folder = oom, folder

    def kills(self) -> int:
        """Return how many processes of the box the kernel has killed for lack of memory."""
        if self._oom < 0:
            return 0
        try:
            for line in os.pread(self._oom, 4096, 0).split(b"\n"):
                if line.startswith(b"oom_kill "):
                    return int(line[9:])
        except (OSError, ValueError):
            pass  # the cgroup is being removed
        return 0

    def figures(self) -> dict[str, int]:
        """Return limit, usage and peak in bytes, those that the kernel tells."""
        if self._folder < 0:
            return {}
        found: dict[str, int] = {}
        for name, files in FILES.items():
            for file in files:
                value = self._read(file)
                if value is not None and value < UNLIMITED:
                    found[name] = value
                    break
        return found

    def _read(self, file: str) -> int | None:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._folder)
        except OSError:
            return None
        try:
            return int(os.read(descriptor, 64))
        except (OSError, ValueError):  # "max"
            return None
        finally:
            os.close(descriptor)
