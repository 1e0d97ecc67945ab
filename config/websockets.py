"""WebSockets: Channels' router inside a wrapper that makes closing safe on our server.

On Granian, sending ``websocket.close`` hangs while another task awaits ``receive()``, and a producer without a pending
``receive()`` never learns that its client has gone. So the wrapper owns the pending receive: it cancels it before a
close frame goes out, and reports the disconnect only after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from channels.routing import URLRouter

from api.bodies import Message, Receive, Scope, Send
from api.errors import NotFound
from api.websockets import refuse

Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def closing_safely(application: Application) -> Application:
    """``application`` with a receive that a close may interrupt."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        pending: asyncio.Future[Message] | None = None
        closing, closed = False, asyncio.Event()
        code = 1005

        async def safe_receive() -> Message:
            nonlocal pending
            if not closing:
                pending = mine = asyncio.ensure_future(receive())
                try:
                    return await mine
                except asyncio.CancelledError:
                    if not closing:  # our caller was cancelled, not we by the close below
                        mine.cancel()
                        raise
            await closed.wait()
            return {"type": "websocket.disconnect", "code": code}

        async def safe_send(message: Message) -> None:
            nonlocal closing, code
            if message["type"] != "websocket.close":
                return await send(message)
            closing, code = True, message.get("code", 1000)
            try:
                if pending is not None and not pending.done():
                    pending.cancel()
                    await asyncio.wait([pending], timeout=1)
                    await asyncio.sleep(0.05)  # the server lets go of the receive a moment after it was cancelled
                await send(message)
            finally:
                closed.set()

        await application(scope, safe_receive, safe_send)

    return wrapped


def application(routes: list[Any]) -> Application:
    """The WebSocket half of the ASGI root: Channels consumers by path, 404 for any other."""
    router: Any = URLRouter(routes)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await router(dict(scope), receive, send)
        except ValueError as error:
            if "No route found" not in str(error):
                raise
            await receive()
            await refuse(send, NotFound("there is no WebSocket here"))

    return closing_safely(routed)
