"""The WebSocket of the web terminal: that of any terminal, for an operator's browser.

Binary messages are input and output. Text messages are about them: from the page `{"resize": [cols, rows]}` and
`{"taken": bytes}` (what its screen has worked off: a browser reads on whatever its page can bear, so the page says it
itself); to the page `{"replay": bytes}`, how many of the first bytes are from before: questions to the terminal among
them were answered then, and another answer would be typed into the shell.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import orjson

from api.asynchronous import headers_of
from api.callers import Caller
from api.errors import ApiError, Unauthorized
from api.threads import in_database
from pty import operators, sessions
from pty.consumers import TerminalConsumer

AHEAD_MAX: Final = 512 * 1024
"""Bytes that a page has not worked off yet, above which it gets no more."""
TEXT_MAX: Final = 200
SIGNED_OUT: Final = 4003
NONSENSE: Final = 1003


class WebTerminalConsumer(TerminalConsumer):
    """One connection of one page."""

    async def _admitted(self, offered: list[str], query: dict[str, str]) -> tuple[Caller, str, str]:
        self._headers = headers_of(self.scope)
        self._ahead, self._room = 0, asyncio.Event()
        operators.check_origin(self._headers)
        params = self.scope["url_route"]["kwargs"]
        name = sessions.checked_name(params["session_name"])
        if not offered:
            raise Unauthorized("the ticket is missing")
        caller = await in_database(operators.use_ticket, self._headers, offered[0], params["devbox_id"])
        return caller, params["devbox_id"], name

    async def _begun(self) -> None:
        await super()._begun()
        await self.send(text_data=orjson.dumps({"replay": self._place.replayed}).decode())

    async def _sent(self, size: int) -> None:
        await super()._sent(size)
        self._ahead += size
        while self._ahead > AHEAD_MAX:
            self._room.clear()
            await self._room.wait()

    async def _used(self) -> None:
        await super()._used()
        try:
            await in_database(operators.operator_of, self._headers)
        except ApiError:
            await self.close(code=SIGNED_OUT)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Input, or a word about it."""
        if text_data is None:
            await super().receive(None, bytes_data)
        elif not await self._told(text_data):
            await self.close(code=NONSENSE)

    async def _told(self, text: str) -> bool:
        """Do what the page asks for; False when it makes no sense."""
        try:
            said: Any = orjson.loads(text) if len(text) <= TEXT_MAX else None
        except orjson.JSONDecodeError:
            return False
        match said:
            case {"taken": int(taken)} if 0 <= taken <= self._ahead:
                self._ahead -= taken
                self._room.set()
            case {"resize": [int(cols), int(rows)]}:
                with contextlib.suppress(ApiError):  # a size that is none, or a session that has just ended
                    await sessions.control_session(self._context, self._name, "resize", {"cols": cols, "rows": rows})
            case _:
                return False
        return True
