"""What goes on in a box, and since when nothing does: by the keeper's own clock, which nobody sets.

In charge of what counts: commands, programs and files that a client attends, terminals with somebody at them. Launch
work does not, nor what commands left behind, nor connections to the box's ports. Not in charge of what follows.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hostd.executions import Executions
    from hostd.terminals import Terminals

LAUNCH_WORK = "set_"
"""What the ids of launch work begin with."""


class Activity:
    """`look` at it from time to time, and `note` every end of a command."""

    def __init__(self, executions: Executions, terminals: Terminals, served: Callable[[], int]) -> None:
        """`served`: how many programs and files are attended."""
        self._executions, self._terminals, self._served = executions, terminals, served
        self._last = time.monotonic()
        self._was_attended = False

    def note(self, name: str) -> None:
        """A command has ended."""
        if not name.startswith(LAUNCH_WORK):
            self._last = time.monotonic()

    def look(self) -> tuple[int, int, int]:
        """Return how many commands run, terminals have somebody at them, programs and files are attended. What is
        attended ends without a word: it is taken to have gone on until it is found missing."""
        known = self._executions.known.values()
        running = sum(one.state != "exited" and not one.id.startswith(LAUNCH_WORK) for one in known)
        attached, served = self._terminals.attended(), self._served()
        attended = attached + served > 0
        if running or attended or self._was_attended:
            self._last = time.monotonic()
        self._was_attended = attended
        return running, attached, served

    def handle(self, client: Any, request: dict[str, Any], body: bytes) -> None:
        """Answer `activity`."""
        running, attached, served = self.look()
        now = time.monotonic()
        client.answer(
            {
                "ok": True,
                "running": running,
                "attached": attached,
                "served": served,
                "idle_seconds": round(now - self._last, 3),
                "monotonic": round(now, 3),
            }
        )
