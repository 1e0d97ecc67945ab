"""Secrets at rest: sealed, rotated, and never opened by the wrong key."""

import pytest
from django.core.exceptions import ImproperlyConfigured

from accounts.sealing import SealBroken, new_seal_key, reseal, seal, unseal

SECRET = {"TOKEN": "s3cret", "list": [1, None]}


def test_what_is_sealed_comes_back(settings):
    settings.SEAL_KEYS = [new_seal_key()]
    sealed = seal(SECRET)
    assert b"s3cret" not in sealed
    assert unseal(sealed) == unseal(memoryview(sealed)) == SECRET
    assert seal(SECRET) != sealed


def test_rotation(settings):
    old, new = new_seal_key(), new_seal_key()
    settings.SEAL_KEYS = [old]
    sealed = seal(SECRET)
    settings.SEAL_KEYS = [new, old]
    fresh = reseal(sealed)
    assert unseal(sealed) == SECRET
    settings.SEAL_KEYS = [new]
    assert unseal(fresh) == SECRET
    with pytest.raises(SealBroken):
        unseal(sealed)
    with pytest.raises(SealBroken):
        reseal(sealed)


def test_changed_bytes_do_not_open(settings):
    settings.SEAL_KEYS = [new_seal_key()]
    sealed = bytearray(seal(SECRET))
    sealed[-3] ^= 1
    with pytest.raises(SealBroken):
        unseal(bytes(sealed))


def test_without_a_key_nothing_is_kept(settings):
    settings.SEAL_KEYS = []
    with pytest.raises(ImproperlyConfigured):
        seal(SECRET)
