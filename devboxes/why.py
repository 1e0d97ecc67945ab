"""Why a devbox is as it is: its phases with their times, its launch work, and the cause of its end with the evidence.

In charge of reading what was written down and of its shape. Not in charge of writing it down (`devbox_flow`, `hosted`,
`services`). Nothing here is guessed: what nobody recorded is left out.
"""

from __future__ import annotations

from typing import Any, Final

import orjson
from django.conf import settings
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

PHASES: Final = ("queued", "placed", "disk_ready", "booted", "running", "suspended", "ended", "removed")
CAUSES: Final = (
    "shutdown_requested",
    "suspend_requested",
    "host_restarted",
    "disk_lost",
    "keep_alive_timeout",
    "entrypoint_exit",
    "entrypoint_lost",
    "launch_failed",
    "out_of_memory",
    "box_ended",
    "box_lost",
    "host_lost",
    "host_refused",
    "no_room",
    "step_timeout",
    "sealed",
    "snapshot_failed",
)


def milliseconds(column: str) -> str:
    """SQL for a point in time in Unix milliseconds."""
    return f"(extract(epoch FROM {column}) * 1000)::bigint"


SILENT_SINCE: Final = f"""
CASE WHEN h.seen_at < clock_timestamp() - make_interval(secs => %s) THEN {milliseconds("h.seen_at")} END
"""
"""SQL for since when a host `h` is silent, null when it is heard; parameter: seconds."""

_TIMES: Final = (
    "d.created_at",
    "d.placed_at",
    "d.disk_at",
    "d.booted_at",
    "d.started_at",
    "d.suspended_at",
    "d.ended_at",
)
_READ: Final = f"""
SELECT d.status, d.why, d.cause::text, d.launch_items::text, d.launch_total, d.host_id, {SILENT_SINCE},
       {", ".join(milliseconds(column) for column in _TIMES)},
       {milliseconds("CASE WHEN d.host_id IS NOT NULL THEN d.completed_at END")}
  FROM devboxes_devbox d LEFT JOIN hosts_host h ON h.id = d.host_id
 WHERE d.id = %s AND d.account_id = %s
"""


def explain(caller: Caller, devbox_id: str) -> dict[str, Any]:
    """The account of one of the caller's devboxes. Raises NotFound. One statement."""
    row = None
    if is_id("dbx", devbox_id):
        row = fetch_one(_READ, [settings.BERTH.SILENT_AFTER, devbox_id, caller.account_id])
    if row is None:
        raise NotFound(f"there is no devbox {devbox_id[:60]}")
    status, why, cause, items, total, host_id, silent_since, *times = row
    over = status in states.OVER
    return {
        "id": devbox_id,
        "status": status,
        "phases": _in_order(phases(zip(PHASES, times, strict=True))),
        "host": host(host_id, None if over else silent_since),
        "launch": [_launch_item(item) for item in orjson.loads(items)],
        "launch_total": total,
        "cause": _cause(orjson.loads(cause) if cause else None, why, times[PHASES.index("ended")])
        if over or cause
        else None,
    }


def phases(found: Any) -> list[dict[str, Any]]:
    """Pairs of a phase and a time, those that were reached."""
    return [{"phase": name, "at_ms": at} for name, at in found if at is not None]


def _in_order(reached: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one that was suspended, when each was reached last."""
    if all(phase["phase"] != "suspended" for phase in reached):
        return reached
    return sorted(reached, key=lambda phase: int(phase["at_ms"]))


def host(host_id: str | None, silent_since_ms: int | None) -> dict[str, Any] | None:
    """Where something is, and since when nothing was heard of there."""
    return None if host_id is None else {"id": host_id, "silent_since_ms": silent_since_ms}


def _launch_item(item: dict[str, Any]) -> dict[str, Any]:
    began, ended = item.get("started_at_ms"), item.get("ended_at_ms")
    return {
        "id": item.get("id"),
        "title": item.get("title"),
        "source": item.get("source"),
        "start_time_ms": began,
        "end_time_ms": ended,
        "duration_ms": ended - began if began is not None and ended is not None else None,
        "exit_status": item.get("exit_status"),
    }


def _cause(found: dict[str, Any] | None, why: str, ended_ms: int | None) -> dict[str, Any] | None:
    if found is None:
        return {"kind": None, "message": why} if why else None
    cause = {"message": why, "at_ms": ended_ms, **found}
    if cause["kind"] in ("shutdown_requested", "suspend_requested"):
        cause["by"] = {"key_id": cause.pop("key_id", None), "member_id": cause.pop("member_id", None)}
    if cause["kind"] == "launch_failed":
        reported = cause.pop("reported", None) or {}
        cause |= {name: value for name, value in reported.items() if name not in ("kind", "detail")}
    elif isinstance(cause.get("reported"), dict):
        cause |= {name: value for name, value in cause.pop("reported").items() if name not in ("kind", "detail")}
    return cause


def _integer(text: str, **more: Any) -> Any:
    return serializers.IntegerField(
        required=False, allow_null=True, max_value=INT64_MAX, min_value=-1, help_text=text, **more
    )


class PhaseHostView(serializers.Serializer[Any]):
    """Where it is or was."""

    id = serializers.CharField()
    silent_since_ms = _integer("Since when nothing was heard of the host; null while it is heard.")


class AskedByView(serializers.Serializer[Any]):
    """Who asked; both null: the operator's own tools."""

    key_id = serializers.CharField(allow_null=True)
    member_id = serializers.CharField(allow_null=True)


class MemoryEvidence(serializers.Serializer[Any]):
    """What the kernel said of the devbox's memory when it was used up."""

    kills = _integer("Processes that were killed for lack of memory.")
    limit_bytes = _integer("What the devbox may use.")
    usage_bytes = _integer("What it used when it was looked, after the kill.")
    peak_bytes = _integer("The most it ever used.")


class DevboxPhaseView(serializers.Serializer[Any]):
    """A phase that was reached, by the database's clock."""

    phase = serializers.ChoiceField(choices=PHASES)
    at_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)


class LaunchItemView(serializers.Serializer[Any]):
    """A piece of launch work that was begun; times by its host's clock."""

    id = serializers.CharField(help_text="As its entries in the logs are marked.")
    title = serializers.CharField()
    source = serializers.CharField()  # type: ignore[assignment]  # a field of that name, not the attribute
    start_time_ms = _integer("When it was started.")
    end_time_ms = _integer("When it ended; null while it runs, and of the entrypoint.")
    duration_ms = _integer("How long it took.")
    exit_status = _integer("How it ended.")


class DevboxCauseView(MemoryEvidence):
    """Why it ended. Evidence that the kind does not have is left out."""

    kind = serializers.ChoiceField(choices=CAUSES, allow_null=True)
    message = serializers.CharField(help_text="The cause in words.")
    at_ms = _integer("When it happened, or was decided.")
    by = AskedByView(required=False, help_text="Who asked for the shutdown.")
    item = _integer("Which piece of the launch work failed, from 0.")
    title = serializers.CharField(required=False, help_text="That piece.")
    exit_status = _integer("How the piece, the entrypoint or the box ended.")
    signal = _integer("The signal that ended it.")
    output = serializers.ListField(
        child=serializers.CharField(), required=False, help_text="The last lines that it wrote."
    )
    step = serializers.CharField(required=False, help_text="The step that was not done in its time, or was refused.")
    seconds = serializers.FloatField(required=False, help_text="The time that was over.")
    code = serializers.CharField(required=False, help_text="What the host answered.")
    detail = serializers.CharField(required=False)
    silent_since_ms = _integer("When its host was last heard.")


class DevboxWhyView(serializers.Serializer[Any]):
    """The account of a devbox. Times are Unix milliseconds."""

    id = serializers.CharField()
    status = serializers.ChoiceField(choices=states.STATUSES)
    phases = DevboxPhaseView(many=True)
    host = PhaseHostView(allow_null=True)
    launch = LaunchItemView(many=True)
    launch_total = serializers.IntegerField(help_text="How many pieces of launch work it has.")
    cause = DevboxCauseView(allow_null=True, help_text="Null while nothing has ended or suspended it.")


_EXAMPLE = OpenApiExample(
    "A launch command failed",
    value={
        "id": "dbx_01k9h3v5x8m2n4p6q8r0s2t4w6",
        "status": "failure",
        "phases": [
            {"phase": "queued", "at_ms": 1762700000000},
            {"phase": "placed", "at_ms": 1762700000006},
            {"phase": "disk_ready", "at_ms": 1762700000019},
            {"phase": "booted", "at_ms": 1762700000058},
            {"phase": "ended", "at_ms": 1762700002404},
        ],
        "host": {"id": "hst_01k9h000000000000000000000", "silent_since_ms": None},
        "launch": [
            {
                "id": "set_01k9h3v60d5f7g9h1j3k5m7n9p",
                "title": "make install",
                "source": "setup_commands",
                "start_time_ms": 1762700000061,
                "end_time_ms": 1762700002398,
                "duration_ms": 2337,
                "exit_status": 2,
            }
        ],
        "launch_total": 1,
        "cause": {
            "kind": "launch_failed",
            "message": "launch work 1 of 1 (make install) ended with 2:\nmake: *** No rule to make target 'install'.",
            "at_ms": 1762700002404,
            "item": 0,
            "title": "make install",
            "exit_status": 2,
            "output": ["make: *** No rule to make target 'install'."],
        },
    },
    response_only=True,
)


class Why(APIView):
    """GET …/why."""

    @extend_schema(
        operation_id="explainDevbox",
        tags=["Devbox"],
        summary="Why a devbox is as it is",
        description="When it reached which phase, what became of each piece of its launch work, and if it is over, the "
        "cause with the evidence. Only what was recorded; what nobody can tell is left out.",
        responses={200: DevboxWhyView, 404: problem("There is no such devbox.")},
        examples=[_EXAMPLE],
        extensions={"x-berth-extension": True},
    )
    def get(self, request: Request, id: str) -> Response:
        return Response(explain(caller_of(request), id))
