"""What every WebSocket endpoint shares: a refusal of the upgrade that says why."""

from __future__ import annotations

import orjson

from api.bodies import Send
from api.errors import ApiError


async def refuse(send: Send, error: ApiError) -> None:
    """Answer an upgrade with an HTTP error: exactly one body message, or the client sees a bare 403."""
    body = orjson.dumps(error.body())
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": head})
    await send({"type": "websocket.http.response.body", "body": body})
