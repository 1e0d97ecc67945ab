"""HTTP/1.1 by hand: requests and server-sent events over raw sockets, hundreds or thousands of them in one thread.

In charge of bytes on sockets. A client library would use more of the machine than the server that is measured, and
would hide how often and when bytes come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson

CONNECT_SECONDS = 20.0
RECEIVE_BYTES = 1 << 18
NO_PORT_YET = 24
"""IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect, so each source address has all of them for itself."""


class Unexpected(RuntimeError):
    """The server said or did what it should not."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where requests go, and with which key. ``source``: the local address that they come from."""

    base_url: str
    key: str
    source: str | None = None

    def connect(self) -> socket.socket:
        """A connection. Raises OSError."""
        parts = urlsplit(self.base_url)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_SECONDS)
            if self.source is not None:
                sock.setsockopt(socket.IPPROTO_IP, NO_PORT_YET, 1)
                sock.bind((self.source, 0))
            sock.connect((parts.hostname, parts.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def request(self, method: str, path: str, body: object = None, more: Mapping[str, str] | None = None) -> bytes:
        """The bytes of a request."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: bench", f"Authorization: Bearer {self.key}"]
        lines += [f"{name}: {value}" for name, value in (more or {}).items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes

    def json(self) -> Any:
        return orjson.loads(self.body)


class Inbox:
    """Takes answers with a Content-Length apart as they arrive."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Answer | None:
        """More bytes; the answer once it is whole. Raises Unexpected for a connection that ends before."""
        if not data:
            raise Unexpected("the server closed a connection that was owed an answer")
        self._held += data
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return None
        status, headers = head(bytes(self._held[:end]))
        length = int(headers["content-length"])
        if len(self._held) < end + 4 + length:
            return None
        body = bytes(self._held[end + 4 : end + 4 + length])
        del self._held[: end + 4 + length]
        return Answer(status, body)


def head(raw: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers, by lower-case name, of an answer's head."""
    first, *lines = raw.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in fields}


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event that carried data. ``at``: when its last byte came, on the clock of the day (seconds)."""

    name: str
    data: dict[str, Any]
    at: float


class Events:
    """One answer of server-sent events, read without ever blocking."""

    def __init__(self, server: Server, path: str) -> None:
        """Ask. Raises OSError."""
        self.sock = server.connect()
        self.sock.sendall(server.request("GET", path))
        self.sock.setblocking(False)
        self.ended = False
        self.received = 0
        """Bytes that came, head and framing included."""
        self._held = b""
        self._text = bytearray()
        self._head = True
        self._left = 0

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self, most: int = RECEIVE_BYTES) -> list[Event]:
        """Events that have come whole, none when nothing has. Raises Unexpected for a cut and for a refusal."""
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return []
        if not data:
            raise Unexpected("the stream was cut before its end")
        self.received += len(data)
        self._text += self._unchunked(self._held + data if self._held else data)
        if not self._text.endswith(b"\n\n"):
            cut = self._text.rfind(b"\n\n")
            if cut < 0:
                return []
            whole, self._text = self._text[: cut + 2], self._text[cut + 2 :]
        else:
            whole, self._text = self._text, bytearray()
        return list(_events(bytes(whole), time.time()))

    def _unchunked(self, data: bytes) -> bytes:
        """The body's bytes in `data`, which begins where the last call stopped; what is not whole is held back."""
        at = 0
        if self._head:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._held = data
                return b""
            status, headers = head(data[:end])
            if status != 200 or headers.get("transfer-encoding") != "chunked":
                raise Unexpected(f"status {status}: {data[end + 4 : end + 300]!r}")
            self._head, at = False, end + 4
        parts: list[bytes] = []
        while at < len(data):
            if self._left:
                piece = data[at : at + self._left]
                parts.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\r\n", at + 2 if data.startswith(b"\r\n", at) else at)
            if end < 0 or (data[at : at + 1] == b"\r" and end == at):
                break
            size = int(data[at:end].strip() or b"-1", 16)
            if size < 0:
                break
            if size == 0:
                if len(data) < end + 4:
                    break
                self.ended, at = True, len(data)
            else:
                self._left, at = size, end + 2
        self._held = data[at:]
        return b"".join(parts)

    def close(self) -> None:
        self.sock.close()


def _events(text: bytes, at: float) -> Iterator[Event]:
    for block in text.split(b"\n\n"):
        if block and not block.startswith(b":"):
            name, _, line = block.rpartition(b"\n")
            yield Event(name.removeprefix(b"event: ").decode(), orjson.loads(line.removeprefix(b"data: ")), at)


def follow_all(streams: Sequence[Events], seconds: float, take: Callable[[int, Event], None]) -> None:
    """Read all of them to their ends; ``take`` gets each event with the number of its stream.

    Raises TimeoutError when that takes longer than ``seconds``, and Unexpected for a stream that was cut.
    """
    deadline = time.monotonic() + seconds
    open_ones = len(streams)
    with selectors.EpollSelector() as waiting:
        for number, stream in enumerate(streams):
            waiting.register(stream, selectors.EVENT_READ, number)
        while open_ones:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{open_ones} of {len(streams)} streams have not ended within {seconds:g} s")
            for key, _ in waiting.select(1.0):
                stream = streams[key.data]
                for event in stream.read():
                    take(key.data, event)
                if stream.ended:
                    waiting.unregister(stream)
                    open_ones -= 1


@dataclasses.dataclass
class _Line:
    """One kept connection of `exchange`."""

    sock: socket.socket
    inbox: Inbox
    number: int
    began: float


def exchange(
    server: Server, requests: Iterable[bytes], connections: int, seconds: float
) -> Iterator[tuple[int, Answer, float, float]]:
    """Send these over kept connections, one at a time on each: (number, answer, milliseconds, when it came).

    The next requests are drawn as connections come free, until there are none or ``seconds`` have passed; what is on
    its way then is waited for. Raises TimeoutError when an answer takes longer than a minute, Unexpected, OSError.
    """
    todo = enumerate(requests)
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.EpollSelector())

        def send(sock: socket.socket, key: selectors.SelectorKey | None) -> None:
            upcoming = next(todo, None) if time.monotonic() < end else None
            if upcoming is None:
                if key is not None:
                    waiting.unregister(sock)
                return
            line = key.data if key is not None else _Line(sock, Inbox(), 0, 0.0)
            line.number, line.began = upcoming[0], time.perf_counter()
            if key is None:
                waiting.register(sock, selectors.EVENT_READ, line)
            sock.sendall(upcoming[1])

        for _ in range(connections):
            sock = server.connect()
            stack.callback(sock.close)
            send(sock, None)
        while waiting.get_map():
            ready = waiting.select(60.0)
            if not ready:
                raise TimeoutError("no answer for a minute")
            for key, _ in ready:
                line: _Line = key.data
                answer = line.inbox.feed(line.sock.recv(RECEIVE_BYTES))
                if answer is None:
                    continue
                now = time.perf_counter()
                found = (line.number, answer, (now - line.began) * 1000, time.time())
                send(line.sock, key)
                yield found
