"""What a step may end in, and the values it may learn.

In charge of: the three outcomes of a step and the markers for values that only the database can know.
Not in charge of: writing them down (`flows.engine`), or which steps exist (each flow).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Also = Callable[[Any], bool]
"""Runs with the settle's own cursor, in its transaction. False rolls everything back; the step runs again later."""


class LeaseLost(Exception):
    """The row belongs to somebody else by now: whatever this step found out is thrown away, in silence."""


class Superseded(LeaseLost):
    """A host has served a newer fence than this step's. Mostly the row has moved on; if not, it is tried again at once
    with a new fence: there is nobody to wait for."""


@dataclass(frozen=True, slots=True)
class DatabaseNow:
    """A point in time by the database's clock, `plus` seconds from the moment of the settle."""

    plus: float = 0.0


@dataclass(frozen=True, slots=True)
class Next:
    """Go to `step`, at once and under the same lease. `learnt` maps columns of the row to their new values."""

    step: str
    learnt: Mapping[str, object] = field(default_factory=dict)
    also: Also | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Give the lease up and sleep for `seconds`, or until a wake. With `step`, sleep in that step instead of this one.

    A wake that came while the step ran is never lost: the row is then due at once.
    """

    seconds: float
    learnt: Mapping[str, object] = field(default_factory=dict)
    also: Also | None = None
    step: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The row has reached its end, in `step`: it is never claimed again, and `completed_at` is set."""

    learnt: Mapping[str, object] = field(default_factory=dict)
    also: Also | None = None
    step: str = "done"


Outcome = Next | Wait | Done
