"""Thousands of long-polls that mostly wait, from a process of its own: ``python -m tests.bench.polls``.

One JSON line on standard input says what to hold; one line on standard output says that all have been asked, and one at
the end (when standard input is closed, or all were answered) what came. A 408 is asked again, as clients do.
"""

from __future__ import annotations

import dataclasses
import json
import selectors
import socket
import sys
import time
from typing import Any

from tests.bench.installation import raise_open_files
from tests.bench.wire import RECEIVE_BYTES, Answer, Inbox, Server

PACE = 0.0005


@dataclasses.dataclass
class Poll:
    """One waiter."""

    sock: socket.socket
    inbox: Inbox
    request: bytes
    path: str


def hold(given: dict[str, Any]) -> None:
    """Open them all, keep them open, tell what came."""
    raise_open_files()
    paths: list[str] = given["paths"]
    sources: list[str] = given["sources"]
    waiting = selectors.EpollSelector()
    body = {"statuses": ["completed"], "timeout_seconds": 25}
    answered: list[list[Any]] = []
    again, wrong, left = 0, [], len(paths)

    def look(seconds: float) -> bool:
        """Take what has come; False once standard input is closed."""
        nonlocal again, left
        for key, _ in waiting.select(seconds):
            if key.data is None:
                return False
            poll: Poll = key.data
            answer: Answer | None
            try:
                answer = poll.inbox.feed(poll.sock.recv(RECEIVE_BYTES))
            except Exception as error:
                answer = Answer(0, str(error).encode())
            if answer is None:
                continue
            if answer.status == 408:
                again += 1
                poll.sock.sendall(poll.request)
                continue
            waiting.unregister(poll.sock)
            poll.sock.close()
            left -= 1
            if answer.status == 200:
                answered.append([poll.path, time.time(), answer.json().get("stdout", "")])
            else:
                wrong.append(f"{answer.status}: {answer.body[:200]!r}")
        return True

    for number, path in enumerate(paths):
        server = Server(given["base_url"], given["key"], sources[number % len(sources)])
        request = server.request("POST", f"{path}/wait_for_status", body)
        sock = server.connect()
        waiting.register(sock, selectors.EVENT_READ, Poll(sock, Inbox(), request, path))
        sock.sendall(request)
        look(PACE)
    _say({"asked": len(paths)})
    waiting.register(sys.stdin, selectors.EVENT_READ, None)
    while left and look(1.0):
        pass
    _say({"answered": answered, "again": again, "wrong": wrong, "left": left})


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    hold(json.loads(sys.stdin.readline()))
