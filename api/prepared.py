"""The few hot SELECTs: run as server-side prepared statements on Django's own connection of this thread.

Django's cursors bind on the client and so plan every time. Only the hand-written reads of a request's path belong
here (the key, the devbox, the execution); everything else is ordinary Django.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from django.db import connection


def fetch_one(sql: str, params: Sequence[Any]) -> tuple[Any, ...] | None:
    """The first row, or None. ``jsonb`` comes as text, as everywhere below Django. Raises Django's database errors."""
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        return cursor.execute(sql, params, prepare=True).fetchone()


def fetch_all(sql: str, params: Sequence[Any]) -> list[tuple[Any, ...]]:
    """All rows; for statements with a LIMIT of their own."""
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        return cursor.execute(sql, params, prepare=True).fetchall()
