"""A door to the terminals of one devbox on this machine's loopback, for programs that bring no key of their own.

In charge of: taking HTTP/1.1 requests and WebSocket upgrades for ``/pty/``, naming the devbox and adding the key, and
carrying bytes both ways. Not in charge of what is said: that is the server's.

Whoever reaches the door has the key's power over the devbox's terminals. So it listens on 127.0.0.1 only and serves
only processes of the user who opened it, and root's; and no page in that user's browser, which would send an Origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

HEAD_MAX: Final = 16 * 1024
BODY_MAX: Final = 64 * 1024
HEAD_SECONDS: Final = 10.0
"""For a request to arrive, and for the server to be dialled."""
CONNECTIONS_MAX: Final = 64
PIECE: Final = 64 * 1024

_REQUEST = re.compile(r"(GET|POST) (/[!-~]*) HTTP/1\.1")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*?)[ \t]*")
_LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)
_OWN: Final = frozenset(
    {"host", "authorization", "connection", "keep-alive", "proxy-connection", "proxy-authorization"}
)


class Refused(Exception):
    """A request that is not carried; the text says why."""

    def __init__(self, status: str, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Door:
    """Where requests go and what they are given. `server`: the API's origin, such as https://api.example.com."""

    server: str
    devbox_id: str
    key: str

    def translated(self, head: bytes) -> tuple[bytes, int]:
        """The request as the server gets it, and the size of its body. Raises Refused."""
        try:
            first, *lines = head.decode("ascii").split("\r\n")
        except UnicodeDecodeError:
            raise Refused("400 Bad Request", "the request has bytes that are not ASCII") from None
        asked = _REQUEST.fullmatch(first)
        if asked is None:
            raise Refused("400 Bad Request", "only GET and POST of HTTP/1.1 are carried")
        method, target = asked.groups()
        path, _, query = target.partition("?")
        if not path.startswith("/pty/"):
            raise Refused("404 Not Found", "only /pty/ is here")
        headers: list[tuple[str, str]] = []
        for line in lines:
            header = _HEADER.fullmatch(line)
            if header is None:
                raise Refused("400 Bad Request", "a header is malformed")
            headers.append((header[1].lower(), header[2]))
        given = dict(headers)
        if "origin" in given:
            raise Refused("403 Forbidden", "pages in a browser are not served")
        if _LOOPBACK.fullmatch(given.get("host", "")) is None:
            raise Refused("403 Forbidden", "the Host header must name this machine's loopback")
        if "transfer-encoding" in given:
            raise Refused("411 Length Required", "a body must say its length")
        size = given.get("content-length", "0")
        if not size.isdecimal() or len(size) > 9 or int(size) > BODY_MAX or len(given) != len(headers):
            raise Refused("400 Bad Request", f"a body has at most {BODY_MAX} bytes, and each header comes once")
        upgrade = given.get("upgrade", "").lower() == "websocket"
        fields = [pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] not in ("devbox_id", "token")]
        told = [
            f"{method} {path}?{urlencode([*fields, ('devbox_id', self.devbox_id)])} HTTP/1.1",
            f"host: {urlsplit(self.server).netloc}",
            f"authorization: Bearer {self.key}",
            f"connection: {'upgrade' if upgrade else 'close'}",
            *(f"{name}: {value}" for name, value in headers if name not in _OWN),
        ]
        return "\r\n".join(told).encode() + b"\r\n\r\n", int(size)

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server. Raises OSError."""
        there = urlsplit(self.server)
        secure = there.scheme == "https"
        return await asyncio.open_connection(
            there.hostname,
            there.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
        )


class Proxy:
    """The listening door."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._open = 0
        self._server: asyncio.Server | None = None

    async def listen(self, port: int) -> int:
        """Begin to listen; the port. Raises OSError when it is taken."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=HEAD_MAX)
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > CONNECTIONS_MAX:
                raise Refused("503 Service Unavailable", f"{CONNECTIONS_MAX} connections are open already")
            if owner_of(writer.get_extra_info("peername")[1]) not in (0, os.getuid()):
                raise Refused("403 Forbidden", "this door is another user's")
            await self._carry(reader, writer)
        except Refused as no:
            body = str(no).encode()
            head = (
                f"HTTP/1.1 {no.status}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close"
            )
            writer.write(head.encode() + b"\r\n\r\n" + body)
        except (OSError, EOFError):
            pass  # whoever is left sees the end
        finally:
            self._open -= 1
            with contextlib.suppress(OSError):
                writer.close()
                await writer.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                except asyncio.LimitOverrunError:
                    raise Refused("431 Request Header Fields Too Large", f"over {HEAD_MAX} bytes") from None
                request, size = self._door.translated(head[:-4])
                request += await reader.readexactly(size)
        except TimeoutError:
            raise Refused("408 Request Timeout", f"the request did not arrive within {HEAD_SECONDS:g} s") from None
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                answers, to_server = await self._door.dial()
        except (OSError, TimeoutError) as error:
            raise Refused("502 Bad Gateway", f"{self._door.server} cannot be reached: {error}") from None
        try:
            to_server.write(request)
            outward = asyncio.create_task(_pump(reader, to_server))
            try:
                await _pump(answers, writer)
            finally:
                outward.cancel()
                await asyncio.wait({outward})
        finally:
            to_server.close()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Bytes as they come, never more than a piece ahead of who takes them, to the end."""
    with contextlib.suppress(OSError):
        while data := await source.read(PIECE):
            target.write(data)
            await target.drain()
        if target.can_write_eof():
            target.write_eof()


def owner_of(port: int) -> int | None:
    """The user id behind that port of the loopback, None when it is not told (any more)."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == f"0100007F:{port:04X}":
            return int(fields[7])
    return None
