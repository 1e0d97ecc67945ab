"""Raw process primitives for the zygote, the keepers and the spawners.

In charge of: the system calls Python does not offer (clone, setns, seccomp, capset, prctl, PTMX = os.makedev(5, 2)
PIDFD_GET_INFO, fallocate),
reading a process's facts from /proc, and a process's visible name.
Not in charge of: deciding anything. Imports ctypes and nothing else of size: every keeper carries what is imported
here.

All of these processes have one thread; `PyDLL` keeps the GIL, so a child made by the raw clone may go on in Python.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import stat
import struct
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterable
else:
    import _signal  # the module around it imports `enum` and with it half a megabyte

signals = _signal
"""The signal numbers and calls of the module `signal`."""

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_SYSCALLS: dict[str, dict[str, int]] = {
    "x86_64": {"clone": 56, "capset": 126, "seccomp": 317, "setns": 308, "rt_sigaction": 13},
    "aarch64": {"clone": 220, "capset": 91, "seccomp": 277, "setns": 268, "rt_sigaction": 134},
}
_NR = _SYSCALLS[os.uname().machine]

SIGCHLD = 17
CLONE_PARENT = 0x00008000
CLONE_PIDFD = 0x00001000
NETWORK_NAMESPACE = 0x40000000
BOX_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x02000000
"""user, mount, pid, ipc, uts, cgroup: all that a box owns. Its network is the machine's: keepers are born in it."""

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
LAST_CAPABILITY = 63
P_PIDFD = 3
PTMX = os.makedev(5, 2)
FIONREAD = 0x541B

TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441

PIDFD_GET_INFO = 0xC0_40_FF_0B  # _IOWR(0xFF, 11, struct pidfd_info), the first version's 64 bytes
PIDFD_INFO_EXIT = 1 << 3


def _raise(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def _syscall(name: str, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(_NR[name]), *converted)
    if result < 0:
        _raise(name)
    return result


def prctl(option: int, argument: int = 0) -> None:
    """Call prctl(option, argument, 0, 0, 0)."""
    if _libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) < 0:
        _raise("prctl")


def default_signals() -> None:
    """Give every signal its default action, and block none: what is ignored survives an exec.

    By the system call, since libc keeps 32 and 33 to itself, and a program far above us may have ignored them.
    """
    default = ctypes.create_string_buffer(32)  # struct sigaction of the kernel, all zero: SIG_DFL
    for number in range(1, 65):
        try:
            _syscall("rt_sigaction", number, default, None, 8)
        except OSError:
            pass  # KILL and STOP
    signals.pthread_sigmask(signals.SIG_SETMASK, [])


def set_name(name: str) -> None:
    """Set what `ps` and /proc/self/comm show (15 bytes)."""
    _libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def command_line_area() -> tuple[int, int]:
    """Return (address, bytes) of this process's command line in its own memory, or (0, 0)."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rsplit(b")", 1)[1].split()
    start, end = int(fields[45]), int(fields[46])
    return (start, end - start) if 0 < end - start < 1 << 16 else (0, 0)


def set_command_line(area: tuple[int, int], text: str) -> None:
    """Overwrite what `ps -f` and `pkill -f` see; `area` is from before the process became undumpable."""
    address, size = area
    if address and size > len(text):
        ctypes.memset(address, 0, size)
        ctypes.memmove(address, text.encode(), len(text))


def setns(pidfd: int, namespaces: int) -> None:
    """Enter the namespaces of a process."""
    _syscall("setns", pidfd, namespaces)


def clone_sibling() -> int:
    """Fork a child of our own parent; return its pid here, 0 in the child.

    After a setns of the pid namespace the child is in the new one, the pid returned is of our own.
    """
    return _clone(CLONE_PARENT | SIGCHLD, None)


_pidfd_cell = ctypes.create_string_buffer(4)


def clone_sibling_with_pidfd() -> tuple[int, int]:
    """Like `clone_sibling`, with the child's pidfd (close-on-exec): (pid, pidfd); (0, -1) in the child."""
    pid = _clone(CLONE_PARENT | CLONE_PIDFD | SIGCHLD, _pidfd_cell)
    return (pid, struct.unpack("i", _pidfd_cell.raw)[0]) if pid else (0, -1)


def clone_child_with_pidfd() -> tuple[int, int]:
    """Fork a child of our own, with its pidfd (close-on-exec): (pid, pidfd); (0, -1) in the child."""
    pid = _clone(CLONE_PIDFD | SIGCHLD, _pidfd_cell)
    return (pid, struct.unpack("i", _pidfd_cell.raw)[0]) if pid else (0, -1)


def _clone(flags: int, pidfd: ctypes.Array[ctypes.c_char] | None) -> int:
    # flags, stack, parent_tid (where the pidfd goes), child_tid, tls: the last two stand the other way round on arm,
    # and are not used.
    return _syscall("clone", flags, 0, pidfd, 0, 0)


def drop_bounding_set(keep: int) -> None:
    """Take all capabilities out of the bounding set but those of the mask `keep`; unknown numbers are skipped."""
    for number in range(LAST_CAPABILITY + 1):
        if not keep >> number & 1:
            try:
                prctl(PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno == errno.EINVAL:  # one past the kernel's last
                    return
                raise


def set_capabilities(permitted: int, effective: int) -> None:
    """Set our permitted and effective sets, as bit masks; the inheritable one becomes empty."""
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    words = (effective, permitted, 0)
    low = [word & 0xFFFFFFFF for word in words]
    high = [word >> 32 for word in words]
    _syscall("capset", header, ctypes.create_string_buffer(struct.pack("=6I", *low, *high)))


def install_filter(program: bytes) -> None:
    """Install a compiled seccomp filter without no_new_privs: needs CAP_SYS_ADMIN in our user namespace."""
    code = ctypes.create_string_buffer(program, len(program))
    prog = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))
    _syscall("seccomp", 1, 0, prog)


def punch_hole(descriptor: int, start: int, length: int) -> None:
    """Free the blocks of a range of a file; its size stays, it reads as zeros."""
    if _libc.fallocate(descriptor, 3, start, length) < 0:  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        _raise("fallocate")


def bytes_in_pipe(descriptor: int) -> int:
    """Return how many bytes lie in a pipe now."""
    cell = bytearray(4)
    fcntl.ioctl(descriptor, FIONREAD, cell)
    return int(struct.unpack("i", cell)[0])


def is_master(descriptor: int) -> bool:
    """Is this the master side of a pty?"""
    facts = os.fstat(descriptor)
    return stat.S_ISCHR(facts.st_mode) and facts.st_rdev == PTMX


def open_terminal(cols: int, rows: int) -> tuple[int, int]:
    """Make a pty of that size: (master, slave), close-on-exec, the master not blocking."""
    # Whatever the box's root has put in its place must not stop us; who is given the master looks at it.
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        return master, fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        os.close(master)
        raise


def change_directory(path: str, required: bool) -> None:
    """Go there; to / when it is not there and not required. Raises OSError."""
    try:
        os.chdir(path)
    except OSError:
        if required:
            raise
        os.chdir("/")  # a home that is not there must not keep anybody from making it


def execute(argv: list[str], environment: dict[str, str]) -> None:
    """Exec by the rules of execvpe; returns never, raises the most telling error."""
    if "/" in argv[0]:
        os.execve(argv[0], argv, environment)
    told: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for directory in environment.get("PATH", "").split(":"):
        try:
            os.execve(f"{directory or '.'}/{argv[0]}", argv, environment)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            told = error
    raise told


def start_time(pid: int) -> int | None:
    """Return a process's start in clock ticks since boot, None if there is none (a zombie counts as none)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def pid_of(pidfd: int) -> int:
    """Return the host's pid of a pidfd, by the kernel's word; -1 when it has been reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
        for line in file:
            if line.startswith(b"Pid:"):
                return int(line[4:])
    raise OSError(errno.EBADF, "not a pidfd")


def signal_group(group: int, signal: int) -> bool:
    """Signal a process group; False when there is none that we may reach."""
    try:
        os.killpg(group, signal)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def parent(pid: int) -> int | None:
    """Return a process's parent (0 when it is outside our pid namespace), None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rsplit(b")", 1)[1].split()[1])
    except OSError:
        return None


def exiting(pid: int) -> bool:
    """Is this process gone or on its way out? A pid namespace's init waits there until everybody in it is reaped."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rsplit(b")", 1)[1].split()[6]) & 0x4)  # PF_EXITING
    except OSError:
        return True


def children() -> list[int]:
    """Return our children's pids, zombies included."""
    pid = os.getpid()
    with open(f"/proc/self/task/{pid}/children", "rb") as file:
        return [int(word) for word in file.read().split()]


def real_uid(pid: int) -> int | None:
    """Return a process's real uid (of a zombie as well), None if there is no such process."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Uid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return None


def exit_of(pidfd: int) -> int | None:
    """Return the wait status of a process that somebody else has reaped; None if it is unknown.

    The kernel keeps it with the pidfd from 6.15 on, which is what saves the exit of a command whose parent was not
    one of ours any more.
    """
    cell = bytearray(64)
    struct.pack_into("=Q", cell, 0, PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, cell)
    except OSError:
        return None
    (mask,) = struct.unpack_from("=Q", cell, 0)
    return struct.unpack_from("=i", cell, 60)[0] if mask & PIDFD_INFO_EXIT else None


def kill_if_same(pid: int, start: int) -> None:
    """Kill a process that nobody can follow any more, if its pid is still it."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if start and start_time(pid) == start:
            kill(pidfd)
            signal_group(pid, signals.SIGKILL)  # what it led, as long as it is there
    finally:
        os.close(pidfd)


def kill(pidfd: int) -> None:
    """Kill a process, whether or not it is there."""
    try:
        signals.pidfd_send_signal(pidfd, signals.SIGKILL)
    except OSError:
        pass


def raise_descriptor_limit() -> None:
    """Allow ourselves as many descriptors as we may have; `command_limits` takes it back for what is started."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def command_limits() -> None:
    """Give ourselves the limits of a fresh login: 1,024 descriptors (select's own bound), no core files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = min(hard, 524288) if hard != resource.RLIM_INFINITY else 524288
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def pid_namespace(pid: int) -> str | None:
    """Return the name of a process's pid namespace, None if it is gone or hidden from us."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return None


def close_others(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 that is not in `keep`."""
    wanted = set(keep)
    for entry in os.listdir("/proc/self/fd"):
        descriptor = int(entry)
        if descriptor > 2 and descriptor not in wanted:
            try:
                os.close(descriptor)
            except OSError:
                pass  # the listing's own
