"""What goes on of a fake host: followed outputs and the event channel. See tests/fake_host.py."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hosts.errors import HostUnreachable

if TYPE_CHECKING:
    from tests.fake_boxes import Execution
    from tests.fake_host import FakeHost


class FakeFollowing:
    """A followed stream: what is there, then more as it comes, until the command has ended. For threads and loops."""

    def __init__(self, host: FakeHost, execution: Execution, stream: str, offset: int) -> None:
        self.host = host
        self.execution = execution
        self.stream = stream
        self.offset = offset
        self.start: int | None = offset
        self.trailer: dict[str, Any] | None = None
        self.closed = False

    def _piece(self) -> bytes | None:
        if self.host.unreachable or self.closed:
            raise HostUnreachable(self.host.host_id, "the stream was cut")
        ended = self.execution.state == "exited"
        data: bytes = getattr(self.execution, self.stream)[self.offset :]
        if data and self.execution.moved:
            self.trailer = {"total": self.offset, "exit": self.execution.exit, "reason": None, "complete": False}
            self.trailer["moved"] = True
            return None
        if data:
            self.offset += len(data)
            return data
        if ended:
            self.trailer = {
                "total": self.offset,
                "exit": self.execution.exit,
                "reason": self.execution.reason,
                "complete": True,
            }
            return None
        return b""

    def __iter__(self) -> Iterator[bytes]:
        while (piece := self._piece()) is not None:
            if piece:
                yield piece
            else:
                time.sleep(0.005)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := self._piece()) is not None:
            if piece:
                yield piece
            else:
                await asyncio.sleep(0.005)

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeFollowing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> FakeFollowing:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class FakeChanges:
    """Lines about the commands of a box: of all at first, then of each that has moved. For loops."""

    def __init__(self, host: FakeHost, read: Callable[[], list[dict[str, Any]]]) -> None:
        self.host = host
        self.read = read
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        known: dict[str, Any] = {}
        while not self.closed:
            if self.host.unreachable:
                raise HostUnreachable(self.host.host_id, "the stream was cut")
            with self.host.lock:
                fresh = [entry for entry in self.read() if known.get(entry["id"]) != entry]
            known |= {entry["id"]: entry for entry in fresh}
            if fresh:
                yield b"".join(json.dumps(entry).encode() + b"\n" for entry in fresh)
            await asyncio.sleep(0.005)

    async def aclose(self) -> None:
        self.closed = True

    async def __aenter__(self) -> FakeChanges:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True


class FakeWatching:
    """An event channel: what is unacknowledged first, then what comes; a heartbeat when there is nothing."""

    def __init__(self, host: FakeHost) -> None:
        self.host = host
        self.told: set[tuple[str, str]] = set()
        self.mute = False
        self.closed = False
        host.watching.append(self)

    def events(self, timeout: float) -> list[dict[str, Any]]:
        if self.closed or self.host.unreachable:
            raise HostUnreachable(self.host.host_id, "the event channel was cut")
        if self.mute:
            time.sleep(min(timeout, 0.05))
            return []
        with self.host.lock:
            fresh = [event for pair, event in self.host.unacked.items() if pair not in self.told]
            self.told.update(self.host.unacked)
        if fresh:
            return fresh
        time.sleep(0.01)
        return [{"event": "heartbeat", "monotonic": time.monotonic()}]

    def ack(self, pairs: Sequence[tuple[str, str]]) -> None:
        with self.host.lock:
            for pair in pairs:
                self.host._acknowledge(*pair)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeWatching:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
