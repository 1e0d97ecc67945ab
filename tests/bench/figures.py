"""Samples to figures, figures to a table and to ``build/bench.json``.

In charge of numbers and their looks.  Not in charge of what is measured (`tests.bench.measures`).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One line of the table.  ``baseline`` is a median taken in the same run, ``ratio`` is median / baseline."""

    name: str
    unit: str
    median: float
    p99: float
    n: int
    baseline: float | None = None
    ratio: float | None = None


def figure(name: str, unit: str, samples: Sequence[float], baseline: float | None = None) -> Figure:
    """The figure of some samples.  Raises ValueError when there are none."""
    if not samples:
        raise ValueError(f"{name}: nothing was measured")
    ordered = sorted(samples)
    median = statistics.median(ordered)
    p99 = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
    ratio = round(median / baseline, 3) if baseline else None
    rounded = None if baseline is None else round(baseline, 3)
    return Figure(name, unit, round(median, 3), round(p99, 3), len(ordered), rounded, ratio)


def table(figures: Sequence[Figure]) -> str:
    """The figures for a person."""
    head = ("name", "unit", "median", "p99", "n", "baseline", "ratio")
    rows = [[_text(value) for value in asdict(one).values()] for one in figures]
    widths = [max(len(row[column]) for row in [list(head), *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(value: object) -> str:
    return "" if value is None else str(value)


def write(path: Path, figures: Sequence[Figure]) -> None:
    """The figures for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(one) for one in figures], indent=2) + "\n")
