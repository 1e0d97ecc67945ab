"""The keeper's side of moving files: a client's connection goes to a process in the box, which answers it.

In charge of: checking the request, which process (a **mover**) gets it, a bound on how many there are at once, and
ending one whose client has gone. Not in charge of: the file, the bytes, the answer (files.py).

A mover is forked by the spawner as the box's user, carries out one request at a time, and is kept for some seconds, as
forking is most of what a small file costs. Its user may stop or kill it: a request that it has not received is taken
back from its socket, whose other end we have as well, and goes to a fresh one. So no two ever speak on one connection.
"""

from __future__ import annotations

import _socket
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

        def resume(self) -> None: ...

        def close(self) -> None: ...


MAX_TRANSFERS = 64
"""Files that are being moved in one box at once."""
GRACE_S = 2.0
"""A process whose client has gone notices by itself, unless the box's file system holds it up."""
TAKE_S = 1.0
"""For a kept mover to receive a request."""
TRIES = 3
KEPT_S = 5.0
KEPT = 4
"""Movers of one box that wait for the next request, and how long."""


class Transfers:
    """All files of a box that are being moved."""

    def __init__(self, poller: polling.Poller, spawner: SpawnerLink) -> None:
        self.poller, self.spawner = poller, spawner
        self.active = 0
        self._kept: list[Mover] = []

    def start(self, client: Client, request: dict[str, Any], body: bytes) -> None:
        """Have the request answered. Raises Refused when it is wrong or there are too many."""
        who, _ = requests.user(request)
        task = requests.file_task(request)
        if self.active >= MAX_TRANSFERS:
            raise Refused("busy", f"{MAX_TRANSFERS} files of this box are being moved already")
        self.active += 1
        self.assign(Transfer(self, client, who, task))

    def assign(self, transfer: Transfer) -> None:
        """Give it to a mover of that user that waits, or to a fresh one."""
        transfer.tries += 1
        if transfer.tries > TRIES:
            os.close(transfer.connection)
            transfer.refuse("not_ready", f"{TRIES} processes of the box did not take it")
            return
        mover = self._waiting(transfer.who) if transfer.tries == 1 else None
        fresh = mover is None
        if mover is None:
            mover = Mover(self, transfer.who)
        try:
            mover.give(transfer)
        except OSError as error:
            mover.dismiss()
            os.close(transfer.connection)
            transfer.refuse("internal", f"no process could be given it: {error}")
            return
        if fresh:
            mover.start()

    def _waiting(self, who: dict[str, Any]) -> Mover | None:
        for mover in reversed(self._kept):
            if mover.who == who:
                self._kept.remove(mover)
                return mover
        return None

    def keep(self, mover: Mover) -> None:
        """It has nothing to do at the moment."""
        self._kept.append(mover)
        self.poller.after(KEPT_S, lambda: self._tire(mover, mover.served))
        if len(self._kept) > KEPT:
            self._kept.pop(0).dismiss()

    def _tire(self, mover: Mover, served: int) -> None:
        if mover in self._kept and mover.served == served:
            self._kept.remove(mover)
            mover.dismiss()

    def lose(self, mover: Mover) -> None:
        """It has ended."""
        if mover in self._kept:
            self._kept.remove(mover)


class Transfer:
    """One of them: from the request until it is answered."""

    def __init__(self, transfers: Transfers, client: Client, who: dict[str, Any], task: dict[str, Any]) -> None:
        self._transfers, self._client = transfers, client
        self.who, self.task = who, task
        self.tries = 0
        self.left = False
        self._over = False
        self.mover: Mover | None = None
        self.connection, rest = client.give(self._client_gone)
        self.rest64 = binascii.b2a_base64(rest, newline=False).decode("ascii")

    def end(self, *, clean: bool) -> None:
        """The mover is done, or dead. `clean`: the connection may carry another request."""
        if self._finish():
            if clean:
                self._client.resume()
            else:
                self._client.close()  # with our copy of the connection its client sees the end

    def refuse(self, code: str, why: str) -> None:
        """No process was to be had for it."""
        if self._finish():
            self._client.take_back(Refused("box_io" if code == "internal" else code, why))  # the box's own affair

    def _finish(self) -> bool:
        """Is there somebody to be told?"""
        self._over = True
        self._transfers.active -= 1
        return not self.left

    def _client_gone(self) -> None:
        if not self._over:
            self.left = True
            self._transfers.poller.after(GRACE_S, self._end_mover)

    def _end_mover(self) -> None:
        if not self._over and self.mover is not None:
            self.mover.kill()


class Mover:
    """A process in the box that moves files, as one user."""

    def __init__(self, transfers: Transfers, who: dict[str, Any]) -> None:
        self._transfers, self.who = transfers, who
        self.served = 0
        self._transfer: Transfer | None = None
        self._pidfd = -1
        self._sock, self._theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        transfers.poller.on(self._sock.fileno(), lambda _: self._hear())

    def start(self) -> None:
        """Have it forked. What it is given meanwhile waits for it."""
        order = Order({"mover": True, **self.who}, os.dup(self._theirs.fileno()))
        order.repeatable = False  # two processes must never share one socket
        order.before = lambda: None
        order.started = lambda pidfd, ends: self._started(pidfd)
        order.failed = self._failed
        order.lost = lambda why: self._failed("not_ready", f"the process that was to move the file ended: {why}")
        order.exec_failed = lambda why: None
        self._transfers.spawner.ask(order)

    def give(self, transfer: Transfer) -> None:
        """Hand it a request. Raises OSError when it cannot be sent."""
        message = {"task": transfer.task, "rest64": transfer.rest64}
        packets.send(self._sock, message, [transfer.connection], wait=False)
        os.close(transfer.connection)
        self.served += 1
        self._transfer, transfer.mover = transfer, self
        if self._pidfd >= 0:
            self._watch()

    def dismiss(self) -> None:
        """Give it nothing any more, and end it: it may be stopped, and would not end by itself."""
        if self._sock.fileno() >= 0:
            self._transfers.poller.off(self._sock.fileno())
            self._sock.close()
            self._theirs.close()
        self.kill()

    def kill(self) -> None:
        """End it now."""
        if self._pidfd >= 0:
            try:
                signals.pidfd_send_signal(self._pidfd, signals.SIGKILL)
            except OSError:
                pass

    def _watch(self) -> None:
        served = self.served
        self._transfers.poller.after(TAKE_S, lambda: self._doubt(served))

    def _doubt(self, served: int) -> None:
        if self.served == served and self._transfer is not None and self._take_back():
            self.dismiss()  # somebody has stopped it

    def _take_back(self) -> bool:
        """Give its request to another if it has not received it."""
        if self._theirs.fileno() < 0:
            return False
        try:
            message, descriptors = packets.receive(self._theirs, wait=False)
        except (BlockingIOError, packets.Malformed):
            return False
        transfer, self._transfer = self._transfer, None
        if message is None or transfer is None or len(descriptors) != 1:
            packets.close_all(descriptors)
            return False
        (transfer.connection,) = descriptors
        if transfer.left:
            os.close(transfer.connection)
            transfer.end(clean=False)
        else:
            self._transfers.assign(transfer)
        return True

    def _started(self, pidfd: int) -> None:
        self._pidfd = pidfd
        self._transfers.poller.on(pidfd, lambda _: self._ended())
        self._watch()

    def _failed(self, code: str, why: str) -> None:
        self.dismiss()
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.refuse(code, why)

    def _hear(self) -> None:
        """The answer to what it was given."""
        try:
            message, descriptors = packets.receive(self._sock, wait=False)
        except BlockingIOError:
            return
        except (packets.Malformed, OSError):
            message, descriptors = None, []
        packets.close_all(descriptors)
        transfer = self._transfer
        if message is None or transfer is None:
            self.kill()  # it speaks out of turn; what becomes of its request is settled by its end
            return
        self._transfer = None
        self._transfers.keep(self)
        transfer.end(clean=message.get("done") is True)

    def _ended(self) -> None:
        if self._transfer is not None and self._sock.fileno() >= 0:
            self._hear()  # it may have been done
        self._transfers.poller.off(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._transfers.lose(self)
        self._take_back()
        self.dismiss()
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.end(clean=False)
