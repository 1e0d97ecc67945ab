"""Celery tasks of snapshots: none yet. Their queue is ``snapshots``."""
