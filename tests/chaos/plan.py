"""What a run will do, from its seed alone: the faults with their times, and the commands each slot runs in turn.

In charge of choosing. Not in charge of finding a victim's pid (`faults`) or of running anything (`drive`). The same
seed, length and number of commands give the same plan on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.chaos import writer


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault. `apart`: seconds between two of this group; `lasts`: how long it is kept up (0: a kill)."""

    weight: int
    group: str
    apart: float
    lasts: tuple[float, float] = (0.0, 0.0)


KINDS: dict[str, Kind] = {
    "kill worker": Kind(4, "worker", 4),
    "kill watcher": Kind(4, "watcher", 2),
    "kill hostd": Kind(4, "hostd", 2),
    "kill web": Kind(3, "web", 12),
    "kill web worker": Kind(3, "web", 12),
    "kill web master": Kind(1, "web", 12),
    "kill sshd": Kind(2, "sshd", 2),
    "kill ssh connection": Kind(4, "connection", 0.5),
    "kill beat": Kind(1, "beat", 5),
    "kill redis": Kind(2, "redis", 4),
    "kill postgres": Kind(1, "postgres", 12),
    "restart postgres": Kind(1, "postgres", 12),
    "kill postgres backend": Kind(1, "postgres", 12),
    "kill s3": Kind(1, "s3", 6),
    "kill keeper": Kind(3, "keeper", 1),
    "kill spawner": Kind(2, "spawner", 1),
    "kill zygote": Kind(1, "zygote", 8),
    "kill maker": Kind(1, "maker", 3),
    "flush redis": Kind(2, "flush", 1),
    "stop worker": Kind(1, "worker", 4),
    "stop watcher": Kind(1, "watcher", 2),
    "stop web": Kind(1, "web", 12),
    "stop hostd": Kind(1, "hostd", 2),
    "freeze worker": Kind(2, "worker", 4, (3, 14)),
    "freeze watcher": Kind(1, "watcher", 2, (2, 9)),
    "freeze hostd": Kind(1, "hostd", 2, (1, 13)),
    "freeze web": Kind(1, "web", 12, (1, 6)),
    "freeze redis": Kind(1, "redis", 4, (1, 5)),
    "freeze keeper": Kind(1, "keeper", 1, (1, 5)),
    "freeze zygote": Kind(1, "zygote", 8, (1, 5)),
    "freeze postgres": Kind(1, "postgres", 12, (1, 6)),
    "freeze s3": Kind(1, "s3", 6, (1, 8)),
    "freeze ssh connection": Kind(2, "connection", 0.5, (1, 9)),
    "cut ssh": Kind(2, "cut", 8, (1, 15)),
    "cut redis": Kind(1, "redis", 4, (1, 6)),
    "cut s3": Kind(1, "s3", 6, (1, 8)),
}
#: A keeper that dies while there is no zygote to bear its successor takes what runs with it, truthfully lost: not what
#: this is about, so the two are kept this many seconds apart.
ZYGOTE_APART = 5.0
QUIET_FIRST, QUIET_LAST = 2.0, 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """`at`: seconds after the start; `pick`: which of several candidates, 0..1; `lasts`: seconds."""

    at: float
    kind: str
    pick: float
    lasts: float


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """All that decides what a run does. `every`: seconds between two faults on average, before those are left out
    that would come too soon after one of their group; `only`: the kinds of faults, all when empty."""

    seed: int
    seconds: float = 60.0
    commands: int = 100
    boxes: int = 5
    every: float = 1.3
    only: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f", only {', '.join(self.only)}" if self.only else ""
        return (
            f"seed {self.seed}, {self.seconds:g} s, {self.commands} commands in {self.boxes} devboxes,"
            f" a fault every {self.every:g} s{more}"
        )


def faults(plan: Plan) -> list[Fault]:
    """The faults of a run in order."""
    rng = random.Random(f"faults {plan.seed}")
    names = [name for name in KINDS if not plan.only or name in plan.only]
    seconds = plan.seconds
    weights = [KINDS[name].weight for name in names]
    found: list[Fault] = []
    busy: dict[str, float] = {}
    at = QUIET_FIRST
    while (at := at + rng.expovariate(1 / plan.every)) < seconds - QUIET_LAST:
        name = rng.choices(names, weights)[0]
        kind = KINDS[name]
        lasts = min(rng.uniform(*kind.lasts), max(0.0, seconds - at)) if kind.lasts[1] else 0.0
        pick = rng.random()
        if at < busy.get(kind.group, 0.0):
            continue
        busy[kind.group] = at + lasts + kind.apart
        if kind.group == "zygote":
            busy["keeper"] = max(busy.get("keeper", 0.0), at + ZYGOTE_APART)
        if kind.group == "keeper":
            busy["zygote"] = max(busy.get("zygote", 0.0), at + lasts + ZYGOTE_APART)
        found.append(Fault(round(at, 3), name, pick, round(lasts, 3)))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One command: `count` lines of about `size` bytes, one each `gap` seconds, each `every`-th on stderr as well.

    `ending`: exit | signal | child (exits, and leaves one behind) | stay (until it is killed) | echo (its input) |
    hog (takes more memory than its devbox has).
    `how` its client hears of it: follow | poll | sync | execute. `after`: seconds until it is killed.
    `shell`: the named shell that it is the `place`-th command of.
    """

    name: str
    box: int
    count: int
    size: int
    gap: float
    every: int
    binary: bool
    ending: str
    code: int
    how: str
    after: float = 0.0
    shell: str = ""
    place: int = 0

    @property
    def command(self) -> str:
        """The text to run. In a shell it looks first whether the one before it has left its mark there."""
        if not self.shell:
            return f"exec {self._python}"
        lost = f'test "${{PLACE:-0}}" = {self.place - 1} || echo "the shell was at ${{PLACE:-0}}" >&2'
        return f"{lost}; PLACE={self.place}; {self._python}"

    @property
    def _python(self) -> str:
        fields = (self.name, self.count, self.size, self.gap, self.every, int(self.binary), self.ending, self.code)
        return f"python3 -SIc {_source()} {writer.MARK} {' '.join(str(field) for field in fields)}"

    @property
    def exit_status(self) -> int:
        """What it ends with when nobody kills it."""
        if self.ending == "hog":
            return 137
        return 128 + self.code if self.ending == "signal" else self.code

    def output(self, stream: str) -> bytes:
        """All that it writes on stdout or stderr when nobody kills it."""
        return writer.expected(self.name, stream[3], self.count, self.size, self.every, self.binary)


@cache
def _source() -> str:
    return shlex.quote(Path(writer.__file__).read_text())


SIGNALS = (6, 9, 10, 11, 15)


def jobs(plan: Plan, slot: int) -> Iterator[Job]:
    """What a slot runs, one after the other, without end. None takes much longer than a third of the run."""
    rng = random.Random(f"slot {plan.seed} {slot}")
    longest = max(4.0, min(30.0, plan.seconds / 3))
    number = 0
    while True:
        number += 1
        name, box = f"w{slot}.{number}", rng.randrange(plan.boxes)
        how = rng.choices(("follow", "poll", "sync", "execute"), (60, 24, 8, 8))[0]
        code = rng.choice((0, 0, 0, 1, 3, 42, 127, 255))
        every = rng.choice((0, 1, 2, 3, 10))
        shape = rng.choices(
            ("slow", "burst", "large", "huge", "binary", "quick", "signal", "child", "killed", "echo", "hog"),
            (30, 12, 12, 1, 12, 10, 8, 4, 8, 6, 2),
        )[0]
        takes = rng.uniform(2.0, longest)
        job = Job(name, box, 0, 0, 0.0, every, False, "exit", code, how)
        if shape == "slow":
            count = rng.randrange(5, 60)
            job = dataclasses.replace(job, count=count, size=rng.randrange(0, 400), gap=round(takes / count, 4))
        elif shape == "burst":
            job = dataclasses.replace(job, count=rng.randrange(200, 2500), size=rng.randrange(20, 300))
        elif shape == "large":
            count = rng.randrange(20, 120)
            job = dataclasses.replace(job, count=count, size=rng.randrange(4000, 20000), gap=round(takes / count, 4))
        elif shape == "huge":
            job = dataclasses.replace(job, count=300, size=60000, gap=round(takes / 300, 4), every=10, how="follow")
        elif shape == "binary":
            count = rng.randrange(5, 60)
            size = rng.randrange(100, 5000)
            job = dataclasses.replace(job, count=count, size=size, gap=round(takes / count, 4), binary=True)
        elif shape == "quick":
            job = dataclasses.replace(job, count=rng.randrange(0, 3), size=30)
        elif shape == "signal":
            count, code = rng.randrange(1, 20), rng.choice(SIGNALS)
            job = dataclasses.replace(job, count=count, size=80, gap=0.05, ending="signal", code=code)
        elif shape == "hog":
            job = dataclasses.replace(job, count=rng.randrange(1, 10), size=80, gap=0.05, ending="hog")
        elif shape == "child":
            job = dataclasses.replace(job, count=rng.randrange(1, 20), size=80, gap=0.05, ending="child")
        elif shape == "killed":
            how = rng.choice(("follow", "poll"))
            after = round(rng.uniform(0.0, takes), 3)
            job = dataclasses.replace(
                job, count=2000, size=60, gap=0.1, every=2, ending="stay", code=0, how=how, after=after
            )
        else:
            count = rng.randrange(3, 20)
            how = rng.choice(("follow", "poll"))
            job = dataclasses.replace(
                job, count=count, size=0, gap=round(takes / count, 4), every=0, ending="echo", how=how
            )
        if is_shell(slot):
            # Not by a signal: bash would then say so on stderr.
            job = dataclasses.replace(
                job, box=slot % plan.boxes, ending="exit", how=rng.choice(("follow", "poll")), after=0.0,
                shell=f"shell-{slot}", place=number, count=min(job.count, 300),
            )  # fmt: skip
        yield job


def is_shell(slot: int) -> bool:
    """Whether a slot runs its commands in a named shell of its own."""
    return slot % 8 == 7


def digest(plan: Plan) -> str:
    """Of the whole plan, so that two runs can be seen to have had the same."""
    text = repr(faults(plan))
    for slot in range(plan.commands):
        text += repr(list(itertools.islice(jobs(plan, slot), 20)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
