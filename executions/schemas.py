"""What the operations on executions take and answer, as DRF serializers.

In charge of field rules and of the OpenAPI document. The operations themselves are async (`api`); the views here only
declare them on their URLs.
"""

from __future__ import annotations

from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from api.schema import problem
from api.validation import FlagField, SecondsField, StrictSerializer, TextField
from api.views import AsyncElsewhere

STATUSES = ("queued", "running", "completed")
SHELL_NAME_HELP = (
    "A persistent shell, made when first used: directory, environment, functions and options survive. It runs one "
    "command at a time, later ones are queued. 1 to 128 printable characters."
)
SIGNALS = ("EOF", "INTERRUPT")


class CreateExecutionParameters(StrictSerializer):
    """A command."""

    command = TextField(help_text="Run by a login bash as the devbox's user, from its home.")
    shell_name = TextField(required=False, allow_null=True, help_text=SHELL_NAME_HELP)
    attach_stdin = FlagField(
        required=False, allow_null=True, help_text="Whether send_std_in will be used; for execute_async only."
    )


class StartExecutionParameters(StrictSerializer):
    """A command with the caller's own id."""

    command_id = TextField(
        allow_blank=False,
        help_text="A UUIDv7. The same id again, with the same command, answers with the same execution.",
    )
    command = TextField(help_text="Run by a login bash as the devbox's user, from its home.")
    shell_name = TextField(required=False, allow_null=True, help_text=SHELL_NAME_HELP)
    optimistic_timeout = SecondsField(
        required=False, allow_null=True, help_text="Seconds to hold for the end, at most and by default 25."
    )


class WaitForCommandRequest(StrictSerializer):
    """Which statuses to wait for."""

    statuses = serializers.ListField(
        child=serializers.ChoiceField(choices=STATUSES), allow_empty=False, max_length=10, help_text="At least one."
    )
    timeout_seconds = SecondsField(
        required=False, allow_null=True, help_text="Seconds to wait, at most and by default 25."
    )


class KillExecutionRequest(StrictSerializer):
    """How to stop a command."""

    kill_process_group = FlagField(
        required=False, allow_null=True, help_text="Also stop the processes that it started in its group."
    )


class SendStdInRequest(StrictSerializer):
    """Exactly one of the two."""

    text = TextField(required=False, allow_null=True)
    signal = serializers.ChoiceField(choices=SIGNALS, required=False, allow_null=True)


class AsyncExecutionDetailView(serializers.Serializer[Any]):
    """An execution. Output and exit status are there once it has completed."""

    devbox_id = serializers.CharField()
    execution_id = serializers.CharField()
    status = serializers.ChoiceField(choices=STATUSES)
    shell_name = serializers.CharField(required=False, allow_null=True)
    stdout = serializers.CharField(required=False, allow_null=True, help_text="The last lines of it, see last_n.")
    stderr = serializers.CharField(required=False, allow_null=True, help_text="The last lines of it, see last_n.")
    exit_status = serializers.IntegerField(
        required=False, allow_null=True, help_text="128+N after signal N; -1 when the command was lost."
    )
    stdout_truncated = serializers.BooleanField(required=False, allow_null=True)
    stderr_truncated = serializers.BooleanField(required=False, allow_null=True)
    why = serializers.CharField(
        required=False, allow_null=True, help_text="The cause of the end where the exit status does not tell it."
    )


class ExecutionDetailView(serializers.Serializer[Any]):
    """A completed execution with its whole output."""

    devbox_id = serializers.CharField()
    execution_id = serializers.CharField(required=False)
    stdout = serializers.CharField()
    stderr = serializers.CharField()
    exit_status = serializers.IntegerField()
    shell_name = serializers.CharField(required=False, allow_null=True)
    why = serializers.CharField(required=False, allow_null=True)


class ListedExecution(serializers.Serializer[Any]):
    """An execution in a list, without its output. Times are Unix milliseconds."""

    devbox_id = serializers.CharField()
    execution_id = serializers.CharField()
    status = serializers.ChoiceField(choices=STATUSES)
    shell_name = serializers.CharField(allow_null=True)
    command_id = serializers.CharField(allow_null=True, help_text="The caller's own id of it.")
    command = serializers.CharField(help_text="Its first 1,024 characters.")
    command_truncated = serializers.BooleanField()
    exit_status = serializers.IntegerField(allow_null=True)
    create_time_ms = serializers.IntegerField()
    start_time_ms = serializers.IntegerField(allow_null=True)
    end_time_ms = serializers.IntegerField(allow_null=True)
    stdout_bytes = serializers.IntegerField(allow_null=True, help_text="What it wrote, kept or not.")
    stderr_bytes = serializers.IntegerField(allow_null=True)
    why = serializers.CharField(allow_null=True, help_text="The cause of its end where the exit status tells none.")


class ExecutionListView(serializers.Serializer[Any]):
    """A page of executions, newest first."""

    executions = ListedExecution(many=True)
    has_more = serializers.BooleanField()
    total_count = serializers.IntegerField(required=False, allow_null=True)


class SendStdInResult(serializers.Serializer[Any]):
    """Whether the command took it."""

    devbox_id = serializers.CharField()
    execution_id = serializers.CharField()
    success = serializers.BooleanField()


class ExecUpdateChunk(serializers.Serializer[Any]):
    """The data of one server-sent event."""

    offset = serializers.IntegerField(
        required=False, help_text="The byte position just after this text: the offset to come back with."
    )
    output = serializers.CharField()


LAST_N = OpenApiParameter(
    "last_n", OpenApiTypes.STR, description="How many of the last lines of stdout and of stderr to answer with (100)."
)
OFFSET = OpenApiParameter("offset", OpenApiTypes.STR, description="The first byte to send (0).")


_NOT_FOUND = problem("The devbox has no such execution.")


class Execute(AsyncElsewhere):
    """POST …/execute."""

    @extend_schema(
        operation_id="executeCommand",
        tags=["executions"],
        summary="Run a command under an id of your own and hold for its end.",
        parameters=[LAST_N],
        request=StartExecutionParameters,
        responses={
            200: AsyncExecutionDetailView,
            400: problem("The devbox is not running, or the id stands for another command."),
            404: problem("There is no such devbox."),
            408: problem("The body did not arrive in time. A command that has not ended is a 200."),
            429: problem("Too many unfinished executions."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class ExecuteAsync(AsyncElsewhere):
    """POST …/execute_async."""

    @extend_schema(
        operation_id="execAsyncCommand",
        tags=["executions"],
        summary="Start a command and answer at once.",
        request=CreateExecutionParameters,
        responses={
            200: AsyncExecutionDetailView,
            400: problem("The devbox is not running."),
            404: problem("There is no such devbox."),
            429: problem("Too many unfinished executions."),
        },
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class ExecuteSync(AsyncElsewhere):
    """POST …/execute_sync."""

    @extend_schema(
        operation_id="execSyncCommand",
        tags=["executions"],
        summary="Run a command and answer with its whole output once it has ended.",
        request=CreateExecutionParameters,
        responses={
            200: ExecutionDetailView,
            400: problem("The devbox is not running."),
            404: problem("There is no such devbox."),
            413: problem("The output is too large for one answer; the message names the streams."),
            429: problem("Too many unfinished executions."),
        },
        deprecated=True,
    )
    def post(self, request: Request, id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class Execution(AsyncElsewhere):
    """GET …/executions/{execution_id}."""

    @extend_schema(
        operation_id="queryAsyncCommand",
        tags=["executions"],
        summary="An execution as it is now.",
        parameters=[LAST_N],
        responses={200: AsyncExecutionDetailView, 404: _NOT_FOUND},
    )
    def get(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class WaitForStatus(AsyncElsewhere):
    """POST …/executions/{execution_id}/wait_for_status."""

    @extend_schema(
        operation_id="waitForCommandCompletion",
        tags=["executions"],
        summary="Hold until an execution has one of some statuses.",
        parameters=[LAST_N],
        request=WaitForCommandRequest,
        responses={
            200: AsyncExecutionDetailView,
            400: problem("A status is missing or unknown."),
            404: _NOT_FOUND,
            408: problem("It had none of them in time; ask again."),
        },
    )
    def post(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class Kill(AsyncElsewhere):
    """POST …/executions/{execution_id}/kill."""

    @extend_schema(
        operation_id="killAsyncExecution",
        tags=["executions"],
        summary="Stop a command.",
        request=KillExecutionRequest,
        responses={200: AsyncExecutionDetailView, 404: _NOT_FOUND},
    )
    def post(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class SendStdIn(AsyncElsewhere):
    """POST …/executions/{execution_id}/send_std_in."""

    @extend_schema(
        operation_id="sendStdIn",
        tags=["executions"],
        summary="Give a running command input, the end of input, or an interrupt.",
        request=SendStdInRequest,
        responses={200: SendStdInResult, 404: _NOT_FOUND},
    )
    def post(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class StreamStdoutUpdates(AsyncElsewhere):
    """GET …/executions/{execution_id}/stream_stdout_updates."""

    @extend_schema(
        operation_id="streamStdOutUpdates",
        tags=["executions", "streaming"],
        summary="stdout as server-sent events, until the command has ended.",
        parameters=[OFFSET],
        responses={
            (200, "application/json"): ExecUpdateChunk,
            (200, "text/event-stream"): ExecUpdateChunk,
            404: _NOT_FOUND,
        },
    )
    def get(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]


class StreamStderrUpdates(AsyncElsewhere):
    """GET …/executions/{execution_id}/stream_stderr_updates."""

    @extend_schema(
        operation_id="streamStdErrUpdates",
        tags=["executions", "streaming"],
        summary="stderr as server-sent events, until the command has ended.",
        parameters=[OFFSET],
        responses={
            (200, "application/json"): ExecUpdateChunk,
            (200, "text/event-stream"): ExecUpdateChunk,
            404: _NOT_FOUND,
        },
    )
    def get(self, request: Request, devbox_id: str, execution_id: str) -> Response:
        return self._elsewhere(request)  # type: ignore[no-any-return]
