"""The spawner's part in named shells: the files through which one command reaches a shell that runs already.

In charge of: a directory of the box that only we may change (it belongs to the spawner's uid; the user may pass through
it, no more), and in it, anew for each command, its text and the FIFOs of its streams, which belong to the user.
Not in charge of: what is written into the shell (shells.py), starting one (spawner.py).

The box's root may do to these files what it likes. Nothing is read from them here, no symbolic link is followed, and
what was opened is checked to be what was made.
"""

from __future__ import annotations

import errno
import os
import stat

from hostd.requests import OUR_UID

TEXT, STDIN, STDOUT, STDERR = "command", "i", "o", "e"
_NEW = os.O_CLOEXEC | os.O_NOFOLLOW
_FIFO = _NEW | os.O_NONBLOCK


def lay_out(directory: str, text: str, user: tuple[int, int], *, stdin: bool) -> list[tuple[str, int]]:
    """Make the files of one command; return our ends as (role, descriptor): 1, 2, and for stdin: stdin, hold.

    `hold` is an end of stdin for reading and writing: as long as it is open, nobody who opens the FIFO has to wait, and
    what is written is kept. What an earlier command left under these names goes; who has it open keeps it.
    Raises OSError.
    """
    try:
        os.mkdir(directory, 0o711)
    except FileExistsError:
        pass
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _NEW)
    ours: list[tuple[str, int]] = []
    try:
        if os.fstat(place).st_uid != OUR_UID:
            raise OSError(errno.EPERM, "the directory of a shell belongs to somebody else")
        for name in (TEXT, STDIN, STDOUT, STDERR):
            try:
                os.unlink(name, dir_fd=place)
            except FileNotFoundError:
                pass
        _write(place, text, user)
        for role, name in (("1", STDOUT), ("2", STDERR)):
            os.mkfifo(name, 0o600, dir_fd=place)
            ours.append((role, _open(place, name, os.O_RDONLY)))
            os.fchown(ours[-1][1], *user)
        if stdin:
            os.mkfifo(STDIN, 0o600, dir_fd=place)
            ours.append(("hold", _open(place, STDIN, os.O_RDWR)))
            ours.append(("stdin", _open(place, STDIN, os.O_WRONLY)))
            os.fchown(ours[-1][1], *user)
        return ours
    except BaseException:
        for _, descriptor in ours:
            os.close(descriptor)
        raise
    finally:
        os.close(place)


def _write(place: int, text: str, user: tuple[int, int]) -> None:
    file = os.open(TEXT, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NEW, 0o600, dir_fd=place)
    try:
        view = memoryview(text.encode("utf-8"))
        while view:
            view = view[os.write(file, view) :]
        os.fchown(file, *user)
    finally:
        os.close(file)


def _open(place: int, name: str, how: int) -> int:
    descriptor = os.open(name, how | _FIFO, dir_fd=place)
    found = os.fstat(descriptor)
    if not stat.S_ISFIFO(found.st_mode) or found.st_uid != OUR_UID:
        os.close(descriptor)
        raise OSError(errno.EPERM, "a file of a shell was replaced")
    return descriptor
