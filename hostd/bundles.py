"""A box's run-time folder and what crun is told: its OCI configuration.

In charge of: :func:`oci_config` (pure), the files bound into a box, crun's command line. Not in charge of: the order of
steps around it (`boxes`).
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import select
import shutil
import signal
import time
from typing import Any, Final

from hostd import slots, syscalls
from hostd.config import UIDS_PER_BOX, HostConfig
from hostd.messages import Refused
from hostd.seccomp import CAPABILITIES

CRUN: Final = "/usr/bin/crun"
INIT: Final = "/run/berth/init"  # inside a box
_CRUN_SECONDS: Final = 20.0
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

_TERMINALS: Final = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5")
MASKED: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/key-users", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/proc/interrupts"),
)
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def oci_config(
    cfg: HostConfig,
    slot: str,
    n: int,
    *,
    hostname: str,
    memory_bytes: int,
    user_namespace: str,
    network_namespace: str,
    seccomp_filter: bytes,
) -> dict[str, Any]:
    """The box's `config.json`. ``user_namespace`` and ``network_namespace`` are paths crun can open.

    The box's user namespace does not own its network namespace, so `/sys` cannot be a sysfs of the box's own, and crun
    would quietly bind the machine's, writable: it is a tmpfs with the processors' folder bound into it.
    """
    folder = cfg.bundle(slot)
    plain = ("nosuid", "noexec", "nodev")
    mapping = [{"containerID": 0, "hostID": cfg.uid_base(n), "size": UIDS_PER_BOX}]
    capabilities = list(CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "root": {"path": f"{folder}/rootfs", "readonly": False},
        "annotations": {"run.oci.seccomp_bpf_data": base64.b64encode(seccomp_filter).decode()},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            # Waits and reaps, and has no child whose end would end the box: `kill -9 -1` by the box's root included.
            "args": [INIT, "-P"],
            "cwd": "/",
            "env": [f"{name}={value}" for name, value in _ENVIRONMENT.items()],
            "noNewPrivileges": False,  # sudo must work; the user namespace is what holds
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
                "inheritable": [],
                "ambient": [],
            },
            "oomScoreAdj": 100,
        },
        "mounts": [
            _mount("/proc", "proc", "proc", *plain),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k"),
            _mount("/dev/pts", "devpts", "devpts", *_TERMINALS),
            _mount("/dev/shm", "tmpfs", "shm", *plain, "mode=1777", f"size={memory_bytes // 2}"),
            _mount("/dev/mqueue", "mqueue", "mqueue", *plain),
            _mount("/sys", "tmpfs", "tmpfs", *plain, "ro", "size=4k", "mode=755"),
            _mount("/sys/devices/system/cpu", "bind", "/sys/devices/system/cpu", "bind", "ro", *plain),
            _mount("/run", "tmpfs", "tmpfs", "nosuid", "nodev", "mode=755", "size=64m"),
            _mount("/run/lock", "tmpfs", "tmpfs", *plain, "mode=1777", "size=5m"),
            _mount(INIT, "bind", f"{cfg.root}/init", "bind", "ro", "nosuid", "nodev"),
            # The machine's word, not the image's; read-only, or the box could fill the machine's disk through them.
            _mount("/etc/resolv.conf", "bind", f"{folder}/resolv.conf", "bind", "ro", *plain),
            _mount("/etc/machine-id", "bind", f"{folder}/machine-id", "bind", "ro", *plain),
        ],
        "linux": {
            "uidMappings": mapping,
            "gidMappings": mapping,
            "namespaces": [
                {"type": "user", "path": user_namespace},
                {"type": "network", "path": network_namespace},
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")),
            ],
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
        },
    }


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def prepare(cfg: HostConfig, slot: str, resolvers: tuple[str, ...]) -> None:
    """Make the folder with everything but `config.json`. The folder must not exist. Raises OSError."""
    folder = cfg.bundle(slot)
    os.makedirs(f"{folder}/rootfs", mode=0o711)
    _put(f"{folder}/resolv.conf", "".join(f"nameserver {address}\n" for address in resolvers))
    _put(f"{folder}/machine-id", machine_id(cfg, slot) + "\n")


def machine_id(cfg: HostConfig, slot: str) -> str:
    """What the box in that slot reads in `/etc/machine-id`, before and after it was suspended."""
    record = slots.read(cfg, slot)
    if record is not None and record.machine_id:
        return record.machine_id
    return hashlib.sha256(f"{cfg.cluster}/{cfg.host}/{slot}".encode()).hexdigest()[:32]


def write_config(cfg: HostConfig, slot: str, config: dict[str, Any]) -> None:
    _put(f"{cfg.bundle(slot)}/config.json", json.dumps(config), 0o600)


def remove(cfg: HostConfig, slot: str) -> None:
    """Remove the folder and crun's own state of the box; nothing there is fine. Its processes must be gone."""
    folder = cfg.bundle(slot)
    if os.path.isdir(f"{folder}/rootfs"):
        syscalls.unmount_all(f"{folder}/rootfs")
        # Never into the disk, should an unmount have been missed: rmdir goes no deeper.
        os.rmdir(f"{folder}/rootfs")
    for path in (folder, f"{cfg.runtime_state}/{slot}"):
        shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            raise Refused("internal", f"{path} cannot be removed")


def run_crun(cfg: HostConfig, slot: str, join: list[str]) -> int:
    """Start the box and return its init's pid (of the machine). ``join``: cgroup.procs files.

    The child joins the cgroups before it becomes crun, so init is born inside them, and whoever empties them gets crun
    as well. It dies with us. Raises Refused internal with crun's words, or naming the time it took too long.
    """
    folder = cfg.bundle(slot)
    arguments = [CRUN, "--root", cfg.runtime_state, "--cgroup-manager=disabled", f"--log={folder}/crun.log"]
    arguments += ["run", "--detach", f"--pid-file={folder}/pid", f"--bundle={folder}", slot]
    opened = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in join]
    # Dead pipes for init to hold. Not the machine's /dev/null, which crun would give to the box's root; and no log,
    # through which a box could fill the machine's disk.
    nothing, ended = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    try:
        child = os.fork()
        if child == 0:
            _become_crun(arguments, opened, (nothing, ended, ended), parent)
    finally:
        for descriptor in (*opened, nothing, ended):
            os.close(descriptor)
    status = _wait(child)
    if status is None:
        raise Refused("internal", f"crun took more than {_CRUN_SECONDS:g} s to start {slot}")
    if status:
        raise Refused("internal", f"crun ended with {status}: {_words(folder)}")
    with open(f"{folder}/pid", encoding="ascii") as file:
        return int(file.read())


def _become_crun(arguments: list[str], join: list[int], streams: tuple[int, int, int], parent: int) -> None:
    """In the child; never returns."""
    try:
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(70)
        for descriptor in join:
            os.write(descriptor, b"0")
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and that would outlive exec
            signal.signal(ignored, signal.SIG_DFL)
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        os.execve(arguments[0], arguments, _ENVIRONMENT)
    finally:
        os._exit(71)


def _wait(child: int) -> int | None:
    """Exit status of a child, None (and the child dead) when it took too long."""
    pidfd = os.pidfd_open(child)
    try:
        if not select.select([pidfd], [], [], _CRUN_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _words(folder: str) -> str:
    try:
        with open(f"{folder}/crun.log", encoding="utf-8", errors="replace") as file:
            return file.read(2000).strip() or "it said nothing"
    except FileNotFoundError:
        return "it said nothing"


def _put(path: str, text: str, mode: int = 0o644) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def start_time(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None when there is none, or only its remains."""
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fields = os.read(file, 4096).rpartition(b")")[2].split()
    except ProcessLookupError:
        return None
    finally:
        os.close(file)
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@functools.cache
def boot_id() -> str:
    """Names this run of the machine."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def now_ms() -> int:
    return int(time.time() * 1000)
