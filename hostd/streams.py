"""One output stream of one command: from the pipe to a file outside the box.

In charge of: moving bytes by splice, so that a kill of the keeper cannot fall between taking and keeping them; the rate
all streams of a box share; the cap of a stream (head and tail are kept, the middle is freed and its range written down
first); what is written after the command's exit (the last megabyte of it, in a file of its own).
Not in charge of: readers and followers (readers.py), when a command counts as exited (executions.py).

    open --exit, pipe drained--> sealed, others still hold the pipe (late) --they close it--> closed
                            `--> sealed and closed
Nothing is ever dropped but by the cap: where the pool is full or the rate used up, the pipe is left full, and the
command waits in its write.
"""

from __future__ import annotations

import binascii
import errno
import os
import select
import stat
import time

from hostd import polling, procs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SPLICE_BYTES = 1 << 20
SPLICE_FLAGS = 3  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK
LATE_BYTES = 1 << 20
"""Size of the ring that keeps what is written after the exit."""
PUNCH_BYTES = 16 << 20
"""The middle is freed in pieces of this size: a hole costs the file system some milliseconds."""
FULL_RETRY_S = 1.0
LAST_LINES_BLOCK = 64 << 10
PAUSE_S = 0.05
PAUSE_BYTES = 65536


class Bucket:
    """Tokens in bytes for all streams of a box."""

    def __init__(self, rate: int, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._tokens = float(burst)
        self._at = time.monotonic()

    def tokens(self) -> float:
        """Return what may be moved now; negative after a drain at an exit, which is not held back."""
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        return self._tokens

    def take(self, count: int) -> None:
        """Pay for what was moved."""
        self._tokens -= count


class Stream:
    """stdout (number 1) or stderr (2) of a command."""

    __slots__ = (
        "_bucket",
        "_directory",
        "_file",
        "_late",
        "_poller",
        "_timer",
        "cap",
        "closed",
        "first_ms",
        "hole",
        "name",
        "noted",
        "number",
        "pipe",
        "punching",
        "removed",
        "sealed",
        "size",
        "stalled",
        "watchers",
    )

    def __init__(
        self, poller: polling.Poller, directory: int, bucket: Bucket, name: str, number: int, cap: int
    ) -> None:
        self._poller, self._directory, self._bucket = poller, directory, bucket
        self.name, self.number, self.cap = f"{name}.{number}", number, cap
        self.pipe = -1
        self.size = 0
        self.first_ms = 0  # when the first byte came; 0: none yet, or a predecessor took it
        self.hole: tuple[int, int] | None = None  # what the cap dropped: [start, end)
        self.sealed = False
        self.stalled = False  # the pool is full
        self.removed = False
        self._file = -1
        self._late = 0
        self._timer: polling.Timer | None = None
        self.watchers: list[Callable[[], None]] = []  # called when there are more bytes, and when sealed
        self.closed: Callable[[], None] | None = None  # the pipe is at its end
        self.punching: Callable[[int, int], None] | None = None  # writes the hole down; raises OSError
        self.noted: Callable[[int, int, bool], None] | None = None  # number, bytes now, after the exit

    # --- beginning and end

    def attach(self, pipe: int) -> None:
        """Take over the read end of a pipe, for a new command or from a dead keeper."""
        self.pipe = pipe
        os.set_blocking(pipe, False)
        self._poller.on(pipe, self._readable)

    def detach(self) -> None:
        """Give up the pipe of a command that never began."""
        self._close_pipe()

    def recover(self, size: int | None, hole: tuple[int, int] | None) -> None:
        """Take up a stream from its file; `size` is known once it was sealed."""
        self.hole = hole
        self.sealed = size is not None
        try:
            self.size = os.stat(self.name, dir_fd=self._directory).st_size if size is None else size
        except FileNotFoundError:
            self.size = 0
        self.removed = self.size > 0 and not self._exists()
        try:
            self._late = os.stat(self.name + ".late", dir_fd=self._directory).st_size
        except FileNotFoundError:
            pass

    def _exists(self) -> bool:
        try:
            os.stat(self.name, dir_fd=self._directory)
        except FileNotFoundError:
            return False
        return True

    def drain(self) -> bool:
        """Move what is in the pipe at this moment, whatever the rate; False when the pool is full."""
        if self.pipe < 0:
            return True
        left = procs.bytes_in_pipe(self.pipe)
        while left > 0:
            moved = self._move(left)
            if moved is None:
                return False
            if moved == 0:
                break
            left -= moved
        return True

    def seal(self) -> None:
        """End the stream at its present size: the command has exited. What still comes is late."""
        self.sealed = True
        self._close_file()
        if self.pipe >= 0:
            poll = select.poll()
            poll.register(self.pipe, 0)
            ready = poll.poll(0)
            if ready and ready[0][1] & select.POLLHUP and procs.bytes_in_pipe(self.pipe) == 0:
                self._close_pipe()
        self._tell()

    def open_for_reading(self) -> int:
        """Return a new descriptor of the file, -1 if nothing was ever written."""
        try:
            return os.open(self.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return -1

    def in_base64(self) -> str | None:
        """Return a small sealed stream as base64 text; None if its file has been removed."""
        if self.size == 0:
            return ""
        descriptor = self.open_for_reading()
        if descriptor < 0:
            return None
        try:
            data = os.pread(descriptor, self.size, 0)
        finally:
            os.close(descriptor)
        return binascii.b2a_base64(data, newline=False).decode("ascii")

    def remove(self, *, late: bool) -> None:
        """Delete what was kept, and what came after the exit if `late`. The pipe goes on being drained, and followers
        are told."""
        self.removed = self.size > 0
        if late:
            self._late = 0
        for name in (self.name, self.name + ".late") if late else (self.name,):
            try:
                os.unlink(name, dir_fd=self._directory)
            except FileNotFoundError:
                pass
        self._tell()

    def read_late(self, offset: int, limit: int) -> tuple[int, bytes]:
        """Return bytes that came after the exit, and where they begin: `offset`, or later if that has been written
        over. Offsets count all late bytes, kept or not."""
        offset = max(offset, self._late - LATE_BYTES)
        length = min(limit, self._late - offset)
        if length <= 0:
            return offset, b""
        try:
            descriptor = os.open(self.name + ".late", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return self._late, b""
        try:
            place = offset % LATE_BYTES
            data = os.pread(descriptor, min(length, LATE_BYTES - place), place)
            if len(data) < length:
                data += os.pread(descriptor, length - len(data), 0)
        finally:
            os.close(descriptor)
        return offset, data

    @property
    def late(self) -> int:
        """Bytes that came after the exit."""
        return self._late

    def recover_late(self, size: int) -> None:
        """What a dead keeper knew to have come after the exit, which its ring does not tell once it is full."""
        self._late = max(self._late, size)

    def changed_at_ms(self) -> int:
        """Return when the file was last written to."""
        try:
            return os.stat(self.name, dir_fd=self._directory).st_mtime_ns // 1_000_000
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Give up the pipe: its writers get SIGPIPE."""
        self._close_pipe()
        self._close_file()

    @property
    def dropped(self) -> int:
        """Bytes the cap dropped."""
        return self.hole[1] - self.hole[0] if self.hole else 0

    @property
    def kept(self) -> int:
        """Bytes of it on the disk."""
        return (0 if self.removed else self.size - self.dropped) + min(self._late, LATE_BYTES)

    # --- bytes

    def _readable(self, events: int) -> None:
        allowed = self._bucket.tokens()
        worthwhile = min(PAUSE_BYTES, self._bucket.rate * PAUSE_S)
        if allowed < worthwhile:  # a few bytes at a time would cost more than they are worth
            self._pause(max(PAUSE_S, min(1.0, (worthwhile - allowed) / self._bucket.rate)))
            return
        moved = self._move(min(SPLICE_BYTES, int(allowed)))
        if moved is None:
            return
        if moved == 0:
            self._close_pipe()
        elif not self.sealed:
            self._tell()

    def _tell(self) -> None:
        for call in tuple(self.watchers):
            call()

    def _move(self, count: int) -> int | None:
        """Splice up to `count` bytes: how many, 0 at the end of the pipe, None if nothing can be moved now."""
        try:
            if self.sealed:
                moved = self._move_late(count)
            else:
                moved = os.splice(self.pipe, self._open_file(), count, offset_dst=self.size, flags=SPLICE_FLAGS)
                if moved and not self.size:
                    self.first_ms = int(time.time() * 1000)
                self.size += moved
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            if not self.stalled:
                polling.log(f"{self.name}: not read on: {error.strerror}")
            self.stalled = True
            self._pause(FULL_RETRY_S)
            return None
        self.stalled = False
        self._bucket.take(moved)
        if moved and self.noted is not None:
            self.noted(self.number, self._late if self.sealed else self.size, self.sealed)
        if self.size > self.cap and not self.sealed:
            self._free_middle()
        return moved

    def _move_late(self, count: int) -> int:
        place = self._late % LATE_BYTES
        if self._file < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.name + ".late", flags, 0o600, dir_fd=self._directory)
        moved = os.splice(self.pipe, self._file, min(count, LATE_BYTES - place), offset_dst=place, flags=SPLICE_FLAGS)
        self._late += moved
        return moved

    def _free_middle(self) -> None:
        """Free what lies behind the head and before the tail; the range is written down before it is freed."""
        start = self.hole[0] if self.hole else self.cap // 2 // 4096 * 4096
        freed = self.hole[1] if self.hole else start
        end = (self.size - self.cap // 2) // 4096 * 4096
        piece = min(PUNCH_BYTES, max(4096, self.cap // 8 // 4096 * 4096))
        if end - freed < piece:
            return
        try:
            if self.punching is not None:
                self.punching(start, end)
            self.hole = (start, end)
            procs.punch_hole(self._open_file(), freed, end - freed)
        except OSError as error:
            polling.log(f"{self.name}: the middle was not freed: {error}")

    def _open_file(self) -> int:
        if self._file < 0:  # only now: most commands write nothing to one of their streams
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.name, flags, 0o600, dir_fd=self._directory)
        return self._file

    def _pause(self, seconds: float) -> None:
        """Stop reading for a while. The descriptor leaves the epoll set: a hang-up would be told again and again."""
        if self._timer is None and self.pipe >= 0:
            self._poller.off(self.pipe)
            self._timer = self._poller.after(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        if self.pipe >= 0:
            self._poller.on(self.pipe, self._readable)

    def _close_pipe(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.pipe >= 0:
            self._poller.off(self.pipe)
            os.close(self.pipe)
            self.pipe = -1
            if self.sealed:
                self._close_file()
            if self.closed is not None:
                self.closed()

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_pipe(descriptor: int) -> bool:
    """Is this one end of a pipe? What a spawner hands out is not believed."""
    return stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def is_socket(descriptor: int) -> bool:
    """Is this a socket?"""
    return stat.S_ISSOCK(os.fstat(descriptor).st_mode)


class FileRange:
    """Bytes of a stream that are to be sent."""

    __slots__ = ("left", "offset", "stream")

    def __init__(self, stream: Stream, offset: int, left: int) -> None:
        self.stream, self.offset, self.left = stream, offset, left


def last_lines(stream: Stream, count: int, limit: int) -> int:
    """Return the offset of the last `count` lines, at most `limit` bytes before the end."""
    floor = max(0, stream.size - limit)
    if stream.hole:
        floor = max(floor, stream.hole[1])
    descriptor = stream.open_for_reading()
    if descriptor < 0:
        return stream.size
    try:
        end = stream.size
        wanted = count + (end > 0 and os.pread(descriptor, 1, end - 1) == b"\n")
        while end > floor:
            start = max(floor, end - LAST_LINES_BLOCK)
            block = os.pread(descriptor, end - start, start)
            found = block.count(b"\n")
            if found >= wanted:
                place = len(block)
                for _ in range(wanted):
                    place = block.rfind(b"\n", 0, place)
                return start + place + 1
            wanted -= found
            end = start
        return floor
    finally:
        os.close(descriptor)
