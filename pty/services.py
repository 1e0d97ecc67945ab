"""Keys to terminals: made, recognised, deleted when their day is over."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Final

from django.db import connection

from api.callers import Caller
from api.errors import BadRequest, Unauthorized
from api.ids import new_id
from api.prepared import fetch_one
from devboxes import selectors as devboxes

LIFE_HOURS: Final = 24
KEY_CHARACTERS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
KEY_LENGTH: Final = 26
"""130 random bits; with its port in front it fits into a label of a host name."""
BATCH: Final = 1000


def create_tunnel(caller: Caller, devbox_id: str) -> tuple[str, str]:
    """A new key and its token for the terminals of a running devbox. Raises NotFound, BadRequest."""
    context = devboxes.execution_context(caller, devbox_id)
    if context.status != "running":
        raise BadRequest(f"devbox {devbox_id} is {context.status}; terminals are opened while it is running")
    key = "".join(secrets.choice(KEY_CHARACTERS) for _ in range(KEY_LENGTH))
    token = secrets.token_urlsafe(32).replace("-", "x").replace("_", "y")
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO pty_ptytunnel (id, devbox_id, account_id, key_id, key_sha256, token_sha256, expires_at) "
            f"VALUES (%s, %s, %s, %s, %s, %s, now() + interval '{LIFE_HOURS} hours')",
            [new_id("ptt"), context.devbox_id, context.account_id, caller.key_id or "", _hash(key), _hash(token)],
        )
    return key, token


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


_FIND: Final = """
SELECT t.devbox_id, t.account_id, t.token_sha256, a.status
  FROM pty_ptytunnel t JOIN accounts_account a ON a.id = t.account_id JOIN accounts_apikey k ON k.id = t.key_id
 WHERE t.key_sha256 = %s AND t.expires_at > now()
   AND k.revoked_at IS NULL AND coalesce(k.expires_at > now(), true)
"""


def authenticate_tunnel(key: str, token: str) -> tuple[Caller, str]:
    """The caller that a key and its token stand for, and the one devbox whose terminals they open.

    Raises Unauthorized: an unknown key, an expired one and a wrong token look the same.
    """
    row = fetch_one(_FIND, [_hash(key)])
    known, wanted = _hash(token), bytes(row[2]) if row is not None else b"\0" * 32
    if not hmac.compare_digest(known, wanted) or row is None or row[3] != "enabled":
        raise Unauthorized("this terminal's key or token is unknown or has expired")
    return Caller(account_id=row[1]), row[0]


def delete_expired_tunnels() -> int:
    """Delete in batches what nobody can use any more; how many."""
    gone = 0
    while True:
        with connection.cursor() as cursor:
            cursor.execute(
                "DELETE FROM pty_ptytunnel WHERE id IN "
                f"(SELECT id FROM pty_ptytunnel WHERE expires_at < now() LIMIT {BATCH})"
            )
            deleted = int(cursor.rowcount)
        gone += deleted
        if deleted < BATCH:
            return gone


def delete_expired_tickets() -> int:
    """Delete those that nobody can use any more; how many."""
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM pty_webticket WHERE expires_at < now()")
        return int(cursor.rowcount)
