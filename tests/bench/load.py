"""Requests as fast as they are answered, from a process of its own: ``python -m tests.bench.load JSON`` prints JSON
with when each answer came (seconds) and how long it took (milliseconds).

A process of its own, so that what it costs is not paid by the one that measures.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

from config.state import CHECKOUT
from tests.bench.wire import Server, Unexpected, exchange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What to ask, and how. ``body``: JSON text in which ``NUMBER`` becomes another number each time. ``want``: what
    a good answer has in it."""

    base_url: str
    key: str
    method: str = "GET"
    path: str
    body: str = ""
    want: str = ""
    connections: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Taken:
    """One answer: when it came, on the clock of the day (s), and how long it took (ms)."""

    at: float
    ms: float


def run(load: Load) -> list[Taken]:
    """All answers. Raises Unexpected for any that is not what was wanted."""
    server = Server(load.base_url, load.key)

    def requests() -> Iterator[bytes]:
        for number in itertools.count():
            body = json.loads(load.body.replace("NUMBER", str(number))) if load.body else None
            yield server.request(load.method, load.path, body)

    taken = []
    for _, answer, took, at in exchange(server, requests(), load.connections, load.seconds):
        if answer.status != 200 or load.want.encode() not in answer.body:
            raise Unexpected(f"status {answer.status}: {answer.body[:200]!r}")
        taken.append(Taken(at, took))
    return taken


def apart(load: Load, processes: int = 1) -> list[Taken]:
    """`run` in that many processes at once, each with its connections. Raises RuntimeError with what one said."""
    argv = [sys.executable, "-m", "tests.bench.load", json.dumps(dataclasses.asdict(load))]
    running = [
        subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        taken: list[Taken] = []
        for process in running:
            printed, complaint = process.communicate(timeout=load.seconds + 90)
            if process.returncode:
                raise RuntimeError(complaint[-1000:])
            taken += [Taken(at, ms) for at, ms in json.loads(printed)]
        return taken
    finally:
        for process in running:
            process.kill()
            process.wait()


def per_second(taken: list[Taken]) -> list[float]:
    """How many answers came in each whole second but the first and the last, which are not whole; one rate over all
    when there is no such second."""
    first, last = min(one.at for one in taken), max(one.at for one in taken)
    whole = int(last - first)
    if whole < 3:
        return [len(taken) / max(last - first, 1e-3)]
    counts = [0.0] * whole
    for one in taken:
        place = int(one.at - first)
        if place < whole:
            counts[place] += 1
    return counts[1:]


if __name__ == "__main__":
    sys.stdout.write(json.dumps([(one.at, one.ms) for one in run(Load(**json.loads(sys.argv[1])))]))
