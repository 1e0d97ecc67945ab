"""Executions as the API answers them.

In charge of the shape of an answer and of which output goes into it. Not in charge of HTTP, or of where output is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from django.conf import settings

from api.errors import ApiError, TooLarge, Unavailable
from api.threads import in_database
from executions import endings
from executions.outputs import STREAMS, OutputMoved, Tail, tail
from executions.selectors import ExecutionView
from storage.objects import StorageError

READ_TRIES: Final = 3
READ_PAUSE_SECONDS: Final = 0.3


class OutputTooLarge(TooLarge):
    """The output does not fit into an answer; it is complete in its streams."""

    code = "output_too_large"


async def async_view(read: Callable[[], ExecutionView], view: ExecutionView, last_n: int) -> dict[str, Any]:
    """A DevboxAsyncExecutionDetailView with the last `last_n` lines of each stream; `read` reads the row again.

    Raises Unavailable when the output cannot be had at the moment.
    """
    answer: dict[str, Any] = {
        "devbox_id": view.devbox_id,
        "execution_id": view.id,
        "status": view.status,
        "shell_name": view.shell_name,
    }
    if not view.completed:
        return answer
    out, err = await _tails(read, view, last_n)
    return answer | {
        "exit_status": view.exit_status,
        "stdout": out.text,
        "stderr": err.text,
        "stdout_truncated": out.truncated,
        "stderr_truncated": err.truncated,
        "why": endings.why(view.reason),
    }


async def sync_view(read: Callable[[], ExecutionView], view: ExecutionView) -> dict[str, Any]:
    """A DevboxExecutionDetailView of a completed execution, with its whole output.

    Raises OutputTooLarge naming the streams that do not fit, ApiError when output was lost, Unavailable.
    """
    limit: int = settings.BERTH.OUTPUT_INLINE_MAX
    large = [stream for stream in STREAMS if view.size(stream) > limit or view.dropped(stream)]
    if large:
        streams = " and ".join(f"stream_{name}_updates" for name in large)
        raise OutputTooLarge(
            f"{' and '.join(large)} of execution {view.id} (exit status {view.exit_status}) went over the {limit} "
            f"bytes that execute_sync answers with; read {streams} instead"
        )
    if view.lost:
        raise ApiError(
            f"the output of execution {view.id} (exit status {view.exit_status}) was lost: {endings.why(view.reason)}",
            code="output_lost",
            headers={"x-should-retry": "false"},
        )
    out, err = await _tails(read, view, None)
    return {
        "devbox_id": view.devbox_id,
        "execution_id": view.id,
        "stdout": out.text,
        "stderr": err.text,
        "exit_status": view.exit_status,
        "shell_name": view.shell_name,
        "why": endings.why(view.reason),
    }


async def _tails(read: Callable[[], ExecutionView], view: ExecutionView, lines: int | None) -> tuple[Tail, Tail]:
    limit: int = settings.BERTH.OUTPUT_INLINE_MAX
    for left in reversed(range(READ_TRIES)):
        try:
            return await tail(view, "stdout", lines, limit), await tail(view, "stderr", lines, limit)
        except (OutputMoved, StorageError) as error:
            if left == 0:
                raise Unavailable(
                    f"execution {view.id} has completed (exit status {view.exit_status}), but its output cannot be "
                    "read at the moment; try again shortly",
                    retry_after=2,
                ) from error
            await asyncio.sleep(READ_PAUSE_SECONDS)
            view = await in_database(read)
    raise AssertionError("unreachable")
