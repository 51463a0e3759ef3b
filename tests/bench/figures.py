"""Figures: what was measured, against what, and whether it is what was wanted.

A figure with a baseline is a ratio. Candidate and baseline are measured in turns, so each round has a ratio of its own,
and the figure is the median of these: what else the machine does meanwhile slows both sides of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

PER_HUNDRED = 100
_MANY = 100  # from here on, decimals of a ratio or a rate say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is wanted: a figure of `at_least` so much, and better `aim`; or one `below` so much."""

    at_least: float | None = None
    aim: float | None = None
    below: float | None = None

    def is_met(self, value: float) -> bool:
        """Tell whether a figure is good enough."""
        if self.below is not None:
            return value < self.below
        return self.at_least is None or value >= self.at_least

    def __str__(self) -> str:
        """As in the table."""
        if self.below is not None:
            return f"below {number(self.below)}"
        aim = "" if self.aim is None else f", aim {number(self.aim)}"
        return f"at least {number(self.at_least or 0)}{aim}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What was measured in each round: of the candidate, and of its baseline if it has one, in the same order."""

    name: str
    unit: str
    runs: Sequence[float]
    baseline: str = ""
    baseline_runs: Sequence[float] = ()
    target: Target | None = None
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """The candidate's part of its baseline, round by round; none without a baseline."""
        return [run / against for run, against in zip(self.runs, self.baseline_runs, strict=bool(self.baseline))]

    @property
    def value(self) -> float:
        """What is held against the target."""
        if self.baseline:
            return median(self.ratios)
        # A limit is one for every run.
        return max(self.runs) if self.target is not None and self.target.below is not None else median(self.runs)

    @property
    def is_met(self) -> bool | None:
        """Whether it is what was wanted; None where it is for information."""
        return None if self.target is None else self.target.is_met(self.value)

    def as_json(self) -> dict[str, Any]:
        """Return it for the JSON file, round by round."""
        return {
            "name": self.name,
            "unit": self.unit,
            "runs": list(self.runs),
            "baseline": self.baseline or None,
            "baseline_runs": list(self.baseline_runs),
            "ratios": self.ratios,
            "value": self.value,
            "target": None if self.target is None else str(self.target),
            "is_met": self.is_met,
            "note": self.note,
        }


def table_of(figures: Sequence[Figure]) -> Table:
    """Return the table that is printed."""
    table = Table("figure", "measured", "baseline", "ratio (min..max)", "target", "met", title="Medians of all rounds")
    for figure in figures:
        baseline = f"{_rate(median(figure.baseline_runs), figure.unit)} {figure.baseline}" if figure.baseline else ""
        met = {None: "", True: "yes", False: "NO"}[figure.is_met]
        table.add_row(
            f"{figure.name}\n  {figure.note}" if figure.note else figure.name,
            _rate(median(figure.runs) if figure.baseline else figure.value, figure.unit),
            baseline,
            _with_spread(figure.ratios),
            "" if figure.target is None else str(figure.target),
            met,
        )
    return table


def _with_spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    return f"{number(median(ratios))} ({number(min(ratios))}..{number(max(ratios))})"


def _rate(value: float, unit: str) -> str:
    return f"{number(value)} {unit}"


def number(value: float) -> str:
    """Write a figure with as many digits as say something."""
    return f"{value:,.0f}" if value >= _MANY or value == int(value) else f"{value:,.3g}"


def percentile(ascending: Sequence[int], percent: int) -> int:
    """Return the smallest value that so many percent of all do not exceed (nearest rank); of none, 0."""
    if not ascending:
        return 0
    rank = -(-len(ascending) * percent // PER_HUNDRED)
    return ascending[max(rank, 1) - 1]
