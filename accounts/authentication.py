"""Recognising a caller by an API key: one prepared SELECT, each time, so that revoking takes effect at once."""

from __future__ import annotations

import hashlib

from django.db import connection
from rest_framework.authentication import BaseAuthentication
from rest_framework.request import Request

from api.callers import Caller
from api.errors import Forbidden, Unauthorized
from api.prepared import fetch_one

TOKEN_MAX = 200

_SELECT = """
SELECT k.id, k.account_id, k.member_id, k.access, a.status,
       k.revoked_at IS NOT NULL, coalesce(k.expires_at <= now(), false),
       coalesce(k.last_used_at < now() - interval '1 minute', true)
  FROM accounts_apikey k JOIN accounts_account a ON a.id = k.account_id
 WHERE k.secret_sha256 = %s
"""
# The guard keeps it to once a minute however many requests come at the same time.
_USED = """
UPDATE accounts_apikey SET last_used_at = now()
 WHERE id = %s AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
"""


def digest(secret: str) -> bytes:
    """What is kept of a secret. Secrets are 160 random bits, so a plain hash cannot be searched for."""
    return hashlib.sha256(secret.encode()).digest()


def authenticate(token: str) -> Caller:
    """The caller who holds ``token``.

    Raises Unauthorized for an unknown, revoked or expired key and Forbidden for a disabled account.
    """
    if len(token) > TOKEN_MAX:
        raise Unauthorized
    row = fetch_one(_SELECT, [digest(token)])
    if row is None:
        raise Unauthorized
    key_id, account_id, member_id, access, status, revoked, expired, stale = row
    if revoked:
        raise Unauthorized("this API key has been revoked")
    if expired:
        raise Unauthorized("this API key has expired")
    if status != "enabled":
        raise Forbidden("this account is disabled; ask the operator")
    if stale:
        with connection.cursor() as cursor:
            cursor.execute(_USED, [key_id])
    return Caller(account_id=account_id, key_id=key_id, member_id=member_id, read_only=access == "read_only")


class ApiKeyAuthentication(BaseAuthentication):
    """DRF's door: ``Authorization: Bearer ak_…``; ``request.user`` is the Caller."""

    def authenticate(self, request: Request) -> tuple[Caller, None]:
        scheme, _, token = request.META.get("HTTP_AUTHORIZATION", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized
        return authenticate(token), None

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"
