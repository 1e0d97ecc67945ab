"""One command of a box, as its keeper knows it.

In charge of: the fields. Not in charge of: how they change (executions.py draws it).
"""

from __future__ import annotations

import time

from hostd.streams import Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hostd.output_index import Index
    from hostd.shells import Shell
    from hostd.stdin import Inputs, Stdin


def now_ms() -> int:
    """Return the time in ms since 1970."""
    return int(time.time() * 1000)


class Execution:
    """One command."""

    __slots__ = (
        "acked",
        "box_kills",
        "cap",
        "exec_error",
        "exit",
        "exit_waiters",
        "exited_at_ms",
        "fence",
        "first_ms",
        "id",
        "index",
        "inputs",
        "killed",
        "late",
        "notes",
        "number",
        "pending_kill",
        "pid",
        "pidfd",
        "reap",
        "reason",
        "settled",
        "shell",
        "started_at_ms",
        "state",
        "status",
        "stdin",
        "streams",
        "waiters",
    )

    def __init__(self, name: str, fence: int, streams: list[Stream]) -> None:
        self.id, self.fence = name, fence
        self.state = "asked"  # asked | running | exited
        self.pid, self.pidfd = 0, -1
        self.streams = streams
        self.stdin: Stdin | None = None
        self.index: Index | None = None  # when its output came; set as soon as it is known
        self.late: Index | None = None  # and when what came after its exit did
        self.inputs: Inputs | None = None  # made when the first one comes
        self.status: int | None = None  # wait status, known before the outputs are complete
        self.reap = False  # the zombie is ours to reap once its exit is written down
        self.exit: int | None = None
        self.reason: dict[str, Any] | None = None
        self.exec_error: str | None = None
        self.killed = 0  # signal sent on request
        self.pending_kill: tuple[int, bool] | None = None
        self.box_kills = 0  # the box's OOM kills when it started
        self.started_at_ms = now_ms()
        self.exited_at_ms: int | None = None
        self.acked = 0  # when, in ms
        self.cap: int | None = None  # bytes kept of each stream, when its spawn said so
        self.first_ms = 0  # when the first byte came, as a predecessor wrote it down
        self.settled = False
        self.shell: Shell | None = None  # the named shell that runs it
        self.number = 0  # its place among the commands of that shell
        self.notes: list[str] = []  # what its user should know of its shell
        self.waiters: list[Callable[[], None]] = []  # called when it runs, or never will
        self.exit_waiters: list[Callable[[], bool]] = []  # called when it has exited; True: its asker was told

    def sizes(self) -> list[int]:
        """Return [stdout, stderr] in bytes, the dropped ones included."""
        return [stream.size for stream in self.streams]

    def first_byte_at_ms(self) -> int:
        """Return when the first byte of output came, 0 when there was none or nobody can tell."""
        return self.first_ms or min((s.first_ms for s in self.streams if s.first_ms), default=0)

    def open_pipes(self) -> bool:
        """Does anybody still hold one of its pipes?"""
        return any(stream.pipe >= 0 for stream in self.streams)


class Follow:
    """One follower of one stream."""

    __slots__ = ("execution", "offset", "stream")

    def __init__(self, execution: Execution, stream: Stream, offset: int) -> None:
        self.execution, self.stream, self.offset = execution, stream, offset


class Settings:
    """What the box's spec says of commands."""

    __slots__ = ("budget", "burst", "cap", "rate")

    def __init__(self, spec: dict[str, Any]) -> None:
        self.cap = int(spec["stream_cap_bytes"])
        self.rate = int(spec["byte_rate"])
        self.burst = int(spec["byte_burst"])
        self.budget = int(spec["out_budget_bytes"])
