"""Entries of devboxes' logs that nobody waits for: written a moment later, many in one transaction.

In charge of the queue between the event loop, where something happened, and the thread that writes. What an entry is,
and entries that must be true together with something else, are `devboxes.logs`. A process that is killed loses what
it had not written yet, a twentieth of a second's worth.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

from django.db import connection, transaction

from api.stopping import going_down
from api.threads import in_database
from devboxes import logs
from flows.statements import RELAXED

log = logging.getLogger(__name__)

TOGETHER_SECONDS: Final = 0.05
AGAIN_SECONDS: Final = 1.0
WAITING_MAX: Final = 10_000
"""Entries that wait while PostgreSQL is away; later ones are dropped."""


class Notes:
    """What waits to be written, on one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[logs.Entry]] = {}
        self._count = 0
        self._writer: asyncio.Task[None] | None = None

    def add(self, devbox_id: str, entry: logs.Entry) -> None:
        """Have an entry written soon; it happened now. Never waits."""
        if self._count >= WAITING_MAX:
            log.warning(
                "%d entries of logs wait for the database already: one of %s is dropped", self._count, devbox_id
            )
            return
        self._put(devbox_id, [dataclasses.replace(entry, at_ms=entry.at_ms or time.time_ns() // 1_000_000)])
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())

    def _put(self, devbox_id: str, entries: Sequence[logs.Entry]) -> None:
        self._waiting.setdefault(devbox_id, []).extend(entries)
        self._count += len(entries)

    async def _write(self) -> None:
        pause = TOGETHER_SECONDS
        while self._waiting:
            await _rest(pause)
            taken, self._waiting, self._count = self._waiting, {}, 0
            try:
                await in_database(_write_all, taken)
                pause = TOGETHER_SECONDS
            except Exception:
                log.exception("entries of logs could not be written")
                if going_down.is_set():
                    return
                newer, self._waiting, self._count = self._waiting, {}, 0
                for part in (taken, newer):
                    for devbox_id, entries in part.items():
                        self._put(devbox_id, entries)
                pause = AGAIN_SECONDS

    async def finish(self) -> None:
        """Write what waits. To be called once `going_down` has begun."""
        if self._writer is not None:
            await asyncio.wait({self._writer})


async def _rest(seconds: float) -> None:
    """Wait, unless the process is to stop."""
    stopping = asyncio.ensure_future(going_down.wait())
    await asyncio.wait({stopping}, timeout=seconds)
    stopping.cancel()


def _write_all(waiting: Mapping[str, Sequence[logs.Entry]]) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"SELECT {RELAXED}")
        for devbox_id, entries in waiting.items():
            logs.write(cursor, devbox_id, entries)


notes = Notes()
