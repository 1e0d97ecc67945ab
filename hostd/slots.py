"""Slots: box numbers in use, and whose they are.

In charge of: the records on disk (one per slot), the devboxes' names on them, and the giving away of a warm slot by one
atomic rename. Not in charge of: what the slot consists of (`boxes`).

`slots/<slot>.json` says that number n is taken. `names/<devbox>` and `warm/<slot>` are symbolic links to such a record;
a warm slot is claimed by renaming its link from the second folder to the first. A record without either belongs to a
making that was cut short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hostd import syscalls
from hostd.config import BOXES, HostConfig, slot_number, write_file
from hostd.messages import Refused, is_box_id


@dataclass(frozen=True, slots=True)
class Slot:
    """A box number in use. ``slot`` is `s<n>-<6 hex>`, never used again; ``n`` is given to others after its end."""

    slot: str
    n: int
    image: str
    disk_bytes: int
    created_at_ms: int = 0
    machine_id: str = ""
    """Of a devbox that was resumed; else it follows from the slot's name."""


def prepare(cfg: HostConfig) -> None:
    """Make the folders. Repeatable."""
    for folder in (cfg.slots, cfg.names, cfg.warm_slots, cfg.outputs):
        os.makedirs(folder, mode=0o700, exist_ok=True)


def new_slot(cfg: HostConfig, image: str, disk_bytes: int, box: str | None = None, *, machine_id: str = "") -> Slot:
    """Take a free number and write its record; with ``box``, also name it (a devbox that has a slot gets that one).

    Numbers are taken in turn, not lowest first: the traces of a dead box have time to go. Raises Refused no_slot.
    """
    with _lock(cfg):
        if box is not None:
            had = slot_of(cfg, box)
            if had is not None:
                return had
        taken = {slot_number(slot) for slot in recorded(cfg)}
        if len(taken) >= BOXES:
            raise Refused("no_slot", f"all {BOXES} box numbers of this host are taken")
        n = _next(cfg)
        while n in taken:
            n = (n + 1) % BOXES
        write_file(f"{cfg.slots}.next", str((n + 1) % BOXES).encode())
        made = Slot(f"s{n}-{secrets.token_hex(3)}", n, image, disk_bytes, int(time.time() * 1000), machine_id)
        _write(cfg, made)
        if box is not None:
            link = f"{cfg.names}/{box}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)  # slot_of found nothing behind it
            os.symlink(_target(made.slot), link)
        return made


def read(cfg: HostConfig, slot: str) -> Slot | None:
    """The record of a slot."""
    try:
        with open(f"{cfg.slots}/{slot}.json", "rb") as file:
            return Slot(**json.loads(file.read()))
    except FileNotFoundError:
        return None


def resize(cfg: HostConfig, slot: str, disk_bytes: int) -> None:
    """Note another disk size; an unknown slot is left unknown."""
    had = read(cfg, slot)
    if had is not None and had.disk_bytes != disk_bytes:
        _write(cfg, dataclasses.replace(had, disk_bytes=disk_bytes))


def recorded(cfg: HostConfig) -> list[str]:
    """All slots that have a record."""
    found = []
    for name in os.listdir(cfg.slots):
        slot = name.removesuffix(".json")
        with contextlib.suppress(ValueError):
            slot_number(slot)
            found.append(slot)
    return sorted(found, key=slot_number)


def slot_of(cfg: HostConfig, box: str) -> Slot | None:
    """The slot a devbox owns on this host."""
    if not is_box_id(box):
        raise Refused("bad_request", f"{box!r} is not a devbox id")
    slot = _pointed(f"{cfg.names}/{box}")
    return read(cfg, slot) if slot else None


def owners(cfg: HostConfig) -> dict[str, str]:
    """Slot -> devbox, of every named slot."""
    found = {}
    for box in os.listdir(cfg.names):
        slot = _pointed(f"{cfg.names}/{box}")
        if slot:
            found[slot] = box
    return found


def warm(cfg: HostConfig) -> set[str]:
    """Slots that are on offer."""
    return set(os.listdir(cfg.warm_slots))


def mark_warm(cfg: HostConfig, slot: str) -> None:
    """Offer a box that is up to :func:`claim_warm`. Repeatable, but not after it was claimed."""
    with contextlib.suppress(FileExistsError):
        os.symlink(_target(slot), f"{cfg.warm_slots}/{slot}")


def claim_warm(cfg: HostConfig, slot: str, box: str) -> bool:
    """Give the warm ``slot`` to ``box`` by one atomic rename. False when somebody else has it, it is not warm, or the
    devbox has a slot already (:func:`slot_of` tells which)."""
    if not is_box_id(box):
        raise Refused("bad_request", f"{box!r} is not a devbox id")
    try:
        syscalls.rename_exclusive(f"{cfg.warm_slots}/{slot}", f"{cfg.names}/{box}")
    except FileNotFoundError:
        return False
    except FileExistsError:
        return _pointed(f"{cfg.names}/{box}") == slot
    return True


def forget(cfg: HostConfig, slot: str, box: str | None = None) -> None:
    """Remove the slot's record and every name on it; the number is free afterwards. Repeatable."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{cfg.warm_slots}/{slot}")
    if box is None or _pointed(f"{cfg.names}/{box}") != slot:
        box = owners(cfg).get(slot)
    if box is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{cfg.names}/{box}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{cfg.slots}/{slot}.json")


def _write(cfg: HostConfig, slot: Slot) -> None:
    write_file(f"{cfg.slots}/{slot.slot}.json", json.dumps(dataclasses.asdict(slot)).encode(), mode=0o600)


def _target(slot: str) -> str:
    return f"../slots/{slot}.json"


def _pointed(link: str) -> str | None:
    try:
        return os.path.basename(os.readlink(link)).removesuffix(".json")
    except FileNotFoundError:
        return None


def _next(cfg: HostConfig) -> int:
    try:
        with open(f"{cfg.slots}.next", encoding="ascii") as file:
            return int(file.read(16)) % BOXES
    except (FileNotFoundError, ValueError):
        return 0


@contextlib.contextmanager
def _lock(cfg: HostConfig) -> Iterator[None]:
    # Held for a few file operations only.
    lock = os.open(f"{cfg.slots}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
