"""Celery tasks of terminals: none yet."""
