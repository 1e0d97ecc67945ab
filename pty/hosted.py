"""The host name of a PTY tunnel: `13-{tunnel_key}.tunnel.<domain>`, where 13 is no port but the terminals' service.

In charge of serving the terminals' control plane there, by the tunnel's own token. `api.tunnel_names` reads the name.
"""

from __future__ import annotations

from collections.abc import Mapping

from api.asynchronous import Request, Response, Route, Routes, bearer_token, query_of, serve
from api.bodies import Receive, Scope, Send
from api.callers import Caller
from api.errors import NotFound
from api.threads import in_database
from api.tunnel_names import TERMINALS, tunnel_of
from pty import api, services

_routes = Routes(
    [
        Route("GET", "/pty/{session_name}", api.connect),
        Route("POST", "/pty/{session_name}/control", api.control),
    ]
)


def tunnel_key_of(scope: Scope) -> str | None:
    """The key in the host name, None when it is not a PTY tunnel's."""
    name = tunnel_of(scope)
    return name.key if name is not None and name.port == TERMINALS else None


async def caller_of_tunnel(key: str, headers: Mapping[str, str], query: Mapping[str, str]) -> tuple[Caller, str]:
    """Who comes through that tunnel, and to which devbox. Raises Unauthorized."""
    own = headers.get("x-runloop-tunnel-authorization") or headers.get("authorization")
    token = query.get("token") if own is None else None
    return await in_database(services.authenticate_tunnel, key, token or bearer_token({"authorization": own or ""}))


async def serve_hosted(key: str, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one HTTP request that came to a PTY tunnel's host name."""
    route, params = _routes.find(scope["method"], scope["path"]) or (Route(scope["method"], "", _nothing), {})

    async def authenticate(headers: Mapping[str, str]) -> Caller:
        query = query_of(scope)
        caller, params["devbox_id"] = await caller_of_tunnel(key, headers, query)
        return caller

    await serve(route, params, scope, receive, send, authenticate)


async def _nothing(request: Request) -> Response:
    raise NotFound(f"the terminals' service has no {request.method} {request.path[:200]}")
