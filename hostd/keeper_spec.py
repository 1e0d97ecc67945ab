"""What hostd and a keeper agree on: the description of a keeper, the zygote's client, the table of messages.

In charge of: `KeeperSpec`, the roles of the descriptors a keeper is born with, and the blocking client functions that
hostd uses to start, restart, adopt and forget keepers.
Not in charge of: opening those descriptors (boxes.py), routing connections to keepers (keepers.py), the keeper itself.

Everything here runs in hostd; the zygote and its children never import this module.

Life of a keeper
----------------
    conn = start_zygote(config)                        connects to the living zygote, or starts one
    sock = listening_socket(config.run, slot)          bound, root's, not listening yet: the keeper listens
    pid, start = start_keeper(conn, spec, [*open_keeper_fds(cfg, slot), (LISTEN, sock.fileno())])
    link = connect_keeper(config.run, slot, pid)       SEQPACKET; checked by SO_PEERCRED; messages below
    ... the keeper dies: `link` reads b"" ...
    pid, start = restart_keeper(conn, slot)            the zygote forks a successor that has everything; connect again
    ... the box goes ...
    forget(conn, slot)                                 kills the keeper, drops what is parked
    ... the zygote dies: `conn` reads b"", keepers live on ...
    conn = start_zygote(config); for each living keeper:
        adopt_keeper(conn, spec, open_keeper_fds(cfg, slot), pid, start, link)     it parks everything again

Messages, hostd -> keeper (each one SEQPACKET packet, JSON, see packets.py)
---------------------------------------------------------------------------
    {"box": "dbx_…"}                            names the box (once; kept in the journal). Without a name every spawn is
                                                answered `not_ready`. May also be given in the spec.
    {"connection": {request line}, "rest": b64} + 1 descriptor: a client's stream socket, whose first line is the
                                                request and after it `rest` has been read already (absent = nothing).
                                                From then on the connection belongs to the keeper.
    {"ack": [execution id | "box", …]}          the control plane has committed these exits.
    {"zygote": true} + 1 descriptor             sent by `adopt_keeper`: park with this zygote from now on.

Messages, keeper -> hostd
-------------------------
    {"event": "hello", "slot", "box": null | "dbx_…", "pid", "running": n, "exited": n}    first on every connection
    {"event": "exit", …}                    as in the wire contract; the unacknowledged ones again on every connection
    {"event": "box_exit", "box", "exit": -1, "oom": bool, "at_ms"}    PID 1 of the box is gone; until acked as "box"
    {"event": "spawner", "state": "up" | "down", "detail": …}         for the log only, never repeated

Messages, hostd -> zygote: {"op": "start" | "restart" | "adopt" | "forget" | "report", …}; one reply each:
    {"ok": true, "pid", "start", …} or {"error": {"code", "message"}}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Protocol

from hostd import packets

KEEPER_CGROUP = "keeper_cgroup"
"""A cgroup.procs file of the keeper's own cgroup, opened O_WRONLY by root; as many as there are v1 hierarchies."""
BOX_CGROUP = "box_cgroup"
"""A cgroup.procs file of the box's cgroup, opened O_WRONLY by root; as many as there are v1 hierarchies."""
INIT = "init"
"""pidfd of the box's PID 1. Exactly one."""
SECCOMP = "seccomp"
"""The compiled filter (`<crun root>/<slot>/seccomp.bpf`, an array of struct sock_filter), O_RDONLY. At most one."""
OUT = "out"
"""The directory of outputs and journal, O_RDONLY|O_DIRECTORY, owned by the keeper's uid, 0700. Exactly one."""
OOM = "oom"
"""memory.oom_control (v1) or memory.events (v2) of the box, O_RDONLY. At most one."""
MEMORY = "memory"
"""The folder of the box's memory cgroup, O_RDONLY|O_DIRECTORY. At most one."""
LISTEN = "listen"
"""The socket from `listening_socket`. Exactly one at `start_keeper`; none at `adopt_keeper` (the keeper has it)."""

ROLES = (KEEPER_CGROUP, BOX_CGROUP, INIT, SECCOMP, OUT, OOM, MEMORY, LISTEN)

CAPABILITIES = 0xA80425FB
"""Bounding set of what is started in a box, as a bit mask: the 14 capabilities of Docker's default set."""

TIMEOUT_S = 10.0
"""Bound on one exchange with the zygote."""


class Config(Protocol):
    """The part of HostConfig used here."""

    @property
    def run(self) -> str:
        """Directory of sockets, root's, 0700 or 0711; the zygote listens on `<run>/zygote.sock`."""

    @property
    def root(self) -> str:
        """Directory of state; the zygote's standard error goes to `<root>/zygote.log`."""


class ZygoteError(Exception):
    """The zygote refused: `code` is unknown_slot, exists, bad_request, busy or internal."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeeperSpec:
    """What a keeper must know besides its descriptors. Sent once; the zygote keeps it for successors."""

    slot: str
    """Name of the box on this host."""
    uid: int
    """Host uid (and gid) of the keeper: the owner of the box's user namespace, used by nothing else."""
    uid_base: int
    """Host uid of the box's root; the box has 65,536 ids from here."""
    init_pid: int
    """Host pid of the box's PID 1."""
    box: str | None = None
    """Devbox id, or None for a warm box that gets its name later."""
    capabilities: int = CAPABILITIES
    """Bounding set of commands: must be what the box's own PID 1 has."""
    stream_cap_bytes: int = 256 << 20
    """Bytes kept of one stream of one command; beyond it the middle is dropped."""
    byte_rate: int = 64 << 20
    """Bytes a second that all commands of the box may write, sustained; the pipes are left full beyond it."""
    byte_burst: int = 256 << 20
    """Bytes they may write at once before the rate holds them."""
    out_budget_bytes: int = 4 << 30
    """Bytes of acknowledged outputs kept on the host before the oldest are removed."""


def start_zygote(config: Config) -> socket.socket:
    """Return a connection to the host's zygote, starting it if none listens.

    The zygote outlives hostd: it is a session of its own, in PID 1's mount namespace where allowed, and nobody's child.
    Raises OSError (also TimeoutError) if it does not come up. One connection is enough for a hostd; it is blocking,
    with a timeout of TIMEOUT_S.
    """
    path = f"{config.run}/zygote.sock"
    with contextlib.suppress(FileNotFoundError, ConnectionError):
        conn = _connect(path)
        try:
            zygote_pid(conn)  # a dying one still takes connections
            return conn
        except BaseException:
            conn.close()
            raise
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(16)
        _exec_zygote(listener.fileno(), f"{config.root}/zygote.log")
        return _connect(path)


def start_keeper(conn: socket.socket, spec: KeeperSpec, fds: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """Start the keeper of a new box; return its pid and start time (clock ticks since boot, field 22 of stat).

    `fds` are (role, descriptor) in any order; the caller still owns and closes its own copies. Raises ZygoteError
    `exists` when the slot has a keeper.
    """
    names = [role for role, _ in fds]
    for role in names:
        if role not in ROLES:
            raise ValueError(f"no descriptor role {role!r}")
    reply = _ask(conn, {"op": "start", "spec": dataclasses.asdict(spec), "roles": names}, [fd for _, fd in fds])
    return int(reply["pid"]), int(reply["start"])


def restart_keeper(conn: socket.socket, slot: str) -> tuple[int, int]:
    """Return (pid, start) of the slot's keeper, after forking a successor if it is dead. Idempotent.

    The successor is forked once the dead keeper's spawner and its unannounced children are gone: milliseconds, or up
    to 5 s for a frozen box (then ZygoteError `busy`). Raises ZygoteError `unknown_slot`.
    """
    reply = _ask(conn, {"op": "restart", "slot": slot})
    return int(reply["pid"]), int(reply["start"])


def adopt_keeper(
    conn: socket.socket, spec: KeeperSpec, fds: Sequence[tuple[str, int]], pid: int, start: int, link: socket.socket
) -> None:
    """Introduce a living keeper to a zygote started after its own died.

    `fds` as for `start_keeper` without LISTEN; `link` is the connection to the keeper, over which it is told. Returns
    when both have been told; the keeper parks its descriptors in its own time. Raises ZygoteError, OSError.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        names = [role for role, _ in fds]
        message = {"op": "adopt", "spec": dataclasses.asdict(spec), "roles": names, "pid": pid, "start": start}
        _ask(conn, message, [*(fd for _, fd in fds), ours.fileno()])
        packets.send(link, {"zygote": True}, [theirs.fileno()])


def forget(conn: socket.socket, slot: str) -> None:
    """Kill the slot's keeper and drop all that is parked for it. An unknown slot is no error."""
    _ask(conn, {"op": "forget", "slot": slot})


def report(conn: socket.socket) -> dict[str, dict[str, Any]]:
    """Return {slot: {"pid", "start", "parked": n, "alive": bool}} as the zygote knows it."""
    slots = _ask(conn, {"op": "report"})["slots"]
    return dict(slots)


def zygote_pid(conn: socket.socket) -> int:
    """Return the zygote's pid."""
    return int(_ask(conn, {"op": "report"})["pid"])


def listening_socket(run: str, slot: str) -> socket.socket:
    """Return a socket bound to `<run>/k/<slot>.sock` (0600, root's), replacing what is there; it does not listen."""
    path = keeper_path(run, slot)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(path)
    os.chmod(path, 0o600)
    return sock


def keeper_path(run: str, slot: str) -> str:
    """Return the path of the slot's keeper socket."""
    return f"{run}/k/{slot}.sock"


def connect_keeper(run: str, slot: str, pid: int, timeout_s: float = 5.0) -> socket.socket:
    """Connect to the slot's keeper; return a blocking SEQPACKET socket whose peer is `pid`.

    The peer's credentials are stamped when a keeper calls listen, some ms after its birth, so a wrong or refused peer
    is tried again until `timeout_s`; then ConnectionError.
    """
    deadline = time.monotonic() + timeout_s
    reason = "nothing listens"
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(timeout_s)
            sock.connect(keeper_path(run, slot))
            peer = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            if peer == pid:
                sock.settimeout(None)
                return sock
            reason = f"process {peer} listens"
        except (ConnectionRefusedError, FileNotFoundError, BlockingIOError) as error:
            reason = str(error)
        except BaseException:
            sock.close()
            raise
        sock.close()
        if time.monotonic() > deadline:
            raise ConnectionError(f"keeper of {slot}: expected process {pid} within {timeout_s:g} s, but {reason}")
        time.sleep(0.001)


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(TIMEOUT_S)
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise


def _ask(conn: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
    packets.send(conn, message, descriptors)
    reply, extra = packets.receive(conn)
    packets.close_all(extra)
    if reply is None:
        raise ConnectionResetError("the zygote is gone")
    if "error" in reply:
        raise ZygoteError(str(reply["error"].get("code")), str(reply["error"].get("message")))
    return reply


def _exec_zygote(listen_fd: int, log_path: str) -> None:
    """Fork twice and exec the interpreter under the name `zygote`, in the mount namespace of PID 1."""
    source = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # a directory, or the bundle itself
    code = f"import sys;sys.path.insert(0,{source!r});from hostd.zygote import main;main({listen_fd})"
    interpreter = os.path.realpath("/usr/bin/python3")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        _join_machine_mounts()
        os.chdir("/")
        null = os.open("/dev/null", os.O_RDWR)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.set_inheritable(listen_fd, True)
        os.execve(interpreter, ["zygote", "-I", "-S", "-OO", "-c", code], {"LANG": "C.UTF-8"})
    except BaseException as error:
        os.write(2, f"zygote: {error!r}\n".encode())
    finally:
        os._exit(70)


def _join_machine_mounts() -> None:
    """Leave hostd's private mount namespace, so that it does not last as long as the zygote.

    Where PID 1 has more rights than we (a container's root has not all of its machine's) its namespaces are closed to
    us, and the zygote stays where it is: it needs no mount.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    try:
        descriptor = os.open("/proc/1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        if libc.setns(descriptor, 0x00020000) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "/proc/1/ns/mnt")
    finally:
        os.close(descriptor)
