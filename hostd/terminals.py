"""The terminals of one box: shells on a pty whose master the keeper holds, and who is attached to them.

In charge of: sessions by name, the last bytes of each, one writer and any number of viewers, backpressure, the time a
session is kept when nobody is attached, its end. Not in charge of: starting the shell (spawner.py), the requests'
shape (requests.py), WebSockets (the server side).

    open     makes the session, or finds it: {"created", "attached", "cols", "rows"}
    attach   {"ok", "offset", "cols", "rows"}; then frames both ways (see `hostd.framing`). Output ends with a trailer
             {"reason"}: exit | closed | takeover | slow | box. A zero frame of the client's, or its end, detaches.
    control  resize, signal, close

A writer that reads nothing stops the shell, after WINDOW bytes; a viewer that falls behind by more than what is kept is
sent away instead. Bytes have a position from the session's first one, so what a replay brings and what comes live
neither overlap nor leave a gap.

A session ends with its keeper: the kernel hangs the terminal up.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import struct
import time

from hostd import packets, polling, requests
from hostd.procs import signals
from hostd.requests import Refused
from hostd.spawner_link import Order, SpawnerLink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_TERMINALS = 32
MAX_ATTACHED = 64
"""Clients of one session."""
RING_BYTES = 256 << 10
"""What a replay brings at most."""
WINDOW = 64 << 10
READ_BYTES = 64 << 10
INPUT_BYTES = 64 << 10
"""Input that waits for the shell to read it; after that the client is not read from."""
FRAME_MAX = 1 << 20
HANGUP_S = 2.0
"""How long a shell may live on after it was hung up."""
STALL_S = 600.0
"""For a client that has gone without a word: it takes nothing of what waits for it."""
SHELL = ["/bin/bash", "-l"]

TIOCGPGRP = 0x540F
TIOCSWINSZ = 0x5414


class Attachment:
    """One client of a session, from its answer line to the end of its connection."""

    def __init__(self, terminal: Terminal, descriptor: int, rest: bytes, position: int, writes: bool) -> None:
        self._terminal, self.position, self.writes = terminal, position, writes
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        self._sock.setblocking(False)
        self._in = bytearray(rest)
        self._frame = 0  # bytes still to come of a frame of input
        self._out: list[memoryview] = []
        self._ending = False
        self._closed = False
        self._events = polling.READ
        self._moved_at = time.monotonic()
        terminal.poller.on(descriptor, self._ready, self._events)
        terminal.clients.add(self)

    def say(self, message: dict[str, Any]) -> None:
        """Queue the answer line."""
        self._out.append(memoryview(packets.dumps(message) + b"\n"))

    def end(self, reason: str) -> None:
        """Send what is left, then the trailer, then hang up."""
        if self._ending or self._closed:
            return
        if reason in ("exit", "closed", "box"):
            self._queue_all()
        self._ending = True
        self._out.append(memoryview(b"\0\0\0\0" + packets.dumps({"reason": reason}) + b"\n"))
        self.pump()

    def _queue_all(self) -> None:
        while (data := self._terminal.piece(self.position)) is not None and data:
            self._frame_out(data)

    def _frame_out(self, data: bytes) -> None:
        self._out.append(memoryview(struct.pack("!I", len(data)) + data))
        self.position += len(data)

    def pump(self) -> None:
        """Send what can be sent now."""
        try:
            while not self._closed:
                if not self._out:
                    if self._ending:
                        self.close()
                        return
                    data = self._terminal.piece(self.position)
                    if data is None:
                        self.end("slow")
                        return
                    if not data:
                        break
                    self._frame_out(data)
                sent = self._sock.send(self._out[0], _socket.MSG_NOSIGNAL)
                self._moved_at = time.monotonic()
                if sent == len(self._out[0]):
                    self._out.pop(0)
                else:
                    self._out[0] = self._out[0][sent:]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self.watch()

    def watch(self) -> None:
        """Listen for what can be dealt with."""
        if self._closed:
            return
        events = polling.WRITE if self._out else 0
        if not self._ending and self._may_say_more():
            events |= polling.READ
        if events != self._events:
            self._events = events
            self._terminal.poller.change(self._sock.fileno(), events)

    def _may_say_more(self) -> bool:
        return not self.writes or self._terminal.takes_input()

    def stalled(self, now: float) -> bool:
        """Has it taken nothing for too long?"""
        return bool(self._out) and now - self._moved_at > STALL_S

    def _ready(self, events: int) -> None:
        if events & polling.READ and not self._ending:
            self._receive()
        if not self._closed and events & polling.HANGUP:
            self.close()
        elif not self._closed and events & polling.WRITE:
            self.pump()
            self._terminal.read()

    def _receive(self) -> None:
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._in += data
        self.take_input()

    def take_input(self) -> None:
        """Hand over the input that has come, as far as the session takes it."""
        while self._in and self._may_say_more() and not self._closed:
            if not self._frame:
                if len(self._in) < 4:
                    break
                (self._frame,) = struct.unpack("!I", self._in[:4])
                del self._in[:4]
                if not 0 < self._frame <= FRAME_MAX:  # zero: it leaves
                    self.close()
                    return
                continue
            data = bytes(self._in[: self._frame])
            del self._in[: len(data)]
            self._frame -= len(data)
            if self.writes:
                self._terminal.write(data)
        self.watch()

    def close(self) -> None:
        """End the connection; harmless when it has ended."""
        if self._closed:
            return
        self._closed = True
        self._terminal.clients.discard(self)
        self._terminal.poller.off(self._sock.fileno())
        self._sock.close()
        self._out = []
        self._terminal.left(self)


class Terminal:
    """One session."""

    def __init__(self, terminals: Terminals, name: str, cols: int, rows: int, ttl: float) -> None:
        self._terminals, self.name, self.cols, self.rows, self._ttl = terminals, name, cols, rows, ttl
        self.poller, self.clients = terminals.poller, terminals.clients
        self.state = "asked"
        self.failure: Refused | None = None
        self.waiters: list[Callable[[], None]] = []
        self._master, self._pidfd = -1, -1
        self._reading = 0
        self._ring = bytearray()
        self.end_position = 0
        self._input = bytearray()
        self._attached: list[Attachment] = []
        self._timer: polling.Timer | None = None

    # --- the shell

    def started(self, pidfd: int, ends: dict[str, int]) -> None:
        """The spawner has made it."""
        self._pidfd, self._master = pidfd, ends["master"]
        if self.state == "ended":  # closed meanwhile
            self._hang_up()
            return
        os.set_blocking(self._master, False)
        self.state = "running"
        self.poller.on(self._pidfd, lambda _: self._exited())
        self._reading = polling.READ
        self.poller.on(self._master, self._master_ready, self._reading)
        self._keep()
        self._tell()

    def failed(self, code: str, why: str) -> None:
        """The spawner could not."""
        self.failure = Refused("box_io" if code == "internal" else code, why)  # what it lacks is the box's own affair
        self._terminals.forget(self)
        self.state = "ended"
        self._tell()

    def _tell(self) -> None:
        waiters, self.waiters = self.waiters, []
        for call in waiters:
            call()

    def _master_ready(self, events: int) -> None:
        if events & polling.WRITE:
            self._feed()
        if events & (polling.READ | polling.HANGUP):
            self.read()
            if events & polling.HANGUP and not events & polling.READ and self._master >= 0:
                self._drain()
                self.poller.off(self._master)  # nobody has the terminal open; the shell's exit is next
                self._reading = -1

    def read(self) -> None:
        """Take what the shell has written, unless its writer is behind."""
        writer = self._writer()
        if self._master < 0 or (writer is not None and self.end_position - writer.position >= WINDOW):
            self._listen()
            return
        data = self._read_master(READ_BYTES)
        if data:
            self._append(data)
            for attachment in list(self._attached):
                attachment.pump()
        self._listen()

    def _read_master(self, limit: int) -> bytes:
        """A pty hands out a few KiB at a time: collect."""
        found = b""
        while len(found) < limit:
            try:
                data = os.read(self._master, limit - len(found))
            except OSError:  # nothing there, or nobody left who has it open
                break
            if not data:
                break
            found += data
        return found

    def _append(self, data: bytes) -> None:
        self._ring += data
        self.end_position += len(data)
        if len(self._ring) > 2 * RING_BYTES:
            del self._ring[: len(self._ring) - RING_BYTES]

    def _drain(self) -> None:
        while self._master >= 0 and (data := self._read_master(READ_BYTES)):
            self._append(data)

    def _listen(self) -> None:
        if self._master < 0 or self._reading < 0:
            return
        writer = self._writer()
        behind = writer is not None and self.end_position - writer.position >= WINDOW
        events = (0 if behind else polling.READ) | (polling.WRITE if self._input else 0)
        if events != self._reading:
            self._reading = events
            self.poller.change(self._master, events)

    def takes_input(self) -> bool:
        """Is there room for more?"""
        return len(self._input) < INPUT_BYTES

    def write(self, data: bytes) -> None:
        """Input for the shell."""
        self._input += data
        self._feed()

    def _feed(self) -> None:
        try:
            while self._input and self._master >= 0:
                count = os.write(self._master, self._input[:4096])
                del self._input[:count]
        except BlockingIOError:
            pass
        except OSError:
            self._input.clear()
        if self.takes_input():
            writer = self._writer()
            if writer is not None:
                self.poller.after(0, writer.take_input)
        self._listen()

    def _exited(self) -> None:
        self.poller.off(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._drain()
        self._end("exit")

    def _end(self, reason: str) -> None:
        if self.state == "ended":
            return
        self.state = "ended"
        self._terminals.forget(self)
        self._stop_clock()
        self._hang_up()
        for attachment in list(self._attached):
            attachment.end(reason)

    def _hang_up(self) -> None:
        """Close the terminal: the kernel sends SIGHUP. A shell that does not care is killed."""
        if self._master >= 0:
            if self._reading >= 0:
                self.poller.off(self._master)
            os.close(self._master)
            self._master = -1
        if self._pidfd >= 0:
            pidfd, self._pidfd = self._pidfd, -1
            self.poller.off(pidfd)
            self.poller.after(HANGUP_S, lambda: _kill_and_close(pidfd))

    # --- its clients

    def _writer(self) -> Attachment | None:
        return next((one for one in self._attached if one.writes), None)

    @property
    def is_attended(self) -> bool:
        """Is there anybody?"""
        return bool(self._attached)

    @property
    def attached(self) -> bool:
        """Is there a writer?"""
        return self._writer() is not None

    def piece(self, position: int) -> bytes | None:
        """Return some bytes from `position`, b"" at the end, None when they are gone."""
        start = self.end_position - len(self._ring)
        if position < start:
            return None
        return bytes(self._ring[position - start : position - start + READ_BYTES])

    def attach(self, give: Callable[[], tuple[int, bytes]], *, writes: bool, takeover: bool, replay: bool) -> None:
        """Add a client. Raises Refused busy when there is a writer already, or too many clients."""
        writer = self._writer()
        if writes and writer is not None and not takeover:
            raise Refused("attached", f"terminal {self.name} has a client attached")
        if len(self._attached) >= MAX_ATTACHED:
            raise Refused("busy", f"{MAX_ATTACHED} clients are attached to terminal {self.name}")
        if writes and writer is not None:
            self._attached.remove(writer)
            writer.end("takeover")
        self._stop_clock()
        position = max(0, self.end_position - min(RING_BYTES, len(self._ring))) if replay else self.end_position
        attachment = Attachment(self, *give(), position, writes)
        self._attached.append(attachment)
        size = {"cols": self.cols, "rows": self.rows}
        attachment.say({"ok": True, "offset": position, "end": self.end_position, **size})
        attachment.pump()
        attachment.take_input()
        self._listen()

    def left(self, attachment: Attachment) -> None:
        """A client has gone."""
        if attachment in self._attached:
            self._attached.remove(attachment)
        if self.state == "running":
            self._listen()
            self._keep()

    def _keep(self) -> None:
        self._stop_clock()
        if not self._attached:
            self._timer = self.poller.after(self._ttl, lambda: self._end("closed"))

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- control

    def resize(self, cols: int, rows: int) -> None:
        """Set the size; the kernel tells the foreground group."""
        self.cols, self.rows = cols, rows
        fcntl.ioctl(self._master, TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def signal(self, number: int) -> None:
        """Signal the foreground process group. Raises Refused when there is none."""
        try:
            (group,) = struct.unpack("i", fcntl.ioctl(self._master, TIOCGPGRP, b"\0\0\0\0"))
            if group <= 1:
                raise ProcessLookupError
            os.killpg(group, number)  # the kernel lets us reach this box's processes only
        except OSError:
            raise Refused("bad_request", f"terminal {self.name} has no foreground process group") from None

    def close(self) -> None:
        """End it."""
        try:
            self.signal(signals.SIGHUP)
        except Refused:
            pass
        self._end("closed")


def _kill_and_close(pidfd: int) -> None:
    try:
        signals.pidfd_send_signal(pidfd, signals.SIGKILL)
    except OSError:
        pass
    os.close(pidfd)


class Terminals:
    """All sessions of a box."""

    def __init__(self, poller: polling.Poller, spawner: SpawnerLink) -> None:
        self.poller, self._spawner = poller, spawner
        self._named: dict[str, Terminal] = {}
        self.clients: set[Attachment] = set()  # those that are still to take the end of a session, too

    def handle(self, client: Any, request: dict[str, Any], body: bytes) -> None:
        """Carry one `terminal` request out. Raises Refused."""
        op, name = request.get("op"), requests.session(request)
        if op == "open":
            self._open(client, name, request, body)
            return
        terminal = self._named.get(name)
        if terminal is None or terminal.state != "running":
            raise Refused("unknown_id", f"no terminal {name} here")
        if op == "attach":
            mode = {flag: requests.flag(request, flag, False) for flag in ("takeover", "replay")}
            terminal.attach(client.release, writes=not requests.flag(request, "view", False), **mode)
            return
        if op == "resize":
            terminal.resize(*requests.size(request))
        elif op == "signal":
            terminal.signal(requests.signal_number(request))
        elif op == "close":
            terminal.close()
        else:
            raise requests.bad("op must be open, attach, resize, signal or close")
        client.answer({"ok": True})

    def _open(self, client: Any, name: str, request: dict[str, Any], body: bytes) -> None:
        terminal = self._named.get(name)
        created = terminal is None
        if terminal is None:
            terminal = self._make(name, request, body)

        def reply() -> None:
            if terminal.failure is not None:
                client.answer(terminal.failure.reply())
                return
            size = {"cols": terminal.cols, "rows": terminal.rows}
            client.answer({"ok": True, "created": created, "attached": terminal.attached, **size})

        if terminal.state == "asked":
            terminal.waiters.append(reply)
            return
        if request.get("cols") is not None:
            terminal.resize(*requests.size(request))
        reply()

    def _make(self, name: str, request: dict[str, Any], body: bytes) -> Terminal:
        try:
            given = packets.loads(body)
        except packets.Malformed as error:
            raise requests.bad(f"the body: {error}") from None
        command = requests.command({"argv": SHELL, "env": given.get("env", {}), "user": given.get("user")})
        cols, rows = requests.size(request) if request.get("cols") is not None else (80, 24)
        ttl = requests.whole(request, "ttl", 1, 86400, default=300)
        if len(self._named) >= MAX_TERMINALS:
            raise Refused("busy", f"{MAX_TERMINALS} terminals are open in this box")
        terminal = self._named[name] = Terminal(self, name, cols, rows, ttl)
        order = Order({**command.message, "terminal": [cols, rows]}, None)
        order.repeatable = False
        order.before = lambda: None
        order.started = terminal.started
        order.failed = terminal.failed
        order.lost = lambda why: terminal.failed("not_ready", f"the shell was lost: {why}")
        order.exec_failed = lambda why: None
        self._spawner.ask(order)
        return terminal

    def forget(self, terminal: Terminal) -> None:
        """It has ended: its name is free."""
        if self._named.get(terminal.name) is terminal:
            del self._named[terminal.name]

    def attended(self) -> int:
        """Return how many terminals somebody writes to or watches."""
        return sum(terminal.is_attended for terminal in self._named.values())

    def sweep(self) -> None:
        """Look after clients that have gone without a word."""
        now = time.monotonic()
        for attachment in list(self.clients):
            if attachment.stalled(now):
                attachment.close()

    def box_gone(self) -> None:
        """The box has stopped."""
        for terminal in list(self._named.values()):
            terminal._end("box")
