"""The newest entries of a devbox's log, from all sources, in order.

In charge of: how much is read of what, and what is left out when there is more than one answer may hold: the oldest,
with one entry that says so. Not in charge of: following a log (`devboxes.log_tail`), HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from api.threads import in_database
from devboxes.log_lines import LATER, LogEntry
from devboxes.log_sources import Scope, newest_events, sources
from devboxes.log_works import Cursor, Output, Work, host_output, late_output, newest
from devboxes.log_works import Told as Lines
from hosts.client import AsyncHostClient, HostError, HostRefused, async_client_for

log = logging.getLogger(__name__)

ANSWER_BYTES: Final = 4 * 1024 * 1024
"""What the entries of one answer may weigh."""
WORKS_AT_ONCE: Final = 8
MOVED_PAUSES: Final = (0.02, 0.2)
"""Seconds before an output that could not be read is looked for again."""

Told = Mapping[str, Any]
"""A command's line of the host's `sizes`."""


@dataclass(slots=True)
class Found:
    """Entries in order. `left_out`: there are older ones. `cursors`: how far each command that may go on was told;
    `over`: the commands that were told to their end; `events`: the places of entries that are no command's.
    `silent`: the host could not be asked about what runs."""

    entries: list[LogEntry] = field(default_factory=list)
    left_out: bool = False
    cursors: dict[str, Cursor] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    events: set[tuple[int, ...]] = field(default_factory=set)
    silent: bool = False


async def read_newest(scope: Scope, limit: int, *, whole: bool) -> Found:
    """The newest `limit` entries. A line that is not at its end yet is told if `whole`; who follows waits for it.

    Raises what the database raises; of commands whose output cannot be had, an entry says so.
    """
    found = Found()
    # Before the rows: what completes in between is in both, and never in neither.
    moving, found.silent = await moving_on_host(scope)
    events = await in_database(newest_events, scope, limit + 1)
    found.left_out = len(events) > limit
    found.entries = events[:limit]
    found.events = {event.place for event in events}
    works: list[Work] = []
    for source in sources():
        works += await in_database(source.newest, scope, limit + 1)
    queue = sorted(_candidates(works, moving), key=lambda pair: pair[0], reverse=True)
    if len(works) > limit:
        found.left_out = True
    client = async_client_for(scope.host_id) if scope.host_id is not None else None
    for at in range(0, len(queue), WORKS_AT_ONCE):
        batch = queue[at : at + WORKS_AT_ONCE]
        if _is_full(found.entries, limit, batch[0][0]):
            found.left_out = True
            found.over |= {work.id for _, work in queue[at:] if work.ended_ms is not None}
            break
        told = await asyncio.gather(
            *(_newest_of(scope, client, work, moving.get(work.id), limit, whole, found) for _, work in batch)
        )
        for entries in told:
            found.entries += entries
    found.entries.sort(key=lambda entry: entry.order)
    _shorten(found, limit)
    if found.silent:
        found.entries.append(notice("the host does not answer: output of running commands may be missing", "error"))
    return found


def notice(message: str, level: str = "warning", at_ms: int | None = None) -> LogEntry:
    """An entry of ours about the log itself."""
    return LogEntry(int(time.time() * 1000) if at_ms is None else at_ms, "exec", level, message=message)


async def moving_on_host(scope: Scope) -> tuple[dict[str, Told], bool]:
    """What runs in the box or wrote after its exit, by id, and whether its host could not be asked."""
    if scope.host_id is None or scope.done:
        return {}, False
    try:
        told = await async_client_for(scope.host_id).sizes(box=scope.devbox_id)
    except HostRefused as error:
        # No box, or none yet, has nothing that runs; a keeper of an earlier release cannot tell.
        return {}, error.code not in ("unknown_box", "not_ready", "lost")
    except HostError:
        return {}, True
    return {entry["id"]: entry for entry in told if scope.takes(entry["id"])}, False


def _candidates(works: Sequence[Work], moving: Mapping[str, Told]) -> list[tuple[float, Work]]:
    """Commands with the latest time that an entry of theirs may have."""
    found: list[tuple[float, Work]] = []
    for work in works:
        there = moving.get(work.id)
        if there is not None and work.source == "exec" and work.cmd is None:
            continue  # what was kept of its late output, while the host still has it
        ended_ms = None if there is not None and any(there["late"]) else work.ended_ms
        found.append((float("inf") if ended_ms is None else ended_ms, work))
    return found


def _is_full(entries: Sequence[LogEntry], limit: int, next_ms: float) -> bool:
    """Whether no entry up to `next_ms` can be among the newest."""
    if sum(entry.weight for entry in entries) > 4 * ANSWER_BYTES:
        return True
    if len(entries) < limit:
        return False
    return sorted((entry.at_ms for entry in entries), reverse=True)[limit - 1] > next_ms


def _shorten(found: Found, limit: int) -> None:
    """Leave out the oldest over the bounds, with an entry that says so."""
    room, first = ANSWER_BYTES, len(found.entries)
    while first > 0 and len(found.entries) - first < limit and room > 0:
        first -= 1
        room -= found.entries[first].weight
    if room <= 0:
        first += 1
    if first > 0 or found.left_out:
        found.left_out = True
        kept = found.entries[first:]
        at_ms = kept[0].at_ms if kept else None
        told = f"[older entries are left out: an answer has the newest {limit} and {ANSWER_BYTES >> 20} MiB at most]"
        found.entries = [notice(told, at_ms=at_ms), *kept]


async def _newest_of(
    scope: Scope, client: AsyncHostClient | None, work: Work, there: Told | None, limit: int, whole: bool, found: Found
) -> list[LogEntry]:
    """The newest entries of one command; notes in `found` how far they go."""
    cursor = Cursor()
    entries: list[LogEntry] = []
    try:
        if work.ended_ms is None:
            if there is None or client is None:
                return []
            output, work.began_ms = await host_output(client, scope.devbox_id, work.id)
            told = await newest(work, output, cursor.told, limit, whole=whole)
        else:
            told, cursor = await _newest_kept(work, limit)
        entries = told.entries
        if told.left_out:
            found.left_out = True
        else:
            entries = [*work.beginning(work.began_ms or work.ended_ms or 0), *entries]
        cursor.begun = True
        if work.ended_ms is not None:
            entries += work.ending()
            if there is not None and any(there["late"]) and client is not None:
                output = await late_output(client, scope.devbox_id, work.id)
                entries += (await newest(work, output, cursor.late, limit, whole=whole, phase=LATER)).entries
    except HostError as error:
        log.info("the log of %s: the output of %s cannot be read: %s", scope.devbox_id, work.id, error)
        found.silent = found.silent or work.ended_ms is None
    except Exception as error:  # of S3, for one
        log.warning("the log of %s: the output of %s cannot be read: %r", scope.devbox_id, work.id, error)
        entries = [
            *work.beginning(work.began_ms or 0),
            work.entry(work.ended_ms or 0, (1,), level="error", message=GONE),
        ]
        if work.ended_ms is not None:
            entries += work.ending()
    if work.ended_ms is None or any(cursor.late):
        found.cursors[work.id] = cursor
    if work.ended_ms is not None:
        found.over.add(work.id)
    return entries


async def _newest_kept(work: Work, limit: int) -> tuple[Lines, Cursor]:
    """The newest of one that has completed. Its output may move from host to S3 between looking where it is and
    reading it, so it is looked for again. Raises what the last try raised."""
    for pause in (*MOVED_PAUSES, None):
        cursor = Cursor()
        try:
            kept = await work.output() if work.output is not None else None
            return await newest(work, kept or _EMPTY, cursor.told, limit, whole=True), cursor
        except Exception:
            if pause is None:
                raise
            await asyncio.sleep(pause)
    raise AssertionError("the last try has returned or raised")


GONE: Final = "[its output cannot be read at the moment]"


async def _nothing(stream: int, start: int, length: int) -> tuple[int, bytes]:
    return start, b""


_EMPTY: Final = Output((0, 0), None, _nothing)
