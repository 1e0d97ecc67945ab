"""The HTTP operation of SSH."""

from __future__ import annotations

from api.asynchronous import Request, Response, in_database, json_response
from api.validation import refuse_unknown
from devboxes.services import touch
from ssh_access import services


async def create_ssh_key(request: Request) -> Response:
    """A key pair that opens the devbox to SSH for a day."""
    refuse_unknown(await request.json(), frozenset())
    made = await in_database(services.create_key, request.caller, request.params["id"])
    await in_database(touch, made.devbox_id, "ssh")
    return json_response(
        {"id": made.devbox_id, "url": made.url, "ssh_private_key": made.private_key, "ssh_user": made.user}
    )
