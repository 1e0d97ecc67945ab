"""Celery tasks of the executions app: `executions.advance`, on the queue `executions`."""

from executions.execution_flow import execution_flow
from flows.engine import register
from flows.tasks import advance_task

advance = advance_task(register(execution_flow))
