"""Celery tasks of the devboxes: the one that advances a row."""

from devboxes.devbox_flow import devbox_flow
from flows.tasks import advance_task

advance = advance_task(devbox_flow)
