"""``python -m tests.bench [NAME …]``: start a throwaway installation, measure, print the table, remove everything."""

from __future__ import annotations

import sys

from config.state import CHECKOUT
from tests.bench import figures
from tests.bench.installation import throwaway
from tests.bench.measures import MEASURES


def main(names: list[str]) -> int:
    """Exit status 1 when something could not be measured, 2 for a name that is none."""
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        sys.stderr.write(f"no such measure: {', '.join(unknown)}; there are {', '.join(MEASURES)}\n")
        return 2
    taken: list[figures.Figure] = []
    failed = 0
    with throwaway() as target:
        for name in names or MEASURES:
            try:
                for one in MEASURES[name](target):
                    taken.append(one)
                    sys.stderr.write(f"{one.name}: {one.median} {one.unit}\n")
            except Exception as error:
                failed += 1
                sys.stderr.write(f"{name}: could not be measured: {type(error).__name__}: {error}\n")
    figures.write(CHECKOUT / "build" / "bench.json", taken)
    sys.stdout.write("\n" + figures.table(taken) + "\n\nbuild/bench.json has the same figures.\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
