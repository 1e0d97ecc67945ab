"""The port to a host: one typed method per verb of hostd, for threads and for the event loop.

In charge of what a verb is called with and answers, and of which client belongs to a host id. How bytes travel is
`hosts.links` and `hosts.ssh`; what a verb does is hostd. Tests put an in-memory host here with `use_fake`.

Every call is bounded (`ASK_SECONDS`) and raises only `HostUnreachable`, `HostRefused` (`StaleFence`) or ValueError
(an argument that the protocol does not allow: a caller's mistake never travels). Every verb may be sent twice.
"""

from __future__ import annotations

import asyncio
import base64
import builtins
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from hostd import messages
from hostd.messages import (
    BootReply,
    HelloReply,
    LateStream,
    ListReply,
    PrepareDiskReply,
    ReportReply,
    Sizes,
    SpawnBody,
    StateReply,
    StdinReply,
    Stream,
    User,
)
from hosts import conversation, ssh
from hosts.activity import Activity, parse_activity
from hosts.dialling import Dialled
from hosts.errors import HostError, HostRefused, HostUnreachable, StaleFence
from hosts.files import FileRead, FileWrite, path64
from hosts.links import Link, link_for
from hosts.running import Running
from hosts.snapshots import SnapshotVerbs
from hosts.streams import ASK_SECONDS, AsyncFollowing, Following, Watching, begin
from hosts.terminals import Attached

T = TypeVar("T")

__all__ = [
    "Activity",
    "AsyncHostClient",
    "HostClient",
    "HostError",
    "HostRefused",
    "HostUnreachable",
    "IndexResult",
    "ReadResult",
    "StaleFence",
    "async_client_for",
    "client_for",
    "index_records",
    "outputs",
    "parse_sizes",
    "use_fake",
]

SMALL_READ = 65536
"""Reads above so many bytes go over the bulk connection, where they delay no short call."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReadResult:
    """A piece of an output. `size`: bytes in the whole stream so far; `offset`: where `data` starts in it."""

    size: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class IndexResult:
    """When a command's output came: `records` as `hostd.messages.INDEX_RECORD` describes them. `sizes` are the bytes
    of its two streams so far, `late` those that came after its exit."""

    sizes: tuple[int, int]
    late: tuple[int, int]
    exited: bool
    started_at_ms: int
    records: bytes


def _index_result(reply: Mapping[str, Any], records: bytes) -> IndexResult:
    checked_sizes(reply)
    sizes, late = reply["sizes"], reply["late"]
    exited = reply["state"] == "exited"
    return IndexResult((sizes[0], sizes[1]), (late[0], late[1]), exited, reply["started_at_ms"], records)


def parse_sizes(line: bytes) -> Sizes:
    """A line of `changes`. Raises ProtocolError or HostRefused: a box's keeper is not believed."""
    return checked_sizes(messages.parse_object(line))


def checked_sizes(told: Any) -> Sizes:
    """One command's line of `sizes`. Raises HostRefused for one that cannot be."""

    def two(value: object) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n >= 0 for n in value)

    right = isinstance(told, dict) and messages.is_work_id(told.get("id")) and two(told.get("sizes"))
    began = told.get("started_at_ms") if isinstance(told, dict) else None
    right = right and two(told.get("late")) and isinstance(began, int) and 0 <= began < 1 << 53
    if not right or told.get("state") not in ("running", "exited"):
        raise HostRefused("internal", "what its keeper tells of a command has a wrong field")
    return cast(Sizes, told)


def index_records(reply: StateReply | messages.ExitEvent | Mapping[str, Any]) -> bytes | None:
    """The index that comes with whole outputs, None where there is none."""
    text = reply.get("index")
    if not isinstance(text, str) or len(text) > messages.INDEX_MAX * 2:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None  # from a box's keeper, which is not believed


def outputs(reply: StateReply | messages.ExitEvent | Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    """stdout and stderr when the reply carries them whole (together <= 64 KiB), else None: read them from the host."""
    out, err = reply.get("stdout"), reply.get("stderr")
    if not isinstance(out, str) or not isinstance(err, str):
        return None
    return base64.b64decode(out), base64.b64decode(err)


class HostClient(SnapshotVerbs):
    """Asks one host from threads. Cheap to make, safe to share; the connections behind it are pooled per process."""

    def __init__(self, host_id: str, link: Link | None = None) -> None:
        self.host_id = host_id
        self._link = link or link_for(host_id)

    def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> dict[str, Any]:
        return self._call(verb, body, fields, _nothing_more)

    def _call(
        self,
        verb: str,
        body: bytes | None,
        fields: Mapping[str, Any],
        more: Callable[[conversation.Inbox, dict[str, Any], Callable[[], None]], T],
        *,
        bulk: bool = False,
    ) -> T:
        """One request on a channel of its own; `more` takes what follows the reply line, by calling for more bytes.

        A channel that is cut before the first byte of an answer is tried once more on a fresh one: every verb may be
        sent twice.
        """
        line = _line(verb, body, fields)
        box = fields.get("box", "") if verb in messages.BOX_VERBS else ""
        deadline = time.monotonic() + ASK_SECONDS
        with self._link.slot():
            for last in (False, True):
                stream = self._link.open(deadline, bulk=bulk, kept_for=None if bulk or last else box)
                inbox, answered = conversation.Inbox(), False
                since, heard = time.monotonic(), False

                def pull(stream: ssh.ThreadStream = stream, inbox: conversation.Inbox = inbox) -> None:
                    nonlocal heard
                    inbox.feed(stream.recv(deadline, 1 << 18))
                    heard = True

                try:
                    stream.send(line + body if body and len(body) < 16384 else line, deadline)
                    if body and len(body) >= 16384:
                        stream.send(body, deadline)
                    while (answer := inbox.line()) is None:
                        pull()
                    found = more(inbox, conversation.answer(self.host_id, answer), pull)
                    self._link.breaker.worked()
                    answered = True
                    return found
                except HostRefused:
                    self._link.breaker.worked()
                    raise
                except ssh.SshError as error:
                    if isinstance(error, ssh.ConnectionCut) and not heard and not last:
                        continue
                    self._link.unanswered(stream, since, error)
                    raise HostUnreachable(self.host_id, f"{verb}: {error}") from error
                except messages.ProtocolError as error:
                    raise HostUnreachable(self.host_id, f"{verb}: {error}") from error
                finally:
                    if answered and not bulk:
                        self._link.keep(stream, box)
                    else:
                        stream.close()
        raise AssertionError("the second try either answers or raises")

    # --- the host ---

    def hello(self) -> HelloReply:
        """Who it is, what it has, what it runs."""
        return cast(HelloReply, self._ask("hello"))

    def report(self) -> ReportReply:
        """Everything on the host that is ours, executions included."""
        return cast(ReportReply, self._ask("report"))

    def prepare_disk(
        self, *, box: str, fence: int, image: str, disk_bytes: int, snapshot: str | None = None
    ) -> PrepareDiskReply:
        """Clone the snapshot; or the image, or claim a warm box that fits. HostRefused: no_space, no_slot,
        unknown_image, unknown_id."""
        fields: dict[str, Any] = {"box": box, "fence": fence, "image": image, "disk_bytes": disk_bytes}
        return cast(PrepareDiskReply, self._ask("prepare_disk", **fields, snapshot=snapshot))

    def boot(
        self, *, box: str, fence: int, cpu_millis: int, memory_bytes: int, pids: int, disk_bytes: int, hostname: str
    ) -> BootReply:
        """Start the box on its disk; of a warm or running one only the limits are written."""
        return cast(
            BootReply,
            self._ask(
                "boot",
                box=box,
                fence=fence,
                cpu_millis=cpu_millis,
                memory_bytes=memory_bytes,
                pids=pids,
                disk_bytes=disk_bytes,
                hostname=hostname,
            ),
        )

    def suspend(self, *, box: str, fence: int) -> bool:
        """End the box; of all it had only its disk stays, written for good. False: it goes on, ask again. HostRefused
        unknown_box: there is no disk of it."""
        return bool(self._ask("suspend", box=box, fence=fence)["done"])

    def resume(
        self,
        *,
        box: str,
        fence: int,
        image: str,
        disk_bytes: int,
        machine_id: str | None = None,
        snapshot: str | None = None,
    ) -> str:
        """Give the suspended box a slot again, with its disk, to be booted; the slot. `snapshot`: make the disk of
        that if there is none. HostRefused: unknown_box when there is no disk of it, no_slot."""
        fields: dict[str, Any] = {"box": box, "fence": fence, "image": image, "disk_bytes": disk_bytes}
        return str(self._ask("resume", machine_id=machine_id, snapshot=snapshot, **fields)["slot"])

    def destroy(self, *, box: str, fence: int, keep_disk: bool = False) -> None:
        """Leave nothing of the box, whatever state it is in; unknown boxes get a tombstone."""
        self._ask("destroy", box=box, fence=fence, keep_disk=keep_disk)

    def set_warm(self, *, count: int, image: str) -> None:
        """Keep `count` boxes ready ahead of need."""
        self._ask("set_warm", count=count, image=image)

    def ship(self, *, digest: str, body: bytes) -> None:
        """Put a bundle of hostd on the host; it is verified by its digest and not started."""
        self._ask("ship", digest=digest, body=body)

    def restart(self, *, digest: str) -> None:
        """Let hostd become the shipped bundle. Nothing running is lost."""
        self._ask("restart", digest=digest)

    # --- a box ---

    def spawn(
        self,
        *,
        box: str,
        id: str,
        fence: int,
        body: SpawnBody,
        hold_ms: int | None = None,
        cap: int | None = None,
    ) -> StateReply:
        """Start a command under that id; a known id answers with its state and starts nothing. `cap`: bytes to keep of
        each stream, None for the host's own."""
        fields: dict[str, Any] = {"box": box, "id": id, "fence": fence, "hold_ms": hold_ms, "cap": cap}
        return cast(StateReply, self._ask("spawn", json.dumps(body).encode(), **fields))

    def state(self, *, box: str, id: str) -> StateReply:
        """HostRefused unknown_id: the box has never heard of it."""
        return cast(StateReply, self._ask("state", box=box, id=id))

    def kill(
        self, *, box: str, id: str, fence: int, signal: int, group: bool = True, request: str | None = None
    ) -> StateReply:
        """Signal the command; an unknown id gets a tombstone, so that a late spawn never starts it. With `request`, a
        repetition signals nothing."""
        fields: dict[str, Any] = {"box": box, "id": id, "fence": fence, "signal": signal, "group": group}
        return cast(StateReply, self._ask("kill", request=request, **fields))

    def ack(self, *, box: str, ids: Sequence[str]) -> None:
        """Their exits are committed. Normally the watcher does this on its event channel."""
        self._ask("ack", box=box, ids=builtins.list(ids))

    def forget(self, *, box: str, id: str, fence: int) -> None:
        """Its outputs are stored for good: the box may delete them. Followers are told that they have moved."""
        self._ask("forget", box=box, ids=[id], fence=fence)

    def read(
        self, *, box: str, id: str, stream: Stream | LateStream, offset: int, limit: int, last_lines: int | None = None
    ) -> ReadResult:
        """At most `limit` (<= 16 MiB) bytes from `offset`; with `last_lines`, the last lines within the limit."""
        fields = {"box": box, "id": id, "stream": stream, "offset": offset, "limit": limit, "last_lines": last_lines}

        def rest(inbox: conversation.Inbox, reply: dict[str, Any], pull: Callable[[], None]) -> ReadResult:
            size = conversation.body_size(self.host_id, reply, messages.READ_MAX)
            while (data := inbox.body(size)) is None:
                pull()
            return ReadResult(reply["size"], reply["offset"], data)

        return self._call("read", None, fields, rest, bulk=limit > SMALL_READ)

    def index(self, *, box: str, id: str, late: bool = False, last: int | None = None) -> IndexResult:
        """When the command's output came, or, with `late`, what it left behind wrote after its exit; the `last` so many
        records, or all."""

        def rest(inbox: conversation.Inbox, reply: dict[str, Any], pull: Callable[[], None]) -> IndexResult:
            size = conversation.body_size(self.host_id, reply, messages.INDEX_MAX)
            while (data := inbox.body(size)) is None:
                pull()
            return _index_result(reply, data)

        return self._call("index", None, {"box": box, "id": id, "late": late, "last": last}, rest)

    def sizes(self, *, box: str) -> Sequence[Sizes]:
        """Commands that run, whose end is not acknowledged, that wrote after it or might still do so."""
        return [checked_sizes(told) for told in self._ask("sizes", box=box)["executions"]]

    def activity(self, *, box: str) -> Activity:
        """What goes on in it, and since when nothing does."""
        return parse_activity(self._ask("activity", box=box))

    def follow(self, *, box: str, id: str, stream: Stream, offset: int = 0) -> Following:
        """The stream from `offset` until it is complete. No time limit but that of silence on the connection."""
        line = _line("follow", None, {"box": box, "id": id, "stream": stream, "offset": offset})
        found, inbox, reply, free = self._begin(line, bulk=True)
        return Following(self.host_id, found, inbox, conversation.offset(reply), free)

    def watch(self, *, stats_seconds: int | None = None) -> Watching:
        """The host's event channel; all unacknowledged events come first. Two at once are allowed and get the same.
        From then on what boxes use is told every `stats_seconds` (0: never)."""
        stream, inbox, _, free = self._begin(_line("watch", None, {"stats_seconds": stats_seconds}), bulk=False)
        free()
        return Watching(self.host_id, stream, inbox)

    def _begin(
        self, line: bytes, *, bulk: bool
    ) -> tuple[ssh.ThreadStream, conversation.Inbox, dict[str, Any], Callable[[], None]]:
        slot = self._link.slot(bulk=bulk)
        slot.__enter__()
        deadline = time.monotonic() + ASK_SECONDS
        stream: ssh.ThreadStream | None = None
        try:
            stream, inbox = self._link.open(deadline, bulk=bulk, window=ssh.IDLE_WINDOW), conversation.Inbox()
            since = time.monotonic()
            try:
                stream.send(line, deadline)
                while (answer := inbox.line()) is None:
                    inbox.feed(stream.recv(deadline))
            except ssh.SshError as error:
                self._link.unanswered(stream, since, error)
                raise HostUnreachable(self.host_id, str(error)) from error
            except messages.ProtocolError as error:
                raise HostUnreachable(self.host_id, str(error)) from error
            reply = conversation.answer(self.host_id, answer)
            self._link.breaker.worked()
        except BaseException:
            if stream is not None:
                stream.close()
            slot.__exit__(None, None, None)
            raise
        return stream, inbox, reply, lambda: _leave(slot)

    def stdin(self, *, box: str, id: str, request: str, eof: bool = False, body: bytes = b"") -> StdinReply:
        """Feed a command; `request` deduplicates."""
        return cast(StdinReply, self._ask("stdin", body, box=box, id=id, request=request, eof=eof))

    def list(self, *, box: str) -> ListReply:
        """The executions that the box knows."""
        return cast(ListReply, self._ask("list", box=box))


class AsyncHostClient:
    """Asks one host from the event loop; the same verbs, awaited."""

    def __init__(self, host_id: str) -> None:
        from hosts.loop_links import loop_link_for  # it needs the web tier's threads, which a host's tools do not

        self.host_id = host_id
        self._link = loop_link_for(host_id)

    async def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> dict[str, Any]:
        return await self._call(verb, body, fields, None)

    async def _call(
        self, verb: str, body: bytes | None, fields: Mapping[str, Any], limit: int | None, *, bulk: bool = False
    ) -> dict[str, Any]:
        """See `HostClient._call`; with `limit`, the reply's raw body comes as its `data`."""
        line = _line(verb, body, fields)
        deadline = time.monotonic() + ASK_SECONDS
        async with self._link.slot():
            for last in (False, True):
                stream: ssh.LoopStream | None = None
                since = time.monotonic()
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - since):
                        stream, inbox, reply = await begin(
                            self._link, line, body or b"", deadline, bulk=bulk, window=ssh.WINDOW
                        )
                        if limit is not None:
                            size = conversation.body_size(self.host_id, reply, limit)
                            while (data := inbox.body(size)) is None:
                                inbox.feed(await stream.read(1 << 18))
                            reply["data"] = data
                    return reply
                except TimeoutError as error:
                    raise self._unanswered(
                        verb, stream, since, ssh.TimedOut("the host did not answer in time")
                    ) from error
                except ssh.SshError as error:
                    if isinstance(error, ssh.ConnectionCut) and stream is None and not last:
                        continue
                    raise self._unanswered(verb, stream, since, error) from error
                except messages.ProtocolError as error:
                    raise HostUnreachable(self.host_id, f"{verb}: {error}") from error
                finally:
                    if stream is not None:
                        stream.aclose()
        raise AssertionError("the second try either answers or raises")

    def _unanswered(
        self, verb: str, stream: ssh.LoopStream | None, since: float, error: ssh.SshError
    ) -> HostUnreachable:
        if stream is not None:
            self._link.unanswered(stream, since, error)
        else:
            self._link.failed(str(error), 1)
        return HostUnreachable(self.host_id, f"{verb}: {error}")

    async def hello(self) -> HelloReply:
        """See `HostClient.hello`."""
        return cast(HelloReply, await self._ask("hello"))

    async def report(self) -> ReportReply:
        """See `HostClient.report`."""
        return cast(ReportReply, await self._ask("report"))

    async def spawn(self, *, box: str, id: str, fence: int, body: SpawnBody, hold_ms: int | None = None) -> StateReply:
        """See `HostClient.spawn`."""
        return cast(
            StateReply,
            await self._ask("spawn", json.dumps(body).encode(), box=box, id=id, fence=fence, hold_ms=hold_ms),
        )

    async def state(self, *, box: str, id: str) -> StateReply:
        """See `HostClient.state`."""
        return cast(StateReply, await self._ask("state", box=box, id=id))

    async def kill(
        self, *, box: str, id: str, fence: int, signal: int, group: bool = True, request: str | None = None
    ) -> StateReply:
        """See `HostClient.kill`."""
        fields: dict[str, Any] = {"box": box, "id": id, "fence": fence, "signal": signal, "group": group}
        return cast(StateReply, await self._ask("kill", request=request, **fields))

    async def read(
        self, *, box: str, id: str, stream: Stream | LateStream, offset: int, limit: int, last_lines: int | None = None
    ) -> ReadResult:
        """See `HostClient.read`."""
        fields = {"box": box, "id": id, "stream": stream, "offset": offset, "limit": limit, "last_lines": last_lines}
        reply = await self._call("read", None, fields, messages.READ_MAX, bulk=limit > SMALL_READ)
        return ReadResult(reply["size"], reply["offset"], reply["data"])

    async def index(self, *, box: str, id: str, late: bool = False, last: int | None = None) -> IndexResult:
        """See `HostClient.index`."""
        fields = {"box": box, "id": id, "late": late, "last": last}
        reply = await self._call("index", None, fields, messages.INDEX_MAX)
        return _index_result(reply, reply["data"])

    async def sizes(self, *, box: str) -> Sequence[Sizes]:
        """See `HostClient.sizes`."""
        return [checked_sizes(told) for told in (await self._ask("sizes", box=box))["executions"]]

    def changes(self, *, box: str) -> AsyncFollowing:
        """Lines of JSON as `sizes` answers them: of what moves now, then of each command whenever it moved. It never
        ends by itself; nothing is sent before the first is asked for."""
        return AsyncFollowing(self._link, _line("changes", None, {"box": box}))

    def follow(self, *, box: str, id: str, stream: Stream, offset: int = 0) -> AsyncFollowing:
        """See `HostClient.follow`; nothing is sent before the first byte is asked for."""
        return AsyncFollowing(
            self._link, _line("follow", None, {"box": box, "id": id, "stream": stream, "offset": offset})
        )

    async def stdin(self, *, box: str, id: str, request: str, eof: bool = False, body: bytes = b"") -> StdinReply:
        """See `HostClient.stdin`."""
        return cast(StdinReply, await self._ask("stdin", body, box=box, id=id, request=request, eof=eof))

    async def list(self, *, box: str) -> ListReply:
        """See `HostClient.list`."""
        return cast(ListReply, await self._ask("list", box=box))

    async def terminal(self, *, box: str, op: str, session: str, body: bytes | None = None, **fields: Any) -> Any:
        """Open, resize, signal or close a terminal; the reply. `fields` are the op's: see `hostd.terminals`."""
        return await self._ask("terminal", body, box=box, op=op, session=session, **fields)

    def attach(self, *, box: str, session: str, view: bool, takeover: bool, replay: bool) -> Attached:
        """A place at an open terminal. Nothing is sent before it is entered."""
        how = {"view": view, "takeover": takeover, "replay": replay}
        return Attached(self._link, messages.request("terminal", box=box, op="attach", session=session, **how))

    def running(self, *, box: str, body: bytes, **fields: Any) -> Running:
        """A program of the box that this client attends. `fields`: cols and rows, for one on a terminal. Nothing is
        sent before it is started, with the same `body`: a spawn's."""
        return Running(self._link, messages.request("run", box=box, body=len(body), **fields))

    def read_file(
        self,
        *,
        box: str,
        user: User,
        path: bytes,
        offset: int = 0,
        length: int | None = None,
        limit: int | None = None,
        text: bool = False,
    ) -> FileRead:
        """A file of the box, from `offset` (from the end when negative). More than `limit` bytes: too_large; with
        `text`, what is not UTF-8: not_text. Nothing is sent before it is entered."""
        fields = {"offset": offset, "length": length, "limit": limit, "text": text}
        return FileRead(self._link, _file_line(box, "read", user, path, **fields), box)

    def write_file(self, *, box: str, user: User, path: bytes | None) -> FileWrite:
        """A file of the box, made or replaced; without a path, `finish` names it."""
        return FileWrite(self._link, _file_line(box, "write", user, path), box)

    def dial(self, *, box: str, port: int) -> Dialled:
        """A connection to a TCP port of the box's own loopback. Nothing is sent before it is entered."""
        return Dialled(self._link, messages.request("dial", box=box, port=port))


def _line(verb: str, body: bytes | None, fields: Mapping[str, Any]) -> bytes:
    size = {} if body is None else {"body": len(body)}
    return messages.request(verb, **size, **fields)


def _file_line(box: str, op: str, user: User, path: bytes | None, **fields: Any) -> bytes:
    named = None if path is None else path64(path)
    return messages.request("file", box=box, op=op, user=user, path64=named, **fields)


def _leave(slot: contextlib.AbstractContextManager[None]) -> None:
    slot.__exit__(None, None, None)


def _nothing_more(inbox: conversation.Inbox, reply: dict[str, Any], pull: Callable[[], None]) -> dict[str, Any]:
    return reply


_fakes: dict[str, Any] = {}


def use_fake(host_id: str, fake: Any | None) -> None:
    """Let `client_for` and `async_client_for` answer with a stand-in for that host (tests); None: no longer.

    The stand-in has the methods of `HostClient`, and `asynchronous`: an object with those of `AsyncHostClient`.
    """
    if fake is None:
        _fakes.pop(host_id, None)
    else:
        _fakes[host_id] = fake


def client_for(host_id: str) -> HostClient:
    """The client of that host for threads. Does not dial."""
    fake = _fakes.get(host_id)
    return HostClient(host_id) if fake is None else cast(HostClient, fake)


def async_client_for(host_id: str) -> AsyncHostClient:
    """The client of that host for the running event loop. Does not dial."""
    fake = _fakes.get(host_id)
    return AsyncHostClient(host_id) if fake is None else cast(AsyncHostClient, fake.asynchronous)
