"""HTTP for a devbox's log: what there is, and following it.

In charge of: parameters, access, the shape of the answer. Not in charge of: what is in a log (`devboxes.log_reading`,
`devboxes.log_tail`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from django.conf import settings
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response

from accounts.caps import limits
from api import asynchronous
from api.asynchronous import StreamResponse, in_database, json_response
from api.errors import BadRequest
from api.schema import problem
from api.views import AsyncElsewhere
from devboxes import log_tail, schemas
from devboxes.log_reading import read_newest
from devboxes.log_sources import Scope, scope_of

NAME_MAX = 255


def _limit(request: asynchronous.Request) -> int:
    most: int = settings.BERTH.LOGS_MAX
    text = request.query.get("limit")
    if text is None:
        return most
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise BadRequest("limit: must be a whole number")
    return max(1, min(int(text), most))


def _reader(request: asynchronous.Request) -> Callable[[], Scope]:
    named: dict[str, str | None] = {name: request.query.get(name) for name in ("execution_id", "shell_name")}
    for name, value in named.items():
        if value is not None and (len(value) > NAME_MAX or "\0" in value):
            raise BadRequest(f"{name}: must be at most {NAME_MAX} characters without NUL")
    return partial(scope_of, request.caller, request.params["id"], named["execution_id"], named["shell_name"])


async def list_logs(request: asynchronous.Request) -> asynchronous.Response:
    """The newest entries, in order."""
    limit, read = _limit(request), _reader(request)
    found = await read_newest(await in_database(read), limit, whole=True)
    return json_response({"logs": [entry.view() for entry in found.entries]})


async def tail_logs(request: asynchronous.Request) -> StreamResponse:
    """The newest entries, then each as it comes, as server-sent events."""
    limit, read = _limit(request), _reader(request)
    await in_database(read)
    cap = (await in_database(limits, request.caller.account_id)).open_streams
    return StreamResponse(200, log_tail.HEADERS, log_tail.Tail(request.caller.account_id, cap, read, limit))


_PARAMETERS = [
    OpenApiParameter("execution_id", OpenApiTypes.STR, description="Only what belongs to this execution."),
    OpenApiParameter("shell_name", OpenApiTypes.STR, description="Only what belongs to this named shell."),
    OpenApiParameter("limit", OpenApiTypes.INT, description="How many of the newest entries; 5000 if not given."),
]
_TAGS = ["Devbox"]


class Logs(AsyncElsewhere):
    """Schema of `logs`."""

    @extend_schema(
        operation_id="listDevboxLogs",
        summary="Get a devbox's log",
        description="Of launch work, commands, files, the devbox's figures and its kernel, in the order of their "
        "times, at once and also after the devbox has ended. An answer has the newest 5000 entries and 4 MiB at "
        "most; when older ones are left out, the first entry says so. `cmd_id` names the execution of an entry.",
        tags=_TAGS,
        parameters=_PARAMETERS,
        responses={200: schemas.DevboxLogsListView, 404: problem("There is no such devbox.")},
    )
    def get(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class TailLogs(AsyncElsewhere):
    """Schema of `logs/tail`."""

    @extend_schema(
        operation_id="tailDevboxLogs",
        summary="Follow a devbox's log",
        description="Server-sent events: what `logs` answers, then each entry as it comes; comments fill the silence. "
        "It ends after the last entry of a devbox that is over; anything else says so first by an `error` event.",
        tags=_TAGS,
        parameters=_PARAMETERS,
        responses={(200, "text/event-stream"): schemas.DevboxLog, 404: problem("There is no such devbox.")},
    )
    def get(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


__all__: list[Any] = ["Logs", "TailLogs", "list_logs", "tail_logs"]
