"""cgroups of boxes and keepers: made, limited, frozen, emptied, removed.

In charge of: both kernel interfaces behind one set of methods, :class:`V1` (own hierarchies for memory, pids, cpu and
freezer) and :class:`V2` (one hierarchy). Not in charge of: who joins (the maker's child before it becomes crun, keepers
and spawners later, all by writing to the files of :meth:`procs`).

Paths are relative to a hierarchy's mount point: `berth_1/b-s17-a3f09c`. Methods raise OSError as the kernel answers
unless they say otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

MOUNT: Final = "/sys/fs/cgroup"
_PERIOD_US: Final = 100_000
_KILL_SECONDS: Final = 10.0
_REMOVE_SECONDS: Final = 5.0
_SAMPLED_PROCESSES: Final = 256


class Stuck(Exception):
    """A cgroup could not be emptied or removed in its time; the message names both."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a cgroup uses. ``cpu_seconds`` matters as a difference only; ``memory_bytes`` leaves out cached files that
    can be given back at once."""

    cpu_seconds: float
    memory_bytes: int
    processes: int


class Hierarchies(ABC):
    """What the rest of hostd knows of cgroups."""

    kind: str

    def __init__(self, mount: str = MOUNT) -> None:
        self.mount = mount

    # --- making

    @abstractmethod
    def prepare(self, base: str) -> None:
        """Make the install's own cgroup, with its controllers. Safe to repeat."""

    def make(self, path: str) -> None:
        """Make a cgroup. Safe to repeat."""
        for folder in self.folders(path):
            self._mkdir(folder)

    @abstractmethod
    def limit(self, path: str, *, cpu_millis: int, memory_bytes: int, pids: int) -> None:
        """Write limits. Raises OSError EBUSY when less memory is allowed than is in use."""

    # --- files others need

    @abstractmethod
    def folders(self, path: str) -> list[str]:
        """The cgroup's folder in every hierarchy."""

    def procs(self, path: str) -> list[str]:
        """The files a process joins by, writing `0` to each."""
        return [f"{folder}/cgroup.procs" for folder in self.folders(path)]

    @abstractmethod
    def oom_file(self, path: str) -> str:
        """Has a line `oom_kill N`."""

    @abstractmethod
    def pids_events_file(self, path: str) -> str:
        """Has a line `max N`, which rises when the limit on processes was hit."""

    # --- using

    @abstractmethod
    def usage(self, path: str) -> Usage:
        """What is used now. Raises OSError when there is no such cgroup."""

    @abstractmethod
    def freeze(self, path: str) -> None: ...

    @abstractmethod
    def frozen(self, path: str) -> bool:
        """Whether all that is in it has come to a halt."""

    @abstractmethod
    def thaw(self, path: str) -> None: ...

    def oom_kills(self, path: str) -> int:
        """How many processes were killed here for want of memory; 0 when there is no such cgroup."""
        try:
            text = _read(self.oom_file(path))
        except FileNotFoundError:
            return 0
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0

    def members(self, path: str) -> set[int]:
        """Host pids of what is in the cgroup, in any hierarchy."""
        found: set[int] = set()
        for file in self.procs(path):
            with contextlib.suppress(FileNotFoundError, OSError):
                found.update(int(line) for line in _read(file).split())
        return found

    def kill(self, path: str, seconds: float = _KILL_SECONDS) -> None:
        """SIGKILL everything in the cgroup until it is empty. Raises Stuck after ``seconds``."""
        deadline = time.monotonic() + seconds
        pause = 0.0005
        while True:
            left = self.members(path)
            if not left:
                return
            # A frozen process takes its SIGKILL only once it is thawed.
            with contextlib.suppress(OSError):
                self.thaw(path)
            self._kill_all(path, left)
            if time.monotonic() > deadline:
                some = sorted(left)[:5]
                raise Stuck(f"{len(left)} processes of {path} are alive {seconds:g} s after SIGKILL: {some}")
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def remove(self, path: str, seconds: float = _REMOVE_SECONDS) -> None:
        """Remove an empty cgroup; nothing there is fine. Raises Stuck after ``seconds``."""
        deadline = time.monotonic() + seconds
        for folder in self.folders(path):
            while True:
                try:
                    os.rmdir(folder)
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise Stuck(f"{folder} cannot be removed after {seconds:g} s: {error.strerror}") from None
                    time.sleep(0.002)

    def children(self, base: str) -> list[str]:
        """Names of the cgroups right below ``base``, in any hierarchy."""
        found: set[str] = set()
        for folder in self.folders(base):
            with contextlib.suppress(FileNotFoundError):
                found.update(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        return sorted(found)

    def _kill_all(self, path: str, pids: set[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _mkdir(self, folder: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o755)


class V1(Hierarchies):
    """One hierarchy per controller, as hybrid machines have it."""

    kind = "v1"
    controllers: Final = ("memory", "pids", "cpu", "freezer")

    def prepare(self, base: str) -> None:
        self.make(base)

    def folders(self, path: str) -> list[str]:
        return [self._in(controller, path) for controller in self.controllers]

    def _in(self, controller: str, path: str) -> str:
        return f"{self.mount}/{controller}/{path}"

    def limit(self, path: str, *, cpu_millis: int, memory_bytes: int, pids: int) -> None:
        self._limit_memory(self._in("memory", path), memory_bytes)
        _write(f"{self._in('pids', path)}/pids.max", pids)
        cpu = self._in("cpu", path)
        _write(f"{cpu}/cpu.cfs_period_us", _PERIOD_US)
        _write(f"{cpu}/cpu.cfs_quota_us", max(1000, cpu_millis * _PERIOD_US // 1000))
        _write(f"{cpu}/cpu.shares", min(262_144, max(2, cpu_millis * 1024 // 1000)))

    def _limit_memory(self, folder: str, memory_bytes: int) -> None:
        # Memory and swap together may not be limited below memory alone, so the order depends on the direction.
        both = f"{folder}/memory.memsw.limit_in_bytes"
        swap = os.path.exists(both)
        raising = swap and int(_read(both)) < memory_bytes
        if raising:
            _write(both, memory_bytes)
        _write(f"{folder}/memory.limit_in_bytes", memory_bytes)
        if swap and not raising:
            _write(both, memory_bytes)

    def usage(self, path: str) -> Usage:
        memory = self._in("memory", path)
        used = int(_read(f"{memory}/memory.usage_in_bytes"))
        cached = _value(_read(f"{memory}/memory.stat"), "total_inactive_file")
        try:
            seconds = int(_read(f"{self._in('cpu', path)}/cpuacct.usage")) / 1e9
        except FileNotFoundError:  # another hierarchy counts, which boxes are not in
            seconds = _cpu_seconds(self.members(path))
        processes = int(_read(f"{self._in('pids', path)}/pids.current"))
        return Usage(seconds, max(0, used - cached), processes)

    def oom_file(self, path: str) -> str:
        return f"{self._in('memory', path)}/memory.oom_control"

    def pids_events_file(self, path: str) -> str:
        return f"{self._in('pids', path)}/pids.events"

    def freeze(self, path: str) -> None:
        _write(f"{self._in('freezer', path)}/freezer.state", "FROZEN")

    def frozen(self, path: str) -> bool:
        return _read(f"{self._in('freezer', path)}/freezer.state").strip() == "FROZEN"

    def thaw(self, path: str) -> None:
        _write(f"{self._in('freezer', path)}/freezer.state", "THAWED")


class V2(Hierarchies):
    """The unified hierarchy."""

    kind = "v2"
    controllers: Final = ("memory", "pids", "cpu")

    def prepare(self, base: str) -> None:
        """Raises OSError EBUSY or ENOENT where the machine does not let its root cgroup give these controllers."""
        wanted = " ".join(f"+{controller}" for controller in self.controllers)
        _write(f"{self.mount}/cgroup.subtree_control", wanted)
        parts = base.split("/")
        for depth in range(1, len(parts) + 1):
            folder = f"{self.mount}/{'/'.join(parts[:depth])}"
            self._mkdir(folder)
            _write(f"{folder}/cgroup.subtree_control", wanted)

    def folders(self, path: str) -> list[str]:
        return [f"{self.mount}/{path}"]

    def limit(self, path: str, *, cpu_millis: int, memory_bytes: int, pids: int) -> None:
        folder = f"{self.mount}/{path}"
        current = f"{folder}/memory.current"
        # v2 takes a limit below what is in use and kills for it; v1 refuses, and so do we.
        if os.path.exists(current) and int(_read(current)) > memory_bytes:
            raise OSError(16, "more memory is in use than the new limit allows", folder)
        _write(f"{folder}/memory.max", memory_bytes)
        with contextlib.suppress(FileNotFoundError):  # absent without swap accounting
            _write(f"{folder}/memory.swap.max", 0)
        _write(f"{folder}/pids.max", pids)
        _write(f"{folder}/cpu.max", f"{max(1000, cpu_millis * _PERIOD_US // 1000)} {_PERIOD_US}")
        _write(f"{folder}/cpu.weight", min(10_000, max(1, cpu_millis // 10)))

    def usage(self, path: str) -> Usage:
        folder = f"{self.mount}/{path}"
        used = int(_read(f"{folder}/memory.current"))
        cached = _value(_read(f"{folder}/memory.stat"), "inactive_file")
        seconds = _value(_read(f"{folder}/cpu.stat"), "usage_usec") / 1e6
        return Usage(seconds, max(0, used - cached), int(_read(f"{folder}/pids.current")))

    def oom_file(self, path: str) -> str:
        return f"{self.mount}/{path}/memory.events"

    def pids_events_file(self, path: str) -> str:
        return f"{self.mount}/{path}/pids.events"

    def freeze(self, path: str) -> None:
        _write(f"{self.mount}/{path}/cgroup.freeze", 1)

    def frozen(self, path: str) -> bool:
        return _value(_read(f"{self.mount}/{path}/cgroup.events"), "frozen") == 1

    def thaw(self, path: str) -> None:
        _write(f"{self.mount}/{path}/cgroup.freeze", 0)

    def _kill_all(self, path: str, pids: set[int]) -> None:
        try:
            _write(f"{self.mount}/{path}/cgroup.kill", 1)
        except FileNotFoundError:  # before Linux 5.14
            super()._kill_all(path, pids)


def detect(mount: str = MOUNT) -> Hierarchies:
    """The driver for this machine: v2 when the mount point itself is one, v1 (hybrid included) otherwise.

    Raises FileNotFoundError naming the controller that is missing.
    """
    if os.path.exists(f"{mount}/cgroup.controllers"):
        given = set(_read(f"{mount}/cgroup.controllers").split())
        for controller in V2.controllers:
            if controller not in given:
                raise FileNotFoundError(2, f"this machine offers no {controller} controller", mount)
        return V2(mount)
    for controller in V1.controllers:
        if not os.path.isdir(f"{mount}/{controller}"):
            raise FileNotFoundError(2, f"this machine offers no {controller} controller", f"{mount}/{controller}")
    return V1(mount)


def _value(text: str, name: str) -> int:
    """The number behind a name in a file of such lines, 0 where it is not there."""
    for line in text.splitlines():
        found, _, value = line.partition(" ")
        if found == name:
            return int(value)
    return 0


def _cpu_seconds(pids: set[int]) -> float:
    """What processes and their children that have ended have used, of the first some hundred of them."""
    ticks = 0
    for pid in sorted(pids)[:_SAMPLED_PROCESSES]:
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
            ticks += sum(map(int, file.read().rsplit(b")", 1)[1].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _write(path: str, value: int | str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, str(value).encode())
    finally:
        os.close(file)


def _read(path: str) -> str:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(file, 65_536):
            pieces.append(piece)
        return b"".join(pieces).decode()
    finally:
        os.close(file)
