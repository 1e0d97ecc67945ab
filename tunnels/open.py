"""What is open through tunnels in this process, so that what outlives its tunnel is cut, or would hold up a restart.

In charge of looking every few seconds whether the tunnels that something is open through are still there, and whether
this process is to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from api.errors import ApiError, NotFound, Unavailable
from api.stopping import going_down
from tunnels.doors import doors

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
LEFT_SECONDS: Final = 5.0
"""What is open when this process is told to end has so long to come to its own end."""


class _Open:
    """The tasks at work for each tunnel. Used from one loop at a time."""

    def __init__(self) -> None:
        self.tasks: dict[tuple[str, str], set[asyncio.Task[object]]] = {}
        self.cut: dict[asyncio.Task[object], ApiError] = {}
        self._looker: asyncio.Task[None] | None = None

    def look(self) -> None:
        looker = self._looker
        if looker is None or looker.done() or looker.get_loop() is not asyncio.get_running_loop():
            self._looker = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while self.tasks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await going_down.wait()
            if going_down.is_set():
                await asyncio.sleep(LEFT_SECONDS)
                for tasks in list(self.tasks.values()):
                    self._cut(tasks, Unavailable("this server is being restarted; ask again"))
                return
            for (tunnel_id, key), tasks in list(self.tasks.items()):
                try:
                    door = await doors.find(key)
                except Exception as error:  # the database is away: that closes no door
                    log.warning("whether tunnels are still there could not be read: %s", error)
                    break
                if door is None or door.tunnel_id != tunnel_id:
                    self._cut(tasks, NotFound("the tunnel was removed"))

    def _cut(self, tasks: set[asyncio.Task[object]], why: ApiError) -> None:
        for task in list(tasks):
            self.cut[task] = why
            task.cancel()


_open = _Open()


@contextlib.asynccontextmanager
async def opened(tunnel_id: str, key: str) -> AsyncIterator[None]:
    """While inside, the running task is cancelled when the tunnel or this process goes. Raises NotFound, Unavailable
    then."""
    task = asyncio.current_task()
    assert task is not None
    tasks = _open.tasks.setdefault((tunnel_id, key), set())
    tasks.add(task)
    _open.look()
    try:
        yield
    except asyncio.CancelledError:
        if (why := _open.cut.get(task)) is not None:
            task.uncancel()
            raise why from None
        raise
    finally:
        _open.cut.pop(task, None)
        tasks.discard(task)
        if not tasks:
            _open.tasks.pop((tunnel_id, key), None)
