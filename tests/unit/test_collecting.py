"""Full collections of garbage keep to their share of the time."""

import gc
import subprocess
import sys

from api.collecting import NEVER, PAUSE_CAP_SECONDS, SHARE, USUAL, Ration


class Clocks:
    """Two clocks that stand still until moved."""

    def __init__(self) -> None:
        self.now, self.worked = 100.0, 5.0
        self.thresholds: list[int] = []
        self.ration = Ration(lambda: self.now, lambda: self.worked, lambda *all_: self.thresholds.append(all_[2]))

    def full(self, took: float) -> None:
        self.ration("start", {"generation": 2})
        self.worked += took
        self.now += took
        self.ration("stop", {"generation": 2})

    def middle(self) -> None:
        self.ration("start", {"generation": 1})
        self.ration("stop", {"generation": 1})


def test_the_next_one_waits_as_long_as_the_last_one_has_to_last() -> None:
    clocks = Clocks()
    clocks.full(0.5)
    assert clocks.thresholds == [NEVER]
    clocks.now += 0.5 / SHARE - 0.01
    clocks.middle()
    assert clocks.thresholds == [NEVER]
    clocks.now += 0.02
    clocks.middle()
    clocks.middle()
    assert clocks.thresholds == [NEVER, USUAL]


def test_it_is_never_put_off_for_ever() -> None:
    clocks = Clocks()
    clocks.full(1000.0)
    clocks.now += PAUSE_CAP_SECONDS
    clocks.middle()
    assert clocks.thresholds == [NEVER, USUAL]


def test_garbage_in_cycles_still_goes() -> None:
    program = """
import gc, weakref
from api import collecting
collecting.begin()
class Node: pass
kept, seen = [], []
for _ in range(300_000):
    node = Node(); node.me = node
    seen.append(weakref.ref(node)); kept.append(node)
    if len(kept) > 50_000: del kept[:25_000]
print(sum(ref() is None for ref in seen), gc.get_freeze_count() > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    gone, frozen = done.stdout.split()
    assert int(gone) >= 50_000 and frozen == "True"
    assert gc.get_freeze_count() == 0  # not here
