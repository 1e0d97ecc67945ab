"""A client's place at a terminal of a box, over the loop's connections to its host: bytes both ways to the end.

In charge of frames and the trailer as `hostd.terminals` speaks them. Who may attach, and WebSockets, are `pty`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Self

from hostd import messages
from hosts import ssh
from hosts.files import FRAME_BYTES, Exchange

INPUT_SECONDS: Final = 600.0
"""For input that the shell does not read: as long as the host itself waits for a client that takes nothing."""

REPLAY_BYTES: Final = 256 * 1024


class Attached(Exchange):
    """`async with` it, `async for` the output, `write` the input; `reason` says why the output ended."""

    reason: str | None = None
    """exit | closed | takeover | slow | box; None while it goes on."""

    replayed = 0
    """How many of the first bytes are from before; known once it is entered."""

    async def __aenter__(self) -> Self:
        """Raises HostRefused (attached: there is a writer; unknown_id; busy), HostUnreachable."""
        reply = await self._begin()
        start, end = reply.get("offset"), reply.get("end")
        if isinstance(start, int) and isinstance(end, int):
            self.replayed = min(max(0, end - start), REPLAY_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The output as it comes, to its end. Raises HostUnreachable when it was cut."""
        assert self._stream is not None
        parser = messages.FrameParser()
        data = self._inbox.rest()
        try:
            while True:
                for piece in parser.feed(data):
                    yield piece
                if parser.trailer is not None:
                    self.reason = str(parser.trailer.get("reason"))
                    return
                data = await self._stream.read()
                if not data:
                    raise ssh.ConnectionCut("the terminal was cut off")
        except (ssh.SshError, messages.ProtocolError) as error:
            raise self._unreachable(error) from error

    async def write(self, data: bytes) -> None:
        """Input. Waits while the shell does not read. Raises HostUnreachable."""
        assert self._stream is not None
        try:
            async with asyncio.timeout(INPUT_SECONDS):
                for at in range(0, len(data), FRAME_BYTES):
                    await self._stream.write(messages.frame(data[at : at + FRAME_BYTES]))
        except (ssh.SshError, TimeoutError) as error:
            raise self._unreachable(error) from error
