"""A connection to a TCP port of a box's own loopback, over the loop's connections to its host: bytes both ways.

In charge of frames and the trailer as `hostd.dials` speaks them. Who may connect where, and what is spoken, is others'.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Self

from hostd import messages
from hosts import ssh
from hosts.files import Exchange

WINDOW: Final = 1024 * 1024
"""Bytes that a server in a box may send before they are read here; also what an unread connection costs in memory."""
READ_BYTES: Final = 256 * 1024
STALL_SECONDS: Final = 600.0
"""For bytes that the server in the box does not take: as long as the host itself waits."""


class Dialled(Exchange):
    """`async with` it, `read` until b"", `write`, `end` when there is no more to write. One reader, one writer."""

    reason: str | None = None
    """How the server ended: end | reset; None while it goes on."""

    _parser: messages.FrameParser
    _pieces: deque[bytes]

    async def __aenter__(self) -> Self:
        """Raises HostRefused (refused: nothing listens there; busy; not_ready; unknown_box), HostUnreachable."""
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def connect(self) -> None:
        """As entering it, for who keeps it; `aclose` then."""
        await self._begin(window=WINDOW)
        self._parser = messages.FrameParser()
        self._pieces = deque()
        self._feed(self._inbox.rest())

    def _feed(self, data: bytes) -> None:
        self._pieces.extend(self._parser.feed(data))
        if self._parser.trailer is not None:
            self.reason = "end" if self._parser.trailer.get("reason") == "end" else "reset"

    async def read(self, size: int = READ_BYTES) -> bytes:
        """Some bytes as they come; b"" once the server has ended (`reason`). `size` is what is asked of the host at
        once. Raises HostUnreachable when the way was cut."""
        assert self._stream is not None
        try:
            while not self._pieces:
                if self.reason is not None:
                    return b""
                data = await self._stream.read(size)
                if not data:
                    raise ssh.ConnectionCut("the connection into the devbox was cut")
                self._feed(data)
        except (ssh.SshError, messages.ProtocolError) as error:
            raise self._unreachable(error) from error
        if len(self._pieces) == 1:
            return self._pieces.popleft()
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    async def write(self, data: bytes) -> None:
        """Send all of it; waits while the server does not take it. Raises HostUnreachable."""
        assert self._stream is not None
        try:
            if self._stream.takes(len(data)):
                await self._stream.write(data)
                return
            async with asyncio.timeout(STALL_SECONDS):
                await self._stream.write(data)
        except (ssh.SshError, TimeoutError) as error:
            raise self._unreachable(error) from error

    def end(self) -> None:
        """Nothing more will be written: the server sees the end of file, and may go on answering."""
        if self._stream is not None:
            self._stream.end()

    @property
    def is_fresh(self) -> bool:
        """Is it open, with nothing said that was not read? What a kept connection must be to be used again."""
        return self.reason is None and not self._pieces and self._stream is not None and self._stream.is_quiet
