"""Copies of disks in the pool: taken, listed, dropped.

In charge of: `snapshots/<id>/disk`, a read-only subvolume, and `about.json` beside it, which is written last: without
it there is no snapshot, only what a killed maker left. Not in charge of: their way to S3 and back (`sending`,
`receiving`), nor of who may ask (`snapshot_verbs`).

A snapshot belongs to no quota group: what it shares with its box is counted there, and on a host that received it, it
holds its bytes itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from typing import Any, Final

from hostd import asleep, boxes, btrfs, cgroups, disks, slots, syscalls
from hostd.config import HostConfig, write_file
from hostd.messages import Refused, is_work_id

NAME: Final = "disk"
FREEZE_SECONDS: Final = 1.0
"""A box that has not come to a halt by then is not waited for: its copy is then like a disk after a power cut."""
_FREEZE_LOOK_SECONDS: Final = 0.0005


def folder(cfg: HostConfig, snapshot: str) -> str:
    """Where a snapshot lies. Raises Refused bad_request for what is no id."""
    if not is_work_id(snapshot):
        raise Refused("bad_request", f"{snapshot!r} is not the id of a snapshot")
    return f"{cfg.snapshots}/{snapshot}"


def about(cfg: HostConfig, snapshot: str) -> dict[str, Any] | None:
    """What is known of a snapshot that is here whole."""
    try:
        with open(f"{folder(cfg, snapshot)}/about.json", "rb") as file:
            found: dict[str, Any] = json.loads(file.read())
    except FileNotFoundError:
        return None
    return found


def source(cfg: HostConfig, snapshot: str) -> str:
    """The subvolume of a snapshot. Raises Refused unknown_id."""
    if about(cfg, snapshot) is None:
        raise Refused("unknown_id", f"snapshot {snapshot} is not on this host")
    return f"{folder(cfg, snapshot)}/{NAME}"


def listed(cfg: HostConfig) -> list[dict[str, Any]]:
    """Every snapshot that is here whole, for reports."""
    try:
        names = sorted(os.listdir(cfg.snapshots))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        known = about(cfg, name) if is_work_id(name) else None
        if known is not None:
            fields = {key: known[key] for key in ("image", "size_bytes", "taken_at_ms")}
            found.append({"snapshot": name, **fields})
    return found


def take(cfg: HostConfig, slot: str, snapshot: str, base_bytes: int) -> dict[str, Any]:
    """Copy a slot's disk, up or not. One that was taken before is told as it was.

    Flushed first, then frozen, copied and thawed: the copying itself commits dirty pages, and with few of them left the
    box stands still for milliseconds. Raises Refused: unknown_box, no_space; OSError.
    """
    if (known := about(cfg, snapshot)) is not None:
        return known
    made = new_folder(cfg, snapshot)
    began = time.monotonic()
    if not disks.has_disk(cfg, slot):
        raise Refused("unknown_box", "this devbox has no disk on this host")
    syscalls.syncfs(cfg.disk(slot))
    flushed = time.monotonic()
    with boxes.locked(cfg, slot):
        record = slots.read(cfg, slot)
        if record is None or not disks.has_disk(cfg, slot):
            raise Refused("unknown_box", "this devbox has no disk on this host")
        up = boxes.find_made(cfg, slot) is not None
        freezing = time.monotonic()
        try:
            frozen = up and _freeze(cfg, slot)
            with disks.space_errors(cfg):
                btrfs.clone(cfg.disk(slot), made, NAME, read_only=True)
        finally:
            if up:
                thaw(cfg, slot)
        thawed = time.monotonic()
        btrfs.sync(cfg.snapshots)
        held, _ = disks.disk_usage(cfg, slot)
    known = {
        "image": record.image,
        "size_bytes": base_bytes + held,
        "freeze_ms": round((thawed - freezing) * 1000, 2) if up else 0.0,
        "flush_ms": round((flushed - began) * 1000, 2),
        "frozen": frozen,
        "taken_at_ms": time.time_ns() // 1_000_000,
    }
    return keep(cfg, snapshot, known)


def take_asleep(cfg: HostConfig, box: str, snapshot: str, base_bytes: int) -> dict[str, Any]:
    """Copy the disk of a suspended devbox, which nothing writes to. Raises Refused: unknown_box, no_space; OSError."""
    if (known := about(cfg, snapshot)) is not None:
        return known
    lying = asleep.listed(cfg).get(box)
    if lying is None:
        raise Refused("unknown_box", "this devbox has no disk on this host")
    made = new_folder(cfg, snapshot)
    with disks.space_errors(cfg):
        try:
            btrfs.clone(f"{cfg.asleep_disks}/{lying.name}", made, NAME, read_only=True)
        except FileNotFoundError:  # it has just been taken up again
            raise Refused("unknown_box", "this devbox sleeps no more") from None
    btrfs.sync(cfg.snapshots)
    group, exclusive = disks.limited(cfg, lying.slot, f"{made}/{NAME}")
    held, _ = btrfs.qgroup_usage(cfg.pool, group, exclusive=exclusive)
    known = {"image": lying.image, "size_bytes": base_bytes + held, "freeze_ms": 0.0, "flush_ms": 0.0, "frozen": False}
    return keep(cfg, snapshot, {**known, "taken_at_ms": time.time_ns() // 1_000_000})


def keep(cfg: HostConfig, snapshot: str, known: dict[str, Any]) -> dict[str, Any]:
    """Say that a snapshot is here whole."""
    write_file(f"{folder(cfg, snapshot)}/about.json", json.dumps(known).encode(), mode=0o600)
    btrfs.sync(cfg.snapshots)
    return known


def new_folder(cfg: HostConfig, snapshot: str) -> str:
    """An empty folder for a snapshot, whatever was left of an earlier try."""
    made = folder(cfg, snapshot)
    drop(cfg, snapshot)
    os.makedirs(made, mode=0o700)
    return made


def drop(cfg: HostConfig, snapshot: str) -> None:
    """Delete a snapshot; its bytes go as far as no box shares them. None there is fine.

    Raises Refused busy while it is being read for its way to S3.
    """
    path = folder(cfg, snapshot)
    if not os.path.isdir(path):
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}/about.json")
    for name in os.listdir(path):
        if os.path.isdir(f"{path}/{name}"):
            try:
                drop_subvolume(cfg, path, name)
            except PermissionError:
                raise Refused("busy", f"snapshot {snapshot} is being sent") from None
    shutil.rmtree(path)


def drop_subvolume(cfg: HostConfig, parent: str, name: str) -> None:
    """Delete a subvolume and what is nested in it."""
    path = f"{parent}/{name}"
    btrfs.set_read_only(path, False)
    for nested in btrfs.nested_subvolumes(path):
        with contextlib.suppress(FileNotFoundError):
            btrfs.delete_subvolume_by_id(cfg.pool, nested)
    btrfs.delete_subvolume(parent, name)


def drop_unfinished(cfg: HostConfig) -> list[str]:
    """Delete what killed makers left half made; the ids. For the start, when nobody is at work."""
    os.makedirs(cfg.snapshots, mode=0o700, exist_ok=True)
    found = [name for name in os.listdir(cfg.snapshots) if is_work_id(name) and about(cfg, name) is None]
    for name in found:
        drop(cfg, name)
    return found


def thaw(cfg: HostConfig, slot: str) -> None:
    """Let a box go on. Repeatable; one that is gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        cgroups.detect().thaw(cfg.box_cgroup(slot))


def _freeze(cfg: HostConfig, slot: str) -> bool:
    driver, path = cgroups.detect(), cfg.box_cgroup(slot)
    deadline = time.monotonic() + FREEZE_SECONDS
    driver.freeze(path)
    while not driver.frozen(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_FREEZE_LOOK_SECONDS)
    return True
