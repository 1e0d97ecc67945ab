"""WebSockets through tunnels on a real server: messages, ends, upgrades that are refused, tokens."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from django.db import connection
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.typing import Subprotocol

from tests.conftest import Party
from tests.sockets.conftest import Granian
from tests.sockets.tunnels import Devbox, saying, serving, tell


@pytest.fixture
def devbox(served: Granian, key: Party) -> Devbox:
    return Devbox(served, key.account_id)


@pytest.fixture(scope="module")
def telling() -> Iterator[int]:
    with serving(tell) as port:
        yield port


async def _app(socket: ServerConnection) -> None:
    assert socket.request is not None
    if socket.request.path == "/headers":
        await socket.send(json.dumps(list(socket.request.headers.raw_items())))
    elif socket.request.path == "/close":
        await socket.close(4321, "as the app says")
        return
    elif socket.request.path == "/break":
        socket.transport.abort()
        return
    elif socket.request.path == "/large":
        await socket.send(b"x" * (17 << 20))
        return
    async for message in socket:
        await socket.send(message)


@pytest.fixture
def app() -> Iterator[int]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def refuse(connection_: ServerConnection, request: Any) -> Any:
        return connection_.respond(403, "not today\n") if request.path == "/refuse" else None

    async def begin() -> Any:
        return await serve_websockets(
            _app,
            "127.0.0.1",
            0,
            select_subprotocol=lambda _, offered: Subprotocol("chat") if "chat" in offered else None,
            process_request=refuse,
            max_size=None,
        )

    server = asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    yield server.sockets[0].getsockname()[1]

    async def end() -> None:
        server.close()
        await server.wait_closed()

    asyncio.run_coroutine_threadsafe(end(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def connected(devbox: Devbox, port: int, path: str = "/", **rest: Any) -> Any:
    return websockets.connect(
        f"ws://{devbox.host(port)}:{devbox.served.port}{path}", host="127.0.0.1", max_size=None, open_timeout=20, **rest
    )


def test_messages_both_ways(devbox: Devbox, app: int) -> None:
    async def main() -> None:
        async with connected(devbox, app, subprotocols=["nothing", "chat"]) as client:
            assert client.subprotocol == "chat"
            for message in ("text, ä", b"bytes\x00", "", b"", "x" * 1_000_000, os.urandom(5_000_000)):
                await client.send(message)
                assert await asyncio.wait_for(client.recv(), 20) == message
            await client.send(["in ", "pieces"])
            assert await asyncio.wait_for(client.recv(), 20) == "in pieces"
            await asyncio.gather(*(client.send(b"%d" % n) for n in range(500)))
            assert [await asyncio.wait_for(client.recv(), 20) for _ in range(500)] == [b"%d" % n for n in range(500)]

    asyncio.run(main())


def test_what_the_server_sees_of_an_upgrade(devbox: Devbox, app: int) -> None:
    async def main() -> None:
        extra = {
            "x-own": "1",
            "authorization": "Bearer app",
            "x_forwarded_for": "9.9.9.9",
            "x-forwarded-for": "8.8.8.8",
        }
        async with connected(devbox, app, "/headers", additional_headers=extra, origin="https://a.test") as client:
            got = {name.lower(): value for name, value in json.loads(await client.recv())}
        assert (got["x-own"], got["authorization"], got["origin"]) == ("1", "Bearer app", "https://a.test")
        assert got["x-forwarded-for"] == "8.8.8.8, 127.0.0.1" and "x_forwarded_for" not in got
        assert got["host"].startswith(devbox.host(app)) and "sec-websocket-extensions" not in got

    asyncio.run(main())


def test_ends_are_told_to_both(devbox: Devbox, app: int) -> None:
    async def main() -> None:
        for path, code in (("/close", 4321), ("/break", 1011), ("/large", 1009)):
            async with connected(devbox, app, path) as client:
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await asyncio.wait_for(client.recv(), 20)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == code, path
        for path, status in (("/refuse", 403),):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with connected(devbox, app, path):
                    pass
            assert (refused.value.response.status_code, refused.value.response.body) == (status, b"not today\n")

    asyncio.run(main())


def test_upgrades_that_lead_nowhere(devbox: Devbox, telling: int) -> None:
    async def refused(port: int, **rest: Any) -> tuple[int, str]:
        with pytest.raises(websockets.InvalidStatus) as error:
            async with connected(devbox, port, **rest):
                pass
        response = error.value.response
        return response.status_code, (response.body or b"").decode()

    async def main() -> None:
        status, body = await refused(1)
        assert status == 502 and "nothing_listens" in body
        assert (await refused(telling))[0] in (200, 502), "a server that knows no WebSockets"

    asyncio.run(main())
    with serving(saying(b"nonsense\r\n\r\n")) as port:
        assert asyncio.run(refused(port))[0] == 502


def test_a_token_opens_a_websocket(served: Granian, key: Party, app: int) -> None:
    devbox = Devbox(served, key.account_id, auth_mode="authenticated")
    token = devbox.view["auth_token"]

    async def main() -> None:
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with connected(devbox, app):
                pass
        assert refused.value.response.status_code == 401
        for header in ("authorization", "x-runloop-tunnel-authorization"):
            async with connected(devbox, app, "/headers", additional_headers={header: f"Bearer {token}"}) as client:
                assert token not in await client.recv()
        async with connected(devbox, app, "/headers", subprotocols=[token, "chat"]) as client:
            assert client.subprotocol == "chat" and token not in await client.recv()
        async with connected(devbox, app, subprotocols=[token]) as client:
            assert client.subprotocol == token

    asyncio.run(main())


def test_a_websocket_ends_with_its_tunnel(devbox: Devbox, app: int) -> None:
    async def main() -> None:
        async with connected(devbox, app) as client:
            await client.send("still")
            assert await asyncio.wait_for(client.recv(), 20) == "still"
            await asyncio.to_thread(remove)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await asyncio.wait_for(client.recv(), 30)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "the tunnel was removed")

    def remove() -> None:
        with connection.cursor() as cursor:
            cursor.execute("DELETE FROM tunnels_tunnel WHERE devbox_id = %s", [devbox.id])
        connection.close()

    asyncio.run(main())
