"""What rooms above this one add to a devbox: a field that may be given at its creation and is shown in its view.

In charge of the seam only. Each room registers its field once, from its `apps.py`; nothing here imports them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class Extension:
    """One field.

    `sql` is an expression over the devbox `d` whose value is JSON or NULL; `show` makes of it what the view says.
    `create` is called inside the transaction that makes the devbox, with its id and what was given for the field.
    """

    field: str
    sql: str
    show: Callable[[Any], Any]
    create: Callable[[str, Any], None]


_registered: dict[str, Extension] = {}


def register(extension: Extension) -> None:
    """Add a field, or replace it by its successor."""
    _registered[extension.field] = extension


def columns() -> str:
    """The expression for all of them: one JSON text."""
    parts = ", ".join(f"'{field}', {one.sql}" for field, one in _registered.items())
    return f"json_build_object({parts})::text"


def shown(text: str) -> dict[str, Any]:
    """The fields of the view, of what `columns` brought."""
    found = orjson.loads(text)
    return {field: one.show(found[field]) for field, one in _registered.items() if found[field] is not None}


def created(devbox_id: str, parameters: Mapping[str, Any]) -> None:
    """Let each room do its part for a new devbox."""
    for field, one in _registered.items():
        if parameters.get(field) is not None:
            one.create(devbox_id, parameters[field])
