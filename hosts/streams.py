"""Answers that go on: a followed output, for threads and for the loop, and a host's event channel.

In charge of frames, trailers and events as they arrive, and of noticing that nothing arrives because nobody is there.
What is asked for is `hosts.client`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from hostd import messages
from hostd.messages import FollowTrailer
from hosts import conversation, ssh
from hosts.errors import HostUnreachable

if TYPE_CHECKING:
    from hosts.loop_links import LoopLink

ASK_SECONDS: Final = 5.0
"""The longest any call may take, dialling included: no step of a flow blocks over it."""
PROBE_SECONDS: Final = 3.0
"""A followed connection that is silent for so long is asked for a sign of life, three times."""


class Following:
    """A stream followed by a thread: iterate for its bytes, then read `trailer`. Use as a context manager."""

    trailer: FollowTrailer | None
    """Set when the stream ended by itself. A cut raises HostUnreachable instead and leaves it None."""
    start: int | None
    """Where the first byte is in the stream: behind a dropped middle that was asked for."""

    def __init__(
        self,
        host_id: str,
        stream: ssh.ThreadStream,
        inbox: conversation.Inbox,
        start: int | None,
        free: Callable[[], None],
    ) -> None:
        self.host_id = host_id
        self.start = start
        self.trailer = None
        self._stream = stream
        self._free: Callable[[], None] | None = free
        self._parser = messages.FrameParser()
        self._first = inbox.rest()

    def __iter__(self) -> Iterator[bytes]:
        try:
            data = self._first
            while True:
                yield from self._parser.feed(data)
                if self._parser.trailer is not None:
                    self.trailer = cast(FollowTrailer, self._parser.trailer)
                    return
                data = self._next()
                if not data:
                    raise ssh.ConnectionCut("the stream was cut before its end")
        except (ssh.SshError, messages.ProtocolError) as error:
            raise HostUnreachable(self.host_id, str(error)) from error
        finally:
            self.close()

    def _next(self) -> bytes:
        # A command may well say nothing for hours; a connection that gives no sign of life may not.
        transport = self._stream.transport
        while True:
            try:
                return self._stream.recv(time.monotonic() + PROBE_SECONDS)
            except ssh.TimedOut:
                quiet = time.monotonic() - transport.heard_at
                if quiet > 3 * PROBE_SECONDS:
                    raise ssh.ConnectionCut(f"no sign of life for {quiet:.0f} s") from None
                transport.probe()

    def close(self) -> None:
        """Stop following. May be called twice."""
        self._stream.close()
        free, self._free = self._free, None
        if free is not None:
            free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncFollowing:
    """A stream followed in the loop: `async with` it, `async for` its bytes, then read `trailer`."""

    trailer: FollowTrailer | None
    """Set when the stream ended by itself. A cut raises HostUnreachable instead and leaves it None."""

    start: int | None
    """Where the bytes really begin, set before the first one: past the offset asked for when that was dropped."""

    def __init__(self, link: LoopLink, line: bytes) -> None:
        self.trailer = None
        self.start = None
        self._link = link
        self._line = line
        self._stream: ssh.LoopStream | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        host_id = self._link.host_id
        parser = messages.FrameParser()
        try:
            async with self._link.slot(bulk=True):
                stream, inbox, reply = await self._begin()
                self._stream = stream
                self.start = conversation.offset(reply)
                data = inbox.rest()
                while True:
                    pieces = parser.feed(data)
                    if pieces:
                        yield pieces[0] if len(pieces) == 1 else b"".join(pieces)
                    if parser.trailer is not None:
                        self.trailer = cast(FollowTrailer, parser.trailer)
                        return
                    data = await stream.read(ssh.IDLE_WINDOW // 2)  # a slow client holds up to three of these
                    if not data:
                        raise ssh.ConnectionCut("the stream was cut before its end")
        except (ssh.SshError, messages.ProtocolError) as error:
            raise HostUnreachable(host_id, str(error)) from error
        finally:
            await self.aclose()

    async def _begin(self) -> tuple[ssh.LoopStream, conversation.Inbox, dict[str, Any]]:
        deadline = time.monotonic() + ASK_SECONDS
        try:
            async with asyncio.timeout(ASK_SECONDS):
                return await begin(self._link, self._line, b"", deadline, bulk=True, window=ssh.IDLE_WINDOW)
        except TimeoutError:
            raise ssh.TimedOut(f"the host did not answer within {ASK_SECONDS:g} s") from None

    async def aclose(self) -> None:
        """Stop following. May be called twice."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class Watching:
    """The event channel of a host, for one thread: `events`, then `ack` what was committed. A context manager."""

    def __init__(self, host_id: str, stream: ssh.ThreadStream, inbox: conversation.Inbox) -> None:
        self.host_id = host_id
        self._stream = stream
        self._inbox = inbox

    def events(self, timeout: float) -> list[messages.Event]:
        """What came, at least one event; an empty list after `timeout` seconds without any. Raises HostUnreachable."""
        deadline = time.monotonic() + timeout
        try:
            found: list[messages.Event] = []
            while True:
                while (line := self._inbox.line()) is not None:
                    found.append(messages.parse_event(line))
                if found:
                    return found
                self._inbox.feed(self._stream.recv(deadline))
        except ssh.TimedOut:
            return []
        except (ssh.SshError, messages.ProtocolError) as error:
            raise HostUnreachable(self.host_id, str(error)) from error

    def ack(self, pairs: Sequence[tuple[str, str]]) -> None:
        """These (box, id) are committed: the host may forget them. Raises HostUnreachable."""
        deadline = time.monotonic() + ASK_SECONDS
        try:
            for line in messages.acks(pairs):
                self._stream.send(line, deadline)
        except ssh.SshError as error:
            raise HostUnreachable(self.host_id, str(error)) from error

    def close(self) -> None:
        """Stop watching."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


async def begin(
    link: LoopLink,
    line: bytes,
    body: bytes,
    deadline: float,
    *,
    bulk: bool,
    window: int,
    kept_for: str | None = None,
) -> tuple[ssh.LoopStream, conversation.Inbox, dict[str, Any]]:
    """Open a channel, or with `kept_for` take one that was kept for that box; send, read the reply line. The caller
    closes the stream; on errors it is closed here."""
    stream = await link.open(deadline, bulk=bulk, window=window, kept_for=kept_for)
    try:
        inbox = conversation.Inbox()
        await stream.write(line + body)
        while (answer := inbox.line()) is None:
            inbox.feed(await stream.read(1 << 18))
        try:
            reply = conversation.answer(link.host_id, answer)
        finally:
            link.breaker.worked()
        return stream, inbox, reply
    except BaseException:
        stream.aclose()
        raise
