"""Celery tasks of tunnels."""

from __future__ import annotations

from celery import shared_task

from tunnels import services


@shared_task(name="tunnels.delete_of_ended", ignore_result=True)
def delete_of_ended() -> int:
    """Delete the tunnels of devboxes that have ended; how many."""
    return services.delete_of_ended()


BEAT = {"delete-tunnels-of-ended-devboxes": {"task": "tunnels.delete_of_ended", "schedule": 3600.0}}
