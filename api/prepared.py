"""The few hot SELECTs: run as server-side prepared statements on Django's own connection of this thread.

Django's cursors bind on the client and so plan every time. Only the hand-written reads of a request's path belong
here (the key, the devbox, the execution); everything else is ordinary Django.

Being reads, they may run twice: one that finds its connection broken, as after a restart of PostgreSQL, connects again
and repeats. The caller's key is the first thing that every request reads, so the rest of it finds a good connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from django.db import InterfaceError, OperationalError, connection


def fetch_one(sql: str, params: Sequence[Any] | Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The first row, or None. ``jsonb`` comes as text, as everywhere below Django. Raises Django's database errors."""
    rows = fetch_all(sql, params)
    return rows[0] if rows else None


def fetch_all(sql: str, params: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """All rows; for statements that bound them themselves."""
    try:
        return _fetch(sql, params)
    except (OperationalError, InterfaceError):
        if connection.in_atomic_block or connection.is_usable():
            raise
        connection.close()
        return _fetch(sql, params)


def _fetch(sql: str, params: Sequence[Any] | Mapping[str, Any]) -> list[tuple[Any, ...]]:
    connection.ensure_connection()
    with connection.wrap_database_errors, psycopg.Cursor(connection.connection) as cursor:
        return cursor.execute(sql, params, prepare=True).fetchall()
