"""What comes to the host name of a tunnel, by its kind. The names themselves are read by `api.tunnel_names`."""

from __future__ import annotations

from api.bodies import Receive, Scope, Send
from api.tunnel_names import TunnelName
from tunnels import proxy, websockets


async def serve_http(name: TunnelName, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one HTTP request that came to a tunnel's host name."""
    await proxy.serve(scope, receive, send, port=name.port, key=name.key)


async def serve_websocket(name: TunnelName, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one WebSocket that came to a tunnel's host name."""
    await websockets.serve(scope, receive, send, port=name.port, key=name.key)
