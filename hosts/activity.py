"""What a host tells of what goes on in a box.

In charge of its shape, and of not believing a keeper. What counts is `hostd.activity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hosts.errors import HostRefused


@dataclasses.dataclass(frozen=True, slots=True)
class Activity:
    """What goes on in a box: commands that run, terminals with somebody at them, programs and files that are attended.
    `idle_seconds` since anything did; `monotonic`: the host's own clock."""

    running: int
    attached: int
    served: int
    idle_seconds: float
    monotonic: float

    @property
    def going_on(self) -> list[tuple[str, int]]:
        """What of which kind, the most telling first."""
        return [("command", self.running), ("terminal", self.attached), ("call", self.served)]


def parse_activity(reply: Mapping[str, Any]) -> Activity:
    """The answer to `activity`. Raises HostRefused for one that cannot be."""
    counts = [reply.get(name) for name in ("running", "attached", "served")]
    clocks = [reply.get(name) for name in ("idle_seconds", "monotonic")]
    right = all(isinstance(count, int) and count >= 0 for count in counts)
    if not right or not all(isinstance(clock, int | float) and clock >= 0 for clock in clocks):
        raise HostRefused("internal", "what its keeper tells of the box has a wrong field")
    return Activity(*counts, *clocks)  # type: ignore[arg-type]
