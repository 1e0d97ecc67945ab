"""The pool and the disks in it.

In charge of: the pool's file, loop device, file system and mount; a box's disk (a clone of an image, under a limit),
its deletion and its keeping. Not in charge of: what an image is (`images`), the ioctls (`btrfs`).

A box's disk is a subvolume `boxes/<slot>` and a member of a quota group of its own, `1/<number of the slot>`. The limit
lies on the group: whatever is ever made inside the disk counts too, and the image's bytes do not. On kernels without
simple quotas (before 6.7) the limit lies on what the subvolume alone holds, in its own group `0/<its id>`. A disk that
was kept lies in `boxes-kept/`, under `<slot>.<time of its keeping>`; those of suspended devboxes are `asleep`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import time
from collections.abc import Iterator

from hostd import btrfs, syscalls
from hostd.config import HostConfig, slot_number
from hostd.messages import Refused

LABEL = "berth"
OPTIONS = "compress=zstd:1,discard=async,space_cache=v2"
_FULL_BELOW = 0.02  # no new disk when less than this part of the pool is free
_TOOL_SECONDS = 300
_KEPT = re.compile(r"(s\d{1,4}-[0-9a-f]{6})\.(\d+)")


# --- the pool -------------------------------------------------------------------------------------------------------


def is_pool_mounted(cfg: HostConfig) -> bool:
    return os.path.ismount(cfg.pool) and btrfs.is_btrfs(cfg.pool)


def make_pool(cfg: HostConfig) -> bool:
    """Have a file system to mount: True when it was made now. Raises Refused internal, no_space; OSError.

    The file is allocated, not sparse: a machine whose root runs full would otherwise turn the pool read-only, and end
    every box. A device that holds anything but a pool of ours is refused, never overwritten.
    """
    if is_pool_mounted(cfg):
        return False
    if cfg.pool_device:
        return _make_pool_on(cfg.pool_device)
    if cfg.pool_bytes is None:
        raise Refused("internal", f"neither pool_bytes nor pool_device is given, and {cfg.pool} is no mounted btrfs")
    if os.path.exists(cfg.pool_file) and _label(cfg.pool_file) == LABEL:
        return False
    free = os.statvfs(cfg.root)
    if free.f_bavail * free.f_frsize < cfg.pool_bytes + (1 << 30):
        raise Refused("no_space", f"{cfg.root} has no room for a pool of {cfg.pool_bytes} bytes and 1 GiB to spare")
    file = os.open(cfg.pool_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(file, 0, cfg.pool_bytes)
    finally:
        os.close(file)
    run("mkfs.btrfs", "-q", "-f", "-L", LABEL, "-m", "single", cfg.pool_file)
    return True


def _make_pool_on(device: str) -> bool:
    if _label(device) == LABEL:
        return False
    done = subprocess.run(["blkid", "-p", device], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    if done.returncode != 2:  # 2: nothing found on it
        raise Refused("internal", f"{device} holds something already: {done.stdout.strip() or done.stderr.strip()}")
    run("mkfs.btrfs", "-q", "-L", LABEL, device)
    return True


def is_ours(device: str) -> bool:
    """Whether a pool of ours lies on the device."""
    return _label(device) == LABEL


def _label(path: str) -> str:
    done = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", path],
        capture_output=True,
        text=True,
        timeout=_TOOL_SECONDS,
        check=False,
    )
    return done.stdout.strip()


def mount_pool(cfg: HostConfig) -> None:
    """Mount the pool; call it in the machine's own mount namespace. Repeatable. Raises Refused internal, OSError."""
    os.makedirs(cfg.pool, mode=0o700, exist_ok=True)
    if is_pool_mounted(cfg):
        return
    device = cfg.pool_device or attach_loop(cfg.pool_file)
    # Set-uid files in the pool are made by tenants; on the machine itself they must be worth nothing.
    syscalls.mount(device, cfg.pool, "btrfs", syscalls.MS_NOATIME | syscalls.MS_NOSUID, OPTIONS)


def prepare_pool(cfg: HostConfig) -> str:
    """Quota and folders of the mounted pool. Returns the kind of quota: `simple`, or `full` on kernels before 6.7."""
    kind = btrfs.quota_kind(cfg.pool)
    if kind == "off":
        try:
            btrfs.enable_simple_quota(cfg.pool)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP):
                raise
            btrfs.enable_full_quota(cfg.pool)
        kind = btrfs.quota_kind(cfg.pool)
    os.chmod(cfg.pool, 0o700)  # the machine's own users have no business in it
    for folder in (cfg.images, cfg.disks, cfg.kept_disks, cfg.asleep_disks, cfg.snapshots):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    return kind


def attach_loop(path: str) -> str:
    """The loop device of a file, attached with direct I/O if it was not. Raises Refused internal."""
    attached = loops_of(path)
    if attached:
        return attached[0]
    return run("losetup", "--find", "--show", "--direct-io=on", path).strip()


def detach_loop(path: str) -> None:
    """Detach every loop device of a file; none is fine. Raises Refused internal."""
    for device in loops_of(path):
        run("losetup", "--detach", device)


def loops_of(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    return run("losetup", "--noheadings", "--output", "NAME", "--associated", path).split()


def space(cfg: HostConfig) -> tuple[int, int]:
    """(bytes of the pool, bytes free)."""
    found = os.statvfs(cfg.pool)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


# --- disks ----------------------------------------------------------------------------------------------------------


def group_of(slot: str) -> int:
    """The quota group of a slot's disk: as unique as the slot, since a deleted disk holds its group for a while."""
    n, tail = slot_number(slot), int(slot.rpartition("-")[2], 16)
    return btrfs.qgroup((n + 1) << 24 | tail)


def has_disk(cfg: HostConfig, slot: str) -> bool:
    return os.path.isdir(cfg.disk(slot))


def make_disk(cfg: HostConfig, slot: str, image: str, disk_bytes: int, source: str | None = None) -> None:
    """Clone ``image``, or the subvolume ``source``, for the slot under a limit of ``disk_bytes`` beyond that.
    Repeatable.

    Raises Refused: unknown_image, unknown_id, no_space; OSError.
    """
    group = group_of(slot)
    if has_disk(cfg, slot):
        limit_disk(cfg, slot, disk_bytes)
        return
    size, free = space(cfg)
    if free < size * _FULL_BELOW:
        raise Refused("no_space", f"the pool has {free} of {size} bytes free, less than {_FULL_BELOW:.0%}")
    simple = btrfs.quota_kind(cfg.pool) == "simple"
    with space_errors(cfg):
        if simple:
            with contextlib.suppress(FileExistsError):
                btrfs.create_qgroup(cfg.pool, group)
            btrfs.limit_qgroup(cfg.pool, group, disk_bytes)
        try:
            btrfs.clone(source or cfg.image_path(image), cfg.disks, slot, group=group if simple else None)
        except FileNotFoundError:
            if source is not None:
                raise Refused("unknown_id", "this host has no such snapshot") from None
            raise Refused("unknown_image", f"this host has no image {image}") from None
        if not simple:
            limit_disk(cfg, slot, disk_bytes)


def limit_disk(cfg: HostConfig, slot: str, disk_bytes: int) -> None:
    """Write another limit. Below what is held already it stops further writing only. Raises OSError."""
    group, exclusive = limited(cfg, slot, cfg.disk(slot))
    btrfs.limit_qgroup(cfg.pool, group, disk_bytes, exclusive=exclusive)


def disk_usage(cfg: HostConfig, slot: str) -> tuple[int, int | None]:
    """(bytes held beyond the image, limit). Raises FileNotFoundError when there is no such disk."""
    group, exclusive = limited(cfg, slot, cfg.disk(slot))
    return btrfs.qgroup_usage(cfg.pool, group, exclusive=exclusive)


def delete_disk(cfg: HostConfig, slot: str) -> None:
    """Unlink a disk and whatever is nested in it; the kernel frees the space later. None there is fine."""
    delete(cfg, cfg.disks, slot, slot)


def keep_disk(cfg: HostConfig, slot: str) -> None:
    """Move a disk out of use, to be deleted by :func:`drop_kept`. None there is fine."""
    keep(cfg, cfg.disks, slot, slot)


def keep(cfg: HostConfig, folder: str, name: str, slot: str) -> None:
    """:func:`keep_disk` of one that lies in another folder."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(f"{folder}/{name}", f"{cfg.kept_disks}/{slot}.{int(time.time())}")


def kept(cfg: HostConfig) -> list[tuple[str, str, int]]:
    """(name, slot, kept at, in seconds since 1970) of every kept disk."""
    found = (_KEPT.fullmatch(name) for name in os.listdir(cfg.kept_disks))
    return [(match[0], match[1], int(match[2])) for match in found if match]


def drop_kept(cfg: HostConfig, older_than_seconds: float) -> int:
    """Delete disks that were kept longer ago than that; returns how many."""
    before = time.time() - older_than_seconds
    gone = [(name, slot) for name, slot, at in kept(cfg) if at <= before]
    for name, slot in gone:
        delete(cfg, cfg.kept_disks, name, slot)
    return len(gone)


def drop_idle_groups(cfg: HostConfig) -> int:
    """Remove quota groups whose disk is gone and cleaned up by the kernel; returns how many."""
    # Slots with a record count even without a disk: one may be about to get it.
    recorded = [name.removesuffix(".json") for name in os.listdir(cfg.slots)]
    in_use = set()
    asleep = [name.split(".")[1] for name in _names(cfg.asleep_disks)]
    for slot in [*recorded, *os.listdir(cfg.disks), *(slot for _, slot, _ in kept(cfg)), *asleep]:
        with contextlib.suppress(ValueError):
            in_use.add(group_of(slot))
    idle = [group for group in btrfs.quota_groups(cfg.pool, 1) if group not in in_use]
    # The kernel has removed a deleted subvolume's own group by itself only since it has simple quotas.
    own = (group for group in btrfs.quota_groups(cfg.pool, 0) if group >= btrfs.FIRST_SUBVOLUME)
    idle += [group for group in own if not btrfs.subvolume_exists(cfg.pool, group)]
    removed = 0
    for group in idle:
        try:
            btrfs.remove_qgroup(cfg.pool, group)
            removed += 1
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise
    return removed


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def delete(cfg: HostConfig, folder: str, name: str, slot: str) -> None:
    """:func:`delete_disk` of one that lies in another folder."""
    path = f"{folder}/{name}"
    if not os.path.isdir(path):
        return
    # At its limit a group has no room for the bookkeeping of a deletion either (EDQUOT).
    with contextlib.suppress(OSError):
        group, exclusive = limited(cfg, slot, path)
        btrfs.limit_qgroup(cfg.pool, group, None, exclusive=exclusive)
    try:
        btrfs.delete_subvolume(folder, name)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        for nested in btrfs.nested_subvolumes(path):
            with contextlib.suppress(FileNotFoundError):
                btrfs.delete_subvolume_by_id(cfg.pool, nested)
        btrfs.delete_subvolume(folder, name)
    with contextlib.suppress(OSError):  # busy, most often: drop_idle_groups comes again
        btrfs.remove_qgroup(cfg.pool, group_of(slot))


def limited(cfg: HostConfig, slot: str, path: str) -> tuple[int, bool]:
    """The quota group that carries the disk's limit, and whether the limit is on its exclusive bytes."""
    if btrfs.quota_kind(cfg.pool) == "full":
        return btrfs.subvolume_id(path), True
    return group_of(slot), False


@contextlib.contextmanager
def space_errors(cfg: HostConfig) -> Iterator[None]:
    """Say of a full pool that it is full: Refused no_space."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refused("no_space", f"the pool {cfg.pool} is full") from None
        raise


def run(*argv: str) -> str:
    """Run a tool and return its output. Raises Refused internal with its words, or naming the time it took too long."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Refused("internal", f"{argv[0]} took more than {_TOOL_SECONDS} s") from None
    except FileNotFoundError:
        raise Refused("internal", f"{argv[0]} is not installed") from None
    if done.returncode:
        raise Refused("internal", f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout
