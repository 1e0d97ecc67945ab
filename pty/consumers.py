"""The terminals' WebSocket: raw bytes both ways.

Close codes: 4000 the shell has ended, or the session was closed, or the devbox stopped; 4001 another client took over;
4008 this viewer could not keep up; 1009 a message too long; 1012 the server is being restarted; 1013 the host is away:
come back. A client that stops reading stops the shell, a shell that stops reading stops the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any, Final

from channels.generic.websocket import AsyncWebsocketConsumer

from accounts.caps import limits, open_socket
from api.asynchronous import authenticate, headers_of, query_of
from api.callers import Caller
from api.errors import ApiError, BadRequest, Forbidden, Unauthorized
from api.stopping import going_down
from api.threads import in_database
from api.websockets import refuse
from devboxes.selectors import is_running
from devboxes.services import touch
from hosts.client import HostUnreachable
from pty import sessions
from pty.hosted import caller_of_tunnel, tunnel_key_of

log = logging.getLogger(__name__)

MESSAGE_MAX: Final = 1024 * 1024
TOUCH_SECONDS: Final = 10.0
CODES: Final = {"exit": 4000, "closed": 4000, "box": 4000, "takeover": 4001, "slow": 4008}
RESTARTING: Final = 1012
AWAY: Final = 1013
TOO_LONG: Final = 1009


class TerminalConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]  # channels brings no types
    """One client of a session, from the upgrade to the close."""

    async def connect(self) -> None:
        self._held = contextlib.AsyncExitStack()
        self._pump: asyncio.Task[None] | None = None
        self._place: Any = None
        self._touched = 0.0
        offered = list(self.scope.get("subprotocols") or [])
        try:
            await self._attach(offered)
        except Exception as error:
            await self._held.aclose()
            if not isinstance(error, ApiError):
                log.exception("a terminal could not be attached")
                error = ApiError("the terminal could not be attached")
            await refuse(self.base_send, error)
            return
        await self.accept(subprotocol=offered[0] if offered else None)
        await self._begun()
        self._pump = asyncio.create_task(self._send_output())

    async def _attach(self, offered: list[str]) -> None:
        query = query_of(self.scope)
        caller, devbox_id, name = await self._admitted(offered, query)
        if query.get("mode", "write") not in ("write", "view"):
            raise BadRequest("mode: must be write or view")
        view = query.get("mode") == "view"
        if caller.read_only and not view:
            raise Forbidden("this API key may only read: attach with mode=view")
        cap = (await in_database(limits, caller.account_id)).open_streams
        self._held.enter_context(open_socket(caller.account_id, cap))
        context = await sessions.context_of(caller, devbox_id)
        if not view:
            await sessions.open_session(context, name, sessions.size_from_query(query))
        self._context, self._name = context, name
        self._view = view
        self._place = await self._held.enter_async_context(
            sessions.attached(
                context, name, view=view, takeover=query.get("takeover") == "1", replay=query.get("replay") == "1"
            )
        )

    async def _admitted(self, offered: list[str], query: dict[str, str]) -> tuple[Caller, str, str]:
        """The caller, the devbox and the session's name. Raises ApiError."""
        caller, devbox_id = await _who(self.scope, offered, query)
        return caller, devbox_id, sessions.checked_name(self.scope["url_route"]["kwargs"]["session_name"])

    async def _send_output(self) -> None:
        """Everything the shell writes, until it ends, the client leaves or the server stops."""
        stopping = asyncio.ensure_future(going_down.wait())
        output = asyncio.ensure_future(self._forward())
        try:
            await asyncio.wait({stopping, output}, return_when=asyncio.FIRST_COMPLETED)
            await self.close(code=output.result() if output.done() else RESTARTING)
        finally:
            stopping.cancel()
            output.cancel()
            await self._held.aclose()

    async def _forward(self) -> int:
        try:
            async for data in self._place:
                await self.send(bytes_data=data)
                await self._sent(len(data))
        except HostUnreachable:
            # A box is ended together with who would say so.
            return AWAY if await in_database(is_running, self._context.devbox_id) else CODES["box"]
        return CODES.get(self._place.reason or "", AWAY)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Input: text and binary messages are the same bytes."""
        data = bytes_data if bytes_data is not None else (text_data or "").encode()
        if self._place is None or not data:
            return
        if len(data) > MESSAGE_MAX:
            await self.close(code=TOO_LONG)
            return
        if not self._view:
            with contextlib.suppress(HostUnreachable):  # the output says so
                await self._place.write(data)
            await self._note()

    async def _begun(self) -> None:
        """It is attached."""

    async def _sent(self, size: int) -> None:
        """So many bytes of output went out."""
        await self._note()

    async def _note(self) -> None:
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            await self._used()

    async def _used(self) -> None:
        """It is in use, as every few seconds of use say."""
        await in_database(touch, self._context.devbox_id, "terminal")

    async def disconnect(self, code: int) -> None:
        """The client has gone, or we closed; the session stays."""
        if self._pump is not None and self._pump is not asyncio.current_task():
            self._pump.cancel()
        await self._held.aclose()


async def _who(scope: Any, offered: list[str], query: dict[str, str]) -> tuple[Caller, str]:
    """The caller and the devbox. The token comes as a header, as the subprotocol, or in the query. Raises ApiError."""
    headers = headers_of(scope)
    if "authorization" not in headers and offered:
        headers["authorization"] = f"Bearer {offered[0]}"
    key = tunnel_key_of(scope)
    if key is not None:
        return await caller_of_tunnel(key, headers, query)
    devbox_id = query.get("devbox_id")
    if not devbox_id:
        raise BadRequest("devbox_id: name the devbox by this query parameter, or ask its PTY tunnel's host")
    if "authorization" not in headers:
        raise Unauthorized
    return await authenticate(headers), devbox_id
