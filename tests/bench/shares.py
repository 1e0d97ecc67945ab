"""Who used the processors, and who holds the memory: every process of an installation by the part it belongs to.

In charge of telling processes apart and of adding them up, from /proc alone. Parts are the services of the supervisor
(with what they forked), and on the host: hostd (with its makers and the zygote), the keepers, and the boxes. A box's
short-lived processes are gone when one looks, so their time is what the ended children of its keeper used.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path

from config import traces
from hostd import cgroups
from hostd.config import HostConfig
from tests.live.conftest import Up

_TICK = os.sysconf("SC_CLK_TCK")
BENCH = "clients"
"""The measuring processes themselves."""


@dataclasses.dataclass(frozen=True)
class Process:
    """One line of /proc. Times in seconds."""

    pid: int
    parent: int
    own: float
    children: float


def processes() -> dict[int, Process]:
    """All processes there are, by pid."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            text = Path("/proc", entry.name, "stat").read_text()
        except OSError:
            continue  # it has just ended
        fields = text.rsplit(")", 1)[1].split()
        times = [int(value) / _TICK for value in fields[11:15]]
        pid = int(entry.name)
        found[pid] = Process(pid, int(fields[1]), times[0] + times[1], times[2] + times[3])
    return found


def with_descendants(roots: Iterable[int], among: dict[int, Process]) -> set[int]:
    """These processes and all that stem from them."""
    children: dict[int, list[int]] = {}
    for one in among.values():
        children.setdefault(one.parent, []).append(one.pid)
    found: set[int] = set()
    todo = [pid for pid in roots if pid in among]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, ())
    return found


class Parts:
    """The parts of one installation, and how to find their processes."""

    def __init__(self, up: Up, more: dict[str, int] | None = None) -> None:
        """``more``: further parts by the pid of their first process."""
        host = traces.Marks.of(up.state).host
        assert host is not None
        self._host: HostConfig = host
        self._up = up
        self._more = dict(more or {})
        self._driver = cgroups.detect()

    def pids(self, among: dict[int, Process]) -> dict[str, set[int]]:
        """part -> its processes. A process belongs to one part."""
        parts: dict[str, set[int]] = {"keepers": set(), "boxes": set(), "hostd": set()}
        for name in self._driver.children(self._host.cgroup):
            kind = {"k": "keepers", "b": "boxes"}.get(name.partition("-")[0])
            if kind is not None:
                for file in self._driver.procs(f"{self._host.cgroup}/{name}")[:1]:
                    parts[kind] |= {int(pid) for pid in Path(file).read_text().split()}
        roots = dict(self._more)
        roots |= {name: int(entry["pid"]) for name, entry in self._up.facts["services"].items()}
        taken = parts["keepers"] | parts["boxes"]
        parts["hostd"] = with_descendants(self._daemons(among), among) - taken
        taken |= parts["hostd"]
        for name, root in roots.items():
            parts[name] = with_descendants([root], among) - taken
            taken |= parts[name]
        parts[BENCH] = with_descendants([os.getpid()], among) - taken - with_descendants([self._up_pid()], among)
        return {name: pids for name, pids in parts.items() if pids}

    def _up_pid(self) -> int:
        return int(self._up.facts["pid"])

    def _daemons(self, among: dict[int, Process]) -> list[int]:
        marks = f"serve\0--config\0{self._host.path}".encode()
        found = []
        for pid in among:
            try:
                line = Path("/proc", str(pid), "cmdline").read_bytes()
            except OSError:
                continue
            if marks in line or (line.startswith(b"zygote") and self._writes_our_log(pid)):
                found.append(pid)
        return found

    def _writes_our_log(self, pid: int) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/fd/1").startswith(f"{self._host.root}/")
        except OSError:
            return False


class Meter:
    """CPU time by part over a ``with``, which must not outlive the processes that matter."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.seconds: dict[str, float] = {}
        self.wall = 0.0

    def __enter__(self) -> Meter:
        self._before = processes()
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.monotonic() - self._began
        after = processes()
        parts = self._parts.pids(after)
        for name, pids in parts.items():
            self.seconds[name] = sum(self._used(after[pid]) for pid in pids)
        # The keepers are the parents of every command, and have no other children.
        ended = sum(after[pid].children - self._was(pid).children for pid in parts.get("keepers", ()))
        self.seconds["boxes"] = self.seconds.get("boxes", 0.0) + ended
        me = os.getpid()  # the clients are our children, and most have ended by now
        self.seconds[BENCH] = self.seconds.get(BENCH, 0.0) + after[me].children - self._was(me).children

    def _was(self, pid: int) -> Process:
        return self._before.get(pid, Process(pid, 0, 0.0, 0.0))

    def _used(self, now: Process) -> float:
        return now.own - self._was(now.pid).own

    def shares(self) -> dict[str, float]:
        """Percent of one processor by part, the largest first; what is below half a percent is left out."""
        used = {name: round(100 * seconds / self.wall, 1) for name, seconds in self.seconds.items()}
        return dict(sorted(((n, v) for n, v in used.items() if v >= 0.5), key=lambda pair: -pair[1]))


def pss_mb(pids: Iterable[int]) -> float:
    """Proportional set size of these processes together, in MiB; what has ended counts nothing."""
    return sum(_pss_kb(pid) for pid in pids) / 1024


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
