"""Disks of suspended devboxes: each lies under its devbox's id, and nothing else of the box is left.

In charge of: putting a disk there, taking it back into a slot, its deletion. Not in charge of: ending the box
(`boxes`), who may ask (`verbs`).

`boxes-asleep/<devbox>.<slot>.<image>`: the slot is the one it had, by which its quota group is known; its number may be
another box's by now. A disk is at one of its two places at any time, since it is moved by one rename.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from hostd import btrfs, disks, slots
from hostd.config import HostConfig
from hostd.messages import Refused, is_box_id

_NAME = re.compile(r"([a-z]+_[0-9a-z]+)\.(s\d{1,4}-[0-9a-f]{6})\.(.+)")


@dataclass(frozen=True, slots=True)
class Asleep:
    """A disk that lies here, with the slot it had and the image it was made of."""

    name: str
    slot: str
    image: str


def listed(cfg: HostConfig) -> dict[str, Asleep]:
    """Every disk that lies here, by its devbox."""
    try:
        found = (_NAME.fullmatch(name) for name in os.listdir(cfg.asleep_disks))
    except FileNotFoundError:  # an install of before there were any
        return {}
    return {match[1]: Asleep(match[0], match[2], match[3]) for match in found if match}


def lay_down(cfg: HostConfig, slot: str, box: str) -> None:
    """Move the slot's disk here, for good: what was written to it and the move are on the platter afterwards. Its box
    must have ended. Repeatable. Raises OSError."""
    if not is_box_id(box):
        raise Refused("bad_request", f"{box!r} is not a devbox id")
    os.makedirs(cfg.asleep_disks, mode=0o700, exist_ok=True)
    # Before the move as well: the file system writes names sooner than contents.
    btrfs.sync(cfg.pool)
    record = slots.read(cfg, slot)
    if record is not None and disks.has_disk(cfg, slot):  # else it lies here already
        os.rename(cfg.disk(slot), f"{cfg.asleep_disks}/{box}.{slot}.{record.image}")
    btrfs.sync(cfg.pool)


def take_up(cfg: HostConfig, slot: str, box: str, disk_bytes: int) -> None:
    """Move the devbox's disk into its new slot, under a limit of ``disk_bytes``. Repeatable.

    Raises Refused unknown_box when there is no such disk; OSError.
    """
    if not disks.has_disk(cfg, slot):
        had = listed(cfg).get(box)
        if had is None:
            raise Refused("unknown_box", "this host does not have the disk of this devbox")
        os.rename(f"{cfg.asleep_disks}/{had.name}", cfg.disk(slot))
    if btrfs.quota_kind(cfg.pool) == "simple":
        group = disks.group_of(slot)
        with contextlib.suppress(FileExistsError):
            btrfs.create_qgroup(cfg.pool, group)
        btrfs.move_to_qgroup(cfg.pool, cfg.disk(slot), group)
    disks.limit_disk(cfg, slot, disk_bytes)


def remove(cfg: HostConfig, box: str, *, keep: bool = False) -> None:
    """Delete the devbox's disk, or keep it for a day with those of boxes that were lost. None there is fine."""
    had = listed(cfg).get(box)
    if had is None:
        return
    if keep:
        disks.keep(cfg, cfg.asleep_disks, had.name, had.slot)
    else:
        disks.delete(cfg, cfg.asleep_disks, had.name, had.slot)
