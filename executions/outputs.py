"""The bytes of an output, wherever they are: in the row, on the host, in S3.

In charge of finding them, of reading the last lines and pieces by offset, and of the bounds on what is held in
memory. Not in charge of decoding them, or of the order in which a stream sends them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Literal, TypeVar

from executions.lines import last_lines, read_last_lines, within
from executions.models import Kept
from executions.selectors import ExecutionView
from hosts.client import HostRefused, HostUnreachable, async_client_for
from storage import objects

Stream = Literal["stdout", "stderr"]
STREAMS: Final[tuple[Stream, Stream]] = ("stdout", "stderr")

LARGE_BYTES: Final = 1024 * 1024
"""Outputs over this size are read a few at a time, so that answers with them cannot fill the process's memory."""
LARGE_AT_ONCE: Final = 4
STORAGE_THREADS: Final = 4
HOST_READ_BYTES: Final = 4 * 1024 * 1024

OUTPUTS_PREFIX: Final = "executions/"

T = TypeVar("T")


class OutputMoved(Exception):
    """The output is not where the row said when it was read, or its host does not answer: read the row again."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tail:
    """The end of an output. `truncated`: something of the output comes before it, or is gone."""

    data: bytes
    truncated: bool

    @property
    def text(self) -> str:
        """As text, with U+FFFD for what is not UTF-8."""
        return self.data.decode("utf-8", "replace")


def output_prefix(devbox_id: str, execution_id: str) -> str:
    """What the S3 keys of an execution's outputs begin with, and no others."""
    return f"{OUTPUTS_PREFIX}{devbox_id}/{execution_id}/"


def output_key(devbox_id: str, execution_id: str, stream: str) -> str:
    """The S3 key of a stored output."""
    return output_prefix(devbox_id, execution_id) + stream


_large = asyncio.Semaphore(LARGE_AT_ONCE)
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


async def in_storage(function: Callable[[], T]) -> T:
    """Run a call of `storage` on one of this process's few threads for that."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(STORAGE_THREADS, "objects")
    return await asyncio.get_running_loop().run_in_executor(_pool, function)


async def tail(view: ExecutionView, stream: Stream, lines: int | None, limit: int) -> Tail:
    """The last `lines` lines of a completed execution's output, at most `limit` bytes of them. With `lines` None: all
    of it, which must not be more than `limit`.

    Raises OutputMoved and StorageError.
    """
    size = view.size(stream)
    if view.kept == Kept.ROW:
        data = view.row_bytes(stream)
        data = data if lines is None else last_lines(data, lines, limit)
    elif view.kept == Kept.NOWHERE:
        return Tail(b"", truncated=True)
    elif size == 0 or lines == 0:
        data = b""
    elif size > LARGE_BYTES:
        async with _large:
            data = await _far_tail(view, stream, lines, limit)
    else:
        data = await _far_tail(view, stream, lines, limit)
    return Tail(data, truncated=len(data) < size or view.dropped(stream) > 0)


async def _far_tail(view: ExecutionView, stream: Stream, lines: int | None, limit: int) -> bytes:
    if lines is None:
        return await _whole(view, stream)
    if view.kept == Kept.STORE:
        # Behind a dropped middle only: text before it would look as if the rest had followed it.
        stored = view.size(stream) - view.dropped(stream)
        base = view.hole(stream) if view.dropped(stream) else 0
        key = output_key(view.devbox_id, view.id, stream)

        def read(start: int, length: int) -> bytes:
            return objects.get_range(key, base + start, length)

        return await in_storage(lambda: read_last_lines(read, stored - base, lines, limit))
    try:
        got = await async_client_for(view.host_id).read(
            box=view.devbox_id, id=view.id, stream=stream, offset=0, limit=limit, last_lines=lines
        )
    except (HostUnreachable, HostRefused) as error:
        raise OutputMoved(str(error)) from error
    # Cut by the limit, not at the beginning of a line: perhaps inside a character.
    return within(got.data, limit - 4) if len(got.data) >= limit else got.data


async def _whole(view: ExecutionView, stream: Stream) -> bytes:
    size = view.size(stream)
    data = bytearray()
    while len(data) < size:
        _, got = await piece(view, stream, len(data), HOST_READ_BYTES)
        if not got:
            raise OutputMoved(f"{stream} ended at byte {len(data)} of {size}")
        data += got
    return bytes(data)


async def piece(view: ExecutionView, stream: Stream, start: int, length: int) -> tuple[int, bytes]:
    """Up to `length` bytes from byte `start` of a completed execution's output, and where they really begin: later
    when `start` lies in what was dropped. No bytes at the end.

    Raises OutputMoved and StorageError.
    """
    if view.kept == Kept.ROW:
        return start, view.row_bytes(stream)[start : start + length]
    size, dropped = view.size(stream), view.dropped(stream)
    if start >= size:
        return start, b""
    if view.kept == Kept.STORE:
        hole = view.hole(stream)
        if dropped and start < hole:
            at, length = start, min(length, hole - start)
        else:
            start = max(start, hole + dropped) if dropped else start
            at, length = start - dropped, min(length, size - start)
        key = output_key(view.devbox_id, view.id, stream)
        return start, await in_storage(partial(objects.get_range, key, at, length))
    try:
        got = await async_client_for(view.host_id).read(
            box=view.devbox_id, id=view.id, stream=stream, offset=start, limit=min(length, size - start)
        )
    except (HostUnreachable, HostRefused) as error:
        raise OutputMoved(str(error)) from error
    return got.offset, got.data
