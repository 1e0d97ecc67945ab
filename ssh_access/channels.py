"""What every channel of a client does: bytes queue up within bounds on their way in, and wait for room on the way out.

In charge of backpressure both ways and of half-closed channels. What is at the other end is `sessions` and `forwards`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import asyncssh

from accounts.caps import open_socket

QUEUE_BYTES: Final = 256 * 1024
"""What a channel's client has sent and the box has not taken; after that it is not read from."""
WRITE_BYTES: Final = 256 * 1024
"""What waits for a client in a channel; after that the box is not read from."""


class Channelled:
    """The part of a session that does not know what it is for. Everything runs in the loop."""

    def __init__(self, room: asyncio.Event) -> None:
        """`room`: set while the connection as a whole takes more."""
        self._room = room
        self._chan: Any = None
        self.is_over = False
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._ended = False
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.held = contextlib.AsyncExitStack()

    def hold_place(self, account_id: str, cap: int) -> None:
        """Count as one of the account's open streams. Raises TooManyRequests."""
        self.held.enter_context(open_socket(account_id, cap))

    def begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run it for as long as the channel is there."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- called by asyncssh

    def connection_made(self, chan: Any) -> None:
        """The channel is open."""
        self._chan = chan
        chan.set_write_buffer_limits(high=WRITE_BYTES)

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """Bytes of the client's; they may come before there is anything that takes them."""
        self._queue.append(data)
        self._queued += len(data)
        self._arrived.set()
        if self._queued >= QUEUE_BYTES:
            self._chan.pause_reading()

    def eof_received(self) -> bool:
        """The client has no more to say; it still listens."""
        self._ended = True
        self._arrived.set()
        return True

    def pause_writing(self) -> None:
        """Its window is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It has room again."""
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is closed, by whomever."""
        self._chan = None
        self.is_over = True
        for task in self._tasks:
            task.cancel()
        cleaning = asyncio.get_running_loop().create_task(self._clean_up())
        _cleaning.add(cleaning)
        cleaning.add_done_callback(_cleaning.discard)

    async def _clean_up(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.held.aclose()

    # --- called by what it is for

    async def carry_in(self, write: Callable[[bytes], Awaitable[None]], end: Callable[[], Awaitable[None]]) -> None:
        """All that the client sends, then its end."""
        while True:
            while self._queue:
                data = self._queue.popleft()
                self._queued -= len(data)
                await write(data)
                if self._queued < QUEUE_BYTES // 2 and self._chan is not None:
                    self._chan.resume_reading()
            if self._ended and not self._queue:
                await end()
                return
            self._arrived.clear()
            if not self._queue and not self._ended:
                await self._arrived.wait()

    async def carry_out(self, data: bytes, datatype: int | None = None) -> None:
        """Bytes for the client. Waits while it takes none."""
        await self._room.wait()
        await self._writable.wait()
        if self._chan is not None:
            with contextlib.suppress(BrokenPipeError):  # closing, as `connection_lost` is about to say
                self._chan.write(data, datatype)

    def refuse(self, why: str, code: int = 255) -> None:
        """End the channel with an explanation."""
        if self._chan is not None:
            with contextlib.suppress(OSError):
                self._chan.write(f"berth: {why}\r\n".encode(), asyncssh.EXTENDED_DATA_STDERR)
                self._chan.exit(code)


_cleaning: set[asyncio.Task[None]] = set()
