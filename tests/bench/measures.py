"""What is measured: the names that ``make bench`` knows, in the order in which they are taken.

Every measure is bounded in count and in time, and none asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.bench import (
    commands,
    creating,
    keeping,
    podman,
    reaching,
    sleeping,
    ssh_access,
    streaming,
    tunnelling,
    waiting,
)
from tests.bench.figures import Figure
from tests.bench.installation import Target


@dataclass(frozen=True)
class Measure:
    """How something is measured, and how many seconds it may take before it is given up."""

    run: Callable[[Target], Iterator[Figure]]
    seconds: float


MEASURES: dict[str, Measure] = {
    "create_to_running": Measure(creating.create_to_running, 120),
    "podman_run": Measure(podman.podman_run, 110),
    "warm_create_to_result": Measure(creating.warm_create_to_result, 90),
    "suspend_resume": Measure(sleeping.suspend_resume, 120),
    "snapshots": Measure(keeping.snapshots, 150),
    "execute_true": Measure(commands.execute_true, 90),
    "short_commands": Measure(commands.short_commands, 150),
    "get_devbox_rps": Measure(commands.get_devbox_rps, 60),
    "first_byte_ms": Measure(streaming.first_byte_ms, 60),
    "stream_mb_s": Measure(streaming.stream_mb_s, 120),
    "streams_200": Measure(streaming.streams_200, 120),
    "slow_reader_1gib": Measure(streaming.slow_reader_1gib, 180),
    "small_file_rw_ms": Measure(reaching.small_file_rw_ms, 60),
    "large_files_mb_s": Measure(reaching.large_files_mb_s, 120),
    "terminals": Measure(reaching.terminals, 90),
    "tunnels": Measure(tunnelling.tunnels, 120),
    "ssh_exec_ms": Measure(ssh_access.ssh_exec_ms, 120),
    "idle_long_polls_mb": Measure(waiting.idle_long_polls_mb, 150),
    "open_executions_1000": Measure(commands.open_executions_1000, 180),
    "burst_50": Measure(creating.burst_50, 150),
}
