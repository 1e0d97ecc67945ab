"""What a devbox has used, from the statuses it went through, which were written down with the changes themselves.

In charge of the arithmetic and of its shape. What is really used at a moment is sampled by hosts, and in the log.

CPU and memory are counted while they are held for what runs: from the start of launch work until the devbox has ended
or is suspended. Its disk is counted from its creation to its end, asleep or not.
"""

from __future__ import annotations

from typing import Any, Final

from drf_spectacular.utils import OpenApiExample, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from api.callers import Caller
from api.errors import NotFound
from api.ids import is_id
from api.permissions import caller_of
from api.prepared import fetch_one
from api.schema import problem
from api.validation import INT64_MAX
from devboxes import states

ACTIVE: Final = ("initializing", "running", "suspending")

_READ: Final = """
SELECT d.status, d.cpu_millis, d.memory_mb, d.disk_mb,
       (extract(epoch FROM d.created_at) * 1000)::bigint, (extract(epoch FROM d.ended_at) * 1000)::bigint,
       extract(epoch FROM greatest(coalesce(d.ended_at, clock_timestamp()) - d.created_at, interval '0'))::float,
       (SELECT coalesce(sum(extract(epoch FROM greatest(coalesce(t.until, clock_timestamp()) - t.at, interval '0'))), 0)
          FROM (SELECT status, at, lead(at) OVER (ORDER BY id) AS until
                  FROM devboxes_devboxtransition WHERE devbox_id = d.id) t
         WHERE t.status = ANY(%s))::float
  FROM devboxes_devbox d WHERE d.id = %s AND d.account_id = %s
"""


def usage(caller: Caller, devbox_id: str) -> dict[str, Any]:
    """The contract's DevboxResourceUsageView of one of the caller's devboxes. Raises NotFound. One statement."""
    row = fetch_one(_READ, [list(ACTIVE), devbox_id, caller.account_id]) if is_id("dbx", devbox_id) else None
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    status, cpu_millis, memory_mb, disk_mb, start_ms, end_ms, elapsed, active = row
    elapsed_seconds, active_seconds = int(elapsed), int(active)
    return {
        "id": devbox_id,
        "status": status,
        "start_time_ms": start_ms,
        "end_time_ms": end_ms,
        "total_elapsed_seconds": elapsed_seconds,
        "total_active_seconds": active_seconds,
        "vcpu_seconds": active_seconds * cpu_millis // 1000,
        "memory_gb_seconds": active_seconds * memory_mb // 1024,
        "disk_gb_seconds": elapsed_seconds * disk_mb // 1024,
    }


def _whole(text: str, **more: Any) -> Any:
    return serializers.IntegerField(max_value=INT64_MAX, min_value=0, help_text=text, **more)


class DevboxResourceUsageView(serializers.Serializer[Any]):
    """What a devbox has used so far. Whole seconds, rounded down; a GB is a GiB."""

    id = serializers.CharField()
    status = serializers.ChoiceField(choices=states.STATUSES)
    total_active_seconds = _whole(
        "For which CPU and memory were held for it: not while it was suspended or provisioned."
    )
    total_elapsed_seconds = _whole("From its creation until its end, or until now.")
    vcpu_seconds = _whole("Active seconds times its CPUs.")
    memory_gb_seconds = _whole("Active seconds times its memory.")
    disk_gb_seconds = _whole("Elapsed seconds times its disk, which it has while it is suspended, too.")
    start_time_ms = _whole("When it was created.")
    end_time_ms = _whole("When its final status was reached; null before.", required=False, allow_null=True)


class Usage(APIView):
    """GET …/usage."""

    @extend_schema(
        operation_id="getDevboxResourceUsage",
        tags=["Devbox"],
        summary="What a devbox has used",
        description="From the times at which it changed its status. What is in use at a moment is in its log, from the "
        "source `stats`.",
        responses={200: DevboxResourceUsageView, 404: problem("There is no such devbox.")},
        examples=[
            OpenApiExample(
                "Suspended for a night",
                value={
                    "id": "dbx_01k9h3v5x8m2n4p6q8r0s2t4w6",
                    "status": "running",
                    "total_active_seconds": 7_200,
                    "total_elapsed_seconds": 43_205,
                    "vcpu_seconds": 14_400,
                    "memory_gb_seconds": 28_800,
                    "disk_gb_seconds": 345_640,
                    "start_time_ms": 1762700000000,
                    "end_time_ms": None,
                },
                response_only=True,
            )
        ],
    )
    def get(self, request: Request, id: str) -> Response:
        return Response(usage(caller_of(request), id))
