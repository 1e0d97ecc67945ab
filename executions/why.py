"""Why an execution is as it is: its phases with their times, and the cause of its end with the evidence.

In charge of reading what was written down and of its shape. Not in charge of writing it down (`execution_flow`,
`services`), or of the one sentence that other answers carry (`endings`), which is the same as the message here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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
from devboxes.why import SILENT_SINCE, AskedByView, MemoryEvidence, PhaseHostView, host, milliseconds, phases
from executions import endings, schemas
from executions.models import Kept
from executions.selectors import parsed

PHASES: Final = ("queued", "placed", "spawned", "first_byte", "exited", "stored")
CAUSES: Final = (
    "exit_status",
    "signal",
    "out_of_memory",
    "kill_requested",
    "not_started",
    "devbox_ended",
    "devbox_suspended",
    "host_lost",
    "lost",
)
_KINDS: Final = {
    endings.ASKED: "kill_requested",
    endings.DEVBOX_ENDING: "devbox_ended",
    "devbox_ended": "devbox_ended",
    endings.DEVBOX_SUSPENDED: "devbox_suspended",
    "oom": "out_of_memory",
    "signal": "signal",
    "killed_before_start": "kill_requested",
    "exec_failed": "not_started",
    "lost": "lost",
}
_EVIDENCE: Final = ("signal", "kills", "limit_bytes", "usage_bytes", "peak_bytes", "silent_since_ms", "detail")

_TIMES: Final = ("e.created_at", "e.placed_at", "e.started_at", "e.first_byte_at", "e.exited_at", "e.stored_at")
_READ: Final = f"""
SELECT e.status, e.exit_status, e.reason, e.stop_why, e.stop_by, e.worker, e.kept, e.host_id, {SILENT_SINCE},
       CASE WHEN e.completed_at IS NULL THEN e.error_code END, e.error_detail,
       CASE WHEN e.step = 'await_turn' THEN e.shell_name END,
       d.status, d.shutdown_reason, d.failure_reason, d.why, {milliseconds("d.ended_at")},
       {", ".join(milliseconds(column) for column in _TIMES)}
  FROM executions_execution e
  JOIN devboxes_devbox d ON d.id = e.devbox_id
  LEFT JOIN hosts_host h ON h.id = e.host_id
 WHERE e.id = %s AND e.devbox_id = %s AND e.account_id = %s
"""


def explain(caller: Caller, devbox_id: str, execution_id: str) -> dict[str, Any]:
    """The account of one of the caller's executions. Raises NotFound. One statement."""
    row = None
    if is_id("exe", execution_id) and is_id("dbx", devbox_id):
        row = fetch_one(_READ, [settings.BERTH.SILENT_AFTER, execution_id, devbox_id, caller.account_id])
    if row is None:
        raise NotFound(f"devbox {devbox_id[:80]} has no execution {execution_id[:80]}")
    status, exit_status, reason, stop_why, stop_by, worker, kept, host_id, silent, error, detail, shell, *rest = row
    devbox, times = rest[:5], rest[5:]
    completed = status == "completed"
    asked = parsed(stop_by)
    return {
        "devbox_id": devbox_id,
        "execution_id": execution_id,
        "status": status,
        "exit_status": exit_status,
        "phases": phases(zip(PHASES, times, strict=True)),
        "worker": worker,
        "host": host(host_id, None if completed else silent),
        "trouble": _trouble(error, detail, shell),
        "output_kept": _KEPT[kept] if completed else None,
        "kill_request": _by(asked) if stop_why == endings.ASKED else None,
        "cause": _cause(exit_status, parsed(reason), asked, devbox) if completed else None,
    }


_RETRIED: Final = "what it needs could not be had; it is tried again"
_TROUBLES: Final = {"HostUnreachable": "its host does not answer; it is asked again"}
_KEPT: Final = {Kept.HOST: "host", Kept.ROW: "stored", Kept.STORE: "stored", Kept.NOWHERE: "lost"}


def _trouble(error: str | None, detail: str | None, shell: str | None) -> str | None:
    if error is None:
        return None if shell is None else f"it waits for an earlier command of shell {shell} to end"
    return _TROUBLES.get(error, detail if error == "HostRefused" else _RETRIED)


def _by(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    asked = asked or {}
    by = {"key_id": asked.get("key_id"), "member_id": asked.get("member_id")}
    return {"by": by, "at_ms": asked.get("at_ms")}


def _cause(
    exit_status: int, reason: Mapping[str, Any] | None, asked: Mapping[str, Any] | None, devbox: list[Any]
) -> dict[str, Any] | None:
    if reason is None:
        if exit_status == 0:
            return None
        return {"kind": "exit_status", "message": f"it ended with exit status {exit_status}"}
    reported = reason.get("reported") or {}
    kind = _kind(reason)
    cause: dict[str, Any] = {"kind": kind, "message": endings.why(reason)}
    facts = {**reported, **reason}
    cause |= {name: facts[name] for name in _EVIDENCE if facts.get(name) is not None}
    if isinstance(cause.get("signal"), int):
        cause["signal_name"] = endings.signal_name(cause["signal"])
    if kind == "kill_requested" and asked is not None:
        cause |= _by(asked)
    if kind == "devbox_ended":
        status, shutdown_reason, failure_reason, why, ended_ms = devbox
        ended = {"status": status, "shutdown_reason": shutdown_reason, "failure_reason": failure_reason}
        cause["devbox"] = {**ended, "why": why or None, "end_time_ms": ended_ms}
    return cause


def _kind(reason: Mapping[str, Any]) -> str:
    kind = str(reason.get("kind"))
    if kind == "killed":
        # By hostd's word: on request, when it names the signal; else with its box.
        return "kill_requested" if reason.get("signal") else "devbox_ended"
    if kind == "lost" and reason.get("silent_since_ms") is not None:
        return "host_lost"
    return _KINDS.get(kind, "lost")


def _integer(text: str) -> Any:
    return serializers.IntegerField(required=False, allow_null=True, max_value=INT64_MAX, min_value=-1, help_text=text)


class ExecutionPhaseView(serializers.Serializer[Any]):
    """A phase that was reached: `queued` and `stored` by the database's clock, `placed` by the worker's, the others by
    the host's."""

    phase = serializers.ChoiceField(choices=PHASES)
    at_ms = serializers.IntegerField(max_value=INT64_MAX, min_value=0)


class KillRequestView(serializers.Serializer[Any]):
    """The first request to kill it."""

    by = AskedByView()
    at_ms = _integer("When it was asked for.")


class EndedDevboxView(serializers.Serializer[Any]):
    """The devbox that it ended with."""

    status = serializers.CharField()
    shutdown_reason = serializers.CharField(allow_null=True)
    failure_reason = serializers.CharField(allow_null=True)
    why = serializers.CharField(allow_null=True)
    end_time_ms = _integer("When that was decided.")


class ExecutionCauseView(MemoryEvidence):
    """Why it ended as it did. Evidence that the kind does not have is left out."""

    kind = serializers.ChoiceField(choices=CAUSES)
    message = serializers.CharField(help_text="The cause in words.")
    signal = _integer("The signal that ended it.")
    signal_name = serializers.CharField(required=False)
    by = AskedByView(required=False, help_text="Who asked for the kill.")
    at_ms = _integer("When it was asked for.")
    silent_since_ms = _integer("When its host was last heard.")
    devbox = EndedDevboxView(required=False)
    detail = serializers.CharField(required=False)


class ExecutionWhyView(serializers.Serializer[Any]):
    """The account of an execution. Times are Unix milliseconds."""

    devbox_id = serializers.CharField()
    execution_id = serializers.CharField()
    status = serializers.ChoiceField(choices=schemas.STATUSES)
    exit_status = serializers.IntegerField(allow_null=True)
    phases = ExecutionPhaseView(many=True)
    worker = serializers.CharField(allow_null=True, help_text="The worker that had it started.")
    host = PhaseHostView(allow_null=True)
    trouble = serializers.CharField(
        allow_null=True, help_text="What its start, or the next look at it, waits for; null when nothing is amiss."
    )
    output_kept = serializers.ChoiceField(
        choices=["host", "stored", "lost"], allow_null=True, help_text="Where its output is; null until it has ended."
    )
    kill_request = KillRequestView(allow_null=True, help_text="Who asked for its end, whatever it ended of.")
    cause = ExecutionCauseView(allow_null=True, help_text="Null until it has ended, and when it ended with 0.")


_EXAMPLE = OpenApiExample(
    "Out of memory",
    value={
        "devbox_id": "dbx_01k9h3v5x8m2n4p6q8r0s2t4w6",
        "execution_id": "exe_01k9h3w0c5d7f9g1h3j5k7m9n1",
        "status": "completed",
        "exit_status": 137,
        "phases": [
            {"phase": "queued", "at_ms": 1762700000000},
            {"phase": "placed", "at_ms": 1762700000002},
            {"phase": "spawned", "at_ms": 1762700000004},
            {"phase": "first_byte", "at_ms": 1762700000121},
            {"phase": "exited", "at_ms": 1762700031337},
            {"phase": "stored", "at_ms": 1762700031341},
        ],
        "worker": "worker-1:4242:5f0c9a1e",
        "host": {"id": "hst_01k9h000000000000000000000", "silent_since_ms": None},
        "trouble": None,
        "output_kept": "stored",
        "kill_request": None,
        "cause": {
            "kind": "out_of_memory",
            "message": "it ran out of memory: 1 processes of the box were killed for lack of memory meanwhile",
            "kills": 1,
            "limit_bytes": 2147483648,
            "usage_bytes": 7340032,
            "peak_bytes": 2147483648,
            "detail": "1 processes of the box were killed for lack of memory meanwhile",
        },
    },
    response_only=True,
)


class Why(APIView):
    """GET …/executions/{execution_id}/why."""

    @extend_schema(
        operation_id="explainExecution",
        tags=["executions"],
        summary="Why an execution is as it is",
        description="When it reached which phase, and if it died, of what, with the evidence. Only what was recorded; "
        "what nobody can tell is left out.",
        responses={200: ExecutionWhyView, 404: problem("The devbox has no such execution.")},
        examples=[_EXAMPLE],
        extensions={"x-berth-extension": True},
    )
    def get(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return Response(explain(caller_of(request), devbox_id, execution_id))
