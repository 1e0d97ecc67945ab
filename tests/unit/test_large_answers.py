"""Answers that are large count against the budget of bodies until their client has taken them."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from api import asynchronous, bodies
from api.asynchronous import Response, Route, serve
from api.callers import Caller


@pytest.fixture
def get():
    async def anybody(headers):
        return Caller(account_id="acc_1")

    async def handler(request):
        return Response(body=b"x" * (asynchronous.LARGE_ANSWER + 1))

    async def get(read):
        """One GET; its client takes the answer when `read` is set. Returns the status."""
        status = []

        async def receive():
            await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.start":
                status.append(message["status"])
            elif status == [200]:
                await read.wait()

        scope = {"type": "http", "method": "GET", "path": "/x", "query_string": b"", "headers": []}
        await serve(Route("GET", "/x", handler), {}, scope, receive, send, authenticate=anybody)
        return status[0]

    return get


def test_large_answers_that_are_not_taken_are_bounded(get, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=asynchronous.LARGE_ANSWER + 100)

    async def main():
        read = asyncio.Event()
        first = asyncio.ensure_future(get(read))
        await asyncio.sleep(0.05)
        assert await get(read) == 503
        read.set()
        assert await first == 200
        assert bodies._held == 0
        assert await get(read) == 200

    asyncio.run(main())


def test_one_alone_is_never_refused(get, settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=1)

    async def main():
        read = asyncio.Event()
        read.set()
        assert await get(read) == 200
        assert bodies._held == 0

    asyncio.run(main())
