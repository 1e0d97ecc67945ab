"""Ten thousand long-polls on one web process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from config.state import CHECKOUT
from tests.bench.figures import Figure, figure
from tests.bench.installation import OneWeb, Target, one_web
from tests.bench.shares import Meter, Parts, pss_mb
from tests.bench.wire import Server, Unexpected, exchange

SOURCES = [f"127.0.0.{number}" for number in range(2, 10)]
"""Each has ports of its own."""
IDLE_EXECUTIONS = 50
ENDING = 20
_ENDS_WHEN_TOLD = "mkfifo told-{number}; read x <told-{number}; echo $EPOCHREALTIME"
_TELL = "exec 9<> <(:); for n in {{0..{last}}}; do read -t {pause:.2f} -u 9; echo >told-$n; done"


def idle_long_polls_mb(target: Target) -> Iterator[Figure]:
    """wait_for_status by 10,000 clients, each asking again after its 408, on one web process: what it grows by; how
    soon an execution's end reaches its waiter meanwhile; how other requests fare; and until all 10,000 are answered
    when what they wait for ends at once."""
    count = 1000 if target.quick else 10_000
    lasts = 8 if target.quick else 35
    with target.boxes(2) as (quiet, lively), one_web(target) as web:
        parts = Parts(target.up, {"one web": web.pid})
        idle = [target.start(quiet, "sleep 300") for _ in range(IDLE_EXECUTIONS)]
        ending = [target.start(lively, _ENDS_WHEN_TOLD.format(number=number)) for number in range(ENDING)]
        alone = _gets(target, web, quiet)
        before = pss_mb([web.pid])
        paths = [idle[number % len(idle)] for number in range(count - ENDING)] + ending
        with Polls({"base_url": web.base_url, "key": target.key, "sources": SOURCES, "paths": paths}) as polls:
            polls.told("asked", 90)
            memory: list[float] = []
            beside: list[float] = []
            target.start(lively, _TELL.format(pause=lasts / 4 / ENDING, last=ENDING - 1))
            with Meter(parts) as meter:
                until = time.monotonic() + lasts
                while time.monotonic() < until:
                    time.sleep(1.0)
                    memory.append(pss_mb([web.pid]) - before)
                    beside += _gets(target, web, quiet, 10)
            ended = time.time()
            target.shutdown(quiet)
            told = polls.told("answered", 60)
    if told["wrong"] or told["left"]:
        raise Unexpected(f"{told['left']} were never answered, {len(told['wrong'])} wrongly: {told['wrong'][:2]}")
    woken = [(at - float(printed)) * 1000 for path, at, printed in told["answered"] if path in set(ending)]
    last = max(at for path, at, _ in told["answered"] if path not in set(ending))
    yield figure("idle_long_polls_mb", "MB", memory).with_cpu(meter.shares())
    yield figure("idle_long_polls_wake_ms", "ms", woken)
    yield figure("get_beside_long_polls_ms", "ms", beside, figure("alone", "ms", alone).median)
    yield figure("idle_long_polls_all_answered_s", "s", [last - ended])


def _gets(target: Target, web: OneWeb, box: str, count: int = 100) -> list[float]:
    """Milliseconds of requests for a devbox, one after another."""
    server = Server(web.base_url, target.key)
    found = list(exchange(server, (server.request("GET", f"/v1/devboxes/{box}") for _ in range(count)), 1, 20))
    if bad := [answer for _, answer, _, _ in found if answer.status != 200]:
        raise Unexpected(f"status {bad[0].status}: {bad[0].body[:200]!r}")
    return [took for _, _, took, _ in found]


class Polls:
    """The process that holds them."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.polls"],
            cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()

    def told(self, what: str, seconds: float) -> dict[str, Any]:
        """The next line it says, which must be about that; after ``seconds`` it has to say what it has. Raises
        Unexpected."""
        assert self._process.stdout is not None and self._process.stdin is not None
        close = threading.Timer(seconds, self._process.stdin.close)
        close.start()
        line = self._process.stdout.readline()
        close.cancel()
        found: dict[str, Any] = json.loads(line) if line else {}
        if what not in found:
            raise Unexpected("the process with the long-polls ended")
        return found

    def __enter__(self) -> Polls:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
