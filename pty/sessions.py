"""Terminal sessions of a devbox: opened, resized, signalled, closed, attached to.

In charge of what a caller may ask and of saying the host's errors in the API's words. The sessions live on the host
(`hostd.terminals`); HTTP is `pty.api`, WebSockets are `pty.consumers`.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal as signals
from collections.abc import Iterator, Mapping
from typing import Any, Final

import orjson
from django.conf import settings

from api.callers import Caller
from api.errors import ApiError, BadRequest, Conflict, NotFound, Unavailable
from api.threads import in_database
from devboxes import selectors as devboxes
from devboxes.selectors import ExecutionContext
from devboxes.services import use_running
from hosts.client import HostRefused, HostUnreachable, async_client_for
from hosts.terminals import Attached

log = logging.getLogger(__name__)

CELLS_MAX: Final = 1000
TERM: Final = "xterm-256color"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,256}")
_NUMBER = re.compile(r"[0-9]{1,4}")


def checked_name(name: str) -> str:
    """A session's name. Raises BadRequest for what is none."""
    if _NAME.fullmatch(name) is None:
        raise BadRequest("session_name: 1 to 256 of A-Z a-z 0-9 - _ are allowed")
    return name


def size_from_query(query: Mapping[str, str]) -> dict[str, int]:
    """`cols` and `rows` when both are there and possible, else nothing: they are ignored then."""
    cols, rows = query.get("cols", ""), query.get("rows", "")
    if not (_NUMBER.fullmatch(cols) and _NUMBER.fullmatch(rows)):
        return {}
    size = {"cols": int(cols), "rows": int(rows)}
    return size if all(1 <= cells <= CELLS_MAX for cells in size.values()) else {}


@contextlib.contextmanager
def _told(context: ExecutionContext, name: str) -> Iterator[None]:
    try:
        yield
    except HostUnreachable as error:
        log.info("a terminal of %s could not go on: %s", context.devbox_id, error)
        raise Unavailable(f"the host of devbox {context.devbox_id} does not answer; try again shortly") from error
    except HostRefused as error:
        match error.code:
            case "unknown_id":
                raise NotFound(f"devbox {context.devbox_id} has no terminal session {name[:80]}") from error
            case "attached":
                raise Conflict(f"terminal session {name[:80]} has a client attached", code="attached") from error
            case "busy" | "not_ready" | "unknown_box" | "lost" | "no_space":
                raise Unavailable(f"the terminal cannot be opened at the moment: {error.message}") from error
            case "bad_request" | "box_io":
                raise BadRequest(error.message, code=error.code) from error
        raise ApiError(f"the host of devbox {context.devbox_id} could not do it: {error.message}") from error


async def context_of(caller: Caller, devbox_id: str) -> ExecutionContext:
    """The running devbox. Raises NotFound, BadRequest when it does not run."""
    return await in_database(use_running, caller, devbox_id, "terminals are there", "terminal")


async def open_session(context: ExecutionContext, name: str, size: Mapping[str, int]) -> dict[str, Any]:
    """Make the session, or find it: the host's {created, attached, cols, rows}."""
    environment = await in_database(devboxes.environment, context.devbox_id)
    body = orjson.dumps({"user": context.user, "env": {"TERM": TERM, **environment}})
    with _told(context, name):
        reply: dict[str, Any] = await async_client_for(context.host_id or "").terminal(
            box=context.devbox_id, op="open", session=name, body=body, ttl=settings.BERTH.PTY_IDLE_TTL, **size
        )
    return reply


async def control_session(context: ExecutionContext, name: str, action: str, given: Mapping[str, Any]) -> None:
    """Resize, signal or close it. Raises BadRequest, NotFound."""
    fields: dict[str, Any] = {}
    if action == "resize":
        for side in ("cols", "rows"):
            value = given.get(side)
            if value is None or not 1 <= value <= CELLS_MAX:
                raise BadRequest(f"{side}: resize needs 1 to {CELLS_MAX}")
            fields[side] = value
    elif action == "signal":
        fields["signal"] = _signal(given.get("signal"))
    with _told(context, name):
        await async_client_for(context.host_id or "").terminal(box=context.devbox_id, op=action, session=name, **fields)


def _signal(name: str | None) -> int:
    found = getattr(signals.Signals, name, None) if name and name.startswith("SIG") else None
    if found is None or not 1 <= found <= 31:
        raise BadRequest(f"signal: {str(name)[:40]!r} is no signal's name, such as SIGTERM")
    return int(found)


@contextlib.asynccontextmanager
async def attached(context: ExecutionContext, name: str, *, view: bool, takeover: bool, replay: bool) -> Any:
    """A place at the session. Raises Conflict when another client writes, NotFound, Unavailable."""
    place: Attached = async_client_for(context.host_id or "").attach(
        box=context.devbox_id, session=name, view=view, takeover=takeover, replay=replay
    )
    with _told(context, name):
        await place.__aenter__()
    try:
        yield place
    finally:
        await place.aclose()
