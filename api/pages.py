"""Pages of a list: ``limit``, ``starting_after``, ``include_total_count``, and nothing about what is listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from api.errors import BadRequest

DEFAULT_LIMIT = 20
MAX_LIMIT = 5000


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """What part of a list is asked for: at most ``limit`` things after the id ``starting_after``."""

    limit: int = DEFAULT_LIMIT
    starting_after: str | None = None
    include_total_count: bool = True

    def __iter__(self) -> Iterator[Any]:
        """``limit, starting_after, include_total_count = page``"""
        return iter((self.limit, self.starting_after, self.include_total_count))


def parse_page(query: Mapping[str, str]) -> Page:
    """The page a query asks for. ``limit`` is clamped to 1…5000; an empty value counts as absent; junk is a 400."""
    limit = DEFAULT_LIMIT
    if text := query.get("limit"):
        try:
            limit = int(text)
        except ValueError:
            raise BadRequest(f"limit: {text[:40]!r} is not a whole number") from None
    return Page(
        limit=max(1, min(MAX_LIMIT, limit)),
        starting_after=query.get("starting_after") or None,
        include_total_count=parse_flag(query, "include_total_count", default=True),
    )


def parse_flag(query: Mapping[str, str], name: str, *, default: bool) -> bool:
    """A boolean of a query: ``true`` or ``false``; absent or empty is ``default``; anything else is a 400."""
    text = (query.get(name) or "").lower()
    if not text:
        return default
    if text in ("true", "1"):
        return True
    if text in ("false", "0"):
        return False
    raise BadRequest(f"{name}: say true or false")
