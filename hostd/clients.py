"""The keeper's side of a client's connection: requests in, answers and framed bytes out.

In charge of: the wire (a request line, its body, the answer line, raw phases), bounds on what one client and all
clients together may hold, and followers, who are sent bytes as they come and never hold anything up.
Not in charge of: what a verb does to a command (executions.py), the bounds of its fields (requests.py).

    line --complete--> (body --complete-->) busy --answer, or the end of the raw phase--> line
A connection that ends while it is busy is forgotten; what it had asked for goes on.
"""

from __future__ import annotations

import _socket
import os
import struct
import time

from hostd import log_verbs, packets, polling, requests
from hostd.execution import Execution, Follow
from hostd.executions import Executions
from hostd.requests import Refused
from hostd.streams import FileRange, Stream, last_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Verb = Callable[["Client", dict[str, Any], bytes], None]

MAX_CLIENTS = 512
BODY_BUDGET = 32 << 20
"""Bytes of bodies that are being read, over all clients of the box."""
RECEIVE_BYTES = 65536
FRAME_BYTES = 256 << 10
TURN_BYTES = 1 << 20
"""Bytes one client is sent before the others get their turn."""
REQUEST_S = 30.0
"""For a request that has begun to arrive to be complete."""
IDLE_S = 600.0
"""For a connection without a request."""
START_S = 3.0
"""For a command to be started before its spawn is answered; it stays asked for. What a box does to itself must not look
like a host that is silent."""
STALL_S = 600.0
"""For a client that takes none of the bytes it asked for."""


class Clients:
    """All connections of a keeper."""

    def __init__(
        self, poller: polling.Poller, executions: Executions, others: dict[str, Verb], box: Callable[[], str | None]
    ) -> None:
        """`others`: the verbs that have nothing to do with commands."""
        self.poller, self.box = poller, box
        self.verbs = {name: _with(executions, verb) for name, verb in VERBS.items()} | others
        self.all: set[Client] = set()
        self.body_bytes = 0

    def take(self, descriptor: int, request: object, rest: bytes) -> None:
        """Take over a stream socket whose first request line hostd has read."""
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, descriptor)
        if isinstance(request, dict) and len(self.all) < MAX_CLIENTS:
            client = Client(self, sock, rest)
            self.all.add(client)
            client.begin(request)
            return
        busy = Refused("busy", f"{MAX_CLIENTS} connections to this box are open")
        refusal = busy if isinstance(request, dict) else requests.bad("the request is not an object")
        try:
            sock.send(packets.dumps(refusal.reply()) + b"\n", _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            pass
        sock.close()

    def sweep(self) -> None:
        """Close the connections whose time is up."""
        now = time.monotonic()
        for client in list(self.all):
            if now - client.moved_at > client.patience():
                client.close()


class Client:
    """One connection."""

    __slots__ = (
        "_body",
        "_buffer",
        "_clients",
        "_closing",
        "_descriptor",
        "_events",
        "_file",
        "_follow",
        "_gone",
        "_hung_up",
        "_out",
        "_request",
        "_sock",
        "_state",
        "_timer",
        "moved_at",
    )

    def __init__(self, clients: Clients, sock: _socket.socket, rest: bytes) -> None:
        self._clients, self._sock = clients, sock
        self._descriptor = sock.fileno()
        os.set_blocking(self._descriptor, False)
        self._buffer = bytearray(rest)
        self._state = "line"
        self._request: dict[str, Any] = {}
        self._body = 0
        self._out: list[memoryview | FileRange] = []
        self._file: tuple[Stream, int] | None = None  # the open file of the range that is being sent
        self._follow: Follow | None = None
        self._closing: Callable[[], None] | None = None
        self._hung_up = False  # it will send nothing more
        self._gone: Callable[[], None] | None = None  # called when a connection that was given away ends
        self._timer: polling.Timer | None = None
        self._events = polling.READ
        self.moved_at = time.monotonic()
        clients.poller.on(self._descriptor, self._ready, self._events)

    def patience(self) -> float:
        """Return how many seconds this connection may go without moving."""
        if self._out:
            return STALL_S
        if self._state == "busy":
            return float("inf")
        return REQUEST_S if self._buffer or self._state == "body" else IDLE_S

    def close(self) -> None:
        """End the connection; harmless when it has ended."""
        if self._state == "closed":
            return
        self._set_body(0)
        self._state = "closed"
        self._unfollow()
        self._close_file()
        if self._closing is not None:
            self._closing()
        if self._timer is not None:
            self._timer.cancel()
        self._clients.poller.off(self._descriptor)
        self._sock.close()
        self._clients.all.discard(self)
        self._out = []
        if self._gone is not None:
            gone, self._gone = self._gone, None
            gone()

    def give(self, gone: Callable[[], None]) -> tuple[int, bytes]:
        """Give the connection to another process: return a descriptor for it and what was read of it already.

        From now on it is only watched: `gone` is called when the client has left, or `close` was called.
        """
        self._gone = gone
        rest, self._buffer = bytes(self._buffer), bytearray()
        return os.dup(self._descriptor), rest

    def release(self) -> tuple[int, bytes]:
        """Part with the connection: return a descriptor for it and what was read of it already."""
        rest, descriptor = bytes(self._buffer), os.dup(self._descriptor)
        self.close()
        return descriptor, rest

    def take_back(self, refusal: Refused) -> None:
        """The other process never came to be: answer in its place, and hang up."""
        self._gone = None
        self._refuse(refusal)

    def resume(self) -> None:
        """The other process is done with it: the next request may come."""
        self._gone, self._state, self.moved_at = None, "line", time.monotonic()
        self._watch()

    # --- in

    def begin(self, request: dict[str, Any]) -> None:
        """Handle the request line that came with the connection, then what came behind it."""
        self._line(request)
        self._parse()

    def _ready(self, events: int) -> None:
        if events & polling.READ and not self._hung_up:
            self._receive()
        if self._state != "closed" and events & polling.HANGUP:
            self.close()
        elif self._state != "closed" and events & polling.WRITE:
            self._flush()

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.moved_at = time.monotonic()
        if not data:
            self._hung_up = True
            if self._state != "busy" and not self._out:
                self.close()
            else:
                self._watch()  # half closed: it still wants its answer
            return
        self._buffer += data
        self._parse()

    def _parse(self) -> None:
        while self._state in ("line", "body"):
            if self._state == "line":
                end = self._buffer.find(b"\n")
                if end < 0:
                    if len(self._buffer) > requests.LINE_BYTES:
                        self._refuse(Refused("too_large", f"a request line has at most {requests.LINE_BYTES} bytes"))
                    break
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                try:
                    self._line(packets.loads(line))
                except packets.Malformed as error:
                    self._refuse(requests.bad(str(error)))
            elif len(self._buffer) < self._body:
                break
            else:
                body = bytes(self._buffer[: self._body])
                del self._buffer[: self._body]
                self._set_body(0)
                self._handle(body)
        if self._state != "closed":
            self._watch()

    def _line(self, request: dict[str, Any]) -> None:
        """A request line is complete: is there a body to wait for?"""
        self._request = request
        try:
            limit = BODY_LIMITS.get(str(request.get("verb")), 0)
            length = requests.whole(request, "body", 0, 1 << 40, default=0)
            if length > limit:
                raise Refused("too_large", f"the body has {length} bytes, the limit of this verb is {limit}")
            if self._clients.body_bytes + length > BODY_BUDGET:
                raise Refused("busy", f"{BODY_BUDGET} bytes of requests are being read already")
        except Refused as refusal:
            self._refuse(refusal)  # the body would be taken for a request, so this is the connection's end
            return
        self._set_body(length)
        self._state = "body"

    def _set_body(self, length: int) -> None:
        self._clients.body_bytes += length - self._body
        self._body = length

    def _handle(self, body: bytes) -> None:
        self._state = "busy"
        request = self._request
        try:
            verb = self._clients.verbs.get(str(request.get("verb")))
            if verb is None:
                raise Refused("unknown_verb", f"no verb {str(request.get('verb'))[:64]!r} for a box")
            box = self._clients.box()
            if box is None:
                raise Refused("not_ready", "the box has no name yet")
            if request.get("box") != box:
                raise Refused("unknown_box", "this is the keeper of another box")
            verb(self, request, body)
        except Refused as refusal:
            self.answer(refusal.reply())
        except OSError as error:
            polling.log_exception(error)
            code = "no_space" if error.errno in (28, 122) else "internal"
            self.answer({"error": {"code": code, "message": error.strerror or str(error)}})

    def _refuse(self, refusal: Refused) -> None:
        """Answer and hang up: where the next request begins is not known."""
        self._state = "busy"
        self._hung_up = True
        self.answer(refusal.reply())

    # --- out

    def answer(self, message: dict[str, Any], body: FileRange | bytes | None = None) -> bool:
        """Send the answer line (and raw bytes behind it); the next request may come. False: nobody is there for it."""
        if self._state != "busy":
            return False
        self._out.append(memoryview(packets.dumps(message) + b"\n"))
        if isinstance(body, bytes):
            self._out.append(memoryview(body))
        elif body is not None and body.left:
            self._out.append(body)
        self._state = "line"
        self._flush()
        return self._state != "closed"

    def follow(self, execution: Execution, stream: Stream, offset: int, answer: dict[str, Any]) -> None:
        """Send the answer line, then frames until the stream is sealed."""
        self._out.append(memoryview(packets.dumps(answer) + b"\n"))
        self._follow = Follow(execution, stream, offset)
        stream.watchers.append(self._pump)
        self._flush()

    def begin_frames(self, answer: dict[str, Any], closing: Callable[[], None]) -> None:
        """Send the answer line; frames follow until the connection ends, which is told by `closing`."""
        self._closing = closing
        self._out.append(memoryview(packets.dumps(answer) + b"\n"))
        self._flush()

    def frame(self, data: bytes) -> None:
        """Send a frame of a raw phase that was begun."""
        if self._state != "closed":
            self._out.append(memoryview(struct.pack("!I", len(data)) + data))
            self._flush()

    def is_behind(self) -> bool:
        """Has it not taken yet what it was sent?"""
        return bool(self._out)

    def _pump(self) -> None:
        if not self._out:
            self._flush()

    def _flush(self) -> None:
        """Send what can be sent now, a turn's worth."""
        budget = TURN_BYTES
        try:
            while budget > 0 and self._state != "closed":
                if not self._out:
                    if self._follow is None or not self._next_frame(self._follow):
                        break
                    continue
                item = self._out[0]
                if isinstance(item, FileRange):
                    sent = self._send_file(item)
                    if not item.left:
                        self._out.pop(0)
                        self._close_file()
                else:
                    more = _socket.MSG_MORE if len(self._out) > 1 else 0
                    sent = self._sock.send(item, _socket.MSG_NOSIGNAL | more)
                    if sent == len(item):
                        self._out.pop(0)
                    else:
                        self._out[0] = item[sent:]
                self.moved_at = time.monotonic()
                budget -= sent
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._state == "closed":
            return
        if not self._out and self._hung_up and self._state != "busy":
            self.close()
            return
        # A turn that ended with the end of a frame leaves nothing queued, and yet there is more to send.
        self._watch(more=budget <= 0 and self._follow is not None)
        if self._state == "line" and self._buffer and not self._out:
            self._clients.poller.after(0, self._parse)

    def _watch(self, *, more: bool = False) -> None:
        """Listen only for what can be dealt with: no new request while one is busy, no end of file twice."""
        events = 0
        ours = not self._hung_up and self._gone is None
        if ours and (len(self._buffer) < max(self._body, requests.LINE_BYTES) or self._state == "body"):
            events |= polling.READ
        if self._out or more:
            events |= polling.WRITE
        if events != self._events:
            self._events = events
            self._clients.poller.change(self._descriptor, events)

    def _send_file(self, item: FileRange) -> int:
        hole = item.stream.hole
        if hole and hole[0] < item.offset + item.left and item.offset < hole[1]:
            # It was dropped after its length had been announced. Zeros would be a lie; a cut is seen and followed up.
            raise ConnectionAbortedError("the range was dropped")
        if self._file is None or self._file[0] is not item.stream:
            self._close_file()
            self._file = (item.stream, item.stream.open_for_reading())
        if self._file[1] < 0:
            raise ConnectionAbortedError("the file was removed")
        sent = os.sendfile(self._descriptor, self._file[1], item.offset, min(item.left, TURN_BYTES))
        if sent == 0:
            raise ConnectionAbortedError("the file is shorter than it was")
        item.offset += sent
        item.left -= sent
        return sent

    def _close_file(self) -> None:
        if self._file is not None and self._file[1] >= 0:
            os.close(self._file[1])
        self._file = None

    def _next_frame(self, follow: Follow) -> bool:
        """Queue the follower's next frame or its end; False when it has to wait."""
        stream, execution = follow.stream, follow.execution
        available = stream.size - follow.offset
        hole = stream.hole
        if hole and follow.offset < hole[1]:
            available = hole[0] - follow.offset
            if available <= 0:
                self._end_follow({"complete": False, "resume": hole[1], "dropped": list(hole), "exit": None})
                return True
        if available > 0 and stream.removed:  # it was stored elsewhere
            self._end_follow({"complete": False, "moved": True, "exit": execution.exit})
            return True
        if available > 0:
            length = min(available, FRAME_BYTES)
            self._out.append(memoryview(struct.pack("!I", length)))
            self._out.append(FileRange(stream, follow.offset, length))
            follow.offset += length
            return True
        if not stream.sealed or execution.state != "exited":
            return False
        # Without an exit it never ran: that is no complete output.
        complete = execution.exit is not None
        self._end_follow({"complete": complete, "exit": execution.exit, "reason": execution.reason})
        return True

    def _end_follow(self, trailer: dict[str, Any]) -> None:
        assert self._follow is not None
        trailer = {"total": self._follow.stream.size, "reason": None, **trailer}
        self._out.append(memoryview(b"\0\0\0\0" + packets.dumps(trailer) + b"\n"))
        self._unfollow()
        self._state = "line"

    def _unfollow(self) -> None:
        if self._follow is not None:
            self._follow.stream.watchers.remove(self._pump)
            self._follow = None

    def hold(self, seconds: float, call: Callable[[], object]) -> None:
        """Make one call later, unless the connection ends before; the one that was to be made before is not."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._clients.poller.after(seconds, call)


def _with(executions: Executions, verb: Callable[[Client, Executions, dict[str, Any], bytes], None]) -> Verb:
    return lambda client, request, body: verb(client, executions, request, body)


# --- verbs: (client, executions, request, body)


def _fence(request: dict[str, Any]) -> int:
    return requests.whole(request, "fence", 0, (1 << 63) - 1)


def _spawn(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    name, fence = requests.execution_id(request), _fence(request)
    hold = requests.whole(request, "hold_ms", 0, requests.HOLD_MS, default=0)
    known = name in executions.known
    try:
        command = packets.loads(body) if not known else {}
    except packets.Malformed as error:
        raise requests.bad(f"the body: {error}") from None
    cap = requests.whole(request, "cap", requests.CAP_MIN, requests.CAP_MAX) if "cap" in request else None
    execution = executions.spawn(name, fence, command, cap)

    answered = False

    def reply(late: bool = False) -> bool:
        nonlocal answered
        if answered:  # the exit and the end of the hold both come; by the second, another request may be busy
            return False
        answered = True
        if late:
            refused = Refused("not_ready", f"no process of the devbox has started it for {START_S:g} s")
            return client.answer(refused.reply())
        if executions.known.get(name) is execution:
            return client.answer({"ok": True, **executions.shape(execution)})
        return client.answer({"error": execution.reason or {"code": "internal", "message": "not started"}})

    def started() -> None:
        if hold and not answered and execution.state == "running":
            execution.exit_waiters.append(reply)
            client.hold(hold / 1000, reply)
        else:
            reply()

    if execution.state == "asked":
        execution.waiters.append(started)
        client.hold(START_S, lambda: reply(late=True))
    elif execution.reason is not None and executions.known.get(name) is not execution:
        reply()
    else:
        started()


def _state(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    client.answer({"ok": True, **executions.shape(executions.find(requests.execution_id(request)))})


def _kill(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    name, fence, signal = requests.execution_id(request), _fence(request), requests.signal_number(request)
    repeated_as = requests.text(request, "request", 128) if request.get("request") is not None else None
    execution, sent = executions.kill(name, fence, signal, requests.flag(request, "group", False), repeated_as)
    client.answer({"ok": True, **executions.shape(execution), "sent": sent})


def _ack(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    for name in requests.ids(request):
        executions.ack(name)
    client.answer({"ok": True})


def _forget(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    fence = _fence(request) if "fence" in request else None
    for name in requests.ids(request):
        executions.forget(name, fence)
    client.answer({"ok": True})


def _stream(executions: Executions, request: dict[str, Any]) -> tuple[Execution, Stream]:
    execution = executions.find(requests.execution_id(request))
    stream = execution.streams[requests.stream_number(request) - 1]
    if stream.removed:
        raise Refused("unknown_id", f"the output of {execution.id} is not kept here any more")
    return execution, stream


def _follow(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    execution, stream = _stream(executions, request)
    offset = requests.whole(request, "offset", 0, 1 << 62, default=0)
    answer: dict[str, Any] = {"ok": True, "offset": offset}
    if stream.hole and stream.hole[0] <= offset < stream.hole[1]:
        offset = stream.hole[1]
        answer.update(offset=offset, dropped=list(stream.hole))
    client.follow(execution, stream, offset, answer)


def _read(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    if request.get("stream") in ("late_stdout", "late_stderr"):
        log_verbs.read_late(client, executions, request)
        return
    _, stream = _stream(executions, request)
    offset = requests.whole(request, "offset", 0, 1 << 62, default=0)
    limit = requests.whole(request, "limit", 0, requests.READ_BYTES, default=requests.READ_BYTES)
    answer: dict[str, Any] = {"ok": True, "size": stream.size}
    if stream.hole:
        answer["dropped"] = list(stream.hole)
    if request.get("last_lines") is not None:
        offset = last_lines(stream, requests.whole(request, "last_lines", 1, 1 << 31), limit)
    elif stream.hole and stream.hole[0] <= offset < stream.hole[1]:
        offset = stream.hole[1]
    end = min(stream.size, offset + limit)
    if stream.hole and offset < stream.hole[0]:
        end = min(end, stream.hole[0])
    length = max(0, end - offset)
    client.answer({**answer, "offset": offset, "body": length}, FileRange(stream, offset, length))


def _stdin(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    execution = executions.find(requests.execution_id(request))
    name = requests.text(request, "request", 128)
    if not name:
        raise requests.bad("request must name this piece of input")
    client.answer(
        {"ok": True, "accepted": executions.stdin(execution, name, body, requests.flag(request, "eof", False))}
    )


def _list(client: Client, executions: Executions, request: dict[str, Any], body: bytes) -> None:
    listed = [
        {"id": e.id, "state": "exited" if e.state == "exited" else "running"}
        for e in executions.known.values()
        if not e.acked
    ]
    client.answer({"ok": True, "executions": listed})


VERBS: dict[str, Callable[[Client, Executions, dict[str, Any], bytes], None]] = {
    "spawn": _spawn,
    "state": _state,
    "kill": _kill,
    "ack": _ack,
    "forget": _forget,
    "follow": _follow,
    "read": _read,
    "stdin": _stdin,
    "list": _list,
    "index": log_verbs.index,
    "sizes": log_verbs.sizes,
    "changes": log_verbs.changes,
}
BODY_LIMITS = {
    "spawn": requests.SPAWN_BODY_BYTES,
    "stdin": requests.STDIN_BYTES,
    "terminal": 2 * requests.ENVIRONMENT_BYTES,
    "run": requests.SPAWN_BODY_BYTES,
}
