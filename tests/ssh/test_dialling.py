"""Connections into a box over a real sshd: the loop's client at one end, the keeper's dials at the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import pathlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from hostd.dials import Dials
from hostd.polling import READ, Poller
from hosts import loop_links
from hosts.client import AsyncHostClient, HostRefused, HostUnreachable
from hosts.dialling import Dialled
from hosts.links import Where
from tests.ssh.loopback import Sshd

BOX = "dbx_" + "0" * 26


class Taken:
    """A client whose request line has been read."""

    def __init__(self, sock: socket.socket) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += sock.recv(1)
        self.request = json.loads(line)
        self._descriptor = sock.detach()

    def release(self) -> tuple[int, bytes]:
        return self._descriptor, b""


class StubKeeper:
    """The keeper's loop with nothing but dials in it."""

    def __init__(self, path: pathlib.Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        path.chmod(0o666)
        self.listener.listen(300)
        self.poller = Poller()
        self.dials = Dials(self.poller, lambda: False)
        self.poller.on(self.listener.fileno(), self._accept, READ)
        threading.Thread(target=self.poller.run, daemon=True).start()

    def _accept(self, _: int) -> None:
        client = Taken(self.listener.accept()[0])
        self.dials.start(client, client.request, b"")

    def cut(self) -> None:
        self.poller.after(0, self.dials.box_gone)
        with socket.socket(socket.AF_UNIX) as waker:  # the loop looks at its timers when something happens
            waker.connect(self.listener.getsockname())
            waker.sendall(b'{"port": 1}\n')
            waker.recv(1)


@pytest.fixture
def keeper(sshd: Sshd, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> StubKeeper:
    path = folder / "hostd.sock"
    monkeypatch.setattr(loop_links, "where_is", lambda _host: Where(sshd.login(), str(path), None))
    return StubKeeper(path)


@contextlib.asynccontextmanager
async def server(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        try:
            await asyncio.wait_for(work(), 60)
        finally:
            await loop_links.close_links()

    asyncio.run(main())


def dial(port: int) -> Dialled:
    return AsyncHostClient("hst_test").dial(box=BOX, port=port)


async def everything(connection: Dialled) -> bytes:
    found = []
    while data := await connection.read():
        found.append(data)
    return b"".join(found)


def test_both_ways_and_half_closed(keeper: StubKeeper) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        given = await reader.read()
        writer.write(b"%d bytes, " % len(given) + given[-5:])
        writer.close()

    async def work() -> None:
        async with server(serve) as port, dial(port) as connection:
            assert connection.is_fresh
            await connection.write(b"x" * 3_000_000)
            await connection.write(b"hello")
            connection.end()
            assert await everything(connection) == b"3000005 bytes, hello"
            assert connection.reason == "end" and not connection.is_fresh

    run(work)


def test_nothing_listens(keeper: StubKeeper) -> None:
    async def work() -> None:
        async with server(lambda reader, writer: asyncio.sleep(0)) as port:
            pass
        with pytest.raises(HostRefused) as refused:
            await dial(port).connect()
        assert refused.value.code == "refused"

    run(work)


def test_a_slow_reader_and_a_slow_server_are_waited_for(keeper: StubKeeper) -> None:
    may_read = asyncio.Event()
    poured = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal poured
        if await reader.readexactly(1) == b"p":
            for _ in range(400):
                writer.write(bytes(100_000))
                await writer.drain()
                poured += 100_000
        else:
            await may_read.wait()
            writer.write(b"%d" % len(await reader.read()))
        writer.close()

    async def work() -> None:
        async with server(serve) as port:
            async with dial(port) as connection:
                await connection.write(b"p")
                await asyncio.sleep(0.5)
                before = poured
                await asyncio.sleep(0.3)
                assert poured == before < 30_000_000, "the server is held back"
                assert len(await everything(connection)) == 40_000_000
            async with dial(port) as connection:
                writing = asyncio.ensure_future(connection.write(b"w" + bytes(40_000_000)))
                await asyncio.sleep(0.5)
                assert not writing.done(), "we are held back"
                may_read.set()
                await writing
                connection.end()
                assert await everything(connection) == b"40000000"

    run(work)


def test_a_cut_is_no_end(keeper: StubKeeper) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"half")
        await reader.read()

    async def work() -> None:
        async with server(serve) as port, dial(port) as connection:
            assert await connection.read() == b"half"
            await asyncio.to_thread(keeper.cut)
            with pytest.raises(HostUnreachable, match="was cut"):
                await connection.read()
            assert connection.reason is None

    run(work)


def test_many_at_once_keep_apart(keeper: StubKeeper) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    async def work() -> None:
        async def one(port: int, number: int) -> None:
            data = b"%d " % number * 20_000
            async with dial(port) as connection:
                writing = asyncio.ensure_future(connection.write(data))
                got = b""
                while len(got) < len(data):
                    got += await connection.read()
                await writing
                assert got == data

        async with server(serve) as port:
            await asyncio.gather(*(one(port, number) for number in range(100)))
        async with asyncio.timeout(20):
            while keeper.dials.all:
                await asyncio.sleep(0.05)

    run(work)
