"""Identifiers: a prefix that says what the thing is, and a ULID that sorts by creation.

``dbx_01k9…``: 26 characters of lower-case Crockford base 32, 48 bits of Unix milliseconds and 80 random bits. Ids made
by one process are strictly increasing, also within a millisecond.
"""

from __future__ import annotations

import re
import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_BODY = re.compile(r"[0-7][0-9a-hjkmnp-tv-z]{25}")
_RANDOM_BITS = 80

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """A fresh identifier of the kind ``prefix`` ("dbx", "exe", …)."""
    global _last
    value = (time.time_ns() // 1_000_000 << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
    with _lock:
        if value >> _RANDOM_BITS <= _last >> _RANDOM_BITS:  # same millisecond, or a clock set back: stay increasing
            value = _last + 1 + secrets.randbits(32)
        _last = value
    pairs = _PAIRS
    return f"{prefix}_" + "".join([pairs[value >> shift & 1023] for shift in range(120, -1, -10)])


def is_id(prefix: str, text: object) -> bool:
    """Whether ``text`` could have come from ``new_id(prefix)``."""
    return (
        isinstance(text, str) and text.startswith(f"{prefix}_") and _BODY.fullmatch(text, len(prefix) + 1) is not None
    )


def first_id(prefix: str, at_ms: int) -> str:
    """The lowest identifier that ``new_id(prefix)`` can have made at that time: ids made before it sort below."""
    value = max(0, min(at_ms, (1 << 48) - 1)) << _RANDOM_BITS
    return f"{prefix}_" + "".join([_PAIRS[value >> shift & 1023] for shift in range(120, -1, -10)])
