"""The numbers the hosts app goes by, read from `settings.BERTH` with defaults sized for small agents' boxes.

In charge of names, units and defaults only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from django.conf import settings
from django.core.signals import setting_changed


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """Settings of hosts; a setting of the same name in upper case in `settings.BERTH` wins over the default."""

    silent_after: float = 10.0
    """Seconds without a heartbeat after which a host gets no placements and is not dialled by steps."""
    lost_after: float = 900.0
    """Seconds without a heartbeat after which what ran on the host is declared lost."""
    stats_seconds: float = 60.0
    """How often hosts tell what each box uses; 0: never."""
    overcommit_cpu: float = 8.0
    """How often a core may be promised. Agents' boxes wait for a model most of the time."""
    overcommit_memory: float = 2.0
    overcommit_disk: float = 2.0
    """Boxes are copy-on-write clones of one image and mostly empty."""
    pool_kept_free: float = 0.10
    """Share of the pool that placement leaves free."""
    memory_kept_free: float = 0.05
    """Share of the host's memory that must really be free for a placement."""


@cache
def policy() -> Policy:
    """The numbers in force. Raises ImproperlyConfigured's plain ValueError on one that is no number."""
    given: Any = getattr(settings, "BERTH", {})
    values: dict[str, float] = {}
    for field in dataclasses.fields(Policy):
        name = field.name.upper()
        value = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
        if value is not None:
            values[field.name] = float(value)
    return Policy(**values)


def _forget(*, setting: str, **_: object) -> None:
    if setting == "BERTH":
        policy.cache_clear()


setting_changed.connect(_forget)
