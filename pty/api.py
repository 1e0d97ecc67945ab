"""The terminals' HTTP operations.

A devbox is named by the host name of a PTY tunnel (then its token is the key to it), or on the API host by the query
parameter `devbox_id` (then an API key is).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode

from django.conf import settings

from api.asynchronous import Request, Response, in_database, json_response
from api.errors import BadRequest, Forbidden
from api.validation import refuse_unknown, validated
from devboxes.services import touch
from pty import services, sessions
from pty.schemas import PtyControlParameters

PROTOCOL_VERSION: Final = "1"


def devbox_id_of(request: Request) -> str:
    """The devbox that a request is for. Raises BadRequest when it names none."""
    found = request.params.get("devbox_id") or request.query.get("devbox_id")
    if not found:
        raise BadRequest("devbox_id: name the devbox by this query parameter, or ask its PTY tunnel's host")
    return found


async def create_pty_tunnel(request: Request) -> Response:
    """A key and a token that open the devbox's terminals for a day."""
    refuse_unknown(await request.json(), frozenset())
    key, token = await in_database(services.create_tunnel, request.caller, request.params["id"])
    await in_database(touch, request.params["id"], "terminal")
    return json_response({"tunnel_key": key, "auth_token": token})


async def connect(request: Request) -> Response:
    """Make the session, or find it. Succeeds while another client is attached: that is decided at the WebSocket."""
    name = sessions.checked_name(request.params["session_name"])
    if request.caller.read_only:  # a GET by the contract, and yet it starts a shell
        raise Forbidden("this API key may only read: attach with mode=view")
    context = await sessions.context_of(request.caller, devbox_id_of(request))
    found = await sessions.open_session(context, name, sessions.size_from_query(request.query))
    url = f"/pty/{name}/attach"
    if "devbox_id" not in request.params:
        url += "?" + urlencode({"devbox_id": context.devbox_id})
    return json_response(
        {
            "session_name": name,
            "status": "ready",
            "protocol_version": PROTOCOL_VERSION,
            "connect_url": url,
            "created": found["created"],
            "attached": found["attached"],
            "cols": found["cols"],
            "rows": found["rows"],
            "idle_ttl_seconds": settings.BERTH.PTY_IDLE_TTL,
        }
    )


async def control(request: Request) -> Response:
    """Resize, signal or close the session."""
    name = sessions.checked_name(request.params["session_name"])
    given = validated(PtyControlParameters, await request.json())
    context = await sessions.context_of(request.caller, devbox_id_of(request))
    await sessions.control_session(context, name, given["action"], given)
    return json_response({"session_name": name, "status": "closed" if given["action"] == "close" else "ready"})
