"""Every door of the API, whoever serves it: no good key, no entry; a key that may only read changes nothing.

The operations come from the OpenAPI document and the tables of routes, so a new one is tried here by itself.
"""

from __future__ import annotations

import asyncio
import datetime
from functools import cache
from typing import Any

import yaml
from django.conf import settings as django_settings
from django.urls import resolve

from accounts.models import Account
from accounts.services import create_key, revoke_key
from api.ids import new_id
from api.permissions import READ_ONLY_MESSAGE
from config.routes import async_routes, websocket_routes
from tests.conftest import Party, make_party

VERBS = {"get", "post", "put", "patch", "delete"}


@cache
def operations() -> list[tuple[str, str]]:
    """Method and path template of every operation, documented or not."""
    document = yaml.safe_load((django_settings.PROJECT / "openapi.yaml").read_text())
    documented = {(verb.upper(), path) for path, verbs in document["paths"].items() for verb in VERBS & verbs.keys()}
    return sorted(documented | {(route.method, route.template) for route in async_routes()})


def path_of(template: str) -> str:
    """A path of that shape, of things that do not exist."""
    parts = []
    for part in template.split("/"):
        if part.startswith("{"):
            part = new_id("exe" if "execution" in part else "dbx") if "id" in part else "key"
        parts.append(part)
    return "/".join(parts)


def only_reads(method: str, template: str) -> bool:
    """Whether the operation says of itself that it changes nothing."""
    for route in async_routes():
        if (route.method, route.template) == (method, template):
            return method == "GET" or route.reads
    view: Any = resolve(path_of(template)).func
    return method == "GET" or bool(getattr(view.view_class, "reads", False))


def refused(web: Any, status: int, code: str, **headers: str) -> None:
    """Nobody who sends these headers gets in anywhere."""
    for method, template in operations():
        answer = web.request(method, path_of(template), headers=headers, json={} if method != "GET" else None)
        assert (answer.status_code, answer.json()["code"]) == (status, code), f"{method} {template}: {answer.text}"
        if status == 401:
            assert answer.headers["www-authenticate"] == "Bearer", f"{method} {template}"


def test_there_are_operations_of_every_kind() -> None:
    tables = {(route.method, route.template) for route in async_routes()}
    assert tables <= set(operations())
    assert len(set(operations()) - tables) > 5, "those of Django"
    assert any("stream" in template for _, template in tables), "those that stream"


def test_without_a_key(web: Any) -> None:
    refused(web, 401, "unauthorized")
    refused(web, 401, "unauthorized", authorization="Bearer ak_" + "a" * 32)


def test_with_a_revoked_or_expired_key(web: Any, alice: Party) -> None:
    revoke_key(alice.key_id)
    refused(web, 401, "unauthorized", authorization=f"Bearer {alice.secret}")
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)  # a transaction's now() is its beginning
    _, expired = create_key(alice.account_id, "old", expires_at=past)
    refused(web, 401, "unauthorized", authorization=f"Bearer {expired}")


def test_with_a_key_of_a_disabled_account(web: Any, alice: Party) -> None:
    Account.objects.filter(pk=alice.account_id).update(status=Account.Status.DISABLED)
    refused(web, 403, "forbidden", authorization=f"Bearer {alice.secret}")


def test_a_key_that_may_only_read(web: Any, alice: Party) -> None:
    reader = make_party(alice.account_id, "reader", web, read_only=True)
    changing = [(method, template) for method, template in operations() if not only_reads(method, template)]
    assert len(changing) > 8
    for method, template in changing:
        answer = web.request(method, path_of(template), key=reader.secret, json={})
        assert (answer.status_code, answer.json()["message"]) == (403, READ_ONLY_MESSAGE), f"{method} {template}"
    reading = [(method, template) for method, template in operations() if method != "GET"]
    for method, template in set(reading) - set(changing):
        answer = web.request(method, path_of(template), key=reader.secret, json={})
        assert answer.status_code in (400, 404), f"{method} {template}: {answer.status_code} {answer.text}"


async def _upgrade(path: str) -> list[dict[str, Any]]:
    from config.asgi import application

    sent: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1006}]

    async def receive() -> dict[str, Any]:
        if not asked:
            await asyncio.Event().wait()
        return asked.pop(0)

    async def send(message: Any) -> None:
        sent.append(dict(message))

    scope = {
        "type": "websocket",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
        "subprotocols": [],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "ws",
        "http_version": "1.1",
    }
    await asyncio.wait_for(application(scope, receive, send), 5)
    return sent


def test_a_websocket_without_a_key_is_not_accepted(web: Any) -> None:
    patterns = [str(route.pattern) for route in websocket_routes()]
    for path in ["/v1/no/such/socket", *("/" + pattern.lstrip("^/").rstrip("$") for pattern in patterns)]:
        sent = web.run(_upgrade(path))
        assert sent and all(message["type"] != "websocket.accept" for message in sent), (path, sent)
        if sent[0]["type"] == "websocket.http.response.start":
            assert sent[0]["status"] in (400, 401, 403, 404), sent
