"""The commands of one box: their states, exits and reasons, and what of them survives a keeper.

In charge of: the life of a command below; the order of writing things down; exit events until they are acknowledged;
how long acknowledged ones are remembered; taking everything up again in a successor.
Not in charge of: starting processes (spawner_link.py), bytes (streams.py, stdin.py), who asks (clients.py).

    spawn -> asked -----------started----------> running --exited, drained, written down--> exited --ack--> acknowledged
               |`-- never ran: no such command      `-- its keeper and its zygote died: lost     (1)      (2)
               `-- may have run: lost
    kill of an unknown id -> exited (137, killed_before_start)

(1) An exit event is sent on every connection of hostd until it is acknowledged.
(2) The command stays known, so that a late spawn of its id starts nothing, and its outputs stay readable, until
    `forget`, or until it is old (see REMEMBERED_S), or until the outputs exceed the box's budget, oldest first.

Before a command is asked for, its intent is in the journal; when it runs, its descriptors are parked with the zygote,
then its pid is written down, then it is announced. So a successor can tell: parked = it runs; intent only = see
`recover`.
"""

from __future__ import annotations

import os
import time

from hostd import packets, polling, procs, requests
from hostd.endings import reason_of
from hostd.execution import Execution, Settings, now_ms
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.output_index import Index
from hostd.procs import signals
from hostd.requests import Refused
from hostd.shells import KEY, Shells
from hostd.spawner_link import Order, SpawnerLink
from hostd.stdin import Inputs, Stdin, sealed_input
from hostd.streams import Bucket, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_RUNNING = 512
"""Commands that run, or whose pipes are still held by what they left behind."""
MAX_KNOWN = 20_000
"""Commands that are known at all: only a control plane that acknowledges nothing comes near it."""
REMEMBERED = 2000
"""Acknowledged commands that stay known at most."""
REMEMBERED_S = 600
"""For so long an acknowledged command stays known in any case (within REMEMBERED), so that a late repetition of its
spawn starts nothing. After that it goes if its outputs were small enough to be in its exit event, or are removed."""
REMEMBERED_ANYWAY = 100
"""So many of the newest stay known however old they are."""
INLINE_BYTES = 65536
"""Outputs up to this size together travel in the exit event."""
RETRY_S = 0.5
TRACED_S = 0.1
EXIT_PATIENCE_S = 5.0
"""How long a successor waits for the zygote to say how a command ended that was not its own child."""
LOST = -1


class Executions:
    """All commands the keeper knows."""

    def __init__(
        self,
        poller: polling.Poller,
        directory: int,
        journal: Journal,
        spawner: SpawnerLink,
        settings: Settings,
        memory: Memory,
        ending: Callable[[], bool],
        park: Callable[[dict[str, Any], list[int]], None],
        announce: Callable[[Execution, bool], None],
    ) -> None:
        self._poller, self._directory, self._journal, self._spawner = poller, directory, journal, spawner
        self._settings, self._memory, self._ending = settings, memory, ending
        self._park, self._announce = park, announce
        self._bucket = Bucket(settings.rate, settings.burst)
        self.known: dict[str, Execution] = {}
        self.by_pid: dict[int, Execution] = {}
        self._active = 0
        self.box_gone = False
        self.listeners: list[Callable[[Execution], None]] = []
        """Called whenever a command has more output, has begun to run or has ended."""
        self.shells = Shells(poller, journal, spawner, park, self)

    # --- verbs

    def find(self, name: str) -> Execution:
        """Return a known command; raise Refused unknown_id."""
        try:
            return self.known[name]
        except KeyError:
            raise Refused("unknown_id", f"no execution {name} here") from None

    def spawn(self, name: str, fence: int, body: dict[str, Any], cap: int | None = None) -> Execution:
        """Start a command, or return the one known by this id, whatever its state. `cap`: bytes kept of each stream,
        None for what the box's spec says."""
        execution = self.known.get(name)
        if execution is not None:
            self._check_fence(execution, fence)
            return execution
        command = requests.command(body)
        if self.box_gone:
            raise Refused("not_ready", "the box has stopped")
        if self._active >= MAX_RUNNING:
            raise Refused("busy", f"{MAX_RUNNING} commands run in this box already")
        if len(self.known) >= MAX_KNOWN:
            raise Refused("busy", f"{MAX_KNOWN} commands of this box wait to be acknowledged")
        shell = self.shells.admit(command.shell) if command.shell is not None else None
        execution = self._new(name, fence, cap)
        if shell is not None:
            self.shells.take(shell, execution, command)
            return execution
        given = sealed_input(command.input) if command.input is not None else None
        order = Order(command.message, given)
        order.before = lambda: self.intend(execution, {})
        order.started = lambda pidfd, ends: self._started(execution, pidfd, ends)
        order.failed = lambda code, message: self.never_ran(execution, code, message)
        order.lost = lambda detail: self.lost(execution, detail)
        order.exec_failed = lambda message: self.exec_failed(execution, message)
        self._spawner.ask(order)
        return execution

    def kill(
        self, name: str, fence: int, signal: int, group: bool, request: str | None = None
    ) -> tuple[Execution, bool]:
        """Signal a command (or its process group); leave a tombstone for an unknown one. Also returns whether it was
        signalled.

        With `request`, a repetition signals nothing, and is told what the first one was.
        """
        execution = self.known.get(name)
        if execution is None:
            return self._tombstone(name, fence), False
        self._check_fence(execution, fence)
        if request is not None and self._inputs(execution).done(request):
            return execution, True
        if execution.state == "asked":
            if request is not None:
                raise Refused("busy", "the command is being started")
            execution.pending_kill = (signal, group)
            return execution, True
        if execution.state != "running" or execution.status is not None:
            return execution, False
        if request is not None:
            self._inputs(execution).begin(request, done=True)
        self._signal(execution, signal, group)
        return execution, True

    def ack(self, name: str) -> None:
        """The control plane knows this exit; unknown ids and running commands are passed over."""
        execution = self.known.get(name)
        if execution is not None and execution.state == "exited" and not execution.acked:
            now = now_ms()
            self._journal.write(name, {"ack": now})
            execution.acked = now

    def forget(self, name: str, fence: int | None = None) -> None:
        """Delete the outputs of an acknowledged command; it stays known until it is one of too many, and what was
        written after its exit stays.

        With a fence it is the control plane that has the outputs by now: then it has the exit as well. Raises Refused.
        """
        execution = self.known.get(name)
        if execution is None or execution.state != "exited":
            return
        if fence is not None:
            self._check_fence(execution, fence)
            self.ack(name)
        if execution.acked:
            for stream in execution.streams:
                stream.remove(late=False)

    def stdin(self, execution: Execution, request: str, data: bytes, eof: bool) -> bool:
        """Pass on bytes for standard input; False: not accepted. Raises Refused."""
        if execution.state == "asked":
            raise Refused("busy", "the command is being started")
        if execution.stdin is None or execution.state != "running":
            return self._inputs(execution).done(request) is True
        return execution.stdin.offer(request, data, eof)

    def _inputs(self, execution: Execution) -> Inputs:
        if execution.inputs is None:
            entries = self._journal.facts.get(execution.id, {}).get("in", [])
            execution.inputs = Inputs(entries, lambda change: self._write(execution, change))
        return execution.inputs

    def shape(self, execution: Execution) -> dict[str, Any]:
        """Return what `state` answers."""
        answer: dict[str, Any] = {
            "id": execution.id,
            "state": "exited" if execution.state == "exited" else "running",
            "sizes": execution.sizes(),
            "dropped": [stream.dropped for stream in execution.streams],
            "started_at_ms": execution.started_at_ms,
        }
        first = execution.first_byte_at_ms()
        if first:
            answer["first_byte_at_ms"] = first
        if execution.state != "exited":
            if execution.pid:
                answer["pid"] = execution.pid
            return answer
        answer.update(exit=execution.exit, reason=execution.reason, exited_at_ms=execution.exited_at_ms)
        if execution.notes:
            answer["notes"] = execution.notes
        if sum(execution.sizes()) <= INLINE_BYTES:
            out, err = (stream.in_base64() for stream in execution.streams)
            if out is not None and err is not None:
                answer.update(stdout=out, stderr=err)
                index = execution.index.for_event() if execution.index is not None else None
                if index is not None:
                    answer["index"] = index
        return answer

    def unacknowledged(self) -> list[Execution]:
        """Return the exits hostd must be told again, oldest first."""
        return [e for e in self.known.values() if e.state == "exited" and not e.acked]

    def pids(self) -> set[int]:
        """Return the host pids of the children that are commands or shells of ours."""
        return self.by_pid.keys() | self.shells.pids()

    def tidy(self) -> None:
        """Remove what is beyond the bounds: called now and then."""
        acked = [e for e in self.known.values() if e.acked and not e.open_pipes()]
        old = now_ms() - REMEMBERED_S * 1000
        for place, execution in enumerate(acked):
            newer = len(acked) - 1 - place
            small = sum(execution.sizes()) <= INLINE_BYTES or all(s.removed or not s.size for s in execution.streams)
            if newer >= REMEMBERED or (newer >= REMEMBERED_ANYWAY and execution.acked < old and small):
                self._remove(execution)
                self._journal.write(execution.id, {"gone": True})
                del self.known[execution.id]
        kept = [(e, sum(s.kept for s in e.streams)) for e in acked if e.id in self.known]
        total = sum(size for _, size in kept)
        for execution, size in kept:
            if total <= self._settings.budget:
                break
            if size:
                self._remove(execution)
                total -= size

    def _remove(self, execution: Execution) -> None:
        for stream in execution.streams:
            stream.remove(late=True)
        for index in (execution.index, execution.late):
            if index is not None:
                index.remove()
        execution.late = None

    # --- a command's life

    def _new(self, name: str, fence: int, cap: int | None = None) -> Execution:
        kept = self._settings.cap if cap is None else cap
        streams = [Stream(self._poller, self._directory, self._bucket, name, number, kept) for number in (1, 2)]
        execution = Execution(name, fence, streams)
        execution.index = Index(self._directory, f"{name}.index", execution.started_at_ms)
        execution.cap = cap
        self.known[name] = execution
        self._active += 1
        for stream in streams:
            stream.closed = lambda: self._pipe_closed(execution)
            stream.noted = lambda number, end, late: self._noted(execution, number, end, late)
            stream.punching = lambda start, end, n=stream.number: self._journal.write(name, {f"hole{n}": [start, end]})
        return execution

    def _noted(self, execution: Execution, number: int, end: int, late: bool) -> None:
        if late and execution.late is None:
            execution.late = Index(self._directory, f"{execution.id}.late-index", 0, through=True)
        index = execution.late if late else execution.index
        if index is not None:
            index.note(number, end)
        self._changed(execution)

    def _changed(self, execution: Execution) -> None:
        for call in self.listeners:
            call(execution)

    def _check_fence(self, execution: Execution, fence: int) -> None:
        if fence < execution.fence:
            raise Refused("stale_fence", f"fence {fence} is older than {execution.fence}", fence=execution.fence)
        if fence > execution.fence:
            self._journal.write(execution.id, {"fence": fence})
            execution.fence = fence

    def intend(self, execution: Execution, more: dict[str, Any]) -> None:
        """The last moment before the spawner is asked. Raises Refused no_space."""
        execution.box_kills = self._memory.kills()
        facts = {"fence": execution.fence, "at": execution.started_at_ms, "oom": execution.box_kills, **more}
        if execution.cap is not None:
            facts["cap"] = execution.cap
        try:
            self._journal.write(execution.id, facts)
        except OSError as error:
            raise Refused("no_space", f"the journal cannot be written: {error.strerror}") from None

    def _started(self, execution: Execution, pidfd: int, ends: dict[str, int]) -> None:
        """Park, then write down, then tell."""
        execution.pidfd, execution.pid = pidfd, procs.pid_of(pidfd)
        self.park_execution(execution, ends)
        self._write(execution, {"pid": execution.pid, "start": procs.start_time(execution.pid) or 0})
        self.run(execution, ends)
        if execution.pending_kill is not None:
            self._signal(execution, *execution.pending_kill)

    def park_execution(self, execution: Execution, ends: dict[str, int]) -> None:
        """Give the zygote its descriptors."""
        held = {"pidfd": execution.pidfd, **ends}
        roles = [role for role, descriptor in held.items() if descriptor >= 0]
        message = {"park": execution.id, "pid": execution.pid, "roles": roles}
        self._park(message, [held[role] for role in roles])

    def park_all(self) -> None:
        """Park everything again: the zygote is a new one."""
        self.shells.park_all()
        for execution in self.known.values():
            if execution.state == "running" or execution.open_pipes():
                ends = {str(stream.number): stream.pipe for stream in execution.streams}
                ends["stdin"] = execution.stdin.pipe if execution.stdin is not None else -1
                if execution.shell is not None and execution.shell.current is execution:
                    ends["hold"] = execution.shell.hold
                self.park_execution(execution, ends)

    def run(self, execution: Execution, ends: dict[str, int]) -> None:
        """It has been started: attend to it."""
        execution.state = "running"
        if execution.shell is None:
            self.by_pid[execution.pid] = execution
        for stream in execution.streams:
            if ends.get(str(stream.number), -1) >= 0:
                stream.attach(ends[str(stream.number)])
        if ends.get("stdin", -1) >= 0:
            execution.stdin = Stdin(
                self._poller,
                ends["stdin"],
                self._inputs(execution),
                lambda: self._park({"unpark": execution.id, "role": "stdin"}, []),
            )
            if self._journal.facts.get(execution.id, {}).get("eof"):
                execution.stdin.close()
        if execution.shell is None:
            self._poller.on(execution.pidfd, lambda _: self._dead(execution))
        self._tell(execution)

    def never_ran(self, execution: Execution, code: str, message: str) -> None:
        """No such command then: whoever asks again starts it anew."""
        self.known.pop(execution.id, None)
        self._active -= 1
        if execution.id in self._journal.facts:
            self._write(execution, {"gone": True})
        execution.state, execution.reason = "exited", {"code": code, "message": message}
        for stream in execution.streams:
            stream.seal()
        self._tell(execution)

    def lost(self, execution: Execution, detail: str) -> None:
        """Nobody can tell how it ended, or whether it ran."""
        self._conclude(execution, LOST, {"kind": "lost", "detail": detail})

    def exec_failed(self, execution: Execution, message: str) -> None:
        """Its program could not be run: the child is about to exit."""
        execution.exec_error = message

    def _signal(self, execution: Execution, signal: int, group: bool) -> None:
        if execution.killed != signal:
            self._write(execution, {"kill": signal})
        execution.killed = signal
        try:
            if execution.shell is not None:
                self.shells.signal(execution, signal, group)
                return
            # Once only: the command leads its group, and two interrupts are not one to many a program. The kernel lets
            # us reach this box's processes only, so a number that is somebody else's group by now is refused.
            if not (group and execution.pid > 1 and procs.signal_group(execution.pid, signal)):
                signals.pidfd_send_signal(execution.pidfd, signal)
        except (ProcessLookupError, PermissionError):
            pass

    def _dead(self, execution: Execution) -> None:
        """The pidfd says that the process has ended."""
        self._poller.off(execution.pidfd)
        try:
            # The zombie stays until the exit is written down: it would go to the zygote together with its status.
            seen = os.waitid(procs.P_PIDFD, execution.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._ask_kernel(execution, time.monotonic() + EXIT_PATIENCE_S)
            return
        if seen is None:  # somebody in the box traces it, and has to let go first
            self._poller.after(TRACED_S, lambda: self._look_again(execution))
            return
        execution.reap = True
        status = seen.si_status << 8 if seen.si_code == os.CLD_EXITED else seen.si_status
        self._spawner.read_waiting()  # the child says why it could not exec before it exits
        self.ended(execution, status)

    def _look_again(self, execution: Execution) -> None:
        if execution.status is None and execution.pidfd >= 0:
            self._poller.on(execution.pidfd, lambda _: self._dead(execution))

    def _ask_kernel(self, execution: Execution, deadline: float) -> None:
        """A dead keeper's child: its parent, the zygote, tells us how it ended; a newer kernel does so as well."""
        if execution.status is not None or execution.state == "exited":
            return
        status = procs.exit_of(execution.pidfd)
        if status is not None:
            self.ended(execution, status)
        elif time.monotonic() > deadline:
            self._poller.off(execution.pidfd)
            self.lost(execution, "it has ended, but the process that was its parent then is gone with its exit status")
        else:
            self._poller.after(0.05, lambda: self._ask_kernel(execution, deadline))

    def ended(self, execution: Execution, status: int) -> None:
        """Take the wait status, from whoever had it first."""
        if execution.status is None and execution.state != "exited":
            execution.status = status
            execution.exited_at_ms = now_ms()
            self._finish(execution)

    def _finish(self, execution: Execution) -> None:
        """Exactly what is in the pipes now, then the exit; a full pool makes both wait."""
        drained = [stream.drain() for stream in execution.streams]
        if not all(drained):
            self._poller.after(RETRY_S, lambda: self._finish(execution))
            return
        assert execution.status is not None
        code = os.waitstatus_to_exitcode(execution.status)
        if code < 0:
            code = 128 - code
        box_ended = self.box_gone or self._ending()
        self._conclude(execution, code, reason_of(execution, code, self._memory, box_ended=box_ended))

    def _conclude(self, execution: Execution, code: int, reason: dict[str, Any] | None) -> None:
        """Write the exit down, reap, tell everybody."""
        if execution.state == "exited":
            return
        exited_at = execution.exited_at_ms or now_ms()
        kept = execution.index.seal() if execution.index is not None else {}
        facts: dict[str, Any] = {"exit": code, "reason": reason, "sizes": execution.sizes(), "end": exited_at, **kept}
        if execution.first_byte_at_ms():
            facts["first"] = execution.first_byte_at_ms()
        if execution.notes:
            facts["notes"] = execution.notes
        try:
            self._journal.write(execution.id, facts)
        except OSError as error:
            polling.log(f"{execution.id}: its exit waits for the journal: {error.strerror}")
            self._poller.after(RETRY_S, lambda: self._conclude(execution, code, reason))
            return
        execution.exit, execution.reason, execution.exited_at_ms = code, reason, exited_at
        execution.state = "exited"
        if execution.reap:
            try:
                os.waitid(procs.P_PIDFD, execution.pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                pass
        if execution.pidfd >= 0:
            self._poller.off(execution.pidfd)
            os.close(execution.pidfd)
            execution.pidfd = -1
        self.by_pid.pop(execution.pid, None)
        if execution.stdin is not None:
            execution.stdin.close()
            execution.stdin = None
        for stream in execution.streams:
            stream.seal()
        self.shells.left(execution)
        if not execution.open_pipes():
            self._settled(execution)
        waiters, execution.exit_waiters = execution.exit_waiters, []
        self._tell(execution)
        heard = [call() for call in waiters]
        self._announce(execution, any(heard))

    def _pipe_closed(self, execution: Execution) -> None:
        if execution.state == "exited" and not execution.open_pipes():
            self._settled(execution)

    def _settled(self, execution: Execution) -> None:
        """It has exited and nobody holds its pipes: nothing of it needs a successor."""
        if execution.settled:
            return
        execution.settled = True
        for stream in execution.streams:
            # What refers back to us: a box remembers many commands.
            stream.closed = stream.punching = stream.noted = None
        self._active -= 1
        self._park({"drop": execution.id}, [])

    def _tombstone(self, name: str, fence: int) -> Execution:
        execution = self._new(name, fence)
        self._journal.write(name, {"fence": fence, "at": execution.started_at_ms})
        detail = "killed before it was started"
        self._conclude(execution, 137, {"kind": "killed_before_start", "detail": detail})
        return execution

    def _tell(self, execution: Execution) -> None:
        self._changed(execution)
        waiters, execution.waiters = execution.waiters, []
        for call in waiters:
            call()

    def _write(self, execution: Execution, change: dict[str, Any]) -> None:
        """Write down what is no condition for going on: a successor copes without it."""
        try:
            self._journal.write(execution.id, change)
        except OSError as error:
            polling.log(f"{execution.id}: {sorted(change)} not written down: {error.strerror}")

    # --- a successor

    def recover(self, parked: dict[str, Any], exits: dict[int, int], orphans: int, proof: bool) -> None:
        """Take up what a dead keeper left.

        `orphans` counts the commands that were started and never parked; they are dead now. The spawner starts in the
        order of the intents, so the first `orphans` of the intents without a command are lost, and the others provably
        never ran. Without proof (nobody was there to count) all of them are lost.
        """
        unanswered, new = [], []
        self.shells.recover(parked)
        for name, facts in list(self._journal.facts.items()):
            if not name or name.startswith(KEY):
                continue
            execution = self._new(name, int(facts.get("fence", 0)), facts.get("cap"))
            execution.first_ms = int(facts.get("first", 0))
            execution.started_at_ms = int(facts.get("at", 0))
            execution.box_kills = int(facts.get("oom", 0))
            execution.killed = int(facts.get("kill", 0))
            sizes = facts.get("sizes", [None, None])
            for stream, size in zip(execution.streams, sizes, strict=True):
                hole = facts.get(f"hole{stream.number}")
                stream.recover(size, (hole[0], hole[1]) if hole else None)
            self._recover_index(execution, facts)
            left = parked.pop(name, None)
            if "exit" in facts:
                self._recover_exited(execution, facts, left)
            elif left is not None and "shell" in facts:
                self.shells.recover_running(execution, facts, left)
            elif left is not None:
                self._recover_running(execution, facts, left, exits)
            elif "pid" in facts:
                procs.kill_if_same(int(facts["pid"]), int(facts.get("start", 0)))
                self.lost(execution, "its keeper and the zygote that held its pipes died")
            elif proof and self.shells.provably_new(facts):
                new.append(execution)
            else:
                unanswered.append(execution)
        for execution in unanswered[: orphans if proof else None]:
            self.lost(execution, "its keeper died while it was being started")
        for execution in [*new, *unanswered[orphans:]] if proof else []:
            self.never_ran(execution, "lost", "never started")
        for left in parked.values():  # no line of the journal speaks of it
            if "pidfd" in left.descriptors:
                procs.kill(left.descriptors["pidfd"])
            packets.close_all(left.descriptors.values())
        self.shells.resume(exits)

    def _recover_index(self, execution: Execution, facts: dict[str, Any]) -> None:
        assert execution.index is not None
        written = {stream.number: (stream.size, stream.changed_at_ms()) for stream in execution.streams if stream.size}
        execution.index.recover(facts, "exit" in facts, written)
        if any(stream.late for stream in execution.streams):
            execution.late = Index(self._directory, f"{execution.id}.late-index", 0, through=True)
            execution.late.recover({}, False, {})
            for number, size in execution.late.ends().items():
                execution.streams[number - 1].recover_late(size)

    def _recover_exited(self, execution: Execution, facts: dict[str, Any], left: Any) -> None:
        execution.state, execution.exit, execution.reason = "exited", facts["exit"], facts.get("reason")
        execution.exited_at_ms, execution.acked = facts.get("end"), int(facts.get("ack", 0))
        execution.pid, execution.notes = int(facts.get("pid", 0)), list(facts.get("notes", []))
        if left is None:
            execution.settled = True
            self._active -= 1
            return
        for stream in execution.streams:
            pipe = left.descriptors.pop(str(stream.number), -1)
            if pipe >= 0:
                stream.attach(pipe)
        packets.close_all(left.descriptors.values())
        if not execution.open_pipes():
            self._settled(execution)

    def _recover_running(self, execution: Execution, facts: dict[str, Any], left: Any, exits: dict[int, int]) -> None:
        execution.pid, execution.pidfd = left.pid, left.descriptors.pop("pidfd")
        if "pid" not in facts:
            self._write(execution, {"pid": left.pid, "start": procs.start_time(left.pid) or 0})
        self.run(execution, left.descriptors)
        if left.pid in exits:
            self.ended(execution, exits[left.pid])
