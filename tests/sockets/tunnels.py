"""For tests of tunnels over real sockets: servers as they run in devboxes, each to show one behaviour, and a devbox."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from django.db import connection

from api.ids import new_id
from tests.sockets.conftest import Granian
from tunnels import services

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


DOMAIN = "tunnel.example.test"


class Devbox:
    """A running devbox's row with a tunnel; its servers are this machine's."""

    def __init__(self, served: Granian, account_id: str, **config: Any) -> None:
        self.id, self.served = new_id("dbx"), served
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO devboxes_devbox (id, account_id, name, metadata, wants, status, step, seen, reserved,"
                " slot, address, image_id, architecture, cpu_millis, memory_mb, disk_mb, launch_parameters,"
                " launch_commands, entrypoint, user_name, user_uid, user_home, keep_alive_seconds, launch_total,"
                " launch_index, launch_items, why, initiator_type, initiator_id, created_at, step_since, attempts,"
                " wakes, fence, error_code, error_detail, lease)"
                " VALUES (%s, %s, '', '{}', 'running', 'running', 'running', '', false, '', '', '', 'x86_64', 1, 1, 1,"
                " '{}', '[]', '', 'user', 1000, '/home/user', 3600, 0, 0, '[]', '', 'api', '', now(), now(), 0, 0, 0,"
                " '', '', '')",
                [self.id, account_id],
            )
        services.create_with_devbox(self.id, config)
        self.view: Any = services.view_of(self.id)

    def host(self, port: int) -> str:
        return f"{port}-{self.view['tunnel_key']}.{DOMAIN}"

    def ask(self, port: int, path: str = "/", method: str = "GET", **rest: Any) -> httpx.Response:
        headers = {"host": self.host(port), **(rest.pop("headers", None) or {})}
        http2 = rest.pop("http2", False)
        with httpx.Client(base_url=self.served.url, http1=not http2, http2=http2, timeout=30) as client:
            return client.request(method, path, headers=headers, **rest)

    def raw(self, port: int, request: bytes) -> bytes:
        """What exactly these bytes, which ask for the connection to be closed, are answered with; {host} in them is
        replaced."""
        with socket.create_connection(("127.0.0.1", self.served.port), timeout=20) as sock:
            sock.sendall(request.replace(b"{host}", self.host(port).encode()))
            found = b""
            while data := sock.recv(65536):
                found += data
            return found

    def get(self, column: str) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {column} FROM devboxes_devbox WHERE id = %s", [self.id])
            return cursor.fetchone()[0]

    def set(self, **columns: Any) -> None:
        with connection.cursor() as cursor:
            for name, value in columns.items():
                cursor.execute(f"UPDATE devboxes_devbox SET {name} = %s WHERE id = %s", [value, self.id])
