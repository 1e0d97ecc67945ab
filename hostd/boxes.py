"""Boxes: made, limited, named and destroyed.

In charge of the order of steps that turn a slot into a running box and back into nothing, and of the records that let
any of it be repeated after a kill: every function may run twice, and :func:`destroy_box` cleans whatever half state it
finds. Not in charge of: fences and who may ask (`serve`), what runs inside (`keeper`), how each part is done (`disks`,
`network`, `cgroups`, `namespaces`, `seccomp`).

Runs in the maker processes, as root, inside the install's private mount namespace (:func:`hostd.namespaces.enter`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hostd.config import HostConfig


@dataclass(frozen=True, slots=True)
class Slot:
    """A box number in use. ``slot`` is `s<n>-<6 hex>`, never used again; ``n`` is given to others after its end."""

    slot: str
    n: int
    image: str
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """``cpu_millis`` 1000 is one CPU; sizes in bytes; ``pids`` counts threads."""

    cpu_millis: int
    memory_bytes: int
    pids: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Made:
    """A box that is up. ``init_start`` is init's start time in clock ticks since the machine's boot: pid and start
    together name one process."""

    slot: str
    n: int
    init_pid: int
    init_start: int
    address: str
    image: str
    booted_at_ms: int


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot as found on this host. ``state``: disk (never booted, or stopped on purpose), up, down (init ended by
    itself). ``box`` is the devbox that owns it, None for a warm box or one whose naming was cut short."""

    slot: str
    n: int
    box: str | None
    warm: bool
    state: str
    image: str
    made: Made | None


@dataclass(slots=True)
class KeeperFds:
    """Descriptors a keeper needs, opened by root. All close-on-exec; :meth:`close` closes what is open."""

    keeper_cgroups: list[int]  # cgroup.procs of the keeper's own cgroup, one per hierarchy, write-only
    box_cgroups: list[int]  # cgroup.procs of the box, same order, write-only
    init: int  # pidfd of the box's init
    seccomp: int  # compiled filter, read-only
    output: int  # the output folder, a directory descriptor; owned by the keeper's uid
    journal: int  # <output>/.journal, read-write, append
    listener: int  # SEQPACKET socket bound to keeper_socket(slot), not listening yet
    oom: int  # memory.oom_control (v1) or memory.events (v2), read-only; both have an `oom_kill N` line
    pids_events: int  # pids.events, read-only: `max N` rises when the limit was hit
    freezer: int  # freezer.state (v1: THAWED/FROZEN) or cgroup.freeze (v2: 0/1), read-write
    uid: int  # the keeper's uid and gid


def new_slot(cfg: HostConfig, image: str, disk_bytes: int, box: str | None = None) -> Slot:
    """Take a free box number and write its record; with ``box``, also name it (a devbox that has a slot already gets
    that one again). Raises Refused: no_slot, unknown_image."""
    raise NotImplementedError


def mark_warm(cfg: HostConfig, slot: str) -> None:
    """Offer a box that is up to :func:`claim_warm`."""
    raise NotImplementedError


def claim_warm(cfg: HostConfig, slot: str, box: str) -> bool:
    """Give the warm ``slot`` to ``box`` by one atomic rename. False when somebody else has it or it is not warm; a box
    that has a slot already keeps it (look with :func:`slot_of` first)."""
    raise NotImplementedError


def slot_of(cfg: HostConfig, box: str) -> Slot | None:
    """The slot a devbox owns on this host."""
    raise NotImplementedError


def list_slots(cfg: HostConfig) -> list[SlotState]:
    """Every slot with a record, what it is and whose."""
    raise NotImplementedError


def make_disk(cfg: HostConfig, slot: str, n: int, image: str, disk_bytes: int) -> None:
    """Clone the image for the slot, under a limit. Nothing happens if the disk exists. Raises Refused: unknown_image,
    no_space."""
    raise NotImplementedError


def make_box(cfg: HostConfig, slot: str, n: int, limits: Limits, hostname: str) -> Made:
    """Bring the box up on its disk. A box that is up already gets ``limits`` and is returned. Raises Refused:
    not_ready (it has no disk), internal."""
    raise NotImplementedError


def set_limits(cfg: HostConfig, slot: str, limits: Limits) -> None:
    """Write new limits to a box, up or not. Memory that is in use already is never taken away: then Refused busy."""
    raise NotImplementedError


def stop_box(cfg: HostConfig, slot: str, n: int) -> None:
    """End everything that runs in the box and its keeper's cgroup; the disk, outputs and name stay."""
    raise NotImplementedError


def destroy_box(cfg: HostConfig, slot: str, n: int, *, keep_disk: bool = False, box: str | None = None) -> None:
    """Leave nothing of the slot: processes, mounts, network, cgroups, disk, outputs, socket, record, name. Works on any
    half state and on slots that do not exist. ``keep_disk`` moves the disk to boxes-kept/. ``box`` saves a search."""
    raise NotImplementedError


def find_made(cfg: HostConfig, slot: str) -> Made | None:
    """The box as it was made, if its init is alive."""
    raise NotImplementedError


def oom_kills(cfg: HostConfig, slot: str) -> int:
    """How many processes the kernel has killed in the box for want of memory."""
    raise NotImplementedError


def open_keeper_fds(cfg: HostConfig, slot: str, n: int) -> KeeperFds:
    """Open everything the box's keeper needs. Raises Refused not_ready when the box is not up."""
    raise NotImplementedError


def thaw_all(cfg: HostConfig) -> None:
    """Thaw every box of the install: nothing stays frozen because its freezer died."""
    raise NotImplementedError


def drop_kept_disks(cfg: HostConfig, older_than_seconds: float) -> int:
    """Delete disks that were kept at their box's destruction longer ago than that; returns how many."""
    raise NotImplementedError
