"""Celery tasks of hosts: none yet; what watches and mends them runs in ``manage.py watch_hosts``."""
