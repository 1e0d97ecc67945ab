"""The spawner's parts that need no box."""

from __future__ import annotations

import os
import select
import signal
import socket
import termios
import time
import types

import pytest

from hostd import packets, spawner


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a process another user")
def test_a_shell_whose_terminal_was_taken_ends_and_never_answers_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = types.SimpleNamespace(TIOCSWINSZ=termios.TIOCSWINSZ, TIOCSCTTY=0x5FFF)
    monkeypatch.setattr(spawner, "termios", refused)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    request = {"n": 7, "terminal": [80, 24], "argv": ["/bin/true"], "env": {}, "cwd": "/", "cwd_required": False}
    pid = os.fork()
    if pid == 0:
        ours.close()
        spawner._start_shell(theirs, {**request, "name": "root", "uid": 0, "gid": 0})
        packets.send(theirs, {"returned": os.getpid()})
        time.sleep(10)
        os._exit(0)
    try:
        theirs.close()
        ours.settimeout(10)
        said, descriptors = {}, []
        for _ in range(3):
            message, given = packets.receive(ours)
            said.update(message or {})
            descriptors += given
        assert set(said) == {"n", "ends", "exec_failed", "detail", "returned"}
        assert said["returned"] == pid, "the child went on as a spawner"
        pidfd = descriptors[said["ends"].index("pidfd")]
        assert select.select([pidfd], [], [], 10)[0], "the shell that could not be is still there"
        packets.close_all(descriptors)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()
