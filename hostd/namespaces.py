"""Namespaces: the install's private mount namespace, and a user namespace for each box.

In charge of: making, pinning and entering the first; making the second owned by a keeper's uid. Not in charge of: what
is mounted for a box (`boxes`), network namespaces (`network`).

Every hostd of an install, and whoever cleans up after one, enters the same mount namespace, pinned at
`<run>/mounts/ns`: what a killed hostd left mounted is found and unmounted by the next. It differs from the machine's
own in two ways: mounts do not travel out of it, and on a hybrid machine the unified cgroup mount is gone (crun 1.8.1
refuses such machines otherwise).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator

from hostd import syscalls
from hostd.bundles import start_time
from hostd.config import UIDS_PER_BOX, HostConfig, installs_on_machine

_UNIFIED = "/sys/fs/cgroup/unified"
_INSIDE = "inside"
_NS_GET_NSTYPE = 0xB703


def enter(cfg: HostConfig) -> None:
    """Move this process (single-threaded) into the install's private mount namespace, making it if there is none.

    Called from the machine's own mount namespace, or from inside already. The pool must be mounted by then, since
    mounts made later in the machine's namespace do not appear inside. Raises OSError.
    """
    if is_inside(cfg):
        return
    with _lock(cfg):
        pin = _open_pin(cfg)
        if pin is None:
            _make(cfg)
            pin = _open_pin(cfg)
            if pin is None:
                raise OSError(2, "the mount namespace was not pinned", cfg.namespace_pin)
        try:
            syscalls.setns(pin, syscalls.CLONE_NEWNS)
        finally:
            os.close(pin)
    os.chdir("/")


def is_inside(cfg: HostConfig) -> bool:
    """Whether this process is in the install's private mount namespace."""
    return os.path.exists(f"{os.path.dirname(cfg.namespace_pin)}/{_INSIDE}")


def is_pinned(cfg: HostConfig) -> bool:
    """Whether the namespace exists, asked in the machine's own."""
    pin = _open_pin(cfg)
    if pin is not None:
        os.close(pin)
    return pin is not None


def unpin(cfg: HostConfig) -> None:
    """Let the namespace go with its last process; call it in the machine's own. None there is fine. Raises OSError."""
    if not os.path.isdir(cfg.run):
        return
    with _lock(cfg):
        folder = os.path.dirname(cfg.namespace_pin)
        syscalls.unmount_all(cfg.namespace_pin)
        syscalls.unmount_all(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(cfg.namespace_pin)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(folder)


def user_namespace(base: int, owner: int) -> int:
    """A user namespace that maps 0..65535 to ``base`` and on, owned by uid ``owner``: a descriptor.

    Its owner may enter it and signal what is in it without any capability on the machine. Raises OSError.
    """

    def become() -> None:
        os.setresgid(owner, owner, owner)
        os.setresuid(owner, owner, owner)
        syscalls.set_dumpable(True)  # a change of uid gives /proc/<pid> to root of the machine; take it back
        syscalls.unshare(syscalls.CLONE_NEWUSER)

    child, words = _child(become)
    try:
        if words:
            raise OSError(1, f"no user namespace: {words}")
        for name in ("uid_map", "gid_map"):
            file = os.open(f"/proc/{child}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(file, b"0 %d %d\n" % (base, UIDS_PER_BOX))
            finally:
                os.close(file)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _open_pin(cfg: HostConfig) -> int | None:
    try:
        pin = os.open(cfg.namespace_pin, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # after a restart of the machine it may be an ordinary file
        if fcntl.ioctl(pin, _NS_GET_NSTYPE) == syscalls.CLONE_NEWNS:
            return pin
    os.close(pin)
    return None


def _make(cfg: HostConfig) -> None:
    """In the machine's namespace: make the private one and bind it to the pin."""
    folder = os.path.dirname(cfg.namespace_pin)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # A namespace can be bound only below a mount that is not shared: one of its own.
    syscalls.unmount_all(folder)
    syscalls.mount(folder, folder, None, syscalls.MS_BIND)
    syscalls.mount(None, folder, None, syscalls.MS_PRIVATE)
    os.close(os.open(cfg.namespace_pin, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # The kernel binds a namespace only if its number is higher than the caller's own (so that none can hold itself),
    # and newer kernels number by processor: in a machine that is itself in a namespace, not every processor will do.
    for processor in os.sched_getaffinity(0):
        try:
            return _pin_made_on(processor, cfg, folder)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    raise OSError(errno.EINVAL, "the kernel lets no mount namespace be pinned here", cfg.namespace_pin)


def _pin_made_on(processor: int, cfg: HostConfig, folder: str) -> None:
    def become() -> None:
        os.sched_setaffinity(0, {processor})
        _furnish(cfg, folder)

    child, words = _child(become)
    try:
        if words:
            raise OSError(1, f"no mount namespace: {words}")
        syscalls.mount(f"/proc/{child}/ns/mnt", cfg.namespace_pin, None, syscalls.MS_BIND)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _furnish(cfg: HostConfig, folder: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    leave_installs(keep=cfg.install)
    if os.path.ismount(_UNIFIED):
        syscalls.unmount(_UNIFIED)
    # The pin cannot be seen from inside; this mark can.
    syscalls.mount("none", folder, "tmpfs", syscalls.MS_NOEXEC, "size=4k,mode=700")
    os.close(os.open(f"{folder}/{_INSIDE}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def leave_installs(keep: int | None = None) -> None:
    """Unmount in this mount namespace, which must be private, what installs of the machine have mounted, but for one's:
    a copy would keep their pools busy for as long as we live."""
    folders = [
        f"{folder}/"
        for install, root in installs_on_machine().items()
        if install != keep
        for folder in (root, f"/run/berth-{install}")
    ]
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        points = [line.split()[4] for line in file]
    for point in reversed(points):
        if point.startswith(tuple(folders)):
            with contextlib.suppress(OSError):
                syscalls.unmount(point)


def _child(action: Callable[[], None]) -> tuple[int, str]:
    """A child that did ``action`` and waits to be killed: its pid, and its error's text if it failed.

    It dies with us, and holds none of our descriptors: a lock among them would outlive a killed maker in it.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            os.closerange(3, write)
            os.closerange(write + 1, 1 << 20)
            action()
            syscalls.die_with_parent(signal.SIGKILL)  # only now: a change of uid would undo it
            if os.getppid() != parent:
                os._exit(1)
            os.write(write, b"1")
            while True:
                signal.pause()
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(write, f"0{error}".encode()[:500])
        finally:
            os._exit(1)
    os.close(write)
    answer = os.read(read, 500)
    os.close(read)
    return child, "" if answer == b"1" else answer[1:].decode(errors="replace") or "its process died"


@contextlib.contextmanager
def _lock(cfg: HostConfig) -> Iterator[None]:
    os.makedirs(cfg.run, mode=0o711, exist_ok=True)
    lock = os.open(f"{cfg.run}/mounts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def set_hostname(init_pid: int, init_start: int, hostname: str) -> None:
    """Give a box that is up another host name. This process keeps its own. Raises OSError; the box's end is none."""
    own = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(init_pid)
            try:
                if start_time(init_pid) != init_start:
                    return
                syscalls.setns(pidfd, syscalls.CLONE_NEWUTS)
            finally:
                os.close(pidfd)
            try:
                socket.sethostname(hostname)
            finally:
                syscalls.setns(own, syscalls.CLONE_NEWUTS)
    finally:
        os.close(own)
