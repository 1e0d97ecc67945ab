"""The caller, and the guarded doors to an account's own rows."""

from __future__ import annotations

from accounts.models import Account, ApiKey
from api.callers import Caller
from api.errors import NotFound

__all__ = ["Caller", "access_account", "access_key"]


def access_account(caller: Caller) -> Account:
    """The caller's account."""
    account = Account.objects.filter(pk=caller.account_id).first()
    if account is None:
        raise NotFound("there is no such account")
    return account


def access_key(caller: Caller, key_id: str) -> ApiKey:
    """A key of the caller's account. Raises NotFound, for a stranger's too."""
    key = ApiKey.objects.filter(pk=key_id, account_id=caller.account_id).first()
    if key is None:
        raise NotFound("there is no such API key")
    return key
