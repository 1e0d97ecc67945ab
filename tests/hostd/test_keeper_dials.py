"""Connections into a box: its loopback reached, bytes exact both ways, ends told apart, nothing without a bound."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import dials
from tests.hostd.bare_box import Box, Client, Host, pss_kb, run_in_machine

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")

SERVER = """
import socket, sys, threading
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
listener = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family, backlog=300)
def serve(sock):
    word = b""
    while not word.endswith(b"\\n"):
        word += sock.recv(1)
    if word == b"echo\\n":
        while data := sock.recv(65536):
            sock.sendall(data)
    elif word == b"count\\n":
        total = 0
        while data := sock.recv(65536):
            total += len(data)
        sock.sendall(b"%d" % total)
    elif word == b"pour\\n":
        for _ in range(512):
            sock.sendall(b"x" * 65536)
    elif word == b"reset\\n":
        sock.sendall(b"half")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\\1\\0\\0\\0\\0\\0\\0\\0")
    elif word == b"deaf\\n":
        threading.Event().wait()
    sock.close()
print("ready", flush=True)
while True:
    sock, _ = listener.accept()
    threading.Thread(target=serve, args=(sock,), daemon=True).start()
"""

LOOPBACK_UP = """
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1 | 64))  # SIOCSIFFLAGS: up, running
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    box = host.box(43)
    # A real box's loopback is set up together with its network.
    run_in_machine("nsenter", "-t", str(box.bare.init_pid), "-n", "/usr/bin/python3", "-c", LOOPBACK_UP)
    _serve(box, "exe_four", "127.0.0.1", 8001)
    _serve(box, "exe_six", "::1", 8002)
    return box


def _serve(box: Box, name: str, address: str, port: int) -> None:
    box.spawn(name, argv=["/usr/bin/python3", "-c", SERVER, address, str(port)])
    deadline = time.monotonic() + 20
    while not box.ask(verb="read", id=name, stream="stdout", offset=0, limit=10)["size"]:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.02)


def dial(box: Box, port: int, word: bytes = b"") -> Client:
    client = box.open(verb="dial", port=port)
    client.sock.settimeout(20)
    assert client.line() == {"ok": True}
    client.sock.sendall(word)
    return client


def test_bytes_both_ways_and_both_ends(box: Box) -> None:
    with dial(box, 8001, b"echo\n") as client:
        client.sock.sendall(b"over ")
        assert client.frame() == b"over "
        client.sock.sendall(b"and out")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.frames() == (b"and out", {"reason": "end"})
    with dial(box, 8002, b"count\n") as client:
        client.sock.sendall(b"x" * 1_000_000)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.frames() == (b"1000000", {"reason": "end"}), "half-closed, it still hears the answer"


def test_what_came_with_the_request_is_passed_on(box: Box) -> None:
    client = box.open(verb="dial", port=8001)
    client.sock.sendall(b"echo\nearly")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.line() == {"ok": True}
    assert client.frames() == (b"early", {"reason": "end"})


def test_a_reset_is_told_from_an_end(box: Box) -> None:
    with dial(box, 8001, b"reset\n") as client:
        data, trailer = client.frames()
        assert trailer == {"reason": "reset"}
        assert data in (b"", b"half")


def test_nothing_listens_and_wrong_ports(box: Box) -> None:
    refused = box.ask(verb="dial", port=8003)["error"]
    assert (refused["code"], refused["message"]) == ("refused", "nothing listens on port 8003")
    for port in (0, -1, 65536, "80", None, True, 1.5):
        assert box.ask(verb="dial", port=port)["error"]["code"] == "bad_request"


def test_many_bytes_echoed_are_the_same(box: Box) -> None:
    data = os.urandom(1 << 20) * 32
    seen = hashlib.sha256()
    with dial(box, 8001, b"echo\n") as client:
        client.sock.setblocking(False)
        at, got, inbox = 0, 0, bytearray()
        while got < len(data):
            more = [client.sock] if at < len(data) else []
            readable, writable, _ = select.select([client.sock], more, [], 20)
            assert readable or writable, "it stands still"
            if writable:
                at += client.sock.send(data[at : at + 65536])
            if readable:
                inbox += client.sock.recv(1 << 18)
                while len(inbox) >= 4 and len(inbox) >= 4 + (size := struct.unpack_from("!I", inbox)[0]):
                    seen.update(inbox[4 : 4 + size])
                    got += size
                    del inbox[: 4 + size]
    assert seen.digest() == hashlib.sha256(data).digest()


def test_a_client_that_does_not_read_holds_back_the_server_and_costs_nothing(box: Box) -> None:
    clients = [dial(box, 8001, b"pour\n") for _ in range(20)]
    time.sleep(0.5)
    assert pss_kb(box.pid) < 40_000
    used = _cpu(box.pid)
    time.sleep(1.0)
    assert _cpu(box.pid) - used < 0.2, "it must wait, not spin"
    for client in clients:
        assert len(client.frames()[0]) == 512 * 65536
        client.__exit__()


def test_a_server_that_hung_up_waits_for_its_slow_client_without_spinning(box: Box) -> None:
    with dial(box, 8001, b"pour\n") as client:
        client.sock.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        used = _cpu(box.pid)
        time.sleep(1.0)
        assert _cpu(box.pid) - used < 0.2
        data, trailer = client.frames()
        assert (len(data), trailer) == (512 * 65536, {"reason": "end"})
    with dial(box, 8001, b"reset\n") as client:
        time.sleep(0.3)
        used = _cpu(box.pid)
        time.sleep(1.0)
        assert _cpu(box.pid) - used < 0.2
        assert client.frames()[1] == {"reason": "reset"}


def test_a_client_that_leaves_ends_the_servers_connection(box: Box) -> None:
    for more in (b"", b"more"):
        with dial(box, 8001, b"echo\n") as client:
            client.sock.sendall(more)
    with dial(box, 8001, b"deaf\n") as client:
        client.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                client.sock.sendall(b"x" * 65536)
    # The deaf one's bytes can not be delivered; the others must be gone.
    deadline = time.monotonic() + 20
    while _connections(box, 8001) > 1:
        assert time.monotonic() < deadline, "connections of clients that left are still open"
        time.sleep(0.05)


def test_there_is_a_bound_and_places_come_free(box: Box) -> None:
    clients: list[Client] = []
    refused: dict[str, Any] = {}
    for _ in range(dials.MAX_DIALS + 1):
        client = box.open(verb="dial", port=8001)
        answer = client.line()
        if "error" in answer:
            refused = answer["error"]
            client.__exit__()
            break
        clients.append(client)
    assert refused["code"] == "busy" and "256 connections" in refused["message"]
    for client in clients:
        client.__exit__()
    deadline = time.monotonic() + 20
    while "error" in (answer := _once(box)):
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def _once(box: Box) -> dict[str, Any]:
    with box.open(verb="dial", port=8001) as client:
        return client.line()


def _cpu(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _connections(box: Box, port: int) -> int:
    with open(f"/proc/{box.bare.init_pid}/net/tcp") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    return sum(line[2].endswith(f":{port:04X}") and line[3] == "01" for line in lines)
