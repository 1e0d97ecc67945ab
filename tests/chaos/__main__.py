"""``python -m tests.chaos [--seed N] [--seconds N] [--commands N]``: one run on a throwaway installation.

Exit status 0 when all was true, 1 for findings (their evidence is kept below build/chaos), 2 when there was no run.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter

from config.state import CHECKOUT
from tests.bench.installation import throwaway
from tests.chaos import check, evidence, plan
from tests.chaos.drive import Run
from tests.chaos.site import Site

BOXES = 5
POOL_GB = 6


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description="Everything is killed while much goes on.")
    parser.add_argument("--seed", type=int, default=None, help="of the plan; a random one by default")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are made (60)")
    parser.add_argument("--commands", type=int, default=100, help="commands at once (100)")
    parser.add_argument("--boxes", type=int, default=BOXES, help=f"devboxes they run in ({BOXES})")
    return parser.parse_args(argv)


def summary(run: Run) -> str:
    """What was done and seen, in some lines."""
    struck = Counter(kind for _, kind, _, _ in run.striker.done)
    written = sum(size for command in run.commands for _, size in command.stored.values())
    lines = [
        f"faults      {sum(struck.values())}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(struck.items())),
        f"commands    {len(run.commands)} in {len(run.every_box)} devboxes, {written / (1 << 20):.1f} MiB of output",
        f"connections {run.caller.cuts} cut under a call or a stream",
        "answers     " + ", ".join(f"{count} × {status}" for status, count in sorted(run.caller.statuses.items())),
        f"outages     {len(run.outages)}, {sum(run.outages):.1f} s; the longest {max(run.outages, default=0.0):.1f} s",
    ]
    most: dict[str, float] = {}
    for name, sample in run.memory.items():
        role = name.split()[0]
        most[role] = max(most.get(role, 0.0), sample.most)
    lines.append("memory      " + ", ".join(f"{role} {size:.0f} MiB" for role, size in sorted(most.items())))
    return "\n".join(lines)


def main() -> int:
    given = parse()
    seed = random.SystemRandom().randrange(1, 1 << 31) if given.seed is None else given.seed
    name = f"seed {seed}, {given.seconds:g} s, {given.commands} commands in {given.boxes} devboxes"
    print(f"chaos: {name}, plan {plan.digest(seed, given.seconds, given.commands, given.boxes)}", flush=True)
    with throwaway(BERTH_POOL_GB=str(POOL_GB)) as target:
        site = Site(target.up.state, target.base_url, target.key, target.up.said)
        run = Run(site, seed, given.seconds, given.commands, given.boxes)
        began = time.monotonic()
        asyncio.run(check.torment(run))
        print(f"\n{summary(run)}\ntook        {time.monotonic() - began:.0f} s")
        if run.findings:
            folder = CHECKOUT / "build" / "chaos" / f"seed-{seed}"
            evidence.keep(run, folder)
            print(f"\n{len(run.findings)} findings with {name}; evidence in {folder}:")
            print("\n".join(run.findings))
            return 1
    print(f"\nall true with {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
