"""The standard input of a running command: what clients send, in order, each request once.

In charge of: the buffer before a command that does not read (its pipe, grown for it, so that what was accepted outlives
the keeper), end of file, and knowing after the keeper's death which requests had been written: a request is written
down before its first byte and after its last.
Input that is complete at the start needs none of this: it is a sealed file in memory.
Not in charge of: when a command takes none any more, or what an interrupt does (executions.py).
"""

from __future__ import annotations

import fcntl
import os

from hostd import polling, procs
from hostd.requests import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

BUFFER_BYTES = 1 << 20
"""Bytes that may wait for a command that does not read."""
F_SETPIPE_SZ, F_ADD_SEALS, ALL_SEALS = 1031, 1033, 15
REMEMBERED = 32
"""Requests whose repetition is recognised."""


class Inputs:
    """The last requests that brought a command input or an interrupt, as they stand in the journal."""

    __slots__ = ("_entries", "_write_down")

    def __init__(self, entries: list[list[Any]], write_down: Callable[[dict[str, Any]], None]) -> None:
        self._entries = [list(entry) for entry in entries]  # [request, done]
        self._write_down = write_down

    def done(self, request: str) -> bool | None:
        """Was it carried out? None: never heard of; False: begun, and nobody can tell how far it came."""
        for name, done in self._entries:
            if name == request:
                return bool(done)
        return None

    def begin(self, request: str, *, done: bool = False) -> None:
        """Write a request down before it has an effect; one that is over with that is `done` at once."""
        known = [entry for entry in self._entries if entry[0] != request]
        self._entries = [*known, [request, done]][-REMEMBERED:]
        self._write_down({"in": self._entries})

    def end(self, request: str, *, eof: bool) -> None:
        """It had its whole effect. The end of file is written down with its request: a successor ends what we had no
        time to."""
        for entry in self._entries:
            if entry[0] == request:
                entry[1] = True
        self._write_down({"in": self._entries, "eof": True} if eof else {"in": self._entries})


class _Piece:
    __slots__ = ("begun", "data", "eof", "request")

    def __init__(self, request: str, data: bytes, eof: bool) -> None:
        self.request, self.data, self.eof = request, memoryview(data), eof
        self.begun = False


class Stdin:
    """The write end of the pipe and what waits for it."""

    def __init__(self, poller: polling.Poller, pipe: int, inputs: Inputs, ended: Callable[[], None]) -> None:
        self._poller = poller
        self._pipe = pipe
        self._inputs = inputs
        self._ended = ended
        self._queue: list[_Piece] = []  # what the pipe could not be made to hold
        self._waiting = False
        self._grown = False
        os.set_blocking(pipe, False)

    @property
    def pipe(self) -> int:
        """The descriptor, -1 after the end."""
        return self._pipe

    def offer(self, request: str, data: bytes, eof: bool) -> bool:
        """Take what one request brings, whole or not at all. False: input has ended, nobody reads any more, or the
        command does not read and its buffer is full. Raises Refused `lost`."""
        done = self._inputs.done(request)
        if done or any(piece.request == request for piece in self._queue):
            return True
        if self._pipe < 0 or any(piece.eof for piece in self._queue):
            return False
        if done is False and data:
            raise Refused("lost", "the keeper died while it wrote this request: it may have been read in part")
        unread = procs.bytes_in_pipe(self._pipe) + sum(len(piece.data) for piece in self._queue)
        if data and unread + len(data) > BUFFER_BYTES:
            return False
        self._queue.append(_Piece(request, data, eof))
        self._flush()
        return self._pipe >= 0 or self._inputs.done(request) is True

    def _flush(self) -> None:
        while self._queue and self._pipe >= 0:
            piece = self._queue[0]
            if not piece.begun:
                piece.begun = True
                self._inputs.begin(piece.request)
            try:
                while piece.data:
                    piece.data = piece.data[self._write(piece.data) :]
            except BlockingIOError:
                self._wait(True)
                return
            except OSError:  # nobody reads any more
                self.close()
                return
            self._queue.pop(0)
            self._inputs.end(piece.request, eof=piece.eof)
            if piece.eof:
                self.close()
        self._wait(False)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._pipe, data)
        except BlockingIOError:
            if self._grown:
                raise
            self._grown = True
            try:
                fcntl.fcntl(self._pipe, F_SETPIPE_SZ, BUFFER_BYTES)
            except OSError:  # the box's user has many large pipes already: what is left waits here
                raise BlockingIOError from None
            return os.write(self._pipe, data)

    def _wait(self, wanted: bool) -> None:
        if wanted != self._waiting and self._pipe >= 0:
            self._waiting = wanted
            if wanted:
                self._poller.on(self._pipe, lambda _: self._flush(), polling.WRITE)
            else:
                self._poller.off(self._pipe)

    def close(self) -> None:
        """End of file for the command; what still waits is given up."""
        self._wait(False)
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
            self._ended()
        self._queue = []


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
