"""Named shells of a box: one bash each that lives from command to command.

In charge of: the bash behind a name, what is written into it for each command, hearing how that ended, noticing its own
end and replacing it; taking it up again in a successor.
Not in charge of: the life of a command (executions.py), making processes and files (spawner.py, shell_files.py), the
order of commands: a shell takes one at a time, and who asks for another one meanwhile is refused as `busy`.

A shell is a login bash that reads two lines for each command from a pipe:

    \\builtin . DIR/command 0</dev/null 1>DIR/o 2>DIR/e 8>&- || \\builtin printf 'NUMBER %d' $? >&8
    \\builtin printf 'NUMBER 0' >&8

The text runs at the top level: in no loop, which a `break` would end, and in no function, which would make `declare`
local; under `set -e` it is the text that fails, not the line around it. It is no `eval` either, and a text with `$(` or
`<(` is looked through by another bash first: if one of them is not closed, this bash (5.2) goes on with a broken heap
and dies some commands later. Such a text is run by a fork of the shell, which tells what is wrong and can be spared.

* The FIFOs are new ones for each command, so what an earlier one has left running writes to its own, which are drained
  like those of any command.
* The second line lies in the pipe, unread, until the first has been carried out. So a shell whose pipe is empty and
  that has told nothing carries out nothing any more (`set -n`, a function called `builtin`): it is ended.
* What a shell tells comes over a socket: it is looked at, the exit is written down, and then it is taken off. So the
  keeper may be killed at any point. It is not believed more than a command's exit status: whoever in the box forges it
  has a command of that shell end too early.
* After it has been handed over, a command that the shell did not begin to read provably never ran, and is given to a
  fresh shell.
"""

from __future__ import annotations

import _socket
import os
import time

from hostd import packets, polling, procs, requests
from hostd.execution import Execution
from hostd.journal import Journal
from hostd.procs import signals
from hostd.spawner_link import Order, SpawnerLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hostd.executions import Executions

KEY = "shell:"
"""Before a shell's name: under that its facts are in the journal, and its descriptors are parked. No id has a colon."""
MAX_SHELLS = 256
PLACES = ("/dev/shm", "/tmp")
"""Where in the box its directory may be; the next one is tried when one cannot be used."""
LOOK_S = 1.0
LOOKS = 3
"""So many looks find an empty pipe before a shell counts as one that carries out nothing."""
PACKETS = 32
"""Messages of one shell that are read in one turn."""
JUNK = 256
"""Messages that mean nothing before a shell is ended."""
PACKET_BYTES = 64
UNKNOWN = 1 << 40
"""What was handed over by a dead keeper: more than any pipe holds, so never all of it is unread."""
TRACED_S = 0.1
EXIT_PATIENCE_S = 5.0

# Aliases work as at a prompt. An interrupt ends the command, not the shell.
FIRST = b"exec 9<&-; BASH_ARGV0=bash; \\builtin shopt -s expand_aliases; trap '\\builtin return 130' INT\n"
CHECK = "BASH_ENV= /bin/bash -O extglob -n {d}/command 2>/dev/null 8>&-"
SUBSTITUTIONS = ("$(", "<(", ">(")


def lines(directory: str, number: int, last: int, text: str, *, stdin: bool) -> bytes:
    """Return what a shell reads for one command; `last` is the status its predecessor left in `$?`."""
    streams = f"1>{directory}/o 2>{directory}/e"
    run = f"\\builtin . {directory}/command"
    run = f"{run} 8>&-" if stdin else f"{run} 0</dev/null {streams} 8>&-"
    if last:
        run = f"(\\builtin exit {last}) || {run}"
    if any(mark in text for mark in SUBSTITUTIONS):
        run = f"if {CHECK.format(d=directory)}; then {run}; else ({run}); fi"
    run = f"{run} || \\builtin printf '{number} %d' $? >&8"
    if stdin:  # once it is open, its end need not be held open for it any more
        run = f"{{ \\builtin printf '{number} b' >&8; {run}; }} 0<{directory}/i {streams}"
    return f"{run}\n\\builtin printf '{number} 0' >&8\n".encode("ascii")


class Shell:
    """One name, and the bash behind it, if there is one."""

    __slots__ = (
        "command",
        "current",
        "directory",
        "doubt",
        "ended",
        "fresh",
        "handed",
        "hold",
        "hung",
        "junk",
        "last",
        "listening",
        "name",
        "notes",
        "number",
        "pid",
        "pidfd",
        "places",
        "program",
        "silent",
        "status",
        "told",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory, self.places = "", 0
        self.number = 0  # of the command it got last; goes on over all its processes
        self.notes: list[str] = []  # what the next command's user should know
        self.current: Execution | None = None
        self.command: requests.Command | None = None
        self.pid, self.pidfd, self.program = 0, -1, -1
        self.status: _socket.socket | None = None
        self.reset()
        self.move()

    def reset(self) -> None:
        """Forget what was true of the last process."""
        self.last = 0  # `$?`
        self.ended: int | None = None  # wait status of a process that is not buried yet; -1: nobody knows it
        self.fresh = True  # it has carried out no command
        self.handed = 0  # bytes of the present command's lines
        self.hold = -1
        self.listening = self.told = self.hung = self.doubt = False
        self.silent = self.junk = 0

    def move(self) -> None:
        """Use another directory from now on."""
        self.directory = f"{PLACES[self.places % len(PLACES)]}/.shell-{os.urandom(8).hex()}"
        self.places += 1

    @property
    def key(self) -> str:
        """Its name in the journal and with the zygote."""
        return KEY + self.name


class Shells:
    """All named shells of the box."""

    def __init__(
        self,
        poller: polling.Poller,
        journal: Journal,
        spawner: SpawnerLink,
        park: Callable[[dict[str, Any], list[int]], None],
        executions: Executions,
    ) -> None:
        self._poller, self._journal, self._spawner = poller, journal, spawner
        self._park, self._executions = park, executions
        self.by_name: dict[str, Shell] = {}

    def pids(self) -> set[int]:
        """Return the host pids of the children that are shells."""
        return {shell.pid for shell in self.by_name.values() if shell.pidfd >= 0}

    # --- one command

    def admit(self, name: str) -> Shell:
        """Return the shell that is to take a command now; raise Refused (busy, bad_request)."""
        shell = self.by_name.get(name)
        if shell is None:
            if len(self.by_name) >= MAX_SHELLS:
                self._forget_idle()
            if len(self.by_name) >= MAX_SHELLS:
                raise requests.bad(f"this box has {MAX_SHELLS} shells already")
            shell = self.by_name[name] = Shell(name)
        if shell.current is not None:
            raise requests.Refused("busy", f"the shell is at {shell.current.id}")
        return shell

    def _forget_idle(self) -> None:
        for shell in list(self.by_name.values()):
            if shell.pidfd < 0 and shell.current is None:
                del self.by_name[shell.name]
                self._write(shell, {"gone": True})

    def take(self, shell: Shell, execution: Execution, command: requests.Command) -> None:
        """Have the shell run a command; make the shell first if there is none."""
        shell.current, shell.command, execution.shell = execution, command, shell
        order = Order(dict(command.message), None)
        order.before = lambda: self._before(shell, execution, command, order)
        order.started = lambda pidfd, ends: self._laid_out(shell, execution, command, pidfd, ends)
        order.failed = lambda code, message: self._failed(shell, execution, code, message)
        order.lost = lambda detail: self._executions.lost(execution, detail)
        order.exec_failed = lambda message: self._executions.exec_failed(execution, message)
        self._spawner.ask(order)

    def _before(self, shell: Shell, execution: Execution, command: requests.Command, order: Order) -> None:
        fresh = shell.pidfd < 0
        shell.number += 1
        execution.number = shell.number
        needs = ["1", "2"]
        if command.message["stdin"] == "pipe":
            needs += ["stdin", "hold"]
        if fresh:
            needs += ["pidfd", "program", "status"]
            execution.notes += shell.notes
            shell.notes = []
        order.needs = frozenset(needs)
        order.message["shell"] = {"directory": shell.directory, "text": command.text, "fresh": fresh}
        facts = {"shell": shell.name, "number": execution.number, "fresh": fresh, "notes": execution.notes}
        self._executions.intend(execution, facts)

    def _failed(self, shell: Shell, execution: Execution, code: str, message: str) -> None:
        shell.current = shell.command = None
        shell.move()  # it may have been the directory
        self._executions.never_ran(execution, code, message)

    def _laid_out(
        self, shell: Shell, execution: Execution, command: requests.Command, pidfd: int, ends: dict[str, int]
    ) -> None:
        """The files are there, and the shell; the command goes in."""
        if pidfd >= 0:
            self._born(shell, pidfd, ends.pop("program"), ends.pop("status"))
        elif shell.pidfd < 0:  # it has died meanwhile
            packets.close_all(ends.values())
            self.take(shell, execution, command)
            return
        execution.pid = shell.pid
        self._executions.park_execution(execution, ends)
        shell.hold = ends.pop("hold", -1)
        if execution.pending_kill is not None:  # before it has begun: the shell need not die for it
            execution.killed = execution.pending_kill[0]
            packets.close_all(ends.values())
            self._executions.run(execution, {})
            self._executions.ended(execution, execution.killed)
            return
        self._hand_over(shell, execution, command)
        self._executions.run(execution, ends)  # it is told that it runs: that must be true whoever dies now

    def _hand_over(self, shell: Shell, execution: Execution, command: requests.Command) -> None:
        stdin = command.message["stdin"] == "pipe"
        text = lines(shell.directory, execution.number, shell.last, command.text, stdin=stdin)
        shell.handed = len(text)
        shell.silent = 0
        try:
            written = os.write(shell.program, text)
        except BrokenPipeError:
            return  # it is dead, and that is about to be told: the command has not begun
        except BlockingIOError:
            written = 0
        if written != len(text):  # somebody has told the end of commands that it is still at
            self._end(shell)
            return
        self._look_later(shell, execution)

    def _again(self, shell: Shell, execution: Execution) -> None:
        """Its shell died before it had read a byte of it."""
        command = shell.command
        assert command is not None
        self._unopened(execution)
        self._bury(shell)
        execution.state = "asked"
        self.take(shell, execution, command)

    @staticmethod
    def _unopened(execution: Execution) -> None:
        """A FIFO that nobody has opened for writing never hangs up."""
        for stream in execution.streams:
            stream.detach()

    def signal(self, execution: Execution, signal: int, group: bool) -> None:
        """Signal the shell, for that is what runs the command, or everything that has come from it."""
        shell = execution.shell
        assert shell is not None
        if shell.pidfd < 0:
            return
        self._read(shell)
        if execution.status is None:
            signals.pidfd_send_signal(shell.pidfd, signal)
            if group and shell.pid > 1:
                os.killpg(shell.pid, signal)

    def left(self, execution: Execution) -> None:
        """The command has ended, and that is written down."""
        shell = execution.shell
        if shell is None or shell.current is not execution:
            return
        shell.current = shell.command = None
        if shell.hold >= 0:
            os.close(shell.hold)
            shell.hold = -1
        if shell.told:
            assert shell.status is not None
            shell.told, shell.last, shell.fresh, shell.doubt = False, execution.exit or 0, False, False
            try:
                shell.status.recv(PACKET_BYTES, _socket.MSG_DONTWAIT)
            except OSError:
                pass
            self._listen(shell)
            self._write(shell, {"number": shell.number, "last": shell.last})
        if shell.ended is not None:
            self._bury(shell)

    # --- what a shell tells

    def _listen(self, shell: Shell) -> None:
        if shell.status is not None and not shell.listening:
            shell.listening = True
            self._poller.on(shell.status.fileno(), lambda _: self._read(shell))

    def _deafen(self, shell: Shell) -> None:
        if shell.status is not None and shell.listening:
            shell.listening = False
            self._poller.off(shell.status.fileno())

    def _read(self, shell: Shell) -> None:
        """Take what it told; the end of its command stays where it is until it is written down."""
        for _ in range(PACKETS):
            execution = shell.current
            if shell.status is None or shell.told:
                return
            try:
                packet = shell.status.recv(PACKET_BYTES, _socket.MSG_PEEK | _socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:  # nobody has the other end any more
                self._deafen(shell)
                return
            running = execution is not None and execution.state == "running" and execution.status is None
            word = _word(packet, execution.number) if execution is not None and running else b""
            if execution is not None and word.isdigit():
                shell.told = True
                self._deafen(shell)
                self._executions.ended(execution, int(word) << 8)
                return
            if execution is not None and word == b"b" and shell.hold >= 0:
                self._park({"unpark": execution.id, "role": "hold"}, [])
                os.close(shell.hold)
                shell.hold = -1
            elif not _word(packet, shell.number):
                shell.junk += 1
            shell.status.recv(PACKET_BYTES, _socket.MSG_DONTWAIT)
            if shell.junk > JUNK:
                self._end(shell)

    def _look_later(self, shell: Shell, execution: Execution) -> None:
        self._poller.after(LOOK_S, lambda: self._look(shell, execution))

    def _look(self, shell: Shell, execution: Execution) -> None:
        """Is it still at the command, or carries it out nothing any more?"""
        if shell.current is not execution or execution.status is not None or shell.program < 0 or shell.hung:
            return
        if procs.bytes_in_pipe(shell.program):
            shell.silent = 0
            shell.doubt = False
        else:
            shell.silent += 1
        if shell.silent < LOOKS:
            self._look_later(shell, execution)
        elif shell.doubt:
            self._unopened(execution)
            self._executions.lost(execution, "its keeper died while it was handed to its shell")
        else:
            self._end(shell)

    def _end(self, shell: Shell) -> None:
        """Kill a shell that is of no use any more; what follows is as if somebody else had."""
        shell.hung = True
        try:
            signals.pidfd_send_signal(shell.pidfd, signals.SIGKILL)
        except OSError:
            pass

    # --- birth and death of a shell

    def _born(self, shell: Shell, pidfd: int, program: int, status: int) -> None:
        shell.reset()
        shell.pidfd, shell.pid = pidfd, procs.pid_of(pidfd)
        shell.program = program
        os.set_blocking(program, False)
        shell.status = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, status)
        # Written down first: what is parked and in no journal would be killed, and its command called never begun.
        start = procs.start_time(shell.pid) or 0
        self._write(shell, {"pid": shell.pid, "start": start, "directory": shell.directory, "notes": [], "last": 0})
        self._park_shell(shell)
        self._attend(shell)
        try:
            os.write(program, FIRST)
        except BrokenPipeError:
            pass  # dead already

    def _park_shell(self, shell: Shell) -> None:
        assert shell.status is not None
        message = {"park": shell.key, "pid": shell.pid, "roles": ["pidfd", "program", "status"]}
        self._park(message, [shell.pidfd, shell.program, shell.status.fileno()])

    def park_all(self) -> None:
        """Park everything again: the zygote is a new one."""
        for shell in self.by_name.values():
            if shell.pidfd >= 0:
                self._park_shell(shell)

    def _attend(self, shell: Shell) -> None:
        self._poller.on(shell.pidfd, lambda _: self._dead(shell))
        self._listen(shell)

    def _dead(self, shell: Shell) -> None:
        """The pidfd says that it has ended."""
        self._poller.off(shell.pidfd)
        try:
            # The zombie stays until its end is written down: it would go to the zygote together with its status.
            seen = os.waitid(procs.P_PIDFD, shell.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._ask_kernel(shell, time.monotonic() + EXIT_PATIENCE_S)
            return
        if seen is None:  # somebody in the box traces it, and has to let go first
            self._poller.after(TRACED_S, lambda: self._dead_again(shell, shell.pidfd))
            return
        self._spawner.read_waiting()
        self._exited(shell, seen.si_status << 8 if seen.si_code == os.CLD_EXITED else seen.si_status)

    def _dead_again(self, shell: Shell, pidfd: int) -> None:
        if shell.ended is None and shell.pidfd == pidfd >= 0:
            self._poller.on(pidfd, lambda _: self._dead(shell))

    def _ask_kernel(self, shell: Shell, deadline: float) -> None:
        """A dead keeper's child: its parent, the zygote, tells us how it ended; a newer kernel does so as well."""
        if shell.ended is not None or shell.pidfd < 0:
            return
        status = procs.exit_of(shell.pidfd)
        if status is not None:
            self._exited(shell, status)
        elif time.monotonic() > deadline:
            self._exited(shell, -1)
        else:
            self._poller.after(0.05, lambda: self._ask_kernel(shell, deadline))

    def exited(self, pid: int, status: int) -> None:
        """Take the wait status of a process, which may be a shell, from the zygote."""
        for shell in self.by_name.values():
            if shell.pid == pid and shell.pidfd >= 0:
                self._exited(shell, status)
                return

    def _exited(self, shell: Shell, status: int) -> None:
        if shell.ended is not None or shell.pidfd < 0:
            return
        self._poller.off(shell.pidfd)
        self._read(shell)
        shell.ended = status
        execution = shell.current
        how = _how(status)
        if execution is None or execution.status is not None or execution.state == "asked":
            # The next command (perhaps one that is being laid out just now) gets a fresh one.
            shell.notes = [f"shell {shell.name} {how} while it was idle; this command got a fresh one"]
            if execution is None or execution.state == "asked":
                self._bury(shell)
            return
        unread = procs.bytes_in_pipe(shell.program) >= shell.handed
        if unread and not shell.fresh and not execution.killed and execution.stdin is None and not shell.hung:
            shell.notes = [f"shell {shell.name} {how} while it was idle; this command got a fresh one"]
            self._again(shell, execution)
            return
        if unread or shell.hung:
            self._unopened(execution)
        when = ""
        if execution.killed and status == execution.killed:
            when = " with its command, on request"
        elif shell.hung:
            when = " because it carried out nothing any more"
        elif unread:
            when = " before its first command"
        execution.notes.append(f"shell {shell.name} {how}{when}; the next command gets a fresh one")
        if status == -1:
            self._executions.lost(execution, "its shell has ended, and its exit status went with the shell's parent")
        else:
            self._executions.ended(execution, status)

    def _bury(self, shell: Shell) -> None:
        """Nothing of the process is needed any more."""
        try:
            os.waitid(procs.P_PIDFD, shell.pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass
        self._deafen(shell)
        packets.close_all(end for end in (shell.pidfd, shell.program, shell.hold) if end >= 0)
        if shell.status is not None:
            shell.status.close()
            shell.status = None
        shell.pid, shell.pidfd, shell.program = 0, -1, -1
        shell.reset()
        self._park({"drop": shell.key}, [])
        self._write(shell, {"pid": 0, "notes": shell.notes, "number": shell.number})

    def _write(self, shell: Shell, change: dict[str, Any]) -> None:
        try:
            self._journal.write(shell.key, change)
        except OSError as error:
            polling.log(f"shell {shell.name!r}: {sorted(change)} not written down: {error.strerror}")

    # --- a successor

    def recover(self, parked: dict[str, Any]) -> None:
        """Take up the shells a dead keeper left; their commands come after, by `recover_running`."""
        for key, facts in list(self._journal.facts.items()):
            if not key.startswith(KEY):
                continue
            shell = self.by_name[key[len(KEY) :]] = Shell(key[len(KEY) :])
            shell.number = int(facts.get("number", 0))
            shell.notes = list(facts.get("notes", []))
            left = parked.pop(key, None)
            if left is not None and left.pid == facts.get("pid"):
                shell.pid, shell.pidfd = left.pid, left.descriptors["pidfd"]
                shell.program = left.descriptors["program"]
                shell.status = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, left.descriptors["status"])
                shell.directory, shell.last = facts["directory"], int(facts.get("last", 0))
                shell.fresh, shell.handed = False, UNKNOWN
                continue
            if left is not None:
                procs.kill(left.descriptors.get("pidfd", -1))
                packets.close_all(left.descriptors.values())
            if facts.get("pid"):
                procs.kill_if_same(int(facts["pid"]), int(facts.get("start", 0)))
                shell.notes = [f"shell {shell.name} went with its keeper; this command got a fresh one"]
                self._write(shell, {"pid": 0, "notes": shell.notes})

    def provably_new(self, facts: dict[str, Any]) -> bool:
        """Did no process have to be started for a command that was never handed over?"""
        shell = self.by_name.get(facts.get("shell", ""))
        return shell is not None and (shell.pidfd >= 0 or not facts.get("fresh"))

    def recover_running(self, execution: Execution, facts: dict[str, Any], left: Any) -> None:
        """Take up a command whose files were there."""
        shell = self.by_name.get(facts["shell"])
        if shell is None or shell.pidfd < 0 or shell.current is not None:
            packets.close_all(left.descriptors.values())
            self._executions.lost(execution, "its keeper and its shell died")
            return
        execution.number, execution.pid = int(facts["number"]), shell.pid
        execution.notes = list(facts.get("notes", []))
        shell.number = max(shell.number, execution.number)
        shell.current, execution.shell = execution, shell
        shell.fresh = bool(facts.get("fresh"))
        shell.hold = left.descriptors.pop("hold", -1)
        shell.doubt = True
        self._executions.run(execution, left.descriptors)
        self._look_later(shell, execution)

    def resume(self, exits: dict[int, int]) -> None:
        """Everything is taken up: go on. `exits` are those the zygote has seen meanwhile."""
        for shell in self.by_name.values():
            if shell.pidfd >= 0:
                self._attend(shell)
                if shell.pid in exits:
                    self._exited(shell, exits[shell.pid])


def _word(packet: bytes, number: int) -> bytes:
    """Return what a message says of the command of this number: b"b", or a status; b"" for anything else."""
    told, _, word = packet.partition(b" ")
    if told != b"%d" % number:
        return b""
    return word if word == b"b" or (word.isdigit() and len(word) <= 3 and int(word) <= 255) else b""


def _how(status: int) -> str:
    if status == -1:
        return "ended"
    code = os.waitstatus_to_exitcode(status)
    return f"exited with status {code}" if code >= 0 else f"was killed by signal {-code}"
