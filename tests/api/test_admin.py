"""The admin, the docs page and the static files: for operators only, complete, and without anybody else's servers."""

from __future__ import annotations

import re

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.urls import reverse

from accounts.models import ApiKey
from accounts.services import create_account, create_key, create_member
from tests.house.tree import ROOMS

OURS = [model for model in admin.site._registry if model._meta.app_label in (*ROOMS, "auth")]


@pytest.fixture
def operator(db, client):
    client.force_login(User.objects.create_superuser("operator", password="a long enough password"))
    return client


def url(model, page, *args):
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def test_strangers_are_sent_to_the_login(web, alice):
    for headers in ({}, alice.headers):
        answer = web.get("/admin/", headers={"host": "localhost", **headers})
        assert answer.status_code == 302 and "/admin/login/" in answer.headers["location"]


def test_a_password_opens_it(db, client):
    User.objects.create_superuser("operator", password="a long enough password")
    User.objects.create_user("nobody", password="a long enough password")
    for name, opened in (("nobody", False), ("operator", True)):
        client.post("/admin/login/", {"username": name, "password": "a long enough password"})
        assert (client.get("/admin/").status_code == 200) is opened


@pytest.mark.parametrize("model", OURS, ids=lambda model: model._meta.label)
def test_every_list_and_search_works(operator, model):
    assert operator.get(url(model, "changelist")).status_code == 200
    assert operator.get(url(model, "changelist") + "?q=something").status_code == 200
    if admin.site._registry[model].has_add_permission.__func__ is admin.ModelAdmin.has_add_permission:
        assert operator.get(url(model, "add")).status_code == 200


def test_a_keys_secret_is_shown_once_and_its_owner_never_changes(operator, web):
    account, other = create_account("A"), create_account("B")
    page = operator.post(
        url(ApiKey, "add"), {"account": account.pk, "name": "by hand", "access": "full", "member": ""}, follow=True
    )
    secret = re.search(r"ak_[a-z2-7]{32}", page.content.decode())
    assert secret is not None, page.content.decode()[:3000]
    assert web.get("/v1/accounts/me", key=secret.group()).json()["id"] == account.pk
    key = ApiKey.objects.get(account=account)
    assert secret.group() not in operator.get(url(ApiKey, "change", key.pk)).content.decode()
    operator.post(url(ApiKey, "change", key.pk), {"account": other.pk, "name": "renamed", "access": "read_only"})
    key.refresh_from_db()
    assert (key.account_id, key.name, key.access) == (account.pk, "renamed", "full")


def test_keys_are_revoked_not_deleted(operator, web):
    account = create_account("A")
    key, secret = create_key(account.pk, "k", member=create_member(account.pk, "m").pk)
    assert operator.post(url(ApiKey, "delete", key.pk), {"post": "yes"}).status_code == 403
    operator.post(url(ApiKey, "changelist"), {"action": "revoke", "_selected_action": [key.pk]})
    assert web.get("/v1/accounts/me", key=secret).status_code == 401


def test_the_docs_page_needs_nobody_elses_server(web):
    page = web.get("/docs/", headers={"host": "localhost"})
    assert page.status_code == 200
    assert not re.findall(r"(?:https?:)?//[^\s\"']+", page.text), page.text
    script = re.search(r'src="([^"]+redoc[^"]+)"', page.text).group(1)
    assert web.get(script, headers={"host": "localhost"}).status_code == 200
    document = web.get("/openapi.yaml", headers={"host": "localhost"})
    assert document.status_code == 200 and "Berth Devbox API" in document.text


def test_the_admin_is_served_with_its_styles(operator, web):
    page = operator.get("/admin/").content.decode()
    styles = re.findall(r'href="(/static/[^"]+\.css)"', page)
    assert styles
    for style in styles:
        assert web.get(style, headers={"host": "localhost"}).status_code == 200


def test_a_foreign_host_name_is_refused_by_the_site_only(web, alice):
    assert web.get("/admin/login/", headers={"host": "evil.example"}).status_code == 400
    assert web.get("/healthz", headers={"host": "10.0.0.7:8080"}).json() == {"status": "ok"}
    assert alice.get("/v1/accounts/me", headers={"host": "10.0.0.7:8080"}).status_code == 200
