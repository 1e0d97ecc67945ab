"""The connections of an event loop to hosts: as `hosts.links`, awaited.

In charge of the loop's Transports (control and bulk apart), of noticing a host that went quiet under streams that
merely wait, and of the same breaker and caps. Handshakes, rows and revivals block, so they run on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from api.threads import in_database
from hosts import ssh
from hosts.errors import HostUnreachable
from hosts.links import (
    BULK_TRANSPORTS,
    CHANNELS_EACH,
    FAIR_SECONDS,
    KEPT_CHANNELS,
    REFUSED_PAUSES,
    SLOT_SECONDS,
    Breaker,
    Broken,
    Where,
    where_is,
)
from hosts.revival import revive

CALLS_AT_ONCE: Final = 256
STREAMS_AT_ONCE: Final = 4096
WHERE_SECONDS: Final = 30.0
PROBE_AFTER: Final = 3.0
"""Seconds without a byte after which a connection with open streams is asked for a sign of life."""
DEAD_AFTER: Final = 9.0
"""Seconds without a byte after which it is closed: its streams are cut instead of hanging for ever."""
WATCH_EVERY: Final = 1.0
DIALLERS: Final = 4

_dialler = ThreadPoolExecutor(DIALLERS, thread_name_prefix="host-dial")


class LoopLink:
    """The connections of the running loop to one host. Not thread-safe."""

    def __init__(self, host_id: str) -> None:
        self.host_id = host_id
        self.breaker = Breaker()
        self._calls = asyncio.Semaphore(CALLS_AT_ONCE)
        self._streams = asyncio.Semaphore(STREAMS_AT_ONCE)
        self._dialling = asyncio.Lock()
        self._reviving: asyncio.Task[None] | None = None
        self._control: ssh.LoopTransport | None = None
        self._bulk: list[ssh.LoopTransport] = []
        self._kept: list[tuple[tuple[str, bool], ssh.LoopStream]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._where: Where | None = None
        self._where_at = 0.0

    async def where(self) -> Where:
        """What the row says, at most 30 s old, and never older than the last failure."""
        where = self._where
        if where is None or time.monotonic() - self._where_at > WHERE_SECONDS:
            where = await in_database(where_is, self.host_id)
            self._where, self._where_at = where, time.monotonic()
        return where

    @contextlib.asynccontextmanager
    async def slot(self, *, bulk: bool = False) -> AsyncIterator[None]:
        """One of the calls at once. Raises HostUnreachable when none comes free in time."""
        gate, limit = (self._streams, STREAMS_AT_ONCE) if bulk else (self._calls, CALLS_AT_ONCE)
        if gate.locked():
            try:
                async with asyncio.timeout(SLOT_SECONDS):
                    await gate.acquire()
            except TimeoutError:
                raise HostUnreachable(
                    self.host_id, f"{limit} calls of this process are waiting for it already"
                ) from None
        else:
            await gate.acquire()
        try:
            yield
        finally:
            gate.release()

    async def open(
        self, deadline: float, *, bulk: bool = False, window: int = ssh.WINDOW, kept_for: str | None = None
    ) -> ssh.LoopStream:
        """A channel to hostd on a live connection; see `links.Link.open`. Raises HostUnreachable."""
        try:
            # Not the watcher's word here: a reader's call costs the loop nothing, and the row may be 30 s old.
            self.breaker.check()
        except Broken as broken:
            raise HostUnreachable(self.host_id, str(broken)) from None
        if kept_for is not None and (kept := self._take((kept_for, bulk))) is not None:
            return kept
        try:
            return await self._open(deadline, bulk, window)
        except ssh.SshError as error:
            self.failed(str(error), 2)
            raise HostUnreachable(self.host_id, str(error)) from error
        except HostUnreachable as error:
            self.failed(error.reason, 2)
            raise

    async def _open(self, deadline: float, bulk: bool, window: int) -> ssh.LoopStream:
        refused, redialled, woken = 0, False, False
        while True:
            where = await self.where()
            transport = await self._transport(where, deadline, bulk)
            began = time.monotonic()
            try:
                return await transport.open(where.socket_path, deadline - time.monotonic(), window)
            except ssh.ConnectionCut:
                self.drop(transport)
                if redialled:
                    raise
                redialled = True
            except ssh.TimedOut:
                if time.monotonic() - began > FAIR_SECONDS:
                    self.drop(transport)
                raise
            except ssh.SocketRefused:
                if refused >= len(REFUSED_PAUSES):
                    if time.monotonic() + 0.2 > deadline:
                        raise
                    if not woken:
                        await self._revive(deadline)
                        woken = True
                pause = REFUSED_PAUSES[min(refused, len(REFUSED_PAUSES) - 1)]
                refused += 1
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311

    def keep(self, stream: ssh.LoopStream, box: str, *, bulk: bool) -> None:
        """Keep a channel whose last answer was complete for the next call to the same box."""
        self._kept = [(kept_for, other) for kept_for, other in self._kept if _is_open(other)]
        self._kept.append(((box, bulk), stream))
        if len(self._kept) > KEPT_CHANNELS:
            self._kept.pop(0)[1].aclose()

    def _take(self, wanted: tuple[str, bool]) -> ssh.LoopStream | None:
        for place in reversed(range(len(self._kept))):
            kept_for, stream = self._kept[place]
            if kept_for == wanted and _is_open(stream):
                return self._kept.pop(place)[1]
        return None

    async def _revive(self, deadline: float) -> None:
        # One for all who wait here, on a thread; it goes on when one of them is cancelled.
        if self._reviving is None or self._reviving.done():
            self._reviving = asyncio.create_task(self._revive_in_thread(deadline))
            self._reviving.add_done_callback(_seen)
        await asyncio.shield(self._reviving)

    async def _revive_in_thread(self, deadline: float) -> None:
        await in_database(revive, self.host_id, deadline)

    async def _transport(self, where: Where, deadline: float, bulk: bool) -> ssh.LoopTransport:
        found = self._live(bulk)
        if found is not None:
            return found
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                async with self._dialling:
                    found = self._live(bulk)
                    if found is not None:
                        return found
                    transport = await self._dial(where, deadline)
                    if bulk:
                        self._bulk.append(transport)
                    else:
                        self._control = transport
        except TimeoutError:
            raise ssh.TimedOut("the deadline passed before the host was dialled") from None
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        return transport

    async def _dial(self, where: Where, deadline: float) -> ssh.LoopTransport:
        tries = 3
        while True:
            tries -= 1
            try:
                return await ssh.dial_for_loop(where.login, _dialler, max(0.1, deadline - time.monotonic()))
            except ssh.DialFailed:
                pause = random.uniform(0.05, 0.3)  # noqa: S311
                if tries == 0 or time.monotonic() + pause + 0.2 > deadline:
                    raise
                await asyncio.sleep(pause)

    def _live(self, bulk: bool) -> ssh.LoopTransport | None:
        if not bulk:
            return self._control if self._control is not None and self._control.active else None
        self._bulk = [transport for transport in self._bulk if transport.active]
        if not self._bulk:
            return None
        least = min(self._bulk, key=lambda transport: transport.channels)
        return None if least.channels >= CHANNELS_EACH and len(self._bulk) < BULK_TRANSPORTS else least

    async def _watch(self) -> None:
        """Cut streams of connections that give no sign of life; ends when there is no connection left."""
        while True:
            await asyncio.sleep(WATCH_EVERY)
            live = [one for one in (self._control, *self._bulk) if one is not None and one.active]
            if not live:
                return
            for transport in live:
                quiet = time.monotonic() - transport.heard_at
                if transport.channels and quiet > DEAD_AFTER:
                    self.failed(f"no sign of life for {quiet:.0f} s", 2)
                    self.drop(transport)
                elif transport.channels and quiet > PROBE_AFTER:
                    transport.probe()

    def drop(self, transport: ssh.LoopTransport) -> None:
        """Close a connection that proved dead; the next call dials."""
        if self._control is transport:
            self._control = None
        self._bulk = [other for other in self._bulk if other is not transport]
        transport.close()

    def failed(self, reason: str, weight: int) -> None:
        """Tell the breaker, and read the row anew before the next call."""
        self._where = None
        self.breaker.failed(reason, weight)

    def unanswered(self, stream: ssh.LoopStream, since: float, error: ssh.SshError) -> None:
        """A call over that stream got no answer; see `links.Link.unanswered`."""
        transport = stream.transport
        quiet = transport.active and transport.heard_at < since and time.monotonic() - since > FAIR_SECONDS
        if quiet or not transport.active:
            self.drop(transport)
        self.failed(str(error), 2 if quiet else 1)

    def close(self) -> None:
        """Close every connection."""
        if self._watcher is not None:
            self._watcher.cancel()
        for transport in (self._control, *self._bulk):
            if transport is not None:
                transport.close()
        self._control, self._bulk, self._where, self._kept = None, [], None, []


def _is_open(stream: ssh.LoopStream) -> bool:
    return stream.transport.active and stream.is_quiet


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()  # whoever waits raises it; when all have left, nobody needs a warning


_links: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, LoopLink]] = weakref.WeakKeyDictionary()


def loop_link_for(host_id: str) -> LoopLink:
    """The running loop's link to that host. Does not dial."""
    mine = _links.setdefault(asyncio.get_running_loop(), {})
    link = mine.get(host_id)
    if link is None:
        link = mine[host_id] = LoopLink(host_id)
    return link


async def close_links() -> None:
    """Close every connection of the running loop (a process that ends, a test)."""
    for link in _links.pop(asyncio.get_running_loop(), {}).values():
        link.close()
