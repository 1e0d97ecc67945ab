"""The garbage collector's full collections, rationed.

A web process with thousands of waiting clients holds a million objects that live for half a minute. Left to itself
Python goes through all of them every few seconds, and serves nobody meanwhile. Here a full collection may take a small
share of the time: the longer the last one took, the longer until the next. Young objects are collected as ever, and
what was there at the start is never looked at again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

SHARE: Final = 0.03
"""The part of the time that full collections may take."""
PAUSE_CAP_SECONDS: Final = 120.0
YOUNG: Final = (700, 10)
USUAL: Final = 10
"""After so many collections of the middle generation a full one is considered: Python's own number."""
NEVER: Final = 1 << 30


class Ration:
    """Shuts off full collections after each one, for as long as its time has to last. Told by `gc.callbacks`."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[], float] = time.thread_time,
        set_threshold: Callable[[int, int, int], None] = gc.set_threshold,
    ) -> None:
        self._clock, self._work, self._set_threshold = clock, work, set_threshold
        self._began = 0.0
        self._again_at: float | None = None

    def __call__(self, phase: str, info: Mapping[str, Any]) -> None:
        if info["generation"] == 2:
            if phase == "start":
                self._began = self._work()
                return
            took = self._work() - self._began  # of this thread alone: a busy machine must not put the next one off
            self._again_at = self._clock() + min(PAUSE_CAP_SECONDS, took / SHARE)
            self._set_threshold(*YOUNG, NEVER)
        elif self._again_at is not None and phase == "stop" and self._clock() >= self._again_at:
            self._again_at = None
            self._set_threshold(*YOUNG, USUAL)


def begin() -> None:
    """From now on, in this process. Call once it has all that it keeps for good."""
    gc.collect()
    gc.freeze()
    gc.callbacks.append(Ration())
