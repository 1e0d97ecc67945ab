"""Reading request bodies off an ASGI connection, bounded in size, in time between bytes and in sum over a process.

Large answers count in that sum, too, while they are being sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from django.conf import settings

from api.errors import ApiError, BadRequest, TooLarge, Unavailable

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_held = 0


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def cut_off() -> BadRequest:
    """The answer to who cannot hear it any more, or has sent chunks that are none: the server tells neither apart."""
    return BadRequest("the request ended before its body was complete, or its chunks are malformed")


class BodyTooSlow(ApiError):
    status = 408
    code = "body_timeout"


class Body:
    """The body of one request. What has been read counts against the process's budget until ``release``."""

    def __init__(self, receive: Receive, declared: int | None) -> None:
        self._receive = receive
        self.declared = declared
        self.finished = asyncio.Event()
        self._taken = 0

    async def chunks(self, limit: int) -> AsyncIterator[bytes]:
        """The body as it comes, not counted against the budget: who streams must not collect.

        Raises TooLarge, BodyTooSlow (BODY_IDLE seconds without a byte), ClientGone.
        """
        if self.declared is not None and self.declared > limit:
            raise too_large(limit)
        size = 0
        while not self.finished.is_set():
            try:
                async with asyncio.timeout(settings.BERTH.BODY_IDLE):
                    message = await self._receive()
            except TimeoutError:
                raise BodyTooSlow(f"no byte of the body came for {settings.BERTH.BODY_IDLE:g} s") from None
            if message["type"] != "http.request":
                raise ClientGone
            if not message.get("more_body", False):
                self.finished.set()
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            if chunk:
                yield chunk

    async def read(
        self, limit: int, *, pause_at: int | None = None, pause: Callable[[], Awaitable[None]] | None = None
    ) -> bytes:
        """The whole body, at most ``limit`` bytes of it.

        ``pause`` is awaited once before more than ``pause_at`` bytes are accepted: the place to ask who is sending.
        Raises what ``chunks`` raises, and Unavailable when all bodies together would exceed BODY_BUDGET.
        """
        if pause is not None and pause_at is not None and (self.declared or 0) > pause_at:
            await pause()
            pause = None
        parts: list[bytes] = []
        async for chunk in self.chunks(limit):
            self._take(len(chunk))
            parts.append(chunk)
            if pause is not None and pause_at is not None and self._taken > pause_at:
                await pause()
                pause = None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def take_for_answer(self, count: int) -> None:
        """Count a large answer, too, until it has been sent: clients that do not read must not fill the memory.

        Raises Unavailable when there is no room beside what other requests hold; one alone always has room.
        """
        global _held
        if _held > self._taken and _held + count > settings.BERTH.BODY_BUDGET:
            raise Unavailable("too many large answers are being sent at once; try again shortly")
        _held += count
        self._taken += count

    def _take(self, count: int) -> None:
        global _held
        if _held + count > settings.BERTH.BODY_BUDGET:
            raise Unavailable("too many large requests are being received at once; try again shortly")
        _held += count
        self._taken += count

    def release(self) -> None:
        """Give the bytes back to the budget. Safe to call twice."""
        global _held
        _held -= self._taken
        self._taken = 0


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {limit} bytes this operation takes")


def declared_length(headers: dict[str, str]) -> int | None:
    """The content length a client announced, if it did."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise BadRequest("content-length is not a number")
    return int(text)
