"""Reading bodies: bounds on size, on silence and on the sum, and asking who it is before much has come."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from api import bodies
from api.bodies import Body, BodyTooSlow, ClientGone, declared_length
from api.errors import BadRequest, TooLarge, Unauthorized, Unavailable


def receiving(*messages):
    """A receive() that yields these chunks; None is a client that leaves, Ellipsis one that says nothing more."""
    queue = list(messages)

    async def receive():
        message = queue.pop(0)
        if message is ...:
            await asyncio.sleep(60)
        if message is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": message, "more_body": bool(queue)}

    return receive, queue


def read(messages, limit=100, declared=None, **options):
    receive, left = receiving(*messages)
    body = Body(receive, declared)

    async def main():
        try:
            return await body.read(limit, **options), left
        finally:
            body.release()
            body.release()
            assert bodies._held == 0

    return asyncio.run(main())


def test_chunks_are_put_together():
    assert read([b"ab", b"", b"c"]) == (b"abc", [])
    assert read([b""]) == (b"", [])


def test_too_much_is_refused_before_it_is_read():
    with pytest.raises(TooLarge, match="100 bytes"):
        read([b"never read"], declared=101)
    with pytest.raises(TooLarge):
        read([b"x" * 60, b"x" * 60, b"never read"])


def test_silence_names_its_clock(settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_IDLE=0.05)
    with pytest.raises(BodyTooSlow, match=r"0\.05 s"):
        read([b"x", ...])


def test_a_client_that_leaves_half_way():
    with pytest.raises(ClientGone):
        read([b"x", None])


def test_the_sum_is_bounded(settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=50)
    with pytest.raises(Unavailable):
        read([b"x" * 30, b"x" * 30])


def test_who_is_sending_is_asked_once_before_much_has_come():
    asked = []

    async def known():
        asked.append(1)

    async def stranger():
        raise Unauthorized

    assert read([b"x" * 10], pause_at=50, pause=known)[0] == b"x" * 10
    assert not asked
    assert len(read([b"x" * 30] * 3, pause_at=50, pause=known)[0]) == 90
    assert len(read([b"x" * 90], declared=90, pause_at=50, pause=known)[0]) == 90
    assert len(asked) == 2
    with pytest.raises(Unauthorized):
        read([b"never read"], declared=90, pause_at=50, pause=stranger)


def test_a_stream_is_not_collected(settings):
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=1)

    async def main():
        receive, _ = receiving(b"ab", b"cd")
        return [chunk async for chunk in Body(receive, None).chunks(100)]

    assert asyncio.run(main()) == [b"ab", b"cd"]


def test_a_declared_length_is_a_number():
    assert declared_length({}) is None
    assert declared_length({"content-length": "12"}) == 12
    for bad in ("-1", "1e3", "12, 12", "", "٣"):
        with pytest.raises(BadRequest):
            declared_length({"content-length": bad})
