"""A patient caller: asks again with the same x-request-id until it is answered, follows a stream from offset to offset.

In charge of behaving as the published clients do, and of noting whatever a client must never see: a 500, an answer
that does not come, a wait that is answered too early, a stream that ends although nothing has.
"""

from __future__ import annotations

import asyncio
import collections
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import httpx

#: Beyond what an operation may hold, an answer may take so long on a machine that is busy being killed.
SLACK_SECONDS: Final = 20.0
PATIENCE_SECONDS: Final = 90.0
SILENCE_SECONDS: Final = 30.0
AGAIN: Final = frozenset({408, 409, 429})


class GivenUp(Exception):
    """No answer that counts within PATIENCE_SECONDS, or one that says no."""


class Caller:
    """One key's calls. `note` is told what should not be."""

    def __init__(self, base_url: str, key: str, note: Callable[[str], None]) -> None:
        self.note = note
        self.statuses: collections.Counter[str] = collections.Counter()
        self.cuts = 0
        self.http = httpx.AsyncClient(
            base_url=base_url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(SLACK_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            trust_env=False,
        )

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        hold: float = 0.0,
        patience: float = PATIENCE_SECONDS,
        final: frozenset[int] = frozenset(),
        **query: Any,
    ) -> Any:
        """The answer's JSON, however often it has to be asked for; None for a status in `final`. `hold`: seconds that
        the server may keep it back. Raises GivenUp."""
        headers = {} if method == "GET" else {"x-request-id": f"chaos-{uuid.uuid4()}"}
        until = time.monotonic() + patience
        why = ""
        while True:
            began = time.monotonic()
            try:
                answer = await self.http.request(
                    method, path, json=body, params=query, headers=headers, timeout=hold + SLACK_SECONDS
                )
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                why = repr(error)  # nobody listens: it is being started again
            except httpx.TimeoutException as error:
                why = repr(error)
                self.note(f"no answer: {method} {path} within {time.monotonic() - began:.1f} s ({why})")
            except httpx.TransportError as error:
                why = repr(error)
                self.cuts += 1
            else:
                status = answer.status_code
                self.statuses[f"{status}"] += 1
                if status in final:
                    return None
                if status < 300:
                    return answer.json()
                why = f"{status} {answer.text[:300]}"
                if status == 500:
                    self.note(f"a 500: {method} {path}: {answer.text[:300]}")
                elif status < 500 and status not in AGAIN:
                    raise GivenUp(f"{method} {path}: {why}")
            if time.monotonic() > until:
                raise GivenUp(f"{method} {path}: no success within {patience:g} s; last: {why}")
            await asyncio.sleep(random.uniform(0.1, 0.6))

    async def wait(self, path: str, seconds: float) -> bool:
        """One long-poll for the end of a command: whether it has ended."""
        began = time.monotonic()
        body = {"statuses": ["completed"], "timeout_seconds": seconds}
        try:
            answer = await self.http.post(f"{path}/wait_for_status", json=body, timeout=seconds + SLACK_SECONDS)
        except httpx.TimeoutException as error:
            if not isinstance(error, httpx.ConnectTimeout):
                self.note(f"no answer: {path}/wait_for_status of {seconds:.1f} s ({error!r})")
            return False
        except httpx.TransportError:
            self.cuts += 1
            await asyncio.sleep(random.uniform(0.1, 0.5))
            return False
        self.statuses[f"{answer.status_code}"] += 1
        if answer.status_code == 200:
            if answer.json()["status"] != "completed":
                self.note(f"a wait for completed was answered 200 with {answer.text[:200]}")
            return True
        if answer.status_code == 408:
            early = time.monotonic() - began < seconds - 0.5
            if early and answer.json().get("code") != "interrupted":  # as one is by a server that is being stopped
                self.note(f"a wait of {seconds:.1f} s was answered 408 after {time.monotonic() - began:.1f} s")
        elif answer.status_code < 500 and answer.status_code not in AGAIN:
            raise GivenUp(f"{path}/wait_for_status: {answer.status_code} {answer.text[:300]}")
        else:
            if answer.status_code == 500:
                self.note(f"a 500: {path}/wait_for_status: {answer.text[:300]}")
            await asyncio.sleep(random.uniform(0.1, 0.5))
        return False

    async def follow(self, path: str, stream: str, until: Callable[[], float]) -> tuple[str, int]:
        """(text, raw bytes) of a whole stream, from offset to offset over every break. Raises GivenUp after `until()`
        on the monotonic clock, or when the server says that bytes are lost."""
        parts: list[str] = []
        offset = 0
        while True:
            if time.monotonic() > until():
                raise GivenUp(f"{stream} of {path} did not end; {offset} bytes so far")
            try:
                async with self.http.stream(
                    "GET",
                    f"{path}/stream_{stream}_updates",
                    params={"offset": str(offset)},
                    headers={"accept": "text/event-stream"},
                    timeout=httpx.Timeout(SILENCE_SECONDS, pool=None),
                ) as answer:
                    self.statuses[f"stream {answer.status_code}"] += 1
                    if answer.status_code == 200:
                        offset, over = await self._events(answer, parts, offset, f"{stream} of {path}")
                        if over:
                            return "".join(parts), offset
                        continue
                    text = (await answer.aread()).decode(errors="replace")
                    if answer.status_code < 500 and answer.status_code not in AGAIN:
                        raise GivenUp(f"{stream} of {path}: {answer.status_code} {text[:300]}")
                    if answer.status_code == 500:
                        self.note(f"a 500: {stream} of {path}: {text[:300]}")
            except httpx.ReadTimeout:
                self.note(f"silence for {SILENCE_SECONDS:g} s: {stream} of {path} at {offset}")
                continue
            except Broken as broken:
                offset = broken.offset
                self.cuts += 1
            except httpx.TransportError:
                self.cuts += 1
            await asyncio.sleep(random.uniform(0.05, 0.4))

    async def _events(self, answer: httpx.Response, parts: list[str], offset: int, what: str) -> tuple[int, bool]:
        """The offset reached, and whether the stream has ended as one does that is complete."""
        event = ""
        try:
            async for line in _lines(answer):
                if line.startswith(b"event:"):
                    event = line[6:].strip().decode()
                elif line.startswith(b"data:"):
                    data = json.loads(line[5:])
                    if event == "error":
                        if int(data["code"]) != 408:
                            raise GivenUp(f"{what}: {data}")
                        self.statuses["stream error 408"] += 1
                        return offset, False
                    if data["offset"] <= offset and data["output"]:
                        self.note(f"{what}: an event goes from {offset} to {data['offset']}")
                    parts.append(data["output"])
                    offset = data["offset"]
                elif line.startswith(b"id:"):
                    self.note(f"{what}: an id line")
                elif not line:
                    event = ""
        except httpx.TransportError as error:
            if isinstance(error, httpx.ReadTimeout):
                self.note(f"silence for {SILENCE_SECONDS:g} s: {what} at {offset}")
            raise Broken(offset) from error
        return offset, True

    async def prober(self, stop: asyncio.Event, say: Callable[[str], None]) -> list[tuple[float, float]]:
        """Ask something small again and again; the outages, from and until when on the monotonic clock."""
        outages: list[tuple[float, float]] = []
        since: float | None = None
        while not stop.is_set():
            try:
                answer = await self.http.get("/v1/accounts/me", timeout=10.0)
                good = answer.status_code == 200
                if answer.status_code == 500:
                    self.note(f"a 500: GET /v1/accounts/me: {answer.text[:200]}")
            except httpx.TransportError:
                good = False
            now = time.monotonic()
            if good and since is not None:
                outages.append((since, now))
                say(f"the API answers again after {now - since:.1f} s")
            since = None if good else since or now
            await asyncio.sleep(0.2)
        if since is not None:
            outages.append((since, time.monotonic()))
        return outages


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Lines without their end, by bytes: httpx's own takes U+0085 and its like for ends of lines as well."""
    held = b""
    async for data in answer.aiter_raw():
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            yield line


class Broken(Exception):
    """The connection of a stream was lost after `offset`."""

    def __init__(self, offset: int) -> None:
        self.offset = offset


async def together(*work: Awaitable[Any]) -> list[Any]:
    """Await all; the first failure is raised when all have ended."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for one in done:
        if isinstance(one, BaseException):
            raise one
    return list(done)
