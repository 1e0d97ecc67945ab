"""Every answer that is not a success has one shape, whoever gives it: DRF, the async frame, Django, the dispatcher."""

import asyncio
import dataclasses
import json
import threading

import pytest
from django.db import OperationalError

from api.asynchronous import Route, Routes
from api.errors import ApiError, BadRequest, Conflict, NotFound, TooManyRequests, Unavailable, WaitTimedOut

SHAPE = {"code", "message"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/no/such/thing", 404, "not_found"),
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", "/v1/accounts/me", 405, "method_not_allowed"),
        ("GET", "/v1/accounts/me/", 404, "not_found"),
        ("GET", "/v1//accounts/me", 404, "not_found"),
    ],
)
def test_one_shape(alice, web, method, path, status, code):
    answer = web.request(method, path, key=alice.secret)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == SHAPE and answer.json()["code"] == code


@pytest.mark.parametrize("content", [b"{", b'{"name": NaN}', b"[]", b'{"name": "\\u0000"}', b'{"name": "\\ud800"}'])
def test_a_body_that_is_no_json_object(alice, web, content):
    answer = web.post("/v1/apikeys", key=alice.secret, content=content)
    assert answer.status_code == 400 and set(answer.json()) == SHAPE


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", None])
def test_whatever_a_client_calls_it_it_is_json(alice, web, kind):
    headers = {"content-type": kind} if kind else {}
    answer = web.post(
        "/v1/apikeys", key=alice.secret, content=b'{"name": "x"}', headers=headers | {"accept": "text/html"}
    )
    assert answer.status_code == 200 and answer.json()["name"] == "x"
    assert web.post("/v1/apikeys", key=alice.secret, content=b"", headers=headers).status_code == 200


def test_an_unexpected_error_is_logged_once_and_told_to_nobody(alice, web, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("the secret cause")

    monkeypatch.setattr("accounts.api.access_account", broken)
    answer = alice.get("/v1/accounts/me")
    assert answer.status_code == 500 and answer.json()["code"] == "internal"
    assert "secret" not in answer.text and "Traceback" not in answer.text
    reference = answer.json()["message"].split()[-1]
    assert reference.startswith("err_")
    logged = [record for record in caplog.records if reference in record.getMessage()]
    assert len(logged) == 1 and logged[0].exc_info


def test_a_database_that_is_away_is_503(alice, monkeypatch):
    def away(*args, **kwargs):
        raise OperationalError("connection refused by 10.0.0.1")

    monkeypatch.setattr("accounts.api.access_account", away)
    answer = alice.get("/v1/accounts/me")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert "10.0.0.1" not in answer.text


@pytest.fixture
def with_route(monkeypatch):
    """Adds async routes to the real dispatcher."""
    from config import asgi

    def add(method, template, handler, **options):
        monkeypatch.setattr(asgi, "routes", Routes([*asgi.routes.routes, Route(method, template, handler, **options)]))

    return add


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (BadRequest("x"), 400, {}),
        (NotFound("x"), 404, {}),
        (WaitTimedOut("x"), 408, {"x-should-retry": "true"}),
        (Conflict("x"), 409, {"x-should-retry": "false"}),
        (Conflict("x", retry=True), 409, {"x-should-retry": "true"}),
        (TooManyRequests("x", retry_after=7), 429, {"retry-after": "7"}),
        (Unavailable("x"), 503, {"retry-after": "1"}),
        (ApiError("x", status=418, code="teapot", headers={"x-a": "b"}), 418, {"x-a": "b"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_async_frame_renders_alike(alice, with_route, error, status, headers):
    async def handler(request):
        raise error

    with_route("GET", "/v1/t", handler)
    answer = alice.get("/v1/t")
    assert answer.status_code == status
    assert answer.json() == {"code": error.code, "message": "x"}
    assert {name: answer.headers[name] for name in headers} == headers


def test_the_async_frame_authenticates_and_keeps_read_only_keys_to_reading(web, alice, with_route):
    from api.asynchronous import json_response
    from tests.conftest import make_party

    async def handler(request):
        return json_response(
            {"account": request.caller.account_id, "body": await request.json(), "query": request.query}
        )

    with_route("POST", "/v1/t/{id}/wait", handler, reads=True)
    with_route("POST", "/v1/t/{id}/change", handler)
    assert web.post("/v1/t/1/wait", {}).status_code == 401
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    answer = reader.post("/v1/t/1/wait?a=1&a=2&b=&c=%20", {"x": 1})
    assert answer.json() == {"account": alice.account_id, "body": {"x": 1}, "query": {"a": "2", "c": " "}}
    assert reader.post("/v1/t/1/change", {}).status_code == 403
    assert alice.post("/v1/t/1/change", {}).status_code == 200
    assert alice.get("/v1/t/1/change").status_code == 404, "another method is Django's"


def test_a_literal_segment_wins_over_a_parameter(alice, with_route):
    from api.asynchronous import json_response

    def answering(name):
        async def handler(request):
            return json_response([name, dict(request.params)])

        return handler

    with_route("POST", "/v1/things/{id}", answering("update"))
    with_route("POST", "/v1/things/create_and_await", answering("create"))
    assert alice.post("/v1/things/create_and_await", {}).json() == ["create", {}]
    assert alice.post("/v1/things/thi_1", {}).json() == ["update", {"id": "thi_1"}]
    assert alice.post("/v1/things/", {}).status_code == 404


def test_a_queue_that_is_full_is_503(alice, settings, monkeypatch):
    settings.BERTH = dataclasses.replace(settings.BERTH, WSGI_QUEUE=-100)
    answer = alice.get("/v1/accounts/me")
    assert answer.status_code == 503 and "retry-after" in answer.headers


def test_slow_bodies_do_not_pass_a_queue_that_fills_meanwhile(alice, web, settings, monkeypatch):
    """Six requests that all found room when they began; their bodies end together, and there is room for two."""
    from config import asgi, wsgi_bridge

    settings.BERTH = dataclasses.replace(settings.BERTH, WSGI_QUEUE=1, WSGI_THREADS=1)
    opened = threading.Event()

    def call(handler, environ):
        opened.wait(10)
        return 200, [], b"{}"

    monkeypatch.setattr(wsgi_bridge, "_call", call)

    async def scenario():
        come = asyncio.Event()

        async def body():
            yield b"{"
            await come.wait()
            yield b"}"

        posts = [
            asyncio.ensure_future(web.send("POST", "/v1/apikeys", key=alice.secret, content=body())) for _ in range(6)
        ]
        await asyncio.sleep(0.2)
        assert not any(post.done() for post in posts)
        come.set()
        await asyncio.sleep(0.2)
        assert asgi.bridge._inside == 2, "as many as have room"
        opened.set()
        return sorted([(await post).status_code for post in posts])

    assert web.run(scenario()) == [200, 200, 503, 503, 503, 503]
    assert asgi.bridge._inside == 0


def test_bodies_share_one_budget(alice, web, settings):
    from api import bodies

    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=1000, BODY_MAX=2000)
    large = json.dumps({"name": "x" * 1500}).encode()
    answer = web.post("/v1/apikeys", key=alice.secret, content=large)
    assert answer.status_code == 503
    assert bodies._held == 0, "the budget leaks"
    settings.BERTH = dataclasses.replace(settings.BERTH, BODY_BUDGET=10_000, BODY_MAX=1000)
    answer = web.post("/v1/apikeys", key=alice.secret, content=large)
    assert answer.status_code == 413 and "1000 bytes" in answer.json()["message"]
    assert bodies._held == 0
