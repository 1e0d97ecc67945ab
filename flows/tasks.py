"""The one Celery task that every flow needs, made once for each by its app's `tasks.py`.

In charge of: the task. Not in charge of: the sweep, which does the same work without a broker (`flows.sweep`).
"""

from collections.abc import Callable
from typing import Any

from celery import shared_task

import flows.sweep  # noqa: F401  (connects the sweep to the worker's start)
from flows.engine import Flow


def advance_task(flow: Flow[Any]) -> Callable[[str], None]:
    """The task `<queue>.advance(pk)`: claim the row and run its steps.

    A row that is not due, or that somebody holds, is left alone.
    """

    def advance(pk: str) -> None:
        flow.run(pk)

    task: Callable[[str], None] = shared_task(name=flow.task, ignore_result=True)(advance)
    return task
