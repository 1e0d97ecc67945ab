"""How much an account may have at once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Protocol

from django.conf import settings

from api.errors import TooManyRequests
from api.prepared import fetch_one

_OWN = "SELECT max_running_devboxes, max_executions_at_once, max_open_streams FROM accounts_account WHERE id = %s"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    running_devboxes: int
    executions_at_once: int
    open_streams: int


def limits(account_id: str) -> Limits:
    """The caps of an account: its own where it has some, else the settings'."""
    row = fetch_one(_OWN, [account_id]) or (None, None, None)
    own = settings.BERTH
    return Limits(
        running_devboxes=own.CAP_RUNNING_DEVBOXES if row[0] is None else row[0],
        executions_at_once=own.CAP_EXECUTIONS if row[1] is None else row[1],
        open_streams=own.CAP_STREAMS if row[2] is None else row[2],
    )


_open: collections.Counter[str] = collections.Counter()


class Source(Protocol):
    """Where the bytes of an answer come from: an asynchronous generator, or what can be read and closed like one."""

    def __anext__(self) -> Awaitable[bytes]: ...

    def aclose(self) -> Awaitable[None]: ...


def _enter(account_id: str, cap: int) -> None:
    if _open[account_id] >= cap:
        raise TooManyRequests(f"this account has {cap} streams open, as many as it may; close one", retry_after=5)
    _open[account_id] += 1


def _leave(account_id: str) -> None:
    _open[account_id] -= 1
    if not _open[account_id]:
        del _open[account_id]


@contextlib.contextmanager
def open_socket(account_id: str, cap: int) -> Iterator[None]:
    """One of the account's open streams and sockets. Raises TooManyRequests at the cap, per server process."""
    _enter(account_id, cap)
    try:
        yield
    finally:
        _leave(account_id)


class CountedStream:
    """The body of one streaming answer, which counts against its account's open streams until it is closed."""

    def __init__(self, account_id: str, cap: int, events: Source) -> None:
        """Raises TooManyRequests at the cap, which is per server process."""
        _enter(account_id, cap)
        self._account_id: str | None = account_id
        self._events = events

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        """End the stream and give the place back. Safe to call twice."""
        account_id, self._account_id = self._account_id, None
        if account_id is not None:
            _leave(account_id)
        await self._events.aclose()
