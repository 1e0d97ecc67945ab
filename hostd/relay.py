"""One program run for a client that stays connected, inside a box, as a user of the box.

In charge of: what a process does that the spawner has forked for one `run` request and given the client's connection:
start the program on pipes or on a terminal, carry its bytes both ways within bounds, say exactly how it ended, hang it
up when the client has gone. Not in charge of: the shape of the request (requests.py), starting and stopping this
process (transfers.py), who may ask.

The wire, after the request line and its body:

    <- {"ok": true, "window"}       or {"error": …}; from then on packets both ways: u32 length of all that follows in
                                    it, one byte that says what it is, the bytes
    -> 0 input      1 control: {"eof": true} | {"deaf": true} | {"resize": [cols, rows]} | {"signal": number}
    <- 1 stdout     2 stderr        3 credit: u32, bytes of input that were taken
    <- 4 end        {"exit": 0..255} or {"signal": number, "core": bool}: all output has been sent

`deaf`: the client wants no more of stdout, and who writes to it shall be told. The client sends at most `window` bytes
of input beyond what it got credit for. So control always gets through, a client that leaves is noticed whatever the
program reads, and neither side holds more than that.

Output ends when everybody has closed the pipes, as with sshd; on a terminal it ends with the program itself.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import struct
import termios

from hostd import packets, procs
from hostd.procs import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

WINDOW = 1 << 20
CREDIT_BYTES = WINDOW // 4
"""Credit goes out when so much has been taken, or when nothing is left."""
PACKET_MAX = 64 * 1024 + 1
READ_BYTES = 64 * 1024
PIPE_BYTES = 256 * 1024
OUT_BYTES = 256 * 1024
"""Output that waits for the client; after that the program is not read from."""
INPUT, CONTROL = 0, 1
STDOUT, STDERR, CREDIT, END = 1, 2, 3, 4
EXEC_FAILED = "berth: cannot run {what}: {why}\n"
HEAD = struct.Struct("!IB")
_GONE = select.POLLHUP | select.POLLERR


class Gone(Exception):
    """The client has left, or sends what the protocol does not allow: there is nobody to answer."""


def work(task: dict[str, Any], descriptor: int, rest: bytes) -> NoReturn:
    """Carry one request out and end the process. `task`: argv, env, cwd, cwd_required, terminal (its size) or None."""
    try:
        signals.signal(signals.SIGCHLD, signals.SIG_DFL)
        os.set_blocking(descriptor, False)
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        try:
            relay = Relay(sock, rest, task)
        except OSError as error:
            told = {"error": {"code": "box_io", "message": f"it cannot be started: {error.strerror or error}"}}
            sock.send(packets.dumps(told) + b"\n", _socket.MSG_NOSIGNAL)
        else:
            relay.run()
    finally:
        os._exit(0)


class Relay:
    """The program, its three streams and the connection."""

    def __init__(self, sock: _socket.socket, rest: bytes, task: dict[str, Any]) -> None:
        """Start the program. Raises OSError."""
        self._sock = sock
        self._in = bytearray(rest)  # packets of the client that are not complete
        self._input = bytearray()  # for the program
        self._input_ended = False
        self._taken = 0  # input for which no credit was given yet
        self._due = 0  # input that may still come
        self._out: list[memoryview] = []
        self._out_bytes = 0
        self._master = -1
        self._stdin = -1
        self._sources: dict[int, int] = {}  # descriptor -> STDOUT or STDERR
        self._exited = False
        self._poll = select.poll()
        self._events: dict[int, int] = {}
        self.pid = self._start_on_terminal(task) if task["terminal"] else self._start_on_pipes(task)
        self._pidfd = os.pidfd_open(self.pid)
        self._due = WINDOW
        self._send(packets.dumps({"ok": True, "window": WINDOW}) + b"\n")

    # --- starting

    def _start_on_terminal(self, task: dict[str, Any]) -> int:
        self._master, slave = procs.open_terminal(*task["terminal"])
        me, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(task, me, slave, slave, slave)
        os.close(slave)
        self._sources[self._master] = STDOUT
        self._stdin = self._master
        return pid

    def _start_on_pipes(self, task: dict[str, Any]) -> int:
        (stdin, self._stdin), (out, stdout), (err, stderr) = (os.pipe2(os.O_CLOEXEC) for _ in range(3))
        for end in (self._stdin, out, err):
            os.set_blocking(end, False)
            try:
                fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            except OSError:
                pass  # its user holds as much of pipes as a user may
        me, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(task, me, stdin, stdout, stderr)
        for end in (stdin, stdout, stderr):
            os.close(end)
        self._sources = {out: STDOUT, err: STDERR}
        return pid

    # --- moving

    def run(self) -> None:
        """Until the program has ended and all is said, or the client has gone."""
        try:
            self._unpack()
            while not self._is_over():
                self._watch()
                # On a terminal the program's end is the output's: what is still to be read is there already.
                timeout = 0 if self._exited and self._has_room() and self._master >= 0 else None
                ready = dict(self._poll.poll(timeout))
                self._turn(ready)
            self._sock.shutdown(_socket.SHUT_WR)
        except (Gone, OSError):
            self._hang_up()

    def _is_over(self) -> bool:
        if self._exited and not self._sources:
            self._end()
        return self._exited and not self._sources and not self._out

    def _turn(self, ready: dict[int, int]) -> None:
        mine = self._sock.fileno()
        if ready.get(mine, 0) & (select.POLLIN | _GONE):
            self._receive()
        if ready.get(mine, 0) & select.POLLOUT:
            self._flush()
        if self._input and self._stdin >= 0:
            self._feed()
        for source, kind in list(self._sources.items()):
            drained = self._exited and source == self._master
            if (drained or ready.get(source)) and self._has_room():
                self._read(source, kind)
        if ready.get(self._pidfd) and not self._exited:
            self._exited = True
        if self._stdin >= 0 and ready.get(self._stdin, 0) & _GONE and self._stdin != self._master:
            self._stop_input()

    def _has_room(self) -> bool:
        return self._out_bytes < OUT_BYTES

    def _watch(self) -> None:
        wanted = {self._sock.fileno(): select.POLLIN | (select.POLLOUT if self._out else 0)}
        if not self._exited:
            wanted[self._pidfd] = select.POLLIN
        for source in self._sources:
            if self._has_room():
                wanted[source] = select.POLLIN
        if self._stdin >= 0 and self._input:
            wanted[self._stdin] = wanted.get(self._stdin, 0) | select.POLLOUT
        for descriptor in [known for known in self._events if known not in wanted]:
            self._poll.unregister(descriptor)
        for descriptor, events in wanted.items():
            if self._events.get(descriptor) != events:
                self._poll.register(descriptor, events)
        self._events = wanted

    def _forget(self, descriptor: int) -> None:
        """Close it; its number may be another's a moment later."""
        if self._events.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)
        os.close(descriptor)

    # --- from the program

    def _read(self, source: int, kind: int) -> None:
        try:
            data = os.read(source, READ_BYTES)
        except BlockingIOError:
            if self._exited and source == self._master:
                self._leave_terminal()
            return
        except OSError:
            data = b""  # a terminal that nobody has open any more
        if data:
            self._say(kind, data)
        elif source == self._master:
            self._leave_terminal()
        else:
            del self._sources[source]
            self._forget(source)

    def _leave_terminal(self) -> None:
        """Nobody has it open, or its program has ended; whoever is left on it gets the hang-up."""
        master, self._master, self._stdin = self._master, -1, -1
        del self._sources[master]
        self._forget(master)
        self._drop_input()

    def _end(self) -> None:
        if self._pidfd < 0:
            return
        told = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG)
        self._forget(self._pidfd)
        self._pidfd = -1
        if told is None or told.si_code == os.CLD_EXITED:
            end: dict[str, Any] = {"exit": told.si_status if told else 255}
        else:
            end = {"signal": told.si_status, "core": told.si_code == os.CLD_DUMPED}
        self._say(END, packets.dumps(end))

    def _say(self, kind: int, data: bytes) -> None:
        self._send(HEAD.pack(len(data) + 1, kind) + data)

    def _send(self, data: bytes) -> None:
        self._out.append(memoryview(data))
        self._out_bytes += len(data)
        self._flush()

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._sock.send(self._out[0], _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            self._out_bytes -= sent
            if sent == len(self._out[0]):
                self._out.pop(0)
            else:
                self._out[0] = self._out[0][sent:]

    # --- from the client

    def _receive(self) -> None:
        try:
            data = self._sock.recv(READ_BYTES * 4)
        except BlockingIOError:
            return
        if not data:
            raise Gone("it left")
        self._in += data
        self._unpack()

    def _unpack(self) -> None:
        at = 0
        while len(self._in) - at >= HEAD.size:
            length, kind = HEAD.unpack_from(self._in, at)
            if not 1 <= length <= PACKET_MAX:
                raise Gone("a packet of a wrong length")
            if len(self._in) - at < length + 4:
                break
            data = bytes(memoryview(self._in)[at + HEAD.size : at + 4 + length])
            at += 4 + length
            if kind == INPUT:
                self._take(data)
            elif kind == CONTROL:
                self._control(data)
            else:
                raise Gone("a packet of an unknown kind")
        del self._in[:at]

    def _take(self, data: bytes) -> None:
        self._due -= len(data)
        if self._due < 0 or self._input_ended:
            raise Gone("more input than there is room for")
        self._input += data
        if self._stdin < 0:
            self._drop_input()
        else:
            self._feed()

    def _feed(self) -> None:
        """Give the program what it takes now."""
        try:
            while self._input:
                count = os.write(self._stdin, memoryview(self._input)[:READ_BYTES].tobytes())
                del self._input[:count]
                self._credit(count)
        except BlockingIOError:
            return
        except OSError:
            self._stop_input()
            return
        if self._input_ended:
            self._close_input()

    def _credit(self, count: int) -> None:
        self._taken += count
        if self._taken >= CREDIT_BYTES or not self._input:
            self._due += self._taken
            self._say(CREDIT, struct.pack("!I", self._taken))
            self._taken = 0

    def _stop_input(self) -> None:
        """The program wants to hear nothing more: what comes is dropped."""
        if self._stdin >= 0 and self._stdin != self._master:
            self._forget(self._stdin)
        self._stdin = -1
        self._drop_input()

    def _drop_input(self) -> None:
        if self._input:
            count = len(self._input)
            self._input.clear()
            self._credit(count)

    def _close_input(self) -> None:
        if self._stdin >= 0 and self._stdin != self._master:
            self._forget(self._stdin)
            self._stdin = -1

    def _stop_output(self) -> None:
        if self._master >= 0:
            self._leave_terminal()
        for source in [source for source, kind in self._sources.items() if kind == STDOUT]:
            del self._sources[source]
            self._forget(source)

    def _control(self, data: bytes) -> None:
        try:
            asked = packets.loads(data)
            if "eof" in asked:
                self._input_ended = True
                if not self._input:
                    self._close_input()
            elif "deaf" in asked:
                self._stop_output()
            elif "resize" in asked:
                cols, rows = asked["resize"]
                if self._master >= 0:
                    fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
            elif "signal" in asked:
                self._signal(asked["signal"])
        except (packets.Malformed, ValueError, TypeError, struct.error) as error:
            raise Gone(str(error)) from None

    def _signal(self, number: int) -> None:
        """To the foreground of its terminal, or to the program's own group. Its pid is its group's until we reap it."""
        group = 0
        if self._master >= 0:
            try:
                (group,) = struct.unpack("i", fcntl.ioctl(self._master, termios.TIOCGPGRP, b"\0\0\0\0"))
            except OSError:
                return
        if 1 <= number <= 31 and group > 1:
            procs.signal_group(group, number)
        elif 1 <= number <= 31 and not group:
            self._signal_own(number)

    def _hang_up(self) -> None:
        if self._pidfd >= 0:
            for number in (signals.SIGHUP, signals.SIGCONT):
                self._signal_own(number)

    def _signal_own(self, number: int) -> None:
        """To the program's group; to itself alone while it is too young to lead one."""
        if not procs.signal_group(self.pid, number):
            try:
                os.kill(self.pid, number)
            except OSError:
                pass


def _become(task: dict[str, Any], relay: int, stdin: int, stdout: int, stderr: int) -> NoReturn:
    """In the child: become the program. Never returns."""
    what, code = str(task["argv"][0]), 126
    try:
        os.setsid()
        # Whoever kills the relay, the program must not go on unattended. It may be gone already.
        procs.prctl(procs.PR_SET_PDEATHSIG, int(signals.SIGHUP))
        if os.getppid() != relay:
            os._exit(129)
        apart = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (stdin, stdout, stderr)]
        for number, end in enumerate(apart):
            os.dup2(end, number)
        if task["terminal"]:
            what = "its terminal"
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        procs.default_signals()
        what = task["cwd"]
        procs.change_directory(what, task["cwd_required"])
        what = task["argv"][0]
        procs.execute(task["argv"], task["env"])
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) and what == task["argv"][0] else 126
        try:
            os.write(2, EXEC_FAILED.format(what=what, why=error.strerror or str(error)).encode("utf-8", "replace"))
        except OSError:
            pass
    finally:
        os._exit(code)
