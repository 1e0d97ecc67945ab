"""Django's WSGI handler behind the ASGI port: a bounded pool of threads, whole bodies in and out.

Six times the throughput of Django's own ASGI handler, and views stay plain and synchronous. The API goes through no
middleware at all: it needs none of the admin's sessions, cookies or redirects. Whoever needs to wait or to stream is
an async route instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from django.conf import settings
from django.core.handlers.exception import convert_exception_to_response
from django.core.handlers.wsgi import WSGIHandler

from api.asynchronous import authenticate, error_response, headers_of
from api.bodies import Body, ClientGone, Receive, Scope, Send, cut_off, declared_length
from api.errors import Unavailable, to_api_error

# More than this of an API request's body is accepted only from a known caller.
UNKNOWN_CALLER_BODY = 64 * 1024
SITE_BODY = 1 << 20
_HOP = frozenset({"transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer", "proxy-authorization"})


class ApiHandler(WSGIHandler):
    """Django's handler without any middleware."""

    def load_middleware(self, is_async: bool = False) -> None:
        self._view_middleware: list[Any] = []
        self._template_response_middleware: list[Any] = []
        self._exception_middleware: list[Any] = []
        self._middleware_chain = convert_exception_to_response(self._get_response)  # type: ignore[attr-defined]


class Bridge:
    """One per process. ``threads`` are its alone; a thread keeps its database connection."""

    def __init__(self) -> None:
        self._site = WSGIHandler()
        self._api = ApiHandler()
        self.pool: Executor = ThreadPoolExecutor(settings.BERTH.WSGI_THREADS, "wsgi")
        self._inside = 0

    def _check_room(self) -> None:
        if self._inside >= settings.BERTH.WSGI_QUEUE + settings.BERTH.WSGI_THREADS:
            raise Unavailable(f"{settings.BERTH.WSGI_QUEUE} requests are waiting already; try again shortly")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Load balancers ask for health by address, which the site's check of the host name would refuse.
        is_api = scope["path"].startswith("/v1/") or scope["path"] == "/healthz"
        body: Body | None = None
        try:
            try:
                self._check_room()  # before a byte of the body is taken
                headers = headers_of(scope)
                body = Body(receive, declared_length(headers))
                if is_api:

                    async def known() -> None:
                        await authenticate(headers)

                    raw = await body.read(settings.BERTH.BODY_MAX, pause_at=UNKNOWN_CALLER_BODY, pause=known)
                else:
                    raw = await body.read(SITE_BODY)
                environ = _environ(scope, headers, raw)
                self._check_room()  # others may have come first while the body was on its way
                self._inside += 1
                try:
                    status, head, content = await asyncio.get_running_loop().run_in_executor(
                        self.pool, _call, self._api if is_api else self._site, environ
                    )
                finally:
                    self._inside -= 1
            except Exception as error:
                answer = error_response(to_api_error(cut_off() if isinstance(error, ClientGone) else error))
                status, content = answer.status, answer.body
                head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers.items()]
        finally:
            if body is not None:
                body.release()
        if status not in (204, 304) and not any(name == b"content-length" for name, _ in head):
            head.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})


def _environ(scope: Scope, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    server = scope.get("server") or ("127.0.0.1", 80)
    client = scope.get("client") or ("", 0)
    version = scope["http_version"]
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": scope["path"].encode("utf-8", "surrogateescape").decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": server[0],
        "SERVER_PORT": str(server[1]),
        "REMOTE_ADDR": client[0],
        "REMOTE_PORT": str(client[1]),
        "SERVER_PROTOCOL": "HTTP/" + ("2.0" if version == "2" else version),
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope["scheme"],
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    for name, value in headers.items():
        if name == "content-type":
            environ["CONTENT_TYPE"] = value
        elif name != "content-length" and name not in _HOP:
            environ["HTTP_" + name.upper().replace("-", "_")] = value
    return environ


def _call(handler: WSGIHandler, environ: dict[str, Any]) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    status = 500
    head: list[tuple[bytes, bytes]] = []

    def start(line: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        nonlocal status, head
        status = int(line[:3])
        head = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]

    response: Any = handler(environ, start)  # type: ignore[arg-type]
    try:
        return status, head, b"".join(response)
    finally:
        with contextlib.suppress(AttributeError):
            response.close()
