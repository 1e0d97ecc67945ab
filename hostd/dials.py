"""Connections into a box: a client's connection becomes a pipe to a TCP port of the box's own loopback.

In charge of: dialling (the keeper lives in the box's network namespace, so its 127.0.0.1 is the box's), moving bytes
both ways with bounded buffers, half-closed ends, and bounds on how many there are.
Not in charge of: what is spoken over them, who may ask (the server side).

    dial     {"ok"}; then the client's bytes go up as they are, its end of file ends them; what the server
             answers comes down in frames (see `hostd.framing`), and a trailer {"reason"}: end | reset. A connection
             that ends without it was cut, and must not be taken for a server that has said all.
    refused  nothing listens on that port
"""

from __future__ import annotations

import _socket
import errno
import struct
import time

from hostd import packets, polling, requests
from hostd.requests import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Client(Protocol):
        """What is needed of `clients.Client`."""

        def release(self) -> tuple[int, bytes]: ...


MAX_DIALS = 256
"""Connections into one box at once."""
CONNECT_S = 3.0
"""For a server whose line of waiting connections is full. Less than any call to a host may take."""
PIECE_BYTES = 64 << 10
"""At most so much of either direction is held for one connection."""
TURN_BYTES = 1 << 20
"""Moved for one connection before the others get their turn."""
STALL_S = 600.0
"""For an end that takes nothing of what waits for it, and for a connection that only one end has left."""
SOMEWHERE = ("192.0.2.1", 9)
"""Nothing is sent there: the kernel is asked which address of the box it would use."""

HEADER = struct.Struct("!I")


class Dials:
    """All connections into a box."""

    def __init__(self, poller: polling.Poller, gone: Callable[[], bool]) -> None:
        """`gone`: has the box ended?"""
        self.poller, self._gone = poller, gone
        self.all: set[Dial] = set()
        self.buffer = memoryview(bytearray(HEADER.size + PIECE_BYTES))

    def start(self, client: Client, request: dict[str, Any], body: bytes) -> None:
        """Carry one `dial` out. Raises Refused when it is wrong, there are too many, or the box has ended."""
        port = requests.whole(request, "port", 1, 65535)
        if self._gone():
            raise Refused("not_ready", "the box has ended")
        if len(self.all) >= MAX_DIALS:
            raise Refused("busy", f"{MAX_DIALS} connections into this box are open")
        descriptor, rest = client.release()
        Dial(self, descriptor, rest, port)

    def sweep(self) -> None:
        """End those that do not move although they should."""
        now = time.monotonic()
        for dial in list(self.all):
            if dial.stalled(now):
                dial.close()

    def box_gone(self) -> None:
        """The box has stopped."""
        for dial in list(self.all):
            dial.close()


class Dial:
    """One of them: `near` is the client's connection, `far` the server's in the box."""

    def __init__(self, dials: Dials, descriptor: int, rest: bytes, port: int) -> None:
        self._dials, self._port = dials, port
        self._poller = dials.poller
        self._near = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        self._near.setblocking(False)
        self._near_fd = descriptor
        self._far: _socket.socket | None = None
        self._far_fd = -1
        self._up = memoryview(rest)  # waits for the server
        self._down = memoryview(b"")  # waits for the client
        self._near_ended = self._far_ended = False  # it will send nothing more
        self._up_ended = self._down_ended = False  # ... and the other end was told so
        self._near_gone = False  # it takes nothing any more either, and is not watched
        self._open = False
        self._closed = False
        self._targets = _targets()
        self._near_events = self._far_events = 0
        self._timer: polling.Timer | None = self._poller.after(CONNECT_S, self._too_late)
        self._moved_at = time.monotonic()
        dials.all.add(self)
        self._poller.on(descriptor, self._near_ready, 0)
        self._try_next()

    # --- connecting

    def _try_next(self) -> None:
        """Try one address after the other: a server may listen on any of them."""
        while self._targets:
            family, address = self._targets.pop(0)
            try:
                far = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
            except OSError:
                continue
            number = far.connect_ex((address, self._port))
            if number in (0, errno.EINPROGRESS):
                self._far, self._far_fd, self._far_events = far, far.fileno(), polling.WRITE
                self._poller.on(self._far_fd, self._far_ready, polling.WRITE)
                return
            far.close()
        self._refuse(Refused("refused", f"nothing listens on port {self._port}"))

    def _connected(self) -> None:
        far = self._far
        assert far is not None
        # A port of the range that the kernel gives to clients may be connected to itself.
        if far.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) or _is_itself(far):
            self._poller.off(self._far_fd)
            far.close()
            self._far = None
            self._try_next()
            return
        self._stop_clock()
        far.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        self._open = True
        self._down = memoryview(packets.dumps({"ok": True}) + b"\n")
        self._move_up()
        self._move_down()
        self._watch()

    def _too_late(self) -> None:
        self._refuse(Refused("refused", f"the server on port {self._port} takes no connection: waited {CONNECT_S:g} s"))

    def _refuse(self, refusal: Refused) -> None:
        try:
            self._near.send(packets.dumps(refusal.reply()) + b"\n", _socket.MSG_NOSIGNAL)
        except OSError:
            pass
        self.close()

    # --- moving

    def _near_ready(self, events: int) -> None:
        if events & polling.HANGUP:  # both ways: what it sent may still be there to be read
            self._poller.off(self._near_fd)
            self._near_gone = True
            if not self._open:
                self.close()
                return
        if self._open:
            if events & polling.WRITE:
                self._move_down()
            if events & (polling.READ | polling.HANGUP):
                self._move_up()
            self._watch()

    def _far_ready(self, events: int) -> None:
        if not self._open:
            self._connected()
            return
        if events & polling.HANGUP:  # it takes nothing more; what it sent may still be there to be read
            self._leave_far()
            self._up, self._near_ended, self._up_ended = memoryview(b""), True, True
        if events & polling.WRITE:
            self._move_up()
        if events & (polling.READ | polling.HANGUP):
            self._move_down()
        self._watch()

    def _move_up(self) -> None:
        """What the client says, to the server."""
        assert self._far is not None
        budget = TURN_BYTES
        buffer = self._dials.buffer[HEADER.size :]
        while budget > 0 and not self._up_ended and not self._closed:
            data = self._up
            if not data and not self._near_ended:
                try:
                    count = self._near.recv_into(buffer)
                except BlockingIOError:
                    return
                except OSError:
                    count = 0
                self._near_ended = not count
                data = buffer[:count]
            if not data:
                self._end_up()
                return
            try:
                sent = self._far.send(data, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError:  # it wants to hear nothing more; it may still have something to say
                self._up, self._near_ended, self._up_ended = memoryview(b""), True, True
                return
            self._moved_at = time.monotonic()
            budget -= sent
            if sent < len(data):
                self._up = data[sent:] if data is self._up else memoryview(bytes(data[sent:]))
                return
            self._up = memoryview(b"")

    def _end_up(self) -> None:
        self._up_ended = True
        assert self._far is not None
        try:
            self._far.shutdown(_socket.SHUT_WR)
        except OSError:
            pass

    def _move_down(self) -> None:
        """What the server says, to the client."""
        assert self._far is not None
        budget = TURN_BYTES
        while budget > 0 and not self._down_ended and not self._near_gone and not self._closed:
            data = self._down
            if not data:
                if self._far_ended:
                    self._end_down()
                    return
                found = self._from_far()
                if found is None:
                    return
                data = found
            try:
                sent = self._near.send(data, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            except OSError:  # gone, as its hang-up is about to say
                self._down_ended = True
                return
            self._moved_at = time.monotonic()
            budget -= sent
            if sent < len(data):
                self._down = data[sent:] if data is self._down else memoryview(bytes(data[sent:]))
                return
            self._down = memoryview(b"")

    def _from_far(self) -> memoryview | None:
        """The next piece as it travels, the trailer at the end; None when there is nothing now."""
        assert self._far is not None
        buffer = self._dials.buffer
        reason = "end"
        try:
            count = self._far.recv_into(buffer[HEADER.size :])
        except BlockingIOError:
            return None
        except OSError:
            count, reason = 0, "reset"
        if count:
            HEADER.pack_into(buffer, 0, count)
            return buffer[: HEADER.size + count]
        self._far_ended = True
        return memoryview(HEADER.pack(0) + packets.dumps({"reason": reason}) + b"\n")

    def _end_down(self) -> None:
        self._down_ended = True
        try:
            self._near.shutdown(_socket.SHUT_WR)
        except OSError:
            pass

    def _watch(self) -> None:
        """Listen for what can be dealt with; end what has ended both ways."""
        if self._closed:
            return
        if self._up_ended and (self._down_ended or self._near_gone):
            self.close()
            return
        left = self._far_fd < 0 and not self._down_ended  # the rest is read when the client takes it
        near = (0 if self._up or self._near_ended else polling.READ) | (polling.WRITE if self._down or left else 0)
        far = polling.WRITE if self._up or (self._near_gone and not self._up_ended) else 0
        if not self._down and not self._far_ended and not self._near_gone:
            far |= polling.READ
        if near != self._near_events and not self._near_gone:
            self._near_events = near
            self._poller.change(self._near_fd, near)
        if far != self._far_events and self._far_fd >= 0:
            self._far_events = far
            self._poller.change(self._far_fd, far)

    def _leave_far(self) -> None:
        if self._far_fd >= 0:
            self._poller.off(self._far_fd)
            self._far_fd = -1

    # --- the end

    def stalled(self, now: float) -> bool:
        """Has it not moved for too long, although something waits or one end has left?"""
        waits = bool(self._up) or bool(self._down) or self._near_ended or self._far_ended
        return waits and now - self._moved_at > STALL_S

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """End the connection; harmless when it has ended."""
        if self._closed:
            return
        self._closed = True
        self._stop_clock()
        self._dials.all.discard(self)
        if not self._near_gone:
            self._poller.off(self._near_fd)
        self._near.close()
        self._leave_far()
        if self._far is not None:
            self._far.close()


def _is_itself(sock: _socket.socket) -> bool:
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:  # reset already
        return True


def _targets() -> list[tuple[int, str]]:
    """Where a server of the box may listen, the usual first."""
    found = [(_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1")]
    asked = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        asked.connect(SOMEWHERE)
        found.append((_socket.AF_INET, asked.getsockname()[0]))
    except OSError:
        pass  # it has no other
    finally:
        asked.close()
    return found
