"""Tunnels: what one adds to a request over a kept connection, and bytes through one each way, beside the direct way."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from config.state import CHECKOUT
from tests.bench.creating import timed
from tests.bench.figures import Figure, figure
from tests.bench.installation import Target
from tests.bench.shares import Meter, Parts
from tests.bench.wire import Inbox, Server, Unexpected, head

MIB = 1024 * 1024
PORT = 8000
SERVER = CHECKOUT / "tests" / "live" / "boxed_server.py"


def tunnels(target: Target) -> Iterator[Figure]:
    """A server in a devbox, asked directly and through its tunnel in the same run."""
    count = 200 if target.quick else 1000
    size, times = (64, 2) if target.quick else (512, 4)
    with target.boxes(1, cores=2) as (box,):
        target.post(f"/v1/devboxes/{box}/write_file_contents", {"file_path": "s.py", "contents": SERVER.read_text()})
        target.start(box, f"exec python3 s.py 0.0.0.0 {PORT}")
        address = target.run(box, "hostname -I").split()[0]
        tunnel: Any = target.post(f"/v1/devboxes/{box}/enable_tunnel")
        name = f"{PORT}-{tunnel['tunnel_key']}.tunnel.bench.test"
        direct = replace(target.server, base_url=f"http://{address}:{PORT}")
        _until_it_listens(direct)
        took = {server: _gets(server, name, count) for server in (direct, target.server)}
        plain = statistics.median(took[direct])
        yield figure("tunnel_get_ms", "ms", took[target.server], plain)
        yield figure("tunnel_get_overhead_ms", "ms", [one - plain for one in took[target.server]])
        parts = Parts(target.up)
        for way, move in (("down", _down), ("up", _up)):
            baseline = statistics.median(move(direct, name, size) for _ in range(times))
            with Meter(parts) as meter:
                rates = [move(target.server, name, size) for _ in range(times)]
            yield figure(f"tunnel_{way}_mb_s", "MB/s", rates, baseline).with_cpu(meter.shares())


def _until_it_listens(server: Server) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            server.connect().close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _request(method: str, path: str, name: str, length: int | None = None) -> bytes:
    more = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: {name}\r\n{more}\r\n".encode()


def _gets(server: Server, name: str, count: int) -> list[float]:
    """Milliseconds of GETs, one after the other over one connection."""
    asked, inbox = _request("GET", "/", name), Inbox()
    with server.connect() as sock:

        def get() -> None:
            sock.sendall(asked)
            while (answer := inbox.feed(sock.recv(65536))) is None:
                pass
            if answer.status != 200:
                raise Unexpected(f"answered {answer.status}: {answer.body[:200]!r}")

        return [timed(get) for _ in range(count + 20)][20:]


def _down(server: Server, name: str, mib: int) -> float:
    """MB/s of one answer."""
    buffer = memoryview(bytearray(MIB))
    with server.connect() as sock:
        sock.settimeout(120)
        began = time.perf_counter()
        sock.sendall(_request("GET", f"/pour/{mib}", name))
        held = b""
        while b"\r\n\r\n" not in held:
            held += _some(sock)
        raw, rest = held.split(b"\r\n\r\n", 1)
        status, headers = head(raw)
        if status != 200 or int(headers["content-length"]) != mib * MIB:
            raise Unexpected(f"answered {status}")
        left = mib * MIB - len(rest)
        while left > 0:
            taken = sock.recv_into(buffer)
            if not taken:
                raise Unexpected(f"ended {left} bytes early")
            left -= taken
        return mib * MIB / 1e6 / (time.perf_counter() - began)


def _up(server: Server, name: str, mib: int) -> float:
    """MB/s of one request's body."""
    piece, inbox = b"x" * MIB, Inbox()
    with server.connect() as sock:
        sock.settimeout(120)
        began = time.perf_counter()
        sock.sendall(_request("PUT", "/sink", name, mib * MIB))
        for _ in range(mib):
            sock.sendall(piece)
        while (answer := inbox.feed(_some(sock))) is None:
            pass
        if answer.status != 200:
            raise Unexpected(f"answered {answer.status}: {answer.body[:200]!r}")
        return mib * MIB / 1e6 / (time.perf_counter() - began)


def _some(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise Unexpected("the connection ended")
    return data
