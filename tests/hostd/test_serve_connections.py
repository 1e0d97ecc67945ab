"""A connection's clocks and bounds, without a daemon."""

from __future__ import annotations

import asyncio
import json
import socket
from types import SimpleNamespace
from typing import Any

from hostd import messages
from hostd import serve as module
from hostd.serve import Connection

BOX = "dbx_01jd4k3v9w8x7y6z5a4b3c2d1e"


class Door:
    """What a connection needs of the daemon."""

    def __init__(self) -> None:
        self.connections: set[Connection] = set()
        self.routed: list[tuple[dict[str, Any], bytes]] = []
        self.keepers = SimpleNamespace(route=self.route)
        self.is_leaving = False
        self.tasks: list[asyncio.Future[None]] = []

    def open(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.connections.add(Connection(self, theirs))  # type: ignore[arg-type]
        return ours

    def route(self, sock: socket.socket, request: dict[str, Any], rest: bytes) -> None:
        self.routed.append((request, rest))
        sock.close()

    def run(self, work: Any) -> None:
        self.tasks.append(asyncio.ensure_future(work))

    async def answer(self, request: dict[str, Any]) -> tuple[bytes, None]:
        await asyncio.sleep(0)
        return messages.ok(verb=request["verb"], body=len(request.get("body", b""))), None


async def receive(sock: socket.socket, seconds: float = 2.0) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), seconds)


def test_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.1)

    async def main() -> None:
        door = Door()
        sock = door.open()
        sock.send(b'{"v":1,')  # half a line buys no time
        assert await receive(sock) == b""
        assert not door.connections

    asyncio.run(main())


def test_a_kept_connection_is_closed_when_idle(monkeypatch):
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.1)

    async def main() -> None:
        door = Door()
        sock = door.open()
        sock.send(messages.request("hello"))
        assert json.loads(await receive(sock))["verb"] == "hello"
        assert await receive(sock) == b""

    asyncio.run(main())


def test_what_follows_a_box_verb_is_handed_over_unread():
    async def main() -> None:
        door = Door()
        sock = door.open()
        sock.send(messages.request("stdin", box=BOX, id="exe_" + BOX[4:], request="r1", body=5) + b"hello{not json")
        while not door.routed:
            await asyncio.sleep(0.01)
        request, rest = door.routed[0]
        assert request["verb"] == "stdin" and rest == b"hello{not json"
        assert not door.connections

    asyncio.run(main())


def test_a_line_that_comes_in_pieces():
    async def main() -> None:
        door = Door()
        sock = door.open()
        for byte in messages.request("hello") * 2:
            sock.send(bytes([byte]))
            await asyncio.sleep(0)
        found = b""
        while found.count(b"\n") < 2:
            found += await receive(sock)

    asyncio.run(main())


def test_a_body_is_read_whole_and_what_follows_is_the_next_request():
    async def main() -> None:
        door = Door()
        sock = door.open()
        data = b"x" * 300_000
        loop = asyncio.get_running_loop()
        whole = messages.request("ship", digest="0" * 64, body=len(data)) + data + messages.request("hello")
        sender = asyncio.ensure_future(loop.sock_sendall(sock, whole))
        found = b""
        while found.count(b"\n") < 2:
            found += await receive(sock)
        await sender
        ship, hello = map(json.loads, found.splitlines())
        assert ship["body"] == len(data) and hello["verb"] == "hello"

    asyncio.run(main())


def test_a_client_that_leaves_in_the_middle():
    async def main() -> None:
        door = Door()
        for sent in (b"", b"{", messages.request("ship", digest="0" * 64, body=10) + b"x", messages.request("hello")):
            sock = door.open()
            sock.send(sent or b" ")
            await asyncio.sleep(0.01)
            sock.close()
        await asyncio.sleep(0.05)
        assert not door.connections
        assert not [task for task in door.tasks if task.done() and task.exception()]

    asyncio.run(main())
