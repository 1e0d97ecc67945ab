"""Tunnels under attack, on a real server: servers in devboxes that answer with what may hurt, clients that insist."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from tests.conftest import Party
from tests.sockets.conftest import Granian
from tests.sockets.tunnels import DOMAIN, Devbox, Serve, head_of, saying, serving, tell
from tunnels.doors import GUESSES

UPGRADE = (
    b"GET /%b HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.fixture
def devbox(served: Granian, key: Party) -> Devbox:
    return Devbox(served, key.account_id)


def status_of(devbox: Devbox, port: int, request: bytes) -> bytes:
    """The status line of the answer to exactly these bytes, {host} in them replaced."""
    with socket.create_connection(("127.0.0.1", devbox.served.port), timeout=20) as sock:
        sock.sendall(request.replace(b"{host}", devbox.host(port).encode()))
        return sock.makefile("rb").readline()


@pytest.mark.parametrize("control", [b"\x01", b"\x08", b"\x1b", b"\x7f"])
def test_control_characters_in_an_answers_headers_are_502(devbox: Devbox, control: bytes) -> None:
    with serving(saying(b"HTTP/1.1 200 OK\r\nX-A: a" + control + b"b\r\nContent-Length: 2\r\n\r\nok")) as port:
        answer = devbox.ask(port)
    assert answer.status_code == 502 and "control character in x-a" in answer.json()["message"]


def test_chunks_that_are_none_are_the_clients_fault(devbox: Devbox) -> None:
    head = b"POST / HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with serving(tell) as port:
        for body in (b'1;x="\ny"\r\nx\r\n0\r\n\r\n', b"zz\r\nx\r\n0\r\n\r\n", b"5\r\nabcdefg\r\n0\r\n\r\n"):
            assert b" 400 " in status_of(devbox, port, head + body), body


def test_a_target_that_is_not_ascii_is_refused(devbox: Devbox) -> None:
    with serving(tell) as port:
        assert b" 400 " in status_of(devbox, port, UPGRADE % b"\xc3\xa4")
        assert b" 400 " in status_of(devbox, port, b"GET /\xc3\xa4 HTTP/1.1\r\nHost: {host}\r\n\r\n")


def flooding(first: bytes, flood: bytes, times: int = 1 << 30) -> Serve:
    """Answers with `first` and then with `flood` again and again."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await head_of(reader) is None:
            return
        writer.write(first)
        while times and not writer.is_closing():
            writer.write(flood)
            await writer.drain()

    return serve


def test_interim_answers_have_an_end(devbox: Devbox) -> None:
    with serving(flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)) as port:
        answer = devbox.ask(port)
    assert answer.status_code == 502 and "more than 100 interim answers" in answer.json()["message"]
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100
    with serving(saying(early + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as port:
        assert devbox.ask(port).text == "ok"


def test_a_page_left_open_on_a_tunnel_that_has_gone_locks_nobody_out(served: Granian, key: Party) -> None:
    address = httpx.HTTPTransport(local_address="127.0.0.4")
    gone = {"host": f"80-{'g' * 26}.{DOMAIN}"}
    with serving(tell) as port, httpx.Client(transport=address, base_url=served.url, timeout=20) as client:
        assert {client.get("/", headers=gone).status_code for _ in range(3 * GUESSES)} == {404}
        locked = Devbox(served, key.account_id, auth_mode="authenticated")
        stale = {"host": locked.host(port), "authorization": "Bearer of-yesterday"}
        assert {client.get("/", headers=stale).status_code for _ in range(3 * GUESSES)} == {401}
        fresh = Devbox(served, key.account_id)
        assert client.get("/", headers={"host": fresh.host(port)}).status_code == 200


def test_a_few_bytes_of_http2_do_not_become_megabytes_of_headers(served: Granian, key: Party) -> None:
    with httpx.Client(base_url=served.url, http1=False, http2=True, timeout=20) as client:
        assert client.get("/v1/accounts/me", headers=[("x", "a" * 3000)] * 20).status_code == 401
        assert client.get("/v1/accounts/me", headers=[("x", "a" * 3000)] * 100).status_code == 431
