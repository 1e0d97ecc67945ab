"""One HTTP request through a tunnel: the client on one side, a server in a devbox on the other.

In charge of moving both bodies as they come, each as fast as its slower end, of every wait's bound, and of never making
a cut answer look whole. Requests are taken apart and made anew, so nothing of a client's framing reaches the server.

Only what may be repeated goes over a kept connection: the server may just have hung it up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from typing import Final, TypeVar

import h11
from django.conf import settings

from accounts.caps import open_socket
from api.asynchronous import error_response
from api.bodies import ClientGone, Message, Receive, Scope, Send, cut_off
from api.errors import ApiError, BadRequest, NotFound, to_api_error
from api.threads import in_database
from devboxes.services import touch
from tunnels import doors, waking
from tunnels.doors import Door
from tunnels.headers import Headers, body_length, check_size, to_client, to_server
from tunnels.open import opened
from tunnels.upstream import BadGateway, GatewayTimeout, Stale, Upstream, pool

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_SECONDS: Final = 300.0
"""For the head of the answer, from the last byte of the request on."""
STALL_SECONDS: Final = 600.0
"""For the next byte of either body, from whoever has to send or take it."""
TOUCH_SECONDS: Final = 10.0
REPEATABLE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
BODYLESS: Final = frozenset({204, 304})


class MethodNotAllowed(ApiError):
    status = 405
    code = "method_not_allowed"


async def serve(scope: Scope, receive: Receive, send: Send, *, port: int, key: str) -> None:
    """Serve one request that came to `{port}-{key}.tunnel.…`."""
    exchange = Exchange(scope, receive, send, port)
    try:
        await exchange.run(key)
    except Exception as error:
        if exchange.started:
            # Returning without the last body message makes the server cut the connection.
            log.info("an answer of port %d of a devbox was cut: %s", port, error or "its client has gone")
            return
        answer = error_response(cut_off() if isinstance(error, ClientGone) else to_api_error(error))
        head = [(name.encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()]
        head.append((b"content-length", str(len(answer.body)).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})


class Exchange:
    """The request, and what has become of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, port: int) -> None:
        self._scope, self._receive, self._send, self._port = scope, receive, send, port
        self._method: str = scope["method"]
        self._touched_at = 0.0
        self._answer_clock: asyncio.Timeout | None = None
        self._request_is_whole = False
        self.started = False

    async def run(self, key: str) -> None:
        """From the head of the request to the last byte of the answer. Raises ApiError, ClientGone."""
        headers = [(bytes(name), bytes(value)) for name, value in self._scope["headers"]]
        target = target_of(self._scope)
        check_size(headers, target)
        if self._method == "CONNECT":
            raise MethodNotAllowed("a tunnel passes HTTP requests and WebSockets on, not connections")
        if not self._port:
            raise NotFound("there is no such tunnel")
        door = await doors.enter(key, doors.tokens_of(headers), doors.client_of(self._scope))
        with open_socket(door.account_id, door.open_streams):
            length, first = body_length(headers), b""
            has_body = bool(length) or any(name == b"transfer-encoding" for name, _ in headers)
            if length is None and not has_body:
                first, has_body = await self._peek()
            passed = to_server(
                headers,
                door,
                address=peer_of(self._scope),
                scheme="https" if settings.SECURE else str(self._scope.get("scheme", "http")),
                host=host_of(headers),
            )
            if length is not None:
                passed.append((b"content-length", str(length).encode()))
            elif has_body:
                passed.append((b"transfer-encoding", b"chunked"))
            async with opened(door.tunnel_id, key):
                await self._attempts(key, door, target, passed, first, has_body=has_body)

    async def _attempts(
        self, key: str, door: Door, target: bytes, headers: Headers, first: bytes, *, has_body: bool
    ) -> None:
        fresh = has_body or self._method not in REPEATABLE
        while True:
            door, upstream = await waking.reached(key, door, partial(pool().take, port=self._port, fresh=fresh))
            try:
                await self._note(door)
                await self._through(upstream, door, target, headers, first, has_body=has_body)
            except Stale:
                fresh = True
                continue
            finally:
                await pool().give(upstream)
            return

    async def _through(
        self,
        upstream: Upstream,
        door: Door,
        target: bytes,
        headers: Headers,
        first: bytes,
        *,
        has_body: bool,
    ) -> None:
        await upstream.begin(self._method.encode("latin-1"), target, headers)
        if not has_body:
            await upstream.finish()
            self._request_is_whole = True
        answering = asyncio.ensure_future(self._answer(upstream, door))
        asking = asyncio.ensure_future(self._ask(upstream, first) if has_body else self._until_gone())
        try:
            await asyncio.wait({answering, asking}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                asking.result()  # it ends by an exception only
            await answering
        finally:
            for task in (answering, asking):
                await _ended(task)

    # --- the request

    async def _peek(self) -> tuple[bytes, bool]:
        """The first bytes of a body that nothing announced, and whether there is one: HTTP/2 needs no announcement."""
        message = await _within(STALL_SECONDS, self._message(), BodyStalled)
        more = bool(message.get("more_body", False))
        return message.get("body", b""), bool(message.get("body")) or more

    async def _message(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        return message

    async def _chunks(self, first: bytes) -> AsyncIterator[bytes]:
        if first:
            yield first
        while True:
            message = await _within(STALL_SECONDS, self._message(), BodyStalled)
            data = message.get("body", b"")
            if data:
                yield data
            if not message.get("more_body", False):
                return

    async def _ask(self, upstream: Upstream, first: bytes) -> None:
        """Send the body on, and see to it that a client's leaving is heard of. Raises ClientGone, ApiError."""
        try:
            async for data in self._chunks(first):
                await upstream.send(data)
            await upstream.finish()
        except (BadGateway, Stale):
            pass  # the server takes no more of it; its answer, or that there is none, says why
        except h11.LocalProtocolError as error:
            raise BadRequest(f"the body is not as long as it was announced: {error}") from error
        self._request_is_whole = True
        if self._answer_clock is not None:
            self._answer_clock.reschedule(asyncio.get_running_loop().time() + ANSWER_SECONDS)
        await self._until_gone()

    async def _until_gone(self) -> None:
        while True:
            await self._message()

    # --- the answer

    async def _answer(self, upstream: Upstream, door: Door) -> None:
        try:
            # A slow upload is not a slow answer: the clock starts when the request is whole.
            async with asyncio.timeout(ANSWER_SECONDS if self._request_is_whole else None) as clock:
                self._answer_clock = clock
                response = await upstream.head()
        except TimeoutError:
            raise AnswerTimeout(ANSWER_SECONDS) from None
        finally:
            self._answer_clock = None
        head = to_client(response.headers)
        self.started = True
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": head})
        if self._method == "HEAD" or response.status_code in BODYLESS:
            await upstream.body()
        else:
            await self._stream(upstream, door)
        await self._send({"type": "http.response.body", "body": b""})

    async def _stream(self, upstream: Upstream, door: Door) -> None:
        while data := await _within(STALL_SECONDS, upstream.body(), AnswerTimeout):
            message = {"type": "http.response.body", "body": data, "more_body": True}
            await _within(STALL_SECONDS, self._send(message), ClientStalled)
            await self._note(door)
            await asyncio.sleep(0)  # a client that has gone takes all at once, and its leaving must be heard of

    async def _note(self, door: Door) -> None:
        if door.http_keep_alive and time.monotonic() - self._touched_at > TOUCH_SECONDS:
            self._touched_at = time.monotonic()
            await note_use(door.devbox_id)


async def note_use(devbox_id: str) -> None:
    """Note that traffic used the devbox; when that cannot be written down, the traffic goes on all the same."""
    try:
        await in_database(touch, devbox_id, "tunnel")
    except Exception as error:
        log.warning("the use of %s by its tunnel was not noted: %s", devbox_id, error)


class BodyStalled(ApiError):
    status = 408
    code = "body_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no byte of the request's body came for {seconds:g} s")


class AnswerTimeout(GatewayTimeout):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"the server in the devbox sent nothing for {seconds:g} s")


class ClientStalled(ClientGone):
    """It takes none of the answer."""


async def _within(seconds: float, work: Awaitable[T], late: type[Exception]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise late(seconds) from None


async def _ended(task: asyncio.Future[None]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
    elif not task.cancelled():
        task.exception()


def target_of(scope: Scope) -> bytes:
    """The request's target as it was sent."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return path + b"?" + query if query else path


def peer_of(scope: Scope) -> str:
    """The other end of the connection."""
    return str((scope.get("client") or ("",))[0])


def host_of(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The host name that was asked."""
    return next((value for name, value in headers if name == b"host"), b"")
