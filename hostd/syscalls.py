"""System calls and prctl that Python 3.11 has no function for.

In charge of: arguments, numbers and errno. Not in charge of: what is mounted, entered or killed with them.

x86-64 and aarch64 share the numbers of the newer calls; the few older ones differ and are looked up.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

_ARM = platform.machine() == "aarch64"
_SETNS: Final = 268 if _ARM else 308
_UNSHARE: Final = 97 if _ARM else 272
_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_MOUNT_SETATTR: Final = 442
_RENAMEAT2: Final = 276 if _ARM else 316

CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWCGROUP: Final = 0x0200_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_NOATIME: Final = 1024
MS_BIND: Final = 4096
MS_REC: Final = 16384
MS_PRIVATE: Final = 1 << 18
MNT_DETACH: Final = 2

MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
MOUNT_ATTR_IDMAP: Final = 0x0010_0000

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_RENAME_NOREPLACE: Final = 1
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def syncfs(path: str) -> None:
    """Write the file system's dirty pages and commit them. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check(_libc.syncfs(folder), path)
    finally:
        os.close(folder)


def _call(number: int, *arguments: int | ctypes.c_char_p | ctypes.Array[ctypes.c_char]) -> int:
    # Every integer as a long: a plain int would leave the upper half of its register undefined.
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide))


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` for new ones. Raises OSError."""
    _call(_UNSHARE, flags)


def setns(descriptor: int, flags: int) -> None:
    """Enter a namespace (or, by pidfd, several). Raises OSError."""
    _call(_SETNS, descriptor, flags)


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    """mount(2). Raises OSError naming the target."""
    encoded = [value.encode() if value is not None else None for value in (source, target, kind)]
    options = data.encode() if data is not None else None
    _check(_libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), options), target)


def unmount(target: str, *, detach: bool = True) -> None:
    """umount2(2); ``detach`` takes it out of sight at once, whoever still uses it. Raises OSError."""
    _check(_libc.umount2(target.encode(), MNT_DETACH if detach else 0), target)


def unmount_all(target: str) -> None:
    """Unmount whatever is stacked on ``target``; nothing there is fine. Raises OSError."""
    for _ in range(64):
        try:
            unmount(target)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if error.errno == 22:  # EINVAL: not a mount point
                return
            raise
    raise OSError(16, "more than 64 mounts are stacked here", target)


def mount_idmapped(source: str, target: str, user_namespace: int) -> None:
    """Show ``source`` at ``target``, owners shifted as ``user_namespace`` (a descriptor) maps them: without device
    files, and with set-uid programs even where the file system is mounted without. Raises OSError."""
    tree = _call(_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(source.encode()), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC)
    try:
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_IDMAP | MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, 0, user_namespace)
        wanted = ctypes.create_string_buffer(attributes)
        _call(_MOUNT_SETATTR, tree, ctypes.c_char_p(b""), _AT_EMPTY_PATH, wanted, 32)
        _call(
            _MOVE_MOUNT,
            tree,
            ctypes.c_char_p(b""),
            _AT_FDCWD,
            ctypes.c_char_p(target.encode()),
            _MOVE_MOUNT_F_EMPTY_PATH,
        )
    finally:
        os.close(tree)


def rename_exclusive(source: str, target: str) -> None:
    """Rename unless the target exists. Raises FileExistsError, FileNotFoundError, OSError."""
    _call(
        _RENAMEAT2,
        _AT_FDCWD,
        ctypes.c_char_p(source.encode()),
        _AT_FDCWD,
        ctypes.c_char_p(target.encode()),
        _RENAME_NOREPLACE,
    )


def die_with_parent(signal_number: int) -> None:
    """Ask for a signal when the thread that forked us ends. The caller checks that it has not ended before."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0))


def set_dumpable(dumpable: bool) -> None:
    """Whether /proc/self belongs to our uid (true) or to root. A change of uid makes it false."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0))
