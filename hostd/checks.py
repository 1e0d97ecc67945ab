"""Checks of single values of the protocol: ids, numbers, texts.

In charge of: what a value has to look like. Not in charge of: which field is checked how (`messages.py`, through which
everybody else imports what is about ids).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_ULID = "[0-9a-hjkmnp-tv-z]{26}"
_BOX = re.compile(f"dbx_{_ULID}")
_ID = re.compile(f"[a-z]{{3}}_{_ULID}")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
REQUEST = re.compile(r"[A-Za-z0-9._-]{1,64}")

Check = Callable[[Any], bool]


def is_box_id(text: object) -> bool:
    """True for a devbox id, ``dbx_`` and a lower-case ULID."""
    return isinstance(text, str) and _BOX.fullmatch(text) is not None


def is_work_id(text: object) -> bool:
    """True for the id of something that runs in a box (an execution, launch work)."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def is_image_id(text: object) -> bool:
    return isinstance(text, str) and _IMAGE.fullmatch(text) is not None


def is_digest(text: object) -> bool:
    """True for a lower-case hexadecimal sha256."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def matches(pattern: re.Pattern[str]) -> Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def whole(low: int, high: int) -> Check:
    # bool is an int to Python, not to the protocol.
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*allowed: str) -> Check:
    return lambda value: isinstance(value, str) and value in allowed
