"""Celery tasks of the app: none, a file is moved while its caller waits."""
