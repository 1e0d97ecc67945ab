"""Celery tasks of SSH access."""

from __future__ import annotations

from celery import shared_task

from ssh_access import services


@shared_task(name="ssh_access.delete_expired_keys", ignore_result=True)
def delete_expired_keys() -> int:
    """Delete keys that open nothing any more; how many."""
    return services.delete_expired_keys()


BEAT = {"delete-expired-ssh-keys": {"task": "ssh_access.delete_expired_keys", "schedule": 600.0}}
