"""Samples to figures, figures to a table and to ``build/bench.json``.

In charge of numbers and their looks.  Not in charge of what is measured.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One line of the table.  ``baseline`` is a median taken in the same run, ``ratio`` is median / baseline.
    ``error``: why there are no numbers.  ``absent``: why there need not be any.  ``cpu``: percent of one processor by
    part of the installation meanwhile."""

    name: str
    unit: str
    median: float | None
    p99: float | None
    n: int
    baseline: float | None = None
    ratio: float | None = None
    error: str | None = None
    absent: str | None = None
    cpu: Mapping[str, float] | None = None

    def beside(self, baseline: float) -> Figure:
        """The same with a baseline."""
        ratio = round(self.median / baseline, 3) if self.median is not None and baseline else None
        return replace(self, baseline=round(baseline, 3), ratio=ratio)

    def with_cpu(self, shares: Mapping[str, float]) -> Figure:
        """The same with who used the processors."""
        return replace(self, cpu=dict(shares))


def figure(name: str, unit: str, samples: Sequence[float], baseline: float | None = None) -> Figure:
    """The figure of some samples.  Raises ValueError when there are none."""
    if not samples:
        raise ValueError(f"{name}: nothing was measured")
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
    found = Figure(name, unit, round(statistics.median(ordered), 3), round(p99, 3), len(ordered))
    return found if baseline is None else found.beside(baseline)


def failed(name: str, error: str) -> Figure:
    """The line of something that could not be measured."""
    return Figure(name, "", None, None, 0, error=error)


def absent(name: str, unit: str, why: str) -> Figure:
    """The line of something that is not to be had on this machine, which is no failure."""
    return Figure(name, unit, None, None, 0, absent=why)


_COLUMNS = ("name", "unit", "median", "p99", "n", "baseline", "ratio")


def table(figures: Sequence[Figure]) -> str:
    """The figures for a person, then who used the processors, then what could not be measured."""
    rows = [[_text(asdict(one)[column]) for column in _COLUMNS] for one in figures]
    widths = [max(len(row[column]) for row in [list(_COLUMNS), *rows]) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [_COLUMNS, *rows]
    ]
    lines.insert(1, "-" * len(lines[0]))
    if busy := [one for one in figures if one.cpu]:
        lines += ["", "percent of one processor meanwhile:"]
        lines += [f"  {one.name}: {', '.join(f'{n} {v:g}' for n, v in (one.cpu or {}).items())}" for one in busy]
    if broken := [one for one in figures if one.error]:
        lines += ["", "could not be measured:"] + [f"  {one.name}: {one.error}" for one in broken]
    if missing := [one for one in figures if one.absent]:
        lines += ["", "not here:"] + [f"  {one.name}: {one.absent}" for one in missing]
    return "\n".join(lines)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def write(path: Path, figures: Sequence[Figure], keep: bool) -> None:
    """The figures for a program.  With ``keep`` the rows of other names that the file has already stay in it."""
    rows = [_row(one) for one in figures]
    if keep:
        fresh = {row["name"]: row for row in rows}
        rows = [fresh.pop(row["name"], row) for row in _known(path)] + list(fresh.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(rows, indent=2) + "\n")
    whole.rename(path)


def _row(one: Figure) -> dict[str, Any]:
    row = asdict(one)
    for name in ("error", "absent", "cpu"):
        if row[name] is None:
            del row[name]
    return row


def _known(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [row for row in rows if isinstance(row, dict) and "name" in row] if isinstance(rows, list) else []
