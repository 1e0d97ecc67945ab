"""What is open through tunnels in this process, so that what outlives its tunnel is cut.

In charge of looking every few seconds whether the tunnels that something is open through are still there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from api.errors import NotFound
from tunnels.doors import doors

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0


class _Open:
    """The tasks at work for each tunnel. Used from one loop at a time."""

    def __init__(self) -> None:
        self.tasks: dict[tuple[str, str], set[asyncio.Task[object]]] = {}
        self.cut: set[asyncio.Task[object]] = set()
        self._looker: asyncio.Task[None] | None = None

    def look(self) -> None:
        looker = self._looker
        if looker is None or looker.done() or looker.get_loop() is not asyncio.get_running_loop():
            self._looker = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while self.tasks:
            await asyncio.sleep(LOOK_SECONDS)
            for (tunnel_id, key), tasks in list(self.tasks.items()):
                try:
                    door = await doors.find(key)
                except Exception as error:  # the database is away: that closes no door
                    log.warning("whether tunnels are still there could not be read: %s", error)
                    break
                if door is None or door.tunnel_id != tunnel_id:
                    for task in list(tasks):
                        self.cut.add(task)
                        task.cancel()


_open = _Open()


@contextlib.asynccontextmanager
async def opened(tunnel_id: str, key: str) -> AsyncIterator[None]:
    """While inside, the running task is cancelled when the tunnel goes. Raises NotFound then."""
    task = asyncio.current_task()
    assert task is not None
    tasks = _open.tasks.setdefault((tunnel_id, key), set())
    tasks.add(task)
    _open.look()
    try:
        yield
    except asyncio.CancelledError:
        if task in _open.cut:
            task.uncancel()
            raise NotFound("the tunnel was removed") from None
        raise
    finally:
        _open.cut.discard(task)
        tasks.discard(task)
        if not tasks:
            _open.tasks.pop((tunnel_id, key), None)
