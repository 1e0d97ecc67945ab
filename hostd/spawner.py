"""The spawner: the process in a box that starts its commands, as their user, as the keeper's children.

In charge of: getting into the box, giving up all it does not need, and for each request: pipes that belong to the user,
a child with the user's ids, groups, directory and a clean set of signals.
Not in charge of: anything that outlives a request. It may be killed at any time by the box's root; its keeper makes
another one.

How it is shielded from the box it lives in:
* its uid is 65533, so `kill -9 -1`, `pkill -u` and a stop of everything by the user do not reach it; only the child
  takes the user's ids;
* it is a fork of a process of the host and never execs, and is not dumpable: nobody in the box may trace it or read its
  memory, its descriptors or its executable, not even root;
* it has the box's bounding set and filter, and of its capabilities only those to give a child another user and to give
  a pipe away;
* it imports nothing once it is inside: the box's files are not its program.

It is started by the keeper's uid, which owns the box's user namespace, and so needs no right on the host.
"""

from __future__ import annotations

import _socket
import binascii
import errno
import fcntl
import os
import stat
import sys
import termios
import time

from hostd import files, packets, procs, relay, shell_files
from hostd.procs import signals
from hostd.requests import OUR_UID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NAME = "boxd"
"""What `ps` shows. No word in it that a `pkill -f` of somebody's own program would match."""
SOCKET = 3
STATUS, PROGRAM = 8, 9
"""The descriptors of a named shell: where it tells how a command ended, and where it reads what to do."""
KEPT_CAPABILITIES = 1 << 0 | 1 << 6 | 1 << 7  # CAP_CHOWN, CAP_SETGID, CAP_SETUID
ENTER_TRIES = 50
"""setns gives EPERM now and then while the box's init is still becoming it; a try every 2 ms."""
GROUP_FILE_BYTES = 256 << 10
MAX_GROUPS = 64
REQUEST_BYTES = 8 << 20
OOM_SCORE = b"100"
EXEC_FAILED_MESSAGE = "berth: cannot run {what}: {why}\n"


class Shell:
    """What a spawner needs to be born with. Every descriptor stays the keeper's own."""

    __slots__ = ("area", "capabilities", "cgroups", "filter", "init")

    def __init__(self, cgroups: list[int], init: int, program: bytes, capabilities: int, area: tuple[int, int]) -> None:
        self.cgroups, self.init, self.filter, self.capabilities = cgroups, init, program, capabilities
        self.area = area


def give_birth(shell: Shell) -> tuple[_socket.socket, int]:
    """Start a spawner; return the keeper's end of its socket and the pid of the process that brings it into the box.

    That process is a child of ours that says {"born": host pid of the spawner} and exits at once; the spawner says
    {"up": true} when it is ready. Neither is waited for.
    """
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    carrier = os.fork()
    if carrier == 0:
        try:
            _enter(shell)
            pid = procs.clone_sibling()
            if pid:
                packets.send(theirs, {"born": pid})
            else:
                _settle(theirs.detach(), shell)
                serve(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, SOCKET))
        except BaseException as error:
            _complain(error, theirs)
        finally:
            os._exit(0)
    theirs.close()
    return ours, carrier


def _complain(error: BaseException, sock: _socket.socket) -> None:
    try:
        if sock.fileno() < 0:
            sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, SOCKET)
        packets.send(sock, {"trouble": f"{type(error).__name__}: {error}"})
    except OSError:
        pass


def _enter(shell: Shell) -> None:
    """Join the box's cgroups and namespaces; the next child is in its pid namespace."""
    try:
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(OOM_SCORE)
    except OSError:
        pass  # it is not ours to write when we are not dumpable
    for descriptor in shell.cgroups:
        os.write(descriptor, b"0")  # opened by root, and the kernel goes by the opener's rights
    for attempt in range(ENTER_TRIES):
        try:
            procs.setns(shell.init, procs.BOX_NAMESPACES)
            return
        except PermissionError:
            if attempt == ENTER_TRIES - 1:
                raise
            time.sleep(0.002)


def _settle(descriptor: int, shell: Shell) -> None:
    """Give up everything that a spawner does not need. The order is forced: see each step."""
    sys.path.clear()
    sys.meta_path.clear()
    os.setsid()
    if descriptor != SOCKET:
        os.dup2(descriptor, SOCKET, inheritable=False)
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    procs.close_others([SOCKET])
    os.set_inheritable(SOCKET, False)
    procs.set_name(NAME)
    procs.set_command_line(shell.area, NAME)
    procs.command_limits()
    procs.drop_bounding_set(shell.capabilities)
    if shell.filter:
        procs.install_filter(
            shell.filter
        )  # while CAP_SYS_ADMIN is there: so no_new_privs is not needed, and sudo works
    os.setgroups([])
    os.setresgid(OUR_UID, OUR_UID, OUR_UID)
    os.setresuid(OUR_UID, OUR_UID, OUR_UID)
    # What a child of root's will need stays permitted; of it the spawner itself uses three.
    procs.set_capabilities(shell.capabilities, KEPT_CAPABILITIES & shell.capabilities)
    procs.prctl(procs.PR_SET_DUMPABLE, 0)  # last: changes of ids set it anew
    os.umask(0o022)
    os.chdir("/")
    procs.default_signals()  # Python ignores SIGPIPE and SIGXFSZ
    signals.signal(signals.SIGCHLD, signals.SIG_IGN)  # our own children, who serve clients, leave no zombies


def serve(sock: _socket.socket) -> None:
    """Start what is asked for, one after the other, until the keeper is gone.

    Request: {"n", argv, env, cwd, cwd_required, name, uid, gid, stdin: none | pipe | given} + the descriptor for
    `given`; a long one is {"long": true} + a memfd of it first. Answer: {"n", "ends": [roles]} + pidfd and the ends of
    the pipes, or {"n", "failed": text}: nothing was started. A child that cannot exec says {"exec_failed": n, "detail"}
    itself. A command for a named shell has "shell": {directory, text, fresh} as well, and argv is the shell's: it is
    started only if `fresh`, and then its `program` and `status` are among the ends.
    Request: {"n", "mover": true, name, uid, gid} + a socket of the keeper's: see files.py. Answer: a pidfd.
    Request: {"n", "run": task, rest64, name, uid, gid} + the client's connection: see relay.py. Answer: a pidfd.
    Request: {"n", "terminal": [cols, rows], argv, env, …}. Answer: a pidfd and the master of a pty.
    """
    packets.send(sock, {"up": True})
    while True:
        request, descriptors = packets.receive(sock)
        if request is None:
            os._exit(0)
        if request.get("long"):
            request = packets.loads(os.pread(descriptors[0], REQUEST_BYTES, 0))
            os.close(descriptors.pop(0))
        if "mover" in request or "run" in request:
            _start_errand(sock, request, descriptors)
        elif "terminal" in request:
            _start_shell(sock, request)
        elif "shell" in request:
            _start_in_shell(sock, request)
        else:
            _start(sock, request, descriptors)


def _start_errand(sock: _socket.socket, request: dict[str, Any], given: list[int]) -> None:
    """Fork a process that serves a client. It is our child, not the keeper's: losing a keeper is nothing to it."""
    try:
        (socket,) = given
        pid, pidfd = procs.clone_child_with_pidfd()
        if pid == 0:
            _serve_client(request, socket)
        packets.close_all(given)
        given = []
        try:
            packets.send(sock, {"n": request["n"], "ends": ["pidfd"]}, [pidfd])
        finally:
            os.close(pidfd)
    except OSError as error:
        packets.send(sock, {"n": request["n"], "failed": error.strerror or str(error)})
    finally:
        packets.close_all(given)


def _serve_client(request: dict[str, Any], socket: int) -> NoReturn:
    try:
        os.close(SOCKET)
        signals.signal(signals.SIGPIPE, signals.SIG_IGN)
        _take_ids(request)
        if request["uid"] != 0:
            procs.set_capabilities(0, 0)  # no exec will take them away
        procs.prctl(procs.PR_SET_DUMPABLE, 0)  # the user's other processes are no masters of this one
        if "run" in request:
            relay.work(request["run"], socket, binascii.a2b_base64(request["rest64"]))
        os.dup2(socket, files.CONTROL, inheritable=False)
        os.close(socket)
        files.serve(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, files.CONTROL))
    finally:
        os._exit(1)


def _start_shell(sock: _socket.socket, request: dict[str, Any]) -> None:
    """Start a program on a terminal of its own. It is our child: the terminal's hang-up ends it."""
    opened: list[int] = []
    try:
        master, slave = procs.open_terminal(*request["terminal"])
        opened += [master, slave]
        os.fchown(slave, request["uid"], -1)
        pid, pidfd = procs.clone_child_with_pidfd()
        if pid == 0:
            _become(sock, request, {0: slave, 1: slave, 2: slave})
        opened.append(pidfd)
        packets.send(sock, {"n": request["n"], "ends": ["master", "pidfd"]}, [master, pidfd])
    except OSError as error:
        packets.send(sock, {"n": request["n"], "failed": error.strerror or str(error)})
    finally:
        packets.close_all(opened)


def _start(sock: _socket.socket, request: dict[str, Any], given: list[int]) -> None:
    theirs: list[int] = list(given)  # of the child
    ours: list[int] = []  # to be handed out
    roles: list[str] = []
    user = (request["uid"], request["gid"])
    try:
        if request["stdin"] == "given":
            stdin = given[0]
        elif request["stdin"] == "pipe":
            stdin, _ = _pipe(user, theirs, ours)
            roles.append("stdin")
        else:
            # Whatever the box's root has put in its place must not stop us.
            stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            os.set_blocking(stdin, True)
            theirs.append(stdin)
        ends = []
        for role in ("1", "2"):
            _, end = _pipe(user, ours, theirs)
            roles.append(role)
            ends.append(end)
        pid, pidfd = procs.clone_sibling_with_pidfd()
        if pid == 0:
            _become(sock, request, {0: stdin, 1: ends[0], 2: ends[1]})
        ours.append(pidfd)
        roles.append("pidfd")
        # Our own copies first: the keeper would take them for a background process that holds the pipes.
        packets.close_all(theirs)
        theirs = []
        packets.send(sock, {"n": request["n"], "ends": roles}, ours)
    except OSError as error:
        packets.send(sock, {"n": request["n"], "failed": error.strerror or str(error)})
    finally:
        packets.close_all(theirs)
        packets.close_all(ours)


def _start_in_shell(sock: _socket.socket, request: dict[str, Any]) -> None:
    """Lay a command out for a named shell, and start the shell if there is none."""
    theirs: list[int] = []
    ours: list[int] = []
    user, shell = (request["uid"], request["gid"]), request["shell"]
    try:
        laid = shell_files.lay_out(shell["directory"], shell["text"], user, stdin=request["stdin"] == "pipe")
        ours = [descriptor for _, descriptor in laid]
        roles = [role for role, _ in laid]
        if shell["fresh"]:
            program, _ = _pipe(user, theirs, ours)
            status, told = (end.detach() for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET))
            ours.append(status)
            theirs.append(told)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            theirs.append(null)
            os.set_blocking(null, True)
            pid, pidfd = procs.clone_sibling_with_pidfd()
            if pid == 0:
                _become(sock, request, {0: null, 1: null, 2: null, STATUS: told, PROGRAM: program})
            ours.append(pidfd)
            roles += ["program", "status", "pidfd"]
        packets.close_all(theirs)
        theirs = []
        packets.send(sock, {"n": request["n"], "ends": roles}, ours)
    except OSError as error:
        packets.send(sock, {"n": request["n"], "failed": error.strerror or str(error)})
    finally:
        packets.close_all(theirs)
        packets.close_all(ours)


def _pipe(user: tuple[int, int], readers: list[int], writers: list[int]) -> tuple[int, int]:
    """Make a pipe of the user's own: only then may a script open /dev/stdout or /dev/stderr again."""
    read, write = os.pipe2(os.O_CLOEXEC)
    readers.append(read)
    writers.append(write)
    os.fchown(read, *user)
    return read, write


def _become(sock: _socket.socket, request: dict[str, Any], ends: dict[int, int]) -> NoReturn:
    """In the child: become the user's command with these `ends`, its number -> ours. Never returns."""
    what, code = request["argv"][0], 126
    try:
        signals.signal(signals.SIGCHLD, signals.SIG_DFL)
        _take_ids(request)
        # First out of the way of the numbers they are to have.
        apart = {number: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, PROGRAM + 1) for number, file in ends.items()}
        for number, file in apart.items():
            os.dup2(file, number)
        if "terminal" in request:
            what = "its terminal"
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the box's root may have been quicker, and taken it
        what = request["cwd"]
        procs.change_directory(what, request["cwd_required"])
        what = request["argv"][0]
        procs.execute(request["argv"], request["env"])
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT and what == request["argv"][0] else 126
        why = error.strerror or str(error)
        _fail(sock, request["n"], what, why)
    except BaseException as error:
        _fail(sock, request["n"], what, f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _take_ids(request: dict[str, Any]) -> None:
    uid, gid = request["uid"], request["gid"]
    os.setsid()
    os.setgroups(_groups(request["name"], gid))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _fail(sock: _socket.socket, number: int, what: str, why: str) -> None:
    try:
        os.write(2, EXEC_FAILED_MESSAGE.format(what=what, why=why).encode("utf-8", "replace"))
        packets.send(sock, {"exec_failed": number, "detail": f"{what[:200]}: {why}"})
    except OSError:
        pass


def _groups(name: str, gid: int) -> list[int]:
    """Return the user's groups by the box's /etc/group: read by the child, so a hostile file hurts nobody else."""
    groups = {gid}
    try:
        descriptor = os.open("/etc/group", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return [gid]
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return [gid]
        text = os.read(descriptor, GROUP_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return [gid]
    finally:
        os.close(descriptor)
    if name in text:
        for line in text.split("\n"):
            fields = line.split(":")
            if len(fields) == 4 and fields[2].isdigit() and name in fields[3].split(",") and len(fields[2]) < 6:
                groups.add(int(fields[2]))
    return sorted(groups)[:MAX_GROUPS]
