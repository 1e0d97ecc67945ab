"""A client that drives the real ASGI application in this process, inside the test's own database transaction.

The dispatcher, the async frame, Django and DRF are all real; only the two thread pools are replaced by one thread that
shares the test's connection, so what a test wrote is seen without a commit. For real concurrency, sockets and commits
use the ``server`` fixture.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
from django.db import connection, connections

from api import threads

T = TypeVar("T")


class SharedConnection:
    """Puts one thread with this thread's connection in place of both pools."""

    def __enter__(self) -> SharedConnection:
        from config.asgi import bridge

        connection.ensure_connection()
        connection.inc_thread_sharing()
        mine = connections["default"]
        self.pool = ThreadPoolExecutor(1, "shared", initializer=lambda: connections.__setitem__("default", mine))
        self._previous_pool = threads.use_pool(self.pool)
        self._bridge, self._bridge_pool = bridge, bridge.pool
        bridge.pool = self.pool
        # The end of a request would close the test's connection.
        mine.close_if_unusable_or_obsolete = lambda: None  # type: ignore[method-assign]
        self._connection = mine
        return self

    def __exit__(self, *_: object) -> None:
        del self._connection.close_if_unusable_or_obsolete
        self._bridge.pool = self._bridge_pool
        threads.use_pool(self._previous_pool)
        self.pool.shutdown()
        connection.dec_thread_sharing()


class Web:
    """``web.get("/v1/…", key=secret)``. ``web.run(coroutine)`` runs anything on the loop that serves the requests."""

    def __init__(self) -> None:
        from config.asgi import application

        self.loop = asyncio.new_event_loop()
        self._http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=application), base_url="http://testserver", timeout=60
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    async def send(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        **rest: Any,
    ) -> httpx.Response:
        headers = dict(headers or {})
        if key is not None:
            headers.setdefault("authorization", f"Bearer {key}")
        if json is not None:
            rest["json"] = json
        return await self._http.request(method, path, headers=headers, **rest)

    def request(self, method: str, path: str, **rest: Any) -> httpx.Response:
        return self.run(self.send(method, path, **rest))

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return self.request("GET", path, **rest)

    def post(self, path: str, json: Any = None, **rest: Any) -> httpx.Response:
        return self.request("POST", path, json=json, **rest)

    def close(self) -> None:
        from api.waiting import hub

        self.run(hub.stop())
        self.run(self._http.aclose())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.close()
