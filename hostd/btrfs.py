"""btrfs by ioctl: subvolumes, quota groups and usage.

In charge of: the kernel's structures (public ABI, linux/btrfs.h). Not in charge of: which subvolume is whose (`disks`,
`images`). By ioctl because a forked tool costs three times as much and Debian 12's tool knows no simple quotas.

All functions raise OSError as the kernel answers.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final


def _ioc(direction: int, number: int, size: int) -> int:
    return (direction << 30) | (size << 16) | (0x94 << 8) | number


_WRITE, _READ, _BOTH = 1, 2, 3
_SNAP_CREATE_V2: Final = _ioc(_WRITE, 23, 4096)
_SUBVOL_CREATE_V2: Final = _ioc(_WRITE, 24, 4096)
_SNAP_DESTROY_V2: Final = _ioc(_WRITE, 63, 4096)
_TREE_SEARCH: Final = _ioc(_BOTH, 17, 4096)
_INO_LOOKUP: Final = _ioc(_BOTH, 18, 4096)
_SUBVOL_GETFLAGS: Final = _ioc(_READ, 25, 8)
_SUBVOL_SETFLAGS: Final = _ioc(_WRITE, 26, 8)
_QUOTA_CTL: Final = _ioc(_BOTH, 40, 16)
_QGROUP_ASSIGN: Final = _ioc(_WRITE, 41, 24)
_QGROUP_CREATE: Final = _ioc(_WRITE, 42, 16)
_QGROUP_LIMIT: Final = _ioc(_READ, 43, 48)
_GET_SUBVOL_INFO: Final = _ioc(_READ, 60, 504)
_SYNC: Final = 0x9408

_FLAG_READ_ONLY: Final = 1 << 1
_FLAG_INHERIT: Final = 1 << 2
_FLAG_BY_ID: Final = 1 << 4

_QUOTA_ENABLE: Final = 1
_QUOTA_ENABLE_SIMPLE: Final = 4
_LIMIT_MAX_RFER: Final = 1
_LIMIT_MAX_EXCL: Final = 2

_ROOT_TREE: Final = 1
_QUOTA_TREE: Final = 8
FIRST_SUBVOLUME: Final = 256
_ROOT_ITEM_KEY: Final = 132
_ROOT_REF_KEY: Final = 156
_QGROUP_STATUS_KEY: Final = 240
_QGROUP_INFO_KEY: Final = 242
_QGROUP_LIMIT_KEY: Final = 244
_QGROUP_RELATION_KEY: Final = 246
_STATUS_SIMPLE: Final = 1 << 3

MAGIC: Final = 0x9123683E
_U64_MAX: Final = 2**64 - 1

LEVEL_1: Final = 1 << 48


def qgroup(number: int) -> int:
    """The id of level-1 quota group ``1/number`` (48 bits)."""
    if not 0 < number < LEVEL_1:
        raise ValueError(f"quota group number {number} does not fit 48 bits")
    return LEVEL_1 | number


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _name(name: str) -> bytes:
    encoded = os.fsencode(name)
    if not encoded or b"/" in encoded or len(encoded) > 255 or name in (".", ".."):
        raise ValueError(f"{name!r} cannot name a subvolume")
    return encoded


def is_btrfs(path: str) -> bool:
    """Whether ``path`` lies on a btrfs. False when it does not exist."""
    try:
        with _folder(path) as folder:
            buffer = bytearray(4096)
            struct.pack_into("=QQ", buffer, 0, 0, FIRST_SUBVOLUME)
            fcntl.ioctl(folder, _INO_LOOKUP, buffer)
    except OSError:
        return False
    return True


def create_subvolume(folder: str, name: str) -> None:
    with _folder(folder) as into:
        # A bytearray, here and below: fcntl.ioctl refuses immutable arguments of more than 1,024 bytes.
        fcntl.ioctl(into, _SUBVOL_CREATE_V2, bytearray(struct.pack("=qQQ32x4040s", 0, 0, 0, _name(name))))


def clone(source: str, folder: str, name: str, *, read_only: bool = False, group: int | None = None) -> None:
    """Snapshot ``source`` as ``folder/name``, a member of quota group ``group`` from its first byte."""
    flags = _FLAG_READ_ONLY if read_only else 0
    inherit = array.array("B")
    if group is not None:
        flags |= _FLAG_INHERIT
        inherit.frombytes(struct.pack("=QQQQ5QQ", 0, 1, 0, 0, 0, 0, 0, 0, 0, group))
    address, size = inherit.buffer_info()
    with _folder(source) as origin, _folder(folder) as into:
        sizes = (size, address) if group is not None else (0, 0)
        argument = bytearray(struct.pack("=qQQQQ16x4040s", origin, 0, flags, *sizes, _name(name)))
        fcntl.ioctl(into, _SNAP_CREATE_V2, argument)


def delete_subvolume(folder: str, name: str) -> None:
    """Unlink a subvolume; the kernel frees its space later. ENOTEMPTY when others are nested in it."""
    with _folder(folder) as into:
        fcntl.ioctl(into, _SNAP_DESTROY_V2, bytearray(struct.pack("=qQQ32x4040s", 0, 0, 0, _name(name))))


def delete_subvolume_by_id(anywhere: str, subvolume: int) -> None:
    """Unlink a subvolume by its id; ``anywhere`` is a folder of the same file system. Opens no path inside it."""
    with _folder(anywhere) as folder:
        argument = struct.pack("=qQQ32xQ4032x", 0, 0, _FLAG_BY_ID, subvolume)
        fcntl.ioctl(folder, _SNAP_DESTROY_V2, bytearray(argument))


def subvolume_id(path: str) -> int:
    with _folder(path) as folder:
        buffer = bytearray(4096)
        struct.pack_into("=QQ", buffer, 0, 0, FIRST_SUBVOLUME)
        fcntl.ioctl(folder, _INO_LOOKUP, buffer)
        found: int = struct.unpack_from("=Q", buffer)[0]
        return found


def received_uuid(path: str) -> str:
    """The uuid a received subvolume was sent under, as 32 hexadecimal digits; all zeros for one made here."""
    with _folder(path) as folder:
        buffer = bytearray(504)
        fcntl.ioctl(folder, _GET_SUBVOL_INFO, buffer)
        # id u64, name[256], parent, dirid, generation, flags u64, then uuid, parent_uuid, received_uuid
        start = 8 + 256 + 4 * 8 + 2 * 16
        return bytes(buffer[start : start + 16]).hex()


def set_read_only(path: str, read_only: bool) -> None:
    with _folder(path) as folder:
        flags = bytearray(8)
        fcntl.ioctl(folder, _SUBVOL_GETFLAGS, flags)
        old = struct.unpack("=Q", flags)[0]
        new = old | _FLAG_READ_ONLY if read_only else old & ~_FLAG_READ_ONLY
        fcntl.ioctl(folder, _SUBVOL_SETFLAGS, bytearray(struct.pack("=Q", new)))


def is_read_only(path: str) -> bool:
    with _folder(path) as folder:
        flags = bytearray(8)
        fcntl.ioctl(folder, _SUBVOL_GETFLAGS, flags)
        return bool(struct.unpack("=Q", flags)[0] & _FLAG_READ_ONLY)


def sync(path: str) -> None:
    """Commit the file system's running transaction."""
    with _folder(path) as folder:
        fcntl.ioctl(folder, _SYNC)


# --- quota ----------------------------------------------------------------------------------------------------------


def enable_simple_quota(path: str) -> None:
    """EINVAL or ENOTTY on kernels before 6.7."""
    _quota_ctl(path, _QUOTA_ENABLE_SIMPLE)


def enable_full_quota(path: str) -> None:
    """Ordinary quota groups: correct, but a clone takes 200-400 ms among 200 others."""
    _quota_ctl(path, _QUOTA_ENABLE)


def _quota_ctl(path: str, command: int) -> None:
    with _folder(path) as folder:
        fcntl.ioctl(folder, _QUOTA_CTL, bytearray(struct.pack("=QQ", command, 0)))


def quota_kind(path: str) -> str:
    """`simple`, `full` or `off`."""
    try:
        items = list(_search(path, _QUOTA_TREE, 0, 0, _QGROUP_STATUS_KEY))
    except FileNotFoundError:  # no quota tree
        return "off"
    for _, _, data in items:
        flags = struct.unpack_from("=QQQ", data)[2]
        return "simple" if flags & _STATUS_SIMPLE else "full"
    return "off"


def create_qgroup(path: str, group: int) -> None:
    """EEXIST when there is one."""
    with _folder(path) as folder:
        fcntl.ioctl(folder, _QGROUP_CREATE, bytearray(struct.pack("=QQ", 1, group)))


def remove_qgroup(path: str, group: int) -> None:
    """EBUSY while it has members: a deleted subvolume stays one until the kernel has cleaned it up."""
    with _folder(path) as folder:
        fcntl.ioctl(folder, _QGROUP_CREATE, bytearray(struct.pack("=QQ", 0, group)))


def move_to_qgroup(path: str, subvolume: str, group: int) -> None:
    """Make the subvolume a member of the level-1 group, and of no other."""
    member = subvolume_id(subvolume)
    found = [offset for _, offset, _ in _search(path, _QUOTA_TREE, member, member, _QGROUP_RELATION_KEY)]
    groups = [one for one in found if one >= LEVEL_1]
    with _folder(path) as folder:
        if group not in groups:
            fcntl.ioctl(folder, _QGROUP_ASSIGN, bytearray(struct.pack("=QQQ", 1, member, group)))
        for one in groups:
            if one != group:
                fcntl.ioctl(folder, _QGROUP_ASSIGN, bytearray(struct.pack("=QQQ", 0, member, one)))


def limit_qgroup(path: str, group: int, max_bytes: int | None, *, exclusive: bool = False) -> None:
    """Limit what the group's members may hold (``exclusive``: what nobody else holds too); None lifts the limit."""
    value = _U64_MAX if max_bytes is None else max_bytes  # all ones clears a limit
    flags, values = (_LIMIT_MAX_EXCL, (0, value)) if exclusive else (_LIMIT_MAX_RFER, (value, 0))
    with _folder(path) as folder:
        fcntl.ioctl(folder, _QGROUP_LIMIT, bytearray(struct.pack("=QQQQQQ", group, flags, *values, 0, 0)))


def qgroup_usage(path: str, group: int, *, exclusive: bool = False) -> tuple[int, int | None]:
    """(bytes held, limit) of a quota group, as last committed. Raises FileNotFoundError when there is none."""
    held: int | None = None
    limit: int | None = None
    for _, _, data in _search(path, _QUOTA_TREE, 0, 0, _QGROUP_INFO_KEY, group):
        held = struct.unpack_from("=5Q", data)[3 if exclusive else 1]
    for _, _, data in _search(path, _QUOTA_TREE, 0, 0, _QGROUP_LIMIT_KEY, group):
        flags, max_rfer, max_excl = struct.unpack_from("=QQQ", data)
        if flags & (_LIMIT_MAX_EXCL if exclusive else _LIMIT_MAX_RFER):
            limit = max_excl if exclusive else max_rfer
    if held is None:
        raise FileNotFoundError(2, "no such quota group", f"{group >> 48}/{group & (LEVEL_1 - 1)}")
    return held, limit


def quota_groups(path: str, level: int) -> list[int]:
    """All quota groups of a level: 0 is the subvolumes' own, named by their ids."""
    return [offset for _, offset, _ in _search(path, _QUOTA_TREE, 0, 0, _QGROUP_INFO_KEY) if offset >> 48 == level]


def subvolume_exists(path: str, subvolume: int) -> bool:
    """Whether the kernel still has the subvolume: a deleted one stays until it is cleaned up."""
    return any(True for _ in _search(path, _ROOT_TREE, subvolume, subvolume, _ROOT_ITEM_KEY))


# --- searching ------------------------------------------------------------------------------------------------------


def nested_subvolumes(path: str) -> list[int]:
    """Ids of the subvolumes inside the one at ``path``, the deepest first."""
    found: list[int] = []
    level = [subvolume_id(path)]
    while level:
        below = []
        for parent in level:
            below += [offset for _, offset, _ in _search(path, _ROOT_TREE, parent, parent, _ROOT_REF_KEY)]
        found[:0] = below
        level = below
        if len(found) > 1_000_000:
            raise OSError(7, "more than a million nested subvolumes", path)
    return found


def _search(
    path: str, tree: int, first: int, last: int, kind: int, offset: int | None = None
) -> Iterator[tuple[int, int, bytes]]:
    """(objectid, offset, data) of every item of one type between two object ids, or with one exact offset."""
    with _folder(path) as folder:
        low = (first, offset if offset is not None else 0)
        while True:
            buffer = bytearray(4096)
            high = offset if offset is not None else _U64_MAX
            struct.pack_into(
                "=QQQQQQQIIII", buffer, 0, tree, low[0], last, low[1], high, 0, _U64_MAX, kind, kind, 512, 0
            )
            fcntl.ioctl(folder, _TREE_SEARCH, buffer)
            count = struct.unpack_from("=I", buffer, 64)[0]
            if not count:
                return
            position = 104
            for _ in range(count):
                _, objectid, item_offset, item_kind, length = struct.unpack_from("=QQQII", buffer, position)
                position += 32
                if item_kind == kind and first <= objectid <= last and (offset is None or item_offset == offset):
                    yield objectid, item_offset, bytes(buffer[position : position + length])
                position += length
            if item_offset == _U64_MAX:
                return
            low = (objectid, item_offset + 1)
