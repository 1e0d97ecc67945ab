"""hostd's connections to the keepers: found again, restarted, fed with clients' connections, listened to.

In charge of: one link per box that was booted, the record on disk by which it is found again after a restart, handing a
client's connection over by SCM_RIGHTS, noticing that a keeper or a box's init died. Not in charge of: making boxes
(`jobs.py` in the makers), what a keeper does with a connection, who watches the events (`events.py`).

What keepers say is input from an unprivileged process that a tenant may have conquered: it is checked and bounded.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hostd import messages, packets
from hostd.boxes import memory_figures, oom_kills
from hostd.config import HostConfig, write_file
from hostd.events import Events, exit_event
from hostd.makers import Makers
from hostd.messages import BOX_EXIT_ID, Refused, is_work_id

PENDING_MAX = 128  # connections waiting for one keeper
PENDING_SECONDS = 4.0  # below the callers' own bound of 5 s, so that they hear a reason
CONNECT_SECONDS = 5.0
LIST_SECONDS = 3.0
HUNG_SECONDS = 30.0  # a keeper whose full queue has not moved for so long is replaced
_RETRY_SECONDS = (0.02, 0.1, 0.5, 2.0)
_SOON_SECONDS = 1.0
_VERDICT_SECONDS = 0.5
_PACKETS_AT_ONCE = 64

log = logging.getLogger("hostd.keepers")


@dataclass(slots=True)
class Record:
    """What is on disk about a box that was booted. ``ended`` is its box_exit event, ``ended_acked`` whether a watcher
    has acknowledged it. Start times are clock ticks since boot: with pid and boot id they name one process."""

    slot: str
    n: int
    boot_id: str
    spec: dict[str, Any]
    pid: int
    start: int
    init_pid: int
    init_start: int
    address: str
    booted_at_ms: int
    limits: dict[str, int]
    ended: dict[str, Any] | None = None
    ended_acked: bool = False


@dataclass(eq=False, slots=True)
class _Pending:
    """A client's connection on its way to a keeper."""

    connection: socket.socket
    message: dict[str, Any]
    expires_at: float


@dataclass(eq=False, slots=True)
class Link:
    """One box's keeper as hostd sees it. ``box`` is None while the box is warm."""

    record: Record
    box: str | None
    socket: socket.socket | None = None
    init: int | None = None  # pidfd
    pending: deque[_Pending] = field(default_factory=deque)
    paused: bool = False
    writing: bool = False
    gone: bool = False  # the box is being destroyed
    lost: bool = False  # nobody can tell any more what became of its executions
    task: asyncio.Task[None] | None = None
    opened_at: float = float("-inf")
    hasty: int = 0
    blocked_at: float | None = None  # since when it has taken nothing of what waits for it
    opened: asyncio.Event = field(default_factory=asyncio.Event)


class Keepers:
    """All links of a host."""

    def __init__(self, cfg: HostConfig, makers: Makers, events: Events, boot_id: str) -> None:
        self._cfg = cfg
        self._makers = makers
        self._events = events
        self._boot_id = boot_id
        self._folder = f"{cfg.root}/keepers"
        self._links: dict[str, Link] = {}  # by slot
        self._by_box: dict[str, Link] = {}
        self._statuses: dict[int, int] = {}  # exit status by pid, of inits that were our children
        self.noticed: Callable[[str], None] | None = None  # the spawner of a devbox that is up has ended
        os.makedirs(self._folder, mode=0o700, exist_ok=True)

    # --- looking

    def link(self, slot: str) -> Link | None:
        return self._links.get(slot)

    @property
    def slots(self) -> list[str]:
        return list(self._links)

    def is_up(self, slot: str) -> bool:
        """True while the box's init lives."""
        link = self._links.get(slot)
        return link is not None and link.init is not None

    def limits_of(self, slot: str) -> dict[str, int] | None:
        """What the box may use; None while it is not up."""
        return self._links[slot].record.limits if self.is_up(slot) else None

    # --- records

    def load(self) -> dict[str, Record]:
        """Records on disk by slot, also those of an older or newer hostd. One that cannot be read is dropped: its box
        is then treated as half made."""
        found: dict[str, Record] = {}
        names = {item.name for item in dataclasses.fields(Record)}
        for name in os.listdir(self._folder):
            path = f"{self._folder}/{name}"
            try:
                with open(path, "rb") as file:
                    record = Record(**{name: value for name, value in json.load(file).items() if name in names})
                found[record.slot] = record
            except (ValueError, TypeError, AttributeError):
                log.warning("%s cannot be read and is removed", path)
                os.unlink(path)
        return found

    def forget_record(self, slot: str) -> None:
        try:
            os.unlink(f"{self._folder}/{slot}.json")
        except FileNotFoundError:
            pass

    def _save(self, record: Record) -> None:
        write_file(f"{self._folder}/{record.slot}.json", json.dumps(dataclasses.asdict(record)).encode(), mode=0o600)

    # --- a link's life

    def add(self, record: Record, box: str | None) -> Link:
        """Take up a box that was just booted or is found again. Writes the record, watches init, connects."""
        link = Link(record, box)
        self._links[record.slot] = link
        if box is not None:
            self._by_box[box] = link
        self._save(record)
        if record.ended is not None:
            if not record.ended_acked and box is not None:
                self._events.add(box, BOX_EXIT_ID, {**record.ended, "box": box})
        elif not self._watch_init(link):
            self._ended(link, None)
        link.lost = record.boot_id != self._boot_id
        if not link.lost:
            link.task = asyncio.get_running_loop().create_task(self._open(link))
        return link

    def name(self, slot: str, box: str) -> None:
        """A warm box was claimed: tell its keeper before anything is spawned in it."""
        link = self._links[slot]
        link.box = box
        self._by_box[box] = link
        link.record.spec["box"] = box
        self._save(link.record)
        self._say(link, {"box": box})

    def limits_written(self, slot: str, limits: dict[str, int]) -> None:
        link = self._links[slot]
        link.record.limits = limits
        self._save(link.record)

    def drop(self, slot: str) -> None:
        """Let go of a box that is to be stopped or destroyed; whoever waits for its keeper is refused. The record stays
        until :meth:`forget_record`, so that a kill in between leaves something to clean up by."""
        link = self._links.pop(slot, None)
        if link is None:
            return
        link.gone = True
        if link.box is not None:
            self._by_box.pop(link.box, None)
            self._events.drop_box(link.box)
        if link.task is not None:
            link.task.cancel()
        self._close_socket(link)
        self._unwatch_init(link)
        while link.pending:
            _refuse(link.pending.popleft().connection, Refused("unknown_box", "the box was destroyed"))

    def let_go(self, slot: str) -> None:
        """Close what is open to a box and leave it as it is: hostd ends, the box lives on."""
        link = self._links.pop(slot)
        link.gone = True
        if link.task is not None:
            link.task.cancel()
        self._close_socket(link)
        self._unwatch_init(link)
        while link.pending:
            _refuse(link.pending.popleft().connection, Refused("not_ready", "hostd is restarting"))

    async def _open(self, link: Link) -> None:
        """Connect, with a successor when the keeper is dead. Goes on until it is connected or the box is gone."""
        attempt = 0
        if time.monotonic() - link.opened_at < _SOON_SECONDS:
            link.hasty += 1  # one that ends every connection must not keep us busy
            await asyncio.sleep(_RETRY_SECONDS[min(link.hasty, len(_RETRY_SECONDS)) - 1])
        else:
            link.hasty = 0
        while not link.gone:
            try:
                if start_time(link.record.pid) != link.record.start:
                    await self._revive(link)
                await self._connect(link)
                return
            except (OSError, Refused) as error:
                log.warning("keeper of %s: %s", link.record.slot, error)
                if isinstance(error, Refused) and error.code == "not_ready" and link.record.ended is not None:
                    # A keeper is not born without a living box, so what this one knew is not to be had any more.
                    self._give_up(link)
                    return
            await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
            attempt += 1

    def _give_up(self, link: Link) -> None:
        link.lost = True
        while link.pending:
            _refuse(link.pending.popleft().connection, Refused("lost", "the box and its keeper have ended"))

    async def _revive(self, link: Link) -> None:
        record = link.record
        log.warning("keeper %s of %s is dead", record.pid, record.slot)
        answer = await self._makers.do("restart_keeper", slot=record.slot, n=record.n, spec=record.spec)
        record.pid, record.start = answer["pid"], answer["start"]
        if not link.gone:
            self._save(record)

    async def _connect(self, link: Link) -> None:
        path = self._cfg.keeper_socket(link.record.slot)
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                sock.connect(path)
                # The peer is stamped when a keeper calls listen, some milliseconds after its birth.
                peer = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
                if peer == link.record.pid:
                    break
                reason = f"process {peer} answers instead of {link.record.pid}"
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError) as error:
                reason = str(error)
            sock.close()
            if start_time(link.record.pid) != link.record.start:
                raise ConnectionError("it died before it listened")
            if time.monotonic() > deadline:
                raise ConnectionError(f"not reached within {CONNECT_SECONDS:g} s: {reason}")
            await asyncio.sleep(0.002)
        link.socket = sock
        if link.box is not None:
            self._say(link, {"box": link.box})
        self._read_again(link)
        link.opened_at = time.monotonic()
        link.blocked_at = None
        link.opened.set()
        self._flush(link)

    def _lost(self, link: Link) -> None:
        """The connection ended: the keeper is dead, or closes it for what we sent."""
        self._close_socket(link)
        if not link.gone:
            link.task = asyncio.get_running_loop().create_task(self._open(link))

    def _close_socket(self, link: Link) -> None:
        if link.socket is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(link.socket)
            loop.remove_writer(link.socket)
            link.socket.close()
            link.socket = None
        link.writing = False
        link.opened.clear()

    async def zygote_was_replaced(self) -> None:
        """A new zygote knows no keeper: introduce the living ones."""
        for link in list(self._links.values()):
            record = link.record
            if link.gone or record.ended is not None or start_time(record.pid) != record.start:
                continue
            try:
                await self._makers.do(
                    "adopt_keeper",
                    slot=record.slot,
                    n=record.n,
                    spec=record.spec,
                    pid=record.pid,
                    start=record.start,
                )
            except Refused as refused:
                log.error("keeper of %s could not be introduced to the new zygote: %s", record.slot, refused)

    # --- to the keeper

    def route(self, connection: socket.socket, request: dict[str, Any], rest: bytes) -> None:
        """Hand a client's connection to its box's keeper. Answers and closes it when that is not possible."""
        link = self._by_box.get(request["box"])
        if link is None:
            _refuse(connection, Refused("unknown_box", "no such box is up on this host"))
            return
        if link.lost:
            _refuse(connection, Refused("lost", "the box and its keeper have ended"))
            return
        message: dict[str, Any] = {"connection": request}
        if rest:
            message["rest"] = base64.b64encode(rest).decode("ascii")
        if link.socket is not None and not link.pending and self._hand_over(link, connection, message):
            return
        if len(link.pending) >= PENDING_MAX:
            _refuse(connection, Refused("busy", f"{PENDING_MAX} requests wait for this box already"))
            return
        link.pending.append(_Pending(connection, message, time.monotonic() + PENDING_SECONDS))
        if link.socket is not None:
            self._flush(link)

    def acknowledged(self, box: str, ids: list[str]) -> None:
        """A watcher has committed these events."""
        link = self._by_box.get(box)
        if link is None:
            return
        if BOX_EXIT_ID in ids and not link.record.ended_acked:
            link.record.ended_acked = True
            self._save(link.record)
        self._say(link, {"ack": ids})

    def expire(self) -> None:
        """Refuse the connections that have waited too long for a keeper, and end a keeper that reads nothing: its
        successor loses nothing. Called every second."""
        now = time.monotonic()
        for link in self._links.values():
            if link.socket is not None and link.blocked_at is not None and now - link.blocked_at > HUNG_SECONDS:
                link.blocked_at = None
                if start_time(link.record.pid) == link.record.start:
                    log.error("keeper %s of %s reads nothing; it is killed", link.record.pid, link.record.slot)
                    os.kill(link.record.pid, signal.SIGKILL)
            while link.pending and link.pending[0].expires_at < now:
                refused = Refused("not_ready", f"the box's keeper did not answer within {PENDING_SECONDS:g} s")
                _refuse(link.pending.popleft().connection, refused)

    async def executions(self, link: Link) -> list[dict[str, Any]] | None:
        """What the keeper knows, as `list` answers; None when it does not answer within :data:`LIST_SECONDS`."""
        if link.lost or link.box is None:
            return []
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            self.route(theirs, {"v": messages.PROTOCOL, "verb": "list", "box": link.box}, b"")
            reply = messages.parse_reply(await asyncio.wait_for(_read_line(ours), LIST_SECONDS))
        except (TimeoutError, OSError, Refused, messages.ProtocolError) as error:
            log.warning("keeper of %s did not list its executions: %s", link.record.slot, error or "too slow")
            return None
        finally:
            ours.close()
        found = reply.get("executions")
        if not isinstance(found, list):
            return None
        return [
            {"id": item["id"], "state": item["state"]}
            for item in found
            if isinstance(item, dict) and is_work_id(item.get("id")) and item.get("state") in ("running", "exited")
        ]

    def _hand_over(self, link: Link, connection: socket.socket, message: dict[str, Any]) -> bool:
        """False when the keeper's queue is full or it is gone: the connection is still ours then."""
        assert link.socket is not None
        try:
            packets.send(link.socket, message, [connection.fileno()], wait=False)
        except OSError:  # a dead keeper is noticed by the reader, which also restarts it
            if link.blocked_at is None:
                link.blocked_at = time.monotonic()
            return False
        link.blocked_at = None
        connection.close()
        return True

    def _flush(self, link: Link) -> None:
        while link.pending and link.socket is not None:
            waiting = link.pending[0]
            if not self._hand_over(link, waiting.connection, waiting.message):
                if not link.writing:
                    link.writing = True
                    asyncio.get_running_loop().add_writer(link.socket, self._flush, link)
                return
            link.pending.popleft()
        if link.writing and link.socket is not None:
            link.writing = False
            link.blocked_at = None
            asyncio.get_running_loop().remove_writer(link.socket)

    def _say(self, link: Link, message: dict[str, Any]) -> None:
        """Names and acknowledgements. What cannot be sent is sent again later: a name on every connect, an
        acknowledgement when the keeper repeats its event."""
        if link.socket is None:
            return
        try:
            packets.send(link.socket, message, wait=False)
        except BlockingIOError:
            log.warning("keeper of %s takes no messages; connecting anew", link.record.slot)
            self._lost(link)
        except OSError:
            pass  # noticed by the reader

    # --- from the keeper

    def room(self, box: str | None, flag: bool) -> None:
        """Stop (False) or go on (True) reading from one box's keeper, or all of them when None."""
        links = list(self._links.values()) if box is None else [self._by_box[box]] if box in self._by_box else []
        for link in links:
            link.paused = not flag
            if link.socket is not None:
                if flag:
                    self._read_again(link)
                else:
                    asyncio.get_running_loop().remove_reader(link.socket)

    def _read_again(self, link: Link) -> None:
        if link.socket is not None and not link.paused:
            asyncio.get_running_loop().add_reader(link.socket, self._readable, link)

    def _readable(self, link: Link) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            if link.socket is None or link.paused:
                return
            try:
                message, descriptors = packets.receive(link.socket, wait=False)
            except BlockingIOError:
                return
            except (packets.Malformed, OSError) as error:
                log.warning("keeper of %s sent what it should not: %s", link.record.slot, error)
                self._lost(link)
                return
            packets.close_all(descriptors)  # a keeper has none to give
            if message is None:
                self._lost(link)
                return
            self._take(link, message)

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        kind = message.get("event")
        if kind == "hello":
            if message.get("pid") != link.record.pid:
                # We reached the dead one's queue before its successor, which now empties it, was announced to us.
                self._lost(link)
        elif kind == "exit":
            event = exit_event(message)
            if event is None:
                log.warning("keeper of %s sent an exit event with a wrong field", link.record.slot)
            elif link.box is not None:
                self._events.add(link.box, event["id"], {**event, "box": link.box})
        elif kind == "box_exit":
            if link.record.ended is None:
                self._ended(link, message.get("oom") is True)
            elif link.record.ended_acked:
                self._say(link, {"ack": [BOX_EXIT_ID]})
        elif kind == "spawner":
            log.info("spawner of %s: %s %s", link.record.slot, message.get("state"), str(message.get("detail"))[:200])
            if self.noticed is not None and link.box is not None and message.get("state") == "down" and link.init:
                self.noticed(link.box)

    # --- init

    def reaped(self, pid: int, status: int) -> None:
        """A child of hostd was reaped: remember the status if it was a box's init."""
        if any(link.record.init_pid == pid for link in self._links.values()):
            self._statuses[pid] = status

    def _watch_init(self, link: Link) -> bool:
        record = link.record
        if record.boot_id != self._boot_id:
            return False
        try:
            handle = os.pidfd_open(record.init_pid)
        except OSError:
            return False
        if start_time(record.init_pid) != record.init_start:
            os.close(handle)
            return False
        link.init = handle
        asyncio.get_running_loop().add_reader(handle, self._init_gone, link)
        return True

    def _unwatch_init(self, link: Link) -> None:
        if link.init is not None:
            asyncio.get_running_loop().remove_reader(link.init)
            os.close(link.init)
            link.init = None

    def _init_gone(self, link: Link) -> None:
        """Init ended. The keeper, which counts kills for want of memory as they come, knows best whether this was one;
        it has a moment to say so."""
        self._unwatch_init(link)
        asyncio.get_running_loop().call_later(_VERDICT_SECONDS, self._ended, link, None)

    def _ended(self, link: Link, oom: bool | None) -> None:
        """The box is down although nobody destroyed it."""
        self._unwatch_init(link)
        if link.gone or link.record.ended is not None:
            return
        record = link.record
        status = self._statuses.pop(record.init_pid, None)
        if status is None:
            try:
                pid, raw = os.waitpid(record.init_pid, os.WNOHANG)
                status = os.waitstatus_to_exitcode(raw) if pid else None
            except ChildProcessError:
                pass  # made under an earlier hostd: nobody here may ask
        if oom is None:
            try:
                oom = record.boot_id == self._boot_id and oom_kills(self._cfg, record.slot) > 0
            except OSError:
                oom = False
        exit = -1 if status is None else status if status >= 0 else 128 - status
        record.ended = {"event": "box_exit", "exit": exit, "oom": oom, "at_ms": time.time_ns() // 1_000_000}
        if record.boot_id != self._boot_id:
            record.ended["rebooted"] = True
        if oom:
            record.ended["memory"] = memory_figures(self._cfg, record.slot)
        self._save(record)
        log.warning("box %s (%s) ended: exit %s, oom %s", record.slot, link.box, exit, oom)
        if link.box is not None:
            self._events.add(link.box, BOX_EXIT_ID, {**record.ended, "box": link.box})


def start_time(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None when there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _refuse(connection: socket.socket, refused: Refused) -> None:
    try:
        connection.send(messages.refusal(refused), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError:
        pass
    connection.close()


async def _read_line(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    found = bytearray()
    while not found.endswith(b"\n"):
        data = await loop.sock_recv(connection, 65536)
        if not data:
            raise ConnectionError("the connection ended before its line did")
        found += data
        if len(found) > messages.REPLY_MAX:
            raise ConnectionError(f"a reply is over the limit of {messages.REPLY_MAX} bytes")
    return bytes(found)
