"""The standard input of a running command: what clients send, in order, each request once.

In charge of: a bounded queue before the pipe, end of file, and knowing after the keeper's death which requests had been
written: a request is written down before its first byte and after its last.
Input that is complete at the start needs none of this: it is a sealed file in memory.
Not in charge of: when a command takes none any more (executions.py).
"""

from __future__ import annotations

import fcntl
import os

from hostd import polling
from hostd.requests import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

QUEUE_BYTES = 2 << 20
"""Bytes that may wait for a command that does not read."""
F_ADD_SEALS, ALL_SEALS = 1033, 15
REMEMBERED = 32
"""Requests whose repetition is recognised."""


class _Piece:
    __slots__ = ("begun", "data", "eof", "reply", "request")

    def __init__(self, request: str, data: bytes, eof: bool, reply: Callable[[dict[str, Any]], None]) -> None:
        self.request, self.data, self.eof, self.reply = request, memoryview(data), eof, reply
        self.begun = False


class Stdin:
    """The write end of the pipe and what waits for it."""

    def __init__(
        self,
        poller: polling.Poller,
        pipe: int,
        remembered: list[list[Any]],
        write_down: Callable[[dict[str, Any]], None],
        ended: Callable[[], None],
    ) -> None:
        self._poller = poller
        self._pipe = pipe
        self._remembered = remembered  # [request, written to its end]
        self._write_down = write_down
        self._ended = ended
        self._queue: list[_Piece] = []
        self._waiting = False
        os.set_blocking(pipe, False)

    @property
    def pipe(self) -> int:
        """The descriptor, -1 after the end."""
        return self._pipe

    def offer(self, request: str, data: bytes, eof: bool, reply: Callable[[dict[str, Any]], None]) -> None:
        """Queue what one request brings; `reply` is called when it is in the pipe. Raises Refused (busy, lost)."""
        for name, written in self._remembered:
            if name == request:
                if not written and data and not any(piece.request == request for piece in self._queue):
                    raise Refused("lost", "the keeper died while it wrote this request: it may have been read in part")
                if written:
                    reply({"ok": True, "accepted": True})
                    return
        for piece in self._queue:
            if piece.request == request:
                raise Refused("busy", "this request is being written")
        if self._pipe < 0 or any(piece.eof for piece in self._queue):
            reply({"ok": True, "accepted": False})
            return
        if sum(len(piece.data) for piece in self._queue) + len(data) > QUEUE_BYTES:
            raise Refused("busy", f"the command does not read: {QUEUE_BYTES} bytes wait already")
        self._queue.append(_Piece(request, data, eof, reply))
        self._flush()

    def _flush(self) -> None:
        while self._queue and self._pipe >= 0:
            piece = self._queue[0]
            if not piece.begun:
                piece.begun = True
                self._remembered = [*self._remembered, [piece.request, False]][-REMEMBERED:]
                self._write_down({"in": self._remembered})
            try:
                while piece.data:
                    piece.data = piece.data[os.write(self._pipe, piece.data) :]
            except BlockingIOError:
                self._wait(True)
                return
            except OSError:  # nobody reads any more
                self.close()
                return
            self._queue.pop(0)
            for entry in self._remembered:
                if entry[0] == piece.request:
                    entry[1] = True
            # The end of file is written down with its request: a successor ends what we had no time to.
            self._write_down({"in": self._remembered, "eof": True} if piece.eof else {"in": self._remembered})
            if piece.eof:
                self.close()
            piece.reply({"ok": True, "accepted": True})
        self._wait(False)

    def _wait(self, wanted: bool) -> None:
        if wanted != self._waiting and self._pipe >= 0:
            self._waiting = wanted
            if wanted:
                self._poller.on(self._pipe, lambda _: self._flush(), polling.WRITE)
            else:
                self._poller.off(self._pipe)

    def close(self) -> None:
        """End of file for the command; what still waits is answered as not accepted."""
        self._wait(False)
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            self._ended()
        queue, self._queue = self._queue, []
        for piece in queue:
            piece.reply({"ok": True, "accepted": False})


def sealed_input(data: bytes) -> int:
    """Return a descriptor of `data` that is read from its start and that nobody can change."""
    written = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(written, view) :]
        fcntl.fcntl(written, F_ADD_SEALS, ALL_SEALS)
        return os.open(f"/proc/self/fd/{written}", os.O_RDONLY | os.O_CLOEXEC)  # an offset of its own
    finally:
        os.close(written)
