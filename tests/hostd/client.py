"""A small blocking client of hostd's socket, for tests and trials.

    with Client("/run/berth-3/hostd.sock") as host:
        host.call("hello")
        host.spawn(box, exe, argv=["/bin/true"])

In charge of nothing the server side needs: that client is `hosts.client`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from hostd import messages
from hostd.messages import FrameParser, ProtocolError

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
USER: dict[str, Any] = {"name": "user", "uid": 1000, "gid": 1000, "home": "/home/user"}
LIMITS: dict[str, Any] = {"cpu_millis": 1000, "memory_bytes": 512 << 20, "pids": 256, "disk_bytes": 1 << 30}


def new_id(prefix: str) -> str:
    """A prefixed ULID as the server side makes them."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    return f"{prefix}_" + "".join(_ALPHABET[(number >> (5 * at)) & 31] for at in reversed(range(26)))


class Client:
    """One call per connection unless `call` is used on a kept one. Raises messages.Refused, OSError, ProtocolError."""

    def __init__(self, path: str, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def connect(self) -> Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        sock.connect(self.path)
        return Connection(sock)

    def call(self, verb: str, body: bytes | None = None, **fields: Any) -> dict[str, Any]:
        with self.connect() as connection:
            return connection.call(verb, body, **fields)

    def create(self, box: str, image: str, fence: int = 1, **limits: int) -> dict[str, Any]:
        """prepare_disk and boot; the reply to boot, without the clock in it, by which two replies differ."""
        wanted = {**LIMITS, **limits}
        self.call("prepare_disk", box=box, fence=fence, image=image, disk_bytes=wanted["disk_bytes"])
        asked_at = time.monotonic()
        reply = dict(self.call("boot", box=box, fence=fence, hostname="devbox", **wanted))
        assert asked_at - 0.01 < reply.pop("monotonic") < time.monotonic() + 0.01
        return reply

    def destroy(self, box: str, fence: int = 2**40, keep_disk: bool = False) -> None:
        self.call("destroy", box=box, fence=fence, keep_disk=keep_disk)

    def spawn(
        self,
        box: str,
        id: str,
        command: str | None = None,
        *,
        argv: list[str] | None = None,
        fence: int = 1,
        hold_ms: int | None = None,
        **body: Any,
    ) -> dict[str, Any]:
        what = {"command": command} if argv is None else {"argv": argv}
        whole = {"env": {}, "cwd": "/home/user", "user": USER, "stdin": "none", **what, **body}
        data = json.dumps(whole).encode()
        return self.call("spawn", data, box=box, id=id, fence=fence, hold_ms=hold_ms)

    def wait(self, box: str, id: str, seconds: float = 30.0) -> dict[str, Any]:
        """Poll `state` until the execution has exited."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.call("state", box=box, id=id)
            if state["state"] == "exited":
                return state
            assert time.monotonic() < deadline, f"{id} still runs after {seconds} s"
            time.sleep(0.01)

    def read(self, box: str, id: str, stream: str = "stdout", offset: int = 0, limit: int = 1 << 20) -> bytes:
        with self.connect() as connection:
            reply = connection.call("read", box=box, id=id, stream=stream, offset=offset, limit=limit)
            return connection.take(reply["body"])

    def follow(self, box: str, id: str, stream: str = "stdout", offset: int = 0) -> Follow:
        connection = self.connect()
        reply = connection.call("follow", box=box, id=id, stream=stream, offset=offset)
        return Follow(connection, reply)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        with self.connect() as connection:
            connection.call("watch")
            yield Watch(connection)


class Connection:
    """A connection and what was read from it too far."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._held = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, verb: str, body: bytes | None = None, **fields: Any) -> None:
        if body is not None:
            fields["body"] = len(body)
        self.socket.sendall(messages.request(verb, **fields) + (body or b""))

    def call(self, verb: str, body: bytes | None = None, **fields: Any) -> dict[str, Any]:
        self.send(verb, body, **fields)
        return messages.parse_reply(self.line())

    def more(self) -> bytes:
        """What arrived; b"" when the other side has closed."""
        if self._held:
            held, self._held = self._held, b""
            return held
        return self.socket.recv(1 << 18)

    def line(self) -> bytes:
        found = bytearray()
        while b"\n" not in found:
            data = self.more()
            if not data:
                raise ProtocolError(f"the connection ended in the middle of a line: {bytes(found[:200])!r}")
            found += data
        line, _, self._held = bytes(found).partition(b"\n")
        return line

    def take(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            data = self.more()
            if not data:
                raise ProtocolError(f"the body ended after {len(found)} of {length} bytes")
            found += data
        self._held = bytes(found[length:])
        return bytes(found[:length])


class Follow:
    """A followed stream: iterate for its bytes; `trailer` is set at its end."""

    def __init__(self, connection: Connection, reply: dict[str, Any]) -> None:
        self.connection = connection
        self.offset = reply["offset"]
        self.trailer: dict[str, Any] | None = None

    def __enter__(self) -> Follow:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.socket.close()

    def __iter__(self) -> Iterator[bytes]:
        parser = FrameParser()
        while parser.trailer is None:
            data = self.connection.more()
            if not data:
                raise ProtocolError("the stream was cut")
            yield from parser.feed(data)
        self.trailer = parser.trailer


class Watch:
    """A watching connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def next(self, seconds: float = 10.0, heartbeats: bool = False, notices: bool = False) -> dict[str, Any]:
        """The next event; heartbeats and notices are left out unless they are wanted."""
        deadline = time.monotonic() + seconds
        while True:
            self.connection.socket.settimeout(max(0.001, deadline - time.monotonic()))
            event = dict(messages.parse_event(self.connection.line()))
            wanted = {"heartbeat": heartbeats, "notice": notices}
            if wanted.get(str(event["event"]), True):
                return event

    def ack(self, *pairs: tuple[str, str]) -> None:
        for line in messages.acks(pairs):
            self.connection.socket.sendall(line)


def outputs(reply: dict[str, Any]) -> tuple[bytes, bytes]:
    """stdout and stderr that came inside a reply or an event."""
    return base64.b64decode(reply["stdout"]), base64.b64decode(reply["stderr"])
