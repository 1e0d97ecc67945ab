"""The keeper's end of a spawner: ask it, believe little of it, replace it.

In charge of: at most IN_FLIGHT orders with a spawner at a time and the others in a queue; a bound on every answer; a
new spawner when one dies; who is lost then and who is simply asked again.
Not in charge of: what an order is for (executions.py), what a spawner does (spawner.py).

Who is lost: the spawner answers each order before it takes the next, so when it dies at most one command was started
and not reported: the first unanswered one. If the keeper then has a child it does not know, that is it (it is killed,
and its order is lost). If it has none, no unanswered order was ever begun, and all of them are asked again. A box's own
process can make itself the keeper's child (CLONE_PARENT), and by that have one order called lost that was not begun.
"""

from __future__ import annotations

import _socket
import os
import time

from hostd import packets, polling, procs, spawner, streams
from hostd.procs import signals
from hostd.requests import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

IN_FLIGHT = 8
QUEUED = 1024
ANSWER_S = 5.0
"""A spawner that has not answered for so long has been stopped by somebody, and is killed."""
GIVE_UP_S = 10.0
"""If no spawner comes up for so long, orders are refused."""
BACK_OFF_S = (0.0, 0.005, 0.02, 0.1, 0.5, 1.0)
KILL_WAIT_S = 0.3
LONG_BYTES = 120_000
ROLES = frozenset(("pidfd", "1", "2", "stdin", "hold", "program", "status", "master"))


class Order:
    """One command to be started. Exactly one of started, failed and lost is called, once."""

    __slots__ = (
        "before",
        "descriptor",
        "exec_failed",
        "failed",
        "lost",
        "message",
        "needs",
        "number",
        "repeatable",
        "since",
        "started",
    )

    def __init__(self, message: dict[str, Any], descriptor: int | None) -> None:
        self.message, self.descriptor = message, descriptor
        self.number = 0
        self.repeatable = True  # may be asked again of another spawner when it provably never ran
        self.needs = frozenset(("pidfd",))  # the roles without which an answer is senseless
        self.since = time.monotonic()
        self.before: Callable[[], None]  # just before it is asked for the first time; may raise Refused
        self.started: Callable[[int, dict[str, int]], None]  # pidfd, -1 if no process was needed; ends by role
        self.failed: Callable[[str, str], None]  # it provably never ran
        self.lost: Callable[[str], None]
        self.exec_failed: Callable[[str], None]

    def close(self) -> None:
        """Give up the descriptor of its input."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class SpawnerLink:
    """Orders in, commands out."""

    def __init__(
        self,
        poller: polling.Poller,
        shell: spawner.Shell,
        born: Callable[[int, int], None],
        known_pids: Callable[[], set[int]],
        tell: Callable[[str, str], None],
    ) -> None:
        self._poller, self._shell, self._born, self._known_pids, self._tell = poller, shell, born, known_pids, tell
        self._sock: _socket.socket | None = None
        self._carrier = 0
        self._pid, self._pidfd = 0, -1
        self._up = False
        self._watched = False
        self._tries = 0
        self._timer: polling.Timer | None = None
        self._counter = 0
        self._asked: dict[int, Order] = {}  # number -> order, in the order they were asked
        self._queue: list[Order] = []
        self._recent: dict[int, Order] = {}  # started, perhaps about to tell that they cannot exec
        self.stopped = False  # the box is gone

    def ask(self, order: Order) -> None:
        """Have a command started. Raises nothing: a full queue is told by `failed`."""
        if len(self._queue) >= QUEUED:
            order.close()
            order.failed("busy", f"{QUEUED} commands wait to be started")
            return
        self._queue.append(order)
        if self._sock is None and self._timer is None:
            self._make()
        elif self._up:
            self._feed()

    def make(self) -> None:
        """Have a spawner ready before the first order."""
        if self._sock is None and self._timer is None:
            self._make()

    def read_waiting(self) -> None:
        """Take the messages that have come already: a failed exec is told before the exit can be seen."""
        while self._sock is not None and self._read():
            pass

    def stop(self) -> None:
        """The box is gone: start nothing any more."""
        self.stopped = True
        if self._sock is not None:
            self._gone("the box stopped")
        self._refuse_all("not_ready", "the box has stopped")

    # --- birth

    def _make(self) -> None:
        self._timer = None
        if self.stopped:
            self._refuse_all("not_ready", "the box has stopped")
            return
        self._sock, self._carrier = spawner.give_birth(self._shell)
        self._pid, self._pidfd, self._up = 0, -1, False
        self._poller.on(self._sock.fileno(), lambda _: self._readable())
        self._watched = False
        self._watch()

    def _watch(self, seconds: float = ANSWER_S) -> None:
        """Have a look some time from now: armed only while something is awaited, so an idle keeper sleeps."""
        sock = self._sock
        if not self._watched and sock is not None:
            self._watched = True
            self._poller.after(seconds, lambda: self._check(sock))

    def _check(self, sock: _socket.socket) -> None:
        """Is it still answering?"""
        if self._sock is not sock:
            return
        self._watched = False
        now = time.monotonic()
        oldest = next(iter(self._asked.values()), None)
        if not self._up:
            self._gone(f"not up after {ANSWER_S:g} s")
        elif oldest is not None and now - oldest.since > ANSWER_S:
            self._gone(f"no answer for {ANSWER_S:g} s")
        elif oldest is not None:
            self._watch(max(0.05, oldest.since + ANSWER_S - now))

    def _readable(self) -> None:
        for _ in range(IN_FLIGHT * 2):
            if not self._read():
                return

    def _read(self) -> bool:
        """Take one message; False when there is none now, or the spawner is gone."""
        sock = self._sock
        if sock is None:
            return False
        try:
            message, descriptors = packets.receive(sock, wait=False)
        except BlockingIOError:
            return False
        except packets.Malformed as error:
            self._gone(str(error))
            return False
        except OSError as error:
            self._gone(str(error))
            return False
        if message is None:
            self._gone("it ended")
            return False
        try:
            self._take(message, descriptors)
        except (KeyError, TypeError, ValueError, OSError) as error:
            packets.close_all(descriptors)
            self._gone(f"a senseless answer: {type(error).__name__} {error}")
            return False
        return self._sock is sock

    def _take(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if "born" in message:
            self._pid = int(message["born"])
            self._pidfd = os.pidfd_open(self._pid)
            self._bury_carrier()
            self._born(self._pid, self._pidfd)
        elif "up" in message:
            self._up, self._tries = True, 0
            self._tell("up", "")
        elif "trouble" in message:
            raise ValueError(str(message["trouble"])[:500])
        elif "exec_failed" in message:
            order = self._asked.get(message["exec_failed"]) or self._recent.get(message["exec_failed"])
            if order is not None:
                order.exec_failed(str(message["detail"])[:500])
        elif "failed" in message:
            order = self._asked.pop(message["n"])
            order.close()
            order.failed("internal", f"the box refused to start it: {str(message['failed'])[:200]}")
        else:
            self._started(message, descriptors)
        if self._up and self._pid:
            self._feed()

    def _started(self, message: dict[str, Any], descriptors: list[int]) -> None:
        roles = message["ends"]
        if len(roles) != len(descriptors) or not ROLES.issuperset(roles) or len(set(roles)) != len(roles):
            raise ValueError(f"{len(descriptors)} descriptors for {roles!r}")
        ends = dict(zip(roles, descriptors, strict=True))
        order = self._asked[message["n"]]
        if not order.needs.issubset(ends) or ("master" in ends) != ("terminal" in order.message):
            raise ValueError(f"{roles!r} where {sorted(order.needs)} are needed")
        pidfd = ends.pop("pidfd", -1)
        if pidfd >= 0 and procs.pid_of(pidfd) <= 0:
            raise ValueError("not a process")
        kinds = {"master": procs.is_master, "status": streams.is_socket}
        if not all(kinds.get(role, streams.is_pipe)(end) for role, end in ends.items()):
            raise ValueError("not what belongs to a process")
        del self._asked[message["n"]]
        order.close()
        self._recent[message["n"]] = order
        while len(self._recent) > IN_FLIGHT * 8:
            self._recent.pop(next(iter(self._recent)))
        order.started(pidfd, ends)

    # --- orders

    def _feed(self) -> None:
        while self._queue and len(self._asked) < IN_FLIGHT and self._sock is not None and self._up and self._pid:
            order = self._queue.pop(0)
            if not order.number:
                try:
                    order.before()
                except Refused as refusal:
                    order.close()
                    order.failed(refusal.code, str(refusal))
                    continue
                self._counter += 1
                order.number = self._counter
            order.since = time.monotonic()
            self._asked[order.number] = order
            self._watch()
            try:
                self._send(order)
            except OSError as error:
                self._gone(str(error))
                return

    def _send(self, order: Order) -> None:
        assert self._sock is not None
        message = {"n": order.number, **order.message}
        given = [order.descriptor] if order.descriptor is not None else []
        text = packets.dumps(message)
        if len(text) <= LONG_BYTES:
            packets.send(self._sock, message, given)
            return
        long = os.memfd_create("request", os.MFD_CLOEXEC)
        try:
            view = memoryview(text)
            while view:
                view = view[os.write(long, view) :]
            packets.send(self._sock, {"long": True}, [long, *given])
        finally:
            os.close(long)

    # --- death

    def _bury_carrier(self) -> None:
        if self._carrier:
            carrier, self._carrier = self._carrier, 0
            _reap(carrier, KILL_WAIT_S)

    def _gone(self, why: str) -> None:
        """The spawner is dead or has to be: find out who is lost, make another one."""
        sock = self._sock
        assert sock is not None
        self._poller.off(sock.fileno())
        if self._carrier:
            try:
                os.kill(self._carrier, signals.SIGKILL)
            except ProcessLookupError:
                pass
            self._bury_carrier()
        if self._pidfd >= 0:
            try:
                signals.pidfd_send_signal(self._pidfd, signals.SIGKILL)
            except ProcessLookupError:
                pass
            _reap(self._pid, KILL_WAIT_S)
            os.close(self._pidfd)
        self._sock, self._up = None, False
        self._read_last_words(sock)
        self._pid, self._pidfd, self._up = 0, -1, False
        self._tell("down", why)
        strangers = [pid for pid in procs.children() if pid not in self._known_pids()]
        for pid in strangers:
            try:
                os.kill(pid, signals.SIGKILL)
            except ProcessLookupError:
                pass
            _reap(pid, KILL_WAIT_S)
        unanswered, self._asked = list(self._asked.values()), {}
        # One stranger at most, unless the spawner answered nonsense or a process of the box made itself our child.
        for order in unanswered[: len(strangers)]:
            order.close()
            order.lost("its spawner was killed while it was being started")
        for order in (order for order in unanswered[len(strangers) :] if not order.repeatable):
            order.close()
            order.lost("its spawner was killed")
        self._queue[:0] = [order for order in unanswered[len(strangers) :] if order.repeatable]
        self._tries += 1
        if self._tries > len(BACK_OFF_S) or self.stopped:
            expired = self._queue if self.stopped else [o for o in self._queue if _age(o) > GIVE_UP_S]
            self._queue = [] if self.stopped else [o for o in self._queue if _age(o) <= GIVE_UP_S]
            for order in expired:
                order.close()
                order.failed("not_ready", f"no process can be started in the box: {why}")
        if not self.stopped and self._timer is None:
            delay = BACK_OFF_S[min(self._tries - 1, len(BACK_OFF_S) - 1)]
            self._timer = self._poller.after(delay, self._make_if_needed)

    def _read_last_words(self, sock: _socket.socket) -> None:
        """Take the answers a dead spawner had given already."""
        while True:
            try:
                message, descriptors = packets.receive(sock, wait=False)
            except (OSError, packets.Malformed):
                break
            if message is None:
                break
            try:
                if "born" not in message and "trouble" not in message:
                    self._take(message, descriptors)
            except (KeyError, TypeError, ValueError, OSError):
                packets.close_all(descriptors)
                break
        self._up = False
        sock.close()

    def _make_if_needed(self) -> None:
        self._timer = None
        if self._queue or self._tries <= len(BACK_OFF_S):
            self._make()

    def _refuse_all(self, code: str, message: str) -> None:
        queue, self._queue = self._queue, []
        for order in queue:
            order.close()
            order.failed(code, message)

    def bury_strangers(self) -> None:
        """Reap dead children that are no commands of ours: a box's process can make itself our child.

        Never while an order is unanswered: then a stranger is the proof that it was begun.
        """
        if self._asked:
            return
        known = self._known_pids() | {self._pid, self._carrier}
        for pid in procs.children():
            if pid not in known:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    pass


def _age(order: Order) -> float:
    return time.monotonic() - order.since


def _reap(pid: int, seconds: float) -> bool:
    """Wait for a child that is dying; give up after `seconds` (a frozen one cannot die)."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
