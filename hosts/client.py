"""The port to a host: one typed method per verb of hostd, for threads and for the event loop.

In charge of what a verb is called with and answers, and of which client belongs to a host id. How bytes travel is
`hosts.links` and `hosts.ssh`; what a verb does is hostd. Tests put an in-memory host here with `use_fake`.

Every call is bounded (`ASK_SECONDS`) and raises only `HostUnreachable`, `HostRefused` (`StaleFence`) or ValueError
(an argument that the protocol does not allow: a caller's mistake never travels). Every verb may be sent twice.
"""

from __future__ import annotations

import base64
import builtins
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from hostd import messages
from hostd.messages import (
    BootReply,
    FollowTrailer,
    HelloReply,
    ListReply,
    PrepareDiskReply,
    ReportReply,
    SpawnBody,
    StateReply,
    StdinReply,
    Stream,
)
from hosts.errors import HostError, HostRefused, HostUnreachable, StaleFence

__all__ = [
    "AsyncHostClient",
    "HostClient",
    "HostError",
    "HostRefused",
    "HostUnreachable",
    "ReadResult",
    "StaleFence",
    "async_client_for",
    "client_for",
    "outputs",
    "use_fake",
]

ASK_SECONDS = 5.0
"""The longest any call may take, dialling included: no step of a flow blocks over it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReadResult:
    """A piece of an output. `size`: bytes in the whole stream so far; `offset`: where `data` starts in it."""

    size: int
    offset: int
    data: bytes


def outputs(reply: StateReply | messages.ExitEvent | Mapping[str, Any]) -> tuple[bytes, bytes] | None:
    """stdout and stderr when the reply carries them whole (together <= 64 KiB), else None: read them from the host."""
    out, err = reply.get("stdout"), reply.get("stderr")
    if not isinstance(out, str) or not isinstance(err, str):
        return None
    return base64.b64decode(out), base64.b64decode(err)


class Following:
    """A stream followed by a thread: iterate for its bytes, then read `trailer`. Use as a context manager."""

    start: int | None = None
    """Where the bytes really begin, set before the first one: past the offset asked for when that was dropped."""
    trailer: FollowTrailer | None = None
    """Set when the stream ended by itself. A cut raises HostUnreachable instead and leaves it None. Not `complete`:
    what follows was dropped, the stream goes on at `resume`."""

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncFollowing:
    """A stream followed in the loop: `async with` it, `async for` its bytes, then read `trailer`."""

    start: int | None = None
    """Where the bytes really begin, set before the first one: past the offset asked for when that was dropped."""
    trailer: FollowTrailer | None = None
    """Set when the stream ended by itself. A cut raises HostUnreachable instead and leaves it None. Not `complete`:
    what follows was dropped, the stream goes on at `resume`."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


class HostClient:
    """Asks one host from threads. Cheap to make, safe to share; the connections behind it are pooled per process."""

    def __init__(self, host_id: str) -> None:
        self.host_id = host_id

    def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> Any:
        raise NotImplementedError

    # --- the host ---

    def hello(self) -> HelloReply:
        """Who it is, what it has, what it runs."""
        return cast(HelloReply, self._ask("hello"))

    def report(self) -> ReportReply:
        """Everything on the host that is ours, executions included."""
        return cast(ReportReply, self._ask("report"))

    def prepare_disk(self, *, box: str, fence: int, image: str, disk_bytes: int) -> PrepareDiskReply:
        """Clone the image, or claim a warm box that fits. HostRefused: no_space, no_slot, unknown_image."""
        return cast(
            PrepareDiskReply, self._ask("prepare_disk", box=box, fence=fence, image=image, disk_bytes=disk_bytes)
        )

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

    def spawn(self, *, box: str, id: str, fence: int, body: SpawnBody, hold_ms: int | None = None) -> StateReply:
        """Start a command under that id; a known id answers with its state and starts nothing."""
        return cast(
            StateReply, self._ask("spawn", json.dumps(body).encode(), box=box, id=id, fence=fence, hold_ms=hold_ms)
        )

    def state(self, *, box: str, id: str) -> StateReply:
        """HostRefused unknown_id: the box has never heard of it."""
        return cast(StateReply, self._ask("state", box=box, id=id))

    def kill(self, *, box: str, id: str, fence: int, signal: int, group: bool = True) -> StateReply:
        """Signal the command; an unknown id gets a tombstone, so that a late spawn never starts it."""
        return cast(StateReply, self._ask("kill", box=box, id=id, fence=fence, signal=signal, group=group))

    def ack(self, *, box: str, ids: Sequence[str]) -> None:
        """Their exits are committed. Normally the watcher does this on its event channel."""
        self._ask("ack", box=box, ids=builtins.list(ids))

    def read(
        self, *, box: str, id: str, stream: Stream, offset: int, limit: int, last_lines: int | None = None
    ) -> ReadResult:
        """At most `limit` (<= 16 MiB) bytes from `offset`; with `last_lines`, the last lines within the limit."""
        raise NotImplementedError

    def follow(self, *, box: str, id: str, stream: Stream, offset: int = 0) -> Following:
        """The stream from `offset` until it is complete. No time limit but that of silence on the connection."""
        raise NotImplementedError

    def stdin(self, *, box: str, id: str, request: str, eof: bool = False, body: bytes = b"") -> StdinReply:
        """Feed a command; `request` deduplicates."""
        return cast(StdinReply, self._ask("stdin", body, box=box, id=id, request=request, eof=eof))

    def list(self, *, box: str) -> ListReply:
        """The executions that the box knows."""
        return cast(ListReply, self._ask("list", box=box))


class AsyncHostClient:
    """Asks one host from the event loop; the same verbs, awaited."""

    def __init__(self, host_id: str) -> None:
        self.host_id = host_id

    async def _ask(self, verb: str, body: bytes | None = None, **fields: Any) -> Any:
        raise NotImplementedError

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

    async def kill(self, *, box: str, id: str, fence: int, signal: int, group: bool = True) -> StateReply:
        """See `HostClient.kill`."""
        return cast(StateReply, await self._ask("kill", box=box, id=id, fence=fence, signal=signal, group=group))

    async def read(
        self, *, box: str, id: str, stream: Stream, offset: int, limit: int, last_lines: int | None = None
    ) -> ReadResult:
        """See `HostClient.read`."""
        raise NotImplementedError

    def follow(self, *, box: str, id: str, stream: Stream, offset: int = 0) -> AsyncFollowing:
        """See `HostClient.follow`; nothing is sent before the first byte is asked for."""
        raise NotImplementedError

    async def stdin(self, *, box: str, id: str, request: str, eof: bool = False, body: bytes = b"") -> StdinReply:
        """See `HostClient.stdin`."""
        return cast(StdinReply, await self._ask("stdin", body, box=box, id=id, request=request, eof=eof))

    async def list(self, *, box: str) -> ListReply:
        """See `HostClient.list`."""
        return cast(ListReply, await self._ask("list", box=box))


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
