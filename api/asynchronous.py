"""The frame of the async routes: everything that waits, streams or touches a host, served on the event loop.

A route is ``Route(method, template, handler)``; a handler takes a ``Request`` and returns a ``Response`` or a
``StreamResponse``, or raises an ``ApiError``. The caller is known before a byte of the body is read. A handler whose
client has gone is cancelled. The ORM is used through ``in_database`` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import orjson
from django.conf import settings
from django.utils.module_loading import import_string

from api.bodies import Body, ClientGone, Receive, Scope, Send, cut_off, declared_length
from api.callers import Caller
from api.errors import ApiError, BadRequest, Forbidden, Unauthorized, to_api_error
from api.permissions import READ_ONLY_MESSAGE
from api.stopping import going_down
from api.threads import in_database
from api.validation import parse_object

__all__ = [
    "ClientGone",
    "Request",
    "Response",
    "Route",
    "StreamResponse",
    "going_down",
    "in_database",
    "json_response",
    "serve",
]

log = logging.getLogger("api.asynchronous")

JSON_LIMIT = 1 << 20
LARGE_ANSWER = 1 << 20
"""An answer over this size counts against the budget of bodies until its client has taken it."""


@dataclasses.dataclass(slots=True)
class Response:
    """A whole answer."""

    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""


@dataclasses.dataclass(slots=True)
class StreamResponse:
    """An answer whose head goes out at once and whose body follows as ``chunks`` yields it.

    The iterator is closed when the client goes away. An exception from it cuts the connection, so a client never
    takes half an answer for a whole one; say what happened in the stream itself where its format can.
    """

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``value`` as JSON."""
    return Response(status, {"content-type": "application/json", **(headers or {})}, orjson.dumps(value))


class Request:
    """One request to an async route. ``query``: the last value wins, an empty one counts as absent."""

    def __init__(
        self, *, scope: Scope, receive: Receive, params: Mapping[str, str], headers: dict[str, str], caller: Caller
    ) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.params = params
        self.headers = headers
        self.caller = caller
        self.receive = receive
        self.prepared: Any = None
        self.body = Body(receive, declared_length(headers))
        self._gone: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def query(self) -> dict[str, str]:
        return query_of(self.scope)

    @property
    def request_id(self) -> str | None:
        """The ``x-request-id`` a client deduplicates by."""
        return self.headers.get("x-request-id")

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises TooLarge over ``limit`` bytes, and see ``api.bodies``."""
        return await self.body.read(limit)

    async def json(self, limit: int = JSON_LIMIT) -> dict[str, Any]:
        """The body as a JSON object, ``{}`` for an empty one. Raises BadRequest for anything else."""
        return parse_object(await self.read(limit))

    def disconnected(self) -> asyncio.Future[None]:
        """Done once the client has gone. Ask only after the body has been read: what is left of it is thrown away."""
        if self._gone is None:
            self._gone = asyncio.get_running_loop().create_future()
            self._watcher = asyncio.ensure_future(self._watch(self._gone))
        return self._gone

    async def _watch(self, gone: asyncio.Future[None]) -> None:
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                break
        if not gone.done():
            gone.set_result(None)

    def close(self) -> None:
        self.body.release()
        if self._watcher is not None:
            self._watcher.cancel()


Handler = Callable[[Request], Awaitable[Response | StreamResponse]]


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """One operation on the event loop. ``reads``: a read-only key may call it although it is a POST.

    ``prepare``: what the handler would ask the database first, with the caller and the path's parameters; it is asked
    together with who the caller is, and ``request.prepared`` has the answer.
    """

    method: str
    template: str
    handler: Handler
    name: str = ""
    reads: bool = False
    prepare: Callable[[Caller, Mapping[str, str]], Any] | None = None

    @property
    def segments(self) -> tuple[str, ...]:
        return tuple(self.template.split("/"))


class Routes:
    """A table of routes, found by method and path. An id never contains a slash."""

    def __init__(self, routes: list[Route]) -> None:
        self.routes = routes
        self._by_shape: dict[tuple[str, int], list[tuple[tuple[str, ...], Route]]] = {}
        for route in routes:
            self._by_shape.setdefault((route.method, len(route.segments)), []).append((route.segments, route))

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route that takes this request and its path parameters; literal segments win over parameters."""
        parts = path.split("/")
        found: tuple[Route, dict[str, str]] | None = None
        for segments, route in self._by_shape.get(("GET" if method == "HEAD" else method, len(parts)), ()):
            params: dict[str, str] = {}
            for want, have in zip(segments, parts, strict=True):
                if want[:1] == "{":
                    if not have:
                        break
                    params[want[1:-1]] = have
                elif want != have:
                    break
            else:
                if found is None or len(params) < len(found[1]):
                    found = route, params
        return found


@lru_cache(maxsize=1)
def _authenticator() -> Callable[[str], Caller]:
    authenticate: Callable[[str], Caller] = import_string(settings.AUTHENTICATE)
    return authenticate


def bearer_token(headers: Mapping[str, str]) -> str:
    """The token of an ``Authorization: Bearer`` header. Raises Unauthorized without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized
    return token


async def authenticate(headers: Mapping[str, str]) -> Caller:
    """Who sends these headers. Raises Unauthorized or Forbidden."""
    return await in_database(_authenticator(), bearer_token(headers))


def headers_of(scope: Scope) -> dict[str, str]:
    """The request's headers by lower-case name; repeated ones are joined. Names with underscores, which pass for
    dashed ones further on, are dropped."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        if b"_" in raw_name:
            continue
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}{'; ' if name == 'cookie' else ', '}{value}" if name in headers else value
    return headers


def query_of(scope: Scope) -> dict[str, str]:
    """A request's query: the last value wins, an empty one counts as absent. Raises BadRequest for over 1,000."""
    try:
        return dict(parse_qsl(scope["query_string"].decode("latin-1"), max_num_fields=1000))
    except ValueError as error:
        raise BadRequest(f"the query is not valid: {error}") from None


Authenticate = Callable[[Mapping[str, str]], Awaitable[Caller]]


async def _admitted(
    route: Route, params: Mapping[str, str], headers: Mapping[str, str], other: Authenticate | None
) -> tuple[Caller, Any]:
    """The caller, who may call it, and what the route prepares. Raises ApiError."""
    if other is not None:
        caller = await other(headers)
        return (
            await in_database(_prepared, route, params, caller) if route.prepare else _prepared(route, params, caller)
        )
    token = bearer_token(headers)
    return await in_database(lambda: _prepared(route, params, _authenticator()(token)))


def _prepared(route: Route, params: Mapping[str, str], caller: Caller) -> tuple[Caller, Any]:
    if caller.read_only and not route.reads and route.method != "GET":
        raise Forbidden(READ_ONLY_MESSAGE)
    return caller, route.prepare(caller, params) if route.prepare is not None else None


async def serve(
    route: Route,
    params: Mapping[str, str],
    scope: Scope,
    receive: Receive,
    send: Send,
    authenticate: Authenticate | None = None,
) -> None:
    """Serve one request by ``route``: authenticate, run the handler while the client is there, send what it returns.

    ``authenticate`` is another's where an API key is not what opens the door.
    """
    request: Request | None = None
    try:
        try:
            headers = headers_of(scope)
            caller, prepared = await _admitted(route, params, headers, authenticate)
            request = Request(scope=scope, receive=receive, params=params, headers=headers, caller=caller)
            request.prepared = prepared
            response = await _run(route.handler, request)
            if isinstance(response, Response) and len(response.body) > LARGE_ANSWER:
                request.body.take_for_answer(len(response.body))
        except ClientGone:
            response = error_response(cut_off())
        except Exception as error:
            response = error_response(to_api_error(error))
        await _answer(response, request, scope, send)
    finally:
        if request is not None:
            request.close()


async def _run(handler: Handler, request: Request) -> Response | StreamResponse:
    """The handler's answer; ClientGone, and the handler cancelled, when the client leaves first."""
    if request.method in ("GET", "HEAD") and not request.body.declared:
        request.body.finished.set()  # nothing to read: the watcher may have receive() at once
    task: asyncio.Future[Response | StreamResponse] = asyncio.ensure_future(handler(request))
    read: asyncio.Future[bool] = asyncio.ensure_future(request.body.finished.wait())
    try:
        # While the handler reads the body it owns receive(); afterwards the watcher does.
        await _first(task, read)
        if not task.done():
            await _first(task, request.disconnected())
            if not task.done():
                raise ClientGone
        return task.result()
    finally:
        read.cancel()
        await _stop(task)


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def _stop(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    return json_response(error.body(), error.status, error.headers)


async def _answer(response: Response | StreamResponse, request: Request | None, scope: Scope, send: Send) -> None:
    head = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()]
    silent = scope["method"] == "HEAD"
    if isinstance(response, Response):
        if response.status not in (204, 304):
            head.append((b"content-length", str(len(response.body)).encode()))
        await send({"type": "http.response.start", "status": response.status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if silent else response.body})
        return
    chunks = response.chunks
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": head})
        if not silent and request is not None:
            await _pump(chunks, request.disconnected(), send)
        await send({"type": "http.response.body", "body": b""})
    except ClientGone:
        pass
    except ClientTooSlow as slow:
        log.info("%s %s is cut off: %s", scope["method"], scope["path"], slow)
    except Exception:
        # Returning without the last body message makes the server cut the connection.
        log.exception("the source of %s %s broke half-way", scope["method"], scope["path"])
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            with contextlib.suppress(Exception):
                await close()


class ClientTooSlow(Exception):
    """The client takes nothing of a stream: it must not hold its place for ever."""


async def _pump(chunks: AsyncIterator[bytes], gone: asyncio.Future[None], send: Send) -> None:
    """Send chunk after chunk, never more than one ahead of the client; ClientGone once it has left, ClientTooSlow when
    it does not take one within SEND_IDLE seconds."""
    patience = settings.BERTH.SEND_IDLE

    async def pump() -> None:
        async for chunk in chunks:
            if chunk:
                try:
                    async with asyncio.timeout(patience):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except TimeoutError:
                    raise ClientTooSlow(f"it took nothing for {patience:g} s") from None
                # Once the client has gone the server's send returns at once, without ever yielding to the loop: a
                # source that is always ready would then spin and the watcher never hear of it.
                await asyncio.sleep(0)

    task = asyncio.ensure_future(pump())
    try:
        await _first(task, gone)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        await _stop(task)
