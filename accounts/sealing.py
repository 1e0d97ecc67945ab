"""Secrets at rest: sealed with the first key of SEAL_KEYS, opened with any of them.

To rotate: put a new key in front, restart, reseal what is kept, drop the old one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured


class SealBroken(Exception):
    """None of the keys opens it: the key is gone or the bytes were changed."""


@lru_cache(maxsize=4)
def _fernet(keys: tuple[str, ...]) -> MultiFernet:
    if not keys:
        raise ImproperlyConfigured("BERTH_SEAL_KEYS is empty: secrets cannot be kept")
    return MultiFernet([Fernet(key) for key in keys])


def seal(value: Any) -> bytes:
    """``value`` (anything JSON can say) encrypted and authenticated."""
    return _fernet(tuple(settings.SEAL_KEYS)).encrypt(orjson.dumps(value))


def unseal(sealed: bytes | memoryview) -> Any:
    """What was sealed. Raises SealBroken."""
    try:
        return orjson.loads(_fernet(tuple(settings.SEAL_KEYS)).decrypt(bytes(sealed)))
    except InvalidToken:
        raise SealBroken("no key of BERTH_SEAL_KEYS opens this") from None


def reseal(sealed: bytes | memoryview) -> bytes:
    """The same secret under the first key. Raises SealBroken."""
    try:
        return _fernet(tuple(settings.SEAL_KEYS)).rotate(bytes(sealed))
    except InvalidToken:
        raise SealBroken("no key of BERTH_SEAL_KEYS opens this") from None


def new_seal_key() -> str:
    """A fresh key for SEAL_KEYS."""
    return Fernet.generate_key().decode()
