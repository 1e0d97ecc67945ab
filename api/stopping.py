"""Whether this process has been asked to stop. Streams and long-polls listen, say so to their client, and end."""

from __future__ import annotations

import asyncio


class GoingDown:
    """Begins once and stays. All on the event loop."""

    def __init__(self) -> None:
        self._begun = False
        self._waiters: set[asyncio.Future[None]] = set()

    def begin(self) -> None:
        self._begun = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def is_set(self) -> bool:
        return self._begun

    async def wait(self) -> None:
        """Returns when the process is to stop."""
        if self._begun:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)


going_down = GoingDown()
