"""`metadata[key]` and `metadata[key][in]` of a list's query, for devboxes and for snapshots."""

from __future__ import annotations

import re
from typing import Final

from django.http import QueryDict

from api.errors import BadRequest
from api.validation import check_metadata_key

VALUES_MAX: Final = 100

_METADATA = re.compile(r"metadata\[([^\[\]]*)\](\[in\])?")


def metadata_filters(query: QueryDict) -> list[tuple[str, list[str]]]:
    """Pairs of a key and the values of which it must have one. Raises BadRequest."""
    found: list[tuple[str, list[str]]] = []
    for parameter, values in query.lists():
        match = _METADATA.fullmatch(parameter)
        if match is None:
            continue
        key, several = match.groups()
        if not check_metadata_key(key):
            raise BadRequest(f"{parameter[:150]}: a key is 1 to 128 characters of A-Z a-z 0-9 _ . / -")
        wanted = [part for value in values for part in str(value).split(",")] if several else [str(values[-1])]
        wanted = [value for value in wanted if value]
        if len(wanted) > VALUES_MAX:
            raise BadRequest(f"{parameter[:150]}: at most {VALUES_MAX} values may be given")
        if any("\0" in value for value in wanted):
            raise BadRequest(f"{parameter[:150]}: a value contains a NUL character")
        if wanted:
            found.append((key, wanted))
    return found
