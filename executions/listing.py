"""The list of a devbox's executions.

In charge of its filters, its page and what it shows of each. Not in charge of output, which a list never carries. Three
statements whatever the page: access to the devbox, the count when it is wanted, the page by an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiExample, OpenApiParameter, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from api.callers import Caller
from api.errors import BadRequest, NotFound
from api.ids import is_id
from api.pages import Page, parse_page
from api.permissions import caller_of
from api.prepared import fetch_all, fetch_one
from api.schema import problem
from devboxes import selectors as devboxes
from executions import endings, schemas
from executions.selectors import parsed

COMMAND_SHOWN: Final = 1024
"""Characters of the command that a list shows."""
SHELL_NAME_MAX: Final = 256

_MS: Final = "(extract(epoch FROM {0}) * 1000)::bigint"
_COLUMNS: Final = f"""
id, status, shell_name, command_id, left(command, {COMMAND_SHOWN}), length(command) > {COMMAND_SHOWN}, exit_status,
{_MS.format("created_at")}, {_MS.format("started_at")}, {_MS.format("coalesce(exited_at, completed_at)")},
CASE WHEN completed_at IS NOT NULL THEN out_size END, CASE WHEN completed_at IS NOT NULL THEN err_size END, reason
"""


def list_executions(
    caller: Caller, devbox_id: str, *, status: str | None, shell_name: str | None, page: Page
) -> dict[str, Any]:
    """A page of the devbox's executions, newest first, as it is answered. Raises NotFound for a devbox that is not the
    caller's, or when `starting_after` is not one of its executions."""
    devboxes.execution_context(caller, devbox_id)
    where, params = ["devbox_id = %s", "account_id = %s"], [devbox_id, caller.account_id]
    if status is not None:
        # Open ones are few and have an index of their own; most have completed.
        where += ["status = %s", "completed_at IS NULL" if status != "completed" else "completed_at IS NOT NULL"]
        params.append(status)
    if shell_name is not None:
        where.append("shell_name = %s")
        params.append(shell_name)
    condition = " AND ".join(where)
    answer: dict[str, Any] = {}
    if page.include_total_count:
        counted = fetch_one(f"SELECT count(*) FROM executions_execution WHERE {condition}", params)
        answer["total_count"] = counted[0] if counted else 0
    if page.starting_after is not None:
        if not _is_one(caller, devbox_id, page.starting_after):
            raise NotFound(f"starting_after: devbox {devbox_id} has no execution {page.starting_after[:60]}")
        condition += " AND id < %s"
        params.append(page.starting_after)
    sql = f"SELECT {_COLUMNS} FROM executions_execution WHERE {condition} ORDER BY id DESC LIMIT %s"
    rows = fetch_all(sql, [*params, page.limit + 1])
    shown = [_item(devbox_id, row) for row in rows[: page.limit]]
    return {"executions": shown, "has_more": len(rows) > page.limit, **answer}


def _is_one(caller: Caller, devbox_id: str, execution_id: str) -> bool:
    sql = "SELECT 1 FROM executions_execution WHERE id = %s AND devbox_id = %s AND account_id = %s"
    return is_id("exe", execution_id) and fetch_one(sql, [execution_id, devbox_id, caller.account_id]) is not None


def _item(devbox_id: str, row: Sequence[Any]) -> dict[str, Any]:
    execution_id, status, shell_name, command_id, command, cut, exit_status, made, started, ended, out, err, reason = (
        row
    )
    return {
        "devbox_id": devbox_id,
        "execution_id": execution_id,
        "status": status,
        "shell_name": shell_name,
        "command_id": command_id,
        "command": command,
        "command_truncated": cut,
        "exit_status": exit_status,
        "create_time_ms": made,
        "start_time_ms": started,
        "end_time_ms": ended,
        "stdout_bytes": out,
        "stderr_bytes": err,
        "why": endings.why(parsed(reason)),
    }


_EXAMPLE = OpenApiExample(
    "One of many",
    value={
        "executions": [
            {
                "devbox_id": "dbx_01k9h3v5x8m2n4p6q8r0s2t4w6",
                "execution_id": "exe_01k9h3w0c5d7f9g1h3j5k7m9n1",
                "status": "completed",
                "shell_name": None,
                "command_id": None,
                "command": "make test",
                "command_truncated": False,
                "exit_status": 137,
                "create_time_ms": 1762700000000,
                "start_time_ms": 1762700000004,
                "end_time_ms": 1762700031337,
                "stdout_bytes": 48211,
                "stderr_bytes": 0,
                "why": "it ran out of memory: 1 processes of the box were killed for lack of memory meanwhile",
            }
        ],
        "has_more": True,
        "total_count": 314,
    },
    response_only=True,
)


class Executions(APIView):
    """All executions of a devbox."""

    @extend_schema(
        operation_id="listExecutions",
        tags=["executions"],
        summary="List the executions of a devbox",
        description="Newest first, without their output; also of a devbox that is over, until they are deleted.",
        parameters=[
            OpenApiParameter("status", OpenApiTypes.STR, enum=schemas.STATUSES, description="Only those in this one."),
            OpenApiParameter("shell_name", OpenApiTypes.STR, description="Only those of this shell."),
            OpenApiParameter(
                "limit", OpenApiTypes.INT, description="How many to answer with: 20 if not given, at most 5000."
            ),
            OpenApiParameter("starting_after", OpenApiTypes.STR, description="The last id of the page before."),
            OpenApiParameter("include_total_count", OpenApiTypes.BOOL, description="Whether to count all; true."),
        ],
        responses={
            200: schemas.ExecutionListView,
            400: problem("A filter is not valid."),
            404: problem("There is no such devbox, or `starting_after` is none of its executions."),
        },
        examples=[_EXAMPLE],
        extensions={"x-berth-extension": True},
    )
    def get(self, request: Request, id: str) -> Response:
        query = request.query_params
        status = query.get("status") or None
        if status is not None and status not in schemas.STATUSES:
            raise BadRequest(f"status: {status[:40]!r} is none of {', '.join(schemas.STATUSES)}")
        shell_name = query.get("shell_name") or None
        if shell_name is not None and ("\0" in shell_name or len(shell_name) > SHELL_NAME_MAX):
            raise BadRequest(f"shell_name: must be 1 to {SHELL_NAME_MAX} characters without NUL")
        page = parse_page(query)
        return Response(list_executions(caller_of(request), id, status=status, shell_name=shell_name, page=page))
