"""A confined sshd with a stub of hostd behind it, per module, and the calls that tests make of them."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hosts.ssh import HostTransport
from tests.ssh.loopback import Sshd, StubHostd, confined, link_user, started


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where an unprivileged user may look."""
    path = tmp_path_factory.mktemp("ssh")
    for one in (path, *list(path.parents)[:2]):
        one.chmod(0o755)
    return path


@pytest.fixture
def stub(folder: pathlib.Path) -> Iterator[StubHostd]:
    with started(StubHostd(folder / "hostd.sock")) as stub:
        yield stub


@pytest.fixture
def sshd(folder: pathlib.Path) -> Iterator[Sshd]:
    with started(Sshd(folder / "sshd", link_user(), **confined(folder / "hostd.sock"))) as sshd:
        yield sshd


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def ask_to_the_end(transport: HostTransport, path: Any, **request: Any) -> bytes:
    """As `ask` of a host that closes after its answer: the channel ends by the host's word, not by ours."""
    stream = transport.open_stream(str(path), soon())
    stream.send(json.dumps(request).encode() + b"\n", soon())
    answer = b""
    while data := stream.recv(soon()):
        answer += data
    stream.channel.shutdown_write()
    deadline = soon()
    while not stream.channel.closed:
        assert time.monotonic() < deadline, "the host's close was not taken in"
        time.sleep(0.0005)
    return answer


def ask(transport: HostTransport, path: Any, **request: Any) -> Any:
    stream = transport.open_stream(str(path), soon())
    try:
        stream.send(json.dumps(request).encode() + b"\n", soon())
        return json.loads(stream.recv(soon()))
    finally:
        stream.close()
