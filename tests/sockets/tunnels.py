"""Servers as they run in devboxes, each to show one behaviour, for tests of tunnels over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def serving(serve: Serve) -> Iterator[int]:
    """Run `serve` for each connection, in a thread's own loop; the port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def begin() -> int:
        server = await asyncio.start_server(guarded, "127.0.0.1", 0, limit=1 << 20)
        return int(server.sockets[0].getsockname()[1])

    async def end() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.wait([*tasks, asyncio.ensure_future(asyncio.sleep(0))], timeout=5)

    try:
        yield asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def head_of(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]] | None:
    """The request line and the headers as they came; None when the client has gone."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    return first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]


async def body_of(reader: asyncio.StreamReader, headers: list[tuple[str, str]]) -> tuple[int, str]:
    """Length and sha256 of a request's body, taken as it comes."""
    named = {name.lower(): value for name, value in headers}
    seen, total = hashlib.sha256(), 0
    if "content-length" in named:
        left = int(named["content-length"])
        while left:
            data = await reader.read(min(left, 1 << 18))
            if not data:
                raise ConnectionError
            seen.update(data)
            left, total = left - len(data), total + len(data)
    elif named.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            data = await reader.readexactly(size)
            await reader.readexactly(2)
            seen.update(data)
            total += size
        await reader.readexactly(2)
    return total, seen.hexdigest()


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keep-alive; answers every request with what came of it, as JSON."""
    count = 0
    while (head := await head_of(reader)) is not None:
        count += 1
        length, digest = await body_of(reader, head[1])
        told = {"line": head[0], "headers": head[1], "length": length, "sha256": digest, "request": count}
        data = json.dumps(told).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data))
        writer.write(data)
        await writer.drain()


def saying(answer: bytes, *, after: bytes = b"", keep: bool = False) -> Serve:
    """Answers the first request with exactly these bytes, whatever they are, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await head_of(reader) is None:
            return
        writer.write(answer)
        await writer.drain()
        if after:
            await asyncio.sleep(0.2)
            writer.write(after)
            await writer.drain()
        if keep:
            await reader.read()

    return serve
