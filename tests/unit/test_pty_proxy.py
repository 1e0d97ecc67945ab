"""The door to terminals on this machine's loopback: what it carries, and for whom."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from pty.proxy import HEAD_MAX, Door, Proxy, Refused

DOOR = Door("https://api.example.com:444", "dbx_mine", "ak_secret")


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode()


def test_the_devbox_and_the_key_are_ours_whatever_was_said() -> None:
    request, size = DOOR.translated(
        head(
            "POST /pty/x/control?cols=1&devbox_id=dbx_other&token=t HTTP/1.1",
            "Host: 127.0.0.1:5000",
            "Authorization: Bearer theirs",
            "Connection: keep-alive",
            "Content-Length: 12",
            "Accept: */*",
        )
    )
    assert request.decode() == (
        "POST /pty/x/control?cols=1&devbox_id=dbx_mine HTTP/1.1\r\nhost: api.example.com:444\r\n"
        "authorization: Bearer ak_secret\r\nconnection: close\r\ncontent-length: 12\r\naccept: */*\r\n\r\n"
    )
    assert size == 12


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["GET /v1/devboxes HTTP/1.1", "Host: localhost"], "404"),
        (["DELETE /pty/x HTTP/1.1", "Host: localhost"], "400"),
        (["GET /pty/x HTTP/1.0", "Host: localhost"], "400"),
        (["GET http://other/pty/x HTTP/1.1", "Host: localhost"], "400"),
        (["GET /pty/x HTTP/1.1"], "403"),
        (["GET /pty/x HTTP/1.1", "Host: evil.example"], "403"),
        (["GET /pty/x HTTP/1.1", "Host: localhost", "Host: evil.example"], "403"),
        (["GET /pty/x HTTP/1.1", "Host: localhost", "Origin: null"], "403"),
        (["POST /pty/x HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked"], "411"),
        (["POST /pty/x HTTP/1.1", "Host: localhost", "Content-Length: 65537"], "400"),
        (["POST /pty/x HTTP/1.1", "Host: localhost", "Content-Length: 1", "Content-Length: 2"], "400"),
        (["GET /pty/x HTTP/1.1", "Host: localhost", "X: a\nAuthorization: y"], "400"),
        (["GET /pty/x HTTP/1.1", "Host: localhost", "X : a"], "400"),
        (["GET /pty/\x00 HTTP/1.1", "Host: localhost"], "400"),
    ],
)
def test_what_is_not_carried(lines: list[str], status: str) -> None:
    with pytest.raises(Refused) as refused:
        DOOR.translated(head(*lines))
    assert refused.value.status.startswith(status), str(refused.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_of_the_machine_is_not_served() -> None:
    program = (
        "import encodings.idna, os, socket, sys; os.setuid(int(sys.argv[2])); "
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10); "
        "s.sendall(b'GET /pty/x HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n'); "
        "print(s.recv(12).decode())"
    )

    async def said(uid: int) -> str:
        port = await Proxy(Door("http://127.0.0.1:1", "dbx_mine", "ak_secret")).listen(0)
        argv = [sys.executable, "-c", program, str(port), str(uid)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() or done.stderr

    assert asyncio.run(said(65534)) == "HTTP/1.1 403"
    assert asyncio.run(said(0)) == "HTTP/1.1 502", "nobody is at the server's port"


def test_a_request_that_never_ends_is_given_up() -> None:
    async def run() -> bytes:
        port = await Proxy(DOOR).listen(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /pty/x HTTP/1.1\r\nx: " + b"y" * 3 * HEAD_MAX)
        return await asyncio.wait_for(reader.read(12), 20)

    assert asyncio.run(run()) == b"HTTP/1.1 431"
