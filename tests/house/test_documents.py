"""What is committed beside the code says what the code says: migrations, the OpenAPI document, the tables of routes."""

from __future__ import annotations

import io
import re

import pytest
import yaml
from django.core.management import call_command
from django.urls import get_resolver
from django.urls.resolvers import URLPattern

from tests.house.tree import PROJECT


@pytest.mark.django_db
def test_migrations_are_current():
    out = io.StringIO()
    try:
        call_command("makemigrations", check=True, dry_run=True, stdout=out)
    except SystemExit:
        pytest.fail("models changed without a migration: run manage.py makemigrations\n" + out.getvalue())


def test_the_openapi_document_is_current():
    out = io.StringIO()
    call_command("spectacular", stdout=out, fail_on_warn=True)
    committed = (PROJECT / "openapi.yaml").read_text()
    assert yaml.safe_load(committed) == yaml.safe_load(out.getvalue()), (
        "run: python manage.py spectacular --file openapi.yaml --fail-on-warn"
    )


def _plain(pattern: URLPattern) -> str:
    return "/" + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", str(pattern.pattern))


def test_every_async_route_is_in_the_document_and_the_other_way_round():
    """An async route's URL must be declared by an AsyncElsewhere view, under the same method and parameter names."""
    from api.views import AsyncElsewhere
    from config.routes import async_routes

    routes = {(route.method, route.template) for route in async_routes()}
    assert len(routes) == len(async_routes()), "two async routes take the same requests"
    declared: set[tuple[str, str]] = set()
    plain: set[tuple[str, str]] = set()
    for pattern in get_resolver().url_patterns:
        if not isinstance(pattern, URLPattern):
            continue
        view = getattr(pattern.callback, "view_class", None) or getattr(pattern.callback, "cls", None)
        if view is None:
            continue
        for method in ("get", "post", "put", "patch", "delete"):
            if hasattr(view, method):
                (declared if issubclass(view, AsyncElsewhere) else plain).add((method.upper(), _plain(pattern)))
    document = yaml.safe_load((PROJECT / "openapi.yaml").read_text())
    written = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert routes - declared == set(), "async routes without a declaration"
    assert declared - routes == set(), "declared as async, but no route takes it: such a request ends as a 500"
    assert not routes & plain, "taken by an async route before this view is reached"
    hidden = {(method, path) for method, path in routes if (method, path) not in written}
    assert all("evictions" in path or "/_" in path for _, path in hidden), f"not in the document: {hidden}"


def test_every_operation_has_a_name_of_its_own():
    document = yaml.safe_load((PROJECT / "openapi.yaml").read_text())
    names = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
