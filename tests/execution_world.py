"""A running devbox on a fake host, and a worker that runs the flow of its commands, inside the test's transaction.

`world.devbox_id` belongs to alice. The worker claims what is due and lets waiters know, as the real worker and Redis
do; `pause` stops it. What the host reports comes in with `world.deliver()`, or by itself while `reporting` is on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import orjson
from django.db import connection

from api.asynchronous import in_database
from api.ids import new_id
from api.waiting import hub
from devboxes.models import Devbox
from executions.execution_flow import execution_flow
from executions.models import Execution
from hosts.client import use_fake
from hosts.models import Host
from tests.fake_host import FakeHost

ROW = {"cpu_millis": 1000, "memory_mb": 1024, "disk_mb": 1024, "keep_alive_seconds": 3600}


def make_host(name: str = "fake") -> FakeHost:
    """A ready host's row and its stand-in, in use."""
    host = Host.objects.create(
        id=new_id("hst"),
        name=name,
        state="ready",
        step="ready",
        wake_at=None,
        address="127.0.0.1",
        host_key="ssh-ed25519 AAAA",
        admin_user="root",
        admin_key_sealed=b"",
    )
    fake = FakeHost(host.pk)
    use_fake(host.pk, fake)
    return fake


def make_devbox(account_id: str, fake: FakeHost, **columns: Any) -> str:
    """A running devbox of that account on that host."""
    devbox = Devbox.objects.create(
        id=new_id("dbx"),
        account_id=account_id,
        host_id=fake.host_id,
        wake_at=None,
        **{"step": "running", "status": "running", **ROW, **columns},
    )
    fake.prepare_disk(box=devbox.pk, fence=1, image=fake.image, disk_bytes=1 << 30)
    fake.boot(box=devbox.pk, fence=1, cpu_millis=1000, memory_bytes=1 << 30, pids=100, disk_bytes=1 << 30, hostname="d")
    fake.calls.clear()
    return devbox.pk


class World:
    """See the module's docstring."""

    def __init__(self, web: Any, account_id: str) -> None:
        self.web = web
        self.fake = make_host()
        self.devbox_id = make_devbox(account_id, self.fake)
        self.url = f"/v1/devboxes/{self.devbox_id}"
        self.paused = False
        self.reporting = True

    def execution_url(self, execution_id: str, tail: str = "") -> str:
        """The URL of one of the devbox's executions."""
        return f"{self.url}/executions/{execution_id}{tail}"

    def row(self, execution_id: str) -> Execution:
        """The execution's row as it is now."""
        return Execution.objects.get(pk=execution_id)

    def work(self) -> list[str]:
        """Run what is due, and let the host report; the ids that were touched."""
        touched: list[str] = []
        if not self.paused:
            with connection.cursor() as cursor:
                # Inside one transaction now() stands still, and what is due "now" would never be.
                cursor.execute(
                    "UPDATE executions_execution SET wake_at = now() "
                    "WHERE wake_at > now() AND wake_at <= clock_timestamp()"
                )
                cursor.execute("SELECT id FROM executions_execution WHERE wake_at <= now() AND lease IS NULL")
                touched = [pk for (pk,) in cursor.fetchall() if execution_flow.run(pk)]
        if self.reporting and self.fake.unacked:
            touched += [pk for _, pk in self.fake.deliver()]
        return touched

    async def worker(self) -> None:
        """Work for ever."""
        while True:
            for pk in await in_database(self.work):
                hub.wake(pk)
            await asyncio.sleep(0.005)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A worker runs on the client's loop while a request is being made."""
        task = self.web.loop.create_task(self.worker())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.web.run(task)

    def started(self, party: Any, command: str = "sleep 1000", **body: Any) -> str:
        """A command that runs: its id."""
        answer = party.post(f"{self.url}/execute_async", {"command": command, **body})
        assert answer.status_code == 200, answer.text
        execution_id: str = answer.json()["execution_id"]
        self.work()
        assert self.row(execution_id).step in ("await_exit", "done", "store")
        return execution_id


class Events:
    """Server-sent events, taken apart the way the official clients do."""

    def __init__(self) -> None:
        self._buffer = b""
        self.comments = 0
        self.updates: list[dict[str, Any]] = []
        self.error: dict[str, Any] | None = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of a response."""
        self._buffer += data
        while b"\n\n" in self._buffer:
            block, self._buffer = self._buffer.split(b"\n\n", 1)
            lines = block.split(b"\n")
            if all(line.startswith(b":") for line in lines):
                self.comments += 1
                continue
            fields = dict(line.split(b": ", 1) for line in lines)
            assert set(fields) <= {b"event", b"data"}, fields
            event = orjson.loads(fields[b"data"])
            if fields.get(b"event") == b"error":
                assert self.error is None
                self.error = event
            else:
                assert b"event" not in fields
                self.updates.append(event)

    @property
    def text(self) -> str:
        """All output so far."""
        return "".join(update["output"] for update in self.updates)

    @property
    def offset(self) -> int:
        """What a client comes back with."""
        return int(self.updates[-1]["offset"])

    def ended(self) -> None:
        """Nothing of an event is left over."""
        assert self._buffer == b""


class Streaming:
    """A client of a streaming operation that sees every piece as it is sent, and may leave."""

    def __init__(self, party: Any, path: str) -> None:
        from config.asgi import application

        self.events = Events()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.over = False
        self._gone = asyncio.Event()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": query.encode(),
            "headers": [(b"authorization", f"Bearer {party.secret}".encode()), (b"accept", b"text/event-stream")],
        }
        self.task = asyncio.ensure_future(application(scope, self._receive, self._send))
        self._changed = asyncio.Condition()

    async def _receive(self) -> dict[str, Any]:
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            if self.status == 200:
                self.events.feed(message.get("body", b""))
            self.over = not message.get("more_body", False)
        async with self._changed:
            self._changed.notify_all()

    async def until(self, happened: Any, within: float = 5.0) -> None:
        """Wait until `happened(events)` is true or the answer is over."""
        async with asyncio.timeout(within), self._changed:
            await self._changed.wait_for(lambda: self.over or happened(self.events))
        assert happened(self.events)

    async def end(self, within: float = 5.0) -> Events:
        """Wait for the clean end of the answer."""
        await asyncio.wait_for(asyncio.shield(self.task), within)
        assert self.over
        self.events.ended()
        return self.events

    async def leave(self) -> None:
        """Close the connection."""
        self._gone.set()
        await asyncio.wait_for(self.task, 5)


class Holed:
    """Lets a fake host have dropped the middle of a command's stdout, as hostd does with what is too long to keep."""

    def __init__(self, fake: FakeHost, start: int, end: int) -> None:
        self.fake, self.start, self.end = fake, start, end
        self._read, self._follow = fake.read, fake.follow
        fake.read = self.read  # type: ignore[method-assign]
        fake.follow = self.follow  # type: ignore[method-assign]

    def read(self, *, offset: int, limit: int, last_lines: int | None = None, **rest: Any) -> Any:
        """As hostd's: moved behind the hole, cut before it."""
        if rest["stream"] == "stderr":
            return self._read(offset=offset, limit=limit, last_lines=last_lines, **rest)
        if last_lines is not None:
            limit = min(limit, len(self.fake._execution(rest["box"], rest["id"]).stdout) - self.end)
            return self._read(offset=offset, limit=limit, last_lines=last_lines, **rest)
        if self.start <= offset < self.end:
            offset = self.end
        if offset < self.start:
            limit = min(limit, self.start - offset)
        return self._read(offset=offset, limit=limit, **rest)

    def follow(self, *, stream: str, offset: int = 0, **rest: Any) -> Any:
        """As hostd's: begins behind the hole, ends where it begins and says where to go on."""
        if stream == "stderr":
            return self._follow(stream=stream, offset=offset, **rest)
        if self.start <= offset < self.end:
            offset = self.end
        following = self._follow(stream=stream, offset=offset, **rest)
        following.start = offset
        if offset < self.start:
            whole, piece = following.execution.stdout, following._piece

            def before() -> bytes | None:
                if following.offset >= self.start:
                    following.trailer = {"total": len(whole), "exit": None, "reason": None, "complete": False}
                    following.trailer |= {"resume": self.end, "dropped": [self.start, self.end]}
                    return None
                at = following.offset
                data: bytes | None = piece()
                if data:
                    following.offset = min(following.offset, self.start)
                    return data[: self.start - at]
                return data

            following._piece = before
        return following
