"""The host name of a PTY tunnel: `13-{tunnel_key}.tunnel.<domain>`, where 13 is no port but the terminals' service.

In charge of recognising it and of serving the terminals' control plane there, by the tunnel's own token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from api.asynchronous import Request, Response, Route, Routes, bearer_token, headers_of, query_of, serve
from api.bodies import Receive, Scope, Send
from api.callers import Caller
from api.errors import NotFound
from api.threads import in_database
from pty import api, services

_HOST = re.compile(r"13-([0-9a-z]{26})\.tunnel\.[a-z0-9.-]+(?::[0-9]{1,5})?", re.IGNORECASE)
_routes = Routes(
    [
        Route("GET", "/pty/{session_name}", api.connect),
        Route("POST", "/pty/{session_name}/control", api.control),
    ]
)


def tunnel_key_of(headers: Mapping[str, str]) -> str | None:
    """The key in the host name, None when it is not a PTY tunnel's."""
    match = _HOST.fullmatch(headers.get("host", ""))
    return match.group(1).lower() if match else None


async def caller_of_tunnel(key: str, headers: Mapping[str, str], query: Mapping[str, str]) -> tuple[Caller, str]:
    """Who comes through that tunnel, and to which devbox. Raises Unauthorized."""
    own = headers.get("x-runloop-tunnel-authorization") or headers.get("authorization")
    token = query.get("token") if own is None else None
    return await in_database(services.authenticate_tunnel, key, token or bearer_token({"authorization": own or ""}))


def is_hosted(scope: Scope) -> bool:
    """Whether a request came to a PTY tunnel's host name. Quick: it is asked of every request."""
    for name, value in scope["headers"]:
        if name == b"host":
            return value[:3] == b"13-" and tunnel_key_of({"host": value.decode("latin-1")}) is not None
    return False


async def serve_hosted(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one HTTP request that came to a PTY tunnel's host name."""
    key = tunnel_key_of(headers_of(scope)) or ""
    route, params = _routes.find(scope["method"], scope["path"]) or (Route(scope["method"], "", _nothing), {})

    async def authenticate(headers: Mapping[str, str]) -> Caller:
        query = query_of(scope)
        caller, params["devbox_id"] = await caller_of_tunnel(key, headers, query)
        return caller

    await serve(route, params, scope, receive, send, authenticate)


async def _nothing(request: Request) -> Response:
    raise NotFound(f"the terminals' service has no {request.method} {request.path[:200]}")
