"""What a server in a devbox makes of its tunnel's work: never so much in one turn that others wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.protocol import State

from tunnels.doors import Door
from tunnels.upstream import PIECES, Upstream
from tunnels.websockets import BROKEN, Link


class Said:
    """A server's connection from which everything has arrived."""

    reason = None

    def __init__(self, data: bytes) -> None:
        self._left = [data]

    async def read(self, size: int = 0) -> bytes:
        return self._left.pop() if self._left else b""

    async def write(self, data: bytes) -> None:
        pass


def _door() -> Door:
    return Door("tun_1", "dbx_1", "acc_1", "running", "hst_1", None, False, False, 1)


async def _turns_of_others(work: asyncio.Future[Any]) -> int:
    turns = 0
    while not work.done():
        turns += 1
        await asyncio.sleep(0)
    return turns


def test_a_flood_of_frames_leaves_turns_to_others() -> None:
    scope = {"headers": [(b"host", b"a")], "raw_path": b"/", "query_string": b"", "subprotocols": []}

    async def main(flood: bytes) -> tuple[int, Any, list[Any]]:
        said: Any = Said(flood)
        link = Link(said, _door(), scope, None)
        link._wire.state = State.OPEN
        link._wire.parser = link._wire.parse()
        next(link._wire.parser)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        down = asyncio.ensure_future(link._down(send))
        turns = await _turns_of_others(down)
        return turns, down.result()[0], sent

    size = 1 << 16
    for flood, expected in (
        (b"\x01\x01a" + b"\x00\x00" * (size // 2) + b"\x80\x01b", ["ab"]),
        (b"\x89\x00" * (size // 2), []),
    ):
        turns, code, sent = asyncio.run(main(flood))
        assert [message["text"] for message in sent] == expected
        assert code == BROKEN, "it broke off then"
        assert turns > size // 4096, "64 KiB of tiny frames were taken apart in a few turns"


def test_a_flood_of_chunks_comes_in_small_portions() -> None:
    async def main() -> tuple[list[int], bytes]:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        said: Any = Said(head + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
        upstream = Upstream(said, ("hst_1", "dbx_1", 80))
        await upstream.begin(b"GET", b"/", [(b"host", b"a")])
        await upstream.finish()
        assert (await upstream.head()).status_code == 200
        portions = []
        while data := await upstream.body():
            portions.append(data)
        return [len(portion) for portion in portions], b"".join(portions)

    sizes, whole = asyncio.run(main())
    assert whole == b"x" * 1000 and max(sizes) <= PIECES
