"""The verbs about copies of disks, and the work behind them that outlasts a request.

In charge of: who may change a snapshot (fences by its id), one piece of work per snapshot at a time, and telling how
far it is. Not in charge of: the work itself (`snapshots`, `sending`, `receiving`, in makers and movers).

Movers are makers of their own, few, so that disks on their way never take the makers from boxes that start.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Mapping
from typing import Any, Final

from hostd import moves, snapshots
from hostd.boxes import Slot
from hostd.config import HostConfig
from hostd.fences import Fences
from hostd.makers import Makers
from hostd.messages import Refused
from hostd.snapshot_messages import HOLD_SECONDS, PARTS_MAX, URL_MAX, URLS_MAX

MOVERS: Final = 2
TAKE_SECONDS: Final = 120.0
MOVE_SECONDS: Final = 6 * 3600.0
_LOOK_SECONDS: Final = 0.03
_DROP_WAITS_SECONDS: Final = 3.0

log = logging.getLogger("hostd.snapshots")

Task = asyncio.Task[dict[str, Any]]


class Snapshots:
    """The snapshots of a host."""

    def __init__(
        self, cfg: HostConfig, makers: Makers, movers: Makers, fences: Fences, named: Mapping[str, Slot]
    ) -> None:
        self._cfg = cfg
        self._makers = makers
        self._movers = movers
        self._fences = fences
        self._named = named
        self._work: dict[tuple[str, str], Task] = {}

    def recover(self) -> None:
        """Before the first request: remove what was left half made."""
        for name in snapshots.drop_unfinished(self._cfg):
            log.warning("snapshot %s was half made and is dropped", name)

    def listed(self) -> list[dict[str, Any]]:
        return snapshots.listed(self._cfg)

    # --- verbs

    async def snapshot(self, box: str, snapshot: str, fence: int, base_bytes: int = 0) -> dict[str, Any]:
        """Copy the devbox's disk. Raises Refused unknown_box, no_space."""
        async with self._fences.held(snapshot, fence):
            if (known := snapshots.about(self._cfg, snapshot)) is not None:
                return {"state": "taken", **known}
            work = self._going_on("take", snapshot)
            if work is None:
                slot = self._named.get(box)
                self._free(snapshot)
                if slot is not None:
                    taking = self._take(slot.slot, snapshot, base_bytes)
                else:  # it may be suspended
                    job = {"box": box, "snapshot": snapshot, "base_bytes": base_bytes}
                    taking = self._makers.do("take_snapshot_asleep", TAKE_SECONDS, **job)
                work = self._start("take", snapshot, taking)
        if not await _ended(work):
            return {"state": "taking"}
        return {"state": "taken", **self._result("take", snapshot, work)}

    async def send_snapshot(
        self, snapshot: str, fence: int, upload: str, part_bytes: int, body: bytes
    ) -> dict[str, Any]:
        """Have it sent. Raises Refused: unknown_id, storage, and what `sending.send` raises."""
        urls = _urls(body)
        async with self._fences.held(snapshot, fence):
            before = moves.read(self._cfg, snapshot, "parts")
            if before.get("upload") == upload and before.get("sealed"):
                return _sealed(before)
            snapshots.source(self._cfg, snapshot)
            given = moves.read(self._cfg, snapshot, "given")
            known = given["urls"] if given.get("upload") == upload else {}
            moves.write(self._cfg, snapshot, "given", {"upload": upload, "urls": {**known, **urls}})
            work = self._going_on("send", snapshot)
            if work is None:
                self._free(snapshot)
                moves.write(self._cfg, snapshot, "now", {"upload": upload, "sent_bytes": 0, "want": None})
                job = {"snapshot": snapshot, "upload": upload, "part_bytes": part_bytes}
                work = self._start("send", snapshot, self._movers.do("send_snapshot", MOVE_SECONDS, **job))
        for _ in range(int(HOLD_SECONDS / _LOOK_SECONDS)):
            if await _ended(work, _LOOK_SECONDS):
                sealed = self._result("send", snapshot, work)
                if sealed["upload"] != upload:
                    raise Refused("not_ready", "another upload has just ended")
                return _sealed(sealed)
            now = moves.read(self._cfg, snapshot, "now")
            if now.get("upload") == upload and now.get("want") is not None and str(now["want"]) not in urls:
                break
        now = moves.read(self._cfg, snapshot, "now")
        mine = now if now.get("upload") == upload else {}
        return {"state": "sending", "sent_bytes": mine.get("sent_bytes", 0), "want": mine.get("want")}

    async def receive_snapshot(self, snapshot: str, fence: int, body: bytes, **sealed: Any) -> dict[str, Any]:
        """Have it received. Raises Refused: no_space, unknown_image, storage."""
        url = _object(body).get("url")
        if not isinstance(url, str) or len(url) > URL_MAX:
            raise Refused("bad_request", "the body is to have a url")
        async with self._fences.held(snapshot, fence):
            if snapshots.about(self._cfg, snapshot) is not None:
                return {"state": "here", "received_bytes": sealed["size"]}
            moves.write(self._cfg, snapshot, "given", {"url": url})
            work = self._going_on("receive", snapshot)
            if work is None:
                self._free(snapshot)
                moves.write(self._cfg, snapshot, "now", {"received_bytes": 0})
                job = self._movers.do("receive_snapshot", MOVE_SECONDS, snapshot=snapshot, **sealed)
                work = self._start("receive", snapshot, job)
        if not await _ended(work):
            now = moves.read(self._cfg, snapshot, "now")
            return {"state": "receiving", "received_bytes": now.get("received_bytes", 0)}
        self._result("receive", snapshot, work)
        moves.forget(self._cfg, snapshot)
        return {"state": "here", "received_bytes": sealed["size"]}

    async def delete_snapshot(self, snapshot: str, fence: int) -> dict[str, Any]:
        """Leave nothing of it here. Raises Refused busy while something has to come to its end first."""
        async with self._fences.held(snapshot, fence, ending=True):
            moves.forget(self._cfg, snapshot)  # who moves it finds nothing given, and ends
            going_on = [work for (_, name), work in self._work.items() if name == snapshot]
            if going_on:
                await asyncio.wait(going_on, timeout=_DROP_WAITS_SECONDS)
            self._free(snapshot)
            await self._makers.do("drop_snapshot", snapshot=snapshot)
            moves.forget(self._cfg, snapshot)
            self._fences.bury(snapshot, fence)
            return {}

    # --- work

    async def _take(self, slot: str, snapshot: str, base_bytes: int) -> dict[str, Any]:
        try:
            job = {"slot": slot, "snapshot": snapshot, "base_bytes": base_bytes}
            return await self._makers.do("take_snapshot", TAKE_SECONDS, **job)
        except Refused as refused:
            if refused.code == "internal":  # its maker may have died while the box stood still
                await self._makers.do("thaw", slot=slot)
            raise

    def _going_on(self, what: str, snapshot: str) -> Task | None:
        """The work, if there is one that has not ended or whose end nobody has heard of."""
        return self._work.get((what, snapshot))

    def _free(self, snapshot: str) -> None:
        """Raises Refused busy when something else is being done with it."""
        for (what, name), work in list(self._work.items()):
            if name == snapshot:
                if not work.done():
                    raise Refused("busy", f"to {what} this snapshot is not over yet")
                _forget_error(self._work.pop((what, name)))

    def _start(self, what: str, snapshot: str, work: Coroutine[Any, Any, dict[str, Any]]) -> Task:
        task = asyncio.ensure_future(work)
        self._work[what, snapshot] = task
        return task

    def _result(self, what: str, snapshot: str, work: Task) -> dict[str, Any]:
        """What came of work that has ended; who asks next begins anew. Raises Refused."""
        if self._work.get((what, snapshot)) is work:
            del self._work[what, snapshot]
        return work.result()


async def _ended(work: Task, seconds: float = HOLD_SECONDS) -> bool:
    await asyncio.wait([work], timeout=seconds)
    return work.done()


def _forget_error(work: Task) -> None:
    if not work.cancelled():
        work.exception()  # looked at, or the loop complains of it


def _sealed(found: Mapping[str, Any]) -> dict[str, Any]:
    told = {"size": found["size"], "sha256": found["sha256"], "parts": found["sealed"]}
    return {"state": "sealed", "sent_bytes": found["size"], "want": None, **told}


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Refused("bad_request", "the body is to be a JSON object")
    return found


def _urls(body: bytes) -> dict[str, str]:
    urls = _object(body).get("urls", {})
    right = isinstance(urls, dict) and len(urls) <= URLS_MAX
    for number, url in urls.items() if right else ():
        right = right and number.isdecimal() and 1 <= int(number) <= PARTS_MAX
        right = right and isinstance(url, str) and len(url) <= URL_MAX
    if not right:
        raise Refused("bad_request", f"urls is an object of up to {URLS_MAX} parts and their URLs")
    return dict(urls)
