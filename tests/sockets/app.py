"""The real ASGI root with a few routes of its own, each there to show one behaviour of the frame on a real server."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
from collections.abc import AsyncIterator
from typing import Any

from config import asgi, websockets  # isort: skip
from channels.generic.websocket import AsyncWebsocketConsumer
from django.urls import path

from api import websockets as api_websockets
from api.asynchronous import Request, Response, Route, Routes, StreamResponse, going_down, json_response
from api.errors import BadRequest, Forbidden
from config.routes import async_routes, websocket_routes
from tests.fake_dials import LocalDials
from tunnels import upstream as tunnels_upstream

seen: dict[str, Any] = {"cancelled": 0, "closed": 0, "sent": 0}


def record(**values: Any) -> None:
    """Leave what happened where the test can read it."""
    seen.update(values)
    folder = pathlib.Path(os.environ["SEEN"])
    (folder / "new").write_text(json.dumps(seen))
    (folder / "new").rename(folder / "seen")


async def echo(request: Request) -> Response:
    body = await request.read(4 << 20)
    return json_response({"length": len(body), "version": request.scope["http_version"], "id": request.params["id"]})


async def hold(request: Request) -> Response:
    await request.json()
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        record(cancelled=seen["cancelled"] + 1)
        raise
    return json_response({})


async def fail(request: Request) -> Response:
    raise RuntimeError("a secret that no client may read")


async def refuse(request: Request) -> Response:
    raise BadRequest("not like this")


async def endless(request: Request) -> StreamResponse:
    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield b"start\n"
            while True:
                if request.query.get("slow"):
                    await asyncio.sleep(0.05)
                yield b"x" * 65536
                seen["sent"] += 65536
                if seen["sent"] % (4 << 20) == 0:
                    record()
        finally:
            record(closed=seen["closed"] + 1)

    return StreamResponse(200, {"content-type": "application/octet-stream"}, chunks())


async def broken(request: Request) -> StreamResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"half of it"
        raise RuntimeError("the source broke")

    return StreamResponse(200, {"content-type": "text/plain"}, chunks())


async def until_down(request: Request) -> StreamResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"data: up\n\n"
        await going_down.wait()
        yield b"data: down\n\n"

    return StreamResponse(200, {"content-type": "text/event-stream"}, chunks())


asgi.routes = Routes(
    [
        *async_routes(),
        Route("POST", "/v1/t/{id}/echo", echo, reads=True),
        Route("POST", "/v1/t/hold", hold),
        Route("GET", "/v1/t/fail", fail),
        Route("GET", "/v1/t/refuse", refuse),
        Route("GET", "/v1/t/endless", endless),
        Route("GET", "/v1/t/broken", broken),
        Route("GET", "/v1/t/until_down", until_down),
    ]
)


class Echo(AsyncWebsocketConsumer):  # type: ignore[misc]  # channels brings no types
    async def connect(self) -> None:
        if self.scope["query_string"] == b"no":
            await api_websockets.refuse(self.base_send, Forbidden("not you"))
            return
        await self.accept(subprotocol=(self.scope["subprotocols"] or [None])[0])

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if text_data == "close from a task":
            self.task = asyncio.ensure_future(self.close(code=4001, reason="as asked"))
        else:
            await self.send(text_data=text_data, bytes_data=bytes_data)

    async def disconnect(self, code: int) -> None:
        record(disconnected=code)


vars(tunnels_upstream)["async_client_for"] = LocalDials
asgi._websocket = websockets.application([path("t/ws", Echo.as_asgi()), *websocket_routes()])
application = asgi.application
