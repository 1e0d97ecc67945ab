"""Requests as fast as they are answered, from a process of its own: ``python -m tests.bench.load HOST PORT PATH KEY
CONNECTIONS SECONDS`` prints JSON with the number of answers and every latency in milliseconds.

Raw sockets, since a client library would use more of the machine than the server that is measured.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time


def run(host: str, port: int, path: str, key: str, connections: int, seconds: float) -> list[float]:
    """Latencies in milliseconds. Raises RuntimeError for any answer but 200."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    waiting = selectors.EpollSelector()
    sent: dict[socket.socket, float] = {}
    buffers: dict[socket.socket, bytes] = {}
    for _ in range(connections):
        sock = socket.create_connection((host, port), timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(sock, selectors.EVENT_READ, sock)
        buffers[sock], sent[sock] = b"", time.perf_counter()
        sock.sendall(request)
    took: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for ready, _ in waiting.select(1.0):
            sock = ready.data
            data = sock.recv(65536)
            if not data:
                raise RuntimeError("the server closed a connection under load")
            buffers[sock] += data
            if not _complete(buffers[sock]):
                continue
            now = time.perf_counter()
            took.append((now - sent[sock]) * 1000)
            buffers[sock], sent[sock] = b"", now
            sock.sendall(request)
    return took


def _complete(data: bytes) -> bool:
    head, separator, body = data.partition(b"\r\n\r\n")
    if not separator:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head[:200].decode("latin-1"))
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(body) >= int(length.split(b":")[1])


if __name__ == "__main__":
    host, port, path, key, connections, seconds = sys.argv[1:]
    sys.stdout.write(json.dumps(run(host, int(port), path, key, int(connections), float(seconds))))
