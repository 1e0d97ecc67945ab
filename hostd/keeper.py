"""The keeper: the process outside a box that holds everything its commands depend on.

In charge of: putting the parts together (commands, spawner, clients), the links to hostd (exit events until they are
acknowledged) and to the zygote (what is parked, who ended), and noticing the end of the box.
Not in charge of: routing (hostd), making or destroying boxes, anything on the host outside its output directory.

It runs as a uid of its own that owns the box's user namespace: towards the host it has no right at all, towards its box
every one. It may be killed at any time; the zygote forks a successor that continues from the journal and from what was
parked.
"""

from __future__ import annotations

import _socket
import gc
import os
import struct
import time

from hostd import packets, polling, procs, requests
from hostd.activity import Activity
from hostd.attended import Attendances
from hostd.clients import Clients
from hostd.dials import Dials
from hostd.execution import Execution, Settings
from hostd.executions import Executions
from hostd.journal import Journal
from hostd.memory import Memory
from hostd.procs import signals
from hostd.spawner import Shell
from hostd.spawner_link import SpawnerLink
from hostd.terminals import Terminals
from hostd.transfers import Transfers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_LINKS = 8
"""Connections of hostd: one, and those of a predecessor that has not ended yet."""
BACKLOG = 64
TICK_S = 10.0
PARK_S = 2
TOLD_S = 1.0
"""Whoever asked for a command has written its end down by then, and what is left to do about it is little."""
FILTER_BYTES = 1 << 19


class Parked:
    """A running command's descriptors, in the zygote's or in a successor's hands."""

    __slots__ = ("descriptors", "pid")

    def __init__(self, pid: int, descriptors: dict[str, int]) -> None:
        self.pid, self.descriptors = pid, descriptors


class Inheritance:
    """What a keeper gets from the zygote it is forked from."""

    __slots__ = ("area", "descriptors", "exits", "link", "orphans", "parked", "proof", "spec")

    def __init__(
        self,
        *,
        spec: dict[str, Any],
        descriptors: list[tuple[str, int]],
        link: _socket.socket,
        parked: dict[str, Parked],
        exits: dict[int, int],
        orphans: int,
        proof: bool,
        area: tuple[int, int],
    ) -> None:
        self.spec, self.descriptors, self.link, self.parked = spec, descriptors, link, parked
        self.exits, self.orphans, self.proof, self.area = exits, orphans, proof, area


def keep(given: Inheritance) -> None:
    """Become the keeper of a box. Never returns: runs until it is killed."""
    procs.set_name("keeper")
    for role, descriptor in given.descriptors:
        if role == "keeper_cgroup":
            os.write(descriptor, b"0")
        elif role == "init":
            try:
                # The machine owns the box's network, so that the box's root has no power over it; only root may enter.
                procs.setns(descriptor, procs.NETWORK_NAMESPACE)
            except ProcessLookupError:
                pass  # the box has ended: nothing will be started in it
    uid = int(given.spec["uid"])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.umask(0o077)
    for number in (signals.SIGPIPE, signals.SIGINT, signals.SIGTERM, signals.SIGHUP):
        signals.signal(number, signals.SIG_IGN)
    keeper = Keeper(given)
    gc.collect()
    gc.freeze()
    keeper.poller.run()


def _bound_sends(sock: _socket.socket) -> None:
    """A zygote that reads nothing must not stop the box: after a while we go on without parking."""
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", PARK_S, 0))


class HostdLink:
    """One connection of hostd: events wait here until its queue takes them."""

    __slots__ = ("box_exit", "exits", "sock", "texts", "waiting")

    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock
        self.texts: list[dict[str, Any]] = []
        self.exits: dict[str, None] = {}  # ids, in order; the event is made when it is sent
        self.box_exit = False
        self.waiting = False


class Keeper:
    """The process's whole state."""

    def __init__(self, given: Inheritance) -> None:
        spec = given.spec
        self.slot: str = spec["slot"]
        self.poller = polling.Poller()
        one = dict(given.descriptors)
        self._init, self._out = one["init"], one["out"]
        self._memory = Memory(one.get("oom", -1), one.get("memory", -1))
        self._zygote: _socket.socket | None = given.link
        _bound_sends(given.link)
        self._spawner_process: tuple[int, int] | None = None
        self._links: list[HostdLink] = []
        self._told: list[Execution] = []  # exits to be announced later
        self._listener = self._listen(one["listen"])
        self.journal = Journal(self._out)
        if spec["box"] and not self.box():
            self.journal.write("", {"box": spec["box"]})
        self._init_pid = int(spec["init_pid"])
        ended = self.facts().get("box_exit")
        if ended and ended.get("init") != self._init_pid:  # it was started anew on the same disk
            self.journal.write("", {"box_exit": None, "box_exit_ack": None})
        program = os.pread(one["seccomp"], FILTER_BYTES, 0) if "seccomp" in one else b""
        cgroups = [descriptor for role, descriptor in given.descriptors if role == "box_cgroup"]
        shell = Shell(cgroups, self._init, program, int(spec["capabilities"]), given.area)
        self.spawner = SpawnerLink(self.poller, shell, self._spawner_born, self._pids, self._tell_spawner)
        self.executions = Executions(
            self.poller,
            self._out,
            self.journal,
            self.spawner,
            Settings(spec),
            self._memory,
            lambda: procs.exiting(self._init_pid),
            self._park,
            self._exited,
        )
        self.terminals = Terminals(self.poller, self.spawner)
        self.dials = Dials(self.poller, lambda: self.executions.box_gone)
        transfers, attendances = Transfers(self.poller, self.spawner), Attendances(self.poller, self.spawner)
        served = lambda: transfers.active + attendances.active  # noqa: E731
        self.activity = Activity(self.executions, self.terminals, served)
        others: dict[str, Any] = {
            "file": transfers.start,
            "run": attendances.start,
            "activity": self.activity.handle,
            "terminal": self.terminals.handle,
            "dial": self.dials.start,
        }
        self.clients = Clients(self.poller, self.executions, others, self.box)
        self._kills_before = self._memory.kills()
        self.poller.on(given.link.fileno(), lambda _: self._on_zygote())
        self.executions.recover(given.parked, given.exits, given.orphans, given.proof)
        if self.facts().get("box_exit"):
            self.executions.box_gone = self.spawner.stopped = True
        else:
            self.poller.on(self._init, lambda _: self._box_gone())
            self.spawner.make()
        self.poller.after(TICK_S, self._tick)

    def _listen(self, inherited: int) -> _socket.socket:
        """Listen, which stamps our pid as the peer's for whoever connects from now on."""
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, inherited)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        self.poller.on(listener.fileno(), lambda _: self._on_connect())
        return listener

    def facts(self) -> dict[str, Any]:
        """Return what the journal says of the box itself."""
        return self.journal.facts.get("", {})

    def box(self) -> str | None:
        """Return the devbox's id, None for a warm box without a name."""
        name = self.facts().get("box")
        return str(name) if name else None

    def _pids(self) -> set[int]:
        return self.executions.pids()

    def _tick(self) -> None:
        self.poller.after(TICK_S, self._tick)
        self.clients.sweep()
        self.terminals.sweep()
        self.dials.sweep()
        self.spawner.bury_strangers()
        self.executions.tidy()
        self.activity.look()
        self._kills_before = self._memory.kills()

    # --- the box's end

    def _box_gone(self) -> None:
        self.poller.off(self._init)
        self.executions.box_gone = True
        self._announce_told()  # exits before the end of the box
        oom = self._memory.kills() > self._kills_before
        self.journal.write("", {"box_exit": {"init": self._init_pid, "oom": oom, "at_ms": int(time.time() * 1000)}})
        self.spawner.stop()
        self.terminals.box_gone()
        self.dials.box_gone()
        for link in self._links:
            link.box_exit = True
            self._flush(link)

    # --- zygote

    def _park(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if self._zygote is None:
            return
        try:
            packets.send(self._zygote, message, descriptors)
        except OSError as error:
            polling.log(f"not parked: {error}")

    def _spawner_born(self, pid: int, pidfd: int) -> None:
        self._spawner_process = (pid, pidfd)
        self._park({"spawner": pid}, [pidfd])

    def _on_zygote(self) -> None:
        assert self._zygote is not None
        try:
            message, descriptors = packets.receive(self._zygote, wait=False)
        except (BlockingIOError, packets.Malformed):
            return
        packets.close_all(descriptors)
        if message is None:
            # The zygote is dead. We go on without a net until hostd introduces a new one.
            self.poller.off(self._zygote.fileno())
            self._zygote.close()
            self._zygote = None
        elif "exited" in message:
            execution = self.executions.by_pid.get(message["exited"])
            if execution is not None:
                self.executions.ended(execution, int(message["status"]))
            else:
                self.executions.shells.exited(int(message["exited"]), int(message["status"]))

    def _meet_zygote(self, descriptor: int) -> None:
        if self._zygote is not None:
            self.poller.off(self._zygote.fileno())
            self._zygote.close()
        self._zygote = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, descriptor)
        _bound_sends(self._zygote)
        self.poller.on(descriptor, lambda _: self._on_zygote())
        self._park({"listen": True}, [self._listener.fileno()])
        if self._spawner_process is not None:
            try:
                self._park({"spawner": self._spawner_process[0]}, [self._spawner_process[1]])
            except OSError:
                pass
        self.executions.park_all()

    # --- hostd

    def _on_connect(self) -> None:
        try:
            sock = packets.accept(self._listener)
        except BlockingIOError:
            return
        while len(self._links) >= MAX_LINKS:
            self._unlink(self._links[0])
        link = HostdLink(sock)
        self._links.append(link)
        self.poller.on(sock.fileno(), lambda events: self._on_hostd(link, events))
        running = sum(e.state != "exited" for e in self.executions.known.values())
        unacknowledged = self.executions.unacknowledged()
        hello = {"event": "hello", "slot": self.slot, "box": self.box(), "pid": os.getpid()}
        link.texts.append({**hello, "running": running, "exited": len(unacknowledged)})
        link.exits = dict.fromkeys(e.id for e in unacknowledged)
        link.box_exit = bool(self.facts().get("box_exit")) and not self.facts().get("box_exit_ack")
        self._flush(link)

    def _on_hostd(self, link: HostdLink, events: int) -> None:
        if events & polling.WRITE:
            self._flush(link)
        if not events & (polling.READ | polling.HANGUP) or link not in self._links:
            return
        try:
            message, descriptors = packets.receive(link.sock, wait=False)
        except BlockingIOError:
            return
        except packets.Malformed as error:
            polling.log(f"from hostd: {error}")
            return
        if message is None:
            self._unlink(link)
            return
        try:
            self._from_hostd(message, descriptors)
        except (KeyError, TypeError, ValueError, OSError) as error:
            polling.log_exception(error)
            packets.close_all(descriptors)

    def _from_hostd(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "connection" in message:
            (descriptor,) = descriptors
            self.clients.take(descriptor, message["connection"], requests.decoded_rest(message))
        elif "ack" in message:
            for name in message["ack"]:
                if name == "box":
                    self.journal.write("", {"box_exit_ack": True})
                else:
                    self.executions.ack(name)
        elif "box" in message:
            name = message["box"]
            if not isinstance(name, str) or not requests.is_id(name):
                raise ValueError(f"a box cannot be called {name!r}")
            if self.box() not in (None, name):
                raise ValueError(f"the box is {self.box()} already, not {name}")
            if self.box() is None:
                self.journal.write("", {"box": name})
        elif "zygote" in message:
            (descriptor,) = descriptors
            self._meet_zygote(descriptor)

    def _unlink(self, link: HostdLink) -> None:
        self.poller.off(link.sock.fileno())
        link.sock.close()
        self._links.remove(link)

    def _exited(self, execution: Execution, told: bool) -> None:
        self.activity.note(execution.id)
        self._announce(execution, told)

    def _announce(self, execution: Execution, told: bool) -> None:
        """Tell hostd of an exit; one that went out with the answer to its spawn is told later, together with others."""
        if told:
            if not self._told:
                self.poller.after(TOLD_S, self._announce_told)
            self._told.append(execution)
            return
        for link in list(self._links):
            link.exits[execution.id] = None
            self._flush(link)

    def _announce_told(self) -> None:
        told, self._told = self._told, []
        for execution in told:
            self._announce(execution, False)

    def _tell_spawner(self, state: str, detail: str) -> None:
        for link in list(self._links):
            if len(link.texts) < 16:
                link.texts.append({"event": "spawner", "state": state, "detail": detail})
                self._flush(link)

    def _flush(self, link: HostdLink) -> None:
        """Send what waits, as far as hostd's queue takes it."""
        try:
            while link.texts:
                packets.send(link.sock, link.texts[0], wait=False)
                link.texts.pop(0)
            while link.exits:
                name = next(iter(link.exits))
                execution = self.executions.known.get(name)
                if execution is not None and not execution.acked:
                    packets.send(link.sock, self._exit_event(execution), wait=False)
                del link.exits[name]
            if link.box_exit:
                gone = self.facts()["box_exit"]
                event = {"event": "box_exit", "box": self.box(), "exit": -1, "oom": gone["oom"], "at_ms": gone["at_ms"]}
                packets.send(link.sock, event, wait=False)
                link.box_exit = False
        except BlockingIOError:
            if not link.waiting:
                link.waiting = True
                self.poller.change(link.sock.fileno(), polling.READ | polling.WRITE)
            return
        except OSError:
            self._unlink(link)
            return
        if link.waiting:
            link.waiting = False
            self.poller.change(link.sock.fileno(), polling.READ)

    def _exit_event(self, execution: Execution) -> dict[str, Any]:
        shape = self.executions.shape(execution)
        del shape["state"]
        return {"event": "exit", "box": self.box(), **shape}
