"""Who may use the web terminal: an operator, signed in to the admin, with a ticket from the page for one connection.

In charge of tickets (made, used once, deleted), of the operator's session as a WebSocket brings it, and of where the
page must be from. A WebSocket is not held back by a browser's rules about origins, and the servers of devboxes are
same-site with us, so cookies alone prove nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import secrets
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.models import AbstractBaseUser, User
from django.db import connection
from django.http import HttpRequest
from django.http.cookie import parse_cookie

from api.callers import Caller
from api.errors import Forbidden, Unauthorized
from devboxes import logs

TICKET_SECONDS: Final = 30


def may_use(user: object) -> bool:
    """Whether that user of the admin may open terminals: they lead into every account's devboxes."""
    return isinstance(user, AbstractBaseUser) and user.is_active and bool(getattr(user, "is_superuser", False))


def make_ticket(user: User, devbox_id: str) -> str:
    """A ticket for one connection of that operator to that devbox."""
    ticket = secrets.token_urlsafe(32)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO pty_webticket (ticket_sha256, devbox_id, user_id, expires_at) "
            f"VALUES (%s, %s, %s, now() + interval '{TICKET_SECONDS} seconds')",
            [_hash(ticket), devbox_id, user.pk],
        )
    return ticket


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def check_origin(headers: Mapping[str, str]) -> None:
    """Raises Forbidden unless a page of this very host asks."""
    origin = urlsplit(headers.get("origin", ""))
    ours = {headers.get("host", "").lower(), urlsplit(settings.BERTH.public_url).netloc.lower()}
    if origin.scheme not in ("http", "https") or not origin.netloc or origin.netloc.lower() not in ours:
        raise Forbidden("this page may not open terminals")


def operator_of(headers: Mapping[str, str]) -> User:
    """The operator whose session these headers carry. Raises Unauthorized."""
    request = HttpRequest()
    key = parse_cookie(headers.get("cookie", "")).get(settings.SESSION_COOKIE_NAME)
    request.session = importlib.import_module(settings.SESSION_ENGINE).SessionStore(key)
    user: Any = get_user(request)
    if not may_use(user):
        raise Unauthorized("sign in to the admin first")
    return user  # type: ignore[no-any-return]


_USE: Final = """
DELETE FROM pty_webticket t USING devboxes_devbox d
 WHERE t.ticket_sha256 = %s AND t.devbox_id = %s AND t.user_id = %s AND t.expires_at > now() AND d.id = t.devbox_id
RETURNING d.account_id
"""


def use_ticket(headers: Mapping[str, str], ticket: str, devbox_id: str) -> Caller:
    """Whom a ticket lets in to that devbox; it is gone afterwards. Raises Unauthorized: an unknown ticket, an expired
    one, one of another operator or for another devbox look the same."""
    user = operator_of(headers)
    with connection.cursor() as cursor:
        cursor.execute(_USE, [_hash(ticket), devbox_id, user.pk])
        row = cursor.fetchone()
    if row is None:
        raise Unauthorized("this ticket is unknown, used or expired")
    logs.note(devbox_id, logs.Entry("exec", message=f"the operator {user.get_username()} opened a terminal"))
    return Caller(account_id=row[0], is_operator=True)
