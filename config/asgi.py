"""The ASGI root: a small dispatcher, run by Granian on one port for HTTP/1.1, HTTP/2 and WebSocket.

WebSockets go to Channels, the async routes stay on the event loop, everything else goes to Django in a bounded pool of
threads. The table of async routes comes first, so a DRF view on the same URL serves the schema only.
"""

from __future__ import annotations

import logging
import os

import config  # noqa: F401  (settles the name ``pty``)

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

import django

django.setup(set_prefix=False)

from django.conf import settings
from django.urls import get_resolver

from api import collecting
from api.asynchronous import Routes, serve
from api.bodies import Receive, Scope, Send
from api.stopping import going_down
from api.tunnel_names import NOBODYS, TERMINALS, tunnel_of
from api.waiting import hub
from config import checks, stopping, websockets
from config.routes import async_routes, websocket_routes
from config.wsgi_bridge import Bridge
from devboxes.log_notes import notes
from pty.hosted import serve_hosted
from tunnels import hosted

log = logging.getLogger("config.asgi")

if refused := [problem for problem in checks.problems() if problem.is_serious()]:
    raise SystemExit("\n".join(f"not serving: {problem.msg}" for problem in refused))

# A request that waits longer than this for PostgreSQL would only hold its thread; migrations may take what they need.
_options = settings.DATABASES["default"]["OPTIONS"]
_options["options"] = (
    f"{_options.get('options', '')} -c statement_timeout=20s -c idle_in_transaction_session_timeout=30s"
)

stopping.listen_for_stop()
bridge = Bridge()
routes = Routes(async_routes())
_websocket = websockets.application(websocket_routes())


async def _into_devbox(scope: Scope, receive: Receive, send: Send) -> None:
    await hosted.serve_websocket(tunnel_of(scope) or NOBODYS, scope, receive, send)


_tunnelled = websockets.closing_safely(_into_devbox)
_ = get_resolver().url_patterns  # imported now, not by the first request


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    kind = scope["type"]
    if kind == "http":
        name = tunnel_of(scope)
        if name is not None:
            if name.port == TERMINALS:
                await serve_hosted(name.key, scope, receive, send)
            else:
                await hosted.serve_http(name, scope, receive, send)
            return
        found = routes.find(scope["method"], scope["path"])
        if found is not None:
            await serve(*found, scope, receive, send)
        else:
            await bridge(scope, receive, send)
    elif kind == "websocket":
        name = tunnel_of(scope)
        if name is None or name.port == TERMINALS:
            await _websocket(scope, receive, send)
        else:
            await _tunnelled(scope, receive, send)
    elif kind == "lifespan":
        await _lifespan(receive, send)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            collecting.begin()
            hub.start()
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            going_down.begin()
            await hub.stop()
            await notes.finish()
            await send({"type": "lifespan.shutdown.complete"})
            return
