"""What a devbox may be made of besides the image: the seam to the room that keeps disks.

In charge of the shape of that seam. The room registers itself from its `apps.py`; nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from api.callers import Caller


@dataclass(frozen=True, slots=True)
class Origin:
    """A kept disk. `ready`: it can be had now; `failed`: why it never will be. `size_bytes`: beyond its image, None
    while it is not known. `launch_parameters`: of the devbox it was taken of."""

    id: str
    ready: bool
    failed: str
    image_id: str
    size_bytes: int | None
    launch_parameters: Mapping[str, Any]


class Origins(Protocol):
    """Who keeps disks."""

    def access(self, caller: Caller, id: str) -> Origin:
        """One that the caller may use. Raises BadRequest, for a stranger's too."""

    def look(self, id: str) -> Origin | None:
        """How it is now; None when it is gone."""

    def holders(self, id: str) -> Sequence[str]:
        """Hosts that have it already."""

    def fetch(self, id: str, host_id: str) -> bool:
        """Have it on that host; False: it is on its way, ask again. Raises HostError."""


_origins: list[Origins] = []


def register(origins: Origins) -> None:
    """Say who keeps disks. Once, from `AppConfig.ready`."""
    _origins[:] = [origins]


def origins() -> Origins:
    """Who keeps disks."""
    return _origins[0]
