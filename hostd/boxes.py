"""Boxes: made, limited and destroyed.

In charge of: the order of steps that turn a slot into a running box and back into nothing. Every function may run
twice, and may be killed anywhere: :func:`destroy_box` cleans whatever half state it finds, :func:`make_box` clears a
half-made box before it makes one. Not in charge of: fences and who may ask (`verbs`), what runs inside (`keeper`),
whose a slot is (`slots`), how each part is done (`disks`, `network`, `cgroups`, `namespaces`, `bundles`).

Runs in the maker processes, as root, inside the install's private mount namespace (:func:`hostd.namespaces.enter`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from hostd import asleep, bundles, cgroups, disks, keeper_spec, namespaces, network, slots, syscalls
from hostd.config import HostConfig, slot_number, write_file
from hostd.memory import Memory
from hostd.messages import Refused
from hostd.slots import Slot as Slot
from hostd.slots import claim_warm as claim_warm
from hostd.slots import mark_warm as mark_warm
from hostd.slots import new_slot as new_slot
from hostd.slots import slot_of as slot_of

_INIT_SECONDS = 10.0
_KEEPER_PIDS = 128


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
    together name one process. ``phases``: milliseconds per step of its making."""

    slot: str
    n: int
    init_pid: int
    init_start: int
    address: str
    booted_at_ms: int
    boot_id: str
    phases: dict[str, float] = field(default_factory=dict)


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


class _Phases:
    """A stopwatch with named laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round((now - self._last) * 1000, 2)
        self._last = now


def list_slots(cfg: HostConfig) -> list[SlotState]:
    """Every slot with a record: what it is, and whose."""
    owners, warm = slots.owners(cfg), slots.warm(cfg)
    found = []
    for slot in slots.recorded(cfg):
        record = slots.read(cfg, slot)
        if record is None:  # went away since it was listed
            continue
        made, alive = _read_made(cfg, slot)
        state = "up" if alive else "down" if made else "disk"
        made = made if alive else None
        found.append(SlotState(slot, record.n, owners.get(slot), slot in warm, state, record.image, made))
    return found


def make_disk(cfg: HostConfig, slot: str, n: int, image: str, disk_bytes: int, source: str | None = None) -> None:
    """Clone the image, or the subvolume ``source``, for the slot, under a limit. A disk that is there gets the limit.
    Raises Refused: unknown_image, unknown_id, no_space."""
    _check(slot, n)
    with _lock(cfg, slot):
        disks.make_disk(cfg, slot, image, disk_bytes, source)
        slots.resize(cfg, slot, disk_bytes)


def make_box(cfg: HostConfig, slot: str, n: int, limits: Limits, hostname: str) -> Made:
    """Bring the box up on its disk. A box that is up already gets ``limits`` and is returned as it is.

    Raises Refused: not_ready (it has no disk), internal.
    """
    _check(slot, n)
    with _lock(cfg, slot):
        made = find_made(cfg, slot)
        if made is not None:
            _write_limits(cfg, slot, limits)
            return made
        if not disks.has_disk(cfg, slot):
            raise Refused("not_ready", f"slot {slot} has no disk")
        if os.path.exists(cfg.bundle(slot)):
            _end(cfg, slot)
        try:
            return _make(cfg, slot, n, limits, hostname)
        except BaseException:
            # What cannot be cleaned now is found again by the next try, or by destroy_box.
            with contextlib.suppress(Exception):
                _end(cfg, slot)
            raise


def _make(cfg: HostConfig, slot: str, n: int, limits: Limits, hostname: str) -> Made:
    driver = cgroups.detect()
    folder = cfg.bundle(slot)
    phases = _Phases()
    with open(cfg.seccomp_filter, "rb") as file:
        seccomp_filter = file.read()
    bundles.prepare(cfg, slot, network.resolvers(cfg))
    for path in (cfg.box_cgroup(slot), cfg.keeper_cgroup(slot)):
        driver.make(path)
    _write_limits(cfg, slot, limits)
    phases.lap("cgroups")
    with contextlib.ExitStack() as opened:
        user = namespaces.user_namespace(cfg.uid_base(n), cfg.keeper_uid(n))
        opened.callback(os.close, user)
        phases.lap("user_namespace")
        syscalls.mount_idmapped(cfg.disk(slot), f"{folder}/rootfs", user)
        phases.lap("mount")
        net = network.wire(cfg, n)
        opened.callback(os.close, net)
        phases.lap("network")
        config = bundles.oci_config(
            cfg,
            slot,
            n,
            hostname=hostname,
            memory_bytes=limits.memory_bytes,
            user_namespace=f"/proc/{os.getpid()}/fd/{user}",
            network_namespace=f"/proc/{os.getpid()}/fd/{net}",
            seccomp_filter=seccomp_filter,
        )
        bundles.write_config(cfg, slot, config)
        phases.lap("config")
        pid = bundles.run_crun(cfg, slot, driver.procs(cfg.box_cgroup(slot)))
        phases.lap("crun")
    syscalls.unmount_all(f"{folder}/rootfs")  # the box has its own copy; ours would only have to be cleaned up
    start = bundles.start_time(pid)
    if start is None:
        raise Refused("internal", f"the init of {slot} ended at once")
    phases.lap("unmount")
    made = Made(slot, n, pid, start, cfg.address(n), bundles.now_ms(), bundles.boot_id(), phases.laps)
    write_file(f"{folder}/made.json", json.dumps(dataclasses.asdict(made)).encode(), mode=0o600)
    return made


def set_limits(cfg: HostConfig, slot: str, limits: Limits, hostname: str | None = None) -> None:
    """Write new limits to a box, up or not; to one that is up its host name, too, when given.

    Raises Refused: busy, when more memory is in use than would be allowed; unknown_box, when the slot has no disk."""
    with _lock(cfg, slot):
        if not disks.has_disk(cfg, slot):
            raise Refused("unknown_box", f"slot {slot} has no disk")
        slots.resize(cfg, slot, limits.disk_bytes)
        if os.path.exists(cgroups.detect().procs(cfg.box_cgroup(slot))[0]):
            _write_limits(cfg, slot, limits)
        else:
            disks.limit_disk(cfg, slot, limits.disk_bytes)
        if hostname is not None:
            made, alive = _read_made(cfg, slot)
            if made is not None and alive:
                namespaces.set_hostname(made.init_pid, made.init_start, hostname)


def stop_box(cfg: HostConfig, slot: str, n: int) -> None:
    """End everything that runs in the box, and its keeper; disk, outputs and name stay. Repeatable."""
    _check(slot, n)
    with _lock(cfg, slot):
        _end(cfg, slot)


def destroy_box(cfg: HostConfig, slot: str, n: int, *, keep_disk: bool = False, box: str | None = None) -> None:
    """Leave nothing of the slot: processes, mounts, network, cgroups, disk, outputs, socket, record, name.

    Works on any half state and on slots that do not exist. ``keep_disk`` moves the disk to boxes-kept/. ``box``, when
    known, saves a search through the names. Raises Refused internal when something cannot be removed; try again.
    """
    _check(slot, n)
    with _lock(cfg, slot, last=True):
        _end(cfg, slot)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(cfg.keeper_socket(slot))
        if keep_disk:
            disks.keep_disk(cfg, slot)
        else:
            disks.delete_disk(cfg, slot)
        if os.path.isdir(cfg.output(slot)):
            shutil.rmtree(cfg.output(slot))
        # Last: until here the slot is listed, and whoever finds it begins again.
        slots.forget(cfg, slot, box)


def suspend_box(cfg: HostConfig, slot: str, n: int, box: str) -> None:
    """Leave nothing of the slot but its disk, which lies under the devbox's id afterwards (:mod:`hostd.asleep`).

    Repeatable; works on any half state. Raises Refused internal when something cannot be removed; OSError.
    """
    _check(slot, n)
    with _lock(cfg, slot, last=True):
        _end(cfg, slot)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(cfg.keeper_socket(slot))
        asleep.lay_down(cfg, slot, box)
        if os.path.isdir(cfg.output(slot)):
            shutil.rmtree(cfg.output(slot))
        slots.forget(cfg, slot, box)


def _end(cfg: HostConfig, slot: str) -> None:
    """No process, mount, cgroup or run-time file of the slot afterwards."""
    driver = cgroups.detect()
    box, keeper = cfg.box_cgroup(slot), cfg.keeper_cgroup(slot)
    try:
        # Commands are the keeper's children: init could not end before it reaps them or dies.
        driver.kill(keeper)
        made, alive = _read_made(cfg, slot)
        if made is not None and alive:
            _kill_init(driver, box, made)
        # crun, and children of the keeper on their way in, are in the cgroup but not below init.
        driver.kill(box)
        driver.remove(box)
        driver.remove(keeper)
    except cgroups.Stuck as stuck:
        raise Refused("internal", str(stuck)) from None
    bundles.remove(cfg, slot)


def _kill_init(driver: cgroups.Hierarchies, box: str, made: Made) -> None:
    """End the box's whole process namespace by its init's end."""
    with contextlib.suppress(OSError):
        driver.thaw(box)  # a frozen process takes no signal
    try:
        init = os.pidfd_open(made.init_pid)
    except ProcessLookupError:
        return
    try:
        # The pid may have passed to another process between our look and the open.
        if bundles.start_time(made.init_pid) != made.init_start:
            return
        signal.pidfd_send_signal(init, signal.SIGKILL)
        if not select.select([init], [], [], _INIT_SECONDS)[0]:
            raise Refused("internal", f"init {made.init_pid} is alive {_INIT_SECONDS:g} s after SIGKILL")
    except ProcessLookupError:
        pass
    finally:
        os.close(init)


def _write_limits(cfg: HostConfig, slot: str, limits: Limits) -> None:
    driver = cgroups.detect()
    try:
        driver.limit(
            cfg.box_cgroup(slot), cpu_millis=limits.cpu_millis, memory_bytes=limits.memory_bytes, pids=limits.pids
        )
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refused("busy", "the box uses more memory than the new limit allows") from None
        raise
    driver.limit(
        cfg.keeper_cgroup(slot),
        cpu_millis=cfg.keeper_cpu_millis,
        memory_bytes=cfg.keeper_memory_bytes,
        pids=_KEEPER_PIDS,
    )
    disks.limit_disk(cfg, slot, limits.disk_bytes)


def find_made(cfg: HostConfig, slot: str) -> Made | None:
    """The box as it was made, if its init is alive."""
    made, alive = _read_made(cfg, slot)
    return made if alive else None


def _read_made(cfg: HostConfig, slot: str) -> tuple[Made | None, bool]:
    """What was written when the box had come up, and whether its init still lives."""
    try:
        with open(f"{cfg.bundle(slot)}/made.json", "rb") as file:
            made = Made(**json.loads(file.read()))
    except (FileNotFoundError, NotADirectoryError):
        return None, False
    alive = bundles.start_time(made.init_pid) == made.init_start and made.boot_id == bundles.boot_id()
    return made, alive


def oom_kills(cfg: HostConfig, slot: str) -> int:
    """How many processes the kernel has killed in the box for want of memory."""
    return cgroups.detect().oom_kills(cfg.box_cgroup(slot))


def memory_figures(cfg: HostConfig, slot: str) -> dict[str, int]:
    """Kills, limit, usage and peak of the box's memory, those that the kernel still tells."""
    folder = os.path.dirname(cgroups.detect().oom_file(cfg.box_cgroup(slot)))
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        return {"kills": oom_kills(cfg, slot), **Memory(-1, descriptor).figures()}
    finally:
        os.close(descriptor)


def open_keeper_fds(cfg: HostConfig, slot: str, n: int) -> list[tuple[str, int]]:
    """What the box's keeper needs, opened by root: (role, descriptor), roles as in `keeper_spec`, all close-on-exec and
    the caller's to close. Its socket is not among them. Raises Refused not_ready when the box is not up."""
    _check(slot, n)
    made = find_made(cfg, slot)
    if made is None:
        raise Refused("not_ready", f"slot {slot} is not up")
    driver = cgroups.detect()
    opened: list[tuple[str, int]] = []
    try:
        for file in driver.procs(cfg.keeper_cgroup(slot)):
            opened.append((keeper_spec.KEEPER_CGROUP, os.open(file, os.O_WRONLY | os.O_CLOEXEC)))
        for file in driver.procs(cfg.box_cgroup(slot)):
            opened.append((keeper_spec.BOX_CGROUP, os.open(file, os.O_WRONLY | os.O_CLOEXEC)))
        opened.append((keeper_spec.INIT, os.pidfd_open(made.init_pid)))
        if bundles.start_time(made.init_pid) != made.init_start:
            raise Refused("not_ready", f"the init of {slot} has just ended")
        opened.append((keeper_spec.SECCOMP, os.open(cfg.seccomp_filter, os.O_RDONLY | os.O_CLOEXEC)))
        opened.append((keeper_spec.OUT, _open_output(cfg, slot, n)))
        oom = driver.oom_file(cfg.box_cgroup(slot))
        opened.append((keeper_spec.OOM, os.open(oom, os.O_RDONLY | os.O_CLOEXEC)))
        folder = os.open(os.path.dirname(oom), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.append((keeper_spec.MEMORY, folder))
    except BaseException as error:
        for _, descriptor in opened:
            os.close(descriptor)
        if isinstance(error, (FileNotFoundError, ProcessLookupError)):
            raise Refused("not_ready", f"slot {slot} is going down: {error}") from None
        raise
    return opened


def _open_output(cfg: HostConfig, slot: str, n: int) -> int:
    path, uid = cfg.output(slot), cfg.keeper_uid(n)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    os.chown(path, uid, uid)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def thaw_all(cfg: HostConfig) -> None:
    """Thaw every box of the install: nothing stays frozen because its freezer died."""
    driver = cgroups.detect()
    for name in driver.children(cfg.cgroup):
        if name.startswith("b-"):
            with contextlib.suppress(FileNotFoundError):
                driver.thaw(f"{cfg.cgroup}/{name}")


def drop_kept_disks(cfg: HostConfig, older_than_seconds: float) -> int:
    """Delete disks that were kept at their box's destruction longer ago than that; returns how many. Also removes the
    quota groups that disks deleted earlier have left."""
    dropped = disks.drop_kept(cfg, older_than_seconds)
    disks.drop_idle_groups(cfg)
    return dropped


def locked(cfg: HostConfig, slot: str) -> contextlib.AbstractContextManager[None]:
    """Nobody makes, stops or destroys the box while it is held."""
    return _lock(cfg, slot)


def _check(slot: str, n: int) -> None:
    if slot_number(slot) != n:
        raise ValueError(f"slot {slot} is not box number {n}")


@contextlib.contextmanager
def _lock(cfg: HostConfig, slot: str, *, last: bool = False) -> Iterator[None]:
    """One maker at a time per slot. The kernel drops it with its holder. ``last`` removes the lock file as well."""
    slot_number(slot)
    folder = f"{cfg.run}/locks"
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = f"{folder}/{slot}"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held it before may have removed the file: then this is a lock on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                break
        os.close(lock)
    try:
        yield
        if last:
            os.unlink(path)
    finally:
        os.close(lock)
