"""Events on their way to the server side: kept until acknowledged, sent to every watcher, again on every connect.

The keepers are the durable holders of exit events; what is here is a copy in memory, filled again by the keepers after
a restart. When the copy grows over a bound (one box's, or that of all) the keepers are not read from until watchers
have acknowledged enough.

In charge of: the table of unacknowledged events, the fields of an exit event, watchers' connections, heartbeats. Not in
charge of: where events come from (`keepers.py`, `notices.py`), what is on disk (`records.py`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from hostd import messages
from hostd.messages import HEARTBEAT_SECONDS, LINE_MAX, ProtocolError

HELD_BYTES_MAX = 64 * 1024 * 1024  # unacknowledged events in memory before the keepers are made to wait
BOX_BYTES_MAX = 16 * 1024 * 1024  # the same for one box
_EVENT_BYTES = 512  # what an event costs besides its line
WATCHERS_MAX = 64
STUCK_SECONDS = 30.0  # a watcher that takes no byte for so long is disconnected; it will ask again
_CHUNK = 256 * 1024
_CHUNKS_AT_ONCE = 8

log = logging.getLogger("hostd.events")

Key = tuple[str, str]


class Events:
    """The unacknowledged events of a host and who watches them.

    ``acknowledged(box, ids)`` is called for what a watcher acknowledged; ``room(box, flag)`` when the keeper of a box
    (all keepers when None) must wait (False) and when it may go on (True).
    """

    def __init__(
        self,
        acknowledged: Callable[[str, list[str]], None],
        room: Callable[[str | None, bool], None] = lambda box, flag: None,
    ) -> None:
        self._acknowledged = acknowledged
        self._room = room
        self._lines: dict[str, dict[str, bytes]] = {}  # box -> id -> line
        self._box_bytes: dict[str, int] = {}
        self._bytes = 0
        self._full = False
        self._full_boxes: set[str] = set()
        self._watchers: set[Watcher] = set()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, box: str, id: str, event: dict[str, Any]) -> None:
        """Keep an event and send it. One that is known already is not sent twice to the same connection."""
        lines = self._lines.setdefault(box, {})
        if id in lines:
            return
        lines[id] = messages.encode(event)
        self._weigh(box, len(lines[id]) + _EVENT_BYTES)
        for watcher in list(self._watchers):
            watcher.tell((box, id))

    def drop(self, box: str, ids: Iterable[str]) -> None:
        lines = self._lines.get(box, {})
        freed = 0
        for id in ids:
            line = lines.pop(id, None)
            if line is not None:
                freed += len(line) + _EVENT_BYTES
        if box in self._lines and not lines:
            del self._lines[box]
        self._weigh(box, -freed)

    def drop_box(self, box: str) -> None:
        """Forget all events of a destroyed devbox."""
        self.drop(box, list(self._lines.get(box, {})))

    def line(self, key: Key) -> bytes | None:
        return self._lines.get(key[0], {}).get(key[1])

    def watch(self, connection: socket.socket, rest: bytes) -> None:
        """Take over a connection that asked to watch. ``rest`` is what it sent after its request line."""
        if len(self._watchers) >= WATCHERS_MAX:
            connection.close()
            return
        watcher = Watcher(self, connection, [(box, id) for box, lines in self._lines.items() for id in lines])
        self._watchers.add(watcher)
        watcher.start(rest)

    def acknowledge(self, pairs: list[Key]) -> None:
        by_box: dict[str, list[str]] = {}
        for box, id in pairs:
            by_box.setdefault(box, []).append(id)
        for box, ids in by_box.items():
            self.drop(box, ids)
            self._acknowledged(box, ids)

    def left(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def close(self) -> None:
        for watcher in list(self._watchers):
            watcher.close()

    def _weigh(self, box: str, change: int) -> None:
        self._bytes += change
        held = self._box_bytes.get(box, 0) + change
        if held > 0:
            self._box_bytes[box] = held
        else:
            self._box_bytes.pop(box, None)
        if box not in self._full_boxes and held > BOX_BYTES_MAX:
            self._full_boxes.add(box)
            log.warning("%s bytes of events of %s wait to be acknowledged; its keeper is not read from", held, box)
            self._room(box, False)
        elif box in self._full_boxes and held < BOX_BYTES_MAX // 2:
            self._full_boxes.discard(box)
            if not self._full:
                self._room(box, True)
        if not self._full and self._bytes > HELD_BYTES_MAX:
            self._full = True
            log.warning("%s bytes of events wait to be acknowledged; no keeper is read from", self._bytes)
            self._room(None, False)
        elif self._full and self._bytes < HELD_BYTES_MAX // 2:
            self._full = False
            self._room(None, True)
            for full in self._full_boxes:
                self._room(full, False)


class Watcher:
    """One watching connection. It holds keys, not lines, so that a slow one costs no memory."""

    def __init__(self, events: Events, connection: socket.socket, keys: list[Key]) -> None:
        self._events = events
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._keys: deque[Key] = deque(keys)
        self._queued: set[Key] = set(keys)
        self._out = memoryview(b"")
        self._in = b""
        self._writing = False
        self._beat_due = True
        self._moved_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self, rest: bytes) -> None:
        self._connection.setblocking(False)
        self._loop.add_reader(self._connection, self._readable)
        if rest:
            self._take(rest)
        if not self._closed:
            self._beat()

    def tell(self, key: Key) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._keys.append(key)
            if not self._writing:
                self._write()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        self._events.left(self)

    def _beat(self) -> None:
        if self._out and time.monotonic() - self._moved_at > STUCK_SECONDS:
            log.warning("a watcher took nothing for %s s and is disconnected", STUCK_SECONDS)
            self.close()
            return
        self._beat_due = True
        self._timer = self._loop.call_later(HEARTBEAT_SECONDS, self._beat)
        if not self._writing:
            self._write()

    def _next(self) -> bytes:
        if self._beat_due:
            self._beat_due = False
            return messages.encode({"event": "heartbeat", "monotonic": round(time.monotonic(), 3)})
        lines: list[bytes] = []
        size = 0
        while self._keys and size < _CHUNK:
            key = self._keys.popleft()
            self._queued.discard(key)
            line = self._events.line(key)
            if line is not None:  # else acknowledged by another watcher meanwhile
                lines.append(line)
                size += len(line)
        return b"".join(lines)

    def _write(self) -> None:
        try:
            for _ in range(_CHUNKS_AT_ONCE):
                if not self._out:
                    self._out = memoryview(self._next())
                    if not self._out:
                        break
                sent = self._connection.send(self._out)
                self._out = self._out[sent:]
                self._moved_at = time.monotonic()
            else:
                raise BlockingIOError  # others want to be heard as well
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._connection, self._write)
            return
        except OSError:
            self.close()
            return
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._connection)

    def _readable(self) -> None:
        try:
            data = self._connection.recv(LINE_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._take(data)

    def _take(self, data: bytes) -> None:
        *lines, self._in = (self._in + data).split(b"\n")
        try:
            if len(self._in) > LINE_MAX:
                raise ProtocolError(f"an ack line is over the limit of {LINE_MAX} bytes")
            for line in lines:
                if line:
                    self._events.acknowledge(messages.parse_acks(line))
        except ProtocolError as error:
            log.warning("a watcher is disconnected: %s", error)
            self.close()


def exit_event(message: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of an exit event that the protocol knows, checked; None when one of them is wrong."""
    event: dict[str, Any] = {"event": "exit", "box": None}
    if not messages.is_work_id(message.get("id")):
        return None
    event["id"] = message["id"]
    for name, low, high in (("exit", -1, 255), ("started_at_ms", 0, 2**62), ("exited_at_ms", 0, 2**62)):
        value = message.get(name)
        if not (isinstance(value, int) and low <= value <= high):
            return None
        event[name] = value
    for name in ("sizes", "dropped"):
        value = message.get(name)
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(x, int) and x >= 0 for x in value)):
            return None
        event[name] = value
    if isinstance(message.get("first_byte_at_ms"), int) and 0 < message["first_byte_at_ms"] < 2**62:
        event["first_byte_at_ms"] = message["first_byte_at_ms"]
    notes = message.get("notes")
    if isinstance(notes, list) and len(notes) <= messages.NOTES_MAX and all(isinstance(note, str) for note in notes):
        event["notes"] = [note[:1000] for note in notes]
    reason = message.get("reason")
    if reason is not None and not (isinstance(reason, dict) and isinstance(reason.get("kind"), str)):
        return None
    event["reason"] = reason
    if isinstance(message.get("stdout"), str) and isinstance(message.get("stderr"), str):
        event["stdout"], event["stderr"] = message["stdout"], message["stderr"]
        if isinstance(message.get("index"), str):
            event["index"] = message["index"]
    return event
