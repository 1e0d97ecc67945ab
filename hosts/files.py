"""A file of a box, read or written over the loop's connections to its host.

In charge of frames, trailers and answers as `hostd.files` speaks them, bounds on silence, and of the answer that comes
before a writer is done. What is asked for is `hosts.client`; what an error means to a caller of the API is theirs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, Self

from hostd import messages
from hosts import conversation, ssh
from hosts.errors import HostUnreachable
from hosts.streams import ASK_SECONDS, begin

if TYPE_CHECKING:
    from hosts.loop_links import LoopLink

STALL_SECONDS: Final = 60.0
"""For a box that neither sends nor takes a byte of a file. Its first answer has ASK_SECONDS, as any call."""
COMMIT_SECONDS: Final = 300.0
"""For a file to take its place once it has arrived: it may have to be copied to another file system of the box."""
FRAME_BYTES: Final = 256 * 1024
SMALL_BYTES: Final = 48 * 1024
"""A file up to this size goes out together with the request."""


def path64(path: bytes) -> str:
    """A path as the wire wants it: a name in a box may have any bytes."""
    return base64.b64encode(path).decode()


class Exchange:
    """One channel that goes on after its first answer, from the request to its end.

    With `box`, a channel kept for that box carries it, and is kept again when the exchange was brought to its end.
    """

    def __init__(self, link: LoopLink, line: bytes, box: str | None = None) -> None:
        self._link, self._line, self._box = link, line, box
        self._held = contextlib.AsyncExitStack()
        self._stream: ssh.LoopStream | None = None
        self._inbox = conversation.Inbox()
        self._complete = False

    async def _begin(self, body: bytes = b"", window: int = ssh.WINDOW) -> dict[str, Any]:
        """Ask, and return the first answer line. Raises HostRefused, HostUnreachable."""
        try:
            await self._held.enter_async_context(self._link.slot(bulk=True))
            deadline = time.monotonic() + ASK_SECONDS
            async with asyncio.timeout(ASK_SECONDS):
                reply = await self._ask(body, deadline, window)
            self._held.callback(self._let_go)
            return reply
        except (ssh.SshError, messages.ProtocolError, TimeoutError) as error:
            await self._held.aclose()
            raise self._unreachable(error) from error
        except BaseException:
            await self._held.aclose()
            raise

    async def _ask(self, body: bytes, deadline: float, window: int) -> dict[str, Any]:
        """A channel that is cut before the first byte of an answer is tried once more, on a fresh one: the same
        request may come twice."""
        for kept_for in (self._box, None):
            try:
                self._stream, self._inbox, reply = await begin(
                    self._link, self._line, body, deadline, bulk=True, window=window, kept_for=kept_for
                )
                return reply
            except ssh.ConnectionCut:
                if kept_for is None:
                    raise
        raise AssertionError("the second try either answers or raises")

    def _let_go(self) -> None:
        assert self._stream is not None
        if self._complete and self._box is not None and self._stream.is_quiet:
            self._link.keep(self._stream, self._box, bulk=True)
        else:
            self._stream.aclose()

    def _unreachable(self, error: Exception) -> HostUnreachable:
        """`error` as the callers know it."""
        late = "the host did not go on with the file in time"
        return HostUnreachable(self._link.host_id, late if isinstance(error, TimeoutError) else str(error))

    async def _line_within(self, seconds: float) -> dict[str, Any]:
        assert self._stream is not None
        async with asyncio.timeout(seconds):
            while (line := self._inbox.line()) is None:
                self._inbox.feed(await self._stream.read())
        return conversation.answer(self._link.host_id, line)

    async def aclose(self) -> None:
        """Give up, or be done. May be called twice. A write that was not finished leaves no trace."""
        await self._held.aclose()


class FileRead(Exchange):
    """`async with` it: `size`, `offset`, `length` and `mtime_ms` are known; then `async for` its bytes."""

    size: int
    offset: int
    length: int
    mtime_ms: int

    async def __aenter__(self) -> Self:
        """Raises HostRefused with a code of files, HostUnreachable."""
        reply = await self._begin()
        try:
            self.size, self.offset, self.length, self.mtime_ms = (
                _whole(reply, name) for name in ("size", "offset", "length", "mtime_ms")
            )
        except messages.ProtocolError as error:
            await self.aclose()
            raise self._unreachable(error) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Exactly `length` bytes. Raises HostUnreachable when fewer or more come."""
        assert self._stream is not None
        parser = messages.FrameParser()
        left = self.length
        data = self._inbox.rest()
        try:
            while True:
                for piece in parser.feed(data):
                    left -= len(piece)
                    if left < 0:
                        raise messages.ProtocolError("more bytes came than were announced")
                    yield piece
                if parser.trailer is not None:
                    break
                async with asyncio.timeout(STALL_SECONDS):
                    data = await self._stream.read(FRAME_BYTES)
                if not data:
                    raise ssh.ConnectionCut("the file was cut before its end")
            if left or parser.trailer.get("complete") is not True:
                raise ssh.ConnectionCut("the file became shorter while it was read")
            self._complete = True
        except (ssh.SshError, messages.ProtocolError, TimeoutError) as error:
            raise self._unreachable(error) from error


class FileWrite(Exchange):
    """`async with` it, `write` the bytes, `finish`; the file is there, whole, once `finish` has returned."""

    _answer: asyncio.Task[dict[str, Any]] | None = None
    _size = 0

    async def __aenter__(self) -> Self:
        """Raises HostRefused with a code of files, HostUnreachable."""
        await self._begin()
        self._answer = asyncio.create_task(self._line_within(24 * 3600.0))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._answer is not None:
            self._answer.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._answer
        await self.aclose()

    async def write(self, data: bytes) -> None:
        """Send some bytes. Raises HostRefused as soon as the box says no (a full disk), HostUnreachable."""
        for at in range(0, len(data), FRAME_BYTES):
            piece = data[at : at + FRAME_BYTES]
            await self._send(messages.frame(piece))
            self._size += len(piece)

    async def finish(self, path: bytes | None = None) -> int:
        """Put the file in its place, at `path` when the request named none. The size in bytes. Raises as `write`."""
        await self._send(_ending(self._size, path))
        size = await self._answered(COMMIT_SECONDS)
        self._complete = True
        return size

    async def _send(self, data: bytes) -> None:
        assert self._stream is not None and self._answer is not None
        sending = asyncio.ensure_future(self._stream.write(data))
        try:
            await asyncio.wait({sending, self._answer}, timeout=STALL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if self._answer.done():
                await self._answered(0)  # it says why it takes no more
                raise HostUnreachable(self._link.host_id, "the box answered before it had the whole file")
            if not sending.done():
                raise TimeoutError
            sending.result()
        except (ssh.SshError, TimeoutError) as error:
            raise self._unreachable(error) from error
        finally:
            sending.cancel()

    async def _answered(self, seconds: float) -> int:
        assert self._answer is not None
        try:
            if not self._answer.done():
                async with asyncio.timeout(seconds):
                    await asyncio.shield(self._answer)
            return _whole(self._answer.result(), "size")
        except (ssh.SshError, messages.ProtocolError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def whole(self, data: bytes) -> int:
        """Write a small file (SMALL_BYTES) in one go, instead of all the above. Raises as the others."""
        frames = messages.frame(data) if data else b""
        await self._begin(frames + _ending(len(data), None))
        try:
            size = _whole(await self._line_within(COMMIT_SECONDS), "size")
            self._complete = True
            return size
        except (ssh.SshError, messages.ProtocolError, TimeoutError) as error:
            raise self._unreachable(error) from error
        finally:
            await self.aclose()


def _ending(size: int, path: bytes | None) -> bytes:
    named = {} if path is None else {"path64": path64(path)}
    return messages.FRAMES_END + messages.encode({"total": size, **named})


def _whole(reply: dict[str, Any], name: str) -> int:
    value = reply.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise messages.ProtocolError(f"{name} is {value!r}")
    return value
