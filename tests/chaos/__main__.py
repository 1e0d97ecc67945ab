"""``python -m tests.chaos [--seed N] [--seconds N] [--commands N] …``: one run on a throwaway installation.

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

POOL_GB = 5


def parse(argv: list[str] | None = None) -> plan.Plan:
    """Exits with status 2 for arguments that make no sense."""
    usual = plan.Plan(0)
    parser = argparse.ArgumentParser(prog="make chaos", description="Everything is killed while much goes on.")
    parser.add_argument("--seed", type=int, default=None, help="of the plan; a random one by default")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="how long faults are made (%(default)g)")
    parser.add_argument("--commands", type=int, default=usual.commands, help="commands at once (%(default)s)")
    parser.add_argument("--boxes", type=int, default=usual.boxes, help="devboxes they run in (%(default)s)")
    parser.add_argument("--every", type=float, default=usual.every, help="seconds between faults (%(default)g)")
    parser.add_argument("--only", action="append", default=[], choices=sorted(plan.KINDS), help="only such faults")
    given = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1, 1 << 31) if given.seed is None else given.seed
    return plan.Plan(seed, given.seconds, given.commands, given.boxes, given.every, tuple(given.only))


def summary(run: Run) -> str:
    """What was done and seen, in some lines."""
    struck = Counter(kind for _, kind, _, _ in run.striker.done)
    out = [until - since for since, until in run.outages]
    written = sum(size for command in run.commands for _, size in command.stored.values())
    lines = [
        f"faults      {sum(struck.values())}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(struck.items())),
        f"commands    {len(run.commands)} in {len(run.every_box)} devboxes, {written / (1 << 20):.1f} MiB of output",
        f"connections {run.caller.cuts} cut under a call or a stream",
        "answers     " + ", ".join(f"{count} × {status}" for status, count in sorted(run.caller.statuses.items())),
        f"outages     {len(out)}, {sum(out):.1f} s; the longest {max(out, default=0.0):.1f} s",
    ]
    late = sorted((command for command in run.commands if not command.job.name.startswith("c")), key=lambda c: c.late)
    if late:
        lines.append(
            f"late        {late[len(late) // 2].late:.1f} s half of the commands, {late[-1].late:.1f} s the latest"
        )
        lines += [f"            {c.late:6.1f} s from {c.began:.1f} to {c.ended:.1f}: {c.title}" for c in late[-4:]]
    most: dict[str, float] = {}
    for name, sample in run.memory.items():
        role = name.split()[0]
        most[role] = max(most.get(role, 0.0), sample.most)
    lines.append("memory      " + ", ".join(f"{role} {size:.0f} MiB" for role, size in sorted(most.items())))
    return "\n".join(lines)


def main() -> int:
    what = parse()
    print(f"chaos: {what}, plan {plan.digest(what)}", flush=True)
    with throwaway(BERTH_POOL_GB=str(POOL_GB)) as target:
        run = Run(Site(target.up, target.base_url, target.key), what)
        began = time.monotonic()
        asyncio.run(check.torment(run))
        print(f"\n{summary(run)}\ntook        {time.monotonic() - began:.0f} s")
        folder = CHECKOUT / "build" / "chaos" / f"seed-{what.seed}"
        evidence.keep(run, folder)
        if run.findings:
            print(f"\n{len(run.findings)} findings with {what}; evidence in {folder}:")
            print("\n".join(run.findings))
            return 1
    print(f"\nall true with {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
