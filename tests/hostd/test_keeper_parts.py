"""The keeper's parts that need no process: packets, requests, the journal, the bucket, the loop."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from hostd import packets, polling, requests
from hostd.journal import Journal
from hostd.streams import Bucket


@pytest.mark.parametrize("value", [{}, {"a": [1, 2.5, None, True, "é\n\0\u2028"], "b": {"c": []}}, {"n": 1 << 80}])
def test_json_there_and_back(value: dict) -> None:
    assert json.loads(packets.dumps(value)) == value
    assert packets.loads(packets.dumps(value)) == value
    assert packets.loads(json.dumps(value, indent=2).encode()) == value


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"1", b"{} x", b'{"a":NaN}', b'{"a":-Infinity}', b"\xff", b'{"a":' * 100_000, b"{'a':1}"],
)
def test_what_is_not_one_object_is_malformed(text: bytes) -> None:
    with pytest.raises(packets.Malformed):
        packets.loads(text)


def test_what_has_no_json_form_is_not_sent() -> None:
    for value in ({"a": b"bytes"}, {"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises((TypeError, ValueError)):
            packets.dumps(value)


def test_descriptors_travel_close_on_exec_and_never_leak() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        read, write = os.pipe()
        packets.send(ours, {"x": 1}, [read, write])
        message, got = packets.receive(theirs)
        assert message == {"x": 1}
        assert len(got) == 2
        assert not any(os.get_inheritable(d) for d in got)
        os.write(got[1], b"through")
        assert os.read(read, 10) == b"through"
        packets.close_all(got)
        before = len(os.listdir("/proc/self/fd"))
        ours.sendmsg([b"nonsense"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, read.to_bytes(4, "little"))])
        with pytest.raises(packets.Malformed):
            packets.receive(theirs)
        assert len(os.listdir("/proc/self/fd")) == before
        with pytest.raises(BlockingIOError):
            packets.receive(theirs, wait=False)
        ours.close()
        assert packets.receive(theirs) == (None, [])
        packets.close_all([read, write])


def open_journal(path: Path) -> Journal:
    return Journal(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def test_journal_merges_and_survives_a_cut_line(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.write("exe_a", {"fence": 1, "at": 5})
    journal.write("exe_a", {"pid": 7})
    journal.write("exe_b", {"fence": 2})
    journal.write("exe_b", {"gone": True})
    with open(tmp_path / "journal", "ab") as file:
        file.write(b'{"id":"exe_a","exit":')  # killed in the middle of a write
    again = open_journal(tmp_path)
    assert again.facts == {"exe_a": {"fence": 1, "at": 5, "pid": 7}}
    again.write("exe_a", {"exit": 0})
    assert open_journal(tmp_path).facts["exe_a"]["exit"] == 0


def test_journal_is_rewritten_when_most_of_it_is_history(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.write("", {"box": "dbx_1"})
    for i in range(12_000):
        journal.write("exe_a", {"in": [[f"request-{i}" * 10, True]]})
    assert os.stat(tmp_path / "journal").st_size < 1_500_000
    again = open_journal(tmp_path)
    assert again.facts == journal.facts
    assert again.facts["exe_a"]["in"] == [["request-11999" * 10, True]]
    assert list(again.facts) == ["", "exe_a"], "the order of intents is kept"


def test_journal_that_cannot_be_rewritten_goes_on(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    os.mkdir(tmp_path / "journal.new")
    journal.write("exe_a", {"at": 1})
    journal.rewrite()
    journal.write("exe_a", {"exit": 1})
    assert open_journal(tmp_path).facts == {"exe_a": {"at": 1, "exit": 1}}


def test_bucket() -> None:
    bucket = Bucket(rate=1000, burst=500)
    assert bucket.tokens() == 500
    bucket.take(700)
    assert -200 <= bucket.tokens() < -150
    time.sleep(0.3)
    assert 80 <= bucket.tokens() < 300


@pytest.mark.parametrize("name", ["exe_1", "set_" + "0" * 26, "dbx_a"])
def test_ids(name: str) -> None:
    assert requests.execution_id({"id": name}) == name


@pytest.mark.parametrize("name", [None, "", "exe", "exe_", "EXE_1", "exe_..", "exe_a/b", "e_1", "exe_" + "a" * 65, 5])
def test_what_is_no_id(name: object) -> None:
    with pytest.raises(requests.Refused):
        requests.execution_id({"id": name})


def test_a_command_in_pieces() -> None:
    user = {"name": "u", "uid": 1, "gid": 1, "home": "/"}
    text = "é" * 100_000
    argv = requests.command({"command": text, "user": user}).message["argv"]
    assert argv[:4] == ["/bin/bash", "-lc", requests.JOIN_PIECES, "/bin/bash"]
    assert "".join(argv[4:]) == text
    assert max(len(piece.encode()) for piece in argv) < 131_071
    assert requests.command({"command": "x", "user": user, "login": False}).message["argv"] == ["/bin/bash", "-c", "x"]


def test_a_callback_that_fails_does_not_end_the_loop() -> None:
    poller = polling.Poller()
    read, write = os.pipe()
    seen = []

    def fail(events: int) -> None:
        os.read(read, 1)
        raise RuntimeError("a bug")

    poller.on(read, fail)
    poller.after(0.01, lambda: seen.append("timer"))
    cancelled = poller.after(0.005, lambda: seen.append("cancelled"))
    cancelled.cancel()
    os.write(write, b"x")
    while not seen:
        poller.turn()
    assert seen == ["timer"]
    packets.close_all([read, write, poller.fileno()])
