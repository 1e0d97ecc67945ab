"""Warm boxes: made ahead of need while the makers are idle, claimed in no time.

In charge of how many there are and of what image. Not in charge of the claim itself (an atomic rename in `boxes`), nor
of what a boot is (`verbs.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from hostd import boxes
from hostd.boxes import Slot
from hostd.config import HostConfig
from hostd.makers import Makers
from hostd.messages import Refused

# What a box waits with; the claimant's own limits are written when it boots.
LIMITS = {"cpu_millis": 1000, "memory_bytes": 512 << 20, "pids": 512, "disk_bytes": 2 << 30}
HOSTNAME = "devbox"
LOOK_SECONDS = 0.5
FAILED_SECONDS = 30.0  # pause after one could not be made

log = logging.getLogger("hostd.warm")

Boot = Callable[[Slot, dict[str, int], str, str | None], Awaitable[None]]


class Warm:
    """The pool. ``boot`` and ``unmake`` are the ordinary ways to make and destroy a box."""

    def __init__(self, cfg: HostConfig, makers: Makers, boot: Boot, unmake: Callable[..., Awaitable[None]]) -> None:
        self._cfg = cfg
        self._makers = makers
        self._boot = boot
        self._unmake = unmake
        self._ready: deque[Slot] = deque()
        self._doomed: deque[Slot] = deque()
        self._not_before = 0.0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def slots(self) -> list[Slot]:
        return list(self._ready)

    def set(self, count: int, image: str) -> None:
        """Change how many of which image there should be, and remember it. Raises OSError."""
        self._cfg = dataclasses.replace(self._cfg, warm=count, image=image)
        self._cfg.save()
        self._not_before = 0.0

    def found(self, slot: Slot) -> None:
        """One that an earlier hostd made."""
        self._ready.append(slot)

    def take(self, image: str) -> Slot | None:
        """The oldest one of this image; it is the caller's from here."""
        for slot in self._ready:
            if slot.image == image:
                self._ready.remove(slot)
                return slot
        return None

    def discard(self, slot: Slot) -> None:
        """One that cannot be used, or is nobody's: destroyed when there is time, again and again until it works."""
        with contextlib.suppress(ValueError):
            self._ready.remove(slot)
        self._doomed.append(slot)

    async def evict(self) -> bool:
        """Destroy one to make room. False when there is none. Raises Refused."""
        if not self._ready:
            return False
        slot = self._ready.popleft()
        await self._unmake(slot.slot, slot.n)
        return True

    async def run(self) -> None:
        """Keep the pool as it should be, one box at a time, for as long as hostd lives."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                while self._makers.idle and await self._step():
                    pass
            except (Refused, OSError) as error:
                self._not_before = time.monotonic() + FAILED_SECONDS
                log.warning("warm boxes: %s; next try in %s s", error, FAILED_SECONDS)

    async def _step(self) -> bool:
        """Do one thing; False when nothing is to be done."""
        for slot in list(self._ready):
            if slot.image != self._cfg.image or len(self._ready) > self._cfg.warm:
                self.discard(slot)
        if time.monotonic() < self._not_before:
            return False
        if self._doomed:
            slot = self._doomed[0]
            await self._unmake(slot.slot, slot.n)
            self._doomed.popleft()
            return True
        if len(self._ready) < self._cfg.warm and self._cfg.image:
            await self._make()
            return True
        return False

    async def _make(self) -> None:
        slot = boxes.new_slot(self._cfg, self._cfg.image, LIMITS["disk_bytes"])
        try:
            job: dict[str, Any] = {"image": slot.image, "disk_bytes": LIMITS["disk_bytes"]}
            await self._makers.do("make_disk", slot=slot.slot, n=slot.n, **job)
            await self._boot(slot, LIMITS, HOSTNAME, None)
            await self._makers.do("warm_up", slot=slot.slot)
            boxes.mark_warm(self._cfg, slot.slot)
        except BaseException:
            self._doomed.append(slot)
            raise
        self._ready.append(slot)
