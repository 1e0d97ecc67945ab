"""What changes accounts, members and keys."""

from __future__ import annotations

import base64
import datetime
import hmac
import secrets

from django.conf import settings
from django.db.models.functions import Now

from accounts.authentication import digest
from accounts.models import Account, ApiKey, Member
from api.ids import new_id

NAME_MAX = 200


def create_account(name: str) -> Account:
    """A new tenant."""
    return Account.objects.create(name=name[:NAME_MAX])


def create_member(account_id: str, name: str, email: str = "") -> Member:
    """A person of an account."""
    return Member.objects.create(account_id=account_id, name=name[:NAME_MAX], email=email)


def new_secret() -> str:
    """A fresh key secret: ``ak_`` and 160 random bits in base 32."""
    return _secret(secrets.token_bytes(20))


def secret_of_request(caller_key_id: str, key_id: str, request_id: str) -> str:
    """The secret of the key ``key_id`` that this request makes: a repetition after a lost answer must give the same
    one, and nothing may keep it meanwhile. Whoever has neither SECRET_KEY nor the request's id cannot know it, and the
    same request id sent with another key, or a day later for another new key, gives another secret."""
    message = f"api key {key_id} made by {caller_key_id} {request_id}".encode()
    return _secret(hmac.digest(settings.SECRET_KEY.encode(), message, "sha256")[:20])


def _secret(random: bytes) -> str:
    return "ak_" + base64.b32encode(random).decode().lower()


def create_key(
    account_id: str,
    name: str,
    member: str | None = None,
    expires_at: datetime.datetime | None = None,
    *,
    read_only: bool = False,
    key_id: str | None = None,
    secret: str | None = None,
) -> tuple[ApiKey, str]:
    """A new API key and its secret, which is in no place but this answer. ``member`` is a member's id."""
    secret = secret or new_secret()
    key = ApiKey.objects.create(
        id=key_id or new_id("key"),
        account_id=account_id,
        member_id=member,
        name=name[:NAME_MAX],
        access=ApiKey.Access.READ_ONLY if read_only else ApiKey.Access.FULL,
        prefix=secret[:9],
        secret_sha256=digest(secret),
        expires_at=expires_at,
    )
    return key, secret


def revoke_key(key_id: str) -> bool:
    """End a key at once; whether it was alive until now."""
    return ApiKey.objects.filter(pk=key_id, revoked_at=None).update(revoked_at=Now()) == 1
