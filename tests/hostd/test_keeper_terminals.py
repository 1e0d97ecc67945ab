"""Terminals: a real shell on a real pty, attached, left, found again; nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostd import polling, terminals
from tests.hostd.bare_box import USER, Box, Client, Host, pss_kb

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes namespaces of other users")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def box(host: Host) -> Box:
    return host.box(41)


def ask(box: Box, session: str, op: str, **more: Any) -> dict[str, Any]:
    body = json.dumps({"user": USER, "env": {"TERM": "xterm", "PS1": "$ "}}).encode() if op == "open" else b""
    sized = {"body": len(body)} if body else {}
    with box.open(verb="terminal", op=op, session=session, **sized, **more) as client:
        if body:
            client.sock.sendall(body)
        return client.line()


def attach(box: Box, session: str, **more: Any) -> Client:
    return box.open(verb="terminal", op="attach", session=session, **more)


def say(client: Client, data: bytes) -> None:
    client.sock.sendall(struct.pack("!I", len(data)) + data)


def until(client: Client, wanted: bytes, seconds: float = 10) -> bytes:
    seen = b""
    deadline = time.monotonic() + seconds
    while wanted not in seen:
        frame = client.frame()
        assert frame, f"ended: {client.line()} after {seen!r}"
        seen += frame
        assert time.monotonic() < deadline, seen
    return seen


def gone(client: Client) -> tuple[bytes, dict[str, Any]]:
    return client.frames()


def test_a_shell_of_the_user_on_a_terminal(box: Box) -> None:
    assert ask(box, "one", "open") == {"ok": True, "created": True, "attached": False, "cols": 80, "rows": 24}
    with attach(box, "one") as client:
        assert client.line() == {"ok": True, "offset": 0, "end": 0, "cols": 80, "rows": 24}
        say(client, b"tty; id -u; pwd; stty size; shopt -q login_shell && echo LOGIN; echo do''ne\n")
        seen = until(client, b"done\r\n").decode()
        assert re.search(r"/dev/pts/\d+\r\n1000\r\n/tmp\r\n24 80\r\nLOGIN", seen), seen
        again = ask(box, "one", "open")
        assert (again["created"], again["attached"]) == (False, True)
        say(client, b"exit 3\n")
        assert gone(client)[1] == {"reason": "exit"}
    assert ask(box, "one", "resize", cols=10, rows=10)["error"]["code"] == "unknown_id"
    assert ask(box, "one", "open")["created"] is True, "the name gives a fresh shell"
    ask(box, "one", "close")


def test_resize_signals_and_interrupt_by_the_keyboard(box: Box) -> None:
    ask(box, "two", "open", cols=100, rows=30)
    with attach(box, "two") as client:
        assert client.line()["cols"] == 100
        say(client, b"trap 'echo W''INCH' WINCH; echo re''ady\n")
        until(client, b"ready\r\n")
        assert ask(box, "two", "resize", cols=132, rows=43) == {"ok": True}
        until(client, b"WINCH\r\n")
        say(client, b"stty size\n")
        until(client, b"43 132\r\n")
        say(client, b"echo st''art; sleep 100; echo $?\n")
        until(client, b"start\r\n")
        time.sleep(0.2)
        say(client, b"\x03")
        until(client, b"^C")
        say(client, b"echo ag''ain; sleep 100; echo rc=$?\n")
        until(client, b"again\r\n")
        time.sleep(0.2)
        assert ask(box, "two", "signal", signal=15) == {"ok": True}
        until(client, b"rc=143\r\n")
        assert ask(box, "two", "signal", signal=99)["error"]["code"] == "bad_request"
        assert ask(box, "two", "resize", cols=0, rows=1)["error"]["code"] == "bad_request"
        assert ask(box, "two", "resize", cols=1001, rows=1)["error"]["code"] == "bad_request"
        assert ask(box, "two", "close") == {"ok": True}
        assert gone(client)[1] == {"reason": "closed"}


def test_one_writer_at_a_time(box: Box) -> None:
    ask(box, "three", "open")
    first = attach(box, "three")
    first.line()
    with attach(box, "three") as second:
        assert second.line()["error"]["code"] == "attached"
    with attach(box, "three", takeover=True) as third, attach(box, "three", view=True) as viewer:
        assert third.line()["ok"]
        viewer.line()
        assert gone(first)[1] == {"reason": "takeover"}
        say(viewer, b"echo not ev''er\n")
        say(third, b"echo on''ly\n")
        seen = until(third, b"only\r\n")
        assert b"never" not in seen
        assert b"only" in until(viewer, b"only\r\n")
    ask(box, "three", "close")


def test_replay_then_live_without_a_gap_or_a_repeat(box: Box) -> None:
    ask(box, "four", "open")
    with attach(box, "four") as client:
        client.line()
        say(client, b"stty -echo; echo set''up\n")
        until(client, b"setup\r\n")
        say(client, b"for i in $(seq 1 60000); do echo line $i; done; echo the e''nd\n")
        until(client, b"line 200\r\n")
    time.sleep(0.3)
    with attach(box, "four", replay=True) as client:
        client.line()
        seen = until(client, b"the end\r\n", 30)
    numbers = [int(found) for found in re.findall(rb"line (\d+)\r\n", seen[seen.index(b"\r\n") :])]
    assert numbers == list(range(numbers[0], 60001)), "each once, in order"
    with attach(box, "four", replay=True) as client:
        client.line()
        seen = until(client, b"the end\r\n", 30)
        assert terminals.RING_BYTES - 1000 < len(seen) <= terminals.RING_BYTES, "as much as is kept"
        say(client, b"echo l''ive\n")
        assert b"the end" not in until(client, b"live\r\n")
    ask(box, "four", "close")


def test_a_writer_that_reads_nothing_stops_the_shell(box: Box) -> None:
    ask(box, "five", "open")
    client = attach(box, "five")
    client.line()
    before = pss_kb(box.pid)
    say(client, b"yes stop\n")
    time.sleep(1.0)
    assert pss_kb(box.pid) - before < 2000
    with attach(box, "five", view=True) as viewer:
        viewer.line()
        viewer.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):  # the shell stands still
            while viewer.sock.recv(1 << 20):
                pass
    for _ in range(20):
        assert client.frame()
    say(client, b"\x03")
    until(client, b"^C", 30)
    ask(box, "five", "close")


def test_a_viewer_that_falls_behind_is_sent_away(box: Box) -> None:
    ask(box, "six", "open")
    viewer = attach(box, "six", view=True)
    viewer.line()
    with attach(box, "six") as client:
        client.line()
        say(client, b"seq 1 200000; echo the e''nd\n")
        until(client, b"the end\r\n", 30)
    data, trailer = gone(viewer)
    assert trailer == {"reason": "slow"}
    assert data
    ask(box, "six", "close")


def test_it_is_kept_for_a_while_and_not_longer(box: Box) -> None:
    ask(box, "seven", "open", ttl=1)
    with attach(box, "seven") as client:
        client.line()
        say(client, b"cd /; echo st''ay\n")
        until(client, b"stay\r\n")
        time.sleep(1.5)
        assert ask(box, "seven", "open")["created"] is False, "somebody is there"
    assert ask(box, "seven", "open")["created"] is False
    time.sleep(1.5)
    assert ask(box, "seven", "open")["created"] is True
    ask(box, "seven", "close")


def test_a_shell_that_ignores_the_hangup_is_killed(box: Box) -> None:
    ask(box, "eight", "open")
    with attach(box, "eight") as client:
        client.line()
        say(client, b"trap '' HUP; echo pid=$$.\n")
        until(client, b"$$.\r\n")
        until(client, b".\r\n")
        ask(box, "eight", "close")
        gone(client)
    deadline = time.monotonic() + terminals.HANGUP_S + 5
    while shells(box):
        assert time.monotonic() < deadline, shells(box)
        time.sleep(0.1)


def shells(box: Box) -> list[str]:
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"Uid:\t{box.bare.base + 1000}\t" in (process / "status").read_text():
                found.append((process / "cmdline").read_text())
        except OSError:
            pass
    return [line for line in found if line.startswith("/bin/bash\0-l")]


@pytest.mark.parametrize("session", ["", "a b", "x" * 257, "ä", "../x", None, 7])
def test_names_that_are_none(box: Box, session: Any) -> None:
    with box.open(verb="terminal", op="open", session=session) as client:
        assert client.line()["error"]["code"] == "bad_request"


def test_limits_and_nonsense(box: Box) -> None:
    for number in range(terminals.MAX_TERMINALS):
        assert ask(box, f"many{number}", "open")["ok"]
    assert ask(box, "onemore", "open")["error"]["code"] == "busy"
    with attach(box, "many0") as client:
        client.line()
        client.sock.sendall(struct.pack("!I", terminals.FRAME_MAX + 1))
        assert client.file.read().endswith(b"") and not client.sock.recv(1)
    for number in range(terminals.MAX_TERMINALS):
        assert ask(box, f"many{number}", "close")["ok"]
    assert ask(box, "x", "attach")["error"]["code"] == "unknown_id"


def test_with_its_keeper_the_shell_ends_and_commands_do_not(box: Box) -> None:
    ask(box, "nine", "open")
    box.spawn("exe_beside", "sleep 1; echo still")
    with attach(box, "nine") as client:
        client.line()
        box.kill_keeper()
        assert client.file.read() is not None
    assert ask(box, "nine", "open")["created"] is True
    ask(box, "nine", "close")
    assert box.wait("exe_beside")["exit"] == 0


def test_who_never_takes_the_end_of_a_session_is_let_go_of_in_the_end() -> None:
    poller = polling.Poller()
    all_of_them = terminals.Terminals(poller, None)  # type: ignore[arg-type]  # no shell is asked for
    terminal = terminals.Terminal(all_of_them, "left", 80, 24, 300.0)
    ours, theirs = socket.socketpair()
    with theirs:
        terminal.attach(lambda: (ours.detach(), b""), writes=True, takeover=False, replay=True)
        terminal._append(b"x" * 2 * terminals.RING_BYTES)
        terminal.state = "running"
        terminal._end("closed")
        (client,) = all_of_them.clients
        all_of_them.sweep()
        assert all_of_them.clients, "it has its time"
        client._moved_at -= 2 * terminals.STALL_S
        all_of_them.sweep()
        assert not all_of_them.clients
        theirs.settimeout(5)
        while theirs.recv(1 << 20):
            pass
    os.close(poller.fileno())


def test_what_the_box_cannot_start_is_its_own_affair() -> None:
    poller = polling.Poller()
    terminal = terminals.Terminal(terminals.Terminals(poller, None), "no", 80, 24, 300.0)  # type: ignore[arg-type]
    terminal.failed("internal", "the box refused to start it: No such file or directory")
    assert terminal.failure is not None
    assert terminal.failure.code == "box_io"
    os.close(poller.fileno())
