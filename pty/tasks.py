"""Celery tasks of terminals."""

from __future__ import annotations

from celery import shared_task

from pty import services


@shared_task(name="pty.delete_expired_tunnels", ignore_result=True)
def delete_expired_tunnels() -> int:
    """Delete keys whose day is over, and tickets that were not used; how many keys."""
    services.delete_expired_tickets()
    return services.delete_expired_tunnels()


BEAT = {"delete-expired-pty-tunnels": {"task": "pty.delete_expired_tunnels", "schedule": 3600.0}}
