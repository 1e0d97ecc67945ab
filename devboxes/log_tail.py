"""A devbox's log as it happens: what is there, then each entry as it comes, until the devbox is over and all is told.

In charge of: following all sources at once from where the newest entries ended, heartbeats, error events, the bounds on
what one follower costs. Not in charge of: HTTP, who may read.

What moves in the box is told by its host, by name and size; rows by hints. Nothing is read that has not moved, but for
a look every few seconds, which also finds what nobody told. What has been told is known by byte positions and row
numbers, so that neither a lost connection nor an output that moves from host to row or S3 loses or repeats an entry.

A command that writes faster than its follower reads is followed at the follower's pace: its output waits where it is
kept. In each turn every command has a piece, so one that floods the log holds up no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

import orjson

from accounts.caps import CountedStream
from api.errors import ApiError
from api.stopping import going_down
from api.threads import in_database
from api.waiting import Watch, hub
from devboxes import logs
from devboxes.log_lines import LATER, LogEntry
from devboxes.log_reading import GONE, read_newest
from devboxes.log_sources import RECENT_SECONDS, ROWS_AT_ONCE, Scope, recent_events, sources
from devboxes.log_works import Cursor, Output, Work, host_output, late_output, onwards
from hostd.messages import LINE_MAX, Sizes
from hosts.client import HostError, async_client_for, parse_sizes

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 2.0
"""How often is looked at what nobody told of, while Redis or the host cannot tell."""
LOOK_LISTENING_SECONDS: Final = 10.0
SOON_SECONDS: Final = 0.005
"""How soon is asked again for an end that the row does not know yet; doubles up to LOOK_SECONDS."""
NEAR_BYTES: Final = 64 * 1024
NEAR_RECORDS: Final = 256
"""A command that has written little since it was looked at last is not asked for its whole index again."""
ASK_FOR_MAX: Final = 500
WORKS_AT_ONCE: Final = 8
MOVED_MAX: Final = 50_000
FRESH_MAX: Final = 20_000
DIAL_SECONDS: Final = 1.0
TROUBLE_SECONDS: Final = 20.0
LINES_AT_ONCE: Final = 1000
"""Of each stream of a command, before others have their turn."""
BUSY_LINES: Final = 500
"""A turn with more gives the process's other requests twice the time that it took."""
EVENT_BYTES: Final = 64 * 1024

HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
COMMENT: Final = b": keep-alive\n\n"


class Tail(CountedStream):
    """The body of one answer. Counts against its account's open streams until it is closed."""

    def __init__(self, account_id: str, cap: int, read: Callable[[], Scope], limit: int) -> None:
        """`read` reads the scope again. Raises TooManyRequests at the cap, which is per server process."""
        super().__init__(account_id, cap, _events(read, limit))


async def _events(read: Callable[[], Scope], limit: int) -> AsyncGenerator[bytes, None]:
    yield COMMENT
    try:
        scope = await in_database(read)
        channel = logs.channel(scope.devbox_id)
        async with hub.watch(channel, scope.devbox_id) as changed, hub.watch(channel, scope.devbox_id) as hinted:
            follower = Follower(scope, read, changed, hinted)
            stopping = asyncio.ensure_future(going_down.wait())
            stopping.add_done_callback(lambda _: changed.notify())
            listening = asyncio.create_task(follower.listen())
            try:
                async with contextlib.aclosing(follower.entries(limit)) as batches:
                    async for batch in batches:
                        if going_down.is_set():
                            yield _error(408, "the server is being restarted; ask again")
                            return
                        if not batch:
                            yield COMMENT
                        for chunk in _encoded(batch):
                            yield chunk
            finally:
                stopping.cancel()
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await listening
    except ApiError as error:
        yield _error(500 if error.status == 404 else 408, error.message)
    except Exception:
        log.exception("a log could not be followed on")
        yield _error(408, "the log could not be followed on; ask again")


def _encoded(batch: Sequence[LogEntry]) -> list[bytes]:
    chunks, chunk = [], bytearray()
    for entry in batch:
        chunk += b"data: " + orjson.dumps(entry.view()) + b"\n\n"
        if len(chunk) >= EVENT_BYTES:
            chunks.append(bytes(chunk))
            chunk.clear()
    return [*chunks, bytes(chunk)] if chunk else chunks


def _error(code: int, message: str) -> bytes:
    return b"event: error\ndata: " + orjson.dumps({"code": code, "message": message}) + b"\n\n"


class Follower:
    """What one follower has been told, and what there may be more of. `changed` wakes it, `hinted` says that rows may
    have moved."""

    def __init__(self, scope: Scope, read: Callable[[], Scope], changed: Watch, hinted: Watch) -> None:
        self._scope, self._read, self._changed, self._hinted = scope, read, changed, hinted
        self._moved: dict[str, Sizes] = {}  # id -> how much there is of it, as the host told it last
        self._works: dict[str, Work] = {}  # what is not told to its end
        self._late: dict[str, Work] = {}  # what is, and went on writing after its exit
        self._cursors: dict[str, Cursor] = {}
        self._over: dict[str, float] = {}  # id -> when it was told to its end
        self._foreign: set[str] = set()  # not in the scope
        self._events: dict[tuple[int, ...], float] = {}
        self._trouble: dict[str, float] = {}
        self._looked_at = time.monotonic()
        self._is_listening = False

    async def listen(self) -> None:
        """Hear the host tell what moves, over lost connections, for ever."""
        while True:
            scope = self._scope
            try:
                if scope.host_id is not None and not scope.done:
                    changes = async_client_for(scope.host_id).changes(box=scope.devbox_id)
                    rest = b""
                    async with changes:
                        async for data in changes:
                            self._is_listening = True
                            *lines, rest = (rest + data).split(b"\n")
                            for told in map(parse_sizes, lines):
                                if scope.takes(told["id"]) and told["id"] not in self._foreign:
                                    self._moved[told["id"]] = told
                            if len(rest) > LINE_MAX or len(self._moved) + len(self._foreign) > MOVED_MAX:
                                raise ValueError("the host tells of more commands than a box may have")
                            self._changed.notify()
            except HostError:
                pass
            except Exception as error:
                log.warning("the changes of %s cannot be heard: %r", scope.devbox_id, error)
            self._is_listening = False
            await asyncio.sleep(DIAL_SECONDS)

    async def entries(self, limit: int) -> AsyncGenerator[list[LogEntry], None]:
        """Batches of entries; an empty one when there was nothing for HEARTBEAT_SECONDS."""
        found = await read_newest(self._scope, limit, whole=False)
        told_at = look_at = time.monotonic()
        self._cursors = found.cursors
        self._over = dict.fromkeys(found.over, told_at)
        self._events = dict.fromkeys(found.events, told_at)
        yield found.entries
        pause = SOON_SECONDS
        while True:
            began = time.monotonic()
            batch: list[LogEntry] = []
            if began >= look_at or await self._hinted.wait(0):
                batch += await self._look()
                look_at = time.monotonic() + (
                    LOOK_LISTENING_SECONDS if self._is_listening and hub.connected else LOOK_SECONDS
                )
            elif asked := self._to_ask_for():
                await self._ask_for(asked)
            more, entries = await self._new_output()
            batch = sorted([*batch, *entries], key=lambda entry: entry.order)
            if batch:
                told_at = time.monotonic()
                yield batch
                if len(batch) > BUSY_LINES:
                    await asyncio.sleep(min(1.0, 2 * (told_at - began)))
            elif self._scope.done and not self._works:
                return
            elif time.monotonic() - told_at > HEARTBEAT_SECONDS:
                told_at = time.monotonic()
                yield []
            if going_down.is_set():
                yield []
                return
            if more:
                continue
            seconds = min(look_at - time.monotonic(), HEARTBEAT_SECONDS)
            # An end that the host told and the row does not know yet: it will in some milliseconds.
            pause = min(LOOK_SECONDS, 2 * pause) if self._to_ask_for() else SOON_SECONDS
            await self._changed.wait(max(0.0, min(seconds, pause) if self._to_ask_for() else seconds))

    def _to_ask_for(self) -> list[str]:
        """The commands of which the host told something that only their rows can explain."""
        found = []
        for work_id, told in self._moved.items():
            if work_id in self._late or (work_id in self._over and not any(told["late"])):
                continue
            work = self._works.get(work_id)
            if work is None or (work.ended_ms is None and told["state"] == "exited"):
                found.append(work_id)
        return found[:ASK_FOR_MAX]

    async def _ask_for(self, ids: Sequence[str]) -> None:
        for source in sources():
            for work in await in_database(source.some, self._scope, ids):
                self._take(work)
        unknown = [name for name in ids if name not in self._works and name not in self._late]
        for work_id in unknown:
            self._moved.pop(work_id, None)
            if work_id not in self._over:
                self._foreign.add(work_id)

    def _take(self, work: Work) -> None:
        """Decide whether a command is to be told, or has been and writes on."""
        if work.id in self._over or self._is_old(work):
            if any(self._moved[work.id]["late"]) if work.id in self._moved else False:
                self._late[work.id] = work
        else:
            self._works[work.id] = work

    def _is_old(self, work: Work) -> bool:
        """Whether it ended so long ago that it must have been told, and been forgotten here since."""
        if work.ended_ms is None or work.id in self._works or work.id in self._cursors:
            return False
        return time.time() - work.ended_ms / 1000 > self._window()

    def _window(self) -> float:
        """How far back rows are read, in seconds: a follower that takes nothing keeps us from looking."""
        return RECENT_SECONDS + time.monotonic() - self._looked_at

    async def _look(self) -> list[LogEntry]:
        """Read from the rows what there is, whoever told of it; the entries that are no command's output."""
        self._scope = await in_database(self._read)
        window, began = self._window(), time.monotonic()
        moving: set[str] = set()
        for source in sources():
            for work in await in_database(source.moving, self._scope, window):
                moving.add(work.id)
                self._take(work)
        for work_id in [name for name, work in self._works.items() if work.ended_ms is None and name not in moving]:
            del self._works[work_id]
        fresh: list[LogEntry] = []
        after = 0
        while page := await in_database(recent_events, self._scope, window, after):
            fresh += [event for event in page if event.place not in self._events]
            self._events |= dict.fromkeys((event.place for event in page), began)
            after = page[-1].place[-1]
            if len(page) < ROWS_AT_ONCE or len(fresh) > FRESH_MAX:
                break
        for seen in (self._over, self._events):
            for key in [key for key, at in seen.items() if began - at > 2 * window + RECENT_SECONDS]:
                del seen[key]  # type: ignore[arg-type]
        self._looked_at = began
        return fresh

    async def _new_output(self) -> tuple[bool, list[LogEntry]]:
        """The next of every command that has something, and whether there is more at once."""
        due = [work for work in self._works.values() if self._has_more(work)]
        due_late = [work for work in self._late.values() if self._has_more_late(work)]
        more, entries = False, list[LogEntry]()
        for at in range(0, len(due), WORKS_AT_ONCE):
            for left, found in await asyncio.gather(*map(self._next_or_trouble, due[at : at + WORKS_AT_ONCE])):
                more, entries = more or left, entries + found
        for work in due_late:
            left, found = await self._next_late(work)
            more, entries = more or left, entries + found
        return more, entries

    def _has_more(self, work: Work) -> bool:
        if work.ended_ms is not None:
            return True
        told, cursor = self._moved.get(work.id), self._cursors.get(work.id)
        return told is not None and (cursor is None or not cursor.begun or list(told["sizes"]) != cursor.seen)

    def _has_more_late(self, work: Work) -> bool:
        told, cursor = self._moved.get(work.id), self._cursors.get(work.id)
        return told is not None and (cursor is None or list(told["late"]) != cursor.late_seen)

    async def _next_late(self, work: Work) -> tuple[bool, list[LogEntry]]:
        if self._scope.host_id is None:
            return False, []
        cursor = self._cursors.setdefault(work.id, Cursor())
        client = async_client_for(self._scope.host_id)
        try:
            output = await late_output(client, self._scope.devbox_id, work.id)
            found = await onwards(work, output, cursor.late, LINES_AT_ONCE, whole=False, phase=LATER)
        except HostError:
            self._moved.pop(work.id, None)  # told again when it can be had again
            return False, []
        if not found.left_out:
            cursor.late_seen = list(output.sizes)
        return found.left_out, found.entries

    async def _next_or_trouble(self, work: Work) -> tuple[bool, list[LogEntry]]:
        try:
            return await self._next_of(work, self._cursors.setdefault(work.id, Cursor()))
        except Exception as error:
            if isinstance(error, HostError) and work.ended_ms is None:
                self._moved.pop(work.id, None)  # told again when it can be had again
                return False, []
            # Try again for a while; then say so in the output's place and go on.
            since = self._trouble.setdefault(work.id, time.monotonic())
            if work.ended_ms is None or time.monotonic() - since < TROUBLE_SECONDS:
                return False, []
            log.warning("the log of %s: the output of %s cannot be read: %r", self._scope.devbox_id, work.id, error)
            self._finished(work)
            return False, [work.entry(work.ended_ms, (1,), level="error", message=GONE), *work.ending()]

    async def _next_of(self, work: Work, cursor: Cursor) -> tuple[bool, list[LogEntry]]:
        output: Output | None
        if work.ended_ms is None:
            assert self._scope.host_id is not None
            client = async_client_for(self._scope.host_id)
            told = self._moved.get(work.id)
            near = told is not None and sum(told["sizes"]) - sum(cursor.told) < NEAR_BYTES
            output, work.began_ms = await host_output(
                client, self._scope.devbox_id, work.id, NEAR_RECORDS if near and cursor.begun else None
            )
        else:
            output = await work.output() if work.output is not None else None
        entries: list[LogEntry] = []
        if not cursor.begun:
            entries += work.beginning(work.began_ms or work.ended_ms or 0)
        found = None
        if output is not None:
            found = await onwards(work, output, cursor.told, LINES_AT_ONCE, whole=work.ended_ms is not None)
            entries += found.entries
        cursor.begun = True
        if found is not None and found.left_out:
            return True, entries
        cursor.seen = list(output.sizes) if output is not None else [0, 0]
        if work.ended_ms is not None:
            entries += work.ending()
            self._finished(work)
        return False, entries

    def _finished(self, work: Work) -> None:
        del self._works[work.id]
        self._over[work.id] = time.monotonic()
        told = self._moved.get(work.id)
        if told is not None and any(told["late"]):
            self._late[work.id] = work
        else:
            self._moved.pop(work.id, None)
            self._cursors.pop(work.id, None)
        self._trouble.pop(work.id, None)


__all__ = ["HEADERS", "Tail"]
