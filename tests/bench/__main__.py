"""``python -m tests.bench [--quick] [NAME …]``: start a throwaway installation, measure, print the table, remove
everything.

Every measure has a bound in time and so has the whole run.  One that fails or takes too long leaves a row that says
why, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from config.state import CHECKOUT
from tests.bench import figures
from tests.bench.installation import Target, throwaway
from tests.bench.measures import MEASURES, Measure

WHOLE_SECONDS, WHOLE_SECONDS_QUICK = 900.0, 420.0
"""For all measures together; starting and removing the installation have bounds of their own."""


class TookTooLong(Exception):
    """A measure's time is up."""


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise TookTooLong in the main thread after that many seconds, whatever it waits for."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLong(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(name: str, one: Measure, target: Target, seconds: float) -> list[figures.Figure]:
    """Its rows; an error's row after those that came before it, or instead."""
    taken: list[figures.Figure] = []
    began = time.monotonic()
    try:
        with bounded(seconds):
            for found in one.run(target):
                taken.append(found)
                sys.stderr.write(f"{found.name}: {found.median} {found.unit}\n")
    except Exception as error:
        said = str(error).strip().splitlines()
        taken.append(figures.failed(name, f"{type(error).__name__}: {said[-1][:300] if said else ''}"))
        sys.stderr.write(f"{name}: could not be measured: {type(error).__name__}: {error}\n")
        with contextlib.suppress(Exception), bounded(30.0):
            target.clear()
    sys.stderr.write(f"    {name} took {time.monotonic() - began:.0f} s\n")
    return taken


def main(arguments: list[str]) -> int:
    """Exit status 1 when something could not be measured, 2 for a name that is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure speed and memory.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="smaller numbers, into build/bench-quick.json")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in MEASURES]
    if unknown:
        sys.stderr.write(f"no such measure: {', '.join(unknown)}; there are {', '.join(MEASURES)}\n")
        return 2
    taken: list[figures.Figure] = []
    path = CHECKOUT / "build" / ("bench-quick.json" if given.quick else "bench.json")
    trouble = ""
    try:
        with throwaway(quick=given.quick) as target:
            end = time.monotonic() + (WHOLE_SECONDS_QUICK if given.quick else WHOLE_SECONDS)
            for name in given.names or MEASURES:
                left = end - time.monotonic()
                if left < 5:
                    taken.append(figures.failed(name, "not begun: the time of the whole run was up"))
                    continue
                taken += measure(name, MEASURES[name], target, min(left, MEASURES[name].seconds))
    except Exception as error:
        if not taken:
            raise
        trouble = f"{type(error).__name__}: {error}"
    figures.write(path, taken, keep=bool(given.names))
    sys.stdout.write(f"\n{figures.table(taken)}\n\n{path.relative_to(CHECKOUT)} has the same figures.\n")
    if trouble:
        sys.stdout.write(f"the installation could not be removed in order: {trouble}\n")
    return 1 if trouble or any(one.error for one in taken) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
