"""Connections to the servers in devboxes: HTTP/1.1 over a dialled port, kept for the next request.

In charge of one exchange's framing (h11), of what the errors on the way mean to a client, and of the pool with its
bounds. Not in charge of which headers travel (`tunnels.headers`), nor of the client's side (`tunnels.proxy`).
"""

from __future__ import annotations

import asyncio
import re
import time
import weakref
from collections import OrderedDict
from typing import Final

import h11

from api.errors import ApiError, Unavailable
from hosts.client import HostRefused, HostUnreachable, async_client_for
from hosts.dialling import Dialled
from tunnels.doors import Door
from tunnels.headers import HEADER_BYTES_MAX, HEADERS_MAX, Headers

KEPT_SECONDS: Final = 20.0
KEPT_EACH: Final = 8
KEPT_MAX: Final = 512
"""Connections that wait for the next request: to one port of one devbox, and of the process."""
READ_BYTES: Final = 256 * 1024
INTERIM_MAX: Final = 100
"""Interim answers (1xx) before the answer."""
PIECES: Final = 64
"""Chunks that are taken apart in one turn of the loop, which others wait for: a body of tiny ones takes long."""

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class BadGateway(ApiError):
    """The server in the devbox is not there, or does not speak HTTP."""

    status = 502
    code = "bad_gateway"


class GatewayTimeout(ApiError):
    status = 504
    code = "gateway_timeout"


class NothingListens(BadGateway):
    code = "nothing_listens"


class Stale(Exception):
    """A kept connection had ended before it was used: nothing of an answer came, the request may go out again."""


async def dial(door: Door, port: int) -> Dialled:
    """A fresh connection. Raises NothingListens, Unavailable."""
    connection = async_client_for(door.host_id).dial(box=door.devbox_id, port=port)
    try:
        await connection.connect()
    except HostRefused as error:
        if error.code == "refused":
            raise NothingListens(f"{error.message} of the devbox") from error
        raise Unavailable(f"the devbox takes no connection at the moment: {error.message}") from error
    except HostUnreachable as error:
        raise Unavailable("the devbox's host does not answer; try again shortly") from error
    return connection


class Upstream:
    """One connection, for one request after the other."""

    def __init__(self, dialled: Dialled, where: tuple[str, str, int]) -> None:
        self.where = where
        self.used = False
        self.kept_at = 0.0
        self._dialled = dialled
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEADER_BYTES_MAX)
        self._heard = False

    async def begin(self, method: bytes, target: bytes, headers: Headers) -> None:
        """Send the head of a request. Raises what `send` raises."""
        self._heard = False
        try:
            request = h11.Request(method=method, target=target, headers=headers)
        except h11.LocalProtocolError as error:
            raise ApiError(f"this request cannot be passed on: {error}", status=400, code="bad_request") from error
        await self._write(self._http.send(request))

    async def send(self, data: bytes) -> None:
        """Send some of the body. Raises BadGateway, Stale; h11.LocalProtocolError for more than was announced."""
        pieces = self._http.send_with_data_passthrough(h11.Data(data=data)) or [b""]
        await self._write(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    async def finish(self) -> None:
        """The body is whole. Raises as `send`."""
        await self._write(self._http.send(h11.EndOfMessage()))

    async def _write(self, data: bytes | None) -> None:
        if data:
            try:
                await self._dialled.write(data)
            except HostUnreachable as error:
                raise self._broken(error) from error

    def _broken(self, error: Exception) -> Exception:
        if self.used and not self._heard:
            return Stale()
        return BadGateway(f"the connection into the devbox broke: {error}")

    async def head(self) -> h11.Response:
        """The head of the answer; interim ones are left out. Raises BadGateway, Stale."""
        for _ in range(INTERIM_MAX + 1):
            event = await self._next()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    raise BadGateway("the server in the devbox changed the protocol without being asked to")
                continue
            if isinstance(event, h11.Response):
                size = sum(len(name) + len(value) + 4 for name, value in event.headers)
                if len(event.headers) > HEADERS_MAX or size > HEADER_BYTES_MAX:
                    most = f"{HEADERS_MAX} headers of {HEADER_BYTES_MAX} bytes"
                    raise BadGateway(f"the server in the devbox sent more than {most}")
                for name, value in event.headers:
                    if _CONTROL.search(value):
                        raise BadGateway(f"the server in the devbox sent a control character in {name.decode()}")
                return event
            raise BadGateway("the server in the devbox ended the connection without an answer")
        raise BadGateway(f"the server in the devbox sent more than {INTERIM_MAX} interim answers")

    async def body(self) -> bytes:
        """More of the answer's body, as much as has come; b"" once it is whole. Raises BadGateway when it was cut."""
        pieces: list[bytes] = []
        while len(pieces) < PIECES:
            event = await self._next(wait=not pieces)
            if isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
                continue
            if event is None or isinstance(event, h11.EndOfMessage):
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _next(self, *, wait: bool = True) -> h11.Event | None:
        """The next event; None when it has not come and is not waited for, or when all of an answer was taken."""
        while True:
            if self._http.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED) and self._heard:
                return None
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise BadGateway(f"what the server in the devbox answers is not HTTP: {error}") from error
            if event is h11.PAUSED:
                return None
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            if not wait:
                return None
            try:
                data = await self._dialled.read(READ_BYTES)
            except HostUnreachable as error:
                raise self._broken(error) from error
            if not data and self._dialled.reason == "reset" and self._heard:
                raise BadGateway("the server in the devbox reset the connection")
            if data:
                self._heard = True
            elif not self._heard:
                raise (
                    Stale
                    if self.used
                    else BadGateway("the server in the devbox ended the connection without an answer")
                )
            self._http.receive_data(data)

    def is_reusable(self) -> bool:
        """Is everything of this exchange done, both ways, with nothing behind it? Gets ready for the next one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self._http.trailing_data[0] or not self._dialled.is_fresh:
            return False
        self._http.start_next_cycle()
        self.used = True
        return True

    @property
    def is_fresh(self) -> bool:
        """Is it still open and quiet?"""
        return self._dialled.is_fresh

    async def aclose(self) -> None:
        """Hang up. May be called twice."""
        await self._dialled.aclose()


class Pool:
    """The connections of one loop that wait for a request; the least recently used one goes first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Upstream] = OrderedDict()
        self._by_port: dict[tuple[str, str, int], list[Upstream]] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def take(self, door: Door, port: int, *, fresh: bool) -> Upstream:
        """A connection: `fresh`, or one that is there already. Raises as `dial`."""
        where = door.host_id, door.devbox_id, port
        while not fresh and (kept := self._by_port.get(where)):
            upstream = kept[-1]
            self._remove(upstream)
            if upstream.is_fresh:
                return upstream
            await upstream.aclose()
        return Upstream(await dial(door, port), where)

    async def give(self, upstream: Upstream) -> None:
        """Keep it for the next request, or hang up when it cannot take one."""
        kept = self._by_port.get(upstream.where, [])
        if len(kept) >= KEPT_EACH or not upstream.is_reusable():
            await upstream.aclose()
            return
        upstream.kept_at = time.monotonic()
        self._kept[id(upstream)] = upstream
        self._by_port.setdefault(upstream.where, []).append(upstream)
        if len(self._kept) > KEPT_MAX:
            oldest = next(iter(self._kept.values()))
            self._remove(oldest)
            await oldest.aclose()
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())

    def _remove(self, upstream: Upstream) -> None:
        del self._kept[id(upstream)]
        kept = self._by_port[upstream.where]
        kept.remove(upstream)
        if not kept:
            del self._by_port[upstream.where]

    async def _sweep(self) -> None:
        """Hang up what nobody used for a while; ends when nothing is kept."""
        while self._kept:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for upstream in list(self._kept.values()):
                if now - upstream.kept_at > KEPT_SECONDS or not upstream.is_fresh:
                    self._remove(upstream)
                    await upstream.aclose()


_pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pool] = weakref.WeakKeyDictionary()


def pool() -> Pool:
    """The running loop's."""
    loop = asyncio.get_running_loop()
    found = _pools.get(loop)
    if found is None:
        found = _pools[loop] = Pool()
    return found
