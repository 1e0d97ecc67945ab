"""What a host tells about itself: `hello` and `report`.

In charge of reading the machine's figures and of asking the keepers. Changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from hostd import boxes, bundle, images, messages
from hostd.config import HostConfig
from hostd.snapshot_verbs import Snapshots
from hostd.verbs import Verbs

_ASKED_AT_ONCE = 32

log = logging.getLogger("hostd.report")


class Report:
    """``boot_id`` names this run of the machine; ``digest`` the bundle that runs."""

    def __init__(self, cfg: HostConfig, verbs: Verbs, snapshots: Snapshots, boot_id: str) -> None:
        self._cfg = cfg
        self._verbs = verbs
        self._snapshots = snapshots
        self._boot_id = boot_id
        path = bundle.running_path()
        self.digest = bundle.digest_of(path) if path else ""

    def hello(self) -> dict[str, Any]:
        """Who this is and what it has free. Raises OSError."""
        memory = meminfo()
        pool = os.statvfs(self._cfg.pool)
        free = pool.f_bavail * pool.f_frsize
        if pool.f_flag & os.ST_RDONLY:
            log.error("the pool is read-only: nothing can be placed here")
            free = 0
        return {
            "protocol": messages.PROTOCOL,
            "digest": self.digest,
            "cluster": self._cfg.cluster,
            "host": self._cfg.host,
            "install": self._cfg.install,
            "boot_id": self._boot_id,
            "monotonic": round(time.monotonic(), 3),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": memory.get("MemTotal", 0),
            "memory_free_bytes": memory.get("MemAvailable", 0),
            "pool_bytes": pool.f_blocks * pool.f_frsize,
            "pool_free_bytes": free,
            "images": images.list_images(self._cfg),
            "boxes": len(self._verbs.named),
            "warm": len(self._verbs.warm),
            "kernel": os.uname().release,
            "cgroup": "v2" if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else "v1",
        }

    async def report(self) -> dict[str, Any]:
        """Everything on this host, with the state of every execution its keepers know."""
        turn = asyncio.Semaphore(_ASKED_AT_ONCE)

        async def one(box: str, slot: boxes.Slot) -> dict[str, Any]:
            link = self._verbs.keepers.link(slot.slot)
            found: list[dict[str, Any]] | None = []
            if link is not None:
                async with turn:
                    found = await self._verbs.keepers.executions(link)
            up = self._verbs.keepers.is_up(slot.slot)
            return {
                "box": box,
                "slot": slot.slot,
                "fence": self._verbs.fences.of(box),
                "state": "disk" if link is None else "up" if up else "down",
                "image": slot.image,
                "executions": found,
            }

        told = await asyncio.gather(*(one(box, slot) for box, slot in list(self._verbs.named.items())))
        # What was destroyed while we asked is not reported.
        there = [entry for entry in told if entry["box"] in self._verbs.named]
        there += [
            {
                "box": box,
                "slot": "",
                "fence": self._verbs.fences.of(box),
                "state": "asleep",
                "image": "",
                "executions": [],
            }
            for box in sorted(self._verbs.asleep - self._verbs.named.keys())
        ]
        warm = [{"slot": slot.slot, "image": slot.image} for slot in self._verbs.warm.slots]
        kept = self._snapshots.listed()
        return {"boxes": there, "warm": warm, "snapshots": kept, "at_ms": time.time_ns() // 1_000_000}


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found: dict[str, int] = {}
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[-1] == "kB":
                found[name] = int(words[0]) * 1024
    return found


def boot_id() -> str:
    """The kernel's id of this run of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
