"""Programs run for a client that stays connected: their bytes, their ends, their bounds, and clients that leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import relay
from tests.hostd.bare_box import USER, Box, Host, pss_kb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(47)


class Run:
    """The client's side of one program."""

    def __init__(self, box: Box, command: str | None = None, size: tuple[int, int] | None = None, **body: Any) -> None:
        what: dict[str, Any] = {"user": USER, "login": False, **body}
        if command is not None:
            what["command"] = command
        text = json.dumps(what).encode()
        sized = {} if size is None else {"cols": size[0], "rows": size[1]}
        self.client = box.open(verb="run", body=len(text), **sized)
        self.client.sock.settimeout(20)
        self.client.sock.sendall(text)
        self._held = b""
        while not self._held.endswith(b"\n"):
            self._held += self.client.sock.recv(1)
        self.answer, self._held = json.loads(self._held), b""
        self.credit = self.answer.get("window", 0)
        self.outputs = {relay.STDOUT: b"", relay.STDERR: b""}
        self.end: dict[str, Any] | None = None

    def packet(self, kind: int, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self.client.sock.sendall(relay.HEAD.pack(len(data) + 1, kind) + data)

    def control(self, **asked: Any) -> None:
        self.packet(relay.CONTROL, json.dumps(asked).encode())

    def put(self, data: bytes) -> None:
        """Input, as credit allows; output is taken meanwhile."""
        for at in range(0, len(data), 60_000):
            piece = data[at : at + 60_000]
            while self.credit < len(piece):
                self.take()
            self.credit -= len(piece)
            self.packet(relay.INPUT, piece)
            while self.end is None and (self._held or select.select([self.client.sock], [], [], 0)[0]):
                self.take()

    def take(self) -> None:
        """One packet of the relay's."""
        (length, kind) = relay.HEAD.unpack(self._exactly(relay.HEAD.size))
        data = self._exactly(length - 1)
        if kind == relay.CREDIT:
            self.credit += struct.unpack("!I", data)[0]
        elif kind == relay.END:
            self.end = json.loads(data)
        else:
            self.outputs[kind] += data

    def _exactly(self, count: int) -> bytes:
        while len(self._held) < count:
            data = self.client.sock.recv(1 << 18)
            assert data, f"cut after {self.answer} {self.outputs}"
            self._held += data
        out, self._held = self._held[:count], self._held[count:]
        return out

    def until(self, wanted: bytes) -> bytes:
        while wanted not in self.outputs[relay.STDOUT]:
            assert self.end is None, (self.end, self.outputs)
            self.take()
        return self.outputs[relay.STDOUT]

    def finish(self) -> dict[str, Any]:
        while self.end is None:
            self.take()
        assert self._held + self.client.sock.recv(1) == b"", "something came after the end"
        return self.end

    def leave(self) -> None:
        self.client.file.close()
        self.client.sock.close()


def result(box: Box, command: str, given: bytes = b"", **more: Any) -> tuple[dict[str, Any], bytes, bytes]:
    run = Run(box, command, **more)
    run.put(given)
    run.control(eof=True)
    return run.finish(), run.outputs[relay.STDOUT], run.outputs[relay.STDERR]


@pytest.mark.parametrize(
    ("command", "end"),
    [
        ("true", {"exit": 0}),
        ("exit 7", {"exit": 7}),
        ("exit 255", {"exit": 255}),
        ("kill -TERM $$", {"signal": 15, "core": False}),
        ("kill -KILL $$", {"signal": 9, "core": False}),
        ("/no/such/thing", {"exit": 127}),
    ],
)
def test_ends_are_exact(box: Box, command: str, end: dict[str, Any]) -> None:
    assert result(box, command)[0] == end


def test_a_program_that_is_not_there_is_said_on_stderr(box: Box) -> None:
    run = Run(box, argv=["/no/such/program"])
    assert run.finish() == {"exit": 127}
    assert b"/no/such/program" in run.outputs[relay.STDERR]


def test_the_streams_are_kept_apart_and_the_user_is_right(box: Box) -> None:
    end, out, err = result(box, "id -u; pwd; echo $HOME $EXTRA; echo no >&2", env={"EXTRA": "yes"})
    assert end == {"exit": 0}
    assert out.decode().split() == [str(USER["uid"]), USER["home"], USER["home"], "yes"]
    assert err == b"no\n"


def test_every_byte_passes_both_ways(box: Box) -> None:
    data = os.urandom(1 << 20) * 24 + bytes(range(256))
    end, out, _ = result(box, "cat", data)
    assert end == {"exit": 0}
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_input_for_a_program_that_stopped_reading_is_dropped(box: Box) -> None:
    end, out, _ = result(box, "head -c 3; exec <&-; sleep 0.2; exit 4", b"x" * (3 << 20))
    assert (end, out) == ({"exit": 4}, b"xxx")


def test_a_client_that_listens_no_more_is_felt_by_who_writes(box: Box) -> None:
    run = Run(box, "yes")
    run.until(b"y\n")
    run.control(deaf=True)
    assert run.finish() == {"signal": 13, "core": False}


def test_more_input_than_the_window_ends_it(box: Box) -> None:
    run = Run(box, "sleep 1000 & echo $!; wait")
    run.until(b"\n")
    with pytest.raises((AssertionError, OSError)):
        for _ in range(64):
            run.packet(relay.INPUT, b"x" * 60_000)
        run.finish()


def test_a_terminal_has_its_size_and_signals_go_to_its_foreground(box: Box) -> None:
    run = Run(box, "stty size; trap 'stty size; exit 5' INT; echo ready; while :; do sleep 0.05; done", size=(91, 33))
    assert b"33 91" in run.until(b"ready")
    run.control(resize=[120, 40])
    run.packet(relay.INPUT, b"\x03")
    assert run.finish() == {"exit": 5}
    assert b"40 120" in run.outputs[relay.STDOUT]


def test_a_terminals_last_words_are_not_lost(box: Box) -> None:
    for _ in range(20):
        run = Run(box, "seq 1 2000", size=(80, 24))
        assert run.finish() == {"exit": 0}
        assert run.outputs[relay.STDOUT].split()[-1] == b"2000"


def test_without_a_terminal_signals_go_to_the_whole_group(box: Box) -> None:
    run = Run(box, "sleep 1000 & echo ready; wait")
    run.until(b"ready")
    run.control(signal=int(signal.SIGTERM))
    assert run.finish() == {"signal": 15, "core": False}


@pytest.mark.parametrize("size", [None, (80, 24)])
def test_a_client_that_leaves_hangs_the_program_up(box: Box, size: tuple[int, int] | None) -> None:
    mark = f"1000.{os.getpid()}{'1' if size else '2'}"
    run = Run(box, f"cat /dev/zero | sleep {mark} & echo ready; wait", size=size)
    run.until(b"ready")
    if size is None:
        run.put(b"x" * 300_000)  # input that nobody reads must not hide that the client has gone
    run.leave()
    deadline = time.monotonic() + 20
    while (left := result(box, f"pgrep -fx 'sleep {mark}'")[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == b""


def test_no_program_goes_on_unattended_however_early_its_client_leaves(box: Box) -> None:
    mark = f"1001.{os.getpid()}"
    for _ in range(60):
        Run(box, f"exec sleep {mark}").leave()
    spawner = box.spawner()
    known = children(spawner)
    run = Run(box, f"exec sleep {mark}")
    (mine,) = children(spawner) - known
    os.kill(mine, signal.SIGKILL)
    run.leave()
    deadline = time.monotonic() + 20
    while (left := result(box, f"pgrep -fx 'sleep {mark}'")[1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == b""


def test_a_client_that_reads_nothing_stops_the_program_and_memory_stays(box: Box) -> None:
    spawner = box.spawner()
    known = children(spawner)
    run = Run(box, "cat /dev/zero")
    (mine,) = children(spawner) - known
    time.sleep(0.5)
    before = pss_kb(mine)
    time.sleep(1)
    assert pss_kb(mine) < before + 512
    run.leave()


def children(pid: int) -> set[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return {int(word) for word in file.read().split()}


def test_what_holds_the_pipes_keeps_the_output_open(box: Box) -> None:
    run = Run(box, "(sleep 0.5; echo late) & echo early")
    assert run.finish() == {"exit": 0}
    assert run.outputs[relay.STDOUT] == b"early\nlate\n"


def test_nonsense_is_refused_and_there_is_a_bound(box: Box) -> None:
    assert Run(box, argv=[]).answer["error"]["code"] == "bad_request"
    assert Run(box, "true", size=(0, 10)).answer["error"]["code"] == "bad_request"
    held = []
    try:
        for _ in range(128):
            run = Run(box, "sleep 1000")
            assert run.answer.get("ok"), run.answer
            held.append(run)
        assert Run(box, "true").answer["error"]["code"] == "busy"
    finally:
        for run in held:
            run.leave()
    deadline = time.monotonic() + 20
    while not (answer := Run(box, "true").answer).get("ok"):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
