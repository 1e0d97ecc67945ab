"""The host verbs that change something, and the table of what is on this host.

In charge of: who may change a devbox (fences, one request at a time), which slot is whose, and finding everything again
when hostd starts. Not in charge of: sockets (`serve.py`), the blocking work itself (`jobs.py`, in the makers), verbs
that only tell (`report.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from hostd import asleep, boxes, bundles, images
from hostd.boxes import Slot, SlotState
from hostd.config import HostConfig
from hostd.events import Events
from hostd.fences import Fences
from hostd.keepers import Keepers, Record
from hostd.makers import Makers
from hostd.messages import Refused
from hostd.warm import Warm

SUSPEND_HOLD_SECONDS = 2.5  # `suspend` is answered after this time, done or not; the work goes on
SUSPEND_SECONDS = 600.0  # for ending a box and having its disk written
LINK_SECONDS = 3.0  # how long `boot` waits for the new keeper; requests wait for it longer

log = logging.getLogger("hostd.verbs")


class Verbs:
    """What the host has and what may be done with it."""

    def __init__(
        self, cfg: HostConfig, makers: Makers, keepers: Keepers, events: Events, fences: Fences, boot_id: str
    ) -> None:
        self._cfg = cfg
        self._makers = makers
        self.keepers = keepers
        self._events = events
        self.fences = fences
        self._boot_id = boot_id
        self.named: dict[str, Slot] = {}  # devbox id -> its slot
        self.asleep: set[str] = set()  # suspended devboxes: of those there is a disk
        self._suspending: dict[str, asyncio.Task[None]] = {}
        self.warm = Warm(cfg, makers, self.boot_slot, self.unmake)

    # --- start

    async def recover(self) -> None:
        """Find everything again. Adopts what lives, cleans what was left half made. Called before the first request."""
        await self._makers.do("thaw_all")
        records = self.keepers.load()
        states = {state.slot: state for state in boxes.list_slots(self._cfg)}
        self.asleep = set(asleep.listed(self._cfg))
        cleaning: list[asyncio.Task[None]] = []
        for state in states.values():
            record = records.pop(state.slot, None)
            if state.box is not None:
                self.named[state.box] = slot_of(state)
                if record is not None:
                    self.keepers.add(record, state.box)
                elif state.state != "disk":
                    cleaning.append(asyncio.ensure_future(self._stop_half_made(state)))
            elif state.warm and record is not None and self.keepers.add(record, None) and self._usable(state.slot):
                self.warm.found(slot_of(state))
            else:
                cleaning.append(asyncio.ensure_future(self._clean(state.slot, state.n)))
        for record in records.values():  # a destroy was cut short after the slot's own record was gone
            cleaning.append(asyncio.ensure_future(self._clean(record.slot, record.n)))
        if cleaning:
            log.warning("%s half made boxes are cleaned", len(cleaning))
            await asyncio.wait(cleaning)

    def _usable(self, slot: str) -> bool:
        return self.keepers.is_up(slot)

    async def _stop_half_made(self, state: SlotState) -> None:
        """A boot that was cut short before anybody was told: back to the disk it started from."""
        try:
            await self._makers.do("stop", slot=state.slot, n=state.n)
        except Refused as refused:
            log.error("half made box %s was not stopped: %s", state.slot, refused)

    async def _clean(self, slot: str, n: int) -> None:
        try:
            await self.unmake(slot, n)
        except Refused as refused:
            log.error("left-over box %s was not removed yet: %s", slot, refused)
            self.warm.discard(Slot(slot, n, "", 0))

    # --- verbs

    async def prepare_disk(
        self, box: str, fence: int, image: str, disk_bytes: int, snapshot: str | None = None
    ) -> dict[str, Any]:
        """Give the devbox a slot with a disk: a warm box when one fits, else a clone of the image; or, always, of the
        snapshot."""
        async with self.fences.held(box, fence):
            slot = self.named.get(box) or (self._claim_warm(box, image) if snapshot is None else None)
            if slot is not None and self.keepers.link(slot.slot) is not None:
                return {"slot": slot.slot, "warm": True}
            if not images.has_image(self._cfg, image):
                raise Refused("unknown_image", f"image {image} is not on this host")
            if slot is None:
                slot = await self._new_slot(box, image, disk_bytes)
                self.named[box] = slot
            await self._make_disk(slot, image, disk_bytes, snapshot)
            return {"slot": slot.slot, "warm": False}

    async def boot(
        self,
        box: str,
        fence: int,
        cpu_millis: int,
        memory_bytes: int,
        pids: int,
        disk_bytes: int,
        hostname: str,
    ) -> dict[str, Any]:
        """Bring the devbox up with these limits and this host name. One that is up (warm) gets no more than them."""
        limits = {"cpu_millis": cpu_millis, "memory_bytes": memory_bytes, "pids": pids, "disk_bytes": disk_bytes}
        async with self.fences.held(box, fence):
            slot = self.named.get(box)
            if slot is None:
                raise Refused("unknown_box", "this devbox has no disk on this host")
            link = self.keepers.link(slot.slot)
            if link is not None and not self.keepers.is_up(slot.slot):
                # It was up and ended. Its processes are gone with its init; start it again on the same disk.
                self.keepers.drop(slot.slot)
                await self._makers.do("stop", slot=slot.slot, n=slot.n)
                self.keepers.forget_record(slot.slot)
                link = None
            if link is None:
                await self.boot_slot(slot, limits, hostname, box)
                link = self.keepers.link(slot.slot)
                assert link is not None
            elif link.record.limits != limits:
                await self._makers.do("set_limits", slot=slot.slot, limits=limits, hostname=hostname)
                self.keepers.limits_written(slot.slot, limits)
            try:
                await asyncio.wait_for(link.opened.wait(), LINK_SECONDS)
            except TimeoutError:
                raise Refused("not_ready", f"the box's keeper did not answer within {LINK_SECONDS:g} s") from None
            record = link.record
            return {
                "slot": record.slot,
                "address": record.address,
                "init_pid": record.init_pid,
                "keeper_pid": record.pid,
                "booted_at_ms": record.booted_at_ms,
                "monotonic": round(time.monotonic(), 3),
                "machine_id": bundles.machine_id(self._cfg, slot.slot),
            }

    async def suspend(self, box: str, fence: int) -> dict[str, Any]:
        """End the devbox's box; of all it had only its disk stays, and that is on the platter once this says so.

        Answered within :data:`SUSPEND_HOLD_SECONDS`; until it is done it is to be asked again.
        """
        running = self._suspending.get(box)
        if running is None:
            running = asyncio.ensure_future(self._suspend(box, fence))
            self._suspending[box] = running
            running.add_done_callback(lambda task: self._suspended(box, task))
            await asyncio.wait({running}, timeout=SUSPEND_HOLD_SECONDS)
            if running.done():
                running.result()
                return {"done": True}
        else:  # under an earlier fence: only what we ask under ours is an answer
            await asyncio.wait({running}, timeout=SUSPEND_HOLD_SECONDS)
        return {"done": False}

    async def _suspend(self, box: str, fence: int) -> None:
        async with self.fences.held(box, fence):
            slot = self.named.get(box)
            if slot is None:
                if box not in self.asleep:
                    raise Refused("unknown_box", "this devbox has no disk on this host")
                return
            self.keepers.drop(slot.slot)
            await self._makers.do("suspend", SUSPEND_SECONDS, slot=slot.slot, n=slot.n, box=box)
            self.keepers.forget_record(slot.slot)
            self.asleep.add(box)
            del self.named[box]

    def _suspended(self, box: str, task: asyncio.Task[None]) -> None:
        self._suspending.pop(box, None)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s was not suspended: %s", box, task.exception())

    async def resume(
        self,
        box: str,
        fence: int,
        image: str,
        disk_bytes: int,
        machine_id: str | None = None,
        snapshot: str | None = None,
    ) -> dict[str, Any]:
        """Give the suspended devbox a slot again, with its disk, for `boot`; one that has it keeps it. With
        ``snapshot`` a devbox that slept on another host gets a disk made of that."""
        async with self.fences.held(box, fence):
            slot = self.named.get(box)
            if slot is None:
                if box not in self.asleep and snapshot is None:
                    raise Refused("unknown_box", "this host does not have the disk of this devbox")
                slot = await self._new_slot(box, image, disk_bytes, machine_id or "")
                self.named[box] = slot
            if snapshot is not None and box not in self.asleep:
                await self._make_disk(slot, image, disk_bytes, snapshot)
            else:
                await self._makers.do("resume", slot=slot.slot, box=box, disk_bytes=disk_bytes)
            self.asleep.discard(box)
            return {"slot": slot.slot}

    async def destroy(self, box: str, fence: int, keep_disk: bool = False) -> dict[str, Any]:
        """Leave nothing of the devbox but its tombstone. Works in any state, for unknown devboxes too."""
        async with self.fences.held(box, fence, ending=True):
            slot = self.named.get(box)
            if slot is not None:
                await self.unmake(slot.slot, slot.n, keep_disk=keep_disk, box=box)
                del self.named[box]
            if box in self.asleep:
                await self._makers.do("drop_asleep", box=box, keep_disk=keep_disk)
                self.asleep.discard(box)
            self._events.drop_box(box)
            self.fences.bury(box, fence)
            return {}

    # --- parts

    def _claim_warm(self, box: str, image: str) -> Slot | None:
        while (slot := self.warm.take(image)) is not None:
            link = self.keepers.link(slot.slot)
            if link is None or not self._usable(slot.slot) or not boxes.claim_warm(self._cfg, slot.slot, box):
                self.warm.discard(slot)
                continue
            self.named[box] = slot
            self.keepers.name(slot.slot, box)
            return slot
        return None

    async def _new_slot(self, box: str, image: str, disk_bytes: int, machine_id: str = "") -> Slot:
        try:
            return boxes.new_slot(self._cfg, image, disk_bytes, box, machine_id=machine_id)
        except Refused as refused:
            if refused.code != "no_slot" or not await self.warm.evict():
                raise
        return boxes.new_slot(self._cfg, image, disk_bytes, box, machine_id=machine_id)

    async def _make_disk(self, slot: Slot, image: str, disk_bytes: int, snapshot: str | None) -> None:
        job: dict[str, Any] = {"slot": slot.slot, "n": slot.n, "image": image, "disk_bytes": disk_bytes}
        job["snapshot"] = snapshot
        try:
            await self._makers.do("make_disk", **job)
        except Refused as refused:
            if refused.code != "no_space" or not await self.warm.evict():
                raise
            await self._makers.do("make_disk", **job)

    async def boot_slot(self, slot: Slot, limits: dict[str, int], hostname: str, box: str | None) -> None:
        """Boot a slot that has a disk, and take up its keeper."""
        began = time.monotonic()
        made = await self._makers.do("boot", slot=slot.slot, n=slot.n, limits=limits, hostname=hostname, box=box)
        phases = made.pop("phases")
        record = Record(slot=slot.slot, n=slot.n, boot_id=self._boot_id, limits=limits, **made)
        self.keepers.add(record, box)
        whole = round((time.monotonic() - began) * 1000, 1)
        log.info("box %s (%s) is up: %s, whole %s ms", slot.slot, box or "warm", phases, whole)

    async def unmake(self, slot: str, n: int, *, keep_disk: bool = False, box: str | None = None) -> None:
        """Destroy a slot. May be repeated until it succeeds."""
        self.keepers.drop(slot)
        await self._makers.do("destroy", slot=slot, n=n, keep_disk=keep_disk, box=box)
        self.keepers.forget_record(slot)


def slot_of(state: SlotState) -> Slot:
    return Slot(state.slot, state.n, state.image, 0)
