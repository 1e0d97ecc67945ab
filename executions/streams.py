"""Output as it happens: the server-sent events of stream_stdout_updates and stream_stderr_updates.

In charge of: following an output from a byte offset to its end, over a lost connection to the host and over the move
of the output to where it is kept; events, heartbeats and error events. Not in charge of HTTP or of who may read.

What clients depend on:

1. An event carries text and the raw byte offset just after it, so a reconnect with that offset loses and repeats
   nothing. No event ends inside a character; bytes that are not UTF-8 become U+FFFD.
2. Silence is filled with comments, which no decoder takes for an event. There is never an `id:` line.
3. A clean end means that the command has ended and all that was kept of its output was sent. Anything else says so
   first: error 408 (`resumable`) when coming back with the last offset will go on, 500 when bytes are gone.
4. The middle of an output that was too long to keep is jumped, with one event that says so.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Final, cast

import orjson

from accounts.caps import CountedStream
from api.errors import ApiError
from api.stopping import going_down
from api.threads import in_database
from api.waiting import hub
from executions import endings
from executions.models import Kept, Status
from executions.outputs import OutputMoved, Stream, piece
from executions.selectors import ExecutionView
from executions.utf8 import Piece, TextCutter
from hosts.client import HostRefused, HostUnreachable, async_client_for
from storage.objects import StorageError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 10.0
TROUBLE_SECONDS: Final = 20.0
"""How long a stream tries by itself to get on before it sends its client the 408. Clients come back at once, without
a pause, so this is also what keeps them from coming in a loop."""
RETRY_FIRST_SECONDS: Final = 0.25
RETRY_CAP_SECONDS: Final = 4.0
PIECE_BYTES: Final = 512 * 1024
EVENT_BYTES: Final = 64 * 1024

HEADERS: Final = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
COMMENT: Final = b": keep-alive\n\n"


class Interrupted(Exception):
    """Coming back with the last offset will go on."""


class OutputLost(Exception):
    """Bytes that were written are gone."""


class Updates(CountedStream):
    """The body of one streaming answer. Counts against its account's open streams until it is closed."""

    def __init__(
        self,
        account_id: str,
        cap: int,
        read: Callable[[], ExecutionView],
        view: ExecutionView,
        stream: Stream,
        offset: int,
    ) -> None:
        """Raises TooManyRequests at the cap, which is per server process."""
        super().__init__(account_id, cap, _events(read, view, stream, offset))


async def _events(
    read: Callable[[], ExecutionView], view: ExecutionView, stream: Stream, offset: int
) -> AsyncGenerator[bytes, None]:
    cutter = TextCutter(offset)
    position = offset
    yield COMMENT  # the head goes out with it, however long the first byte takes
    try:
        async with contextlib.aclosing(_with_heartbeats(_follow(read, view, stream, offset))) as pieces:
            async for found_bytes in pieces:
                if found_bytes is None:
                    yield COMMENT
                    continue
                start, data = found_bytes
                if start > position:
                    before = cutter.finish()
                    marker = f"\n[{start - position} bytes of output were not kept]\n"
                    yield _update(Piece((before.text if before else "") + marker, start))
                    cutter = TextCutter(start)
                position = start + len(data)
                updates = []
                for at in range(0, len(data), EVENT_BYTES):
                    found = cutter.feed(data[at : at + EVENT_BYTES])
                    if found is not None:
                        updates.append(_update(found))
                yield b"".join(updates)  # what came together goes out together: every turn of the loop costs
        last = cutter.finish()
        if last is not None:
            yield _update(last)
    except Interrupted as error:
        yield _error(408, str(error))
    except OutputLost as error:
        yield _error(500, str(error))
    except ApiError as error:
        # The row could not be read again: gone for good, or the database is away for a moment.
        yield _error(500 if error.status == 404 else 408, error.message)
    except Exception:
        log.exception("the stream of %s of %s broke", stream, view.id)
        yield _error(408, "the stream broke on our side; it goes on from the last offset")


def _update(found: Piece) -> bytes:
    return b"data: " + orjson.dumps({"output": found.text, "offset": found.end}) + b"\n\n"


def _error(code: int, message: str) -> bytes:
    told = {"code": code, "message": message, "resumable": code == 408}
    return b"event: error\ndata: " + orjson.dumps(told) + b"\n\n"


async def _with_heartbeats(
    source: AsyncGenerator[tuple[int, bytes], None],
) -> AsyncGenerator[tuple[int, bytes] | None, None]:
    """What `source` yields, None whenever it has been silent for HEARTBEAT_SECONDS.

    Raises Interrupted when the server is being stopped.
    """
    ahead: collections.deque[tuple[int, bytes]] = collections.deque()
    stirred, taken = asyncio.Event(), asyncio.Event()

    async def pull() -> None:
        # One task for the whole stream; one a piece would cost more than the piece.
        async for found in source:
            while ahead:
                taken.clear()
                await taken.wait()
            ahead.append(found)
            stirred.set()

    pulling, stopping = asyncio.ensure_future(pull()), asyncio.ensure_future(going_down.wait())
    for ending in (pulling, stopping):
        ending.add_done_callback(lambda _: stirred.set())
    try:
        while True:
            if stopping.done():
                # Also while there is always more: what has arrived and was not sent comes again from the last offset.
                raise Interrupted("the server is being restarted; the stream goes on from the last offset")
            if ahead:
                found = ahead.popleft()
                taken.set()
                yield found
                continue
            if pulling.done():
                pulling.result()
                return
            stirred.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await stirred.wait()
            except TimeoutError:
                yield None
    finally:
        stopping.cancel()
        pulling.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await pulling
        await source.aclose()


async def _follow(
    read: Callable[[], ExecutionView], view: ExecutionView, stream: Stream, offset: int
) -> AsyncGenerator[tuple[int, bytes], None]:
    """The raw bytes from `offset` to the end of the output, each piece with where it begins.

    Raises Interrupted, OutputLost, and what `read` raises.
    """
    loop = asyncio.get_running_loop()
    position = offset
    trouble_since: float | None = None
    pause = RETRY_FIRST_SECONDS
    async with hub.watch(view.id) as changed:
        if not view.completed:
            view = await in_database(read)  # what changed before we listened
        while True:
            trouble = ""
            try:
                if view.status == Status.QUEUED:
                    await changed.wait(hub.reread_after())
                elif view.completed and view.kept == Kept.NOWHERE:
                    if 0 < view.size(stream) <= position:
                        return
                    raise OutputLost(f"the output of execution {view.id} was lost: {endings.why(view.reason)}")
                elif view.completed and view.kept != Kept.HOST:
                    while True:
                        start, data = await piece(view, stream, position, PIECE_BYTES)
                        if not data:
                            return
                        position = start + len(data)
                        yield start, data
                else:
                    began = False
                    following = async_client_for(view.host_id).follow(
                        box=view.devbox_id, id=view.id, stream=stream, offset=position
                    )
                    # Its iterator is a generator that holds a place among the host's streams until it is closed.
                    chunks = cast(AsyncGenerator[bytes, None], aiter(following))
                    async with following, contextlib.aclosing(chunks) as arriving:
                        async for data in arriving:
                            start = position if began or following.start is None else following.start
                            began = True
                            position = start + len(data)
                            trouble_since, pause = None, RETRY_FIRST_SECONDS
                            yield start, data
                    trailer = following.trailer
                    if trailer is not None and trailer["complete"]:
                        return
                    if trailer is not None and trailer.get("resume", 0) > position:
                        position = trailer["resume"]
                        continue
                    trouble = "the output has moved" if trailer and trailer.get("moved") else "the host ended it early"
            except (HostUnreachable, HostRefused, OutputMoved, StorageError) as error:
                trouble = str(error)
            if trouble:
                fresh = await in_database(read)
                if fresh.kept != view.kept:  # it was stored, and the host keeps it no more: on from there, at once
                    view = fresh
                    continue
                now = loop.time()
                trouble_since = trouble_since or now
                if now - trouble_since >= TROUBLE_SECONDS:
                    log.info("the stream of %s of %s could not go on: %s", stream, view.id, trouble)
                    raise Interrupted(
                        "the output cannot be read at the moment; the stream goes on from the last offset"
                    )
                await changed.wait(pause)
                pause = min(RETRY_CAP_SECONDS, pause * 2)
            view = await in_database(read)
