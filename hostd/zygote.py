"""The zygote: forks keepers, and keeps what a keeper's successor needs.

In charge of: one keeper per slot, alive; the descriptors keepers park here (pidfds and pipe ends of running commands,
the listening socket); being the last parent of commands whose keeper died, and telling the successor their exits;
making sure, before a successor is forked, that nothing the dead keeper started unannounced is still running.
Not in charge of: anything a client says. It reads messages of hostd (trusted) and of keepers (bounded, never believed
beyond their own slot), and holds no secret, because every keeper is a fork of it.

Started by keeper_spec.start_zygote as `zygote`, root, in the machine's mount namespace, one thread, lean imports.

A slot:   alive --keeper dies--> clearing --nothing left of it--> alive (successor)
                                     `-- deadline: kept clearing, those who wait are told `busy`
"""

from __future__ import annotations

import _socket
import errno
import gc
import os
import select
import time

from hostd import packets, polling, procs
from hostd.keeper import Inheritance, Parked, keep
from hostd.procs import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_PARKED = 2048
"""Commands one keeper may park here; far above what it runs at once."""
CLEAR_TRY_S = 0.003
CLEAR_DEADLINE_S = 5.0
"""How long one restart request waits for a dead keeper's leftovers to die (a frozen box's cannot)."""
QUICK_DEATHS, QUICK_DEATHS_S, BACK_OFF_S = 20, 10.0, 1.0
"""So many deaths within so many seconds, and the next successor has to wait."""
FORGET_WAIT_MS = 1000


class Slot:
    """What is known of one box's keeper."""

    def __init__(self, spec: dict[str, Any], descriptors: list[tuple[str, int]]) -> None:
        self.spec = spec
        self.name: str = spec["slot"]
        self.descriptors = descriptors
        self.pid = 0
        self.start = 0
        self.pidfd = -1
        self.link: _socket.socket | None = None  # to the keeper; None while it is dead
        self.ours = True  # we are the keeper's parent; False for one adopted from a dead zygote
        self.alive = False
        self.parked: dict[str, Parked] = {}
        self.exits: dict[int, int] = {}  # host pid -> wait status of parked commands we reaped
        self.spawner = 0  # host pid
        self.spawner_pidfd = -1
        self.orphans = 0  # commands that were started and never parked, found dead or killed by us
        self.waiting: list[tuple[_socket.socket, float]] = []  # restart requests, with their deadlines
        self.deaths: list[float] = []

    def owns(self, uid: int) -> bool:
        """Is this one of the box's or its keeper's uids?"""
        return bool(uid == self.spec["uid"] or 0 <= uid - self.spec["uid_base"] < 65536)

    def drop(self, execution: str) -> None:
        """Close what is parked for one command."""
        parked = self.parked.pop(execution, None)
        if parked is not None:
            packets.close_all(parked.descriptors.values())
            self.exits.pop(parked.pid, None)

    def close(self) -> None:
        """Close everything."""
        for execution in list(self.parked):
            self.drop(execution)
        packets.close_all(descriptor for _, descriptor in self.descriptors)
        packets.close_all(d for d in (self.pidfd, self.spawner_pidfd) if d >= 0)
        self.pidfd = self.spawner_pidfd = -1
        if self.link is not None:
            self.link.close()
            self.link = None


class Zygote:
    """The process's whole state."""

    def __init__(self, listener: _socket.socket) -> None:
        self.poller = polling.Poller()
        self.listener = listener
        self.slots: dict[str, Slot] = {}
        self.area = procs.command_line_area()
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signals.signal(signals.SIGCHLD, lambda *_: None)
        signals.set_wakeup_fd(self.wake_write, warn_on_full_buffer=False)
        self.poller.on(self.wake_read, self._on_child)
        self.poller.on(listener.fileno(), self._on_connect)
        self.operations = {
            "start": self._start,
            "restart": self._restart,
            "adopt": self._adopt,
            "forget": self._forget,
            "report": self._report,
        }

    # --- hostd

    def _on_connect(self, events: int) -> None:
        conn = packets.accept(self.listener)
        self.poller.on(conn.fileno(), lambda _: self._on_hostd(conn))

    def _on_hostd(self, conn: _socket.socket) -> None:
        try:
            message, descriptors = packets.receive(conn)
        except packets.Malformed as error:
            self._reply(conn, {"error": {"code": "bad_request", "message": str(error)}})
            return
        if message is None:
            self.poller.off(conn.fileno())
            for slot in self.slots.values():
                slot.waiting = [(c, deadline) for c, deadline in slot.waiting if c is not conn]
            conn.close()
            return
        try:
            operation = self.operations.get(str(message.get("op")))
            if operation is None:
                raise Refused("bad_request", f"no operation {message.get('op')!r}")
            reply = operation(conn, message, descriptors)
        except Refused as refusal:
            packets.close_all(descriptors)
            reply = {"error": {"code": refusal.code, "message": str(refusal)}}
        except (OSError, KeyError, TypeError, ValueError) as error:
            polling.log_exception(error)
            reply = {"error": {"code": "internal", "message": f"{type(error).__name__}: {error}"}}
        if reply is not None:
            self._reply(conn, reply)

    @staticmethod
    def _reply(conn: _socket.socket, message: dict[str, Any]) -> None:
        try:
            packets.send(conn, message, wait=False)
        except OSError as error:
            polling.log(f"a reply to hostd was lost: {error}")

    def _start(self, conn: _socket.socket, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        spec, roles = message["spec"], message["roles"]
        if len(roles) != len(descriptors):
            raise Refused("bad_request", f"{len(roles)} roles for {len(descriptors)} descriptors")
        if spec["slot"] in self.slots:
            raise Refused("exists", f"slot {spec['slot']} has a keeper")
        if "listen" not in roles or "out" not in roles or "init" not in roles:
            raise Refused("bad_request", "a keeper needs the descriptors listen, out and init")
        slot = Slot(spec, list(zip(roles, descriptors, strict=True)))
        self._fork(slot, proof=True)
        self.slots[slot.name] = slot
        return self._where(slot)

    def _restart(self, conn: _socket.socket, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        slot = self._slot(message)
        if slot.alive and self._is_dead(slot):
            self._died(slot)
        # A dying one closes hostd's link before it can be waited for: that moment must not count as life.
        if slot.alive and not procs.exiting(slot.pid):
            return self._where(slot)
        slot.waiting.append((conn, time.monotonic() + CLEAR_DEADLINE_S))
        return None

    def _adopt(self, conn: _socket.socket, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        spec, roles = message["spec"], message["roles"]
        if len(descriptors) != len(roles) + 1:
            raise Refused("bad_request", f"{len(roles)} roles for {len(descriptors)} descriptors")
        if spec["slot"] in self.slots:
            raise Refused("exists", f"slot {spec['slot']} has a keeper")
        pidfd = os.pidfd_open(message["pid"])
        if procs.start_time(message["pid"]) != message["start"]:
            os.close(pidfd)
            raise Refused("unknown_slot", f"process {message['pid']} is not that keeper any more")
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, descriptors.pop())
        slot = Slot(spec, list(zip(roles, descriptors, strict=True)))
        slot.pid, slot.start, slot.pidfd = message["pid"], message["start"], pidfd
        slot.ours, slot.alive = False, True
        self.slots[slot.name] = slot
        self._watch(slot, link)
        return self._where(slot)

    def _forget(self, conn: _socket.socket, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        slot = self.slots.pop(str(message.get("slot")), None)
        if slot is None:
            return {"ok": True}
        for waiter, _ in slot.waiting:
            self._reply(waiter, {"error": {"code": "unknown_slot", "message": "the slot was forgotten meanwhile"}})
        for pidfd in (slot.pidfd, slot.spawner_pidfd):
            if pidfd >= 0:
                _kill(pidfd)
        if slot.pidfd >= 0:
            poll = select.poll()
            poll.register(slot.pidfd, select.POLLIN)
            poll.poll(FORGET_WAIT_MS)
        self._unlink(slot)
        if slot.pidfd >= 0:
            self.poller.off(slot.pidfd)
        slot.close()
        return {"ok": True}

    def _report(self, conn: _socket.socket, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        slots = {
            slot.name: {"pid": slot.pid, "start": slot.start, "parked": len(slot.parked), "alive": slot.alive}
            for slot in self.slots.values()
        }
        return {"ok": True, "pid": os.getpid(), "slots": slots}

    def _slot(self, message: dict[str, Any]) -> Slot:
        try:
            return self.slots[message["slot"]]
        except (KeyError, TypeError):
            raise Refused("unknown_slot", f"no slot {message.get('slot')!r}") from None

    @staticmethod
    def _where(slot: Slot) -> dict[str, Any]:
        return {"ok": True, "pid": slot.pid, "start": slot.start}

    # --- keepers

    def _watch(self, slot: Slot, link: _socket.socket) -> None:
        slot.link = link
        self.poller.on(link.fileno(), lambda _: self._read_keeper(slot))
        if not slot.ours:
            self.poller.on(slot.pidfd, lambda _: self._died(slot))

    def _unlink(self, slot: Slot) -> None:
        if slot.link is not None:
            self.poller.off(slot.link.fileno())
            slot.link.close()
            slot.link = None

    def _read_keeper(self, slot: Slot) -> bool:
        """Take one message; False when there is none (any more). Closes the link when it is at its end."""
        if slot.link is None:
            return False
        try:
            message, descriptors = packets.receive(slot.link, wait=False)
        except packets.Malformed as error:
            polling.log(f"keeper of {slot.name}: {error}")
            return True
        except OSError as error:
            return error.errno == errno.EINTR
        if message is None:
            self._unlink(slot)
            return False
        try:
            self._take(slot, message, descriptors)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            polling.log_exception(error)
            packets.close_all(descriptors)
        return True

    def _take(self, slot: Slot, message: dict[str, Any], descriptors: list[int]) -> None:
        """park | drop one descriptor | drop all of a command | the spawner's process | the listening socket."""
        if "park" in message:
            if len(slot.parked) >= MAX_PARKED or len(message["roles"]) != len(descriptors):
                packets.close_all(descriptors)
                return
            slot.drop(message["park"])
            named = dict(zip(message["roles"], descriptors, strict=True))
            slot.parked[message["park"]] = Parked(int(message["pid"]), named)
        elif "unpark" in message:
            parked = slot.parked.get(message["unpark"])
            if parked is not None and message["role"] in parked.descriptors:
                os.close(parked.descriptors.pop(message["role"]))
        elif "drop" in message:
            slot.drop(message["drop"])
        elif "spawner" in message:
            packets.close_all(d for d in (slot.spawner_pidfd,) if d >= 0)
            slot.spawner, (slot.spawner_pidfd,) = int(message["spawner"]), descriptors
        elif "listen" in message:
            packets.close_all(d for role, d in slot.descriptors if role == "listen")
            (descriptor,) = descriptors
            slot.descriptors = [(r, d) for r, d in slot.descriptors if r != "listen"] + [("listen", descriptor)]
        else:
            packets.close_all(descriptors)

    def _fork(self, slot: Slot, proof: bool) -> None:
        """Fork the slot's keeper, which inherits everything known of the slot."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signals.set_wakeup_fd(-1)
                signals.signal(signals.SIGCHLD, signals.SIG_DFL)
                mine = [d for _, d in slot.descriptors]
                mine += [d for parked in slot.parked.values() for d in parked.descriptors.values()]
                procs.close_others([theirs.fileno(), *mine])
                procs.set_command_line(self.area, "keeper")
                keep(
                    Inheritance(
                        spec=slot.spec,
                        descriptors=slot.descriptors,
                        link=theirs,
                        parked=slot.parked,
                        exits=slot.exits,
                        orphans=slot.orphans,
                        proof=proof,
                        area=self.area,
                    )
                )
            except BaseException as error:
                polling.log_exception(error)
            finally:
                os._exit(code)
        theirs.close()
        packets.close_all(d for d in (slot.pidfd, slot.spawner_pidfd) if d >= 0)
        slot.pid, slot.start, slot.pidfd = pid, procs.start_time(pid) or 0, os.pidfd_open(pid)
        slot.spawner, slot.spawner_pidfd, slot.orphans = 0, -1, 0
        slot.ours = slot.alive = True
        self._watch(slot, ours)

    # --- deaths

    @staticmethod
    def _is_dead(slot: Slot) -> bool:
        poll = select.poll()
        poll.register(slot.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def _on_child(self, events: int) -> None:
        try:
            os.read(self.wake_read, 4096)
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if seen is None:
                return
            self._bury(seen.si_pid)

    def _bury(self, pid: int) -> None:
        """Reap one dead child, after finding out whose it was: a zombie still has its uid, a reaped one nothing."""
        uid = procs.real_uid(pid)
        slot = next((s for s in self.slots.values() if s.pid == pid and s.ours), None)
        if slot is not None:
            os.waitpid(pid, 0)
            if slot.alive:
                self._died(slot)
            return
        slot = next((s for s in self.slots.values() if uid is not None and s.owns(uid)), None)
        _, status = os.waitpid(pid, 0)
        if slot is None:
            return
        while self._read_keeper(slot):  # it may be in a message that we have not read yet
            pass
        if pid == slot.spawner or uid == slot.spec["uid"]:
            return  # the spawner, or what was about to become one
        if not any(parked.pid == pid for parked in slot.parked.values()):
            slot.orphans += 1
            return
        slot.exits[pid] = status
        if slot.link is not None and slot.alive:
            try:
                packets.send(slot.link, {"exited": pid, "status": status}, wait=False)
            except OSError as error:
                polling.log(f"keeper of {slot.name}: the exit of {pid} was not taken: {error}")

    def _died(self, slot: Slot) -> None:
        """The keeper is dead: read what it still said, then clear up behind it."""
        while self._read_keeper(slot):
            pass
        self._unlink(slot)
        self.poller.off(slot.pidfd)
        slot.alive = False
        now = time.monotonic()
        slot.deaths = [t for t in slot.deaths if now - t < QUICK_DEATHS_S] + [now]
        polling.log(f"keeper {slot.pid} of {slot.name} died; {len(slot.parked)} commands parked")
        self.poller.after(0, lambda: self._clear(slot))

    def _clear(self, slot: Slot) -> None:
        """Kill the dead keeper's spawner and unannounced children; when none is left, fork the successor.

        The order matters: the spawner may still start what it had been asked, so nothing is known until it is gone.
        """
        if self.slots.get(slot.name) is not slot or slot.alive:
            return
        if slot.spawner_pidfd >= 0:
            _kill(slot.spawner_pidfd)
        self._reap()  # the dead count as well: they are the proof of what had been started
        strangers = self._strangers(slot)
        for pid in strangers:
            try:
                os.kill(pid, signals.SIGKILL)
            except ProcessLookupError:
                pass
        now = time.monotonic()
        if not any(role == "listen" for role, _ in slot.descriptors):
            self._give_up(slot)
            return
        if not strangers and (len(slot.deaths) < QUICK_DEATHS or now - slot.deaths[-1] > BACK_OFF_S):
            try:
                self._fork(slot, proof=slot.ours)
            except OSError as error:
                polling.log(f"no successor for {slot.name} yet: {error}")
            else:
                for conn, _ in slot.waiting:
                    self._reply(conn, self._where(slot))
                slot.waiting = []
                return
        late = [conn for conn, deadline in slot.waiting if now > deadline]
        slot.waiting = [(conn, deadline) for conn, deadline in slot.waiting if now <= deadline]
        for conn in late:
            text = f"{len(strangers)} processes of the dead keeper are still alive after {CLEAR_DEADLINE_S:g} s"
            self._reply(conn, {"error": {"code": "busy", "message": text}})
        self.poller.after(CLEAR_TRY_S if now - slot.deaths[-1] < 1 else 0.1, lambda: self._clear(slot))

    def _give_up(self, slot: Slot) -> None:
        """An adopted keeper died before it had parked its listening socket: hostd has to start one anew."""
        for conn, _ in slot.waiting:
            text = "the keeper died before it had introduced itself to this zygote"
            self._reply(conn, {"error": {"code": "unknown_slot", "message": text}})
        del self.slots[slot.name]
        slot.close()

    def _strangers(self, slot: Slot) -> list[int]:
        """Return living children of the dead keeper that it never parked.

        They are our children now. Behind an adopted keeper they are somebody else's; there the box's processes whose
        parent is outside the box are looked for in the whole machine.
        """
        known = {parked.pid for parked in slot.parked.values()}
        if slot.ours:
            candidates = [pid for pid in procs.children() if pid not in known]
            return [pid for pid in candidates if slot.owns(procs.real_uid(pid) or 0) and procs.start_time(pid)]
        found = []
        inside = procs.pid_namespace(slot.spec["init_pid"])
        if inside is None:
            return []  # with its init everybody in the box is dead
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) in known or int(entry) == slot.spec["init_pid"]:
                continue
            pid = int(entry)
            if procs.pid_namespace(pid) != inside or procs.start_time(pid) is None:
                continue
            parent = procs.parent(pid)
            if parent is not None and procs.pid_namespace(parent) != inside:
                found.append(pid)
        return found


class Refused(Exception):
    """A request of hostd that is answered with an error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _kill(pidfd: int) -> None:
    try:
        signals.pidfd_send_signal(pidfd, signals.SIGKILL)
    except ProcessLookupError:
        pass


def main(listen_fd: int) -> None:
    """Serve for ever on a listening SEQPACKET socket."""
    procs.set_name("zygote")
    procs.set_command_line(procs.command_line_area(), "zygote")
    procs.prctl(procs.PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(listen_fd, False)
    procs.raise_descriptor_limit()
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, listen_fd)
    zygote = Zygote(listener)
    gc.collect()
    gc.freeze()  # keepers are forks: a collection must not touch the pages they share
    zygote.poller.run()
