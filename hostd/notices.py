"""What a host tells of its boxes besides ends: samples of what they use, and what the kernel says of them.

In charge of: reading both, attributing each to one box, and handing it on as `notice` events, bounded per box. Not in
charge of: sending them and keeping them until they are acknowledged (`events.py`), what they mean.

The kernel's log belongs to the whole machine, so it is parsed strictly and nothing of it is passed on but the figures
of a kill for want of memory: which names the box's own cgroup, and a uid of that box's own range. A process chooses its
own name, so names are what is left when everything else has been taken from both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping

from hostd import cgroups, disks
from hostd.boxes import Slot
from hostd.config import UIDS_PER_BOX, HostConfig
from hostd.events import Events

KMSG = "/dev/kmsg"
RECORD_BYTES = 8192
RECORDS_AT_ONCE = 256
STATS_SECONDS = 60.0
KEPT_STATS = 5
"""Samples of a box that wait to be acknowledged; older ones make room."""
KEPT_OTHERS = 100
RATE, RATE_SECONDS = 20, 60.0
"""So many of a source are told of a box in that time: what its processes can bring about has no bound of its own."""
NEARLY_FULL = 0.95
PENDING_KILLS = 64
MIB = 1 << 20
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"

_RECORD = re.compile(r"(\d+),(\d+),(\d+),[^;]*;([^\n]*)")
_KILL = re.compile(
    r"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=[^,=]*,cpuset=[^,=]*,mems_allowed=[0-9,-]*,"
    r"oom_memcg=([^,]*),task_memcg=([^,]*),task=.{0,64},pid=(\d+),uid=(\d+)"
)
_KILLED = re.compile(
    r"Memory cgroup out of memory: Killed process (\d+) \((.{0,64})\) total-vm:(\d+)kB, anon-rss:(\d+)kB, "
    r"file-rss:(\d+)kB, shmem-rss:(\d+)kB, UID:(\d+) .*"
)

log = logging.getLogger("hostd.notices")


class Notices:
    """``named`` are the devboxes that are here, with their slots; ``limits`` says what a slot may use, None while it
    is not up."""

    def __init__(
        self,
        cfg: HostConfig,
        events: Events,
        named: Mapping[str, Slot],
        limits: Callable[[str], dict[str, int] | None],
        boot_id: str,
    ) -> None:
        self._cfg, self._events, self._named, self._limits, self._boot_id = cfg, events, named, limits, boot_id
        self._hierarchies = cgroups.detect()
        self._told: dict[tuple[str, str], deque[str]] = {}
        self._used: dict[str, tuple[float, float | None]] = {}  # slot -> CPU seconds, monotonic time of the last sample
        self._kills: dict[tuple[int, int], str] = {}  # pid, uid -> box, between the two lines of a kill
        self._rates: dict[tuple[str, str], tuple[float, int, int]] = {}  # since when, how many, how many too many
        self._kmsg = -1
        self.stats_seconds = STATS_SECONDS

    # --- telling

    def tell(self, box: str, source: str, level: str, message: str, *, at_ms: int, key: str) -> None:
        """Hand a notice on. ``key`` names it: the same notice told twice is one."""
        since, count, left_out = self._rates.get((box, source), (0.0, 0, 0))
        if time.monotonic() - since > RATE_SECONDS:
            since, count = time.monotonic(), 0
        if count >= RATE:
            self._rates[box, source] = (since, count, left_out + 1)
            return
        self._rates[box, source] = (since, count + 1, 0)
        if left_out:
            message = f"{message} ({left_out} more before it were left out)"
        digest = int.from_bytes(hashlib.sha256(f"{self._boot_id}/{box}/{source}/{key}".encode()).digest()[:16], "big")
        id = "ntc_" + "".join(_ALPHABET[digest >> shift & 31] for shift in range(125, -1, -5))
        told = self._told.setdefault((box, source), deque())
        told.append(id)
        if len(told) > (KEPT_STATS if source == "stats" else KEPT_OTHERS):
            self._events.drop(box, [told.popleft()])
        event = {"event": "notice", "box": box, "id": id, "source": source, "level": level}
        self._events.add(box, id, {**event, "message": message[:2000], "at_ms": at_ms})

    def spawner(self, box: str) -> None:
        """The process that starts commands in a box has ended: by its root, or for want of memory."""
        at_ms = time.time_ns() // 1_000_000
        message = "the process that starts commands in the devbox was ended from inside; another takes its place"
        self.tell(box, "exec", "warning", message, at_ms=at_ms, key=str(at_ms))

    def _forget_gone(self) -> None:
        for table in (self._told, self._rates):
            for key in [key for key in table if key[0] not in self._named]:
                del table[key]
        slots = {slot.slot for slot in self._named.values()}
        for name in [name for name in self._used if name not in slots]:
            del self._used[name]

    # --- what boxes use

    async def sample_for_ever(self) -> None:
        """Sample every box that is up, every ``stats_seconds``; 0 stops it. One box at a time, so that nobody waits."""
        while True:
            began = time.monotonic()
            while self.stats_seconds <= 0 or time.monotonic() - began < self.stats_seconds:
                await asyncio.sleep(min(1.0, self.stats_seconds or 1.0))
            self._forget_gone()
            for box, slot in list(self._named.items()):
                await asyncio.sleep(0)
                if box in self._named:
                    try:
                        self.sample(box, slot)
                    except (OSError, ValueError) as error:
                        log.info("box %s (%s) could not be sampled: %s", slot.slot, box, error)

    def sample(self, box: str, slot: Slot) -> None:
        """Tell what a box uses now. Raises OSError when it is just going away."""
        limits = self._limits(slot.slot)
        if limits is None:
            return
        usage = self._hierarchies.usage(self._cfg.box_cgroup(slot.slot))
        now = time.monotonic()
        before, at = self._used.get(slot.slot, (0.0, None))
        self._used[slot.slot] = (usage.cpu_seconds, now)
        held, _ = disks.disk_usage(self._cfg, slot.slot)
        cores = limits["cpu_millis"] / 1000
        share = max(0.0, usage.cpu_seconds - before) / max(0.001, now - at) if at is not None else None
        cpu = "" if share is None else f"cpu {share:.2f} of {cores:g}, "
        parts = (("memory", usage.memory_bytes, limits["memory_bytes"]), ("disk", held, limits["disk_bytes"]))
        full = [name for name, used, most in parts if used >= NEARLY_FULL * most]
        message = (
            f"{cpu}memory {usage.memory_bytes // MIB} of {limits['memory_bytes'] // MIB} MiB, "
            f"disk {held // MIB} of {limits['disk_bytes'] // MIB} MiB, processes {usage.processes} of {limits['pids']}"
        )
        if full:
            message += f"; its {' and '.join(full)} {'is' if len(full) == 1 else 'are'} nearly full"
        at_ms = time.time_ns() // 1_000_000
        self.tell(box, "stats", "warning" if full else "info", message, at_ms=at_ms, key=str(at_ms))

    # --- what the kernel says

    def listen(self) -> None:
        """Read the kernel's log from its beginning: what was told before comes again under the same names. Without the
        right to do so there are no such notices."""
        try:
            self._kmsg = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            asyncio.get_running_loop().add_reader(self._kmsg, self._readable)
        except OSError as error:
            log.warning("the kernel's log cannot be read, so no kill for want of memory is told in detail: %s", error)

    def close(self) -> None:
        if self._kmsg >= 0:
            with contextlib.suppress(OSError):
                asyncio.get_running_loop().remove_reader(self._kmsg)
            os.close(self._kmsg)
            self._kmsg = -1

    def _readable(self) -> None:
        for _ in range(RECORDS_AT_ONCE):
            try:
                record = os.read(self._kmsg, RECORD_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EPIPE:  # records were overwritten before we came to them
                    continue
                log.error("the kernel's log cannot be read on: %s", error)
                self.close()
                return
            if not record:
                self.close()
                return
            self.hear(record)

    def hear(self, record: bytes) -> None:
        """Take one record of the kernel's log."""
        match = _RECORD.match(record.decode("utf-8", "replace"))
        if match is None or int(match[1]) >= 8:  # what has another facility was written by a program
            return
        line = match[4]
        if (kill := _KILL.fullmatch(line)) is not None:
            box = self._box_of(kill[2], int(kill[4]))
            if box is not None:
                self._kills[int(kill[3]), int(kill[4])] = box
                while len(self._kills) > PENDING_KILLS:
                    del self._kills[next(iter(self._kills))]
        elif (killed := _KILLED.fullmatch(line)) is not None:
            uid = int(killed[7])
            # Of many kills at once the kernel tells the first line of some only; the uid is one box's all the same.
            box = self._kills.pop((int(killed[1]), uid), None) or self._box_with(uid)
            if box is None:
                return
            total, anonymous, file, shared = (int(killed[number]) // 1024 for number in (3, 4, 5, 6))
            message = (
                f"Out of memory: killed process {killed[2]} (virtual {total} MiB, anonymous {anonymous} MiB, "
                f"files {file} MiB, shared {shared} MiB)"
            )
            age = time.clock_gettime(time.CLOCK_MONOTONIC) - int(match[3]) / 1e6
            at_ms = int((time.time() - max(0.0, age)) * 1000)
            self.tell(box, "kmsg", "error", message, at_ms=at_ms, key=match[2])

    def _box_of(self, path: str, uid: int) -> str | None:
        """Whose cgroup that is, provided that the uid is one of that box's."""
        for box, slot in self._named.items():
            own = "/" + self._cfg.box_cgroup(slot.slot)
            at = path.find(own)
            if at >= 0 and path[at + len(own) :][:1] in ("", "/"):
                return box if self._has(slot, uid) else None
        return None

    def _box_with(self, uid: int) -> str | None:
        return next((box for box, slot in self._named.items() if self._has(slot, uid)), None)

    def _has(self, slot: Slot, uid: int) -> bool:
        first = self._cfg.uid_base(slot.n)
        return first <= uid < first + UIDS_PER_BOX
