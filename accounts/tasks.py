"""Celery tasks of accounts: none; a key is looked up each time and needs no sweeping."""
