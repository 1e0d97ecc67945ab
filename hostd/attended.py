"""The keeper's side of running programs for a client that stays connected: the client's connection goes to a process in
the box, which answers it.

In charge of: checking the request, having the process forked by the spawner, a bound on how many there are, and ending
one whose client has gone. Not in charge of: the bytes, the answer (relay.py); files (transfers.py).
"""

from __future__ import annotations

import binascii
import os

from hostd import packets, polling, requests
from hostd.procs import signals
from hostd.requests import Refused
from hostd.spawner_link import Order, SpawnerLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Client(Protocol):
        """What is needed of `clients.Client`."""

        def give(self, gone: Any) -> tuple[int, bytes]: ...

        def take_back(self, refusal: Refused) -> None: ...

        def close(self) -> None: ...


MAX_ATTENDED = 128
"""Programs of one box that are attended at once."""
GRACE_S = 2.0
"""A process whose client has gone notices by itself, unless the box's file system holds it up."""


class Attendances:
    """All programs of a box that a client attends."""

    def __init__(self, poller: polling.Poller, spawner: SpawnerLink) -> None:
        self._poller, self._spawner = poller, spawner
        self.active = 0

    def start(self, client: Client, request: dict[str, Any], body: bytes) -> None:
        """Have a `run` request answered. Raises Refused when it is wrong or there are too many."""
        try:
            given = packets.loads(body)
        except packets.Malformed as error:
            raise requests.bad(f"the body: {error}") from None
        terminal = None if request.get("cols") is None else requests.size(request)
        told = requests.command(given).message
        task = {name: told[name] for name in ("argv", "env", "cwd", "cwd_required")}
        who = {name: told[name] for name in ("name", "uid", "gid")}
        if self.active >= MAX_ATTENDED:
            raise Refused("busy", f"{MAX_ATTENDED} programs of this box are attended already")
        Attendance(self, client, who, {**task, "terminal": terminal})

    def begin(self, order: Order) -> None:
        """Count one more and ask for its process."""
        self.active += 1
        self._spawner.ask(order)

    def end(self) -> None:
        """One less."""
        self.active -= 1

    @property
    def poller(self) -> polling.Poller:
        """The keeper's loop."""
        return self._poller


class Attendance:
    """One of them: from the request until its process has ended."""

    def __init__(self, all_: Attendances, client: Client, who: dict[str, Any], task: dict[str, Any]) -> None:
        self._all, self._client = all_, client
        self._pidfd = -1
        self._left = False
        descriptor, rest = client.give(self._client_gone)
        rest64 = binascii.b2a_base64(rest, newline=False).decode("ascii")
        order = Order({"run": task, "rest64": rest64, **who}, descriptor)
        order.repeatable = False  # two processes must never speak on one connection
        order.before = lambda: None
        order.started = lambda pidfd, ends: self._started(pidfd)
        order.failed = self._failed
        order.lost = lambda why: self._failed("not_ready", f"the process that was to serve it ended: {why}")
        order.exec_failed = lambda why: None
        all_.begin(order)

    def _started(self, pidfd: int) -> None:
        self._pidfd = pidfd
        self._all.poller.on(pidfd, lambda _: self._ended())
        if self._left:
            self._all.poller.after(GRACE_S, self._kill)

    def _failed(self, code: str, why: str) -> None:
        self._all.end()
        if not self._left:
            self._client.take_back(Refused("box_io" if code == "internal" else code, why))  # the box's own affair

    def _client_gone(self) -> None:
        self._left = True
        if self._pidfd >= 0:
            self._all.poller.after(GRACE_S, self._kill)

    def _kill(self) -> None:
        if self._pidfd >= 0:
            try:
                signals.pidfd_send_signal(self._pidfd, signals.SIGKILL)
            except OSError:
                pass

    def _ended(self) -> None:
        self._all.poller.off(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._all.end()
        if not self._left:
            self._client.close()  # with our copy of the connection its client sees the end
