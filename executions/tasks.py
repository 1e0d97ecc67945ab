"""Celery tasks of the executions app: `executions.advance`, on the queue `executions`, and the deletion of old ones."""

from __future__ import annotations

from typing import Any, Final

from celery import shared_task

from executions import retention
from executions.execution_flow import execution_flow
from flows.engine import register
from flows.tasks import advance_task

BEAT: Final[dict[str, Any]] = {"executions-retention": {"task": "executions.delete_old", "schedule": 300.0}}

advance = advance_task(register(execution_flow))


@shared_task(name="executions.delete_old", ignore_result=True)
def delete_old() -> None:
    """Delete commands and outputs whose time is over. Two runs at once delete the same."""
    retention.delete_what_is_over()
    retention.abandon_uploads()
