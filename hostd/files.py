"""Files read or written for clients, inside a box, as a user of the box.

In charge of: what a process does that the spawner has forked, and that is given one client's connection after another:
open the file by the box's own names and the user's own rights, move the bytes, say in a typed way what was wrong.
Not in charge of: starting and stopping that process (transfers.py), the shape of the request (transfers.py).

Everything happens in the box: symbolic links, `..`, mounts and permissions mean what they mean to the user's own
programs, and no path is ever looked at on the host. Only regular files are moved; nothing blocks on a FIFO or a device.
A write becomes visible at once and whole, by a file without a name that takes the old one's place at the end; a cut
leaves the old one. The one exception: a file that its user may write in a directory that he may not is overwritten.

The wire, after the request line (see `hostd.messages` for frames):

    read   <- {"ok": true, "size", "offset", "length", "mtime_ms"}, frames, 0, {"complete", "total", "error"?}
    write  <- {"ok": true}                       at once: the target can be written
           -> frames, 0, {"total", "path"?}      the path only when the request did not name it
           <- {"ok": true, "size"}
    either <- {"error": {"code", "message"}}     instead of any of these lines

The wire to the keeper: <- {"task", "rest64"} + the connection; -> {"done": may the connection carry another request?}.
"""

from __future__ import annotations

import _codecs
import _socket
import binascii
import errno
import os
import stat
import struct

from hostd import packets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

FRAME_BYTES = 256 << 10
FRAME_MAX = 1 << 20
TRAILER_BYTES = 64 << 10
PATH_BYTES = 4095
UNSIZED_BYTES = 1 << 20
"""Files that the kernel makes up (/proc) say that they are empty; so much of one is read."""
STALL_S = 600
"""For a client that neither sends nor takes a byte."""
NEW_MODE = 0o666
SMALL_BYTES = 64 << 10
"""A range up to this size goes out in one piece with its answer and trailer."""
CONTROL = 3
"""The descriptor of the socket to the keeper; the numbers of what one request opens are above it."""
DESCRIPTORS = 64


class Failed(Exception):
    """The request cannot be carried out; `code` is one of the wire contract."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def reply(self) -> dict[str, Any]:
        """Return the answer."""
        return {"error": {"code": self.code, "message": str(self)}}


_CODES = {
    errno.ENOENT: "no_such_file",
    errno.ENOTDIR: "bad_path",
    errno.EEXIST: "bad_path",  # a file where a directory would have to be made
    errno.ELOOP: "bad_path",
    errno.ENAMETOOLONG: "bad_path",
    errno.EINVAL: "bad_path",
    errno.EISDIR: "not_a_file",
    errno.ENXIO: "not_a_file",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EROFS: "denied",
    errno.ETXTBSY: "denied",
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EFBIG: "too_large",
}


def failed(error: OSError, path: bytes) -> Failed:
    """Say an error of the box's file system in the words of the wire."""
    code = _CODES.get(error.errno or 0, "box_io")
    return Failed(code, f"{shown(path)}: {error.strerror or error}")


def shown(path: bytes) -> str:
    """Return a path as it may stand in a message. Without a codec that would have to be imported: see spawner.py."""
    text = path.decode("utf-8", "replace")[:300]
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


class Cut(Exception):
    """The client has gone, or sends what the protocol does not allow: there is nobody to answer."""


_buffer = bytearray(FRAME_BYTES)
"""For what is received: of one connection at a time."""


class Connection:
    """The client's socket, blocking, with what had been read of it before it came here."""

    def __init__(self, descriptor: int, rest: bytes) -> None:
        os.set_blocking(descriptor, True)
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        self._sock.settimeout(None)
        patience = struct.pack("ll", STALL_S, 0)
        self._sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, patience)
        self._sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, patience)
        self._rest = bytearray(rest)
        self._buffer = _buffer
        self._unsent = b""

    def close(self) -> bool:
        """End our part in it. Had everything that came of it been asked for?"""
        self._sock.close()
        return not self._rest

    def say(self, message: dict[str, Any], before: bytes = b"") -> None:
        """Send one JSON line, `before` in front of it."""
        self._send(before + packets.dumps(message) + b"\n")

    def say_soon(self, message: dict[str, Any], more: bytes = b"") -> None:
        """Send one JSON line and `more` together with what follows, before anything is waited for."""
        self._unsent += packets.dumps(message) + b"\n" + more

    def _send(self, data: bytes) -> None:
        data, self._unsent = self._unsent + data, b""
        try:
            self._sock.sendall(data, _socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Cut(str(error)) from None

    def _flush(self) -> None:
        if self._unsent:
            self._send(b"")

    def send_file(self, descriptor: int, offset: int, length: int) -> int:
        """Send so many bytes of a file as frames; return how many there were, fewer if it has become shorter."""
        sent = 0
        while sent < length:
            # The length goes first, so it has to be certain: of what a frame has promised the rest must come.
            wanted = min(FRAME_BYTES, length - sent, max(0, os.fstat(descriptor).st_size - offset - sent))
            if wanted == 0:
                break
            self._send(struct.pack("!I", wanted))
            left = wanted
            while left:
                try:
                    count = os.sendfile(self._sock.fileno(), descriptor, offset + sent, left)
                except OSError as error:
                    raise Cut(str(error)) from None
                if count == 0:
                    raise Cut("the file became shorter within a frame")
                sent += count
                left -= count
        return sent

    def receive_frame(self) -> int:
        """Return the length of the next frame, 0 at the end."""
        (length,) = struct.unpack("!I", self._exactly(4))
        if length > FRAME_MAX:
            raise Cut("a frame is too long")
        return int(length)

    def receive_some(self, at_most: int) -> memoryview:
        """Return some of the bytes of a frame, at least one. The view is good until the next call."""
        if self._rest:
            taken = min(len(self._rest), at_most, len(self._buffer))
            self._buffer[:taken] = self._rest[:taken]
            del self._rest[:taken]
            return memoryview(self._buffer)[:taken]
        self._flush()
        try:
            count = self._sock.recv_into(memoryview(self._buffer)[: min(at_most, len(self._buffer))])
        except OSError as error:
            raise Cut(str(error)) from None
        if count == 0:
            raise Cut("the connection ended")
        return memoryview(self._buffer)[:count]

    def receive_line(self) -> dict[str, Any]:
        """Return the trailer."""
        while (end := self._rest.find(b"\n")) < 0:
            if len(self._rest) > TRAILER_BYTES:
                raise Cut("the trailer is too long")
            self._flush()
            try:
                data = self._sock.recv(4096)
            except OSError as error:
                raise Cut(str(error)) from None
            if not data:
                raise Cut("the connection ended")
            self._rest += data
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        try:
            return packets.loads(line)
        except packets.Malformed as error:
            raise Cut(str(error)) from None

    def _exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            found += self.receive_some(count - len(found))
        return found


def serve(control: _socket.socket) -> NoReturn:
    """Carry out one request after the other until the keeper lets go; then end the process."""
    try:
        while True:
            message, descriptors = packets.receive(control)
            if message is None:
                break
            (descriptor,) = descriptors
            clean = _carry_out(message["task"], descriptor, binascii.a2b_base64(message["rest64"]))
            os.closerange(CONTROL + 1, DESCRIPTORS)
            packets.send(control, {"done": clean})
    finally:
        os._exit(0)


def _carry_out(task: dict[str, Any], descriptor: int, rest: bytes) -> bool:
    """Carry one request out. `task`: op, home, path64 and the fields of the op. May the connection go on?"""
    connection = Connection(descriptor, rest)
    clean = False
    try:
        try:
            home = task["home"].encode("utf-8")
            task["path"] = None if task["path64"] is None else path_of(task)
            if task["op"] == "read":
                clean = True  # nothing is read of it, whatever is answered
                read(connection, home, task)
            else:
                write(connection, home, task)
                clean = True
        except Failed as no:
            connection.say(no.reply())
        except Cut:
            raise
        except Exception as error:
            connection.say(Failed("internal", f"{type(error).__name__}: {error}").reply())
    except Cut:
        clean = False
    return connection.close() and clean


def located(path: bytes, home: bytes) -> bytes:
    """Return the absolute path that a user's path means: `~` and relative ones from the home. Raises Failed."""
    if not path:
        raise Failed("bad_path", "the path is empty")
    if b"\0" in path:
        raise Failed("bad_path", "the path contains NUL")
    if path == b"~" or path.startswith(b"~/"):
        path = home + path[1:]
    elif not path.startswith(b"/"):
        path = home + b"/" + path
    if len(path) > PATH_BYTES:
        raise Failed("bad_path", f"the path is longer than {PATH_BYTES} bytes")
    return path


# --- read


def read(connection: Connection, home: bytes, task: dict[str, Any]) -> None:
    """Answer a read. Raises Failed before the first byte, Cut."""
    path = located(task["path"], home)
    try:
        descriptor = _open_regular(path, os.O_RDONLY)
        facts = os.fstat(descriptor)
        size = facts.st_size
        made_up = _unsized(descriptor) if size == 0 else b""
    except OSError as error:
        raise failed(error, path) from None
    if made_up:
        size = len(made_up)
    offset = task["offset"] if task["offset"] >= 0 else max(0, size + task["offset"])
    length = max(0, min(size - offset, task["length"] if task["length"] is not None else size))
    if task["limit"] is not None and length > task["limit"]:
        raise Failed("too_large", f"{shown(path)}: it has {length} bytes, the limit here is {task['limit']}")
    if task["text"]:
        _check_text(path, descriptor, made_up, offset, length)
    small = made_up[offset : offset + length]
    if not made_up and length <= SMALL_BYTES:
        try:
            small = os.pread(descriptor, length, offset) if length else b""
        except OSError as error:
            raise failed(error, path) from None
    connection.say_soon(
        {"ok": True, "size": size, "offset": offset, "length": length, "mtime_ms": facts.st_mtime_ns // 1_000_000},
        struct.pack("!I", len(small)) + small if small else b"",
    )
    try:
        sent = len(small)
        if not made_up and length > SMALL_BYTES:
            sent = connection.send_file(descriptor, offset, length)
    except OSError as error:
        no = failed(error, path)
        connection.say({"complete": False, "total": 0, **no.reply()}, before=b"\0\0\0\0")
        return
    connection.say({"complete": sent == length, "total": sent}, before=b"\0\0\0\0")


def _open_regular(path: bytes, flags: int) -> int:
    """Open a regular file. Raises OSError, Failed not_a_file. What it is is asked first: opening a device may act."""
    _must_be_regular(path, os.stat(path).st_mode)
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    _must_be_regular(path, os.fstat(descriptor).st_mode)
    return descriptor


def _must_be_regular(path: bytes, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise Failed("not_a_file", f"{shown(path)}: this is {what}")


def _unsized(descriptor: int) -> bytes:
    found = b""
    while len(found) < UNSIZED_BYTES:
        try:
            data = os.read(descriptor, UNSIZED_BYTES - len(found))
        except BlockingIOError:
            break
        if not data:
            break
        found += data
    return found


def _check_text(path: bytes, descriptor: int, made_up: bytes, offset: int, length: int) -> None:
    """Raise Failed not_text for a range that is not UTF-8."""
    rest, done = b"", 0
    while done < length:
        wanted = min(1 << 20, length - done)
        try:
            data = made_up[offset + done :][:wanted] if made_up else os.pread(descriptor, wanted, offset + done)
        except OSError as error:
            raise failed(error, path) from None
        if not data:
            break
        done += len(data)
        rest += data
        try:
            _, used = _codecs.utf_8_decode(rest, "strict", done >= length)
        except UnicodeDecodeError as error:
            at = offset + done - len(rest) + error.start
            raise Failed("not_text", f"{shown(path)}: not UTF-8 at byte {at}") from None
        rest = rest[used:]


# --- write


class Target:
    """Where a write will be: the directory, the name in it, the mode, and whether it must be done in place."""

    def __init__(self, path: bytes) -> None:
        """Resolve, make the directories, look. Raises Failed."""
        self.path = path
        try:
            self._look()
        except OSError as error:
            raise failed(error, path) from None

    def _look(self) -> None:
        if self.path.endswith((b"/", b"/.", b"/..")):
            raise Failed("not_a_file", f"{shown(self.path)}: this names a directory")
        real = os.path.realpath(self.path)  # a symbolic link stays one; what it points at is replaced
        folder, self.name = os.path.split(real)
        os.makedirs(folder, exist_ok=True)
        self.folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.mode: int | None = None
        self.in_place = False
        try:
            found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        _must_be_regular(self.path, found.st_mode)
        if not os.access(self.name, os.W_OK, dir_fd=self.folder):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        self.mode = stat.S_IMODE(found.st_mode)
        self.in_place = not _may_write(self.folder)

    def staging(self) -> int:
        """Return a new file without a name that can take the target's place. Raises Failed."""
        try:
            if self.in_place:
                return _nameless(b"/tmp")
            return _nameless(b"/proc/self/fd/%d" % self.folder)
        except OSError as error:
            raise failed(error, self.path) from None

    def commit(self, staged: int, size: int) -> None:
        """Put the staged file in its place. Raises Failed."""
        try:
            if self.in_place:
                self._overwrite(staged, size)
                return
            try:
                self._replace(staged)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                nearer = self.staging()  # it was staged before its place was known
                _copy(staged, nearer, size)
                self._replace(nearer)
        except OSError as error:
            raise failed(error, self.path) from None

    def _replace(self, staged: int) -> None:
        os.fchmod(staged, self.mode if self.mode is not None else NEW_MODE & ~_umask())
        for _ in range(16):
            beside = b".berth-" + os.urandom(8).hex().encode("ascii")
            try:
                # With a directory's descriptor Python follows the link, and only then.
                os.link(b"/proc/self/fd/%d" % staged, beside, dst_dir_fd=self.folder, follow_symlinks=True)
            except FileExistsError:
                continue
            try:
                os.rename(beside, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            except OSError:
                os.unlink(beside, dir_fd=self.folder)
                raise
            return
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

    def _overwrite(self, staged: int, size: int) -> None:
        target = os.open(self.name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.folder)
        _must_be_regular(self.path, os.fstat(target).st_mode)
        _copy(staged, target, size)
        os.ftruncate(target, size)


def _may_write(folder: int) -> bool:
    return os.access(b"/proc/self/fd/%d" % folder, os.W_OK | os.X_OK)


def _umask() -> int:
    before = os.umask(0o022)
    os.umask(before)
    return before


def _nameless(folder: bytes) -> int:
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def _copy(source: int, target: int, size: int) -> None:
    done = 0
    while done < size:
        count = os.sendfile(target, source, done, size - done)
        if count == 0:
            raise OSError(errno.EIO, "the staged file became shorter")
        done += count


def write(connection: Connection, home: bytes, task: dict[str, Any]) -> None:
    """Answer a write. Raises Failed, Cut."""
    target = Target(located(task["path"], home)) if task["path"] is not None else None
    staged = target.staging() if target is not None else _stage_anywhere(home)
    connection.say_soon({"ok": True})
    size = _receive(connection, staged)
    trailer = connection.receive_line()
    if trailer.get("total") != size:
        raise Cut("the trailer does not fit what came")
    if target is None:
        target = Target(located(path_of(trailer), home))
    target.commit(staged, size)
    connection.say({"ok": True, "size": size})


def path_of(message: dict[str, Any]) -> bytes:
    """Return the path in a message: base64, since a name may have any bytes. Raises Failed."""
    try:
        path = binascii.a2b_base64(message["path64"].encode("ascii"), strict_mode=True)
    except (KeyError, AttributeError, ValueError):
        raise Failed("bad_request", "path64 must be base64 text") from None
    return path


def _stage_anywhere(home: bytes) -> int:
    told: OSError | None = None
    for folder in (home, b"/tmp"):
        try:
            return _nameless(folder)
        except OSError as error:
            if told is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                told = error
    assert told is not None
    raise failed(told, home)


def _receive(connection: Connection, staged: int) -> int:
    """Write the frames into the file; return how many bytes. Raises Cut, Failed (what still comes is not read)."""
    size = 0
    while left := connection.receive_frame():
        while left:
            data = connection.receive_some(left)
            left -= len(data)
            while data:
                try:
                    count = os.write(staged, data)
                except OSError as error:
                    raise failed(error, b"the file") from None
                size += count
                data = data[count:]
    return size
