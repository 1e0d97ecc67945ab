"""The bounded pool of threads in which the event loop's handlers use the database."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

from api.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")

_pool: Executor | None = None
_pool_lock = threading.Lock()
_waiting = 0


def database_pool() -> Executor:
    """The pool, made on first use with DATABASE_THREADS threads that keep a connection each."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(settings.BERTH.DATABASE_THREADS, "database")
        return _pool


def use_pool(pool: Executor | None) -> Executor | None:
    """Put another pool in place (None: a fresh one on next use); the previous one, for the caller to shut down."""
    global _pool
    with _pool_lock:
        previous, _pool = _pool, pool
    return previous


async def in_database(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``function``, which may use the ORM, on a thread of the pool.

    Raises what it raises, and Unavailable when DATABASE_QUEUE calls are waiting already. A cancelled caller does not
    stop a call that has begun.
    """
    global _waiting
    if _waiting >= settings.BERTH.DATABASE_QUEUE:
        raise Unavailable("too many requests are waiting for the database")
    _waiting += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(database_pool(), lambda: _call(function, args, kwargs))
    finally:
        _waiting -= 1


def _call(function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
    try:
        return function(*args, **kwargs)
    except (DatabaseError, InterfaceError):
        # Outside of a request nobody else drops a connection that broke.
        if not connection.in_atomic_block:
            with contextlib.suppress(Exception):
                connection.close_if_unusable_or_obsolete()
        raise
